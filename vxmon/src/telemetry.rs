//! What the monitor notes for the metrics while it runs, and a look at this process and node in /proc. It decides nothing.

use std::{collections::BTreeMap, fs, time::Duration};

use crate::{
    event::Record,
    sink::metrics::{ByCause, Process, Readings},
};

/// Where `net.snmp` of the calling thread's network namespace is.
const SNMP: [(&str, &str, &str); 2] =
    [("ipv4", "/proc/thread-self/net/snmp", "Udp"), ("ipv6", "/proc/thread-self/net/snmp6", "Udp6InCsumErrors")];

/// Notes of what was written.
#[derive(Debug, Default)]
pub struct Telemetry {
    anomalies: ByCause,
    /// Connections with bad packets, by how they ended.
    endings: BTreeMap<&'static str, u64>,
    /// Watched devices by index: name, role, hook.
    attached: BTreeMap<u32, (String, &'static str, &'static str)>,
    offload_changes: u64,
    /// Events wait that the last turn did not come to.
    pub behind: bool,
}

impl Telemetry {
    /// Notes what a line tells.
    pub fn note(&mut self, record: &Record) {
        match record {
            Record::Anomaly(anomaly) => {
                let proved = anomaly.cause.as_ref().is_some_and(|cause| cause.proved);
                let random_fully = anomaly.nat.as_ref().map_or("none", |nat| nat.random_fully);
                *self.anomalies.entry((anomaly.verdict, proved, random_fully)).or_default() += 1 + anomaly.suppressed;
            }
            Record::Recovered(ending) | Record::NotRecovered(ending) => {
                *self.endings.entry(ending.outcome).or_default() += 1;
            }
            Record::Attached(attached) => {
                self.attached.insert(attached.ifindex, (attached.dev.clone(), attached.role, attached.hook));
            }
            Record::Detached(detached) => drop(self.attached.remove(&detached.ifindex)),
            Record::Offload(_) => self.offload_changes += 1,
            Record::Lost(_) | Record::Missed(_) | Record::Summary(_) => {}
        }
    }

    /// What was noted, and what /proc says now; the monitor adds the rest.
    #[must_use]
    pub fn readings(&self) -> Readings {
        Readings {
            anomalies: self.anomalies.clone(),
            endings: self.endings.clone(),
            attached: self.attached.values().cloned().collect(),
            offload_changes: self.offload_changes,
            checksum_errors: checksum_errors(),
            process: process(),
            ..Readings::default()
        }
    }
}

/// `UdpInCsumErrors` by family, of the calling thread's network namespace.
fn checksum_errors() -> Vec<(&'static str, u64)> {
    SNMP.into_iter()
        .filter_map(|(family, path, name)| {
            let text = fs::read_to_string(path).ok()?;
            let value = if family == "ipv4" { snmp(&text, name) } else { snmp6(&text, name) };
            value.map(|value| (family, value))
        })
        .collect()
}

/// `InCsumErrors` of a protocol in /proc/net/snmp: a line of names, then one of values.
fn snmp(text: &str, protocol: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
    let (names, values) = (lines.next()?, lines.next()?);
    let column = names.split(' ').position(|name| name == "InCsumErrors")?;
    values.split(' ').nth(column)?.parse().ok()
}

/// A value of /proc/net/snmp6: a name and a value on each line.
fn snmp6(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// What this process uses; zeros where /proc does not tell.
fn process() -> Process {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    let cpu = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from);
    Process {
        resident: kib.unwrap_or(0) * 1024,
        cpu: cpu.unwrap_or_default(),
        // Less the one that lists them.
        descriptors: fs::read_dir("/proc/self/fd").map_or(0, |list| list.count().saturating_sub(1) as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_column_is_found_by_its_name() {
        // head of /proc/net/snmp, Linux 6.18.
        let text = "Tcp: RtoAlgorithm InCsumErrors\nTcp: 1 9\n\
                    Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors\n\
                    Udp: 12 3 4 5 6 7 8 9 10\nUdpLite: InDatagrams InCsumErrors\nUdpLite: 0 1\n";
        assert_eq!(snmp(text, "Udp"), Some(8));
        assert_eq!(snmp("", "Udp"), None);
        assert_eq!(
            snmp6("Udp6InErrors                    \t1\nUdp6InCsumErrors                \t2\n", "Udp6InCsumErrors"),
            Some(2)
        );
        assert!(checksum_errors().iter().any(|(family, _)| *family == "ipv4"));
    }

    #[test]
    fn this_process_is_seen() {
        let process = process();
        assert!(process.resident > 1 << 20 && process.descriptors >= 3, "{process:?}");
    }
}
