//! Maps in place of what kernels before 5.8 lack: see [`vxmon_common::config::legacy`].

use aya_ebpf::maps::{Array, PerCpuArray, PerfEventArray, ProgramArray};
use vxmon_common::{
    config::{
        Devices, PORTS, SLOTS_TABLE,
        legacy::{STAGES as ALL_STAGES, WORK_SIZE},
    },
    event::Event,
};

use super::sum::PIECE;

/// See [`vxmon_common::config::legacy::SAMPLE_MAP`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static SAMPLE: Array<u32> = Array::with_max_entries(1, 0);
/// See [`vxmon_common::config::legacy::PORTS_MAP`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static PORT_TABLE: Array<[u8; PORTS]> = Array::with_max_entries(1, 0);
/// See [`vxmon_common::config::legacy::SLOTS_MAP`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static SLOT_TABLE: Array<[u8; SLOTS_TABLE]> = Array::with_max_entries(1, 0);
/// See [`vxmon_common::config::legacy::DEVICES_MAP`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static DEVICE_TABLE: Array<Devices> = Array::with_max_entries(1, 0);
/// See [`vxmon_common::config::legacy::EVENTS_MAP`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static PERF_EVENTS: PerfEventArray<Event> = PerfEventArray::new(0);
/// See [`vxmon_common::config::legacy::STAGES_MAP`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static STAGES: ProgramArray = ProgramArray::with_max_entries(ALL_STAGES.len() as u32, 0);
/// The packet at hand: [`super::work::Work`].
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static WORK: PerCpuArray<[u64; WORK_SIZE / 8]> = PerCpuArray::with_max_entries(1, 0);
/// The event that is sent.
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static EVENT: PerCpuArray<Event> = PerCpuArray::with_max_entries(1, 0);
/// Where data is copied to be summed.
#[cfg_attr(feature = "legacy", aya_ebpf::macros::map)]
pub static PIECE_COPY: PerCpuArray<[u8; PIECE as usize]> = PerCpuArray::with_max_entries(1, 0);
