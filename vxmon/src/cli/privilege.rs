//! Does this process have the capabilities that `attach` needs? Looked up before anything is tried, so that the answer
//! names what is missing.

use anyhow::{Result, bail};

use super::say;
use crate::source::start::Kind;

/// Numbers in include/uapi/linux/capability.h.
const NET_ADMIN: u8 = 12;
const NET_RAW: u8 = 13;
const SYS_ADMIN: u8 = 21;
const PERFMON: u8 = 38;
const BPF: u8 = 39;

/// Whether this engine can be started: an error that names what is missing and how to get it. Where packet sockets will do
/// instead of TC programs, what is missing for these.
pub fn check(kind: &Kind) -> Result<Option<String>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let Some(bits) = effective(&status) else {
        return Ok(None); // without /proc the kernel itself will say
    };
    let (for_tc, raw) = (missing(bits), bits & 1 << NET_RAW != 0);
    let no_tc = match kind {
        Kind::Tc => return report(&for_tc).map(|()| None),
        Kind::Auto if for_tc.is_empty() => return Ok(None),
        Kind::Auto if !raw => return report(&for_tc).map(|()| None),
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
        let error = report(&["CAP_BPF"]).map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("CAP_BPF is missing") && text.lines().count() == 1));
    }
}
