//! What others can look at while `attach` runs: the socket and the metrics. Both are served by one thread of its own, so
//! that nobody who looks ever holds up the monitor: it publishes a line or a set of readings and goes on.

use std::{
    io,
    net::TcpListener,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    feed::Feed,
    http,
    metrics::Board,
    socket::{self, Counts, Readers, Shared, Socket},
};
use crate::{event::Line, sandbox};

/// How long readers of the socket have, at the end, to take what is left.
const PATIENCE: Duration = Duration::from_millis(500);

/// The listening ends. Opened before anything else is done, so that what cannot be had is said at once.
#[derive(Debug, Default)]
pub struct Listeners {
    /// Of the live log.
    pub socket: Option<Socket>,
    /// Of the metrics.
    pub metrics: Option<TcpListener>,
}

/// The publishing end.
#[derive(Debug, Default)]
pub struct Live {
    feed: Option<Arc<Feed>>,
    readers: Arc<Readers>,
    board: Option<Arc<Board>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Live {
    /// Begins to serve; without listeners it does nothing.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(listeners: Listeners, node: &str) -> io::Result<Self> {
        let mut live = Self::default();
        if listeners.socket.is_none() && listeners.metrics.is_none() {
            return Ok(live);
        }
        live.feed = listeners.socket.is_some().then(Arc::default);
        live.board = listeners.metrics.is_some().then(Arc::default);
        let (end, ended) = oneshot::channel();
        let readers = Arc::clone(&live.readers);
        let socket = listeners.socket.zip(live.feed.clone());
        let socket = socket.map(|(socket, feed)| (socket, Shared { feed, readers, node: node.into() }));
        let metrics = listeners.metrics.zip(live.board.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("live".into());
        let serve = move || {
            sandbox::keep_nothing("live");
            runtime.block_on(serve(socket, metrics, ended));
        };
        live.thread = Some(thread.spawn(serve)?);
        live.end = Some(end);
        Ok(live)
    }

    /// Whether metrics are asked for.
    #[must_use]
    pub fn board(&self) -> Option<&Arc<Board>> {
        self.board.as_ref()
    }

    /// Counts of the socket's readers, if there is a socket.
    #[must_use]
    pub fn readers(&self) -> Option<Counts> {
        self.feed.as_ref().map(|_| self.readers.counts())
    }

    /// Hands a line to the socket's readers.
    pub fn publish(&self, line: &Arc<Line>) {
        if let Some(feed) = &self.feed {
            feed.publish(Arc::clone(line));
        }
    }

    /// Ends: readers get what there is, if they take it soon; the socket is removed.
    pub fn finish(mut self) {
        if let Some(feed) = &self.feed {
            feed.close();
        }
        drop(self.end.take());
        let Some(thread) = self.thread.take() else {
            return;
        };
        // Bounded by itself; the thread does nothing that blocks.
        let until = Instant::now() + 2 * PATIENCE;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

async fn serve(
    socket: Option<(Socket, Shared)>,
    metrics: Option<(TcpListener, Arc<Board>)>,
    ended: oneshot::Receiver<()>,
) {
    let (first, second) = (tokio::sync::watch::Sender::new(()), tokio::sync::watch::Sender::new(()));
    let (mut socket_end, mut metrics_end) = (first.subscribe(), second.subscribe());
    let sockets = async {
        if let Some((socket, shared)) = &socket {
            let done = async { drop(socket_end.changed().await) };
            if let Err(error) = socket::serve(socket, shared.clone(), done).await {
                log::error!("cannot serve {}: {error}", socket.path().display());
            }
        }
    };
    let pages = async {
        if let Some((listener, board)) = metrics {
            let done = async { drop(metrics_end.changed().await) };
            if let Err(error) = http::serve(listener, board, done).await {
                log::error!("cannot serve metrics: {error}");
            }
        }
    };
    let end = async {
        // Whether it is told or just dropped.
        let _ = ended.await;
        drop((first, second));
        tokio::time::sleep(PATIENCE).await;
    };
    tokio::select! {
        _ = async { tokio::join!(sockets, pages) } => {}
        () = end => {}
    }
}
