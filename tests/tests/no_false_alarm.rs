//! No false alarm: whatever the offloads, families and sizes, healthy traffic has no anomaly, and nothing goes unverified
//! but what nobody can verify: fragments. Each way in which a good checksum can stand in a packet must have occurred.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use vxmon_tests::{
    Backend, Family, Lab, LabOptions, RuleForm, Rules, Topology, Vxmon,
    counters::udp_csum_errors,
    lab::Side,
    skip,
    traffic::{self, BulkMode, BulkServer, HttpServer, UdpClient, UdpMode, UdpServer},
    vxmon::{Finished, GOOD_VERDICTS, anomalies, by_perf},
};

const LIMIT: Duration = Duration::from_secs(5);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Labs at a time: they mostly wait for programs to start.
const WORKERS: usize = 3;
const BULK: u64 = 1 << 20;

/// Names of verdicts and of reasons for none, with the packets that had them.
type Counts = BTreeMap<String, u64>;

/// One line of the matrix.
#[derive(Clone)]
struct Case {
    options: LabOptions,
    args: &'static [&'static str],
}

impl Case {
    /// Whether it is one of those that show what there is to see without the skb's metadata.
    fn is_enough(&self) -> bool {
        self.options.mtu == 1500 || self.options.segmentation && self.options.vxlan_tx_offload
    }

    fn name(&self) -> String {
        let options = &self.options;
        let on = |yes: bool| if yes { "+" } else { "-" };
        format!(
            "{:?} {:?} mtu {} {}udpcsum {}uplink-tx {}vxlan-tx {}segmentation {}",
            options.topology,
            options.underlay,
            options.mtu,
            on(options.udpcsum),
            on(options.uplink_tx_offload),
            on(options.vxlan_tx_offload),
            on(options.segmentation),
            self.args.join(" ")
        )
    }
}

/// All combinations.
fn matrix(args: &'static [&'static str]) -> Vec<Case> {
    (0..64_u8)
        .map(|bits| {
            let bit = |n: u8| bits >> n & 1 == 1;
            let options = LabOptions {
                underlay: FAMILIES[usize::from(bit(0))],
                mtu: if bit(1) { 9000 } else { 1500 },
                udpcsum: bit(2),
                uplink_tx_offload: bit(3),
                vxlan_tx_offload: bit(4),
                segmentation: bit(5),
                ..LabOptions::default()
            };
            Case { options, args }
        })
        .collect()
}

/// Every kind of packet that takes a path of its own through the kernel, over both inner families.
fn traffic(lab: &Lab) -> Result<()> {
    let mtu = lab.options().mtu as usize;
    for inner in FAMILIES {
        let bulk = BulkServer::start(&lab.b, lab.pod_socket(inner))?;
        for mode in BulkMode::ALL {
            traffic::bulk_send(&lab.a, lab.pod_socket(inner), BULK, mode)?;
        }
        ensure!(bulk.received() == 3 * BULK, "{} bytes arrived", bulk.received());
        let udp = UdpServer::start(&lab.b, lab.pod_udp(inner), true)?;
        let client = UdpClient::connect(&lab.a, lab.pod_udp(inner))?;
        // Empty, odd, even, the largest that fits, one more than a few packets.
        for size in [0, 1, 40, mtu - 200, 2 * mtu + 1] {
            ensure!(client.ask(size, LIMIT)?.is_some(), "{inner:?}: {size} bytes by UDP lost");
        }
        let before = udp.datagrams();
        client.send(1200, UdpMode::Corked { parts: 3 })?;
        client.send(1201, UdpMode::Corked { parts: 7 })?;
        client.send(3 * mtu, UdpMode::Corked { parts: 5 })?;
        client.send(12_000, UdpMode::Segment { size: 1200 })?;
        ensure!(udp.wait(before + 13, LIMIT), "{inner:?}: only {} datagrams", udp.datagrams() - before);
        for size in [56, 57, 2 * mtu] {
            let echo = traffic::icmp_echo(&lab.a, Side::B.pod(inner), size, LIMIT)?;
            ensure!(echo.is_some(), "{inner:?}: echo of {size} bytes lost");
        }
    }
    Ok(())
}

/// What the summary counts, by name.
fn counts(finished: &Finished) -> Counts {
    let sections = [("", "verdicts"), ("unverified ", "unverified")];
    let all = sections.into_iter().flat_map(|(prefix, section)| {
        let map = finished.summary["packets"][section].as_object().into_iter().flatten();
        map.map(move |(name, count)| (format!("{prefix}{name}"), count.as_u64().unwrap_or(0)))
    });
    all.filter(|(_, count)| *count > 0).collect()
}

fn no_alarm(lab: &Lab, finished: &Finished) -> Result<()> {
    finished.adds_up()?;
    ensure!(finished.events.is_empty(), "{:#?}", finished.events);
    ensure!(anomalies(&finished.summary["packets"]) == 0, "{}", finished.summary);
    for device in [lab.lower(Side::A), &lab.options().vxlan] {
        let device = finished.device(device).with_context(|| format!("no {device} in the summary"))?;
        ensure!(device["packets"]["seen"].as_u64() > Some(50), "{device}");
    }
    Ok(())
}

/// One lab; its counts.
fn run(case: &Case, unverified: &[&str]) -> Result<Counts> {
    let lab = case.options.clone().build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&["--format", "json"], case.args].concat())?;
    traffic(&lab)?;
    let finished = vxmon.stop()?;
    no_alarm(&lab, &finished)?;
    let counts = counts(&finished);
    for name in counts.keys() {
        let allowed = |reason: &&str| *name == format!("unverified {reason}");
        ensure!(GOOD_VERDICTS.contains(&name.as_str()) || unverified.iter().any(allowed), "{name}: {counts:?}");
    }
    ensure!(counts.contains_key("unverified fragment"), "no inner fragment was sent: {counts:?}");
    ensure!(udp_csum_errors(&lab.b, case.options.underlay)? == 0, "the receiver dropped packets");
    Ok(counts)
}

/// Runs all cases, prints a table, and returns the sum of the counts; fails with every case that failed.
fn run_all(cases: &[Case], unverified: &[&str]) -> Result<Counts> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = run(case, unverified);
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(case.name(), result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(results.len() == cases.len(), "{} results of {} cases", results.len(), cases.len());
    let (mut sum, mut failed) = (Counts::new(), Vec::new());
    let mut table = String::new();
    for (name, result) in results {
        match result {
            Ok(counts) => {
                let columns: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
                table += &format!("{name:<72} {}\n", columns.join(", "));
                for (name, count) in counts {
                    *sum.entry(name).or_default() += count;
                }
            }
            Err(error) => failed.push(format!("{name}: {error:#}")),
        }
    }
    vxmon_tests::cleanup::note(&format!("{table}in all: {sum:?}"));
    if failed.is_empty() { Ok(sum) } else { Err(anyhow!("{} cases failed:\n{}", failed.len(), failed.join("\n"))) }
}

fn each_occurred(sum: &Counts) -> Result<()> {
    for verdict in GOOD_VERDICTS {
        ensure!(sum.get(verdict).is_some_and(|count| *count > 0), "no packet was {verdict}: {sum:?}");
    }
    Ok(())
}

#[test]
fn healthy_traffic_has_no_anomaly() -> Result<()> {
    if !skip::root_or_skip("healthy_traffic_has_no_anomaly") {
        return Ok(());
    }
    let mut cases = matrix(&[]);
    if by_perf() {
        cases.retain(Case::is_enough);
    }
    each_occurred(&run_all(&cases, &["fragment"])?)
}

/// Without the skb's metadata some packets can be read in several ways, or not be summed up: those may go unverified.
#[test]
fn healthy_traffic_has_no_anomaly_without_btf() -> Result<()> {
    if !skip::root_or_skip("healthy_traffic_has_no_anomaly_without_btf") {
        return Ok(());
    }
    let mut cases = matrix(&["--no-btf"]);
    cases.retain(Case::is_enough);
    let sum = run_all(&cases, &["fragment", "ambiguous"])?;
    let (ambiguous, all) = (sum.get("unverified ambiguous").copied().unwrap_or(0), sum.values().sum::<u64>());
    vxmon_tests::cleanup::note(&format!("without BTF {ambiguous} of {all} packets are ambiguous"));
    ensure!(ambiguous * 10 < all, "{ambiguous} of {all} packets are ambiguous");
    Ok(())
}

#[test]
fn healthy_traffic_has_no_anomaly_through_clsact() -> Result<()> {
    if !skip::root_or_skip("healthy_traffic_has_no_anomaly_through_clsact") {
        return Ok(());
    }
    let mut cases = matrix(&["--hook", "clsact"]);
    cases.retain(|case| case.options.mtu == 1500 && (case.options.uplink_tx_offload == case.options.segmentation));
    each_occurred(&run_all(&cases, &["fragment"])?)
}

/// By packet sockets, which see packets when the kernel has done its part: segmented, and summed where the device does not.
#[test]
fn healthy_traffic_has_no_anomaly_by_packet_sockets() -> Result<()> {
    if !skip::root_or_skip("healthy_traffic_has_no_anomaly_by_packet_sockets") {
        return Ok(());
    }
    each_occurred(&run_all(&matrix(&["--engine", "packet-socket"]), &["fragment"])?)
}

#[test]
fn healthy_traffic_has_no_anomaly_by_packet_sockets_without_a_ring() -> Result<()> {
    if !skip::root_or_skip("healthy_traffic_has_no_anomaly_by_packet_sockets_without_a_ring") {
        return Ok(());
    }
    let mut cases = matrix(&["--engine", "packet-socket", "--no-packet-ring"]);
    cases.retain(|case| case.options.mtu == 1500 && (case.options.uplink_tx_offload == case.options.segmentation));
    each_occurred(&run_all(&cases, &["fragment"])?)
}

/// On VLANs, bonds and bridges: with all offloads of the wire and none, with and without big packets.
#[test]
fn healthy_traffic_has_no_anomaly_on_stacked_devices() -> Result<()> {
    let test = "healthy_traffic_has_no_anomaly_on_stacked_devices";
    if !skip::root_or_skip(test) {
        return Ok(());
    }
    let mut cases = Vec::new();
    for (number, topology) in Topology::RARE.into_iter().enumerate() {
        if let Some(why) = topology.missing()? {
            skip::skip(test, &why);
            return Ok(());
        }
        for bits in 0..4_u8 {
            let options = LabOptions {
                underlay: FAMILIES[(number + usize::from(bits)) % 2],
                topology,
                uplink_tx_offload: bits & 1 == 1,
                segmentation: bits & 2 == 2,
                ..LabOptions::default()
            };
            cases.push(Case { options, args: &[] });
        }
        let options = LabOptions { topology, underlay: FAMILIES[number % 2], ..LabOptions::default() };
        cases.push(Case { options, args: &["--engine", "packet-socket"] });
    }
    run_all(&cases, &["fragment"]).map(drop)
}

/// Datagrams up to the longest, each summed over all of it on the uplink.
#[test]
fn the_longest_packets_are_summed() -> Result<()> {
    if !skip::root_or_skip("the_longest_packets_are_summed") {
        return Ok(());
    }
    for underlay in FAMILIES {
        let options = LabOptions {
            underlay,
            mtu: 65_535,
            uplink_tx_offload: false,
            vxlan_tx_offload: false,
            segmentation: false,
            ..LabOptions::default()
        };
        let lab = options.build()?;
        let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
        let sizes = [16_300, 16_384, 32_768, 49_153, 60_000, 65_300];
        for inner in FAMILIES {
            let _udp = UdpServer::start(&lab.b, lab.pod_udp(inner), true)?;
            let client = UdpClient::connect(&lab.a, lab.pod_udp(inner))?;
            for size in sizes {
                ensure!(client.ask(size, LIMIT)?.is_some(), "{inner:?}: {size} bytes by UDP lost");
            }
        }
        let finished = vxmon.stop()?;
        finished.adds_up()?;
        let counts = counts(&finished);
        // On the uplink; on the VXLAN device the sum is still to be made. Once for each family inside.
        let wanted = 2 * sizes.len() as u64;
        ensure!(counts.get("valid").is_some_and(|valid| *valid >= wanted), "{underlay:?}: {counts:?}");
        ensure!(counts.keys().all(|name| GOOD_VERDICTS.contains(&name.as_str())), "{underlay:?}: {counts:?}");
        ensure!(udp_csum_errors(&lab.b, underlay)? == 0, "the receiver dropped packets");
    }
    Ok(())
}

/// The rules that kube-proxy has since the fix, and the traffic that the old ones broke.
#[test]
fn fixed_rules_have_no_anomaly() -> Result<()> {
    if !skip::root_or_skip("fixed_rules_have_no_anomaly") {
        return Ok(());
    }
    for underlay in FAMILIES {
        for backend in Backend::ALL {
            let lab = LabOptions { underlay, ..LabOptions::default() }.build()?;
            lab.rules(&Rules { backend, form: RuleForm::Fixed, ..Rules::default() })?;
            let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
            for inner in FAMILIES {
                let _http = HttpServer::start(&lab.b, lab.pod_socket(inner))?;
                let _udp = UdpServer::start(&lab.b, lab.pod_udp(inner), true)?;
                for _ in 0..5 {
                    traffic::http_get(&lab.a, lab.service_socket(inner), LIMIT)?;
                    ensure!(traffic::udp_ask(&lab.a, lab.service_udp(inner), 40, LIMIT)?.is_some());
                }
            }
            no_alarm(&lab, &vxmon.stop()?).with_context(|| format!("{backend:?} {underlay:?}"))?;
        }
    }
    Ok(())
}
