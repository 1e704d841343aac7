//! `cargo xtask bench`: builds and starts the benchmarks of package `vxmon-tests`, and keeps what they print.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use crate::{cargo, proc, setup::Scope, vm};

/// Runs it.
pub fn run() -> Result<()> {
    let vxmon = cargo::build(Scope::Everything)?;
    let mut command = cargo::command()?;
    // As a test, since `cargo bench` would build everything once more, in a profile of its own.
    command.args(["test", "--release", "--locked", "--quiet", "--package=vxmon-tests", "--bench=cost"]);
    command.env("VXMON_BIN", &vxmon).env("VXMON_BENCH", "1");
    if !Uid::effective().is_root() {
        command.args(["--config", &sudo(&vxmon)?]);
    }
    println!();
    let mut text = String::new();
    let status = proc::run_lines(&mut command, |line| {
        println!("{line}");
        text += line;
        text.push('\n');
    })?;
    let path = vxmon.with_file_name("../bench.txt");
    let write = |text: &str| fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()));
    write(&text)?;
    // Of programs of whatever version the last runs in this clone had: `docs/kernels.md` of it names them.
    let verified = match vm::verified()? {
        none if none.is_empty() => "not counted in this clone: `cargo xtask vm --only verifier`\n".to_owned(),
        counts => counts,
    };
    let verified = format!(
        "\ninstructions verified of 1,000,000, by kernel, as `cargo xtask vm` last counted them in this clone\n{verified}"
    );
    print!("{verified}");
    text += &verified;
    write(&text)?;
    proc::check(&command, status).context("not everything could be measured")?;
    println!("written to target/bench.txt");
    Ok(())
}

/// Has cargo start the benchmarks by sudo: they need root, and the build does not.
fn sudo(vxmon: &Path) -> Result<String> {
    if proc::output(Command::new("sudo").arg("--version")).is_none() {
        bail!("not root, and there is no sudo: the benchmarks need one of them");
    }
    let words = [
        "sudo".to_owned(),
        "env".to_owned(),
        format!("PATH={}", env::var("PATH")?),
        format!("VXMON_BIN={}", vxmon.display()),
        "VXMON_BENCH=1".to_owned(),
    ];
    // A JSON array of strings is a TOML one as well.
    Ok(format!("target.'cfg(target_os = \"linux\")'.runner = {}", serde_json::to_string(&words)?))
}
