//! Calls of cargo, and what is checked about the binary that it builds.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    proc,
    setup::{self, Scope},
};

/// The largest that the binary may be, in bytes.
const SIZE_LIMIT: u64 = 10 << 20;

/// The directory of the workspace.
pub fn root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask is not in its workspace")
}

/// The cargo that started this program, to be run in the workspace.
pub fn command() -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()?);
    // `cargo run` sets these for xtask; to build scripts that watch them they would look like a change.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Sets the machine up, builds the release binary, checks it, and returns its path.
pub fn build(scope: Scope) -> Result<PathBuf> {
    setup::run(scope)?;
    let mut command = command()?;
    let built = executable(command.args(["build", "--release", "--package=vxmon", "--bin=vxmon"]))?;
    // cargo's own path names the target: see .cargo/config.toml.
    let path = built.ancestors().nth(3).context("cargo put the binary nowhere")?.join("release/vxmon");
    install(&built, &path).with_context(|| format!("cannot write {}", path.display()))?;
    check(&path)?;
    Ok(path)
}

/// Fails unless the binary is static and small enough; says how large it is.
pub fn check(path: &Path) -> Result<()> {
    let binary = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if asks_for_interpreter(&binary).with_context(|| path.display().to_string())? {
        bail!("{} is not static: it names a program interpreter", path.display());
    }
    let size = u64::try_from(binary.len())?;
    println!(
        "{}: static, {:.1} MiB of at most {} MiB",
        path.strip_prefix(root()?).unwrap_or(path).display(),
        size as f64 / f64::from(1 << 20),
        SIZE_LIMIT >> 20
    );
    if size > SIZE_LIMIT {
        bail!("{} is too large", path.display());
    }
    Ok(())
}

/// Builds the binary without optimisation, and returns its path.
pub fn build_dev(scope: Scope) -> Result<PathBuf> {
    setup::run(scope)?;
    executable(command()?.args(["build", "--package=vxmon", "--bin=vxmon"]))
}

/// Runs cargo, and returns the path of the executable that it says it built.
pub fn executable(command: &mut Command) -> Result<PathBuf> {
    command.args(["--locked", "--message-format=json-render-diagnostics"]);
    let mut found = None;
    let status = proc::run_lines(command, |line| {
        let message: Option<serde_json::Value> = serde_json::from_str(line).ok();
        if let Some(path) = message.as_ref().and_then(|message| message.get("executable")?.as_str()) {
            found = Some(PathBuf::from(path));
        }
    })?;
    proc::check(command, status)?;
    found.context("cargo built no executable")
}

/// Builds those integration tests of `package` in just the way [`crate::test`] does, and returns the path of each, by name.
pub fn test_binaries(package: &str, names: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = command()?;
    // Of the package alone, dependencies would have fewer features, and would be built a second time.
    command.args(["test", "--no-run", "--locked", "--workspace", "--exclude=vxmon-ebpf"]);
    command.arg("--message-format=json-render-diagnostics");
    for name in names {
        command.args(["--test", name]);
    }
    let mut found = BTreeMap::new();
    let status = proc::run_lines(&mut command, |line| {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { return };
        let (target, path) = (&message["target"], message["executable"].as_str());
        // `path+file:///…/tests#vxmon-tests@0.1.0`
        let of_package = message["package_id"].as_str().is_some_and(|id| id.contains(&format!("#{package}@")));
        if let (Some(name), Some(path), true) =
            (target["name"].as_str(), path, of_package && target["kind"][0] == "test")
        {
            found.insert(name.to_owned(), PathBuf::from(path));
        }
    })?;
    proc::check(&command, status)?;
    Ok(found)
}

/// Copies a program to where an older version of it may be running.
fn install(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    fs::create_dir_all(to.parent().context("no directory")?)?;
    fs::copy(from, &new)?;
    Ok(fs::rename(&new, to)?)
}

/// Whether an ELF file (64 bits, little-endian) needs a dynamic loader: has a PT_INTERP segment, elf(5).
fn asks_for_interpreter(elf: &[u8]) -> Result<bool> {
    const PT_INTERP: u64 = 3;
    let number = |offset: usize, length: usize| {
        let bytes = elf.get(offset..offset.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |number, &byte| (number << 8) | u64::from(byte)))
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        bail!("not a little-endian ELF file of 64 bits");
    }
    let read = || {
        let (offset, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
        (0..count).map(|index| number(usize::try_from(offset + index * size).ok()?, 4)).collect::<Option<Vec<_>>>()
    };
    Ok(read().context("truncated program headers")?.contains(&PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::asks_for_interpreter;

    /// An ELF header and one program header of the given type.
    fn elf(segment: u8) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (bytes[0x20], bytes[0x36], bytes[0x38]) = (64, 56, 1);
        bytes[64] = segment;
        bytes
    }

    #[test]
    fn static_and_dynamic_are_told_apart() {
        assert!(asks_for_interpreter(&elf(3)).unwrap());
        assert!(!asks_for_interpreter(&elf(1)).unwrap());
        assert!(asks_for_interpreter(&elf(3)[..64]).is_err());
        assert!(asks_for_interpreter(b"#!/bin/sh").is_err());
    }
}
