//! The connection inside the tunnel: its key, and what the kernel program remembers of one that had bad packets.
//!
//! The key is made here, once, for the kernel program and for the daemon. Nothing here knows of times to come: what a
//! retry may bring is the daemon's business.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    event::role,
    packet::{self, Fragment, Ip, Packet, UDP, proto},
};

/// One direction of a connection inside a tunnel, or of a frame that is about to enter one. The outer packets of one
/// connection may differ in port (`net.core.txrehash`, NAT); these do not.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Connection {
    /// Source address, memory order; IPv4 in the first word.
    pub src: [u32; 4],
    /// Destination address.
    pub dst: [u32; 4],
    /// Source port, memory order; 0 if the protocol has none.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// The VNI; [`NO_VNI`] if the tunnel packet has none; of a frame on a VXLAN device, [`DEVICE`] and its index.
    pub scope: u32,
    /// IP protocol, and in the next byte the IP version.
    pub proto: u32,
}

const _: () = assert!(size_of::<Connection>() == 44);

/// [`Connection::scope`] of a tunnel packet without a VNI.
pub const NO_VNI: u32 = 1 << 30;
/// Bit of [`Connection::scope`]: the rest is the index of the VXLAN device that was about to encapsulate the frame.
pub const DEVICE: u32 = 1 << 31;

/// TCP flag bits (RFC 9293, section 3.1).
pub mod tcp_flag {
    /// The first packet of a direction.
    pub const SYN: u8 = 2;
    /// The connection is refused or aborted.
    pub const RST: u8 = 4;
}

/// Bits of [`Story::state`].
pub mod story_flag {
    /// The next good packet is to be sent to the daemon.
    pub const OPEN: u32 = 1;
    /// A good SYN was; the next good packet that is no SYN is still wanted.
    pub const SYN_TOLD: u32 = 2;
}

/// What the kernel program remembers of a connection that had bad packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Story {
    /// Bad packets so far.
    pub bad: u64,
    /// TCP SYNs among them.
    pub bad_syns: u64,
    /// When the last bad one left, CLOCK_MONOTONIC, ns.
    pub last_bad_ns: u64,
    /// See [`story_flag`].
    pub state: u32,
    /// Padding, zero.
    pub reserved: u32,
}

/// Finds the connection that a judged packet belongs to, and writes it to `found`: by the packet inside if `role` is that
/// of an uplink (where `ip` is the outer header), else by `ip` itself, seen on the device `ifindex`. The TCP flags;
/// `None` if there is none: not IP, or not all to be read.
#[inline(always)]
pub fn connection<P: Packet>(packet: &P, ip: &Ip, seen_as: u8, ifindex: u32, found: &mut Connection) -> Option<u8> {
    let (ip, scope) = if seen_as == role::UPLINK {
        let vni = packet::vxlan(packet, ip.l4 + UDP)?.vni;
        (packet::inner(packet, ip.l4).ok()?, vni.unwrap_or(NO_VNI))
    } else {
        (*ip, ifindex | DEVICE)
    };
    if ip.fragment == Fragment::Later {
        return None;
    }
    (found.src, found.dst) = packet::addresses(packet, &ip)?;
    (found.sport, found.dport) = (0, 0);
    if ip.proto == proto::TCP || ip.proto == proto::UDP {
        (found.sport, found.dport) = (packet.u16(ip.l4)?, packet.u16(ip.l4 + 2)?);
    }
    let version = match ip.family {
        packet::Family::V4 => 4,
        packet::Family::V6 => 6,
    };
    (found.scope, found.proto) = (scope, u32::from(ip.proto) | version << 8);
    if ip.proto == proto::TCP { packet.u8(ip.l4 + 13) } else { Some(0) }
}
