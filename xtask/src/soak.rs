//! `cargo xtask soak`: minutes of everything that wears a monitor out, in the lab: VXLAN devices made anew, rules and
//! conntrack flushed, readers of the socket and scrapers that come and go or never read, and storms while the monitor is
//! stopped, so that its ring buffer overruns. After each round memory and file descriptors are read; at the end every
//! packet must be accounted for. What it measured goes to docs/soak.md.

use std::{
    env,
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::{Uid, mkfifo},
};
use serde_json::Value;
use vxmon_tests::{
    Backend, Family, Lab, LabOptions, Rules, Vxmon, cleanup,
    counters::GsoCounter,
    lab::{Side, ethtool},
    traffic::{self, HttpServer, OuterSum, RawSender},
    vxmon::{self, number},
};

use crate::{cargo, proc, setup::Scope};

/// Flows of a storm: more than the ring buffer holds events.
const FLOWS: u16 = 6000;
/// Packets of a storm.
const STORM: u64 = 12_000;
/// Rounds before memory is compared: what is bounded (queues, the ring of lines, tables of flows) is full by then.
const WARM_UP: usize = 6;
/// What memory may grow by after that.
const SLACK: u64 = 1 << 20;
/// What memory may be at most.
const MOST: u64 = 20 << 20;
/// Far longer than anything takes.
const LIMIT: Duration = Duration::from_secs(60);
const METRICS: &str = "9560";

/// Runs it for so many seconds at least; `built` is the binary, if it is built already.
pub fn run(seconds: u64, built: Option<PathBuf>) -> Result<()> {
    let binary = match built {
        Some(binary) => binary,
        None => cargo::build(Scope::Everything)?,
    };
    if !Uid::effective().is_root() {
        return as_root(seconds, &binary);
    }
    // SAFETY: no other thread has been started.
    unsafe { env::set_var("VXMON_BIN", &binary) };
    cleanup::on_interrupt()?;
    let report = Soak::start()?.run(Duration::from_secs(seconds))?;
    let path = cargo::root()?.join("docs/soak.md");
    fs::write(&path, report).with_context(|| format!("cannot write {}", path.display()))?;
    println!("written to docs/soak.md");
    Ok(())
}

/// Only the lab needs root, not the build.
fn as_root(seconds: u64, binary: &Path) -> Result<()> {
    if proc::output(Command::new("sudo").arg("--version")).is_none() {
        bail!("not root, and there is no sudo: network namespaces need one of them");
    }
    let path = format!("PATH={}", env::var("PATH")?);
    let mut command = Command::new("sudo");
    command.args(["env", &path]).arg(env::current_exe()?).args(["soak", "--seconds", &seconds.to_string()]);
    proc::run(command.arg("--binary").arg(binary))
}

/// What was measured after a round, the monitor having nothing to do.
#[derive(Clone, Copy, Debug)]
struct Sample {
    resident: u64,
    descriptors: usize,
    threads: usize,
}

/// Files of a run, removed when dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Scratch {
    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

struct Soak {
    lab: Lab,
    _server: HttpServer,
    vxmon: Vxmon,
    /// Reads the output to its end.
    output: JoinHandle<Result<Lines>>,
    /// Reads the socket to its end.
    reader: JoinHandle<Result<Lines>>,
    /// Never reads.
    _dead: UnixStream,
    scratch: Scratch,
    sender: RawSender,
    /// What had left by the uplink before vxmon attached, and once it had.
    attached: (u64, u64),
    sent: u64,
    /// Descriptors when it had two readers and had done nothing yet.
    descriptors: usize,
}

/// What came by one way.
#[derive(Debug, Default)]
struct Lines {
    /// Lines, those left out that only tell of others.
    events: u64,
    anomalies: u64,
    missed: u64,
    summary: Value,
}

impl Lines {
    fn read(from: impl std::io::Read) -> Result<Self> {
        let mut lines = Self::default();
        for line in BufReader::new(from).lines() {
            let line = line?;
            let value: Value = serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))?;
            match value["type"].as_str() {
                Some("missed") => {
                    lines.missed += value["lines"].as_u64().unwrap_or(0);
                    continue;
                }
                Some("anomaly") => lines.anomalies += 1,
                Some("summary") => lines.summary = value,
                _ => {}
            }
            lines.events += 1;
        }
        ensure!(lines.summary.is_object(), "the last line is no summary");
        Ok(lines)
    }
}

impl Soak {
    fn start() -> Result<Self> {
        let lab = LabOptions::default().build()?;
        lab.rules(&rules())?;
        // A second VXLAN device, that stays: the uplink is watched all the time, and all that passes it is counted.
        lab.a.ip("link add vxlan.stays type vxlan id 99 dstport 4789 dev uplink\nlink set vxlan.stays up\n")?;
        let server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        let scratch = Scratch(env::temp_dir().join(format!("vxmon-soak-{}", std::process::id())));
        fs::create_dir_all(&scratch.0)?;
        let (pipe, socket) = (scratch.path("output"), scratch.path("socket"));
        mkfifo(Path::new(&pipe), Mode::S_IRUSR | Mode::S_IWUSR)?;
        let output = {
            let pipe = pipe.clone();
            thread::spawn(move || Lines::read(File::open(pipe)?))
        };
        count_egress(&lab)?;
        let before_attaching = egress(&lab)?;
        let vxmon =
            Vxmon::attach(&lab.a, &["--format", "json", "--output", &pipe, "--socket", &socket, "--metrics", METRICS])?;
        wait("it is ready", || Ok(scrape(&lab, "/readyz")?.starts_with("ok")))?;
        let attached = (before_attaching, egress(&lab)?);
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"{}\n")?;
        let reader = thread::spawn(move || Lines::read(stream));
        let mut dead = UnixStream::connect(&socket)?;
        dead.write_all(b"{}\n")?;
        let sender = RawSender::open(&lab.a, "uplink")?;
        let mut soak = Self {
            lab,
            _server: server,
            vxmon,
            output,
            reader,
            _dead: dead,
            scratch,
            sender,
            attached,
            sent: 0,
            descriptors: usize::MAX,
        };
        let both = "
vxmon_socket_readers 2.0
";
        wait("both readers are served", || Ok(scrape(&soak.lab, "/metrics")?.contains(both)))?;
        wait("the scraper is gone", || {
            let before = soak.descriptors;
            soak.descriptors = soak.count("fd")?;
            Ok(soak.descriptors == before)
        })?;
        Ok(soak)
    }

    fn run(mut self, duration: Duration) -> Result<String> {
        let (start, mut samples) = (Instant::now(), Vec::new());
        while start.elapsed() < duration || samples.len() < 2 * WARM_UP {
            if proc::stop_signal().is_some() {
                bail!("interrupted");
            }
            self.round(samples.len()).with_context(|| format!("round {}", samples.len() + 1))?;
            let sample = self.sample()?;
            if samples.len().is_multiple_of(5) {
                println!(
                    "{:>4} s, round {}: resident {} KiB, {} descriptors, {} threads",
                    start.elapsed().as_secs(),
                    samples.len() + 1,
                    sample.resident >> 10,
                    sample.descriptors,
                    sample.threads
                );
            }
            samples.push(sample);
        }
        self.finish(&samples, start.elapsed())
    }

    /// One of everything.
    fn round(&mut self, number: usize) -> Result<()> {
        let passing = self.readers(number)?;
        // Not `nft flush ruleset`: what counts the packets at egress is nftables as well.
        self.lab.a.run("iptables-legacy", &["-t", "nat", "-F"])?;
        self.lab.a.run("iptables-legacy", &["-t", "nat", "-X"])?;
        self.lab.flush_conntrack()?;
        self.lab.rules(&rules())?;
        // Fails or not: the fault is the matter of other tests.
        let _ = traffic::http_get(&self.lab.a, self.lab.service_socket(Family::V4), Duration::from_millis(100));
        self.lab.delete_vxlan(Side::A)?;
        self.storm()?;
        self.lab.create_vxlan(Side::A)?;
        ethtool(
            &self.lab.a,
            &self.lab.options().vxlan,
            &["tx-checksum-ip-generic", if number.is_multiple_of(2) { "off" } else { "on" }],
        )?;
        let _ = traffic::http_get(&self.lab.a, self.lab.service_socket(Family::V4), Duration::from_millis(100));
        ensure!(scrape(&self.lab, "/metrics")?.contains("vxmon_packets_total"), "no metrics");
        for mut child in passing {
            // Killed in the middle, as a shell in a pod is.
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Bad packets of many flows while the monitor is stopped.
    fn storm(&mut self) -> Result<()> {
        let frames: Vec<Vec<u8>> = (0..FLOWS)
            .map(|flow| {
                let mut frame = self.lab.frame();
                (frame.sport, frame.sum) = (1 + flow, OuterSum::Value(0x1234));
                frame.bytes()
            })
            .collect();
        self.vxmon.signal(Signal::SIGSTOP)?;
        let storm = self.sender.storm(&frames, STORM);
        self.vxmon.signal(Signal::SIGCONT)?;
        self.sent += storm?.sent;
        Ok(())
    }

    /// Readers that come: good ones, and some that talk nonsense and go.
    fn readers(&self, number: usize) -> Result<Vec<Child>> {
        let socket = self.scratch.path("socket");
        for garbage in [&b"GET / HTTP/1.0\r\n\r\n"[..], b"\xff\xff\xff\n", b"{\"format\":7}\n"] {
            let mut stream = UnixStream::connect(&socket)?;
            let _ = stream.write_all(garbage);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            ensure!(answer.starts_with("{\"error\""), "{answer}");
        }
        (0..3 + number % 5)
            .map(|index| {
                let mut command = Command::new(vxmon::binary()?);
                let format = if index % 2 == 0 { "text" } else { "json" };
                command.args(["tail", "--socket", &socket, "--format", format]);
                Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?)
            })
            .collect()
    }

    /// Memory and descriptors, once the monitor has nothing to do and the readers that left are gone: their descriptors
    /// must be closed by then.
    fn sample(&self) -> Result<Sample> {
        wait("as few descriptors as at the start", || Ok(self.count("fd")? <= self.descriptors))?;
        wait("it is idle", || {
            let before = self.vxmon.cpu_time()?;
            thread::sleep(Duration::from_millis(200));
            Ok(self.vxmon.cpu_time()? <= before + Duration::from_millis(10))
        })?;
        Ok(Sample { resident: self.vxmon.resident()?, descriptors: self.count("fd")?, threads: self.count("task")? })
    }

    fn count(&self, what: &str) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/{what}", self.vxmon.pid()))?.count())
    }

    fn finish(self, samples: &[Sample], elapsed: Duration) -> Result<String> {
        let before_stopping = egress(&self.lab)?;
        let finished = self.vxmon.stop()?;
        // What left in the moments of attaching and of detaching may be counted or not.
        let least = before_stopping - self.attached.1;
        let most = egress(&self.lab)? - self.attached.0;
        ensure!(
            finished.status.success() && finished.stderr.lines().all(|line| line.starts_with("vxmon: ")),
            "{finished:#?}"
        );
        let join = |reader: JoinHandle<Result<Lines>>| reader.join().map_err(|_| anyhow!("a reader panicked"))?;
        let (written, read) = (join(self.output)?, join(self.reader)?);
        ensure!(!Path::new(&self.scratch.path("socket")).exists(), "the socket is still there");
        let left = self.lab.a.run("tc", &["filter", "show", "dev", "uplink", "egress"])?;
        ensure!(left.is_empty(), "left at the uplink: {left}");

        // Every packet, every anomaly, every line.
        let packets = &written.summary["packets"];
        let uplinks =
            written.summary["devices"].as_array().into_iter().flatten().filter(|device| device["dev"] == "uplink");
        let counted: u64 =
            uplinks.map(|device| number(&device["packets"], "seen") + number(&device["packets"], "other")).sum();
        ensure!(
            (least..=most).contains(&counted),
            "{least} to {most} packets left by the uplink, {counted} were counted"
        );
        let bad = vxmon::anomalies(packets);
        let told =
            ["anomalies/reported", "anomalies/suppressed", "lost/ring", "lost/queue"].map(|path| number(packets, path));
        ensure!(told.iter().sum::<u64>() == bad, "{bad} anomalies: {packets}");
        ensure!(bad >= self.sent, "{} were sent: {packets}", self.sent);
        ensure!(written.anomalies == told[0], "{} lines of {} reported", written.anomalies, told[0]);
        ensure!(told[2] > 0, "the ring buffer did not overrun: {packets}");
        ensure!(
            read.events + read.missed == written.events + told[3],
            "by the socket {} lines and {} missed, written {} and {} lost",
            read.events,
            read.missed,
            written.events,
            told[3]
        );

        // Flat.
        let (early, late) = samples.split_at(samples.len() / 2);
        let early = early.get(WARM_UP..).filter(|early| !early.is_empty()).unwrap_or(early);
        let most = |samples: &[Sample]| samples.iter().map(|sample| sample.resident).max().unwrap_or(0);
        let (before, after) = (most(early), most(late));
        ensure!(after <= before + SLACK, "grew from {before} to {after} bytes: {samples:#?}");
        ensure!(after <= MOST, "{after} bytes");
        let descriptors: Vec<usize> = samples.iter().skip(WARM_UP).map(|sample| sample.descriptors).collect();
        ensure!(descriptors.iter().all(|count| *count == descriptors[0]), "descriptors: {descriptors:?}");

        let mut report = String::from("# The last soak\n\n");
        write!(
            report,
            "`cargo xtask soak` on Linux {}, {} processors.\n\n| | |\n|---|---|\n\
             | time | {} s, {} rounds |\n\
             | in each round | VXLAN device made anew and its offload switched, rules and conntrack flushed, 6 to 10 readers of \
             the socket, a storm of {STORM} bad packets of {FLOWS} flows while the monitor is stopped |\n\
             | beside them, all the time | a reader that reads all, one that never reads |\n\
             | packets that left by the uplink | {counted}, all counted |\n\
             | anomalies | {bad}: {} reported, {} held back as repeats, {} lost to the full ring buffer, {} to the output's queue |\n\
             | lines to the reader of all | {}, and {} that it was told it missed |\n\
             | resident memory, most | {:.1} MiB in the first half, {:.1} MiB in the second (limit 20) |\n\
             | file descriptors after each round | {} |\n\
             | threads | {} |\n\
             | end | exit code 0, no filter and no socket left |\n",
            nix::sys::utsname::uname()?.release().to_string_lossy(),
            thread::available_parallelism()?,
            elapsed.as_secs(),
            samples.len(),
            told[0],
            told[1],
            told[2],
            told[3],
            read.events,
            read.missed,
            before as f64 / f64::from(1 << 20),
            after as f64 / f64::from(1 << 20),
            descriptors[0],
            samples.last().map_or(0, |sample| sample.threads),
        )?;
        println!("\n{report}");
        Ok(report)
    }
}

fn rules() -> Rules {
    Rules { backend: Backend::IptablesLegacy, ..Rules::default() }
}

/// Has nftables count what leaves by the uplink, right ahead of vxmon's program.
fn count_egress(lab: &Lab) -> Result<()> {
    // Kept until the namespace goes.
    std::mem::forget(GsoCounter::start(&lab.a, "uplink", 0)?);
    Ok(())
}

fn egress(lab: &Lab) -> Result<u64> {
    let text = lab.a.run("nft", &["list", "counter", "netdev", "gso-uplink", "big"])?;
    let value = text.split_once("packets").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    value.with_context(|| format!("cannot read the counter from {text:?}"))
}

fn scrape(lab: &Lab, path: &str) -> Result<String> {
    lab.a.run("curl", &["-s", "-S", "--max-time", "30", &format!("http://127.0.0.1:{METRICS}{path}")])
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
