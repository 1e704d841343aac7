//! Another network namespace than the shell's.

use std::{fs::File, path::Path};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

/// Moves this thread, before any other is started, to another network namespace.
pub fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open the network namespace {}", path.display()))?;
    if let Err(errno) = setns(&file, CloneFlags::CLONE_NEWNET) {
        let way_out = match errno {
            Errno::EPERM => "it needs CAP_SYS_ADMIN",
            _ => "a network namespace? try /proc/PID/ns/net or /run/netns/NAME",
        };
        bail!("cannot enter {}: {} ({way_out})", path.display(), errno.desc());
    }
    Ok(())
}
