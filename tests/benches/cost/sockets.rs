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
        let baseline = format!("tcpdump {:.0} k/s", tcpdump.rate / 1e3);
        table.line(what, vxmon.rate / 1e3, "k/s", &baseline, Limit::None);
        table.note(&format!("vxmon: {vxmon}; tcpdump -w /dev/null: {tcpdump}"));
    }
    Ok(())
}

/// What came of one rate.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Packets a second that were sent.
    rate: f64,
    sent: u64,
    dropped: u64,
    /// CPU time of whoever watched.
    cpu: Duration,
    /// The sender is not as fast as it was asked to be.
    is_all: bool,
}

impl std::fmt::Display for Step {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each = self.cpu.as_nanos() as f64 / self.sent as f64;
        let why = if self.is_all { ", as fast as the sender can" } else { "" };
        write!(formatter, "{:.2} s of CPU, {each:.0} ns a packet{why}", self.cpu.as_secs_f64())
    }
}

/// The fastest step without drops.
fn fastest(try_rate: impl Fn(f64) -> Result<Step>) -> Result<Step> {
    let mut rate = FIRST;
    let mut best = None;
    let mut step = try_rate(rate)?;
    while step.dropped == 0 {
        best = Some(step);
        if step.is_all {
            return Ok(step);
        }
        rate *= 2.0;
        step = try_rate(rate)?;
    }
    let mut best = best.context("packets were dropped at the lowest rate")?;
    let (mut good, mut bad) = (rate / 2.0, rate);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(good, bad);
        let step = try_rate(middle)?;
        if step.dropped == 0 {
            (best, good) = (step, middle);
        } else {
            bad = middle;
        }
    }
    Ok(best)
}

/// Sends at about that rate; returns how many, at what rate, and whether the sender is not that fast.
fn send(lab: &Lab, frames: &[Vec<u8>], wanted: f64) -> Result<(u64, f64, bool)> {
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
    let rate = sent as f64 / start.elapsed().as_secs_f64();
    Ok((sent, rate, rate < 0.7 * wanted))
}

fn with_vxmon(lab: &Lab, frames: &[Vec<u8>], rate: f64) -> Result<Step> {
    let args = ["--format", "json", "--engine", "packet-socket", &lab.options().uplink];
    let vxmon = Vxmon::attach_to(&lab.a, 1, &args)?;
    let before = vxmon.cpu_time()?;
    let (sent, rate, is_all) = send(lab, frames, rate)?;
    settle();
    let cpu = vxmon.cpu_time()? - before;
    let finished = vxmon.stop()?;
    let (seen, dropped) = (finished.total("seen"), finished.total("lost/capture"));
    ensure!(seen + dropped == sent, "{sent} packets sent, but: {}", finished.summary);
    Ok(Step { rate, sent, dropped, cpu, is_all })
}

fn with_tcpdump(lab: &Lab, frames: &[Vec<u8>], rate: f64) -> Result<Step> {
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
    let sent = send(lab, frames, rate);
    settle();
    let cpu = cpu_time(tcpdump.id())? - before;
    kill(Pid::from_raw(tcpdump.id().cast_signed()), Signal::SIGINT)?;
    let mut said = String::new();
    tcpdump.stderr.take().context("tcpdump without an output")?.read_to_string(&mut said)?;
    tcpdump.wait()?;
    let (sent, rate, is_all) = sent?;
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
    Ok(Step { rate, sent, dropped, cpu, is_all })
}

/// Until whoever watches is ready, or has done what is left: tcpdump reads what it has once a second.
fn settle() {
    thread::sleep(Duration::from_millis(1300));
}
