//! A running `vxmon attach`.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    time::clock_getcpuclockid,
    unistd::Pid,
};
use serde_json::Value;

use crate::{Netns, cmd, pace};

/// How long it may take to attach, or to end: without optimisation, reading the kernel's BTF takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A `vxmon attach` that runs in a namespace. Dropping it kills it.
#[derive(Debug)]
pub struct Vxmon {
    child: Child,
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
    started: Instant,
    /// From the start of the process until it said that it was attached.
    pub ready_after: Duration,
}

/// What is known once it has ended.
#[derive(Debug)]
pub struct Finished {
    /// Every `anomaly` line.
    pub events: Vec<Value>,
    /// Every JSON line, of whatever type.
    pub all: Vec<Value>,
    /// The `summary` line; null if there was none.
    pub summary: Value,
    /// Standard output as lines, for formats other than JSON.
    pub stdout: Vec<String>,
    /// Standard error.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
}

impl Finished {
    /// A number in the summary's totals, `verdicts/valid` for instance; 0 where there is none.
    #[must_use]
    pub fn total(&self, path: &str) -> u64 {
        number(&self.summary["packets"], path)
    }

    /// The summary's line of a device, by name. With several, as of a device made anew, the last.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&Value> {
        self.summary["devices"].as_array()?.iter().rfind(|device| device["dev"] == name)
    }

    /// Fails unless it ended well and its summary adds up, in total and for each device: verdicts and unverified to what
    /// was seen; reported, suppressed and lost to the anomalies; and the devices to the total.
    pub fn adds_up(&self) -> Result<()> {
        if self.status.code() != Some(0) {
            bail!("vxmon ended with {}; it said: {}", self.status, self.stderr.trim_end());
        }
        let devices = self.summary["devices"].as_array().context("no summary")?;
        adds_up(&self.summary["packets"]).context("in total")?;
        for device in devices {
            adds_up(&device["packets"]).with_context(|| format!("device {}", device["dev"]))?;
        }
        for path in ["seen", "other", "counted_above", "anomalies/reported", "anomalies/suppressed"] {
            let sum: u64 = devices.iter().map(|device| number(&device["packets"], path)).sum();
            if sum != self.total(path) {
                bail!("{path}: the devices have {sum}, the total is {}", self.total(path));
            }
        }
        Ok(())
    }
}

/// Names of the verdicts that are no anomaly.
pub const GOOD_VERDICTS: [&str; 4] = ["zero", "valid", "lco-valid", "pending"];

/// Anomalies among the verdicts of `packets`.
#[must_use]
pub fn anomalies(packets: &Value) -> u64 {
    let verdicts = packets["verdicts"].as_object().into_iter().flatten();
    let bad = verdicts.filter(|(name, _)| !GOOD_VERDICTS.contains(&name.as_str()));
    bad.filter_map(|(_, count)| count.as_u64()).sum()
}

/// A number in `packets`, by its path; 0 where there is none.
#[must_use]
pub fn number(packets: &Value, path: &str) -> u64 {
    packets.pointer(&format!("/{path}")).and_then(Value::as_u64).unwrap_or(0)
}

fn adds_up(packets: &Value) -> Result<()> {
    let all = |section: &str| -> u64 {
        packets[section].as_object().into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum()
    };
    if all("verdicts") + all("unverified") != number(packets, "seen") {
        bail!("verdicts and unverified are not what was seen: {packets}");
    }
    // `lost/capture` counts packets that were not judged.
    let lost = number(packets, "lost/ring") + number(packets, "lost/queue");
    if all("anomalies") + lost != anomalies(packets) {
        bail!("reported, suppressed and lost are not the anomalies: {packets}");
    }
    Ok(())
}

/// Seconds of the day.
fn time(ts: &Value) -> Result<f64> {
    let text = ts.as_str().with_context(|| format!("not a time: {ts}"))?;
    let parse = || {
        let (_, time) = text.trim_end_matches('Z').split_once('T')?;
        let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
        Some(parts.next()?? * 3600.0 + parts.next()?? * 60.0 + parts.next()??)
    };
    parse().with_context(|| format!("not a time: {text}"))
}

/// From one `ts` of an event to another, in seconds, if they are not a day apart.
pub fn seconds_between(from: &Value, to: &Value) -> Result<f64> {
    let apart = time(to)? - time(from)?;
    Ok(if apart < -43_200.0 { apart + 86_400.0 } else { apart })
}

#[derive(Debug, Default)]
struct Shared {
    output: Mutex<Output>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Output {
    stdout: Vec<String>,
    json: Vec<Value>,
    stderr: String,
    closed: u8,
}

impl Output {
    fn of_type<'all>(&'all self, kind: &'all str) -> impl Iterator<Item = &'all Value> {
        self.json.iter().filter(move |value| value["type"] == kind)
    }
}

/// The binary under test: `VXMON_BIN`, else `release/vxmon` in the target directory, where `cargo xtask build` puts it.
pub fn binary() -> Result<PathBuf> {
    let target = || match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => PathBuf::from(target),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
    };
    let path = std::env::var_os("VXMON_BIN").map_or_else(|| target().join("release/vxmon"), PathBuf::from);
    path.canonicalize()
        .with_context(|| format!("no {}: run `cargo xtask build --release`, or set VXMON_BIN", path.display()))
}

/// Whether vxmon is told by the environment to watch by packet sockets: then there is no mark, and the conntrack entry comes
/// by netlink.
#[must_use]
pub fn by_packet_socket() -> bool {
    std::env::var("VXMON_ENGINE").is_ok_and(|engine| engine == "packet-socket")
}

/// Whether vxmon is told by the environment to use the TC programs for kernels before 5.8: then the checksum's state is not
/// known, and the conntrack entry comes by netlink.
#[must_use]
pub fn by_perf() -> bool {
    std::env::var("VXMON_TRANSPORT").is_ok_and(|transport| transport == "perf")
}

/// Whether this kernel lets a program see NAT being set up, by kprobes: evidence `observed`.
#[must_use]
pub fn sees_nat() -> bool {
    Path::new("/sys/bus/event_source/devices/kprobe/type").exists()
}

/// CPU time of a process so far, in user and kernel mode.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let time = || clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?.now();
    Ok(time().with_context(|| format!("cannot read the CPU time of process {pid}"))?.into())
}

impl Vxmon {
    /// Starts `vxmon attach ARGS…` in `node` and waits until it is attached to at least one device.
    pub fn attach(node: &Netns, args: &[&str]) -> Result<Self> {
        Self::attach_to(node, 1, args)
    }

    /// As [`attach`](Self::attach), but waits until it is attached to `devices` devices.
    ///
    /// Attached is what an `attached` line on stdout says; without `--format json`, or with `--output`, the first line on
    /// stderr.
    pub fn attach_to(node: &Netns, devices: usize, args: &[&str]) -> Result<Self> {
        let vxmon = Self::start(node, args)?;
        let json = args.windows(2).any(|pair| pair == ["--format", "json"]) || args.contains(&"--format=json");
        let json = json && !args.iter().any(|arg| arg.starts_with("--output"));
        vxmon.until_ready(devices, json)
    }

    /// Starts `vxmon attach ARGS…` in `node` and does not wait: for what is expected to fail.
    pub fn start(node: &Netns, args: &[&str]) -> Result<Self> {
        let mut command = node.command(binary()?);
        command.arg("attach").args(args);
        Self::spawn(command)
    }

    /// Starts a command that is or becomes vxmon, and does not wait.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run `{}`", cmd::line(&command)))?;
        let shared = Arc::new(Shared::default());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let readers = vec![
            read_lines(&shared, stdout, |output, line| {
                output.json.extend(serde_json::from_str::<Value>(&line).ok().filter(Value::is_object));
                output.stdout.push(line);
            })?,
            read_lines(&shared, stderr, |output, line| {
                output.stderr.push_str(&line);
                output.stderr.push('\n');
            })?,
        ];
        Ok(Self { child, shared, readers, started, ready_after: Duration::ZERO })
    }

    fn until_ready(mut self, devices: usize, json: bool) -> Result<Self> {
        let ready = |output: &Output| {
            if json { output.of_type("attached").count() >= devices } else { output.stderr.contains('\n') }
        };
        let output = self.wait_until(PATIENCE, ready);
        if !ready(&output) {
            let said = output.stderr.trim_end().to_owned();
            drop(output);
            bail!("vxmon attach is not ready after {:?}; it said: {said}", self.started.elapsed());
        }
        drop(output);
        self.ready_after = self.started.elapsed();
        Ok(self)
    }

    /// Waits until there are `count` anomalies, or `limit` has passed; returns those that there are.
    #[must_use]
    pub fn wait_events(&self, count: usize, limit: Duration) -> Vec<Value> {
        self.wait_type("anomaly", count, limit)
    }

    /// As [`wait_events`](Self::wait_events), for lines of another type.
    #[must_use]
    pub fn wait_type(&self, kind: &str, count: usize, limit: Duration) -> Vec<Value> {
        let output = self.wait_until(limit, |output| output.of_type(kind).count() >= count);
        output.of_type(kind).cloned().collect()
    }

    /// The anomalies so far.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        self.wait_events(0, Duration::ZERO)
    }

    /// The lines of standard output so far.
    #[must_use]
    pub fn stdout(&self) -> Vec<String> {
        self.lock().stdout.clone()
    }

    /// Standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.lock().stderr.clone()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// The most resident memory that it had since the start, or since [`reset_peak`](Self::reset_peak), in bytes.
    pub fn peak_resident(&self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    /// Has the kernel forget how much resident memory it had so far: proc_pid_clear_refs(5).
    pub fn reset_peak(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.pid());
        fs::write(&path, "5").with_context(|| format!("cannot write {path}"))
    }

    /// A line of proc_pid_status(5), in bytes.
    fn memory(&self, name: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().with_context(|| format!("{name} {line}"))?;
        Ok(kib * 1024)
    }

    /// CPU time used so far, in user and kernel mode.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.pid())
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).context("vxmon is gone")
    }

    /// Asks it to end, as Ctrl-C does, and waits until it has.
    pub fn stop(self) -> Result<Finished> {
        // It may have ended by itself (`--count`, `--duration`).
        let _ = self.signal(Signal::SIGINT);
        self.wait(PATIENCE)
    }

    /// Ends it with SIGKILL: nothing of its own clean-up runs.
    pub fn kill(mut self) -> Result<Finished> {
        self.child.kill()?;
        self.wait(PATIENCE)
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self, limit: Duration) -> Result<Finished> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if start.elapsed() > pace::limit(limit) {
                bail!("vxmon did not end within {limit:?}; it said: {}", self.stderr().trim_end());
            }
            thread::sleep(Duration::from_millis(2));
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let mut output = self.lock();
        Ok(Finished {
            events: output.of_type("anomaly").cloned().collect(),
            summary: output.of_type("summary").last().cloned().unwrap_or(Value::Null),
            all: std::mem::take(&mut output.json),
            stdout: std::mem::take(&mut output.stdout),
            stderr: std::mem::take(&mut output.stderr),
            status,
        })
    }

    /// Waits until the output satisfies `done`, is complete, or `limit` has passed.
    fn wait_until(&self, limit: Duration, done: impl Fn(&Output) -> bool) -> MutexGuard<'_, Output> {
        let (guard, limit) = (self.lock(), pace::limit(limit));
        let waited = self.shared.changed.wait_timeout_while(guard, limit, |output| !done(output) && output.closed < 2);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.shared.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vxmon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(
    shared: &Arc<Shared>,
    pipe: Option<impl Read + Send + 'static>,
    mut take: impl FnMut(&mut Output, String) + Send + 'static,
) -> Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    let pipe = BufReader::new(pipe.context("a child without an output")?);
    Ok(thread::Builder::new().name("vxmon-output".to_owned()).spawn(move || {
        for line in pipe.lines().map_while(Result::ok) {
            take(&mut shared.output.lock().unwrap_or_else(PoisonError::into_inner), line);
            shared.changed.notify_all();
        }
        shared.output.lock().unwrap_or_else(PoisonError::into_inner).closed += 1;
        shared.changed.notify_all();
    })?)
}
