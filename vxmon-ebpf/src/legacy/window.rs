//! Reading the bytes of the packet at hand from the copy of its first ones; the few that are further on by helper.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes};
use vxmon_common::{
    checksum::Sum,
    packet::{Chain, ETHERNET, IPV4, Ip, MAX_EXTENSIONS, Packet, Stop, UDP, VXLAN},
};

use super::work::{Handle, SUMS, Walk, ask};
use crate::skb::{FAILED, forget_as, positive, reads_by_load};

/// Bytes that are copied; a power of two. Enough for all headers but long chains of IPv6 extensions.
pub const WINDOW: u32 = 256;

/// The packet at hand. `INNER`: which of [`super::work::Work::walks`] it is whose answers are taken, 0 or 1.
pub struct Window<const INNER: usize> {
    skb: *mut __sk_buff,
    work: Handle,
}

impl<const INNER: usize> Window<INNER> {
    /// The packet at hand.
    #[inline(always)]
    pub const fn new(skb: *mut __sk_buff, work: Handle) -> Self {
        Self { skb, work }
    }

    #[inline(always)]
    fn load<T: Copy + Integer>(&self, at: u32) -> Option<T> {
        let size = size_of::<T>() as u32;
        if u64::from(at) + u64::from(size) > u64::from(self.work.length()) {
            return None;
        }
        if at < WINDOW - size {
            // SAFETY: behind the window there is room for the longest read at its end.
            return Some(unsafe { T::read::<{ WINDOW - 1 }>(self.work.head(), at) });
        }
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper fills the whole value or fails.
        unsafe {
            match bpf_skb_load_bytes(self.skb.cast(), at, value.as_mut_ptr().cast(), size) {
                0 => Some(value.assume_init()),
                _ => None,
            }
        }
    }
}

/// Copies the first bytes of the packet.
#[inline(always)]
pub fn copy(skb: *mut __sk_buff, work: Handle) {
    // SAFETY: the context is valid.
    let len = unsafe { (&raw const (*skb).len).read_volatile() };
    let head = len.min(WINDOW);
    // SAFETY: the window has room for `head` bytes.
    let failed =
        head == 0 || unsafe { bpf_skb_load_bytes(skb.cast(), 0, work.head().cast(), positive::<WINDOW>(head)) } != 0;
    work.set_length(if failed { 0 } else { len });
}

/// A number that can be read from the value of a map.
pub trait Integer {
    /// Reads it at `at & MASK` from `base`.
    ///
    /// # Safety
    /// The value must have room for it at each such place.
    unsafe fn read<const MASK: u32>(base: *const u8, at: u32) -> Self;
}

/// One load at a variable offset. Bounded by a mask right before, without a branch, so that the verifier knows nothing of the
/// offset and no copy of it can lose its bounds.
///
/// The offset is added to the address, not the address to the offset: that `adjust_ptr_min_max_vals()` mistakes for an address
/// in no map, which it then reads from, before 4.20 (0962590e5533; kernel/bpf/verifier.c of 4.14, but not of 4.14.336).
macro_rules! read {
    ($kind:ty, $load:literal) => {
        impl Integer for $kind {
            #[inline(always)]
            unsafe fn read<const MASK: u32>(base: *const u8, at: u32) -> Self {
                #[cfg(target_arch = "bpf")]
                {
                    let value: u64;
                    // SAFETY: by the caller and the mask.
                    unsafe {
                        core::arch::asm!(
                            "{at} &= {mask}",
                            "{value} = {base}",
                            "{value} += {at}",
                            concat!("{value} = *(", $load, " *)({value} + 0)"),
                            at = inout(reg) u64::from(at) => _,
                            base = in(reg) base,
                            value = out(reg) value,
                            mask = const MASK,
                            options(readonly, nostack, preserves_flags)
                        );
                    }
                    value as $kind
                }
                #[cfg(not(target_arch = "bpf"))]
                // SAFETY: by the caller. Never run: other targets only check this crate.
                unsafe {
                    base.add((at & MASK) as usize).cast::<$kind>().read_unaligned()
                }
            }
        }
    };
}
read!(u8, "u8");
read!(u16, "u16");
read!(u32, "u32");
read!(u64, "u64");

impl<const INNER: usize> Packet for Window<INNER> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.work.length()
    }
    reads_by_load!();
    #[inline(always)]
    fn forget(&self, offset: u32) -> u32 {
        forget_as(offset.into(), self.work.length().into()) as u32
    }
    /// Without a loop; and after each header the verifier knows no more than after any other.
    #[inline(always)]
    fn extensions(&self, chain: &mut Chain) -> Result<(), Stop> {
        macro_rules! steps {
            ($($n:literal)*) => {
                const { assert!([$($n),*].len() == MAX_EXTENSIONS as usize) };
                $(
                    let _ = $n;
                    if chain.is_at_end() {
                        return Ok(());
                    }
                    chain.step(self)?;
                    *chain = Chain::unpack(forget_as(chain.pack(), self.work.length().into())).ok_or(Stop::Unreadable)?;
                )*
            };
        }
        steps!(1 2 3 4 5 6 7 8);
        Ok(())
    }
    /// The answer of [`super::stage::walk`], or a note that it is to be asked.
    #[inline(always)]
    fn ip(&self, ethertype: u16, l3: u32) -> Result<Ip, Stop> {
        let key = Walk::key(ethertype, l3);
        let walk = self.work.walk(INNER);
        // SAFETY: this CPU's value of the map.
        unsafe {
            let answered = (&raw const (*walk).key).read_volatile();
            if answered == key {
                // The offset too from the answer, read once more: the verifier knows nothing of it then.
                let l3 = ((&raw const (*walk).key).read_volatile() >> 16) as u32;
                return Ip::unpack((&raw const (*walk).packed).read_volatile(), l3);
            }
            if self.work.may_ask() {
                (&raw mut (*walk).key).write_volatile(key);
                self.work.set_asked(if INNER == 0 { ask::WALK } else { ask::WALK_INNER });
            }
        }
        Err(Stop::Unreadable)
    }
    /// The answer of [`super::sum::sum`], or a note that it is to be asked.
    #[inline(always)]
    fn sum(&self, at: u32, len: u32) -> Option<Sum> {
        // From the outer UDP header to the inner L4 header, as Local Checksum Offload needs it of most packets.
        const TO_INNER_L4: u32 = UDP + VXLAN + ETHERNET + IPV4;
        if len == TO_INNER_L4 && at < WINDOW - TO_INNER_L4 && at + len <= self.work.length() {
            let base = self.work.head().cast_const();
            // SAFETY: as in `load`.
            return Some(unsafe {
                let mut sum = Sum::ZERO.add_u16(u16::read::<{ WINDOW - 1 }>(base, at + TO_INNER_L4 - 2));
                for n in 0..TO_INNER_L4 / 8 {
                    sum = sum.add_u64(u64::read::<{ WINDOW - 1 }>(base, at + 8 * n));
                }
                sum
            });
        }
        let summed = self.work.summed();
        for n in 0..SUMS as u32 {
            let span = self.work.span(n);
            // SAFETY: this CPU's value of the map.
            unsafe {
                if summed > n && (*span).at == at && (*span).len == len {
                    let sum = (&raw const (*span).sum).read_volatile();
                    return if sum >= FAILED { None } else { Some(Sum::from_bits(sum)) };
                }
            }
        }
        if self.work.may_ask() {
            let span = self.work.span(summed);
            // SAFETY: this CPU's value of the map.
            unsafe { ((*span).at, (*span).len) = (at, len) };
            self.work.set_asked(ask::SUM);
        }
        None
    }
}
