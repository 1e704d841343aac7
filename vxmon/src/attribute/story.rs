//! The story of a connection inside the tunnel: which of its packets were bad, when a retry is expected to get through,
//! and how it ended. A state machine fed with packets and times: it has no clock, reads no kernel parameter, and prints
//! nothing.
//!
//! What it rests on: NAT decides on the first packet of an outer flow. Retries that are not marked any more keep the
//! conntrack entry, and with it the rewrite that breaks the checksum, as long as each comes before the entry expires. A
//! retry gets through when it is later than that, or leaves with another outer source port (`net.core.txrehash`).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use vxmon_common::{
    config,
    packet::proto,
    story::{Connection, DEVICE, tcp_flag},
};

/// Stories kept at a time; half of what the kernel program remembers.
pub const MOST: usize = config::STORIES as usize / 2;
/// Attempts listed of one story; further ones are counted.
const LISTED: usize = 16;
/// Stories that [`Stories::expire`] ends at once; the others follow at the next call.
const AT_ONCE: usize = 256;

const SECOND: u64 = 1_000_000_000;
/// TCP's first retransmission timeout (TCP_TIMEOUT_INIT, include/net/tcp.h; RFC 6298, section 2).
const FIRST_RTO: u64 = SECOND;
/// How long a story that recovered is kept, to notice that it goes on.
const AFTERMATH: u64 = 10 * SECOND;
/// How long a packet is waited for of which it is not known when it should come, if the conntrack timeout is unknown too.
const WAIT: u64 = 65 * SECOND;

/// Kernel parameters of the watched network namespace. A client in another one (a pod) has its own retry parameters,
/// by default the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `nf_conntrack_udp_timeout`, ns.
    pub udp_timeout: Option<u64>,
    /// `nf_conntrack_udp_timeout_stream`, ns.
    pub udp_timeout_stream: Option<u64>,
    /// Whether a retry gets another hash, and so leaves with another outer source port (`net.core.txrehash`); `None`: not
    /// known.
    pub txrehash: Option<bool>,
    /// `net.ipv4.tcp_syn_linear_timeouts`; 0 on kernels without it.
    pub syn_linear_timeouts: u32,
    /// `net.ipv4.tcp_syn_retries`.
    pub syn_retries: Option<u32>,
}

/// The outer conntrack entry of a bad packet that NAT rewrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Source port before NAT, host byte order.
    pub before: u16,
    /// Source port as it leaves.
    pub after: u16,
    /// The entry is assured: packets went both ways for more than two seconds, so the longer timeout holds
    /// (nf_conntrack_udp_packet(), net/netfilter/nf_conntrack_proto_udp.c).
    pub is_assured: bool,
}

/// A packet of a connection that has, or had, bad ones.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The connection.
    pub connection: Connection,
    /// Index of the device by which it left.
    pub ifindex: u32,
    /// When it left, CLOCK_MONOTONIC, ns.
    pub at: u64,
    /// Outer source port as it leaves; 0 if there is no outer packet.
    pub sport: u16,
    /// TCP flags, 0 for other protocols.
    pub tcp_flags: u8,
    /// Bad packets so far as the kernel program counted them, those that it held back included; 0: not known.
    pub counted: u64,
    /// TCP SYNs among them.
    pub counted_syns: u64,
    /// When the last bad one before it left; 0: not known.
    pub last_bad: u64,
}

/// What is known of a bad packet beside.
#[derive(Clone, Copy, Debug, Default)]
pub struct Circumstances {
    /// The outer flow was rewritten by NAT, and the checksum shows it.
    pub entry: Option<Entry>,
    /// The packet has a mark.
    pub is_marked: bool,
}

/// Why a retry is expected to get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// It leaves with another outer source port.
    SourcePort,
    /// It leaves after the conntrack entry has expired.
    Timeout,
}

impl By {
    /// Name in events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SourcePort => "source-port",
            Self::Timeout => "conntrack-timeout",
        }
    }
}

/// A connection's story at one of its bad packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoFar {
    /// Number of this bad packet, from 1.
    pub attempt: u64,
    /// Since the first one that was reported, ns.
    pub since_first: u64,
    /// How long the outer conntrack entry lives after this packet, ns.
    pub timeout: Option<u64>,
    /// When the retry is expected that gets through, and why.
    pub expected: Option<(u64, By)>,
    /// A new outer flow was rewritten and broken again: waiting does not help.
    pub is_rewritten_anew: bool,
}

/// A packet in the list of a story that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// When it left, ns.
    pub at: u64,
    /// Its outer source port as it left; 0 if there is no outer packet.
    pub sport: u16,
    /// Its checksum was wrong.
    pub is_bad: bool,
}

/// How a story ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// TCP: no SYN got through before, and now a right packet that is no SYN left: the SYN was answered.
    Connected,
    /// A packet with a right checksum left. Whether it was answered cannot be seen here.
    GoodAgain,
    /// No further packet of the connection came.
    NotSeenAgain,
    /// TCP: a SYN with a right checksum left, and nothing after it: not answered, or given up.
    NotAnswered,
    /// TCP: this side aborted the connection.
    Reset,
}

impl Outcome {
    /// Whether the connection came through.
    pub const fn is_recovery(self) -> bool {
        match self {
            Self::Connected | Self::GoodAgain => true,
            Self::NotSeenAgain | Self::NotAnswered | Self::Reset => false,
        }
    }

    /// Name in events.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::GoodAgain => "good-again",
            Self::NotSeenAgain => "not-seen-again",
            Self::NotAnswered => "not-answered",
            Self::Reset => "reset",
        }
    }
}

/// A story that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The connection.
    pub connection: Connection,
    /// Index of the device by which its last packet left.
    pub ifindex: u32,
    /// How.
    pub outcome: Outcome,
    /// When: the packet that ended it, or when it was given up, ns.
    pub at: u64,
    /// The first bad packet, ns.
    pub first_bad: u64,
    /// The last one.
    pub last_bad: u64,
    /// The first good packet after it.
    pub first_good: Option<u64>,
    /// Why that one was good, as far as ports and times show it.
    pub by: Option<By>,
    /// What was expected last.
    pub expected: Option<u64>,
    /// Bad packets.
    pub bad: u64,
    /// TCP SYNs among them.
    pub bad_syns: u64,
    /// The first packets, as far as they were reported.
    pub attempts: Vec<Attempt>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for a good packet.
    Open,
    /// Recovered; kept for a while.
    Over,
}

#[derive(Debug)]
struct Story {
    ifindex: u32,
    first: u64,
    last_bad: u64,
    /// The last packet, good or bad.
    last: u64,
    bad: u64,
    bad_syns: u64,
    /// What the kernel program had counted before this story.
    before: (u64, u64),
    entry: Option<Entry>,
    timeout: Option<u64>,
    is_marked: bool,
    is_rewritten_anew: bool,
    expected: Option<(u64, By)>,
    /// The first good packet, and its outer source port.
    first_good: Option<(u64, u16)>,
    attempts: Vec<Attempt>,
    state: State,
    deadline: u64,
}

/// How many stories there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Connections with bad packets.
    pub opened: u64,
    /// Those that recovered.
    pub recovered: u64,
    /// Those that did not.
    pub not_recovered: u64,
    /// Those that gave way to newer ones before they had ended.
    pub evicted: u64,
}

/// Which devices' good packets matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Awaiting {
    /// Those of uplinks.
    pub uplinks: bool,
    /// Those of VXLAN devices with these indexes.
    pub devices: BTreeSet<u32>,
}

/// All stories.
#[derive(Debug, Default)]
pub struct Stories {
    stories: HashMap<Connection, Story>,
    /// By last packet: the first gives way.
    by_age: BTreeSet<(u64, Connection)>,
    by_deadline: BTreeSet<(u64, Connection)>,
    tally: Tally,
    /// Open stories: of uplinks (0), of VXLAN devices by index.
    open: BTreeMap<u32, usize>,
}

impl Stories {
    /// A bad packet.
    pub fn bad(&mut self, seen: &Seen, circumstances: &Circumstances, parameters: &Parameters) -> SoFar {
        let mut story = self.take(&seen.connection).unwrap_or_else(|| {
            self.tally.opened += 1;
            Story::new(seen, parameters)
        });
        let so_far = story.bad(seen, circumstances, parameters);
        self.put(seen.connection, story);
        while self.stories.len() > MOST
            && let Some((_, oldest)) = self.by_age.first().copied()
        {
            if self.take(&oldest).is_some_and(|story| story.state == State::Open) {
                self.tally.evicted += 1;
            }
        }
        so_far
    }

    /// A good packet; the end of the story, if it is that.
    pub fn good(&mut self, seen: &Seen, parameters: &Parameters) -> Option<Ended> {
        let mut story = self.take(&seen.connection)?;
        let outcome = story.good(seen, parameters);
        let ended = outcome.map(|outcome| self.end(seen.connection, &mut story, outcome, seen.at));
        // One that recovered is kept, so that what goes wrong next is not told as new.
        if ended.as_ref().is_none_or(|ended| ended.outcome.is_recovery()) {
            self.put(seen.connection, story);
        }
        ended
    }

    /// Ends what nothing more is expected of at `now`, CLOCK_MONOTONIC, ns; a bounded number at a time.
    pub fn expire(&mut self, now: u64) -> Vec<Ended> {
        let mut ended = Vec::new();
        while ended.len() < AT_ONCE
            && let Some((deadline, connection)) = self.by_deadline.first().copied()
            && deadline <= now
        {
            let Some(mut story) = self.take(&connection) else {
                self.by_deadline.remove(&(deadline, connection));
                continue;
            };
            if story.state == State::Open {
                let outcome = if story.first_good.is_some() { Outcome::NotAnswered } else { Outcome::NotSeenAgain };
                ended.push(self.end(connection, &mut story, outcome, now));
            }
        }
        ended
    }

    /// How many there were.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Those that have not ended.
    pub fn open(&self) -> usize {
        self.open.values().sum()
    }

    /// Whose good packets are waited for.
    pub fn awaiting(&self) -> Awaiting {
        Awaiting {
            uplinks: self.open.contains_key(&UPLINKS),
            devices: self.open.keys().copied().filter(|device| *device != UPLINKS).collect(),
        }
    }

    fn end(&mut self, connection: Connection, story: &mut Story, outcome: Outcome, at: u64) -> Ended {
        if outcome.is_recovery() {
            self.tally.recovered += 1;
        } else {
            self.tally.not_recovered += 1;
        }
        story.state = State::Over;
        story.deadline = at.saturating_add(AFTERMATH);
        Ended {
            connection,
            ifindex: story.ifindex,
            outcome,
            at,
            first_bad: story.first,
            last_bad: story.last_bad,
            first_good: story.first_good.map(|(at, _)| at),
            by: story.by(),
            expected: story.expected.map(|(at, _)| at),
            bad: story.bad,
            bad_syns: story.bad_syns,
            attempts: std::mem::take(&mut story.attempts),
        }
    }

    fn take(&mut self, connection: &Connection) -> Option<Story> {
        let story = self.stories.remove(connection)?;
        self.by_age.remove(&(story.last, *connection));
        self.by_deadline.remove(&(story.deadline, *connection));
        if story.state == State::Open {
            let at = whose(connection);
            if let Some(open) = self.open.get_mut(&at) {
                *open -= 1;
                if *open == 0 {
                    self.open.remove(&at);
                }
            }
        }
        Some(story)
    }

    fn put(&mut self, connection: Connection, story: Story) {
        self.by_age.insert((story.last, connection));
        self.by_deadline.insert((story.deadline, connection));
        if story.state == State::Open {
            *self.open.entry(whose(&connection)).or_default() += 1;
        }
        self.stories.insert(connection, story);
    }
}

/// In [`Stories::open`]: seen on an uplink. No device has this index.
const UPLINKS: u32 = 0;

/// Whose good packets a connection's story waits for.
const fn whose(connection: &Connection) -> u32 {
    if connection.scope & DEVICE != 0 { connection.scope & !DEVICE } else { UPLINKS }
}

const fn is_tcp(connection: &Connection) -> bool {
    connection.proto as u8 == proto::TCP
}

const fn is_syn(seen: &Seen) -> bool {
    is_tcp(&seen.connection) && seen.tcp_flags & tcp_flag::SYN != 0
}

impl Story {
    fn new(seen: &Seen, parameters: &Parameters) -> Self {
        // What the kernel program counted long ago belongs to another story of the same addresses and ports.
        let long = parameters.udp_timeout.map_or(WAIT, |timeout| timeout.saturating_mul(2));
        let is_old = seen.last_bad == 0 || seen.at.saturating_sub(seen.last_bad) > long;
        let (bad, syns) = (seen.counted.saturating_sub(1), seen.counted_syns.saturating_sub(u64::from(is_syn(seen))));
        Self {
            ifindex: seen.ifindex,
            first: seen.at,
            last_bad: seen.at,
            last: seen.at,
            bad: 0,
            bad_syns: 0,
            before: if is_old { (bad, syns) } else { (0, 0) },
            entry: None,
            timeout: None,
            is_marked: false,
            is_rewritten_anew: false,
            expected: None,
            first_good: None,
            attempts: Vec::new(),
            state: State::Open,
            deadline: 0,
        }
    }

    fn list(&mut self, seen: &Seen, is_bad: bool) {
        if self.attempts.len() < LISTED && self.state == State::Open {
            self.attempts.push(Attempt { at: seen.at, sport: seen.sport, is_bad });
        }
    }

    /// Takes over the kernel program's counts, which know of packets that were held back; `now` is what this one adds.
    fn count(&mut self, seen: &Seen, now: u64) {
        let syns = if is_syn(seen) { now } else { 0 };
        let (bad, bad_syns) = self.before;
        self.bad = (self.bad + now).max(seen.counted.saturating_sub(bad));
        self.bad_syns = (self.bad_syns + syns).max(seen.counted_syns.saturating_sub(bad_syns)).min(self.bad);
    }

    fn bad(&mut self, seen: &Seen, circumstances: &Circumstances, parameters: &Parameters) -> SoFar {
        let previous = if seen.last_bad >= self.first { seen.last_bad } else { self.last_bad };
        let gap = seen.at.saturating_sub(previous);
        self.count(seen, 1);
        self.list(seen, true);
        self.ifindex = seen.ifindex;
        self.last_bad = self.last_bad.max(seen.at);
        self.last = self.last.max(seen.at);
        self.is_marked |= circumstances.is_marked;
        if let (Some(then), Some(now)) = (self.entry, circumstances.entry) {
            self.is_rewritten_anew |= (then.before, then.after) != (now.before, now.after);
        }
        self.entry = circumstances.entry.or(self.entry);
        self.first_good = None;
        self.timeout = circumstances
            .entry
            .and_then(|entry| if entry.is_assured { parameters.udp_timeout_stream } else { parameters.udp_timeout });
        let mut retries = Retries::new(self.bad, gap, parameters);
        self.expected = if is_syn(seen) { self.expect(seen.at, retries.clone(), parameters) } else { None };
        let wait = if is_syn(seen) {
            retries.next().unwrap_or(FIRST_RTO).saturating_mul(3) / 2 + 2 * SECOND
        } else {
            self.timeout.map_or(WAIT, |timeout| timeout.saturating_mul(2).saturating_add(5 * SECOND))
        };
        self.deadline = seen.at.saturating_add(if self.state == State::Open { wait } else { AFTERMATH });
        SoFar {
            attempt: self.bad,
            since_first: seen.at.saturating_sub(self.first),
            timeout: self.timeout,
            expected: self.expected,
            is_rewritten_anew: self.is_rewritten_anew,
        }
    }

    /// When a SYN is expected to get through, the last one having left `at`.
    fn expect(&self, at: u64, retries: Retries, parameters: &Parameters) -> Option<(u64, By)> {
        // Without a mark it is not the first packet's treatment that is wrong, or it cannot be known here.
        if !self.is_marked || self.is_rewritten_anew {
            return None;
        }
        let (timeout, mut time) = (self.timeout?, at);
        let has_retried = self.bad > 1;
        for gap in retries {
            time = time.saturating_add(gap);
            if parameters.txrehash == Some(true) && !has_retried {
                return Some((time, By::SourcePort));
            }
            if gap >= timeout {
                return Some((time, By::Timeout));
            }
        }
        None
    }

    fn good(&mut self, seen: &Seen, parameters: &Parameters) -> Option<Outcome> {
        self.last = self.last.max(seen.at);
        if self.state == State::Over {
            return None;
        }
        self.count(seen, 0);
        self.last_bad = self.last_bad.max(if seen.last_bad <= seen.at { seen.last_bad } else { 0 });
        if self.first_good.is_none() {
            self.first_good = Some((seen.at, seen.sport));
        }
        self.list(seen, false);
        if !is_tcp(&seen.connection) {
            return Some(Outcome::GoodAgain);
        }
        if seen.tcp_flags & tcp_flag::RST != 0 {
            return Some(Outcome::Reset);
        }
        if is_syn(seen) {
            let gap = seen.at.saturating_sub(self.last_bad);
            let next = Retries::new(self.bad + 1, gap, parameters).next().unwrap_or(FIRST_RTO);
            self.deadline = seen.at.saturating_add(next.saturating_mul(3) / 2 + 2 * SECOND);
            return None;
        }
        Some(if self.bad > 0 && self.bad_syns == self.bad { Outcome::Connected } else { Outcome::GoodAgain })
    }

    /// Why the first good packet was good: by another source port before NAT, or after the entry had expired.
    fn by(&self) -> Option<By> {
        let ((at, sport), entry) = (self.first_good?, self.entry?);
        if sport == entry.after {
            // The same outer flow: it was not NAT that came to an end.
            None
        } else if sport != entry.before {
            Some(By::SourcePort)
        } else if at.saturating_sub(self.last_bad) >= self.timeout? {
            Some(By::Timeout)
        } else {
            None
        }
    }
}

/// The gaps to a SYN's next retries, ns, as many as there will be (tcp_retransmit_timer(), net/ipv4/tcp_timer.c): some of
/// one second, then each twice the one before. If the last gap seen was another, twice that one, and so on.
#[derive(Clone, Debug)]
struct Retries {
    next: u64,
    /// Retries before the next one, if they go by the kernel parameters.
    number: Option<u32>,
    linear: u32,
    most: Option<u32>,
}

/// TCP_RTO_MAX, include/net/tcp.h.
const LONGEST_RTO: u64 = 120 * SECOND;
/// Retries looked ahead.
const AHEAD: u32 = 64;

impl Retries {
    /// After `sent` packets, the last one `gap` behind the one before.
    fn new(sent: u64, gap: u64, parameters: &Parameters) -> Self {
        let linear = parameters.syn_linear_timeouts;
        let most = parameters.syn_retries.map(|retries| retries.saturating_add(linear));
        let number = u32::try_from(sent.saturating_sub(1)).unwrap_or(u32::MAX);
        let planned = Self { next: 0, number: Some(number), linear, most };
        let last = planned.planned(number);
        // Timers are late by up to an eighth (kernel/time/timer.c), and answers to ICMP errors may hurry.
        if number == 0 || gap.abs_diff(last) <= last / 4 {
            return planned;
        }
        Self { next: gap.saturating_mul(2).min(LONGEST_RTO), number: None, linear, most }
    }

    /// The gap before retry `number`, from 1.
    fn planned(&self, number: u32) -> u64 {
        let doublings = number.saturating_sub(self.linear.saturating_add(1)).min(7);
        (FIRST_RTO << doublings).min(LONGEST_RTO)
    }
}

impl Iterator for Retries {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        match self.number {
            Some(number) => {
                let number = number.checked_add(1)?;
                self.number = Some(number);
                if self.most.is_some_and(|most| number > most) || number > AHEAD {
                    return None;
                }
                Some(self.planned(number))
            }
            None => {
                let gap = self.next;
                // It ends where it does not grow any more.
                self.next = if gap >= LONGEST_RTO { 0 } else { gap.saturating_mul(2).min(LONGEST_RTO) };
                (gap > 0).then_some(gap)
            }
        }
    }
}

#[cfg(test)]
#[path = "story/tests.rs"]
mod tests;
