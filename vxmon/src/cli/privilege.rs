//! Does this process have the capabilities that `attach` needs? Looked up before anything is tried, so that the answer
//! names what is missing.

use anyhow::{Result, bail};

/// Numbers in include/uapi/linux/capability.h.
const NET_ADMIN: u8 = 12;
const SYS_ADMIN: u8 = 21;
const PERFMON: u8 = 38;
const BPF: u8 = 39;

/// An error that names what is missing and how to get it.
pub fn check() -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    match effective(&status) {
        Some(bits) => report(&missing(bits)),
        None => Ok(()), // without /proc the kernel itself will say
    }
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
        "attach needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, of which {} {} missing: run it as root (sudo vxmon attach), \
         or add them to the container's securityContext.capabilities",
        missing.join(" and "),
        if missing.len() == 1 { "is" } else { "are" }
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
