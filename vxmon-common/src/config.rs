//! What the daemon tells the kernel program.
//!
//! [`Config`] is a read-only global, fixed at load: the verifier sees its values as constants and drops the code that
//! they switch off. The tables are array maps, changed while the program runs.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Name of the read-only global.
pub const CONFIG: &str = "CONFIG";
/// Section, and so name of the map, of the table of UDP ports: [`PORTS`] bytes, indexed by the port in memory order, see
/// [`port_flag`]. This table and the next two are globals: the program reaches them without a lookup.
pub const PORTS_MAP: &str = ".bss.ports";
/// Section of the table from interface index to slot: [`SLOTS_TABLE`] bytes, indexed by `ifindex & 0xffff`.
pub const SLOTS_MAP: &str = ".bss.slots";
/// Section of the table of [`Device`], [`SLOTS`] of them, indexed by slot.
pub const DEVICES_MAP: &str = ".bss.devices";
/// Name of the per-CPU map of [`crate::counters::Counters`], indexed by slot.
pub const COUNTERS_MAP: &str = "COUNTERS";
/// Name of the ring buffer of [`crate::event::Event`].
pub const EVENTS_MAP: &str = "EVENTS";
/// Name of the bounded LRU map of repeated anomalies.
pub const FLOWS_MAP: &str = "FLOWS";
/// Name of the bounded LRU map from [`crate::story::Connection`] to [`crate::story::Story`].
pub const STORIES_MAP: &str = "STORIES";
/// Name of the program for uplinks.
pub const UPLINK_PROGRAM: &str = "vxmon_uplink";
/// Name of the program for VXLAN devices.
pub const VXLAN_PROGRAM: &str = "vxmon_vxlan";

/// Bytes in the port table.
pub const PORTS: usize = 1 << 16;
/// Bytes in the slot table.
pub const SLOTS_TABLE: usize = 1 << 16;
/// Slots: 0 means "not watched", so at most one device fewer can be watched at a time.
pub const SLOTS: u32 = slot_bits::SLOT as u32 + 1;
/// Flows whose repeats are counted at a time; the least recently seen gives way.
pub const FLOWS: u32 = 8192;
/// Connections that had bad packets and are remembered at a time; the least recently seen gives way. The daemon keeps
/// half as many, so that those it waits for are not pushed out.
pub const STORIES: u32 = 8192;
/// Size of the ring buffer, bytes: some 1,300 events, as many as arrive in a second of a storm before the daemon is
/// scheduled once.
pub const RING: u32 = 1 << 19;
/// Repeats of a flow's anomaly are sent no more often than this, ns.
pub const REPEAT_INTERVAL_NS: u64 = 1_000_000_000;

/// Bits of an entry in the port table.
pub mod port_flag {
    /// Packets to this port are tunnel packets.
    pub const TUNNEL: u8 = 1;
    /// A zero outer sum over IPv6 is wrong on this port.
    pub const NO_ZERO_IPV6: u8 = 2;
}

/// Bits of an entry in the slot table.
pub mod slot_bits {
    /// The slot's number.
    pub const SLOT: u8 = 0x7f;
    /// The device's packets have no Ethernet header.
    pub const BARE: u8 = 0x80;
}

/// Bits of [`Device::flags`].
pub mod device_flag {
    /// Another watched device lies below this one: remember what passed.
    pub const HAS_LOWER: u32 = 2;
    /// Good packets may belong to a connection whose recovery is waited for: look them up.
    pub const FOLLOW: u32 = 4;
}

/// One watched device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Device {
    /// Interface index.
    pub ifindex: u32,
    /// See [`device_flag`].
    pub flags: u32,
    /// Slots of the watched devices stacked on this one (VLAN, bond, bridge, macvlan), a bit each: a packet they have
    /// counted is not counted again here.
    pub above: [u64; 2],
}

/// The table of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Devices(pub [Device; SLOTS as usize]);

/// Values of [`Config::has_skb`].
pub mod skb_access {
    /// The skb's metadata is not read.
    pub const NONE: u32 = 0;
    /// A window of it is copied (`bpf_probe_read_kernel()`).
    pub const COPY: u32 = 1;
    /// It is read in place, through `bpf_cast_to_kern_ctx()`.
    pub const CAST: u32 = 2;
}

/// What the object calls in place of the kernel function `bpf_cast_to_kern_ctx()`: the daemon puts in the number that the
/// running kernel's BTF has for it, or takes the call out. "vxca"; no helper has such a number.
pub const CAST: i32 = 0x7678_6361;

/// Bytes of the skb that the program reads at once to get at its metadata.
pub const WINDOW: usize = 160;

/// Settings fixed at load. All offsets in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Sum the payload of one packet in this many; 0 and 1: of each.
    pub sample: u32,
    /// Bytes that `bpf_csum_diff` takes at once: 512 on kernels that copy them to a scratchpad first.
    pub csum_chunk: u32,
    /// How the skb's metadata is read, see [`skb_access`]; the offsets below count unless it is not.
    pub has_skb: u32,
    /// Start of the window in `struct sk_buff`; the next offsets count from here.
    pub window_start: u32,
    /// Bytes in the window, at most [`WINDOW`].
    pub window_len: u32,
    /// The byte that holds `ip_summed`.
    pub ip_summed: u32,
    /// Its first bit in that byte.
    pub ip_summed_shift: u32,
    /// `csum_start` (u16, from `head`).
    pub csum_start: u32,
    /// `csum_offset` (u16, from csum_start).
    pub csum_offset: u32,
    /// `end` (u32, from `head`).
    pub end: u32,
    /// `head` (pointer).
    pub head: u32,
    /// `data` (pointer).
    pub data: u32,
    /// `gso_type` in `struct skb_shared_info` (u32).
    pub gso_type: u32,
    /// Whether the conntrack entry is read; the offsets below count only then.
    pub has_conntrack: u32,
    /// `_nfct` in `struct sk_buff` (pointer and three flag bits).
    pub nfct: u32,
    /// The original tuple in `struct nf_conn`.
    pub tuple_orig: u32,
    /// The reply tuple in `struct nf_conn`.
    pub tuple_reply: u32,
    /// `status` in `struct nf_conn` (unsigned long).
    pub status: u32,
}

/// The object for kernels before 5.8: what is a global or the ring buffer in the other one is a map there, under another
/// name, and the work is done in stages. The names of the entries, and all other maps, are the same.
pub mod legacy {
    use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// Array of one value: [`super::Config::sample`].
    pub const SAMPLE_MAP: &str = "SAMPLE";
    /// Array of one value, as [`super::PORTS_MAP`].
    pub const PORTS_MAP: &str = "PORT_TABLE";
    /// Array of one value, as [`super::SLOTS_MAP`].
    pub const SLOTS_MAP: &str = "SLOT_TABLE";
    /// Array of one value, as [`super::DEVICES_MAP`].
    pub const DEVICES_MAP: &str = "DEVICE_TABLE";
    /// Perf event array of [`crate::event::Event`].
    pub const EVENTS_MAP: &str = "PERF_EVENTS";
    /// Program array of [`STAGES`].
    pub const STAGES_MAP: &str = "STAGES";
    /// Per-CPU array of one value, [`WORK_SIZE`] bytes: the packet at hand. It begins with [`Judged`].
    pub const WORK_MAP: &str = "WORK";
    /// Size of that value.
    pub const WORK_SIZE: usize = 1024;

    /// What the judge said of the last packet. For tests.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Judged {
        /// [`crate::judge::Packed`].
        pub outcome: u64,
        /// The judged header: [`crate::packet::Ip::pack`].
        pub ip: u64,
        /// Where that is.
        pub l3: u32,
        /// Padding.
        pub reserved: u32,
    }

    /// The programs of the stages, by their index in that array.
    pub const STAGES: [&str; 8] = [
        "vxmon_tunnel",
        "vxmon_frame",
        "vxmon_walk",
        "vxmon_any",
        "vxmon_sum",
        "vxmon_whose",
        "vxmon_count",
        "vxmon_send",
    ];

    /// Indexes in [`STAGES`].
    pub mod stage {
        /// Judges an uplink's packet.
        pub const TUNNEL: u32 = 0;
        /// Judges a VXLAN device's frame.
        pub const FRAME: u32 = 1;
        /// Walks through an IP header.
        pub const WALK: u32 = 2;
        /// Judges by any reading.
        pub const ANY: u32 = 3;
        /// Sums.
        pub const SUM: u32 = 4;
        /// Finds the connection inside.
        pub const WHOSE: u32 = 5;
        /// Counts an anomaly.
        pub const COUNT: u32 = 6;
        /// Sends it.
        pub const SEND: u32 = 7;
    }
}

/// The program that tries what the kernel can do.
pub mod probe {
    /// Its name.
    pub const PROGRAM: &str = "vxmon_probe";
    /// Bytes that it sums at once: more than the kernel's scratchpad of 512 had room for.
    pub const LONG: u32 = 1024;
    /// It returns: the kernel did,
    pub const TAKEN: u32 = 0;
    /// it did not,
    pub const REFUSED: u32 = 1;
    /// the packet was too short.
    pub const TOO_SHORT: u32 = 2;
}

#[cfg(feature = "aya")]
mod pod {
    #![expect(unsafe_code, reason = "aya's Pod is an unsafe marker; zerocopy's derives prove what it asks")]
    // SAFETY: repr(C), integers only, no padding (IntoBytes is derived).
    unsafe impl aya::Pod for super::Device {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Devices {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::counters::Counters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::event::FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::event::FlowCount {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::story::Connection {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::story::Story {}
}
