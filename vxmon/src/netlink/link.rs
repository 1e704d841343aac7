//! The devices of the namespace as plain values: what kind, on what, and what a VXLAN device was told to do. It never
//! judges which of them matter.

use std::net::IpAddr;

use netlink_packet_core::Emitable;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkHeader, LinkMessage},
};
use nix::libc;

use super::{
    Error, Socket,
    attribute::{Value, attributes_after},
    socket::Reply,
};

/// Attributes of a link, include/uapi/linux/if_link.h.
mod ifla {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const IFNAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const LINK: u16 = 5;
    pub(super) const MASTER: u16 = 10;
    pub(super) const OPERSTATE: u16 = 16;
    pub(super) const LINKINFO: u16 = 18;
    pub(super) const LINK_NETNSID: u16 = 37;
    pub(super) const PROP_LIST: u16 = 52;
    /// Within PROP_LIST.
    pub(super) const ALT_IFNAME: u16 = 53;
    /// Within LINKINFO.
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const INFO_DATA: u16 = 2;
}

/// Attributes of a VXLAN device within `IFLA_INFO_DATA`, include/uapi/linux/if_link.h.
mod ifla_vxlan {
    pub(super) const ID: u16 = 1;
    pub(super) const GROUP: u16 = 2;
    pub(super) const LINK: u16 = 3;
    pub(super) const LOCAL: u16 = 4;
    pub(super) const LEARNING: u16 = 7;
    pub(super) const PORT: u16 = 15;
    pub(super) const GROUP6: u16 = 16;
    pub(super) const LOCAL6: u16 = 17;
    pub(super) const UDP_CSUM: u16 = 18;
    pub(super) const UDP_ZERO_CSUM6_TX: u16 = 19;
    pub(super) const UDP_ZERO_CSUM6_RX: u16 = 20;
    pub(super) const COLLECT_METADATA: u16 = 25;
}

/// A device, as RTM_NEWLINK describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index in this namespace.
    pub ifindex: u32,
    /// Its name in this namespace.
    pub name: String,
    /// Other names it answers to (since 5.5), often longer ones.
    pub alternative_names: Vec<String>,
    /// What made it (`IFLA_INFO_KIND`): `vxlan`, `veth`, `bond`. Empty for hardware and for loopback.
    pub kind: String,
    /// Link layer, ARPHRD_* of include/uapi/linux/if_arp.h: 1 Ethernet, 772 loopback, 65534 none.
    pub hardware: u16,
    /// Administratively up (IFF_UP).
    pub up: bool,
    /// Loopback (IFF_LOOPBACK).
    pub loopback: bool,
    /// Operational state.
    pub state: OperState,
    /// MTU in bytes.
    pub mtu: u32,
    /// The bridge, bond, team or VRF of which it is a port.
    pub master: Option<u32>,
    /// The device it refers to (`IFLA_LINK`): the one below a VLAN or macvlan, but the *peer* of a veth.
    pub link: Option<u32>,
    /// Set when [`Link::link`] (for a VXLAN device: its whole underlay) is in another network namespace: that one's id as
    /// seen from this one, negative where it has none.
    pub link_netnsid: Option<i32>,
    /// Hardware address, if it is of Ethernet's length.
    pub mac: Option<[u8; 6]>,
    /// What a device of kind `vxlan` was told to do.
    pub vxlan: Option<Vxlan>,
}

impl Link {
    /// Frames on it begin with an Ethernet header. Without it (WireGuard, tun, ipip) they begin with the IP header.
    pub fn has_ethernet_header(&self) -> bool {
        matches!(self.hardware, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK)
    }
}

/// The settings of a VXLAN device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits; 0 where the device is [`Vxlan::external`].
    pub vni: u32,
    /// The device its packets are bound to, in the namespace of its underlay.
    pub lower: Option<u32>,
    /// UDP destination port, host byte order.
    pub port: u16,
    /// Source address of its packets, if it is fixed.
    pub local: Option<IpAddr>,
    /// Default destination (`remote` or `group`), if there is one.
    pub remote: Option<IpAddr>,
    /// Fills the outer checksum over IPv4.
    pub udp_csum: bool,
    /// Sends a zero outer checksum over IPv6.
    pub zero_csum6_tx: bool,
    /// Accepts a zero outer checksum over IPv6.
    pub zero_csum6_rx: bool,
    /// Takes VNI and destination from each packet's metadata (`external`, collect-metadata): what is set above does not
    /// say what it sends.
    pub external: bool,
    /// Learns forwarding entries from what it receives.
    pub learning: bool,
}

/// Operational state of a device, RFC 2863 section 3.1.14, numbers of include/uapi/linux/if.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OperState {
    /// The driver does not say; usual for virtual devices.
    #[default]
    Unknown,
    /// Hardware is missing.
    NotPresent,
    /// Cannot transmit.
    Down,
    /// The device below cannot transmit.
    LowerLayerDown,
    /// In test.
    Testing,
    /// Waits for something outside, such as 802.1X.
    Dormant,
    /// Can transmit.
    Up,
}

impl From<u8> for OperState {
    fn from(number: u8) -> Self {
        match number {
            1 => Self::NotPresent,
            2 => Self::Down,
            3 => Self::LowerLayerDown,
            4 => Self::Testing,
            5 => Self::Dormant,
            6 => Self::Up,
            _ => Self::Unknown,
        }
    }
}

/// All devices of the socket's namespace, ordered by index.
///
/// # Errors
/// See [`Socket::dump`].
pub fn links(socket: &mut Socket) -> Result<Vec<Link>, Error> {
    let mut message = LinkMessage::default();
    // Statistics are most of such a message, and none of our business; kernels before 4.5 send them anyway.
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let mut links = socket.dump("list network devices", &RouteNetlinkMessage::GetLink(message), decode)?;
    links.sort_unstable_by_key(|link| link.ifindex);
    links.dedup_by_key(|link| link.ifindex);
    Ok(links)
}

/// The device index in a link message's fixed header (struct ifinfomsg).
pub(super) fn index(payload: &[u8]) -> Option<u32> {
    LinkHeader::parse(payload).ok().map(|header| header.index)
}

fn decode(reply: Reply<'_>) -> Option<Link> {
    if reply.kind != libc::RTM_NEWLINK {
        return None;
    }
    let header = LinkHeader::parse(reply.payload).ok()?;
    let flags = header.flags.bits();
    let mut link = Link {
        ifindex: header.index,
        hardware: header.link_layer_type.into(),
        up: flags & libc::IFF_UP as u32 != 0,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        ..Link::default()
    };
    for (kind, value) in attributes_after(header.buffer_len(), reply.payload) {
        match kind {
            ifla::ADDRESS => link.mac = value.array(),
            ifla::IFNAME => link.name = value.text(),
            ifla::MTU => link.mtu = value.u32().unwrap_or_default(),
            ifla::LINK => link.link = value.u32().filter(|index| *index != 0),
            ifla::MASTER => link.master = value.u32().filter(|index| *index != 0),
            ifla::OPERSTATE => link.state = value.u8().unwrap_or_default().into(),
            ifla::LINK_NETNSID => link.link_netnsid = value.i32(),
            ifla::PROP_LIST => {
                let names = value.nested().filter(|(kind, _)| *kind == ifla::ALT_IFNAME);
                link.alternative_names = names.map(|(_, name)| name.text()).collect();
            }
            ifla::LINKINFO => (link.kind, link.vxlan) = decode_info(value),
            _ => {}
        }
    }
    Some(link)
}

/// Kind, and settings if that is `vxlan`.
fn decode_info(info: Value<'_>) -> (String, Option<Vxlan>) {
    let find = |wanted| info.nested().find_map(|(kind, value)| (kind == wanted).then_some(value));
    let kind = find(ifla::INFO_KIND).map(Value::text).unwrap_or_default();
    let vxlan = (kind == "vxlan").then(|| find(ifla::INFO_DATA).map(decode_vxlan).unwrap_or_default());
    (kind, vxlan)
}

fn decode_vxlan(data: Value<'_>) -> Vxlan {
    let mut vxlan = Vxlan::default();
    let set = |value: Value<'_>| value.u8().is_some_and(|byte| byte != 0);
    for (kind, value) in data.nested() {
        match kind {
            ifla_vxlan::ID => vxlan.vni = value.u32().unwrap_or_default(),
            ifla_vxlan::LINK => vxlan.lower = value.u32().filter(|index| *index != 0),
            ifla_vxlan::PORT => vxlan.port = value.u16_be().unwrap_or_default(),
            ifla_vxlan::GROUP | ifla_vxlan::GROUP6 => vxlan.remote = specified(value),
            ifla_vxlan::LOCAL | ifla_vxlan::LOCAL6 => vxlan.local = specified(value),
            ifla_vxlan::UDP_CSUM => vxlan.udp_csum = set(value),
            ifla_vxlan::UDP_ZERO_CSUM6_TX => vxlan.zero_csum6_tx = set(value),
            ifla_vxlan::UDP_ZERO_CSUM6_RX => vxlan.zero_csum6_rx = set(value),
            ifla_vxlan::COLLECT_METADATA => vxlan.external = set(value),
            ifla_vxlan::LEARNING => vxlan.learning = set(value),
            _ => {}
        }
    }
    vxlan
}

/// An address other than 0.0.0.0 and ::, which mean none.
fn specified(value: Value<'_>) -> Option<IpAddr> {
    value.ip().filter(|address| !address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 local 10.0.100.3 nolearning udp6zerocsumrx`, then what
    /// Linux 6.18 answers to `ip -d link show flannel.1`, without the attributes that nothing here reads.
    #[rustfmt::skip]
    const FLANNEL: [u8; 292] = [
        0, 0, 1, 0, 4, 0, 0, 0, 0x43, 0x10, 1, 0, 0, 0, 0, 0, // struct ifinfomsg: ARPHRD_ETHER, device 4, up and more
        14, 0, 3, 0, b'f', b'l', b'a', b'n', b'n', b'e', b'l', b'.', b'1', 0, 0, 0, // IFLA_IFNAME
        5, 0, 16, 0, 0, 0, 0, 0,                // IFLA_OPERSTATE
        8, 0, 4, 0, 0xaa, 5, 0, 0,              // IFLA_MTU
        10, 0, 1, 0, 0xfa, 0x26, 0x9b, 0x34, 0x2a, 0xec, 0, 0, // IFLA_ADDRESS
        // IFLA_LINKINFO: IFLA_INFO_KIND, then IFLA_INFO_DATA
        232, 0, 18, 0, 10, 0, 1, 0, b'v', b'x', b'l', b'a', b'n', 0, 0, 0, 216, 0, 2, 0,
        8, 0, 1, 0, 1, 0, 0, 0,                 // IFLA_VXLAN_ID
        8, 0, 3, 0, 3, 0, 0, 0,                 // IFLA_VXLAN_LINK
        8, 0, 4, 0, 10, 0, 100, 3,              // IFLA_VXLAN_LOCAL
        5, 0, 5, 0, 0, 0, 0, 0, 5, 0, 28, 0, 0, 0, 0, 0, 5, 0, 6, 0, 0, 0, 0, 0, 5, 0, 29, 0, 0, 0, 0, 0,
        8, 0, 26, 0, 0, 0, 0, 0, 8, 0, 32, 0, 0, 0, 0, 0,
        5, 0, 7, 0, 0, 0, 0, 0,                 // IFLA_VXLAN_LEARNING
        5, 0, 11, 0, 0, 0, 0, 0, 5, 0, 12, 0, 0, 0, 0, 0, 5, 0, 13, 0, 0, 0, 0, 0, 5, 0, 14, 0, 0, 0, 0, 0,
        5, 0, 25, 0, 0, 0, 0, 0,                // IFLA_VXLAN_COLLECT_METADATA
        8, 0, 8, 0, 44, 1, 0, 0, 8, 0, 9, 0, 0, 0, 0, 0,
        6, 0, 15, 0, 0x21, 0x18, 0, 0,          // IFLA_VXLAN_PORT, big endian
        5, 0, 18, 0, 1, 0, 0, 0,                // IFLA_VXLAN_UDP_CSUM
        5, 0, 19, 0, 0, 0, 0, 0,                // IFLA_VXLAN_UDP_ZERO_CSUM6_TX
        5, 0, 20, 0, 1, 0, 0, 0,                // IFLA_VXLAN_UDP_ZERO_CSUM6_RX
        5, 0, 21, 0, 0, 0, 0, 0, 5, 0, 22, 0, 0, 0, 0, 0, 5, 0, 31, 0, 1, 0, 0, 0,
        8, 0, 10, 0, 0, 0, 0, 0, 12, 0, 33, 0, 0xf7, 0xff, 0xff, 0xff, 0, 0, 0, 0xff,
    ];

    #[test]
    fn a_device_of_flannel() {
        let expected = Link {
            ifindex: 4,
            name: "flannel.1".into(),
            kind: "vxlan".into(),
            hardware: libc::ARPHRD_ETHER,
            up: true,
            mtu: 1450,
            mac: Some([0xfa, 0x26, 0x9b, 0x34, 0x2a, 0xec]),
            vxlan: Some(Vxlan {
                vni: 1,
                lower: Some(3),
                port: 8472,
                local: Some(IpAddr::from([10, 0, 100, 3])),
                udp_csum: true,
                zero_csum6_rx: true,
                ..Vxlan::default()
            }),
            ..Link::default()
        };
        assert_eq!(decode(Reply { kind: libc::RTM_NEWLINK, payload: &FLANNEL }), Some(expected));
    }

    #[test]
    fn cut_or_changed_anywhere_it_never_panics() {
        for length in 0..FLANNEL.len() {
            let _ = decode(Reply { kind: libc::RTM_NEWLINK, payload: &FLANNEL[..length] });
            for byte in [0, 1, 3, 5, 0x7f, 0xff] {
                let mut changed = FLANNEL;
                changed[length] = byte;
                let _ = decode(Reply { kind: libc::RTM_NEWLINK, payload: &changed });
            }
        }
    }
}
