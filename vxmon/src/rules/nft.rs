//! nftables to the model: chains of registers become conditions on values. What is in the tables of iptables-nft becomes
//! iptables' own conditions. It never asks the kernel more than [`crate::netlink::nftables`] does.

mod iptables;
mod read;

use std::collections::HashMap;

pub use self::read::read;
use super::{
    model::{Act, Change, Family, Nat, NatKind, Op, Part, Set, Side, Source, Test, Value, Verdict},
    xt,
};
use crate::netlink::nftables::expression::{Data, Expression};

/// `NFPROTO_*`, include/uapi/linux/netfilter.h.
const fn family(number: u8) -> Option<Family> {
    match number {
        1 => Some(Family::Inet),
        2 => Some(Family::Ip),
        10 => Some(Family::Ip6),
        _ => None,
    }
}

pub(super) const fn family_number(family: Family) -> u8 {
    match family {
        Family::Inet => 1,
        Family::Ip => 2,
        Family::Ip6 => 10,
    }
}

/// `NFT_*` and `NF_*`.
fn verdict(code: i32, chain: Option<&String>) -> Option<Verdict> {
    Some(match (code, chain) {
        (0, _) => Verdict::Drop,
        (1, _) => Verdict::Accept,
        (-1 | -2, _) => Verdict::Continue,
        (-3, Some(chain)) => Verdict::Jump(chain.as_str().into()),
        (-4, Some(chain)) => Verdict::Goto(chain.as_str().into()),
        (-5, _) => Verdict::Return,
        // The queue's number is in the upper half.
        (code, _) if code & 0xff == 3 => Verdict::Queue,
        _ => return None,
    })
}

/// What the registers hold, by the 4 bytes where it begins.
#[derive(Default)]
struct Registers(HashMap<usize, Value>);

impl Registers {
    fn load(&mut self, at: usize, value: Value) {
        let end = at + words(&value);
        self.0.retain(|begin, held| *begin >= end || begin + words(held) <= at);
        self.0.insert(at, value);
    }

    fn get(&self, at: usize) -> Value {
        self.0.get(&at).cloned().unwrap_or_else(|| plain(Source::Other("a register".into()), 4))
    }

    /// The fields of a key of so many bytes, of which each begins a new register.
    fn key(&self, at: usize, len: usize) -> Box<[Value]> {
        let (mut found, mut next) = (Vec::new(), at);
        while next < at + len.div_ceil(4).max(1) {
            let value = self.get(next);
            next += words(&value);
            found.push(value);
        }
        found.into()
    }

    fn constant(&self, at: usize) -> Option<Box<[u8]>> {
        match self.0.get(&at) {
            Some(Value { source: Source::Constant(bytes), changes, .. }) if changes.is_empty() => Some(bytes.clone()),
            Some(_) | None => None,
        }
    }
}

/// How many registers of 4 bytes a value takes.
fn words(value: &Value) -> usize {
    usize::from(value.len).div_ceil(4).max(1)
}

fn plain(source: Source, len: u8) -> Value {
    Value { source, len, changes: Box::new([]) }
}

fn changed(mut value: Value, change: Change) -> Value {
    let mut changes = value.changes.into_vec();
    changes.push(change);
    value.changes = changes.into();
    value
}

/// The parts of a rule.
fn translate(expressions: &[Expression], family: Family, sets: &HashMap<Box<str>, Set>) -> Vec<Part> {
    let mut registers = Registers::default();
    expressions.iter().filter_map(|expression| part(expression, &mut registers, family, sets)).collect()
}

fn part(
    expression: &Expression,
    registers: &mut Registers,
    family: Family,
    sets: &HashMap<Box<str>, Set>,
) -> Option<Part> {
    match expression {
        Expression::Meta { key, to: Some(to), .. } => load(registers, *to, meta(*key)),
        Expression::Ct { key, to: Some(to), .. } => load(registers, *to, ct(*key)),
        Expression::Payload { base, offset, len, to: Some(to) } => load(registers, *to, payload(*base, *offset, *len)),
        Expression::Fib { to, result, flags } => load(registers, *to, fib(*result, *flags)),
        Expression::Load { name, to } => load(registers, *to, plain(Source::Other(name.as_str().into()), 4)),
        Expression::Immediate { to: Some(to), data: Data::Value(bytes) } => {
            let len = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
            load(registers, *to, plain(Source::Constant(bytes.as_slice().into()), len))
        }
        Expression::Bitwise { from, to, bits, .. } => {
            let change = match bits {
                Some((and, xor)) => Change::Bits { and: and.as_slice().into(), xor: xor.as_slice().into() },
                None => Change::Unknown,
            };
            let value = changed(registers.get(*from), change);
            load(registers, *to, value)
        }
        Expression::Byteorder { from, to, size } => {
            let value = changed(registers.get(*from), Change::Swap(u8::try_from(*size).unwrap_or(0)));
            load(registers, *to, value)
        }
        Expression::Compare { from, op, with } => Some(Part::Test(compare(registers.get(*from), *op, with))),
        Expression::Range { from, invert, least, most } => Some(Part::Test(Test::Range {
            value: registers.get(*from),
            from: least.as_slice().into(),
            to: most.as_slice().into(),
            invert: *invert,
        })),
        Expression::Lookup { set, from, to, invert } => {
            let len = sets.get(set.as_str()).map_or(4, |set| set.key_len);
            let key = registers.key(*from, len);
            lookup(registers, key, set, *to, *invert)
        }
        Expression::Immediate { data: Data::Verdict(code, chain), .. } => Some(Part::Act(
            verdict(*code, chain.as_ref()).map_or_else(|| Act::Unknown(format!("verdict {code}").into()), Act::Verdict),
        )),
        Expression::Immediate { to: None, data: Data::Value(_) } => Some(Part::Act(Act::Unknown("immediate".into()))),
        _ => Some(act(expression, registers, family)),
    }
}

fn load(registers: &mut Registers, to: usize, value: Value) -> Option<Part> {
    registers.load(to, value);
    None
}

fn act(expression: &Expression, registers: &Registers, family: Family) -> Part {
    let act = match expression {
        Expression::Meta { key: 3, from: Some(from), .. } => set_mark(&registers.get(*from)),
        Expression::Ct { key: 3, from: Some(_), .. } => Act::Nothing("ct mark set …".into()),
        Expression::Nat { kind, family, addresses, ports, flags } => {
            nat(registers, *kind, *family, *addresses, *ports, *flags)
        }
        Expression::Masquerade { redirect, ports, flags } => Act::Nat(Nat {
            kind: if *redirect { NatKind::Redirect } else { NatKind::Masquerade },
            flags: *flags,
            addresses: None,
            ports: ports.and_then(|(least, most)| port(registers, least).zip(port(registers, most))),
            dynamic: None,
        }),
        Expression::Match(xt) => return Part::Test(xt::test(&xt.name, xt.revision, &xt.info)),
        Expression::Target(xt) => match &*xt.name {
            // With the arptables and ebtables verdicts aside, compat has these as immediates.
            "" => Act::Unknown("standard target".into()),
            name => xt::act(name, xt.revision, &xt.info, family == Family::Ip6),
        },
        Expression::Other { name } => return other(name),
        // Writing to the packet, to priority, and so on.
        Expression::Meta { .. } | Expression::Ct { .. } | Expression::Payload { .. } => Act::Nothing("set …".into()),
        _ => Act::Unknown("expression".into()),
    };
    Part::Act(act)
}

/// Statements that load no register. A limit breaks off the rule when it is exceeded.
fn other(name: &str) -> Part {
    match name {
        "counter" | "log" | "notrack" | "dynset" | "dup" | "last" | "objref" | "flow_offload" | "secmark" => {
            Part::Act(Act::Nothing(name.into()))
        }
        "limit" | "quota" | "connlimit" => Part::Test(Test::Chance(name.into())),
        "reject" => Part::Act(Act::Verdict(Verdict::Reject)),
        "queue" => Part::Act(Act::Verdict(Verdict::Queue)),
        // Whatever it is: it may break off the rule, and it may end the traversal.
        name => Part::Act(Act::Unknown(name.into())),
    }
}

fn meta(key: u32) -> Value {
    let (source, len) = match key {
        1 => (Source::Protocol, 2),
        3 => (Source::Mark, 4),
        4 => (Source::DeviceIndex(Side::Source), 4),
        5 => (Source::DeviceIndex(Side::Destination), 4),
        6 => (Source::DeviceName(Side::Source), 16),
        7 => (Source::DeviceName(Side::Destination), 16),
        15 => (Source::NfProto, 1),
        16 => (Source::L4Proto, 1),
        10 => (Source::Other("meta skuid".into()), 4),
        11 => (Source::Other("meta skgid".into()), 4),
        0 => (Source::Other("meta length".into()), 4),
        19 => (Source::Other("meta pkttype".into()), 1),
        23 => (Source::Other("meta cgroup".into()), 4),
        24 => (Source::Other("meta random".into()), 4),
        key => (Source::Other(format!("meta key {key}").into()), 4),
    };
    plain(source, len)
}

fn ct(key: u32) -> Value {
    let (source, len) = match key {
        0 => (Source::CtState, 4),
        3 => (Source::CtMark, 4),
        1 => (Source::Other("ct direction".into()), 1),
        2 => (Source::Other("ct status".into()), 4),
        key => (Source::Other(format!("ct key {key}").into()), 4),
    };
    plain(source, len)
}

fn payload(base: u32, offset: u32, len: u32) -> Value {
    let len = u8::try_from(len).unwrap_or(u8::MAX);
    match base {
        1 | 2 => plain(Source::Payload { transport: base == 2, offset }, len),
        base => plain(Source::Other(format!("payload base {base} offset {offset}").into()), len),
    }
}

/// `NFT_FIB_RESULT_ADDRTYPE` is 3; flags: source, destination, mark, iif, oif.
fn fib(result: u32, flags: u32) -> Value {
    let side = match flags & 3 {
        1 => Some(Side::Source),
        2 => Some(Side::Destination),
        _ => None,
    };
    let device = match flags & 0x18 {
        8 => Some(Side::Source),
        0x10 => Some(Side::Destination),
        _ => None,
    };
    match side {
        Some(side) if result == 3 && flags & !0x1b == 0 => plain(Source::AddrType { side, device }, 4),
        _ => plain(Source::Other("fib".into()), 4),
    }
}

fn compare(value: Value, op: u32, with: &[u8]) -> Test {
    let op = match op {
        0 => Op::Eq,
        1 => Op::Ne,
        2 => Op::Lt,
        3 => Op::Le,
        4 => Op::Gt,
        5 => Op::Ge,
        op => return Test::Unknown(format!("cmp operation {op}").into()),
    };
    Test::Compare { value, op, with: with.into() }
}

fn lookup(
    registers: &mut Registers,
    key: Box<[Value]>,
    set: &str,
    to: Option<Option<usize>>,
    invert: bool,
) -> Option<Part> {
    match to {
        None => Some(Part::Test(Test::Lookup { key, set: set.into(), invert })),
        Some(None) => Some(Part::Act(Act::VerdictMap { key, map: set.into() })),
        // The rule goes on only if there is an element.
        Some(Some(to)) => {
            registers.load(to, plain(Source::Other(format!("map @{set}").into()), 4));
            Some(Part::Test(Test::Lookup { key, set: set.into(), invert: false }))
        }
    }
}

/// `meta mark set`: of the mark itself, of a constant, or of something else.
fn set_mark(value: &Value) -> Act {
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_ne_bytes);
    match (&value.source, &*value.changes) {
        (Source::Constant(bytes), []) => match word(bytes) {
            Some(xor) => Act::SetMark { and: 0, xor },
            None => Act::SetMarkFrom("meta mark set …".into()),
        },
        (Source::Mark, changes) => {
            let (mut and, mut xor) = (u32::MAX, 0);
            for change in changes {
                let bits = match change {
                    Change::Bits { and, xor } => word(and).zip(word(xor)),
                    Change::Swap(_) | Change::Unknown => None,
                };
                let Some((more_and, more_xor)) = bits else { return Act::SetMarkFrom("meta mark set …".into()) };
                and &= more_and;
                xor = (xor & more_and) ^ more_xor;
            }
            Act::SetMark { and, xor }
        }
        (Source::CtMark, []) => Act::SetMarkFrom("meta mark set ct mark".into()),
        _ => Act::SetMarkFrom("meta mark set …".into()),
    }
}

fn port(registers: &Registers, at: usize) -> Option<u16> {
    registers.constant(at)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn nat(
    registers: &Registers,
    kind: u32,
    family: u32,
    addresses: Option<(usize, usize)>,
    ports: Option<(usize, usize)>,
    flags: u32,
) -> Act {
    let address = |at: usize| {
        let bytes = registers.constant(at)?;
        let fields = xt::Fields(&bytes);
        if family == 10 { fields.v6(0) } else { fields.v4(0) }
    };
    let known = addresses.and_then(|(least, most)| address(least).zip(address(most)));
    Act::Nat(Nat {
        kind: if kind == 0 { NatKind::Snat } else { NatKind::Dnat },
        flags,
        addresses: known,
        ports: ports.and_then(|(least, most)| port(registers, least).zip(port(registers, most))),
        dynamic: (known.is_none() && addresses.is_some()).then(|| "…".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::{
        read::{add_rule, arrange},
        *,
    };
    use crate::{
        netlink::{attribute::golden as bytes, nftables as wire},
        rules::{
            model::{Backend, Table},
            render,
        },
    };

    /// Rules as the tools print them, and their messages.
    fn golden(text: &str) -> Vec<(&str, wire::Rule)> {
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        lines.chunks_exact(2).map(|pair| (pair[0], wire::decode_golden(&bytes(pair[1])).unwrap())).collect()
    }

    fn rendered(backend: Backend, rule: wire::Rule) -> String {
        let mut table = Table::new(backend, family(rule.family).unwrap(), &rule.table);
        let index = table.chain(&rule.chain);
        add_rule(&mut table, index, rule);
        let chain = &table.chains[index];
        render::rule(&table, chain, &chain.rules[0])
    }

    #[test]
    fn native_rules_are_what_nft_prints() {
        let mut sets = 0;
        for (text, rule) in golden(include_str!("golden/nft.txt")) {
            // The lengths of their keys come with the sets.
            if text.contains(" . ") {
                sets += 1;
                continue;
            }
            assert_eq!(rendered(Backend::Nftables, rule), text);
        }
        assert_eq!(sets, 5);
    }

    #[test]
    fn rules_of_iptables_nft_are_what_it_prints() {
        for (text, rule) in golden(include_str!("golden/iptables-nft.txt")) {
            assert_eq!(rendered(Backend::IptablesNft, rule), text);
        }
    }

    /// Each expression that is known, or known not to matter: the command that made it, the rule, and its message.
    #[test]
    fn each_expression_is_read() {
        for (backend, text) in [
            (Backend::Nftables, include_str!("golden/expressions.txt")),
            (Backend::IptablesNft, include_str!("golden/xtables.txt")),
        ] {
            let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
            for rule in lines.chunks_exact(3) {
                let message = wire::decode_golden(&bytes(rule[2])).unwrap();
                assert_eq!(rendered(backend, message), rule[1], "{}", rule[0]);
            }
        }
    }

    /// Bytes changed anywhere: read as something, or left out.
    #[test]
    fn a_changed_message_is_read_or_left_out() {
        let text = include_str!("golden/iptables-nft.txt");
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        for pair in lines.chunks_exact(2) {
            let message = bytes(pair[1]);
            for at in 0..message.len() {
                for byte in [0, 1, 0x7f, 0xff] {
                    let mut changed = message.clone();
                    changed[at] = byte;
                    if let Some(rule) = wire::decode_golden(&changed)
                        && family(rule.family).is_some()
                    {
                        let _ = rendered(Backend::IptablesNft, rule);
                    }
                }
            }
        }
    }

    #[test]
    fn ends_of_intervals_are_put_to_their_beginnings() {
        let element =
            |key: &[u8], ends_interval| wire::Element { key: key.into(), key_end: None, ends_interval, data: None };
        // As the kernel dumps { 10.1.0.0/16, 10.3.0.1-10.3.0.9 }: backwards, and with an end at the very beginning.
        let wire = vec![
            element(&[10, 3, 0, 10], true),
            element(&[10, 3, 0, 1], false),
            element(&[10, 2, 0, 0], true),
            element(&[10, 1, 0, 0], false),
            element(&[0, 0, 0, 0], true),
        ];
        let arranged: Vec<_> = arrange(wire, true).into_iter().map(|one| (one.key, one.end.unwrap())).collect();
        assert_eq!(
            arranged,
            [([10, 1, 0, 0].into(), [10, 1, 255, 255].into()), ([10, 3, 0, 1].into(), [10, 3, 0, 9].into())]
        );
    }
}
