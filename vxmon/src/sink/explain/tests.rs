//! Each case, from the event that it has to the advice that it gets, and what must not be in it.

use std::collections::BTreeMap;

use super::*;
use crate::event::{Cause, Csum, Ct, Endpoints, Flow, Inner, Packet};

const RELEASE: &str = "6.18.44";
const KUBE: &str = "-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully";

/// Fault B as README shows it, rules not read.
pub(crate) fn fault_b() -> Anomaly {
    let outer = |sport| Endpoints { src: "10.0.100.3".into(), sport, dst: "10.0.100.15".into(), dport: 8472 };
    Anomaly {
        ts: "2026-11-25T12:00:54.373945Z".into(),
        node: "worker-1".into(),
        dev: "eth0".into(),
        ifindex: 2,
        role: "uplink",
        verdict: "nat-stale-port",
        csum: Csum {
            seen: "0x76b9".into(),
            expected: Some("0x4212".into()),
            state: "partial",
            start: Some(84),
            gso_size: 0,
        },
        outer: Some(outer(49991)),
        vni: Some(1),
        vxlan_dev: Some("flannel.1".into()),
        inner: Some(Inner {
            proto: "tcp".into(),
            src: "10.244.0.0".into(),
            sport: Some(40018),
            dst: "10.244.2.73".into(),
            dport: Some(9153),
            flags: Some("S".into()),
            seq: Some(7),
        }),
        mark: Some("0x4000".into()),
        ct: Some(Ct {
            orig: outer(36512),
            reply: Endpoints { src: "10.0.100.15".into(), sport: 8472, dst: "10.0.100.3".into(), dport: 49991 },
            status: vec!["confirmed", "src-nat"],
            source: "skb",
        }),
        nat: Some(Nat { random_fully: "port-rewritten", ..Nat::default() }),
        cause: Some(Cause { predicted: Some("0x76b9".into()), proved: true, ..Cause::default() }),
        flow: Some(Flow { attempt: 1, conntrack_timeout_s: Some(30), ..Flow::default() }),
        suppressed: 0,
        missing: BTreeMap::new(),
        packet: Packet::default(),
    }
}

fn by_rule(why: &'static str) -> Anomaly {
    let rule = |rule: &str, position| NatRule {
        rule: rule.into(),
        backend: "iptables-nft",
        table: "ip nat".into(),
        chain: rule.split(' ').nth(1).unwrap_or_default().into(),
        position,
        handle: Some(9),
    };
    let nat = Nat {
        random_fully: "rule",
        rule: Some(KUBE.into()),
        backend: Some("iptables-nft"),
        table: Some("ip nat".into()),
        chain: Some("KUBE-POSTROUTING".into()),
        position: Some(1),
        handle: Some(12),
        mark: Some("0x4000".into()),
        why: Some(why),
        set_by: vec![rule("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000", 1)],
        cleared_by: Some(rule("-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0", 3)),
        ahead: Some(rule("-A POSTROUTING -d 10.244.2.0/24 -j SNAT --to-source 10.244.0.0", 1)),
        ..Nat::default()
    };
    Anomaly { nat: Some(nat), ..fault_b() }
}

fn fault_a() -> Anomaly {
    Anomaly {
        verdict: "nat-mangled-zero",
        csum: Csum { seen: "0xffff".into(), expected: Some("0x0000".into()), ..fault_b().csum },
        cause: Some(Cause { predicted: Some("0xffff".into()), proved: true, ..Cause::default() }),
        ..fault_b()
    }
}

fn text_of(anomaly: &Anomaly, release: &str, about: &str) -> String {
    let parts = explain(anomaly, release);
    let found: Vec<&Part> = parts.iter().filter(|part| part.about == about).collect();
    assert!(found.len() <= 1, "{found:?}");
    found.first().map(|part| part.text.clone() + part.command.as_deref().map_or("", |_| " $")).unwrap_or_default()
}

fn commands(anomaly: &Anomaly) -> Vec<String> {
    explain(anomaly, RELEASE).into_iter().filter_map(|part| part.command).collect()
}

fn whole(anomaly: &Anomaly, release: &str) -> String {
    explain(anomaly, release).iter().map(|part| format!("{} {}\n", part.about, part.text)).collect()
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[track_caller]
fn says_not(text: &str, words: &[&str]) {
    for word in words {
        assert!(!text.contains(word), "{word:?} in {text}");
    }
}

#[test]
fn fault_b_is_told_with_its_proof() {
    let anomaly = fault_b();
    says(
        &text_of(&anomaly, RELEASE, "what"),
        &["the SYN of tcp 10.244.0.0:40018 > 10.244.2.73:9153", "UdpInCsumErrors"],
    );
    says(&text_of(&anomaly, RELEASE, "why"), &["10.0.100.3:49991 of 10.0.100.3:36512", "0x76b9", "fault B"]);
    says(&text_of(&anomaly, RELEASE, "kernel"), &["no kernel fixes"]);
    assert_eq!(commands(&anomaly), ["ethtool -K flannel.1 tx-checksum-ip-generic off"]);
    // The rules are not known: no rule is named, and none to delete.
    says(&text_of(&anomaly, RELEASE, "mark"), &["the outer packet has mark 0x4000"]);
    says_not(&whole(&anomaly, RELEASE), &["fault A", "set by", "survived", "-D "]);
    assert_eq!(text_of(&anomaly, RELEASE, "rule"), "");
}

#[test]
fn later_attempts_say_which_they_are() {
    let flow = Flow { attempt: 3, since_first_ms: 3100, ..Flow::default() };
    let anomaly = Anomaly { flow: Some(flow), ..fault_b() };
    says(&text_of(&anomaly, RELEASE, "what"), &["bad packet 3", "3.1 s after the first"]);
}

#[test]
fn fault_a_has_a_fixed_kernel_in_some_series() {
    says(&text_of(&fault_a(), "4.19.108", "why"), &["0xffff", "fault A"]);
    for (release, words) in [
        ("4.19.108-rt", ["has a fix: 4.19.123", "same series"]),
        ("4.14.0", ["has a fix: 4.14.181", "same series"]),
        ("5.4.40-200.el7", ["has a fix: 5.4.41", "same series"]),
        ("5.6.12", ["has a fix: 5.6.13", "same series"]),
        ("3.10.0-1127.el7.x86_64", ["ask who builds 3.10.0-1127.el7.x86_64", "5.7 have the fix"]),
        ("5.5.19", ["ask who builds 5.5.19", "4.14.181"]),
        ("4.19.123", ["should have the fix", "ea64d8d6c675"]),
        ("6.1.192", ["should have the fix", "ask who builds"]),
        ("5.7.0", ["should have the fix", "ask who builds"]),
        ("", ["4.14.181", "ea64d8d6c675"]),
        ("custom", ["ask who builds custom", "ea64d8d6c675"]),
    ] {
        says(&text_of(&fault_a(), release, "kernel"), &words);
        says_not(&whole(&fault_a(), release), &["no kernel fixes", "fault B"]);
    }
}

#[test]
fn fault_a_without_its_entry_is_not_called_proved() {
    let anomaly = Anomaly {
        ct: None,
        nat: None,
        cause: Some(Cause { predicted: None, proved: false, ..Cause::default() }),
        missing: [("ct", "it is gone".to_owned())].into(),
        ..fault_a()
    };
    says(&text_of(&anomaly, RELEASE, "why"), &["not proved", "it is gone"]);
    says_not(&whole(&anomaly, RELEASE), &["computed from", "NAT made"]);
}

#[test]
fn an_old_rule_that_comes_first_is_to_be_deleted() {
    let anomaly = by_rule("old-rule-first");
    says(
        &text_of(&anomaly, RELEASE, "rule"),
        &[KUBE, "iptables-nft, table ip nat, chain KUBE-POSTROUTING, rule 1, handle 12"],
    );
    says(&text_of(&anomaly, RELEASE, "mark"), &["KUBE-MARK-MASQ", "--set-xmark 0x4000/0x0", "comes first"]);
    let delete =
        "iptables-nft -t nat -D KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully".to_owned();
    assert_eq!(commands(&anomaly)[1], delete);
    // The kube-proxy that is to be installed is installed.
    says_not(&text_of(&anomaly, RELEASE, "cure"), &["1.17.9"]);

    let with = |backend, table: &str| {
        let nat = Nat { backend: Some(backend), table: Some(table.into()), ..anomaly.nat.clone().unwrap() };
        commands(&Anomaly { nat: Some(nat), ..anomaly.clone() }).pop().unwrap()
    };
    says(&with("iptables-legacy", "ip nat"), &["iptables-legacy -t nat -D KUBE"]);
    says(&with("iptables-legacy", "ip6 nat"), &["ip6tables-legacy -t nat -D KUBE"]);
    says(&with("iptables-nft", "ip6 nat"), &["ip6tables-nft -t nat -D KUBE"]);
    assert_eq!(with("nftables", "ip kube-proxy"), "nft delete rule ip kube-proxy KUBE-POSTROUTING handle 12");
}

#[test]
fn a_rule_ahead_is_named() {
    let anomaly = by_rule("snat-ahead");
    says(
        &text_of(&anomaly, RELEASE, "mark"),
        &["-A POSTROUTING -d 10.244.2.0/24 -j SNAT", "ends the inner packet's way"],
    );
    says(&text_of(&anomaly, RELEASE, "cure"), &["after the one that clears the mark"]);
    assert_eq!(commands(&anomaly).len(), 1);
}

#[test]
fn rules_from_before_the_fix_call_for_kube_proxy_if_they_are_its() {
    let anomaly = by_rule("mark-not-cleared");
    says(&text_of(&anomaly, RELEASE, "mark"), &["no rule clears it"]);
    says(&text_of(&anomaly, RELEASE, "cure"), &["1.17.9"]);
    let nat = Nat { chain: Some("OTHER".into()), ..anomaly.nat.clone().unwrap() };
    says_not(&text_of(&Anomaly { nat: Some(nat), ..anomaly }, RELEASE, "cure"), &["kube-proxy"]);
}

#[test]
fn a_rule_without_a_mark_is_to_leave_vxlan_alone() {
    let anomaly = by_rule("no-mark");
    says(&text_of(&anomaly, RELEASE, "cure"), &["UDP port 8472"]);
    says_not(&text_of(&anomaly, RELEASE, "mark"), &["survived"]);
    says(&text_of(&by_rule("unclear"), RELEASE, "mark"), &["nothing was found"]);
}

#[test]
fn rules_that_cannot_be_told_apart_are_all_named() {
    let Some(Nat { set_by, .. }) = by_rule("unclear").nat else { unreachable!() };
    let nat =
        Nat { random_fully: "port-rewritten", candidates: [set_by.clone(), set_by.clone()].concat(), ..Nat::default() };
    let anomaly = Anomaly { nat: Some(nat), ..fault_b() };
    says(&text_of(&anomaly, RELEASE, "rule"), &["it cannot be told which; candidates: `-A", ", or `-A"]);
    let reason = Some("the rules were being changed when the packet left".to_owned());
    let nat = Nat { random_fully: "port-rewritten", reason, candidates: set_by, ..Nat::default() };
    let anomaly = Anomaly { nat: Some(nat), ..fault_b() };
    says(&text_of(&anomaly, RELEASE, "rule"), &["not certain: the rules were being changed", "; candidate: `-A"]);
    let nat = Nat { random_fully: "port-rewritten", reason: Some("the rules cannot be read".into()), ..Nat::default() };
    let anomaly = Anomaly { nat: Some(nat), ..fault_b() };
    says(&text_of(&anomaly, RELEASE, "rule"), &["not known: the rules cannot be read"]);
}

#[test]
fn a_rule_named_while_rules_change_is_said_to_be_so() {
    let changing = |changing| {
        let nat = by_rule("mark-not-cleared").nat.map(|nat| Nat { changing, ..nat });
        text_of(&Anomaly { nat, ..fault_b() }, RELEASE, "rule")
    };
    says(&changing(true), &["KUBE-POSTROUTING", "there before as well as after"]);
    says_not(&changing(false), &["before as well as after"]);
}

#[test]
fn offload_is_said_to_be_on_only_if_the_packet_shows_it() {
    says(&text_of(&fault_b(), RELEASE, "now"), &["flannel.1 is on"]);
    let blind = Anomaly { csum: Csum { state: "unknown", ..fault_b().csum }, vxlan_dev: None, ..fault_b() };
    says(&text_of(&blind, RELEASE, "now"), &["if tx-checksum-ip-generic of the VXLAN device is on"]);
    // No command for a device that is not known.
    assert!(commands(&blind).is_empty());
}

#[test]
fn what_comes_next_is_told_as_it_is_expected() {
    let with = |flow: Flow| text_of(&Anomaly { flow: Some(flow), ..fault_b() }, RELEASE, "then");
    let expected = || Flow {
        attempt: 1,
        conntrack_timeout_s: Some(45),
        expected_recovery: Some("2026-11-25T12:01:57.373945Z".into()),
        expected_by: Some("conntrack-timeout"),
        ..Flow::default()
    };
    says(&with(expected()), &["45 s", "about 12:01:57"]);
    let by_port = with(Flow { expected_by: Some("source-port"), ..expected() });
    says(&by_port, &["net.core.txrehash", "12:01:57"]);
    says_not(&by_port, &["45 s"]);
    says(&with(Flow { conntrack_timeout_s: Some(30), ..Flow::default() }), &["30 s", "within that time"]);
    says(&with(Flow { rewritten_anew: true, ..expected() }), &["waiting does not help"]);
    assert_eq!(with(Flow::default()), "");
}

#[test]
fn what_nat_did_not_do_is_not_blamed_on_it() {
    let unnamed = Some(Cause { predicted: None, proved: false, ..Cause::default() });
    let no_nat = Anomaly { verdict: "bad-outer", cause: unnamed.clone(), ..fault_b() };
    says(&text_of(&no_nat, RELEASE, "why"), &["NAT rewrote nothing"]);
    let other = Anomaly {
        verdict: "bad-outer",
        cause: Some(Cause { predicted: Some("0x1111".into()), proved: false, ..Cause::default() }),
        ..fault_b()
    };
    says(&text_of(&other, RELEASE, "why"), &["would have left 0x1111"]);
    let unknown =
        Anomaly { ct: None, nat: None, missing: [("ct", "no permission".to_owned())].into(), ..no_nat.clone() };
    says(&text_of(&unknown, RELEASE, "why"), &["cannot be told", "no permission"]);
    let port = Some(Cause { right_for_sport: Some(36512), ..Cause::default() });
    let captured = Anomaly { cause: port, ..unknown.clone() };
    says(&text_of(&captured, RELEASE, "why"), &["no permission", "With source port 36512", "became 49991"]);
    says(&text_of(&captured, RELEASE, "now"), &["vxmon attach"]);
    let inner = Anomaly { verdict: "bad-inner", role: "vxlan", dev: "flannel.1".into(), ..unknown.clone() };
    says(&text_of(&inner, RELEASE, "what"), &["when it entered flannel.1"]);
    let zero = Anomaly { verdict: "zero-outer-v6", ..unknown.clone() };
    says(&text_of(&zero, RELEASE, "why"), &["udp6zerocsumtx"]);
    let malformed = Anomaly { verdict: "malformed", inner: None, ..unknown.clone() };
    says(&text_of(&malformed, RELEASE, "what"), &["length fields"]);
    for anomaly in [no_nat, other, unknown, inner, zero, malformed] {
        assert!(commands(&anomaly).is_empty(), "{anomaly:?}");
        says_not(&whole(&anomaly, RELEASE), &["fault A", "fault B", "ends this at once", "1.17.9", "KUBE"]);
    }
}
