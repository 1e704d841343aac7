//! Next hop objects (kernel 5.3 on), to which routes and VXLAN forwarding entries can refer by number. It never changes
//! one. netlink-packet-route does not know them, so the message is made here.

use std::{collections::BTreeMap, net::IpAddr};

use netlink_packet_core::NetlinkSerializable;

use super::{Error, Socket, attribute::attributes_after, socket::Reply};

/// Messages about next hops, include/uapi/linux/rtnetlink.h.
pub(super) const RTM_NEWNEXTHOP: u16 = 104;
pub(super) const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;
/// Length of struct nhmsg in bytes.
const NHMSG: usize = 8;
/// Length of struct nexthop_grp in bytes: id (4), weight, three more.
const NEXTHOP_GRP: usize = 8;
/// How deep groups are followed; the kernel allows no group in a group but for resilience.
const DEPTH: u32 = 4;

/// Attributes of a next hop, include/uapi/linux/nexthop.h.
mod nha {
    pub(super) const ID: u16 = 1;
    pub(super) const GROUP: u16 = 2;
    pub(super) const OIF: u16 = 5;
    pub(super) const GATEWAY: u16 = 6;
}

/// One next hop: a device or a gateway or both, or a group of others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Nexthop {
    device: Option<u32>,
    gateway: Option<IpAddr>,
    group: Vec<u32>,
}

/// The next hop objects of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nexthops(BTreeMap<u32, Nexthop>);

impl Nexthops {
    /// All of the socket's namespace; none, where the kernel does not have such objects.
    ///
    /// # Errors
    /// See [`Socket::dump`].
    pub fn list(socket: &mut Socket) -> Result<Self, Error> {
        match socket.dump("list next hops", &Dump, decode) {
            Ok(nexthops) => Ok(Self(nexthops.into_iter().collect())),
            Err(error) if error.is_unsupported() => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Indexes of the devices of the next hop `id`, or of all in that group.
    #[must_use]
    pub fn devices(&self, id: u32) -> Vec<u32> {
        self.members(id, DEPTH).into_iter().filter_map(|nexthop| nexthop.device).collect()
    }

    /// Gateways of the next hop `id`, or of all in that group. For a forwarding entry they are its remotes.
    #[must_use]
    pub fn gateways(&self, id: u32) -> Vec<IpAddr> {
        self.members(id, DEPTH).into_iter().filter_map(|nexthop| nexthop.gateway).collect()
    }

    fn members(&self, id: u32, depth: u32) -> Vec<&Nexthop> {
        let Some(nexthop) = self.0.get(&id) else {
            return Vec::new();
        };
        if nexthop.group.is_empty() || depth == 0 {
            return vec![nexthop];
        }
        nexthop.group.iter().flat_map(|member| self.members(*member, depth - 1)).collect()
    }
}

/// `RTM_GETNEXTHOP` for all: an empty struct nhmsg.
struct Dump;

impl NetlinkSerializable for Dump {
    fn message_type(&self) -> u16 {
        RTM_GETNEXTHOP
    }

    fn buffer_len(&self) -> usize {
        NHMSG
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}

fn decode(reply: Reply<'_>) -> Option<(u32, Nexthop)> {
    if reply.kind != RTM_NEWNEXTHOP {
        return None;
    }
    let mut id = None;
    let mut nexthop = Nexthop::default();
    for (kind, value) in attributes_after(NHMSG, reply.payload) {
        match kind {
            nha::ID => id = value.u32(),
            nha::OIF => nexthop.device = value.u32(),
            nha::GATEWAY => nexthop.gateway = value.ip(),
            nha::GROUP => {
                let members = value.0.chunks_exact(NEXTHOP_GRP).filter_map(|member| member.first_chunk());
                nexthop.group = members.map(|id| u32::from_ne_bytes(*id)).collect();
            }
            _ => {}
        }
    }
    Some((id?, nexthop))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip nexthop add id 1 via 10.0.100.1 dev eth0` and `ip nexthop add id 3 group 1/2`, then what Linux 6.18 answers to
    /// `ip nexthop show`.
    #[rustfmt::skip]
    const GATEWAY: [u8; 32] = [
        2, 0xfd, 0, 0, 0, 0, 0, 0,              // struct nhmsg: AF_INET, link scope
        8, 0, 1, 0, 1, 0, 0, 0,                 // NHA_ID
        8, 0, 5, 0, 3, 0, 0, 0,                 // NHA_OIF
        8, 0, 6, 0, 10, 0, 100, 1,              // NHA_GATEWAY
    ];
    #[rustfmt::skip]
    const GROUP: [u8; 52] = [
        0, 0, 0, 0, 0, 0, 0, 0,                 // struct nhmsg
        8, 0, 1, 0, 3, 0, 0, 0,                 // NHA_ID
        6, 0, 3, 0, 0, 0, 0, 0,                 // NHA_GROUP_TYPE: multipath
        20, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, // NHA_GROUP: 1 and 2, weight 1 each
        8, 0, 14, 0, 0, 0, 0, 0x80,             // NHA_OP_FLAGS
    ];

    #[test]
    fn a_gateway_and_a_group() {
        let read = |payload| decode(Reply { kind: RTM_NEWNEXTHOP, payload });
        let gateway = Nexthop { device: Some(3), gateway: Some(IpAddr::from([10, 0, 100, 1])), group: Vec::new() };
        assert_eq!(read(&GATEWAY), Some((1, gateway)));
        assert_eq!(read(&GROUP), Some((3, Nexthop { group: vec![1, 2], ..Nexthop::default() })));
        for length in 0..GROUP.len() {
            let _ = read(&GROUP[..length]);
        }
    }

    #[test]
    fn groups_are_followed_and_loops_end() {
        let device = |index| Nexthop { device: Some(index), ..Nexthop::default() };
        let group = |ids: &[u32]| Nexthop { group: ids.to_vec(), ..Nexthop::default() };
        let nexthops =
            Nexthops(BTreeMap::from([(1, device(7)), (2, device(8)), (3, group(&[1, 2, 9])), (4, group(&[4]))]));
        assert_eq!(nexthops.devices(3), [7, 8]);
        assert_eq!(nexthops.devices(2), [8]);
        assert!(nexthops.devices(5).is_empty());
        assert!(nexthops.devices(4).is_empty());
    }
}
