//! The tables of nftables as far as they are kept: chains by name where POSTROUTING leads, all other rules only in passing, for
//! the marks that they set.

use std::collections::{HashMap, HashSet};

use super::{family, family_number, iptables, translate, verdict};
use crate::{
    netlink::{
        Error, Socket,
        nftables::{
            self as wire,
            expression::{Data, Expression},
        },
    },
    rules::{
        model::{Backend, Base, Element, Family, Hook, Kind, Rule, Set, Table},
        reach::{Keep, Others, is_postrouting, note_reached, prune, reachable, set_of, sets_mark},
    },
};

/// Elements of one set that are read; a larger one counts as not read.
const LARGEST_SET: usize = 1 << 16;
/// How often the ruleset is read anew because it changed meanwhile.
const ATTEMPTS: u32 = 6;
/// The same for the rules outside POSTROUTING. After the last attempt it is chain by chain that they are read.
const ATTEMPTS_OTHERS: u32 = 2;

/// The tables, and the generation that they are of; no generation if the kernel has no nftables.
///
/// # Errors
/// See [`wire::generation`]; [`Error::Unsteady`] if there was no moment at which POSTROUTING could be read.
pub fn read(socket: &mut Socket, keep: Keep) -> Result<(Vec<Table>, Option<u32>), Error> {
    for _ in 0..ATTEMPTS {
        let Some(before) = wire::generation(socket)? else { return Ok((Vec::new(), None)) };
        let found = of_postrouting(socket, keep);
        // Then an error says no more than the rest: a chain that is listed may be gone when its rules are asked for.
        if wire::generation(socket)? != Some(before) {
            continue;
        }
        let mut tables = found?;
        match keep {
            Keep::All => tables.iter_mut().for_each(note_reached),
            Keep::WhatMatters => others(socket, &mut tables)?,
            Keep::Postrouting => tables.iter_mut().for_each(|table| {
                note_reached(table);
                prune(table);
            }),
        }
        return Ok((tables, Some(before)));
    }
    Err(Error::Unsteady { request: "read the rules of nftables".to_owned(), attempts: ATTEMPTS })
}

fn of_postrouting(socket: &mut Socket, keep: Keep) -> Result<Vec<Table>, Error> {
    let mut tables = chains(socket)?;
    for table in &mut tables {
        read_rules(socket, table, keep)?;
    }
    Ok(tables)
}

/// All tables with their chains and sets, but without rules and elements.
fn chains(socket: &mut Socket) -> Result<Vec<Table>, Error> {
    let chains = wire::chains(socket)?;
    let mut tables: Vec<Table> = Vec::new();
    let mut numbers: HashMap<(Family, String), usize> = HashMap::new();
    for chain in &chains {
        let Some(family) = family(chain.family) else { continue };
        let number = *numbers.entry((family, chain.table.clone())).or_insert_with(|| {
            let backend =
                if is_iptables(family, &chain.table, &chains) { Backend::IptablesNft } else { Backend::Nftables };
            tables.push(Table::new(backend, family, &chain.table));
            tables.len() - 1
        });
        if let Some(table) = tables.get_mut(number) {
            let index = table.chain(&chain.name);
            if let (Some((hook, priority)), Some(entry)) = (chain.hook, table.chains.get_mut(index)) {
                let kind = if chain.kind.as_deref() == Some("nat") { Kind::Nat } else { Kind::Other };
                entry.base = Some(Base { kind, hook: Hook::from(hook), priority, drops: chain.drops });
            }
        }
    }
    for set in wire::sets(socket)? {
        let table = family(set.family).and_then(|family| numbers.get(&(family, set.table.clone())));
        if let Some(table) = table.and_then(|number| tables.get_mut(*number)) {
            let flag = |bit: u32| set.flags & bit != 0;
            let entry = Set {
                anonymous: flag(wire::SET_ANONYMOUS),
                interval: flag(wire::SET_INTERVAL),
                key_len: usize::try_from(set.key_len).unwrap_or(0),
                elements: None,
            };
            table.sets.insert(set.name.into(), entry);
        }
    }
    Ok(tables)
}

/// Whether a table is one of iptables-nft's: its name, and all base chains have iptables' names.
fn is_iptables(family: Family, table: &str, chains: &[wire::Chain]) -> bool {
    const NAMES: [&str; 5] = ["nat", "mangle", "filter", "raw", "security"];
    const CHAINS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    let number = family_number(family);
    let mut bases =
        chains.iter().filter(|chain| chain.family == number && chain.table == table && chain.hook.is_some()).peekable();
    family != Family::Inet
        && NAMES.contains(&table)
        && bases.peek().is_some()
        && bases.all(|chain| CHAINS.contains(&chain.name.as_str()))
}

/// Reads the rules of the chains that POSTROUTING leads to, or of all, and the elements of the sets that POSTROUTING asks. Maps
/// of verdicts lead to more chains, so until nothing is new.
fn read_rules(socket: &mut Socket, table: &mut Table, keep: Keep) -> Result<(), Error> {
    let (mut read, mut sets) = (HashSet::new(), HashSet::new());
    loop {
        let mut open = match keep {
            Keep::All => (0..table.chains.len()).collect(),
            Keep::WhatMatters | Keep::Postrouting => reachable(table, false, is_postrouting),
        };
        open.retain(|chain| read.insert(*chain));
        if open.is_empty() {
            return Ok(());
        }
        for chain in open {
            read_chain(socket, table, chain)?;
        }
        read_elements(socket, table, &mut sets)?;
    }
}

fn read_chain(socket: &mut Socket, table: &mut Table, chain: usize) -> Result<(), Error> {
    let Some(name) = table.chains.get(chain).map(|chain| chain.name.clone()) else { return Ok(()) };
    for rule in wire::chain_rules(socket, family_number(table.family), &table.name, &name)? {
        add_rule(table, chain, rule);
    }
    Ok(())
}

/// Adds a rule to its chain.
pub(super) fn add_rule(table: &mut Table, chain: usize, rule: wire::Rule) {
    let mut rule = model(table, rule);
    if let Some(chain) = table.chains.get_mut(chain) {
        rule.position = u32::try_from(chain.rules.len() + 1).unwrap_or(u32::MAX);
        chain.rules.push(rule);
    }
}

/// A rule of this table, without its position.
fn model(table: &Table, rule: wire::Rule) -> Rule {
    let mut parts = translate(&rule.expressions, table.family, &table.sets);
    if table.backend == Backend::IptablesNft {
        parts = iptables::convert(parts, table.family == Family::Ip6);
    }
    let comment = rule.comment.map(String::into_boxed_str);
    Rule { handle: Some(rule.handle), position: 0, parts: parts.into(), comment }
}

/// Reads the elements of the sets in rules that POSTROUTING can reach, but for those that were read.
fn read_elements(socket: &mut Socket, table: &mut Table, read: &mut HashSet<Box<str>>) -> Result<(), Error> {
    let mut wanted: Vec<Box<str>> = Vec::new();
    for chain in reachable(table, false, is_postrouting) {
        let rules = table.chains.get(chain).map(|chain| &chain.rules).into_iter().flatten();
        wanted.extend(rules.flat_map(|rule| &rule.parts).filter_map(set_of).map(Box::from));
    }
    for name in wanted {
        if !read.insert(name.clone()) {
            continue;
        }
        let elements = wire::elements(socket, family_number(table.family), &table.name, &name)?;
        if let Some(set) = table.sets.get_mut(&name)
            && elements.len() <= LARGEST_SET
        {
            set.elements = Some(arrange(elements, set.interval));
        }
    }
    Ok(())
}

/// Goes through all rules for those that set marks, and leaves out what does not matter.
fn others(socket: &mut Socket, tables: &mut [Table]) -> Result<(), Error> {
    let mut attempt = 1;
    loop {
        let mut passing = Passing::new(tables);
        let is_of_one_moment = wire::visit_rules(socket, |rule| passing.take(tables, rule))?;
        if is_of_one_moment || attempt == ATTEMPTS_OTHERS {
            if !is_of_one_moment {
                passing.read_again(socket, tables);
            }
            for (table, others) in tables.iter_mut().zip(passing.others) {
                others.finish(table);
            }
            return Ok(());
        }
        attempt += 1;
    }
}

/// Rules as they pass by.
struct Passing {
    others: Vec<Others>,
    /// By table: the chains that were read.
    read: Vec<Vec<bool>>,
    /// The last one's family, table and chain, and their numbers: rules come chain by chain.
    last: Option<(u8, String, String, usize, usize)>,
}

impl Passing {
    fn new(tables: &[Table]) -> Self {
        let read = |table: &Table| {
            let mut read = vec![false; table.chains.len()];
            for chain in reachable(table, false, is_postrouting) {
                if let Some(read) = read.get_mut(chain) {
                    *read = true;
                }
            }
            read
        };
        Self { others: tables.iter().map(Others::new).collect(), read: tables.iter().map(read).collect(), last: None }
    }

    /// Numbers of a rule's table and chain.
    fn place(&mut self, tables: &[Table], rule: &wire::RawRule<'_>) -> Option<(usize, usize)> {
        if let Some((family, table, chain, number, index)) = &self.last
            && (*family, &**table, &**chain) == (rule.family, &*rule.table, &*rule.chain)
        {
            return Some((*number, *index));
        }
        let family = family(rule.family)?;
        let number = tables.iter().position(|table| table.family == family && *table.name == *rule.table)?;
        let index = *tables.get(number)?.by_name.get(&*rule.chain)?;
        self.last = Some((rule.family, rule.table.to_string(), rule.chain.to_string(), number, index));
        Some((number, index))
    }

    fn take(&mut self, tables: &[Table], rule: &wire::RawRule<'_>) {
        let Some((number, chain)) = self.place(tables, rule) else { return };
        let (Some(table), Some(others)) = (tables.get(number), self.others.get_mut(number)) else { return };
        let position = others.next(chain);
        if self.read.get(number).and_then(|read| read.get(chain)) == Some(&true) {
            return;
        }
        let mut may_set_mark = false;
        for expression in rule.named(&["immediate", "lookup", "meta", "target"]) {
            match expression {
                Expression::Immediate { data: Data::Verdict(_, Some(to)), .. } => {
                    if let Some(to) = table.by_name.get(to.as_str()) {
                        others.jump(chain, *to);
                    }
                }
                Expression::Lookup { to: Some(None), .. } => others.jump_by_map(chain),
                Expression::Meta { key: 3, from: Some(_), .. } | Expression::Target(_) => may_set_mark = true,
                _ => {}
            }
        }
        if may_set_mark {
            others.mark(chain, marking(table, rule.decode(), position));
        }
    }

    /// Reads the chains with rules that set marks once more, each by itself: of a dump that was interrupted by a change some
    /// rules are missing, and some came twice, so that the positions are not right either.
    fn read_again(&mut self, socket: &mut Socket, tables: &[Table]) {
        for (table, others) in tables.iter().zip(&mut self.others) {
            for chain in others.take_marked() {
                let Some(name) = table.chains.get(chain).map(|chain| &*chain.name) else { continue };
                match wire::chain_rules(socket, family_number(table.family), &table.name, name) {
                    Ok(rules) => {
                        for (position, rule) in (1..).zip(rules) {
                            others.mark(chain, marking(table, rule, position));
                        }
                    }
                    // It is gone.
                    Err(error) => log::debug!("rules: {error}"),
                }
            }
        }
    }
}

/// A rule, if it gives the mark a value that is in it.
fn marking(table: &Table, rule: wire::Rule, position: u32) -> Option<Rule> {
    let rule = Rule { position, ..model(table, rule) };
    sets_mark(&rule).then_some(rule)
}

/// Elements in order, the ends of intervals put to their beginnings.
pub(super) fn arrange(mut wire: Vec<wire::Element>, interval: bool) -> Vec<Element> {
    let element = |one: &wire::Element, end: Option<Vec<u8>>| Element {
        key: one.key.as_slice().into(),
        end: end.map(Vec::into_boxed_slice),
        verdict: match &one.data {
            Some(Data::Verdict(code, chain)) => verdict(*code, chain.as_ref()),
            Some(Data::Value(_)) | None => None,
        },
        data: match &one.data {
            Some(Data::Value(bytes)) => Some(bytes.as_slice().into()),
            Some(Data::Verdict(..)) | None => None,
        },
    };
    // An end comes before the beginning of what adjoins it.
    wire.sort_by(|one, other| one.key.cmp(&other.key).then(other.ends_interval.cmp(&one.ends_interval)));
    if !interval || wire.iter().any(|one| one.key_end.is_some()) {
        return wire.iter().map(|one| element(one, one.key_end.clone())).collect();
    }
    let mut found = Vec::new();
    for (index, one) in wire.iter().enumerate().filter(|(_, one)| !one.ends_interval) {
        let end = match wire.get(index + 1) {
            Some(next) => before(&next.key),
            None => vec![0xff; one.key.len()],
        };
        found.push(element(one, (!one.key.is_empty()).then_some(end)));
    }
    found
}

/// The number before, bytes as a big-endian number.
fn before(key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    for byte in key.iter_mut().rev() {
        let (less, borrowed) = byte.overflowing_sub(1);
        *byte = less;
        if !borrowed {
            break;
        }
    }
    key
}
