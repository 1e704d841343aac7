//! One guest: QEMU with a kernel, the initramfs, the host's root and a directory for results. A guest never runs longer than
//! its limit, and never outlives this process.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use super::{initramfs, kernel::Image};
use crate::proc;

const QEMU: &str = "qemu-system-x86_64";
const CPUS: &str = "2";
const MEMORY: &str = "2048";
/// A guest under KVM is there after this time, or hangs. Under TCG, a kernel needs a few seconds to a minute.
const KVM_LIMIT: Duration = Duration::from_secs(15);
/// From power-on until the guest has written its facts, at most.
pub const BOOT_LIMIT: Duration = Duration::from_secs(300);
const TICK: Duration = Duration::from_millis(100);
/// How many times longer than here things may take in an emulated guest.
const SLOWNESS: u32 = 8;
/// How many lines of the console are shown of a guest that hangs.
const LAST_LINES: usize = 30;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM if a guest really boots with it, else TCG.
    Auto,
    /// The processor's own virtualisation.
    Kvm,
    /// Emulation: works everywhere, slowly.
    Tcg,
}

impl Accel {
    /// Never [`Auto`](Self::Auto): where that is asked for, a guest is booted with KVM to see.
    pub fn resolve(self, image: &Image, scratch: &Path) -> Result<Self> {
        static KVM_WORKS: OnceLock<bool> = OnceLock::new();
        match self {
            Self::Kvm | Self::Tcg => Ok(self),
            Self::Auto => {
                let works = match KVM_WORKS.get() {
                    Some(works) => *works,
                    None => *KVM_WORKS.get_or_init(|| kvm_boots(image, scratch)),
                };
                Ok(if works { Self::Kvm } else { Self::Tcg })
            }
        }
    }
}

/// Whether a guest comes up with KVM: /dev/kvm alone says little, least of all where this machine is itself a guest.
fn kvm_boots(image: &Image, scratch: &Path) -> bool {
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("vm: no KVM: /dev/kvm cannot be opened; guests are emulated (TCG), which is slow");
        return false;
    }
    let boots = || -> Result<bool> {
        fs::create_dir_all(scratch)?;
        fs::write(scratch.join("jobs"), "")?;
        let guest = Guest { image, run: scratch, accel: Accel::Kvm, limit: KVM_LIMIT };
        Ok(guest.run(|_| Ok(())).is_ok())
    };
    let boots = boots().unwrap_or(false) && proc::stop_signal().is_none();
    eprintln!(
        "vm: {}",
        if boots {
            "KVM works"
        } else {
            "a guest does not boot with KVM here; guests are emulated (TCG), which is slow"
        }
    );
    boots
}

/// A guest to run.
pub struct Guest<'a> {
    /// Its kernel.
    pub image: &'a Image,
    /// Where `jobs` is, and the results go.
    pub run: &'a Path,
    /// Not [`Accel::Auto`].
    pub accel: Accel,
    /// The most that it may take.
    pub limit: Duration,
}

impl Guest<'_> {
    /// Runs it to its end, calling `each` every now and then. Fails if the guest did not get to its end: with the last lines
    /// of its console.
    pub fn run(&self, mut each: impl FnMut(&Path) -> Result<()>) -> Result<()> {
        let console = self.run.join("console.log");
        let _ = fs::remove_file(self.run.join("done"));
        let mut command = self.command(&console)?;
        let start = Instant::now();
        let mut child = Killed(command.spawn().with_context(|| {
            format!("cannot run {QEMU} (Debian's package qemu-system-x86): `{}`", proc::line(&command))
        })?);
        let status = loop {
            if let Some(status) = child.0.try_wait()? {
                break status;
            }
            ensure!(proc::stop_signal().is_none(), "interrupted");
            let booted = self.run.join("facts").exists();
            let (limit, what) = if booted { (self.limit, "end") } else { (self.limit.min(BOOT_LIMIT), "start") };
            if start.elapsed() > limit {
                let limit = limit.as_secs();
                bail!("the guest did not {what} within {limit} s; its console's last lines:\n{}", last(&console));
            }
            each(self.run)?;
            thread::sleep(TICK);
        };
        each(self.run)?;
        if !status.success() || !self.run.join("done").exists() {
            let said = fs::read_to_string(self.run.join("qemu.err")).unwrap_or_default();
            bail!("the guest ended early ({status}); {said}its console's last lines:\n{}", last(&console));
        }
        Ok(())
    }

    fn command(&self, console: &Path) -> Result<Command> {
        let initrd = self.run.join("initramfs");
        fs::write(&initrd, initramfs::build(self.image.modules.as_deref())?)?;
        let guest = crate::cargo::root()?.join("xtask/vm/guest.sh");
        let modules =
            self.image.modules.as_ref().map_or_else(String::new, |path| format!(" VXMON_MODULES={}", path.display()));
        let (accel, cpu, slowness) = match self.accel {
            Accel::Kvm => ("kvm", "host", 1),
            // Five-level page tables cost an emulated kernel seconds at boot.
            Accel::Auto | Accel::Tcg => ("tcg,thread=multi", "max,la57=off", SLOWNESS),
        };
        // no_timer_check: where the host is busy, an emulated timer looks broken to the kernel (`check_timer()`), which panics.
        // What the kernel does not know it puts into the first process's environment.
        let append = format!(
            "console=ttyS0 panic=-1 no_timer_check mitigations=off loglevel=5 random.trust_cpu=on VXMON_SLOWNESS={slowness} \
             VXMON_GUEST={}{modules}",
            guest.display()
        );
        let share = |path: &Path, tag: &str, more: &str| {
            format!("local,path={},mount_tag={tag},security_model=none,multidevs=remap{more}", path.display())
        };
        // QEMU ends with this process, even if that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-machine", "pc", "-accel", accel, "-cpu", cpu, "-smp", CPUS, "-m", MEMORY]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-kernel").arg(&self.image.vmlinuz).arg("-initrd").arg(&initrd).args(["-append", &append]);
        command.args(["-virtfs", &share(Path::new("/"), "host", ",readonly=on")]);
        command.args(["-virtfs", &share(self.run, "results", "")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(self.run.join("qemu.err"))?);
        Ok(command)
    }
}

/// A child that does not outlive this value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn last(console: &Path) -> String {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].iter().map(|line| format!("    {line}\n")).collect()
}
