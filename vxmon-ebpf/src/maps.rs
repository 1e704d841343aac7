//! Every map and global of the kernel program. Names and sizes are those of [`vxmon_common::config`].

use aya_ebpf::{
    macros::map,
    maps::{Array, LruHashMap, PerCpuArray, RingBuf},
};
use vxmon_common::{
    config::{
        Config, Device, FLOWS as MAX_FLOWS, PORTS as PORT_TABLE, RING, SLOTS as MAX_SLOTS, SLOTS_TABLE,
        STORIES as MAX_STORIES, WINDOW,
    },
    conntrack::Endpoints,
    counters::Counters,
    event::{FlowCount, FlowKey},
    story::{Connection, Story},
};

use crate::{meta::Entry, report::Case};

/// Settings; the daemon writes them into the object before it is loaded.
#[unsafe(no_mangle)]
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

/// See [`vxmon_common::config::PORTS_MAP`].
#[map]
pub static PORTS: Array<[u8; PORT_TABLE]> = Array::with_max_entries(1, 0);
/// See [`vxmon_common::config::SLOTS_MAP`].
#[map]
pub static SLOTS: Array<[u8; SLOTS_TABLE]> = Array::with_max_entries(1, 0);
/// See [`vxmon_common::config::DEVICES_MAP`].
#[map]
pub static DEVICES: Array<Device> = Array::with_max_entries(MAX_SLOTS, 0);
/// See [`vxmon_common::config::COUNTERS_MAP`].
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(MAX_SLOTS, 0);
/// See [`vxmon_common::config::FLOWS_MAP`].
#[map]
pub static FLOWS: LruHashMap<FlowKey, FlowCount> = LruHashMap::with_max_entries(MAX_FLOWS, 0);
/// See [`vxmon_common::config::STORIES_MAP`].
#[map]
pub static STORIES: LruHashMap<Connection, Story> = LruHashMap::with_max_entries(MAX_STORIES, 0);
/// See [`vxmon_common::config::EVENTS_MAP`].
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(RING, 0);
/// Where data that is not linear is copied to be summed.
#[map]
pub static COPY: PerCpuArray<[u8; COPY_LEN + 4]> = PerCpuArray::with_max_entries(1, 0);
/// The part of the skb's own fields that is read of the packet at hand.
#[map]
pub static SKB_WINDOW: PerCpuArray<[u64; WINDOW / 8]> = PerCpuArray::with_max_entries(1, 0);
/// The conntrack entry of the packet at hand.
#[map]
pub static CONNTRACK: PerCpuArray<Entry> = PerCpuArray::with_max_entries(1, 0);
/// The anomaly at hand.
#[map]
pub static CASE: PerCpuArray<Case> = PerCpuArray::with_max_entries(1, 0);
/// Addresses and ports of the anomaly at hand.
#[map]
pub static ENDPOINTS: PerCpuArray<Endpoints> = PerCpuArray::with_max_entries(1, 0);
/// The outer flow of the anomaly at hand.
#[map]
pub static FLOW_KEY: PerCpuArray<FlowKey> = PerCpuArray::with_max_entries(1, 0);
/// The connection inside the packet at hand.
#[map]
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
