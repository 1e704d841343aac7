//! What the programs do with a packet: find out whether it is one to judge, judge it, count it.

use aya_ebpf::bindings::__sk_buff;
use vxmon_common::{
    config::{Device, device_flag, port_flag},
    event::role,
    judge::{self, Found, Outcome, Skb, Surroundings},
    packet::{Family, Ip, Packet},
};

use crate::{
    maps::{DEVICES, PASSED, PORTS, Passed, SLOTS, setting},
    meta,
    report::{self, Case},
    skb::SkbPacket,
    story,
    tally::Tally,
};

/// A device's slot, and its counters on this CPU.
struct Watched {
    slot: u32,
    tally: Tally,
}

#[inline(always)]
fn watched(skb: *mut __sk_buff) -> Option<Watched> {
    // SAFETY: the context is valid; the table has an entry for each u16.
    let slot = unsafe { *SLOTS.get_ptr(0)?.cast::<u8>().add((*skb).ifindex as u16 as usize) };
    let slot = u32::from(slot);
    if slot == 0 {
        return None;
    }
    Some(Watched { slot, tally: Tally::of(slot)? })
}

/// Surroundings of a packet in the kernel: maps, globals and the skb itself.
pub struct Kernel {
    skb: *mut __sk_buff,
}

impl Kernel {
    #[inline(always)]
    fn port(port: u16) -> u8 {
        match PORTS.get_ptr(0) {
            // SAFETY: the table has an entry for each u16.
            Some(table) => unsafe { *table.cast::<u8>().add(port as usize) },
            None => 0,
        }
    }
}

impl Surroundings for Kernel {
    #[inline(always)]
    fn is_tunnel_port(&self, port: u16) -> bool {
        Self::port(port) & port_flag::TUNNEL != 0
    }
    #[inline(always)]
    fn zero_over_ipv6_is_wrong(&self, port: u16) -> bool {
        // What comes from elsewhere (a bridged or routed guest's own tunnel) is not this node's to leave out or not; the
        // tunnel clears skb_iif of what it makes (skb_scrub_packet(), net/core/skbuff.c).
        // SAFETY: the context is valid.
        Self::port(port) & port_flag::NO_ZERO_IPV6 != 0 && unsafe { (*self.skb).ingress_ifindex } == 0
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
}

#[inline(always)]
fn bare_ethertype(skb: *mut __sk_buff, device: &Device) -> Option<u16> {
    // SAFETY: the context is valid.
    (device.flags & device_flag::BARE != 0).then(|| unsafe { (*skb).protocol as u16 })
}

/// An uplink's packet.
#[inline(always)]
pub fn uplink(skb: *mut __sk_buff) -> Option<()> {
    let watched = watched(skb)?;
    // SAFETY: a value of the map, and only read.
    let device = unsafe { &*DEVICES.get_ptr(watched.slot)? };
    let packet = SkbPacket::new(skb);
    let bare = bare_ethertype(skb, device);
    let surroundings = Kernel { skb };
    let Some(ip) = judge::tunnel(&packet, &surroundings, bare) else {
        watched.tally.other();
        return Some(());
    };
    if counted_above(&packet, &ip, device, watched.slot) {
        watched.tally.counted_above();
        return Some(());
    }
    let outcome = judge::outer(&packet, &surroundings, &ip);
    settle(skb, &watched, device, &Found { ip, outcome }, role::UPLINK, bare);
    Some(())
}

/// A frame that enters a VXLAN device.
#[inline(always)]
pub fn vxlan(skb: *mut __sk_buff) -> Option<()> {
    let watched = watched(skb)?;
    // SAFETY: a value of the map, and only read.
    let device = unsafe { &*DEVICES.get_ptr(watched.slot)? };
    let packet = SkbPacket::new(skb);
    let bare = bare_ethertype(skb, device);
    match judge::vxlan_device(&packet, &Kernel { skb }, bare) {
        Some(found) => settle(skb, &watched, device, &found, role::VXLAN, bare),
        None => watched.tally.other(),
    }
    Some(())
}

#[inline(always)]
fn settle(skb: *mut __sk_buff, watched: &Watched, device: &Device, found: &Found, role: u8, bare: Option<u16>) {
    match found.outcome {
        Outcome::Other => watched.tally.other(),
        Outcome::Unverified(reason) => watched.tally.unverified(reason),
        Outcome::Judged(finding) => {
            if !finding.verdict.is_anomaly() {
                watched.tally.verdict(finding.verdict);
                if device.flags & device_flag::FOLLOW == 0 {
                    return;
                }
            }
            let ip = found.ip;
            let connection = story::vxmon_connection(skb, Ip::pack(Ok(ip)), ip.l3, u32::from(role));
            report::note(Case { slot: watched.slot, role, bare, ip, finding, connection });
            report::vxmon_report(skb);
        }
    }
}

/// Whether a device stacked on this one has counted the packet already. Stacked devices (VLAN, bond, bridge, macvlan)
/// hand a packet down within one call, on one CPU, so the upper one leaves a note that the next one finds. The note goes
/// at the lowest device, so that it cannot hide another packet.
#[inline(always)]
fn counted_above(packet: &SkbPacket, ip: &Ip, device: &Device, slot: u32) -> bool {
    let has_lower = device.flags & device_flag::HAS_LOWER != 0;
    if !has_lower && device.above[0] | device.above[1] == 0 {
        return false;
    }
    let word = match ip.family {
        Family::V4 => ip.l3 + 2,
        Family::V6 => ip.l3 + 4,
    };
    let (Some(passed), Some(ip), Some(udp)) = (PASSED.get_ptr_mut(0), packet.u32(word), packet.u64(ip.l4)) else {
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
