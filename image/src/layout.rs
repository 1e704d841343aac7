//! The OCI image layout: `oci-layout`, `index.json`, and under `blobs/sha256` layer, configuration and manifest.
//!
//! Source: opencontainers/image-spec, version 1.1: image-layout.md, config.md, manifest.md, annotations.md.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    str::FromStr as _,
};

use jiff::Timestamp;
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder, SCHEMA_VERSION,
    Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::{Contents, Error, PROGRAM, RUN, archive::Archive};

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Digest of the manifest, by which the image is known: `sha256:…`.
    pub digest: String,
    /// Name and tag in the layout.
    pub name: String,
    /// Architecture as Go calls it: `amd64`, `arm64`.
    pub architecture: String,
}

/// Writes the layout into `directory`, replacing what was there.
///
/// # Errors
/// [`Error::Machine`] and [`Error::Time`] for contents of which no image can be made; [`Error::File`] for what cannot be
/// written.
pub fn write(directory: &Path, contents: &Contents<'_>) -> Result<Written, Error> {
    let layout = Layout::make(directory)?;
    let architecture = machine(contents.binary).ok_or(Error::Machine)?;
    let created = rfc3339(contents.created).ok_or(Error::Time(contents.created))?;
    let about = annotations(contents, &created);

    let layer = layer(contents).map_err(Error::Tar)?;
    let layer = layout.blob(MediaType::ImageLayer, &layer)?;
    let configuration = ImageConfigurationBuilder::default()
        .created(&*created)
        .architecture(architecture.clone())
        .os(Os::Linux)
        .config(
            ConfigBuilder::default()
                .user("0:0")
                .entrypoint([PROGRAM.to_owned()])
                .cmd(["attach".to_owned()])
                .env(["PATH=/usr/bin".to_owned()])
                .working_dir("/")
                .labels(about.clone())
                .build()?,
        )
        // Not compressed, so the layer's digest is that of its content as well.
        .rootfs(RootFsBuilder::default().typ("layers").diff_ids([layer.digest().to_string()]).build()?)
        .history([])
        .build()?;
    let configuration = layout.json_blob(MediaType::ImageConfig, &configuration)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(configuration)
        .layers([layer])
        .annotations(about)
        .build()?;
    let mut manifest = layout.json_blob(MediaType::ImageManifest, &manifest)?;

    let name = format!("vxmon:{}", contents.version);
    manifest.set_platform(Some(PlatformBuilder::default().architecture(architecture.clone()).os(Os::Linux).build()?));
    // The first names the image for containerd, the second for podman and skopeo.
    manifest.set_annotations(Some(HashMap::from([
        ("io.containerd.image.name".to_owned(), format!("localhost/{name}")),
        (oci_spec::image::ANNOTATION_REF_NAME.to_owned(), format!("localhost/{name}")),
    ])));
    let digest = manifest.digest().to_string();
    let index = ImageIndexBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageIndex)
        .manifests([manifest])
        .build()?;
    layout.file("index.json", &json(&index)?)?;
    layout.file("oci-layout", &json(&OciLayoutBuilder::default().image_layout_version("1.0.0").build()?)?)?;
    Ok(Written { digest, name: format!("localhost/{name}"), architecture: architecture.to_string() })
}

/// The one layer.
fn layer(contents: &Contents<'_>) -> std::io::Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new(), contents.created);
    for path in ["run", RUN, "usr", "usr/bin"] {
        archive.directory(path.trim_start_matches('/'))?;
    }
    archive.file(PROGRAM.trim_start_matches('/'), 0o755, contents.binary)?;
    archive.finish()
}

/// Keys of the specification's annotations.md; the same for manifest and configuration (labels).
fn annotations(contents: &Contents<'_>, created: &str) -> HashMap<String, String> {
    let mut about: HashMap<String, String> = [
        (oci_spec::image::ANNOTATION_TITLE, "vxmon"),
        (
            oci_spec::image::ANNOTATION_DESCRIPTION,
            "Finds VXLAN packets whose checksum the kernel got wrong, and says which connection and which NAT did it",
        ),
        (oci_spec::image::ANNOTATION_VERSION, contents.version),
        (oci_spec::image::ANNOTATION_CREATED, created),
        (oci_spec::image::ANNOTATION_LICENSES, "MIT OR GPL-2.0-only"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    if let Some(revision) = contents.revision {
        about.insert(oci_spec::image::ANNOTATION_REVISION.to_owned(), revision.to_owned());
    }
    about
}

/// The machine that an ELF file is for (`e_machine`, elf(5)).
fn machine(elf: &[u8]) -> Option<Arch> {
    const X86_64: [u8; 2] = 62_u16.to_le_bytes();
    const AARCH64: [u8; 2] = 183_u16.to_le_bytes();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    match [*elf.get(18)?, *elf.get(19)?] {
        X86_64 => Some(Arch::Amd64),
        AARCH64 => Some(Arch::ARM64),
        _ => None,
    }
}

/// Seconds since 1970 as RFC 3339 has it, in UTC.
fn rfc3339(seconds: u64) -> Option<String> {
    Timestamp::from_second(seconds.try_into().ok()?).ok().map(|time| time.to_string())
}

/// As bytes with the keys in order: the types keep annotations in hash maps, whose order is chance.
fn json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    fn sorted(value: serde_json::Value) -> serde_json::Value {
        match value {
            serde_json::Value::Object(map) => {
                let mut entries: Vec<_> = map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
                entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                serde_json::Value::Object(entries.into_iter().collect())
            }
            serde_json::Value::Array(items) => items.into_iter().map(sorted).collect(),
            other => other,
        }
    }
    Ok(serde_json::to_vec(&sorted(serde_json::to_value(value)?))?)
}

/// The directory that is being written.
struct Layout<'a> {
    directory: &'a Path,
    blobs: PathBuf,
}

impl<'a> Layout<'a> {
    fn make(directory: &'a Path) -> Result<Self, Error> {
        let blobs = directory.join("blobs/sha256");
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::File { path: directory.to_owned(), source: error });
            }
            _ => {}
        }
        fs::create_dir_all(&blobs).map_err(|source| Error::File { path: blobs.clone(), source })?;
        Ok(Self { directory, blobs })
    }

    fn file(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.directory.join(name);
        fs::write(&path, content).map_err(|source| Error::File { path, source })
    }

    fn json_blob(&self, kind: MediaType, value: &impl Serialize) -> Result<Descriptor, Error> {
        self.blob(kind, &json(value)?)
    }

    /// Stores content under its digest.
    fn blob(&self, kind: MediaType, content: &[u8]) -> Result<Descriptor, Error> {
        let digest: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.blobs.join(&digest);
        fs::write(&path, content).map_err(|source| Error::File { path, source })?;
        let size = content.len() as u64;
        Ok(DescriptorBuilder::default().media_type(kind).digest(Sha256Digest::from_str(&digest)?).size(size).build()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("vxmon-image-{name}-{}", std::process::id()))
    }

    /// A beginning of an ELF file, enough to tell its machine.
    fn elf(machine: u8) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(64, 0);
        bytes[18] = machine;
        bytes
    }

    #[test]
    fn the_same_contents_make_the_same_bytes() {
        let binary = elf(62);
        let contents = Contents { binary: &binary, version: "1.2.3", revision: Some("abc"), created: 1_700_000_000 };
        let (one, two, tar_one, tar_two) = (scratch("one"), scratch("two"), scratch("one.tar"), scratch("two.tar"));
        let first = write(&one, &contents).unwrap();
        // A second time over what is there, and elsewhere.
        fs::write(one.join("left over"), "x").unwrap();
        assert_eq!(write(&one, &contents).unwrap(), first);
        assert_eq!(write(&two, &contents).unwrap(), first);
        crate::archive(&one, &tar_one, contents.created).unwrap();
        crate::archive(&two, &tar_two, contents.created).unwrap();
        let (bytes, same) = (fs::read(&tar_one).unwrap(), fs::read(&tar_two).unwrap());
        assert!(bytes == same && bytes.len() > binary.len());

        // Each part counts.
        let other = elf(183);
        for changed in [
            Contents { binary: &other, ..contents },
            Contents { version: "1.2.4", ..contents },
            Contents { revision: None, ..contents },
            Contents { created: 1_700_000_001, ..contents },
        ] {
            assert_ne!(write(&two, &changed).unwrap().digest, first.digest, "{changed:?}");
        }
        for directory in [one, two] {
            fs::remove_dir_all(directory).unwrap();
        }
        for file in [tar_one, tar_two] {
            fs::remove_file(file).unwrap();
        }
    }

    #[test]
    fn machines_are_told_by_the_binary() {
        assert_eq!(machine(&elf(62)), Some(Arch::Amd64));
        assert_eq!(machine(&elf(183)), Some(Arch::ARM64));
        assert_eq!(machine(&elf(3)), None);
        assert_eq!(machine(&elf(62)[..18]), None);
        assert_eq!(machine(b"#!/bin/sh"), None);
    }

    #[test]
    fn times_are_calendar_times() {
        assert_eq!(rfc3339(1_795_581_629).as_deref(), Some("2026-11-25T04:40:29Z")); // date -u -d @1795581629 +%FT%TZ
        assert_eq!(rfc3339(0).as_deref(), Some("1970-01-01T00:00:00Z"));
        assert_eq!(rfc3339(253_402_300_800), None);
        assert_eq!(rfc3339(u64::MAX), None);
    }
}
