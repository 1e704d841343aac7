//! VLANs, bonds and bridges between the VXLAN and the wire, made of the kernel's own devices: each bad packet is reported once,
//! whichever of the devices are watched, with tcpdump's values and conntrack's ports; the summary counts each packet once.
//! That healthy traffic has no anomaly there is in `no_false_alarm`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Backend, Capture, Captured, Family, Lab, LabOptions, Rules, Topology, Vxmon,
    counters::{CtEntry, conntrack_vxlan},
    lab::Side,
    skip,
    traffic::{self, HttpServer, UdpClient, UdpServer},
    vxmon::{Finished, anomalies, number},
};

const LIMIT: Duration = Duration::from_secs(30);
/// Long enough to see that a packet which should not arrive does not; shorter than a retry.
const A_MOMENT: Duration = Duration::from_millis(120);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const VXLAN: &str = "flannel.1";

/// Ends and checksums of a bad packet: source, its port, destination, what is in the packet, what should be.
type Bad = (IpAddr, u16, IpAddr, Option<u16>, Option<u16>);

/// What one vxmon watches, and by what.
struct Watcher {
    name: &'static str,
    /// Empty: all that vxmon finds.
    devices: Vec<String>,
    engine: &'static str,
    running: Vxmon,
}

impl Watcher {
    fn start(lab: &Lab, name: &'static str, devices: Vec<String>, engine: &'static str) -> Result<Self> {
        let mut args = vec!["--format", "json", "--engine", engine];
        args.extend(devices.iter().map(String::as_str));
        // Alone it finds the VXLAN device and the uppermost of the stack.
        let count = if devices.is_empty() { 2 } else { devices.len() };
        let running = Vxmon::attach_to(&lab.a, count, &args).context(name)?;
        Ok(Self { name, devices, engine, running })
    }
}

/// All ways to watch the stack.
fn watchers(lab: &Lab) -> Result<Vec<Watcher>> {
    let wires = lab.wires();
    let mut all = lab.stacked(Side::A).to_vec();
    all.extend(wires.iter().cloned());
    Ok(vec![
        Watcher::start(lab, "what it finds", Vec::new(), "tc")?,
        Watcher::start(lab, "all", all.clone(), "tc")?,
        Watcher::start(lab, "the wire", wires.clone(), "tc")?,
        Watcher::start(lab, "all, by packet sockets", all, "packet-socket")?,
    ])
}

/// Requests to the service, which start with a bad packet, and packets to the pod, which are good.
fn requests(lab: &Lab) -> Result<()> {
    for inner in FAMILIES {
        let _http = HttpServer::start(&lab.b, lab.pod_socket(inner))?;
        let _udp = UdpServer::start(&lab.b, lab.pod_udp(inner), true)?;
        for _ in 0..3 {
            let _ = traffic::http_get(&lab.a, lab.service_socket(inner), A_MOMENT);
        }
        for _ in 0..2 {
            let _ = UdpClient::connect(&lab.a, lab.service_udp(inner))?.ask(40, A_MOMENT)?;
        }
        traffic::http_get(&lab.a, lab.pod_socket(inner), LIMIT).context("the pod")?;
        let answer = UdpClient::connect(&lab.a, lab.pod_udp(inner))?.ask(1200, LIMIT)?;
        ensure!(answer.is_some(), "the pod does not answer");
    }
    Ok(())
}

fn sum(event: &Value, path: &str) -> Option<u16> {
    u16::from_str_radix(event.pointer(path)?.as_str()?.strip_prefix("0x")?, 16).ok()
}

fn address(value: &Value) -> Result<IpAddr> {
    Ok(value.as_str().context("no address")?.parse()?)
}

/// Bad packets as vxmon tells of them, and how often; without those that it only counts.
fn reported(finished: &Finished) -> Result<BTreeMap<Bad, u64>> {
    let mut all = BTreeMap::new();
    for event in &finished.events {
        let outer = &event["outer"];
        let sport = u16::try_from(outer["sport"].as_u64().context("no port")?)?;
        let bad = (
            address(&outer["src"])?,
            sport,
            address(&outer["dst"])?,
            sum(event, "/csum/seen"),
            sum(event, "/csum/expected"),
        );
        *all.entry(bad).or_default() += 1;
    }
    Ok(all)
}

fn on_the_wire(packets: &[Captured]) -> BTreeMap<Bad, u64> {
    let mut all = BTreeMap::new();
    for packet in packets.iter().filter(|packet| packet.bad) {
        *all.entry((packet.src, packet.sport, packet.dst, packet.seen, packet.expected)).or_default() += 1;
    }
    all
}

/// The outer flows of bad packets.
fn flows(all: &BTreeMap<Bad, u64>) -> BTreeSet<(IpAddr, u16, IpAddr)> {
    all.keys().map(|(src, sport, dst, ..)| (*src, *sport, *dst)).collect()
}

/// The report is what left by the wire, no packet twice, and each proved from an entry that `conntrack -L` shows. A retry within a
/// second, on a slow machine, is of a flow that was reported, and only counted.
fn reported_once(finished: &Finished, packets: &[Captured], entries: &[CtEntry]) -> Result<()> {
    finished.adds_up()?;
    let (wire, report) = (on_the_wire(packets), reported(finished)?);
    let known = report.iter().all(|(bad, count)| wire.get(bad).is_some_and(|sent| count <= sent));
    ensure!(known && flows(&wire) == flows(&report), "on the wire: {wire:x?}; reported: {report:x?}");
    let bad = wire.values().sum::<u64>();
    let others: Vec<&Value> = finished.events.iter().filter(|event| event["verdict"] != "nat-stale-port").collect();
    ensure!(others.is_empty(), "another verdict: {others:#?}");
    ensure!(finished.total("verdicts/nat-stale-port") == bad, "{bad} bad packets: {}", finished.summary);
    ensure!(anomalies(&finished.summary["packets"]) == bad, "{bad} bad packets: {}", finished.summary);
    for event in &finished.events {
        ensure!(event["cause"]["proved"] == true, "{event:#}");
        let ct = &event["ct"];
        let known = entries.iter().any(|entry| {
            ct["orig"]["sport"] == entry.orig.sport
                && ct["reply"]["dport"] == entry.reply.dport
                && ct["orig"]["src"] == entry.orig.src.to_string()
        });
        ensure!(known, "`conntrack -L` does not know {ct}: {entries:#?}");
    }
    Ok(())
}

/// Each packet is counted once, where it should be.
fn counted_once(lab: &Lab, devices: &[String], engine: &str, finished: &Finished, sent: u64) -> Result<()> {
    let sum = |names: &[String], path: &str| -> u64 {
        let packets = names.iter().filter_map(|name| finished.device(name)).map(|device| &device["packets"]);
        packets.map(|packets| number(packets, path)).sum()
    };
    let (wires, stacked) = (lab.wires(), lab.stacked(Side::A));
    let top = [lab.lower(Side::A).to_owned()];
    let context = || format!("{sent} sent: {}", finished.summary);
    if devices.is_empty() {
        ensure!(sum(&top, "seen") == sent && finished.device(VXLAN).is_some(), "{}", context());
        return Ok(());
    }
    ensure!(finished.total("seen") == sent, "{}", context());
    if engine == "packet-socket" || devices == wires {
        return ensure_all(sum(&wires, "seen") == sent, context);
    }
    // By TC programs the uppermost counts, and those below see that it has.
    ensure!(sum(&top, "seen") == sent && sum(&top, "counted_above") == 0, "{}", context());
    let between = stacked.iter().filter(|name| **name != top[0]);
    for name in between {
        ensure!(sum(std::slice::from_ref(name), "counted_above") == sent, "{name}: {}", context());
    }
    ensure_all(sum(&wires, "counted_above") == sent, context)
}

fn ensure_all(holds: bool, context: impl Fn() -> String) -> Result<()> {
    ensure!(holds, "{}", context());
    Ok(())
}

fn run(topology: Topology, underlay: Family) -> Result<()> {
    let lab = LabOptions { underlay, topology, ..LabOptions::default() }.build()?;
    lab.rules(&Rules { backend: Backend::Nftables, ..Rules::default() })?;
    // tcpdump is given no filter: the place of the ports differs by tag, and by whether the tag is in the packet.
    let captures: Vec<Capture> =
        lab.wires().iter().map(|wire| Capture::start(&lab.a, wire, "")).collect::<Result<_>>()?;
    let watchers = watchers(&lab)?;
    requests(&lab)?;
    let entries = conntrack_vxlan(&lab.a, underlay, lab.options().port)?;
    let mut packets = Vec::new();
    for capture in captures {
        packets.extend(capture.stop()?);
    }
    let (own, port) = (Side::A.underlay(underlay), lab.options().port);
    packets.retain(|packet| packet.src == own && packet.dport == port);
    let sent = packets.len() as u64;
    let bad = packets.iter().filter(|packet| packet.bad).count();
    ensure!(bad >= 8, "only {bad} bad packets of 10 requests: {packets:#?}");
    for Watcher { name, devices, engine, running } in watchers {
        let _ = running.wait_events(bad, Duration::from_secs(1));
        let finished = running.stop()?;
        reported_once(&finished, &packets, &entries).with_context(|| name.to_owned())?;
        counted_once(&lab, &devices, engine, &finished, sent).with_context(|| name.to_owned())?;
    }
    Ok(())
}

fn each_bad_packet_once(test: &str, topology: Topology) -> Result<()> {
    if !skip::root_or_skip(test) {
        return Ok(());
    }
    if let Some(why) = topology.missing()? {
        skip::skip(test, &why);
        return Ok(());
    }
    for underlay in FAMILIES {
        run(topology, underlay).with_context(|| format!("{topology:?}, {underlay:?}"))?;
    }
    Ok(())
}

#[test]
fn a_vlan() -> Result<()> {
    each_bad_packet_once("a_vlan", Topology::Vlan)
}

#[test]
fn a_vlan_that_tags_early() -> Result<()> {
    each_bad_packet_once("a_vlan_that_tags_early", Topology::TaggedVlan)
}

#[test]
fn a_vlan_in_a_vlan() -> Result<()> {
    each_bad_packet_once("a_vlan_in_a_vlan", Topology::Qinq)
}

#[test]
fn a_bond() -> Result<()> {
    each_bad_packet_once("a_bond", Topology::Bond)
}

#[test]
fn a_bond_that_sends_in_turn() -> Result<()> {
    each_bad_packet_once("a_bond_that_sends_in_turn", Topology::BondInTurn)
}

#[test]
fn a_vlan_on_a_bond() -> Result<()> {
    each_bad_packet_once("a_vlan_on_a_bond", Topology::BondVlan)
}

#[test]
fn a_bridge_with_a_vlan_as_its_port() -> Result<()> {
    each_bad_packet_once("a_bridge_with_a_vlan_as_its_port", Topology::VlanBridge)
}

#[test]
fn a_bridge() -> Result<()> {
    each_bad_packet_once("a_bridge", Topology::Bridge)
}
