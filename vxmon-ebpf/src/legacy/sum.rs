//! Summing: copies of 512 bytes, which is what `bpf_csum_diff()` takes at once (`struct bpf_scratchpad`, net/core/filter.c),
//! one after the other without a loop. What is left after [`PIECES_A_RUN`] of them is for the next run of the same stage.

use core::ptr;

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes},
};
use vxmon_common::packet::Packet as _;

use super::{maps::PIECE_COPY, window::Window, work::Handle};
use crate::skb::{FAILED, positive};

/// Bytes summed at once.
pub const PIECE: u32 = 512;
/// Whole pieces summed in one run, so that the longest packet takes four.
const PIECES_A_RUN: u32 = 32;
const _: () = assert!(4 * PIECES_A_RUN * PIECE > 0xffff);

/// Goes on with the sum of `at`, `left` and `sum` in [`super::work::Work`]. `true`: it is complete, and in `sum`.
#[inline(always)]
pub fn run(skb: *mut __sk_buff, work: Handle) -> bool {
    let Some(copy) = PIECE_COPY.get_ptr_mut(0) else {
        work.set_sum(FAILED);
        return true;
    };
    let copy = copy.cast::<u8>();
    let (mut at, mut left, mut sum) = (work.at(), work.left(), work.sum());
    if at > 0xffff || left > 0xffff {
        work.set_sum(FAILED);
        return true;
    }
    'pieces: {
        // A loop would have to be unrolled by the compiler, which is not bound to.
        macro_rules! piece {
            () => {
                if left < PIECE {
                    break 'pieces;
                }
                // SAFETY: the copy has room for a piece.
                sum += unsafe { load(skb, at, copy, PIECE) };
                at += PIECE;
                left -= PIECE;
            };
        }
        macro_rules! times {
            ($($n:literal)*) => { $( { const _: u32 = $n; piece!(); } )* };
        }
        times!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
    }
    // By way of the map, so that the verifier forgets how many pieces there were.
    work.set_at(at);
    work.set_left(left);
    work.set_sum(sum);
    let (at, left) = (work.at(), work.left());
    if left >= PIECE {
        return false;
    }
    let words = left & !3;
    if words > 0 {
        // SAFETY: the copy has room for a piece.
        work.set_sum(work.sum() + unsafe { load(skb, at, copy, positive::<PIECE>(words)) });
    }
    rest(&Window::<0>::new(skb, work), work, at + words, left & 3);
    true
}

/// Adds the last bytes, fewer than four.
#[inline(always)]
fn rest(packet: &Window<0>, work: Handle, at: u32, len: u32) {
    let mut at = at;
    if len & 2 != 0 {
        work.set_sum(work.sum() + packet.u16(at).map_or(FAILED, u64::from));
        at += 2;
    }
    if len & 1 != 0 {
        let last = packet.u8(at).map_or(FAILED, |byte| u16::from_ne_bytes([byte, 0]).into());
        work.set_sum(work.sum() + last);
    }
}

/// Copies `len` bytes, divisible by 4, and sums the copy.
///
/// # Safety
/// `copy` must have room for them.
#[inline(always)]
unsafe fn load(skb: *mut __sk_buff, at: u32, copy: *mut u8, len: u32) -> u64 {
    // SAFETY: by the caller; each helper is told the length anew, see the parent module.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), at, copy.cast(), len) != 0 {
            return FAILED;
        }
        let sum = bpf_csum_diff(ptr::null_mut(), 0, copy.cast(), len, 0);
        if sum < 0 { FAILED } else { sum as u32 as u64 }
    }
}
