//! One ruleset, whichever of the three homes it was read from. Only data: nothing here reads, matches or prints.

use std::{collections::HashMap, net::IpAddr};

/// Where rules live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// xtables, by getsockopt.
    IptablesLegacy,
    /// nftables, with xtables' expressions.
    IptablesNft,
    /// nftables.
    Nftables,
}

impl Backend {
    /// Its name in events.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::Nftables => "nftables",
        }
    }
}

/// The family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4 packets.
    Ip,
    /// IPv6 packets.
    Ip6,
    /// Both.
    Inet,
}

impl Family {
    /// As nft writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
        }
    }

    /// Whether its tables see packets of this IP version.
    #[must_use]
    pub const fn sees(self, v6: bool) -> bool {
        match self {
            Self::Ip => !v6,
            Self::Ip6 => v6,
            Self::Inet => true,
        }
    }
}

/// All tables of a network namespace, as far as they could be read.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// The tables.
    pub tables: Vec<Table>,
    /// What could not be read, and why, in words.
    pub unread: Vec<String>,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    /// Where it lives.
    pub backend: Backend,
    /// Which packets it sees.
    pub family: Family,
    /// Its name.
    pub name: Box<str>,
    /// Its chains, or those of them that matter.
    pub chains: Vec<Chain>,
    /// Chains by name.
    pub by_name: HashMap<Box<str>, usize>,
    /// Sets and maps of nftables by name; the elements of those that POSTROUTING asks.
    pub sets: HashMap<Box<str>, Set>,
}

impl Table {
    /// An empty table.
    #[must_use]
    pub fn new(backend: Backend, family: Family, name: &str) -> Self {
        Self { backend, family, name: name.into(), chains: Vec::new(), by_name: HashMap::new(), sets: HashMap::new() }
    }

    /// Adds a chain, unless it is there; its number.
    pub fn chain(&mut self, name: &str) -> usize {
        if let Some(index) = self.by_name.get(name) {
            return *index;
        }
        self.chains.push(Chain { name: name.into(), base: None, reached: false, rules: Vec::new() });
        self.by_name.insert(name.into(), self.chains.len() - 1);
        self.chains.len() - 1
    }
}

/// A chain.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Its name.
    pub name: Box<str>,
    /// Where it is hooked in, if it is.
    pub base: Option<Base>,
    /// A base chain can lead to it.
    pub reached: bool,
    /// Its rules, in order: all of them if POSTROUTING can lead to it, else at least those that set marks.
    pub rules: Vec<Rule>,
}

/// Where a base chain is hooked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// What it is for.
    pub kind: Kind,
    /// When it is asked.
    pub hook: Hook,
    /// Lower ones first (`NF_IP_PRI_*`; NAT in POSTROUTING: 100).
    pub priority: i32,
    /// The policy is drop.
    pub drops: bool,
}

/// What a base chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// NAT: asked for the first packet of a connection only.
    Nat,
    /// Anything else.
    Other,
}

/// Hooks (`NF_INET_*`, include/uapi/linux/netfilter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// What arrives.
    Prerouting,
    /// What this host is to get.
    Input,
    /// What is passed on.
    Forward,
    /// What this host sends.
    Output,
    /// What leaves.
    Postrouting,
    /// Another one (ingress).
    Other,
}

impl From<u32> for Hook {
    fn from(number: u32) -> Self {
        match number {
            0 => Self::Prerouting,
            1 => Self::Input,
            2 => Self::Forward,
            3 => Self::Output,
            4 => Self::Postrouting,
            _ => Self::Other,
        }
    }
}

/// A rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Its handle; none in iptables-legacy.
    pub handle: Option<u64>,
    /// Its place in its chain, from 1.
    pub position: u32,
    /// What it asks and does, in order.
    pub parts: Box<[Part]>,
    /// nft's comment.
    pub comment: Option<Box<str>>,
}

/// Part of a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// What the packet must be; otherwise the next rule is asked.
    Test(Test),
    /// What is done then.
    Act(Act),
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Source, or incoming.
    Source,
    /// Destination, or outgoing.
    Destination,
    /// Either one (multiport).
    Either,
}

/// A condition. The named ones are iptables', the last few nftables'.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// `-s`, `-d`.
    Address {
        /// Which.
        side: Side,
        /// Its value under the mask.
        address: IpAddr,
        /// The mask, as an address.
        mask: IpAddr,
        /// With `!`.
        invert: bool,
    },
    /// `-i`, `-o`.
    Device {
        /// Which.
        side: Side,
        /// Its name; with `+` at the end the beginning of one.
        name: Box<str>,
        /// With `!`.
        invert: bool,
    },
    /// `-p`.
    Protocol {
        /// IP protocol.
        number: u8,
        /// With `!`.
        invert: bool,
    },
    /// `-f`.
    Fragment {
        /// With `!`.
        invert: bool,
    },
    /// `-m mark`, or `-m connmark`.
    Mark {
        /// Of the connection, not of the packet.
        connection: bool,
        /// The value.
        value: u32,
        /// The bits that count.
        mask: u32,
        /// With `!`.
        invert: bool,
    },
    /// `-m tcp`, `-m udp`.
    Ports {
        /// IP protocol.
        protocol: u8,
        /// Source ports from, to, host order; none: any.
        source: Option<(u16, u16)>,
        /// Destination ports.
        destination: Option<(u16, u16)>,
        /// `!` before each.
        invert: (bool, bool),
        /// TCP flags or options that are asked for besides.
        more: Option<Box<str>>,
    },
    /// `-m multiport`.
    Multiport {
        /// Which.
        side: Side,
        /// From, to.
        ranges: Box<[(u16, u16)]>,
        /// With `!`.
        invert: bool,
    },
    /// `-m addrtype`.
    AddrType {
        /// Bits by `RTN_*`, of the source; 0: any.
        source: u16,
        /// Of the destination.
        destination: u16,
        /// `!` before each.
        invert: (bool, bool),
        /// `--limit-iface-in`, `--limit-iface-out`.
        limit: (bool, bool),
    },
    /// `-m conntrack --ctstate`.
    State {
        /// Bits as in xt_conntrack.
        mask: u16,
        /// With `!`.
        invert: bool,
        /// Written as `-m state`.
        old: bool,
    },
    /// `-m set --match-set`.
    IpSet {
        /// Its number.
        index: u16,
        /// Its name, once known.
        name: Option<Box<str>>,
        /// Which end each dimension takes.
        sides: Box<[Side]>,
        /// With `!`.
        invert: bool,
        /// Counters are asked or options given: rendered not wholly, and not evaluated.
        more: bool,
    },
    /// `-m comment`.
    Comment(Box<str>),
    /// It depends on chance, time or traffic; as one would type it.
    Chance(Box<str>),
    /// nftables: a value compared.
    Compare {
        /// What.
        value: Value,
        /// How.
        op: Op,
        /// With what.
        with: Box<[u8]>,
    },
    /// nftables: a value within a range.
    Range {
        /// What.
        value: Value,
        /// From.
        from: Box<[u8]>,
        /// To, inclusive.
        to: Box<[u8]>,
        /// Not within.
        invert: bool,
    },
    /// nftables: values in a set.
    Lookup {
        /// The fields of the key.
        key: Box<[Value]>,
        /// The set.
        set: Box<str>,
        /// Not in it.
        invert: bool,
    },
    /// What vxmon cannot read, named.
    Unknown(Box<str>),
}

/// How nftables compares, bytes as a big-endian number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
}

/// What is done.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// A verdict.
    Verdict(Verdict),
    /// A verdict by a map; no entry: the next rule.
    VerdictMap {
        /// The fields of the key.
        key: Box<[Value]>,
        /// The map.
        map: Box<str>,
    },
    /// The packet's mark: `(mark & and) ^ xor`.
    SetMark {
        /// Bits that are kept.
        and: u32,
        /// Bits that are turned over.
        xor: u32,
    },
    /// The packet's mark gets a value that is not in the rule; as one would type it.
    SetMarkFrom(Box<str>),
    /// NAT.
    Nat(Nat),
    /// It neither ends the traversal nor changes the mark; as one would type it.
    Nothing(Box<str>),
    /// What vxmon cannot read, named.
    Unknown(Box<str>),
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Accepted.
    Accept,
    /// Dropped.
    Drop,
    /// Dropped, and its sender told.
    Reject,
    /// To a userspace queue.
    Queue,
    /// Back to the calling chain.
    Return,
    /// The next rule.
    Continue,
    /// A chain, and back.
    Jump(Box<str>),
    /// A chain, and not back here.
    Goto(Box<str>),
}

/// A translation.
#[derive(Clone, Debug, PartialEq)]
pub struct Nat {
    /// Which.
    pub kind: NatKind,
    /// `NF_NAT_RANGE_*`, include/uapi/linux/netfilter/nf_nat.h.
    pub flags: u32,
    /// Addresses from, to; none: as the device has it, or dynamic.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Ports from, to.
    pub ports: Option<(u16, u16)>,
    /// Where it goes, if that is not a constant, as nft writes it.
    pub dynamic: Option<Box<str>>,
}

/// Kinds of NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NatKind {
    /// Source, to an address.
    Snat,
    /// Source, to the address of the device.
    Masquerade,
    /// Destination.
    Dnat,
    /// Destination, to this host.
    Redirect,
}

/// NF_NAT_RANGE_PROTO_RANDOM: a random port.
pub const RANDOM: u32 = 1 << 2;
/// `NF_NAT_RANGE_PROTO_SPECIFIED`: ports were given.
pub const PROTO_SPECIFIED: u32 = 1 << 1;
/// NF_NAT_RANGE_PERSISTENT.
pub const PERSISTENT: u32 = 1 << 3;
/// NF_NAT_RANGE_PROTO_RANDOM_FULLY: a random port, from the whole range.
pub const RANDOM_FULLY: u32 = 1 << 4;

impl Nat {
    /// Whether it chooses ports fully at random.
    #[must_use]
    pub const fn is_random_fully(&self) -> bool {
        self.flags & RANDOM_FULLY != 0
    }

    /// Whether it changes the source.
    #[must_use]
    pub const fn is_source(&self) -> bool {
        matches!(self.kind, NatKind::Snat | NatKind::Masquerade)
    }
}

/// What an nftables expression loads, and what is made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// What.
    pub source: Source,
    /// Length in bytes.
    pub len: u8,
    /// What is made of it, in order.
    pub changes: Box<[Change]>,
}

/// Operations on a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// `(value & and) ^ xor`.
    Bits {
        /// Bits that are kept.
        and: Box<[u8]>,
        /// Bits that are turned over.
        xor: Box<[u8]>,
    },
    /// Byte order, in units of so many bytes.
    Swap(u8),
    /// One that vxmon does not know.
    Unknown,
}

/// What nftables can look at.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A constant.
    Constant(Box<[u8]>),
    /// `meta mark`, host order.
    Mark,
    /// `meta oif`, `meta iif`: index, host order.
    DeviceIndex(Side),
    /// `meta oifname`, `meta iifname`: 16 bytes.
    DeviceName(Side),
    /// `meta l4proto`.
    L4Proto,
    /// `meta nfproto`.
    NfProto,
    /// `meta protocol`: EtherType.
    Protocol,
    /// `ct mark`.
    CtMark,
    /// `ct state`, host order.
    CtState,
    /// Bytes of the packet.
    Payload {
        /// From its network header (true: from its transport header).
        transport: bool,
        /// Where.
        offset: u32,
    },
    /// `fib saddr type`, `fib daddr type`: RTN_*, host order.
    AddrType {
        /// Whose.
        side: Side,
        /// On the device (`. oif`, `. iif`) only.
        device: Option<Side>,
    },
    /// Another one, as nft names it.
    Other(Box<str>),
}

/// A set or a map of nftables.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Set {
    /// Part of one rule, without a name of its own.
    pub anonymous: bool,
    /// Elements are intervals.
    pub interval: bool,
    /// Length of a key in bytes.
    pub key_len: usize,
    /// The elements; none: not read.
    pub elements: Option<Vec<Element>>,
}

/// An element.
#[derive(Clone, Debug, PartialEq)]
pub struct Element {
    /// The key; empty: everything else.
    pub key: Box<[u8]>,
    /// The end of the interval, inclusive.
    pub end: Option<Box<[u8]>>,
    /// What it maps to, if that is a verdict.
    pub verdict: Option<Verdict>,
    /// What it maps to otherwise.
    pub data: Option<Box<[u8]>>,
}

/// Which rule, by numbers of table, chain and rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId {
    /// Index into [`Ruleset::tables`].
    pub table: usize,
    /// Index into [`Table::chains`].
    pub chain: usize,
    /// Index into [`Chain::rules`].
    pub rule: usize,
}

impl Ruleset {
    /// A rule with its table and chain.
    #[must_use]
    pub fn get(&self, id: RuleId) -> Option<(&Table, &Chain, &Rule)> {
        let table = self.tables.get(id.table)?;
        let chain = table.chains.get(id.chain)?;
        Some((table, chain, chain.rules.get(id.rule)?))
    }
}

impl Rule {
    /// The translation that it makes.
    #[must_use]
    pub fn nat(&self) -> Option<&Nat> {
        self.parts.iter().find_map(|part| match part {
            Part::Act(Act::Nat(nat)) => Some(nat),
            Part::Act(_) | Part::Test(_) => None,
        })
    }

    /// Whether vxmon cannot read a part of it, or not evaluate it.
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Test(Test::Unknown(_)) | Part::Act(Act::Unknown(_))))
    }

    /// The chains it may lead to, and the maps that name more.
    pub fn leads_to(&self) -> impl Iterator<Item = Way<'_>> {
        self.parts.iter().filter_map(|part| match part {
            Part::Act(Act::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain))) => Some(Way::Chain(chain)),
            Part::Act(Act::VerdictMap { map, .. }) => Some(Way::Map(map)),
            Part::Act(_) | Part::Test(_) => None,
        })
    }
}

/// Where a rule leads.
#[derive(Clone, Copy, Debug)]
pub enum Way<'a> {
    /// To this chain.
    Chain(&'a str),
    /// To the chains that this map names.
    Map(&'a str),
}
