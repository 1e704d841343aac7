//! What a test found out about the machine it runs on, for the table of kernels.

use std::{fmt::Display, fs::OpenOptions, io::Write};

use anyhow::{Context, Result};

/// Adds `name=value` to the file that `VXMON_FACTS` names, if it does.
pub fn write(name: &str, value: impl Display) -> Result<()> {
    let Some(path) = std::env::var_os("VXMON_FACTS") else { return Ok(()) };
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| writeln!(file, "{name}={value}"))
        .with_context(|| format!("cannot write {}", path.display()))
}
