//! What the kernel program counts: for each device and CPU, every packet it saw, once, by what came of it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::judge::{Reason, Verdict};

/// Counts of one device on one CPU. Packets, unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Counters {
    /// Packets that carry no checksum to judge here.
    pub other: u64,
    /// Packets that a device stacked on this one has counted already.
    pub counted_above: u64,
    /// Judged packets, by [`Verdict`].
    pub verdicts: [u64; Verdict::ALL.len()],
    /// Packets that could not be judged, by [`Reason`].
    pub unverified: [u64; Reason::ALL.len()],
    /// Anomalies sent to the daemon.
    pub sent: u64,
    /// Anomalies counted but not sent, as repeats of a flow's anomaly within a second.
    pub suppressed: u64,
    /// Anomalies counted but not sent, the ring buffer being full.
    pub lost_ring: u64,
    /// Packets that could not be judged because they could not be had: the packet socket's ring was full. Not among those
    /// seen; always 0 with TC programs, which see each packet.
    pub lost_capture: u64,
}

impl Counters {
    /// Adds another CPU's or another time's counts.
    pub fn add(&mut self, other: &Self) {
        let Self { other: o, counted_above, verdicts, unverified, sent, suppressed, lost_ring, lost_capture } = other;
        self.other += o;
        self.counted_above += counted_above;
        for (sum, n) in self.verdicts.iter_mut().zip(verdicts) {
            *sum += n;
        }
        for (sum, n) in self.unverified.iter_mut().zip(unverified) {
            *sum += n;
        }
        self.sent += sent;
        self.suppressed += suppressed;
        self.lost_ring += lost_ring;
        self.lost_capture += lost_capture;
    }

    /// Packets seen: judged and unverified.
    pub fn seen(&self) -> u64 {
        self.verdicts.iter().sum::<u64>() + self.unverified.iter().sum::<u64>()
    }

    /// Anomalies among them.
    pub fn anomalies(&self) -> u64 {
        Verdict::ALL.iter().zip(self.verdicts).filter(|(verdict, _)| verdict.is_anomaly()).map(|(_, n)| n).sum()
    }
}
