//! Reading and summing the bytes of an skb.
//!
//! This is all that differs between the judge in the kernel and in userspace. The verifier allows direct access to the
//! linear part only after a comparison with its end, made with the very pointer that is read; the rest is reached by
//! `bpf_skb_load_bytes()`. Sums go through `bpf_csum_diff()`, which takes packet data directly, but only of a length
//! that the verifier knows: hence one function for each multiple of 64 bytes.

use core::{
    mem::{MaybeUninit, offset_of},
    ptr,
};

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes},
};
use vxmon_common::{
    checksum::Sum,
    judge::{Datagram, GLANCE, Packed},
    packet::{ETHERNET, IPV4, Ip, OFFSET_MASK, Packet, Stop, UDP, VXLAN, ethertype, ip},
};

use crate::maps::{COPY, COPY_LEN, setting};

/// An skb on its way out, from its link-layer header on.
pub struct SkbPacket {
    skb: *mut __sk_buff,
}

/// The verifier does not follow packet pointers further than this (MAX_PACKET_OFF, kernel/bpf/verifier.c), less the
/// longest single access.
const MAX_OFFSET: u32 = 0xffff - LADDER_TOP;

impl SkbPacket {
    /// `skb` is the context of a TC program.
    #[inline(always)]
    pub const fn new(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    /// Where the linear part begins and ends, read anew at each use. Kept, the verifier would distinguish all states that
    /// differ in how much of it was found readable; read in plain Rust, the compiler would keep the address of the field,
    /// and the verifier refuses reads through a context pointer that was added to.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        #[cfg(target_arch = "bpf")]
        // SAFETY: the context is valid as long as the program runs.
        unsafe {
            let (data, end): (usize, usize);
            core::arch::asm!(
                "{data} = *(u32 *)({skb} + {data_at})",
                "{end} = *(u32 *)({skb} + {end_at})",
                skb = in(reg) self.skb,
                data = out(reg) data,
                end = lateout(reg) end,
                data_at = const offset_of!(__sk_buff, data),
                end_at = const offset_of!(__sk_buff, data_end),
            );
            (data, end)
        }
        #[cfg(not(target_arch = "bpf"))]
        // SAFETY: as above. Never run: other targets only check this crate.
        unsafe {
            ((*self.skb).data as usize, (*self.skb).data_end as usize)
        }
    }

    /// The first bytes of the packet, if they are in the linear part: enough for [`vxmon_common::judge::glance`].
    #[inline(always)]
    pub fn head(&self) -> Option<Piece> {
        let (data, end) = self.bounds();
        let is_there = behind::<GLANCE>(data) <= end;
        is_there.then_some(Piece { data: data as *const u8, at: 0, len: GLANCE })
    }

    /// The same IP header, of which the verifier knows no more than of one that was walked through, so that what follows need
    /// not be verified once more.
    #[inline(always)]
    pub fn as_walked(&self, ip: Ip) -> Ip {
        let forget = |offset: u32| forget(self.skb, offset) & OFFSET_MASK;
        Ip { l4: forget(ip.l4), end: forget(ip.end), ..ip }
    }

    /// Where `len` bytes at `at` lie, if they are in the linear part.
    #[inline(always)]
    fn linear(&self, at: u32, len: u32) -> Option<*const u8> {
        let at = opaque(at as usize); // so that what is compared is what is added
        if at > MAX_OFFSET as usize {
            return None;
        }
        let (data, end) = self.bounds();
        let start = data + at;
        if opaque(start + len as usize) > end { None } else { Some(start as *const u8) }
    }

    #[inline(always)]
    fn load<T: Copy>(&self, at: u32) -> Option<T> {
        if let Some(data) = self.linear(at, size_of::<T>() as u32) {
            // SAFETY: within the linear part. Not aligned by Rust's rules; BPF loads need not be (the verifier checks
            // alignment where the machine asks for it), and `read_unaligned` becomes one load a byte.
            return Some(unsafe { *data.cast::<T>() });
        }
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper fills the whole value or fails.
        unsafe {
            match bpf_skb_load_bytes(self.skb.cast(), at, value.as_mut_ptr().cast(), size_of::<T>() as u32) {
                0 => Some(value.assume_init()),
                _ => None,
            }
        }
    }
}

/// What lies `BYTES` behind `start`: for the same purpose as [`opaque`], in a register of its own. Before 4.19 the verifier
/// takes a pointer that is moved to the register it is in for a number (`check_alu_op()`), and learns nothing from its
/// comparison.
#[inline(always)]
fn behind<const BYTES: u32>(start: usize) -> usize {
    let end: usize;
    #[cfg(target_arch = "bpf")]
    // SAFETY: arithmetic in a register.
    unsafe {
        core::arch::asm!(
            "{end} = {start}",
            "{end} += {bytes}",
            start = in(reg) start,
            end = out(reg) end,
            bytes = const BYTES,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        end = core::hint::black_box(start + BYTES as usize);
    }
    end
}

/// The same number or pointer, its origin hidden from the compiler: it would turn `start + 1 > end` into `start >= end`,
/// from which the verifier does not learn that a byte can be read, or compare one copy of an offset and use another.
/// Not for the legacy programs, see [`behind`].
#[inline(always)]
pub fn opaque(mut pointer: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    // SAFETY: moves a register to itself. (No instruction at all would leave two line entries for one place in the
    // object, which the kernel refuses.)
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        pointer = core::hint::black_box(pointer);
    }
    pointer
}

/// A number from 1 to `MOST` as it is; and the verifier knows that it is one of these. From a comparison
/// with 0 it learns nothing before 6.8, and so refuses the number as the length of what a helper fills.
#[inline(always)]
pub fn positive<const MOST: u32>(number: u32) -> u32 {
    let mut number = u64::from(number);
    #[cfg(target_arch = "bpf")]
    // SAFETY: arithmetic in a register.
    unsafe {
        core::arch::asm!(
            "{number} += -1",
            "{number} &= {mask}",
            "{number} += 1",
            "if {number} < {above} goto +1",
            "{number} = {most}",
            number = inout(reg) number,
            mask = const MOST.next_power_of_two() - 1,
            above = const MOST + 1,
            most = const MOST,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        number = number.clamp(1, u64::from(MOST));
    }
    number as u32
}

/// The same number, of which the verifier knows nothing any more.
#[inline(always)]
fn forget(skb: *mut __sk_buff, number: u32) -> u32 {
    // SAFETY: the context is valid.
    forget_as(u64::from(number), u64::from(unsafe { (*skb).len })) as u32
}

/// The same number, of which the verifier knows no more than of `unknown`: it is combined twice with that.
#[inline(always)]
pub fn forget_as(mut number: u64, unknown: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: two moves of bits in a register.
    unsafe {
        core::arch::asm!(
            "{number} ^= {unknown}",
            "{number} ^= {unknown}",
            number = inout(reg) number,
            unknown = in(reg) unknown,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        number = core::hint::black_box(number ^ unknown) ^ unknown;
    }
    number
}

/// The reads of [`Packet`] by a method `load` that is generic over what is read.
macro_rules! reads_by_load {
    () => {
        #[inline(always)]
        fn u8(&self, at: u32) -> Option<u8> {
            self.load(at)
        }
        #[inline(always)]
        fn u16(&self, at: u32) -> Option<u16> {
            self.load(at)
        }
        #[inline(always)]
        fn u32(&self, at: u32) -> Option<u32> {
            self.load(at)
        }
        #[inline(always)]
        fn u64(&self, at: u32) -> Option<u64> {
            self.load(at)
        }
    };
}
pub(crate) use reads_by_load;

impl Packet for SkbPacket {
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the context is valid as long as the program runs.
        unsafe { (*self.skb).len }
    }
    reads_by_load!();
    #[inline(always)]
    fn forget(&self, offset: u32) -> u32 {
        forget(self.skb, offset)
    }
    /// Without a call where that is possible: a return is dear where the kernel guards it against speculation.
    #[inline(always)]
    fn ip(&self, ethertype: u16, l3: u32) -> Result<Ip, Stop> {
        if ethertype != ethertype::IPV4 && ethertype != ethertype::IPV6 {
            return Err(Stop::NotIp);
        }
        let packed = match self.linear(l3, IPV4) {
            Some(data) if ethertype == ethertype::IPV4 => {
                let packed = Ip::pack(ip(&Piece { data, at: l3, len: IPV4 }, ethertype::IPV4, l3));
                // SAFETY: within the piece; alignment as in `load`.
                forget_as(packed, unsafe { *data.cast::<u64>() })
            }
            _ => vxmon_ip(self.skb, u32::from(ethertype), l3),
        };
        Ip::unpack(packed, l3)
    }
    #[inline(always)]
    fn sum(&self, at: u32, len: u32) -> Option<Sum> {
        // From the outer UDP header to the inner L4 header, as Local Checksum Offload needs it of most packets.
        const TO_INNER_L4: u32 = UDP + VXLAN + ETHERNET + IPV4;
        if len == TO_INNER_L4
            && let Some(data) = self.linear(at, TO_INNER_L4)
        {
            // SAFETY: within the linear part; alignment as in `load`.
            return Some(unsafe {
                let mut sum = Sum::ZERO.add_u16(*data.add(TO_INNER_L4 as usize - 2).cast::<u16>());
                for n in 0..TO_INNER_L4 as usize / 4 {
                    sum = sum.add_u32(*data.cast::<u32>().add(n));
                }
                sum
            });
        }
        let sum = vxmon_sum(self.skb, at, len);
        if sum >= FAILED { None } else { Some(Sum::from_bits(sum)) }
    }
}

/// A few bytes of the linear part, which the verifier knows to be there: all reads are at constant offsets in it.
pub struct Piece {
    data: *const u8,
    at: u32,
    len: u32,
}

impl Piece {
    #[inline(always)]
    fn load<T: Copy>(&self, at: u32) -> Option<T> {
        let offset = at.wrapping_sub(self.at);
        // SAFETY: within the piece; alignment as in `SkbPacket::load`.
        (offset + size_of::<T>() as u32 <= self.len).then(|| unsafe { *self.data.add(offset as usize).cast::<T>() })
    }
}

impl Packet for Piece {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.at + self.len
    }
    reads_by_load!();
    #[inline(always)]
    fn sum(&self, _: u32, _: u32) -> Option<Sum> {
        None
    }
}

/// Walks an IP header. A global function, which the verifier checks once for any arguments, not anew for each way through
/// the headers before it, nor what follows for each way through these.
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[inline(never)]
pub extern "C" fn vxmon_ip(skb: *mut __sk_buff, ethertype: u32, l3: u32) -> u64 {
    Ip::pack(ip(&SkbPacket::new(skb), ethertype as u16, l3))
}

/// Judges a datagram without knowing which row of the judge's table applies; see [`Datagram::pack`]. A global function, as
/// [`vxmon_ip`] is.
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[inline(never)]
pub extern "C" fn vxmon_any(skb: *mut __sk_buff, datagram: u64, pseudo: u64, sum_payload: u32) -> u64 {
    let datagram = Datagram::unpack(datagram, Sum::from_bits(pseudo));
    datagram.any_reading(&SkbPacket::new(skb), sum_payload != 0).to_bits()
}

/// [`vxmon_any`] for [`vxmon_common::judge::Surroundings::any_reading`].
#[inline(always)]
pub fn any_reading(skb: *mut __sk_buff, datagram: &Datagram, sum_payload: bool) -> Packed {
    Packed::from_bits(vxmon_any(skb, datagram.pack(), datagram.pseudo().to_bits(), sum_payload.into()))
}

/// Returned instead of a sum, and still recognised after sums were added; no sum of 64 KiB gets near it.
pub const FAILED: u64 = 1 << 56;
/// The longest piece summed at once, on kernels that sum packet data in place.
const LADDER_TOP: u32 = 1472;
/// The longest piece that older kernels take (their scratchpad, `struct bpf_scratchpad` in net/core/filter.c).
const SCRATCHPAD: u32 = 512;

/// Sums `len` bytes at `at`. A global function, as [`vxmon_ip`] is.
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[inline(never)]
pub extern "C" fn vxmon_sum(skb: *mut __sk_buff, at: u32, len: u32) -> u64 {
    let packet = SkbPacket::new(skb);
    if len > 0xffff || at > 0xffff {
        return FAILED;
    }
    let (data, end) = packet.bounds();
    if at + len > MAX_OFFSET || data + (at + len) as usize > end {
        return sum_copied(skb, at, len);
    }
    let Some(tail) = sum_tail(&packet, at + (len & !63), len & 63) else {
        return FAILED;
    };
    let mut at = at;
    let mut left = len & !63;
    let pieces = if setting(|config| &config.csum_chunk) >= LADDER_TOP {
        sum_pieces::<LADDER_TOP>(skb, &mut at, &mut left)
    } else {
        sum_pieces::<SCRATCHPAD>(skb, &mut at, &mut left)
    };
    if pieces >= FAILED {
        return FAILED;
    }
    let mut sum = tail + pieces;
    let (at, left) = (forget(skb, at), forget(skb, left));
    if left > 0 {
        sum += sum_blocks(skb, at, left >> 6);
    }
    sum
}

/// As many whole pieces of the linear part as there are in `left` bytes at `at`, which are moved behind them.
#[inline(always)]
fn sum_pieces<const PIECE: u32>(skb: *mut __sk_buff, at: &mut u32, left: &mut u32) -> u64 {
    let mut sum = 0;
    for _ in 0..0x1_0000 / PIECE {
        if *left < PIECE {
            break;
        }
        // Not added: the verifier would follow what comes after once for each piece that failed.
        let piece = sum_inline::<PIECE>(skb, *at);
        if piece >= FAILED {
            return FAILED;
        }
        sum += piece;
        *at += PIECE;
        *left -= PIECE;
    }
    sum
}

/// Fewer than 64 bytes of the linear part, by halves.
#[inline(always)]
fn sum_tail(packet: &SkbPacket, at: u32, len: u32) -> Option<u64> {
    let mut sum = Sum::ZERO;
    if len & 32 != 0 {
        sum = sum.plus(words::<8>(packet, at)?);
    }
    if len & 16 != 0 {
        sum = sum.plus(words::<4>(packet, at + (len & 32))?);
    }
    if len & 8 != 0 {
        sum = sum.plus(words::<2>(packet, at + (len & 48))?);
    }
    if len & 4 != 0 {
        sum = sum.plus(words::<1>(packet, at + (len & 56))?);
    }
    if len & 2 != 0 {
        sum = sum.add_u16(packet.u16(at + (len & 60))?);
    }
    if len & 1 != 0 {
        sum = sum.add_u16(u16::from_ne_bytes([packet.u8(at + (len & 62))?, 0]));
    }
    Some(sum.to_bits())
}

/// `N` words of 32 bits of the linear part.
#[inline(always)]
fn words<const N: usize>(packet: &SkbPacket, at: u32) -> Option<Sum> {
    let words = packet.linear(at, 4 * N as u32)?.cast::<u32>();
    let mut sum = Sum::ZERO;
    for n in 0..N {
        // SAFETY: within the linear part; alignment as in `load`.
        sum = sum.add_u32(unsafe { *words.add(n) });
    }
    Some(sum)
}

/// `LEN` bytes of the linear part, divisible by 4. Never inlined: were the arms of [`sum_blocks`] merged into one call, its
/// length would no longer be known to the verifier.
#[inline(never)]
fn sum_exactly<const LEN: u32>(skb: *mut __sk_buff, at: u32) -> u64 {
    sum_inline::<LEN>(skb, at)
}

/// As [`sum_exactly`], where there is one length only.
#[inline(always)]
fn sum_inline<const LEN: u32>(skb: *mut __sk_buff, at: u32) -> u64 {
    match SkbPacket::new(skb).linear(at, LEN) {
        // SAFETY: within the linear part.
        Some(data) => unsafe { csum_diff(data, LEN) },
        None => FAILED,
    }
}

/// # Safety
/// `len` bytes at `data` must be readable, and `len` divisible by 4.
#[inline(always)]
unsafe fn csum_diff(data: *const u8, len: u32) -> u64 {
    // SAFETY: by the caller.
    let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, data.cast_mut().cast(), len, 0) };
    if sum < 0 { FAILED } else { sum as u32 as u64 }
}

#[inline(always)]
fn sum_blocks(skb: *mut __sk_buff, at: u32, blocks: u32) -> u64 {
    macro_rules! ladder {
        ($($n:literal)*) => {
            match blocks {
                $($n => sum_exactly::<{ 64 * $n }>(skb, at),)*
                _ => FAILED,
            }
        };
    }
    ladder!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23)
}

/// Sums bytes that are not all in the linear part.
#[inline(never)]
fn sum_copied(skb: *mut __sk_buff, at: u32, len: u32) -> u64 {
    if setting(|config| &config.csum_chunk) >= COPY_LEN as u32 {
        sum_by_copies::<{ COPY_LEN as u32 }>(skb, at, len)
    } else {
        sum_by_copies::<SCRATCHPAD>(skb, at, len)
    }
}

/// Copies the bytes and sums the copies, `PIECE` bytes at a time.
#[inline(always)]
fn sum_by_copies<const PIECE: u32>(skb: *mut __sk_buff, at: u32, len: u32) -> u64 {
    let Some(copy) = COPY.get_ptr_mut(0) else {
        return FAILED;
    };
    let copy = copy.cast::<u8>();
    let mut sum = 0;
    let mut at = at;
    let mut left = len;
    for _ in 0..=0x1_0000 / PIECE {
        if left == 0 {
            return sum;
        }
        let piece = positive::<PIECE>(left.min(PIECE)) as usize;
        // SAFETY: the copy has room for COPY_LEN bytes and four of padding, and `piece` is at most COPY_LEN.
        sum += unsafe {
            if bpf_skb_load_bytes(skb.cast(), at, copy.cast(), piece as u32) != 0 {
                return FAILED;
            }
            for n in 0..3 {
                *copy.add(piece + n) = 0;
            }
            csum_diff(copy, (piece as u32 + 3) & !3)
        };
        at += piece as u32;
        left -= piece as u32;
    }
    FAILED
}
