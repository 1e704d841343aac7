//! The eBPF objects, built by `build.rs` and embedded.

/// The object that the daemon loads.
pub static MAIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon"));

/// The same judge with the skb's metadata handed in, for tests and benchmarks. Not used by the daemon, and so not in its
/// binary.
#[doc(hidden)]
pub static TEST: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon-test"));
