//! The story of a connection, on the kernel itself: when it recovers is when vxmon said that it would, and with as many bad
//! packets as tcpdump saw. Conntrack timeouts are shortened, so that the tests are too.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Capture, Family, Lab, LabOptions, RuleForm, Rules, Vxmon,
    lab::{self, TXREHASH},
    skip,
    traffic::{self, HttpServer, UdpClient, UdpServer},
    vxmon::{Finished, seconds_between},
};

const JSON: [&str; 2] = ["--format", "json"];
/// How far from the expected time a retry may leave: timers are late by up to an eighth.
const NEAR: f64 = 1.5;
const A_MOMENT: Duration = Duration::from_millis(150);

/// 6.5 and later; before, timeouts double from the first on.
const LINEAR: &str = "net.ipv4.tcp_syn_linear_timeouts";
/// Where there is [`LINEAR`], if nobody changed it.
const LINEAR_DEFAULT: u32 = 4;

fn can_run(test: &str, txrehash: bool, linear: u32) -> bool {
    let needed = [(!txrehash).then_some(TXREHASH), (1..LINEAR_DEFAULT).contains(&linear).then_some(LINEAR)];
    skip::root_or_skip(test) && needed.into_iter().flatten().all(|parameter| skip::parameter_or_skip(test, parameter))
}

fn build(txrehash: bool, udp_timeout: u32, linear: u32) -> Result<Lab> {
    let linear = skip::has_parameter(LINEAR).then(|| (LINEAR.to_owned(), linear.to_string()));
    let options = LabOptions {
        txrehash: Some(txrehash),
        udp_timeout: Some(udp_timeout),
        sysctls: linear.into_iter().collect(),
        ..LabOptions::default()
    };
    let lab = options.build()?;
    lab.rules(&Rules { form: RuleForm::Before1179, ..Rules::default() })?;
    Ok(lab)
}

fn the_one<'finished>(finished: &'finished Finished, kind: &str) -> Result<&'finished Value> {
    let found: Vec<&Value> = finished.all.iter().filter(|line| line["type"] == kind).collect();
    ensure!(found.len() == 1, "{} lines of type {kind}: {:#?}", found.len(), finished.all);
    Ok(found[0])
}

fn bad_on_the_wire(capture: Capture) -> Result<u64> {
    Ok(capture.stop()?.iter().filter(|packet| packet.bad).count() as u64)
}

/// With 3 s for conntrack: SYNs after 1, 3 and 7 s, of which the last is more than 3 s behind the one before.
#[test]
fn a_connection_recovers_when_it_was_expected_to() -> Result<()> {
    if !can_run("a_connection_recovers_when_it_was_expected_to", false, 0) {
        return Ok(());
    }
    let lab = build(false, 3, 0)?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let capture = Capture::vxlan(&lab)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    let connect = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(20))?.as_secs_f64();
    let _ = vxmon.wait_type("recovered", 1, Duration::from_secs(3));
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    let bad = bad_on_the_wire(capture)?;

    let recovered = the_one(&finished, "recovered")?;
    ensure!(bad >= 2, "the lab is broken: {bad} bad packets");
    ensure!(recovered["outcome"] == "connected" && recovered["by"] == "conntrack-timeout", "{recovered}");
    ensure!(recovered["bad_syns"] == bad && recovered["bad_packets"] == bad, "{bad} on the wire: {recovered}");
    let after = recovered["after_ms"].as_f64().context("no time")? / 1e3;
    ensure!((after - connect).abs() < 0.5, "connected after {connect} s: {recovered}");
    let attempts = recovered["attempts"].as_array().context("no attempts")?;
    ensure!(attempts.iter().filter(|attempt| attempt["bad"] == true).count() as u64 == bad, "{recovered}");

    let (first, last) = (&finished.events[0], finished.events.last().context("no events")?);
    for event in [first, last] {
        let flow = &event["flow"];
        ensure!(flow["conntrack_timeout_s"] == 3 && flow["expected_by"] == "conntrack-timeout", "{event}");
        let off = seconds_between(&flow["expected_recovery"], &recovered["ts"])?;
        ensure!(off.abs() < NEAR, "{off} s from what was expected: {event} {recovered}");
    }
    ensure!(last["flow"]["attempt"] == bad, "{last}");
    let connections = &finished.summary["connections"];
    ensure!(connections["bad"] == 1 && connections["recovered"] == 1 && connections["open"] == 0, "{connections}");
    Ok(())
}

/// Linear timeouts (Linux 6.5) make more retries of the same gap, none of which gets through.
#[test]
fn linear_timeouts_are_reckoned_with() -> Result<()> {
    if !can_run("linear_timeouts_are_reckoned_with", false, 2) {
        return Ok(());
    }
    let lab = build(false, 2, 2)?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let capture = Capture::vxlan(&lab)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(20))?;
    let _ = vxmon.wait_type("recovered", 1, Duration::from_secs(3));
    let finished = vxmon.stop()?;
    let (bad, recovered) = (bad_on_the_wire(capture)?, the_one(&finished, "recovered")?);
    // After 1, 2, 3 and, two seconds later, 5 s.
    ensure!(bad == 4 && recovered["bad_syns"] == 4, "{bad} on the wire: {recovered}");
    let off = seconds_between(&finished.events[0]["flow"]["expected_recovery"], &recovered["ts"])?;
    ensure!(off.abs() < NEAR, "{off} s from what was expected: {:#?}", finished.all);
    Ok(())
}

#[test]
fn another_source_port_recovers_at_the_first_retry() -> Result<()> {
    if !can_run("another_source_port_recovers_at_the_first_retry", true, LINEAR_DEFAULT) {
        return Ok(());
    }
    let lab = build(true, 30, LINEAR_DEFAULT)?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(20))?;
    let _ = vxmon.wait_type("recovered", 1, Duration::from_secs(3));
    let finished = vxmon.stop()?;
    let recovered = the_one(&finished, "recovered")?;
    ensure!(recovered["outcome"] == "connected" && recovered["by"] == "source-port", "{recovered}");
    ensure!(recovered["bad_syns"] == 1, "{recovered}");
    let flow = &finished.events[0]["flow"];
    ensure!(flow["expected_by"] == "source-port" && flow["conntrack_timeout_s"] == 30, "{flow}");
    let off = seconds_between(&flow["expected_recovery"], &recovered["ts"])?;
    ensure!(off.abs() < NEAR, "{off} s from what was expected: {:#?}", finished.all);
    Ok(())
}

/// A query that is repeated on the same socket: a repeat that comes early keeps the outer entry. One that comes late finds
/// the inner connection forgotten as well, so that it is marked, masqueraded and broken anew, as another connection. Only a
/// remedy ends that.
#[test]
fn a_query_gets_through_when_offload_is_turned_off() -> Result<()> {
    if !can_run("a_query_gets_through_when_offload_is_turned_off", false, 0) {
        return Ok(());
    }
    let lab = build(false, 2, 0)?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let capture = Capture::vxlan(&lab)?;
    // From elsewhere: the timeout is that of the namespace it watches.
    let path = lab.a.path();
    let path = path.to_str().context("not UTF-8")?;
    let vxmon = Vxmon::attach_to(&lab.b, 2, &[&JSON[..], &["--netns", path]].concat())?;
    let client = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?;
    for pause in [950, 950, 3500, 0] {
        ensure!(client.ask(40, A_MOMENT)?.is_none(), "answered");
        thread::sleep(Duration::from_millis(pause));
    }
    lab::ethtool(&lab.a, &lab.options().vxlan, &["tx-checksum-ip-generic", "off"])?;
    ensure!(client.ask(40, Duration::from_secs(2))?.is_some(), "not answered without offload");
    let _ = vxmon.wait_type("recovered", 1, Duration::from_secs(3));
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    let (bad, recovered) = (bad_on_the_wire(capture)?, the_one(&finished, "recovered")?);
    ensure!(bad == 4 && recovered["bad_packets"] == 1, "{bad} on the wire: {recovered}");
    // It left by the same outer flow: neither the entry nor the port was it that changed.
    ensure!(recovered["outcome"] == "good-again" && recovered["by"].is_null(), "{recovered}");
    ensure!(recovered["inner"]["proto"] == "udp" && recovered["bad_syns"] == 0, "{recovered}");
    let attempts: Vec<u64> = finished.events.iter().filter_map(|event| event["flow"]["attempt"].as_u64()).collect();
    ensure!(attempts == [1, 2, 3, 1], "{attempts:?}");
    let connections = &finished.summary["connections"];
    ensure!(connections["bad"] == 2 && connections["recovered"] == 1 && connections["open"] == 1, "{connections}");
    for event in &finished.events {
        // When a program asks again is its own business.
        ensure!(event["flow"]["conntrack_timeout_s"] == 2, "{event}");
        ensure!(event["flow"].get("expected_recovery").is_none(), "{event}");
    }
    Ok(())
}

/// Without eBPF too, though the mark, and so what to expect, is not seen there.
#[test]
fn a_recovery_is_seen_by_packet_sockets() -> Result<()> {
    if !can_run("a_recovery_is_seen_by_packet_sockets", true, LINEAR_DEFAULT) {
        return Ok(());
    }
    let lab = build(true, 30, LINEAR_DEFAULT)?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--engine", "packet-socket"]].concat())?;
    traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(20))?;
    let _ = vxmon.wait_type("recovered", 1, Duration::from_secs(3));
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    let recovered = the_one(&finished, "recovered")?;
    ensure!(recovered["outcome"] == "connected" && recovered["by"] == "source-port", "{recovered}");
    ensure!(recovered["bad_syns"] == 1 && recovered["bad_packets"] == 1, "{recovered}");
    ensure!(finished.events.len() == 1 && finished.events[0]["flow"]["attempt"] == 1, "{:#?}", finished.events);
    ensure!(finished.events[0]["flow"].get("expected_recovery").is_none(), "{:#?}", finished.events);
    Ok(())
}

#[test]
fn a_connection_that_gives_up_is_told_so() -> Result<()> {
    if !can_run("a_connection_that_gives_up_is_told_so", false, LINEAR_DEFAULT) {
        return Ok(());
    }
    let lab = build(false, 30, LINEAR_DEFAULT)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "connected");
    let ended = vxmon.wait_type("not-recovered", 1, Duration::from_secs(20));
    let finished = vxmon.stop()?;
    ensure!(ended.len() == 1, "{:#?}", finished.all);
    ensure!(ended[0]["outcome"] == "not-seen-again" && ended[0]["bad_syns"] == 1, "{}", ended[0]);
    let connections = &finished.summary["connections"];
    ensure!(connections["bad"] == 1 && connections["not_recovered"] == 1, "{connections}");
    Ok(())
}
