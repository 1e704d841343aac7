//! Times as events write them: RFC 3339, UTC, microseconds.

use std::time::Duration;

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

use crate::event::rfc3339;

/// Now.
#[must_use]
pub fn now() -> String {
    rfc3339(Timestamp::now())
}

/// CLOCK_MONOTONIC, ns.
#[must_use]
pub fn monotonic() -> Option<u64> {
    clock_gettime(ClockId::CLOCK_MONOTONIC).ok().map(|now| Duration::from(now).as_nanos() as u64)
}

/// A time of CLOCK_MONOTONIC (ns), past or to come, as wall-clock time.
#[must_use]
pub fn wall_clock(at: u64) -> String {
    let (wall, now) = (Timestamp::now(), monotonic().unwrap_or(at));
    let apart = Duration::from_nanos(now.abs_diff(at));
    let time = if at <= now { wall.checked_sub(apart) } else { wall.checked_add(apart) };
    rfc3339(time.unwrap_or(wall))
}
