//! A story that has ended, as an event shows it.

use vxmon_common::{
    packet::Family,
    story::{Connection, DEVICE, NO_VNI},
};

use super::{
    headers,
    story::{Attempt, By, Ended},
};
use crate::event::{self, Inner, Record};

/// The event; `wall` turns a time of CLOCK_MONOTONIC (ns) into RFC 3339.
pub fn record(ended: &Ended, node: &str, dev: &str, wall: &dyn Fn(u64) -> String) -> Record {
    let since_first = |at: u64| at.saturating_sub(ended.first_bad) / 1_000_000;
    let attempt = |attempt: &Attempt| event::Attempt {
        after_ms: since_first(attempt.at),
        sport: (attempt.sport != 0).then_some(attempt.sport),
        bad: attempt.is_bad,
    };
    let ending = event::Ending {
        ts: wall(ended.at),
        node: node.to_owned(),
        dev: dev.to_owned(),
        ifindex: ended.ifindex,
        vni: (ended.connection.scope & (DEVICE | NO_VNI) == 0).then_some(ended.connection.scope),
        inner: inner(&ended.connection),
        outcome: ended.outcome.name(),
        after_ms: since_first(ended.at),
        bad_packets: ended.bad,
        bad_syns: ended.bad_syns,
        last_bad_ms: since_first(ended.last_bad),
        first_good_ms: ended.first_good.map(since_first),
        by: ended.by.map(By::name),
        expected_recovery: ended.expected.map(wall),
        attempts: ended.attempts.iter().map(attempt).collect(),
    };
    let ending = Box::new(ending);
    if ended.outcome.is_recovery() { Record::Recovered(ending) } else { Record::NotRecovered(ending) }
}

fn inner(connection: &Connection) -> Inner {
    let family = if connection.proto >> 8 == 6 { Family::V6 } else { Family::V4 };
    let protocol = connection.proto as u8;
    let port = |port: u16| headers::has_ports(protocol).then_some(u16::from_be(port));
    Inner {
        proto: headers::protocol(protocol),
        src: headers::address(family, &connection.src).to_string(),
        sport: port(connection.sport),
        dst: headers::address(family, &connection.dst).to_string(),
        dport: port(connection.dport),
        flags: None,
        seq: None,
    }
}
