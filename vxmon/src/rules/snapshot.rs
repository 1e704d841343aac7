//! The rules as they were at one moment, with what else they depend on, and what is looked for in them often.

use std::collections::{HashMap, HashSet};

use super::{
    ipset::{Element, IpSet, IpSets},
    legacy,
    matching::World,
    model::{Act, Backend, Change as Operation, Hook, Op, Part, Rule, RuleId, Ruleset, Source, Table, Test},
    nft,
    reach::{Keep, is_postrouting, note_reached, reachable},
};
use crate::netlink::{Error, Protocol, Socket, address, ipset as wire, link, ruleset::Change};

/// Elements of one set of ipset that are kept.
const LARGEST_SET: usize = 1 << 16;

/// A change of the mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkChange {
    /// The rule.
    pub rule: RuleId,
    /// Bits that are kept.
    pub and: u32,
    /// Bits that are turned over.
    pub xor: u32,
    /// It can be reached from POSTROUTING.
    pub postrouting: bool,
}

impl MarkChange {
    /// It sets all of these bits, whatever they were.
    #[must_use]
    pub const fn sets(&self, bits: u32) -> bool {
        self.xor & !self.and & bits == bits
    }

    /// It clears all of these bits if they are set.
    #[must_use]
    pub const fn clears(&self, bits: u32) -> bool {
        (self.and ^ self.xor) & bits == 0
    }
}

/// The rules at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The rules.
    pub ruleset: Ruleset,
    /// What else they ask for.
    pub world: World,
    /// Devices that are part of another one, by which packets may have been routed.
    pub below: HashSet<u32>,
    /// Changes of the mark in rules that can be reached.
    pub marks: Vec<MarkChange>,
    /// Marks that rules ask for in POSTROUTING: value and mask.
    pub asked: Vec<(u32, u32)>,
    /// What tells a later state of iptables-legacy from this one.
    pub legacy: Vec<legacy::Seen>,
    /// What tells a later state of nftables from this one.
    pub generation: Option<u32>,
}

impl Snapshot {
    /// Reads what can matter to a packet that leaves. What cannot be read is in [`Ruleset::unread`].
    #[must_use]
    pub fn read() -> Self {
        Self::read_keeping(Keep::WhatMatters)
    }

    /// Reads so much.
    #[must_use]
    pub fn read_keeping(keep: Keep) -> Self {
        let mut snapshot = Self::default();
        snapshot.read_legacy(keep);
        snapshot.read_the_rest(keep);
        snapshot
    }

    /// Reads the chains that POSTROUTING leads to. Tables of iptables-legacy that look as they did when `last` was read are
    /// taken from there: they can be had only as a whole.
    #[must_use]
    pub fn glimpse(last: Option<&Self>) -> Self {
        let mut snapshot = Self::default();
        match last.filter(|last| legacy::looks_the_same(&last.legacy)) {
            Some(last) => {
                let tables = last.ruleset.tables.iter().filter(|table| table.backend == Backend::IptablesLegacy);
                snapshot.ruleset.tables = tables.cloned().collect();
                snapshot.legacy.clone_from(&last.legacy);
            }
            None => snapshot.read_legacy(Keep::Postrouting),
        }
        snapshot.read_the_rest(Keep::Postrouting);
        snapshot
    }

    fn read_legacy(&mut self, keep: Keep) {
        let (tables, seen, errors) = legacy::read(keep);
        self.legacy = seen;
        self.ruleset.tables = tables;
        self.ruleset.unread.extend(errors.iter().map(ToString::to_string));
    }

    /// Reads everything but iptables-legacy.
    fn read_the_rest(&mut self, keep: Keep) {
        match Socket::open(Protocol::Netfilter) {
            Ok(mut socket) => {
                match nft::read(&mut socket, keep) {
                    Ok((tables, generation)) => {
                        self.ruleset.tables.extend(tables);
                        self.generation = generation;
                    }
                    Err(error) => self.ruleset.unread.push(error.to_string()),
                }
                self.read_ip_sets(&mut socket);
            }
            Err(error) => self.ruleset.unread.push(error.to_string()),
        }
        if let Err(error) = self.read_devices() {
            log::warn!("rules: {error}");
        }
        self.index();
    }

    /// The same for rules that were made by hand.
    #[must_use]
    pub fn of(ruleset: Ruleset, world: World) -> Self {
        let mut snapshot = Self { ruleset, world, ..Self::default() };
        snapshot.ruleset.tables.iter_mut().for_each(note_reached);
        snapshot.index();
        snapshot
    }

    /// Whether a change concerns what translates packets that leave. One of which that is not known does.
    #[must_use]
    pub fn is_concerned(&self, change: &Change) -> bool {
        let Change::Table { family, name, hook } = change else { return true };
        if !self.ruleset.unread.is_empty() {
            return true;
        }
        let is_here = |table: &Table| {
            nft::family_number(table.family) == *family
                && table.backend != Backend::IptablesLegacy
                && *table.name == **name
                && table.chains.iter().any(|chain| chain.base.as_ref().is_some_and(is_postrouting))
        };
        hook.is_some_and(|hook| Hook::from(hook) == Hook::Postrouting) || self.ruleset.tables.iter().any(is_here)
    }

    fn read_devices(&mut self) -> Result<(), Error> {
        let mut socket = Socket::open(Protocol::Route)?;
        self.world.addresses = Some(address::addresses(&mut socket)?.iter().map(|one| one.address).collect());
        let links = link::links(&mut socket)?;
        self.below.extend(links.iter().filter(|link| link.master.is_some()).map(|link| link.ifindex));
        let upper =
            links.iter().filter(|link| link.link_netnsid.is_none() && !["vxlan", "veth"].contains(&&*link.kind));
        self.below.extend(upper.filter_map(|link| link.link));
        Ok(())
    }

    /// The sets of ipset: all names, and the elements of those that POSTROUTING asks. Names are put into the rules.
    fn read_ip_sets(&mut self, socket: &mut Socket) {
        if !self.rules().any(|(_, rule)| ip_sets(rule).next().is_some()) {
            return;
        }
        let sets = match wire::list(socket, None) {
            Ok(sets) => sets,
            Err(error) => {
                log::debug!("rules: {error}");
                return;
            }
        };
        let mut asked = HashSet::new();
        for table in &self.ruleset.tables {
            for chain in reachable(table, true, is_postrouting) {
                let rules = table.chains.get(chain).map(|chain| &chain.rules);
                asked.extend(rules.into_iter().flatten().flat_map(ip_sets));
            }
        }
        let mut found = HashMap::new();
        for set in sets {
            let Some(index) = set.index else { continue };
            let elements = asked.contains(&index).then(|| read_elements(socket, &set.name)).flatten();
            found.insert(index, IpSet { name: set.name, kind: set.kind, elements });
        }
        for rule in
            self.ruleset.tables.iter_mut().flat_map(|table| &mut table.chains).flat_map(|chain| &mut chain.rules)
        {
            for part in &mut rule.parts {
                if let Part::Test(Test::IpSet { index, name, .. }) = part {
                    *name = found.get(index).map(|set| set.name.as_str().into());
                }
            }
        }
        self.world.sets = IpSets(found);
    }

    fn rules(&self) -> impl Iterator<Item = (RuleId, &Rule)> {
        self.ruleset.tables.iter().enumerate().flat_map(|(table, one)| {
            one.chains.iter().enumerate().flat_map(move |(chain, one)| {
                one.rules.iter().enumerate().map(move |(rule, one)| (RuleId { table, chain, rule }, one))
            })
        })
    }

    /// Notes where marks are changed and asked for.
    fn index(&mut self) {
        let (mut marks, mut asked) = (Vec::new(), Vec::new());
        for (number, table) in self.ruleset.tables.iter().enumerate() {
            let postrouting: HashSet<usize> = reachable(table, true, is_postrouting).into_iter().collect();
            for (chain, _) in table.chains.iter().enumerate().filter(|(_, chain)| chain.reached) {
                let in_postrouting = postrouting.contains(&chain);
                note_marks(table, (number, chain), in_postrouting, &mut marks, &mut asked);
            }
        }
        asked.sort_unstable();
        asked.dedup();
        (self.marks, self.asked) = (marks, asked);
    }
}

fn note_marks(
    table: &Table,
    (number, chain): (usize, usize),
    postrouting: bool,
    marks: &mut Vec<MarkChange>,
    asked: &mut Vec<(u32, u32)>,
) {
    for (index, rule) in table.chains.get(chain).map(|chain| &chain.rules).into_iter().flatten().enumerate() {
        for part in &rule.parts {
            match part {
                Part::Act(Act::SetMark { and, xor }) => marks.push(MarkChange {
                    rule: RuleId { table: number, chain, rule: index },
                    and: *and,
                    xor: *xor,
                    postrouting,
                }),
                Part::Test(test) if postrouting => asked.extend(mark_asked(test)),
                Part::Test(_) | Part::Act(_) => {}
            }
        }
    }
}

/// The value and the mask of a condition on the mark.
pub(super) fn mark_asked(test: &Test) -> Option<(u32, u32)> {
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_ne_bytes);
    match test {
        Test::Mark { connection: false, value, mask, .. } => Some((*value, *mask)),
        Test::Compare { value, op: Op::Eq | Op::Ne, with } if value.source == Source::Mark => match &*value.changes {
            [] => Some((word(with)?, u32::MAX)),
            [Operation::Bits { and, xor }] => Some((word(with)? ^ word(xor)?, word(and)?)),
            _ => None,
        },
        _ => None,
    }
}

fn ip_sets(rule: &Rule) -> impl Iterator<Item = u16> {
    rule.parts.iter().filter_map(|part| match part {
        Part::Test(Test::IpSet { index, .. }) => Some(*index),
        Part::Test(_) | Part::Act(_) => None,
    })
}

fn read_elements(socket: &mut Socket, name: &str) -> Option<Vec<Element>> {
    let parts = wire::list(socket, Some(name)).map_err(|error| log::debug!("rules: {error}")).ok()?;
    let elements: Vec<Element> = parts.into_iter().flat_map(|set| set.elements).map(|one| element(&one)).collect();
    (elements.len() <= LARGEST_SET).then_some(elements)
}

fn element(one: &wire::Element) -> Element {
    let net = |number: usize| {
        let address = one.addresses.get(number).copied().flatten()?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        Some((address, one.prefixes.get(number).copied().flatten().unwrap_or(whole)))
    };
    Element { first: net(0), second: net(1), port: one.protocol.zip(one.port), odd: one.except }
}
