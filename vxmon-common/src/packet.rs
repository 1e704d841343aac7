//! Reading and summing the bytes of a packet, and the walk through its headers.
//!
//! [`Packet`] is the one place where kernel and userspace differ: the kernel reads an skb (directly where the data is
//! linear, by helper elsewhere), userspace reads a slice. Nothing here judges: a length that contradicts another is
//! handed on for the judge to name.

use core::mem::offset_of;

use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
    vlan::VlanHdr,
    vxlan::VxlanHdr,
};

use crate::checksum::{Sum, sum_bytes};

/// Bytes of a packet from its first header on.
///
/// Offsets count from the first byte of the packet. The integers come **as they lie in memory**, without conversion
/// (see the crate's note on byte order). Every read outside what can be read gives `None`, never a panic.
pub trait Packet {
    /// Length of the packet in bytes, also of what cannot be read (a truncated capture record).
    fn len(&self) -> u32;
    /// One byte.
    fn u8(&self, at: u32) -> Option<u8>;
    /// Two bytes in memory order.
    fn u16(&self, at: u32) -> Option<u16>;
    /// Four bytes in memory order.
    fn u32(&self, at: u32) -> Option<u32>;
    /// Eight bytes in memory order.
    fn u64(&self, at: u32) -> Option<u64>;
    /// The ones' complement sum of `len` bytes; an odd last byte is padded with zero.
    fn sum(&self, at: u32, len: u32) -> Option<Sum>;
    /// The same offset, of which the verifier is to forget how it came about: it would follow each way through a chain of
    /// extension headers by itself. In userspace nothing.
    #[inline(always)]
    fn forget(&self, offset: u32) -> u32 {
        offset
    }
    /// Walks an IP header with its options or extension headers: [`ip`], which an implementation may only wrap.
    /// `ethertype` in memory order.
    #[inline(always)]
    fn ip(&self, ethertype: u16, l3: u32) -> Result<Ip, Stop>
    where
        Self: Sized,
    {
        ip(self, ethertype, l3)
    }
    /// Walks on to the end of a chain of extension headers, at most [`MAX_EXTENSIONS`] of them; an implementation may only
    /// unroll it.
    #[inline(always)]
    fn extensions(&self, chain: &mut Chain) -> Result<(), Stop>
    where
        Self: Sized,
    {
        for _ in 0..MAX_EXTENSIONS {
            if chain.is_at_end() {
                break;
            }
            chain.step(self)?;
        }
        Ok(())
    }
    /// Whether the packet has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A packet in memory: a frame from a packet socket, or a capture record.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    bytes: &'a [u8],
    len: u32,
}

impl<'a> Bytes<'a> {
    /// A packet of which every byte is there.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::truncated(bytes, 0)
    }

    /// A packet of which only the first `bytes` were kept out of `len` (a snap length, the head in an event).
    pub fn truncated(bytes: &'a [u8], len: u32) -> Self {
        let kept = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Self { bytes, len: len.max(kept) }
    }

    fn array<const N: usize>(&self, at: u32) -> Option<[u8; N]> {
        let at = usize::try_from(at).ok()?;
        self.bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }
}

impl Packet for Bytes<'_> {
    fn len(&self) -> u32 {
        self.len
    }
    fn u8(&self, at: u32) -> Option<u8> {
        self.array::<1>(at).map(|[byte]| byte)
    }
    fn u16(&self, at: u32) -> Option<u16> {
        self.array(at).map(u16::from_ne_bytes)
    }
    fn u32(&self, at: u32) -> Option<u32> {
        self.array(at).map(u32::from_ne_bytes)
    }
    fn u64(&self, at: u32) -> Option<u64> {
        self.array(at).map(u64::from_ne_bytes)
    }
    fn sum(&self, at: u32, len: u32) -> Option<Sum> {
        let at = usize::try_from(at).ok()?;
        let len = usize::try_from(len).ok()?;
        self.bytes.get(at..at.checked_add(len)?).map(sum_bytes)
    }
}

/// Length of an Ethernet header without tags, bytes.
pub const ETHERNET: u32 = EthHdr::LEN as u32;
/// Length of an IPv4 header without options, bytes.
pub const IPV4: u32 = Ipv4Hdr::LEN as u32;
/// Length of a UDP header, bytes.
pub const UDP: u32 = UdpHdr::LEN as u32;
/// Length of a VXLAN header, bytes (RFC 7348, section 5).
pub const VXLAN: u32 = VxlanHdr::LEN as u32;
/// VLAN tags that are walked through: 802.1ad, 802.1Q, and one to spare.
const MAX_TAGS: u32 = 3;
/// IPv6 extension headers that are walked through; senders use each at most once or twice (RFC 8200, section 4.1).
pub const MAX_EXTENSIONS: u32 = 8;

/// IP protocol numbers as they stand in a header (network-types names them).
pub mod proto {
    use network_types::ip::IpProto;
    /// TCP.
    pub const TCP: u8 = IpProto::Tcp as u8;
    /// UDP.
    pub const UDP: u8 = IpProto::Udp as u8;
    /// ICMP for IPv4.
    pub const ICMP: u8 = IpProto::Icmp as u8;
    /// ICMPv6.
    pub const ICMPV6: u8 = IpProto::Ipv6Icmp as u8;
}

/// EtherType values in memory order.
pub mod ethertype {
    use network_types::eth::EtherType;
    /// IPv4.
    pub const IPV4: u16 = EtherType::Ipv4 as u16;
    /// IPv6.
    pub const IPV6: u16 = EtherType::Ipv6 as u16;
}

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Where in a fragmented IP packet these bytes stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    No,
    /// The first fragment: has the L4 header, lacks the end of the payload.
    First,
    /// A later fragment: has no L4 header.
    Later,
}

/// An IP header and the extension headers behind it.
#[derive(Clone, Copy, Debug)]
pub struct Ip {
    /// Version.
    pub family: Family,
    /// Offset of the IP header.
    pub l3: u32,
    /// Offset of what follows the IP header, its options and extension headers.
    pub l4: u32,
    /// Where the IP packet ends by its own length field; not checked against the packet's length. 0 where the header
    /// gives none (BIG TCP, RFC 2675 jumbograms).
    pub end: u32,
    /// Protocol of what follows.
    pub proto: u8,
    /// Fragmentation.
    pub fragment: Fragment,
    /// An IPv6 routing header has segments left: the checksum was made for a destination other than the header's
    /// (RFC 8200, section 8.1).
    pub rerouted: bool,
}

impl Ip {
    /// Packs the result of a walk into one number, and so through one register.
    #[inline(always)]
    pub const fn pack(walk: Result<Self, Stop>) -> u64 {
        match walk {
            Err(Stop::NotIp) => 0,
            Err(Stop::Unreadable) => 1,
            Ok(ip) => {
                let fragment = match ip.fragment {
                    Fragment::No => 0,
                    Fragment::First => 1,
                    Fragment::Later => 2,
                };
                let v6 = matches!(ip.family, Family::V6) as u64;
                2 | (ip.rerouted as u64) << 2
                    | v6 << 3
                    | fragment << 4
                    | (ip.proto as u64) << 8
                    | ((ip.l4 & OFFSET_MASK) as u64) << 16
                    | ((ip.end & OFFSET_MASK) as u64) << 40
            }
        }
    }

    /// Back from [`Ip::pack`]; `l3` is where the walk began.
    #[inline(always)]
    pub const fn unpack(packed: u64, l3: u32) -> Result<Self, Stop> {
        match packed & 3 {
            0 => Err(Stop::NotIp),
            1 => Err(Stop::Unreadable),
            _ => Ok(Self {
                family: if packed & 8 == 0 { Family::V4 } else { Family::V6 },
                l3,
                l4: (packed >> 16) as u32 & OFFSET_MASK,
                end: (packed >> 40) as u32 & OFFSET_MASK,
                proto: (packed >> 8) as u8,
                fragment: match packed >> 4 & 3 {
                    0 => Fragment::No,
                    1 => Fragment::First,
                    _ => Fragment::Later,
                },
                rerouted: packed & 4 != 0,
            }),
        }
    }
}

/// Bits of an offset in a packed [`Ip`]: no header walk and no IP length field gets beyond.
pub const OFFSET_MASK: u32 = (1 << 20) - 1;

/// Why a header walk ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Not IP, or an IP version that contradicts the EtherType.
    NotIp,
    /// The bytes are not there, or more headers than are walked through.
    Unreadable,
}

/// Walks an Ethernet header and its VLAN tags: EtherType (memory order) and offset of what follows.
#[inline(always)]
pub fn ethernet<P: Packet>(packet: &P, at: u32) -> Result<(u16, u32), Stop> {
    let mut ethertype = packet.u16(at + offset_of!(EthHdr, ether_type) as u32).ok_or(Stop::Unreadable)?;
    let mut next = at + ETHERNET;
    for _ in 0..MAX_TAGS {
        if !is_tag(ethertype) {
            break;
        }
        ethertype = packet.u16(next + offset_of!(VlanHdr, ether_type) as u32).ok_or(Stop::Unreadable)?;
        next += VlanHdr::LEN as u32;
    }
    if is_tag(ethertype) { Err(Stop::Unreadable) } else { Ok((ethertype, next)) }
}

/// Whether a VLAN tag follows.
#[inline(always)]
pub const fn is_tag(ethertype: u16) -> bool {
    ethertype == EtherType::Ieee8021q as u16
        || ethertype == EtherType::Ieee8021ad as u16
        || ethertype == EtherType::Ieee8021QinQ1 as u16
}

/// Walks an IP header with its options or extension headers. `ethertype` in memory order. Call it as [`Packet::ip`].
#[inline(always)]
pub fn ip<P: Packet>(packet: &P, ethertype: u16, l3: u32) -> Result<Ip, Stop> {
    if ethertype == ethertype::IPV4 {
        ipv4(packet, l3)
    } else if ethertype == ethertype::IPV6 {
        ipv6(packet, l3)
    } else {
        Err(Stop::NotIp)
    }
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &P, l3: u32) -> Result<Ip, Stop> {
    const MORE_OR_OFFSET: u16 = 0x3fff_u16.to_be();
    const OFFSET: u16 = 0x1fff_u16.to_be();
    let version_ihl = packet.u8(l3).ok_or(Stop::Unreadable)?;
    let proto = packet.u8(l3 + offset_of!(Ipv4Hdr, proto) as u32).ok_or(Stop::Unreadable)?;
    let ihl = u32::from(version_ihl & 0xf) * 4;
    if version_ihl >> 4 != 4 || ihl < IPV4 {
        return Err(Stop::NotIp);
    }
    let total = packet.u16(l3 + offset_of!(Ipv4Hdr, tot_len) as u32).ok_or(Stop::Unreadable)?;
    let frags = packet.u16(l3 + offset_of!(Ipv4Hdr, frags) as u32).ok_or(Stop::Unreadable)?;
    let total = u32::from(u16::from_be(total));
    Ok(Ip {
        family: Family::V4,
        l3,
        l4: l3 + ihl,
        end: if total == 0 { 0 } else { l3 + total },
        proto,
        fragment: match (frags & MORE_OR_OFFSET, frags & OFFSET) {
            (0, _) => Fragment::No,
            (_, 0) => Fragment::First,
            _ => Fragment::Later,
        },
        rerouted: false,
    })
}

#[inline(always)]
fn ipv6<P: Packet>(packet: &P, l3: u32) -> Result<Ip, Stop> {
    if packet.u8(l3).ok_or(Stop::Unreadable)? >> 4 != 6 {
        return Err(Stop::NotIp);
    }
    let payload = packet.u16(l3 + offset_of!(Ipv6Hdr, payload_len) as u32).ok_or(Stop::Unreadable)?;
    let payload = u32::from(u16::from_be(payload));
    let next = packet.u8(l3 + offset_of!(Ipv6Hdr, next_hdr) as u32).ok_or(Stop::Unreadable)?;
    let l4 = l3 + Ipv6Hdr::LEN as u32;
    let end = if payload == 0 { 0 } else { l4 + payload };
    let mut chain = Chain { next, l4, fragment: Fragment::No, rerouted: false };
    packet.extensions(&mut chain)?;
    if !chain.is_at_end() {
        return Err(Stop::Unreadable);
    }
    let Chain { next, l4, fragment, rerouted } = chain;
    Ok(Ip { family: Family::V6, l3, l4, end, proto: next, fragment, rerouted })
}

/// How far a chain of IPv6 extension headers was walked through.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// Kind of the next header,
    next: u8,
    /// and its offset.
    l4: u32,
    fragment: Fragment,
    rerouted: bool,
}

impl Chain {
    /// Whether what comes next is no extension header, or is in another fragment.
    #[inline(always)]
    pub fn is_at_end(&self) -> bool {
        !is_extension(self.next) || self.fragment == Fragment::Later
    }

    /// One header further.
    #[inline(always)]
    pub fn step<P: Packet>(&mut self, packet: &P) -> Result<(), Stop> {
        const OFFSET_OR_MORE: u16 = 0xfff9_u16.to_be();
        const OFFSET: u16 = 0xfff8_u16.to_be();
        let Self { next, mut l4, mut fragment, mut rerouted } = *self;
        let header = packet.u16(l4).ok_or(Stop::Unreadable)?.to_ne_bytes();
        let length = u32::from(header[1]);
        if next == IpProto::Ipv6Frag as u8 {
            let field = packet.u16(l4 + 2).ok_or(Stop::Unreadable)?;
            if field & OFFSET_OR_MORE != 0 {
                fragment = if field & OFFSET == 0 { Fragment::First } else { Fragment::Later };
            }
            l4 += 8;
        } else if next == IpProto::Ah as u8 {
            l4 += (length + 2) * 4; // RFC 4302, section 2.2
        } else {
            if next == IpProto::Ipv6Route as u8 {
                rerouted |= packet.u8(l4 + 3).ok_or(Stop::Unreadable)? != 0;
            }
            l4 += (length + 1) * 8; // RFC 8200, section 4.3
        }
        *self = Self { next: header[0], l4: packet.forget(l4), fragment, rerouted };
        Ok(())
    }

    /// In one number, as [`Ip::pack`].
    #[inline(always)]
    pub const fn pack(&self) -> u64 {
        let Self { next, l4, fragment, rerouted } = *self;
        Ip::pack(Ok(Ip { family: Family::V6, l3: 0, l4, end: 0, proto: next, fragment, rerouted }))
    }

    /// Back from [`Chain::pack`].
    #[inline(always)]
    pub const fn unpack(packed: u64) -> Option<Self> {
        match Ip::unpack(packed, 0) {
            Ok(Ip { l4, proto, fragment, rerouted, .. }) => Some(Self { next: proto, l4, fragment, rerouted }),
            Err(_) => None,
        }
    }
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    next == IpProto::HopOpt as u8
        || next == IpProto::Ipv6Route as u8
        || next == IpProto::Ipv6Frag as u8
        || next == IpProto::Ipv6Opts as u8
        || next == IpProto::Ah as u8
}

/// The pseudo-header sum: addresses, protocol, and L4 length in bytes (RFC 768; RFC 8200, section 8.1).
#[inline(always)]
pub fn pseudo_header<P: Packet>(packet: &P, ip: &Ip, length: u32) -> Option<Sum> {
    let addresses = match ip.family {
        Family::V4 => Sum::ZERO.add_u64(packet.u64(ip.l3 + offset_of!(Ipv4Hdr, src_addr) as u32)?),
        Family::V6 => {
            let at = ip.l3 + offset_of!(Ipv6Hdr, src_addr) as u32;
            Sum::ZERO
                .add_u64(packet.u64(at)?)
                .add_u64(packet.u64(at + 8)?)
                .add_u64(packet.u64(at + 16)?)
                .add_u64(packet.u64(at + 24)?)
        }
    };
    Some(addresses.add_u16(u16::from(ip.proto).to_be()).add_u32(length.to_be()))
}

/// Source and destination address, memory order; an IPv4 address stands in the first word.
#[inline(always)]
pub fn addresses<P: Packet>(packet: &P, ip: &Ip) -> Option<([u32; 4], [u32; 4])> {
    match ip.family {
        Family::V4 => {
            let at = ip.l3 + offset_of!(Ipv4Hdr, src_addr) as u32;
            Some(([packet.u32(at)?, 0, 0, 0], [packet.u32(at + 4)?, 0, 0, 0]))
        }
        Family::V6 => {
            let at = ip.l3 + offset_of!(Ipv6Hdr, src_addr) as u32;
            let word = |n: u32| packet.u32(at + 4 * n);
            Some(([word(0)?, word(1)?, word(2)?, word(3)?], [word(4)?, word(5)?, word(6)?, word(7)?]))
        }
    }
}

/// Offset of the checksum field in a UDP header.
pub const UDP_CHECK: u32 = offset_of!(UdpHdr, check) as u32;
/// Offset of the destination port in a UDP header.
pub const UDP_DST: u32 = offset_of!(UdpHdr, dst) as u32;
/// Offset of the length in a UDP header.
pub const UDP_LEN: u32 = offset_of!(UdpHdr, len) as u32;

/// Offset of the checksum field in the L4 header of a protocol that has one which vxmon knows.
#[inline(always)]
pub const fn check_offset(family: Family, protocol: u8) -> Option<u32> {
    match (family, protocol) {
        (_, proto::TCP) => Some(offset_of!(network_types::tcp::TcpHdr, check) as u32),
        (_, proto::UDP) => Some(UDP_CHECK),
        (Family::V4, proto::ICMP) | (Family::V6, proto::ICMPV6) => Some(2),
        _ => None,
    }
}

/// A VXLAN header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The VNI, if the I flag is set (RFC 7348, section 5).
    pub vni: Option<u32>,
    /// Where the inner packet begins.
    pub inner: u32,
    /// EtherType of the inner packet in memory order if it has no Ethernet header of its own (VXLAN-GPE,
    /// draft-ietf-nvo3-vxlan-gpe, section 3); `None` for Ethernet.
    pub bare: Option<u16>,
}

/// Reads the VXLAN header at `at`.
#[inline(always)]
pub fn vxlan<P: Packet>(packet: &P, at: u32) -> Option<Vxlan> {
    const GPE_NEXT_PROTOCOL: u8 = 0x04;
    let flags = packet.u32(at)?.to_ne_bytes();
    let vni = u32::from_be(packet.u32(at + offset_of!(VxlanHdr, vni) as u32)?) >> 8;
    let bare = match (flags[0] & GPE_NEXT_PROTOCOL != 0, flags[3]) {
        (true, 1) => Some(ethertype::IPV4),
        (true, 2) => Some(ethertype::IPV6),
        _ => None,
    };
    Some(Vxlan { vni: (flags[0] & 0x08 != 0).then_some(vni), inner: at + VXLAN, bare })
}

/// Walks the packet inside a VXLAN packet whose outer UDP header is at `udp`.
#[inline(always)]
pub fn inner<P: Packet>(packet: &P, udp: u32) -> Result<Ip, Stop> {
    let vxlan = vxlan(packet, udp + UDP).ok_or(Stop::Unreadable)?;
    match vxlan.bare {
        Some(ethertype) => packet.ip(ethertype, vxlan.inner),
        None => {
            let (ethertype, l3) = ethernet(packet, vxlan.inner)?;
            packet.ip(ethertype, l3)
        }
    }
}
