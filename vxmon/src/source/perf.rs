//! Events from a perf event array: a buffer for each CPU, read as one stream in the order of time.
//!
//! A buffer that is full takes no more. From 5.1 on the kernel program is told so and counts it (56201969114e); before, only a
//! record in the buffer tells how many were lost.

use std::{
    future::poll_fn,
    io,
    ops::ControlFlow,
    task::{Context, Poll},
};

use aya::{
    maps::{
        MapData, PerfEventArray,
        perf::{PerfBufferError, PerfEvent, PerfEventArrayBuffer},
    },
    util::online_cpus,
};
use tokio::io::unix::AsyncFd;
use vxmon_common::{config::RING, event::Event};
use zerocopy::FromBytes as _;

/// Pages of a CPU's buffer (4 KiB on most machines), at least: some forty events.
const LEAST_PAGES: usize = 4;
/// And at most. Less than the 516 KiB for each CPU that may be locked without CAP_IPC_LOCK (perf_mmap(), kernel/events/core.c).
const MOST_PAGES: usize = 64;
/// All of them together, if the limits allow: as large as the ring buffer.
const ALL_PAGES: usize = RING as usize >> 12;

/// One CPU's buffer.
struct Cpu {
    buffer: AsyncFd<PerfEventArrayBuffer<MapData>>,
    /// Its oldest event, taken out.
    next: Option<Box<Event>>,
}

/// The buffers of all CPUs. Those of CPUs that come later are missing: the kernel program then counts its events as lost.
pub struct Perf {
    cpus: Vec<Cpu>,
    lost: u64,
}

impl Perf {
    /// Opens the buffers.
    pub fn open(mut array: PerfEventArray<MapData>) -> io::Result<Self> {
        let numbers =
            online_cpus().map_err(|(what, error)| io::Error::new(error.kind(), format!("{what}: {error}")))?;
        let pages = (ALL_PAGES / numbers.len().max(1)).next_power_of_two().clamp(LEAST_PAGES, MOST_PAGES);
        let mut cpus = Vec::with_capacity(numbers.len());
        for cpu in numbers {
            let buffer = array.open(cpu, Some(pages)).map_err(|error| opening(cpu, error))?;
            // SAFETY: the buffer owns its descriptor, which stays open and the same as long as it exists.
            cpus.push(Cpu { buffer: unsafe { AsyncFd::register(buffer)? }, next: None });
        }
        Ok(Self { cpus, lost: 0 })
    }

    /// Waits until there may be events. Cancelled, it loses nothing.
    pub async fn readable(&mut self) -> io::Result<()> {
        poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ready = false;
        for cpu in &self.cpus {
            // Cleared before the events are taken: one that comes meanwhile makes it ready again.
            if let Poll::Ready(guard) = cpu.buffer.poll_read_ready(context) {
                guard?.clear_ready();
                ready = true;
            }
        }
        if ready { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// The oldest event that is waiting. A story depends on the order, and its packets leave by any CPU.
    pub fn take(&mut self) -> Option<Box<Event>> {
        for Cpu { buffer, next } in &mut self.cpus {
            if next.is_none() {
                *next = read(buffer.get_mut(), &mut self.lost);
            }
        }
        let waiting = self.cpus.iter_mut().filter(|cpu| cpu.next.is_some());
        waiting.min_by_key(|cpu| cpu.next.as_ref().map_or(u64::MAX, |event| event.time_ns))?.next.take()
    }

    /// Events lost so far, as told by records in the buffers.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// The next event of one CPU.
fn read(buffer: &mut PerfEventArrayBuffer<MapData>, lost: &mut u64) -> Option<Box<Event>> {
    let flow = buffer.try_fold((), |(), record| match record {
        PerfEvent::Lost { count } => {
            *lost += count;
            ControlFlow::Continue(())
        }
        PerfEvent::Sample { head, tail } => match join(head, tail) {
            Some(event) => ControlFlow::Break(event),
            None => {
                log::error!("from the kernel program: a record of {} bytes", head.len() + tail.len());
                ControlFlow::Continue(())
            }
        },
    });
    flow.break_value()
}

/// An event in two parts, with padding behind it.
fn join(head: &[u8], tail: &[u8]) -> Option<Box<Event>> {
    let mut bytes = [0; size_of::<Event>()];
    let (first, second) = bytes.split_at_mut(head.len().min(size_of::<Event>()));
    first.copy_from_slice(head.get(..first.len())?);
    second.copy_from_slice(tail.get(..second.len())?);
    Event::read_from_bytes(&bytes).ok().map(Box::new)
}

fn opening(cpu: u32, error: PerfBufferError) -> io::Error {
    let what = match &error {
        PerfBufferError::OpenError { io_error } | PerfBufferError::MMapError { io_error } => io_error.kind(),
        _ => io::ErrorKind::Other,
    };
    io::Error::new(what, format!("perf events of CPU {cpu}: {error}"))
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes as _;

    use super::*;

    /// A record may lie across the end of the buffer at any byte, and is padded.
    #[test]
    fn an_event_in_two_parts_is_one() {
        let whole: Vec<u8> = (0..size_of::<Event>() + 4).map(|n| n as u8).collect();
        for cut in 0..=whole.len() {
            let (head, tail) = whole.split_at(cut);
            let event = join(head, tail);
            assert_eq!(event.as_ref().map(|event| event.as_bytes()), whole.get(..size_of::<Event>()), "cut at {cut}");
        }
        let short = &whole[..size_of::<Event>() - 1];
        assert!(join(short, &[]).is_none() && join(&[], short).is_none() && join(&short[..8], &short[8..]).is_none());
    }
}
