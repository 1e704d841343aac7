//! Every map and global of the kernel program. Names and sizes are those of [`vxmon_common::config`].

use aya_ebpf::{
    macros::map,
    maps::{LruHashMap, PerCpuArray, RingBuf},
};
use vxmon_common::{
    config::{
        Config, Device, FLOWS as MAX_FLOWS, PORTS as PORT_TABLE, RING, SLOTS, SLOTS_TABLE, STORIES as MAX_STORIES,
        WINDOW,
    },
    conntrack::Endpoints,
    counters::Counters,
    event::{FlowCount, FlowKey},
    story::{Connection, Story},
};

use crate::{meta::Entry, report::Case};

/// Settings; the daemon writes them into the object before it is loaded.
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
static CONFIG: Config = Config {
    sample: 0,
    csum_chunk: 0,
    has_skb: 0,
    window_start: 0,
    window_len: 0,
    ip_summed: 0,
    ip_summed_shift: 0,
    csum_start: 0,
    csum_offset: 0,
    end: 0,
    head: 0,
    data: 0,
    gso_type: 0,
    has_conntrack: 0,
    nfct: 0,
    tuple_orig: 0,
    tuple_reply: 0,
    status: 0,
};

/// Reads one setting, so that the compiler does not take the zeros above for granted, while the verifier, for which the
/// frozen map's values are constants, drops the code that they switch off.
#[inline(always)]
pub fn setting(of: impl Fn(&'static Config) -> &'static u32) -> u32 {
    // SAFETY: a reference can be read from.
    unsafe { core::ptr::read_volatile(of(&CONFIG)) }
}

/// See [`vxmon_common::config::PORTS_MAP`]. This and the next two are written by the daemon alone, a byte or a device at a
/// time as far as the program can see.
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[cfg_attr(feature = "modern", unsafe(link_section = ".bss.ports"))]
static mut PORTS: [u8; PORT_TABLE] = [0; PORT_TABLE];
/// See [`vxmon_common::config::SLOTS_MAP`].
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[cfg_attr(feature = "modern", unsafe(link_section = ".bss.slots"))]
static mut INDEXES: [u8; SLOTS_TABLE] = [0; SLOTS_TABLE];
/// See [`vxmon_common::config::DEVICES_MAP`].
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[cfg_attr(feature = "modern", unsafe(link_section = ".bss.devices"))]
static mut DEVICES: [Device; SLOTS as usize] = [Device { ifindex: 0, flags: 0, above: [0; 2] }; SLOTS as usize];

/// What is known of a UDP port (memory order): see [`vxmon_common::config::port_flag`].
#[inline(always)]
pub fn port_flags(port: u16) -> u8 {
    // SAFETY: the table has an entry for each u16. Volatile: the daemon writes what the compiler takes for constant.
    unsafe { (&raw const PORTS).cast::<u8>().add(port as usize).read_volatile() }
}

/// The entry of the device with this index, see [`vxmon_common::config::slot_bits`]; 0: not watched.
#[inline(always)]
pub fn slot_entry(ifindex: u32) -> u8 {
    // SAFETY: as above.
    unsafe { (&raw const INDEXES).cast::<u8>().add(ifindex as u16 as usize).read_volatile() }
}

/// The device in a slot, to be read field by field.
#[inline(always)]
pub fn device(slot: u32) -> *const Device {
    const { assert!(SLOTS.is_power_of_two()) };
    // SAFETY: within the table.
    unsafe { (&raw const DEVICES).cast::<Device>().add((slot & (SLOTS - 1)) as usize) }
}
/// See [`vxmon_common::config::COUNTERS_MAP`].
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(SLOTS, 0);
/// See [`vxmon_common::config::FLOWS_MAP`].
#[map]
pub static FLOWS: LruHashMap<FlowKey, FlowCount> = LruHashMap::with_max_entries(MAX_FLOWS, 0);
/// See [`vxmon_common::config::STORIES_MAP`].
#[map]
pub static STORIES: LruHashMap<Connection, Story> = LruHashMap::with_max_entries(MAX_STORIES, 0);
/// See [`vxmon_common::config::EVENTS_MAP`].
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(RING, 0);
/// Where data that is not linear is copied to be summed.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static COPY: PerCpuArray<[u8; COPY_LEN + 4]> = PerCpuArray::with_max_entries(1, 0);
/// The part of the skb's own fields that is read of the packet at hand.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static SKB_WINDOW: PerCpuArray<[u64; WINDOW / 8]> = PerCpuArray::with_max_entries(1, 0);
/// The conntrack entry of the packet at hand.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static CONNTRACK: PerCpuArray<Entry> = PerCpuArray::with_max_entries(1, 0);
/// The anomaly at hand.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static CASE: PerCpuArray<Case> = PerCpuArray::with_max_entries(1, 0);
/// Addresses and ports of the anomaly at hand.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static ENDPOINTS: PerCpuArray<Endpoints> = PerCpuArray::with_max_entries(1, 0);
/// The outer flow of the anomaly at hand.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static FLOW_KEY: PerCpuArray<FlowKey> = PerCpuArray::with_max_entries(1, 0);
/// The connection inside the packet at hand.
#[cfg_attr(feature = "modern", aya_ebpf::macros::map)]
pub static CONNECTION: PerCpuArray<Connection> = PerCpuArray::with_max_entries(1, 0);
/// The last packet counted on a device that has another watched device below it.
#[map]
pub static PASSED: PerCpuArray<Passed> = PerCpuArray::with_max_entries(1, 0);

/// Bytes summed at a time from [`COPY`]; four more take the padding of an odd end.
pub const COPY_LEN: usize = 4096;

/// A packet that was counted on its way down a stack of devices.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Passed {
    /// Slot of the device that counted it; 0: none.
    pub slot: u32,
    /// First word of the IP header behind its version and length: total length and identification, or IPv6 payload
    /// length and next header.
    pub ip: u32,
    /// The whole UDP header: ports, length, checksum.
    pub udp: u64,
}
