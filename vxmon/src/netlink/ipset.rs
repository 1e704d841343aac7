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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::attribute::golden, *};

    fn read(hex: &str) -> Set {
        decode(Reply { kind: u16::from(SUBSYSTEM) << 8 | u16::from(LIST), payload: &golden(hex) }).unwrap()
    }

    /// What the kernel (6.18) answers to IPSET_CMD_LIST, protocol 7, after these commands.
    #[test]
    fn sets_are_those_of_ipset() {
        // ipset create KUBE-CLUSTER-IP hash:ip,port; ipset add KUBE-CLUSTER-IP 10.96.0.10,tcp:9153
        let set = read(
            "020000000500010007000000140002004b5542452d434c55535445522d49500011000300686173683a69702c706f72740000\
             00000500050002000000050004000700000006000b40000000003c0007800800124000000400080013400001000005001500\
             0c00000008001140e96e1b84080019400000000008001a4000000108080018400000000124000880200007800c0001800800\
             01000a60000a0600044023c100000500070006000000",
        );
        assert_eq!((set.index, &*set.name, &*set.kind), (Some(0), "KUBE-CLUSTER-IP", "hash:ip,port"));
        let one = Element {
            addresses: [Some([10, 96, 0, 10].into()), None],
            protocol: Some(6),
            port: Some(9153),
            ..Element::default()
        };
        assert_eq!(set.elements, [one]);

        // ipset create KUBE-LOOP-BACK hash:ip,port,ip; ipset add KUBE-LOOP-BACK 10.244.0.73,udp:53,10.244.0.73
        let set = read(
            "020000000500010007000000130002004b5542452d4c4f4f502d4241434b000014000300686173683a69702c706f72742c69\
             70000500050002000000050004000600000006000b40000100003c0007800800124000000400080013400001000005001500\
             0c000000080011409792e7d7080019400000000008001a40000001080800184000000001300008802c0007800c0001800800\
             01000af400490c001480080001000af4004906000440003500000500070011000000",
        );
        assert_eq!((set.index, &*set.kind), (Some(1), "hash:ip,port,ip"));
        let pod = Some([10, 244, 0, 73].into());
        let one = Element { addresses: [pod, pod], protocol: Some(17), port: Some(53), ..Element::default() };
        assert_eq!(set.elements, [one]);

        // ipset create cali hash:net; ipset add cali 10.244.0.0/16; ipset add cali 10.244.7.0/24 nomatch
        let set = read(
            "0200000005000100070000000900020063616c69000000000d000300686173683a6e65740000000005000500020000000500\
             04000700000006000b40000200003c00078008001240000004000800134000010000050015000c00000008001140ee95f176\
             080019400000000008001a400000022808001840000000023c000880180007800c000180080001000af40000050003001000\
             0000200007800c000180080001000af4070005000300180000000800084000000004",
        );
        let net = |third, prefix, except| Element {
            addresses: [Some([10, 244, third, 0].into()), None],
            prefixes: [Some(prefix), None],
            except,
            ..Element::default()
        };
        assert_eq!(set.elements, [net(0, 16, false), net(7, 24, true)]);

        // ipset create six hash:net family inet6; ipset add six fd00:244::/48
        let set = read(
            "02000000050001000700000008000200736978000d000300686173683a6e657400000000050005000a000000050004000700\
             000006000b40000300003c00078008001240000004000800134000010000050015000c000000080011406b2ec3c708001940\
             0000000008001a4000000520080018400000000128000880240007801800018014000200fd00024400000000000000000000\
             00000500030030000000",
        );
        let net = Some("fd00:244::".parse().unwrap());
        let one = Element { addresses: [net, None], prefixes: [Some(48), None], ..Element::default() };
        assert_eq!(set.elements, [one]);
    }

    proptest! {
        /// Whatever the kernel answers, reading it ends.
        #[test]
        fn garbage_is_left_out(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(Reply { kind: 0x0607, payload: &bytes });
        }
    }
}
