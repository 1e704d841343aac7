//! `attach --pcap`: what tcpdump and `vxmon check` read in it is what was reported.

use std::{collections::BTreeSet, fs, process::Command, time::Duration};

use anyhow::{Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Family, LabOptions, Rules, Scratch, Vxmon, cmd, skip,
    traffic::{self, HttpServer},
    vxmon::binary,
};

const LIMIT: Duration = Duration::from_secs(10);
/// The first SYN is sent again after a second.
const BEFORE_RETRY: Duration = Duration::from_millis(600);

#[test]
fn the_capture_holds_what_was_reported() -> Result<()> {
    if !skip::root_or_skip("the_capture_holds_what_was_reported") {
        return Ok(());
    }
    for (underlay, engine) in [(Family::V4, "tc"), (Family::V6, "tc"), (Family::V4, "packet-socket")] {
        let lab = LabOptions { underlay, ..LabOptions::default() }.build()?;
        lab.rules(&Rules::default())?;
        let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        let file = Scratch::new("reported.pcapng");
        let args = ["--format", "json", "--engine", engine, "--pcap", file.text()?];
        let vxmon = Vxmon::attach(&lab.a, &args)?;
        for wanted in 1..=3 {
            ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), BEFORE_RETRY).is_err(), "connected");
            ensure!(vxmon.wait_events(wanted, LIMIT).len() == wanted, "{wanted} did not come");
        }
        let finished = vxmon.stop()?;
        finished.adds_up()?;
        let field = |event: &Value, path: &str| event.pointer(path).map(Value::to_string).unwrap_or_default();
        let told: BTreeSet<_> = finished
            .events
            .iter()
            .map(|event| (field(event, "/outer/sport"), field(event, "/csum/seen"), field(event, "/csum/expected")))
            .collect();
        ensure!(told.len() == 3, "{told:?}");

        // The sum inside may still be pending, so the right value of the outer one is not what tcpdump computes.
        let dump = cmd::run(Command::new("tcpdump").args(["-nvvr", file.text()?]))?;
        for (sport, seen, _) in &told {
            let digits = seen.trim_matches('"').trim_start_matches("0x").trim_start_matches('0');
            let words = format!("[bad udp cksum 0x{digits:0>4} -> ");
            ensure!(dump.contains(&words) && dump.contains(&format!(".{sport} > ")), "{words} {sport}: {dump}");
        }
        ensure!(dump.matches("bad udp cksum").count() == 3, "{dump}");

        let check = Command::new(binary()?).args(["check", "--format", "json", file.text()?]).output()?;
        ensure!(check.status.code() == Some(1), "{check:?}");
        let checked: Vec<Value> =
            serde_json::Deserializer::from_slice(&check.stdout).into_iter().collect::<Result<_, _>>()?;
        let checked: BTreeSet<_> = checked
            .iter()
            .filter(|line| line["dev"].as_str().is_some_and(|dev| dev.ends_with(":uplink")))
            .map(|event| (field(event, "/outer/sport"), field(event, "/csum/seen"), field(event, "/csum/expected")))
            .collect();
        ensure!(checked == told, "check: {checked:?}, attach: {told:?}");

        let bytes = fs::read(&file.0)?;
        let comments = String::from_utf8_lossy(&bytes).matches("nat-stale-port").count();
        ensure!(comments == 3, "{comments} comments");
    }
    Ok(())
}

#[test]
fn a_capture_that_cannot_be_written_is_an_error() -> Result<()> {
    if !skip::root_or_skip("a_capture_that_cannot_be_written_is_an_error") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    for (path, part) in [("/dev/full", "No space left"), ("/not-there/file", "No such file")] {
        let finished = Vxmon::start(&lab.a, &["--pcap", path, "--duration", "5s"])?.wait(LIMIT)?;
        let said = finished.stderr.lines().last().unwrap_or_default();
        ensure!(finished.status.code() == Some(2) && said.contains(part), "{path}: {}: {said}", finished.status);
    }
    Ok(())
}
