//! Addresses of the devices of the namespace. It never changes one.

use std::net::IpAddr;

use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressHeader, AddressMessage},
};
use nix::libc;

use super::{Error, Socket, attribute::attributes_after, socket::Reply};

/// Attributes of an address, include/uapi/linux/if_addr.h.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Length of struct ifaddrmsg in bytes.
const IFADDRMSG: usize = 8;

/// An address of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Index of the device that holds it.
    pub ifindex: u32,
    /// The device's own address, also where it is one end of a point-to-point link.
    pub address: IpAddr,
    /// Length of its prefix, in bits.
    pub prefix: u8,
    /// Reach, `RT_SCOPE_*` of include/uapi/linux/rtnetlink.h: 0 everywhere, 253 this link, 254 this host.
    pub scope: u8,
}

impl Address {
    /// Usable as the source of packets to other hosts beyond the link.
    pub fn is_global(&self) -> bool {
        self.scope == libc::RT_SCOPE_UNIVERSE
    }
}

/// All IPv4 and IPv6 addresses of the socket's namespace.
///
/// # Errors
/// See [`Socket::dump`].
pub fn addresses(socket: &mut Socket) -> Result<Vec<Address>, Error> {
    let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    socket.dump("list addresses", &message, decode)
}

fn decode(reply: Reply<'_>) -> Option<Address> {
    if reply.kind != libc::RTM_NEWADDR {
        return None;
    }
    let header = AddressHeader::parse(reply.payload).ok()?;
    let (mut own, mut any) = (None, None);
    for (kind, value) in attributes_after(IFADDRMSG, reply.payload) {
        match kind {
            IFA_LOCAL => own = value.ip(),
            IFA_ADDRESS => any = value.ip(),
            _ => {}
        }
    }
    Some(Address {
        ifindex: header.index,
        // IFA_ADDRESS is the other end, where there is an IFA_LOCAL.
        address: own.or(any)?,
        prefix: header.prefix_len,
        scope: header.scope.into(),
    })
}
