//! From what the kernel program sent to an [`Anomaly`]: each section of it is filled here, or says why not. Never prints,
//! never attaches.
//!
//! ```text
//! headers    outer and inner packet, from the first bytes
//! conntrack  the outer connection: from the skb, by netlink where the skb does not tell
//! nat        the rule that rewrote it, and why it did
//! story      the connection inside: its bad packets, when it is expected to recover, how it ended
//! parameters the kernel parameters that this hangs on
//! ending     the end of a story, as an event shows it
//! ```
//! The cause itself, the predicted value, is [`vxmon_common::conntrack::cause`]: the kernel program's own code.

mod conntrack;
mod ending;
mod headers;
mod nat;
mod parameters;
pub mod story;

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;

use vxmon_common::{
    conntrack::{Cause, Nat, Rewrite, cause, right_sport},
    event::{Event, event_flag, role},
    judge::{Finding, State, Verdict},
};
use zerocopy::FromBytes as _;

pub use self::{
    conntrack::Source as ConntrackSource,
    nat::{Observer, Pending},
};
use self::{
    headers::Headers,
    nat::RangeFlags,
    story::{Awaiting, By, Circumstances, Entry, Seen, Stories, Tally},
};
use crate::{
    devices::VxlanDevice,
    event::{self, Anomaly, Record},
    netlink::conntrack::status,
    rules::Rules,
};

/// Why bytes from the ring buffer are not an event.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Not an event's size.
    #[error("an event of {0} bytes")]
    Size(usize),
    /// A number that means nothing.
    #[error("an event with {0} {1}")]
    Number(&'static str, u8),
}

/// An event whose numbers were checked.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    /// As it came.
    pub event: Event,
    /// Its verdict.
    pub verdict: Verdict,
    /// The skb's checksum state.
    pub state: State,
}

/// Checks the bytes of an event.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let event = Event::read_from_bytes(bytes).map_err(|_| DecodeError::Size(bytes.len()))?;
    let verdict = Verdict::try_from(event.verdict).map_err(|number| DecodeError::Number("verdict", number))?;
    let state = State::try_from(event.state).map_err(|number| DecodeError::Number("state", number))?;
    Ok(Decoded { event, verdict, state })
}

/// An anomaly, and the verdict that the kernel program counted it under.
#[derive(Debug)]
pub struct Attributed {
    /// The anomaly.
    pub anomaly: Anomaly,
    /// The verdict it was counted under.
    pub counted: Verdict,
    /// The verdict it has now that its connection is known.
    pub verdict: Verdict,
    /// Rules that are still to be read may tell more of its NAT.
    pub pending: Option<Box<Pending>>,
}

/// Fills in what the packet itself does not tell.
#[derive(Debug)]
pub struct Attributor {
    node: String,
    conntrack: conntrack::Lookup,
    nat: nat::Lookup,
    observer: Option<Box<dyn Observer>>,
    stories: Stories,
    parameters: parameters::Reader,
    /// VXLAN devices: port, VNI and name.
    vxlans: Vec<(u16, u32, String)>,
    /// Why an event has no mark.
    no_mark: &'static str,
}

impl Attributor {
    /// For this node.
    pub fn new(node: String, source: ConntrackSource) -> Self {
        Self {
            node,
            conntrack: conntrack::Lookup::new(source),
            nat: nat::Lookup::default(),
            observer: None,
            stories: Stories::default(),
            parameters: parameters::Reader::default(),
            vxlans: Vec::new(),
            no_mark: "a packet socket does not see it",
        }
    }

    /// For packets of captures: asks this machine nothing.
    pub fn of_captures(node: String) -> Self {
        Self {
            parameters: parameters::Reader::elsewhere(),
            no_mark: "a capture does not hold it",
            ..Self::new(node, ConntrackSource::Nowhere)
        }
    }

    /// Names NAT rules too.
    #[must_use]
    pub fn with_rules(mut self, rules: Rules) -> Self {
        self.nat = nat::Lookup::new(rules);
        self
    }

    /// Asks also for what was seen as NAT was set up, if that can be seen.
    #[must_use]
    pub fn with_observer(mut self, observer: Option<Box<dyn Observer>>) -> Self {
        self.observer = observer;
        self
    }

    /// Fills in an event seen on `device` at `ts`.
    pub fn attribute(&mut self, decoded: &Decoded, device: &str, ts: String) -> Attributed {
        let Decoded { event, verdict: counted, state } = *decoded;
        let mut missing = std::collections::BTreeMap::new();
        let Headers { outer, vni, inner } = headers::read(&event, &mut missing);

        let known = match &outer {
            Some(outer) => self.conntrack.find(&event, outer),
            None if event.role == role::UPLINK => Err("the outer packet could not be read".to_owned()),
            None => Err("a VXLAN device's frames have no outer packet yet".to_owned()),
        };
        let is_untracked = matches!(known, Ok(conntrack::Entry::None));
        let (ct, tuples, nat) = match known {
            Ok(conntrack::Entry::Found(found)) => (Some(found.ct), Some((found.orig, found.reply)), None),
            Ok(conntrack::Entry::None) => {
                missing.insert("ct", "the packet has no conntrack entry".to_owned());
                (None, None, Some(Nat::None))
            }
            Ok(conntrack::Entry::NoneListed) => {
                missing.insert("ct", "conntrack had no entry of the packet when it was asked".to_owned());
                (None, None, Some(Nat::None))
            }
            Err(why) => {
                missing.insert("ct", why);
                (None, None, Some(Nat::Unknown))
            }
        };
        let finding = Finding {
            // The kernel program may have named the cause already; the same code names it again here.
            verdict: match counted {
                Verdict::NatStalePort => Verdict::BadOuter,
                Verdict::NatMangledZero if event.expected != 0 => Verdict::BadOuter,
                verdict => verdict,
            },
            seen: event.seen,
            expected: (event.flags & event_flag::EXPECTED != 0).then_some(event.expected),
        };
        let endpoints = headers::endpoints(&event);
        let rewrite = match (&tuples, &endpoints) {
            (Some((orig, reply)), Some(endpoints)) => Rewrite::find(orig, reply, endpoints),
            _ => None,
        };
        let nat = nat.unwrap_or(match rewrite {
            Some(rewrite) => Nat::Rewritten(rewrite),
            None => Nat::None,
        });
        let Cause { verdict, predicted, proved } =
            if event.role == role::UPLINK { cause(&finding, &nat) } else { cause(&finding, &Nat::None) };

        let right_for_sport = match (verdict, &nat, &endpoints, finding.expected) {
            (Verdict::BadOuter, Nat::Unknown, Some(outer), Some(expected)) => {
                Some(u16::from_be(right_sport(event.seen, expected, outer.sport)))
            }
            _ => None,
        };
        let observed = match (&mut self.observer, &tuples, &rewrite) {
            (Some(observer), Some((orig, reply)), Some(_)) => observer.range_flags(orig, reply).map(RangeFlags),
            _ => None,
        };
        let (nat, pending) = match (&ct, &tuples, &endpoints) {
            (Some(ct), Some((orig, reply)), Some(endpoints)) if Rewrite::is_of(orig, reply, endpoints) => {
                let (nat, pending) = self.nat.find(&nat::Seen {
                    ct,
                    observed,
                    rewrite: rewrite.as_ref().map(|rewrite| (rewrite.before, rewrite.after)),
                    inner: inner.as_ref(),
                    device,
                    ifindex: event.ifindex,
                    mark: (event.flags & event_flag::NO_MARK == 0).then_some(event.mark),
                    at: event.time_ns,
                });
                (Some(nat), pending)
            }
            (Some(_), ..) => {
                (Some(nat::unknown("the packet is not as its conntrack entry has it: it was changed after NAT")), None)
            }
            // Then conntrack's NAT did not touch it.
            (None, ..) if is_untracked => (Some(nat::untouched()), None),
            (None, ..) if event.role == role::UPLINK => {
                (Some(nat::unknown(missing.get("ct").map_or("the conntrack entry is not known", String::as_str))), None)
            }
            (None, ..) => (None, None),
        };
        if nat.is_none() {
            missing.insert("nat", "a VXLAN device's frames have no outer packet yet".to_owned());
        }
        let entry =
            rewrite.filter(|_| matches!(verdict, Verdict::NatMangledZero | Verdict::NatStalePort)).map(|nat| Entry {
                before: u16::from_be(nat.before.sport),
                after: u16::from_be(nat.after.sport),
                is_assured: ct.as_ref().is_some_and(|ct| ct.status.contains(&"assured")),
            });
        let flow = self.flow(&event, &Circumstances { entry, is_marked: event.mark != 0 }, &ts);
        if flow.is_none() {
            missing.insert("flow", "the connection inside could not be read".to_owned());
        }
        let vxlan_dev =
            if event.role == role::UPLINK { self.vxlan_device(outer.as_ref(), vni) } else { Some(device.to_owned()) };
        if event.flags & event_flag::NO_MARK != 0 {
            missing.insert("mark", self.no_mark.to_owned());
        }
        let anomaly = Anomaly {
            ts,
            node: self.node.clone(),
            dev: device.to_owned(),
            ifindex: event.ifindex,
            role: if event.role == role::UPLINK { "uplink" } else { "vxlan" },
            verdict: verdict.name(),
            csum: event::Csum {
                seen: hex(event.seen),
                expected: finding.expected.map(hex),
                state: state.name(),
                start: (event.flags & event_flag::CSUM_START != 0).then_some(event.csum_start),
                gso_size: event.gso_size,
            },
            outer,
            vni,
            vxlan_dev,
            inner,
            mark: (event.flags & event_flag::NO_MARK == 0).then(|| format!("{:#x}", event.mark)),
            ct,
            nat,
            cause: (event.role == role::UPLINK).then(|| event::Cause {
                predicted: predicted.value().map(hex),
                proved,
                right_for_sport,
            }),
            flow,
            suppressed: event.suppressed,
            missing,
            packet: event::Packet::default(),
        };
        Attributed { anomaly, counted, verdict, pending }
    }

    /// Puts what the rules say that were read since into an anomaly's section `nat`; whether they said something.
    pub fn settle(&mut self, anomaly: &mut Anomaly, pending: &Pending) -> bool {
        let nat = self.nat.settle(anomaly, pending);
        let is_settled = nat.is_some();
        anomaly.nat = nat.or(anomaly.nat.take());
        is_settled
    }

    /// Has the rules be read from now on.
    pub fn begin(&self) {
        self.nat.begin();
    }

    /// Is told when there is more by which anomalies may be settled.
    pub fn news(&self) -> Option<Arc<Notify>> {
        self.nat.news()
    }

    /// A good packet that was sent because its connection had bad ones; the end of that story, if it is that.
    pub fn follow_up(&mut self, decoded: &Decoded) -> Option<story::Ended> {
        let parameters = self.parameters.at(decoded.event.time_ns);
        self.stories.good(&seen(&decoded.event)?, &parameters)
    }

    /// Stories of which nothing more is expected at `now`, CLOCK_MONOTONIC, ns.
    pub fn expire(&mut self, now: u64) -> Vec<story::Ended> {
        self.stories.expire(now)
    }

    /// The end of a story as an event; `wall` turns a time of CLOCK_MONOTONIC (ns) into RFC 3339.
    pub fn ending(&self, ended: &story::Ended, device: &str, wall: &dyn Fn(u64) -> String) -> Record {
        ending::record(ended, &self.node, device, wall)
    }

    /// Whose good packets are waited for.
    pub fn awaiting(&self) -> Awaiting {
        self.stories.awaiting()
    }

    /// How many stories there were, and how many have not ended.
    pub fn stories(&self) -> (Tally, u64) {
        (self.stories.tally(), self.stories.open() as u64)
    }

    /// Takes note of the namespace's VXLAN devices.
    pub fn set_vxlans(&mut self, vxlans: &[VxlanDevice]) {
        let known = vxlans.iter().filter(|vxlan| !vxlan.settings.external);
        self.vxlans = known.map(|v| (v.settings.port, v.settings.vni, v.name.clone())).collect();
    }

    /// The VXLAN device that a tunnel packet came from, if there is just one that it can be.
    fn vxlan_device(&self, outer: Option<&event::Endpoints>, vni: Option<u32>) -> Option<String> {
        let (port, vni) = (outer?.dport, vni?);
        let mut fitting = self.vxlans.iter().filter(|(p, v, _)| *p == port && *v == vni);
        let (_, _, name) = fitting.next()?;
        fitting.next().is_none().then(|| name.clone())
    }

    fn flow(&mut self, event: &Event, circumstances: &Circumstances, ts: &str) -> Option<event::Flow> {
        let parameters = self.parameters.at(event.time_ns);
        let seen = seen(event)?;
        let so_far = self.stories.bad(&seen, circumstances, &parameters);
        let later = |at: u64| later(ts, at.saturating_sub(seen.at));
        Some(event::Flow {
            attempt: so_far.attempt,
            since_first_ms: so_far.since_first / 1_000_000,
            conntrack_timeout_s: so_far.timeout.map(|timeout| timeout / 1_000_000_000),
            expected_recovery: so_far.expected.and_then(|(at, _)| later(at)),
            expected_by: so_far.expected.map(|(_, by)| By::name(by)),
            rewritten_anew: so_far.is_rewritten_anew,
        })
    }
}

/// An event's packet as its connection's story takes it.
fn seen(event: &Event) -> Option<Seen> {
    let (connection, tcp_flags) = headers::connection(event)?;
    let outer = if event.role == role::UPLINK { headers::endpoints(event) } else { None };
    Some(Seen {
        connection,
        ifindex: event.ifindex,
        at: event.time_ns,
        sport: outer.map_or(0, |outer| u16::from_be(outer.sport)),
        tcp_flags,
        counted: event.attempts.into(),
        counted_syns: event.bad_syns.into(),
        last_bad: event.last_bad_ns,
    })
}

/// A time so many ns later than `ts`, in the same form.
fn later(ts: &str, by: u64) -> Option<String> {
    let time = ts.parse::<Timestamp>().ok()?;
    let later = time.checked_add(SignedDuration::from_nanos(i64::try_from(by).ok()?)).ok()?;
    Some(event::rfc3339(later))
}

/// A checksum as events show it: hexadecimal, network order.
fn hex(check: u16) -> String {
    format!("{:#06x}", u16::from_be(check))
}

/// Names of a conntrack entry's status bits.
fn status_names(bits: u64) -> Vec<&'static str> {
    status::names(bits as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the ring buffer holds, decoding and attributing it ends without a panic.
        #[test]
        fn garbage_is_an_error_or_an_anomaly(mut bytes in proptest::collection::vec(any::<u8>(), size_of::<Event>()), verdict in 0_u8..12, state in 0_u8..6) {
            let at = std::mem::offset_of!(Event, verdict);
            bytes[at] = verdict;
            bytes[at + 1] = state;
            if let Ok(decoded) = decode(&bytes) {
                let mut attributor = Attributor::new("node".into(), ConntrackSource::Skb);
                attributor.attribute(&decoded, "eth0", String::new());
            }
        }

        #[test]
        fn other_sizes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..800)) {
            prop_assume!(bytes.len() != size_of::<Event>());
            prop_assert_eq!(decode(&bytes).map(drop), Err(DecodeError::Size(bytes.len())));
        }
    }
}
