//! What each stage does. The entries look whether the packet is one to judge at all; most packets of a node end there.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CURRENT_CPU},
    helpers::generated::{bpf_get_prandom_u32, bpf_perf_event_output},
    programs::TcContext,
};
use vxmon_common::{
    checksum::Sum,
    config::{Device, PORTS, SLOTS, SLOTS_TABLE, device_flag, legacy::stage, port_flag, slot_bits},
    event::{Event, role},
    judge::{self, Datagram, Glance, Packed, Reason, Skb, State, Surroundings},
    packet::{self, ETHERNET, Ip, Packet, ethertype},
    story,
};

use super::{
    maps::{DEVICE_TABLE, EVENT, PERF_EVENTS, PORT_TABLE, SAMPLE, SLOT_TABLE, STAGES},
    sum,
    window::{self, Integer as _, Window},
    work::{Handle, Walk, Work, ask},
};
use crate::{
    meta::Conntrack,
    report::{self, Case},
    skb::SkbPacket,
    story::{awaited, found_flags},
    tally::Tally,
    watch::counted_above,
};

/// What is known of a UDP port (memory order).
#[inline(always)]
fn port_flags(port: u16) -> u8 {
    const { assert!(PORTS == 1 << 16) };
    match PORT_TABLE.get_ptr(0) {
        // SAFETY: a value of the map.
        Some(table) => unsafe { u8::read::<0xffff>(table.cast(), port.into()) },
        None => 0,
    }
}

/// The device in a slot.
#[inline(always)]
fn device(slot: u32) -> Option<Device> {
    const { assert!(size_of::<Device>() == 24 && SLOTS == 128) };
    let table: *const u8 = DEVICE_TABLE.get_ptr(0)?.cast();
    #[cfg(target_arch = "bpf")]
    {
        let (start, flags, low, high): (u64, u64, u64, u64);
        // SAFETY: within the value of the map, by the mask.
        unsafe {
            core::arch::asm!(
                "{slot} &= 127",
                "{slot} *= 24",
                "{start} = {table}",
                "{start} += {slot}", // see window::Integer
                "{flags} = *(u32 *)({start} + 4)",
                "{low} = *(u64 *)({start} + 8)",
                "{high} = *(u64 *)({start} + 16)",
                slot = inout(reg) u64::from(slot) => _,
                table = in(reg) table,
                start = out(reg) start,
                flags = out(reg) flags,
                low = out(reg) low,
                high = out(reg) high,
                options(readonly, nostack, preserves_flags)
            );
        }
        let _ = start;
        Some(Device { ifindex: 0, flags: flags as u32, above: [low, high] })
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above. Never run: other targets only check this crate.
    unsafe {
        Some(table.cast::<Device>().add(slot as usize).read_unaligned())
    }
}

/// Surroundings of a packet: maps, and no metadata.
struct Here {
    skb: *mut __sk_buff,
    work: Option<Handle>,
}

impl Surroundings for Here {
    #[inline(always)]
    fn is_tunnel_port(&self, port: u16) -> bool {
        port_flags(port) & port_flag::TUNNEL != 0
    }
    #[inline(always)]
    fn zero_over_ipv6_is_wrong(&self, port: u16) -> bool {
        // SAFETY: the context is valid. See watch::Kernel.
        let came_from = unsafe { (&raw const (*self.skb).ingress_ifindex).read_volatile() };
        port_flags(port) & port_flag::NO_ZERO_IPV6 != 0 && came_from == 0
    }
    #[inline(always)]
    fn skb(&self) -> Skb {
        Skb::UNKNOWN
    }
    #[inline(always)]
    fn sum_payload(&self) -> bool {
        self.work.is_some_and(|work| work.sum_payload() != 0)
    }
    /// A note that [`any`] is to be asked.
    #[inline(always)]
    fn any_reading<P: Packet>(&self, _: &P, datagram: &Datagram) -> Packed {
        if let Some(work) = self.work
            && work.may_ask()
        {
            work.set_datagram(datagram.pack());
            work.set_pseudo(datagram.pseudo().to_bits());
            work.set_asked(ask::ANY);
        }
        Packed::from_bits(Reason::Unreadable as u64)
    }
}

/// Goes on with another stage. Comes back only if that cannot be.
#[inline(always)]
fn go(skb: *mut __sk_buff, stage: u32) {
    // SAFETY: the context is valid.
    unsafe { STAGES.tail_call(&TcContext::new(skb), stage) };
}

/// Goes on to judge a packet. If that cannot be, it is counted as one that was not judged.
#[inline(always)]
fn judge(skb: *mut __sk_buff, work: Handle, stage: u32) {
    go(skb, stage);
    if let Some(tally) = Tally::of(work.slot()) {
        tally.unverified(Reason::Unreadable as u8);
    }
}

/// Has another stage answer what the judge asked for, and then go on with this one. `false`: it asked for nothing.
#[inline(always)]
fn answered(skb: *mut __sk_buff, work: Handle, this: u32) -> bool {
    let stage = match work.asked() {
        ask::NOTHING => return false,
        ask::SUM => stage::SUM,
        ask::ANY => stage::ANY,
        _ => stage::WALK,
    };
    work.set_stage(this);
    judge(skb, work, stage);
    true
}

/// The slot of a device, and whether its packets have no Ethernet header.
#[inline(always)]
fn watched(skb: *mut __sk_buff) -> Option<(u32, bool)> {
    const { assert!(SLOTS_TABLE == 1 << 16) };
    let table = SLOT_TABLE.get_ptr(0)?;
    // SAFETY: a value of the map; the context is valid.
    let entry = unsafe { u8::read::<0xffff>(table.cast(), (*skb).ifindex) };
    (entry != 0).then_some((u32::from(entry & slot_bits::SLOT), entry & slot_bits::BARE != 0))
}

/// Notes what is known of a packet that is to be judged, and goes on.
#[inline(always)]
fn begin(skb: *mut __sk_buff, (slot, is_bare): (u32, bool), role: u8, walked: Option<Ip>, stage: u32) -> Option<()> {
    let work = Handle::get()?;
    work.clear();
    work.set_slot(slot);
    work.set_role(role.into());
    // SAFETY: the context is valid.
    let protocol = unsafe { (&raw const (*skb).protocol).read_volatile() };
    work.set_bare(if is_bare { protocol & 0xffff } else { Work::ETHERNET });
    if let Some(ip) = walked {
        let walk = work.walk(0);
        // SAFETY: this CPU's value of the map.
        unsafe { *walk = Walk { key: Walk::key(ethertype::IPV4, ETHERNET), packed: Ip::pack(Ok(ip)) } };
    }
    // SAFETY: a value of the map.
    let sample = unsafe { *SAMPLE.get_ptr(0)? };
    // SAFETY: a helper without arguments.
    let sum_payload = sample <= 1 || unsafe { bpf_get_prandom_u32() } % sample == 0;
    work.set_sum_payload(sum_payload.into());
    window::copy(skb, work);
    judge(skb, work, stage);
    Some(())
}

/// The entry for uplinks.
#[inline(always)]
pub fn uplink(skb: *mut __sk_buff) -> Option<()> {
    let device = watched(skb)?;
    let glance = match SkbPacket::new(skb).head() {
        Some(head) if !device.1 => judge::glance(&head, &Here { skb, work: None }),
        _ => Glance::Unclear,
    };
    match glance {
        Glance::Other => {
            Tally::of(device.0)?.other();
            Some(())
        }
        Glance::Tunnel(ip) => begin(skb, device, role::UPLINK, Some(ip), stage::TUNNEL),
        Glance::Unclear => begin(skb, device, role::UPLINK, None, stage::TUNNEL),
    }
}

/// The entry for VXLAN devices.
#[inline(always)]
pub fn vxlan(skb: *mut __sk_buff) -> Option<()> {
    begin(skb, watched(skb)?, role::VXLAN, None, stage::FRAME)
}

/// Judges an uplink's packet.
#[inline(always)]
pub fn tunnel(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    work.set_asked(ask::NOTHING);
    let (packet, here) = (Window::<0>::new(skb, work), Here { skb, work: Some(work) });
    let Some(ip) = judge::tunnel(&packet, &here, work.bare_ethertype()) else {
        if !answered(skb, work, stage::TUNNEL) {
            Tally::of(work.slot())?.other();
        }
        return Some(());
    };
    let slot = work.slot();
    if counted_above(&packet, &ip, slot, &device(slot)?) {
        Tally::of(slot)?.counted_above();
        return Some(());
    }
    work.set_ip(&ip);
    let outcome = judge::outer(&packet, &here, &ip);
    if !answered(skb, work, stage::TUNNEL) {
        settle(skb, work, outcome)?;
    }
    Some(())
}

/// Judges a VXLAN device's frame.
#[inline(always)]
pub fn frame(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    work.set_asked(ask::NOTHING);
    let (packet, here) = (Window::<0>::new(skb, work), Here { skb, work: Some(work) });
    let found = match judge::frame(&packet, &here, work.bare_ethertype()) {
        // By way of the map: what `None` leaves unset must not be carried along.
        Some((ip, outcome)) => {
            work.set_ip(&ip);
            work.set_outcome(outcome);
            true
        }
        None => false,
    };
    if answered(skb, work, stage::FRAME) {
        return Some(());
    }
    if found {
        return settle(skb, work, work.outcome());
    }
    Tally::of(work.slot())?.other();
    Some(())
}

/// Judges a datagram by any reading.
#[inline(always)]
pub fn any(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    work.set_asked(ask::NOTHING);
    let datagram = Datagram::unpack(work.datagram(), Sum::from_bits(work.pseudo()));
    let outcome = datagram.any_reading(&Window::<1>::new(skb, work), work.sum_payload() != 0);
    if !answered(skb, work, stage::ANY) {
        settle(skb, work, outcome)?;
    }
    Some(())
}

/// Walks through the IP header that was asked for.
#[inline(always)]
pub fn walk(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    let walk = if work.asked() == ask::WALK { work.walk(0) } else { work.walk(1) };
    // SAFETY: this CPU's value of the map.
    unsafe {
        let key = (&raw const (*walk).key).read_volatile();
        let packed = Ip::pack(packet::ip(&Window::<0>::new(skb, work), key as u16, (key >> 16) as u32));
        (&raw mut (*walk).packed).write_volatile(packed);
    }
    judge(skb, work, work.stage());
    Some(())
}

/// Makes the sum that was asked for.
#[inline(always)]
pub fn sum(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    if work.asked() == ask::SUM {
        let span = work.span(work.summed());
        // SAFETY: this CPU's value of the map.
        unsafe {
            work.set_at((*span).at);
            work.set_left((*span).len);
        }
        work.set_sum(0);
        work.set_asked(ask::MORE);
    }
    if !sum::run(skb, work) {
        judge(skb, work, stage::SUM);
        return Some(());
    }
    let summed = work.summed();
    // SAFETY: this CPU's value of the map.
    unsafe { (*work.span(summed)).sum = work.sum() };
    work.set_summed(summed + 1);
    judge(skb, work, work.stage());
    Some(())
}

/// Counts what came of a packet. An anomaly goes on to be reported, and so does a good packet while one is waited for.
#[inline(always)]
fn settle(skb: *mut __sk_buff, work: Handle, outcome: Packed) -> Option<()> {
    work.set_outcome(outcome);
    let slot = work.slot();
    if !outcome.is_judged() {
        Tally::of(slot)?.unverified(outcome.number());
        return Some(());
    }
    if !outcome.is_anomaly() {
        Tally::of(slot)?.verdict(outcome.number());
        if device(slot)?.flags & device_flag::FOLLOW == 0 {
            return Some(());
        }
    }
    go(skb, stage::WHOSE);
    Some(())
}

/// Finds the connection inside.
#[inline(always)]
pub fn whose(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    work.set_asked(ask::NOTHING);
    let ip = work.ip()?;
    // By way of the map, as in `frame`.
    // SAFETY: this CPU's value of the map; the context is valid.
    work.set_flags(found_flags(unsafe {
        let packet = Window::<1>::new(skb, work);
        story::connection(&packet, &ip, work.role() as u8, (*skb).ifindex, &mut *work.connection())
    }));
    if answered(skb, work, stage::WHOSE) {
        return Some(());
    }
    let case = Case {
        slot: work.slot(),
        role: work.role() as u8,
        bare: work.bare_ethertype(),
        ip: work.ip()?,
        outcome: work.outcome(),
        connection: work.flags(),
    };
    // SAFETY: this CPU's value of the map.
    unsafe { *work.case() = case };
    go(skb, stage::COUNT);
    Some(())
}

/// Counts an anomaly, and goes on if it is due to be sent.
#[inline(always)]
pub fn count(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    // SAFETY: this CPU's value of the map.
    let case = unsafe { &*work.case() };
    let connection = || case.has_connection().then(|| work.connection_key());
    // SAFETY: this CPU's value of the map.
    let endpoints = unsafe { &mut *work.endpoints() };
    report::find_endpoints(&Window::<1>::new(skb, work), &case.ip, endpoints);
    if !case.outcome.is_anomaly() {
        let counted = report::follow_up(case, &awaited(connection(), case.connection)?);
        // SAFETY: this CPU's value of the map.
        unsafe { *work.counted() = counted };
        go(skb, stage::SEND);
        return Some(());
    }
    let (tally, unknown, mut key) = (Tally::of(case.slot)?, Conntrack::Unknown, MaybeUninit::uninit());
    let (counted, _) = report::count(skb, case, &tally, connection, &unknown, endpoints, &mut key)?;
    // SAFETY: this CPU's value of the map.
    unsafe { *work.counted() = counted };
    go(skb, stage::SEND);
    tally.lost_ring();
    Some(())
}

/// Sends it.
#[inline(always)]
pub fn send(skb: *mut __sk_buff) -> Option<()> {
    let work = Handle::get()?;
    let event = EVENT.get_ptr_mut(0)?;
    let packet = Window::<1>::new(skb, work);
    // SAFETY: this CPU's values of the maps.
    let (case, counted) = unsafe { (&*work.case(), &*work.counted()) };
    // Skb::UNKNOWN, of which the compiler would make a call of memset.
    let zero = || crate::zero() as u32;
    let unknown =
        Skb { state: State::Unknown, csum_start: zero(), csum_offset: zero(), gso_size: zero(), gso_type: zero() };
    // SAFETY: as above.
    let failed = unsafe {
        report::fill(event, &packet, case, counted, skb, &unknown, &Conntrack::Unknown);
        bpf_perf_event_output(
            skb.cast(),
            (&raw const PERF_EVENTS).cast_mut().cast(),
            BPF_F_CURRENT_CPU,
            event.cast(),
            size_of::<Event>() as u64,
        )
    };
    if !case.outcome.is_anomaly() {
        if failed == 0 {
            awaited(case.has_connection().then(|| work.connection_key()), case.connection)?.sent();
        }
        return Some(());
    }
    let tally = Tally::of(case.slot)?;
    if failed != 0 {
        tally.lost_ring();
        return Some(());
    }
    // SAFETY: this CPU's value of the map.
    let (endpoints, mut key) = (unsafe { &*work.endpoints() }, MaybeUninit::uninit());
    report::sent(&tally, counted, report::known_flow(skb, counted, endpoints, &mut key));
    Some(())
}
