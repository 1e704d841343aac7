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

impl Endpoints {
    /// A tuple as the packets of its direction look before NAT.
    #[inline(always)]
    pub const fn of(tuple: &Tuple) -> Self {
        Self { src: tuple.src, dst: tuple.dst, sport: tuple.sport, dport: tuple.dport }
    }

    /// The same with source and destination swapped.
    #[inline(always)]
    pub const fn inverse(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport }
    }

    #[inline(always)]
    fn addresses(&self) -> Sum {
        Sum::ZERO
            .add_u32(self.src[0])
            .add_u32(self.src[1])
            .add_u32(self.src[2])
            .add_u32(self.src[3])
            .add_u32(self.dst[0])
            .add_u32(self.dst[1])
            .add_u32(self.dst[2])
            .add_u32(self.dst[3])
    }

    #[inline(always)]
    fn sum(&self) -> Sum {
        self.addresses().add_u16(self.sport).add_u16(self.dport)
    }

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        // Word by word: a comparison of arrays becomes a call of memcmp, which the kernel does not have.
        self.sport == other.sport
            && self.dport == other.dport
            && self.src[0] == other.src[0]
            && self.src[1] == other.src[1]
            && self.src[2] == other.src[2]
            && self.src[3] == other.src[3]
            && self.dst[0] == other.dst[0]
            && self.dst[1] == other.dst[1]
            && self.dst[2] == other.dst[2]
            && self.dst[3] == other.dst[3]
    }
}

/// What NAT did to a packet: how it looked before, and how it looks now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Before NAT.
    pub before: Endpoints,
    /// As it leaves.
    pub after: Endpoints,
}

impl Rewrite {
    /// The rewrite of a packet that leaves as `after`, by the two tuples of its connection. Packets of the original
    /// direction leave as the inverse of the reply tuple, and the other way round (`nf_nat_packet()`,
    /// net/netfilter/nf_nat_core.c). `None` if the packet fits neither, or nothing was rewritten.
    #[inline(always)]
    pub fn find(orig: &Tuple, reply: &Tuple, after: &Endpoints) -> Option<Self> {
        let (orig, reply) = (Endpoints::of(orig), Endpoints::of(reply));
        let before = if reply.inverse().is(after) {
            orig
        } else if orig.inverse().is(after) {
            reply
        } else {
            return None;
        };
        if before.is(after) { None } else { Some(Self { before, after: *after }) }
    }

    /// What fault A leaves in a field that was 0: `inet_proto_csum_replace4/16()` adds the change of address and skips
    /// that of the port, because the skb is PARTIAL, and a 0 is then written as `CSUM_MANGLED_0` (`udp_manip_pkt()`,
    /// net/netfilter/nf_nat_proto.c, before ea64d8d6c675). 0xffff if no address changed. Memory order.
    #[inline(always)]
    pub fn mangled_zero(&self) -> u16 {
        match self.after.addresses().minus(self.before.addresses()).fold() {
            0 => 0xffff,
            value => value,
        }
    }

    /// What fault B leaves: the sum that was right for the packet before NAT. `expected` is the right one now, both
    /// memory order.
    #[inline(always)]
    pub fn stale(&self, expected: u16) -> u16 {
        Sum::ZERO.add_u16(!expected).minus(self.after.sum()).plus(self.before.sum()).to_check()
    }
}

/// What is known of the packet's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat {
    /// The entry could not be read.
    Unknown,
    /// The entry (or its absence) says that nothing was rewritten.
    None,
    /// The entry says what was rewritten.
    Rewritten(Rewrite),
}

/// A finding and its cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The verdict, now naming the fault where the values show it.
    pub verdict: Verdict,
    /// The value that the fault leaves, computed from the entry alone, memory order.
    pub predicted: Option<u16>,
    /// The predicted value is the seen one.
    pub proved: bool,
}

/// Names the cause of a wrong outer sum: a fault is called by its name only when the value it leaves, computed from the
/// connection's tuples, is the value seen. The one exception is 0xffff with no entry to be had, fault A's signature with
/// an unchanged address, which is named but not proved.
#[inline(always)]
pub fn cause(finding: &Finding, nat: &Nat) -> Cause {
    let Finding { verdict, seen, expected } = *finding;
    let unnamed = Cause { verdict, predicted: None, proved: false };
    match (verdict, nat) {
        (Verdict::NatMangledZero, Nat::Rewritten(rewrite)) => {
            let predicted = rewrite.mangled_zero();
            Cause { verdict, predicted: Some(predicted), proved: same(predicted, seen) }
        }
        (Verdict::BadOuter, Nat::Rewritten(rewrite)) => {
            let Some(expected) = expected else {
                return unnamed;
            };
            let (zero, stale) = (rewrite.mangled_zero(), rewrite.stale(expected));
            if seen == zero {
                Cause { verdict: Verdict::NatMangledZero, predicted: Some(zero), proved: true }
            } else {
                let proved = seen == stale;
                let verdict = if proved { Verdict::NatStalePort } else { verdict };
                Cause { verdict, predicted: Some(stale), proved }
            }
        }
        (Verdict::BadOuter, Nat::Unknown) if seen == 0xffff => Cause { verdict: Verdict::NatMangledZero, ..unnamed },
        _ => unnamed,
    }
}
