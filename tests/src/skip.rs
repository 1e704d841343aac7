//! A test that cannot run here says so, and says why.

use std::{fs::OpenOptions, io::Write};

use anyhow::{Result, bail};
use nix::unistd::geteuid;

use crate::cleanup::note;

/// Prints `SKIP name: reason`, and adds that line to the file that `VXMON_SKIP_FILE` names.
pub fn skip(name: &str, reason: &str) {
    let line = format!("SKIP {name}: {reason}");
    note(&line);
    if let Some(path) = std::env::var_os("VXMON_SKIP_FILE") {
        let file = OpenOptions::new().create(true).append(true).open(&path);
        if let Err(error) = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())) {
            note(&format!("cannot write to {}: {error}", path.display()));
        }
    }
}

/// Fails, in one line, if the process is not root.
pub fn require_root() -> Result<()> {
    if !geteuid().is_root() {
        bail!("network namespaces need root: run this as root");
    }
    Ok(())
}

/// True if the process is root; else skips the test `name`.
#[must_use]
pub fn root_or_skip(name: &str) -> bool {
    let root = geteuid().is_root();
    if !root {
        skip(name, "not root");
    }
    root
}
