//! What the probe on `nf_nat_setup_info()` notes of each NAT that it sees set up, and what the daemon tells it.
//!
//! Layout only. The probe notes the source NAT of UDP packets to tunnel ports in one network namespace: by the
//! connection's original tuple, what it became and by which flags.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::conntrack::Tuple;

/// Name of the read-only global.
pub const CONFIG: &str = "NAT_CONFIG";
/// Section, and so name of the map, of the table of UDP ports: a byte for each, not 0 for a tunnel port, indexed by the port
/// in memory order.
pub const PORTS_MAP: &str = ".bss.nat_ports";
/// Section, and so name of the map, of a counter: notes that could not be made.
pub const LOST_MAP: &str = ".bss.nat_lost";
/// Name of the bounded LRU map from the original tuple (its direction 0) to [`Translation`].
pub const TRANSLATIONS_MAP: &str = "TRANSLATIONS";
/// Connections noted at a time; the least recently noted gives way.
pub const TRANSLATIONS: u32 = 8192;
/// Calls of the function that have not returned, at a time.
pub const PENDING: u32 = 4096;
/// The function that is probed (net/netfilter/nf_nat_core.c).
pub const FUNCTION: &str = "nf_nat_setup_info";
/// Name of the program at its start.
pub const ENTRY_PROGRAM: &str = "vxmon_nat_entry";
/// Name of the program at its return.
pub const RETURN_PROGRAM: &str = "vxmon_nat_return";

/// Bytes in the port table.
pub const PORTS: usize = 1 << 16;

/// In place of an offset: the kernel has no such member.
pub const NO_OFFSET: u32 = u32::MAX;

/// Settings fixed at load. Offsets in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Inode number of the network namespace; others are left out.
    pub netns: u32,
    /// The original tuple in `struct nf_conn`.
    pub tuple_orig: u32,
    /// The reply tuple in `struct nf_conn`.
    pub tuple_reply: u32,
    /// `status` in `struct nf_conn` (unsigned long).
    pub status: u32,
    /// `ct_net.net` in `struct nf_conn` (pointer).
    pub net: u32,
    /// `ns.inum` in `struct net` (u32).
    pub inum: u32,
    /// `zone.id` in `struct nf_conn` (u16), or [`NO_OFFSET`].
    pub zone: u32,
}

/// A source NAT that was set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Translation {
    /// The connection's reply direction, and so what NAT made of it.
    pub reply: Tuple,
    /// `bpf_ktime_get_ns()` when the function was entered: CLOCK_MONOTONIC, ns.
    pub time_ns: u64,
    /// Flags of the range: `NF_NAT_RANGE_*`, include/uapi/linux/netfilter/nf_nat.h.
    pub flags: u32,
    /// Conntrack zone.
    pub zone: u32,
}

const _: () = assert!(size_of::<Translation>() == 56);

#[cfg(feature = "aya")]
mod pod {
    #![expect(unsafe_code, reason = "aya's Pod is an unsafe marker; zerocopy's derives prove what it asks")]
    // SAFETY: repr(C), integers only, no padding (IntoBytes is derived).
    unsafe impl aya::Pod for super::Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Translation {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::conntrack::Tuple {}
}
