//! The TC egress programs: loaded once, attached to each watched device, their counters and events read.
//!
//! tcx links where the kernel has them (6.6): the kernel removes them with the process, whatever ends it. Elsewhere
//! filters in the clsact qdisc, which stay: see [`crate::source::clsact`]. Knows nothing of what events mean.

use std::{collections::BTreeMap, thread, time::Duration};

use aya::{
    Ebpf, EbpfLoader, Pod, VerifierLogLevel,
    maps::{Array, MapData, MapError, PerCpuArray, PerfEventArray, ProgramArray, RingBuf},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions},
    },
    util::KernelVersion,
};
use aya_log::EbpfLogger;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use vxmon_common::{
    config::{self, Device, Devices, device_flag, legacy, port_flag, skb_access, slot_bits},
    counters::Counters,
};

use super::{
    btf::Layout,
    clsact,
    engine::{Engine, EngineError},
    events::Events,
    object::{self, Object},
    stats,
};
use crate::{
    attribute::story::Awaiting,
    devices::{Role, Watch},
    netlink,
    sandbox::{self, Capability},
};

/// What the daemon could not do with the programs.
#[derive(Debug, thiserror::Error)]
pub enum TcError {
    /// The object, a map or a program was refused.
    #[error("the kernel refused vxmon's eBPF {what}: {reason}")]
    Refused {
        /// Which part.
        what: String,
        /// What the kernel or the loader said, on one line.
        reason: String,
    },
    /// A device could not be attached to.
    #[error("cannot attach to {device}: {reason}")]
    Attach {
        /// The device.
        device: String,
        /// What the kernel said.
        reason: String,
    },
    /// A map could not be read or written.
    #[error("cannot use the eBPF map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// Too many devices.
    #[error("more than {} devices to watch at once; name the ones that matter", config::SLOTS - 1)]
    TooMany,
    /// The events cannot be waited for.
    #[error("cannot wait for events: {0}")]
    Events(std::io::Error),
    /// No number is free for this instance's filters.
    #[error("cannot take a number for this instance of vxmon: {0}")]
    Instance(std::io::Error),
    /// A device's clsact qdisc could not be handled.
    #[error(transparent)]
    Clsact(#[from] clsact::ClsactError),
    /// What others left could not be looked for.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
}

/// How to attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tcx if the kernel has it, else clsact.
    Auto,
    /// tcx links.
    Tcx,
    /// The clsact qdisc.
    Clsact,
}

/// How a device's program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// By a tcx link.
    Tcx,
    /// By a filter in the clsact qdisc.
    Clsact,
}

impl Attachment {
    /// Name in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Which of the two objects it is, and so how events come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// The one with a ring buffer and globals.
    RingBuffer,
    /// The one for kernels before 5.8: [`legacy`].
    Perf,
}

impl Transport {
    /// Name in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RingBuffer => "ringbuf",
            Self::Perf => "perf",
        }
    }

    /// Map of the UDP ports.
    fn ports(self) -> &'static str {
        match self {
            Self::RingBuffer => config::PORTS_MAP,
            Self::Perf => legacy::PORTS_MAP,
        }
    }

    /// Map from interface index to slot.
    fn slots(self) -> &'static str {
        match self {
            Self::RingBuffer => config::SLOTS_MAP,
            Self::Perf => legacy::SLOTS_MAP,
        }
    }

    /// Map of the devices.
    fn devices(self) -> &'static str {
        match self {
            Self::RingBuffer => config::DEVICES_MAP,
            Self::Perf => legacy::DEVICES_MAP,
        }
    }
}

/// The last priority tried for a filter in the clsact qdisc.
const LAST_PRIORITY: u16 = 16;

/// A table of one byte for each 16-bit number: a map with one value.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Table(pub [u8; 1 << 16]);

// SAFETY: bytes, without padding.
unsafe impl Pod for Table {}

/// A watched device.
struct Slot {
    watch: Watch,
    link: Option<SchedClassifierLinkId>,
    attachment: Attachment,
    made_clsact: bool,
}

/// The loaded programs.
pub struct Tc {
    ebpf: Ebpf,
    log: Option<EbpfLogger<&'static dyn log::Log>>,
    hook: Hook,
    transport: Transport,
    instance: Option<clsact::Instance>,
    slots: BTreeMap<u32, Slot>,
    ports: BTreeMap<u16, bool>,
    awaiting: Awaiting,
    metadata: &'static str,
}

fn refused(what: &str, error: &dyn std::error::Error) -> TcError {
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

/// The capability without which maps can no longer be used, if there is one. Where kernel.unprivileged_bpf_disabled is set,
/// before 5.19 (c8644cd0efe7) every bpf(2) needs CAP_BPF, before 5.8 CAP_SYS_ADMIN; from then on only what makes something new.
pub(super) fn for_bpf() -> Option<Capability> {
    let version = KernelVersion::current().unwrap_or(KernelVersion::new(0, 0, 0));
    if version >= KernelVersion::new(5, 19, 0) {
        return None;
    }
    let bpf = version >= KernelVersion::new(5, 8, 0) && sandbox::has(Capability::CAP_BPF);
    Some(if bpf { Capability::CAP_BPF } else { Capability::CAP_SYS_ADMIN })
}

impl Tc {
    /// Loads the programs with these settings.
    pub fn load(layout: &Layout, hook: Hook) -> Result<Self, TcError> {
        // At 0 the verifier drops the program's log lines altogether.
        let log_level = if log::log_enabled!(log::Level::Debug) { aya_log::Level::Debug as u8 } else { 0 };
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global(config::CONFIG, &layout.config, true)
            .override_global(aya_log::LEVEL, &log_level, true)
            .load(Object::new(object::MAIN, layout.cast).bytes())
            .map_err(|error| refused("object", &error))?;
        load_programs(&mut ebpf)?;
        let log = if log_level > 0 {
            Some(EbpfLogger::init(&mut ebpf).map_err(|error| refused("log", &error))?)
        } else {
            None
        };
        let metadata = if layout.config.has_skb != skb_access::NONE { "skb" } else { "none" };
        let mut tc = Self::of(ebpf, hook, Transport::RingBuffer);
        (tc.log, tc.metadata) = (log, metadata);
        Ok(tc)
    }

    /// Loads the programs for kernels before 5.8; of one packet in `sample` the payload is summed.
    pub fn load_legacy(sample: u32, hook: Hook) -> Result<Self, TcError> {
        let mut tc = Self::of(legacy_object()?, hook, Transport::Perf);
        let failed = |source| TcError::Map { map: legacy::SAMPLE_MAP, source };
        tc.array::<u32>(legacy::SAMPLE_MAP)?.set(0, sample, 0).map_err(failed)?;
        Ok(tc)
    }

    fn of(ebpf: Ebpf, hook: Hook, transport: Transport) -> Self {
        Self {
            ebpf,
            log: None,
            hook,
            transport,
            instance: None,
            slots: BTreeMap::new(),
            ports: BTreeMap::new(),
            awaiting: Awaiting::default(),
            metadata: "none",
        }
    }

    fn array<T: Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, T>, TcError> {
        let map = self.ebpf.map_mut(name).ok_or_else(|| missing(name))?;
        Array::try_from(map).map_err(|source| TcError::Map { map: name, source })
    }

    fn link(&mut self, watch: &Watch) -> Result<(SchedClassifierLinkId, Attachment, bool), TcError> {
        let failed = |error: ProgramError| {
            let TcError::Refused { reason, .. } = refused("", &error) else {
                return TcError::TooMany;
            };
            TcError::Attach { device: watch.name.clone(), reason }
        };
        let name = match watch.role {
            Role::Uplink => config::UPLINK_PROGRAM,
            Role::Vxlan => config::VXLAN_PROGRAM,
        };
        // aya attaches by name, and the slot is by index: a device renamed or made anew since the look is not the one.
        if nix::net::if_::if_nametoindex(watch.name.as_str()) != Ok(watch.ifindex) {
            return Err(TcError::Attach { device: watch.name.clone(), reason: "it has just changed".into() });
        }
        if self.hook != Hook::Clsact {
            // First in the chain: what a program ahead decides could end it.
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            match program(&mut self.ebpf, name)?.attach_with_options(&watch.name, TcAttachType::Egress, options) {
                Ok(link) => return Ok((link, Attachment::Tcx, false)),
                Err(error) if self.hook == Hook::Tcx => return Err(failed(error)),
                Err(error) => log::debug!("{}: no tcx: {error}", watch.name),
            }
        }
        let instance = match &self.instance {
            Some(instance) => instance,
            None => self.instance.insert(clsact::Instance::claim().map_err(TcError::Instance)?),
        };
        let made_clsact = clsact::prepare(&watch.name, watch.ifindex)?;
        let handle = instance.handle(made_clsact);
        let program = program(&mut self.ebpf, name)?;
        let mut result = Err(TcError::TooMany);
        // A priority belongs to one kind of filter and one protocol; where others have the first, the next free one.
        for priority in 1..=LAST_PRIORITY {
            let options = NlOptions { priority, handle: handle.into(), ..NlOptions::default() };
            let options = TcAttachOptions::Netlink(options);
            match program.attach_with_options(&watch.name, TcAttachType::Egress, options) {
                Ok(link) => return Ok((link, Attachment::Clsact, made_clsact)),
                Err(error) => result = Err(failed(error)),
            }
        }
        clsact::tidy(&watch.name, watch.ifindex, made_clsact);
        result
    }

    fn slot_counters(&self, slot: u32) -> Result<Counters, TcError> {
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

    fn reset_counters(&mut self, slot: u32) -> Result<(), TcError> {
        let name = config::COUNTERS_MAP;
        let map = self.ebpf.map_mut(name).ok_or_else(|| missing(name))?;
        let failed = |source| TcError::Map { map: name, source };
        let mut counters = PerCpuArray::<_, Counters>::try_from(map).map_err(failed)?;
        let cpus = counters.get(&slot, 0).map_err(failed)?.len();
        let zeros = aya::maps::PerCpuValues::try_from(vec![Counters::default(); cpus])
            .map_err(|error| failed(MapError::IoError(error)))?;
        counters.set(slot, zeros, 0).map_err(failed)
    }

    /// Writes which device has which slot, and what lies on what.
    fn write_tables(&mut self) -> Result<(), TcError> {
        self.write_devices()?;
        let mut table = Box::new(Table([0; 1 << 16]));
        for (slot, Slot { watch, .. }) in &self.slots {
            let bare = if watch.l2 { 0 } else { slot_bits::BARE };
            table.0[usize::from(watch.ifindex as u16)] = *slot as u8 | bare;
        }
        let map = self.transport.slots();
        self.array::<Table>(map)?.set(0, *table, 0).map_err(|source| TcError::Map { map, source })
    }

    /// Writes what the kernel program knows of each device.
    fn write_devices(&mut self) -> Result<(), TcError> {
        let slot_of: BTreeMap<u32, u32> = self.slots.iter().map(|(slot, s)| (s.watch.ifindex, *slot)).collect();
        let mut devices = Devices([Device::default(); config::SLOTS as usize]);
        for (slot, Slot { watch, .. }) in &self.slots {
            let mut above = [0_u64; 2];
            for upper in watch.above.iter().filter_map(|ifindex| slot_of.get(ifindex)) {
                above[(upper / 64) as usize] |= 1 << (upper % 64);
            }
            let has_lower = self.slots.values().any(|other| other.watch.above.contains(&watch.ifindex));
            let follows = match watch.role {
                Role::Uplink => self.awaiting.uplinks,
                Role::Vxlan => self.awaiting.devices.contains(&watch.ifindex),
            };
            let flags =
                if has_lower { device_flag::HAS_LOWER } else { 0 } | if follows { device_flag::FOLLOW } else { 0 };
            if let Some(device) = devices.0.get_mut(*slot as usize) {
                *device = Device { ifindex: watch.ifindex, flags, above };
            }
        }
        let map = self.transport.devices();
        self.array::<Devices>(map)?.set(0, devices, 0).map_err(|source| TcError::Map { map, source })
    }
}

impl Engine for Tc {
    fn metadata(&self) -> &'static str {
        self.metadata
    }

    fn transport(&self) -> Option<&'static str> {
        Some(self.transport.as_str())
    }

    fn keeps(&self) -> Vec<Capability> {
        // For both kinds of attachment, and for questions about conntrack entries.
        let mut keeps = vec![Capability::CAP_NET_ADMIN];
        keeps.extend(for_bpf());
        keeps
    }

    fn events(&mut self) -> Result<Events, EngineError> {
        let name = match self.transport {
            Transport::RingBuffer => config::EVENTS_MAP,
            Transport::Perf => legacy::EVENTS_MAP,
        };
        let map = self.ebpf.take_map(name).ok_or_else(|| missing(name))?;
        let failed = |source| TcError::Map { map: name, source };
        Ok(match self.transport {
            Transport::RingBuffer => Events::of_ring(RingBuf::try_from(map).map_err(failed)?),
            Transport::Perf => Events::of_perf(PerfEventArray::try_from(map).map_err(failed)?),
        }
        .map_err(TcError::Events)?)
    }

    fn set_ports(&mut self, ports: &BTreeMap<u16, bool>) -> Result<(), EngineError> {
        if *ports == self.ports {
            return Ok(());
        }
        let mut table = Box::new(Table([0; 1 << 16]));
        for (port, no_zero_ipv6) in ports {
            let flags = port_flag::TUNNEL | if *no_zero_ipv6 { port_flag::NO_ZERO_IPV6 } else { 0 };
            table.0[usize::from(port.to_be())] = flags;
        }
        let map = self.transport.ports();
        self.array::<Table>(map)?.set(0, *table, 0).map_err(|source| TcError::Map { map, source })?;
        self.ports = ports.clone();
        Ok(())
    }

    fn follow(&mut self, awaiting: &Awaiting) -> Result<(), EngineError> {
        if *awaiting != self.awaiting {
            self.awaiting = awaiting.clone();
            self.write_devices()?;
        }
        Ok(())
    }

    fn watched(&self) -> Vec<&Watch> {
        self.slots.values().map(|slot| &slot.watch).collect()
    }

    fn attach(&mut self, watch: &Watch) -> Result<&'static str, EngineError> {
        let slot = (1..config::SLOTS).find(|slot| !self.slots.contains_key(slot)).ok_or(TcError::TooMany)?;
        let collides = |other: &Watch| other.ifindex as u16 == watch.ifindex as u16;
        if self.watched().into_iter().any(collides) {
            return Err(TcError::Attach {
                device: watch.name.clone(),
                reason: "its index and another watched device's differ by a multiple of 65536".into(),
            }
            .into());
        }
        self.reset_counters(slot)?;
        self.slots
            .insert(slot, Slot { watch: watch.clone(), link: None, attachment: Attachment::Tcx, made_clsact: false });
        let attached = self.write_tables().and_then(|()| self.link(watch));
        match attached {
            Ok((link, attachment, made_clsact)) => {
                if let Some(slot) = self.slots.get_mut(&slot) {
                    slot.link = Some(link);
                    slot.attachment = attachment;
                    slot.made_clsact = made_clsact;
                }
                Ok(attachment.as_str())
            }
            Err(error) => {
                self.slots.remove(&slot);
                self.write_tables()?;
                Err(error.into())
            }
        }
    }

    fn update(&mut self, watch: &Watch) -> Result<(), EngineError> {
        if let Some(slot) = self.slots.values_mut().find(|slot| slot.watch.ifindex == watch.ifindex) {
            slot.watch = watch.clone();
        }
        Ok(self.write_tables()?)
    }

    fn detach(&mut self, ifindex: u32) -> Result<Counters, EngineError> {
        let Some((&slot, _)) = self.slots.iter().find(|(_, slot)| slot.watch.ifindex == ifindex) else {
            return Ok(Counters::default());
        };
        let Some(Slot { watch, link, attachment: _, made_clsact }) = self.slots.remove(&slot) else {
            return Ok(Counters::default());
        };
        if let Some(link) = link {
            let name = match watch.role {
                Role::Uplink => config::UPLINK_PROGRAM,
                Role::Vxlan => config::VXLAN_PROGRAM,
            };
            // A device that has vanished took the attachment with it.
            if let Err(error) = program(&mut self.ebpf, name)?.detach(link) {
                log::debug!("{}: {error}", watch.name);
            }
        }
        clsact::tidy(&watch.name, ifindex, made_clsact);
        self.write_tables()?;
        Ok(self.slot_counters(slot)?)
    }

    fn counters(&self, ifindex: u32) -> Result<Counters, EngineError> {
        match self.slots.iter().find(|(_, slot)| slot.watch.ifindex == ifindex) {
            Some((slot, _)) => Ok(self.slot_counters(*slot)?),
            None => Ok(Counters::default()),
        }
    }

    fn unhooked(&self) -> Vec<Watch> {
        let by_filter = self.slots.values().filter(|slot| slot.attachment == Attachment::Clsact);
        by_filter.filter(|slot| !clsact::holds(slot.watch.ifindex)).map(|slot| slot.watch.clone()).collect()
    }

    fn run_stats(&self) -> Vec<(String, Duration, u64)> {
        stats::of_programs(&self.ebpf)
    }

    fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }
}

impl Drop for Tc {
    fn drop(&mut self) {
        let watched: Vec<u32> = self.slots.values().map(|slot| slot.watch.ifindex).collect();
        for ifindex in watched {
            if let Err(error) = self.detach(ifindex) {
                log::warn!("{error}");
            }
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
