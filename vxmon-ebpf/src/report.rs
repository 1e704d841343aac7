//! What becomes of an anomaly: its cause is named from the conntrack entry, it is counted, and unless it repeats what was
//! sent within the last second, it goes to the daemon. Counted even if it cannot be sent. The follow-up on one, a good
//! packet of its connection, goes the same way, uncounted.

use core::ptr::copy_nonoverlapping;

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    programs::TcContext,
};
use aya_log_ebpf::debug;
use vxmon_common::{
    config::REPEAT_INTERVAL_NS,
    conntrack::{Endpoints, Nat, Rewrite, cause},
    event::{Event, FlowCount, HEAD, event_flag, role},
    judge::{Packed, State, Verdict},
    packet::{self, Ip, Packet, proto},
};

use crate::{
    maps::{CASE, ENDPOINTS, EVENTS, FLOW_KEY, FLOWS},
    meta::{self, Conntrack},
    skb::{SkbPacket, positive},
    story,
    tally::Tally,
    zero,
};

/// `BPF_NOEXIST` (include/uapi/linux/bpf.h).
const BPF_NOEXIST: u64 = 1;

/// An anomaly or a follow-up on one, and where it was seen. Handed over in a map of one value for each CPU: what the verifier knows of it ends
/// there, and the stack (512 bytes for all functions together) is spared.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Case {
    /// The device's slot.
    pub slot: u32,
    /// See [`vxmon_common::event::role`].
    pub role: u8,
    /// EtherType (memory order) if the device's packets have no Ethernet header.
    pub bare: Option<u16>,
    /// IP header of the judged packet.
    pub ip: Ip,
    /// What the judge found.
    pub outcome: Packed,
    /// What [`story::vxmon_connection`] said of the packet.
    pub connection: u64,
}

/// Takes note of a case, for [`vxmon_report`].
#[inline(always)]
pub fn note(case: Case) {
    if let Some(note) = CASE.get_ptr_mut(0) {
        // SAFETY: this CPU's value of the map.
        unsafe { *note = case };
    }
}

/// Counts the anomaly noted last, and sends it if it is due; sends a follow-up. A global function: checked once by the
/// verifier. Returns whether it was sent.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn vxmon_report(skb: *mut __sk_buff) -> u64 {
    match CASE.get_ptr(0) {
        // SAFETY: this CPU's value of the map, filled by `note` on the way here.
        Some(case) => u64::from(report(skb, unsafe { &*case })),
        None => 0,
    }
}

#[inline(always)]
fn report(skb: *mut __sk_buff, case: &Case) -> bool {
    let Case { slot, role, bare, ip, outcome, connection } = case;
    let (role, bare) = (*role, *bare);
    let is_anomaly = outcome.is_anomaly();
    let awaited = if is_anomaly { None } else { story::awaited(*connection) };
    if !is_anomaly && awaited.is_none() {
        return false;
    }
    let Some(tally) = Tally::of(*slot) else {
        return false;
    };
    let packet = &SkbPacket::new(skb);
    let has_ports = ip.proto == proto::UDP || ip.proto == proto::TCP;
    let Some(endpoints) = ENDPOINTS.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: this CPU's value of the map.
    let endpoints = unsafe { &mut *endpoints };
    (endpoints.src, endpoints.dst) = packet::addresses(packet, ip).unwrap_or(([0; 4], [0; 4]));
    (endpoints.sport, endpoints.dport) = (0, 0);
    if has_ports && let (Some(sport), Some(dport)) = (packet.u16(ip.l4), packet.u16(ip.l4 + 2)) {
        (endpoints.sport, endpoints.dport) = (sport, dport);
    }
    let conntrack = meta::conntrack(skb);
    let nat = match conntrack {
        Conntrack::Unknown => Nat::Unknown,
        Conntrack::None => Nat::None,
        // SAFETY: filled by `conntrack`.
        Conntrack::Entry(entry) => match unsafe { Rewrite::find(&(*entry).orig, &(*entry).reply, endpoints) } {
            Some(rewrite) => Nat::Rewritten(rewrite),
            None => Nat::None,
        },
    };
    let cause = cause(&outcome.finding(), if role == role::UPLINK { &nat } else { &Nat::None });
    if is_anomaly {
        tally.verdict(cause.verdict as u8);
    }

    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the context is valid.
    let ifindex = unsafe { (*skb).ifindex };
    let flow = if is_anomaly { flow(endpoints, ifindex, cause.verdict) } else { None };
    let mut number = 1;
    let mut suppressed = 0;
    let mut due = true;
    if let Some(flow) = flow {
        // SAFETY: a value of the map, which stays allocated while the program runs. Other CPUs add to it too; a count
        // may be read a little late, but none is lost.
        unsafe {
            atomic_add_one(&raw mut (*flow).count);
            number = (*flow).count;
            let (sent_ns, sent_at) = ((*flow).sent_ns, (*flow).sent_at_count);
            // Another CPU may have sent one since `now` was read.
            due = sent_ns == 0 || now >= sent_ns.wrapping_add(REPEAT_INTERVAL_NS);
            if number > sent_at {
                suppressed = number - sent_at - 1;
            }
        }
    }

    let so_far = match &awaited {
        Some(awaited) => awaited.so_far(),
        None => story::bad(*connection, now, due),
    };
    if !due {
        tally.suppressed();
        return false;
    }
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        if is_anomaly {
            tally.lost_ring();
        }
        return false;
    };
    let event = entry.as_mut_ptr();
    let mut flags = 0;
    let state = meta::skb(skb);
    // SAFETY: the reserved entry has room for an event; the context is valid.
    unsafe {
        (*event).time_ns = now;
        (*event).count = number;
        (*event).suppressed = suppressed;
        (*event).ifindex = ifindex;
        (*event).len = packet.len();
        (*event).mark = (*skb).mark;
        (*event).gso_type = state.gso_type;
        (*event).gso_size = state.gso_size;
        (*event).csum_start = state.csum_start;
        (*event).csum_offset = state.csum_offset;
        if matches!(state.state, State::Partial) {
            flags |= event_flag::CSUM_START;
        }
        (*event).l3 = ip.l3;
        (*event).l4 = ip.l4;
        (*event).seen = outcome.seen();
        (*event).expected = outcome.expected();
        if outcome.has_expected() {
            flags |= event_flag::EXPECTED;
        }
        (*event).predicted = match cause.predicted {
            Some(predicted) => {
                flags |= event_flag::PREDICTED;
                predicted
            }
            None => 0,
        };
        if cause.proved {
            flags |= event_flag::PROVED;
        }
        (*event).bare_ethertype = match bare {
            Some(ethertype) => {
                flags |= event_flag::BARE;
                ethertype
            }
            None => 0,
        };
        (*event).verdict = cause.verdict as u8;
        (*event).state = state.state as u8;
        (*event).role = role;
        match conntrack {
            Conntrack::Entry(known) => {
                flags |= event_flag::CONNTRACK;
                // An assignment would be a call of memmove: see `zero`.
                copy_nonoverlapping(&raw const (*known).orig, &raw mut (*event).ct_orig, 1);
                copy_nonoverlapping(&raw const (*known).reply, &raw mut (*event).ct_reply, 1);
                (*event).ct_status = (*known).status;
            }
            Conntrack::None => flags |= event_flag::NO_CONNTRACK,
            Conntrack::Unknown => {}
        }
        (*event).flags = flags;
        (*event).last_bad_ns = so_far.last_bad_ns;
        (*event).attempts = so_far.attempts;
        (*event).bad_syns = so_far.bad_syns;
        (*event).reserved = 0;
        let len = packet.len();
        let head_len = if len > HEAD as u32 { HEAD as u32 } else { len };
        (*event).head_len = head_len;
        let known = positive::<{ HEAD as u32 }>(head_len);
        if head_len == 0 || bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*event).head).cast(), known) != 0 {
            (*event).head_len = 0;
        }
    }
    entry.submit(0);
    if let Some(awaited) = &awaited {
        awaited.sent();
        return true;
    }
    tally.sent();
    // Compiled in, but dropped by the verifier unless the daemon asks for it (AYA_LOG_LEVEL is a read-only global).
    debug!(&TcContext::new(skb), "device {}: anomaly {} of its flow, verdict {}", ifindex, number, cause.verdict as u8);
    if let Some(flow) = flow {
        // SAFETY: as above.
        unsafe {
            (*flow).sent_ns = now;
            (*flow).sent_at_count = number;
        }
    }
    true
}

/// The flow's counts, made if they are not there yet.
#[inline(always)]
fn flow(endpoints: &Endpoints, ifindex: u32, verdict: Verdict) -> Option<*mut FlowCount> {
    let key = FLOW_KEY.get_ptr_mut(0)?;
    // SAFETY: this CPU's value of the map. It is there for the sake of the stack.
    let key = unsafe { &mut *key };
    (key.src, key.dst) = (endpoints.src, endpoints.dst);
    (key.sport, key.dport) = (endpoints.sport, endpoints.dport);
    (key.ifindex, key.verdict) = (ifindex, verdict as u32);
    let key = &*key;
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        return Some(flow);
    }
    let new = FlowCount { count: zero(), sent_at_count: zero(), sent_ns: zero() };
    // Fails if another CPU was first, which is as good.
    let _ = FLOWS.insert(key, new, BPF_NOEXIST);
    FLOWS.get_ptr_mut(key)
}

/// Adds one, atomically among CPUs (BPF_ATOMIC | BPF_ADD, in every kernel with eBPF).
///
/// # Safety
/// `counter` must point into a map's value.
#[inline(always)]
pub unsafe fn atomic_add_one(counter: *mut u64) {
    // Rust's atomics cannot say this for BPF: their additions return the old value, which needs newer instructions.
    #[cfg(target_arch = "bpf")]
    // SAFETY: by the caller.
    unsafe {
        core::arch::asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter, one = in(reg) 1_u64);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: by the caller. Never run: other targets only check this crate.
    unsafe {
        *counter += 1;
    }
}
