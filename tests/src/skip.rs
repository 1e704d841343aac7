//! A test that cannot run here says so, and says why.

use std::{fs::OpenOptions, io::Write, path::Path};

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

/// True if the process is root and the kernel has this parameter, named as in `net.core.txrehash`; else skips the test `name`.
#[must_use]
pub fn parameter_or_skip(name: &str, parameter: &str) -> bool {
    if !has_parameter(parameter) {
        skip(name, &format!("this kernel has no {parameter}"));
        return false;
    }
    root_or_skip(name)
}

/// Whether the kernel has this parameter.
#[must_use]
pub fn has_parameter(parameter: &str) -> bool {
    Path::new("/proc/sys").join(parameter.replace('.', "/")).exists()
}
