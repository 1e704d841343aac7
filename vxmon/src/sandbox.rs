//! What the daemon gives up once its programs are loaded and its files are open, before it attaches to anything: so
//! whatever still works afterwards works with what is left.
//!
//! Works on the calling thread, from which later ones inherit: to be called before any is started. Never gives up what it
//! was told to keep, and never asks for anything.
//!
//! | | how | where it cannot be had |
//! |---|---|---|
//! | capabilities | `capset(2)`; effective and permitted to what is kept, inheritable and ambient to none | an error |
//! | bounding set | `PR_CAPBSET_DROP` | stays; needs CAP_SETPCAP, which a container that drops all does not have |
//! | no new privileges | `PR_SET_NO_NEW_PRIVS` | an error |
//! | nothing written, executed, connected to or signalled | Landlock (Linux 5.13, each part from some version on) | stays |

use std::{fmt, path::Path};

use caps::{CapSet, CapsHashSet, errors::CapsError};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    RulesetError, RulesetStatus, Scope,
};
use nix::{errno::Errno, sys::prctl};

pub use caps::Capability;

/// The newest Landlock that was tried; the kernel's own may be older.
const LANDLOCK: ABI = ABI::V7;

/// What cannot be given up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel keeps capabilities as they are.
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] CapsError),
    /// The kernel does not know no_new_privs, or refuses it.
    #[error("cannot set no_new_privs: {}", .0.desc())]
    NoNewPrivileges(Errno),
}

/// What was given up, for the log.
#[derive(Debug)]
pub struct Report {
    kept: Vec<String>,
    bounding_left: usize,
    /// What the kernel made of it, or why it did not.
    landlock: Result<RulesetStatus, String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = if self.kept.is_empty() { "none".to_owned() } else { self.kept.join(" ") };
        write!(f, "sandbox: capabilities {kept}; bounding set ")?;
        match self.bounding_left {
            0 => f.write_str("empty")?,
            left => write!(f, "of {left} (no CAP_SETPCAP to empty it)")?,
        }
        f.write_str("; no new privileges; Landlock ")?;
        match &self.landlock {
            Ok(RulesetStatus::FullyEnforced) => f.write_str("enforced"),
            Ok(RulesetStatus::PartiallyEnforced) => f.write_str("enforced as far as this kernel has it"),
            Ok(RulesetStatus::NotEnforced) => f.write_str("missing in this kernel"),
            Err(error) => write!(f, "refused: {error}"),
        }
    }
}

/// Gives up everything but `keep`, as far as this process has it. Of the file system, files may still be removed in
/// `sockets`, the directory of a socket that goes when the daemon does; what is open stays open.
///
/// # Errors
/// [`SandboxError`] where the kernel refuses what every supported one can do. What only some can do is in the [`Report`].
pub fn enter(keep: &[Capability], sockets: Option<&Path>) -> Result<Report, SandboxError> {
    let bounding_left = empty_bounding_set()?;
    caps::clear(None, CapSet::Inheritable)?;
    let kept = keep_only(keep)?;
    prctl::set_no_new_privs().map_err(SandboxError::NoNewPrivileges)?;
    let landlock = restrict(sockets);
    let mut kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
    kept.sort();
    Ok(Report { kept, bounding_left, landlock })
}

/// Gives up every capability of the calling thread but `keep`, as far as it has them; what it has left.
///
/// # Errors
/// [`SandboxError::Capabilities`] if the kernel refuses.
pub fn keep_only(keep: &[Capability]) -> Result<CapsHashSet, SandboxError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = keep.iter().copied().filter(|capability| permitted.contains(capability)).collect();
    caps::set(None, CapSet::Effective, &kept)?;
    // The ambient set goes with it: it is never more than both permitted and inheritable.
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(kept)
}

/// For a thread that only handles what is open already: gives up what the thread that started it still has.
pub fn keep_nothing(thread: &str) {
    if let Err(error) = keep_only(&[]) {
        log::warn!("the thread {thread}: {error}");
    }
}

/// Whether this process has a capability.
pub fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// How many capabilities are left in it.
fn empty_bounding_set() -> Result<usize, SandboxError> {
    let bounding = caps::read(None, CapSet::Bounding)?;
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in &bounding {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    Ok(caps::read(None, CapSet::Bounding)?.len())
}

/// Landlock: no file of any other place is opened for writing, made or removed, no program is run, no TCP connection is
/// made or waited for, and no process or abstract socket outside is spoken to.
fn restrict(sockets: Option<&Path>) -> Result<RulesetStatus, String> {
    let build = || -> Result<RulesetStatus, RulesetError> {
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_write(LANDLOCK) | AccessFs::Execute)?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?;
        // One that cannot be opened is not a directory in which anything could be made.
        let here = |path: &Path| if path.as_os_str().is_empty() { ".".into() } else { path.to_owned() };
        if let Some(directory) = sockets.and_then(|path| PathFd::new(here(path)).ok()) {
            ruleset = ruleset.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?;
        }
        Ok(ruleset.restrict_self()?.ruleset)
    };
    build().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind, os::unix::net::UnixListener, process::Command, thread};

    use super::*;

    /// Runs it on a thread of its own, since what is given up is given up for good.
    fn inside<T: Send>(sockets: Option<&Path>, work: impl FnOnce(Report) -> T + Send) -> T {
        thread::scope(|scope| {
            scope.spawn(|| work(enter(&[Capability::CAP_NET_ADMIN], sockets).unwrap())).join().unwrap()
        })
    }

    fn status(field: &str) -> u64 {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        u64::from_str_radix(value.trim(), 16).unwrap()
    }

    #[test]
    fn keeps_what_it_was_told_to_and_nothing_else() {
        let (had, bound) = (status("CapPrm:"), status("CapBnd:"));
        let can_empty = status("CapEff:") & 1 << 8 != 0; // CAP_SETPCAP
        inside(None, |report| {
            let kept = had & 1 << 12; // CAP_NET_ADMIN
            assert_eq!(
                [status("CapEff:"), status("CapPrm:"), status("CapInh:"), status("CapAmb:")],
                [kept, kept, 0, 0]
            );
            assert_eq!(status("CapBnd:"), if can_empty { 0 } else { bound });
            assert_eq!(status("NoNewPrivs:"), 1);
            let text = report.to_string();
            assert!(
                text.contains(if kept == 0 { "capabilities none" } else { "capabilities CAP_NET_ADMIN;" }),
                "{text}"
            );
            // What is given up does not come back.
            assert!(caps::raise(None, CapSet::Effective, Capability::CAP_BPF).is_err());
        });
        assert_eq!(status("CapPrm:"), had, "another thread lost something");
    }

    #[test]
    fn writes_nowhere_but_where_it_may() {
        let base = std::env::temp_dir().join(format!("vxmon-sandbox-{}", std::process::id()));
        let sockets = base.join("sockets");
        fs::create_dir_all(&sockets).unwrap();
        fs::write(base.join("file"), "text").unwrap();
        let _listener = UnixListener::bind(sockets.join("vxmon.sock")).unwrap();
        let open = fs::File::create(base.join("open")).unwrap();
        let enforced = inside(Some(&sockets), |report| {
            if !matches!(report.landlock, Ok(RulesetStatus::FullyEnforced)) {
                return false;
            }
            let denied = |result: std::io::Result<()>| result.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied);
            assert!(denied(fs::write(base.join("file"), "changed")));
            assert!(denied(fs::write(sockets.join("file"), "new")));
            assert!(denied(fs::remove_file(base.join("file"))));
            assert!(denied(fs::create_dir(base.join("directory"))));
            assert!(denied(Command::new("/bin/true").status().map(drop)));
            assert!(denied(std::net::TcpListener::bind("127.0.0.1:0").map(drop)));
            assert!(denied(std::net::TcpStream::connect("127.0.0.1:9").map(drop)));
            assert!(nix::sys::signal::kill(nix::unistd::getppid(), None).is_err());
            assert_eq!(fs::read_to_string(base.join("file")).unwrap(), "text");
            std::io::Write::write_all(&mut &open, b"open before").unwrap();
            assert!(denied(UnixListener::bind(sockets.join("another.sock")).map(drop)));
            fs::remove_file(sockets.join("vxmon.sock")).unwrap();
            true
        });
        fs::remove_dir_all(&base).unwrap();
        if !enforced {
            println!("not tried: this kernel has no Landlock, or not all of it");
        }
    }

    #[test]
    fn a_missing_directory_is_no_error() {
        inside(Some(Path::new("/no/such/directory")), |report| {
            assert!(report.landlock.is_ok(), "{report}");
        });
    }
}
