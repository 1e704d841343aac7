//! The NAT that rewrote the outer packet: which rule, how certain that is, and why the packet met it at all. Everything about
//! rules is [`crate::rules`]'; here it is put to the packet and into the event. It never waits: what only later rules can settle
//! is given back as such.

mod between;

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use tokio::sync::Notify;

use vxmon_common::conntrack::{Endpoints, Tuple};

use super::headers::address;
use crate::{
    event::{self, Anomaly, Ct, Inner, NatRule},
    rules::{Device, Finding, Now, Packet, Question, RuleId, Rules, Snapshot, explain, model::RANDOM_FULLY, render},
};
use vxmon_common::packet::Family;

/// Connections whose finding is remembered; the oldest gives way.
const REMEMBERED: usize = 1024;
/// `AF_INET6`, as it stands in a tuple.
const AF_INET6: u16 = 10;

/// Who sees NAT being set up.
pub trait Observer: std::fmt::Debug {
    /// The flags (`NF_NAT_RANGE_*`) by which the NAT of the connection with just these tuples was set up; none if that was not
    /// seen, or if it is not certain that it was this connection's.
    fn range_flags(&mut self, orig: &Tuple, reply: &Tuple) -> Option<u32>;
}

/// Flags of the range from which NAT chose address and port, as the kernel was seen to do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeFlags(pub u32);

impl RangeFlags {
    /// Names by bit number: `NF_NAT_RANGE_*` of include/uapi/linux/netfilter/nf_nat.h.
    pub const NAMES: [&'static str; 7] =
        ["map-ips", "proto-specified", "proto-random", "persistent", "proto-random-fully", "proto-offset", "netmap"];

    /// The level of evidence.
    const fn level(self) -> &'static str {
        if self.0 & RANDOM_FULLY != 0 { "observed" } else { "no" }
    }

    /// Those that are set, by name.
    fn names(self) -> Vec<&'static str> {
        Self::NAMES.into_iter().enumerate().filter(|(bit, _)| self.0 & 1 << bit != 0).map(|(_, name)| name).collect()
    }
}

/// A packet that left.
#[derive(Debug)]
pub struct Seen<'a> {
    /// Its conntrack entry.
    pub ct: &'a Ct,
    /// By which flags its NAT was seen to be set up.
    pub observed: Option<RangeFlags>,
    /// How it was before NAT and is now; none if nothing was rewritten.
    pub rewrite: Option<(&'a Tuple, &'a Endpoints)>,
    /// The packet inside.
    pub inner: Option<&'a Inner>,
    /// The device by which it left.
    pub device: &'a str,
    /// That device's index.
    pub ifindex: u32,
    /// `skb->mark`; none: not known.
    pub mark: Option<u32>,
    /// When: CLOCK_MONOTONIC, ns.
    pub at: u64,
}

/// A packet of which rules that are still to be read may tell more.
#[derive(Debug)]
pub struct Pending {
    before: Tuple,
    after: Endpoints,
    observed: Option<RangeFlags>,
    mark: Option<u32>,
    at: u64,
    /// What the last rules say that had been read when it left.
    earlier: Option<event::Nat>,
}

impl Pending {
    /// When the packet left: CLOCK_MONOTONIC, ns.
    pub const fn at(&self) -> u64 {
        self.at
    }
}

/// Before and after, of one connection.
type Key = ([u32; 4], u16, [u32; 4], u16, u16);

/// What was found for a connection.
#[derive(Clone, Debug)]
struct Found {
    nat: Arc<event::Nat>,
    observed: Option<RangeFlags>,
    /// A rule is named: it stays so.
    settled: bool,
}

/// Finds NAT rules.
#[derive(Debug, Default)]
pub struct Lookup {
    rules: Option<Rules>,
    /// What was found when a connection was seen first: its rules are those of then, and its later packets may not have the
    /// mark that they saw.
    found: HashMap<Key, Found>,
    order: VecDeque<Key>,
}

impl Lookup {
    /// With these rules.
    pub fn new(rules: Rules) -> Self {
        Self { rules: Some(rules), ..Self::default() }
    }

    /// The section of the event, and what is needed to ask again if rules that are still to be read may tell more.
    pub fn find(&mut self, seen: &Seen<'_>) -> (event::Nat, Option<Box<Pending>>) {
        let source_nat = seen.ct.status.contains(&"src-nat");
        let Some((before, after)) = seen.rewrite.filter(|_| source_nat) else {
            return (untouched(), None);
        };
        let key = key(before, after);
        let found = self.found.get(&key);
        // Seen now is what counts: it may be another connection with the same ends.
        let observed = seen.observed.or(found.and_then(|found| found.observed));
        if let Some(found) = found.filter(|found| found.settled && found.observed == observed) {
            return (event::Nat::clone(&found.nat), None);
        }
        let seen = Seen { observed, ..*seen };
        let now = self.rules.as_mut().map(Rules::now);
        let (nat, pending) = match now {
            None => (bare(observed, before, after, "rules are not read"), None),
            Some(Now::Still(reading)) => (decide(&reading.snapshot, &seen, before, after), None),
            Some(Now::Changed(last)) => {
                let last = last.filter(|reading| reading.had_ended(seen.at));
                let earlier = last.map(|reading| decide(&reading.snapshot, &seen, before, after));
                // Otherwise they are being read for the first time, which is waited for.
                self.rules.iter().filter(|_| earlier.is_some()).for_each(Rules::ask);
                let nat = between::unsettled(earlier.as_ref(), &bare(observed, before, after, ""));
                let (before, after) = (*before, *after);
                (nat, Some(Box::new(Pending { before, after, observed, mark: seen.mark, at: seen.at, earlier })))
            }
        };
        self.remember(key, &nat, observed);
        (nat, pending)
    }

    /// What the rules say that were read since, of the packet of this anomaly; none: nothing yet.
    pub fn settle(&mut self, anomaly: &Anomaly, pending: &Pending) -> Option<event::Nat> {
        let Pending { before, after, observed, mark, at, earlier } = pending;
        let seen = Seen {
            ct: anomaly.ct.as_ref()?,
            observed: *observed,
            rewrite: Some((before, after)),
            inner: anomaly.inner.as_ref(),
            device: &anomaly.dev,
            ifindex: anomaly.ifindex,
            mark: *mark,
            at: *at,
        };
        let rules = self.rules.as_mut()?;
        let nat = match rules.now() {
            Now::Still(reading) if reading.had_begun(*at) => decide(&reading.snapshot, &seen, before, after),
            // They are being read for the first time.
            Now::Changed(None) => return None,
            Now::Still(_) | Now::Changed(Some(_)) => {
                let later = decide(&rules.since(*at)?.snapshot, &seen, before, after);
                between::between(earlier.clone(), later, &bare(*observed, before, after, ""))
            }
        };
        self.remember(key(before, after), &nat, *observed);
        Some(nat)
    }

    /// Has the rules be read from now on.
    pub fn begin(&self) {
        self.rules.iter().for_each(Rules::begin);
    }

    /// Is told when there are rules by which more may be settled; none if none are read.
    pub fn news(&self) -> Option<Arc<Notify>> {
        self.rules.as_ref().map(Rules::news)
    }

    /// Keeps what will be said of the connection's later packets.
    fn remember(&mut self, key: Key, nat: &event::Nat, observed: Option<RangeFlags>) {
        let settled = nat.rule.is_some() || self.rules.is_none();
        if !settled && observed.is_none() {
            return;
        }
        let found = Found { nat: Arc::new(nat.clone()), observed, settled };
        if self.found.insert(key, found).is_some() {
            return;
        }
        self.order.push_back(key);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.found.remove(&oldest);
        }
    }
}

const fn key(before: &Tuple, after: &Endpoints) -> Key {
    (before.src, before.sport, after.src, after.sport, after.dport)
}

/// The level of evidence without a rule.
const fn level(observed: Option<RangeFlags>, before: &Tuple, after: &Endpoints) -> &'static str {
    match observed {
        Some(flags) => flags.level(),
        None if before.sport == after.sport => "no",
        None => "port-rewritten",
    }
}

/// What can be said without rules, which are not asked for this reason.
fn bare(observed: Option<RangeFlags>, before: &Tuple, after: &Endpoints, reason: &str) -> event::Nat {
    event::Nat {
        random_fully: level(observed, before, after),
        range_flags: observed.map(RangeFlags::names),
        reason: Some(reason.to_owned()),
        ..event::Nat::default()
    }
}

/// What can be said of a packet whose NAT is not known.
pub fn unknown(reason: &str) -> event::Nat {
    event::Nat { random_fully: "unknown", reason: Some(reason.to_owned()), ..event::Nat::default() }
}

/// What can be said of a packet that NAT did not touch.
pub fn untouched() -> event::Nat {
    event::Nat { random_fully: "no", ..event::Nat::default() }
}

/// What the rules say, and what was seen, which they cannot contradict.
fn decide(snapshot: &Snapshot, seen: &Seen<'_>, before: &Tuple, after: &Endpoints) -> event::Nat {
    let outer = outer(seen, before, snapshot);
    let family = if before.family == AF_INET6 { Family::V6 } else { Family::V4 };
    let inner = seen.inner.and_then(inner);
    let question = Question {
        outer: &outer,
        after: (address(family, &after.src), u16::from_be(after.sport)),
        inner: inner.as_ref(),
        seen: seen.observed.map(|flags| flags.0),
    };
    let finding = explain::explain(snapshot, &question);
    section(snapshot, &finding, seen.observed, level(seen.observed, before, after))
}

/// The packet as it was before NAT.
fn outer(seen: &Seen<'_>, before: &Tuple, snapshot: &Snapshot) -> Packet {
    let v6 = before.family == AF_INET6;
    let family = if v6 { Family::V6 } else { Family::V4 };
    Packet {
        v6,
        src: Some(address(family, &before.src)),
        dst: Some(address(family, &before.dst)),
        protocol: Some(before.proto),
        sport: Some(u16::from_be(before.sport)),
        dport: Some(u16::from_be(before.dport)),
        mark: seen.mark,
        out: Some(Device {
            name: seen.device.to_owned(),
            index: seen.ifindex,
            below: snapshot.below.contains(&seen.ifindex),
        }),
    }
}

/// The packet inside.
fn inner(inner: &Inner) -> Option<Packet> {
    let (src, dst): (IpAddr, IpAddr) = (inner.src.parse().ok()?, inner.dst.parse().ok()?);
    let protocol = match inner.proto.as_str() {
        "tcp" => 6,
        "udp" => 17,
        "icmp" => 1,
        "icmpv6" => 58,
        number => number.parse().ok()?,
    };
    Some(Packet {
        v6: dst.is_ipv6(),
        src: Some(src),
        dst: Some(dst),
        protocol: Some(protocol),
        sport: inner.sport,
        dport: inner.dport,
        mark: None,
        out: None,
    })
}

fn section(
    snapshot: &Snapshot,
    finding: &Finding,
    observed: Option<RangeFlags>,
    without_rule: &'static str,
) -> event::Nat {
    let all = |ids: &[RuleId]| ids.iter().filter_map(|id| rule(snapshot, *id)).collect();
    let one = |id: Option<RuleId>| id.and_then(|id| rule(snapshot, id));
    let named = one(finding.rule);
    event::Nat {
        random_fully: match (observed, &named, finding.random_fully) {
            (None, Some(_), true) => "rule",
            (None, Some(_), false) => "no",
            (Some(_), _, _) | (None, None, _) => without_rule,
        },
        range_flags: observed.map(RangeFlags::names),
        backend: named.as_ref().map(|named| named.backend),
        table: named.as_ref().map(|named| named.table.clone()),
        chain: named.as_ref().map(|named| named.chain.clone()),
        position: named.as_ref().map(|named| named.position),
        handle: named.as_ref().and_then(|named| named.handle),
        rule: named.map(|named| named.rule),
        changing: false,
        reason: finding.reason.clone(),
        mark: (finding.bits != 0).then(|| format!("{:#x}", finding.bits)),
        why: finding.why.map(explain::Why::name),
        set_by: all(&finding.set_by),
        cleared_by: one(finding.cleared_by),
        ahead: one(finding.ahead),
        candidates: all(&finding.candidates),
        unknown: all(&finding.unknown),
    }
}

fn rule(snapshot: &Snapshot, id: RuleId) -> Option<NatRule> {
    let (table, chain, rule) = snapshot.ruleset.get(id)?;
    Some(NatRule {
        rule: render::rule(table, chain, rule),
        backend: table.backend.name(),
        table: format!("{} {}", table.family.name(), table.name),
        chain: chain.name.to_string(),
        position: rule.position,
        handle: rule.handle,
    })
}

#[cfg(test)]
#[path = "nat/tests.rs"]
mod tests;
