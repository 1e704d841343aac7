//! News that the nftables ruleset changed, and in which tables. What is lost of it is told as a change of anything.

use std::io;

use netlink_packet_core::{NLMSG_ALIGNTO, NetlinkBuffer};
use netlink_sys::{SocketAddr, protocols};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};

pub use super::nftables::Change;
use super::{
    Error, Protocol,
    nftables::{self, decode_change},
    socket::Reply,
};

/// Room for one datagram, in bytes: the kernel puts messages together up to 8 KiB (`NLMSG_GOODSIZE`), and one of a large rule
/// alone may be longer.
const BUFFER: usize = 32 * 1024;
/// Length of struct nlmsghdr in bytes.
const HEADER: usize = 16;

/// Listens to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct News {
    socket: netlink_sys::Socket,
    buffer: Vec<u8>,
}

impl News {
    /// Begins to listen; read the ruleset after that.
    ///
    /// # Errors
    /// [`Error::Open`], with `EPERM` without CAP_NET_ADMIN.
    pub fn open() -> Result<Self, Error> {
        let open = |source| Error::Open { protocol: Protocol::Netfilter.name(), source };
        let mut socket = netlink_sys::Socket::new(protocols::NETLINK_NETFILTER).map_err(open)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(open)?;
        socket.add_membership(nftables::GROUP).map_err(open)?;
        socket.set_non_blocking(true).map_err(open)?;
        // Who changes so much at once that it does not fit has changed everything.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &(64 * 1024));
        Ok(Self { socket, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Takes all news that there is, and shows each change to `each`.
    pub fn take(&mut self, mut each: impl FnMut(Change)) {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT | libc::MSG_TRUNC) {
                Ok(length) => read(&self.buffer, length, &mut each),
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => each(Change::Unknown),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

/// The messages of one datagram that was `length` bytes long, of which these are there.
fn read(datagram: &[u8], length: usize, each: &mut impl FnMut(Change)) {
    let mut rest = datagram;
    if length > datagram.len() {
        each(Change::Unknown);
    }
    while !rest.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(rest) else { return each(Change::Unknown) };
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        let reply = Reply { kind: message.message_type(), payload: rest.get(HEADER..length).unwrap_or_default() };
        if let Some(change) = decode_change(reply) {
            each(change);
        }
        rest = rest.get(length.next_multiple_of(usize::from(NLMSG_ALIGNTO))..).unwrap_or_default();
    }
}

impl std::os::fd::AsFd for News {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
