//! What becomes of an anomaly: its cause is named from the conntrack entry, it is counted, and unless it repeats what was
//! sent within the last second, it goes to the daemon. Counted even if it cannot be sent. The follow-up on one, a good
//! packet of its connection, goes the same way, uncounted.

use core::{borrow::Borrow, mem::MaybeUninit, ptr::copy_nonoverlapping};

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes},
};
use vxmon_common::{
    config::REPEAT_INTERVAL_NS,
    conntrack::{Endpoints, Nat, Rewrite, cause},
    event::{Event, FlowCount, FlowKey, HEAD, event_flag, role},
    judge::{Packed, Skb, State, Verdict},
    packet::{self, Ip, Packet, proto},
    story::Connection,
};

use crate::{
    maps::{CASE, ENDPOINTS, EVENTS, FLOW_KEY, FLOWS},
    meta::{self, Conntrack},
    skb::{SkbPacket, positive},
    story::{self, Awaited, SoFar},
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

impl Case {
    /// Whether a connection was found.
    #[inline(always)]
    #[must_use]
    pub fn has_connection(&self) -> bool {
        story::is_found(self.connection)
    }
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
#[cfg_attr(feature = "modern", unsafe(no_mangle))]
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
    let connection = || story::found(case.connection);
    if !case.outcome.is_anomaly() {
        // A way of its own: whether there is one must not be asked again behind what both have in common, where verifiers
        // before 6.8 no longer know it.
        let Some(awaited) = story::awaited(connection(), case.connection) else {
            return false;
        };
        let is_sent = send(skb, case, &follow_up(case, &awaited), &meta::conntrack(skb));
        if is_sent {
            awaited.sent();
        }
        return is_sent;
    }
    let (Some(endpoints), Some(key)) = (ENDPOINTS.get_ptr_mut(0), FLOW_KEY.get_ptr_mut(0)) else {
        return false;
    };
    let Some(tally) = Tally::of(case.slot) else {
        return false;
    };
    // SAFETY: this CPU's values of the maps.
    let (endpoints, key) = unsafe { (&mut *endpoints, &mut *key.cast()) };
    find_endpoints(&SkbPacket::new(skb), &case.ip, endpoints);
    // Not before: the verifier would follow that once for each kind of answer.
    let conntrack = meta::conntrack(skb);
    let Some((counted, flow)) = count(skb, case, &tally, connection, &conntrack, endpoints, key) else {
        return false;
    };
    if !send(skb, case, &counted, &conntrack) {
        tally.lost_ring();
        return false;
    }
    sent(&tally, &counted, flow);
    // Compiled in, but dropped by the verifier unless the daemon asks for it (AYA_LOG_LEVEL is a read-only global).
    #[cfg(feature = "modern")]
    aya_log_ebpf::debug!(
        &aya_ebpf::programs::TcContext::new(skb),
        "device {}: anomaly {} of its flow, verdict {}",
        ifindex(skb),
        counted.number,
        counted.verdict as u8
    );
    true
}

/// Sends an event, unless the ring buffer is full.
#[inline(always)]
fn send(skb: *mut __sk_buff, case: &Case, counted: &Counted, conntrack: &Conntrack) -> bool {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        return false;
    };
    // SAFETY: the reserved entry has room for an event.
    unsafe { fill(entry.as_mut_ptr(), &SkbPacket::new(skb), case, counted, skb, &meta::skb(skb), conntrack) };
    entry.submit(0);
    true
}

/// The device's index.
#[inline(always)]
fn ifindex(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid.
    unsafe { (*skb).ifindex }
}

/// A case that was counted and is due to be sent. Integers only, every one of which is always set, since it may be handed over
/// in a map: see [`Packed`].
#[derive(Clone, Copy)]
pub struct Counted {
    verdict: u32,
    /// What the named fault leaves, memory order; 0 if `flags` do not say that it is known.
    predicted: u32,
    /// Of [`event_flag`], those of the cause.
    flags: u64,
    now: u64,
    number: u64,
    suppressed: u64,
    so_far: SoFar,
}

/// Counts an anomaly with these addresses and ports, whose `connection` is looked up only then. `None`: it is not due to be
/// sent. Else what was counted, and its flow.
#[inline(always)]
pub fn count<C: Borrow<Connection>>(
    skb: *mut __sk_buff,
    case: &Case,
    tally: &Tally,
    connection: impl Fn() -> Option<C>,
    conntrack: &Conntrack,
    endpoints: &Endpoints,
    key: &mut MaybeUninit<FlowKey>,
) -> Option<(Counted, Option<*mut FlowCount>)> {
    let nat = match conntrack {
        Conntrack::Unknown => Nat::Unknown,
        Conntrack::None => Nat::None,
        // SAFETY: filled by `meta::conntrack`.
        Conntrack::Entry(entry) => match unsafe { Rewrite::find(&(**entry).orig, &(**entry).reply, endpoints) } {
            Some(rewrite) => Nat::Rewritten(rewrite),
            None => Nat::None,
        },
    };
    let cause = cause(&case.outcome.finding(), if case.role == role::UPLINK { &nat } else { &Nat::None });
    tally.verdict(cause.verdict as u8);

    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let flow = flow(endpoints, ifindex(skb), cause.verdict, key);
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

    let so_far = story::bad(connection(), case.connection, now, due);
    if !due {
        tally.suppressed();
        return None;
    }
    let predicted = cause.predicted.or_zero().into();
    let known = if cause.predicted.is_known() { event_flag::PREDICTED } else { 0 };
    let flags = u64::from(known | if cause.proved { event_flag::PROVED } else { 0 });
    Some((Counted { verdict: cause.verdict as u32, predicted, flags, now, number, suppressed, so_far }, flow))
}

/// A good packet that is waited for: not counted, but sent as an anomaly is.
#[inline(always)]
#[must_use]
pub fn follow_up(case: &Case, awaited: &Awaited) -> Counted {
    Counted {
        verdict: case.outcome.number().into(),
        predicted: 0,
        flags: 0,
        // SAFETY: a helper without arguments.
        now: unsafe { bpf_ktime_get_ns() },
        number: 1,
        suppressed: 0,
        so_far: awaited.so_far(),
    }
}

/// Fills an event from a case that was counted.
///
/// # Safety
/// `event` must have room for one.
#[inline(always)]
pub unsafe fn fill<P: Packet>(
    event: *mut Event,
    packet: &P,
    case: &Case,
    counted: &Counted,
    skb: *mut __sk_buff,
    state: &Skb,
    conntrack: &Conntrack,
) {
    let Case { role, bare, ip, outcome, .. } = case;
    let Counted { verdict, predicted, flags, now, number, suppressed, so_far } = counted;
    let mut flags = *flags as u8;
    // SAFETY: by the caller; the context is valid.
    unsafe {
        (*event).time_ns = *now;
        (*event).count = *number;
        (*event).suppressed = *suppressed;
        (*event).ifindex = (*skb).ifindex;
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
        (*event).predicted = *predicted as u16;
        (*event).bare_ethertype = match bare {
            Some(ethertype) => {
                flags |= event_flag::BARE;
                *ethertype
            }
            None => 0,
        };
        (*event).verdict = *verdict as u8;
        (*event).state = state.state as u8;
        (*event).role = *role;
        match *conntrack {
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
}

/// An anomaly was sent.
#[inline(always)]
pub fn sent(tally: &Tally, counted: &Counted, flow: Option<*mut FlowCount>) {
    tally.sent();
    if let Some(flow) = flow {
        // SAFETY: as in `count`.
        unsafe {
            (*flow).sent_ns = counted.now;
            (*flow).sent_at_count = counted.number;
        }
    }
}

/// Addresses and ports of the judged packet.
#[inline(always)]
pub fn find_endpoints<P: Packet>(packet: &P, ip: &Ip, endpoints: &mut Endpoints) {
    (endpoints.src, endpoints.dst) = packet::addresses(packet, ip).unwrap_or(([0; 4], [0; 4]));
    (endpoints.sport, endpoints.dport) = (0, 0);
    let has_ports = ip.proto == proto::UDP || ip.proto == proto::TCP;
    if has_ports && let (Some(sport), Some(dport)) = (packet.u16(ip.l4), packet.u16(ip.l4 + 2)) {
        (endpoints.sport, endpoints.dport) = (sport, dport);
    }
}

/// The flow's counts, made if they are not there yet.
#[inline(always)]
fn flow(
    endpoints: &Endpoints,
    ifindex: u32,
    verdict: Verdict,
    key: &mut MaybeUninit<FlowKey>,
) -> Option<*mut FlowCount> {
    let key = write_key(endpoints, ifindex, verdict as u32, key);
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        return Some(flow);
    }
    let new = FlowCount { count: zero(), sent_at_count: zero(), sent_ns: zero() };
    // Fails if another CPU was first, which is as good.
    let _ = FLOWS.insert(key, new, BPF_NOEXIST);
    FLOWS.get_ptr_mut(key)
}

#[inline(always)]
fn write_key<'a>(endpoints: &Endpoints, ifindex: u32, verdict: u32, key: &'a mut MaybeUninit<FlowKey>) -> &'a FlowKey {
    let to = key.as_mut_ptr();
    // SAFETY: writable; each field is written, and there is no padding (IntoBytes is derived).
    unsafe {
        ((*to).src, (*to).dst) = (endpoints.src, endpoints.dst);
        ((*to).sport, (*to).dport) = (endpoints.sport, endpoints.dport);
        ((*to).ifindex, (*to).verdict) = (ifindex, verdict);
        key.assume_init_ref()
    }
}

/// The counts of the flow of a case that was counted.
#[inline(always)]
pub fn known_flow(
    skb: *mut __sk_buff,
    counted: &Counted,
    endpoints: &Endpoints,
    key: &mut MaybeUninit<FlowKey>,
) -> Option<*mut FlowCount> {
    FLOWS.get_ptr_mut(write_key(endpoints, ifindex(skb), counted.verdict, key))
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
