//! The object that sees NAT being set up: a probe at the start of `nf_nat_setup_info()` and one at its return. An object of its own,
//! so that a kernel which refuses it still takes the TC programs; nothing here is shared with them.
//!
//! At the start it is known by which flags the port will be chosen, at the return which one it was. So the note holds both: a
//! later connection between the same ends, even in the same memory, is told apart by its port. Nothing is ever changed.

#![no_std]
#![no_main]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "what is handed over by value is copied on the stack, which is small"
)]
#![expect(missing_docs, reason = "the macro makes public functions without the comments")]

use core::mem::MaybeUninit;

use aya_ebpf::{
    helpers::generated::{bpf_get_current_task, bpf_ktime_get_ns, bpf_probe_read_kernel},
    macros::{kprobe, kretprobe, map},
    maps::LruHashMap,
    programs::{ProbeContext, RetProbeContext},
};
use vxmon_common::{
    conntrack::Tuple,
    translation::{self, Config, NO_OFFSET, PORTS, Translation},
};

/// `NF_NAT_MANIP_SRC` (include/net/netfilter/nf_nat.h).
const MANIP_SRC: u32 = 0;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;
/// `IPS_CONFIRMED`: the entry is in the table, and its NAT no longer changes.
const CONFIRMED: u64 = 1 << 3;
/// `IPS_SRC_NAT_DONE`.
const SRC_NAT_DONE: u64 = 1 << 7;
/// The function takes microseconds; what has been pending for longer is left from a return that was not seen, ns.
const LONGEST_CALL: u64 = 1_000_000_000;

/// Settings; the daemon writes them into the object before it is loaded.
#[unsafe(no_mangle)]
static NAT_CONFIG: Config = Config { netns: 0, tuple_orig: 0, tuple_reply: 0, status: 0, net: 0, inum: 0, zone: 0 };

/// Reads one setting, so that the compiler does not take the zeros above for granted.
#[inline(always)]
fn setting(of: impl Fn(&'static Config) -> &'static u32) -> u32 {
    // SAFETY: a reference can be read from.
    unsafe { core::ptr::read_volatile(of(&NAT_CONFIG)) }
}

/// See [`translation::PORTS_MAP`].
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.nat_ports")]
static mut NAT_PORTS: [u8; PORTS] = [0; PORTS];
/// See [`translation::LOST_MAP`].
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.nat_lost")]
static mut NAT_LOST: u64 = 0;

/// See [`translation::TRANSLATIONS_MAP`].
#[map]
static TRANSLATIONS: LruHashMap<Tuple, Translation> = LruHashMap::with_max_entries(translation::TRANSLATIONS, 0);
/// Calls that have not returned, by task: the function does not sleep, and what interrupts it finds its own call first.
#[map]
static CALLS: LruHashMap<u64, Call> = LruHashMap::with_max_entries(translation::PENDING, 0);

/// A call of the function.
#[repr(C)]
#[derive(Clone, Copy)]
struct Call {
    /// Address of the connection.
    entry: u64,
    /// When it was called.
    time_ns: u64,
    /// The connection's original tuple.
    orig: Tuple,
    /// Flags of the range.
    flags: u32,
    /// Conntrack zone.
    zone: u32,
}

/// Runs where the function starts: `nf_nat_setup_info(ct, range, maniptype)`.
#[kprobe]
pub fn vxmon_nat_entry(ctx: ProbeContext) -> u32 {
    if let (Some(entry), Some(range), Some(kind)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1), ctx.arg::<u64>(2))
        // An enum: the upper half of its register is anything.
        && kind as u32 == MANIP_SRC
    {
        // SAFETY: every read of kernel memory is by the helper that checks the address.
        unsafe { begin(entry, range) };
    }
    0
}

/// Runs where it returns.
#[kretprobe]
pub fn vxmon_nat_return(ctx: RetProbeContext) -> u32 {
    // SAFETY: as above.
    unsafe { end(ctx.ret::<u64>() as u32) };
    0
}

/// # Safety
/// `T` must be valid for any bytes, and `to` be writable.
#[inline(always)]
unsafe fn read_into<T>(to: *mut T, address: u64) -> Option<()> {
    // SAFETY: the helper fills the whole value or fails; it checks the address.
    (unsafe { bpf_probe_read_kernel(to.cast(), size_of::<T>() as u32, address as *const _) } == 0).then_some(())
}

/// # Safety
/// `T` must be valid for any bytes.
#[inline(always)]
unsafe fn read<T>(address: u64) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: by the caller; filled if the helper did not fail.
    unsafe {
        read_into(value.as_mut_ptr(), address)?;
        Some(value.assume_init())
    }
}

/// Remembers the call, if it is one that counts.
///
/// # Safety
/// None of its own: see [`read_into`].
#[inline(always)]
unsafe fn begin(entry: u64, range: u64) -> Option<()> {
    let mut call = MaybeUninit::<Call>::uninit();
    let call = call.as_mut_ptr();
    // SAFETY: each field is written before it is read; the tables have an entry for each index.
    unsafe {
        read_into(&raw mut (*call).orig, entry + u64::from(setting(|config| &config.tuple_orig)))?;
        let port = usize::from((*call).orig.dport);
        if (*call).orig.proto != UDP || (&raw const NAT_PORTS).cast::<u8>().add(port).read_volatile() == 0 {
            return None;
        }
        let net: u64 = read(entry + u64::from(setting(|config| &config.net)))?;
        let netns: u32 = read(net + u64::from(setting(|config| &config.inum)))?;
        let status: u64 = read(entry + u64::from(setting(|config| &config.status)))?;
        // That of an entry in the table stays as it is, whatever the range says.
        if netns != setting(|config| &config.netns) || status & CONFIRMED != 0 {
            return None;
        }
        let zone = setting(|config| &config.zone);
        (*call).zone = if zone == NO_OFFSET { 0 } else { u32::from(read::<u16>(entry + u64::from(zone))?) };
        // The first member of struct nf_nat_range2 (uapi), and of nf_nat_range before it.
        read_into(&raw mut (*call).flags, range)?;
        (*call).entry = entry;
        (*call).time_ns = bpf_ktime_get_ns();
        (*call).orig.direction = 0;
        // What was noted of an earlier connection between the same ends is over, whatever becomes of this note.
        let _ = TRANSLATIONS.remove(&(*call).orig);
        if CALLS.insert(&bpf_get_current_task(), &*call, 0).is_err() {
            lost();
        }
    }
    Some(())
}

/// Makes the note of a call that returns.
///
/// # Safety
/// None of its own: see [`read_into`].
#[inline(always)]
unsafe fn end(verdict: u32) -> Option<()> {
    let mut translation = MaybeUninit::<Translation>::uninit();
    let translation = translation.as_mut_ptr();
    // SAFETY: as in `begin`; the value stays where it is until the program ends.
    unsafe {
        let task = bpf_get_current_task();
        let call = CALLS.get_ptr(&task)?;
        let Call { entry, time_ns, flags, zone, .. } = *call;
        let mut orig: Tuple = read(entry + u64::from(setting(|config| &config.tuple_orig)))?;
        orig.direction = 0;
        let same = is_same(&orig, call);
        let _ = CALLS.remove(&task);
        let status: u64 = read(entry + u64::from(setting(|config| &config.status)))?;
        let late = bpf_ktime_get_ns().wrapping_sub(time_ns) > LONGEST_CALL;
        if !same || late || verdict != ACCEPT || status & SRC_NAT_DONE == 0 {
            return None;
        }
        read_into(&raw mut (*translation).reply, entry + u64::from(setting(|config| &config.tuple_reply)))?;
        (*translation).time_ns = time_ns;
        (*translation).flags = flags;
        (*translation).zone = zone;
        if TRANSLATIONS.insert(&orig, &*translation, 0).is_err() {
            lost();
        }
    }
    Some(())
}

/// Whether the connection still is the one that the function was called for. Word by word: a comparison of structures
/// would be a call of memcmp.
///
/// # Safety
/// `call` must be readable.
#[inline(always)]
unsafe fn is_same(orig: &Tuple, call: *const Call) -> bool {
    // SAFETY: by the caller.
    let then = unsafe { &(*call).orig };
    (orig.src[0] ^ then.src[0])
        | (orig.src[1] ^ then.src[1])
        | (orig.src[2] ^ then.src[2])
        | (orig.src[3] ^ then.src[3])
        | (orig.dst[0] ^ then.dst[0])
        | (orig.dst[1] ^ then.dst[1])
        | (orig.dst[2] ^ then.dst[2])
        | (orig.dst[3] ^ then.dst[3])
        | u32::from(orig.sport ^ then.sport)
        | u32::from(orig.dport ^ then.dport)
        | u32::from(orig.proto ^ then.proto)
        == 0
}

/// Counts a note that could not be made. Not exact where CPUs collide; that it changes is what counts.
///
/// # Safety
/// None of its own.
#[inline(always)]
unsafe fn lost() {
    let counter = &raw mut NAT_LOST;
    // SAFETY: the counter is this object's own; the daemon only reads it.
    unsafe { counter.write_volatile(counter.read_volatile().wrapping_add(1)) };
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
