//! `cargo xtask image`: the container image, as an OCI layout and as an archive of it.
//!
//! Built apart from `cargo xtask build`, in `target/image/build`: with the paths of this machine left out of the binary, so
//! that the same commit gives the same bytes wherever it is built with the same tools. `--verify` builds it a second time,
//! from a fresh checkout elsewhere and with another cargo home, and compares.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;
use vxmon_image::{Contents, Written};

use crate::{
    cargo, proc,
    setup::{self, Scope},
};

/// What `cargo xtask image` was asked to do.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to put `oci/`, the layout, and `vxmon.tar`, its archive
    #[arg(long, value_name = "DIR", default_value = "target/image")]
    output: PathBuf,
    /// Build it once more, in another place, and compare the bytes
    #[arg(long)]
    verify: bool,
}

/// Makes the image.
pub fn run(args: &Args) -> Result<()> {
    setup::run(Scope::Build)?;
    let root = cargo::root()?;
    let place = Place { root: root.to_owned(), cargo_home: cargo_home()? };
    let output = env::current_dir()?.join(&args.output);
    let source = Source::of(root)?;
    let image = place.make(&output, &source)?;
    let tar = output.join("vxmon.tar");
    println!("{} {} ({})", image.name, image.digest, image.architecture);
    println!("layout:  {}", output.join("oci").display());
    println!("archive: {} ({:.1} MiB)", tar.display(), fs::metadata(&tar)?.len() as f64 / f64::from(1 << 20));
    if args.verify { verify(&place, &output, &source) } else { Ok(()) }
}

/// What it is built from: looked up once, since a commit may be made meanwhile.
struct Source {
    /// The commit, marked if the files are not those of the commit.
    revision: Option<String>,
    /// Time of the image's files, seconds since 1970.
    created: u64,
}

impl Source {
    fn of(root: &Path) -> Result<Self> {
        Ok(Self { revision: revision(root), created: created(root)? })
    }
}

/// Where it is built: all of it should leave no trace.
struct Place {
    /// The workspace, in which it is built: in `target/image/build`.
    root: PathBuf,
    cargo_home: PathBuf,
}

impl Place {
    /// Builds the binary, and writes the image into `output`.
    fn make(&self, output: &Path, source: &Source) -> Result<Written> {
        let path = self.binary()?;
        let binary = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // Also where a symbolic link leads: a path that rustc got from getcwd() is not remapped.
        let places = self.remapped().into_iter().map(|(place, _)| place).chain([self.cargo_home.clone()]);
        let traces = places.flat_map(|place| [place.canonicalize().ok(), Some(place)]).flatten();
        for trace in traces.filter_map(|place| place.to_str().map(str::to_owned)) {
            if binary.windows(trace.len()).any(|window| window == trace.as_bytes()) {
                bail!("{} names {trace}, a path of this machine", path.display());
            }
        }
        let (revision, created) = (source.revision.as_deref(), source.created);
        let contents = Contents { binary: &binary, version: env!("CARGO_PKG_VERSION"), revision, created };
        let image = vxmon_image::write(&output.join("oci"), &contents)?;
        vxmon_image::archive(&output.join("oci"), &output.join("vxmon.tar"), created)?;
        Ok(image)
    }

    /// What paths become in the binary.
    fn remapped(&self) -> [(PathBuf, &'static str); 2] {
        [(self.cargo_home.join("registry/src"), "/cargo"), (self.root.clone(), "/vxmon")]
    }

    /// The release binary without paths of this machine.
    fn binary(&self) -> Result<PathBuf> {
        fixed_addresses();
        let flags = self.remapped().map(|(from, to)| {
            // A JSON string is a TOML one as well.
            serde_json::to_string(&format!("--remap-path-prefix={}={to}", from.display()))
        });
        let flags = flags.into_iter().collect::<Result<Vec<_>, _>>()?.join(",");
        // Joined to the flags of .cargo/config.toml, which the variable RUSTFLAGS would replace.
        let flags = format!("target.'cfg(target_os = \"linux\")'.rustflags=[{flags}]");
        let mut command = cargo::command()?;
        command.current_dir(&self.root).env("CARGO_HOME", &self.cargo_home);
        command.env("VXMON_TRIM_PATHS", "1").env_remove("RUSTFLAGS");
        command.args(["build", "--release", "--package=vxmon", "--bin=vxmon", "--config", &flags, "--target-dir"]);
        let path = cargo::executable(command.arg(self.root.join("target/image/build")))?;
        cargo::check(&path)?;
        Ok(path)
    }
}

fn verify(first: &Place, image: &Path, source: &Source) -> Result<()> {
    let revision = source.revision.as_deref();
    ensure!(revision.is_some_and(|revision| !revision.ends_with("-dirty")), "--verify needs a commit without changes");
    let elsewhere = env::temp_dir().canonicalize()?.join(format!("vxmon-image-{}", std::process::id()));
    let _clean = Removed(elsewhere.clone());
    let second = Place { root: elsewhere.join("a/longer/path/source"), cargo_home: elsewhere.join("cargo") };
    println!("once more, in {}", elsewhere.display());
    fs::create_dir_all(&second.cargo_home)?;
    proc::run(Command::new("git").args(["clone", "--quiet", "--shared"]).args([&first.root, &second.root]))?;
    // Whatever has been committed meanwhile.
    proc::run(
        Command::new("git").arg("-C").arg(&second.root).args(["checkout", "--quiet", "--detach"]).args(revision),
    )?;
    // What is downloaded and what it is built with are the same; where they are is not. Sources are unpacked once more: rustc
    // takes its working directory for what it is, not for the symbolic link that leads there.
    fs::create_dir_all(second.root.join("target"))?;
    symlink(first.root.join("target/tools"), second.root.join("target/tools"))?;
    fs::create_dir_all(second.cargo_home.join("registry"))?;
    for shared in ["registry/cache", "registry/index", "config.toml"] {
        let from = first.cargo_home.join(shared);
        if from.exists() {
            symlink(from, second.cargo_home.join(shared))?;
        }
    }
    let again = elsewhere.join("image");
    second.make(&again, source)?;
    for file in ["oci/index.json", "vxmon.tar"] {
        let same = fs::read(image.join(file))? == fs::read(again.join(file))?;
        ensure!(same, "{file} differs: the image is not reproducible");
    }
    println!("the same bytes");
    Ok(())
}

/// Removes a directory when dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Has programs that are started from now on loaded at the same addresses each time. LLVM puts types that are declared only into
/// BTF in the order of their addresses (`BTFDebug`, llvm/lib/Target/BPF/BTFDebug.cpp): of eight links of the same bitcode, one
/// object came out in four forms, with fixed addresses in one in each directory. Not where seccomp forbids it, as in some containers.
fn fixed_addresses() {
    const QUERY: libc::c_ulong = 0xffff_ffff;
    // SAFETY: neither call touches memory; this process stays as it is, since addresses are chosen by execve().
    let set = unsafe {
        let current = libc::personality(QUERY);
        libc::personality(libc::c_ulong::from((current | libc::ADDR_NO_RANDOMIZE).cast_unsigned()))
    };
    if set < 0 {
        println!(
            "addresses stay random (personality(2) is refused), so eBPF objects may differ in the order of their types"
        );
    }
}

/// cargo's home, as the working directory of a process in it reads.
fn cargo_home() -> Result<PathBuf> {
    let home = match env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?).join(".cargo"),
    };
    home.canonicalize().with_context(|| format!("no cargo home {}", home.display()))
}

/// The commit, marked if the files are not those of the commit.
fn revision(root: &Path) -> Option<String> {
    let git = |args: &[&str]| proc::output(Command::new("git").arg("-C").arg(root).args(args));
    let commit = git(&["rev-parse", "HEAD"])?;
    Some(if git(&["status", "--porcelain"])?.is_empty() { commit } else { format!("{commit}-dirty") })
}

/// Time of the image's files: `SOURCE_DATE_EPOCH`, else that of the commit, else 0.
fn created(root: &Path) -> Result<u64> {
    if let Ok(text) = env::var("SOURCE_DATE_EPOCH") {
        return text.parse().with_context(|| format!("SOURCE_DATE_EPOCH is {text}, not seconds since 1970"));
    }
    let commit = proc::output(Command::new("git").arg("-C").arg(root).args(["log", "-1", "--format=%ct"]));
    Ok(commit.and_then(|text| text.parse().ok()).unwrap_or(0))
}
