//! The lab itself: without vxmon, tcpdump, conntrack and the receiver's counters show fault B where it must be, and
//! nothing where it must not be. If one of these fails, what the other tests say means nothing.

use std::{
    io::Write,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use vxmon_tests::{
    Backend, Capture, Captured, Family, Lab, LabOptions, RuleForm, Rules, Topology,
    counters::{GsoCounter, conntrack_vxlan, udp_csum_errors},
    lab::{Side, TXREHASH, ethtool},
    skip,
    traffic::{self, BulkMode, BulkServer, HttpServer, OuterSum, RawSender, UdpClient, UdpMode, UdpServer, VnetHdr},
};

const LIMIT: Duration = Duration::from_secs(5);
/// The first SYN is sent again after a second.
const BEFORE_RETRY: Duration = Duration::from_millis(600);
/// Long enough to see that a packet which should not arrive does not.
const A_MOMENT: Duration = Duration::from_millis(150);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// What a request to the service looks like from all sides.
struct Request {
    /// None if it took longer than the caller wanted to wait.
    connect: Option<Duration>,
    packets: Vec<Captured>,
    rewritten: usize,
    dropped: u64,
}

impl Request {
    fn bad(&self) -> Vec<&Captured> {
        self.packets.iter().filter(|packet| packet.bad).collect()
    }
}

/// Connects to the service over `inner`, for at most `limit`, and looks.
fn request(lab: &Lab, inner: Family, limit: Duration) -> Result<Request> {
    let underlay = lab.options().underlay;
    let _server = HttpServer::start(&lab.b, lab.pod_socket(inner))?;
    let before = udp_csum_errors(&lab.b, underlay)?;
    let capture = Capture::vxlan(lab)?;
    let connect = traffic::http_get(&lab.a, lab.service_socket(inner), limit).ok();
    let packets = capture.stop()?;
    let entries = conntrack_vxlan(&lab.a, underlay, lab.options().port)?;
    Ok(Request {
        connect,
        packets,
        rewritten: entries.iter().filter(|entry| entry.port_rewritten()).count(),
        dropped: udp_csum_errors(&lab.b, underlay)? - before,
    })
}

fn with_rules(options: LabOptions, rules: &Rules) -> Result<Lab> {
    let lab = options.build()?;
    lab.rules(rules)?;
    Ok(lab)
}

/// The first SYN has a bad sum, its connection a new port, and the receiver drops it.
fn shows_fault_b(lab: &Lab, inner: Family) -> Result<()> {
    let request = request(lab, inner, A_MOMENT)?;
    let bad = request.bad();
    ensure!(bad.len() == 1, "{} bad packets of {:#?}", bad.len(), request.packets);
    ensure!(bad[0] == &request.packets[0], "not the first packet: {:#?}", request.packets);
    ensure!(bad[0].seen != bad[0].expected && bad[0].seen != Some(0), "{:?}", bad[0]);
    ensure!(request.rewritten == 1, "{} rewritten connections", request.rewritten);
    ensure!(request.dropped == 1, "the receiver dropped {}", request.dropped);
    ensure!(request.connect.is_none(), "connected after {:?}", request.connect);
    Ok(())
}

fn shows_no_fault(lab: &Lab, inner: Family) -> Result<()> {
    let request = request(lab, inner, BEFORE_RETRY)?;
    ensure!(!request.packets.is_empty(), "nothing captured");
    ensure!(request.bad().is_empty(), "bad packets: {:#?}", request.bad());
    ensure!(request.dropped == 0, "the receiver dropped {}", request.dropped);
    ensure!(request.connect.is_some(), "not connected within {BEFORE_RETRY:?}");
    Ok(())
}

#[test]
fn fault_b_shows_with_each_backend_and_family() -> Result<()> {
    if !skip::root_or_skip("fault_b_shows_with_each_backend_and_family") {
        return Ok(());
    }
    for underlay in FAMILIES {
        for backend in Backend::ALL {
            let rules = Rules { backend, comments: true, ..Rules::default() };
            let lab = with_rules(LabOptions { underlay, ..LabOptions::default() }, &rules)?;
            for inner in FAMILIES {
                let context = format!("{backend:?}, underlay {underlay:?}, inner {inner:?}");
                shows_fault_b(&lab, inner).map_err(|error| error.context(context))?;
                lab.flush_conntrack()?;
            }
        }
    }
    Ok(())
}

/// A retransmit has another source port (since 5.18 if `net.core.txrehash` is 1), hence a connection without NAT.
#[test]
fn the_first_retransmit_gets_through() -> Result<()> {
    if !skip::root_or_skip("the_first_retransmit_gets_through") {
        return Ok(());
    }
    let lab = with_rules(LabOptions { txrehash: Some(true), ..LabOptions::default() }, &Rules::default())?;
    let request = request(&lab, Family::V4, LIMIT)?;
    ensure!(request.bad().len() == 1 && request.dropped == 1, "{:#?}", request.packets);
    let about_a_second = Duration::from_millis(900)..Duration::from_millis(1500);
    ensure!(request.connect.is_some_and(|time| about_a_second.contains(&time)), "{:?}", request.connect);
    Ok(())
}

#[test]
fn the_flow_stays_bad_without_rehash() -> Result<()> {
    if !skip::parameter_or_skip("the_flow_stays_bad_without_rehash", TXREHASH) {
        return Ok(());
    }
    let lab = with_rules(LabOptions { txrehash: Some(false), ..LabOptions::default() }, &Rules::default())?;
    let request = request(&lab, Family::V4, Duration::from_millis(2500))?;
    ensure!(request.connect.is_none(), "connected after {:?}", request.connect);
    ensure!(request.bad().len() >= 2 && request.bad().len() == request.packets.len(), "{:#?}", request.packets);
    let (sum, port) = (request.packets[0].seen, request.packets[0].sport);
    ensure!(request.packets.iter().all(|packet| packet.sport == port), "{:#?}", request.packets);
    ensure!(request.rewritten == 1 && sum != Some(0));
    Ok(())
}

/// NAT rules are asked for an outer connection's first packet only, and what that is depends on the outer source port, a hash.
/// Here all hashes are the same.
#[test]
fn inner_connections_of_one_outer_port_share_its_fate() -> Result<()> {
    if !skip::root_or_skip("inner_connections_of_one_outer_port_share_its_fate") {
        return Ok(());
    }
    for underlay in FAMILIES {
        // `udp_flow_src_port()`, include/net/udp.h: min + (hash * (max - min) >> 32); 7.2 draws the last port, too.
        let one_port = ("net.ipv4.ip_local_port_range".to_owned(), "40000 40000".to_owned());
        let options = LabOptions { underlay, sysctls: vec![one_port], ..LabOptions::default() };
        let lab = with_rules(options, &Rules::default())?;
        // Bad as ever; and a second connection, whose own socket draws another hash, is bad in the same outer connection.
        let (first, second) = (request(&lab, Family::V4, A_MOMENT)?, request(&lab, Family::V6, A_MOMENT)?);
        let packets: Vec<&Captured> = first.packets.iter().chain(&second.packets).collect();
        ensure!(packets.len() == 2 && packets.iter().all(|packet| packet.bad), "{packets:#?}");
        ensure!(packets[0].sport == packets[1].sport && packets[0].sport != 40_000, "{packets:#?}");
        ensure!(second.rewritten == 1 && second.dropped == 1, "{} rewritten", second.rewritten);
        // To the pod itself: not marked, so the outer connection is not rewritten. Nor is it for the service after that.
        lab.flush_conntrack()?;
        let server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        traffic::http_get(&lab.a, lab.pod_socket(Family::V4), LIMIT)?;
        drop(server);
        let third = request(&lab, Family::V6, BEFORE_RETRY)?;
        ensure!(third.connect.is_some() && third.rewritten == 0 && third.bad().is_empty(), "{:#?}", third.packets);
        ensure!(third.packets.iter().all(|packet| packet.sport == 40_000), "{:#?}", third.packets);
    }
    Ok(())
}

#[test]
fn fixed_rules_have_no_fault() -> Result<()> {
    if !skip::root_or_skip("fixed_rules_have_no_fault") {
        return Ok(());
    }
    for underlay in FAMILIES {
        for backend in Backend::ALL {
            let rules = Rules { backend, form: RuleForm::Fixed, ..Rules::default() };
            let lab = with_rules(LabOptions { underlay, ..LabOptions::default() }, &rules)?;
            for inner in FAMILIES {
                let context = format!("{backend:?}, underlay {underlay:?}, inner {inner:?}");
                shows_no_fault(&lab, inner).map_err(|error| error.context(context))?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_rule_ahead_of_the_fixed_ones_brings_the_fault_back() -> Result<()> {
    if !skip::root_or_skip("a_rule_ahead_of_the_fixed_ones_brings_the_fault_back") {
        return Ok(());
    }
    for backend in Backend::ALL {
        for form in [RuleForm::OldBeforeFixed, RuleForm::SnatBeforeFixed] {
            let lab = with_rules(LabOptions::default(), &Rules { backend, form, ..Rules::default() })?;
            for inner in FAMILIES {
                let context = format!("{backend:?}, {form:?}, inner {inner:?}");
                shows_fault_b(&lab, inner).map_err(|error| error.context(context))?;
                lab.flush_conntrack()?;
            }
        }
    }
    Ok(())
}

#[test]
fn rules_can_be_flushed() -> Result<()> {
    if !skip::root_or_skip("rules_can_be_flushed") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    for backend in Backend::ALL {
        lab.rules(&Rules { backend, ..Rules::default() })?;
    }
    lab.flush_rules()?;
    let left = lab.a.run("iptables-legacy-save", &[])? + &lab.a.run("nft", &["list", "ruleset"])?;
    ensure!(!left.contains("KUBE") && !left.contains("kube"), "left: {left}");
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_millis(100)).is_err());
    Ok(())
}

#[test]
fn every_mitigation_and_topology_works() -> Result<()> {
    if !skip::root_or_skip("every_mitigation_and_topology_works") {
        return Ok(());
    }
    let rules = Rules::default();
    for underlay in FAMILIES {
        let options = LabOptions { underlay, ..LabOptions::default() };
        // No inner offload: the inner sum is complete before the packet is encapsulated, so the outer one is not LCO.
        let lab = with_rules(LabOptions { vxlan_tx_offload: false, ..options.clone() }, &rules)?;
        shows_no_fault(&lab, Family::V4)?;
        // No outer sum: nothing to go stale (on a kernel without fault A).
        let lab = with_rules(LabOptions { udpcsum: false, ..options.clone() }, &rules)?;
        shows_no_fault(&lab, Family::V4)?;
        for topology in [Topology::Bridge, Topology::Macvlan] {
            let lab = with_rules(LabOptions { topology, ..options.clone() }, &rules)?;
            shows_fault_b(&lab, Family::V4).map_err(|error| error.context(format!("{topology:?}, {underlay:?}")))?;
        }
        let lab = with_rules(
            LabOptions { fixed_lower: false, mtu: 9000, segmentation: false, port: 4789, vni: 4096, ..options },
            &rules,
        )?;
        shows_fault_b(&lab, Family::V4)?;
    }
    Ok(())
}

#[test]
fn offload_of_the_uplink_hides_the_fault_from_the_receiver() -> Result<()> {
    if !skip::root_or_skip("offload_of_the_uplink_hides_the_fault_from_the_receiver") {
        return Ok(());
    }
    let lab = with_rules(LabOptions { uplink_tx_offload: true, ..LabOptions::default() }, &Rules::default())?;
    let request = request(&lab, Family::V4, BEFORE_RETRY)?;
    ensure!(request.rewritten == 1 && request.dropped == 0, "{} {}", request.rewritten, request.dropped);
    ensure!(request.connect.is_some(), "not connected within {BEFORE_RETRY:?}");
    Ok(())
}

#[test]
fn gso_packets_reach_the_egress_of_the_uplink() -> Result<()> {
    if !GsoCounter::can_run("gso_packets_reach_the_egress_of_the_uplink")? {
        return Ok(());
    }
    for underlay in FAMILIES {
        for (uplink_tx_offload, segmentation) in [(false, true), (true, true), (false, false)] {
            let options = LabOptions { underlay, uplink_tx_offload, segmentation, ..LabOptions::default() };
            let lab = options.build()?;
            for inner in FAMILIES {
                let address = lab.pod_socket(inner);
                let server = BulkServer::start(&lab.b, address)?;
                let counter = GsoCounter::start(&lab.a, "uplink", 1500)?;
                let capture = Capture::vxlan(&lab)?;
                for mode in BulkMode::ALL {
                    traffic::bulk_send(&lab.a, address, 4 << 20, mode)?;
                }
                let (big, packets) = (counter.count()?, capture.stop()?);
                let context = format!("{underlay:?} {inner:?} tx {uplink_tx_offload} segmentation {segmentation}");
                ensure!(server.received() == 12 << 20, "{context}: received {}", server.received());
                ensure!((big > 0) == segmentation, "{context}: {big} big packets");
                // tcpdump sees what the device sees: cut by the kernel unless the device does it.
                let long = packets.iter().filter(|packet| packet.length > 1500).count();
                ensure!((long > 0) == (uplink_tx_offload && segmentation), "{context}: {long} long packets captured");
                if !uplink_tx_offload {
                    ensure!(packets.iter().all(|packet| !packet.bad), "{context}: bad packets");
                }
            }
        }
    }
    Ok(())
}

/// GSO stores the pseudo-header sum only, which the kernel completes after NAT: so bulk data works on a flow whose
/// handshake would not.
#[test]
fn only_small_packets_of_a_rewritten_flow_are_bad() -> Result<()> {
    if !GsoCounter::can_run("only_small_packets_of_a_rewritten_flow_are_bad")? {
        return Ok(());
    }
    for underlay in FAMILIES {
        // Offload on, so that the handshake passes; then off, so that the sums of the same flow count.
        let options = LabOptions { underlay, uplink_tx_offload: true, ..LabOptions::default() };
        let lab = with_rules(options, &Rules::default())?;
        let server = BulkServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        let mut stream = lab.a.enter(|| Ok(TcpStream::connect_timeout(&lab.service_socket(Family::V4), LIMIT)?))?;
        for node in [&lab.a, &lab.b] {
            ethtool(node, "uplink", &["tx", "off"])?;
        }
        let (capture, counter) = (Capture::vxlan(&lab)?, GsoCounter::start(&lab.a, "uplink", 1500)?);
        stream.write_all(&[7; 30_000])?;
        let start = Instant::now();
        while server.received() < 30_000 {
            ensure!(start.elapsed() < LIMIT, "{underlay:?}: {} bytes arrived", server.received());
            thread::sleep(Duration::from_millis(1));
        }
        stream.write_all(&[7; 30])?;
        thread::sleep(A_MOMENT);
        let (big, packets) = (counter.count()?, capture.stop()?);
        ensure!(big > 0, "no GSO packet");
        let (mut small, large): (Vec<_>, Vec<_>) = packets.iter().partition(|packet| packet.length < 200);
        // A retransmission, where the machine is slow, has another port.
        let port = small.first().map(|packet| packet.sport);
        small.retain(|packet| Some(packet.sport) == port);
        ensure!(large.len() > 10 && large.iter().all(|packet| !packet.bad), "{large:#?}");
        ensure!(!small.is_empty() && small.iter().all(|packet| packet.bad), "{small:#?}");
    }
    Ok(())
}

#[test]
fn every_kind_of_datagram_arrives() -> Result<()> {
    if !skip::root_or_skip("every_kind_of_datagram_arrives") {
        return Ok(());
    }
    for underlay in FAMILIES {
        let lab = LabOptions { underlay, ..LabOptions::default() }.build()?;
        for inner in FAMILIES {
            let server = UdpServer::start(&lab.b, lab.pod_udp(inner), true)?;
            let client = UdpClient::connect(&lab.a, lab.pod_udp(inner))?;
            for size in [0, 1, 100, 1401, 5000] {
                ensure!(client.ask(size, LIMIT)?.is_some(), "{underlay:?} {inner:?}: {size} bytes lost");
            }
            let before = server.datagrams();
            client.send(1200, UdpMode::Corked { parts: 3 })?;
            client.send(9001, UdpMode::Corked { parts: 9 })?;
            client.send(12_000, UdpMode::Segment { size: 1200 })?;
            ensure!(server.wait(before + 12, LIMIT), "{underlay:?} {inner:?}: {} arrived", server.datagrams() - before);
            for size in [56, 3000] {
                let echo = traffic::icmp_echo(&lab.a, Side::B.pod(inner), size, LIMIT)?;
                ensure!(echo.is_some(), "{underlay:?} {inner:?}: echo of {size} bytes lost");
            }
        }
        ensure!(udp_csum_errors(&lab.b, underlay)? == 0);
    }
    Ok(())
}

#[test]
fn dns_through_the_service_is_lost() -> Result<()> {
    if !skip::root_or_skip("dns_through_the_service_is_lost") {
        return Ok(());
    }
    let lab = with_rules(LabOptions::default(), &Rules::default())?;
    let _server = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let limit = Duration::from_millis(300);
    ensure!(traffic::udp_ask(&lab.a, lab.pod_udp(Family::V4), 40, limit)?.is_some());
    let client = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?;
    for _ in 0..3 {
        ensure!(client.ask(40, limit)?.is_none(), "answered through the service");
    }
    ensure!(udp_csum_errors(&lab.b, Family::V4)? == 3);
    Ok(())
}

#[test]
fn frames_made_by_hand_are_what_they_say() -> Result<()> {
    if !skip::root_or_skip("frames_made_by_hand_are_what_they_say") {
        return Ok(());
    }
    for underlay in FAMILIES {
        let lab = LabOptions { underlay, ..LabOptions::default() }.build()?;
        let capture = Capture::vxlan(&lab)?;
        let mut frame = lab.frame();
        for sum in [OuterSum::Right, OuterSum::Value(0x1234), OuterSum::StalePort(1111), OuterSum::Zero] {
            frame.sum = sum;
            traffic::send_raw(&lab.a, "uplink", &frame.bytes())?;
        }
        // The device fills the sum in: from the pseudo-header sum, which is all that the field holds.
        let bytes = frame.bytes();
        let udp = bytes.len() - frame.inner.len() - 16;
        frame.sum = OuterSum::Value(frame.pseudo_sum());
        RawSender::open(&lab.a, "uplink")?.send_vnet(VnetHdr::partial(udp as u16, 6), &frame.bytes())?;
        let packets = capture.stop()?;
        let bad: Vec<bool> = packets.iter().map(|packet| packet.bad).collect();
        // A zero is none; over IPv6 the receiver's VXLAN device has to allow it, and does.
        ensure!(bad == [false, true, true, false, false], "{underlay:?}: {packets:#?}");
        ensure!(packets[1].seen == Some(0x1234), "{packets:#?}");
        ensure!(packets[3].seen == Some(0), "{packets:#?}");
        ensure!(udp_csum_errors(&lab.b, underlay)? == 2);
    }
    Ok(())
}

/// tcpdump does not get to run for a while, as on a busy machine: it misses nothing.
#[test]
fn a_capture_waits_for_tcpdump() -> Result<()> {
    if !skip::root_or_skip("a_capture_waits_for_tcpdump") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let capture = Capture::vxlan(&lab)?;
    let tcpdump = capture.pid();
    kill(tcpdump, Signal::SIGSTOP)?;
    let sender = RawSender::open(&lab.a, &lab.options().uplink)?;
    for sport in 20_000..20_050 {
        sender.send(&traffic::Frame { sport, ..lab.frame() }.bytes())?;
    }
    let goes_on = thread::spawn(move || {
        thread::sleep(Duration::from_millis(400));
        kill(tcpdump, Signal::SIGCONT)
    });
    let packets = capture.stop()?;
    ensure!(goes_on.join().is_ok_and(|result| result.is_ok()), "tcpdump did not go on");
    ensure!(packets.len() == 50, "{} of 50 packets", packets.len());
    Ok(())
}

#[test]
fn a_storm_arrives() -> Result<()> {
    if !skip::root_or_skip("a_storm_arrives") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let frames: Vec<Vec<u8>> = (0..1000)
        .map(|flow| {
            let mut frame = lab.frame();
            (frame.sport, frame.sum) = (20_000 + flow, OuterSum::StalePort(1));
            frame.bytes()
        })
        .collect();
    let storm = RawSender::open(&lab.a, "uplink")?.storm(&frames, 200_000)?;
    ensure!(storm.sent == 200_000);
    let start = Instant::now();
    while udp_csum_errors(&lab.b, Family::V4)? < 190_000 {
        ensure!(start.elapsed() < LIMIT, "{} arrived", udp_csum_errors(&lab.b, Family::V4)?);
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[test]
fn iperf3_reports_throughput() -> Result<()> {
    if !skip::root_or_skip("iperf3_reports_throughput") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let result = traffic::iperf3(&lab.a, &lab.b, Side::B.pod(Family::V4), 1, &[])?;
    ensure!(result.gbits > 0.0, "{result:?}");
    Ok(())
}

#[test]
fn the_vxlan_device_can_be_made_again() -> Result<()> {
    if !skip::root_or_skip("the_vxlan_device_can_be_made_again") {
        return Ok(());
    }
    let lab = LabOptions { udp_timeout: Some(5), ..LabOptions::default() }.build()?;
    let _server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    lab.delete_vxlan(Side::A)?;
    lab.create_vxlan(Side::A)?;
    traffic::http_get(&lab.a, lab.pod_socket(Family::V4), LIMIT)?;
    ethtool(&lab.a, "flannel.1", &["tx-checksum-ip-generic", "off"])?;
    traffic::http_get(&lab.a, lab.pod_socket(Family::V4), LIMIT)?;
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    if !skip::root_or_skip("nothing_is_left_behind") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let paths = [lab.a.path(), lab.b.path()];
    ensure!(paths.iter().all(|path| path.exists()));
    let mut sleeper = lab.a.command("sleep").arg("60").spawn()?;
    drop(lab);
    ensure!(!sleeper.wait()?.success());
    ensure!(paths.iter().all(|path| !path.exists()));
    Ok(())
}
