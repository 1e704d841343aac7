//! The engine without eBPF: chosen where TC programs cannot be used, with what privileges, and counting what it misses.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use vxmon_tests::{
    Lab, LabOptions, Vxmon, cmd, skip,
    traffic::{self, Frame, OuterSum, RawSender},
};

const UPLINK: &str = "uplink";
const VXLAN: &str = "flannel.1";
const JSON: [&str; 2] = ["--format", "json"];

/// Runs `vxmon attach ARGS` for a moment without some capabilities; its lines, and what it said.
fn without(lab: &Lab, capabilities: &str, args: &[&str]) -> Result<(i32, Vec<Value>, String)> {
    let mut command: Command = lab.a.command("setpriv");
    command.arg(format!("--bounding-set={capabilities}")).arg(format!("--inh-caps={capabilities}"));
    command.arg(vxmon_tests::vxmon::binary()?);
    command.args(["attach", "--duration", "300ms"]).args(JSON).args(args);
    let output = command.output().with_context(|| cmd::line(&command))?;
    let lines = String::from_utf8(output.stdout)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok((output.status.code().unwrap_or(-1), lines, String::from_utf8(output.stderr)?))
}

fn attached(lines: &[Value]) -> Vec<&Value> {
    lines.iter().filter(|line| line["type"] == "attached").collect()
}

/// An ingress qdisc, which others made, leaves no room for a clsact one: the programs load, and cannot be attached.
#[test]
fn packet_sockets_take_over_where_programs_load_but_cannot_be_attached() -> Result<()> {
    if !skip::root_or_skip("packet_sockets_take_over_where_programs_load_but_cannot_be_attached") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    for dev in [UPLINK, VXLAN] {
        lab.a.run("tc", &["qdisc", "add", "dev", dev, "ingress"])?;
    }
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--hook", "clsact"]].concat())?;
    for line in vxmon.wait_type("attached", 2, Duration::ZERO) {
        let why = line["fallback"].as_str().unwrap_or_default();
        let named = [UPLINK, VXLAN].iter().any(|dev| why.contains(&format!("{dev}: cannot add a clsact qdisc")));
        ensure!(line["hook"] == "packet-socket" && named, "{line}");
    }
    let mut frame = lab.frame();
    frame.sum = OuterSum::Value(0x1234);
    traffic::send_raw(&lab.a, UPLINK, &frame.bytes())?;
    ensure!(vxmon.wait_events(1, Duration::from_secs(5)).len() == 1, "{}", vxmon.stderr());
    vxmon.stop()?.adds_up()?;
    Ok(())
}

/// What packet sockets would need is kept only until it is known that they are not needed.
#[test]
fn cap_net_raw_is_given_up_once_tc_programs_are_attached() -> Result<()> {
    if !skip::root_or_skip("cap_net_raw_is_given_up_once_tc_programs_are_attached") {
        return Ok(());
    }
    const NET_RAW: u64 = 1 << 13;
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--metrics", "9464"]].concat())?;
    let start = Instant::now();
    let left = || -> Result<Vec<String>> {
        let mut left = Vec::new();
        for thread in std::fs::read_dir(format!("/proc/{}/task", vxmon.pid()))?.flatten() {
            let status = std::fs::read_to_string(thread.path().join("status"))?;
            let bits = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).context("no CapPrm")?;
            if u64::from_str_radix(bits.trim(), 16)? & NET_RAW != 0 {
                left.push(status.lines().next().unwrap_or_default().to_owned());
            }
        }
        Ok(left)
    };
    // `attached` is written a moment before.
    while !left()?.is_empty() && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(20));
    }
    ensure!(left()?.is_empty(), "still has CAP_NET_RAW: {:?}", left()?);
    vxmon.stop()?.adds_up()?;
    Ok(())
}

#[test]
fn without_cap_bpf_packet_sockets_are_used_and_say_why() -> Result<()> {
    if !skip::root_or_skip("without_cap_bpf_packet_sockets_are_used_and_say_why") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let no_bpf = "-bpf,-perfmon,-sys_admin";
    let (code, lines, said) = without(&lab, no_bpf, &[])?;
    ensure!(code == 0, "{said}");
    let devices = attached(&lines);
    ensure!(devices.len() == 2, "{lines:#?}");
    for line in devices {
        ensure!(line["hook"] == "packet-socket" && line["metadata"] == "packet-socket", "{line}");
        ensure!(line["fallback"] == "CAP_BPF and CAP_PERFMON are missing", "{line}");
    }
    ensure!(said.contains("by packet sockets") && said.contains("CAP_BPF"), "{said}");
    // Asked for by name, there is nothing to explain.
    let (code, lines, said) = without(&lab, no_bpf, &["--engine", "packet-socket"])?;
    ensure!(code == 0 && !said.contains("CAP_BPF"), "{said}");
    ensure!(attached(&lines).iter().all(|line| line["fallback"].is_null()), "{lines:#?}");
    // And TC programs that were asked for are not replaced.
    let (code, lines, said) = without(&lab, no_bpf, &["--engine", "tc"])?;
    ensure!(code == 2 && lines.is_empty() && said.lines().count() == 1 && said.contains("CAP_BPF"), "{said}");
    Ok(())
}

#[test]
fn cap_net_raw_alone_will_do() -> Result<()> {
    if !skip::root_or_skip("cap_net_raw_alone_will_do") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let (code, lines, said) = without(&lab, "-all,+net_raw", &["--engine", "packet-socket"])?;
    ensure!(code == 0 && attached(&lines).len() == 2, "{said}");
    ensure!(said.contains("without CAP_NET_ADMIN"), "{said}");
    for engine in ["packet-socket", "auto"] {
        let (code, lines, said) = without(&lab, "-all", &["--engine", engine])?;
        ensure!(code == 2 && lines.is_empty() && said.lines().count() == 1, "{said}");
        ensure!(said.contains("CAP_NET_RAW") && said.contains("missing"), "{said}");
    }
    Ok(())
}

#[test]
fn without_cap_net_admin_packet_sockets_are_used() -> Result<()> {
    if !skip::root_or_skip("without_cap_net_admin_packet_sockets_are_used") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let (code, lines, said) = without(&lab, "-net_admin", &["--engine", "auto"])?;
    ensure!(code == 0 && attached(&lines).len() == 2, "{said}");
    ensure!(attached(&lines).iter().all(|line| line["fallback"].is_string()), "{lines:#?}");
    Ok(())
}

/// While it does not read, packets are lost; each is either judged or counted as lost.
#[test]
fn what_the_ring_could_not_hold_is_counted() -> Result<()> {
    if !skip::root_or_skip("what_the_ring_could_not_hold_is_counted") {
        return Ok(());
    }
    const SENT: u64 = 100_000;
    for more in [&[][..], &["--no-packet-ring"]] {
        let lab = LabOptions::default().build()?;
        let args = [&JSON[..], &["--engine", "packet-socket", "uplink"], more].concat();
        let vxmon = Vxmon::attach(&lab.a, &args)?;
        let frame = lab.frame();
        let frames = vec![frame.bytes()];
        vxmon.signal(Signal::SIGSTOP)?;
        let storm = RawSender::open(&lab.a, "uplink")?.storm(&frames, SENT)?;
        ensure!(storm.sent == SENT);
        vxmon.signal(Signal::SIGCONT)?;
        let told = vxmon.wait_type("lost", 1, Duration::from_secs(10));
        ensure!(told.first().is_some_and(|line| line["capture"].as_u64() > Some(0)), "{told:#?}");
        let finished = vxmon.stop()?;
        finished.adds_up()?;
        let (seen, lost) = (finished.total("seen"), finished.total("lost/capture"));
        // A few multicast reports of IPv6 pass, too.
        ensure!(
            lost > 0 && seen > 0 && (SENT..SENT + 50).contains(&(seen + lost)),
            "{more:?}: {seen} seen, {lost} lost of {SENT}"
        );
        let told: u64 =
            finished.all.iter().filter(|line| line["type"] == "lost").filter_map(|line| line["capture"].as_u64()).sum();
        ensure!(told == lost, "told of {told}, lost {lost}");
    }
    Ok(())
}

/// Good packets are counted by verdict, bad ones reported as they come.
#[test]
fn a_bad_packet_is_told_of_at_once() -> Result<()> {
    if !skip::root_or_skip("a_bad_packet_is_told_of_at_once") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach(&lab.a, &[&JSON[..], &["--engine", "packet-socket", "uplink"]].concat())?;
    let sender = RawSender::open(&lab.a, "uplink")?;
    let good = lab.frame();
    let bad = Frame { sum: OuterSum::Value(0x1234), ..good.clone() };
    sender.send(&good.bytes())?;
    let start = Instant::now();
    sender.send(&bad.bytes())?;
    let events = vxmon.wait_events(1, Duration::from_secs(5));
    let after = start.elapsed();
    ensure!(events.len() == 1, "after {after:?}: {events:#?}");
    ensure!(events[0]["verdict"] == "bad-outer" && events[0]["csum"]["seen"] == "0x1234", "{}", events[0]);
    ensure!(events[0]["mark"].is_null() && events[0]["missing"]["mark"].is_string(), "{}", events[0]);
    thread::sleep(Duration::from_millis(50));
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    ensure!(finished.total("seen") == 2, "{}", finished.summary);
    Ok(())
}
