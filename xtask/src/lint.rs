//! Format, clippy and documentation, with warnings as errors.
//!
//! Warnings are refused by clippy's own arguments: RUSTFLAGS would replace the flags in .cargo/config.toml.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{cargo, proc, setup};

/// Checks the whole workspace.
pub fn run() -> Result<()> {
    setup::run(setup::Scope::Build)?;
    proc::run(cargo::command()?.args(["fmt", "--all", "--check"])).context("`cargo fmt` puts it right")?;
    ebpf()?;
    let everything = ["--locked", "--workspace", "--exclude=vxmon-ebpf"];
    // With the eBPF objects, though their contents do not matter here: without them (`AYA_BUILD_SKIP`) the next test would
    // have vxmon built anew, and this again after it.
    let mut clippy = cargo::command()?;
    clippy.arg("clippy").args(everything);
    proc::run(clippy.args(["--all-targets", "--", "--deny=warnings"]))?;
    let mut doc = cargo::command()?;
    doc.env("RUSTDOCFLAGS", "--deny=warnings").arg("doc").args(everything);
    proc::run(doc.arg("--no-deps"))
}

/// Clippy on the eBPF program, for its own target: only there does aya-ebpf compile all of it.
fn ebpf() -> Result<()> {
    let root = cargo::root()?;
    let toolchain = fs::read_to_string(root.join("target/tools/ebpf-toolchain"))?;
    let toolchain = toolchain.trim();
    let cargo = || {
        let mut command = Command::new("rustup");
        command.args(["run", toolchain, "cargo"]).current_dir(root);
        command
    };
    if proc::output(cargo().args(["clippy", "--version"])).is_none() {
        bail!(
            "toolchain `{toolchain}` has no clippy: `rustup component add clippy --toolchain {toolchain}`, or Debian's rust-web-clippy"
        );
    }
    let architecture = std::env::consts::ARCH;
    let target = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
    let mut clippy = cargo();
    clippy
        .args(["clippy", "--locked", "--package=vxmon-ebpf", "--bins", "--target", target, "-Zbuild-std=core"])
        // Profile and directory of the real build (aya-build's), to share its procedural macros and build scripts.
        .args(["--release", "--target-dir"])
        .arg(root.join("target/ebpf/target/vxmon-ebpf"))
        .args(["--", "--deny=warnings"])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{architecture}\""));
    proc::run(&mut clippy)
}
