//! The TC programs in the kernel: which of the two objects, loaded, with its maps. What the kernel refuses is said in one line.
//! Knows nothing of devices.

use std::{thread, time::Duration};

use aya::{
    Ebpf, EbpfLoader, Pod, VerifierLogLevel,
    maps::{Array, MapError, PerCpuArray, PerfEventArray, ProgramArray, RingBuf},
    programs::{ProgramError, SchedClassifier},
    util::KernelVersion,
};
use aya_log::EbpfLogger;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use vxmon_common::{
    config::{self, legacy, skb_access},
    counters::Counters,
};

use super::{
    btf::Layout,
    events::Events,
    object::{self, Object},
    stats,
    tc::TcError,
};
use crate::sandbox::{self, Capability};

/// Which of the two objects it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// The one with a ring buffer and globals.
    Modern,
    /// The one for kernels before 5.8: [`legacy`].
    Legacy,
}

impl Generation {
    /// How events come, as events name it.
    pub fn transport(self) -> &'static str {
        match self {
            Self::Modern => "ringbuf",
            Self::Legacy => "perf",
        }
    }

    /// Map of the events.
    fn events(self) -> &'static str {
        match self {
            Self::Modern => config::EVENTS_MAP,
            Self::Legacy => legacy::EVENTS_MAP,
        }
    }

    /// Map of the UDP ports.
    pub fn ports(self) -> &'static str {
        match self {
            Self::Modern => config::PORTS_MAP,
            Self::Legacy => legacy::PORTS_MAP,
        }
    }

    /// Map from interface index to slot.
    pub fn slots(self) -> &'static str {
        match self {
            Self::Modern => config::SLOTS_MAP,
            Self::Legacy => legacy::SLOTS_MAP,
        }
    }

    /// Map of the devices.
    pub fn devices(self) -> &'static str {
        match self {
            Self::Modern => config::DEVICES_MAP,
            Self::Legacy => legacy::DEVICES_MAP,
        }
    }
}

/// A table of one byte for each 16-bit number: a map with one value.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Table(pub [u8; 1 << 16]);

// SAFETY: bytes, without padding.
unsafe impl Pod for Table {}

/// Programs that are loaded.
pub struct Programs {
    ebpf: Ebpf,
    /// Which.
    pub generation: Generation,
    log: Option<EbpfLogger<&'static dyn log::Log>>,
    /// What they read of the skb, as events name it.
    pub metadata: &'static str,
}

impl Programs {
    /// Loads those for kernels from 5.8 on, with these settings, by a new loader.
    pub fn load(layout: &Layout, loader: EbpfLoader<'_>) -> Result<Self, TcError> {
        // At 0 the verifier drops the program's log lines altogether.
        let log_level = if log::log_enabled!(log::Level::Debug) { aya_log::Level::Debug as u8 } else { 0 };
        let object = Object::new(object::MAIN, layout.cast);
        // For as long as what it is told of here.
        let mut loader = loader;
        loader.btf(None).verifier_log_level(VerifierLogLevel::STATS);
        loader.override_global(config::CONFIG, &layout.config, true);
        loader.override_global(aya_log::LEVEL, &log_level, true);
        let mut ebpf = loader.load(object.bytes()).map_err(|error| refused("object", &error))?;
        load_programs(&mut ebpf)?;
        let log = if log_level > 0 {
            Some(EbpfLogger::init(&mut ebpf).map_err(|error| refused("log", &error))?)
        } else {
            None
        };
        let metadata = if layout.config.has_skb != skb_access::NONE { "skb" } else { "none" };
        Ok(Self { ebpf, generation: Generation::Modern, log, metadata })
    }

    /// Loads those for kernels before 5.8; of one packet in `sample` the payload is summed.
    pub fn load_legacy(sample: u32) -> Result<Self, TcError> {
        let mut programs = Self { ebpf: legacy_object()?, generation: Generation::Legacy, log: None, metadata: "none" };
        programs.set(legacy::SAMPLE_MAP, sample)?;
        Ok(programs)
    }

    /// Writes the one value of a map.
    pub fn set<T: Pod>(&mut self, map: &'static str, value: T) -> Result<(), TcError> {
        let failed = |source| TcError::Map { map, source };
        let values = self.ebpf.map_mut(map).ok_or_else(|| missing(map))?;
        Array::<_, T>::try_from(values).and_then(|mut values| values.set(0, value, 0)).map_err(failed)
    }

    /// What was counted for the device with this slot, by all CPUs.
    pub fn counters(&self, slot: u32) -> Result<Counters, TcError> {
        let name = config::COUNTERS_MAP;
        let map = self.ebpf.map(name).ok_or_else(|| missing(name))?;
        let failed = |source| TcError::Map { map: name, source };
        let counters = PerCpuArray::<_, Counters>::try_from(map).map_err(failed)?;
        let mut sum = Counters::default();
        for cpu in counters.get(&slot, 0).map_err(failed)?.iter() {
            sum.add(cpu);
        }
        Ok(sum)
    }

    /// Has them begin at zero.
    pub fn reset_counters(&mut self, slot: u32) -> Result<(), TcError> {
        let name = config::COUNTERS_MAP;
        let map = self.ebpf.map_mut(name).ok_or_else(|| missing(name))?;
        let failed = |source| TcError::Map { map: name, source };
        let mut counters = PerCpuArray::<_, Counters>::try_from(map).map_err(failed)?;
        let cpus = counters.get(&slot, 0).map_err(failed)?.len();
        let zeros = aya::maps::PerCpuValues::try_from(vec![Counters::default(); cpus])
            .map_err(|error| failed(MapError::IoError(error)))?;
        counters.set(slot, zeros, 0).map_err(failed)
    }

    /// The events, once.
    pub fn events(&mut self) -> Result<Events, TcError> {
        let name = self.generation.events();
        let map = self.ebpf.take_map(name).ok_or_else(|| missing(name))?;
        let failed = |source| TcError::Map { map: name, source };
        match self.generation {
            Generation::Modern => Events::of_ring(RingBuf::try_from(map).map_err(failed)?),
            Generation::Legacy => Events::of_perf(PerfEventArray::try_from(map).map_err(failed)?),
        }
        .map_err(TcError::Events)
    }

    /// A program, to be attached.
    pub fn program(&mut self, name: &str) -> Result<&mut SchedClassifier, TcError> {
        program(&mut self.ebpf, name)
    }

    /// Name, time and runs of each program, while the kernel keeps such statistics.
    pub fn run_stats(&self) -> Vec<(String, Duration, u64)> {
        stats::of_programs(&self.ebpf)
    }

    /// Logs what the programs have to say.
    pub fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }
}

/// The object for kernels before 5.8, its programs loaded and its stages in their places, with nothing in its tables.
#[doc(hidden)]
pub fn legacy_object() -> Result<Ebpf, TcError> {
    let mut ebpf = EbpfLoader::new()
        .btf(None)
        .verifier_log_level(VerifierLogLevel::STATS)
        .load(object::LEGACY)
        .map_err(|error| refused("object", &error))?;
    load_programs(&mut ebpf)?;
    let mut programs = Vec::new();
    for name in legacy::STAGES {
        let fd = program(&mut ebpf, name)?.fd().and_then(|fd| Ok(fd.try_clone()?));
        programs.push(fd.map_err(|error| refused(&format!("program {name}"), &error))?);
    }
    // The map stays in the object: the kernel empties it when its last descriptor is closed (prog_array_map_clear(),
    // kernel/bpf/arraymap.c).
    let map = ebpf.map_mut(legacy::STAGES_MAP).ok_or_else(|| missing(legacy::STAGES_MAP))?;
    let failed = |source| TcError::Map { map: legacy::STAGES_MAP, source };
    let mut stages = ProgramArray::try_from(map).map_err(failed)?;
    for (index, program) in (0..).zip(&programs) {
        stages.set(index, program, 0).map_err(failed)?;
    }
    Ok(ebpf)
}

/// Loads all programs at once: the verifier takes most of the time until vxmon watches, and works for each on a CPU of its
/// own (`bpf_check()` in kernel/bpf/verifier.c takes its lock only without CAP_BPF).
fn load_programs(ebpf: &mut Ebpf) -> Result<(), TcError> {
    thread::scope(|scope| {
        let loads: Vec<_> = ebpf
            .programs_mut()
            .map(|(name, program)| {
                let what = format!("program {name}");
                scope.spawn(move || {
                    let program: Result<&mut SchedClassifier, ProgramError> = program.try_into();
                    program.and_then(SchedClassifier::load).map_err(|error| refused(&what, &error))
                })
            })
            .collect();
        loads.into_iter().try_for_each(|load| load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn missing(name: &'static str) -> TcError {
    TcError::Refused { what: format!("map {name}"), reason: "it is not in the object".into() }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, TcError> {
    let not_there = || TcError::Refused { what: format!("program {name}"), reason: "it is not in the object".into() };
    let program = ebpf.program_mut(name).ok_or_else(not_there)?;
    program.try_into().map_err(|error: ProgramError| refused(&format!("program {name}"), &error))
}

/// What was refused, and why, on one line.
pub fn refused(what: &str, error: &dyn std::error::Error) -> TcError {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let text = error.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
        }
        source = error.source();
    }
    let first_line = reason.lines().next().unwrap_or_default().to_owned();
    let reason = reason
        .lines()
        .rfind(|line| line.contains("invalid") || line.contains("unknown"))
        .map_or_else(|| first_line.clone(), |verifier| format!("{first_line} ({})", verifier.trim()));
    let reason = match memlock(&reason) {
        Some(why) => format!("{reason}: {why}"),
        None => reason,
    };
    TcError::Refused { what: what.to_owned(), reason }
}

/// What is behind a refusal, if the kernel still charges maps to RLIMIT_MEMLOCK, which the loader raises if it may.
fn memlock(reason: &str) -> Option<String> {
    // Only the words hang on the version.
    let charges = KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(5, 11, 0));
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    memlock_is_why(reason, charges, limit, sandbox::has(Capability::CAP_SYS_RESOURCE))
}

fn memlock_is_why(reason: &str, charges: bool, limit: u64, may_raise: bool) -> Option<String> {
    let refused = reason.contains("Operation not permitted");
    (refused && charges && !may_raise && limit != RLIM_INFINITY).then(|| {
        format!(
            "maps are charged to RLIMIT_MEMLOCK here, which is {} KiB, and CAP_SYS_RESOURCE to raise it is missing",
            limit >> 10
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_locked_memory_is_named_where_it_is_the_reason() {
        let reason = "failed to create map `FLOWS`: Operation not permitted (os error 1)";
        let why = memlock_is_why(reason, true, 64 << 10, false);
        assert!(why.is_some_and(|why| why.contains("is 64 KiB") && why.contains("CAP_SYS_RESOURCE")));
        for (reason, charges, limit, may_raise) in [
            (reason, false, 64 << 10, false),
            (reason, true, RLIM_INFINITY, false),
            (reason, true, 64 << 10, true),
            ("Invalid argument (os error 22)", true, 64 << 10, false),
        ] {
            assert_eq!(memlock_is_why(reason, charges, limit, may_raise), None);
        }
    }
}
