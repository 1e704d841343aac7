//! The daemon as a process: size, memory, and how long one waits for it.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Family, LabOptions, Rules, Vxmon, cmd,
    traffic::{self, Frame, OuterSum, RawSender},
    vxmon,
};

use crate::table::{Limit, Table, max, median};

/// Starts of the daemon that are timed.
const STARTS: usize = 11;
/// Bad packets whose way to the output is timed.
const EVENTS: usize = 25;
/// Bad packets of the storm, and flows among them.
const STORM: u64 = 1_000_000;
const FLOWS: u16 = 20_000;
/// Flows of a storm all of which the kernel program remembers.
const KNOWN_FLOWS: u16 = 4_000;
const MIB: f64 = (1 << 20) as f64;
const PATIENCE: Duration = Duration::from_secs(5);

pub fn measure(table: &mut Table) -> Result<()> {
    table.section("the daemon");
    let size = fs::metadata(vxmon::binary()?)?.len();
    table.line("binary, static", size as f64 / MIB, "MiB", "", Limit::AtMost(10.0));
    start(table)?;
    latency(table)?;
    memory(table)?;
    repeats(table)
}

fn start(table: &mut Table) -> Result<()> {
    let lab = LabOptions::default().build()?;
    let (mut ready, mut version) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let begin = Instant::now();
        cmd::run(Command::new(vxmon::binary()?).arg("--version"))?;
        version.push(begin.elapsed().as_secs_f64() * 1e3);
        let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
        ready.push(vxmon.ready_after.as_secs_f64() * 1e3);
        vxmon.stop()?;
    }
    let baseline = format!("--version {:.1} ms", median(&version));
    table.line("start until attached to all devices", median(&ready), "ms", &baseline, Limit::AtMost(200.0));
    table.line(&format!("  the slowest of {STARTS}"), max(&ready), "ms", &baseline, Limit::None);
    Ok(())
}

/// From the time in the event, which is when the kernel program saw the packet, until its line is read here.
fn latency(table: &mut Table) -> Result<()> {
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    let mut times = Vec::new();
    let sender = RawSender::open(&lab.a, &lab.options().uplink)?;
    for number in 0..EVENTS {
        // Not on the daemon's own schedule.
        std::thread::sleep(Duration::from_millis(20 + 7 * (number as u64 % 5)));
        if number % 2 == 0 {
            // The kernel's own bad packet: the first SYN of a connection, which this does not wait for.
            let _ = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_millis(1));
        } else {
            sender
                .send(&Frame { sport: 20_000 + number as u16, sum: OuterSum::Value(0x1234), ..lab.frame() }.bytes())?;
        }
        let events = vxmon.wait_events(number + 1, PATIENCE);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        ensure!(events.len() > number, "event {number} did not come");
        times.push(1e3 * (now - time_of(&events[number])?));
    }
    vxmon.stop()?;
    let baseline = format!("{EVENTS} events");
    table.line("packet until its line is read", median(&times), "ms", &baseline, Limit::AtMost(100.0));
    table.line("  the slowest", max(&times), "ms", &baseline, Limit::AtMost(100.0));
    Ok(())
}

/// Seconds since 1970 of an event that is not older than a day.
pub fn time_of(event: &Value) -> Result<f64> {
    let text = event["ts"].as_str().context("no ts")?;
    let parse = || {
        let (_, time) = text.trim_end_matches('Z').split_once('T')?;
        let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
        Some(parts.next()?? * 3600.0 + parts.next()?? * 60.0 + parts.next()??)
    };
    let of_day = parse().with_context(|| format!("not a time: {text}"))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let midnight = now - now.rem_euclid(86_400.0);
    Ok(if midnight + of_day > now + 43_200.0 { midnight - 86_400.0 + of_day } else { midnight + of_day })
}

fn memory(table: &mut Table) -> Result<()> {
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    std::thread::sleep(Duration::from_millis(300));
    let idle = vxmon.resident()? as f64 / MIB;
    table.line("resident memory, idle", idle, "MiB", "", Limit::AtMost(20.0));
    let frames: Vec<_> = (0..FLOWS)
        .map(|flow| Frame { sport: 20_000 + flow, sum: OuterSum::Value(0x1234), ..lab.frame() }.bytes())
        .collect();
    let storm = RawSender::open(&lab.a, &lab.options().uplink)?.storm(&frames, STORM)?;
    let after = vxmon.resident()? as f64 / MIB;
    let cpu = vxmon.cpu_time()?;
    let finished = vxmon.stop()?;
    let packets = &finished.summary["packets"];
    let bad = packets["verdicts"]["bad-outer"].as_u64().unwrap_or(0);
    let baseline = format!("idle {idle:.1} MiB");
    table.line("resident memory, after a storm of bad packets", after, "MiB", &baseline, Limit::AtMost(20.0));
    table.note(&format!(
        "{bad} bad packets of {} in {FLOWS} flows, {:.0} a second; reported {}, repeats {}, not shown {}; CPU time {:.1} s of {:.1} s",
        storm.sent,
        storm.rate(),
        packets["anomalies"]["reported"],
        packets["anomalies"]["suppressed"],
        packets["lost"],
        cpu.as_secs_f64(),
        storm.elapsed.as_secs_f64(),
    ));
    ensure!(bad >= storm.sent, "the storm's packets were not all counted: {packets}");
    Ok(())
}

/// Repeats are counted in the kernel: a flow is reported once a second, however many its packets.
fn repeats(table: &mut Table) -> Result<()> {
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    let frames: Vec<_> = (0..KNOWN_FLOWS)
        .map(|flow| Frame { sport: 20_000 + flow, sum: OuterSum::Value(0x1234), ..lab.frame() }.bytes())
        .collect();
    let storm = RawSender::open(&lab.a, &lab.options().uplink)?.storm(&frames, STORM)?;
    let finished = vxmon.stop()?;
    // Where the ring is full, the flow's next packet tries again, and all that it costs is a count.
    let sent = finished.total("anomalies/reported") + finished.total("lost/queue");
    // Each second that was begun.
    let seconds = storm.elapsed.as_secs_f64().floor() + 1.0;
    let each = sent as f64 / f64::from(KNOWN_FLOWS) / seconds;
    let baseline = format!("{:.0} packets a second", storm.rate() / f64::from(KNOWN_FLOWS));
    let what = format!("reports a second of each of {KNOWN_FLOWS} flows, in a storm");
    table.line(&what, each, "", &baseline, Limit::AtMost(1.0));
    Ok(())
}
