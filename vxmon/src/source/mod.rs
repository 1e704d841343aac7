//! Where observations come from. Only these files touch aya.
//!
//! ```text
//! tc      the TC egress programs: loading, attaching, counters, events
//! object  the eBPF objects, embedded
//! btf     offsets in the running kernel's structures
//! ```

pub mod btf;
pub mod object;
