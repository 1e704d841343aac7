//! A program that tries what the running kernel can do. The daemon runs it once (`BPF_PROG_TEST_RUN`) and never attaches it.
//! Nothing here is shared with the others: their maps would be made once more at each start.

#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macro makes public functions without the comments")]

use core::ptr;

use aya_ebpf::{helpers::generated::bpf_csum_diff, macros::classifier, programs::TcContext};
use vxmon_common::config::probe::{LONG, REFUSED, TAKEN, TOO_SHORT};

/// Sums [`LONG`] bytes of a packet at once.
#[classifier]
pub fn vxmon_probe(ctx: TcContext) -> i32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + LONG as usize > end {
        return TOO_SHORT as i32;
    }
    // SAFETY: the packet has so many bytes.
    let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, data as *mut _, LONG, 0) };
    (if sum < 0 { REFUSED } else { TAKEN }) as i32
}

/// The kernel does not load a program that could get here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
