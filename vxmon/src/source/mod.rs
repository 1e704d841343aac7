//! Where observations come from. Only these files touch aya.
//!
//! ```text
//! engine         what the daemon asks of any of them
//! start          which engine it is to be, and its start
//! events         the stream of events, whatever carries it
//! perf           events by perf buffers, for kernels without the ring buffer
//! tc             the engine by TC egress programs: devices, attaching, counters, events
//! programs       the TC programs in the kernel: loading, maps
//! packet_socket  the engine without eBPF, on packet sockets
//! userspace      the judge and its counting, for sources outside the kernel
//! capture        packets of capture files
//! nat_probe      NAT as it is set up: the probes on it and what they noted
//! probe          what the running kernel can do, by trying
//! object         the eBPF objects, embedded
//! clsact         what stays in the kernel when a process is killed, and how it is found again
//! btf            offsets in the running kernel's structures
//! stats          how often and how long the programs ran
//! ```

pub mod btf;
pub mod capture;
pub mod clsact;
pub mod engine;
pub mod events;
pub mod nat_probe;
pub mod object;
pub mod packet_socket;
mod perf;
mod probe;
pub mod programs;
pub mod start;
pub mod stats;
pub mod tc;
pub mod userspace;
