//! Builds the kernel that has fault A: Debian's linux-source-6.1, `vm/fault-a.patch`, and `vm/fault-a.config` on top of
//! `tinyconfig`. It is kept under a name made of all three.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::{cache::Cache, kernel::Image};
use crate::{cargo, proc, setup};

const SOURCE: &str = "/usr/src/linux-source-6.1.tar.xz";
const CONFIG: &str = include_str!("../../vm/fault-a.config");
const PATCH: &str = include_str!("../../vm/fault-a.patch");

/// The source is there, and no kernel comes of it: the patch or the configuration does not fit it any more. That is a failure
/// of the lab, not a kernel that cannot be had.
#[derive(Debug)]
pub struct DoesNotBuild(String);

impl fmt::Display for DoesNotBuild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no kernel comes of {} with xtask/vm/fault-a.patch and fault-a.config", self.0)
    }
}

/// The kernel, built if need be.
pub fn image(cache: &Cache) -> Result<Image> {
    let digest = Sha256::new().chain_update(CONFIG).chain_update(PATCH).finalize();
    let digest: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    // Of whatever version the source was: to look whether there is a newer one, it would have to be installed first.
    let built = cache
        .names()
        .into_iter()
        .rfind(|name| name.strip_prefix("fault-a-").is_some_and(|rest| rest.strip_suffix(&digest).is_some()));
    let entry = match built.and_then(|name| cache.find(&name)) {
        Some(entry) if !Path::new(SOURCE).exists() => entry,
        _ => {
            setup::kernel_build()?;
            let version = proc::output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "linux-source-6.1"]));
            let version = version.with_context(|| format!("{SOURCE} is not of a Debian package"))?;
            let name = format!("fault-a-{version}-{digest}");
            let log = cache.path(&format!("{name}.log"));
            let broken = DoesNotBuild(format!("linux-source-6.1 {version}"));
            cache.entry(&name, |directory| build(directory, &log, broken))?
        }
    };
    Ok(Image { vmlinuz: entry.join("vmlinuz"), modules: None })
}

fn build(directory: &Path, log: &Path, broken: DoesNotBuild) -> Result<()> {
    eprintln!(
        "vm: building the kernel with fault A, into {}: takes about 10 minutes on two cores",
        log.parent().unwrap_or(directory).display()
    );
    let (source, out) = (directory.join("source"), directory.join("build"));
    fs::create_dir(&source)?;
    fs::create_dir(&out)?;
    proc::run(Command::new("tar").args(["-xJf", SOURCE, "--strip-components=1", "-C"]).arg(&source))?;
    let patch = cargo::root()?.join("xtask/vm/fault-a.patch");
    proc::run(Command::new("patch").args(["--quiet", "-p1", "-d"]).arg(&source).arg("-i").arg(&patch))
        .and_then(|()| configure(&source, &out))
        .context(broken)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from) + 1;
    let mut make = make(&source, &out);
    make.arg(format!("-j{jobs}")).arg("bzImage").stdout(fs::File::create(log)?);
    proc::run(&mut make).with_context(|| format!("see {}", log.display()))?;
    fs::copy(out.join("arch/x86/boot/bzImage"), directory.join("vmlinuz"))?;
    fs::copy(out.join(".config"), directory.join("config"))?;
    // 3 GiB that nobody needs again.
    fs::remove_dir_all(&source)?;
    Ok(fs::remove_dir_all(&out)?)
}

fn make(source: &Path, out: &Path) -> Command {
    // Others may be at work on this machine.
    let mut command = Command::new("nice");
    command.args(["-n", "5", "make", "--silent", "-C"]).arg(source).arg(format!("O={}", out.display()));
    command.env("KBUILD_BUILD_TIMESTAMP", "@0").env("KBUILD_BUILD_USER", "vxmon").env("KBUILD_BUILD_HOST", "lab");
    // cargo's own job server is not make's.
    command.env_remove("MAKEFLAGS").env_remove("CARGO_MAKEFLAGS").stderr(Stdio::inherit());
    command
}

/// `.config`: tinyconfig with the fragment over it. Fails if an option of the fragment did not come out as it says.
fn configure(source: &Path, out: &Path) -> Result<()> {
    let quiet = |mut command: Command| proc::run(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let mut tiny = make(source, out);
    tiny.arg("tinyconfig");
    quiet(tiny)?;
    let config: PathBuf = out.join(".config");
    let mut text = fs::read_to_string(&config)?;
    text.push_str(CONFIG);
    fs::write(&config, text)?;
    // The last line of an option counts.
    let mut resolve = make(source, out);
    resolve.arg("olddefconfig");
    quiet(resolve)?;
    let result = fs::read_to_string(&config)?;
    let lines: std::collections::HashSet<&str> = result.lines().collect();
    let missing: Vec<&str> =
        CONFIG.lines().filter(|line| line.starts_with("CONFIG_") && !lines.contains(line)).collect();
    if !missing.is_empty() {
        bail!("the kernel's configuration does not take {}", missing.join(" "));
    }
    ensure!(lines.contains("CONFIG_DEBUG_INFO_BTF=y"), "no BTF: is pahole (Debian's package dwarves) installed?");
    Ok(())
}
