//! NAT rules by the ten thousand: reading and asking them, and events that come meanwhile.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, ensure};
use vxmon::rules::{Device, Packet, Question, Snapshot, explain};
use vxmon_tests::{Backend, Family, Lab, LabOptions, Rules, Vxmon, cmd, lab::Side, traffic};

use crate::{
    daemon::time_of,
    table::{Limit, Table, max, median},
};

/// Services; each has five rules, or as much in maps and chains.
const SERVICES: usize = 2000;
const READS: usize = 5;
const STARTS: usize = 5;
const EVENTS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(5);

pub fn measure(table: &mut Table) -> Result<()> {
    table.section(&format!("NAT rules of kube-proxy, {} in each home", 5 * SERVICES));
    for (backend, name) in [
        (Backend::IptablesLegacy, "iptables-legacy"),
        (Backend::IptablesNft, "iptables-nft"),
        (Backend::Nftables, "nftables"),
    ] {
        let lab = LabOptions::default().build()?;
        let rules = Rules { backend, ..Rules::default() };
        lab.rules(&rules)?;
        rules.add_services(&lab.a, SERVICES)?;
        reading(table, &lab, name)?;
        let mut ready = Vec::new();
        for _ in 0..STARTS {
            let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
            ready.push(vxmon.ready_after.as_secs_f64() * 1e3);
            vxmon.stop()?;
        }
        table.line("  start until attached", median(&ready), "ms", "", Limit::AtMost(200.0));
        let other = "table ip churn { chain c { counter; }; }\ndelete table ip churn\n";
        events(table, &lab, "another table is made and removed", || {
            cmd::run_with_input(lab.a.command("nft").args(["-f", "-"]), other).map(drop)
        })?;
        events(table, &lab, "kube-proxy writes all of its rules", || rules.sync(&lab.a, SERVICES))?;
    }
    Ok(())
}

fn reading(table: &mut Table, lab: &Lab, name: &str) -> Result<()> {
    let (mut reads, mut asked, mut rules) = (Vec::new(), Vec::new(), 0);
    for _ in 0..READS {
        let begin = Instant::now();
        let snapshot = lab.a.enter(|| Ok(Snapshot::read()))?;
        reads.push(begin.elapsed().as_secs_f64() * 1e3);
        let chains = snapshot.ruleset.tables.iter().flat_map(|table| &table.chains);
        rules = chains.map(|chain| chain.rules.len()).sum();
        let begin = Instant::now();
        let finding = explain::explain(
            &snapshot,
            &Question { outer: &outer(), after: (Side::A.underlay(Family::V4), 7), inner: None, seen: None },
        );
        asked.push(begin.elapsed().as_secs_f64() * 1e3);
        ensure!(finding.rule.is_some() && finding.random_fully, "{finding:?}");
    }
    table.line(&format!("{name}: read, {rules} rules kept"), median(&reads), "ms", "", Limit::AtMost(1000.0));
    table.line("  the rule of a packet found", median(&asked), "ms", "", Limit::AtMost(10.0));
    Ok(())
}

/// An outer packet of the lab's with the mark.
fn outer() -> Packet {
    Packet {
        v6: false,
        src: Some(Side::A.underlay(Family::V4)),
        dst: Some(Side::B.underlay(Family::V4)),
        protocol: Some(17),
        sport: Some(40_000),
        dport: Some(8472),
        mark: Some(0x4000),
        out: Some(Device { name: "uplink".to_owned(), index: 2, below: false }),
    }
}

/// How long a bad packet takes to its line while the rules are changed, and therefore read, all the time.
fn events(table: &mut Table, lab: &Lab, what: &str, change: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    // The start has its own peak, which is not this one.
    thread::sleep(Duration::from_millis(300));
    vxmon.reset_peak()?;
    let ended = AtomicBool::new(false);
    let (times, named, changes) = thread::scope(|scope| -> Result<_> {
        let changer = scope.spawn(|| {
            let mut changes = 0_u32;
            while !ended.load(Ordering::Relaxed) {
                changes += u32::from(change().is_ok());
                thread::sleep(Duration::from_millis(20));
            }
            changes
        });
        let times = timed(lab, &vxmon);
        ended.store(true, Ordering::Relaxed);
        let changes = changer.join().unwrap_or(0);
        let (times, named) = times?;
        Ok((times, named, changes))
    })?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (resident, peak) = (vxmon.resident()?, vxmon.peak_resident()?);
    vxmon.stop()?;
    table.note(&format!("{what} meanwhile, {changes} times:"));
    table.line("  packet until its line is read", median(&times), "ms", "", Limit::AtMost(100.0));
    table.line("    the slowest", max(&times), "ms", "", Limit::AtMost(100.0));
    table.line("  rules named", f64::from(named), &format!("of {EVENTS}"), "", Limit::None);
    table.line("  resident memory", mib(resident), "MiB", "", Limit::AtMost(20.0));
    table.line("    at most", mib(peak), "MiB", "", Limit::AtMost(20.0));
    Ok(())
}

fn timed(lab: &Lab, vxmon: &Vxmon) -> Result<(Vec<f64>, u32)> {
    let (mut times, mut named) = (Vec::new(), 0);
    for number in 0..EVENTS {
        thread::sleep(Duration::from_millis(30 + 7 * (number as u64 % 5)));
        let _ = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_millis(1));
        let events = vxmon.wait_events(number + 1, PATIENCE);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        ensure!(events.len() > number, "event {number} did not come");
        times.push(1e3 * (now - time_of(&events[number])?));
        named += u32::from(events[number]["nat"]["random_fully"] == "rule");
    }
    Ok((times, named))
}
