//! Builds the eBPF objects that vxmon embeds, and tells the compiler which commit this is.
//!
//! Installs nothing: `cargo xtask setup` does, and leaves in `target/tools` the linker, and the name of the toolchain
//! that has core's source. With `AYA_BUILD_SKIP=1` the objects are empty, which is enough for clippy and documentation.

use std::{
    env, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use aya_build::{Package, Toolchain};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};
use sha2::{Digest as _, Sha256};

const OBJECTS: [&str; 5] = ["vxmon", "vxmon-legacy", "vxmon-nat", "vxmon-probe", "vxmon-test"];
/// Features of vxmon-ebpf, with each of which it is built: see its manifest.
const KINDS: [&str; 2] = ["modern", "legacy"];
/// For kernels that take an object's BTF and then refuse what it says of the programs' functions (E2BIG on 4.19).
const WITHOUT_BTF: &str = "vxmon-legacy";
/// Not in the daemon's binary.
const TEST_OBJECT: &str = "vxmon-test";
const SETUP: &str = "run `cargo xtask setup`";
/// Set to 1 by `cargo xtask image`: the objects then hold no path of this machine.
const TRIM: &str = "VXMON_TRIM_PATHS";

fn main() {
    // One line for people, instead of the report on a build script that failed.
    if let Err(error) = build() {
        println!("cargo::error={error:#}");
    }
}

fn build() -> Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("cargo did not set CARGO_MANIFEST_DIR")?)
        .parent()
        .context("this package is not in its workspace")?
        .to_owned();
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo did not set OUT_DIR")?);

    println!("cargo::rustc-env=VXMON_COMMIT={}", commit(&root).as_deref().unwrap_or("unknown"));
    for variable in ["AYA_BUILD_SKIP", "VXMON_EBPF_TOOLCHAIN", TRIM] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("AYA_BUILD_SKIP").is_some_and(|skip| skip == "1" || skip == "true") {
        for object in OBJECTS {
            fs::write(out.join(object), [])?;
        }
        println!("cargo::rustc-env=VXMON_EBPF_ID=none");
        return Ok(());
    }
    ebpf(&root, &out)?;
    println!("cargo::rustc-env=VXMON_EBPF_ID={}", object_id(&out)?);
    Ok(())
}

/// Identifies the objects that the daemon loads: the head of the SHA-256 of their names, sizes and contents.
fn object_id(out: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for object in OBJECTS.into_iter().filter(|object| *object != TEST_OBJECT) {
        let content = fs::read(out.join(object)).with_context(|| format!("cannot read the object {object}"))?;
        hash.update(format!("{object} {}\n", content.len()));
        hash.update(&content);
    }
    Ok(hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}

fn ebpf(root: &Path, out: &Path) -> Result<()> {
    // `vxmon-ebpf` itself is watched by aya-build.
    for path in ["Cargo.lock", "Cargo.toml", ".cargo/config.toml", "vxmon-common/Cargo.toml", "vxmon-common/src"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }

    let tools = root.join("target/tools");
    // .cargo/config.toml names the same path.
    let linker = tools.join("bin/bpf-linker");
    let record = tools.join("ebpf-toolchain");
    for path in [&linker, &record] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    if !linker.exists() {
        bail!("the eBPF program cannot be built, bpf-linker is missing: {SETUP}");
    }
    let toolchain = match env::var("VXMON_EBPF_TOOLCHAIN") {
        Ok(name) => name,
        Err(_) => match fs::read_to_string(&record) {
            Ok(name) => name.trim().to_owned(),
            Err(_) => bail!("the eBPF program cannot be built, no toolchain for it is known: {SETUP}"),
        },
    };
    let usable = Command::new("rustup").args(["run", &toolchain, "rustc", "--version"]).output();
    if !usable.is_ok_and(|output| output.status.success()) {
        bail!("the eBPF program cannot be built, toolchain `{toolchain}` does not run: {SETUP}");
    }

    let trim = env::var_os(TRIM).is_some_and(|trim| trim == "1");
    // Apart: each would otherwise be built again after the other.
    let shared = if trim { "target/ebpf-trimmed" } else { "target/ebpf" };
    share_target(&out.join("aya-build"), &root.join(shared))?;
    // SAFETY: this is the main thread, and no other has been started.
    unsafe {
        // `-Z build-std=core`, and aya-ebpf's `asm_experimental_arch`, on a compiler that is not a nightly.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build passes every line of the inner cargo on as a warning; progress is none.
        env::set_var("CARGO_TERM_QUIET", "true");
        if trim {
            env::set_var("CARGO_UNSTABLE_TRIM_PATHS", "true");
            env::set_var("CARGO_PROFILE_RELEASE_TRIM_PATHS", "all");
        }
    }
    let package = root.join("vxmon-ebpf");
    let root_dir = package.to_str().context("the path of the workspace is not UTF-8")?;
    let features = KINDS.map(|kind| [kind]);
    let packages = features.each_ref().map(|features| Package {
        name: "vxmon-ebpf",
        root_dir,
        no_default_features: true,
        features,
    });
    aya_build::build_ebpf(packages, Toolchain::Custom(&toolchain)).context("the eBPF program does not build")?;
    for object in OBJECTS {
        let path = out.join(object);
        if !path.exists() {
            bail!("vxmon-ebpf has no binary `{object}`");
        }
        slim(&path, object != WITHOUT_BTF).with_context(|| format!("cannot rewrite {}", path.display()))?;
    }
    Ok(())
}

/// Takes out debug information, of which the BTF was made and which no loader reads; and BTF itself where `btf` is false.
fn slim(path: &Path, btf: bool) -> Result<()> {
    let bytes = fs::read(path)?;
    let mut object = Builder::read(bytes.as_slice())?;
    for section in &mut object.sections {
        let name = section.name.strip_prefix(b".rel").unwrap_or(&section.name);
        section.delete = name.starts_with(b".debug_") || !btf && name.starts_with(b".BTF");
    }
    // LLVM keeps names of sections and symbols together, which the builder does not.
    let names = object.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    object.delete_orphans();
    let mut slim = Vec::new();
    object.write(&mut slim)?;
    Ok(fs::write(path, slim)?)
}

/// Has aya-build put its intermediate files into `shared`, so that all profiles and target directories build core and
/// the program once.
fn share_target(private: &Path, shared: &Path) -> Result<()> {
    if fs::read_link(private).is_ok_and(|target| target == shared) {
        return Ok(());
    }
    fs::create_dir_all(shared).with_context(|| format!("cannot create {}", shared.display()))?;
    match fs::remove_file(private) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => symlink(shared, private).with_context(|| format!("cannot create {}", private.display())),
    }
}

/// The commit that is checked out; has cargo run this again when another one is.
fn commit(root: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    // Without the check, a source tree unpacked inside another repository would take that one's commit.
    if Path::new(&git(&["rev-parse", "--show-toplevel"])?).canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "packed-refs"].into_iter().chain(branch.as_deref()) {
        let path = root.join(git(&["rev-parse", "--git-path", name])?);
        // To cargo a file that does not exist has always changed. A branch without one gets it with its next commit.
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        } else if let Some(directory) = path.parent().filter(|directory| name != "packed-refs" && directory.exists()) {
            println!("cargo::rerun-if-changed={}", directory.display());
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}
