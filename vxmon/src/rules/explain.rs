//! From a packet that NAT rewrote to a finding: the rule that did it, the mark for which it did, who set that mark, and why
//! nobody cleared it. What is not certain is said to be so.

use std::net::IpAddr;

use super::{
    matching::{self, Outcome, Packet},
    model::{Nat, NatKind, PERSISTENT, PROTO_SPECIFIED, Part, RANDOM, RANDOM_FULLY, RuleId},
    snapshot::{MarkChange, Snapshot},
};

/// Marks that are tried for the packet as NAT saw it.
const MARKS: usize = 64;
/// Rules that a finding names of each kind.
const NAMED: usize = 8;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The packet as it was before NAT, with the mark that it leaves with.
    pub outer: &'a Packet,
    /// Its source after NAT.
    pub after: (IpAddr, u16),
    /// The packet inside, as it is after NAT.
    pub inner: Option<&'a Packet>,
    /// The flags by which the kernel was seen to choose that (`NF_NAT_RANGE_*`); none: not seen.
    pub seen: Option<u32>,
}

/// Why the outer packet was taken by the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No rule clears the mark.
    MarkNotCleared,
    /// A rule does, but the one that took the packets comes before it.
    OldRuleFirst,
    /// A rule does, but another translation ends the inner packet's way before it.
    SnatAhead,
    /// A rule does, but a RETURN or ACCEPT ends the inner packet's way before it.
    ReturnAhead,
    /// A rule does, and it is not known why it did not.
    Unclear,
    /// The rule does not ask for a mark.
    NoMark,
}

impl Why {
    /// Its name in events.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MarkNotCleared => "mark-not-cleared",
            Self::OldRuleFirst => "old-rule-first",
            Self::SnatAhead => "snat-ahead",
            Self::ReturnAhead => "return-ahead",
            Self::Unclear => "unclear",
            Self::NoMark => "no-mark",
        }
    }

    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::MarkNotCleared, Self::OldRuleFirst, Self::SnatAhead, Self::ReturnAhead, Self::Unclear, Self::NoMark];
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finding {
    /// The rule that translated the packet.
    pub rule: Option<RuleId>,
    /// It chooses ports fully at random.
    pub random_fully: bool,
    /// Why there is no rule.
    pub reason: Option<String>,
    /// The bits of the mark for which the rule took the packet.
    pub bits: u32,
    /// Why it took the outer packet.
    pub why: Option<Why>,
    /// Who sets these bits.
    pub set_by: Vec<RuleId>,
    /// Who clears them.
    pub cleared_by: Option<RuleId>,
    /// Who keeps the inner packet from that.
    pub ahead: Option<RuleId>,
    /// Rules of which it may be any.
    pub candidates: Vec<RuleId>,
    /// Rules of which something could not be told.
    pub unknown: Vec<RuleId>,
}

/// A way that agrees with what was seen, and the mark with which it begins.
struct Fit {
    mark: Option<u32>,
    outcome: Outcome,
}

/// Answers.
#[must_use]
pub fn explain(snapshot: &Snapshot, question: &Question<'_>) -> Finding {
    let nothing = |reason: String| Finding { reason: Some(reason), ..Finding::default() };
    let as_seen = if question.seen.is_some() { ", in the way that the kernel was seen to do it," } else { "" };
    if let Some(unread) = snapshot.ruleset.unread.first() {
        return nothing(format!("not all rules could be read: {unread}"));
    }
    let fits = match fits(snapshot, question) {
        Ok(fits) => fits,
        Err(why) => return nothing(why.to_owned()),
    };
    let mut candidates: Vec<RuleId> = fits.iter().filter_map(|fit| fit.outcome.nat).collect();
    candidates.sort_unstable();
    candidates.dedup();
    let mut unknown: Vec<RuleId> = fits.iter().flat_map(|fit| fit.outcome.unknown.iter().copied()).collect();
    unknown.sort_unstable();
    unknown.dedup();
    unknown.truncate(NAMED);
    let certain = fits.iter().find(|fit| !fit.outcome.assumed);
    let finding = match (candidates.as_slice(), certain) {
        ([], _) => {
            // `nf_nat_alloc_null_binding()`, net/netfilter/nf_nat_core.c, which keeps the address, and asks for no port.
            let chosen = question.seen.is_some_and(|seen| seen & (RANDOM | RANDOM_FULLY | PROTO_SPECIFIED) != 0);
            let taken = if question.outer.src == Some(question.after.0) && !chosen {
                ", or its port was another connection's, and NAT drew one for it without any rule"
            } else {
                ""
            };
            nothing(format!(
                "no rule that is there now would have translated a packet with the mark {:#x}{as_seen}: the first packet of \
                 the connection had another one, or the rules have changed since{taken}",
                question.outer.mark.unwrap_or(0)
            ))
        }
        ([rule], Some(fit)) => named(snapshot, question, *rule, fit.mark),
        ([_], None) => nothing("a rule would have, if a condition held that vxmon cannot tell".to_owned()),
        (several, _) => nothing(format!(
            "it may have been any of {} rules: a condition, or the order of tables with the same priority, cannot be told",
            several.len()
        )),
    };
    candidates.truncate(NAMED);
    let candidates = if finding.rule.is_some() { Vec::new() } else { candidates };
    Finding { candidates, unknown, ..finding }
}

/// All ways through the rules that end as the conntrack entry and the packet's mark say.
fn fits(snapshot: &Snapshot, question: &Question<'_>) -> Result<Vec<Fit>, &'static str> {
    let mut fits = Vec::new();
    for mark in marks(snapshot, question.outer) {
        let packet = Packet { mark, ..question.outer.clone() };
        for outcome in matching::postrouting(&snapshot.ruleset, &snapshot.world, &packet)? {
            let same_mark = match (outcome.mark, question.outer.mark) {
                (Some(end), Some(seen)) => end == seen,
                _ => true,
            };
            let translates = outcome
                .nat
                .and_then(|id| snapshot.ruleset.get(id))
                .is_some_and(|(_, _, rule)| rule.nat().is_none_or(|nat| agrees(snapshot, nat, question)));
            if same_mark && translates {
                fits.push(Fit { mark, outcome });
            }
        }
    }
    Ok(fits)
}

/// Whether a translation can have made what was seen.
fn agrees(snapshot: &Snapshot, nat: &Nat, question: &Question<'_>) -> bool {
    let (address, port) = question.after;
    let address_fits = match (nat.kind, nat.addresses) {
        (NatKind::Snat, Some((from, to))) => (from..=to).contains(&address),
        (NatKind::Masquerade, _) => snapshot.world.addresses.as_ref().is_none_or(|own| own.contains(&address)),
        _ => true,
    };
    // The kernel adds others of its own (NF_NAT_RANGE_MAP_IPS).
    let asked = RANDOM | RANDOM_FULLY | PERSISTENT;
    let flags_fit = question.seen.is_none_or(|seen| seen & asked == nat.flags & asked);
    address_fits && flags_fit && nat.ports.is_none_or(|(from, to)| (from..=to).contains(&port))
}

/// The marks that the packet may have had as NAT saw it, the one that it leaves with first: rules may have changed it on
/// the way, and the bits that they ask for and change are few.
fn marks(snapshot: &Snapshot, outer: &Packet) -> Vec<Option<u32>> {
    let Some(mark) = outer.mark else { return vec![None] };
    let changes: Vec<&MarkChange> = snapshot.marks.iter().filter(|change| change.postrouting).collect();
    let mut found = vec![mark];
    if changes.is_empty() {
        return vec![Some(mark)];
    }
    let mut add = |make: &dyn Fn(u32) -> u32| {
        for index in 0..found.len() {
            let candidate = found.get(index).map(|mark| make(*mark));
            if let Some(candidate) = candidate
                && !found.contains(&candidate)
                && found.len() < MARKS
            {
                found.push(candidate);
            }
        }
    };
    for change in changes {
        add(&|mark| mark ^ (change.xor & change.and));
        add(&|mark| mark ^ (change.xor & !change.and));
        if change.and != 0 {
            add(&|mark| mark ^ !change.and);
        }
    }
    for (value, mask) in &snapshot.asked {
        add(&|mark| (mark & !mask) | value);
        add(&|mark| mark & !mask);
    }
    found.into_iter().map(Some).collect()
}

/// The finding for a rule that is certain.
fn named(snapshot: &Snapshot, question: &Question<'_>, id: RuleId, mark: Option<u32>) -> Finding {
    let random_fully = snapshot.ruleset.get(id).and_then(|(_, _, rule)| rule.nat()).is_some_and(Nat::is_random_fully);
    let bits = mark.map_or(0, |mark| bits(snapshot, question.outer, id, mark));
    let mut finding = Finding { rule: Some(id), random_fully, bits, ..Finding::default() };
    if bits == 0 {
        finding.why = Some(Why::NoMark);
        return finding;
    }
    // The mark was set on the inner packet, and could have been cleared from it.
    let v6 = question.inner.map_or(question.outer.v6, |inner| inner.v6);
    let sees = |change: &&MarkChange| {
        snapshot.ruleset.tables.get(change.rule.table).is_some_and(|table| table.family.sees(v6))
    };
    let changes = || snapshot.marks.iter().filter(sees);
    finding.set_by = changes().filter(|change| change.sets(bits)).map(|change| change.rule).take(NAMED).collect();
    finding.cleared_by = changes().find(|change| change.postrouting && change.clears(bits)).map(|change| change.rule);
    let (why, ahead) = match (finding.cleared_by, question.inner) {
        (None, _) => (Why::MarkNotCleared, None),
        (Some(_), None) => (Why::Unclear, None),
        (Some(_), Some(inner)) => survived(snapshot, inner, mark.unwrap_or(bits), bits),
    };
    (finding.why, finding.ahead) = (Some(why), ahead);
    finding
}

/// The bits of `mark` without which the rule would not have taken the packet.
fn bits(snapshot: &Snapshot, outer: &Packet, id: RuleId, mark: u32) -> u32 {
    let mut masks: Vec<u32> = snapshot.asked.iter().map(|(_, mask)| mask & mark).filter(|bits| *bits != 0).collect();
    masks.sort_unstable();
    masks.dedup();
    let needed = |bits: &u32| {
        let packet = Packet { mark: Some(mark & !bits), ..outer.clone() };
        let outcomes = matching::postrouting(&snapshot.ruleset, &snapshot.world, &packet);
        outcomes.is_ok_and(|outcomes| outcomes.iter().all(|outcome| outcome.nat != Some(id)))
    };
    // The smallest that is needed: a mask of all bits is needed too, but says less.
    masks.sort_unstable_by_key(|bits| bits.count_ones());
    masks.into_iter().find(needed).unwrap_or(0)
}

/// How the inner packet left POSTROUTING with these bits, though a rule clears them.
fn survived(snapshot: &Snapshot, inner: &Packet, mark: u32, bits: u32) -> (Why, Option<RuleId>) {
    // Its source and the device it left by are not known any more: both ways are followed where they are asked for.
    let before = Packet { src: None, sport: None, out: None, mark: Some(mark), ..inner.clone() };
    let Ok(outcomes) = matching::postrouting(&snapshot.ruleset, &snapshot.world, &before) else {
        return (Why::Unclear, None);
    };
    let kept = |outcome: &&Outcome| outcome.mark.is_some_and(|end| end & bits == bits);
    let mut kept: Vec<&Outcome> = outcomes.iter().filter(kept).collect();
    // What is certain first; a translation before a mere end.
    kept.sort_by_key(|outcome| (outcome.assumed, outcome.nat.is_none()));
    let Some(outcome) = kept.first() else { return (Why::Unclear, None) };
    match (outcome.nat, outcome.ended_by) {
        (Some(id), _) if asks_for(snapshot, id, bits) => (Why::OldRuleFirst, Some(id)),
        (Some(id), _) => (Why::SnatAhead, Some(id)),
        // A rule that returns because the mark is not there does not keep it there.
        (None, Some(id)) => (Why::ReturnAhead, Some(id)),
        (None, None) => (Why::Unclear, None),
    }
}

/// Whether a rule itself asks for these bits: kube-proxy's old MASQUERADE does.
fn asks_for(snapshot: &Snapshot, id: RuleId, bits: u32) -> bool {
    snapshot.ruleset.get(id).is_some_and(|(_, _, rule)| {
        rule.parts
            .iter()
            .filter_map(|part| if let Part::Test(test) = part { super::snapshot::mark_asked(test) } else { None })
            .any(|(_, mask)| mask & bits == bits)
    })
}
