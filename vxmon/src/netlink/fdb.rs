//! Forwarding entries of VXLAN devices: to which remote each MAC address goes. It never changes one, and leaves the
//! entries of bridges alone.

use std::net::IpAddr;

use netlink_packet_core::Emitable;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourHeader, NeighbourMessage},
};
use nix::libc;

use super::{Error, Socket, attribute::attributes_after, socket::Reply};

/// Attributes of a neighbour, include/uapi/linux/neighbour.h.
mod nda {
    pub(super) const DST: u16 = 1;
    pub(super) const LLADDR: u16 = 2;
    pub(super) const PORT: u16 = 6;
    pub(super) const VNI: u16 = 7;
    pub(super) const IFINDEX: u16 = 8;
    pub(super) const NH_ID: u16 = 13;
}

/// A forwarding entry of a VXLAN device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// Index of the VXLAN device.
    pub ifindex: u32,
    /// Destination MAC address of the inner frame; zeros for the default entry.
    pub mac: [u8; 6],
    /// Where such frames go.
    pub remote: Option<IpAddr>,
    /// UDP destination port, host byte order, if it is not the device's own.
    pub port: Option<u16>,
    /// VNI, if it is not the device's own.
    pub vni: Option<u32>,
    /// Device by which the packet must leave (`via`), if it is not the one the VXLAN device is bound to.
    pub via: Option<u32>,
    /// Next hop object that holds the remotes (EVPN multihoming, since 5.8), instead of [`Entry::remote`].
    pub nexthop: Option<u32>,
}

/// The forwarding entries of the VXLAN device `ifindex`.
///
/// # Errors
/// See [`Socket::dump`].
pub fn entries(socket: &mut Socket, ifindex: u32) -> Result<Vec<Entry>, Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    // A filter for kernels with strict checking (4.20); others send the entries of all devices.
    message.header.ifindex = ifindex;
    let request = format!("list forwarding entries of the device with index {ifindex}");
    socket.dump(&request, &RouteNetlinkMessage::GetNeighbour(message), |reply| {
        decode(reply).filter(|entry| entry.ifindex == ifindex)
    })
}

/// The forwarding entries of all devices of the namespace that have remotes: those of tunnels, not those of bridges.
///
/// # Errors
/// See [`Socket::dump`].
pub fn all(socket: &mut Socket) -> Result<Vec<Entry>, Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    socket.dump("list forwarding entries", &RouteNetlinkMessage::GetNeighbour(message), |reply| {
        decode(reply).filter(|entry| entry.remote.is_some() || entry.nexthop.is_some())
    })
}

/// Whether a neighbour message is about a forwarding entry with a remote, as only tunnel devices have them.
pub(super) fn has_remote(payload: &[u8]) -> bool {
    NeighbourHeader::parse(payload).is_ok_and(|header| {
        header.family == AddressFamily::Bridge
            && attributes_after(header.buffer_len(), payload).any(|(kind, _)| matches!(kind, nda::DST | nda::NH_ID))
    })
}

fn decode(reply: Reply<'_>) -> Option<Entry> {
    if reply.kind != libc::RTM_NEWNEIGH {
        return None;
    }
    let header = NeighbourHeader::parse(reply.payload).ok()?;
    if header.family != AddressFamily::Bridge {
        return None;
    }
    let mut entry = Entry { ifindex: header.ifindex, ..Entry::default() };
    for (kind, value) in attributes_after(header.buffer_len(), reply.payload) {
        match kind {
            nda::LLADDR => entry.mac = value.array().unwrap_or_default(),
            nda::DST => entry.remote = value.ip().filter(|address| !address.is_unspecified()),
            nda::PORT => entry.port = value.u16_be(),
            nda::VNI => entry.vni = value.u32(),
            nda::IFINDEX => entry.via = value.u32().filter(|index| *index != 0),
            nda::NH_ID => entry.nexthop = value.u32(),
            _ => {}
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `bridge fdb add 02:00:00:00:00:0f dev vxlan.calico dst 10.0.100.15 port 8472 vni 7 via eth0 self permanent`, then
    /// what Linux 6.18 answers to `bridge fdb show dev vxlan.calico`.
    #[rustfmt::skip]
    const ENTRY: [u8; 76] = [
        7, 0, 0, 0, 6, 0, 0, 0, 0xc0, 0, 2, 1,  // struct ndmsg: AF_BRIDGE, device 6, NUD_NOARP | NUD_PERMANENT, NTF_SELF
        10, 0, 2, 0, 2, 0, 0, 0, 0, 0x0f, 0, 0, // NDA_LLADDR
        8, 0, 1, 0, 10, 0, 100, 15,             // NDA_DST
        6, 0, 6, 0, 0x21, 0x18, 0, 0,           // NDA_PORT, big endian
        8, 0, 7, 0, 7, 0, 0, 0,                 // NDA_VNI
        8, 0, 8, 0, 3, 0, 0, 0,                 // NDA_IFINDEX
        20, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // NDA_CACHEINFO
    ];

    #[test]
    fn an_entry_with_everything() {
        let entry = decode(Reply { kind: libc::RTM_NEWNEIGH, payload: &ENTRY });
        let expected = Entry {
            ifindex: 6,
            mac: [2, 0, 0, 0, 0, 0x0f],
            remote: Some(IpAddr::from([10, 0, 100, 15])),
            port: Some(8472),
            vni: Some(7),
            via: Some(3),
            nexthop: None,
        };
        assert_eq!(entry, Some(expected));
        assert!(has_remote(&ENTRY));
    }

    #[test]
    fn other_neighbours_are_not_entries() {
        let mut arp = ENTRY;
        arp[0] = libc::AF_INET as u8;
        assert_eq!(decode(Reply { kind: libc::RTM_NEWNEIGH, payload: &arp }), None);
        assert!(!has_remote(&arp));
        // What a bridge has learned of its port: no remote.
        assert!(!has_remote(&ENTRY[..24]));
    }

    #[test]
    fn cut_anywhere_it_never_panics() {
        for length in 0..ENTRY.len() {
            let _ = decode(Reply { kind: libc::RTM_NEWNEIGH, payload: &ENTRY[..length] });
        }
    }
}
