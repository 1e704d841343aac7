//! Which chains can be reached from which, and what a table is without the others. It reads nothing, and follows no packet.

use std::collections::{BTreeSet, HashSet};

use super::model::{Act, Base, Hook, Part, Rule, Table, Test, Verdict, Way};

/// How much of the rules is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// What can matter to a packet that leaves: the chains that POSTROUTING can reach, and of the others the rules that set
    /// marks. A node has tens of these among its thousands.
    WhatMatters,
    /// Only the chains that POSTROUTING can reach.
    Postrouting,
    /// Everything.
    All,
}

/// Whether a base chain is one of POSTROUTING.
pub(super) fn is_postrouting(base: &Base) -> bool {
    base.hook == Hook::Postrouting
}

/// The chains that can be reached from base chains, these included; with `by_unread_maps` a map that was not read is taken to
/// lead everywhere.
pub(super) fn reachable(table: &Table, by_unread_maps: bool, from: impl Fn(&Base) -> bool) -> Vec<usize> {
    let bases = table.chains.iter().enumerate().filter(|(_, chain)| chain.base.as_ref().is_some_and(&from));
    let mut found: Vec<usize> = bases.map(|(index, _)| index).collect();
    let mut seen: HashSet<usize> = found.iter().copied().collect();
    let mut next = 0;
    while let Some(chain) = found.get(next).copied() {
        next += 1;
        let (targets, is_everywhere) = targets(table, chain);
        if is_everywhere && by_unread_maps {
            return (0..table.chains.len()).collect();
        }
        found.extend(targets.into_iter().filter(|target| seen.insert(*target)));
    }
    found
}

/// Where the rules of a chain lead, and whether they do so by a map that was not read.
fn targets(table: &Table, chain: usize) -> (Vec<usize>, bool) {
    let (mut found, mut is_everywhere) = (Vec::new(), false);
    let rules = table.chains.get(chain).map(|chain| &chain.rules).into_iter().flatten();
    for way in rules.flat_map(Rule::leads_to) {
        match way {
            Way::Chain(name) => found.extend(table.by_name.get(name)),
            Way::Map(map) => match table.sets.get(map).and_then(|set| set.elements.as_ref()) {
                Some(elements) => found.extend(elements.iter().filter_map(|element| match &element.verdict {
                    Some(Verdict::Jump(name) | Verdict::Goto(name)) => table.by_name.get(name),
                    _ => None,
                })),
                None => is_everywhere = true,
            },
        }
    }
    (found, is_everywhere)
}

/// Notes which chains any base chain can reach, in a table of which all rules are there.
pub(super) fn note_reached(table: &mut Table) {
    for index in reachable(table, true, |_| true) {
        if let Some(chain) = table.chains.get_mut(index) {
            chain.reached = true;
        }
    }
}

/// What is noted of a table's rules that are not in POSTROUTING, while they pass by.
#[derive(Debug)]
pub(super) struct Others {
    /// How many rules each chain had so far.
    positions: Vec<u32>,
    /// Jumps: from, to.
    edges: Vec<(usize, usize)>,
    /// Chains that have a map which leads to others.
    maps: Vec<usize>,
    /// Rules that set marks, by chain.
    marks: Vec<(usize, Rule)>,
}

impl Others {
    /// Before the first rule.
    pub(super) fn new(table: &Table) -> Self {
        Self { positions: vec![0; table.chains.len()], edges: Vec::new(), maps: Vec::new(), marks: Vec::new() }
    }

    /// The next rule of a chain; its position, from 1.
    pub(super) fn next(&mut self, chain: usize) -> u32 {
        self.positions.get_mut(chain).map_or(0, |position| {
            *position = position.saturating_add(1);
            *position
        })
    }

    /// It leads to another chain.
    pub(super) fn jump(&mut self, from: usize, to: usize) {
        // Mostly of one chain after the other: what is there twice costs nothing but its bytes.
        if self.edges.last() != Some(&(from, to)) {
            self.edges.push((from, to));
        }
    }

    /// It leads to chains that a map names.
    pub(super) fn jump_by_map(&mut self, from: usize) {
        if self.maps.last() != Some(&from) {
            self.maps.push(from);
        }
    }

    /// It sets the mark, if it is one.
    pub(super) fn mark(&mut self, chain: usize, rule: Option<Rule>) {
        self.marks.extend(rule.map(|rule| (chain, rule)));
    }

    /// Forgets the rules that set marks; the chains that had them.
    pub(super) fn take_marked(&mut self) -> BTreeSet<usize> {
        std::mem::take(&mut self.marks).into_iter().map(|(chain, _)| chain).collect()
    }

    /// Puts the rules that set marks into the table, if they can be reached, and leaves out all chains that do not matter.
    pub(super) fn finish(mut self, table: &mut Table) {
        for from in 0..table.chains.len() {
            let (targets, is_everywhere) = targets(table, from);
            self.edges.extend(targets.into_iter().map(|to| (from, to)));
            self.maps.extend(is_everywhere.then_some(from));
        }
        let reached = self.reached_from(table, |_| true);
        for (index, chain) in table.chains.iter_mut().enumerate() {
            chain.reached = reached.get(index) == Some(&true);
        }
        for (chain, rule) in self.marks {
            if let Some(chain) = table.chains.get_mut(chain).filter(|chain| chain.reached) {
                chain.rules.push(rule);
            }
        }
        prune(table);
    }

    /// Whether each chain can be reached from such base chains.
    pub(super) fn reached_from(&mut self, table: &Table, from: impl Fn(&Base) -> bool) -> Vec<bool> {
        self.edges.sort_unstable();
        self.maps.sort_unstable();
        let mut reached = vec![false; table.chains.len()];
        let bases = table.chains.iter().enumerate().filter(|(_, chain)| chain.base.as_ref().is_some_and(&from));
        let mut open: Vec<usize> = bases.map(|(index, _)| index).collect();
        while let Some(chain) = open.pop() {
            match reached.get_mut(chain) {
                Some(seen) if !*seen => *seen = true,
                _ => continue,
            }
            if self.maps.binary_search(&chain).is_ok() {
                return vec![true; table.chains.len()];
            }
            let begin = self.edges.partition_point(|(from, _)| *from < chain);
            let from_here = self.edges.iter().skip(begin).take_while(|(from, _)| *from == chain);
            open.extend(from_here.map(|(_, to)| *to));
        }
        reached
    }
}

/// Leaves out chains that POSTROUTING cannot reach and that have no rules, and sets that no rule asks.
pub(super) fn prune(table: &mut Table) {
    let postrouting: HashSet<usize> = reachable(table, false, is_postrouting).into_iter().collect();
    let mut index = 0;
    table.chains.retain(|chain| {
        index += 1;
        postrouting.contains(&(index - 1)) || !chain.rules.is_empty()
    });
    table.chains.shrink_to_fit();
    table.by_name = table.chains.iter().enumerate().map(|(index, chain)| (chain.name.clone(), index)).collect();
    let asked: HashSet<&str> =
        table.chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.parts).filter_map(set_of).collect();
    table.sets.retain(|name, _| asked.contains(&**name));
    table.sets.shrink_to_fit();
}

/// The set or map of nftables that a part of a rule asks.
pub(super) fn set_of(part: &Part) -> Option<&str> {
    match part {
        Part::Test(Test::Lookup { set, .. }) => Some(set),
        Part::Act(Act::VerdictMap { map, .. }) => Some(map),
        Part::Test(_) | Part::Act(_) => None,
    }
}

/// Whether a rule gives the mark a value that is in the rule.
pub(super) fn sets_mark(rule: &Rule) -> bool {
    rule.parts.iter().any(|part| matches!(part, Part::Act(Act::SetMark { .. })))
}
