//! The skb's own fields that `__sk_buff` does not show.
//!
//! The context pointer is the `struct sk_buff` pointer, so any field can be read at an offset that the daemon took from BTF:
//! directly where the kernel can tell the verifier what the pointer is (6.2), by `bpf_probe_read_kernel()` elsewhere. The
//! conntrack entry is read only for a packet found wrong.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_probe_read_kernel};
use vxmon_common::{
    config::{WINDOW, skb_access},
    conntrack::Tuple,
    judge::{Skb, State},
};

use crate::maps::{CONNTRACK, SKB_WINDOW, setting};

/// # Safety
/// `T` must be valid for any bytes, and `to` be writable.
#[inline(always)]
unsafe fn read_into<T>(to: *mut T, address: usize) -> bool {
    // SAFETY: the helper fills the whole value or fails; it checks the address.
    unsafe { bpf_probe_read_kernel(to.cast(), size_of::<T>() as u32, address as *const _) == 0 }
}

/// # Safety
/// `T` must be valid for any bytes.
#[inline(always)]
unsafe fn read<T>(address: usize) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: by the caller; filled if the helper did not fail.
    unsafe { if read_into(value.as_mut_ptr(), address) { Some(value.assume_init()) } else { None } }
}

/// Reads what the skb says of its checksum: in place where the kernel lets the program follow the pointer, by a copy of the
/// window otherwise.
#[inline(always)]
pub fn skb(skb: *mut __sk_buff) -> Skb {
    let start = setting(|config| &config.window_start) as usize;
    match setting(|config| &config.has_skb) {
        skb_access::CAST => {
            // SAFETY: the verifier has checked each field that is read at these offsets against the kernel's BTF.
            unsafe { fields(skb, cast_to_kern_ctx(skb).add(start)) }
        }
        skb_access::COPY => match window(skb, start) {
            // SAFETY: every offset was checked by the daemon to lie in the window with its field, and the verifier, which
            // knows their values, checks it again.
            Some(window) => unsafe { fields(skb, window) },
            None => Skb::UNKNOWN,
        },
        _ => Skb::UNKNOWN,
    }
}

/// The kernel function `bpf_cast_to_kern_ctx()` (kernel/bpf/helpers.c, since 6.2): the same pointer, which may be followed
/// now. The verifier makes a plain move of it. The library has no calls of kernel functions, so the daemon writes the
/// function's number into the object in place of [`CAST`].
#[inline(always)]
fn cast_to_kern_ctx(skb: *mut __sk_buff) -> *const u8 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as any call: r1 is the argument, r0 the result, r1 to r5 are lost.
    unsafe {
        let kernel: *const u8;
        core::arch::asm!(
            "call {cast}",
            cast = const vxmon_common::config::CAST,
            inlateout("r1") skb => _,
            lateout("r0") kernel,
            lateout("r2") _,
            lateout("r3") _,
            lateout("r4") _,
            lateout("r5") _,
        );
        kernel
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        skb.cast_const().cast() // Never run: other targets only check this crate.
    }
}

/// Copies the part of the skb that holds its fields. Not a function of its own: the return from one is dear where the kernel
/// guards it against speculation. So the copy is in a map, for the stack (512 bytes in all, MAX_BPF_STACK) has no room.
#[inline(always)]
fn window(skb: *mut __sk_buff, start: usize) -> Option<*const u8> {
    let window = SKB_WINDOW.get_ptr_mut(0)?.cast::<u8>();
    let len = setting(|config| &config.window_len);
    if len > WINDOW as u32 {
        return None;
    }
    // SAFETY: the window has room for `len` bytes; the helper checks the address.
    let failed = unsafe { bpf_probe_read_kernel(window.cast(), len, (skb as usize + start) as *const _) };
    (failed == 0).then_some(window.cast_const())
}

/// The fields at their offsets in the window.
///
/// # Safety
/// The window must hold all of them.
#[inline(always)]
unsafe fn fields(skb: *mut __sk_buff, window: *const u8) -> Skb {
    // SAFETY: by the caller; __sk_buff is the program's context.
    unsafe {
        let at = |offset: u32| window.add(offset as usize);
        let state = State::from_ip_summed(
            (*at(setting(|config| &config.ip_summed)) >> setting(|config| &config.ip_summed_shift)) & 3,
        );
        let head = *at(setting(|config| &config.head)).cast::<u64>();
        let headroom = (*at(setting(|config| &config.data)).cast::<u64>()).wrapping_sub(head) as u32;
        let gso_size = (*skb).gso_size;
        let gso_type = if gso_size > 0 {
            let shared_info = head as usize + *at(setting(|config| &config.end)).cast::<u32>() as usize;
            match read::<u32>(shared_info + setting(|config| &config.gso_type) as usize) {
                Some(gso_type) => gso_type,
                None => return Skb::UNKNOWN,
            }
        } else {
            0
        };
        Skb {
            state,
            csum_start: u32::from(*at(setting(|config| &config.csum_start)).cast::<u16>()).wrapping_sub(headroom),
            csum_offset: u32::from(*at(setting(|config| &config.csum_offset)).cast::<u16>()),
            gso_size,
            gso_type,
        }
    }
}

/// A conntrack entry as it is read from an skb.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    /// Original direction.
    pub orig: Tuple,
    /// Reply direction.
    pub reply: Tuple,
    /// `IPS_*` bits.
    pub status: u64,
}

/// What the skb says of its connection.
#[derive(Clone, Copy)]
pub enum Conntrack {
    /// It could not be read.
    Unknown,
    /// The skb has no entry.
    None,
    /// Its entry, in this CPU's scratch map until the next packet.
    Entry(*const Entry),
}

/// Reads the connection that the (outer) packet belongs to.
#[inline(always)]
pub fn conntrack(skb: *mut __sk_buff) -> Conntrack {
    /// Flag bits in `_nfct` (NFCT_INFOMASK, include/linux/skbuff.h).
    const INFO_MASK: usize = 7;
    if setting(|config| &config.has_conntrack) == 0 {
        return Conntrack::Unknown;
    }
    let Some(copy) = CONNTRACK.get_ptr_mut(0) else {
        return Conntrack::Unknown;
    };
    // SAFETY: integers only, valid for any bytes; `copy` is this CPU's value of the map.
    unsafe {
        let Some(nfct) = read::<usize>(skb as usize + setting(|config| &config.nfct) as usize) else {
            return Conntrack::Unknown;
        };
        let entry = nfct & !INFO_MASK;
        if entry == 0 {
            return Conntrack::None;
        }
        let orig = entry + setting(|config| &config.tuple_orig) as usize;
        let reply = entry + setting(|config| &config.tuple_reply) as usize;
        let status = entry + setting(|config| &config.status) as usize;
        if read_into(&raw mut (*copy).orig, orig)
            && read_into(&raw mut (*copy).reply, reply)
            && read_into(&raw mut (*copy).status, status)
        {
            Conntrack::Entry(copy)
        } else {
            Conntrack::Unknown
        }
    }
}
