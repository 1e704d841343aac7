//! The level of evidence, from what was seen and what the rules say.

use super::*;
use crate::rules::{
    World,
    model::{
        Act, Backend, Base, Family as Sees, Hook, Kind, Nat, NatKind, PERSISTENT, Part, RANDOM, Rule, Ruleset, Table,
    },
};

/// `NF_NAT_RANGE_MAP_IPS`, which masquerading adds.
const MAP_IPS: u32 = 1;

/// POSTROUTING of masquerading rules with these flags, in this order, each behind what lets nothing but the outcome tell
/// which one it was: each in a table of its own with the same priority.
fn rules(flags: &[u32]) -> Snapshot {
    let table = |(number, flags): (usize, &u32)| {
        let mut table = Table::new(Backend::Nftables, Sees::Ip, &format!("t{number}"));
        let chain = table.chain("post");
        let nat = Nat { kind: NatKind::Masquerade, flags: *flags, addresses: None, ports: None, dynamic: None };
        let rule = Rule { handle: Some(7), position: 1, parts: Box::new([Part::Act(Act::Nat(nat))]), comment: None };
        table.chains[chain].base = Some(Base { kind: Kind::Nat, hook: Hook::Postrouting, priority: 100, drops: false });
        table.chains[chain].rules.push(rule);
        table
    };
    let tables = flags.iter().enumerate().map(table).collect();
    Snapshot::of(Ruleset { tables, unread: Vec::new() }, World::default())
}

fn before() -> Tuple {
    let src = [u32::from_ne_bytes([10, 0, 100, 3]), 0, 0, 0];
    let dst = [u32::from_ne_bytes([10, 0, 100, 15]), 0, 0, 0];
    Tuple { src, sport: 57314_u16.to_be(), family: 2, dst, dport: 8472_u16.to_be(), proto: 17, direction: 0 }
}

fn after(sport: u16) -> Endpoints {
    let Tuple { src, dst, dport, .. } = before();
    Endpoints { src, dst, sport: sport.to_be(), dport }
}

fn ct() -> Ct {
    let side = |sport, dport| event::Endpoints { src: "10.0.100.3".into(), sport, dst: "10.0.100.15".into(), dport };
    Ct { orig: side(57314, 8472), reply: side(8472, 33246), status: vec!["confirmed", "src-nat"], source: "skb" }
}

fn seen<'a>(ct: &'a Ct, rewrite: (&'a Tuple, &'a Endpoints), observed: Option<u32>) -> Seen<'a> {
    let observed = observed.map(RangeFlags);
    Seen { ct, observed, rewrite: Some(rewrite), inner: None, device: "uplink", ifindex: 2, mark: Some(0), at: 7 }
}

/// What is said of a connection under these rules that got another port, its NAT seen to be set up by these flags.
fn said(rules_flags: &[u32], observed: Option<u32>) -> event::Nat {
    let (ct, before, after) = (ct(), before(), after(33246));
    let seen = seen(&ct, (&before, &after), observed);
    decide(&rules(rules_flags), &seen, &before, &after)
}

#[test]
fn what_was_seen_is_the_strongest_evidence() {
    let nat = said(&[RANDOM_FULLY], None);
    assert_eq!((nat.random_fully, nat.range_flags.as_ref(), nat.rule.is_some()), ("rule", None, true));
    let nat = said(&[RANDOM_FULLY], Some(MAP_IPS | RANDOM_FULLY));
    assert_eq!((nat.random_fully, nat.rule.as_deref()), ("observed", Some("masquerade fully-random")));
    assert_eq!(nat.range_flags, Some(vec!["map-ips", "proto-random-fully"]));
}

#[test]
fn seen_otherwise_no_rule_can_say_so() {
    // The rule was put there after the connection, say.
    for flags in [0, MAP_IPS, MAP_IPS | RANDOM, MAP_IPS | PERSISTENT] {
        let nat = said(&[RANDOM_FULLY], Some(flags));
        assert_eq!((nat.random_fully, &nat.rule), ("no", &None), "{flags:#x}");
        assert!(nat.reason.as_ref().is_some_and(|why| why.contains("seen to do it")), "{nat:?}");
    }
    // And the reverse.
    let nat = said(&[0], Some(MAP_IPS | RANDOM_FULLY));
    assert_eq!((nat.random_fully, &nat.rule), ("observed", &None));
    // The rule that does agree is named.
    let nat = said(&[RANDOM], Some(MAP_IPS | RANDOM));
    assert_eq!((nat.random_fully, nat.rule.as_deref()), ("no", Some("masquerade random")));
}

#[test]
fn what_was_seen_tells_rules_apart() {
    let nat = said(&[RANDOM_FULLY, 0], None);
    assert_eq!((nat.random_fully, nat.rule.is_none(), nat.candidates.len()), ("port-rewritten", true, 2));
    let nat = said(&[RANDOM_FULLY, 0], Some(MAP_IPS | RANDOM_FULLY));
    assert_eq!((nat.random_fully, nat.rule.as_deref()), ("observed", Some("masquerade fully-random")));
    let nat = said(&[RANDOM_FULLY, 0], Some(MAP_IPS));
    assert_eq!((nat.random_fully, nat.rule.as_deref()), ("no", Some("masquerade")));
}

#[test]
fn without_rules_what_was_seen_is_still_said() {
    let say = |observed: Option<u32>| bare(observed.map(RangeFlags), &before(), &after(33246), "later");
    assert_eq!(say(None).random_fully, "port-rewritten");
    assert_eq!((say(Some(MAP_IPS)).random_fully, say(Some(RANDOM_FULLY)).random_fully), ("no", "observed"));
    assert_eq!(say(Some(RANDOM_FULLY)).reason.as_deref(), Some("later"));
}

#[test]
fn later_packets_of_the_connection_keep_what_was_seen_of_it() {
    let (ct, before, first) = (ct(), before(), after(33246));
    let mut lookup = Lookup::default();
    let mut find = |after: &Endpoints, observed| lookup.find(&seen(&ct, (&before, after), observed)).0.random_fully;
    assert_eq!(find(&first, Some(RANDOM_FULLY)), "observed");
    // The note has given way to others meanwhile.
    assert_eq!(find(&first, None), "observed");
    // The same ends again, another connection.
    assert_eq!(find(&after(33247), None), "port-rewritten");
    assert_eq!(find(&first, Some(0)), "no");
    assert_eq!(find(&first, None), "no");
}

#[test]
fn what_was_not_rewritten_needs_no_evidence() {
    let ct = Ct { status: vec!["confirmed"], ..ct() };
    let (before, after) = (before(), after(33246));
    let (nat, _) = Lookup::default().find(&seen(&ct, (&before, &after), Some(RANDOM_FULLY)));
    assert_eq!((nat.random_fully, nat.range_flags), ("no", None));
}

#[test]
fn all_flags_have_names() {
    assert_eq!(RangeFlags(0x7f).names(), RangeFlags::NAMES);
    assert_eq!(RangeFlags(0xffff_ff80).names(), Vec::<&str>::new());
}

/// What is said between a reading with rules of these flags and one with rules of those.
fn said_between(earlier: Option<&[u32]>, later: &[u32]) -> event::Nat {
    let bare = bare(None, &before(), &after(33246), "");
    between::between(earlier.map(|flags| said(flags, None)), said(later, None), &bare)
}

#[test]
fn a_rule_that_is_there_before_and_after_is_named() {
    let nat = said_between(Some(&[RANDOM_FULLY]), &[RANDOM_FULLY]);
    assert_eq!((nat.random_fully, nat.rule.as_deref(), nat.changing), ("rule", Some("masquerade fully-random"), true));
    assert_eq!((nat.handle, nat.position, nat.reason), (Some(7), Some(1), None));
}

#[test]
fn a_rule_that_was_written_anew_has_no_handle() {
    let first = said(&[RANDOM_FULLY], None);
    let second = event::Nat { handle: Some(8), position: Some(2), ..first.clone() };
    let nat = between::between(Some(first.clone()), second, &event::Nat::default());
    assert_eq!((nat.rule, nat.handle, nat.position), (first.rule, None, None));
}

#[test]
fn what_is_there_only_before_or_only_after_is_a_candidate() {
    for (earlier, later, candidates) in [
        (Some(&[RANDOM_FULLY][..]), &[RANDOM][..], 2),
        (Some(&[RANDOM_FULLY]), &[], 1),
        (Some(&[]), &[RANDOM_FULLY], 1),
        (None, &[RANDOM_FULLY], 1),
        (Some(&[RANDOM_FULLY]), &[RANDOM_FULLY, 0], 2),
    ] {
        let nat = said_between(earlier, later);
        assert_eq!(
            (nat.random_fully, &nat.rule, nat.changing),
            ("port-rewritten", &None, false),
            "{earlier:?} {later:?}"
        );
        assert_eq!(nat.candidates.len(), candidates, "{earlier:?} {later:?}: {nat:#?}");
        assert!(nat.reason.is_some_and(|why| why.contains("the packet left")), "{earlier:?} {later:?}");
    }
}

#[test]
fn without_a_later_reading_nothing_is_named() {
    let bare = bare(Some(RangeFlags(RANDOM_FULLY)), &before(), &after(33246), "");
    let nat = between::unsettled(Some(&said(&[RANDOM_FULLY], None)), &bare);
    assert_eq!((nat.random_fully, nat.rule, nat.candidates.len()), ("observed", None, 1));
    let nat = between::unsettled(None, &bare);
    assert_eq!((nat.random_fully, nat.rule, nat.candidates.len()), ("observed", None, 0));
    assert!(nat.reason.is_some());
}
