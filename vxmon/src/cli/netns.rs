//! Another network namespace than the shell's.

use std::{fs::File, path::Path};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

/// Moves this thread, before any other is started, to another network namespace.
pub fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open the network namespace {}", path.display()))?;
    if let Err(errno) = setns(&file, CloneFlags::CLONE_NEWNET) {
        bail!(
            "cannot enter {}: {} (a network namespace? try /proc/PID/ns/net or /run/netns/NAME)",
            path.display(),
            errno.desc()
        );
    }
    Ok(())
}
