//! README's sample, and its remedies, on the kernel itself.

use std::{process::Output, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use vxmon_tests::{
    Backend, Family, Lab, LabOptions, Netns, RuleForm, Rules, Vxmon, cmd, counters::udp_csum_errors, skip, traffic,
    vxmon::binary,
};

#[path = "../../vxmon/tests/support/mod.rs"]
mod support;

/// Time for a first SYN, and for an event to be written.
const A_MOMENT: Duration = Duration::from_millis(300);
/// The first SYN is sent again after a second.
const BEFORE_RETRY: Duration = Duration::from_millis(600);
/// And that one may be late.
const AFTER_RETRY: Duration = Duration::from_secs(5);

fn lab(rules: Rules) -> Result<Lab> {
    let lab = LabOptions::default().build()?;
    lab.rules(&rules)?;
    Ok(lab)
}

/// The line of README's shell blocks that begins with `start`, without its comment.
fn command(start: &str) -> Result<String> {
    let readme = support::read("README.md");
    let line = readme.lines().find(|line| line.starts_with(start)).with_context(|| format!("README has no {start}"))?;
    Ok(line.split("    #").next().unwrap_or(line).to_owned())
}

fn shell(node: &Netns, command: &str) -> Result<Output> {
    node.command("sh").args(["-c", command]).output().context("cannot run sh")
}

/// Asks the service once, and returns what vxmon wrote in `format`.
fn ask(lab: &Lab, format: &str) -> Result<Vec<String>> {
    let _server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let vxmon = Vxmon::attach(&lab.a, &["--format", format])?;
    // It connects at the first retry, which has another outer source port.
    let _ = traffic::http_get(&lab.a, lab.service_socket(Family::V4), AFTER_RETRY);
    // Time for the last event to be written.
    thread::sleep(A_MOMENT);
    Ok(vxmon.stop()?.stdout)
}

/// Lines of explanations joined: where they are broken depends on the length of numbers.
fn unwrapped<'text>(lines: impl Iterator<Item = &'text str>) -> Vec<String> {
    let mut joined: Vec<String> = Vec::new();
    for line in lines {
        match joined.last_mut() {
            Some(last) if line.starts_with("     ") => *last = format!("{last} {}", line.trim_start()),
            _ => joined.push(line.to_owned()),
        }
    }
    joined
}

/// A line with what differs from run to run taken out: times, checksums, ports that are chosen at random, counts.
fn shape(line: &str) -> String {
    let word = |word: &str| {
        let (bare, rest) = word.split_at(word.trim_end_matches([',', ';', ':']).len());
        let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || ".:".contains(c));
        match bare.rsplit_once(':') {
            Some((_, "8472" | "9153")) => word.to_owned(),
            Some((address, _)) if address.split('.').count() == 4 => format!("{address}:PORT{rest}"),
            Some(_) if digits(bare) => format!("TIME{rest}"),
            _ if bare.starts_with("0x") && bare != "0x4000" => format!("SUM{rest}"),
            _ if bare.contains('.') && digits(bare) => format!("SECONDS{rest}"),
            _ => word.to_owned(),
        }
    };
    let line = line.split(' ').map(word).collect::<Vec<_>>().join(" ");
    // A rule's handle counts the rules made before it.
    let mut parts = line.split("handle ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |line, rest| format!("{line}handle {}", rest.trim_start_matches(|c: char| c.is_ascii_digit())))
}

#[test]
fn the_sample_is_what_the_kernel_shows() -> Result<()> {
    if !skip::root_or_skip("the_sample_is_what_the_kernel_shows") {
        return Ok(());
    }
    let readme = support::read("README.md");
    let text = readme.split("```text\n").nth(1).and_then(|rest| rest.split("```").next()).context("no sample")?;
    let printed = ask(&lab(Rules::default())?, "text")?;
    let printed: Vec<String> = unwrapped(printed.iter().map(String::as_str)).iter().map(|line| shape(line)).collect();
    // All but the three lines of counts.
    let sample = unwrapped(text.lines().filter(|line| !line.contains(" checked")));
    let sample: Vec<String> = sample.iter().map(|line| shape(line)).collect();
    let printed: Vec<String> = printed.into_iter().filter(|line| !line.contains(" checked")).collect();
    ensure!(sample == printed, "README:\n{sample:#?}\nprinted:\n{printed:#?}");
    Ok(())
}

#[test]
fn lines_of_a_real_run_are_as_the_schema_says() -> Result<()> {
    if !skip::root_or_skip("lines_of_a_real_run_are_as_the_schema_says") {
        return Ok(());
    }
    let schema = support::Schema::of_docs();
    let lines = ask(&lab(Rules::default())?, "json")?;
    for line in &lines {
        let value = serde_json::from_str(line).with_context(|| line.clone())?;
        schema.check(&value).map_err(anyhow::Error::msg).with_context(|| line.clone())?;
    }
    let has = |kind: &str| lines.iter().any(|line| line.contains(&format!("\"type\":\"{kind}\"")));
    ensure!(has("attached") && has("anomaly") && has("recovered") && has("summary"), "{lines:#?}");
    Ok(())
}

#[test]
fn offload_off_stops_it() -> Result<()> {
    if !skip::root_or_skip("offload_off_stops_it") {
        return Ok(());
    }
    let lab = lab(Rules::default())?;
    let _server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "nothing to stop");
    lab.flush_conntrack()?;
    let before = udp_csum_errors(&lab.b, Family::V4)?;
    cmd::run(lab.a.command("sh").args(["-c", &command("ethtool -K flannel.1 ")?]))?;
    let look = "ethtool -k flannel.1 | grep tx-checksum-ip-generic";
    ensure!(support::read("README.md").contains(look), "README has no {look}");
    let looked = shell(&lab.a, look)?;
    ensure!(String::from_utf8_lossy(&looked.stdout).contains(": off"), "{looked:?}");
    traffic::http_get(&lab.a, lab.service_socket(Family::V4), BEFORE_RETRY)?;
    ensure!(udp_csum_errors(&lab.b, Family::V4)? == before, "packets were dropped");

    cmd::run(lab.a.command("ethtool").args(["-K", "flannel.1", "tx-checksum-ip-generic", "on"]))?;
    lab.flush_conntrack()?;
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "nothing to stop");
    lab.flush_conntrack()?;
    let vxmon = binary()?;
    for (start, said) in [("vxmon mitigate --dry-run", "would be turned off"), ("vxmon mitigate   ", "is off now")] {
        let command = command(start)?.replacen("vxmon", &vxmon.to_string_lossy(), 1);
        let said_it = cmd::run(lab.a.command("sh").args(["-c", &command]))?;
        ensure!(said_it.contains(said), "{command}: {said_it}");
    }
    traffic::http_get(&lab.a, lab.service_socket(Family::V4), BEFORE_RETRY)?;
    Ok(())
}

#[test]
fn an_old_rule_is_found_by_the_command() -> Result<()> {
    if !skip::root_or_skip("an_old_rule_is_found_by_the_command") {
        return Ok(());
    }
    let command = command("iptables-save ")?;
    for (backend, program) in
        [(Backend::IptablesLegacy, "iptables-legacy-save"), (Backend::IptablesNft, "iptables-nft-save")]
    {
        for (form, lines) in [(RuleForm::Before1179, 1), (RuleForm::OldBeforeFixed, 1), (RuleForm::Fixed, 0)] {
            for comments in [false, true] {
                let lab = lab(Rules { backend, form, comments, ..Rules::default() })?;
                let found = shell(&lab.a, &command.replacen("iptables-save", program, 1))?;
                let found = String::from_utf8(found.stdout)?;
                ensure!(found.lines().count() == lines, "{backend:?}, {form:?}: {found}");
            }
        }
    }
    Ok(())
}
