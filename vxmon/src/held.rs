//! Lines that wait for a moment: an anomaly of which rules that are just being read may tell more, and whatever comes behind
//! it, so that the order stays. Bounded in number and in time. Events are taken and counted meanwhile as ever.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{sync::Notify, time::Instant};

use crate::{
    attribute::Pending,
    clock::monotonic,
    event::{Anomaly, Record},
};

/// How long after its packet an anomaly waits at most; its line is to come within 100 ms.
const PATIENCE: Duration = Duration::from_millis(80);
/// Lines that wait at most; in a storm of anomalies nothing waits.
const MOST: usize = 256;

#[derive(Debug)]
struct Waiting {
    record: Record,
    /// For what, and how long; none: for those ahead of it.
    pending: Option<(Box<Pending>, Instant)>,
}

/// Lines that wait, oldest first.
#[derive(Debug, Default)]
pub struct Held {
    queue: VecDeque<Waiting>,
    anomalies: u64,
    news: Option<Arc<Notify>>,
}

impl Held {
    /// None yet; `news` tells that waiting may be over.
    pub fn new(news: Option<Arc<Notify>>) -> Self {
        Self { news, ..Self::default() }
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many anomalies wait.
    pub const fn anomalies(&self) -> u64 {
        self.anomalies
    }

    /// Adds a line, which waits if it is pending, or if others are ahead.
    pub fn push(&mut self, record: Record, pending: Option<Box<Pending>>) {
        let pending = pending.map(|pending| {
            let age = monotonic().map_or(0, |now| now.saturating_sub(pending.at()));
            let left = PATIENCE.saturating_sub(Duration::from_nanos(age));
            (pending, Instant::now() + left)
        });
        self.anomalies += u64::from(matches!(record, Record::Anomaly(_)));
        self.queue.push_back(Waiting { record, pending });
    }

    /// The next line whose time has come: it waits for nothing, `settle` could tell more of it, it has waited long enough, or
    /// too many wait. With `all` no line waits any longer.
    pub fn next(&mut self, all: bool, settle: impl FnOnce(&mut Anomaly, &Pending) -> bool) -> Option<Record> {
        let too_many = self.queue.len() > MOST;
        let Waiting { record, pending } = self.queue.front_mut()?;
        let is_due = match (record, pending) {
            (Record::Anomaly(anomaly), Some((pending, until))) => {
                settle(anomaly, pending) || all || too_many || *until <= Instant::now()
            }
            _ => true,
        };
        let record = self.queue.pop_front_if(|_| is_due)?.record;
        self.anomalies -= u64::from(matches!(record, Record::Anomaly(_)));
        Some(record)
    }

    /// Until there may be a line whose time has come; without end if none waits.
    pub async fn wait(&self) {
        let until = match self.queue.front() {
            None => return std::future::pending().await,
            Some(Waiting { pending: Some((_, until)), .. }) => *until,
            Some(Waiting { pending: None, .. }) => return,
        };
        match &self.news {
            Some(news) => drop(tokio::time::timeout_at(until, news.notified()).await),
            None => tokio::time::sleep_until(until).await,
        }
    }
}
