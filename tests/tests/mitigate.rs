//! `vxmon mitigate`: the fault is gone by it and back by its `--revert`, it switches what it is asked for and nothing else, and
//! what it cannot do it says in one line.

use std::{
    process::{Command, Output},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use vxmon_tests::{
    Family, Lab, LabOptions, Netns, Rules, Vxmon, skip,
    traffic::{self, HttpServer},
    vxmon::binary,
};

const LIMIT: Duration = Duration::from_secs(10);
/// The first SYN is sent again after a second.
const BEFORE_RETRY: Duration = Duration::from_millis(600);
/// Long enough to see that an event which should not come does not.
const A_MOMENT: Duration = Duration::from_millis(300);
const WAS_ON: &str = "flannel.1: tx-checksum-ip-generic was on, is off now\n";

/// Runs it, and returns its exit code and what it wrote.
fn mitigate(mut command: Command, args: &[&str]) -> Result<(Option<i32>, String, String)> {
    let Output { status, stdout, stderr } = command.arg(binary()?).arg("mitigate").args(args).output()?;
    Ok((status.code(), String::from_utf8(stdout)?, String::from_utf8(stderr)?))
}

fn within(node: &Netns) -> Command {
    node.command("env")
}

/// Fails unless that came of it.
fn gives(node: &Netns, args: &[&str], wanted: &str) -> Result<()> {
    let (code, stdout, stderr) = mitigate(within(node), args)?;
    ensure!(code == Some(0) && stdout == wanted, "{args:?}: {code:?}\n{stdout}{stderr}");
    Ok(())
}

/// Fails unless it is refused in one line that has all of this in it.
fn is_refused(command: Command, args: &[&str], parts: &[&str]) -> Result<()> {
    let (code, stdout, stderr) = mitigate(command, args)?;
    let one_line = stderr.lines().count() == 1 && stderr.starts_with("vxmon: ");
    let all = parts.iter().all(|part| stderr.contains(part));
    ensure!(code == Some(2) && stdout.is_empty() && one_line && all, "{args:?}: {code:?}\n{stdout}{stderr}");
    Ok(())
}

/// As ethtool sees it.
fn offload(node: &Netns, device: &str) -> Result<bool> {
    let features = node.run("ethtool", &["-k", device])?;
    let line = features.lines().find_map(|line| line.strip_prefix("\ttx-checksum-ip-generic: "));
    Ok(line.with_context(|| features.clone())?.starts_with("on"))
}

#[test]
fn the_fault_goes_and_comes_back() -> Result<()> {
    if !skip::root_or_skip("the_fault_goes_and_comes_back") {
        return Ok(());
    }
    for underlay in [Family::V4, Family::V6] {
        let lab = LabOptions { underlay, ..LabOptions::default() }.build()?;
        lab.rules(&Rules::default())?;
        let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
        let ask = |lab: &Lab| traffic::http_get(&lab.a, lab.service_socket(Family::V4), BEFORE_RETRY);
        ensure!(ask(&lab).is_err() && vxmon.wait_events(1, LIMIT).len() == 1, "nothing to mitigate");

        let before = lab.a.run("ethtool", &["-k", "flannel.1"])?;
        gives(&lab.a, &[], WAS_ON)?;
        let after = lab.a.run("ethtool", &["-k", "flannel.1"])?;
        let changed: Vec<&str> =
            before.lines().zip(after.lines()).filter(|(old, new)| old != new).map(|(_, new)| new.trim()).collect();
        ensure!(changed.iter().all(|line| line.starts_with("tx-") || line.starts_with("tcp-seg")), "{changed:#?}");
        ensure!(changed.contains(&"tx-checksum-ip-generic: off"), "{changed:#?}");
        ensure!(!offload(&lab.a, "flannel.1")?, "it is on");
        let changes = vxmon.wait_type("offload", 1, LIMIT);
        ensure!(changes.iter().any(|change| change["state"] == "off" && change["why"] == "switched"), "{changes:?}");
        lab.flush_conntrack()?;
        ask(&lab).context("not mitigated")?;
        thread::sleep(A_MOMENT);
        ensure!(vxmon.events().len() == 1, "reported again");
        gives(&lab.a, &[], "flannel.1: tx-checksum-ip-generic is off already\n")?;

        gives(&lab.a, &["--revert"], "flannel.1: tx-checksum-ip-generic was off, is on now\n")?;
        ensure!(lab.a.run("ethtool", &["-k", "flannel.1"])? == before, "not all is as it was");
        lab.flush_conntrack()?;
        ensure!(ask(&lab).is_err() && vxmon.wait_events(2, LIMIT).len() == 2, "the fault did not come back");
        vxmon.stop()?.adds_up()?;
    }
    Ok(())
}

#[test]
fn only_what_is_asked_for_is_switched() -> Result<()> {
    if !skip::root_or_skip("only_what_is_asked_for_is_switched") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    lab.a.ip("link add vxlan.other type vxlan id 7 dstport 4789 local 192.0.2.1\n")?;
    let all = lab.a.run("ethtool", &["-k", "flannel.1"])?;
    let uplink = lab.a.run("ethtool", &["-k", "uplink"])?;

    gives(&lab.a, &["flannel.1", "--dry-run"], "flannel.1: tx-checksum-ip-generic is on, would be turned off\n")?;
    ensure!(lab.a.run("ethtool", &["-k", "flannel.1"])? == all, "--dry-run changed something");
    // Nothing is changed if one of them is wrong.
    is_refused(within(&lab.a), &["flannel.1", "eth7"], &["no device named eth7", "flannel.1, vxlan.other"])?;
    is_refused(within(&lab.a), &["flannel.1", "uplink"], &["uplink is no VXLAN device", "flannel.1, vxlan.other"])?;
    ensure!(lab.a.run("ethtool", &["-k", "flannel.1"])? == all, "changed, though refused");

    let path = lab.a.path();
    let netns = ["--netns", path.to_str().context("path")?];
    let (code, stdout, stderr) = mitigate(Command::new("env"), &["flannel.1", netns[0], netns[1]])?;
    ensure!(code == Some(0) && stdout == WAS_ON && stderr.contains("made anew"), "{code:?}\n{stdout}{stderr}");
    ensure!(offload(&lab.a, "vxlan.other")?, "the other device was switched");
    gives(
        &lab.a,
        &["--dry-run"],
        "flannel.1: tx-checksum-ip-generic is off already\nvxlan.other: tx-checksum-ip-generic is on, would be turned off\n",
    )?;
    ensure!(lab.a.run("ethtool", &["-k", "uplink"])? == uplink, "the uplink was switched");

    // Switched though its output cannot be written, both of them.
    let full = format!("{} mitigate flannel.1 vxlan.other --revert >/dev/full", binary()?.display());
    let output = lab.a.command("sh").args(["-c", &full]).output()?;
    ensure!(output.status.code() == Some(2) && String::from_utf8_lossy(&output.stderr).contains("No space left"));
    gives(&lab.a, &["vxlan.other"], &WAS_ON.replace("flannel.1", "vxlan.other"))?;
    ensure!(offload(&lab.a, "flannel.1")?, "it is off");

    // Others decide packet by packet what an external one does.
    lab.a.ip("link add cilium_vxlan type vxlan external dstport 8473\n")?;
    let (code, stdout, stderr) = mitigate(within(&lab.a), &[])?;
    ensure!(
        code == Some(0) && !stdout.contains("cilium") && stderr.contains("cilium_vxlan is left alone"),
        "{stdout}{stderr}"
    );
    gives(&lab.a, &["cilium_vxlan"], &WAS_ON.replace("flannel.1", "cilium_vxlan"))
}

#[test]
fn what_cannot_be_done_is_said() -> Result<()> {
    if !skip::root_or_skip("what_cannot_be_done_is_said") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let mut without = lab.a.command("setpriv");
    without.arg("--bounding-set=-net_admin").arg("env");
    is_refused(without, &[], &["CAP_NET_ADMIN", "flannel.1"])?;
    ensure!(offload(&lab.a, "flannel.1")?, "it is off");
    is_refused(within(&Netns::create("empty")?), &[], &["no VXLAN device", "--netns"])?;
    is_refused(within(&lab.a), &["--netns", "/run/netns/not-there"], &["/run/netns/not-there", "No such file"])
}
