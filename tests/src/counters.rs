//! What the kernel itself counts and remembers: connections, checksum errors, and the size of packets at egress.

use std::{fs, net::IpAddr};

use anyhow::{Context, Result, bail};

use crate::{Family, Netns, skip};

/// Addresses and ports of one direction. Ports are 0 where the protocol has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub src: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port.
    pub dport: u16,
}

/// A conntrack entry, as `conntrack -L` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CtEntry {
    /// `tcp`, `udp`, …
    pub proto: String,
    /// What was sent first.
    pub orig: Tuple,
    /// What an answer is expected to look like.
    pub reply: Tuple,
    /// `UNREPLIED`, `ASSURED`, …
    pub flags: Vec<String>,
    /// The connection's own mark.
    pub mark: u32,
}

impl CtEntry {
    /// Whether NAT changed the source port.
    #[must_use]
    pub fn port_rewritten(&self) -> bool {
        self.orig.sport != self.reply.dport
    }
}

/// All connections of a family in `node`.
pub fn conntrack(node: &Netns, family: Family) -> Result<Vec<CtEntry>> {
    let name = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    let text = node.run("conntrack", &["-L", "-f", name])?;
    text.lines().map(|line| parse_entry(line).with_context(|| format!("cannot read the entry {line:?}"))).collect()
}

/// The outer connections of a VXLAN: UDP to `port`.
pub fn conntrack_vxlan(node: &Netns, family: Family, port: u16) -> Result<Vec<CtEntry>> {
    let mut entries = conntrack(node, family)?;
    entries.retain(|entry| entry.proto == "udp" && entry.orig.dport == port);
    Ok(entries)
}

/// `udp 17 27 src=… dst=… sport=… dport=… [UNREPLIED] src=… dst=… sport=… dport=… mark=0 use=1`
fn parse_entry(line: &str) -> Option<CtEntry> {
    let mut words = line.split_whitespace();
    let proto = words.next()?.to_owned();
    let (mut addresses, mut ports, mut flags, mut mark) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for word in words {
        if let Some(flag) = word.strip_prefix('[') {
            flags.push(flag.trim_end_matches(']').to_owned());
        }
        let Some((key, value)) = word.split_once('=') else { continue };
        match key {
            "src" | "dst" => addresses.push(value.parse::<IpAddr>().ok()?),
            "sport" | "dport" => ports.push(value.parse::<u16>().ok()?),
            "mark" => mark = value.parse().ok()?,
            _ => {}
        }
    }
    ports.resize(4, 0);
    let tuple = |first: usize| {
        Some(Tuple {
            src: *addresses.get(first)?,
            sport: *ports.get(first)?,
            dst: *addresses.get(first + 1)?,
            dport: *ports.get(first + 1)?,
        })
    };
    Some(CtEntry { proto, orig: tuple(0)?, reply: tuple(2)?, flags, mark })
}

/// `UdpInCsumErrors` of `node`: datagrams that were dropped because their checksum was wrong.
pub fn udp_csum_errors(node: &Netns, family: Family) -> Result<u64> {
    match family {
        Family::V4 => snmp(node, "InCsumErrors"),
        Family::V6 => {
            let text = read_inside(node, "snmp6")?;
            let line = text.lines().find_map(|line| line.strip_prefix("Udp6InCsumErrors"));
            line.and_then(|value| value.trim().parse().ok()).context("no Udp6InCsumErrors in /proc/net/snmp6")
        }
    }
}

/// `Udp:` of `/proc/net/snmp`: a line of names, then a line of values.
fn snmp(node: &Netns, name: &str) -> Result<u64> {
    let text = read_inside(node, "snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { bail!("no UDP in /proc/net/snmp") };
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    let value = pairs.find(|(key, _)| *key == name).map(|(_, value)| value);
    value.and_then(|value| value.parse().ok()).with_context(|| format!("no {name} in /proc/net/snmp"))
}

fn read_inside(node: &Netns, name: &str) -> Result<String> {
    // Not /proc/net: that is the namespace of the main thread.
    node.enter(|| Ok(fs::read_to_string(format!("/proc/thread-self/net/{name}"))?))
}

/// Counts the packets at the egress of a device that are larger than its MTU: GSO packets not yet cut. It does so by an
/// nftables hook, which runs where TC egress does, before a device without segmentation has the kernel cut them.
#[derive(Debug)]
pub struct GsoCounter<'node> {
    node: &'node Netns,
    table: String,
}

impl<'node> GsoCounter<'node> {
    /// Starts to count packets of more than `mtu` bytes; needs a kernel with nftables egress hooks (5.16).
    pub fn start(node: &'node Netns, dev: &str, mtu: u32) -> Result<Self> {
        let table = format!("gso-{}", dev.replace('.', "-"));
        let rule = format!(
            "table netdev {table} {{ counter big {{ }}; \
             chain egress {{ type filter hook egress device \"{dev}\" priority 0; meta length > {} counter name big; }}; }}",
            mtu + 14
        );
        node.run("nft", &[&rule])?;
        Ok(Self { node, table })
    }

    /// True if the process is root and the kernel has egress hooks; else skips the test `name`.
    pub fn can_run(name: &str) -> Result<bool> {
        if !skip::root_or_skip(name) {
            return Ok(false);
        }
        let refused = match GsoCounter::start(&Netns::create("egress")?, "lo", 1500) {
            Ok(_) => false,
            Err(error) if is_older() && format!("{error:#}").contains("Operation not supported") => true,
            Err(error) => return Err(error),
        };
        if refused {
            skip::skip(name, "this kernel has no nftables egress hook (5.16)");
        }
        Ok(!refused)
    }

    /// How many so far.
    pub fn count(&self) -> Result<u64> {
        let text = self.node.run("nft", &["list", "counter", "netdev", &self.table, "big"])?;
        let value = text.split_once("packets").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
        value.with_context(|| format!("cannot read the counter from {text:?}"))
    }
}

/// Whether the kernel is from before the egress hook: else it is a fault not to have it.
fn is_older() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) < (Some(5), Some(16))
}

impl Drop for GsoCounter<'_> {
    fn drop(&mut self) {
        let _ = self.node.run("nft", &["delete", "table", "netdev", &self.table]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_understood() {
        let line = "udp      17 27 src=10.0.100.3 dst=10.0.100.15 sport=35300 dport=8472 [UNREPLIED] src=10.0.100.15 \
                    dst=10.0.100.3 sport=8472 dport=27486 mark=0 use=1";
        let entry = parse_entry(line).unwrap();
        assert_eq!((entry.proto.as_str(), entry.orig.sport, entry.reply.dport), ("udp", 35300, 27486));
        assert_eq!(entry.flags, ["UNREPLIED"]);
        assert!(entry.port_rewritten());
        let line = "icmpv6   58 29 src=fd00:100::3 dst=fd00:100::f type=128 code=0 id=1 src=fd00:100::f dst=fd00:100::3 \
                    type=129 code=0 id=1 mark=16384 use=1";
        let entry = parse_entry(line).unwrap();
        assert_eq!((entry.orig.sport, entry.mark, entry.port_rewritten()), (0, 0x4000, false));
    }
}
