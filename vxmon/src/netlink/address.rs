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

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip addr add 192.0.2.1 peer 192.0.2.9 dev eth1`, then what Linux 6.18 answers to `ip addr show dev eth1`.
    #[rustfmt::skip]
    const POINT_TO_POINT: [u8; 64] = [
        2, 0x20, 0x80, 0, 5, 0, 0, 0,           // struct ifaddrmsg: AF_INET, /32, IFA_F_PERMANENT, universe, device 5
        8, 0, 1, 0, 192, 0, 2, 9,               // IFA_ADDRESS: the peer
        8, 0, 2, 0, 192, 0, 2, 1,               // IFA_LOCAL
        9, 0, 3, 0, b'e', b't', b'h', b'1', 0, 0, 0, 0, // IFA_LABEL
        8, 0, 8, 0, 0x80, 0, 0, 0,              // IFA_FLAGS
        20, 0, 6, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0x96, 0x18, 3, 0, 0x96, 0x18, 3, 0, // IFA_CACHEINFO
    ];

    #[test]
    fn the_own_address_and_not_the_peer() {
        let address = decode(Reply { kind: libc::RTM_NEWADDR, payload: &POINT_TO_POINT });
        let expected = Address { ifindex: 5, address: IpAddr::from([192, 0, 2, 1]), prefix: 32, scope: 0 };
        assert_eq!(address, Some(expected));
        assert!(expected.is_global());
    }

    #[test]
    fn cut_anywhere_it_never_panics() {
        for length in 0..POINT_TO_POINT.len() {
            let _ = decode(Reply { kind: libc::RTM_NEWADDR, payload: &POINT_TO_POINT[..length] });
        }
    }
}
