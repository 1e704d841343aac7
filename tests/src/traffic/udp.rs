//! UDP: a server that counts and answers, and clients that send in each way that shapes an skb differently.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::libc;

use super::POLL;
use crate::{Netns, pace};

/// Largest payload of a datagram over IPv4.
const LARGEST: usize = 65_507;

/// How a datagram is handed to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpMode {
    /// One `send`. More than the MTU becomes IP fragments.
    Plain,
    /// So many `send`s joined by `MSG_MORE` into one datagram: a non-linear skb, whose sum the kernel adds up part by part.
    Corked {
        /// How many parts.
        parts: usize,
    },
    /// `UDP_SEGMENT`: one `send`, which leaves as datagrams of that size; a GSO skb if it is large enough.
    Segment {
        /// Payload of each datagram.
        size: u16,
    },
}

/// Counts datagrams and sends back the first 512 bytes of each, until it is dropped.
#[derive(Debug)]
pub struct UdpServer {
    stop: Arc<AtomicBool>,
    datagrams: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl UdpServer {
    /// Binds `address`; answers if `echo`.
    pub fn start(node: &Netns, address: SocketAddr, echo: bool) -> Result<Self> {
        let socket = bind(node, address)?;
        socket.set_read_timeout(Some(POLL))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (datagrams, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (stop_seen, count, sum) = (Arc::clone(&stop), Arc::clone(&datagrams), Arc::clone(&bytes));
        let thread = thread::Builder::new().name("udp".to_owned()).spawn(move || {
            let mut buffer = vec![0; LARGEST];
            while !stop_seen.load(Ordering::Relaxed) {
                let Ok((size, from)) = socket.recv_from(&mut buffer) else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                sum.fetch_add(size as u64, Ordering::Relaxed);
                if echo {
                    // A client that is gone misses nothing.
                    let _ = socket.send_to(&buffer[..size.min(512)], from);
                }
            }
        })?;
        Ok(Self { stop, datagrams, bytes, thread: Some(thread) })
    }

    /// Datagrams received so far.
    #[must_use]
    pub fn datagrams(&self) -> u64 {
        self.datagrams.load(Ordering::Relaxed)
    }

    /// Payload bytes received so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits until it has `count` datagrams; false if `limit` passes first.
    #[must_use]
    pub fn wait(&self, count: u64, limit: Duration) -> bool {
        let start = Instant::now();
        while self.datagrams() < count {
            if start.elapsed() > pace::limit(limit) {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One socket, hence one flow as long as it lives.
#[derive(Debug)]
pub struct UdpClient {
    socket: UdpSocket,
}

impl UdpClient {
    /// A socket in `node`, connected to `server`.
    pub fn connect(node: &Netns, server: SocketAddr) -> Result<Self> {
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = bind(node, any.parse()?)?;
        socket.connect(server).with_context(|| format!("cannot connect to {server} in {}", node.name()))?;
        Ok(Self { socket })
    }

    /// Its own address and port.
    pub fn local(&self) -> Result<SocketAddr> {
        Ok(self.socket.local_addr()?)
    }

    /// Sends `size` bytes.
    pub fn send(&self, size: usize, mode: UdpMode) -> Result<()> {
        if size > LARGEST {
            bail!("a datagram of {size} bytes: at most {LARGEST}");
        }
        let data: Vec<u8> = (0..size).map(|index| (index * 5 + 1) as u8).collect();
        match mode {
            UdpMode::Plain => self.part(&data, 0),
            UdpMode::Corked { parts } => {
                let mut left = data.chunks(size.div_ceil(parts.max(1)).max(1)).peekable();
                while let Some(part) = left.next() {
                    self.part(part, if left.peek().is_some() { libc::MSG_MORE } else { 0 })?;
                }
                Ok(())
            }
            UdpMode::Segment { size } => {
                self.segment(size)?;
                let sent = self.part(&data, 0);
                self.segment(0)?;
                sent
            }
        }
    }

    /// Sends `size` bytes and waits for an answer. `Ok(None)` if none comes within `limit`.
    pub fn ask(&self, size: usize, limit: Duration) -> Result<Option<Duration>> {
        let (start, limit) = (Instant::now(), pace::answer(limit));
        self.send(size, UdpMode::Plain)?;
        loop {
            // 0 would be for ever.
            let left = limit.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.recv(&mut [0; 512]) {
                Ok(_) => return Ok(Some(start.elapsed())),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                // With a timeout, also where no signal has a handler: after the process was stopped or frozen (signal(7)).
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("no answer"),
            }
        }
    }

    fn part(&self, data: &[u8], flags: libc::c_int) -> Result<()> {
        // SAFETY: `data` is valid for its length during the call.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
        nix::errno::Errno::result(sent).with_context(|| format!("cannot send {} bytes", data.len()))?;
        Ok(())
    }

    fn segment(&self, size: u16) -> Result<()> {
        let size = libc::c_int::from(size);
        // SAFETY: the option value is a c_int that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const size).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        nix::errno::Errno::result(result).context("UDP_SEGMENT")?;
        Ok(())
    }
}

/// Sends one datagram from a new socket and waits for an answer: what a resolver does. `Ok(None)` if none comes.
pub fn udp_ask(node: &Netns, server: SocketAddr, size: usize, limit: Duration) -> Result<Option<Duration>> {
    UdpClient::connect(node, server)?.ask(size, limit)
}

fn bind(node: &Netns, address: SocketAddr) -> Result<UdpSocket> {
    node.enter(|| UdpSocket::bind(address).with_context(|| format!("cannot bind {address} in {}", node.name())))
}
