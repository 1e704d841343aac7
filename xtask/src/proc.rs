//! Child processes. None outlives this one.
//!
//! Ctrl-C reaches the children by itself, since they are in the same process group: what is left to do is to wait for
//! them. A signal sent to this process alone is passed on. Grandchildren whose parent died come to this process (it is a
//! subreaper), so it can end them too.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicI32, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// How often a wait looks whether this process is to stop.
const TICK: Duration = Duration::from_millis(20);
/// How long children have to end after SIGTERM, before SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

static STOP: AtomicI32 = AtomicI32::new(0);

/// Prepares this process; to be called once, before any child is started.
pub fn init() -> Result<()> {
    prctl::set_child_subreaper(true).context("cannot become the reaper of orphans")?;
    let action = SigAction::new(SigHandler::Handler(note_stop), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but store to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}

extern "C" fn note_stop(signal: i32) {
    STOP.store(signal, Ordering::Relaxed);
}

/// The signal that asked this process to stop.
pub fn stop_signal() -> Option<Signal> {
    Signal::try_from(STOP.load(Ordering::Relaxed)).ok()
}

/// Runs `command` to its end; fails if its exit status is not 0.
pub fn run(command: &mut Command) -> Result<()> {
    let mut child = spawn(command)?;
    let status = wait(&mut child)?;
    check(command, status)
}

/// Runs `command` to its end, but for no longer than `limit`; fails if its exit status is not 0.
pub fn run_within(command: &mut Command, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut child = spawn(command)?;
    loop {
        if let Some(status) = child.try_wait()? {
            return check(command, status);
        }
        if stop_signal().is_some() || Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("`{}` was ended after at most {} s", line(command), limit.as_secs());
        }
        thread::sleep(TICK);
    }
}

/// Runs `command` to its end, calling `each` with every line of its standard output as it comes.
pub fn run_lines(command: &mut Command, mut each: impl FnMut(&str)) -> Result<ExitStatus> {
    let mut child = spawn(command.stdout(Stdio::piped()))?;
    let stdout = child.stdout.take().context("the child has no standard output")?;
    let (sender, lines) = mpsc::channel();
    // Not joined: an orphan that holds the pipe open must not hold up this process.
    thread::spawn(move || {
        for text in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    loop {
        match lines.recv_timeout(TICK) {
            Ok(text) => each(&String::from_utf8_lossy(&text)),
            Err(RecvTimeoutError::Timeout) if stop_signal().is_none() => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return wait(&mut child),
        }
    }
}

/// Runs `command` and returns its standard output, trimmed; `None` if it cannot be run or its exit status is not 0.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Ends every process that descends from this one, and waits until they are gone.
pub fn end_children() {
    let start = Instant::now();
    let mut signal = Signal::SIGTERM;
    loop {
        let left = descendants();
        if left.is_empty() {
            return;
        }
        for pid in left {
            // It may have ended by now, or belong to root (sudo passes the signal on to what it runs).
            let _ = kill(pid, signal);
        }
        let resend = Instant::now() + Duration::from_secs(1);
        while Instant::now() < resend {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => thread::sleep(TICK),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return, // ECHILD: none is left
            }
        }
        if signal == Signal::SIGKILL {
            return;
        }
        if start.elapsed() > GRACE {
            signal = Signal::SIGKILL;
        }
    }
}

/// The command line, for messages.
pub fn line(command: &Command) -> String {
    let program = command.get_program();
    let words = [Path::new(program).file_name().unwrap_or(program)].into_iter().chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::null());
    command.spawn().with_context(|| format!("cannot run `{}`", line(command)))
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if stop_signal().is_some() {
            end_children();
            bail!("interrupted");
        }
        thread::sleep(TICK);
    }
}

/// Fails if `status`, that of `command`, is not 0.
pub fn check(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("`{}` failed: {status}", line(command));
    }
    Ok(())
}

/// Every living process that descends from this one.
fn descendants() -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // proc(5): pid (comm) state ppid …; comm may hold spaces and parentheses.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (Some(state), Some(parent)) = (fields.next(), fields.next()) else { continue };
        if state != "Z"
            && let Ok(parent) = parent.parse()
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut next = vec![Pid::this().as_raw()];
    while let Some(parent) = next.pop() {
        let mine = children.remove(&parent).unwrap_or_default();
        found.extend(mine.iter().copied().map(Pid::from_raw));
        next.extend(mine);
    }
    found
}
