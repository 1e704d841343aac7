//! Ten thousand rules of kube-proxy in each home: the right one is named, and no anomaly is lost, comes twice or out of order
//! while they are read, and while they are written anew without pause. How long things take is the benchmark's business.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use vxmon::{
    netlink::{Protocol, Socket, nftables},
    rules::Snapshot,
};
use vxmon_tests::{
    Backend, Capture, Family, Lab, LabOptions, Netns, Rules, Vxmon, cmd, skip,
    traffic::{self, Frame, OuterSum, RawSender},
    vxmon::Finished,
};

/// Services; each has five rules, or as much in maps and chains.
const SERVICES: usize = 2000;
/// Connections; and how many at most, until enough has changed.
const EVENTS: usize = 12;
const MOST: usize = 400;
const LIMIT: Duration = Duration::from_secs(10);
/// Rules are what is tested here: what the kernel is seen to do is left out (`observed.rs`).
const JSON: [&str; 3] = ["--format", "json", "--no-nat-probe"];

fn lab(rules: &Rules) -> Result<Lab> {
    let lab = LabOptions::default().build()?;
    lab.rules(rules)?;
    rules.add_services(&lab.a, SERVICES)?;
    Ok(lab)
}

/// A lab that tcpdump and vxmon watch.
fn watched(rules: &Rules) -> Result<(Lab, Capture, Vxmon)> {
    let lab = lab(rules)?;
    let capture = Capture::vxlan(&lab)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    Ok((lab, capture, vxmon))
}

/// Opens a connection, whose SYN is bad, and does not wait for an answer.
fn connect(lab: &Lab) {
    let _ = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_millis(1));
}

/// The masquerading rule of kube-proxy, as it is rendered.
const fn rule(backend: Backend) -> &'static str {
    match backend {
        Backend::IptablesLegacy | Backend::IptablesNft => {
            "-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully"
        }
        Backend::Nftables => "meta mark & 0x00004000 != 0x00000000 masquerade fully-random",
    }
}

/// Does `work` while another thread makes changes, one after the other; `work` gets their number so far.
fn while_changing(change: impl Fn() -> Result<()> + Sync, work: impl FnOnce(&AtomicU32) -> Result<()>) -> Result<()> {
    let (ended, changes) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let changer = scope.spawn(|| -> Result<()> {
            while !ended.load(Ordering::Relaxed) {
                change()?;
                changes.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let worked = work(&changes);
        ended.store(true, Ordering::Relaxed);
        changer.join().map_err(|_| anyhow!("the thread that makes changes panicked"))??;
        worked
    })
}

/// Fails unless all bad packets on the wire were reported, each once, in their order.
fn all_are_told(capture: Capture, finished: &Finished) -> Result<()> {
    finished.adds_up()?;
    let captured = capture.stop()?;
    let sent = captured.iter().filter(|packet| packet.bad).map(|packet| format!("{}:{}", packet.src, packet.sport));
    let told = finished.events.iter().map(|event| format!("{}:{}", text(event, "src"), event["outer"]["sport"]));
    let (sent, told): (Vec<String>, Vec<String>) = (sent.collect(), told.collect());
    ensure!(sent.len() >= EVENTS && told == sent, "on the wire: {sent:?}; told: {told:?}");
    ensure!(finished.total("anomalies/suppressed") == 0, "{}", finished.summary);
    Ok(())
}

fn text<'event>(event: &'event Value, field: &str) -> &'event str {
    event["outer"][field].as_str().unwrap_or_default()
}

#[test]
fn the_right_one_is_named() -> Result<()> {
    if !skip::root_or_skip("the_right_one_is_named") {
        return Ok(());
    }
    for backend in Backend::ALL {
        let (lab, capture, vxmon) = watched(&Rules { backend, ..Rules::default() })?;
        // From the very start, while they are being read for the first time.
        let sender = RawSender::open(&lab.a, &lab.options().uplink)?;
        for sport in (20_000..).take(EVENTS / 2) {
            connect(&lab);
            // Of this one no rule can tell anything; still its line comes after that of the other.
            sender.send(&Frame { sport, sum: OuterSum::Value(0x1234), ..lab.frame() }.bytes())?;
        }
        ensure!(vxmon.wait_events(EVENTS, LIMIT).len() == EVENTS, "{backend:?}: {:#?}", vxmon.events());
        // And when they have been.
        let mut last = Value::Null;
        for count in EVENTS + 1..EVENTS + 20 {
            connect(&lab);
            last = vxmon.wait_events(count, LIMIT).last().cloned().unwrap_or_default();
            if last["nat"]["reason"].is_null() {
                break;
            }
            thread::sleep(Duration::from_millis(300));
        }
        let finished = vxmon.stop()?;
        all_are_told(capture, &finished)?;
        ensure!(last["nat"]["rule"] == rule(backend) && last["nat"]["random_fully"] == "rule", "{backend:?}: {last:#}");
        ensure!(last["nat"]["set_by"].as_array().is_some_and(|rules| rules.len() == 1), "{backend:?}: {last:#}");
    }
    Ok(())
}

/// Whoever writes all rules anew without pause: no other rule than the one that is in all of them is named, and all
/// anomalies come.
#[test]
fn rules_that_change_without_pause() -> Result<()> {
    if !skip::root_or_skip("rules_that_change_without_pause") {
        return Ok(());
    }
    for backend in Backend::ALL {
        let rules = Rules { backend, ..Rules::default() };
        let (lab, capture, vxmon) = watched(&rules)?;
        while_changing(
            || rules.sync(&lab.a, SERVICES),
            |changes| {
                let mut sent = 0;
                while (sent < EVENTS || changes.load(Ordering::Relaxed) < 3) && sent < MOST {
                    connect(&lab);
                    sent += 1;
                    thread::sleep(Duration::from_millis(150));
                }
                let events = vxmon.wait_events(sent, LIMIT).len();
                ensure!(events == sent, "{backend:?}: {events} events of {sent} connections");
                ensure!(changes.load(Ordering::Relaxed) > 1, "{backend:?}: nothing changed");
                Ok(())
            },
        )?;
        let finished = vxmon.stop()?;
        all_are_told(capture, &finished)?;
        for event in &finished.events {
            let nat = &event["nat"];
            let is_named = nat["rule"] == rule(backend) && nat["random_fully"] == "rule" && nat["reason"].is_null();
            let is_told_why =
                nat["rule"].is_null() && nat["random_fully"] == "port-rewritten" && nat["reason"].is_string();
            ensure!(is_named || is_told_why, "{backend:?}: {nat:#}");
        }
    }
    Ok(())
}

/// The rule is replaced by one with another comment, and then a packet leaves. The one before may be a candidate, if reading so
/// many rules takes long; it is never named.
#[test]
fn a_rule_that_is_gone_is_not_named() -> Result<()> {
    const ROUNDS: u32 = 20;
    if !skip::root_or_skip("a_rule_that_is_gone_is_not_named") {
        return Ok(());
    }
    let lab = lab(&Rules::default())?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    for round in 1..=ROUNDS {
        let comment = format!("round {round}");
        let rule =
            format!("-m comment --comment \"{comment}\" -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully");
        let text = format!("*nat\n-F KUBE-POSTROUTING\n-A KUBE-POSTROUTING {rule}\nCOMMIT\n");
        cmd::run_with_input(lab.a.command("iptables-nft-restore").arg("--noflush"), &text)?;
        connect(&lab);
        let events = vxmon.wait_events(round as usize, LIMIT);
        let nat = &events.last().context("no event")?["nat"];
        ensure!(events.len() == round as usize, "{} events in round {round}", events.len());
        let named = nat["rule"].as_str();
        ensure!(named.is_none_or(|named| named.contains(&rule)), "{comment}: {nat:#}");
        // Sooner or later, while they are being read.
        thread::sleep(Duration::from_millis(u64::from(round % 7) * 20));
    }
    vxmon.stop()?.adds_up()
}

/// Rules that set marks, in a table that is changed without pause at its beginning. A dump of them takes many datagrams, so
/// changes come in between; the kernel says so (`NLM_F_DUMP_INTR`), and where it goes on is not where it was.
#[test]
fn an_interrupted_dump_has_no_rule_twice() -> Result<()> {
    const CHAINS: usize = 20;
    const RULES: usize = 200;
    const INTERRUPTED: u32 = 3;
    if !skip::root_or_skip("an_interrupted_dump_has_no_rule_twice") {
        return Ok(());
    }
    let netns = Netns::create("rules")?;
    let nft = |text: &str| cmd::run_with_input(netns.command("nft").args(["-f", "-"]), text).map(drop);
    let (mut text, mut jumps) = ("table ip t {\nchain first { }\n".to_owned(), String::new());
    for chain in 0..CHAINS {
        write!(text, "chain c{chain} {{ ")?;
        for rule in 1..=RULES {
            write!(text, "meta mark set {rule}; ")?;
        }
        text += "}\n";
        write!(jumps, "jump c{chain}; ")?;
    }
    nft(&format!(
        "{text}chain out {{ type nat hook output priority -100; jump first; {jumps} }}\n\
         chain post {{ type nat hook postrouting priority 100; masquerade fully-random; }}\n}}\n"
    ))?;
    let change = || {
        nft(&"add rule ip t first counter\n".repeat(50))?;
        nft("flush chain ip t first\n")
    };
    while_changing(change, |_| {
        netns.enter(|| {
            let mut socket = Socket::open(Protocol::Netfilter)?;
            let (mut interrupted, mut most) = (0, 0);
            for _ in 0..50 * INTERRUPTED {
                interrupted += u32::from(!nftables::visit_rules(&mut socket, |_| ())?);
                let snapshot = Snapshot::read();
                ensure!(snapshot.ruleset.unread.is_empty(), "{:?}", snapshot.ruleset.unread);
                let table = snapshot.ruleset.tables.first().context("no table")?;
                let mut handles = BTreeSet::new();
                for chain in table.chains.iter().filter(|chain| chain.name.starts_with('c')) {
                    for (index, rule) in chain.rules.iter().enumerate() {
                        ensure!(handles.insert(rule.handle), "handle {:?} twice", rule.handle);
                        ensure!(rule.position as usize == index + 1, "handle {:?} at {}", rule.handle, rule.position);
                    }
                }
                most = most.max(handles.len());
                if interrupted >= INTERRUPTED && most > 0 {
                    return Ok(());
                }
            }
            Err(anyhow!("{interrupted} dumps were interrupted, {most} rules read at most"))
        })
    })
}
