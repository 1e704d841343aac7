//! Expressions of nftables rules as the kernel dumps them. One that is not known is kept by name.

use std::borrow::Cow;

use super::super::attribute::Value;

/// Attributes and their values, include/uapi/linux/netfilter/nf_tables.h.
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

/// An expression. Registers are counted in units of 4 bytes from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// `meta`: `NFT_META_*` into a register, or from one.
    Meta {
        /// Which.
        key: u32,
        /// Where to.
        to: Option<usize>,
        /// Where from.
        from: Option<usize>,
    },
    /// `ct`: `NFT_CT_*`.
    Ct {
        /// Which.
        key: u32,
        /// Where to.
        to: Option<usize>,
        /// Where from.
        from: Option<usize>,
    },
    /// `payload`: bytes of the packet; none for `to` if it writes to the packet.
    Payload {
        /// `NFT_PAYLOAD_*_HEADER`: 0 link, 1 network, 2 transport.
        base: u32,
        /// Where.
        offset: u32,
        /// How many.
        len: u32,
        /// Where to.
        to: Option<usize>,
    },
    /// `bitwise`: `(from & mask) ^ xor`; without them another operation.
    Bitwise {
        /// Where from.
        from: usize,
        /// Where to.
        to: usize,
        /// Length in bytes.
        len: u32,
        /// Mask and xor.
        bits: Option<(Vec<u8>, Vec<u8>)>,
    },
    /// `byteorder`, in units of so many bytes.
    Byteorder {
        /// Where from.
        from: usize,
        /// Where to.
        to: usize,
        /// Bytes that change places.
        size: u32,
    },
    /// `cmp`: `NFT_CMP_*`.
    Compare {
        /// Where from.
        from: usize,
        /// How: equal, not equal, less, less or equal, greater, greater or equal.
        op: u32,
        /// With what.
        with: Vec<u8>,
    },
    /// `range`.
    Range {
        /// Where from.
        from: usize,
        /// Not within.
        invert: bool,
        /// The least.
        least: Vec<u8>,
        /// The most.
        most: Vec<u8>,
    },
    /// `immediate`: a constant.
    Immediate {
        /// Where to; none for the verdict.
        to: Option<usize>,
        /// What.
        data: Data,
    },
    /// `lookup`.
    Lookup {
        /// The set or map.
        set: String,
        /// Where the key is.
        from: usize,
        /// Where what it maps to is put: none if it is a set, `Some(None)` for the verdict.
        to: Option<Option<usize>>,
        /// Not in it.
        invert: bool,
    },
    /// `nat`.
    Nat {
        /// 0 source, 1 destination.
        kind: u32,
        /// `NFPROTO_*` of the addresses.
        family: u32,
        /// Where the addresses from, to are.
        addresses: Option<(usize, usize)>,
        /// Where the ports from, to are.
        ports: Option<(usize, usize)>,
        /// `NF_NAT_RANGE_*`.
        flags: u32,
    },
    /// `masq`, and `redir`.
    Masquerade {
        /// It is `redir`.
        redirect: bool,
        /// Where the ports from, to are.
        ports: Option<(usize, usize)>,
        /// `NF_NAT_RANGE_*`.
        flags: u32,
    },
    /// `fib`.
    Fib {
        /// Where to.
        to: usize,
        /// 1 index, 2 name, 3 type of address.
        result: u32,
        /// `NFTA_FIB_F_*`.
        flags: u32,
    },
    /// `match`: xtables'.
    Match(Xt),
    /// `target`: xtables'.
    Target(Xt),
    /// Another one that puts something into a register.
    Load {
        /// Its name.
        name: String,
        /// Where to.
        to: usize,
    },
    /// Another one.
    Other {
        /// Its name.
        name: String,
    },
}

/// A match or a target of xtables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xt {
    /// Its name.
    pub name: String,
    /// Its revision.
    pub revision: u32,
    /// Its structure.
    pub info: Vec<u8>,
}

/// A constant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Bytes.
    Value(Vec<u8>),
    /// A verdict (`NFT_*`, `NF_*`), and the chain it names.
    Verdict(i32, Option<String>),
}

impl Data {
    pub(super) fn read(value: Value<'_>) -> Option<Self> {
        value.nested().find_map(|(kind, value)| match kind {
            DATA_VALUE => Some(Self::Value(value.0.to_vec())),
            DATA_VERDICT => {
                let find = |wanted| value.nested().find_map(|(kind, value)| (kind == wanted).then_some(value));
                let code = find(VERDICT_CODE)?.u32_be()?.cast_signed();
                Some(Self::Verdict(code, find(VERDICT_CHAIN).map(Value::text)))
            }
            _ => None,
        })
    }
}

/// The bytes of a constant.
pub(super) fn value(nested: Value<'_>) -> Option<Vec<u8>> {
    nested.nested().find_map(|(kind, value)| (kind == DATA_VALUE).then(|| value.0.to_vec()))
}

/// The attributes of one expression.
#[derive(Clone, Copy)]
struct Attributes<'a>(Value<'a>);

impl<'a> Attributes<'a> {
    fn get(self, wanted: u16) -> Option<Value<'a>> {
        self.0.nested().find_map(|(kind, value)| (kind == wanted).then_some(value))
    }

    fn number(self, wanted: u16) -> Option<u32> {
        self.get(wanted)?.u32_be()
    }

    /// `NFT_REG_1` to `NFT_REG_4` are 16 bytes wide, `NFT_REG32_00` and those that follow 4.
    fn register(self, wanted: u16) -> Option<usize> {
        match self.number(wanted)? {
            number @ 1..=4 => usize::try_from((number - 1) * 4).ok(),
            number @ 8..=23 => usize::try_from(number - 8).ok(),
            _ => None,
        }
    }

    fn registers(self, least: u16, most: u16) -> Option<(usize, usize)> {
        let least = self.register(least)?;
        Some((least, self.register(most).unwrap_or(least)))
    }

    fn data(self, wanted: u16) -> Option<Vec<u8>> {
        value(self.get(wanted)?)
    }

    fn xt(self) -> Option<Xt> {
        Some(Xt { name: self.get(1)?.text(), revision: self.number(2)?, info: self.get(3)?.0.to_vec() })
    }
}

impl Expression {
    /// What kind it is, by nftables' own name.
    pub(super) fn name(value: Value<'_>) -> Option<Cow<'_, str>> {
        Attributes(value).get(EXPRESSION_NAME).map(Value::name)
    }

    /// Reads an expression, whatever it is.
    pub(super) fn read(value: Value<'_>) -> Self {
        let outer = Attributes(value);
        let name = outer.get(EXPRESSION_NAME).map(Value::text).unwrap_or_default();
        let attributes = Attributes(outer.get(EXPRESSION_DATA).unwrap_or(Value(&[])));
        let known = Self::known(&name, attributes).or_else(|| Self::compare(&name, attributes));
        known.unwrap_or(match attributes.register(1) {
            // What loads a register has it as its first attribute.
            Some(to) if matches!(&*name, "rt" | "osf" | "numgen" | "exthdr" | "xfrm" | "meta" | "ct" | "fib") => {
                Self::Load { name, to }
            }
            _ => match attributes.register(2) {
                // Or behind its source or key: NFTA_HASH_DREG, NFTA_SOCKET_DREG, NFTA_TUNNEL_DREG.
                Some(to) if matches!(&*name, "hash" | "socket" | "tunnel") => Self::Load { name, to },
                _ => Self::Other { name },
            },
        })
    }

    fn known(name: &str, attributes: Attributes<'_>) -> Option<Self> {
        Some(match name {
            "meta" => {
                Self::Meta { key: attributes.number(2)?, to: attributes.register(1), from: attributes.register(3) }
            }
            "ct" => Self::Ct { key: attributes.number(2)?, to: attributes.register(1), from: attributes.register(4) },
            "payload" => Self::Payload {
                base: attributes.number(2)?,
                offset: attributes.number(3)?,
                len: attributes.number(4)?,
                to: attributes.register(1),
            },
            "immediate" => Self::Immediate { to: attributes.register(1), data: Data::read(attributes.get(2)?)? },
            "nat" => Self::Nat {
                kind: attributes.number(1)?,
                family: attributes.number(2)?,
                addresses: attributes.registers(3, 4),
                ports: attributes.registers(5, 6),
                flags: attributes.number(7).unwrap_or(0),
            },
            "masq" => Self::Masquerade {
                redirect: false,
                flags: attributes.number(1).unwrap_or(0),
                ports: attributes.registers(2, 3),
            },
            "redir" => Self::Masquerade {
                redirect: true,
                ports: attributes.registers(1, 2),
                flags: attributes.number(3).unwrap_or(0),
            },
            "fib" => Self::Fib {
                to: attributes.register(1)?,
                result: attributes.number(2)?,
                flags: attributes.number(3).unwrap_or(0),
            },
            "match" => Self::Match(attributes.xt()?),
            "target" => Self::Target(attributes.xt()?),
            _ => return None,
        })
    }

    fn compare(name: &str, attributes: Attributes<'_>) -> Option<Self> {
        Some(match name {
            "bitwise" => Self::Bitwise {
                from: attributes.register(1)?,
                to: attributes.register(2)?,
                len: attributes.number(3)?,
                bits: attributes.data(4).zip(attributes.data(5)).filter(|_| attributes.number(6).unwrap_or(0) == 0),
            },
            "byteorder" => Self::Byteorder {
                from: attributes.register(1)?,
                to: attributes.register(2)?,
                size: attributes.number(5)?,
            },
            "cmp" => {
                Self::Compare { from: attributes.register(1)?, op: attributes.number(2)?, with: attributes.data(3)? }
            }
            "range" => Self::Range {
                from: attributes.register(1)?,
                invert: attributes.number(2)? != 0,
                least: attributes.data(3)?,
                most: attributes.data(4)?,
            },
            "lookup" => Self::Lookup {
                set: attributes.get(1)?.text(),
                from: attributes.register(2)?,
                // NFT_REG_VERDICT is 0.
                to: attributes.number(3).map(|_| attributes.register(3)),
                invert: attributes.number(5).unwrap_or(0) & 1 != 0,
            },
            _ => return None,
        })
    }
}
