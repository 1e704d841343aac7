//! Network namespaces with a name, an owner and an end.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::{Pid, getpid, getppid},
};

use crate::{cleanup, cmd};

/// A network namespace, named `vxmon-<pid>-<number>-<suffix>`. Dropping it kills the programs that the lab started in it,
/// and deletes it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
}

impl Netns {
    /// Makes a namespace with a number of its own. The first call in a process removes namespaces whose owner is dead.
    pub fn create(suffix: &str) -> Result<Self> {
        Self::numbered(next_number(), suffix)
    }

    /// Makes two namespaces, `a` and `b`, with the same number.
    pub fn pair() -> Result<(Self, Self)> {
        let number = next_number();
        Ok((Self::numbered(number, "a")?, Self::numbered(number, "b")?))
    }

    fn numbered(number: u32, suffix: &str) -> Result<Self> {
        let name = format!("vxmon-{}-{number}-{suffix}", std::process::id());
        cleanup::wait_if_interrupted();
        cleanup::register(&name);
        let made = cmd::run(Command::new("ip").args(["netns", "add", &name])).and_then(|_| {
            File::open(cleanup::netns_path(&name)).with_context(|| format!("cannot open namespace {name}"))
        });
        match made {
            Ok(file) => Ok(Self { name, file: Arc::new(file) }),
            Err(error) => {
                cleanup::remove(&name);
                Err(error)
            }
        }
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it (`/run/netns/NAME`).
    #[must_use]
    pub fn path(&self) -> PathBuf {
        cleanup::netns_path(&self.name)
    }

    /// A program that will run inside, with `/sys` of that namespace as `ip netns exec` gives it: without what else is
    /// mounted below `/sys` (bpffs, tracefs, cgroups). It gets SIGKILL when the thread that started it ends, and when the
    /// namespace is dropped.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let (file, parent) = (Arc::clone(&self.file), getpid());
        command.env(cleanup::OWNER, parent.to_string());
        // SAFETY: runs between fork and exec: only system calls, no allocation and no lock.
        unsafe { command.pre_exec(move || enter_for_exec(&file, parent)) };
        command
    }

    /// Runs a program inside to its end and returns its standard output.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        cmd::run(self.command(program).args(args))
    }

    /// Runs lines of `ip` (without the word `ip`) inside, in one process; stops at the first that fails.
    pub fn ip(&self, lines: &str) -> Result<()> {
        cmd::run_with_input(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), lines).map(drop)
    }

    /// Runs `work` inside, on a thread of its own, and waits for it. Sockets made there stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.join_current_thread()?;
                work()
            });
            inside.join().unwrap_or_else(|_| Err(anyhow!("a thread in {} panicked", self.name)))
        })
    }

    /// Starts `work` on a thread inside and does not wait.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let (file, name) = (Arc::clone(&self.file), self.name.clone());
        Ok(thread::Builder::new().name(name).spawn(move || {
            setns(&*file, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
            work()
        })?)
    }

    /// Sets kernel parameters of this namespace; the names are as in `net.core.txrehash`.
    pub fn sysctl<K: AsRef<str> + Sync, V: AsRef<str> + Sync>(&self, settings: &[(K, V)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in settings {
                let (key, value) = (key.as_ref(), value.as_ref());
                let path = Path::new("/proc/sys").join(key.replace('.', "/"));
                fs::write(&path, value).with_context(|| format!("cannot set {key}={value} in {}", self.name))?;
            }
            Ok(())
        })
    }

    fn join_current_thread(&self) -> Result<()> {
        setns(&*self.file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter namespace {}", self.name))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        cleanup::wait_if_interrupted();
        cleanup::remove(&self.name);
    }
}

fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn enter_for_exec(namespace: &File, parent: Pid) -> std::io::Result<()> {
    const NOTHING: Option<&str> = None;
    set_pdeathsig(Signal::SIGKILL)?;
    // If the parent died before the line above, nobody will send that signal.
    if getppid() != parent {
        return Err(nix::Error::ESRCH.into());
    }
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    // /sys shows the devices of the namespace in which it was mounted.
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING)?;
    let _ = umount2("/sys", MntFlags::MNT_DETACH);
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NOTHING)?;
    Ok(())
}
