//! The sets of ipset: their names and elements. It only reads.

use std::net::IpAddr;

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};

use super::{
    Error, Socket,
    attribute::{Value, attributes, attributes_after},
    socket::Reply,
};

/// `NFNL_SUBSYS_IPSET`, include/uapi/linux/netfilter/nfnetlink.h.
const SUBSYSTEM: u8 = 6;
/// `IPSET_CMD_LIST`, include/uapi/linux/netfilter/ipset/ip_set.h.
const LIST: u8 = 7;
/// The protocol that tells the number of a set (`IPSET_PROTOCOL`, since 4.20).
const PROTOCOL: u8 = 7;
/// Length of struct nfgenmsg in bytes.
const NFGENMSG: usize = 4;

/// Attributes, the same file.
mod attr {
    pub(super) const PROTOCOL: u16 = 1;
    pub(super) const SETNAME: u16 = 2;
    pub(super) const TYPENAME: u16 = 3;
    pub(super) const FLAGS: u16 = 6;
    pub(super) const DATA: u16 = 7;
    pub(super) const ADT: u16 = 8;
    pub(super) const INDEX: u16 = 11;
    /// Within DATA.
    pub(super) const IP: u16 = 1;
    pub(super) const CIDR: u16 = 3;
    pub(super) const PORT: u16 = 4;
    pub(super) const PROTO: u16 = 7;
    pub(super) const CADT_FLAGS: u16 = 8;
    pub(super) const IP2: u16 = 20;
    pub(super) const CIDR2: u16 = 21;
}

/// `IPSET_FLAG_LIST_SETNAME` and `IPSET_FLAG_LIST_HEADER`: without elements.
const WITHOUT_ELEMENTS: u32 = 1 << 2;
/// `IPSET_FLAG_NOMATCH`.
const NOMATCH: u32 = 1 << 2;

/// A set, or part of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// Its number.
    pub index: Option<u16>,
    /// Its name.
    pub name: String,
    /// Its type; empty in the later parts of a set.
    pub kind: String,
    /// Its elements.
    pub elements: Vec<Element>,
}

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// Its addresses.
    pub addresses: [Option<IpAddr>; 2],
    /// The lengths of their prefixes; none: the whole address.
    pub prefixes: [Option<u8>; 2],
    /// IP protocol.
    pub protocol: Option<u8>,
    /// Port, host byte order.
    pub port: Option<u16>,
    /// `nomatch`.
    pub except: bool,
}

/// All sets without their elements; with `name` that one, with its elements, in parts.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN; `EINVAL` if the kernel has no ipset, or one that does not tell numbers; otherwise see
/// [`Socket::dump`].
pub fn list(socket: &mut Socket, name: Option<&str>) -> Result<Vec<Set>, Error> {
    let mut attributes = vec![DefaultNla::new(attr::PROTOCOL, vec![PROTOCOL])];
    match name {
        Some(name) => {
            let mut bytes = name.as_bytes().to_vec();
            bytes.push(0);
            attributes.push(DefaultNla::new(attr::SETNAME, bytes));
        }
        // NLA_F_NET_BYTEORDER
        None => attributes.push(DefaultNla::new(attr::FLAGS | 0x4000, WITHOUT_ELEMENTS.to_be_bytes().to_vec())),
    }
    let message = NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0),
        NetfilterMessageInner::Other { subsys: NetfilterSubsystem::Other(SUBSYSTEM), message_type: LIST, attributes },
    );
    socket.dump("list the sets of ipset", &message, decode)
}

fn decode(reply: Reply<'_>) -> Option<Set> {
    let mut set = Set::default();
    for (kind, value) in attributes_after(NFGENMSG, reply.payload) {
        match kind {
            attr::SETNAME => set.name = value.text(),
            attr::TYPENAME => set.kind = value.text(),
            attr::INDEX => set.index = value.u16_be(),
            attr::ADT => set
                .elements
                .extend(value.nested().filter(|(kind, _)| *kind == attr::DATA).map(|(_, value)| element(value))),
            _ => {}
        }
    }
    (!set.name.is_empty()).then_some(set)
}

fn element(value: Value<'_>) -> Element {
    let mut found = Element::default();
    let address = |value: Value<'_>| attributes(value.0).find_map(|(_, value)| value.ip());
    for (kind, value) in value.nested() {
        match kind {
            attr::IP => found.addresses[0] = address(value),
            attr::IP2 => found.addresses[1] = address(value),
            attr::CIDR => found.prefixes[0] = value.u8(),
            attr::CIDR2 => found.prefixes[1] = value.u8(),
            attr::PORT => found.port = value.u16_be(),
            attr::PROTO => found.protocol = value.u8(),
            attr::CADT_FLAGS => found.except = value.u32_be().is_some_and(|flags| flags & NOMATCH != 0),
            _ => {}
        }
    }
    found
}
