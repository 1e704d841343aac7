//! What the programs do with a packet: find out whether it is one to judge, judge it, count it.

use aya_ebpf::bindings::__sk_buff;
use vxmon_common::{
    config::{Device, device_flag, port_flag, slot_bits},
    event::role,
    judge::{self, Datagram, Glance, Packed, Skb, Surroundings},
    packet::{Family, Ip, Packet},
};

use crate::{
    maps::{self, PASSED, Passed, port_flags, setting, slot_entry},
    meta,
    report::{self, Case},
    skb::{self, SkbPacket, opaque},
    story,
    tally::Tally,
};

/// A device's slot, and its counters on this CPU.
struct Watched {
    slot: u32,
    /// Its packets have no Ethernet header.
    is_bare: bool,
    tally: Tally,
}

#[inline(always)]
fn watched(skb: *mut __sk_buff) -> Option<Watched> {
    // SAFETY: the context is valid.
    let entry = opaque(slot_entry(unsafe { (*skb).ifindex }).into());
    if entry == 0 {
        return None;
    }
    let slot = entry as u32 & u32::from(slot_bits::SLOT);
    Some(Watched { slot, is_bare: entry > slot_bits::SLOT.into(), tally: Tally::of(slot)? })
}

/// Surroundings of a packet in the kernel: maps, globals and the skb itself.
pub struct Kernel {
    skb: *mut __sk_buff,
}

impl Kernel {
    /// Those of this packet.
    #[inline(always)]
    pub fn of(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }
}

impl Surroundings for Kernel {
    #[inline(always)]
    fn is_tunnel_port(&self, port: u16) -> bool {
        port_flags(port) & port_flag::TUNNEL != 0
    }
    #[inline(always)]
    fn zero_over_ipv6_is_wrong(&self, port: u16) -> bool {
        // What comes from elsewhere (a bridged or routed guest's own tunnel) is not this node's to leave out or not; the
        // tunnel clears skb_iif of what it makes (skb_scrub_packet(), net/core/skbuff.c).
        // SAFETY: the context is valid.
        port_flags(port) & port_flag::NO_ZERO_IPV6 != 0 && unsafe { (*self.skb).ingress_ifindex } == 0
    }
    #[inline(always)]
    fn skb(&self) -> Skb {
        meta::skb(self.skb)
    }
    #[inline(always)]
    fn sum_payload(&self) -> bool {
        let sample = setting(|config| &config.sample);
        // SAFETY: a helper without arguments.
        sample <= 1 || unsafe { aya_ebpf::helpers::generated::bpf_get_prandom_u32() } % sample == 0
    }
    #[inline(always)]
    fn any_reading<P: Packet>(&self, _: &P, datagram: &Datagram) -> Packed {
        skb::any_reading(self.skb, datagram, self.sum_payload())
    }
}

#[inline(always)]
fn bare_ethertype(skb: *mut __sk_buff, watched: &Watched) -> Option<u16> {
    // SAFETY: the context is valid. Volatile, so that it is read whether it counts or not: the compiler may carry along what
    // it has not set, and the verifier refuses that.
    let protocol = unsafe { (&raw const (*skb).protocol).read_volatile() } as u16;
    watched.is_bare.then_some(protocol)
}

/// An uplink's packet.
#[inline(always)]
pub fn uplink<S: Surroundings>(skb: *mut __sk_buff, surroundings: &S) -> Option<()> {
    let watched = watched(skb)?;
    let packet = SkbPacket::new(skb);
    // Most packets end here.
    let glance = match packet.head() {
        Some(head) if !watched.is_bare => judge::glance(&head, surroundings),
        _ => Glance::Unclear,
    };
    let bare = bare_ethertype(skb, &watched);
    let ip = match glance {
        Glance::Other => None,
        Glance::Tunnel(ip) => Some(packet.as_walked(ip)),
        Glance::Unclear => judge::tunnel(&packet, surroundings, bare),
    };
    let Some(ip) = ip else {
        watched.tally.other();
        return Some(());
    };
    // SAFETY: an entry of the table, and only read.
    if counted_above(&packet, &ip, watched.slot, unsafe { &*maps::device(watched.slot) }) {
        watched.tally.counted_above();
        return Some(());
    }
    let outcome = judge::outer(&packet, surroundings, &ip);
    settle(skb, &watched, &ip, outcome, role::UPLINK, bare);
    Some(())
}

/// A frame that enters a VXLAN device.
#[inline(always)]
pub fn vxlan<S: Surroundings>(skb: *mut __sk_buff, surroundings: &S) -> Option<()> {
    let watched = watched(skb)?;
    let packet = SkbPacket::new(skb);
    let bare = bare_ethertype(skb, &watched);
    match judge::frame(&packet, surroundings, bare) {
        Some((ip, outcome)) => settle(skb, &watched, &ip, outcome, role::VXLAN, bare),
        None => watched.tally.other(),
    }
    Some(())
}

#[inline(always)]
fn settle(skb: *mut __sk_buff, watched: &Watched, ip: &Ip, outcome: Packed, role: u8, bare: Option<u16>) {
    if !outcome.is_judged() {
        watched.tally.unverified(outcome.number());
        return;
    }
    if !outcome.is_anomaly() {
        watched.tally.verdict(outcome.number());
        // SAFETY: an entry of the table, and only read.
        if unsafe { (*maps::device(watched.slot)).flags } & device_flag::FOLLOW == 0 {
            return;
        }
    }
    let connection = story::vxmon_connection(skb, Ip::pack(Ok(*ip)), ip.l3, u32::from(role));
    report::note(Case { slot: watched.slot, role, bare, ip: *ip, outcome, connection });
    report::vxmon_report(skb);
}

/// Whether a device stacked on this one has counted the packet already. Stacked devices (VLAN, bond, bridge, macvlan)
/// hand a packet down within one call, on one CPU, so the upper one leaves a note that the next one finds. The note goes
/// at the lowest device, so that it cannot hide another packet.
#[inline(always)]
pub fn counted_above<P: Packet>(packet: &P, ip: &Ip, slot: u32, device: &Device) -> bool {
    let has_lower = device.flags & device_flag::HAS_LOWER != 0;
    if !has_lower && device.above[0] | device.above[1] == 0 {
        return false;
    }
    let word = match ip.family {
        Family::V4 => ip.l3 + 2,
        Family::V6 => ip.l3 + 4,
    };
    let Some(passed) = PASSED.get_ptr_mut(0) else {
        return false;
    };
    // One after the other: see the judge's udp().
    let l4 = ip.l4;
    let Some(ip) = packet.u32(word) else {
        return false;
    };
    let Some(udp) = packet.u64(l4) else {
        return false;
    };
    // SAFETY: this CPU's value of the map.
    let passed = unsafe { &mut *passed };
    let above = if passed.slot < 64 { device.above[0] } else { device.above[1] };
    let counted = passed.slot != 0 && above >> (passed.slot & 63) & 1 != 0 && passed.ip == ip && passed.udp == udp;
    if !has_lower {
        passed.slot = 0;
    } else if !counted {
        *passed = Passed { slot, ip, udp };
    }
    counted
}
