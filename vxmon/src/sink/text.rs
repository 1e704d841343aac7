//! Text for people: one line an event. What it means is [`super::explain`]'s business.

use std::fmt::Write as _;

use super::Paint;
use crate::event::{
    Anomaly, Attached, Detached, DeviceSummary, Ending, Endpoints, Inner, Lost, Missed, Offload, Packets, Record,
    Summary,
};

/// An event as text, without the last line's end.
pub fn render(record: &Record, paint: Paint) -> String {
    match record {
        Record::Anomaly(anomaly) => self::anomaly(anomaly, paint),
        Record::Recovered(ending) => self::ending(&paint.good("recovered"), ending),
        Record::NotRecovered(ending) => self::ending(&paint.warn("not-recovered"), ending),
        Record::Attached(Attached { ts, dev, role, why, hook, metadata, transport, .. }) => {
            let by = if *transport == Some("perf") { " and perf buffers" } else { "" };
            let blind = if *metadata == "none" { ", without skb metadata" } else { "" };
            format!("{} {dev} watched as {role} ({}; by {hook}{by}{blind})", time(ts), why.join(", "))
        }
        Record::Detached(Detached { ts, dev, why, .. }) => format!("{} {dev} no longer watched: {why}", time(ts)),
        Record::Lost(lost) => self::lost(lost),
        Record::Offload(Offload { ts, dev, feature, state, was, why, .. }) => {
            let again = if state == was { "still" } else { "now" };
            let what = if *why == "recreated" { "the device was made anew" } else { "it was switched" };
            format!("{} {dev} {feature} is {again} {state}: {what}", time(ts))
        }
        Record::Missed(Missed { ts, lines, .. }) => {
            format!("{} {lines} lines missed: this reader was too slow", time(ts))
        }
        Record::Summary(summary) => self::summary(summary),
    }
}

fn lost(Lost { ts, ring, queue, capture, .. }: &Lost) -> String {
    let mut parts = Vec::new();
    if ring + queue > 0 {
        parts.push(format!("{} anomalies counted but not shown (ring buffer {ring}, output {queue})", ring + queue));
    }
    if *capture > 0 {
        parts.push(format!("{capture} packets left unseen, the packet socket's ring being full"));
    }
    format!("{} {}", time(ts), parts.join("; "))
}

/// `12:00:54` of an RFC 3339 time stamp.
pub fn time_of_day(ts: &str) -> &str {
    let time = time(ts);
    time.split_once('.').map_or(time, |(seconds, _)| seconds)
}

/// `12:00:54.373945` of an RFC 3339 time stamp.
fn time(ts: &str) -> &str {
    ts.split_once('T').map_or(ts, |(_, time)| time).trim_end_matches('Z')
}

/// `10.0.100.3:8472`, `[fd00::1]:8472`.
pub fn end(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn ends(Endpoints { src, sport, dst, dport }: &Endpoints) -> String {
    format!("{} > {}", end(src, *sport), end(dst, *dport))
}

/// `tcp 10.244.0.0:40018 > 10.244.2.73:9153`.
pub fn connection(inner: &Inner) -> String {
    let side = |address: &str, port: Option<u16>| port.map_or(address.to_owned(), |port| end(address, port));
    format!("{} {} > {}", inner.proto, side(&inner.src, inner.sport), side(&inner.dst, inner.dport))
}

fn inner_text(inner: &Inner) -> String {
    let mut text = connection(inner);
    if let Some(flags) = &inner.flags {
        let _ = write!(text, " [{flags}]");
    }
    text
}

fn anomaly(anomaly: &Anomaly, paint: Paint) -> String {
    let mut line = format!("{} {} {}", time(&anomaly.ts), anomaly.dev, paint.bad(anomaly.verdict));
    if let Some(outer) = &anomaly.outer {
        let _ = write!(line, " {}", ends(outer));
    }
    match &anomaly.csum.expected {
        Some(expected) => {
            let _ = write!(line, " checksum {} instead of {expected}", anomaly.csum.seen);
        }
        None => {
            let _ = write!(line, " checksum {}", anomaly.csum.seen);
        }
    }
    if let Some(inner) = &anomaly.inner {
        match anomaly.vni {
            Some(vni) => {
                let _ = write!(line, " | vni {vni} {}", inner_text(inner));
            }
            None => {
                let _ = write!(line, " | {}", inner_text(inner));
            }
        }
    }
    if let Some(mark) = &anomaly.mark {
        let _ = write!(line, " | mark {mark}");
    }
    if let Some(ct) = &anomaly.ct {
        let after = end(&ct.reply.dst, ct.reply.dport);
        let _ = write!(line, " | conntrack {} became {after}", end(&ct.orig.src, ct.orig.sport));
    } else if let Some(why) = anomaly.missing.get("ct") {
        let _ = write!(line, " | conntrack: {why}");
    }
    if let Some(cause) = &anomaly.cause {
        match (&cause.predicted, cause.proved) {
            (Some(predicted), true) => {
                let what = if anomaly.verdict == "nat-mangled-zero" {
                    "what NAT makes of \"no checksum\""
                } else {
                    "right for the packet before NAT"
                };
                let _ = write!(line, " | proved: {predicted} is {what}");
            }
            (Some(predicted), false) => {
                let _ = write!(line, " | not proved: NAT would have left {predicted}");
            }
            (None, _) => {}
        }
        if let Some(port) = cause.right_for_sport {
            let _ = write!(line, " | right for source port {port}");
        }
    }
    if let Some(flow) = anomaly.flow.as_ref().filter(|flow| flow.attempt > 1) {
        let _ = write!(line, " | bad packet {} in {:.1} s", flow.attempt, flow.since_first_ms as f64 / 1e3);
    }
    if anomaly.suppressed > 0 {
        let _ = write!(line, " | {} more since the last line", anomaly.suppressed);
    }
    line
}

/// `6 bad SYNs`, `1 bad packet`.
fn bad_packets(ending: &Ending) -> String {
    let what = if ending.bad_syns == ending.bad_packets { "SYN" } else { "packet" };
    format!("{} bad {what}{}", ending.bad_packets, if ending.bad_packets == 1 { "" } else { "s" })
}

fn ending(name: &str, ending: &Ending) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1e3);
    let (bad, after) = (bad_packets(ending), seconds(ending.after_ms));
    let first_good = seconds(ending.first_good_ms.unwrap_or(ending.after_ms));
    let mut line = format!("{} {} {name}", time(&ending.ts), ending.dev);
    if let Some(vni) = ending.vni {
        let _ = write!(line, " vni {vni}");
    }
    let _ = write!(line, " {} | ", inner_text(&ending.inner));
    let _ = match ending.outcome {
        "connected" => write!(line, "connected after {after}, {bad}"),
        "good-again" => write!(line, "a packet with a right checksum left after {after}, {bad}"),
        "not-answered" => write!(line, "a right SYN left after {first_good}, {bad}, and nothing after it"),
        "reset" => write!(line, "aborted after {after}, {bad}"),
        _ => write!(line, "not seen again after {bad} in {}", seconds(ending.last_bad_ms)),
    };
    line += match ending.by {
        Some("source-port") => " | by another outer source port",
        Some("conntrack-timeout") => " | the outer conntrack entry had expired",
        _ => "",
    };
    line
}

fn counts(packets: &Packets) -> String {
    let mut parts: Vec<String> =
        packets.verdicts.iter().filter(|(_, n)| **n > 0).map(|(name, n)| format!("{n} {name}")).collect();
    parts
        .extend(packets.unverified.iter().filter(|(_, n)| **n > 0).map(|(name, n)| format!("{n} unverified ({name})")));
    if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) }
}

fn summary(summary: &Summary) -> String {
    let mut text = String::new();
    for device in &summary.devices {
        let packets = &device.packets;
        let _ = writeln!(
            text,
            "{} ({}): {} checked{}; {} other packets",
            device.dev,
            device.role,
            packets.seen,
            counts(packets),
            packets.other
        );
    }
    let Packets { seen, verdicts, anomalies, lost, .. } = &summary.packets;
    let bad: u64 = anomalies.reported + anomalies.suppressed + lost.ring + lost.queue;
    let _ = write!(text, "{seen} packets checked in {:.1} s, {bad} with a wrong checksum", summary.seconds);
    if lost.ring + lost.queue > 0 {
        let _ = write!(text, " ({} of them counted but not shown)", lost.ring + lost.queue);
    }
    if lost.capture > 0 {
        let _ = write!(text, "; {} more packets left unseen, the packet socket's ring being full", lost.capture);
    }
    let nat = ["nat-mangled-zero", "nat-stale-port"].iter().filter_map(|name| verdicts.get(name)).sum::<u64>();
    if nat > 0 {
        let _ = write!(
            text,
            "\nNAT with --random-fully or a changed source port breaks these packets on this node. To stop it now: {}. To \
             cure it: kube-proxy rules that clear the mark (1.16.13, 1.17.9, 1.18.6 or later, and no older rule left in \
             front).",
            stop(&summary.devices)
        );
    }
    text
}

/// What ends both faults at once: for the VXLAN devices that were seen to hand over packets with the inner checksum left to
/// offload; if none was watched, how to find the device.
fn stop(devices: &[DeviceSummary]) -> String {
    let vxlans = || devices.iter().filter(|device| device.role == "vxlan");
    let offloads = |device: &&DeviceSummary| device.packets.verdicts.get("pending").is_some_and(|pending| *pending > 0);
    let mut names: Vec<&str> = vxlans().filter(offloads).map(|device| device.dev.as_str()).collect();
    if names.is_empty() {
        names.extend(vxlans().map(|device| device.dev.as_str()));
    }
    // A device made anew has a line of its own.
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return "turn tx-checksum-ip-generic off with `ethtool -K` on the VXLAN device (`ip -d link show type vxlan` names \
                it)"
            .to_owned();
    }
    names.iter().map(|name| format!("ethtool -K {name} tx-checksum-ip-generic off")).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(dev: &str, ifindex: u32, role: &'static str, pending: u64) -> DeviceSummary {
        let verdicts = [("pending", pending)].into();
        DeviceSummary { dev: dev.to_owned(), ifindex, role, packets: Packets { verdicts, ..Packets::default() } }
    }

    #[test]
    fn the_remedy_names_the_devices_that_offload() {
        let uplink = device("eth0", 2, "uplink", 9);
        let again = [device("flannel.1", 3, "vxlan", 1), device("flannel.1", 7, "vxlan", 2)];
        let quiet = device("vxlan.calico", 4, "vxlan", 0);
        let [one, two] = again;
        assert_eq!(
            stop(&[uplink.clone(), one.clone(), two, quiet.clone()]),
            "ethtool -K flannel.1 tx-checksum-ip-generic off"
        );
        assert_eq!(
            stop(&[one, device("vxlan.calico", 4, "vxlan", 5)]),
            "ethtool -K flannel.1 tx-checksum-ip-generic off; ethtool -K vxlan.calico tx-checksum-ip-generic off"
        );
        assert_eq!(stop(&[uplink.clone(), quiet]), "ethtool -K vxlan.calico tx-checksum-ip-generic off");
        assert!(stop(&[uplink]).contains("ip -d link show type vxlan"));
    }
}
