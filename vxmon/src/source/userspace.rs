//! The judge outside the kernel: on packets from a packet socket or a capture file. Does what the kernel program does
//! around it: counts, names the cause, counts a flow's repeats, and makes the event. Reads no socket and no file.

use std::{cell::Cell, collections::HashMap};

use vxmon_common::{
    config::{FLOWS, REPEAT_INTERVAL_NS, STORIES, port_flag},
    conntrack::{Cause, Nat, Predicted, Tuple, cause},
    counters::Counters,
    event::{Event, FlowCount, FlowKey, HEAD, event_flag, role},
    judge::{self, Finding, Outcome, Skb, State, Surroundings},
    packet::{self, Bytes, Ip, Packet as _, proto},
    story::{self, Connection, Story, story_flag, tcp_flag},
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
    /// None: an event is made of each anomaly.
    repeats: Option<Repeats>,
    stories: Remembered,
}

impl Judge {
    /// Sums the payload of one packet in `sample`; 0 and 1: of each. Knows no port yet.
    pub fn new(sample: u32) -> Self {
        let ports = vec![0; 1 << 16].into_boxed_slice();
        Self { ports, sample, turn: Cell::new(0), repeats: Some(Repeats::default()), stories: Remembered::default() }
    }

    /// Sums the payload of each packet, and makes an event of each anomaly.
    pub fn of_each() -> Self {
        Self { repeats: None, ..Self::new(1) }
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

    /// Judges a packet, counts it, and makes an event of an anomaly that is not a repeat within a second; also of the first
    /// good packets of a connection after it, which have a good verdict.
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
            Outcome::Unverified(reason) => add_one(&mut counters.unverified, reason as usize),
            Outcome::Judged(finding) if finding.verdict.is_anomaly() => {
                return self.anomaly(sighting, &found.ip, &finding, counters);
            }
            Outcome::Judged(finding) => {
                add_one(&mut counters.verdicts, finding.verdict as usize);
                let so_far = self.stories.good(sighting, &found.ip)?;
                let cause = Cause { verdict: finding.verdict, predicted: Predicted::NONE, proved: false };
                return Some(event(sighting, &found.ip, &finding, &cause, so_far, (so_far.bad, 0)));
            }
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
        let Sighting { bytes, time_ns, ifindex, role, .. } = *sighting;
        // The connection is looked up later, if at all.
        let cause = cause(finding, &if role == Role::Uplink { Nat::Unknown } else { Nat::None });
        add_one(&mut counters.verdicts, cause.verdict as usize);
        let (src, dst) = packet::addresses(&bytes, ip).unwrap_or_default();
        let has_ports = ip.proto == proto::UDP || ip.proto == proto::TCP;
        let port = |at| bytes.u16(at).filter(|_| has_ports).unwrap_or(0);
        let key =
            FlowKey { src, dst, sport: port(ip.l4), dport: port(ip.l4 + 2), ifindex, verdict: cause.verdict as u32 };
        let due = match &mut self.repeats {
            Some(repeats) => repeats.count(&key, time_ns),
            None => Some((1, 0)),
        };
        let so_far = self.stories.bad(sighting, ip, due.is_some());
        let Some(counts) = due else {
            counters.suppressed += 1;
            return None;
        };
        Some(event(sighting, ip, finding, &cause, so_far, counts))
    }
}

/// The event; `counts`: which of its flow it is, and how many were left out since the last.
fn event(
    sighting: &Sighting<'_>,
    ip: &Ip,
    finding: &Finding,
    cause: &Cause,
    so_far: Story,
    (count, suppressed): (u64, u64),
) -> Box<Event> {
    let Sighting { bytes, head, bare, skb, time_ns, ifindex, role } = *sighting;
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
        gso_type: skb.gso_type,
        gso_size: skb.gso_size,
        csum_start: skb.csum_start,
        csum_offset: skb.csum_offset,
        l3: ip.l3,
        l4: ip.l4,
        seen: finding.seen,
        expected: finding.expected.unwrap_or(0),
        predicted: cause.predicted.or_zero(),
        bare_ethertype: bare.unwrap_or(0),
        verdict: cause.verdict as u8,
        state: skb.state as u8,
        role: role_number(role),
        flags: event_flag::NO_MARK
            | flag(finding.expected.is_some(), event_flag::EXPECTED)
            | flag(cause.predicted.is_known(), event_flag::PREDICTED)
            | flag(bare.is_some(), event_flag::BARE)
            | flag(skb.state == State::Partial, event_flag::CSUM_START),
        ct_orig: Tuple::default(),
        ct_reply: Tuple::default(),
        last_bad_ns: so_far.last_bad_ns,
        attempts: u32::try_from(so_far.bad).unwrap_or(u32::MAX),
        bad_syns: u32::try_from(so_far.bad_syns).unwrap_or(u32::MAX),
        head_len: kept as u32,
        reserved: 0,
        head: [0; HEAD],
    };
    for (to, from) in event.head.iter_mut().zip(head) {
        *to = *from;
    }
    Box::new(event)
}

fn role_number(role: Role) -> u8 {
    if role == Role::Uplink { role::UPLINK } else { role::VXLAN }
}

/// Connections that had bad packets, bounded as [`Repeats`] are.
#[derive(Debug, Default)]
struct Remembered {
    young: HashMap<Connection, Story>,
    old: HashMap<Connection, Story>,
}

impl Remembered {
    fn find(sighting: &Sighting<'_>, ip: &Ip) -> Option<(Connection, u8)> {
        let mut found = Connection::default();
        let role = role_number(sighting.role);
        let flags = story::connection(&sighting.bytes, ip, role, sighting.ifindex, &mut found)?;
        Some((found, flags))
    }

    /// Counts a bad packet; one that is not sent begins no story. What is known then, the time being the last one's.
    fn bad(&mut self, sighting: &Sighting<'_>, ip: &Ip, is_sent: bool) -> Story {
        let Some((connection, flags)) = Self::find(sighting, ip) else {
            return Story::default();
        };
        if !self.young.contains_key(&connection) {
            let known = self.old.remove(&connection);
            if known.is_none() && !is_sent {
                return Story::default();
            }
            if self.young.len() >= STORIES as usize / 2 {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(connection, known.unwrap_or_default());
        }
        let Some(story) = self.young.get_mut(&connection) else {
            return Story::default();
        };
        let last_bad_ns = story.last_bad_ns;
        story.bad += 1;
        story.bad_syns += u64::from(flags & tcp_flag::SYN != 0);
        story.last_bad_ns = sighting.time_ns;
        if is_sent {
            story.state = story_flag::OPEN;
        }
        Story { last_bad_ns, ..*story }
    }

    /// What came before a good packet, if it is one that is waited for: the first good SYN, the first good other packet.
    fn good(&mut self, sighting: &Sighting<'_>, ip: &Ip) -> Option<Story> {
        if self.young.is_empty() && self.old.is_empty() {
            return None;
        }
        let (connection, flags) = Self::find(sighting, ip)?;
        let story = self.young.get_mut(&connection).or_else(|| self.old.get_mut(&connection))?;
        let is_syn = connection.proto as u8 == proto::TCP && flags & tcp_flag::SYN != 0;
        if story.state & story_flag::OPEN == 0 || is_syn && story.state & story_flag::SYN_TOLD != 0 {
            return None;
        }
        story.state = if is_syn { story.state | story_flag::SYN_TOLD } else { 0 };
        Some(*story)
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

    /// An Ethernet frame of a TCP packet, without its checksum: good if it is said to be filled in later.
    fn tcp(flags: u8, check: u16) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 20];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..18].copy_from_slice(&[0x45, 0, 0, 40]);
        frame[23] = proto::TCP;
        frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        (frame[46], frame[47]) = (0x50, flags);
        frame[50..52].copy_from_slice(&check.to_be_bytes());
        frame
    }

    #[test]
    fn the_first_good_packets_after_bad_ones_are_told() {
        const ACK: u8 = 0x10;
        let mut judge = Judge::new(1);
        let mut counters = Counters::default();
        // 10.0.0.1 + 10.0.0.2 + protocol + length: the pseudo-header sum, as it stands where the device fills in the rest.
        let right = 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 6 + 20;
        let skb = Skb { state: State::Partial, csum_start: 34, csum_offset: 16, ..Skb::UNKNOWN };
        let mut look = |flags, check, time_ns| {
            let frame = tcp(flags, check);
            let bytes = Bytes::new(&frame);
            let sighting = Sighting { bytes, head: &frame, bare: None, skb, time_ns, ifindex: 3, role: Role::Vxlan };
            judge.look(&sighting, &mut counters)
        };
        let is_good = |event: &Option<Box<Event>>| event.as_ref().map(|event| event.verdict < 4);
        assert_eq!(is_good(&look(ACK, right, 1)), None, "nothing was bad");
        assert_eq!(is_good(&look(tcp_flag::SYN, 1, 2)), Some(false));
        assert_eq!(is_good(&look(tcp_flag::SYN, 1, 3)), None, "a repeat");
        let good_syn = look(tcp_flag::SYN, right, 4);
        assert_eq!(good_syn.as_ref().map(|event| (event.attempts, event.bad_syns, event.last_bad_ns)), Some((2, 2, 3)));
        assert_eq!(is_good(&good_syn), Some(true));
        assert_eq!(is_good(&look(tcp_flag::SYN, right, 5)), None, "told already");
        assert_eq!(is_good(&look(ACK, right, 6)), Some(true));
        assert_eq!(is_good(&look(ACK, right, 7)), None, "told already");
        assert_eq!((counters.suppressed, counters.seen()), (1, 7));
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
