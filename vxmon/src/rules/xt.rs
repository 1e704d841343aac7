//! Matches and targets of xtables from their kernel structures: the same bytes come by iptables-legacy's blob and by
//! nftables' compat expressions. It never panics on bytes, and what it does not know it keeps by name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::model::{Act, Nat, NatKind, Side, Test, Verdict};

/// Fields of a structure in host byte order, each with its bounds checked.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    pub(super) fn u8(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub(super) fn u16(self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_ne_bytes)
    }

    pub(super) fn u16_be(self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    pub(super) fn u32(self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_ne_bytes)
    }

    pub(super) fn i32(self, at: usize) -> Option<i32> {
        self.bytes(at).map(i32::from_ne_bytes)
    }

    pub(super) fn v4(self, at: usize) -> Option<IpAddr> {
        self.bytes::<4>(at).map(|octets| Ipv4Addr::from(octets).into())
    }

    pub(super) fn v6(self, at: usize) -> Option<IpAddr> {
        self.bytes::<16>(at).map(|octets| Ipv6Addr::from(octets).into())
    }

    /// Text of at most `len` bytes, up to the first NUL.
    pub(super) fn text(self, at: usize, len: usize) -> Option<String> {
        let field = self.0.get(at..at.checked_add(len)?.min(self.0.len()))?;
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        Some(String::from_utf8_lossy(field.get(..end)?).into_owned())
    }
}

/// A match by name, revision and structure.
pub(super) fn test(name: &str, revision: u32, info: &[u8]) -> Test {
    read_test(name, revision, Fields(info)).unwrap_or_else(|| Test::Unknown(named(name, revision)))
}

/// As `-m name` with what cannot be read in words.
fn named(name: &str, revision: u32) -> Box<str> {
    format!("{name} revision {revision}").into()
}

fn read_test(name: &str, revision: u32, info: Fields<'_>) -> Option<Test> {
    Some(match (name, revision) {
        // struct xt_mark_mtinfo1, struct xt_connmark_mtinfo1
        ("mark" | "connmark", 1) => Test::Mark {
            connection: name == "connmark",
            value: info.u32(0)?,
            mask: info.u32(4)?,
            invert: info.u8(8)? != 0,
        },
        // struct xt_comment_info
        ("comment", 0) => Test::Comment(info.text(0, 256)?.into()),
        // struct xt_udp: source from, to, destination from, to, flags
        ("udp", 0) => ports(17, info, info.u8(8)?, None)?,
        // struct xt_tcp: besides an option, and flags under a mask
        ("tcp", 0) => {
            let (option, mask, flags) = (info.u8(8)?, info.u8(9)?, info.u8(10)?);
            let invert = info.u8(11)?;
            let more = (option != 0 || mask != 0)
                .then(|| format!("[option {option}, flags {flags:#04x} of {mask:#04x}, inverted {invert:#x}]").into());
            ports(6, info, invert, more)?
        }
        ("multiport", 1) => multiport(info)?,
        // struct xt_addrtype_info_v1
        ("addrtype", 1) => {
            let flags = info.u32(4)?;
            Test::AddrType {
                source: info.u16(0)?,
                destination: info.u16(2)?,
                invert: (flags & 1 != 0, flags & 2 != 0),
                limit: (flags & 4 != 0, flags & 8 != 0),
            }
        }
        // struct xt_addrtype_info
        ("addrtype", 0) => Test::AddrType {
            source: info.u16(0)?,
            destination: info.u16(2)?,
            invert: (info.u32(4)? != 0, info.u32(8)? != 0),
            limit: (false, false),
        },
        // struct xt_conntrack_mtinfo3: only if nothing but the state is asked (XT_CONNTRACK_STATE); iptables writes `-m state`
        // so too, with XT_CONNTRACK_STATE_ALIAS
        ("conntrack", 3) if matches!(info.u16(146)?, 1 | 0x2001) => {
            Test::State { mask: info.u16(150)?, invert: info.u16(148)? & 1 != 0, old: info.u16(146)? != 1 }
        }
        // struct xt_state_info; RELATED and so on have the same bits
        ("state", 0) => Test::State { mask: u16::try_from(info.u32(0)?).ok()?, invert: false, old: true },
        ("statistic", 0) => statistic(info)?,
        ("set", 1..=4) => ip_set(revision, info)?,
        _ => return None,
    })
}

fn ports(protocol: u8, info: Fields<'_>, invert: u8, more: Option<Box<str>>) -> Option<Test> {
    let range = |at: usize| -> Option<Option<(u16, u16)>> {
        let (from, to) = (info.u16(at)?, info.u16(at + 2)?);
        Some(((from, to) != (0, u16::MAX)).then_some((from, to)))
    };
    Some(Test::Ports {
        protocol,
        source: range(0)?,
        destination: range(4)?,
        invert: (invert & 1 != 0, invert & 2 != 0),
        more,
    })
}

/// struct xt_multiport_v1: side, count, ports, whether each begins a range, inverted.
fn multiport(info: Fields<'_>) -> Option<Test> {
    let side = match info.u8(0)? {
        0 => Side::Source,
        1 => Side::Destination,
        2 => Side::Either,
        _ => return None,
    };
    let count = usize::from(info.u8(1)?).min(15);
    let (mut ranges, mut at) = (Vec::new(), 0);
    while at < count {
        let from = info.u16(2 + 2 * at)?;
        let begins = info.u8(32 + at)? != 0 && at + 1 < count;
        let to = if begins { info.u16(4 + 2 * at)? } else { from };
        ranges.push((from, to));
        at += if begins { 2 } else { 1 };
    }
    Some(Test::Multiport { side, ranges: ranges.into(), invert: info.u8(47)? != 0 })
}

/// struct xt_statistic_info.
fn statistic(info: Fields<'_>) -> Option<Test> {
    let not = if info.u16(2)? & 1 != 0 { "! " } else { "" };
    let text = match info.u16(0)? {
        0 => {
            let probability = f64::from(info.u32(4)?) / f64::from(0x8000_0000_u32);
            format!("-m statistic --mode random {not}--probability {probability:.11}")
        }
        1 => {
            let (every, packet) = (info.u32(4)?.saturating_add(1), info.u32(8)?);
            format!("-m statistic --mode nth {not}--every {every} --packet {packet}")
        }
        _ => return None,
    };
    Some(Test::Chance(text.into()))
}

/// struct xt_set_info_match_v1, and what the later ones begin with: index, dimensions, flags (bit 0 inverted, bit n: the
/// n-th dimension is the source).
fn ip_set(revision: u32, info: Fields<'_>) -> Option<Test> {
    let (index, dimensions, flags) = (info.u16(0)?, info.u8(2)?, info.u8(3)?);
    let side = |dimension: u8| if flags & (1 << dimension) != 0 { Side::Source } else { Side::Destination };
    let more = match revision {
        1 | 2 => false,
        // Counters (value and operator, twice) and flags.
        _ => info.0.get(4..).is_some_and(|rest| rest.iter().any(|byte| *byte != 0)),
    };
    Some(Test::IpSet {
        index,
        name: None,
        sides: (1..=dimensions.min(6)).map(side).collect(),
        invert: flags & 1 != 0,
        more,
    })
}

/// A target by name, revision and structure, in a table of this IP version.
pub(super) fn act(name: &str, revision: u32, info: &[u8], v6: bool) -> Act {
    read_act(name, revision, Fields(info), v6).unwrap_or_else(|| Act::Unknown(named(name, revision)))
}

fn read_act(name: &str, revision: u32, info: Fields<'_>, v6: bool) -> Option<Act> {
    Some(match (name, revision) {
        // struct xt_mark_tginfo2: (mark & ~mask) ^ value
        ("MARK", 2) => Act::SetMark { and: !info.u32(4)?, xor: info.u32(0)? },
        // struct xt_connmark_tginfo1: bits of the connection, bits of the packet, mode; tginfo2 has two bytes on shifting
        // before the mode
        ("CONNMARK", 1 | 2) => {
            let (value, mask, bits) = (info.u32(0)?, info.u32(4)?, info.u32(8)?);
            match info.u8(if revision == 1 { 12 } else { 14 })? {
                0 => Act::Nothing(format!("-j CONNMARK --set-xmark {value:#x}/{mask:#x}").into()),
                1 => Act::Nothing(format!("-j CONNMARK --save-mark --nfmask {bits:#x} --ctmask {mask:#x}").into()),
                2 => {
                    Act::SetMarkFrom(format!("-j CONNMARK --restore-mark --nfmask {bits:#x} --ctmask {mask:#x}").into())
                }
                _ => return None,
            }
        }
        ("MASQUERADE", 0) => Act::Nat(nat_range(NatKind::Masquerade, info, v6, 0)?),
        ("SNAT", 0..=2) => Act::Nat(nat_range(NatKind::Snat, info, v6, revision)?),
        ("DNAT", 0..=2) => Act::Nat(nat_range(NatKind::Dnat, info, v6, revision)?),
        ("REDIRECT", 0) => Act::Nat(nat_range(NatKind::Redirect, info, v6, 0)?),
        ("NFQUEUE", _) => Act::Verdict(Verdict::Queue),
        // They answer XT_CONTINUE, and leave the mark as it is.
        (
            "LOG" | "NFLOG" | "ULOG" | "TRACE" | "CT" | "NOTRACK" | "TCPMSS" | "CHECKSUM" | "CLASSIFY" | "TOS" | "DSCP"
            | "TTL" | "HL" | "TEE" | "AUDIT",
            _,
        ) => Act::Nothing(format!("-j {name}").into()),
        _ => return None,
    })
}

/// struct nf_nat_ipv4_multi_range_compat in revision 0 of IPv4's, otherwise struct nf_nat_range (or range2, which begins
/// alike).
fn nat_range(kind: NatKind, info: Fields<'_>, v6: bool, revision: u32) -> Option<Nat> {
    let old = !v6 && revision == 0;
    let flags = info.u32(if old { 4 } else { 0 })?;
    let (addresses, ports) = if old {
        ((info.v4(8)?, info.v4(12)?), (info.u16_be(16)?, info.u16_be(18)?))
    } else {
        let address = |at| if v6 { info.v6(at) } else { info.v4(at) };
        ((address(4)?, address(20)?), (info.u16_be(36)?, info.u16_be(38)?))
    };
    Some(Nat {
        kind,
        flags,
        addresses: (flags & 1 != 0).then_some(addresses),
        ports: (flags & 2 != 0).then_some(ports),
        dynamic: None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever a structure holds, reading it ends.
        #[test]
        fn garbage_is_read_or_unknown(bytes in proptest::collection::vec(any::<u8>(), 0..300), revision in 0_u32..6, v6: bool) {
            for name in ["mark", "comment", "udp", "tcp", "multiport", "addrtype", "conntrack", "state", "statistic", "set", "?"] {
                let _ = test(name, revision, &bytes);
            }
            for name in ["MARK", "CONNMARK", "MASQUERADE", "SNAT", "DNAT", "REDIRECT", "LOG", "?"] {
                let _ = act(name, revision, &bytes, v6);
            }
        }
    }
}
