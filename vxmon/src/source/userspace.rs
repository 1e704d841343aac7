//! The judge outside the kernel: on packets from a packet socket or a capture file. Does what the kernel program does
//! around it: counts, names the cause, counts a flow's repeats, and makes the event. Reads no socket and no file.

use std::{cell::Cell, collections::HashMap};

use vxmon_common::{
    config::{FLOWS, REPEAT_INTERVAL_NS, port_flag},
    conntrack::{Nat, Tuple, cause},
    counters::Counters,
    event::{Event, FlowCount, FlowKey, HEAD, event_flag, role},
    judge::{self, Finding, Outcome, Skb, State, Surroundings},
    packet::{self, Bytes, Ip, Packet as _, proto},
};

use crate::devices::Role;

/// One packet, and what is known of it beside its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sighting<'a> {
    /// The packet from its first header on.
    pub bytes: Bytes<'a>,
    /// The same bytes, as far as they are there.
    pub head: &'a [u8],
    /// EtherType (memory order) if it has no Ethernet header.
    pub bare: Option<u16>,
    /// What is known of its checksum.
    pub skb: Skb,
    /// When it was seen, ns of any clock that does not go back.
    pub time_ns: u64,
    /// The device's index.
    pub ifindex: u32,
    /// What the device is.
    pub role: Role,
}

/// The judge and what it keeps from packet to packet.
#[derive(Debug)]
pub struct Judge {
    /// [`port_flag`]s by port in memory order.
    ports: Box<[u8]>,
    sample: u32,
    turn: Cell<u32>,
    repeats: Repeats,
}

impl Judge {
    /// Sums the payload of one packet in `sample`; 0 and 1: of each. Knows no port yet.
    pub fn new(sample: u32) -> Self {
        let ports = vec![0; 1 << 16].into_boxed_slice();
        Self { ports, sample, turn: Cell::new(0), repeats: Repeats::default() }
    }

    /// Sets the UDP ports of tunnel packets, host byte order.
    pub fn set_ports(&mut self, ports: impl IntoIterator<Item = u16>) {
        self.ports.fill(0);
        for port in ports {
            if let Some(flags) = self.ports.get_mut(usize::from(port.to_be())) {
                *flags = port_flag::TUNNEL;
            }
        }
    }

    /// Judges a packet, counts it, and makes an event of an anomaly that is not a repeat within a second.
    pub fn look(&mut self, sighting: &Sighting<'_>, counters: &mut Counters) -> Option<Box<Event>> {
        let surroundings = Around { judge: self, skb: sighting.skb };
        let found = match sighting.role {
            Role::Uplink => judge::uplink(&sighting.bytes, &surroundings, sighting.bare),
            Role::Vxlan => judge::vxlan_device(&sighting.bytes, &surroundings, sighting.bare),
        };
        let Some(found) = found else {
            counters.other += 1;
            return None;
        };
        match found.outcome {
            Outcome::Other => counters.other += 1,
            Outcome::Unverified(reason) => add_one(&mut counters.unverified, reason as usize),
            Outcome::Judged(finding) if finding.verdict.is_anomaly() => {
                return self.anomaly(sighting, &found.ip, &finding, counters);
            }
            Outcome::Judged(finding) => add_one(&mut counters.verdicts, finding.verdict as usize),
        }
        None
    }

    fn anomaly(
        &mut self,
        sighting: &Sighting<'_>,
        ip: &Ip,
        finding: &Finding,
        counters: &mut Counters,
    ) -> Option<Box<Event>> {
        let Sighting { bytes, head, bare, skb: _, time_ns, ifindex, role } = *sighting;
        // The connection is looked up later, if at all.
        let cause = cause(finding, &if role == Role::Uplink { Nat::Unknown } else { Nat::None });
        add_one(&mut counters.verdicts, cause.verdict as usize);
        let (src, dst) = packet::addresses(&bytes, ip).unwrap_or_default();
        let has_ports = ip.proto == proto::UDP || ip.proto == proto::TCP;
        let port = |at| bytes.u16(at).filter(|_| has_ports).unwrap_or(0);
        let key =
            FlowKey { src, dst, sport: port(ip.l4), dport: port(ip.l4 + 2), ifindex, verdict: cause.verdict as u32 };
        let Some((count, suppressed)) = self.repeats.count(&key, time_ns) else {
            counters.suppressed += 1;
            return None;
        };
        let flag = |yes: bool, flag: u8| if yes { flag } else { 0 };
        let kept = head.len().min(HEAD);
        let mut event = Event {
            time_ns,
            count,
            suppressed,
            ct_status: 0,
            ifindex,
            len: bytes.len(),
            mark: 0,
            gso_type: finding.skb.gso_type,
            gso_size: finding.skb.gso_size,
            csum_start: finding.skb.csum_start,
            csum_offset: finding.skb.csum_offset,
            l3: ip.l3,
            l4: ip.l4,
            seen: finding.seen,
            expected: finding.expected.unwrap_or(0),
            predicted: cause.predicted.unwrap_or(0),
            bare_ethertype: bare.unwrap_or(0),
            verdict: cause.verdict as u8,
            state: finding.skb.state as u8,
            role: if role == Role::Uplink { role::UPLINK } else { role::VXLAN },
            flags: event_flag::NO_MARK
                | flag(finding.expected.is_some(), event_flag::EXPECTED)
                | flag(cause.predicted.is_some(), event_flag::PREDICTED)
                | flag(bare.is_some(), event_flag::BARE)
                | flag(finding.skb.state == State::Partial, event_flag::CSUM_START),
            ct_orig: Tuple::default(),
            ct_reply: Tuple::default(),
            last_bad_ns: 0,
            attempts: 0,
            bad_syns: 0,
            head_len: kept as u32,
            reserved: 0,
            head: [0; HEAD],
        };
        for (to, from) in event.head.iter_mut().zip(head) {
            *to = *from;
        }
        Some(Box::new(event))
    }
}

fn add_one(counters: &mut [u64], index: usize) {
    if let Some(counter) = counters.get_mut(index) {
        *counter += 1;
    }
}

/// Surroundings of one packet.
struct Around<'a> {
    judge: &'a Judge,
    skb: Skb,
}

impl Surroundings for Around<'_> {
    fn is_tunnel_port(&self, port: u16) -> bool {
        self.judge.ports.get(usize::from(port)).is_some_and(|flags| flags & port_flag::TUNNEL != 0)
    }
    /// Never: whether a packet is this node's own tunnel's, and so its to leave the sum out or not, cannot be seen here.
    fn zero_over_ipv6_is_wrong(&self, _: u16) -> bool {
        false
    }
    fn skb(&self) -> Skb {
        self.skb
    }
    fn sum_payload(&self) -> bool {
        let turn = self.judge.turn.get();
        self.judge.turn.set((turn + 1) % self.judge.sample.max(1));
        turn == 0
    }
}

/// Repeated anomalies by flow, bounded: when the younger half is full, the older one is forgotten.
#[derive(Debug, Default)]
struct Repeats {
    young: HashMap<FlowKey, FlowCount>,
    old: HashMap<FlowKey, FlowCount>,
}

impl Repeats {
    /// Counts one; if it is to be sent, which of its flow it is and how many were left out since the last.
    fn count(&mut self, key: &FlowKey, now: u64) -> Option<(u64, u64)> {
        if !self.young.contains_key(key) {
            let known = self.old.remove(key).unwrap_or_default();
            if self.young.len() >= FLOWS as usize / 2 {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(*key, known);
        }
        let flow = self.young.get_mut(key)?;
        flow.count += 1;
        let FlowCount { count, sent_at_count, sent_ns } = *flow;
        if sent_at_count > 0 && now < sent_ns.saturating_add(REPEAT_INTERVAL_NS) {
            return None;
        }
        (flow.sent_ns, flow.sent_at_count) = (now, count);
        Some((count, count - sent_at_count - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = REPEAT_INTERVAL_NS;

    fn key(sport: u16) -> FlowKey {
        FlowKey { sport, ..FlowKey::default() }
    }

    #[test]
    fn a_flow_is_sent_once_a_second_and_the_rest_is_counted() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.count(&key(1), 0), Some((1, 0)));
        assert_eq!(repeats.count(&key(1), SECOND - 1), None);
        assert_eq!(repeats.count(&key(1), SECOND - 1), None);
        assert_eq!(repeats.count(&key(2), SECOND - 1), Some((1, 0)), "another flow");
        assert_eq!(repeats.count(&key(1), SECOND), Some((4, 2)));
        assert_eq!(repeats.count(&key(1), SECOND + 1), None);
    }

    #[test]
    fn flows_are_bounded_and_the_busy_ones_stay() {
        let mut repeats = Repeats::default();
        for n in 0..=u16::MAX {
            repeats.count(&key(n), u64::from(n));
            if n % 1000 == 0 {
                repeats.count(&key(7), 10 * SECOND);
            }
        }
        assert!(repeats.young.len() + repeats.old.len() <= FLOWS as usize);
        assert_eq!(repeats.count(&key(7), 10 * SECOND), None, "still known");
    }

    #[test]
    fn one_in_so_many_payloads_is_summed() {
        let judge = Judge::new(3);
        let around = Around { judge: &judge, skb: Skb::UNKNOWN };
        let summed = (0..9).filter(|_| around.sum_payload()).count();
        assert_eq!(summed, 3);
        let judge = Judge::new(0);
        assert!(Around { judge: &judge, skb: Skb::UNKNOWN }.sum_payload());
    }
}
