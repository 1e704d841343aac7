//! Which NAT rule a packet reaches: base chains in the order of their priorities, rules in theirs, with three answers to
//! each condition: yes, no, cannot tell. Where it cannot be told, both ways are followed. It never guesses, and it never
//! asks the kernel.
//!
//! The kernel asks NAT chains for the first packet of a connection only, and the first that translates ends it
//! (`nf_nat_inet_fn()`, net/netfilter/nf_nat_core.c); other chains on the same hook see the packet whatever they say.

mod condition;

use std::net::IpAddr;

pub use self::condition::Truth;
use super::{
    ipset::IpSets,
    model::{Act, Base, Chain, Hook, Kind, Part, Rule, RuleId, Ruleset, Table, Test, Value, Verdict},
};

/// Steps of one traversal: more than any ruleset needs, and an end to chains that lead in circles.
const STEPS: usize = 200_000;
/// Ways that are followed for one packet.
const WAYS: usize = 256;
/// Chains that wait for a return.
const DEPTH: usize = 32;
/// Base chains of the same priority that are tried in each order.
const PERMUTED: usize = 4;

/// What is known of a packet; none: not known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Packet {
    /// IPv6.
    pub v6: bool,
    /// Source address.
    pub src: Option<IpAddr>,
    /// Destination address.
    pub dst: Option<IpAddr>,
    /// IP protocol.
    pub protocol: Option<u8>,
    /// Source port, host order.
    pub sport: Option<u16>,
    /// Destination port, host order.
    pub dport: Option<u16>,
    /// `skb->mark`.
    pub mark: Option<u32>,
    /// The device by which it leaves.
    pub out: Option<Device>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// The packet may have been routed to another one, of which this is a part.
    pub below: bool,
}

/// What else rules ask for.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Addresses of this host; none: not known.
    pub addresses: Option<Vec<IpAddr>>,
    /// The sets of ipset.
    pub sets: IpSets,
}

/// Where a packet's way may end.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The rule that translates its source.
    pub nat: Option<RuleId>,
    /// The rule that ended the last NAT chain, if one did.
    pub ended_by: Option<RuleId>,
    /// The mark with which it leaves.
    pub mark: Option<u32>,
    /// A condition on this way was taken to be true that could not be told.
    pub assumed: bool,
    /// Rules on this way of which something could not be told.
    pub unknown: Vec<RuleId>,
}

/// All ends that are possible; an error in words if there are too many.
pub type Outcomes = Result<Vec<Outcome>, &'static str>;

/// Follows a packet through POSTROUTING, from the first NAT chain on.
pub fn postrouting(ruleset: &Ruleset, world: &World, packet: &Packet) -> Outcomes {
    let mut bases = bases(ruleset, packet.v6);
    let first_nat = bases.iter().filter(|base| base.base.kind == Kind::Nat).map(|base| base.base.priority).min();
    let Some(first_nat) = first_nat else { return Ok(Vec::new()) };
    bases.retain(|base| base.base.priority >= first_nat);
    let mut found: Vec<Outcome> = Vec::new();
    for order in orders(bases)? {
        for outcome in (Traversal { ruleset, world, packet, steps: 0 }).all(&order)? {
            if !found.contains(&outcome) {
                found.push(outcome);
            }
        }
    }
    Ok(found)
}

#[derive(Clone, Copy)]
struct BaseChain {
    table: usize,
    chain: usize,
    base: Base,
}

/// The base chains of POSTROUTING that see such packets, by priority. Others than NAT's only if they change marks.
fn bases(ruleset: &Ruleset, v6: bool) -> Vec<BaseChain> {
    let mut found = Vec::new();
    for (number, table) in ruleset.tables.iter().enumerate().filter(|(_, table)| table.family.sees(v6)) {
        for (chain, entry) in table.chains.iter().enumerate() {
            if let Some(base) = entry.base
                && base.hook == Hook::Postrouting
                && !is_idle(table, chain, base.kind)
            {
                found.push(BaseChain { table: number, chain, base });
            }
        }
    }
    found.sort_by_key(|base| base.base.priority);
    found
}

/// Whether a base chain cannot have anything to do with NAT or marks.
fn is_idle(table: &Table, chain: usize, kind: Kind) -> bool {
    let rules = table.chains.get(chain).map(|chain| &chain.rules);
    match kind {
        Kind::Nat => rules.is_none_or(Vec::is_empty),
        Kind::Other => !table.chains.iter().flat_map(|chain| &chain.rules).any(changes_mark),
    }
}

fn changes_mark(rule: &Rule) -> bool {
    rule.parts.iter().any(|part| matches!(part, Part::Act(Act::SetMark { .. } | Act::SetMarkFrom(_) | Act::Unknown(_))))
}

/// The orders in which base chains may be asked: which of those with the same priority comes first depends on which was
/// registered first (`nf_hook_entries_grow()`), which the kernel does not tell.
fn orders(bases: Vec<BaseChain>) -> Result<Vec<Vec<BaseChain>>, &'static str> {
    let mut orders: Vec<Vec<BaseChain>> = vec![Vec::new()];
    for group in bases.chunk_by(|one, other| one.base.priority == other.base.priority) {
        if group.len() > PERMUTED {
            return Err("too many NAT chains have the same priority");
        }
        let mut next = Vec::new();
        for order in &orders {
            for permuted in permutations(group) {
                next.push(order.iter().copied().chain(permuted).collect());
            }
        }
        orders = next;
        if orders.len() > WAYS {
            return Err("too many NAT chains have the same priority");
        }
    }
    Ok(orders)
}

fn permutations(group: &[BaseChain]) -> Vec<Vec<BaseChain>> {
    let Some((first, rest)) = group.split_first() else { return vec![Vec::new()] };
    let mut found = Vec::new();
    for permuted in permutations(rest) {
        for at in 0..=permuted.len() {
            let mut one = permuted.clone();
            one.insert(at, *first);
            found.push(one);
        }
    }
    found
}

/// A way through the rules so far.
#[derive(Clone, Default)]
struct Way {
    nat: Option<RuleId>,
    ended_by: Option<RuleId>,
    mark: Option<u32>,
    assumed: bool,
    unknown: Vec<RuleId>,
}

/// A way, and where it is: chain, rule, part, and the chains that wait for a return.
#[derive(Clone)]
struct At {
    way: Way,
    chain: usize,
    rule: usize,
    part: usize,
    stack: Vec<(usize, usize)>,
}

struct Traversal<'a> {
    ruleset: &'a Ruleset,
    world: &'a World,
    packet: &'a Packet,
    steps: usize,
}

/// What a part of a rule does to a way.
enum Step {
    /// On to the next part.
    On,
    /// On to the next rule.
    Next,
    /// It cannot be told which.
    Either,
    /// To a chain, with or without return.
    To(usize, bool),
    /// Back to the calling chain.
    Return,
    /// The base chain has nothing more to say.
    End,
    /// The packet goes no further.
    Gone,
    /// To one of several ends, or on to the next rule.
    Any(Vec<Verdict>),
    /// Any of these, or it translates the source.
    Anything,
}

impl Traversal<'_> {
    fn all(&mut self, order: &[BaseChain]) -> Outcomes {
        let mut ways = vec![Way { mark: self.packet.mark, ..Way::default() }];
        for base in order {
            let mut next = Vec::new();
            for way in ways {
                if base.base.kind == Kind::Nat && way.nat.is_some() {
                    next.push(way);
                } else {
                    self.base(*base, way, &mut next)?;
                }
            }
            ways = next;
            if ways.len() > WAYS {
                return Err("too much cannot be told");
            }
        }
        let outcome = |way: Way| Outcome {
            nat: way.nat,
            ended_by: way.ended_by,
            mark: way.mark,
            assumed: way.assumed,
            unknown: way.unknown,
        };
        Ok(ways.into_iter().map(outcome).collect())
    }

    fn base(&mut self, base: BaseChain, way: Way, ends: &mut Vec<Way>) -> Result<(), &'static str> {
        let Some(table) = self.ruleset.tables.get(base.table) else { return Ok(()) };
        let mut open = vec![At { way, chain: base.chain, rule: 0, part: 0, stack: Vec::new() }];
        while let Some(mut at) = open.pop() {
            loop {
                self.steps += 1;
                if self.steps > STEPS || open.len() + ends.len() > WAYS {
                    return Err("too much cannot be told");
                }
                let Some(rule) = table.chains.get(at.chain).and_then(|chain: &Chain| chain.rules.get(at.rule)) else {
                    if back(&mut at) {
                        continue;
                    }
                    if !base.base.drops {
                        ends.push(at.way);
                    }
                    break;
                };
                let Some(part) = rule.parts.get(at.part) else {
                    (at.rule, at.part) = (at.rule + 1, 0);
                    continue;
                };
                let id = RuleId { table: base.table, chain: at.chain, rule: at.rule };
                at.part += 1;
                match self.part(table, part, &mut at.way, id) {
                    Step::On => {}
                    Step::Next => (at.rule, at.part) = (at.rule + 1, 0),
                    Step::Either => {
                        note(&mut at.way, id);
                        let mut other = at.clone();
                        (other.rule, other.part) = (other.rule + 1, 0);
                        open.push(other);
                        at.way.assumed = true;
                    }
                    Step::To(chain, returns) => go(&mut at, chain, returns)?,
                    Step::Return => {
                        if !back(&mut at) {
                            at.way.ended_by = Some(id);
                            if !base.base.drops {
                                ends.push(at.way);
                            }
                            break;
                        }
                    }
                    Step::End => {
                        at.way.ended_by = Some(id);
                        ends.push(at.way);
                        break;
                    }
                    Step::Gone => break,
                    Step::Any(verdicts) => {
                        note(&mut at.way, id);
                        for verdict in &verdicts {
                            branch(table, &at, verdict, id, &mut open, ends)?;
                        }
                        (at.rule, at.part) = (at.rule + 1, 0);
                    }
                    Step::Anything => {
                        note(&mut at.way, id);
                        for verdict in [Verdict::Accept, Verdict::Return] {
                            branch(table, &at, &verdict, id, &mut open, ends)?;
                        }
                        if base.base.kind == Kind::Nat {
                            ends.push(Way { nat: Some(id), assumed: true, ..at.way.clone() });
                        }
                        (at.rule, at.part) = (at.rule + 1, 0);
                    }
                }
            }
        }
        Ok(())
    }

    fn part(&self, table: &Table, part: &Part, way: &mut Way, id: RuleId) -> Step {
        match part {
            Part::Test(test) => match self.test(table, test, way.mark) {
                Truth::Yes => Step::On,
                Truth::No => Step::Next,
                Truth::Unknown => Step::Either,
            },
            Part::Act(act) => self.act(table, act, way, id),
        }
    }

    fn test(&self, table: &Table, test: &Test, mark: Option<u32>) -> Truth {
        condition::holds(test, table, self.packet, mark, self.world)
    }

    fn act(&self, table: &Table, act: &Act, way: &mut Way, id: RuleId) -> Step {
        match act {
            Act::Verdict(verdict) => step(table, verdict),
            Act::VerdictMap { key, map } => self.verdict_map(table, key, map, way.mark),
            Act::SetMark { and, xor } => {
                way.mark = way.mark.map(|mark| (mark & and) ^ xor).or((*and == 0).then_some(*xor));
                Step::On
            }
            Act::SetMarkFrom(_) => {
                way.mark = None;
                Step::On
            }
            Act::Nat(nat) => {
                if nat.is_source() {
                    way.nat = Some(id);
                }
                Step::End
            }
            Act::Nothing(_) => Step::On,
            Act::Unknown(_) => {
                way.mark = None;
                Step::Anything
            }
        }
    }

    fn verdict_map(&self, table: &Table, key: &[Value], map: &str, mark: Option<u32>) -> Step {
        let elements = table.sets.get(map).and_then(|set| set.elements.as_ref());
        let Some(elements) = elements else { return Step::Anything };
        match condition::find(key, elements, self.packet, mark, self.world) {
            Ok(Some(element)) => element.verdict.as_ref().map_or(Step::Next, |verdict| step(table, verdict)),
            Ok(None) => Step::Next,
            Err(()) => {
                let mut verdicts: Vec<Verdict> = Vec::new();
                for verdict in elements.iter().filter_map(|element| element.verdict.as_ref()) {
                    if !verdicts.contains(verdict) {
                        verdicts.push(verdict.clone());
                    }
                }
                Step::Any(verdicts)
            }
        }
    }
}

/// The way of a verdict.
fn step(table: &Table, verdict: &Verdict) -> Step {
    match verdict {
        // What is queued comes back accepted, or not at all.
        Verdict::Accept | Verdict::Queue => Step::End,
        Verdict::Drop | Verdict::Reject => Step::Gone,
        Verdict::Return => Step::Return,
        Verdict::Continue => Step::Next,
        Verdict::Jump(chain) => table.by_name.get(chain).map_or(Step::Next, |chain| Step::To(*chain, true)),
        Verdict::Goto(chain) => table.by_name.get(chain).map_or(Step::Next, |chain| Step::To(*chain, false)),
    }
}

/// A way that goes on as if this were the verdict.
fn branch(
    table: &Table,
    at: &At,
    verdict: &Verdict,
    id: RuleId,
    open: &mut Vec<At>,
    ends: &mut Vec<Way>,
) -> Result<(), &'static str> {
    let mut other = at.clone();
    other.way.assumed = true;
    match step(table, verdict) {
        Step::To(chain, returns) => {
            go(&mut other, chain, returns)?;
            open.push(other);
        }
        Step::Return if back(&mut other) => open.push(other),
        Step::Return | Step::End => {
            other.way.ended_by = Some(id);
            ends.push(other.way);
        }
        Step::On | Step::Next | Step::Either | Step::Any(_) | Step::Anything | Step::Gone => {}
    }
    Ok(())
}

fn note(way: &mut Way, id: RuleId) {
    if !way.unknown.contains(&id) {
        way.unknown.push(id);
    }
}

fn go(at: &mut At, chain: usize, returns: bool) -> Result<(), &'static str> {
    if returns {
        at.stack.push((at.chain, at.rule + 1));
    }
    if at.stack.len() > DEPTH {
        return Err("chains are nested too deeply");
    }
    (at.chain, at.rule, at.part) = (chain, 0, 0);
    Ok(())
}

/// To the calling chain; false if there is none.
fn back(at: &mut At) -> bool {
    match at.stack.pop() {
        Some((chain, rule)) => {
            (at.chain, at.rule, at.part) = (chain, rule, 0);
            true
        }
        None => false,
    }
}
