//! From what the kernel program sent to an [`Anomaly`]: each section of it is filled here, or says why not. Never prints,
//! never attaches.
//!
//! ```text
//! headers    outer and inner packet, from the first bytes
//! conntrack  the outer connection: from the skb, by netlink where the skb does not tell
//! ```
//! The cause itself, the predicted value, is [`vxmon_common::conntrack::cause`]: the kernel program's own code.

mod conntrack;
mod headers;

use std::{collections::HashMap, collections::VecDeque};

use vxmon_common::{
    conntrack::{Cause, Nat, Rewrite, cause},
    event::{Event, event_flag, role},
    judge::{Finding, Skb, State, Verdict},
};
use zerocopy::FromBytes as _;

pub use self::conntrack::Source as ConntrackSource;
use self::headers::Headers;
use crate::{
    event::{self, Anomaly},
    netlink::conntrack::status,
};

/// Flows whose first anomaly is remembered; the oldest gives way.
const FLOWS: usize = 8192;

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
}

/// Fills in what the packet itself does not tell.
#[derive(Debug)]
pub struct Attributor {
    node: String,
    conntrack: conntrack::Lookup,
    firsts: HashMap<(u32, String, u16, String, u16), u64>,
    order: VecDeque<(u32, String, u16, String, u16)>,
}

impl Attributor {
    /// For this node.
    pub fn new(node: String, source: ConntrackSource) -> Self {
        Self { node, conntrack: conntrack::Lookup::new(source), firsts: HashMap::new(), order: VecDeque::new() }
    }

    /// Fills in an event seen on `device` at `ts`.
    pub fn attribute(&mut self, decoded: &Decoded, device: &str, ts: String) -> Attributed {
        let Decoded { event, verdict: counted, state } = *decoded;
        let mut missing = std::collections::BTreeMap::new();
        let Headers { outer, vni, inner } = headers::read(&event, &mut missing);

        let known = match &outer {
            Some(outer) => self.conntrack.find(&event, outer),
            None => Err("a VXLAN device's frames have no outer packet yet".to_owned()),
        };
        let (ct, tuples, nat) = match known {
            Ok(Some(found)) => (Some(found.ct), Some((found.orig, found.reply)), None),
            Ok(None) => {
                missing.insert("ct", "the packet has no conntrack entry".to_owned());
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
            skb: Skb::UNKNOWN,
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

        let rewritten_port = rewrite.is_some_and(|rewrite| rewrite.before.sport != rewrite.after.sport);
        let nat = ct.as_ref().map(|ct| {
            let source_nat = ct.status.contains(&"src-nat");
            event::Nat {
                random_fully: if source_nat && rewritten_port { "port-rewritten" } else { "no" },
                ..event::Nat::default()
            }
        });
        if nat.is_none() {
            missing.insert("nat", "not known without the conntrack entry".to_owned());
        }
        let flow = outer.as_ref().or(None).map(|outer| self.flow(&event, outer));
        if flow.is_none() {
            missing.insert("flow", "flows are told apart by their outer packets".to_owned());
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
            inner,
            mark: format!("{:#x}", event.mark),
            ct,
            nat,
            cause: (event.role == role::UPLINK).then(|| event::Cause { predicted: predicted.map(hex), proved }),
            flow,
            suppressed: event.suppressed,
            missing,
        };
        Attributed { anomaly, counted, verdict }
    }

    fn flow(&mut self, event: &Event, outer: &event::Endpoints) -> event::Flow {
        let key = (event.ifindex, outer.src.clone(), outer.sport, outer.dst.clone(), outer.dport);
        // A count that starts again is a new story: the kernel program has forgotten the flow.
        let first = match self.firsts.get_mut(&key) {
            Some(first) if event.count > 1 => *first,
            Some(first) => {
                *first = event.time_ns;
                event.time_ns
            }
            None => {
                if self.order.len() >= FLOWS
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.firsts.remove(&oldest);
                }
                self.order.push_back(key.clone());
                self.firsts.insert(key, event.time_ns);
                event.time_ns
            }
        };
        event::Flow { attempt: event.count, since_first_ms: event.time_ns.saturating_sub(first) / 1_000_000 }
    }
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
