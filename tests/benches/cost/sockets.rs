//! Packet sockets: how many packets a second are judged without one being left out, beside what tcpdump takes down.
//!
//! The rate is doubled until packets are dropped, or the sender has no more; then the last step is halved a few times. Sender,
//! receiver and watcher share the machine's CPUs.

use std::{
    io::Read as _,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vxmon_tests::{
    Lab, LabOptions, Vxmon,
    traffic::{Frame, OuterSum, RawSender},
    vxmon::cpu_time,
};

use crate::table::{Limit, Table};

/// How long each rate is held.
const STEP: Duration = Duration::from_secs(1);
/// The first rate, packets a second.
const FIRST: f64 = 10_000.0;
/// Steps between the last rate without and the first with drops.
const HALVINGS: u32 = 3;
/// Payload of the inner datagram that fills 1500 bytes.
const WHOLE_MTU: usize = 1500 - 78;

pub fn measure(table: &mut Table) -> Result<()> {
    table.section("packet sockets: thousand packets a second without drops");
    let lab = LabOptions { vxlan_tx_offload: false, ..LabOptions::default() }.build()?;
    for (what, payload, sum) in [
        ("headers only: 96 bytes, no checksum", 18, OuterSum::Zero),
        ("full sum: 96 bytes", 18, OuterSum::Right),
        ("full sum: 1500 bytes", WHOLE_MTU, OuterSum::Right),
    ] {
        let frame = Frame { sum, inner: Frame::inner_udp(&vec![0x5a; payload]), ..lab.frame() }.bytes();
        let frames = vec![frame];
        let vxmon = fastest(|rate| with_vxmon(&lab, &frames, rate))?;
        let tcpdump = fastest(|rate| with_tcpdump(&lab, &frames, rate))?;
        let baseline = format!("tcpdump {:.0} k/s", tcpdump.step.rate / 1e3);
        table.line(what, vxmon.step.rate / 1e3, "k/s", &baseline, Limit::None);
        table.note(&format!("vxmon: {vxmon}"));
        table.note(&format!("tcpdump -w /dev/null: {tcpdump}"));
    }
    Ok(())
}

/// What came of one rate.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Packets a second that were asked for, and that were sent.
    wanted: f64,
    rate: f64,
    sent: u64,
    dropped: u64,
    /// CPU time of whoever watched.
    cpu: Duration,
}

/// The fastest step without drops.
struct Fastest {
    step: Step,
    /// No drops at any rate: the sender is no faster.
    is_all: bool,
}

impl std::fmt::Display for Fastest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Step { cpu, sent, .. } = self.step;
        let each = cpu.as_nanos() as f64 / sent as f64;
        let why = if self.is_all { ", as fast as the sender can" } else { "" };
        write!(
            formatter,
            "{:.1} % of a CPU, {each:.0} ns a packet{why}",
            100.0 * cpu.as_secs_f64() / STEP.as_secs_f64()
        )
    }
}

/// Looks for it.
fn fastest(try_rate: impl Fn(f64) -> Result<Step>) -> Result<Fastest> {
    let mut best = try_rate(FIRST)?;
    ensure!(best.dropped == 0, "packets were dropped at the lowest rate: {best:?}");
    let (mut wanted, mut in_vain) = (FIRST, 0);
    let mut bad = loop {
        wanted *= 2.0;
        let step = try_rate(wanted)?;
        if step.dropped > 0 {
            break wanted;
        }
        if step.rate > 1.1 * best.rate {
            (best, in_vain) = (step, 0);
        } else {
            in_vain += 1;
        }
        if in_vain == 3 {
            return Ok(Fastest { step: best, is_all: true });
        }
    };
    for _ in 0..HALVINGS {
        let step = try_rate(f64::midpoint(best.wanted, bad))?;
        if step.dropped > 0 {
            bad = step.wanted;
        } else {
            best = step;
        }
    }
    Ok(Fastest { step: best, is_all: false })
}

/// Sends at about that rate, or as fast as it can; returns how many, and at what rate.
fn send(lab: &Lab, frames: &[Vec<u8>], wanted: f64) -> Result<(u64, f64)> {
    /// Not worth a call.
    const FEW: f64 = 32.0;
    /// What was not sent in time is not made up for by a burst, if the sender did not get to run for longer than this.
    const LATE: f64 = 0.005;
    let sender = RawSender::open(&lab.a, &lab.options().uplink)?;
    let start = Instant::now();
    let (mut sent, mut last) = (0, start);
    while start.elapsed() < STEP {
        let now = Instant::now();
        let due = wanted * (now - last).as_secs_f64().min(LATE);
        if due < FEW {
            thread::sleep(Duration::from_micros(100));
            continue;
        }
        sent += sender.storm(frames, due as u64)?.sent;
        last = now;
    }
    Ok((sent, sent as f64 / start.elapsed().as_secs_f64()))
}

fn with_vxmon(lab: &Lab, frames: &[Vec<u8>], wanted: f64) -> Result<Step> {
    let args = ["--format", "json", "--engine", "packet-socket", &lab.options().uplink];
    let vxmon = Vxmon::attach_to(&lab.a, 1, &args)?;
    let before = vxmon.cpu_time()?;
    let (sent, rate) = send(lab, frames, wanted)?;
    settle();
    let cpu = vxmon.cpu_time()? - before;
    let finished = vxmon.stop()?;
    let (seen, dropped) = (finished.total("seen"), finished.total("lost/capture"));
    ensure!(seen + dropped == sent, "{sent} packets sent, but: {}", finished.summary);
    Ok(Step { wanted, rate, sent, dropped, cpu })
}

fn with_tcpdump(lab: &Lab, frames: &[Vec<u8>], wanted: f64) -> Result<Step> {
    let filter = format!("udp dst port {}", lab.options().port);
    let mut tcpdump = lab
        .a
        .command("tcpdump")
        .args(["-nn", "-i", &lab.options().uplink, "-w", "/dev/null", "-Z", "root", &filter])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run tcpdump")?;
    settle();
    let before = cpu_time(tcpdump.id())?;
    let sent = send(lab, frames, wanted);
    settle();
    let cpu = cpu_time(tcpdump.id())? - before;
    kill(Pid::from_raw(tcpdump.id().cast_signed()), Signal::SIGINT)?;
    let mut said = String::new();
    tcpdump.stderr.take().context("tcpdump without an output")?.read_to_string(&mut said)?;
    tcpdump.wait()?;
    let (sent, rate) = sent?;
    let number = |what: &str| {
        let line = said
            .lines()
            .find(|line| line.trim_end().ends_with(what))
            .with_context(|| format!("tcpdump said {said:?}"))?;
        line.split(' ').next().and_then(|number| number.parse::<u64>().ok()).context("no number")
    };
    let (received, dropped) = (number("received by filter")?, number("dropped by kernel")?);
    // Those that came before its filter was in place are among them.
    ensure!(received >= sent && number("captured")? + dropped >= sent, "{sent} packets sent, but: {said:?}");
    Ok(Step { wanted, rate, sent, dropped, cpu })
}

/// Until whoever watches is ready, or has done what is left: tcpdump reads what it has once a second.
fn settle() {
    thread::sleep(Duration::from_millis(1300));
}
