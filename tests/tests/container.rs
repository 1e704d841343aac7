//! The image runs from scratch, with the documented capabilities and no more, and says which one is missing.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vxmon_tests::{
    Family, Lab, LabOptions, Rules,
    container::{CAPABILITIES, Container},
    lab::Side,
    skip, traffic,
};

const LIMIT: Duration = Duration::from_secs(10);
const A_MOMENT: Duration = Duration::from_millis(150);
const JSON: [&str; 3] = ["attach", "--format", "json"];
/// As numbers of include/uapi/linux/capability.h.
const NET_ADMIN: u64 = 1 << 12;

fn lab() -> Result<Lab> {
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    Ok(lab)
}

fn runnable(test: &str) -> bool {
    let found = std::process::Command::new("runc").arg("--version").output().is_ok();
    if !found {
        skip::skip(test, "there is no runc: `cargo xtask setup` installs it");
    }
    found && skip::root_or_skip(test)
}

/// Makes the fault show once.
fn ask(lab: &Lab) -> Result<()> {
    let asked = traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT);
    ensure!(asked.is_err(), "the service answered: there is no fault to see");
    lab.flush_conntrack()
}

#[test]
fn sees_the_fault_with_the_documented_capabilities() -> Result<()> {
    if !runnable("sees_the_fault_with_the_documented_capabilities") {
        return Ok(());
    }
    let lab = lab()?;
    let _server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let container = Container::new(&lab.a, &CAPABILITIES, &JSON)?;
    let vxmon = container.start()?;
    ensure!(vxmon.wait_type("attached", 2, LIMIT).len() == 2, "not attached: {}", vxmon.stderr());
    ask(&lab)?;
    let events = vxmon.wait_events(1, LIMIT);
    ensure!(events.len() == 1 && events[0]["cause"]["proved"] == true, "{events:#?}, {}", vxmon.stderr());
    ensure!(events[0]["node"] == "worker-in-a-box", "{events:#?}");

    // Of the three, only one is left by now, and it is enough for a device made anew. Threads that only write have none.
    let pid = container.pid()?.to_string();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        let status = fs::read_to_string(task.path().join("status"))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let bits = |name: &str| field(name).and_then(|value| u64::from_str_radix(value, 16).ok());
        for bits in [bits("CapEff:"), bits("CapPrm:")] {
            let is_main = task.file_name() == *pid;
            ensure!(bits == Some(NET_ADMIN) || !is_main && bits == Some(0), "{status}");
        }
        ensure!(field("NoNewPrivs:") == Some("1"), "{status}");
    }
    lab.delete_vxlan(Side::A)?;
    lab.create_vxlan(Side::A)?;
    ensure!(vxmon.wait_type("attached", 3, LIMIT).len() >= 3, "not attached again: {}", vxmon.stderr());
    ask(&lab)?;
    ensure!(vxmon.wait_events(2, LIMIT).len() == 2, "{}", vxmon.stderr());
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    ensure!(finished.total("verdicts/nat-stale-port") == 2, "{}", finished.summary);
    Ok(())
}

/// Kernels before 5.8 know neither CAP_BPF nor CAP_PERFMON.
#[test]
fn sees_the_fault_with_the_capabilities_of_old_kernels() -> Result<()> {
    if !runnable("sees_the_fault_with_the_capabilities_of_old_kernels") {
        return Ok(());
    }
    let lab = lab()?;
    let _server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let container = Container::new(&lab.a, &["SYS_ADMIN", "NET_ADMIN"], &JSON)?;
    let vxmon = container.start()?;
    ensure!(vxmon.wait_type("attached", 2, LIMIT).len() == 2, "not attached: {}", vxmon.stderr());
    ask(&lab)?;
    ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "{}", vxmon.stderr());
    vxmon.stop()?.adds_up()
}

#[test]
fn names_each_missing_capability() -> Result<()> {
    if !runnable("names_each_missing_capability") {
        return Ok(());
    }
    let lab = lab()?;
    for missing in CAPABILITIES {
        let others: Vec<&str> = CAPABILITIES.into_iter().filter(|name| *name != missing).collect();
        let finished = Container::new(&lab.a, &others, &JSON)?.start()?.wait(LIMIT)?;
        ensure!(finished.status.code() == Some(2), "{finished:#?}");
        ensure!(finished.stderr.lines().count() == 1, "{finished:#?}");
        ensure!(finished.stderr.contains(&format!("CAP_{missing} is missing")), "{finished:#?}");
    }
    Ok(())
}

/// As old container runtimes' default profiles do it, whatever the capabilities.
#[test]
fn names_a_seccomp_profile_that_forbids_bpf() -> Result<()> {
    if !runnable("names_a_seccomp_profile_that_forbids_bpf") {
        return Ok(());
    }
    let lab = lab()?;
    for errno in [1, 38] {
        let mut container = Container::new(&lab.a, &CAPABILITIES, &JSON)?;
        container.config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno }],
        });
        let finished = container.start()?.wait(LIMIT)?;
        ensure!(finished.status.code() == Some(2), "{finished:#?}");
        ensure!(finished.stderr.lines().count() == 1, "{finished:#?}");
        ensure!(finished.stderr.contains("seccomp profile forbids bpf(2)"), "{finished:#?}");
    }
    Ok(())
}

/// What needs no privilege needs none.
#[test]
fn says_its_version_without_any_capability() -> Result<()> {
    if !runnable("says_its_version_without_any_capability") {
        return Ok(());
    }
    let lab = lab()?;
    let finished = Container::new(&lab.a, &[], &["--version"])?.start()?.wait(LIMIT)?;
    ensure!(finished.status.code() == Some(0), "{finished:#?}");
    let line = finished.stdout.first().context("no version")?;
    ensure!(line.starts_with("vxmon "), "{line}");
    Ok(())
}
