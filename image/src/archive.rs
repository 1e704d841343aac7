//! Tar archives that depend on nothing but their entries: one owner, one time, one mode for each kind, ustar headers.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use tar::{Builder, EntryType, Header};

use crate::Error;

/// Adds entries to a tar archive.
pub(crate) struct Archive<W: Write> {
    builder: Builder<W>,
    time: u64,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(writer: W, time: u64) -> Self {
        Self { builder: Builder::new(writer), time }
    }

    /// A directory that everybody may look into. `path` is relative.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.append(EntryType::Directory, 0o755, &format!("{path}/"), &[])
    }

    /// A file of root's. `path` is relative.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.append(EntryType::Regular, mode, path, content)
    }

    fn append(&mut self, kind: EntryType, mode: u32, path: &str, content: &[u8]) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_path(path)?;
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(self.time);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.builder.append(&header, content)
    }

    pub(crate) fn finish(self) -> io::Result<W> {
        self.builder.into_inner()
    }
}

/// Packs an OCI layout, which is a directory, into the archive `to`: `podman load` and `ctr images import` take it.
///
/// # Errors
/// [`Error::File`] for a file that cannot be read or written; [`Error::Tar`].
pub fn archive(layout: &Path, to: &Path, time: u64) -> Result<(), Error> {
    let file = fs::File::create(to).map_err(|source| Error::File { path: to.to_owned(), source })?;
    let mut archive = Archive::new(io::BufWriter::new(file), time);
    let mut entries = Vec::new();
    list(layout, Path::new(""), &mut entries)?;
    entries.sort();
    for relative in entries {
        let path = layout.join(&relative);
        let name = relative.to_string_lossy();
        let added = if path.is_dir() {
            archive.directory(&name)
        } else {
            let content = fs::read(&path).map_err(|source| Error::File { path, source })?;
            archive.file(&name, 0o644, &content)
        };
        added.map_err(Error::Tar)?;
    }
    archive.finish().and_then(|mut writer| writer.flush()).map_err(Error::Tar)
}

fn list(root: &Path, below: &Path, entries: &mut Vec<PathBuf>) -> Result<(), Error> {
    let directory = root.join(below);
    let failed = |source| Error::File { path: directory.clone(), source };
    for entry in fs::read_dir(&directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let relative = below.join(entry.file_name());
        if entry.file_type().map_err(failed)?.is_dir() {
            list(root, &relative, entries)?;
        }
        entries.push(relative);
    }
    Ok(())
}
