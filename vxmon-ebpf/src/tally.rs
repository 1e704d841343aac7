//! This CPU's counters of one device.

use core::hint::black_box;

use vxmon_common::counters::Counters;

use crate::maps::COUNTERS;

/// Counters of one device on this CPU. Programs of one CPU do not interrupt each other at TC egress (softirqs are off),
/// so plain additions lose nothing.
pub struct Tally(*mut Counters);

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident)*) => {
        $($(#[$doc])*
        #[inline(always)]
        pub fn $name(&self) {
            // SAFETY: a value of the map, which lives as long as the program.
            unsafe { (*self.0).$name += 1 }
        })*
    };
}

impl Tally {
    /// The counters of the device in this slot.
    #[inline(always)]
    pub fn of(slot: u32) -> Option<Self> {
        COUNTERS.get_ptr_mut(slot).map(Self)
    }

    counters! {
        /// See [`Counters::other`].
        other
        /// See [`Counters::counted_above`].
        counted_above
        /// See [`Counters::sent`].
        sent
        /// See [`Counters::suppressed`].
        suppressed
        /// See [`Counters::lost_ring`].
        lost_ring
    }

    /// Counts a verdict, by its number.
    #[inline(always)]
    pub fn verdict(&self, verdict: u8) {
        // SAFETY: as above.
        unsafe { add_one(&mut (*self.0).verdicts, verdict.into()) }
    }

    /// Counts a packet that could not be judged, by the number of the reason.
    #[inline(always)]
    pub fn unverified(&self, reason: u8) {
        // SAFETY: as above.
        unsafe { add_one(&mut (*self.0).unverified, reason.into()) }
    }
}

/// Adds one to the counter with this index. That it is in bounds is to be checked even if the compiler knows it, for the
/// verifier does not.
#[inline(always)]
fn add_one<const N: usize>(counters: &mut [u64; N], index: usize) {
    if let Some(counter) = counters.get_mut(black_box(index)) {
        *counter += 1;
    }
}
