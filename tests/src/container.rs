//! vxmon in a container: the image as `cargo xtask image` packs it, unpacked, and run by runc in a node's network namespace.
//!
//! Never builds the program, and never asks a registry. The container is as the manifests in `deploy/kubernetes` want it:
//! root of the file system read-only, no new privileges, the capabilities that are named and no other.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vxmon_image::Contents;

use crate::{Netns, Vxmon, cleanup, cmd, vxmon};

/// What `attach` needs, as the manifests name it.
pub const CAPABILITIES: [&str; 3] = ["BPF", "NET_ADMIN", "PERFMON"];

/// An unpacked image, and what is to be changed about the container before it runs. Dropping it removes both.
#[derive(Debug)]
pub struct Container {
    id: String,
    directory: PathBuf,
    /// `config.json` of the OCI runtime specification.
    pub config: Value,
}

impl Container {
    /// A container in the network of `node`, with these capabilities.
    pub fn new(node: &Netns, capabilities: &[&str], args: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("vxmon-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut container = Self { directory: std::env::temp_dir().join(&id), id, config: Value::Null };
        let image = unpack(&container.directory)?;
        let words = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)).collect()
        };
        let mut command = words(&image["Entrypoint"]);
        command.extend(args.iter().map(|&arg| arg.to_owned()));
        let mut env = words(&image["Env"]);
        // So that it ends with the namespace, as programs do that the lab starts itself.
        env.push(format!("{}={}", cleanup::OWNER, std::process::id()));
        let capabilities: Vec<String> = capabilities.iter().map(|name| format!("CAP_{name}")).collect();
        container.config = json!({
            "ociVersion": "1.0.2",
            "hostname": "worker-in-a-box",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": command,
                "env": env,
                "cwd": image["WorkingDir"],
                "noNewPrivileges": true,
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            },
            "root": { "path": "rootfs", "readonly": true },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
                { "destination": "/run/vxmon", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "noexec"] },
            ],
            "linux": { "namespaces": [
                { "type": "mount" }, { "type": "pid" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "network", "path": node.path() },
            ] },
        });
        Ok(container)
    }

    /// Starts it and does not wait.
    pub fn start(&self) -> Result<Vxmon> {
        fs::write(self.directory.join("config.json"), serde_json::to_vec(&self.config)?)?;
        let mut command = self.runc();
        command.arg("run").arg("--bundle").arg(&self.directory).arg(&self.id);
        Vxmon::spawn(command)
    }

    /// Process id of the program inside, as seen from here.
    pub fn pid(&self) -> Result<u32> {
        let state: Value = serde_json::from_str(&cmd::run(self.runc().args(["state", &self.id]))?)?;
        let pid = state["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.filter(|&pid| pid != 0).with_context(|| format!("it does not run: {state}"))
    }

    /// Runs another program of the image in it, as `kubectl exec` does: without capabilities of its own here.
    #[must_use]
    pub fn exec(&self, words: &[&str]) -> Command {
        let mut command = self.runc();
        command.args(["exec", &self.id]).args(words);
        command
    }

    fn runc(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.directory.join("state"));
        command
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.runc().args(["delete", "--force", &self.id]).output();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Packs the program under test, unpacks the image into `directory/rootfs`, and returns the image's configuration.
fn unpack(directory: &Path) -> Result<Value> {
    let path = vxmon::binary()?;
    let binary = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let layout = directory.join("oci");
    let contents = Contents { binary: &binary, version: "0.0.0-test", revision: None, created: 0 };
    let written = vxmon_image::write(&layout, &contents)?;
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    ensure!(index["manifests"][0]["digest"] == *written.digest, "{index}");
    let manifest = blob(&layout, &index["manifests"][0])?;
    let manifest: Value = serde_json::from_slice(&fs::read(manifest)?)?;
    let rootfs = directory.join("rootfs");
    fs::create_dir_all(&rootfs)?;
    for layer in manifest["layers"].as_array().context("no layers")? {
        cmd::run(Command::new("tar").arg("-xf").arg(blob(&layout, layer)?).arg("-C").arg(&rootfs))?;
    }
    let config: Value = serde_json::from_slice(&fs::read(blob(&layout, &manifest["config"])?)?)?;
    Ok(config["config"].clone())
}

/// Path of what a descriptor describes, once its digest and size have been found right.
fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest =
        descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:")).context("no digest")?;
    let path = layout.join("blobs/sha256").join(digest);
    let sum = cmd::run(Command::new("sha256sum").arg(&path))?;
    ensure!(sum.starts_with(digest), "the digest of {} is {sum}", path.display());
    ensure!(descriptor["size"] == fs::metadata(&path)?.len(), "the size of {}: {descriptor}", path.display());
    Ok(path)
}
