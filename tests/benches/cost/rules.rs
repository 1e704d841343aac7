//! NAT rules by the ten thousand: reading and asking them, and events that come meanwhile.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, ensure};
use vxmon::rules::{Device, Packet, Question, Snapshot, explain};
use vxmon_tests::{Backend, Family, Lab, LabOptions, Netns, Rules, Vxmon, cmd, lab::Side, traffic};

use crate::{
    daemon::time_of,
    table::{Limit, Table, max, median},
};

/// Services; each has five rules, or as much in maps and chains.
const SERVICES: usize = 2000;
const READS: usize = 5;
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
        lab.rules(&Rules { backend, ..Rules::default() })?;
        many(&lab.a, backend)?;
        reading(table, &lab, name)?;
        events(table, &lab)?;
    }
    Ok(())
}

/// As kube-proxy writes them for so many services of one endpoint each, where the lab's own rules are.
fn many(node: &Netns, backend: Backend) -> Result<()> {
    let mut text = String::new();
    let address = |net: u8, service: usize| format!("10.{net}.{}.{}", 100 + service / 250, 1 + service % 250);
    let each = (0..SERVICES).map(|number| (number, address(96, number), address(244, number)));
    if backend == Backend::Nftables {
        text += "table ip kube-proxy {\n";
        for (number, service, pod) in each {
            writeln!(
                text,
                "chain endpoint-{number} {{ ip saddr {pod} jump mark-for-masquerade; meta l4proto tcp dnat to {pod}:80; }}\n\
                 chain service-{number} {{ ip daddr {service} tcp dport 80 ip saddr != 10.244.0.0/16 jump mark-for-masquerade; \
                 numgen random mod 1 vmap {{ 0 : goto endpoint-{number} }}; }}"
            )?;
        }
        text += "}\n";
        return cmd::run_with_input(node.command("nft").args(["-f", "-"]), &text).map(drop);
    }
    text += "*nat\n";
    for (number, service, pod) in each {
        writeln!(
            text,
            ":KUBE-SVC-{number} - [0:0]\n:KUBE-SEP-{number} - [0:0]\n\
             -A KUBE-SERVICES -d {service}/32 -p tcp -m comment --comment \"default/service-{number} cluster IP\" -m tcp \
             --dport 80 -j KUBE-SVC-{number}\n\
             -A KUBE-SVC-{number} ! -s 10.244.0.0/16 -d {service}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{number} -m comment --comment \"default/service-{number}\" -j KUBE-SEP-{number}\n\
             -A KUBE-SEP-{number} -s {pod}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{number} -p tcp -m tcp -j DNAT --to-destination {pod}:80"
        )?;
    }
    text += "COMMIT\n";
    let program = if backend == Backend::IptablesLegacy { "iptables-legacy-restore" } else { "iptables-nft-restore" };
    cmd::run_with_input(node.command(program).args(["-w", "10", "--noflush"]), &text).map(drop)
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
fn events(table: &mut Table, lab: &Lab) -> Result<()> {
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    let ready = vxmon.ready_after.as_secs_f64() * 1e3;
    let ended = AtomicBool::new(false);
    let (times, named, changes) = thread::scope(|scope| -> Result<_> {
        let changer = scope.spawn(|| {
            let mut changes = 0_u32;
            while !ended.load(Ordering::Relaxed) {
                let text = "table ip churn { chain c { counter; }; }\ndelete table ip churn\n";
                if cmd::run_with_input(lab.a.command("nft").args(["-f", "-"]), text).is_ok() {
                    changes += 1;
                }
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
    let resident = vxmon.resident()? as f64 / f64::from(1 << 20);
    vxmon.stop()?;
    let baseline = format!("{changes} changes meanwhile");
    table.line("  packet until its line is read", median(&times), "ms", &baseline, Limit::AtMost(100.0));
    table.line("    the slowest", max(&times), "ms", &baseline, Limit::AtMost(100.0));
    table.note(&format!("{named} of {EVENTS} named their rule; the others came while the rules were being read"));
    table.line("  start until attached", ready, "ms", "", Limit::AtMost(200.0));
    table.line("  resident memory", resident, "MiB", "", Limit::AtMost(20.0));
    Ok(())
}

fn timed(lab: &Lab, vxmon: &Vxmon) -> Result<(Vec<f64>, usize)> {
    let (mut times, mut named) = (Vec::new(), 0);
    for number in 0..EVENTS {
        thread::sleep(Duration::from_millis(30 + 7 * (number as u64 % 5)));
        let _ = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_millis(1));
        let events = vxmon.wait_events(number + 1, PATIENCE);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        ensure!(events.len() > number, "event {number} did not come");
        times.push(1e3 * (now - time_of(&events[number])?));
        named += usize::from(events[number]["nat"]["random_fully"] == "rule");
    }
    Ok((times, named))
}
