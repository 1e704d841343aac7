//! Fault A: NAT "updates" an outer checksum of 0, which means that there is none. On kernels without the fault (which a
//! request shows, no version is asked for) these tests are skipped; `cargo xtask vm fault-a` has one that has it.

use std::{net::IpAddr, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vxmon_tests::{
    Backend, Capture, Captured, Family, Lab, LabOptions, RuleForm, Rules, Vxmon,
    counters::{CtEntry, conntrack_vxlan, udp_csum_errors},
    lab::TXREHASH,
    skip,
    traffic::{self, HttpServer, UdpClient, UdpServer},
    vxmon::{Finished, anomalies, by_packet_socket, sees_nat},
};

const LIMIT: Duration = Duration::from_secs(5);
/// Long enough to see that a packet which should not arrive does not; shorter than a retry.
const A_MOMENT: Duration = Duration::from_millis(200);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Another address of node a's, to which the outer packets are rewritten.
const OTHER: &str = "10.0.100.44";

/// A VXLAN without outer checksums.
fn options(underlay: Family) -> LabOptions {
    LabOptions { underlay, udpcsum: false, ..LabOptions::default() }
}

/// Whether this kernel has the fault: what leaves on a new connection to the service. Where the caller knows that it has
/// (`VXMON_EXPECT_FAULT_A`), not to see it is an error.
fn has_fault_a(test: &str) -> Result<bool> {
    let lab = options(Family::V4).build()?;
    lab.rules(&Rules::default())?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let capture = Capture::vxlan(&lab)?;
    let _ = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?.ask(40, A_MOMENT)?;
    let packets = capture.stop()?;
    ensure!(!packets.is_empty(), "nothing left node a");
    let has = packets.iter().any(|packet| packet.bad);
    if !has {
        ensure!(std::env::var_os("VXMON_EXPECT_FAULT_A").is_none(), "this kernel should have fault A: {packets:#?}");
        skip::skip(test, "NAT leaves a checksum of 0 alone on this kernel (no fault A)");
    }
    Ok(has)
}

/// What tcpdump, conntrack and vxmon say of the same traffic.
struct Seen {
    packets: Vec<Captured>,
    entries: Vec<CtEntry>,
    vxmon: Finished,
    dropped: u64,
}

impl Seen {
    fn bad(&self) -> Vec<&Captured> {
        self.packets.iter().filter(|packet| packet.bad).collect()
    }
}

/// Three TCP and two UDP requests of each family to the service, each given `limit`.
fn watch(lab: &Lab, args: &[&str], limit: Duration) -> Result<(Seen, usize)> {
    let underlay = lab.options().underlay;
    let before = udp_csum_errors(&lab.b, underlay)?;
    let capture = Capture::vxlan(lab)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&["--format", "json"], args].concat())?;
    let mut answered = 0;
    for inner in FAMILIES {
        let _http = HttpServer::start(&lab.b, lab.pod_socket(inner))?;
        let _udp = UdpServer::start(&lab.b, lab.pod_udp(inner), true)?;
        for _ in 0..3 {
            answered += usize::from(traffic::http_get(&lab.a, lab.service_socket(inner), limit).is_ok());
        }
        for _ in 0..2 {
            let client = UdpClient::connect(&lab.a, lab.service_udp(inner))?;
            answered += usize::from(client.ask(40, limit)?.is_some());
        }
    }
    let entries = conntrack_vxlan(&lab.a, underlay, lab.options().port)?;
    let packets = capture.stop()?;
    let bad = packets.iter().filter(|packet| packet.bad).count();
    let _ = vxmon.wait_events(bad, Duration::from_secs(2));
    let vxmon = vxmon.stop()?;
    vxmon.adds_up()?;
    Ok((Seen { packets, entries, vxmon, dropped: udp_csum_errors(&lab.b, underlay)? - before }, answered))
}

fn hex(value: u16) -> Value {
    format!("{value:#06x}").into()
}

/// Each bad packet is reported once as fault A, proved, with tcpdump's value and the ports of `conntrack -L`.
fn all_proved(seen: &Seen, value: u16, source: &str) -> Result<()> {
    let bad = seen.bad();
    ensure!(bad.len() >= 10, "only {} bad packets: {:#?}", bad.len(), seen.packets);
    ensure!(seen.dropped == bad.len() as u64, "{} dropped, {} bad", seen.dropped, bad.len());
    let source = if by_packet_socket() { "netlink" } else { source };
    let mark = if by_packet_socket() { Value::Null } else { "0x4000".into() };
    for packet in &bad {
        ensure!(packet.seen == Some(value), "{:?} on the wire, not {value:#06x}: {packet:#?}", packet.seen);
        let of_packet = |event: &&Value| {
            event["outer"]
                == json!({"src": packet.src, "sport": packet.sport, "dst": packet.dst, "dport": packet.dport})
        };
        let events: Vec<&Value> = seen.vxmon.events.iter().filter(of_packet).collect();
        let &[event] = events.as_slice() else { anyhow::bail!("{} events for {packet:#?}", events.len()) };
        let entry = seen
            .entries
            .iter()
            .find(|entry| entry.reply.dport == packet.sport && entry.reply.dst == packet.src)
            .with_context(|| format!("`conntrack -L` has no entry for {packet:#?}"))?;
        ensure!(entry.port_rewritten(), "{entry:?}");
        let checks = [
            ("/verdict", "nat-mangled-zero".into()),
            ("/role", "uplink".into()),
            ("/csum/seen", hex(value)),
            ("/cause/predicted", hex(value)),
            ("/cause/proved", true.into()),
            ("/ct/source", source.into()),
            ("/ct/orig/src", entry.orig.src.to_string().into()),
            ("/ct/orig/sport", entry.orig.sport.into()),
            ("/ct/reply/dst", entry.reply.dst.to_string().into()),
            ("/ct/reply/dport", entry.reply.dport.into()),
            ("/mark", mark.clone()),
        ];
        for (path, wanted) in checks {
            let found = event.pointer(path).unwrap_or(&Value::Null);
            ensure!(*found == wanted, "{path} is {found}, not {wanted}, in {event}");
        }
        // The kernel was seen to choose the port, where it lets itself be watched.
        let flags = event["nat"]["range_flags"].as_array();
        let random = flags.is_some_and(|flags| flags.iter().any(|flag| flag == "proto-random-fully"));
        let observed = event["nat"]["random_fully"] == "observed" && random;
        ensure!(observed == sees_nat(), "{event:#}");
    }
    let bad = bad.len() as u64;
    ensure!(seen.vxmon.total("verdicts/nat-mangled-zero") == bad, "{bad} bad packets: {}", seen.vxmon.summary);
    ensure!(anomalies(&seen.vxmon.summary["packets"]) == bad, "{bad} bad packets: {}", seen.vxmon.summary);
    Ok(())
}

fn mangled_zero(test: &str, backend: Backend, args: &[&str], source: &str) -> Result<()> {
    if !skip::root_or_skip(test) || !has_fault_a(test)? {
        return Ok(());
    }
    for underlay in FAMILIES {
        let lab = options(underlay).build()?;
        lab.rules(&Rules { backend, ..Rules::default() })?;
        let (seen, answered) = watch(&lab, args, A_MOMENT)?;
        ensure!(answered == 0, "{answered} requests were answered at once");
        // The address stays, so that nothing is added to 0, which is then written as 0xffff.
        all_proved(&seen, 0xffff, source).with_context(|| format!("{backend:?}, {underlay:?}"))?;
    }
    Ok(())
}

#[test]
fn a_mangled_zero_is_proved_with_iptables_legacy() -> Result<()> {
    mangled_zero("a_mangled_zero_is_proved_with_iptables_legacy", Backend::IptablesLegacy, &[], "skb")
}

#[test]
fn a_mangled_zero_is_proved_with_iptables_nft() -> Result<()> {
    mangled_zero("a_mangled_zero_is_proved_with_iptables_nft", Backend::IptablesNft, &[], "skb")
}

#[test]
fn a_mangled_zero_is_proved_with_nftables() -> Result<()> {
    mangled_zero("a_mangled_zero_is_proved_with_nftables", Backend::Nftables, &[], "skb")
}

/// Nothing but the packet's bytes, and the entry by netlink: what there is on the kernels that have this fault.
#[test]
fn a_mangled_zero_is_proved_without_btf() -> Result<()> {
    mangled_zero("a_mangled_zero_is_proved_without_btf", Backend::IptablesNft, &["--no-btf"], "netlink")
}

/// With another source address, the change of address is left in the field: 10.0.100.44 - 10.0.100.3 = 0x29.
#[test]
fn a_changed_address_leaves_the_predicted_value() -> Result<()> {
    let test = "a_changed_address_leaves_the_predicted_value";
    if !skip::root_or_skip(test) || !has_fault_a(test)? {
        return Ok(());
    }
    let lab = options(Family::V4).build()?;
    lab.rules(&Rules { backend: Backend::IptablesLegacy, ..Rules::default() })?;
    let rule = format!(
        "-w 10 -t nat -I POSTROUTING 1 -o {} -p udp --dport {} -m mark --mark 0x4000/0x4000 -j SNAT --to-source {OTHER} \
         --random-fully",
        lab.options().uplink,
        lab.options().port
    );
    lab.a.run("iptables-legacy", &rule.split_whitespace().collect::<Vec<_>>())?;
    let (mut seen, answered) = watch(&lab, &[], A_MOMENT)?;
    // The capture of the usual source address has the good packets only.
    ensure!(answered == 0 && seen.bad().is_empty(), "{answered} answered; {:#?}", seen.packets);
    let capture = Capture::start(&lab.a, &lab.options().uplink, &format!("src host {OTHER} and udp"))?;
    lab.flush_conntrack()?;
    let before = udp_csum_errors(&lab.b, Family::V4)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    for _ in 0..10 {
        ensure!(UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?.ask(40, A_MOMENT)?.is_none(), "answered");
    }
    seen.entries = conntrack_vxlan(&lab.a, Family::V4, lab.options().port)?;
    seen.packets = capture.stop()?;
    let _ = vxmon.wait_events(seen.packets.len(), Duration::from_secs(2));
    seen.vxmon = vxmon.stop()?;
    seen.vxmon.adds_up()?;
    seen.dropped = udp_csum_errors(&lab.b, Family::V4)? - before;
    let other: IpAddr = OTHER.parse()?;
    ensure!(seen.packets.iter().all(|packet| packet.src == other), "{:#?}", seen.packets);
    all_proved(&seen, 0x0029, "skb")
}

/// No bad packet, everything answered, and vxmon has nothing to say.
fn silent(lab: &Lab) -> Result<()> {
    let (seen, answered) = watch(lab, &[], LIMIT)?;
    ensure!(answered == 10, "{answered} of 10 requests were answered");
    ensure!(seen.bad().is_empty() && seen.dropped == 0, "{:#?}", seen.packets);
    ensure!(seen.vxmon.events.is_empty(), "{:#?}", seen.vxmon.events);
    ensure!(anomalies(&seen.vxmon.summary["packets"]) == 0, "{}", seen.vxmon.summary);
    // The address families of the underlay have rules of their own: that the outer flow was seen at all.
    ensure!(seen.vxmon.device("uplink").is_some_and(|device| device["packets"]["seen"].as_u64() > Some(10)));
    Ok(())
}

#[test]
fn with_the_offload_off_there_is_silence() -> Result<()> {
    let test = "with_the_offload_off_there_is_silence";
    if !skip::root_or_skip(test) || !has_fault_a(test)? {
        return Ok(());
    }
    for underlay in FAMILIES {
        let lab = LabOptions { vxlan_tx_offload: false, ..options(underlay) }.build()?;
        lab.rules(&Rules::default())?;
        silent(&lab).with_context(|| format!("{underlay:?}"))?;
    }
    Ok(())
}

#[test]
fn with_the_fixed_rules_there_is_silence() -> Result<()> {
    let test = "with_the_fixed_rules_there_is_silence";
    if !skip::root_or_skip(test) || !has_fault_a(test)? {
        return Ok(());
    }
    for underlay in FAMILIES {
        for backend in Backend::ALL {
            let lab = options(underlay).build()?;
            lab.rules(&Rules { backend, form: RuleForm::Fixed, ..Rules::default() })?;
            silent(&lab).with_context(|| format!("{underlay:?}, {backend:?}"))?;
        }
    }
    Ok(())
}

/// Retries on a flow that NAT rewrote once are all bad, and all counted.
#[test]
fn the_flow_stays_bad() -> Result<()> {
    let test = "the_flow_stays_bad";
    if !skip::parameter_or_skip(test, TXREHASH) || !has_fault_a(test)? {
        return Ok(());
    }
    let lab = LabOptions { txrehash: Some(false), ..options(Family::V4) }.build()?;
    lab.rules(&Rules::default())?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let capture = Capture::vxlan(&lab)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(4)).is_err(), "connected");
    thread::sleep(A_MOMENT);
    let packets = capture.stop()?;
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    ensure!(packets.len() >= 3 && packets.iter().all(|packet| packet.seen == Some(0xffff)), "{packets:#?}");
    ensure!(packets.iter().all(|packet| packet.sport == packets[0].sport), "{packets:#?}");
    ensure!(finished.total("verdicts/nat-mangled-zero") == packets.len() as u64, "{}", finished.summary);
    ensure!(finished.events.iter().all(|event| event["cause"]["proved"] == true), "{:#?}", finished.events);
    Ok(())
}
