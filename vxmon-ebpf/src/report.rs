//! What becomes of an anomaly: its cause is named from the conntrack entry, it is counted, and unless it repeats what was
//! sent within the last second, it goes to the daemon. Counted even if it cannot be sent.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    programs::TcContext,
};
use aya_log_ebpf::debug;
use vxmon_common::{
    config::REPEAT_INTERVAL_NS,
    conntrack::{Nat, Rewrite, cause},
    event::{Event, FlowCount, FlowKey, HEAD, event_flag, role},
    judge::{Finding, State},
    packet::{self, Ip, Packet, proto},
};

use crate::{
    maps::{CASE, ENDPOINTS, EVENTS, FLOWS},
    meta::{self, Conntrack},
    skb::SkbPacket,
    tally::Tally,
};

/// `BPF_NOEXIST` (include/uapi/linux/bpf.h).
const BPF_NOEXIST: u64 = 1;

/// An anomaly, and where it was seen. Handed over in a map of one value for each CPU: what the verifier knows of it ends
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
    pub finding: Finding,
}

/// Takes note of an anomaly, for [`vxmon_anomaly`].
#[inline(always)]
pub fn note(case: Case) {
    if let Some(note) = CASE.get_ptr_mut(0) {
        // SAFETY: this CPU's value of the map.
        unsafe { *note = case };
    }
}

/// Counts the anomaly noted last, and sends it if it is due. A global function: checked once by the verifier. Returns
/// nothing of use; global functions must return a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn vxmon_anomaly(skb: *mut __sk_buff) -> u64 {
    if let Some(case) = CASE.get_ptr(0) {
        // SAFETY: this CPU's value of the map, filled by `note` on the way here.
        anomaly(skb, unsafe { &*case });
    }
    0
}

#[inline(always)]
fn anomaly(skb: *mut __sk_buff, case: &Case) {
    let Case { slot, role, bare, ip, finding } = case;
    let (role, bare) = (*role, *bare);
    let Some(tally) = Tally::of(*slot) else {
        return;
    };
    let packet = &SkbPacket::new(skb);
    let has_ports = ip.proto == proto::UDP || ip.proto == proto::TCP;
    let Some(endpoints) = ENDPOINTS.get_ptr_mut(0) else {
        return;
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
    let cause = cause(finding, if role == role::UPLINK { &nat } else { &Nat::None });
    tally.verdict(cause.verdict);

    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the context is valid.
    let ifindex = unsafe { (*skb).ifindex };
    let key = FlowKey {
        src: endpoints.src,
        dst: endpoints.dst,
        sport: endpoints.sport,
        dport: endpoints.dport,
        ifindex,
        verdict: cause.verdict as u32,
    };
    let flow = flow(&key);
    let mut number = 1;
    let mut suppressed = 0;
    if let Some(flow) = flow {
        // SAFETY: a value of the map, which stays allocated while the program runs. Other CPUs add to it too; a count
        // may be read a little late, but none is lost.
        unsafe {
            atomic_add_one(&raw mut (*flow).count);
            number = (*flow).count;
            let (sent_ns, sent_at) = ((*flow).sent_ns, (*flow).sent_at_count);
            // Another CPU may have sent one since `now` was read.
            if sent_ns != 0 && now < sent_ns.wrapping_add(REPEAT_INTERVAL_NS) {
                tally.suppressed();
                return;
            }
            if number > sent_at {
                suppressed = number - sent_at - 1;
            }
        }
    }

    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        tally.lost_ring();
        return;
    };
    let event = entry.as_mut_ptr();
    let mut flags = 0;
    let state = finding.skb;
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
        (*event).seen = finding.seen;
        (*event).expected = match finding.expected {
            Some(expected) => {
                flags |= event_flag::EXPECTED;
                expected
            }
            None => 0,
        };
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
                (*event).ct_orig = (*known).orig;
                (*event).ct_reply = (*known).reply;
                (*event).ct_status = (*known).status;
            }
            Conntrack::None => flags |= event_flag::NO_CONNTRACK,
            Conntrack::Unknown => {}
        }
        (*event).flags = flags;
        (*event).reserved = 0;
        let len = packet.len();
        let head_len = if len > HEAD as u32 { HEAD as u32 } else { len };
        (*event).head_len = head_len;
        if head_len == 0
            || head_len > HEAD as u32
            || bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*event).head).cast(), head_len) != 0
        {
            (*event).head_len = 0;
        }
    }
    entry.submit(0);
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
}

/// The flow's counts, made if they are not there yet.
#[inline(always)]
fn flow(key: &FlowKey) -> Option<*mut FlowCount> {
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        return Some(flow);
    }
    let new = FlowCount { count: 0, sent_at_count: 0, sent_ns: 0 };
    // Fails if another CPU was first, which is as good.
    let _ = FLOWS.insert(key, new, BPF_NOEXIST);
    FLOWS.get_ptr_mut(key)
}

/// Adds one, atomically among CPUs (BPF_ATOMIC | BPF_ADD, in every kernel with eBPF).
///
/// # Safety
/// `counter` must point into a map's value.
#[inline(always)]
unsafe fn atomic_add_one(counter: *mut u64) {
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
