//! The most recent lines, for readers that come and go. One ring of bounded length holds them; each reader has a place in
//! it of its own. Publishing never waits for anybody: a reader that is slower than the ring is long loses the oldest
//! lines, and learns how many. Nothing here knows of sockets.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{Format, render};
use crate::event::Line;

/// Lines that are kept.
pub const KEPT: usize = 1024;
/// Lines that a reader takes at a time.
const BATCH: usize = 64;

/// A line, and what it looks like in each format that somebody asked for.
#[derive(Debug)]
pub struct Entry {
    /// The line.
    pub line: Arc<Line>,
    text: OnceLock<Bytes>,
    json: OnceLock<Bytes>,
}

impl Entry {
    /// The line with its end, rendered once for all readers.
    pub fn rendered(&self, format: Format) -> &Bytes {
        let cell = match format {
            Format::Text => &self.text,
            Format::Json => &self.json,
        };
        cell.get_or_init(|| Bytes::from(render(format, &self.line) + "\n"))
    }
}

#[derive(Debug)]
struct Ring {
    lines: VecDeque<Arc<Entry>>,
    /// Number of the first line in the ring; lines are numbered from 0 as they are published.
    first: u64,
}

impl Ring {
    fn end(&self) -> u64 {
        self.first + self.lines.len() as u64
    }
}

/// The recent lines and who waits for more.
#[derive(Debug)]
pub struct Feed {
    ring: Mutex<Ring>,
    /// How many lines were published; none: the last one was.
    published: watch::Sender<Option<u64>>,
}

impl Default for Feed {
    fn default() -> Self {
        let ring = Ring { lines: VecDeque::with_capacity(KEPT), first: 0 };
        Self { ring: Mutex::new(ring), published: watch::Sender::new(Some(0)) }
    }
}

impl Feed {
    /// Adds a line; the oldest one makes room for it.
    pub fn publish(&self, line: Arc<Line>) {
        let mut ring = self.lock();
        if ring.lines.len() == KEPT {
            ring.lines.pop_front();
            ring.first += 1;
        }
        ring.lines.push_back(Arc::new(Entry { line, text: OnceLock::new(), json: OnceLock::new() }));
        let end = ring.end();
        drop(ring);
        self.published.send_replace(Some(end));
    }

    /// No line will follow: readers end when they have read what there is.
    pub fn close(&self) {
        self.published.send_replace(None);
    }

    /// A reader that begins with at most so many of the lines that there are.
    pub fn reader(self: &Arc<Self>, backlog: usize) -> Reader {
        let ring = self.lock();
        let backlog = backlog.min(ring.lines.len()) as u64;
        Reader { next: ring.end() - backlog, published: self.published.subscribe(), feed: Arc::clone(self) }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a reader gets next.
#[derive(Debug)]
pub enum Next {
    /// Some lines.
    Lines(Vec<Arc<Entry>>),
    /// So many lines have left the ring before this reader came to them.
    Missed(u64),
    /// There is nothing new for now.
    Nothing,
    /// There will be nothing more.
    End,
}

/// A reader's place in the feed.
#[derive(Debug)]
pub struct Reader {
    feed: Arc<Feed>,
    published: watch::Receiver<Option<u64>>,
    /// Number of the line to read next.
    next: u64,
}

impl Reader {
    /// What is next, without waiting.
    pub fn take(&mut self) -> Next {
        // Looked at first: what is published before the feed is closed is in the ring by then.
        let open = self.published.borrow_and_update().is_some();
        let ring = self.feed.lock();
        if self.next < ring.first {
            let missed = ring.first - self.next;
            self.next = ring.first;
            return Next::Missed(missed);
        }
        let from = usize::try_from(self.next - ring.first).unwrap_or(usize::MAX);
        let lines: Vec<Arc<Entry>> = ring.lines.iter().skip(from).take(BATCH).cloned().collect();
        self.next += lines.len() as u64;
        match (lines.is_empty(), open) {
            (false, _) => Next::Lines(lines),
            (true, true) => Next::Nothing,
            (true, false) => Next::End,
        }
    }

    /// Waits until [`Reader::take`] has something new.
    pub async fn changed(&mut self) {
        if self.published.changed().await.is_err() {
            // Unreachable while this reader holds the feed; never return at once for ever.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Lost, Record};

    fn line(ring: u64) -> Arc<Line> {
        Arc::new(Line::from(Record::Lost(Lost { ts: String::new(), node: String::new(), ring, queue: 0, capture: 0 })))
    }

    fn numbers(reader: &mut Reader) -> (Vec<u64>, u64, bool) {
        let (mut all, mut missed) = (Vec::new(), 0);
        loop {
            match reader.take() {
                Next::Lines(lines) => all.extend(lines.iter().map(|entry| match &entry.line.record {
                    Record::Lost(lost) => lost.ring,
                    other => panic!("{other:?}"),
                })),
                Next::Missed(n) => missed += n,
                Next::Nothing => return (all, missed, false),
                Next::End => return (all, missed, true),
            }
        }
    }

    #[test]
    fn backlog_then_live_lines_then_the_end() {
        let feed = Arc::new(Feed::default());
        (0..5).for_each(|n| feed.publish(line(n)));
        let (mut all, mut two, mut none) = (feed.reader(usize::MAX), feed.reader(2), feed.reader(0));
        assert_eq!(numbers(&mut all), (vec![0, 1, 2, 3, 4], 0, false));
        feed.publish(line(5));
        feed.close();
        assert_eq!(numbers(&mut all), (vec![5], 0, true));
        assert_eq!(numbers(&mut two), (vec![3, 4, 5], 0, true));
        assert_eq!(numbers(&mut none), (vec![5], 0, true));
    }

    #[test]
    fn a_slow_reader_learns_what_it_missed_and_nothing_grows() {
        let feed = Arc::new(Feed::default());
        let mut reader = feed.reader(usize::MAX);
        let count = KEPT as u64 * 3 + 7;
        (0..count).for_each(|n| feed.publish(line(n)));
        let (lines, missed, end) = numbers(&mut reader);
        assert_eq!((lines.len(), missed, end), (KEPT, count - KEPT as u64, false));
        assert_eq!(lines.last(), Some(&(count - 1)));
        assert!(feed.lock().lines.len() <= KEPT);
    }

    #[test]
    fn a_line_is_rendered_once_for_all() {
        let feed = Arc::new(Feed::default());
        feed.publish(line(1));
        let (Next::Lines(one), Next::Lines(two)) = (feed.reader(1).take(), feed.reader(1).take()) else {
            panic!("no lines");
        };
        let (one, two) = (one[0].rendered(Format::Json), two[0].rendered(Format::Json));
        assert_eq!(one.as_ptr(), two.as_ptr());
        assert!(one.ends_with(b"}\n"));
    }
}
