//! What goes to standard error: more with `-v`, the kernel program's own lines among it, and what RUST_LOG says.

use std::{
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vxmon_tests::{
    LabOptions, skip,
    traffic::{self, OuterSum},
    vxmon,
};

const LIMIT: Duration = Duration::from_secs(20);
/// vxmon-ebpf/src/report.rs says so of each anomaly that it sends.
const LINE: &str = "anomaly 1 of its flow";

#[test]
fn the_kernel_programs_lines_come_with_v() -> Result<()> {
    if !skip::root_or_skip("the_kernel_programs_lines_come_with_v") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    for (args, rust_log, wanted) in [
        (&["-v"][..], None, true),
        (&[], None, false),
        (&[], Some("vxmon=debug,vxmon_ebpf=debug"), true),
        (&["-v"], Some("error"), false),
    ] {
        let log = std::env::temp_dir().join(format!("vxmon-log-{}", std::process::id()));
        let output = std::env::temp_dir().join(format!("vxmon-out-{}", std::process::id()));
        let mut command = lab.a.command(vxmon::binary()?);
        command.arg("attach").args(args).stdin(Stdio::null()).env_remove("RUST_LOG");
        command.envs(rust_log.map(|value| ("RUST_LOG", value)));
        let mut child = command.stdout(std::fs::File::create(&output)?).stderr(std::fs::File::create(&log)?).spawn()?;
        let wait = |file: &std::path::Path, part: &str| -> Result<()> {
            let start = Instant::now();
            while !std::fs::read_to_string(file)?.contains(part) {
                ensure!(start.elapsed() < LIMIT, "no {part:?}: {}", std::fs::read_to_string(file)?);
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        };
        wait(&log, "watching")?;
        let mut frame = lab.frame();
        frame.sum = OuterSum::Value(0x1234);
        traffic::send_raw(&lab.a, "uplink", &frame.bytes())?;
        wait(&output, "bad-outer")?;
        if wanted {
            wait(&log, LINE)?;
        }
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        child.wait()?;
        let said = std::fs::read_to_string(&log)?;
        std::fs::remove_file(&log)?;
        std::fs::remove_file(&output)?;
        ensure!(said.contains(LINE) == wanted, "{args:?} {rust_log:?}: {said}");
    }
    Ok(())
}
