//! One packet socket: its memory-mapped ring (TPACKET_V3), or plain reads where the kernel does not give a ring together
//! with the header that tells a checksum's state (before 4.6). Hands out frames; knows nothing of what is in them.
//!
//! Documentation/networking/packet_mmap.rst, include/uapi/linux/if_packet.h; the header in front of each frame is
//! `struct virtio_net_hdr` (PACKET_VNET_HDR; include/uapi/linux/virtio_net.h), in native byte order.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::libc::{self, c_int, c_void, sock_filter, sock_fprog, tpacket_block_desc, tpacket_req3, tpacket3_hdr};
use vxmon_common::judge::{Skb, State};

/// Bytes in a block of the ring: several times the longest packet.
const BLOCK: usize = 1 << 18;
/// Blocks of a ring. With them it takes a burst of a millisecond at 16 Gbit/s.
const BLOCKS: usize = 8;
/// After how many ms a block that is not full is handed over.
const RETIRE_MS: u32 = 20;
/// Bytes of `struct virtio_net_hdr`.
const VNET: usize = 10;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`.
const DATA_VALID: u8 = 2;
/// Bytes of a plain read: the longest packet, its link-layer header, and the header in front of it.
const READ: usize = VNET + (1 << 16) + 256;
/// Packets waiting for plain reads, in bytes of the kernel's memory.
const WAITING: c_int = 4 << 20;
/// Plain reads in a row.
const READS: usize = 4096;

/// One frame that left.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Its bytes, as far as they were kept.
    pub bytes: &'a [u8],
    /// How many it had.
    pub len: u32,
    /// What the kernel says of its checksum; of `gso_type`, nothing.
    pub skb: Skb,
    /// Its EtherType, memory order.
    pub ethertype: u16,
    /// When it was seen, CLOCK_REALTIME, ns; 0: just now.
    pub realtime_ns: u64,
}

/// A packet socket on one device.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    ring: Option<Ring>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Ring {
    memory: *mut u8,
    next: usize,
}

// SAFETY: the mapping belongs to this value alone, and any thread may use it.
unsafe impl Send for Ring {}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and nobody holds a reference into it any more (frames are lent to a closure).
        unsafe {
            libc::munmap(self.memory.cast(), BLOCK * BLOCKS);
        }
    }
}

impl Capture {
    /// Opens a socket on a device. Sees nothing until [`Capture::set_filter`] lets something through.
    pub fn open(ifindex: u32, with_ring: bool) -> io::Result<Self> {
        // Protocol 0: nothing arrives before everything is set up.
        // SAFETY: a system call without pointers; the descriptor it returns is nobody else's.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
            check(fd)?;
            OwnedFd::from_raw_fd(fd)
        };
        let fd = socket.as_raw_fd();
        set_option(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1_i32)?;
        let mut capture = Self { ring: None, buffer: Vec::new(), socket };
        let ring = if with_ring { map_ring(fd) } else { Err(io::ErrorKind::Unsupported.into()) };
        match ring {
            Ok(ring) => capture.ring = Some(ring),
            Err(error) => {
                log::debug!("no ring on device {ifindex}: {error}");
                capture.buffer = vec![0; READ];
                // Beyond net.core.rmem_max with CAP_NET_ADMIN only.
                if set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &WAITING).is_err() {
                    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &WAITING)?;
                }
            }
        }
        capture.set_filter(&super::filter::program(super::filter::Wanted::Nothing))?;
        bind(fd, ifindex)?;
        Ok(capture)
    }

    /// Lets through what this program accepts.
    pub fn set_filter(&self, program: &[sock_filter]) -> io::Result<()> {
        set_filter(self.socket.as_raw_fd(), program)
    }

    /// The socket, to wait on.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Packets dropped since the last call: the ring was full, or (in newer kernels) the kernel could not put the
    /// packet's state into the header.
    pub fn dropped(&self) -> u64 {
        // The first two fields are the same in each version.
        let mut stats = libc::tpacket_stats_v3 { tp_packets: 0, tp_drops: 0, tp_freeze_q_cnt: 0 };
        let mut length = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the buffer has the length that is given.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        if result == 0 { u64::from(stats.tp_drops) } else { 0 }
    }

    /// Hands over the frames that are waiting, at most a ring full; an error is the device's, which may have gone.
    pub fn drain(&mut self, each: &mut dyn FnMut(Frame<'_>)) -> io::Result<()> {
        match &mut self.ring {
            Some(ring) => {
                ring.drain(each);
                // Takes the error that woke the caller, if any: a device that went down.
                take_error(self.socket.as_raw_fd())
            }
            None => self.read(each),
        }
    }

    fn read(&mut self, each: &mut dyn FnMut(Frame<'_>)) -> io::Result<()> {
        for _ in 0..READS {
            // SAFETY: all zeros is an address of no family.
            let mut from: libc::sockaddr_ll = unsafe { mem::zeroed() };
            let mut from_len = size_of_val(&from) as libc::socklen_t;
            // SAFETY: buffer and address have the lengths that are given.
            let length = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    libc::MSG_TRUNC,
                    (&raw mut from).cast(),
                    &raw mut from_len,
                )
            };
            if length < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => return Ok(()),
                    // The state of this packet does not fit the header; it is lost.
                    Some(libc::EINVAL) => continue,
                    _ => return Err(error),
                }
            }
            let length = length as usize;
            let (Some(vnet), Some(bytes)) =
                (self.buffer.get(..VNET), self.buffer.get(VNET..length.min(self.buffer.len())))
            else {
                continue;
            };
            let len = u32::try_from(length - VNET).unwrap_or(u32::MAX);
            each(Frame { bytes, len, skb: skb(vnet), ethertype: from.sll_protocol, realtime_ns: 0 });
        }
        Ok(())
    }
}

impl Ring {
    fn drain(&mut self, each: &mut dyn FnMut(Frame<'_>)) {
        for _ in 0..BLOCKS {
            // SAFETY: `next` is below BLOCKS, so the block lies in the mapping, aligned to its size.
            let (status, block) = unsafe {
                let start = self.memory.add(self.next * BLOCK);
                let status =
                    mem::offset_of!(tpacket_block_desc, hdr) + mem::offset_of!(libc::tpacket_hdr_v1, block_status);
                (AtomicU32::from_ptr(start.add(status).cast()), start)
            };
            // Acquire: what the kernel wrote before it set the bit (prb_flush_block(), net/packet/af_packet.c).
            if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
                return;
            }
            // SAFETY: the block is ours until the status says otherwise, and nothing else writes to it.
            let bytes = unsafe { std::slice::from_raw_parts(block, BLOCK) };
            frames(bytes, each);
            status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
            self.next = (self.next + 1) % BLOCKS;
        }
    }
}

/// The frames of one block (`struct tpacket_block_desc`).
fn frames(block: &[u8], each: &mut dyn FnMut(Frame<'_>)) {
    let header = mem::offset_of!(tpacket_block_desc, hdr);
    let count = u32_at(block, header + mem::offset_of!(libc::tpacket_hdr_v1, num_pkts));
    let mut at = u32_at(block, header + mem::offset_of!(libc::tpacket_hdr_v1, offset_to_first_pkt)) as usize;
    for _ in 0..count {
        let Some(bytes) = block.get(at..) else {
            return;
        };
        if let Some(frame) = frame(bytes) {
            each(frame);
        }
        match u32_at(bytes, mem::offset_of!(tpacket3_hdr, tp_next_offset)) {
            0 => return, // the last one
            next => at += next as usize,
        }
    }
}

/// One frame (`struct tpacket3_hdr`).
fn frame(bytes: &[u8]) -> Option<Frame<'_>> {
    let word = |offset| u32_at(bytes, offset);
    let mac = usize::from(u16_at(bytes, mem::offset_of!(tpacket3_hdr, tp_mac)));
    let kept = word(mem::offset_of!(tpacket3_hdr, tp_snaplen)) as usize;
    let address = size_of::<tpacket3_hdr>().next_multiple_of(libc::TPACKET_ALIGNMENT);
    Some(Frame {
        bytes: bytes.get(mac..mac.checked_add(kept)?)?,
        len: word(mem::offset_of!(tpacket3_hdr, tp_len)),
        skb: skb(bytes.get(mac.checked_sub(VNET)?..mac)?),
        ethertype: u16_at(bytes, address + mem::offset_of!(libc::sockaddr_ll, sll_protocol)),
        realtime_ns: u64::from(word(mem::offset_of!(tpacket3_hdr, tp_sec))) * 1_000_000_000
            + u64::from(word(mem::offset_of!(tpacket3_hdr, tp_nsec))),
    })
}

/// What the header in front of a frame says (`virtio_net_hdr_from_skb()`, include/linux/virtio_net.h). Of a packet to be
/// segmented it has the inner protocol only, not whether the tunnel has a checksum.
fn skb(vnet: &[u8]) -> Skb {
    let (flags, gso_type) = (vnet.first().copied().unwrap_or(0), vnet.get(1).copied().unwrap_or(0));
    let partial = flags & NEEDS_CSUM != 0;
    let only = |yes: bool, value: u16| if yes { u32::from(value) } else { 0 };
    Skb {
        state: match (partial, flags & DATA_VALID != 0) {
            (true, _) => State::Partial,
            (false, true) => State::Unnecessary,
            (false, false) => State::None,
        },
        gso_size: only(gso_type != 0, u16_at(vnet, 4)),
        csum_start: only(partial, u16_at(vnet, 6)),
        csum_offset: only(partial, u16_at(vnet, 8)),
        gso_type: 0,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_option<T>(fd: RawFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value has the length that is given.
    check(unsafe {
        libc::setsockopt(fd, level, name, ptr::from_ref(value).cast::<c_void>(), size_of::<T>() as libc::socklen_t)
    })
}

/// Attaches a classic BPF program to a socket, in place of the one before.
pub(super) fn set_filter(fd: RawFd, program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // The kernel only reads it.
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

fn take_error(fd: RawFd) -> io::Result<()> {
    let mut error: c_int = 0;
    let mut length = size_of_val(&error) as libc::socklen_t;
    // SAFETY: the buffer has the length that is given.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut error).cast(), &raw mut length) })?;
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

fn map_ring(fd: RawFd) -> io::Result<Ring> {
    set_option(fd, libc::SOL_PACKET, libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V3 as c_int))?;
    let frame = 2048;
    let request = tpacket_req3 {
        tp_block_size: BLOCK as u32,
        tp_block_nr: BLOCKS as u32,
        tp_frame_size: frame,
        tp_frame_nr: (BLOCK * BLOCKS) as u32 / frame,
        tp_retire_blk_tov: RETIRE_MS,
        tp_sizeof_priv: 0,
        tp_feature_req_word: 0,
    };
    set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
    // SAFETY: a new mapping of the ring just made.
    let memory = unsafe {
        libc::mmap(ptr::null_mut(), BLOCK * BLOCKS, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(Ring { memory: memory.cast(), next: 0 })
}

fn bind(fd: RawFd, ifindex: u32) -> io::Result<()> {
    // SAFETY: all zeros is an address of no family.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    // Only a socket for all protocols sees what leaves.
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = c_int::try_from(ifindex).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the address has the length that is given.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_in_front_of_a_frame() {
        // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; native byte order, as the kernel writes them.
        let header = |flags: u8, kind: u8, rest: [u16; 4]| -> Vec<u8> {
            [flags, kind].into_iter().chain(rest.into_iter().flat_map(u16::to_ne_bytes)).collect()
        };
        let plain = skb(&header(0, 0, [0, 0, 0, 0]));
        assert_eq!(plain, Skb { state: State::None, ..Skb::UNKNOWN });
        let lco = skb(&header(NEEDS_CSUM, 0, [0, 0, 84, 16]));
        assert_eq!(lco, Skb { state: State::Partial, csum_start: 84, csum_offset: 16, ..Skb::UNKNOWN });
        let gso = skb(&header(NEEDS_CSUM, 1, [104, 1398, 84, 16]));
        assert_eq!((gso.state, gso.gso_size, gso.csum_start), (State::Partial, 1398, 84));
        assert_eq!(skb(&header(DATA_VALID, 0, [0; 4])).state, State::Unnecessary);
        assert_eq!(skb(&[]).state, State::None);
    }

    #[test]
    fn a_block_that_contradicts_itself_ends_early() {
        let mut block = vec![0xff_u8; 4096];
        frames(&block, &mut |frame| assert!(frame.bytes.len() <= 4096));
        // One packet that begins at the block's last byte.
        let header = mem::offset_of!(tpacket_block_desc, hdr);
        block[header + 4..header + 8].copy_from_slice(&1_u32.to_ne_bytes());
        block[header + 8..header + 12].copy_from_slice(&4095_u32.to_ne_bytes());
        frames(&block, &mut |_| unreachable!("no frame fits"));
    }
}
