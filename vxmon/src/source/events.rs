//! Events on their way from an engine to the daemon, whatever carries them. The carrier is the only queue before the output's.

use std::io;

use aya::maps::{MapData, PerfEventArray, RingBuf};
use tokio::{io::unix::AsyncFd, sync::mpsc};
use vxmon_common::event::Event;
use zerocopy::IntoBytes as _;

use super::perf::Perf;
use crate::attribute::{DecodeError, Decoded, decode};

/// What carries the events.
enum Carrier {
    /// The eBPF ring buffer.
    Ring(AsyncFd<RingBuf<MapData>>),
    /// A perf buffer for each CPU.
    Perf(Perf),
    /// A channel within this process, and what was taken from it by waiting.
    Channel(mpsc::Receiver<Box<Event>>, Option<Box<Event>>),
}

/// A stream of events.
pub struct Events {
    carrier: Carrier,
    /// Whether some may be waiting.
    ready: bool,
}

impl Events {
    /// From a ring buffer.
    pub fn of_ring(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring buffer owns its descriptor, which stays open and the same as long as it exists.
        let carrier = Carrier::Ring(unsafe { AsyncFd::register(ring)? });
        Ok(Self { carrier, ready: true })
    }

    /// From a perf event array.
    pub fn of_perf(array: PerfEventArray<MapData>) -> io::Result<Self> {
        Ok(Self { carrier: Carrier::Perf(Perf::open(array)?), ready: true })
    }

    /// From a thread of this process.
    pub fn of_channel(receiver: mpsc::Receiver<Box<Event>>) -> Self {
        Self { carrier: Carrier::Channel(receiver, None), ready: true }
    }

    /// Waits until there may be events. Then take them with [`Events::take`] until none is left, or call again: it
    /// returns at once as long as some may be waiting. Cancelled, it loses nothing.
    pub async fn wait(&mut self) -> io::Result<()> {
        if !self.ready {
            match &mut self.carrier {
                // Cleared before the events are taken: one that comes meanwhile makes it ready again.
                Carrier::Ring(ring) => ring.readable_mut().await?.clear_ready(),
                Carrier::Perf(perf) => perf.readable().await?,
                Carrier::Channel(receiver, taken) => match receiver.recv().await {
                    Some(event) => *taken = Some(event),
                    None => return Err(io::ErrorKind::BrokenPipe.into()),
                },
            }
            self.ready = true;
        }
        Ok(())
    }

    /// The next event, if one is waiting.
    pub fn take(&mut self) -> Option<Result<Decoded, DecodeError>> {
        let next = match &mut self.carrier {
            Carrier::Ring(ring) => ring.get_mut().next().map(|item| decode(&item)),
            Carrier::Perf(perf) => perf.take().map(|event| decode(event.as_bytes())),
            Carrier::Channel(receiver, taken) => {
                taken.take().or_else(|| receiver.try_recv().ok()).map(|event| decode(event.as_bytes()))
            }
        };
        self.ready = next.is_some();
        next
    }

    /// Events that were lost on the way, as far as the carrier says so by itself.
    pub fn lost(&self) -> u64 {
        match &self.carrier {
            Carrier::Perf(perf) => perf.lost(),
            Carrier::Ring(_) | Carrier::Channel(..) => 0,
        }
    }
}
