//! Is this packet's checksum right, and if not, what is wrong with it?
//!
//! The one decision vxmon exists for; its table, from `udp_set_csum()` (net/ipv4/udp.c), `udp6_set_csum()`
//! (net/ipv6/ip6_checksum.c) and `lco_csum()` (include/linux/skbuff.h), with C the UDP checksum field:
//!
//! | state of the skb | right content of C | verdict |
//! |---|---|---|
//! | any | 0 (IPv4; IPv6 if the device may) | `zero` |
//! | GSO with `SKB_GSO_UDP_TUNNEL_CSUM` | folded pseudo-header sum, not complemented | `pending` |
//! | GSO with `SKB_GSO_UDP_TUNNEL` only | 0, so any other value is wrong | |
//! | PARTIAL, csum_start behind the UDP header (Local Checksum Offload) | final, by the inner check field | `lco-valid` |
//! | PARTIAL, csum_start at the UDP header | folded pseudo-header sum, not complemented | `pending` |
//! | not PARTIAL | full sum over the datagram | `valid` |
//! | not known | whatever one of the rows allows | as that row |
//!
//! TC egress runs before `validate_xmit_skb()`, so an offloaded sum is still unfilled there: "checksum incorrect (maybe
//! caused by offload)" is no fault here. Nothing in this file reads a map, a clock or a device.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    checksum::{Sum, same},
    packet::{
        self, ETHERNET, Family, Fragment, IPV4, Ip, OFFSET_MASK, Packet, Stop, UDP, UDP_CHECK, UDP_DST, UDP_LEN,
        ethertype, proto,
    },
};

/// What the judge says of a packet it could judge. The numbers are fixed: they cross the ring buffer and index counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Verdict {
    /// No checksum is used (RFC 768; RFC 6935 for tunnels over IPv6).
    Zero = 0,
    /// The full sum is right.
    Valid = 1,
    /// The sum is right by Local Checksum Offload: the inner sum is filled in later, the outer one is final.
    LcoValid = 2,
    /// The field holds the right pseudo-header sum; the rest is filled in later.
    Pending = 3,
    /// Fault A: NAT "updated" a zero that means "no checksum".
    NatMangledZero = 4,
    /// Fault B: NAT rewrote port or address under Local Checksum Offload and left the final outer sum as it was.
    NatStalePort = 5,
    /// The outer sum is wrong for another cause, or one that could not be seen.
    BadOuter = 6,
    /// The sum of the packet that the VXLAN device is about to encapsulate is wrong.
    BadInner = 7,
    /// No outer checksum over IPv6 though the VXLAN device was not allowed to leave it out.
    ZeroOuterV6 = 8,
    /// Length fields contradict each other.
    Malformed = 9,
}

impl Verdict {
    /// All verdicts, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Zero,
        Self::Valid,
        Self::LcoValid,
        Self::Pending,
        Self::NatMangledZero,
        Self::NatStalePort,
        Self::BadOuter,
        Self::BadInner,
        Self::ZeroOuterV6,
        Self::Malformed,
    ];

    /// Whether it is a fault, to be reported.
    #[inline(always)]
    pub const fn is_anomaly(self) -> bool {
        (self as u8) >= Self::NatMangledZero as u8
    }

    /// Name in events and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Valid => "valid",
            Self::LcoValid => "lco-valid",
            Self::Pending => "pending",
            Self::NatMangledZero => "nat-mangled-zero",
            Self::NatStalePort => "nat-stale-port",
            Self::BadOuter => "bad-outer",
            Self::BadInner => "bad-inner",
            Self::ZeroOuterV6 => "zero-outer-v6",
            Self::Malformed => "malformed",
        }
    }
}

impl TryFrom<u8> for Verdict {
    type Error = u8;
    fn try_from(number: u8) -> Result<Self, u8> {
        Self::ALL.get(usize::from(number)).copied().ok_or(number)
    }
}

/// Why a packet could not be judged. Counted and shown, never reported as an anomaly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// A fragment: the rest of the datagram is in other packets.
    Fragment = 0,
    /// Longer than can be summed.
    TooLong = 1,
    /// Bytes that could not be read, or more headers than are walked through.
    Unreadable = 2,
    /// Left out by `--sample`.
    Sampled = 3,
    /// Wrong by every reading known, but one that cannot be told without the skb's metadata may be right.
    Ambiguous = 4,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Fragment, Self::TooLong, Self::Unreadable, Self::Sampled, Self::Ambiguous];

    /// Name in events and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fragment => "fragment",
            Self::TooLong => "too-long",
            Self::Unreadable => "unreadable",
            Self::Sampled => "sampled",
            Self::Ambiguous => "ambiguous",
        }
    }
}

/// `skb->ip_summed` (include/linux/skbuff.h, "CHECKSUM_*"), or not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// CHECKSUM_NONE: at transmit, the packet's sums are final.
    None = 0,
    /// CHECKSUM_UNNECESSARY: the same at transmit.
    Unnecessary = 1,
    /// CHECKSUM_COMPLETE: the same at transmit.
    Complete = 2,
    /// CHECKSUM_PARTIAL: the sum from csum_start on is filled in later.
    Partial = 3,
    /// The skb's metadata is not to be had.
    Unknown = 4,
}

impl State {
    /// All states, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::None, Self::Unnecessary, Self::Complete, Self::Partial, Self::Unknown];

    /// Name in events and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Unnecessary => "unnecessary",
            Self::Complete => "complete",
            Self::Partial => "partial",
            Self::Unknown => "unknown",
        }
    }

    /// From the two bits of `ip_summed`.
    #[inline(always)]
    pub const fn from_ip_summed(bits: u8) -> Self {
        match bits {
            0 => Self::None,
            1 => Self::Unnecessary,
            2 => Self::Complete,
            3 => Self::Partial,
            _ => Self::Unknown,
        }
    }
}

impl TryFrom<u8> for State {
    type Error = u8;
    fn try_from(number: u8) -> Result<Self, u8> {
        Self::ALL.get(usize::from(number)).copied().ok_or(number)
    }
}

/// `SKB_GSO_UDP_TUNNEL` (include/linux/skbuff.h): a tunnel without outer checksum.
pub const SKB_GSO_UDP_TUNNEL: u32 = 1 << 9;
/// `SKB_GSO_UDP_TUNNEL_CSUM`: a tunnel with outer checksum.
pub const SKB_GSO_UDP_TUNNEL_CSUM: u32 = 1 << 10;

/// What the skb says of its checksum, beside the packet's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skb {
    /// `ip_summed`.
    pub state: State,
    /// Where the sum that is filled in later starts, bytes from the packet's first byte. Only with PARTIAL.
    pub csum_start: u32,
    /// Where that sum is put, bytes from `csum_start`. Only with PARTIAL.
    pub csum_offset: u32,
    /// Payload bytes of each segment; 0: not GSO.
    pub gso_size: u32,
    /// `SKB_GSO_*` bits.
    pub gso_type: u32,
}

impl Skb {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self { state: State::Unknown, csum_start: 0, csum_offset: 0, gso_size: 0, gso_type: 0 };
}

/// A verdict and the two values it rests on, memory order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The verdict.
    pub verdict: Verdict,
    /// The checksum field.
    pub seen: u16,
    /// What it should hold; `None` where no one value is right (`zero-outer-v6`, `malformed`).
    pub expected: Option<u16>,
}

/// What came of looking at a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It could not be judged.
    Unverified(Reason),
    /// It was judged.
    Judged(Finding),
}

/// An [`Outcome`] in one number, every part of which is always set: of an enum the compiler may carry along parts that the
/// case at hand does not have, and the kernel's verifier refuses to read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed(u64);

impl Packed {
    const JUDGED: u64 = 1 << 8;
    const EXPECTED: u64 = 1 << 9;

    /// As one number.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Back from [`Packed::to_bits`].
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    #[inline(always)]
    const fn unverified(reason: Reason) -> Self {
        Self(reason as u64)
    }

    #[inline(always)]
    const fn judged(verdict: Verdict, seen: u16) -> Self {
        Self(verdict as u64 | Self::JUDGED | (seen as u64) << 16)
    }

    #[inline(always)]
    const fn expecting(self, expected: u16) -> Self {
        Self(self.0 | Self::EXPECTED | (expected as u64) << 32)
    }

    /// Whether it was judged.
    #[inline(always)]
    pub const fn is_judged(self) -> bool {
        self.0 & Self::JUDGED != 0
    }

    /// Number of the verdict, or of the reason if it was not judged.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self.0 as u8
    }

    /// Whether it was judged a fault.
    #[inline(always)]
    pub const fn is_anomaly(self) -> bool {
        self.is_judged() && self.number() >= Verdict::NatMangledZero as u8
    }

    /// What was found, if it was judged.
    #[inline(always)]
    pub const fn finding(self) -> Finding {
        let verdict = match self.number() {
            0 => Verdict::Zero,
            1 => Verdict::Valid,
            2 => Verdict::LcoValid,
            3 => Verdict::Pending,
            4 => Verdict::NatMangledZero,
            5 => Verdict::NatStalePort,
            6 => Verdict::BadOuter,
            7 => Verdict::BadInner,
            8 => Verdict::ZeroOuterV6,
            _ => Verdict::Malformed,
        };
        let expected = if self.has_expected() { Some(self.expected()) } else { None };
        Finding { verdict, seen: self.seen(), expected }
    }

    /// The checksum field, memory order.
    #[inline(always)]
    pub const fn seen(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// What it should hold, memory order; 0 where no one value is right.
    #[inline(always)]
    pub const fn expected(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// Whether one value is right.
    #[inline(always)]
    pub const fn has_expected(self) -> bool {
        self.0 & Self::EXPECTED != 0
    }

    /// The same as an enum.
    pub fn outcome(self) -> Outcome {
        if self.is_judged() {
            return Outcome::Judged(self.finding());
        }
        let reason = Reason::ALL.get(usize::from(self.number())).copied();
        Outcome::Unverified(reason.unwrap_or(Reason::Unreadable))
    }
}

// The numbers that `finding` has are those of the enum, and none is missing. (From a table, `Verdict::ALL`, they would be read
// from a map in the kernel, which the oldest ones do not have; `zerocopy::try_transmute!` made 31 instructions more of it.)
const _: () = {
    let mut number = 0;
    while number < Verdict::ALL.len() {
        let verdict = Verdict::ALL[number];
        assert!(verdict as usize == number, "ALL is in the order of the numbers");
        assert!(Packed::judged(verdict, 0).finding().verdict as usize == number, "finding() knows the verdict");
        number += 1;
    }
};

/// What the judge asks of its surroundings. In the kernel these are maps and helpers; each is asked only when needed.
pub trait Surroundings {
    /// Whether UDP packets to this port (memory order) are tunnel packets.
    fn is_tunnel_port(&self, port: u16) -> bool;
    /// Whether a zero outer sum over IPv6 to this port (memory order) is wrong: every VXLAN device with that port was
    /// told to send one (no `udp6zerocsumtx`).
    fn zero_over_ipv6_is_wrong(&self, port: u16) -> bool;
    /// The skb's metadata.
    fn skb(&self) -> Skb;
    /// Whether this packet's whole payload is to be summed (`--sample`).
    fn sum_payload(&self) -> bool;
    /// Judges where the metadata does not tell which row applies: [`Datagram::any_reading`], which an implementation may
    /// only wrap.
    #[inline(always)]
    fn any_reading<P: Packet>(&self, packet: &P, datagram: &Datagram) -> Packed {
        datagram.any_reading(packet, self.sum_payload())
    }
}

/// The outer headers of a tunnel packet, once found; the caller needs them to report it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// IP header; its `l4` is the UDP header's offset on an uplink, the inner L4 header's on a VXLAN device.
    pub ip: Ip,
    /// What came of it.
    pub outcome: Outcome,
}

/// Judges the outer checksum of a packet leaving by an uplink. `ethertype` (memory order) is `None` for a device with
/// Ethernet headers, otherwise the protocol of the bare packet. `None`: not a tunnel packet.
#[inline(always)]
pub fn uplink<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ethertype: Option<u16>) -> Option<Found> {
    let ip = tunnel(packet, surroundings, ethertype)?;
    Some(Found { ip, outcome: outer(packet, surroundings, &ip).outcome() })
}

/// The first half of [`uplink`]: is it a tunnel packet?
#[inline(always)]
pub fn tunnel<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ethertype: Option<u16>) -> Option<Ip> {
    let (ethertype, l3) = match ethertype {
        Some(bare) => (bare, 0),
        None => packet::ethernet(packet, 0).ok()?,
    };
    let ip = packet.ip(ethertype, l3).ok()?;
    if ip.proto != proto::UDP || ip.fragment == Fragment::Later {
        return None;
    }
    surroundings.is_tunnel_port(packet.u16(ip.l4 + UDP_DST)?).then_some(ip)
}

/// What the first bytes of a frame show.
#[derive(Clone, Copy, Debug)]
pub enum Glance {
    /// Not a tunnel packet.
    Other,
    /// A tunnel packet over IPv4, without VLAN tags or IP options.
    Tunnel(Ip),
    /// [`tunnel`] has to look.
    Unclear,
}

/// Bytes that [`glance`] looks at: Ethernet, IPv4 and UDP header.
pub const GLANCE: u32 = ETHERNET + IPV4 + UDP;

/// What [`tunnel`] would say of an Ethernet frame, as far as its first [`GLANCE`] bytes tell. Most packets of a node end
/// here, so it reads at constant offsets only.
#[inline(always)]
pub fn glance<P: Packet, S: Surroundings>(head: &P, surroundings: &S) -> Glance {
    const NO_OPTIONS: u8 = 0x45;
    let look = || {
        let ethertype = head.u16(offset_of!(EthHdr, ether_type) as u32)?;
        if ethertype == ethertype::IPV6 {
            let next = head.u8(ETHERNET + offset_of!(Ipv6Hdr, next_hdr) as u32)?;
            let is_last = next == proto::TCP || next == proto::ICMPV6;
            return Some(if is_last { Glance::Other } else { Glance::Unclear });
        }
        if ethertype != ethertype::IPV4 {
            return Some(if packet::is_tag(ethertype) { Glance::Unclear } else { Glance::Other });
        }
        if head.u8(ETHERNET + offset_of!(Ipv4Hdr, proto) as u32)? != proto::UDP {
            return Some(Glance::Other);
        }
        if head.u8(ETHERNET)? != NO_OPTIONS {
            return Some(Glance::Unclear);
        }
        let ip = packet::ip(head, ethertype::IPV4, ETHERNET).ok()?;
        let is_tunnel =
            ip.fragment != Fragment::Later && surroundings.is_tunnel_port(head.u16(ETHERNET + IPV4 + UDP_DST)?);
        Some(if is_tunnel { Glance::Tunnel(Ip { l4: ETHERNET + IPV4, ..ip }) } else { Glance::Other })
    };
    look().unwrap_or(Glance::Unclear)
}

/// The second half of [`uplink`].
#[inline(always)]
pub fn outer<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ip: &Ip) -> Packed {
    if ip.fragment == Fragment::No { udp(packet, surroundings, ip, true) } else { FRAGMENT }
}

/// Judges the L4 checksum of a frame that a VXLAN device is about to encapsulate. `ethertype` as for [`uplink`].
/// `None`: a frame without a checksum that vxmon knows (ARP, SCTP, ESP, …).
#[inline(always)]
pub fn vxlan_device<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ethertype: Option<u16>) -> Option<Found> {
    let (ip, packed) = frame(packet, surroundings, ethertype)?;
    Some(Found { ip, outcome: packed.outcome() })
}

/// [`vxlan_device`] in the form for the kernel.
#[inline(always)]
pub fn frame<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ethertype: Option<u16>) -> Option<(Ip, Packed)> {
    let (ethertype, l3) = match ethertype {
        Some(bare) => (bare, 0),
        None => packet::ethernet(packet, 0).ok()?,
    };
    let ip = packet.ip(ethertype, l3).ok()?;
    let check = packet::check_offset(ip.family, ip.proto)?;
    let outcome = if ip.fragment != Fragment::No {
        FRAGMENT
    } else if ip.proto == proto::UDP {
        udp(packet, surroundings, &ip, false)
    } else {
        l4(packet, surroundings, &ip, check)
    };
    Some((ip, outcome))
}

const UNREADABLE: Packed = Packed::unverified(Reason::Unreadable);
const FRAGMENT: Packed = Packed::unverified(Reason::Fragment);
const AMBIGUOUS: Packed = Packed::unverified(Reason::Ambiguous);
const MALFORMED: Packed = Packed::judged(Verdict::Malformed, 0);
/// No IP packet is longer, jumbograms and BIG TCP aside.
const MAX_IP: u32 = 0xffff;

/// Length of the L4 part by the IP header, or what is wrong with it.
#[inline(always)]
fn l4_length<P: Packet>(packet: &P, ip: &Ip) -> Result<u32, Packed> {
    let len = packet.len();
    let end = if ip.end != 0 {
        ip.end
    } else if len > MAX_IP {
        len // the IP header has no room for the length: BIG TCP
    } else {
        return Err(MALFORMED);
    };
    if end > len || ip.l4 > end { Err(MALFORMED) } else { Ok(end - ip.l4) }
}

/// Judges a UDP checksum: the outer one of a tunnel packet, or one inside.
#[inline(always)]
fn udp<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ip: &Ip, is_outer: bool) -> Packed {
    // One after the other: of two at once the compiler carries one along that is not set, if the other one cannot be read.
    let Some(length) = packet.u16(ip.l4 + UDP_LEN) else {
        return UNREADABLE;
    };
    let Some(seen) = packet.u16(ip.l4 + UDP_CHECK) else {
        return UNREADABLE;
    };
    let available = match l4_length(packet, ip) {
        Ok(available) => available,
        Err(outcome) => return outcome,
    };
    let length = match u32::from(u16::from_be(length)) {
        // BIG TCP: the length does not fit its field, but the pseudo-header has all of it (udp_tunnel_xmit_skb()).
        length if available > MAX_IP && (length == 0 || length == available & MAX_IP) => available,
        length if length < UDP || length > available => return MALFORMED,
        length => length,
    };
    if seen == 0 {
        let wrong = is_outer
            && ip.family == Family::V6
            && packet.u16(ip.l4 + UDP_DST).is_some_and(|port| surroundings.zero_over_ipv6_is_wrong(port));
        return Packed::judged(if wrong { Verdict::ZeroOuterV6 } else { Verdict::Zero }, seen);
    }
    if ip.rerouted {
        return AMBIGUOUS;
    }
    let Some(pseudo) = packet::pseudo_header(packet, ip, length) else {
        return UNREADABLE;
    };
    let skb = surroundings.skb();
    let wrong = if is_outer { Verdict::BadOuter } else { Verdict::BadInner };
    let datagram = Datagram { at: ip.l4, length, seen, pseudo, wrong };
    match Row::of(&skb, ip.l4, length) {
        Row::MustBeZero => Packed::judged(if is_outer { Verdict::NatMangledZero } else { wrong }, seen).expecting(0),
        Row::Pending => datagram.pending(),
        Row::Lco => datagram.lco(packet, skb.csum_start, skb.csum_offset),
        Row::Full => datagram.full(packet, surroundings.sum_payload()),
        Row::Segmented => datagram.segmented(),
        Row::Any => surroundings.any_reading(packet, &datagram),
    }
}

/// Which row of the table applies to a UDP checksum that is not 0.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Row {
    /// The device sends no outer sum: something wrote to a field that was 0.
    MustBeZero,
    Pending,
    Lco,
    Full,
    /// Cut up in software later, and each part summed then.
    Segmented,
    /// The metadata does not tell.
    Any,
}

impl Row {
    #[inline(always)]
    fn of(skb: &Skb, udp: u32, length: u32) -> Self {
        match skb.state {
            State::Unknown => Self::Any,
            State::None | State::Unnecessary | State::Complete if skb.gso_size > 0 => Self::Segmented,
            State::None | State::Unnecessary | State::Complete => Self::Full,
            State::Partial if skb.csum_start == udp => Self::Pending,
            State::Partial if skb.gso_size > 0 => {
                if skb.gso_type & SKB_GSO_UDP_TUNNEL_CSUM != 0 {
                    Self::Pending
                } else if skb.gso_type & SKB_GSO_UDP_TUNNEL != 0 {
                    Self::MustBeZero
                } else {
                    Self::Any
                }
            }
            // By the distance: 6.12's verifier loses the bounds of an offset that was compared after something was added.
            State::Partial if (UDP..=length).contains(&skb.csum_start.wrapping_sub(udp)) => Self::Lco,
            State::Partial => Self::Any,
        }
    }
}

/// Judges the checksum of an inner TCP, ICMP or ICMPv6 packet.
#[inline(always)]
fn l4<P: Packet, S: Surroundings>(packet: &P, surroundings: &S, ip: &Ip, check: u32) -> Packed {
    let length = match l4_length(packet, ip) {
        Ok(length) => length,
        Err(outcome) => return outcome,
    };
    if length < check + 2 {
        return MALFORMED;
    }
    if ip.rerouted {
        return AMBIGUOUS;
    }
    let has_pseudo_header = ip.proto != proto::ICMP;
    let Some(seen) = packet.u16(ip.l4 + check) else {
        return UNREADABLE;
    };
    let Some(pseudo) = packet::pseudo_header(packet, ip, length) else {
        return UNREADABLE;
    };
    let pseudo = if has_pseudo_header { pseudo } else { Sum::ZERO };
    let skb = surroundings.skb();
    let datagram = Datagram { at: ip.l4, length, seen, pseudo, wrong: Verdict::BadInner };
    match skb.state {
        State::Partial if skb.csum_start == ip.l4 && has_pseudo_header => {
            // Some guests leave the length out of the pseudo-header of a packet to be segmented, as their own
            // hardware wants it (Windows LSO); the host's segmentation puts it right.
            let without_length = pseudo.minus(Sum::ZERO.add_u32(length.to_be())).fold();
            if skb.gso_size > 0 && same(seen, without_length) {
                datagram.found(true, Verdict::Pending, seen)
            } else {
                datagram.pending()
            }
        }
        State::None | State::Unnecessary | State::Complete if skb.gso_size > 0 => datagram.segmented(),
        State::None | State::Unnecessary | State::Complete => datagram.full(packet, surroundings.sum_payload()),
        State::Partial | State::Unknown => {
            if has_pseudo_header && same(seen, pseudo.fold()) {
                datagram.pending()
            } else {
                datagram.full(packet, surroundings.sum_payload())
            }
        }
    }
}

/// A span of bytes with a checksum in it, and the rows of the table as its methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Offset of the L4 header.
    at: u32,
    /// Length of L4 header and payload.
    length: u32,
    /// The checksum field.
    seen: u16,
    /// Pseudo-header sum, with the length.
    pseudo: Sum,
    /// The verdict if it is wrong.
    wrong: Verdict,
}

impl Datagram {
    /// All but the pseudo-header sum in one number, and so through one register.
    #[inline(always)]
    pub const fn pack(&self) -> u64 {
        (self.at & OFFSET_MASK) as u64
            | ((self.length & OFFSET_MASK) as u64) << 20
            | (self.seen as u64) << 40
            | (self.wrong as u64) << 56
    }

    /// The pseudo-header sum, with the length.
    #[inline(always)]
    pub const fn pseudo(&self) -> Sum {
        self.pseudo
    }

    /// Back from [`Datagram::pack`].
    #[inline(always)]
    pub const fn unpack(packed: u64, pseudo: Sum) -> Self {
        let is_inner = packed >> 56 == Verdict::BadInner as u64;
        Self {
            at: packed as u32 & OFFSET_MASK,
            length: (packed >> 20) as u32 & OFFSET_MASK,
            seen: (packed >> 40) as u16,
            pseudo,
            wrong: if is_inner { Verdict::BadInner } else { Verdict::BadOuter },
        }
    }

    #[inline(always)]
    fn found(&self, right: bool, good: Verdict, expected: u16) -> Packed {
        let (verdict, expected) = if right { (good, self.seen) } else { (self.wrong, expected) };
        Packed::judged(verdict, self.seen).expecting(expected)
    }

    /// The field holds the pseudo-header sum.
    #[inline(always)]
    fn pending(&self) -> Packed {
        let expected = self.pseudo.fold();
        self.found(same(self.seen, expected), Verdict::Pending, expected)
    }

    /// A packet to be segmented that is not PARTIAL. With `UDP_SEGMENT` on a device without checksum offload the field
    /// holds the pseudo-header sum (since 6.11: udp_send_skb(), net/ipv4/udp.c, "Don't checksum the payload, skb will get
    /// segmented"); in a list of packets joined on receipt (SKB_GSO_FRAGLIST) it is the first one's own, final sum.
    #[inline(always)]
    fn segmented(&self) -> Packed {
        if same(self.seen, self.pseudo.fold()) { self.pending() } else { AMBIGUOUS }
    }

    /// The field is final, by Local Checksum Offload: from `csum_start` on, the packet will sum to the complement of
    /// what stands in the inner check field now, so that the payload need not be read (lco_csum(), include/linux/skbuff.h).
    #[inline(always)]
    fn lco(&self, packet: &impl Packet, csum_start: u32, csum_offset: u32) -> Packed {
        match self.lco_sum(packet, csum_start, csum_offset) {
            Some(sum) => self.found(sum.is_all_ones(), Verdict::LcoValid, sum.minus_u16(self.seen).to_check()),
            None => UNREADABLE,
        }
    }

    #[inline(always)]
    fn lco_sum(&self, packet: &impl Packet, csum_start: u32, csum_offset: u32) -> Option<Sum> {
        let headers = packet.sum(self.at, csum_start - self.at)?;
        let inner = packet.u16(csum_start.checked_add(csum_offset)?)?;
        Some(self.pseudo.plus(headers).add_u16(!inner))
    }

    /// The field is final, over everything.
    #[inline(always)]
    fn full(&self, packet: &impl Packet, sum_payload: bool) -> Packed {
        if !sum_payload {
            return Packed::unverified(Reason::Sampled);
        }
        if self.length > MAX_IP {
            return Packed::unverified(Reason::TooLong);
        }
        match packet.sum(self.at, self.length) {
            Some(sum) => {
                let sum = self.pseudo.plus(sum);
                self.found(sum.is_all_ones(), Verdict::Valid, sum.minus_u16(self.seen).to_check())
            }
            None => UNREADABLE,
        }
    }

    /// Without the skb's metadata (UDP only): accepts what any row allows. Calls it wrong only if the inner packet
    /// shows which row applies: its own sum is pending (so the outer one is by LCO), or final (so the outer one is
    /// full). Where it shows neither, as with a tunnel inside the tunnel, it stays open.
    #[inline(always)]
    pub fn any_reading(&self, packet: &impl Packet, sum_payload: bool) -> Packed {
        if same(self.seen, self.pseudo.fold()) {
            return self.pending();
        }
        let inner = match packet::inner(packet, self.at) {
            Ok(ip) => Inner::read(packet, &ip).unwrap_or(Inner::UNKNOWN),
            Err(Stop::NotIp) => Inner::UNKNOWN,
            Err(Stop::Unreadable) => Inner::UNKNOWN,
        };
        if inner.is_known
            && let Some(sum) = self.lco_sum(packet, inner.at, inner.check)
            && sum.is_all_ones()
        {
            return self.found(true, Verdict::LcoValid, self.seen);
        }
        let full = self.full(packet, sum_payload);
        if !full.is_anomaly() {
            return full;
        }
        if inner.is_known && inner.is_pending() {
            self.lco(packet, inner.at, inner.check)
        } else if inner.is_known && inner.is_final(packet) {
            full
        } else {
            AMBIGUOUS
        }
    }
}

/// The L4 part of a packet inside a tunnel packet. Not an `Option`: the compiler reads what `None` leaves unset, which
/// verifiers before 6.3 refuse (`invalid read from stack`).
struct Inner {
    is_known: bool,
    at: u32,
    check: u32,
    length: u32,
    seen: u16,
    pseudo: Sum,
}

impl Inner {
    const UNKNOWN: Self = Self { is_known: false, at: 0, check: 0, length: 0, seen: 0, pseudo: Sum::ZERO };

    #[inline(always)]
    fn read(packet: &impl Packet, ip: &Ip) -> Option<Self> {
        let check = packet::check_offset(ip.family, ip.proto)?;
        let length = l4_length(packet, ip).ok()?;
        if ip.fragment != Fragment::No || ip.rerouted || length < check + 2 {
            return None;
        }
        let pseudo = if ip.proto == proto::ICMP { Sum::ZERO } else { packet::pseudo_header(packet, ip, length)? };
        Some(Self { is_known: true, at: ip.l4, check, length, seen: packet.u16(ip.l4 + check)?, pseudo })
    }

    #[inline(always)]
    fn is_pending(&self) -> bool {
        self.seen != 0 && same(self.seen, self.pseudo.fold())
    }

    #[inline(always)]
    fn is_final(&self, packet: &impl Packet) -> bool {
        // RFC 768: 0 means none. A tunnel inside the tunnel, say, of which the checksum within may be pending.
        let unused = self.seen == 0 && self.check == UDP_CHECK;
        !unused
            && self.length <= MAX_IP
            && packet.sum(self.at, self.length).is_some_and(|sum| self.pseudo.plus(sum).is_all_ones())
    }
}
