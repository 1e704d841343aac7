//! Connections that had bad packets: how many, and whether a good one has left since.
//!
//! A connection is remembered from the first anomaly of it that is sent to the daemon; repeats that are held back are
//! counted here too. Only while the daemon waits for a recovery (a flag of the device) are good packets looked up, and a
//! connection costs at most two follow-ups for each anomaly sent: the first good SYN, and the first good other packet.

use core::borrow::Borrow;

use aya_ebpf::bindings::__sk_buff;
use vxmon_common::{
    packet::{Ip, proto},
    story::{Connection, Story, connection, story_flag, tcp_flag},
};

use crate::{
    maps::{CONNECTION, STORIES},
    report::atomic_add_one,
    skb::SkbPacket,
    zero,
};

/// `BPF_NOEXIST` (include/uapi/linux/bpf.h).
const BPF_NOEXIST: u64 = 1;
/// In what [`vxmon_connection`] returns: there is one.
const FOUND: u64 = 1 << 8;

/// Finds the connection of the packet whose judged header is `packed` (see [`Ip::pack`]) at `l3`, and leaves it in this
/// CPU's scratch map; the TCP flags and [`FOUND`], or 0. A global function: the verifier checks it once.
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
#[inline(never)]
pub extern "C" fn vxmon_connection(skb: *mut __sk_buff, packed: u64, l3: u32, role: u32) -> u64 {
    let (Ok(ip), Some(found)) = (Ip::unpack(packed, l3), CONNECTION.get_ptr_mut(0)) else {
        return 0;
    };
    // SAFETY: this CPU's value of the map; the context is valid.
    let flags = unsafe { connection(&SkbPacket::new(skb), &ip, role as u8, (*skb).ifindex, &mut *found) };
    found_flags(flags)
}

/// The TCP flags and [`FOUND`], or 0 if there is no connection.
#[inline(always)]
#[must_use]
pub fn found_flags(flags: Option<u8>) -> u64 {
    match flags {
        Some(flags) => FOUND | u64::from(flags),
        None => 0,
    }
}

/// Whether there is a connection, by what [`vxmon_connection`] returned.
#[inline(always)]
#[must_use]
pub fn is_found(flags: u64) -> bool {
    flags & FOUND != 0
}

/// The connection that [`vxmon_connection`] found last, if `flags`, which it returned, say so.
#[inline(always)]
pub fn found(flags: u64) -> Option<&'static Connection> {
    if !is_found(flags) {
        return None;
    }
    // SAFETY: this CPU's value of the map, filled by `vxmon_connection`.
    CONNECTION.get_ptr(0).map(|connection| unsafe { &*connection })
}

/// What an event tells of its connection.
#[derive(Clone, Copy)]
pub struct SoFar {
    /// See [`vxmon_common::event::Event::attempts`].
    pub attempts: u32,
    /// See [`vxmon_common::event::Event::bad_syns`].
    pub bad_syns: u32,
    /// See [`vxmon_common::event::Event::last_bad_ns`].
    pub last_bad_ns: u64,
}

impl SoFar {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self { attempts: 0, bad_syns: 0, last_bad_ns: 0 };

    #[inline(always)]
    fn of(story: &Story) -> Self {
        let top = |count: u64| if count > u64::from(u32::MAX) { u32::MAX } else { count as u32 };
        Self { attempts: top(story.bad), bad_syns: top(story.bad_syns), last_bad_ns: story.last_bad_ns }
    }
}

/// Counts a bad packet of a connection that is remembered; from now on it is, if the packet `is_sent` to the daemon.
/// The TCP flags are the low byte of `flags`.
#[inline(always)]
pub fn bad<C: Borrow<Connection>>(connection: Option<C>, flags: u64, now: u64, is_sent: bool) -> SoFar {
    let Some(connection) = connection else {
        return SoFar::UNKNOWN;
    };
    let connection = connection.borrow();
    let story = match STORIES.get_ptr_mut(connection) {
        Some(story) => story,
        None if is_sent => {
            let new = Story {
                bad: zero(),
                bad_syns: zero(),
                last_bad_ns: zero(),
                state: zero() as u32,
                reserved: zero() as u32,
            };
            // Fails if another CPU was first, which is as good.
            let _ = STORIES.insert(connection, new, BPF_NOEXIST);
            match STORIES.get_ptr_mut(connection) {
                Some(story) => story,
                None => return SoFar::UNKNOWN,
            }
        }
        None => return SoFar::UNKNOWN,
    };
    // SAFETY: a value of the map, which stays allocated while the program runs. Packets of one connection on two CPUs at
    // once are rare, and lose no count.
    unsafe {
        let last_bad_ns = (*story).last_bad_ns;
        atomic_add_one(&raw mut (*story).bad);
        if flags as u8 & tcp_flag::SYN != 0 {
            atomic_add_one(&raw mut (*story).bad_syns);
        }
        (*story).last_bad_ns = now;
        if is_sent {
            (*story).state = story_flag::OPEN;
        }
        SoFar { last_bad_ns, ..SoFar::of(&*story) }
    }
}

/// A good packet that is waited for.
pub struct Awaited {
    story: *mut Story,
    then: u32,
}

/// Whether a good packet, seen while the daemon waits for recoveries, is one that is waited for; `flags` as for [`bad`].
#[inline(always)]
pub fn awaited<C: Borrow<Connection>>(connection: Option<C>, flags: u64) -> Option<Awaited> {
    let connection = connection?;
    let connection = connection.borrow();
    let story = STORIES.get_ptr_mut(connection)?;
    // SAFETY: a value of the map, as in `bad`.
    let state = unsafe { (*story).state };
    let is_syn = connection.proto as u8 == proto::TCP && flags as u8 & tcp_flag::SYN != 0;
    if state & story_flag::OPEN == 0 || is_syn && state & story_flag::SYN_TOLD != 0 {
        return None;
    }
    Some(Awaited { story, then: if is_syn { state | story_flag::SYN_TOLD } else { 0 } })
}

impl Awaited {
    /// What came before it.
    #[inline(always)]
    pub fn so_far(&self) -> SoFar {
        // SAFETY: as in `awaited`.
        SoFar::of(unsafe { &*self.story })
    }

    /// It was sent. (If the ring buffer is full, the next good packet will do.)
    #[inline(always)]
    pub fn sent(&self) {
        // SAFETY: as in `awaited`.
        unsafe { (*self.story).state = self.then }
    }
}
