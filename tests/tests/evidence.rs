//! Evidence other than a rule: what is said of a packet's NAT if its conntrack entry is not there, cannot be had, or is not the
//! packet's any more; and that nothing is said where there is nothing to be said yet.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Family, Lab, LabOptions, Rules, Vxmon, cmd, skip,
    traffic::{self, Frame, OuterSum, RawSender},
};

const JSON: [&str; 3] = ["--format", "json", "--no-nat-probe"];
const LIMIT: Duration = Duration::from_secs(10);
/// Long enough for the first SYN, shorter than its retry.
const A_MOMENT: Duration = Duration::from_millis(120);

fn lab() -> Result<Lab> {
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    Ok(lab)
}

/// The first anomaly of what `send` sends.
fn anomaly(lab: &Lab, args: &[&str], send: impl FnOnce() -> Result<()>) -> Result<Value> {
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], args].concat())?;
    send()?;
    let event = vxmon.wait_events(1, LIMIT).first().cloned().context("no anomaly")?;
    vxmon.stop()?.adds_up()?;
    Ok(event)
}

/// Opens a connection whose SYN is masqueraded.
fn connect(lab: &Lab) -> Result<()> {
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "connected at once");
    Ok(())
}

/// Puts a frame on the uplink, past conntrack.
fn inject(lab: &Lab) -> Result<()> {
    let frame = Frame { sum: OuterSum::Value(0x1234), ..lab.frame() };
    RawSender::open(&lab.a, &lab.options().uplink)?.send(&frame.bytes())?;
    Ok(())
}

#[test]
fn an_entry_that_cannot_be_had_leaves_it_unknown() -> Result<()> {
    if !skip::root_or_skip("an_entry_that_cannot_be_had_leaves_it_unknown") {
        return Ok(());
    }
    let lab = lab()?;
    let event = anomaly(&lab, &["--no-btf", "--conntrack", "skb"], || connect(&lab))?;
    let (nat, why) = (&event["nat"], &event["missing"]["ct"]);
    ensure!(event["ct"].is_null() && why.is_string(), "{event:#}");
    ensure!(nat["random_fully"] == "unknown" && nat["reason"] == *why && nat["rule"].is_null(), "{event:#}");
    ensure!(event["missing"]["nat"].is_null(), "{event:#}");
    Ok(())
}

/// That a packet has no entry is certain only if the packet says so: one that is not listed may have been there.
#[test]
fn no_entry_is_not_the_same_as_none_listed() -> Result<()> {
    if !skip::root_or_skip("no_entry_is_not_the_same_as_none_listed") {
        return Ok(());
    }
    let lab = lab()?;
    let by_skb = !vxmon_tests::vxmon::by_packet_socket();
    for (args, level) in [(&[][..], if by_skb { "no" } else { "unknown" }), (&["--conntrack", "netlink"], "unknown")] {
        let event = anomaly(&lab, args, || inject(&lab))?;
        ensure!(event["verdict"] == "bad-outer" && event["ct"].is_null(), "{event:#}");
        ensure!(event["missing"]["ct"].is_string(), "{event:#}");
        ensure!(event["nat"]["random_fully"] == level, "{args:?}: {event:#}");
        ensure!(event["nat"]["reason"].is_string() == (level == "unknown"), "{args:?}: {event:#}");
    }
    Ok(())
}

/// Rewritten once more, after NAT, by what conntrack does not know of: the entry is not that of the packet which left.
#[test]
fn a_packet_that_was_changed_after_nat_is_not_explained_by_its_entry() -> Result<()> {
    if !skip::root_or_skip("a_packet_that_was_changed_after_nat_is_not_explained_by_its_entry") {
        return Ok(());
    }
    if vxmon_tests::vxmon::by_packet_socket() {
        skip::skip("a_packet_that_was_changed_after_nat_is_not_explained_by_its_entry", "needs the packet's own entry");
        return Ok(());
    }
    let lab = lab()?;
    let late = "table ip late { chain post { type filter hook postrouting priority 300; \
                oifname \"uplink\" udp dport 8472 udp sport set 4444; }; }\n";
    cmd::run_with_input(lab.a.command("nft").args(["-f", "-"]), late)?;
    let event = anomaly(&lab, &[], || connect(&lab))?;
    ensure!(event["outer"]["sport"] == 4444 && event["ct"]["status"].is_array(), "{event:#}");
    let nat = &event["nat"];
    ensure!(nat["random_fully"] == "unknown" && nat["reason"].is_string() && nat["rule"].is_null(), "{event:#}");
    Ok(())
}

#[test]
fn a_frame_that_is_not_encapsulated_yet_has_no_nat() -> Result<()> {
    if !skip::root_or_skip("a_frame_that_is_not_encapsulated_yet_has_no_nat") {
        return Ok(());
    }
    let lab = lab()?;
    let mut frame = Frame::inner_udp(b"wrong");
    if let Some(check) = frame.get_mut(14 + 20 + 6) {
        *check ^= 0x55;
    }
    let event = anomaly(&lab, &[], || RawSender::open(&lab.a, &lab.options().vxlan)?.send(&frame).map(drop))?;
    ensure!(event["verdict"] == "bad-inner" && event["role"] == "vxlan", "{event:#}");
    for section in ["ct", "nat"] {
        ensure!(event[section].is_null() && event["missing"][section].is_string(), "{section}: {event:#}");
    }
    Ok(())
}
