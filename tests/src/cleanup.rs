//! What this process made and must not leave behind: its namespaces, and the programs in them.
//!
//! Three ways lead out. `Drop` of a [`Netns`](crate::Netns) is the usual one. [`on_interrupt`] covers SIGINT, SIGTERM and
//! SIGHUP. After SIGKILL, programs die by themselves (`PR_SET_PDEATHSIG`), and the next process that makes a namespace
//! removes those whose owner is gone.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
    unistd::Pid,
};

/// The variable that marks programs started by the lab; its value is the process id of the owner.
pub(crate) const OWNER: &str = "VXMON_LAB_OWNER";
const NETNS_DIR: &str = "/run/netns";

static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP delete the namespaces of this process, kill the programs in them, and exit with
/// 128 + signal (130 for SIGINT). For programs that own their process, not for tests.
pub fn on_interrupt() -> Result<()> {
    let (mut reader, writer) = std::io::pipe().context("cannot make the pipe for signals")?;
    // The write end stays open for as long as the process lives: the handler needs it.
    SIGNAL_PIPE.store(writer.as_raw_fd(), Ordering::SeqCst);
    std::mem::forget(writer);
    thread::Builder::new().name("cleanup".to_owned()).spawn(move || {
        let mut number = [0_u8];
        if reader.read_exact(&mut number).is_ok() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            everything();
            std::process::exit(128 + i32::from(number[0]));
        }
    })?;
    let action = SigAction::new(SigHandler::Handler(forward), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only loads an atomic and calls write(2), which are async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}

/// Deletes all namespaces of this process and kills the programs in them, at once.
pub fn everything() {
    loop {
        let name = live().first().cloned();
        let Some(name) = name else { break };
        remove(&name);
    }
}

/// Once interrupted, a thread that would make or drop a namespace has nothing left to do: it waits for the exit, lest the
/// errors that follow from killed programs decide how the process ends.
pub(crate) fn wait_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}

extern "C" fn forward(signal: i32) {
    let byte = [u8::try_from(signal).unwrap_or(0)];
    // SAFETY: write(2) on a descriptor that is never closed, from a buffer that outlives the call.
    let _ = unsafe { nix::libc::write(SIGNAL_PIPE.load(Ordering::SeqCst), byte.as_ptr().cast(), 1) };
}

/// Notes that `name` is ours and, the first time in this process, removes what dead processes left.
pub(crate) fn register(name: &str) {
    static FIRST: Once = Once::new();
    FIRST.call_once(remove_stale);
    live().insert(name.to_owned());
}

/// Kills what the lab started in the namespace, and deletes it. A namespace that is already gone is fine.
pub(crate) fn remove(name: &str) {
    let path = netns_path(name);
    if let Ok(meta) = fs::metadata(&path) {
        kill_inside(meta.ino());
    }
    // As `ip netns del` does it. Either may fail where creation failed half-way.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(&path);
    live().remove(name);
}

pub(crate) fn netns_path(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

fn live() -> MutexGuard<'static, BTreeSet<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove_stale() {
    for entry in fs::read_dir(NETNS_DIR).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("vxmon-").and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !is_alive(pid)) {
            remove(&name);
        }
    }
}

/// A zombie has a directory in /proc until its parent takes notice, which may be never.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state comes after the name, which is in parentheses and may have any character in it.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Kills the processes in that namespace which carry the mark, whoever their parent is by now.
fn kill_inside(namespace: u64) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let inside = fs::metadata(entry.path().join("ns/net")).is_ok_and(|meta| meta.ino() == namespace);
        if inside && pid.cast_unsigned() != std::process::id() && is_marked(&entry.path()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn is_marked(process: &Path) -> bool {
    let mut environment = Vec::new();
    let read = fs::File::open(process.join("environ")).and_then(|mut file| file.read_to_end(&mut environment));
    read.is_ok()
        && environment
            .split(|&byte| byte == 0)
            .any(|variable| variable.strip_prefix(OWNER.as_bytes()).is_some_and(|rest| rest.starts_with(b"=")))
}

/// Writes a line for people to stderr, past the capture of the test harness.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
