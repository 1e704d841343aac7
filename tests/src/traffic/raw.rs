//! Frames sent as they are, through a packet socket. They pass TC egress, as everything that leaves a device.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use crate::Netns;

/// Frames handed to the kernel at once in a storm.
const BATCH: usize = 512;
const VNET_HDR_SIZE: usize = 10;

/// Header of `PACKET_VNET_HDR`: says what is left to do to a frame, so that it becomes an skb in that state.
#[derive(Clone, Copy, Debug, Default)]
pub struct VnetHdr {
    /// `VIRTIO_NET_HDR_F_NEEDS_CSUM` (1): the skb is CHECKSUM_PARTIAL.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`: 0 none, 1 TCPv4, 3 UDP (fragments), 4 TCPv6, 5 UDP segmentation.
    pub gso_type: u8,
    /// Length of the headers, for GSO.
    pub hdr_len: u16,
    /// Payload of a segment, for GSO.
    pub gso_size: u16,
    /// Where the sum starts, from the start of the frame.
    pub csum_start: u16,
    /// Where it goes, from `csum_start` on.
    pub csum_offset: u16,
}

impl VnetHdr {
    /// A frame whose sum is left to the device.
    #[must_use]
    pub fn partial(csum_start: u16, csum_offset: u16) -> Self {
        Self { flags: 1, csum_start, csum_offset, ..Self::default() }
    }

    fn bytes(self) -> [u8; VNET_HDR_SIZE] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// What a storm achieved.
#[derive(Clone, Copy, Debug)]
pub struct Storm {
    /// Frames handed to the device.
    pub sent: u64,
    /// In that time.
    pub elapsed: Duration,
}

impl Storm {
    /// Frames a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.sent as f64 / self.elapsed.as_secs_f64()
    }
}

/// A packet socket on one device.
#[derive(Debug)]
pub struct RawSender {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

impl RawSender {
    /// Opens it on `dev` inside `node`.
    pub fn open(node: &Netns, dev: &str) -> Result<Self> {
        node.enter(|| {
            let index = if_nametoindex(dev).with_context(|| format!("no device {dev} in {}", node.name()))?;
            // Protocol 0: it only sends.
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
                .context("cannot open a packet socket")?;
            // SAFETY: all zeroes is a valid sockaddr_ll.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_ifindex = index.cast_signed();
            Ok(Self { socket, address })
        })
    }

    /// Sends one frame.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let (address, length) = self.address();
        // SAFETY: frame and address are valid for the lengths given.
        let sent =
            unsafe { libc::sendto(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, address, length) };
        Errno::result(sent).with_context(|| format!("cannot send a frame of {} bytes", frame.len()))?;
        Ok(())
    }

    /// Sends one frame that the kernel has still work to do on. From then on the socket wants a header for each frame, so
    /// a sender is used for either this or [`send`](Self::send).
    pub fn send_vnet(&self, header: VnetHdr, frame: &[u8]) -> Result<()> {
        const PACKET_VNET_HDR: libc::c_int = 15;
        let on: libc::c_int = 1;
        // SAFETY: the option value is a c_int that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_VNET_HDR,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        Errno::result(result).context("PACKET_VNET_HDR")?;
        self.send(&[header.bytes().as_slice(), frame].concat())
    }

    /// Sends `total` frames as fast as one thread can, taking them from `frames` in turn.
    pub fn storm(&self, frames: &[Vec<u8>], total: u64) -> Result<Storm> {
        if frames.is_empty() {
            bail!("a storm of no frames");
        }
        let mut parts: Vec<libc::iovec> = frames
            .iter()
            .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
            .collect();
        let mut address = self.address;
        let in_turn = BATCH.next_multiple_of(frames.len());
        let mut messages: Vec<libc::mmsghdr> = (0..in_turn)
            .map(|index| {
                let part = &raw mut parts[index % frames.len()];
                // SAFETY: all zeroes is a valid mmsghdr.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_name = (&raw mut address).cast();
                message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let start = Instant::now();
        let (mut sent, mut next) = (0_u64, 0_usize);
        while sent < total {
            let count = (messages.len() - next).min(BATCH).min(usize::try_from(total - sent)?);
            // SAFETY: the messages point at `parts`, `frames` and `address`, which outlive the call; the kernel only reads
            // the frames.
            let done = unsafe {
                libc::sendmmsg(self.socket.as_raw_fd(), messages[next..].as_mut_ptr(), count as libc::c_uint, 0)
            };
            match Errno::result(done) {
                Ok(done) => {
                    let done = done.cast_unsigned() as usize;
                    sent += done as u64;
                    next = (next + done) % messages.len();
                }
                // The queue of the device is full: it empties by itself.
                Err(Errno::ENOBUFS | Errno::EINTR | Errno::EAGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error).context("cannot send frames"),
            }
        }
        Ok(Storm { sent, elapsed: start.elapsed() })
    }

    fn address(&self) -> (*const libc::sockaddr, libc::socklen_t) {
        ((&raw const self.address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    }
}

/// Sends one frame by `dev` inside `node`.
pub fn send_raw(node: &Netns, dev: &str, frame: &[u8]) -> Result<()> {
    RawSender::open(node, dev)?.send(frame)
}
