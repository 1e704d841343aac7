//! vxmon's TC egress program: judges each tunnel packet that leaves, counts it, and sends anomalies to the daemon.
//!
//! ```text
//! bin/vxmon       the object the daemon loads: one program for uplinks, one for VXLAN devices
//! bin/vxmon-legacy  the same for kernels before 5.8, with `legacy`
//! bin/vxmon-probe tries what the kernel can do
//! bin/vxmon-test  the same judge with the skb's metadata handed in, for tests and benchmarks
//! watch           what both programs do with a packet
//! skb             reading and summing an skb's bytes (vxmon_common::packet::Packet)
//! meta            the skb's own fields: ip_summed, csum_start, gso_type, conntrack entry
//! report          repeats are counted, the rest goes to the ring buffer
//! story       connections that had bad packets, and their first good one after
//! tally           this CPU's counters of a device
//! maps            every map and global, by the names in vxmon_common::config
//! legacy          what kernels before 5.8 can run: the same judge and reports in stages
//! ```
//!
//! The program never changes, delays or drops a packet: it always returns TC_ACT_UNSPEC, so that other programs behind
//! it run as if it were not there. TC_ACT_OK would end their chain.

#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::not_unsafe_ptr_arg_deref,
    reason = "the pointers are the program's context, for which the verifier vouches at each use"
)]

pub mod legacy;
pub mod maps;
pub mod meta;
pub mod report;
pub mod skb;
pub mod story;
pub mod tally;
pub mod watch;

/// What every program returns: "no decision", so the next one runs (TCX_NEXT with tcx links, -1 too).
pub const TC_ACT_UNSPEC: i32 = -1;

/// 0, which the compiler does not know to be that. Of several zeros in a row it makes a call of memset, and the linker's
/// memset is refused by kernels such as 6.1 (`reg type unsupported for arg#0`), as is its memmove.
#[inline(always)]
#[must_use]
pub fn zero() -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let zero: u64;
        // SAFETY: sets a register.
        unsafe {
            core::arch::asm!("{zero} = 0", zero = out(reg) zero, options(pure, nomem, nostack, preserves_flags));
        }
        zero
    }
    #[cfg(not(target_arch = "bpf"))]
    0
}

/// The kernel does not load a program that could get here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The kernel hands helpers such as `bpf_probe_read_kernel` only to programs that say they are GPL-compatible.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
