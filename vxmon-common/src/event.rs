//! What crosses the ring buffer: one anomaly, as the kernel program saw it.
//!
//! Integers only, explicit padding, no enum: the daemon copies the bytes out (zerocopy) and checks each number.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::conntrack::Tuple;

/// Bytes of the packet's head that an event carries: enough for VLAN tags, an IPv6 underlay, and the inner TCP header
/// over IPv6.
pub const HEAD: usize = 192;

/// Bits of [`Event::flags`].
pub mod event_flag {
    /// `ct_orig`, `ct_reply` and `ct_status` were read from the skb.
    pub const CONNTRACK: u8 = 1;
    /// The skb has no conntrack entry: untracked, or no NAT on this path.
    pub const NO_CONNTRACK: u8 = 2;
    /// `expected` holds a value.
    pub const EXPECTED: u8 = 4;
    /// `predicted` holds a value.
    pub const PREDICTED: u8 = 8;
    /// The predicted value is the seen one.
    pub const PROVED: u8 = 16;
    /// The packet has no Ethernet header.
    pub const BARE: u8 = 32;
    /// `csum_start` and `csum_offset` hold values.
    pub const CSUM_START: u8 = 64;
    /// `mark` is not known.
    pub const NO_MARK: u8 = 128;
}

/// Values of [`Event::role`].
pub mod role {
    /// Seen leaving by an uplink: the outer packet was judged.
    pub const UPLINK: u8 = 0;
    /// Seen entering a VXLAN device: the frame to be encapsulated was judged.
    pub const VXLAN: u8 = 1;
}

/// One anomaly; or, with a good verdict, the follow-up on one: a good packet of a connection that had bad ones.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Event {
    /// `bpf_ktime_get_ns()`: CLOCK_MONOTONIC, ns.
    pub time_ns: u64,
    /// Anomalies of this flow and verdict so far, this one included.
    pub count: u64,
    /// Of these, how many came after the last one sent and were not sent themselves.
    pub suppressed: u64,
    /// `status` of the conntrack entry (IPS_* bits, include/uapi/linux/netfilter/nf_conntrack_common.h).
    pub ct_status: u64,
    /// Interface index of the device.
    pub ifindex: u32,
    /// Length of the packet in bytes, link-layer header included.
    pub len: u32,
    /// `skb->mark`.
    pub mark: u32,
    /// `SKB_GSO_*` bits.
    pub gso_type: u32,
    /// Payload bytes of each segment; 0: not GSO.
    pub gso_size: u32,
    /// Where the pending sum starts, bytes from the packet's first byte.
    pub csum_start: u32,
    /// Where it is put, bytes from `csum_start`.
    pub csum_offset: u32,
    /// Offset of the judged packet's IP header.
    pub l3: u32,
    /// Offset of its L4 header.
    pub l4: u32,
    /// The checksum field, memory order.
    pub seen: u16,
    /// What it should hold, memory order.
    pub expected: u16,
    /// What the named fault leaves, memory order.
    pub predicted: u16,
    /// EtherType in memory order if the packet has no Ethernet header.
    pub bare_ethertype: u16,
    /// [`crate::judge::Verdict`].
    pub verdict: u8,
    /// [`crate::judge::State`].
    pub state: u8,
    /// See [`role`].
    pub role: u8,
    /// See [`event_flag`].
    pub flags: u8,
    /// The connection's original direction.
    pub ct_orig: Tuple,
    /// The connection's reply direction.
    pub ct_reply: Tuple,
    /// When the connection's last bad packet before this one left, as `time_ns`; 0: none, or not known.
    pub last_bad_ns: u64,
    /// Bad packets of the connection inside so far, this one included if it is one; 0: not known. Ends at the top.
    pub attempts: u32,
    /// TCP SYNs among them.
    pub bad_syns: u32,
    /// Bytes in `head` that count.
    pub head_len: u32,
    /// Padding, zero.
    pub reserved: u32,
    /// The packet's first bytes.
    pub head: [u8; HEAD],
}

const _: () = assert!(size_of::<Event>() == 376 && align_of::<Event>() == 8);

/// Key of the map of repeated anomalies: one outer flow (inner flow on a VXLAN device), device and verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowKey {
    /// Source address, memory order; IPv4 in the first word.
    pub src: [u32; 4],
    /// Destination address.
    pub dst: [u32; 4],
    /// Source port, memory order.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Interface index.
    pub ifindex: u32,
    /// [`crate::judge::Verdict`].
    pub verdict: u32,
}

/// Value of that map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowCount {
    /// Anomalies so far.
    pub count: u64,
    /// `count` when one was last sent.
    pub sent_at_count: u64,
    /// When one was last sent, CLOCK_MONOTONIC, ns.
    pub sent_ns: u64,
}
