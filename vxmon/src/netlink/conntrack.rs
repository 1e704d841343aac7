//! One conntrack entry, looked up by the packet that belongs to it. It never lists the table (which can hold a million
//! entries), never changes an entry, and does not refresh its timeout.

pub mod status;

use std::net::IpAddr;

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    conntrack::{
        ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol as IpProtocol, Tuple as TupleAttribute,
    },
};
use nix::{errno::Errno, libc};

use super::{
    Error, Protocol, Socket,
    attribute::{Value, attributes_after},
    socket::Reply,
};

/// Attributes of an entry, include/uapi/linux/netfilter/nfnetlink_conntrack.h (enum ctattr_type).
mod cta {
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const TIMEOUT: u16 = 7;
    pub(super) const MARK: u16 = 8;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
    /// Within a tuple.
    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;
    /// Within TUPLE_IP.
    pub(super) const IP_V4_SRC: u16 = 1;
    pub(super) const IP_V4_DST: u16 = 2;
    pub(super) const IP_V6_SRC: u16 = 3;
    pub(super) const IP_V6_DST: u16 = 4;
    /// Within TUPLE_PROTO.
    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_SRC_PORT: u16 = 2;
    pub(super) const PROTO_DST_PORT: u16 = 3;
}

/// Length of struct nfgenmsg in bytes.
const NFGENMSG: usize = 4;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW`.
const CT_NEW: u16 = 1 << 8;

/// One direction of a connection. Ports in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// IP protocol: 17 is UDP.
    pub proto: u8,
}

impl Tuple {
    /// The tuple of a UDP packet.
    #[must_use]
    pub fn udp(src: IpAddr, sport: u16, dst: IpAddr, dport: u16) -> Self {
        Self { src, dst, sport, dport, proto: libc::IPPROTO_UDP as u8 }
    }

    /// The same with source and destination swapped.
    #[must_use]
    pub fn inverse(self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, proto: self.proto }
    }
}

impl std::fmt::Display for Tuple {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use std::net::SocketAddr;
        let (from, to) = (SocketAddr::new(self.src, self.sport), SocketAddr::new(self.dst, self.dport));
        write!(formatter, "{from} > {to} (protocol {})", self.proto)
    }
}

/// A connection as conntrack knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Packets of the original direction, before NAT.
    pub orig: Tuple,
    /// Packets of the reply direction, before they are translated back. Packets of the original direction leave as its
    /// inverse.
    pub reply: Tuple,
    /// IPS_* bits; [`status::names`] has words for them.
    pub status: u32,
    /// Connection mark; the kernel leaves out a mark of 0.
    pub mark: Option<u32>,
    /// Number that tells it from a later connection with the same tuples.
    pub id: Option<u32>,
    /// Seconds until it is forgotten, unless another packet comes.
    pub timeout_s: Option<u32>,
    /// Zone, 0 by default.
    pub zone: u16,
}

/// Looks entries up, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens the way to ctnetlink.
    ///
    /// # Errors
    /// [`Error::Open`]. Whether the kernel has ctnetlink shows with the first look-up.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(Protocol::Netfilter)? })
    }

    /// The entry to which a packet belongs that leaves with these addresses and ports **after NAT**; `None` if there is no
    /// such entry (any more). Needs CAP_NET_ADMIN.
    ///
    /// # Errors
    /// [`Error::Refused`] with `EPERM` without the privilege, `EINVAL` or `EOPNOTSUPP` if the kernel has no ctnetlink;
    /// otherwise see [`Socket::request`].
    pub fn by_packet(&mut self, packet: Tuple, zone: u16) -> Result<Option<Entry>, Error> {
        // What leaves is the inverse of the reply tuple, and no two entries share one in a zone.
        self.get(ConntrackAttribute::CtaTupleReply(attribute(packet.inverse())), packet, zone)
    }

    /// The entry whose packets look like this **before NAT**; `None` if there is none.
    ///
    /// # Errors
    /// As [`Conntrack::by_packet`].
    pub fn by_original(&mut self, original: Tuple, zone: u16) -> Result<Option<Entry>, Error> {
        self.get(ConntrackAttribute::CtaTupleOrig(attribute(original)), original, zone)
    }

    fn get(&mut self, tuple: ConntrackAttribute, packet: Tuple, zone: u16) -> Result<Option<Entry>, Error> {
        let request = format!("look up the conntrack entry of {packet}");
        let found = self.socket.request(&request, 0, &message(tuple, packet.src, zone), decode);
        match found {
            Ok(entries) => Ok(entries.into_iter().next()),
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn message(tuple: ConntrackAttribute, address: IpAddr, zone: u16) -> NetfilterMessage {
    let family = match address {
        IpAddr::V4(_) => NetfilterProtoFamily::IPv4,
        IpAddr::V6(_) => NetfilterProtoFamily::IPv6,
    };
    let mut attributes = vec![tuple];
    if zone != 0 {
        attributes.push(ConntrackAttribute::Other(DefaultNla::new(cta::ZONE, zone.to_be_bytes().to_vec())));
    }
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), ConntrackMessage::Get(attributes))
}

fn attribute(tuple: Tuple) -> Vec<TupleAttribute> {
    vec![
        TupleAttribute::Ip(vec![IPTuple::SourceAddress(tuple.src), IPTuple::DestinationAddress(tuple.dst)]),
        TupleAttribute::Proto(vec![
            ProtoTuple::Protocol(IpProtocol::from(tuple.proto)),
            ProtoTuple::SourcePort(tuple.sport),
            ProtoTuple::DestinationPort(tuple.dport),
        ]),
    ]
}

fn decode(reply: Reply<'_>) -> Option<Entry> {
    if reply.kind != CT_NEW {
        return None;
    }
    let (mut orig, mut reply_tuple) = (None, None);
    let (mut status, mut mark, mut id, mut timeout_s, mut zone) = (0, None, None, None, 0);
    for (kind, value) in attributes_after(NFGENMSG, reply.payload) {
        match kind {
            cta::TUPLE_ORIG => orig = decode_tuple(value),
            cta::TUPLE_REPLY => reply_tuple = decode_tuple(value),
            cta::STATUS => status = value.u32_be().unwrap_or_default(),
            cta::TIMEOUT => timeout_s = value.u32_be(),
            cta::MARK => mark = value.u32_be(),
            cta::ID => id = value.u32_be(),
            cta::ZONE => zone = value.u16_be().unwrap_or_default(),
            _ => {}
        }
    }
    Some(Entry { orig: orig?, reply: reply_tuple?, status, mark, id, timeout_s, zone })
}

fn decode_tuple(value: Value<'_>) -> Option<Tuple> {
    let (mut src, mut dst, mut proto, mut sport, mut dport) = (None, None, None, 0, 0);
    for (kind, value) in value.nested() {
        match kind {
            cta::TUPLE_IP => {
                for (kind, value) in value.nested() {
                    match kind {
                        cta::IP_V4_SRC | cta::IP_V6_SRC => src = value.ip(),
                        cta::IP_V4_DST | cta::IP_V6_DST => dst = value.ip(),
                        _ => {}
                    }
                }
            }
            cta::TUPLE_PROTO => {
                for (kind, value) in value.nested() {
                    match kind {
                        cta::PROTO_NUM => proto = value.u8(),
                        cta::PROTO_SRC_PORT => sport = value.u16_be().unwrap_or_default(),
                        cta::PROTO_DST_PORT => dport = value.u16_be().unwrap_or_default(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(Tuple { src: src?, dst: dst?, sport, dport, proto: proto? })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, NetlinkSerializable};

    use super::*;

    const NODE: [u8; 4] = [10, 0, 100, 3];
    const PEER: [u8; 4] = [10, 0, 100, 15];

    /// A UDP flow under `-j MASQUERADE --random-fully` with mark 0x4000, then what passes between Linux 6.18 and
    /// `strace -xx conntrack -G -p udp -s 10.0.100.3 -d 10.0.100.15 --sport 57314 --dport 8472`, which prints `udp 17 29
    /// src=10.0.100.3 dst=10.0.100.15 sport=57314 dport=8472 [UNREPLIED] src=10.0.100.15 dst=10.0.100.3 sport=8472
    /// dport=33246 mark=16384 use=2`. First the question:
    #[rustfmt::skip]
    const QUESTION: [u8; 56] = [
        2, 0, 0, 0,                             // struct nfgenmsg: AF_INET
        52, 0, 1, 0x80,                         // CTA_TUPLE_ORIG
        20, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 100, 3, 8, 0, 2, 0, 10, 0, 100, 15, // CTA_TUPLE_IP: source, destination
        28, 0, 2, 0x80, 5, 0, 1, 0, 17, 0, 0, 0, // CTA_TUPLE_PROTO: CTA_PROTO_NUM
        6, 0, 2, 0, 0xdf, 0xe2, 0, 0,           // CTA_PROTO_SRC_PORT, big endian
        6, 0, 3, 0, 0x21, 0x18, 0, 0,           // CTA_PROTO_DST_PORT
    ];
    /// Then the answer:
    #[rustfmt::skip]
    const ANSWER: [u8; 148] = [
        2, 0, 0, 0,                             // struct nfgenmsg: AF_INET
        52, 0, 1, 0x80,                         // CTA_TUPLE_ORIG
        20, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 100, 3, 8, 0, 2, 0, 10, 0, 100, 15,
        28, 0, 2, 0x80, 5, 0, 1, 0, 17, 0, 0, 0, 6, 0, 2, 0, 0xdf, 0xe2, 0, 0, 6, 0, 3, 0, 0x21, 0x18, 0, 0,
        52, 0, 2, 0x80,                         // CTA_TUPLE_REPLY
        20, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 100, 15, 8, 0, 2, 0, 10, 0, 100, 3,
        28, 0, 2, 0x80, 5, 0, 1, 0, 17, 0, 0, 0, 6, 0, 2, 0, 0x21, 0x18, 0, 0, 6, 0, 3, 0, 0x81, 0xde, 0, 0,
        8, 0, 3, 0, 0, 0, 0x01, 0x98,           // CTA_STATUS
        8, 0, 8, 0, 0, 0, 0x40, 0,              // CTA_MARK
        8, 0, 12, 0, 0x2d, 0xe9, 0x88, 0xf6,    // CTA_ID
        8, 0, 11, 0, 0, 0, 0, 2,                // CTA_USE
        8, 0, 7, 0, 0, 0, 0, 29,                // CTA_TIMEOUT
    ];

    fn original() -> Tuple {
        Tuple::udp(NODE.into(), 57314, PEER.into(), 8472)
    }

    fn bytes(message: &NetfilterMessage) -> Vec<u8> {
        let mut bytes = vec![0; Emitable::buffer_len(message)];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn the_question_is_the_one_of_conntrack_tools() {
        let asked = message(ConntrackAttribute::CtaTupleOrig(attribute(original())), NODE.into(), 0);
        assert_eq!(bytes(&asked), QUESTION);
        assert_eq!(asked.message_type(), 0x0101);
    }

    #[test]
    fn a_zone_is_part_of_the_question() {
        let asked = message(ConntrackAttribute::CtaTupleOrig(attribute(original())), NODE.into(), 0x1234);
        assert_eq!(bytes(&asked).get(56..), Some([6, 0, 18, 0, 0x12, 0x34, 0, 0].as_slice()));
    }

    #[test]
    fn the_answer_is_the_entry() {
        let entry = decode(Reply { kind: CT_NEW, payload: &ANSWER });
        let expected = Entry {
            orig: original(),
            reply: Tuple::udp(PEER.into(), 8472, NODE.into(), 33246),
            status: 0x198,
            mark: Some(0x4000),
            id: Some(770_279_670),
            timeout_s: Some(29),
            zone: 0,
        };
        assert_eq!(entry, Some(expected));
    }

    #[test]
    fn cut_or_changed_anywhere_it_never_panics() {
        for length in 0..ANSWER.len() {
            let _ = decode(Reply { kind: CT_NEW, payload: &ANSWER[..length] });
            for byte in [0, 1, 3, 5, 0x7f, 0xff] {
                let mut changed = ANSWER;
                changed[length] = byte;
                let _ = decode(Reply { kind: CT_NEW, payload: &changed });
            }
        }
    }
}
