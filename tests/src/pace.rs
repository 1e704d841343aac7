//! How slow the machine is. The limits that tests give are for a machine that runs its own instructions; an emulated guest sets
//! `VXMON_SLOWNESS` to how many times longer things take there.

use std::{sync::OnceLock, time::Duration};

/// A request that is given this long is to be answered. One that is given less is to show that no answer comes before the
/// first retry of TCP, which an emulated kernel sends after one second too.
const A_RETRY: Duration = Duration::from_secs(1);

/// The most that something may take.
#[must_use]
pub fn limit(limit: Duration) -> Duration {
    limit * slowness()
}

/// How long to wait for an answer.
#[must_use]
pub fn answer(limit: Duration) -> Duration {
    if limit < A_RETRY { limit } else { limit * slowness() }
}

/// 1 on a machine that is not slow.
#[must_use]
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS
        .get_or_init(|| std::env::var("VXMON_SLOWNESS").ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1))
}
