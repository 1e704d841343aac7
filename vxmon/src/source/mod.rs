//! Where observations come from. Only these files touch aya.
//!
//! ```text
//! tc      the TC egress programs: loading, attaching, counters, events
//! object  the eBPF objects, embedded
//! clsact  what stays in the kernel when a process is killed, and how it is found again
//! btf     offsets in the running kernel's structures
//! ```

pub mod btf;
pub mod clsact;
pub mod object;
pub mod tc;
