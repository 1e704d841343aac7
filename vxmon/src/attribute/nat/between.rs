//! A packet that left while rules were being changed: what is certain is what the rules said both before and after it. Pure
//! functions of two answers.

use crate::event::{Nat, NatRule};

/// What holds of a packet between two readings, by what each of them says of it. A rule is named only if both name it;
/// `bare` is what can be said without rules.
pub(super) fn between(earlier: Option<Nat>, later: Nat, bare: &Nat) -> Nat {
    let Some(earlier) = earlier else {
        return unsure(&[&later], "the rules have changed since the packet left, and had not been read before", bare);
    };
    if essence(&earlier) != essence(&later) {
        return unsure(&[&earlier, &later], "the rules were being changed when the packet left", bare);
    }
    if later.rule.is_none() {
        return later;
    }
    Nat {
        changing: true,
        position: earlier.position.filter(|_| earlier.position == later.position),
        handle: earlier.handle.filter(|_| earlier.handle == later.handle),
        ..earlier
    }
}

/// What can be said if there is no later reading: what an earlier one says of the packet is no more than a candidate.
pub(super) fn unsettled(earlier: Option<&Nat>, bare: &Nat) -> Nat {
    match earlier {
        Some(earlier) => unsure(
            &[earlier],
            "the rules were being changed when the packet left, and could not be read again in time",
            bare,
        ),
        None => unsure(&[], "the rules had not been read when the packet left", bare),
    }
}

/// Any of what they name, for this reason.
fn unsure(answers: &[&Nat], reason: &str, bare: &Nat) -> Nat {
    let mut candidates: Vec<NatRule> = Vec::new();
    for rule in answers.iter().flat_map(|answer| named(answer)) {
        if !candidates.iter().any(|known| place(known) == place(&rule)) {
            candidates.push(rule);
        }
    }
    Nat { reason: Some(reason.to_owned()), candidates, ..bare.clone() }
}

/// The rule that an answer names, or the rules of which it may be any.
fn named(nat: &Nat) -> Vec<NatRule> {
    let one = || {
        Some(NatRule {
            rule: nat.rule.clone()?,
            backend: nat.backend?,
            table: nat.table.clone()?,
            chain: nat.chain.clone()?,
            position: nat.position?,
            handle: nat.handle,
        })
    };
    one().map_or_else(|| nat.candidates.clone(), |rule| vec![rule])
}

/// What stays the same if a rule is written anew, as kube-proxy does with all of its chain.
fn place(rule: &NatRule) -> (&str, &str, &str, &str) {
    (rule.backend, &rule.table, &rule.chain, &rule.rule)
}

/// What two answers must agree on. Who sets the mark is left out: a glimpse does not look there.
fn essence(nat: &Nat) -> impl PartialEq {
    let rules = |rules: &[NatRule]| {
        let places = rules.iter().map(|rule| format!("{:?}", place(rule)));
        places.collect::<Vec<_>>()
    };
    let named = (nat.random_fully, nat.rule.clone(), nat.backend, nat.table.clone(), nat.chain.clone());
    let why = (nat.mark.clone(), nat.why, rules(nat.cleared_by.as_slice()), rules(nat.ahead.as_slice()));
    (named, why, rules(&nat.candidates), nat.reason.clone())
}
