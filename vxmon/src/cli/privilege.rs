//! Does this process have the capabilities that `attach` needs, and is it let use them? Looked up before anything is tried,
//! so that the answer names what is missing.

use anyhow::{Result, bail};
use nix::{errno::Errno, libc};

use super::say;
use crate::source::start::Kind;

/// Numbers in include/uapi/linux/capability.h.
const NET_ADMIN: u8 = 12;
const NET_RAW: u8 = 13;
const SYS_ADMIN: u8 = 21;
const PERFMON: u8 = 38;
const BPF: u8 = 39;

const FILTERED: &str = "attach has the capabilities it needs, but the container's seccomp profile forbids bpf(2): RuntimeDefault \
                        allows it together with CAP_BPF from containerd 1.6.9 and Docker 23 on; elsewhere use seccompProfile \
                        Unconfined, or a Localhost profile that allows bpf";

/// Whether this engine can be started: an error that names what is missing and how to get it. Where packet sockets will do
/// instead of TC programs, what is missing for these.
pub fn check(kind: &Kind) -> Result<Option<String>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let Some(bits) = effective(&status) else {
        return Ok(None); // without /proc the kernel itself will say
    };
    let (for_tc, raw) = (missing(bits), bits & 1 << NET_RAW != 0);
    let filtered = for_tc.is_empty() && is_filtered(&status) && bpf_is_refused();
    let may_tc = || if filtered { bail!(FILTERED) } else { report(&for_tc) };
    let no_tc = match kind {
        Kind::Tc => return may_tc().map(|()| None),
        Kind::Auto if for_tc.is_empty() && !filtered => return Ok(None),
        Kind::Auto if !raw => return may_tc().map(|()| None),
        Kind::Auto if filtered => Some("the container's seccomp profile forbids bpf(2)".to_owned()),
        Kind::Auto => Some(lacking(&for_tc)),
        Kind::PacketSocket if !raw => bail!(
            "packet sockets need CAP_NET_RAW, which is missing: run it as root (sudo vxmon attach), or add it to the \
             container's securityContext.capabilities"
        ),
        Kind::PacketSocket => None,
    };
    if bits & 1 << NET_ADMIN == 0 {
        say("vxmon: without CAP_NET_ADMIN no conntrack entry can be read, so that no cause can be proved");
    }
    Ok(no_tc)
}

/// `CAP_BPF and CAP_PERFMON are missing`.
fn lacking(missing: &[&str]) -> String {
    format!("{} {} missing", missing.join(" and "), if missing.len() == 1 { "is" } else { "are" })
}

/// Whether this process's system calls pass a seccomp filter (proc(5)).
fn is_filtered(status: &str) -> bool {
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

/// Whether bpf(2) is refused before its arguments are looked at. To the kernel itself, a map of type 0 (and so without
/// keys) is an invalid one, whoever asks for it.
fn bpf_is_refused() -> bool {
    const BPF_MAP_CREATE: libc::c_long = 0;
    // SAFETY: no attributes (their size is 0, so the pointer is not followed), and nothing is made.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, std::ptr::null::<u8>(), 0_usize) };
    result == -1 && matches!(Errno::last(), Errno::EPERM | Errno::ENOSYS)
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing(effective: u64) -> Vec<&'static str> {
    let has = |bit: u8| effective & 1 << bit != 0;
    [("CAP_BPF", BPF), ("CAP_PERFMON", PERFMON), ("CAP_NET_ADMIN", NET_ADMIN)]
        .into_iter()
        .filter(|(_, bit)| !has(*bit) && (*bit == NET_ADMIN || !has(SYS_ADMIN)))
        .map(|(name, _)| name)
        .collect()
}

fn report(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "attach needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, of which {}: run it as root (sudo vxmon attach), or add them \
         to the container's securityContext.capabilities (--engine packet-socket needs CAP_NET_RAW only)",
        lacking(missing)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        assert_eq!(missing(0), ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]);
        assert_eq!(missing(1 << SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert_eq!(missing(1 << BPF | 1 << NET_ADMIN), ["CAP_PERFMON"]);
        assert!(missing(u64::MAX).is_empty());
        assert_eq!(effective("Name:\tvxmon\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        assert_eq!(effective("garbage"), None);
        assert!(is_filtered("CapEff:\t0\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!is_filtered("Seccomp:\t0\nSeccomp_filters:\t0\n") && !is_filtered(""));
        let error = report(&["CAP_BPF"]).map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("CAP_BPF is missing") && text.lines().count() == 1));
    }
}
