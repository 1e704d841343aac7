//! A file, or a directory, for one test.

use std::{env, fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process};

use anyhow::{Context, Result};

/// A path that nobody else has, and nothing there yet; what is there in the end goes with this value.
#[derive(Debug)]
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// One whose file name ends so.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(env::temp_dir().join(format!("vxmon-{}-{name}", process::id())))
    }

    /// A file with these contents.
    pub fn of(name: &str, bytes: &[u8]) -> Result<Self> {
        let file = Self::new(name);
        fs::write(&file.0, bytes)?;
        Ok(file)
    }

    /// A directory that others may look into.
    pub fn directory(name: &str) -> Result<Self> {
        let directory = Self::new(name);
        fs::create_dir_all(&directory.0)?;
        fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o755))?;
        Ok(directory)
    }

    /// The path.
    pub fn text(&self) -> Result<&str> {
        self.0.to_str().context("not UTF-8")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = if self.0.is_dir() { fs::remove_dir_all(&self.0) } else { fs::remove_file(&self.0) };
    }
}
