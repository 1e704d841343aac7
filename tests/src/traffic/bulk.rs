//! Bulk TCP: so many bytes, one way, in several ways of handing them to the kernel.

use std::{
    fs::File,
    io::{ErrorKind, Read, Seek, SeekFrom, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::libc;

use super::PATIENCE;
use crate::{Netns, pace};

const CHUNK: usize = 64 * 1024;

/// How the sender hands its bytes to the kernel; it decides what the fragments of an skb are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkMode {
    /// `write` of 64 KiB: the kernel copies.
    Write,
    /// `send` with `MSG_ZEROCOPY`: fragments are pages of this process.
    Zerocopy,
    /// `sendfile` from a memory file: fragments are pages of the page cache.
    Sendfile,
}

impl BulkMode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Write, Self::Zerocopy, Self::Sendfile];
}

/// Reads and counts what is sent to it, until it is dropped.
#[derive(Debug)]
pub struct BulkServer {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl BulkServer {
    /// Listens on `address`; when this returns, clients can connect.
    pub fn start(node: &Netns, address: SocketAddr) -> Result<Self> {
        let listener = node.enter(|| {
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address} in {}", node.name()))
        })?;
        super::accept_with_pauses(&listener)?;
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop_seen, counter) = (Arc::clone(&stop), Arc::clone(&received));
        let thread = thread::Builder::new().name("bulk".to_owned()).spawn(move || {
            while !stop_seen.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else { continue };
                let counter = Arc::clone(&counter);
                thread::spawn(move || drain(stream, &counter));
            }
        })?;
        Ok(Self { stop, received, thread: Some(thread) })
    }

    /// Bytes received so far, of all connections.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for BulkServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends `bytes` to a [`BulkServer`] and returns the time until it has read them all, the connect not counted.
pub fn bulk_send(node: &Netns, server: SocketAddr, bytes: u64, mode: BulkMode) -> Result<Duration> {
    let mut stream = node.enter(|| {
        TcpStream::connect_timeout(&server, pace::limit(PATIENCE))
            .with_context(|| format!("cannot connect to {server} in {}", node.name()))
    })?;
    stream.set_write_timeout(Some(pace::limit(PATIENCE)))?;
    stream.set_read_timeout(Some(pace::limit(PATIENCE)))?;
    let start = Instant::now();
    match mode {
        BulkMode::Write => write(&mut stream, bytes),
        BulkMode::Zerocopy => zerocopy(&stream, bytes),
        BulkMode::Sendfile => sendfile(&stream, bytes),
    }
    .with_context(|| format!("cannot send {bytes} bytes to {server} ({mode:?})"))?;
    stream.shutdown(Shutdown::Write)?;
    // The server says how much it has read.
    let mut total = [0; 8];
    stream.read_exact(&mut total).with_context(|| format!("{server} did not read everything"))?;
    let (elapsed, total) = (start.elapsed(), u64::from_be_bytes(total));
    if total != bytes {
        bail!("{server} read {total} bytes of {bytes}");
    }
    Ok(elapsed)
}

fn drain(mut stream: TcpStream, received: &AtomicU64) {
    let mut buffer = vec![0; 4 * CHUNK];
    let mut total = 0_u64;
    if stream.set_read_timeout(Some(pace::limit(PATIENCE))).is_err() {
        return;
    }
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                total += count as u64;
                received.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
    // A client that is gone misses nothing.
    let _ = stream.write_all(&total.to_be_bytes());
}

/// A pattern whose checksum is not 0, so that a wrong sum shows.
fn pattern() -> Vec<u8> {
    (0..CHUNK).map(|index| (index * 7 + index / 256) as u8).collect()
}

fn chunks(bytes: u64) -> impl Iterator<Item = usize> {
    let (whole, rest) = (bytes / CHUNK as u64, (bytes % CHUNK as u64) as usize);
    (0..whole).map(|_| CHUNK).chain((rest > 0).then_some(rest))
}

fn write(stream: &mut TcpStream, bytes: u64) -> Result<()> {
    let data = pattern();
    for size in chunks(bytes) {
        stream.write_all(&data[..size])?;
    }
    Ok(())
}

fn zerocopy(stream: &TcpStream, bytes: u64) -> Result<()> {
    let data = pattern();
    let on: libc::c_int = 1;
    // SAFETY: the option value is a c_int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result).context("SO_ZEROCOPY")?;
    for size in chunks(bytes) {
        let mut rest = &data[..size];
        while !rest.is_empty() {
            // SAFETY: `rest` is valid for its length. The kernel may read it until it has sent it; it is never written to,
            // and the pages stay valid for the kernel even when freed here.
            let sent = unsafe {
                libc::send(
                    stream.as_raw_fd(),
                    rest.as_ptr().cast(),
                    rest.len(),
                    libc::MSG_ZEROCOPY | libc::MSG_NOSIGNAL,
                )
            };
            match nix::errno::Errno::result(sent) {
                Ok(count) => rest = &rest[count.cast_unsigned()..],
                // Too many notices not yet read: the notices count as socket memory.
                Err(nix::errno::Errno::ENOBUFS) => thread::sleep(Duration::from_millis(1)),
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("send"),
            }
            forget_notices(stream);
        }
    }
    Ok(())
}

/// Empties the error queue, in which the kernel says which buffers it no longer needs.
fn forget_notices(stream: &TcpStream) {
    let mut control = [0_u8; 128];
    loop {
        // SAFETY: all zeroes is a valid msghdr: no name, no data, no control buffer.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = control.len() as _;
        // SAFETY: `message` points at `control`, which outlives the call.
        let got =
            unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
        if got < 0 {
            return;
        }
    }
}

fn sendfile(stream: &TcpStream, bytes: u64) -> Result<()> {
    // SAFETY: the name is a C string; the descriptor is new and ours.
    let fd = unsafe { libc::memfd_create(c"bulk".as_ptr(), libc::MFD_CLOEXEC) };
    nix::errno::Errno::result(fd).context("memfd_create")?;
    // SAFETY: a valid descriptor that nobody else owns.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&pattern())?;
    for size in chunks(bytes) {
        file.seek(SeekFrom::Start(0))?;
        let mut rest = size;
        while rest > 0 {
            // SAFETY: both descriptors are open; the offset pointer may be null.
            let sent = unsafe { libc::sendfile(stream.as_raw_fd(), file.as_raw_fd(), std::ptr::null_mut(), rest) };
            match nix::errno::Errno::result(sent) {
                Ok(count) => rest -= count.cast_unsigned(),
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("sendfile"),
            }
        }
    }
    Ok(())
}
