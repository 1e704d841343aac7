//! Kernels are kept outside of the clone, so that the next one does not fetch and build them again: in `vxmon/kernels` of
//! `XDG_CACHE_HOME`, or of `~/.cache`.
//!
//! An entry's name says all that it was made of. It is made under another name and then renamed, so it is whole if it is there,
//! and never changes. Only one process makes it; others wait for that one.

use std::{
    env,
    fs::{self, File, TryLockError},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::proc;

const TICK: Duration = Duration::from_millis(200);

/// The directory of all entries.
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// Makes the directory if need be.
    pub fn open() -> Result<Self> {
        // As the XDG base directory specification has it: a relative path counts as none.
        let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Self::at(base.context("neither XDG_CACHE_HOME nor HOME says where kernels may be kept")?.join("vxmon/kernels"))
    }

    fn at(directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Where something of that name is, or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The entry, if it is there.
    pub fn find(&self, name: &str) -> Option<PathBuf> {
        self.path(name).canonicalize().ok()
    }

    /// The names of all that is there, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// The entry, made by `make` in an empty directory if it is not there.
    pub fn entry(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        if let Some(path) = self.find(name) {
            return Ok(path);
        }
        let _lock = self.lock(name)?;
        if let Some(path) = self.find(name) {
            return Ok(path);
        }
        let scratch = self.scratch(name)?;
        make(&scratch.0)?;
        let path = self.path(name);
        fs::rename(&scratch.0, &path)?;
        Ok(path)
    }

    /// Waits until no other process has `name`.
    pub fn lock(&self, name: &str) -> Result<File> {
        lock(&self.path(&format!("{name}.lock")))
    }

    /// An empty directory, to be used under the lock of `name`; what was left in it by a process that was killed is removed.
    pub fn scratch(&self, name: &str) -> Result<Scratch> {
        let path = self.path(&format!("{name}.new"));
        remove(&path)?;
        fs::create_dir(&path)?;
        Ok(Scratch(path))
    }

    /// Gives the entry `to` another name, in place of what had that name.
    pub fn link(&self, name: &str, to: &str) -> Result<()> {
        let new = self.path(&format!("{name}.link"));
        remove(&new)?;
        symlink(to, &new)?;
        Ok(fs::rename(&new, self.path(name))?)
    }
}

/// Waits until no other process has locked this file; it is locked until what is returned is dropped.
pub fn lock(path: &Path) -> Result<File> {
    // The file stays: whoever removed it might remove one that another process has just locked.
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut said = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error).context(path.display().to_string()),
            Err(TryLockError::WouldBlock) if proc::stop_signal().is_some() => bail!("interrupted"),
            Err(TryLockError::WouldBlock) => {}
        }
        if !said {
            eprintln!("vm: another process has {}: waiting for it", path.display());
            said = true;
        }
        thread::sleep(TICK);
    }
}

/// A directory that ends with this value, unless it was renamed.
pub struct Scratch(pub PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = remove(&self.0);
    }
}

/// Removes a file or a directory, if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        thread,
        time::Duration,
    };

    use super::Cache;

    fn cache(name: &str) -> Cache {
        let path = std::env::temp_dir().join(format!("vxmon-cache-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Cache::at(path).unwrap()
    }

    #[test]
    fn an_entry_is_whole_or_not_there() {
        let cache = cache("whole");
        let fails = cache.entry("one", |path| {
            fs::write(path.join("half"), "")?;
            anyhow::bail!("the network is gone")
        });
        assert!(fails.is_err());
        assert_eq!(cache.find("one"), None);
        // As if killed in the middle.
        fs::create_dir(cache.path("one.new")).unwrap();
        fs::write(cache.path("one.new/half"), "").unwrap();
        let path = cache.entry("one", |path| Ok(fs::write(path.join("all"), "")?)).unwrap();
        assert!(path.join("all").exists() && !path.join("half").exists());
        assert_eq!(cache.entry("one", |_| panic!("made twice")).unwrap(), path);
        cache.link("newest", "one").unwrap();
        cache.entry("two", |_| Ok(())).unwrap();
        cache.link("newest", "two").unwrap();
        assert_eq!(cache.find("newest"), cache.find("two"));
        assert!(!cache.path("one.new").exists() && !cache.path("two.new").exists());
        fs::remove_dir_all(cache.directory).unwrap();
    }

    #[test]
    fn only_one_makes_it() {
        let cache = Arc::new(cache("once"));
        let made = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (cache, made) = (Arc::clone(&cache), Arc::clone(&made));
                thread::spawn(move || {
                    cache.entry("one", |_| {
                        made.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(50));
                        Ok(())
                    })
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap().unwrap();
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
        fs::remove_dir_all(cache.path("")).unwrap();
    }
}
