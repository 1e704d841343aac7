//! The container image: from scratch, one layer, one file in it.
//!
//! Writes the OCI image layout itself, as a directory and as a tar archive: no daemon, no registry and no base image. The
//! bytes depend on what is handed in and on nothing else: no clock, no file's owner or time, no order of a directory.
//! It never builds anything, and never looks at the machine.
//!
//! Layer, configuration and archive are not compressed: a compressor's next version would change the digest.

mod archive;
mod layout;

use std::{io, path::PathBuf};

pub use archive::archive;
pub use layout::{Written, write};

/// Where the program is in the image.
pub const PROGRAM: &str = "/usr/bin/vxmon";
/// The directory of the socket: in the image, so that it can be mounted over where the root is read-only.
pub const RUN: &str = "/run/vxmon";

/// What an image is made of.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The static binary.
    pub binary: &'a [u8],
    /// Its version.
    pub version: &'a str,
    /// The commit it was built from, if that is known.
    pub revision: Option<&'a str>,
    /// Time of all files and of the image, in seconds since 1970 (`SOURCE_DATE_EPOCH`).
    pub created: u64,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary is for a machine that has no name here.
    #[error("not a 64-bit little-endian ELF file for x86-64 or AArch64, so there is no image for it")]
    Machine,
    /// The time is outside of what calendars show.
    #[error("{0} s since 1970 is no time that an image can have; see SOURCE_DATE_EPOCH")]
    Time(u64),
    /// A part of the image is not as the specification has it.
    #[error("cannot describe the image: {0}")]
    Spec(#[from] oci_spec::OciSpecError),
    /// A part of the image cannot be written as JSON.
    #[error("cannot describe the image: {0}")]
    Json(#[from] serde_json::Error),
    /// A tar archive cannot be made.
    #[error("cannot write a tar archive: {0}")]
    Tar(io::Error),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
