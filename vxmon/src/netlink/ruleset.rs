//! News that the nftables ruleset changed. It says that, not what; losing some is no loss, since the next read sees all.

use std::io;

use netlink_sys::{SocketAddr, protocols};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};

use super::{Error, Protocol, nftables};

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
        // One message says as much as a thousand: what does not fit is left out.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &(64 * 1024));
        Ok(Self { socket, buffer: Vec::with_capacity(64) })
    }

    /// Takes all news that there is; whether there was any.
    pub fn take(&mut self) -> bool {
        let mut any = false;
        loop {
            self.buffer.clear();
            // The rest of a longer message is thrown away.
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => any = true,
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => any = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return any,
            }
        }
    }
}

impl std::os::fd::AsFd for News {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
