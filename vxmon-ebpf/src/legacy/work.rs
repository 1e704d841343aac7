//! The packet at hand, as one stage hands it to the next: one value for each CPU. Programs at TC egress do not interrupt
//! each other on a CPU, and a chain of tail calls is one run.

use core::ptr;

use vxmon_common::{
    config::legacy::{Judged, WORK_SIZE},
    conntrack::Endpoints,
    judge::Packed,
    packet::Ip,
    story::Connection,
};

use super::{maps::WORK, window::WINDOW};
use crate::report::{Case, Counted};

/// What a stage asks of another one, so that it can go on.
pub mod ask {
    /// Nothing.
    pub const NOTHING: u32 = 0;
    /// To walk through the IP header noted in `walks[0]`.
    pub const WALK: u32 = 1;
    /// To walk through the one in `walks[1]`.
    pub const WALK_INNER: u32 = 2;
    /// To sum what the last of `sums` that is in use says.
    pub const SUM: u32 = 3;
    /// To judge `datagram` by any reading.
    pub const ANY: u32 = 4;
    /// To go on with that sum.
    pub const MORE: u32 = 5;
}

/// An IP header that was asked for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Walk {
    /// Where, and its EtherType: see [`Walk::key`]. 0: none, since 0 is no EtherType of IP.
    pub key: u64,
    /// [`Ip::pack`].
    pub packed: u64,
}

impl Walk {
    /// EtherType (memory order) and offset in one number.
    #[inline(always)]
    #[must_use]
    pub const fn key(ethertype: u16, l3: u32) -> u64 {
        ethertype as u64 | (l3 as u64) << 16
    }
}

/// A sum that was asked for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Span {
    /// First byte.
    pub at: u32,
    /// Bytes.
    pub len: u32,
    /// The sum, or [`crate::skb::FAILED`].
    pub sum: u64,
}

/// Room for the sums that the judge asks for of one packet: its headers, all of it, the inner packet. A power of two.
pub const SUMS: usize = 4;

/// What is known of the packet.
#[repr(C)]
pub struct Work {
    /// What the judge said of it.
    pub judged: Judged,
    /// Its first bytes. Behind them room for the longest read at the last offset.
    pub head: [u8; WINDOW as usize + 8],
    /// Its length.
    pub length: u32,
    /// The device's slot.
    pub slot: u32,
    /// See [`vxmon_common::event::role`].
    pub role: u32,
    /// EtherType (memory order) if the device's packets have no Ethernet header, else [`Work::ETHERNET`].
    pub bare: u32,
    /// Whether the payload is to be summed: decided once, for the judge may begin anew.
    pub sum_payload: u32,
    /// The stage that asks.
    pub stage: u32,
    /// What it asks, see [`ask`].
    pub asked: u32,
    /// How many of `sums` are in use.
    pub summed: u32,
    /// Outer (or only) IP header, and the one inside.
    pub walks: [Walk; 2],
    /// Sums so far.
    pub sums: [Span; SUMS],
    /// [`vxmon_common::judge::Datagram::pack`], and its pseudo-header sum.
    pub datagram: u64,
    /// See `datagram`.
    pub pseudo: u64,
    /// [`crate::story::found_flags`].
    pub flags: u64,
    /// The sum that is being made: so far,
    pub sum: u64,
    /// from here on,
    pub at: u32,
    /// so many bytes.
    pub left: u32,
    /// The connection inside, if `case.connection` says so.
    pub connection: Connection,
    /// Addresses and ports of the judged packet.
    pub endpoints: Endpoints,
    /// What is to be reported.
    pub case: Case,
    /// The same, counted.
    pub counted: Counted,
}

/// A reference to it. All that is read is read anew, as the verifier then knows nothing of it.
#[derive(Clone, Copy)]
pub struct Handle(*mut Work);

macro_rules! fields {
    ($($name:ident $set:ident $kind:ty)*) => {
        $(
            /// See [`Work`].
            #[inline(always)]
            #[must_use]
            pub fn $name(self) -> $kind {
                // SAFETY: this CPU's value of the map.
                unsafe { (&raw const (*self.0).$name).read_volatile() }
            }
            /// See [`Work`].
            #[inline(always)]
            pub fn $set(self, value: $kind) {
                // SAFETY: as above.
                unsafe { (&raw mut (*self.0).$name).write_volatile(value) }
            }
        )*
    };
}

impl Work {
    /// [`Work::bare`] of a device with Ethernet headers.
    pub const ETHERNET: u32 = 1 << 16;
}

impl Handle {
    /// This CPU's.
    #[inline(always)]
    #[must_use]
    pub fn get() -> Option<Self> {
        const { assert!(size_of::<Work>() <= WORK_SIZE) };
        WORK.get_ptr_mut(0).map(|work| Self(work.cast()))
    }

    /// The packet's first bytes.
    #[inline(always)]
    #[must_use]
    pub fn head(self) -> *mut u8 {
        // SAFETY: this CPU's value of the map.
        unsafe { (&raw mut (*self.0).head).cast() }
    }

    fields! {
        length set_length u32
        slot set_slot u32
        role set_role u32
        bare set_bare u32
        sum_payload set_sum_payload u32
        stage set_stage u32
        asked set_asked u32
        summed set_summed u32
        datagram set_datagram u64
        pseudo set_pseudo u64
        flags set_flags u64
        sum set_sum u64
        at set_at u32
        left set_left u32
    }

    /// Whether something can be asked. Only one thing: what the judge does after it was left without an answer does not
    /// count.
    #[inline(always)]
    #[must_use]
    pub fn may_ask(self) -> bool {
        self.asked() == ask::NOTHING
    }

    /// Notes the header that is judged.
    #[inline(always)]
    pub fn set_ip(self, ip: &Ip) {
        // SAFETY: this CPU's value of the map.
        unsafe {
            (&raw mut (*self.0).judged.ip).write_volatile(Ip::pack(Ok(*ip)));
            (&raw mut (*self.0).judged.l3).write_volatile(ip.l3);
        }
    }

    /// What came of it.
    #[inline(always)]
    #[must_use]
    pub fn outcome(self) -> Packed {
        // SAFETY: this CPU's value of the map.
        Packed::from_bits(unsafe { (&raw const (*self.0).judged.outcome).read_volatile() })
    }

    /// Notes what came of it.
    #[inline(always)]
    pub fn set_outcome(self, outcome: Packed) {
        // SAFETY: this CPU's value of the map.
        unsafe { (&raw mut (*self.0).judged.outcome).write_volatile(outcome.to_bits()) }
    }

    /// EtherType of a packet without an Ethernet header.
    #[inline(always)]
    #[must_use]
    pub fn bare_ethertype(self) -> Option<u16> {
        let bare = self.bare();
        (bare & Work::ETHERNET == 0).then_some(bare as u16)
    }

    /// The judged IP header.
    #[inline(always)]
    #[must_use]
    pub fn ip(self) -> Option<Ip> {
        // SAFETY: this CPU's value of the map.
        let (packed, l3) = unsafe {
            ((&raw const (*self.0).judged.ip).read_volatile(), (&raw const (*self.0).judged.l3).read_volatile())
        };
        Ip::unpack(packed, l3).ok()
    }

    /// One of the walks, by a number that the compiler knows.
    #[inline(always)]
    #[must_use]
    pub fn walk(self, n: usize) -> *mut Walk {
        // SAFETY: this CPU's value of the map; `n` is 0 or 1.
        unsafe { (&raw mut (*self.0).walks).cast::<Walk>().add(n) }
    }

    /// One of the sums.
    #[inline(always)]
    #[must_use]
    pub fn span(self, n: u32) -> *mut Span {
        const { assert!(SUMS.is_power_of_two() && size_of::<Span>() == 16) };
        // SAFETY: this CPU's value of the map.
        let first = unsafe { (&raw mut (*self.0).sums).cast::<Span>() };
        #[cfg(target_arch = "bpf")]
        {
            let span: *mut Span;
            // SAFETY: within the array, by the mask.
            unsafe {
                core::arch::asm!(
                    "{n} &= {mask}",
                    "{n} <<= 4",
                    "{span} = {first}",
                    "{span} += {n}", // see window::Integer
                    n = inout(reg) u64::from(n) => _,
                    first = in(reg) first,
                    span = out(reg) span,
                    mask = const SUMS - 1,
                    options(pure, readonly, nostack, preserves_flags)
                );
            }
            span
        }
        #[cfg(not(target_arch = "bpf"))]
        // SAFETY: as above. Never run: other targets only check this crate.
        unsafe {
            first.add(n as usize % SUMS)
        }
    }

    /// A packet begins: nothing was asked yet.
    #[inline(always)]
    pub fn clear(self) {
        // SAFETY: this CPU's value of the map.
        unsafe {
            for n in 0..2 {
                (&raw mut (*self.walk(n)).key).write_volatile(0);
            }
        }
        self.set_asked(ask::NOTHING);
        self.set_summed(0);
    }

    /// Addresses and ports of the judged packet.
    #[inline(always)]
    #[must_use]
    pub fn endpoints(self) -> *mut Endpoints {
        // SAFETY: this CPU's value of the map.
        unsafe { &raw mut (*self.0).endpoints }
    }

    /// The case to be reported.
    #[inline(always)]
    #[must_use]
    pub fn case(self) -> *mut Case {
        // SAFETY: this CPU's value of the map.
        unsafe { &raw mut (*self.0).case }
    }

    /// The same, counted.
    #[inline(always)]
    #[must_use]
    pub fn counted(self) -> *mut Counted {
        // SAFETY: this CPU's value of the map.
        unsafe { &raw mut (*self.0).counted }
    }

    /// The connection inside.
    #[inline(always)]
    #[must_use]
    pub fn connection(self) -> *mut Connection {
        // SAFETY: this CPU's value of the map.
        unsafe { &raw mut (*self.0).connection }
    }

    /// A copy of it on the stack, where map keys have to be before 4.18. Word by word: see [`crate::zero`].
    #[inline(always)]
    #[must_use]
    pub fn connection_key(self) -> Connection {
        let from = self.connection();
        // SAFETY: this CPU's value of the map; integers only.
        unsafe {
            let word = |at: *const u32| ptr::read_volatile(at);
            let four = |at: *const [u32; 4]| {
                let at = at.cast::<u32>();
                [word(at), word(at.add(1)), word(at.add(2)), word(at.add(3))]
            };
            Connection {
                src: four(&raw const (*from).src),
                dst: four(&raw const (*from).dst),
                sport: ptr::read_volatile(&raw const (*from).sport),
                dport: ptr::read_volatile(&raw const (*from).dport),
                scope: word(&raw const (*from).scope),
                proto: word(&raw const (*from).proto),
            }
        }
    }
}
