//! The engine without eBPF: a packet socket on each watched device, and the judge in this process. For kernels and
//! containers where TC programs cannot be used; it needs CAP_NET_RAW.
//!
//! ```text
//! filter  classic BPF: what the kernel passes on at all
//! ring    one socket, its ring, and the frames in it
//! ```
//!
//! A packet socket sees what leaves *after* `validate_xmit_skb()` (`dev_queue_xmit_nit()`, net/core/dev.c): what the
//! device cannot do is done already, segmentation included, and what it will do is still to be done, with the checksum's
//! state in the header in front of each frame. It does not see the packet's mark or conntrack entry, nor whether the packet
//! was forwarded. A thread of its own reads the sockets; the daemon takes events from a channel.
//!
//! A packet that passes a stack of devices (a bridge and its port) reaches the socket of each. Only the lowest watched
//! device counts it: everything that leaves passes there, once.

mod filter;
mod ring;

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
    time::{ClockId, clock_gettime},
};
use tokio::sync::mpsc::{self, error::TrySendError};
use vxmon_common::{counters::Counters, event::Event, judge::Verdict, packet::Bytes};

use self::{
    filter::Wanted,
    ring::{Capture, Frame},
};
use super::{
    engine::{Engine, EngineError},
    events::Events,
    userspace::{Judge, Sighting},
};
use crate::{
    devices::{Role, Watch},
    sandbox::{self, Capability},
};

/// What the daemon could not do with packet sockets.
#[derive(Debug, thiserror::Error)]
pub enum PacketSocketError {
    /// A socket could not be opened or set up.
    #[error("cannot open a packet socket on {device}: {source}{}", hint(source))]
    Open {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The reading thread could not be started.
    #[error("cannot start reading packet sockets: {0}")]
    Start(io::Error),
    /// The reading thread has ended.
    #[error("packet sockets are no longer read")]
    Ended,
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied { " (it needs CAP_NET_RAW)" } else { "" }
}

/// Events between the reading thread and the daemon: as many as the eBPF ring buffer holds.
const CHANNEL: usize = 1300;
/// The number by which the reading thread is told to end; no device has it.
const END: u64 = 0;
/// How long the last packets may still be on their way into a block that is handed over (twice the ring's time limit).
const SETTLE: Duration = Duration::from_millis(40);

/// One device.
struct Device {
    watch: Watch,
    capture: Capture,
    counters: Counters,
    /// What its filter lets through.
    open: bool,
}

/// What both threads use.
struct State {
    devices: BTreeMap<u32, Device>,
    judge: Judge,
    ports: Vec<u16>,
}

struct Shared {
    state: Mutex<State>,
    epoll: Epoll,
    end: EventFd,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine.
pub struct PacketSocket {
    shared: Arc<Shared>,
    events: Option<mpsc::Receiver<Box<Event>>>,
    sender: mpsc::Sender<Box<Event>>,
    reader: Option<JoinHandle<()>>,
    watched: BTreeMap<u32, Watch>,
    with_ring: bool,
}

impl PacketSocket {
    /// Starts the reading thread. Sums the payload of one packet in `sample`; without `with_ring` by plain reads.
    pub fn start(sample: u32, with_ring: bool) -> Result<Self, PacketSocketError> {
        let failed = |errno: nix::Error| PacketSocketError::Start(errno.into());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let end = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed)?;
        epoll.add(end.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, END)).map_err(failed)?;
        let state = State { devices: BTreeMap::new(), judge: Judge::new(sample), ports: Vec::new() };
        let shared = Arc::new(Shared { state: Mutex::new(state), epoll, end });
        let (sender, events) = mpsc::channel(CHANNEL);
        let reader = thread::Builder::new().name("packet-socket".into());
        let reader = reader.spawn({
            let (shared, sender) = (Arc::clone(&shared), sender.clone());
            move || {
                // It only reads sockets that the daemon opens.
                if let Err(error) = sandbox::enter(&[], None) {
                    log::warn!("packet-socket thread: {error}");
                }
                read(&shared, &sender);
            }
        });
        Ok(Self {
            shared,
            events: Some(events),
            sender,
            reader: Some(reader.map_err(PacketSocketError::Start)?),
            watched: BTreeMap::new(),
            with_ring,
        })
    }

    /// Has each socket see what it should, now that devices or ports changed.
    fn set_filters(&self, state: &mut State) -> Result<(), PacketSocketError> {
        let lower_ones: Vec<u32> = state.devices.values().flat_map(|device| device.watch.above.clone()).collect();
        let State { devices, ports, .. } = state;
        for device in devices.values_mut() {
            device.open = !lower_ones.contains(&device.watch.ifindex);
            let wanted = match (device.open, device.watch.role) {
                (false, _) => Wanted::Nothing,
                (true, Role::Vxlan) => Wanted::All,
                (true, Role::Uplink) => Wanted::Ports { ports, l2: device.watch.l2 },
            };
            let set = device.capture.set_filter(&filter::program(wanted));
            set.map_err(|source| PacketSocketError::Open { device: device.watch.name.clone(), source })?;
        }
        Ok(())
    }

    /// Stops watching a device whose socket is silent by now; its counters.
    fn close(&mut self, ifindex: u32) -> Result<Counters, PacketSocketError> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state();
        let State { devices, judge, .. } = &mut *state;
        let Some(mut device) = devices.remove(&ifindex) else {
            return Ok(Counters::default());
        };
        if let Err(error) = look(&mut device, judge, &self.sender) {
            log::debug!("{}: {error}", device.watch.name);
        }
        self.set_filters(&mut state)?;
        Ok(device.counters)
    }
}

impl Engine for PacketSocket {
    fn metadata(&self) -> &'static str {
        "packet-socket"
    }

    fn keeps(&self) -> Vec<Capability> {
        // For the socket of a further device, and for questions about conntrack entries.
        vec![Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN]
    }

    fn events(&mut self) -> Result<Events, EngineError> {
        Ok(Events::of_channel(self.events.take().ok_or(PacketSocketError::Ended)?))
    }

    fn set_ports(&mut self, ports: &BTreeMap<u16, bool>) -> Result<(), EngineError> {
        let mut state = self.shared.state();
        if !state.ports.iter().eq(ports.keys()) {
            state.ports = ports.keys().copied().collect();
            state.judge.set_ports(ports.keys().copied());
            self.set_filters(&mut state)?;
        }
        Ok(())
    }

    fn watched(&self) -> Vec<&Watch> {
        self.watched.values().collect()
    }

    fn attach(&mut self, watch: &Watch) -> Result<&'static str, EngineError> {
        let failed = |source| PacketSocketError::Open { device: watch.name.clone(), source };
        let capture = Capture::open(watch.ifindex, self.with_ring).map_err(failed)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(watch.ifindex));
        let mut state = self.shared.state();
        self.shared.epoll.add(capture.socket(), event).map_err(|errno| failed(errno.into()))?;
        let device = Device { watch: watch.clone(), capture, counters: Counters::default(), open: false };
        state.devices.insert(watch.ifindex, device);
        if let Err(error) = self.set_filters(&mut state) {
            state.devices.remove(&watch.ifindex);
            return Err(error.into());
        }
        self.watched.insert(watch.ifindex, watch.clone());
        Ok("packet-socket")
    }

    fn update(&mut self, watch: &Watch) -> Result<(), EngineError> {
        let mut state = self.shared.state();
        if let Some(device) = state.devices.get_mut(&watch.ifindex) {
            device.watch = watch.clone();
            self.watched.insert(watch.ifindex, watch.clone());
        }
        Ok(self.set_filters(&mut state)?)
    }

    fn detach(&mut self, ifindex: u32) -> Result<Counters, EngineError> {
        if self.watched.remove(&ifindex).is_none() {
            return Ok(Counters::default());
        }
        let silent = match self.shared.state().devices.get(&ifindex) {
            Some(device) => device.capture.set_filter(&filter::program(Wanted::Nothing)).is_err() || !device.open,
            None => true,
        };
        if !silent {
            thread::sleep(SETTLE);
        }
        Ok(self.close(ifindex)?)
    }

    fn counters(&self, ifindex: u32) -> Result<Counters, EngineError> {
        let mut state = self.shared.state();
        Ok(state.devices.get_mut(&ifindex).map_or_else(Counters::default, |device| {
            device.counters.lost_capture += device.capture.dropped();
            device.counters
        }))
    }

    fn unhooked(&self) -> Vec<Watch> {
        Vec::new() // nobody else can close a socket
    }
}

impl Drop for PacketSocket {
    fn drop(&mut self) {
        let told = self.shared.end.write(1);
        if let (Ok(_), Some(reader)) = (told, self.reader.take())
            && reader.join().is_err()
        {
            log::error!("the thread that reads packet sockets ended early");
        }
    }
}

/// The reading thread: until it is told to end.
fn read(shared: &Shared, sender: &mpsc::Sender<Box<Event>>) {
    let mut ready = [EpollEvent::empty(); 16];
    loop {
        let ready = match shared.epoll.wait(&mut ready, EpollTimeout::NONE) {
            Ok(count) => ready.iter().take(count).map(EpollEvent::data),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => {
                log::error!("cannot wait for packets: {}", errno.desc());
                return;
            }
        };
        for number in ready {
            if number == END {
                return;
            }
            let mut state = shared.state();
            let State { devices, judge, .. } = &mut *state;
            // One that is gone closes its socket, and so leaves the set.
            let device = u32::try_from(number).ok().and_then(|ifindex| devices.get_mut(&ifindex));
            if let Some(device) = device
                && let Err(error) = look(device, judge, sender)
            {
                log::debug!("{}: {error}", device.watch.name);
            }
        }
    }
}

/// Judges what is waiting on one device.
fn look(device: &mut Device, judge: &mut Judge, sender: &mpsc::Sender<Box<Event>>) -> io::Result<()> {
    let Device { watch, capture, counters, open: _ } = device;
    let clock = Clock::now();
    let result = capture.drain(&mut |frame: Frame<'_>| {
        let sighting = Sighting {
            bytes: Bytes::truncated(frame.bytes, frame.len),
            head: frame.bytes,
            bare: (!watch.l2).then_some(frame.ethertype),
            skb: frame.skb,
            time_ns: clock.monotonic(frame.realtime_ns),
            ifindex: watch.ifindex,
            role: watch.role,
        };
        if let Some(event) = judge.look(&sighting, counters) {
            // A good one follows up on bad ones, and is not counted.
            let is_anomaly = Verdict::try_from(event.verdict).is_ok_and(Verdict::is_anomaly);
            match sender.try_send(event) {
                _ if !is_anomaly => {}
                Ok(()) => counters.sent += 1,
                Err(TrySendError::Full(_) | TrySendError::Closed(_)) => counters.lost_ring += 1,
            }
        }
    });
    counters.lost_capture += capture.dropped();
    result
}

/// Two clocks at one moment, ns.
struct Clock {
    realtime: u64,
    monotonic: u64,
}

impl Clock {
    fn now() -> Self {
        let ns = |clock| clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos() as u64);
        Self { realtime: ns(ClockId::CLOCK_REALTIME), monotonic: ns(ClockId::CLOCK_MONOTONIC) }
    }

    /// A recent time of CLOCK_REALTIME (0: now) by CLOCK_MONOTONIC.
    fn monotonic(&self, realtime: u64) -> u64 {
        match realtime {
            0 => self.monotonic,
            realtime => self.monotonic.saturating_sub(self.realtime.saturating_sub(realtime)),
        }
    }
}
