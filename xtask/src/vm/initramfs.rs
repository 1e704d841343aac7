//! The guest's first file system: busybox, `vm/init.sh`, and the modules without which the host's root cannot be mounted.
//! Written as an uncompressed cpio archive (newc: `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

const BUSYBOX: &str = "/bin/busybox";
const INIT: &str = include_str!("../../vm/init.sh");
/// What has to be there before the host's root is: the rest is loaded from there.
const WANTED: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// Builds the archive for a kernel with modules in `modules` (a directory named by the release in it), or without any.
pub fn build(modules: Option<&Path>) -> Result<Vec<u8>> {
    let busybox =
        fs::read(BUSYBOX).with_context(|| format!("{BUSYBOX} is missing (Debian's package busybox-static)"))?;
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "modules"] {
        archive.add(directory, 0o040_755, &[])?;
    }
    archive.add("bin/busybox", 0o100_755, &busybox)?;
    archive.add("init", 0o100_755, INIT.as_bytes())?;
    let mut order = String::new();
    if let Some(base) = modules {
        let release = fs::read_dir(base)?.flatten().next().context("no modules")?.path();
        for path in load_order(&release)? {
            let name = module_name(&path);
            archive.add(&format!("modules/{name}.ko"), 0o100_644, &uncompressed(&release.join(&path))?)?;
            writeln!(order, "{name}.ko")?;
        }
    }
    archive.add("modules/order", 0o100_644, order.as_bytes())?;
    archive.end()
}

/// The wanted modules and what they need, each after what it needs; paths within `release`.
fn load_order(release: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(release.join("modules.dep")).context("cannot read modules.dep")?;
    let needs: BTreeMap<&str, Vec<&str>> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (path, needs.split_whitespace().collect()))
        .collect();
    let built_in = fs::read_to_string(release.join("modules.builtin")).unwrap_or_default();
    let mut order: Vec<String> = Vec::new();
    for wanted in WANTED {
        let Some((path, needed)) = needs.iter().find(|(path, _)| module_name(path) == wanted) else {
            if built_in.lines().any(|path| module_name(path) == wanted) {
                continue;
            }
            bail!("the kernel has no module {wanted}");
        };
        // modules.dep names all that is needed, the last first.
        for path in needed.iter().rev().chain([path]) {
            if !order.iter().any(|have| have == path) {
                order.push((*path).to_owned());
            }
        }
    }
    debug_assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), order.len());
    Ok(order)
}

/// `kernel/fs/9p/9p.ko.xz` is `9p`.
fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file)
}

fn uncompressed(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output = Command::new(program).arg("-dc").arg(path).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("`{program} -dc {}` failed: {}", path.display(), output.status);
    }
    Ok(output.stdout)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.files += 1;
        let (size, name_size) = (u32::try_from(content.len())?, u32::try_from(name.len() + 1)?);
        // magic, inode, mode, uid, gid, links, mtime, size, device and rdev (major, minor each), name's size, checksum
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, process::Command};

    use super::{Archive, load_order, module_name};

    #[test]
    fn the_archive_is_one_that_cpio_reads() {
        let mut archive = Archive::default();
        archive.add("bin", 0o040_755, &[]).unwrap();
        archive.add("bin/tool", 0o100_755, b"12345").unwrap();
        let bytes = archive.end().unwrap();
        let Ok(mut child) = Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            return; // no busybox to ask
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "bin\nbin/tool\n");
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let directory = std::env::temp_dir().join(format!("vxmon-modules-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let dep = "a/9p.ko: a/9pnet.ko a/netfs.ko\na/9pnet.ko:\na/netfs.ko:\na/9pnet_virtio.ko.xz: a/9pnet.ko b/virtio.ko\n\
                   b/virtio.ko:\nc/overlay.ko:\n";
        fs::write(directory.join("modules.dep"), dep).unwrap();
        fs::write(directory.join("modules.builtin"), "kernel/virtio_pci.ko\n").unwrap();
        let order = load_order(&directory).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let names: Vec<&str> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["virtio", "9pnet", "9pnet_virtio", "netfs", "9p", "overlay"]);
    }
}
