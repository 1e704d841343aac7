//! vxmon under real traffic: time in its programs by the kernel's own count, and throughput with and without it.

use std::{os::fd::AsFd as _, os::fd::AsRawFd as _, process::Stdio, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf,
    programs::{LinkOrder, SchedClassifier, TcAttachType, loaded_programs, tc::TcAttachOptions},
    sys::{Stats, enable_stats},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use vxmon::source::object;
use vxmon_common::config;
use vxmon_tests::{
    Family, Lab, LabOptions, Vxmon,
    traffic::{BulkMode, BulkServer, UdpClient, UdpMode, UdpServer, bulk_send, iperf3},
};

use crate::{
    stats::{self, Runs},
    table::{Limit, Table, median},
};

/// Rounds of throughput, and seconds of each run.
const ROUNDS: usize = 5;
const SECONDS: u32 = 2;

pub fn measure(table: &mut Table) -> Result<()> {
    table.section("ns a packet over an empty TC program, in real traffic");
    table.note(
        "Information, beside the limits for packets that the cache holds, above: here vxmon's program is the first to",
    );
    table.note("read a packet's headers, or all of it, and waits for memory; the empty one reads nothing.");
    let segmented = || LabOptions { segmentation: false, ..LabOptions::default() };
    let bulk = |lab: &Lab| {
        let server = BulkServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        bulk_send(&lab.a, lab.pod_socket(Family::V4), 400 << 20, BulkMode::Sendfile).map(drop)?;
        drop(server);
        Ok(())
    };
    counted(table, "header only: uplink, TCP in MTU-sized packets", 25.0, segmented(), On::Uplink, "lco-valid", bulk)?;
    counted(
        table,
        "header only: uplink, TCP in 64 KiB packets",
        25.0,
        LabOptions::default(),
        On::Uplink,
        "pending",
        bulk,
    )?;
    counted(table, "full sum: VXLAN device, linear", 80.0, segmented_off(), On::Vxlan, "valid", |lab| {
        datagrams(lab, UdpMode::Plain)
    })?;
    counted(table, "full sum: VXLAN device, not linear", 80.0, LabOptions::default(), On::Vxlan, "valid", |lab| {
        datagrams(lab, UdpMode::Corked { parts: 4 })
    })?;
    throughput(table)
}

/// The VXLAN device computes nothing: every packet is final when it enters.
fn segmented_off() -> LabOptions {
    LabOptions { vxlan_tx_offload: false, ..LabOptions::default() }
}

/// Datagrams that fill the inner MTU.
fn datagrams(lab: &Lab, mode: UdpMode) -> Result<()> {
    let server = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), false)?;
    let client = UdpClient::connect(&lab.a, lab.pod_udp(Family::V4))?;
    for _ in 0..100_000 {
        client.send(1422, mode)?;
    }
    drop(server);
    Ok(())
}

#[derive(Clone, Copy)]
enum On {
    Uplink,
    Vxlan,
}

/// Time in vxmon's program and in an empty one behind it on the same device, while `send` sends.
fn counted(
    table: &mut Table,
    what: &str,
    limit: f64,
    options: LabOptions,
    on: On,
    verdict: &str,
    send: impl Fn(&Lab) -> Result<()>,
) -> Result<()> {
    let lab = options.build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    let device = match on {
        On::Uplink => lab.options().uplink.clone(),
        On::Vxlan => lab.options().vxlan.clone(),
    };
    let mut ebpf = Ebpf::load(object::TEST)?;
    let empty: &mut SchedClassifier = ebpf.program_mut("empty").context("no program")?.try_into()?;
    empty.load()?;
    lab.a.enter(|| {
        let behind = TcAttachOptions::TcxOrder(LinkOrder::last());
        Ok(empty.attach_with_options(&device, TcAttachType::Egress, behind).map(drop)?)
    })?;
    let nothing = empty.fd()?.as_fd().as_raw_fd();
    let name = match on {
        On::Uplink => config::UPLINK_PROGRAM,
        On::Vxlan => config::VXLAN_PROGRAM,
    };
    let held = stats::of_process(vxmon.pid())?;
    let id = loaded_programs()
        .filter_map(Result::ok)
        .find(|program| held.contains_key(&program.id()) && program.name_as_str() == Some(name))
        .with_context(|| format!("vxmon holds no program {name}"))?
        .id();
    let watching = || -> Result<Runs> { stats::of_process(vxmon.pid())?.get(&id).copied().context("no program") };
    let counting = enable_stats(Stats::RunTime)?;
    let before = (watching()?, stats::of_fd(nothing)?);
    send(&lab)?;
    let (ours, empty) = (watching()?.since(before.0), stats::of_fd(nothing)?.since(before.1));
    drop(counting);
    let finished = vxmon.stop()?;
    // Otherwise it would be something else that was measured. (How many of a bulk transfer's packets are one segment varies.)
    let packets = finished.summary["devices"]
        .as_array()
        .and_then(|devices| devices.iter().find(|summary| summary["dev"] == *device))
        .map_or(&Value::Null, |summary| &summary["packets"]);
    let (of, seen) = (packets["verdicts"][verdict].as_u64(), packets["seen"].as_u64());
    let share = 100.0 * of.unwrap_or(0) as f64 / seen.unwrap_or(0) as f64;
    ensure!(share > 30.0, "{what}: only {share:.0} % of the packets are {verdict}: {packets}");
    let baseline = format!("empty {:.1} ns", empty.mean());
    table.line(what, ours.mean() - empty.mean(), "ns", &baseline, Limit::Information(limit));
    table.note(&format!("{} packets, {share:.1} % of them {verdict}", ours.count));
    Ok(())
}

/// iperf3 over the VXLAN pair: alone, with vxmon, with tcpdump.
fn throughput(table: &mut Table) -> Result<()> {
    let lab = LabOptions::default().build()?;
    let run = || Ok::<_, anyhow::Error>(iperf3(&lab.a, &lab.b, lab.pod_socket(Family::V4).ip(), SECONDS, &[])?.gbits);
    run()?; // warms up
    let (mut alone, mut with_vxmon, mut with_tcpdump) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push(run()?);
        let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
        with_vxmon.push(run()?);
        let finished = vxmon.stop()?;
        ensure!(finished.summary["packets"]["seen"].as_u64() > Some(1000), "vxmon saw nothing: {}", finished.summary);
        let mut tcpdump = lab
            .a
            .command("tcpdump")
            .args(["-nn", "-i", &lab.options().uplink, "-w", "/dev/null"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run tcpdump")?;
        thread::sleep(Duration::from_millis(200));
        let measured = run();
        kill(Pid::from_raw(tcpdump.id().cast_signed()), Signal::SIGINT)?;
        tcpdump.wait()?;
        with_tcpdump.push(measured?);
    }
    // Each round against its own baseline: what else the machine does changes from round to round.
    let share = |with: &[f64]| with.iter().zip(&alone).map(|(with, alone)| 100.0 * with / alone).collect::<Vec<_>>();
    let (vxmon, tcpdump) = (share(&with_vxmon), share(&with_tcpdump));
    table.section(&format!("throughput of iperf3 through the VXLAN pair (median of {ROUNDS} x {SECONDS} s, in turns)"));
    let baseline = format!("alone {:.2} Gbit/s", median(&alone));
    let rounds = |shares: &[f64]| shares.iter().map(|share| format!("{share:.0}")).collect::<Vec<_>>().join(", ");
    table.line("with vxmon attached", median(&vxmon), "%", &baseline, Limit::AtLeast(99.0));
    table.note(&format!("rounds: {}", rounds(&vxmon)));
    table.line("with tcpdump -w /dev/null", median(&tcpdump), "%", &baseline, Limit::None);
    table.note(&format!("rounds: {}", rounds(&tcpdump)));
    Ok(())
}
