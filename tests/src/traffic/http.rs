//! A server that answers every request with a few bytes, and a client that times the connect.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::PATIENCE;
use crate::{Netns, pace};

/// Serves HTTP until it is dropped.
#[derive(Debug)]
pub struct HttpServer {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Listens on `address`; when this returns, clients can connect.
    pub fn start(node: &Netns, address: SocketAddr) -> Result<Self> {
        let listener = node.enter(|| {
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address} in {}", node.name()))
        })?;
        super::accept_with_pauses(&listener)?;
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop_seen, counter) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = thread::Builder::new().name("http".to_owned()).spawn(move || {
            serve(&listener, &stop_seen, &counter);
        })?;
        Ok(Self { stop, served, thread: Some(thread) })
    }

    /// Requests answered so far.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How long the parts of a request took.
#[derive(Clone, Copy, Debug)]
pub struct Get {
    /// Until the connection was there.
    pub connect: Duration,
    /// Until the answer was complete.
    pub total: Duration,
}

/// Gets `/` from `server` and returns how long the connect took; an error if it takes longer than `limit`.
pub fn http_get(node: &Netns, server: SocketAddr, limit: Duration) -> Result<Duration> {
    Ok(http_get_timed(node, server, limit)?.connect)
}

/// As [`http_get`], with all times.
pub fn http_get_timed(node: &Netns, server: SocketAddr, limit: Duration) -> Result<Get> {
    let limit = pace::answer(limit);
    let start = Instant::now();
    let mut stream = node.enter(|| {
        TcpStream::connect_timeout(&server, limit)
            .with_context(|| format!("cannot connect to {server} in {}", node.name()))
    })?;
    let connect = start.elapsed();
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("no answer from {server}"))?;
    if !answer.starts_with("HTTP/1.0 200") {
        bail!("{server} answered {answer:?}");
    }
    Ok(Get { connect, total: start.elapsed() })
}

fn serve(listener: &TcpListener, stop: &AtomicBool, served: &Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        // An error is a pause, or a connection that was reset before it was accepted.
        let Ok((stream, _)) = listener.accept() else { continue };
        let served = Arc::clone(served);
        // A connection whose request is lost must not hold up the next one.
        thread::spawn(move || {
            if answer(stream).is_ok() {
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(pace::limit(PATIENCE)))?;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut part)? {
            0 => break,
            count => request.extend_from_slice(&part[..count]),
        }
    }
    stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nvxmon\n")
}
