//! The judge with the skb's metadata handed in, for tests and benchmarks through BPF_PROG_TEST_RUN, whose skbs are
//! always linear and CHECKSUM_NONE. Never loaded by the daemon.
//!
//! `cb[0]`: the state's number in the low byte, [`NO_PAYLOAD`] and [`READ_SKB`] as further bits; `cb[1]`: csum_start;
//! `cb[2]`: csum_offset; `cb[3]`: gso_size; `cb[4]`: gso_type.

#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macro makes public functions without the comments")]

use core::hint::black_box;

use aya_ebpf::{
    bindings::__sk_buff,
    macros::{classifier, map},
    maps::Array,
    programs::TcContext,
};
use vxmon_common::{
    config::port_flag,
    judge::{self, Datagram, Packed, Skb, State, Surroundings},
    packet::{Ip, Packet},
};
use vxmon_ebpf::{
    TC_ACT_UNSPEC,
    maps::port_flags,
    meta,
    skb::{self, SkbPacket},
    watch,
};

/// In `cb[0]`: payloads are not summed.
const NO_PAYLOAD: u32 = 1 << 8;
/// In `cb[0]`: read the real metadata too, so that its cost is in the measurement.
const READ_SKB: u32 = 1 << 9;

/// What the judge said last: kind (0 not one to judge, 2 unverified, 3 judged), number of the reason or the
/// verdict, field seen, field expected (memory order), whether one is expected, offset of the L4 header.
#[map]
static RESULT: Array<[u32; 6]> = Array::with_max_entries(1, 0);

struct HandedIn {
    skb: *mut __sk_buff,
}

impl HandedIn {
    #[inline(always)]
    fn cb(&self, n: usize) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.skb).cb[n] }
    }
}

impl Surroundings for HandedIn {
    #[inline(always)]
    fn is_tunnel_port(&self, port: u16) -> bool {
        port_flags(port) & port_flag::TUNNEL != 0
    }
    #[inline(always)]
    fn zero_over_ipv6_is_wrong(&self, port: u16) -> bool {
        port_flags(port) & port_flag::NO_ZERO_IPV6 != 0
    }
    #[inline(always)]
    fn skb(&self) -> Skb {
        let flags = self.cb(0);
        if flags & READ_SKB != 0 {
            black_box(meta::skb(self.skb));
        }
        Skb {
            state: match flags as u8 {
                4.. => State::Unknown,
                bits => State::from_ip_summed(bits),
            },
            csum_start: self.cb(1),
            csum_offset: self.cb(2),
            gso_size: self.cb(3),
            gso_type: self.cb(4),
        }
    }
    #[inline(always)]
    fn sum_payload(&self) -> bool {
        self.cb(0) & NO_PAYLOAD == 0
    }
    #[inline(always)]
    fn any_reading<P: Packet>(&self, _: &P, datagram: &Datagram) -> Packed {
        skb::any_reading(self.skb, datagram, self.sum_payload())
    }
}

/// Writes one word of the result. Volatile: merged, the writes would read registers that were never set, which the
/// compiler may do and the verifier refuses.
#[inline(always)]
fn put(n: usize, value: u32) {
    if let Some(result) = RESULT.get_ptr_mut(0) {
        // SAFETY: the map's value; `n` is below 6.
        unsafe { (&raw mut (*result)[n]).write_volatile(value) }
    }
}

#[inline(always)]
fn clear() {
    for n in 0..6 {
        put(n, 0);
    }
}

#[inline(always)]
fn tell(ip: &Ip, outcome: Packed) {
    put(5, ip.l4);
    put(1, outcome.number().into());
    if outcome.is_judged() {
        put(2, outcome.seen().into());
        put(3, outcome.expected().into());
        put(4, outcome.has_expected().into());
        put(0, 3);
    } else {
        put(0, 2);
    }
}

/// Judges an uplink's packet.
#[classifier]
pub fn judge_uplink(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    clear();
    let (packet, surroundings) = (SkbPacket::new(skb), HandedIn { skb });
    if let Some(ip) = judge::tunnel(&packet, &surroundings, None) {
        tell(&ip, judge::outer(&packet, &surroundings, &ip));
    }
    TC_ACT_UNSPEC
}

/// Judges a VXLAN device's frame.
#[classifier]
pub fn judge_vxlan(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    clear();
    if let Some((ip, outcome)) = judge::frame(&SkbPacket::new(skb), &HandedIn { skb }, None) {
        tell(&ip, outcome);
    }
    TC_ACT_UNSPEC
}

/// All of the uplink's program, as it is on a node.
#[classifier]
pub fn whole_uplink(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    watch::uplink(skb, &watch::Kernel::of(skb));
    TC_ACT_UNSPEC
}

/// The same, with the metadata handed in.
#[classifier]
pub fn whole_uplink_told(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    watch::uplink(skb, &HandedIn { skb });
    TC_ACT_UNSPEC
}

/// What the others are measured against.
#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}
