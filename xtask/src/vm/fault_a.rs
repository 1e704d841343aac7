//! Builds the kernel that has fault A: Debian's linux-source-6.1, `vm/fault-a.patch`, and `vm/fault-a.config` on top of
//! `tinyconfig`. The build is kept in `target/vm/kernels` under a name made of all three, out of the source tree.

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::kernel::{Image, cache};
use crate::{cargo, proc};

const SOURCE: &str = "/usr/src/linux-source-6.1.tar.xz";
const CONFIG: &str = include_str!("../../vm/fault-a.config");
const PATCH: &str = include_str!("../../vm/fault-a.patch");

/// The kernel, built if need be.
pub fn image() -> Result<Image> {
    let meta =
        fs::metadata(SOURCE).with_context(|| format!("{SOURCE} is missing (Debian's package linux-source-6.1)"))?;
    let mut hasher = DefaultHasher::new();
    (CONFIG, PATCH, meta.len(), meta.modified()?).hash(&mut hasher);
    let directory = cache()?.join("kernels").join(format!("fault-a-{:016x}", hasher.finish()));
    let vmlinuz = directory.join("vmlinuz");
    if !vmlinuz.exists() {
        build(&directory, &vmlinuz)?;
    }
    Ok(Image { vmlinuz, modules: None })
}

fn build(directory: &Path, vmlinuz: &Path) -> Result<()> {
    eprintln!("vm: building the kernel with fault A: takes about 10 minutes on two cores");
    let (source, out) = (directory.join("source"), directory.join("build"));
    let _ = fs::remove_dir_all(&source);
    fs::create_dir_all(&source)?;
    fs::create_dir_all(&out)?;
    proc::run(Command::new("tar").args(["-xJf", SOURCE, "--strip-components=1", "-C"]).arg(&source))?;
    let patch = cargo::root()?.join("xtask/vm/fault-a.patch");
    proc::run(Command::new("patch").args(["--quiet", "-p1", "-d"]).arg(&source).arg("-i").arg(&patch))?;
    configure(&source, &out)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from) + 1;
    let log = directory.join("build.log");
    let mut make = make(&source, &out);
    // Others may be at work on this machine.
    make.arg(format!("-j{jobs}")).arg("bzImage").stdout(fs::File::create(&log)?);
    proc::run(&mut make).with_context(|| format!("see {}", log.display()))?;
    fs::copy(out.join("arch/x86/boot/bzImage"), vmlinuz.with_extension("new"))?;
    fs::copy(out.join(".config"), directory.join("config"))?;
    fs::rename(vmlinuz.with_extension("new"), vmlinuz)?;
    // 3 GiB that nobody needs again.
    fs::remove_dir_all(&source)?;
    Ok(fs::remove_dir_all(&out)?)
}

fn make(source: &Path, out: &Path) -> Command {
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
