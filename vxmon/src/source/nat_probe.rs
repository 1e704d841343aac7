//! NAT as it is set up: two probes on `nf_nat_setup_info()`, an object of their own, and what they noted. It is extra evidence:
//! where it cannot be had, that is said, and everything else goes on without.
//!
//! kprobes, not fentry: their function is in a module as a rule, whose BTF only CAP_SYS_ADMIN may open, and of aya's tracing
//! programs none takes a module's function. Never says more than was seen: a note counts for the connection with the same
//! ends before *and* after NAT, and only if no run of the probes is known to have been left out since.

use std::{
    collections::BTreeMap,
    fmt,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Array, HashMap, Map, MapData, MapError},
    programs::{KProbe, ProgramError},
};
use vxmon_common::{
    conntrack::Tuple,
    translation::{
        CONFIG, ENTRY_PROGRAM, FUNCTION, LOST_MAP, PORTS_MAP, RETURN_PROGRAM, TRANSLATIONS_MAP, Translation,
    },
};

use super::{
    btf::{self, LayoutError},
    object,
    programs::Table,
    stats,
    tc::for_bpf,
};
use crate::{attribute::Observer, clock::monotonic, sandbox::Capability};

/// Where the kernel says that it has kprobes for programs (4.17).
const PMU: &str = "/sys/bus/event_source/devices/kprobe/type";
/// Who may watch the kernel by `perf_event_open(2)`, of which kprobes are a part.
const PARANOID: &str = "/proc/sys/kernel/perf_event_paranoid";
/// The calling thread's network namespace.
const NETNS: &str = "/proc/thread-self/ns/net";

/// Why NAT cannot be seen as it is set up.
#[derive(Debug, thiserror::Error)]
pub enum NatProbeError {
    /// Not wanted.
    #[error("not used, as asked for")]
    Off,
    /// No kprobes.
    #[error("this kernel has no kprobes for programs ({PMU}: no such file; CONFIG_KPROBE_EVENTS)")]
    NoKprobes,
    /// The namespace has no number.
    #[error("cannot look at {NETNS}: {0}")]
    Namespace(std::io::Error),
    /// Structures cannot be read.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The function is not there.
    #[error("{FUNCTION}() is not in this kernel: the module nf_nat is not loaded, or was not when vxmon started")]
    NoFunction,
    /// Kprobes are for others.
    #[error(
        "the kernel refuses kprobes (kernel.perf_event_paranoid is {paranoid}): they need CAP_PERFMON, and CAP_SYS_ADMIN on kernels \
         such as Debian's where that is more than 2"
    )]
    Forbidden {
        /// The setting as it is.
        paranoid: String,
    },
    /// The object, a map or a program was refused.
    #[error("the kernel refused the probe's {what}: {reason}")]
    Refused {
        /// Which part.
        what: &'static str,
        /// What the kernel or the loader said, on one line.
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
}

/// An error and its causes on one line, with the verifier's last words left out.
fn refused(what: &'static str, error: &dyn std::error::Error) -> NatProbeError {
    let causes = std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string);
    let mut reason = String::new();
    for text in causes.filter_map(|text| text.lines().next().map(str::to_owned)) {
        if !reason.contains(&text) {
            reason = if reason.is_empty() { text } else { format!("{reason}: {text}") };
        }
    }
    NatProbeError::Refused { what, reason }
}

fn missing(what: &'static str) -> NatProbeError {
    NatProbeError::Refused { what, reason: "it is not in the object".to_owned() }
}

/// The probes. Dropped, or with the process, they are gone.
pub struct NatProbe {
    ebpf: Ebpf,
    ports: Vec<u16>,
}

impl NatProbe {
    /// Sets the probes for this thread's network namespace; and what they will have noted.
    pub fn start() -> Result<(Self, Translations), NatProbeError> {
        if !Path::new(PMU).exists() {
            return Err(NatProbeError::NoKprobes);
        }
        let netns = std::fs::metadata(NETNS).map_err(NatProbeError::Namespace)?.ino();
        // Numbers of namespaces are 32 bits wide in the kernel (struct ns_common).
        let config = btf::translation(netns as u32)?;
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global(CONFIG, &config, true)
            .load(object::NAT)
            .map_err(|error| refused("object", &error))?;
        // The return first: a call that is not seen to return makes no note.
        for name in [RETURN_PROGRAM, ENTRY_PROGRAM] {
            let program = ebpf.program_mut(name).ok_or_else(|| missing(name))?;
            let program: &mut KProbe = program.try_into().map_err(|error: ProgramError| refused(name, &error))?;
            program.load().map_err(|error| refused(name, &error))?;
            program.attach(FUNCTION, 0).map_err(|error| match &error {
                ProgramError::SyscallError(syscall) if syscall.io_error.kind() == std::io::ErrorKind::NotFound => {
                    NatProbeError::NoFunction
                }
                ProgramError::SyscallError(syscall)
                    if syscall.io_error.kind() == std::io::ErrorKind::PermissionDenied =>
                {
                    let paranoid = std::fs::read_to_string(PARANOID).unwrap_or_default();
                    NatProbeError::Forbidden { paranoid: paranoid.trim().to_owned() }
                }
                _ => refused(name, &error),
            })?;
        }
        let translations = Translations::of(&mut ebpf)?;
        Ok((Self { ebpf, ports: Vec::new() }, translations))
    }

    /// The capabilities without which notes cannot be read.
    pub fn keeps() -> Vec<Capability> {
        for_bpf().into_iter().collect()
    }

    /// Sets the UDP ports of tunnel packets, host byte order: the NAT of others is not noted.
    pub fn set_ports(&mut self, ports: &BTreeMap<u16, bool>) -> Result<(), NatProbeError> {
        if ports.keys().eq(&self.ports) {
            return Ok(());
        }
        let mut table = Box::new(Table([0; 1 << 16]));
        for port in ports.keys() {
            table.0[usize::from(port.to_be())] = 1;
        }
        let failed = |source| NatProbeError::Map { map: PORTS_MAP, source };
        let map = self.ebpf.map_mut(PORTS_MAP).ok_or_else(|| missing(PORTS_MAP))?;
        Array::try_from(map).and_then(|mut map| map.set(0, *table, 0)).map_err(failed)?;
        self.ports = ports.keys().copied().collect();
        Ok(())
    }

    /// As [`crate::source::engine::Engine::run_stats`].
    pub fn run_stats(&self) -> Vec<(String, Duration, u64)> {
        stats::of_programs(&self.ebpf)
    }
}

/// What the probes noted.
pub struct Translations {
    notes: HashMap<MapData, Tuple, Translation>,
    lost: Array<MapData, u64>,
    programs: Vec<OwnedFd>,
    /// Runs that were left out and notes that could not be made, so far.
    missed: u64,
    /// Notes made before that (CLOCK_MONOTONIC, ns) may be of a connection that has a successor since.
    since: u64,
}

impl fmt::Debug for Translations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Translations").field("missed", &self.missed).field("since", &self.since).finish_non_exhaustive()
    }
}

impl Translations {
    fn of(ebpf: &mut Ebpf) -> Result<Self, NatProbeError> {
        let mut take =
            |name: &'static str| -> Result<Map, NatProbeError> { ebpf.take_map(name).ok_or_else(|| missing(name)) };
        let notes = HashMap::try_from(take(TRANSLATIONS_MAP)?)
            .map_err(|source| NatProbeError::Map { map: TRANSLATIONS_MAP, source })?;
        let lost = Array::try_from(take(LOST_MAP)?).map_err(|source| NatProbeError::Map { map: LOST_MAP, source })?;
        let programs = ebpf.programs().filter_map(|(_, program)| program.fd().ok()?.as_fd().try_clone_to_owned().ok());
        Ok(Self { notes, lost, programs: programs.collect(), missed: 0, since: 0 })
    }

    /// How many runs were left out and notes could not be made; `None`: the kernel does not say.
    fn missed(&self) -> Option<u64> {
        let lost = self.lost.get(&0, 0).ok()?;
        // Programs are left out where one of this kind interrupts another; counted for kprobes since 6.7.
        let left_out = self.programs.iter().filter_map(|program| stats::misses(program.as_fd()));
        Some(left_out.fold(lost, u64::wrapping_add))
    }
}

impl Observer for Translations {
    fn range_flags(&mut self, orig: &Tuple, reply: &Tuple) -> Option<u32> {
        let note = self.notes.get(&Tuple { direction: 0, ..*orig }, 0).ok()?;
        // After the note was read: what was left out before that counts.
        let missed = self.missed()?;
        if missed != self.missed {
            log::debug!("of NAT's set-up {} runs were not seen", missed.wrapping_sub(self.missed));
            (self.missed, self.since) = (missed, monotonic()?);
        }
        counts(&note, reply, self.since).then_some(note.flags)
    }
}

/// Whether a note is of the connection with this reply tuple, whose original one it was found by.
fn counts(note: &Translation, reply: &Tuple, since: u64) -> bool {
    let Tuple { src, sport, family, dst, dport, proto, direction: _ } = note.reply;
    let noted = (src, sport, family, dst, dport, proto);
    // Entries are looked up in the default zone; elsewhere there may be another with the same tuples.
    note.zone == 0
        && note.time_ns >= since
        && noted == (reply.src, reply.sport, reply.family, reply.dst, reply.dport, reply.proto)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> Tuple {
        let src = [u32::from_ne_bytes([10, 0, 100, 15]), 0, 0, 0];
        let dst = [u32::from_ne_bytes([10, 0, 100, 3]), 0, 0, 0];
        Tuple { src, sport: 8472_u16.to_be(), family: 2, dst, dport: 33246_u16.to_be(), proto: 17, direction: 1 }
    }

    #[test]
    fn a_note_is_of_one_connection_only() {
        let note = Translation { reply: reply(), time_ns: 100, flags: 0x11, zone: 0 };
        assert!(counts(&note, &reply(), 0));
        // Netlink does not tell directions apart.
        assert!(counts(&note, &Tuple { direction: 0, ..reply() }, 100));
        // Another connection between the same ends had another port, or another address.
        assert!(!counts(&note, &Tuple { dport: 33247_u16.to_be(), ..reply() }, 0));
        assert!(!counts(&note, &Tuple { dst: [1, 0, 0, 0], ..reply() }, 0));
        assert!(!counts(&note, &Tuple { proto: 6, ..reply() }, 0));
        // In another zone there may be another one.
        assert!(!counts(&Translation { zone: 1, ..note }, &reply(), 0));
        // Something was not seen since.
        assert!(!counts(&note, &reply(), 101));
    }

    #[test]
    fn a_refusal_is_one_line() {
        let error = std::io::Error::other(std::io::Error::other("inner\nverifier's log"));
        let text = refused("object", &error).to_string();
        assert_eq!(text, "the kernel refused the probe's object: inner");
    }
}
