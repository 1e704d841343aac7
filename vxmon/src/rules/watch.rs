//! A thread that reads the rules at the start, and again when they changed. Who handles events takes what was read last, and
//! never waits for it but at the start.
//!
//! nftables tells of changes. xtables does not: its tables are looked at when an anomaly comes, by name and size at once,
//! rule by rule at most once a second.

use std::{
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{legacy, snapshot::Snapshot};
use crate::{
    netlink::{Protocol, Socket, nftables, ruleset::News},
    sandbox::{self, Capability},
};

/// How long changes are gathered before the rules are read again: what belongs together arrives within it.
const SETTLE: Duration = Duration::from_millis(10);
/// The least time between two readings, and how many times as long as the last one took.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_FACTOR: u32 = 4;
/// The least time between two looks at all that the kernel does not tell of.
const LOOK: Duration = Duration::from_secs(1);
/// The least time between two looks at the sizes of xtables' tables.
const GLANCE: Duration = Duration::from_millis(20);

/// The rules, read in the background.
#[derive(Debug)]
pub struct Rules {
    shared: Arc<Shared>,
    wake: UnixStream,
    glanced: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    current: Mutex<Option<Arc<Snapshot>>>,
    read: Condvar,
    /// Something changed that was not read yet.
    stale: AtomicBool,
}

impl Shared {
    fn set(&self, snapshot: Snapshot) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(snapshot));
        self.read.notify_all();
    }

    fn get(&self) -> Option<Arc<Snapshot>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Rules {
    /// Starts the thread, in the network namespace of the calling one.
    ///
    /// # Errors
    /// What the system said to a thread or a pair of sockets.
    pub fn start() -> std::io::Result<Self> {
        let (wake, waken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waken.set_nonblocking(true)?;
        let shared = Arc::new(Shared::default());
        let other = Arc::clone(&shared);
        thread::Builder::new().name("vxmon-rules".to_owned()).spawn(move || {
            // Reading rules needs no more, whatever the rest of the daemon needs.
            if let Err(error) = sandbox::enter(&[Capability::CAP_NET_ADMIN], None) {
                log::warn!("the thread that reads the rules: {error}");
            }
            Reader::new(other, waken).run();
        })?;
        Ok(Self { shared, wake, glanced: None })
    }

    /// Waits until the rules were read for the first time, at most so long.
    pub fn wait(&self, limit: Duration) {
        let guard = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.shared.read.wait_timeout_while(guard, limit, |current| current.is_none());
    }

    /// The rules as they are now, for an anomaly of a new connection.
    ///
    /// # Errors
    /// In words, if they are being read.
    pub fn current(&mut self) -> Result<Arc<Snapshot>, &'static str> {
        let current = self.shared.get().ok_or("the rules are being read")?;
        if self.glanced.is_none_or(|glanced| glanced.elapsed() >= GLANCE) {
            self.glanced = Some(Instant::now());
            if !legacy::looks_the_same(&current.legacy) {
                self.shared.stale.store(true, Ordering::Relaxed);
            }
            // A full pipe has been heard already.
            let _ = (&self.wake).write(&[0]);
        }
        if self.shared.stale.load(Ordering::Relaxed) {
            return Err("the rules changed a moment ago and are being read again");
        }
        Ok(current)
    }
}

/// The thread.
struct Reader {
    shared: Arc<Shared>,
    waken: UnixStream,
    news: Option<News>,
    looked: Instant,
    pause: Duration,
}

impl Reader {
    fn new(shared: Arc<Shared>, waken: UnixStream) -> Self {
        // Before the first reading, so that no change falls between.
        let news = News::open().map_err(|error| log::warn!("rules: changes of nftables are not told: {error}")).ok();
        Self { shared, waken, news, looked: Instant::now(), pause: PAUSE }
    }

    /// Until the other end is dropped.
    fn run(mut self) {
        loop {
            self.read();
            while !self.shared.stale.load(Ordering::Relaxed) {
                if !self.wait() {
                    return;
                }
            }
            thread::sleep(SETTLE.max(self.pause));
        }
    }

    fn read(&mut self) {
        let begin = Instant::now();
        // What changes from here on counts as not read.
        if let Some(news) = &mut self.news {
            news.take();
        }
        self.shared.stale.store(false, Ordering::Relaxed);
        let snapshot = Snapshot::read();
        log::debug!(
            "rules: {} tables read in {:.1} ms",
            snapshot.ruleset.tables.len(),
            begin.elapsed().as_secs_f64() * 1e3
        );
        self.shared.set(snapshot);
        legacy::release_memory();
        self.looked = Instant::now();
        self.pause = PAUSE.max(begin.elapsed() * PAUSE_FACTOR);
    }

    /// Waits for news; false at the end.
    fn wait(&mut self) -> bool {
        let (told, woken) = {
            let mut waits = vec![PollFd::new(self.waken.as_fd(), PollFlags::POLLIN)];
            waits.extend(self.news.as_ref().map(|news| PollFd::new(news.as_fd(), PollFlags::POLLIN)));
            if poll(&mut waits, PollTimeout::NONE).is_err() {
                return true;
            }
            let ready = |index: usize| waits.get(index).and_then(PollFd::any).unwrap_or(false);
            (ready(1), ready(0))
        };
        if told && self.news.as_mut().is_some_and(News::take) {
            self.shared.stale.store(true, Ordering::Relaxed);
        }
        if woken {
            let mut bytes = [0; 64];
            if matches!(self.waken.read(&mut bytes), Ok(0)) {
                return false;
            }
            if self.looked.elapsed() >= LOOK {
                self.look();
            }
        }
        true
    }

    /// Looks at what the kernel does not tell of: xtables rule by rule, and the generation where news cannot be had.
    fn look(&mut self) {
        self.looked = Instant::now();
        let Some(current) = self.shared.get() else { return };
        let untold = self.news.is_none() && generation() != current.generation;
        // Sets of ipset and addresses change without a word.
        let depends = !current.world.sets.0.is_empty();
        if untold || depends || !legacy::is_the_same(&current.legacy) {
            self.shared.stale.store(true, Ordering::Relaxed);
        }
    }
}

fn generation() -> Option<u32> {
    let mut socket = Socket::open(Protocol::Netfilter).ok()?;
    nftables::generation(&mut socket).ok().flatten()
}
