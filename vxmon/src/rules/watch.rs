//! Threads that read the rules at the start, and again when they changed. Who handles events takes what was read last, and
//! never waits for it.
//!
//! nftables tells of changes. xtables does not: its tables are looked at when an anomaly comes, by name and size at once,
//! rule by rule at most once a second.
//!
//! While rules change without pause, what was read last is never what is there now. Then a packet that left meanwhile can be
//! put between two readings: one that had ended when it left, and one that began after that. The second is a glimpse, made
//! when it is asked for: only the chains that POSTROUTING leads to, which takes a fraction of the time, on a thread of its own.

use std::{
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::Notify;

use super::{legacy, snapshot::Snapshot};
use crate::{
    clock::monotonic,
    netlink::{Protocol, Socket, nftables, ruleset::News},
    sandbox::{self, Capability},
};

/// How long changes are gathered before the rules are read again: what belongs together arrives within it.
const SETTLE: Duration = Duration::from_millis(10);
/// The least time between two readings, and how many times as long as the last one took.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_FACTOR: u32 = 4;
/// The same after changes that concern no packet that leaves: they may be of rules that set marks.
const REST: Duration = Duration::from_secs(1);
const REST_FACTOR: u32 = 100;
/// The same for glimpses, for which somebody waits.
const GLIMPSE_PAUSE_FACTOR: u32 = 2;
/// The least time between two looks at all that the kernel does not tell of.
const LOOK: Duration = Duration::from_secs(1);
/// The least time between two looks at the sizes of xtables' tables.
const GLANCE: Duration = Duration::from_millis(20);

/// The rules as they were at some moment between two times of CLOCK_MONOTONIC (ns).
#[derive(Debug)]
pub struct Reading {
    /// The rules.
    pub snapshot: Snapshot,
    begun: u64,
    ended: u64,
}

impl Reading {
    fn take(read: impl FnOnce() -> Snapshot) -> Self {
        let begun = monotonic().unwrap_or(u64::MAX);
        let snapshot = read();
        let ended = monotonic().unwrap_or(u64::MAX);
        legacy::release_memory();
        Self { snapshot, begun, ended }
    }

    /// Whether it had begun by then.
    #[must_use]
    pub const fn had_begun(&self, at: u64) -> bool {
        self.begun <= at
    }

    /// Whether it had ended by then.
    #[must_use]
    pub const fn had_ended(&self, at: u64) -> bool {
        self.ended <= at
    }
}

/// What is known of the rules as they are now.
#[derive(Clone, Debug)]
pub enum Now {
    /// As they were read: nothing that concerns packets which leave has changed since that began.
    Still(Arc<Reading>),
    /// They have changed since the last reading, if there was one, or may have.
    Changed(Option<Arc<Reading>>),
}

/// The rules, read in the background.
#[derive(Debug)]
pub struct Rules {
    shared: Arc<Shared>,
    wake: UnixStream,
    /// Where nftables' changes are told, to see whether there are some that nobody has looked at.
    told: Option<OwnedFd>,
    glanced: Option<Instant>,
}

#[derive(Debug)]
struct Shared {
    last: Mutex<Option<Arc<Reading>>>,
    /// What changed and was not read yet: bits of [`stale`].
    stale: AtomicU8,
    glimpses: Mutex<Glimpses>,
    asked: Condvar,
    /// Told of each reading and glimpse.
    news: Arc<Notify>,
}

/// What may have changed since the last reading.
mod stale {
    /// nftables: it was told, or it may have been.
    pub(super) const TOLD: u8 = 1;
    /// What the kernel does not tell of.
    pub(super) const SEEN: u8 = 2;
}

#[derive(Debug, Default)]
struct Glimpses {
    last: Option<Arc<Reading>>,
    wanted: bool,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rules {
    /// Starts the threads, in the network namespace of the calling one; they read nothing before [`Rules::begin`].
    ///
    /// # Errors
    /// What the system said to a thread or a pair of sockets.
    pub fn start() -> std::io::Result<Self> {
        legacy::keep_no_large_blocks();
        let (wake, waken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waken.set_nonblocking(true)?;
        // Before the first reading, so that no change falls between.
        let news = News::open().map_err(|error| log::warn!("rules: changes of nftables are not told: {error}")).ok();
        let told = news.as_ref().map(|news| news.as_fd().try_clone_to_owned()).transpose()?;
        let shared = Arc::new(Shared {
            last: Mutex::default(),
            stale: AtomicU8::new(stale::TOLD | stale::SEEN),
            glimpses: Mutex::default(),
            asked: Condvar::new(),
            news: Arc::default(),
        });
        let other = Arc::clone(&shared);
        reading_thread("vxmon-rules", move || Reader::new(other, waken, news).run())?;
        let other = Arc::clone(&shared);
        reading_thread("vxmon-glimpse", move || other.glimpse())?;
        Ok(Self { shared, wake, told, glanced: None })
    }

    /// Begins to read.
    pub fn begin(&self) {
        self.wake();
    }

    fn wake(&self) {
        // A full pipe has been heard already.
        let _ = (&self.wake).write(&[0]);
    }

    /// The rules as they are now, for an anomaly of a new connection.
    pub fn now(&mut self) -> Now {
        if self.glanced.is_none_or(|glanced| glanced.elapsed() >= GLANCE) {
            self.glanced = Some(Instant::now());
            let last = lock(&self.shared.last).clone();
            if last.is_some_and(|last| !legacy::looks_the_same(&last.snapshot.legacy)) {
                self.shared.stale.fetch_or(stale::SEEN, Ordering::Release);
            }
            self.wake();
        }
        // In this order: who takes the news says so before, and what is read is there before it is said to be.
        let is_changed = self.has_news() || self.shared.is_stale();
        match lock(&self.shared.last).clone() {
            Some(last) if !is_changed => Now::Still(last),
            last => Now::Changed(last),
        }
    }

    /// Whether there are news that nobody has looked at.
    fn has_news(&self) -> bool {
        self.told.as_ref().is_some_and(|told| {
            let mut wait = [PollFd::new(told.as_fd(), PollFlags::POLLIN)];
            poll(&mut wait, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        })
    }

    /// Asks for a glimpse that begins after this.
    pub fn ask(&self) {
        lock(&self.shared.glimpses).wanted = true;
        self.shared.asked.notify_one();
    }

    /// A glimpse, or a reading, that had not begun by then (CLOCK_MONOTONIC, ns).
    #[must_use]
    pub fn since(&self, at: u64) -> Option<Arc<Reading>> {
        let glimpse = lock(&self.shared.glimpses).last.clone();
        glimpse.into_iter().chain(lock(&self.shared.last).clone()).find(|reading| !reading.had_begun(at))
    }

    /// Is told when there is another reading or glimpse.
    #[must_use]
    pub fn news(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.news)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        lock(&self.shared.glimpses).ended = true;
        self.shared.asked.notify_one();
    }
}

/// Starts a thread that can do no more than read rules, whatever the rest of the daemon needs.
fn reading_thread(name: &'static str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let limited = move || {
        if let Err(error) = sandbox::enter(&[Capability::CAP_NET_ADMIN], None) {
            log::warn!("the thread {name}: {error}");
        }
        run();
    };
    thread::Builder::new().name(name.to_owned()).spawn(limited).map(drop)
}

impl Shared {
    fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Acquire) != 0
    }

    /// Takes glimpses when asked, until the other end is dropped.
    fn glimpse(&self) {
        loop {
            let mut glimpses = lock(&self.glimpses);
            while !glimpses.wanted && !glimpses.ended {
                glimpses = self.asked.wait(glimpses).unwrap_or_else(PoisonError::into_inner);
            }
            if glimpses.ended {
                return;
            }
            glimpses.wanted = false;
            drop(glimpses);
            let begin = Instant::now();
            let last = lock(&self.last).clone();
            let reading = Reading::take(|| Snapshot::glimpse(last.as_ref().map(|last| &last.snapshot)));
            log::debug!("rules: a glimpse, in {:.1} ms", begin.elapsed().as_secs_f64() * 1e3);
            let pause = begin.elapsed() * GLIMPSE_PAUSE_FACTOR;
            lock(&self.glimpses).last = Some(Arc::new(reading));
            self.news.notify_one();
            thread::sleep(pause);
        }
    }
}

/// The thread that reads everything.
struct Reader {
    shared: Arc<Shared>,
    waken: UnixStream,
    news: Option<News>,
    looked: Instant,
    /// How long the last reading took.
    took: Duration,
    /// When to read again though nothing changed that concerns packets which leave.
    again: Option<Instant>,
}

/// What the thread has waited for.
enum Waited {
    /// There is something to read.
    Changed,
    /// Nothing yet.
    Quiet,
    /// The other end was dropped.
    Ended,
}

impl Reader {
    fn new(shared: Arc<Shared>, waken: UnixStream, news: Option<News>) -> Self {
        Self { shared, waken, news, looked: Instant::now(), took: Duration::ZERO, again: None }
    }

    /// Until the other end is dropped.
    fn run(mut self) {
        // The start of the daemon is over when the other end says so.
        let _ = poll(&mut [PollFd::new(self.waken.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
        loop {
            self.read();
            loop {
                match self.wait() {
                    Waited::Changed => break,
                    Waited::Quiet => {}
                    Waited::Ended => return,
                }
            }
            thread::sleep(SETTLE.max(PAUSE).max(self.took * PAUSE_FACTOR));
        }
    }

    fn read(&mut self) {
        let begin = Instant::now();
        // Until it is over nobody looks at the news.
        self.shared.stale.store(stale::TOLD | stale::SEEN, Ordering::Release);
        if let Some(news) = &mut self.news {
            news.take(drop);
        }
        self.again = None;
        let reading = Arc::new(Reading::take(Snapshot::read));
        log::debug!(
            "rules: {} tables read in {:.1} ms",
            reading.snapshot.ruleset.tables.len(),
            begin.elapsed().as_secs_f64() * 1e3
        );
        self.took = begin.elapsed();
        let is_concerned = self.take_news(&reading.snapshot);
        *lock(&self.shared.last) = Some(reading);
        self.shared.stale.store(if is_concerned { stale::TOLD } else { 0 }, Ordering::Release);
        self.shared.news.notify_one();
        self.looked = Instant::now();
    }

    /// Takes all news; whether something changed that concerns packets which leave.
    fn take_news(&mut self, snapshot: &Snapshot) -> bool {
        let (mut any, mut concerned) = (false, false);
        if let Some(news) = &mut self.news {
            news.take(|change| {
                any = true;
                concerned |= snapshot.is_concerned(&change);
            });
        }
        if any && self.again.is_none() {
            self.again = Some(Instant::now() + REST.max(self.took * REST_FACTOR));
        }
        concerned
    }

    /// Waits for news.
    fn wait(&mut self) -> Waited {
        if self.shared.is_stale() {
            return Waited::Changed;
        }
        let left = self.again.map(|again| again.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Waited::Changed;
        }
        // A millisecond more, so as not to wake too early.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX)
        });
        let (told, woken) = {
            let mut waits = vec![PollFd::new(self.waken.as_fd(), PollFlags::POLLIN)];
            waits.extend(self.news.as_ref().map(|news| PollFd::new(news.as_fd(), PollFlags::POLLIN)));
            if poll(&mut waits, timeout).is_err() {
                return Waited::Quiet;
            }
            let ready = |index: usize| waits.get(index).and_then(PollFd::any).unwrap_or(false);
            (ready(1), ready(0))
        };
        if told {
            // Before they are taken, see `Rules::now`.
            self.shared.stale.fetch_or(stale::TOLD, Ordering::Release);
            let last = lock(&self.shared.last).clone();
            if last.is_some_and(|last| !self.take_news(&last.snapshot)) {
                self.shared.stale.fetch_and(!stale::TOLD, Ordering::Release);
                self.shared.news.notify_one();
            }
        }
        if woken {
            let mut bytes = [0; 64];
            if matches!(self.waken.read(&mut bytes), Ok(0)) {
                return Waited::Ended;
            }
            if self.looked.elapsed() >= LOOK {
                self.look();
            }
        }
        Waited::Quiet
    }

    /// Looks at what the kernel does not tell of: xtables rule by rule, and the generation where news cannot be had.
    fn look(&mut self) {
        self.looked = Instant::now();
        let Some(last) = lock(&self.shared.last).clone() else { return };
        let last = &last.snapshot;
        let untold = self.news.is_none() && generation() != last.generation;
        // Sets of ipset and addresses change without a word.
        let depends = !last.world.sets.0.is_empty();
        if untold || depends || !legacy::is_the_same(&last.legacy) {
            self.shared.stale.fetch_or(stale::SEEN, Ordering::Release);
        }
        legacy::release_memory();
    }
}

fn generation() -> Option<u32> {
    let mut socket = Socket::open(Protocol::Netfilter).ok()?;
    nftables::generation(&mut socket).ok().flatten()
}
