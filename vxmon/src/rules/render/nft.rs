//! Native rules in nft's words.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use super::super::model::{
    Act, Change, Element, Family, NatKind, Op, PERSISTENT, Part, RANDOM, RANDOM_FULLY, Rule, Side, Source, Table, Test,
    Value, Verdict,
};

/// `RTN_*` by number.
pub(super) const TYPES: [&str; 12] = [
    "unspec",
    "unicast",
    "local",
    "broadcast",
    "anycast",
    "multicast",
    "blackhole",
    "unreachable",
    "prohibit",
    "throw",
    "nat",
    "xresolve",
];

/// A rule.
pub(super) fn rule(table: &Table, rule: &Rule) -> String {
    let mut context = Context { table, family: table.family, protocol: None };
    let mut words: Vec<String> = Vec::new();
    let mut parts = rule.parts.iter().enumerate().peekable();
    while let Some((index, part)) = parts.next() {
        let rest = rule.parts.get(index + 1..).unwrap_or_default();
        match part {
            Part::Test(Test::Compare { value, op: Op::Eq, with }) if context.is_implied(value, with, rest) => {}
            // Two halves of a range.
            Part::Test(Test::Compare { value, op: Op::Ge, with }) => match parts.peek() {
                Some((_, Part::Test(Test::Compare { value: other, op: Op::Le, with: to }))) if other == value => {
                    let range = format!("{}-{}", context.constant(value, with), context.constant(value, to));
                    words.push(format!("{} {range}", context.value(value)));
                    parts.next();
                }
                _ => words.push(context.comparison(value, Op::Ge, with)),
            },
            Part::Test(one) => words.push(context.test(one)),
            Part::Act(act) => words.push(context.act(act)),
        }
    }
    if let Some(comment) = &rule.comment {
        words.push(format!("comment \"{comment}\""));
    }
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// A condition by itself.
pub(super) fn test(table: &Table, test: &Test) -> String {
    Context { table, family: table.family, protocol: None }.test(test)
}

/// What the conditions so far say of the packet.
struct Context<'a> {
    table: &'a Table,
    family: Family,
    protocol: Option<u8>,
}

impl Context<'_> {
    /// Whether nft leaves a condition out because what follows says as much: `ip saddr` in an inet table, `tcp dport`.
    fn is_implied(&mut self, value: &Value, with: &[u8], rest: &[Part]) -> bool {
        let payload = |transport: bool| {
            rest.iter().any(|part| match part {
                Part::Test(Test::Compare { value, .. } | Test::Range { value, .. }) => is_payload(value, transport),
                Part::Test(Test::Lookup { key, .. }) | Part::Act(Act::VerdictMap { key, .. }) => {
                    key.iter().any(|value| is_payload(value, transport))
                }
                Part::Test(_) | Part::Act(_) => false,
            })
        };
        match (&value.source, with) {
            (Source::L4Proto, [number]) => {
                self.protocol = Some(*number);
                payload(true) && matches!(number, 6 | 17 | 132 | 33 | 136)
            }
            (Source::NfProto, [number]) => {
                self.family = if *number == 10 { Family::Ip6 } else { Family::Ip };
                let nat = rest.iter().any(
                    |part| matches!(part, Part::Act(Act::Nat(nat)) if nat.addresses.is_some() || nat.dynamic.is_some()),
                );
                payload(false) || nat
            }
            _ => false,
        }
    }

    fn test(&self, test: &Test) -> String {
        match test {
            Test::Compare { value, op, with } => self.comparison(value, *op, with),
            Test::Range { value, from, to, invert } => {
                let not = if *invert { "!= " } else { "" };
                format!("{} {not}{}-{}", self.value(value), self.constant(value, from), self.constant(value, to))
            }
            Test::Lookup { key, set, invert } => {
                let not = if *invert { "!= " } else { "" };
                format!("{} {not}{}", self.key(key), self.set(key, set))
            }
            Test::Chance(name) => name.to_string(),
            Test::Unknown(name) => format!("[{name}: not known to vxmon]"),
            other => format!("xt [{}]", super::iptables_test(self.table, other)),
        }
    }

    fn comparison(&self, value: &Value, op: Op, with: &[u8]) -> String {
        // `ct state new` is asked as `ct state & new != 0`.
        if let (Source::CtState, Op::Ne, [Change::Bits { and, .. }], [0, 0, 0, 0]) =
            (&value.source, op, &*value.changes, with)
        {
            return format!("{} {}", self.name(value), self.constant(value, and));
        }
        let masked = value.changes.iter().any(|change| matches!(change, Change::Bits { .. }));
        // An address under the mask of a prefix.
        if let (Some(text), Op::Eq | Op::Ne) = (self.network(value, with), op) {
            let not = if op == Op::Ne { "!= " } else { "" };
            return format!("{} {not}{text}", self.name(value));
        }
        let sign = match op {
            Op::Eq if masked => "== ",
            Op::Eq => "",
            Op::Ne => "!= ",
            Op::Lt => "< ",
            Op::Le => "<= ",
            Op::Gt => "> ",
            Op::Ge => ">= ",
        };
        format!("{} {sign}{}", self.value(value), self.constant(value, with))
    }

    /// A value with what is made of it.
    fn value(&self, value: &Value) -> String {
        let mut text = self.name(value);
        for change in &value.changes {
            if let Change::Bits { and, xor } = change {
                if and.iter().any(|byte| *byte != 0xff) {
                    let _ = write!(text, " & {}", self.constant(value, and));
                }
                if xor.iter().any(|byte| *byte != 0) {
                    let _ = write!(text, " ^ {}", self.constant(value, xor));
                }
            }
        }
        text
    }

    fn key(&self, key: &[Value]) -> String {
        let fields: Vec<String> = key.iter().map(|value| self.value(value)).collect();
        fields.join(" . ")
    }

    /// A set by its name, or by its elements.
    fn set(&self, key: &[Value], name: &str) -> String {
        match self.table.sets.get(name) {
            Some(set) if set.anonymous => match &set.elements {
                Some(elements) => {
                    let all: Vec<String> = elements.iter().map(|element| self.element(key, element)).collect();
                    format!("{{ {} }}", all.join(", "))
                }
                None => "{ … }".to_owned(),
            },
            _ => format!("@{name}"),
        }
    }

    fn element(&self, key: &[Value], element: &Element) -> String {
        let mut text = match (key, &element.end) {
            _ if element.key.is_empty() => "*".to_owned(),
            ([one], Some(end)) if **end != *element.key => match prefix_of(&element.key, end) {
                Some(prefix) if is_address(one) => format!("{}/{prefix}", self.constant(one, &element.key)),
                _ => format!("{}-{}", self.constant(one, &element.key), self.constant(one, end)),
            },
            ([one], _) => self.constant(one, &element.key),
            _ => {
                let mut at = 0;
                let fields = key.iter().map(|value| {
                    let len = usize::from(value.len);
                    let field = element.key.get(at..at + len).unwrap_or_default();
                    at += len.next_multiple_of(4);
                    self.constant(value, field)
                });
                fields.collect::<Vec<_>>().join(" . ")
            }
        };
        if let Some(verdict) = &element.verdict {
            let _ = write!(text, " : {}", self::verdict(verdict));
        }
        text
    }

    fn name(&self, value: &Value) -> String {
        match &value.source {
            Source::Mark => "meta mark".to_owned(),
            Source::DeviceIndex(Side::Source) => "iif".to_owned(),
            Source::DeviceIndex(_) => "oif".to_owned(),
            Source::DeviceName(Side::Source) => "iifname".to_owned(),
            Source::DeviceName(_) => "oifname".to_owned(),
            Source::L4Proto => "meta l4proto".to_owned(),
            Source::NfProto => "meta nfproto".to_owned(),
            Source::Protocol => "meta protocol".to_owned(),
            Source::CtMark => "ct mark".to_owned(),
            Source::CtState => "ct state".to_owned(),
            Source::AddrType { side, device } => {
                let device = match device {
                    None => "",
                    Some(Side::Source) => " . iif",
                    Some(_) => " . oif",
                };
                format!("fib {}{device} type", if *side == Side::Source { "saddr" } else { "daddr" })
            }
            Source::Payload { transport, offset } => self.field(*transport, *offset),
            Source::Constant(bytes) => hex(bytes),
            Source::Other(name) => name.to_string(),
        }
    }

    fn field(&self, transport: bool, offset: u32) -> String {
        if transport {
            let protocol = self.protocol.and_then(super::protocol_name).unwrap_or("th");
            return match offset {
                0 => format!("{protocol} sport"),
                2 => format!("{protocol} dport"),
                offset => format!("@th,{}", u64::from(offset) * 8),
            };
        }
        let known = match (self.family, offset) {
            (Family::Ip | Family::Inet, 12) => Some("ip saddr"),
            (Family::Ip | Family::Inet, 16) => Some("ip daddr"),
            (Family::Ip | Family::Inet, 9) => Some("ip protocol"),
            (Family::Ip6, 8) => Some("ip6 saddr"),
            (Family::Ip6, 24) => Some("ip6 daddr"),
            (Family::Ip6, 6) => Some("ip6 nexthdr"),
            _ => None,
        };
        known.map_or_else(|| format!("@nh,{}", u64::from(offset) * 8), str::to_owned)
    }

    /// An address or network, where the value is one, as the kernel compares it: only its first bytes, or under a mask.
    fn network(&self, value: &Value, with: &[u8]) -> Option<String> {
        if !is_address(value) {
            return None;
        }
        let (width, mut bits) = if self.family == Family::Ip6 { (16, 0) } else { (4, 0) };
        match &*value.changes {
            [] => bits += 8 * with.len(),
            [Change::Bits { and, xor }] if xor.iter().all(|byte| *byte == 0) => {
                bits += and.iter().map(|byte| byte.leading_ones() as usize).take_while(|ones| *ones > 0).sum::<usize>();
                if and.iter().map(|byte| byte.count_ones() as usize).sum::<usize>() != bits {
                    return None;
                }
            }
            _ => return None,
        }
        let mut address = with.to_vec();
        address.resize(width, 0);
        let text = self.constant(value, &address);
        Some(if bits == 8 * width { text } else { format!("{text}/{bits}") })
    }

    /// A constant in the words of the value that it is compared with.
    fn constant(&self, value: &Value, bytes: &[u8]) -> String {
        let word = || bytes.try_into().ok().map(u32::from_ne_bytes);
        let swapped = value.changes.iter().any(|change| matches!(change, Change::Swap(_)));
        match &value.source {
            Source::Mark | Source::CtMark => {
                let word = word().map(|word| if swapped { word.swap_bytes() } else { word });
                word.map_or_else(|| hex(bytes), |word| format!("{word:#010x}"))
            }
            Source::DeviceName(_) => {
                let end = bytes.iter().position(|byte| *byte == 0);
                let name = String::from_utf8_lossy(bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default());
                format!("\"{name}{}\"", if end.is_none() && bytes.len() < 16 { "*" } else { "" })
            }
            Source::DeviceIndex(_) => word().map_or_else(|| hex(bytes), |index| index.to_string()),
            Source::L4Proto => bytes.first().map_or_else(String::new, |number| super::protocol(*number)),
            Source::Payload { transport: false, offset: 9 | 6 } if bytes.len() == 1 => {
                bytes.first().map_or_else(String::new, |number| super::protocol(*number))
            }
            Source::NfProto => if bytes == [10] { "ipv6" } else { "ipv4" }.to_owned(),
            Source::AddrType { .. } => {
                let name = word().and_then(|kind| TYPES.get(usize::try_from(kind).ok()?));
                name.map_or_else(|| hex(bytes), |name| (*name).to_owned())
            }
            Source::CtState => word().map_or_else(|| hex(bytes), ct_states),
            Source::Payload { .. } => match bytes {
                [a, b] => u16::from_be_bytes([*a, *b]).to_string(),
                [a, b, c, d] => Ipv4Addr::new(*a, *b, *c, *d).to_string(),
                _ => match <[u8; 16]>::try_from(bytes) {
                    Ok(octets) => Ipv6Addr::from(octets).to_string(),
                    Err(_) => hex(bytes),
                },
            },
            // Of these the kernel has a number in host order, unless a rule turns it round.
            Source::Other(name) if IN_HOST_ORDER.iter().any(|start| name.starts_with(start)) => match word() {
                Some(word) => format!("{:#x}", if swapped { word.swap_bytes() } else { word }),
                None => hex(bytes),
            },
            Source::Constant(_) | Source::Protocol | Source::Other(_) => hex(bytes),
        }
    }

    fn act(&self, act: &Act) -> String {
        match act {
            Act::Verdict(one) => verdict(one),
            Act::VerdictMap { key, map } => format!("{} vmap {}", self.key(key), self.set(key, map)),
            Act::SetMark { and, xor } => match (*and, *xor) {
                (0, xor) => format!("meta mark set {xor:#010x}"),
                (u32::MAX, xor) => format!("meta mark set meta mark ^ {xor:#010x}"),
                (and, 0) => format!("meta mark set meta mark & {and:#010x}"),
                (and, xor) if and == !xor => format!("meta mark set meta mark | {xor:#010x}"),
                (and, xor) => format!("meta mark set meta mark & {and:#010x} ^ {xor:#010x}"),
            },
            Act::SetMarkFrom(text) => text.to_string(),
            Act::Nat(nat) => {
                let mut text = match nat.kind {
                    NatKind::Snat => "snat",
                    NatKind::Masquerade => "masquerade",
                    NatKind::Dnat => "dnat",
                    NatKind::Redirect => "redirect",
                }
                .to_owned();
                let range = |(from, to): (u16, u16)| if from == to { from.to_string() } else { format!("{from}-{to}") };
                let to = super::target(nat, range);
                if !to.is_empty() {
                    let addressed = nat.addresses.is_some() || nat.dynamic.is_some();
                    let family = if addressed && self.table.family == Family::Inet { self.family.name() } else { "" };
                    let family = if family.is_empty() { String::new() } else { format!(" {family}") };
                    let _ = write!(text, "{family} to {to}");
                }
                let flags = [(RANDOM, "random"), (RANDOM_FULLY, "fully-random"), (PERSISTENT, "persistent")];
                let flags: Vec<&str> =
                    flags.iter().filter(|(flag, _)| nat.flags & flag != 0).map(|(_, name)| *name).collect();
                if !flags.is_empty() {
                    let _ = write!(text, " {}", flags.join(","));
                }
                text
            }
            // Counters are not shown.
            Act::Nothing(text) if &**text == "counter" => String::new(),
            Act::Nothing(text) => text.to_string(),
            Act::Unknown(name) => format!("[{name}: not known to vxmon]"),
        }
    }
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".to_owned(),
        Verdict::Drop => "drop".to_owned(),
        Verdict::Reject => "reject".to_owned(),
        Verdict::Queue => "queue".to_owned(),
        Verdict::Return => "return".to_owned(),
        Verdict::Continue => "continue".to_owned(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
    }
}

fn is_payload(value: &Value, in_transport: bool) -> bool {
    matches!(&value.source, Source::Payload { transport, .. } if *transport == in_transport)
}

fn is_address(value: &Value) -> bool {
    matches!(&value.source, Source::Payload { transport: false, offset: 12 | 16 | 8 | 24 })
}

/// `NF_CT_STATE_*`, as in xt_conntrack.
fn ct_states(mask: u32) -> String {
    const NAMES: [(u32, &str); 5] = [(1, "invalid"), (2, "established"), (4, "related"), (8, "new"), (64, "untracked")];
    let names: Vec<&str> = NAMES.iter().filter(|(bit, _)| mask & bit != 0).map(|(_, name)| *name).collect();
    names.join(",")
}

/// Length of the prefix that an interval is; none if it is none.
fn prefix_of(from: &[u8], to: &[u8]) -> Option<u32> {
    let number = |bytes: &[u8]| bytes.iter().fold(0_u128, |number, byte| (number << 8) | u128::from(*byte));
    let width = u32::try_from(8 * from.len()).ok()?;
    let (from, to) = (number(from), number(to));
    let differ = from ^ to;
    let free = 128 - differ.leading_zeros();
    let all = 1_u128.checked_shl(free).map_or(u128::MAX, |bit| bit - 1);
    (differ == all && from & all == 0).then(|| width.saturating_sub(free))
}

/// How the names begin of values that are numbers of the host.
const IN_HOST_ORDER: [&str; 6] = ["meta ", "ct ", "fib", "hash", "numgen", "xfrm"];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
