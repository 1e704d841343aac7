//! A storm of bad packets neither grows the daemon nor loses a count.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::Value;
use vxmon_tests::{
    LabOptions, Vxmon,
    counters::GsoCounter,
    traffic::{OuterSum, RawSender},
    vxmon::number,
};

const MILLION: u64 = 1_000_000;
const WARM_UP: u64 = 250_000;
const SLACK: u64 = 1 << 20;
const MOST: u64 = 20 << 20;

/// Sends a million bad packets of so many flows, and holds the daemon's memory and counts to it. What comes before it
/// fills what is bounded (queues, tables of flows), before memory is compared.
fn storm(flows: u16, output: &Output) -> Result<()> {
    let lab = LabOptions::default().build()?;
    let frames: Vec<Vec<u8>> = (0..flows)
        .map(|flow| {
            let mut frame = lab.frame();
            (frame.sport, frame.sum) = (1 + flow, OuterSum::Value(0x1234));
            frame.bytes()
        })
        .collect();
    // Netfilter's egress hook is right ahead of TC's, so this is the number of packets that vxmon had to judge: those that
    // the veth then refused, its receiver being slow, and that were sent again, are in both.
    let counter = GsoCounter::start(&lab.a, "uplink", 0)?;
    let go = Arc::new(AtomicBool::new(false));
    let reader = output.reader(&go)?;
    let vxmon = Vxmon::attach(&lab.a, &["--format", "json", "--output", output.path()?, "uplink"])?;
    let counted_before = counter.count()?;
    let sender = RawSender::open(&lab.a, "uplink")?;
    // A pipe is not read meanwhile, so that the queue of lines has been full, once, before memory is compared.
    let mut sent = sender.storm(&frames, WARM_UP)?.sent;
    settle(&vxmon)?;
    go.store(true, Ordering::Relaxed);
    settle(&vxmon)?;
    let before = vxmon.resident()?;
    let storm = sender.storm(&frames, MILLION)?;
    sent += storm.sent;
    settle(&vxmon)?;
    let (after, cpu) = (vxmon.resident()?, vxmon.cpu_time()?);
    let egress = counter.count()? - counted_before;
    let finished = vxmon.stop()?;
    ensure!(finished.status.success(), "{} {}", finished.status, finished.stderr);
    let (events, summary) = match reader {
        Some(reader) => reader.join().map_err(|_| anyhow!("the reader of the output panicked"))??,
        None => read(File::open(&output.0)?)?,
    };
    let packets = &summary["packets"];
    vxmon_tests::cleanup::note(&format!(
        "{flows} flows: {:.0} packets a second, resident {} KiB before and {} KiB after, {cpu:?} of CPU time, {}, lost {}",
        storm.rate(),
        before >> 10,
        after >> 10,
        packets["anomalies"],
        packets["lost"]
    ));
    ensure!(after <= before + SLACK, "grew from {before} to {after} bytes");
    ensure!(after <= MOST, "{after} bytes");
    let bad = number(packets, "verdicts/bad-outer");
    ensure!(bad >= sent && bad + number(packets, "other") == egress, "sent {sent}, egress {egress}: {summary}");
    ensure!(number(packets, "seen") == bad, "{summary}");
    let told = ["anomalies/reported", "anomalies/suppressed", "lost/ring", "lost/queue"];
    let told: u64 = told.iter().map(|path| number(packets, path)).sum();
    ensure!(told == bad, "{told} of {bad} accounted for: {summary}");
    ensure!(events == number(packets, "anomalies/reported"), "{events} lines: {summary}");
    ensure!(events >= u64::from(flows).min(1000), "only {events} lines for {flows} flows");
    Ok(())
}

/// Counts the anomalies in an output, and gives its last line, the summary.
fn read(file: File) -> Result<(u64, Value)> {
    let (mut events, mut last) = (0, String::new());
    for line in BufReader::new(file).lines() {
        last = line?;
        events += u64::from(last.contains("\"type\":\"anomaly\""));
    }
    let summary: Value = serde_json::from_str(&last).with_context(|| format!("not JSON: {last}"))?;
    ensure!(summary["type"] == "summary", "{last}");
    Ok((events, summary))
}

/// Reads a pipe to its end, as [`read`].
type Reader = JoinHandle<Result<(u64, Value)>>;

/// Where the daemon writes: a file, or a pipe, in which far more passes than one wants to keep. Removed when dropped.
struct Output(PathBuf, bool);

impl Output {
    fn file(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("vxmon-{name}-{}.json", std::process::id())), false)
    }

    fn pipe(name: &str) -> Result<Self> {
        let mut pipe = Self::file(name);
        mkfifo(&pipe.0, Mode::S_IRUSR | Mode::S_IWUSR)?;
        pipe.1 = true;
        Ok(pipe)
    }

    fn path(&self) -> Result<&str> {
        self.0.to_str().context("not UTF-8")
    }

    /// For a pipe, what reads it while the daemon runs, from `go` on.
    fn reader(&self, go: &Arc<AtomicBool>) -> Result<Option<Reader>> {
        if !self.1 {
            return Ok(None);
        }
        let (path, go) = (self.0.clone(), Arc::clone(go));
        let wait_and_read = move || {
            let pipe = File::open(&path)?;
            while !go.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(10));
            }
            read(pipe)
        };
        Ok(Some(thread::Builder::new().name("reader".to_owned()).spawn(wait_and_read)?))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Waits until the daemon has nothing left to do.
fn settle(vxmon: &Vxmon) -> Result<()> {
    let start = Instant::now();
    loop {
        let before = vxmon.cpu_time()?;
        thread::sleep(Duration::from_millis(250));
        if vxmon.cpu_time()? == before {
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(20), "still busy");
    }
}

#[test]
fn a_million_bad_packets_of_few_flows() -> Result<()> {
    if !GsoCounter::can_run("a_million_bad_packets_of_few_flows")? {
        return Ok(());
    }
    storm(4, &Output::file("few"))
}

#[test]
fn a_million_bad_packets_of_many_flows() -> Result<()> {
    if !GsoCounter::can_run("a_million_bad_packets_of_many_flows")? {
        return Ok(());
    }
    storm(4000, &Output::file("many"))
}

/// More than the kernel program's table of flows holds, so that hardly any is held back: more than can be told, and
/// what cannot be is counted.
#[test]
fn a_million_bad_packets_of_more_flows_than_are_remembered() -> Result<()> {
    if !GsoCounter::can_run("a_million_bad_packets_of_more_flows_than_are_remembered")? {
        return Ok(());
    }
    storm(50_000, &Output::pipe("more")?)
}
