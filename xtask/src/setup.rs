//! Makes the machine able to build and test. Installs only what is missing; what it installs it names first.
//!
//! The eBPF program needs a toolchain that has core's source, and bpf-linker. The usual source of the former is a nightly
//! with the component rust-src. Debian's own packages are the other one: they also work where rustup cannot download.
//! Either way `target/tools` then holds the linker, and the name of the toolchain, for `vxmon/build.rs`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use crate::{cargo, proc};

/// What a task needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// To compile everything, the eBPF program included.
    Build,
    /// To compile, and to run the lab and the tests.
    Everything,
    /// To compile, to run the lab, and what only tests call.
    Tests,
}

/// Programs that the lab and the tests call, and the Debian package of each.
const LAB_PROGRAMS: [(&str, &str); 16] = [
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("ethtool", "ethtool"),
    ("iptables", "iptables"),
    ("iptables-legacy", "iptables"),
    ("iptables-nft", "iptables"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("tcpdump", "tcpdump"),
    ("curl", "curl"),
    ("python3", "python3"),
    ("iperf3", "iperf3"),
    ("ipset", "ipset"),
    ("runc", "runc"),
    ("systemd-analyze", "systemd"),
];

/// Programs that only tests call.
const TEST_PROGRAMS: [(&str, &str); 2] = [("prometheus", "prometheus"), ("promtool", "prometheus")];

/// What `cargo xtask vm` calls, or a file that it needs, and the Debian package of each.
const VM_PROGRAMS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("/bin/busybox", "busybox-static"),
    ("modprobe", "kmod"),
    ("xz", "xz-utils"),
    ("ipvsadm", "ipvsadm"),
    ("setpriv", "util-linux"),
    ("dpkg-deb", "dpkg"),
];

/// What the kernel with fault A is built with, and of.
const KERNEL_PROGRAMS: [(&str, &str); 12] = [
    ("patch", "patch"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("pahole", "pahole"),
    ("xz", "xz-utils"),
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/include/openssl/ssl.h", "libssl-dev"),
    ("/usr/src/linux-source-6.1.tar.xz", "linux-source-6.1"),
];

/// The name under which rustup knows Debian's toolchain.
const LINKED_TOOLCHAIN: &str = "vxmon-ebpf";
const DEBIAN_TOOLCHAIN: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy"];

const LINKER_VERSION: &str = "0.13.0";
/// The LLVM that bpf-linker is built with. It reads the bitcode of rustcs with this LLVM or an older one.
const LLVM: u32 = 22;
const DEBIAN_LLVM: [&str; 2] = ["llvm-22-dev", "libpolly-22-dev"];

/// Package of the Python package index.
const SCHEMAS_VERSION: &str = "1.37.0";

/// `rustup component add` takes seconds, or has no network.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(90);

/// Checks what `scope` needs, and installs what is missing.
pub fn run(scope: Scope) -> Result<()> {
    let mut packages = Vec::new();
    packages.extend(missing_packages(scope));
    let tools = cargo::root()?.join("target/tools");
    let linker = tools.join("bin/bpf-linker");
    let linker_ready = proc::output(Command::new(&linker).arg("--version"))
        .is_some_and(|version| version == format!("bpf-linker {LINKER_VERSION}"));
    let llvm = env::var_os("LLVM_PREFIX").map_or_else(|| PathBuf::from(format!("/usr/lib/llvm-{LLVM}")), PathBuf::from);
    if !linker_ready && !llvm.join("include/llvm-c/Core.h").exists() {
        eprintln!("setup: LLVM {LLVM} is missing: bpf-linker is built with it");
        packages.extend(DEBIAN_LLVM);
    }
    let mut toolchain = find_toolchain(&tools)?;
    if toolchain.is_none() {
        eprintln!("setup: no toolchain has core's source: the eBPF program is built with it");
        toolchain = add_source_to_nightly(&tools)?;
    }
    let linked = toolchain.as_ref().is_none_or(|toolchain| toolchain.name == LINKED_TOOLCHAIN);
    if linked && (Toolchain::debian().is_none() || !Path::new("/usr/bin/cargo-clippy").exists()) {
        eprintln!("setup: Debian's Rust is missing, or its clippy: it builds and lints the eBPF program");
        packages.extend(DEBIAN_TOOLCHAIN);
    }
    if !packages.is_empty() {
        install(&packages)?;
        if !missing_packages(scope).is_empty() {
            bail!("the packages are installed, but programs are still missing");
        }
    }

    let toolchain = match toolchain {
        Some(toolchain) => toolchain,
        None => link_debian_toolchain()?,
    };
    record(&tools, &toolchain)?;
    eprintln!("setup: eBPF toolchain `{}` ({})", toolchain.name, toolchain.version);
    if !linker_ready {
        build_linker(&tools, &llvm)?;
    }
    eprintln!("setup: bpf-linker {LINKER_VERSION}");
    Ok(())
}

/// Installs what checks the Kubernetes manifests: the schemas of all versions, with a program that knows them. Without it
/// those tests are skipped.
pub fn schemas() -> Result<()> {
    let place = cargo::root()?.join("target/tools/kubernetes-validate");
    let ready = proc::output(Command::new(place.join("bin/kubernetes-validate")).arg("--version"))
        .is_some_and(|version| version.contains(SCHEMAS_VERSION));
    if ready {
        return Ok(());
    }
    eprintln!("setup: installing kubernetes-validate {SCHEMAS_VERSION} into target/tools");
    if proc::output(Command::new("python3").args(["-c", "import venv, ensurepip"])).is_none() {
        install(&["python3-venv"])?;
    }
    let package = format!("kubernetes-validate=={SCHEMAS_VERSION}");
    let made = proc::run(Command::new("python3").args(["-m", "venv"]).arg(&place)).and_then(|()| {
        let mut pip = Command::new(place.join("bin/pip"));
        proc::run_within(pip.args(["install", "--quiet", "--disable-pip-version-check", &package]), DOWNLOAD_LIMIT)
    });
    if let Err(error) = made {
        eprintln!("setup: {error:#}; the manifests are not checked");
        // Else the tests would take it for whole.
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    Ok(())
}

/// Installs what guests need: QEMU, and what is called to get and start them.
pub fn guests() -> Result<()> {
    require("the lab of kernels needs it", &VM_PROGRAMS)
}

/// Installs what a kernel is built with, and the source of the one that has fault A.
pub fn kernel_build() -> Result<()> {
    require("the kernel with fault A is built with it", &KERNEL_PROGRAMS)
}

fn require(why: &str, programs: &[(&'static str, &'static str)]) -> Result<()> {
    let packages = missing(why, programs);
    if packages.is_empty() {
        return Ok(());
    }
    install(&packages)?;
    let still = missing(why, programs);
    if !still.is_empty() {
        bail!("the packages are installed, but still missing is what these should have brought: {}", still.join(" "));
    }
    Ok(())
}

/// The packages of the programs that are missing.
fn missing_packages(scope: Scope) -> Vec<&'static str> {
    match scope {
        Scope::Build => Vec::new(),
        Scope::Everything => missing("the lab and the tests call it", &LAB_PROGRAMS),
        Scope::Tests => {
            let lab = missing("the lab and the tests call it", &LAB_PROGRAMS);
            [lab, missing("the tests of metrics call it", &TEST_PROGRAMS)].concat()
        }
    }
}

fn missing(why: &str, programs: &[(&'static str, &'static str)]) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for &(program, package) in programs {
        if find_program(program).is_none() {
            eprintln!("setup: {program} is missing: {why}");
            if !packages.contains(&package) {
                packages.push(package);
            }
        }
    }
    if packages.is_empty() {
        let names: Vec<&str> = programs.iter().map(|(program, _)| *program).collect();
        eprintln!("setup: {}", names.join(" "));
    }
    packages
}

/// `program` on PATH, or where only root's PATH leads.
fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// A toolchain that can build the eBPF program, as far as its files tell.
struct Toolchain {
    name: String,
    /// As rustc says it.
    version: String,
}

impl Toolchain {
    /// `None` if there is no such toolchain, or none that will do; says why in the latter case.
    fn new(name: &str, sysroot: &Path) -> Option<Self> {
        let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !source.exists() || !sysroot.join("bin/cargo").exists() {
            return None;
        }
        let version = proc::output(Command::new(sysroot.join("bin/rustc")).arg("-vV"))?;
        if let Err(reason) = suits(&version, env!("CARGO_PKG_RUST_VERSION")) {
            eprintln!("setup: toolchain `{name}` will not do: {reason}");
            return None;
        }
        Some(Self { name: name.to_owned(), version: version.lines().next().unwrap_or_default().to_owned() })
    }

    fn debian() -> Option<Self> {
        Self::new(LINKED_TOOLCHAIN, Path::new("/usr"))
    }
}

/// Whether a rustc whose `-vV` says `version` can build the eBPF program; if not, why.
fn suits(version: &str, at_least: &str) -> Result<(), String> {
    let field = |name| version.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("unknown");
    let numbers = |text: &str| text.split(['.', '-']).map_while(|part| part.parse().ok()).collect::<Vec<u32>>();
    let (release, llvm) = (field("release: "), field("LLVM version: "));
    if numbers(release) < numbers(at_least) {
        return Err(format!("it is Rust {release}, and {at_least} is the oldest that works"));
    }
    if numbers(llvm).first().is_none_or(|&major| major > LLVM) {
        return Err(format!("its LLVM is {llvm}, and bpf-linker's is {LLVM}"));
    }
    Ok(())
}

/// The toolchain that the user names, or the one of last time, or the first that will do.
fn find_toolchain(tools: &Path) -> Result<Option<Toolchain>> {
    let installed = installed_toolchains()?;
    let find = |name: &str| {
        let (name, sysroot) = installed.iter().find(|(full, _)| is_called(full, name))?;
        Toolchain::new(name, sysroot)
    };
    if let Ok(name) = env::var("VXMON_EBPF_TOOLCHAIN") {
        return match find(&name) {
            Some(toolchain) => Ok(Some(toolchain)),
            None => bail!("VXMON_EBPF_TOOLCHAIN is `{name}`, which has no rust-src or is not installed"),
        };
    }
    let last = fs::read_to_string(tools.join("ebpf-toolchain")).unwrap_or_default();
    Ok([last.trim(), "nightly", LINKED_TOOLCHAIN].into_iter().find_map(find))
}

/// Whether `name` means the toolchain of which rustup shows the name `full`, the host included.
fn is_called(full: &str, name: &str) -> bool {
    !name.is_empty()
        && full.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(is_host))
}

/// Tells `x86_64-unknown-linux-gnu` from the date of `nightly-2026-01-01-x86_64-unknown-linux-gnu`.
fn is_host(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
}

/// Name and path of every toolchain that rustup knows.
fn installed_toolchains() -> Result<Vec<(String, PathBuf)>> {
    let list = proc::output(Command::new("rustup").args(["toolchain", "list", "--verbose"]))
        .context("rustup does not run: it chooses the toolchain of the eBPF program (https://rustup.rs)")?;
    Ok(list
        .lines()
        .filter_map(|line| {
            // NAME [(active, default)] PATH
            let (name, path) = (line.split_whitespace().next()?, line.get(line.find('/')?..)?);
            Some((name.to_owned(), PathBuf::from(path)))
        })
        .collect())
}

/// Downloads core's source for an installed nightly. `None` if there is no nightly that will do, or no network.
fn add_source_to_nightly(tools: &Path) -> Result<Option<Toolchain>> {
    let Some((name, sysroot)) = installed_toolchains()?.into_iter().find(|(full, _)| is_called(full, "nightly")) else {
        return Ok(None);
    };
    let version = proc::output(Command::new(sysroot.join("bin/rustc")).arg("-vV")).unwrap_or_default();
    if let Err(reason) = suits(&version, env!("CARGO_PKG_RUST_VERSION")) {
        eprintln!("setup: toolchain `{name}` will not do: {reason}");
        return Ok(None);
    }
    eprintln!("setup: adding rust-src to `{name}`");
    let mut command = Command::new("rustup");
    command.args(["component", "add", "rust-src", "--toolchain", &name]).env("RUSTUP_MAX_RETRIES", "1");
    // What it has to say if it fails is long, and no reason to stop.
    command.stderr(std::process::Stdio::null());
    if let Err(error) = proc::run_within(&mut command, DOWNLOAD_LIMIT) {
        eprintln!("setup: no rust-src to be had for `{name}` ({error:#})");
        return Ok(None);
    }
    find_toolchain(tools)
}

/// Has rustup know the toolchain of Debian's packages, which lives in /usr.
fn link_debian_toolchain() -> Result<Toolchain> {
    let toolchain = Toolchain::debian().context("Debian's toolchain is installed, but will not do")?;
    proc::run(Command::new("rustup").args(["toolchain", "link", LINKED_TOOLCHAIN, "/usr"]))?;
    Ok(toolchain)
}

/// Notes the toolchain for `vxmon/build.rs`; leaves the file alone if it says so already, since cargo watches it.
fn record(tools: &Path, toolchain: &Toolchain) -> Result<()> {
    let (path, text) = (tools.join("ebpf-toolchain"), format!("{}\n", toolchain.name));
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::create_dir_all(tools)?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn build_linker(tools: &Path, llvm: &Path) -> Result<()> {
    eprintln!("setup: building bpf-linker {LINKER_VERSION} into target/tools: takes a minute");
    let mut command = cargo::command()?;
    command
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force", "--quiet"])
        .args(["--no-default-features", "--features", &format!("llvm-{LLVM}")])
        .arg("--root")
        .arg(tools)
        .env("LLVM_PREFIX", llvm)
        // The workspace asks for static binaries, but LLVM is a dynamic library.
        .env("CARGO_ENCODED_RUSTFLAGS", "")
        .env_remove("CARGO_TARGET_DIR");
    proc::run(&mut command)
}

/// Installs Debian packages.
fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if find_program("apt-get").is_none() {
        bail!(
            "this machine has no apt-get. Install what provides the same as Debian's packages {names}; in place of {} \
             a nightly toolchain with rust-src and an LLVM not newer than {LLVM} will do; if LLVM is not in \
             /usr/lib/llvm-{LLVM}, let LLVM_PREFIX say where",
            DEBIAN_TOOLCHAIN.join(" ")
        );
    }
    let apt = |arguments: &[&str]| {
        let mut command = if Uid::effective().is_root() { Command::new("env") } else { Command::new("sudo") };
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600"]);
        command.args(["-o", "Dpkg::Use-Pty=0"]).args(arguments);
        command
    };
    if !Uid::effective().is_root() && find_program("sudo").is_none() {
        bail!("not root, and there is no sudo. As root: apt-get install --no-install-recommends {names}");
    }
    eprintln!("setup: installing Debian packages: {names}");
    // A list of some source may fail to come while the others are enough.
    if let Err(error) = proc::run(&mut apt(&["update"])) {
        eprintln!("setup: {error:#}; going on with the package lists that are there");
    }
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages);
    proc::run(&mut apt(&arguments))
}

#[cfg(test)]
mod tests {
    use super::{is_called, suits};

    const NIGHTLY: &str = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4";

    #[test]
    fn a_rustc_suits_by_release_and_llvm() {
        assert_eq!(suits(NIGHTLY, "1.95"), Ok(()));
        assert!(suits(NIGHTLY, "1.98").is_err());
        assert!(suits("release: 1.63.0\nLLVM version: 14.0.6", "1.95").is_err());
        assert!(suits("release: 1.99.0\nLLVM version: 23.1.0", "1.95").is_err());
        assert!(suits("", "1.95").is_err());
    }

    #[test]
    fn a_channel_is_called_without_its_host() {
        assert!(is_called("nightly-x86_64-unknown-linux-gnu", "nightly"));
        assert!(is_called("vxmon-ebpf", "vxmon-ebpf"));
        assert!(is_called("nightly-2026-05-20-x86_64-unknown-linux-gnu", "nightly-2026-05-20"));
        assert!(!is_called("nightly-2026-05-20-x86_64-unknown-linux-gnu", "nightly"));
        assert!(!is_called("nightly-x86_64-unknown-linux-gnu", ""));
    }
}
