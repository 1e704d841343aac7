//! A connection as conntrack knows it, and what NAT would have left in the outer checksum.
//!
//! Pure arithmetic on two tuples; where they come from (the skb, ctnetlink) is not this file's business.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    checksum::{Sum, same},
    judge::{Finding, Verdict},
};

/// One direction of a connection, laid out as the kernel's `struct nf_conntrack_tuple`
/// (include/net/netfilter/nf_conntrack_tuple.h), so that the kernel's own bytes can be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tuple {
    /// Source address, memory order; IPv4 in the first word, the rest zero.
    pub src: [u32; 4],
    /// Source port, memory order.
    pub sport: u16,
    /// `AF_INET` or `AF_INET6`, native order.
    pub family: u16,
    /// Destination address, as `src`.
    pub dst: [u32; 4],
    /// Destination port, memory order.
    pub dport: u16,
    /// IP protocol.
    pub proto: u8,
    /// `IP_CT_DIR_ORIGINAL` (0) or `IP_CT_DIR_REPLY` (1).
    pub direction: u8,
}

const _: () = assert!(size_of::<Tuple>() == 40);

/// Addresses and ports of one packet; all in memory order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Source address; IPv4 in the first word.
    pub src: [u32; 4],
    /// Destination address.
    pub dst: [u32; 4],
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
}

/// Adds both addresses to a sum.
#[inline(always)]
fn add_addresses(sum: Sum, src: &[u32; 4], dst: &[u32; 4]) -> Sum {
    sum.add_u32(src[0])
        .add_u32(src[1])
        .add_u32(src[2])
        .add_u32(src[3])
        .add_u32(dst[0])
        .add_u32(dst[1])
        .add_u32(dst[2])
        .add_u32(dst[3])
}

/// Compares word by word: a comparison of arrays becomes a call of memcmp, which the kernel does not have.
#[inline(always)]
const fn equal(a: &[u32; 4], b: &[u32; 4]) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// What NAT did to a packet: how it looked before, and how it looks now. Borrowed throughout: the kernel program's stack
/// has no room for copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<'a> {
    /// Before NAT.
    pub before: &'a Tuple,
    /// As it leaves.
    pub after: &'a Endpoints,
}

impl<'a> Rewrite<'a> {
    /// The rewrite of a packet that leaves as `after`, by the two tuples of its connection. Packets of the original
    /// direction leave as the inverse of the reply tuple, and the other way round (`nf_nat_packet()`,
    /// net/netfilter/nf_nat_core.c). `None` if the packet fits neither, or nothing was rewritten.
    #[inline(always)]
    pub fn find(orig: &'a Tuple, reply: &'a Tuple, after: &'a Endpoints) -> Option<Self> {
        let before = if Self::answers(reply, after) {
            orig
        } else if Self::answers(orig, after) {
            reply
        } else {
            return None;
        };
        let unchanged = before.sport == after.sport
            && before.dport == after.dport
            && equal(&before.src, &after.src)
            && equal(&before.dst, &after.dst);
        if unchanged { None } else { Some(Self { before, after }) }
    }

    /// Whether a packet that leaves as `after` is one of the connection with these tuples, rewritten or not.
    #[must_use]
    pub const fn is_of(orig: &Tuple, reply: &Tuple, after: &Endpoints) -> bool {
        Self::answers(reply, after) || Self::answers(orig, after)
    }

    /// Whether packets of `tuple` are the answers to `packet`.
    #[inline(always)]
    const fn answers(tuple: &Tuple, packet: &Endpoints) -> bool {
        tuple.sport == packet.dport
            && tuple.dport == packet.sport
            && equal(&tuple.src, &packet.dst)
            && equal(&tuple.dst, &packet.src)
    }

    /// What fault A leaves in a field that was 0: `inet_proto_csum_replace4/16()` adds the change of address and skips
    /// that of the port, because the skb is PARTIAL, and a 0 is then written as `CSUM_MANGLED_0` (`udp_manip_pkt()`,
    /// net/netfilter/nf_nat_proto.c, before ea64d8d6c675). 0xffff if no address changed. Memory order.
    #[inline(always)]
    pub fn mangled_zero(&self) -> u16 {
        let before = add_addresses(Sum::ZERO, &self.before.src, &self.before.dst);
        match add_addresses(Sum::ZERO, &self.after.src, &self.after.dst).minus(before).fold() {
            0 => 0xffff,
            value => value,
        }
    }

    /// What fault B leaves: the sum that was right for the packet before NAT, plus the change of address, which
    /// `inet_proto_csum_replace4/16()` adds as if to a pseudo-header sum because the skb is PARTIAL (the right sum would
    /// have it subtracted), while that of the port is skipped. `expected` is the right one now, both memory order.
    #[inline(always)]
    pub fn stale(&self, expected: u16) -> u16 {
        let Self { before, after } = self;
        let now = add_addresses(Sum::ZERO, &after.src, &after.dst);
        let then = add_addresses(Sum::ZERO, &before.src, &before.dst);
        let right_then = Sum::ZERO
            .add_u16(expected)
            .plus(now)
            .add_u16(after.sport)
            .add_u16(after.dport)
            .minus(then.add_u16(before.sport).add_u16(before.dport));
        match right_then.plus(now).minus(then).fold() {
            0 => 0xffff,
            value => value,
        }
    }
}

/// The source port with which `seen` would be right, where `expected` is right with `sport`; all memory order. The port before
/// NAT, if fault B left the checksum and no address was changed; of any other wrong checksum it means nothing.
#[inline(always)]
pub const fn right_sport(seen: u16, expected: u16, sport: u16) -> u16 {
    Sum::ZERO.add_u16(sport).add_u16(expected).minus_u16(seen).fold()
}

/// What is known of the packet's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat<'a> {
    /// The entry could not be read.
    Unknown,
    /// The entry (or its absence) says that nothing was rewritten.
    None,
    /// The entry says what was rewritten.
    Rewritten(Rewrite<'a>),
}

/// A value, memory order, if there is one; in one number, which is always set: see [`crate::judge::Packed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicted(u32);

impl Predicted {
    /// None.
    pub const NONE: Self = Self(0);
    const IS_KNOWN: u32 = 1 << 16;

    /// This one.
    #[inline(always)]
    #[must_use]
    pub const fn of(value: u16) -> Self {
        Self(value as u32 | Self::IS_KNOWN)
    }

    /// The value, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn value(self) -> Option<u16> {
        if self.is_known() { Some(self.or_zero()) } else { None }
    }

    /// Whether there is one.
    #[inline(always)]
    #[must_use]
    pub const fn is_known(self) -> bool {
        self.0 & Self::IS_KNOWN != 0
    }

    /// The value, or 0.
    #[inline(always)]
    #[must_use]
    pub const fn or_zero(self) -> u16 {
        self.0 as u16
    }
}

/// A finding and its cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The verdict, now naming the fault where the values show it.
    pub verdict: Verdict,
    /// The value that the fault leaves, computed from the entry alone.
    pub predicted: Predicted,
    /// The predicted value is the seen one.
    pub proved: bool,
}

/// Names the cause of a wrong outer sum: a fault is called by its name only when the value it leaves, computed from the
/// connection's tuples, is the value seen. The one exception is 0xffff with no entry to be had, fault A's signature with
/// an unchanged address, which is named but not proved.
#[inline(always)]
pub fn cause(finding: &Finding, nat: &Nat<'_>) -> Cause {
    let Finding { verdict, seen, expected } = *finding;
    let unnamed = Cause { verdict, predicted: Predicted::NONE, proved: false };
    match (verdict, nat) {
        (Verdict::NatMangledZero, Nat::Rewritten(rewrite)) => {
            let predicted = rewrite.mangled_zero();
            Cause { verdict, predicted: Predicted::of(predicted), proved: same(predicted, seen) }
        }
        (Verdict::BadOuter, Nat::Rewritten(rewrite)) => {
            let Some(expected) = expected else {
                return unnamed;
            };
            let (zero, stale) = (rewrite.mangled_zero(), rewrite.stale(expected));
            // One stale sum in 65,536 is 0xffff too. Then it is taken for the fault that every kernel has, and devices as
            // they are made by default.
            if seen == zero && seen != stale {
                Cause { verdict: Verdict::NatMangledZero, predicted: Predicted::of(zero), proved: true }
            } else {
                let proved = seen == stale;
                let verdict = if proved { Verdict::NatStalePort } else { verdict };
                Cause { verdict, predicted: Predicted::of(stale), proved }
            }
        }
        (Verdict::BadOuter, Nat::Unknown) if seen == 0xffff => Cause { verdict: Verdict::NatMangledZero, ..unnamed },
        _ => unnamed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Where only the port was rewritten, the stale checksum gives the port before.
        #[test]
        fn a_stale_checksum_tells_the_port_before(expected in 1_u16.., before in 1..u16::MAX, after in 1_u16.., dport: u16) {
            let tuple = Tuple { sport: before, dport, ..Tuple::default() };
            let endpoints = Endpoints { sport: after, dport, ..Endpoints::default() };
            let stale = Rewrite { before: &tuple, after: &endpoints }.stale(expected);
            prop_assert_eq!(right_sport(stale, expected, after), before);
        }
    }
}
