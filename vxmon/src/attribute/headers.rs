//! The outer and the inner packet, read from an event's first bytes by the judge's own header walk.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use vxmon_common::{
    conntrack,
    event::{Event, HEAD, event_flag, role},
    packet::{self, Bytes, Family, Fragment, Ip, Packet, UDP, proto},
    story::{self, Connection},
};

use crate::event::{Endpoints, Inner};

/// What the first bytes say.
pub struct Headers {
    /// The outer UDP packet.
    pub outer: Option<Endpoints>,
    /// The VNI.
    pub vni: Option<u32>,
    /// The packet inside.
    pub inner: Option<Inner>,
}

/// An address in memory order, as an [`IpAddr`].
pub fn address(family: Family, words: &[u32; 4]) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(words[0].to_ne_bytes()).into(),
        Family::V6 => {
            let mut bytes = [0; 16];
            for (four, word) in bytes.chunks_exact_mut(4).zip(words) {
                four.copy_from_slice(&word.to_ne_bytes());
            }
            Ipv6Addr::from(bytes).into()
        }
    }
}

fn head(event: &Event) -> Bytes<'_> {
    let kept = usize::try_from(event.head_len).unwrap_or(HEAD).min(HEAD);
    Bytes::truncated(event.head.get(..kept).unwrap_or_default(), event.len)
}

/// The judged packet's IP header.
fn judged(event: &Event) -> Option<Ip> {
    let packet = head(event);
    let (ethertype, l3) = if event.flags & event_flag::BARE != 0 {
        (event.bare_ethertype, 0)
    } else {
        packet::ethernet(&packet, 0).ok()?
    };
    packet.ip(ethertype, l3).ok()
}

/// Addresses and ports of the judged packet in memory order.
pub fn endpoints(event: &Event) -> Option<conntrack::Endpoints> {
    let (packet, ip) = (head(event), judged(event)?);
    let (src, dst) = packet::addresses(&packet, &ip)?;
    Some(conntrack::Endpoints { src, dst, sport: packet.u16(ip.l4)?, dport: packet.u16(ip.l4 + 2)? })
}

/// The connection inside, and the packet's TCP flags: by the code that the kernel program runs.
pub fn connection(event: &Event) -> Option<(Connection, u8)> {
    let mut found = Connection::default();
    let flags = story::connection(&head(event), &judged(event)?, event.role, event.ifindex, &mut found)?;
    Some((found, flags))
}

/// Reads what an event says of the packets; what cannot be read is named in `missing`.
pub fn read(event: &Event, missing: &mut BTreeMap<&'static str, String>) -> Headers {
    let packet = head(event);
    let Some(ip) = judged(event) else {
        for section in ["outer", "inner"] {
            missing.insert(section, "the packet's first bytes could not be read".to_owned());
        }
        return Headers { outer: None, vni: None, inner: None };
    };
    if event.role != role::UPLINK {
        missing.insert("outer", "seen before it was encapsulated".to_owned());
        return Headers { outer: None, vni: None, inner: inner(&packet, &ip) };
    }
    let outer = endpoints(event).map(|endpoints| Endpoints {
        src: address(ip.family, &endpoints.src).to_string(),
        sport: u16::from_be(endpoints.sport),
        dst: address(ip.family, &endpoints.dst).to_string(),
        dport: u16::from_be(endpoints.dport),
    });
    let vxlan = packet::vxlan(&packet, ip.l4 + UDP);
    let inner = packet::inner(&packet, ip.l4).ok().and_then(|ip| inner(&packet, &ip));
    if inner.is_none() {
        missing.insert("inner", "not IP, or beyond the first bytes".to_owned());
    }
    Headers { outer, vni: vxlan.and_then(|vxlan| vxlan.vni), inner }
}

fn inner(packet: &Bytes<'_>, ip: &Ip) -> Option<Inner> {
    let (src, dst) = packet::addresses(packet, ip)?;
    let has_ports = has_ports(ip.proto) && ip.fragment != Fragment::Later;
    let port = |at: u32| has_ports.then(|| packet.u16(ip.l4 + at).map(u16::from_be)).flatten();
    let is_tcp = ip.proto == proto::TCP && has_ports;
    Some(Inner {
        proto: protocol(ip.proto),
        src: address(ip.family, &src).to_string(),
        sport: port(0),
        dst: address(ip.family, &dst).to_string(),
        dport: port(2),
        flags: is_tcp.then(|| packet.u8(ip.l4 + 13).map(tcp_flags)).flatten(),
        seq: is_tcp.then(|| packet.u32(ip.l4 + 4).map(u32::from_be)).flatten(),
    })
}

/// Whether a protocol has ports that vxmon knows.
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, proto::TCP | proto::UDP)
}

/// A protocol's name in events.
pub fn protocol(protocol: u8) -> String {
    match protocol {
        proto::TCP => "tcp".to_owned(),
        proto::UDP => "udp".to_owned(),
        proto::ICMP => "icmp".to_owned(),
        proto::ICMPV6 => "icmpv6".to_owned(),
        other => other.to_string(),
    }
}

/// As tcpdump writes them.
fn tcp_flags(bits: u8) -> String {
    const NAMES: [(u8, char); 8] =
        [(0x01, 'F'), (0x02, 'S'), (0x04, 'R'), (0x08, 'P'), (0x10, '.'), (0x20, 'U'), (0x40, 'E'), (0x80, 'W')];
    let flags: String = NAMES.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    if flags.is_empty() { "none".to_owned() } else { flags }
}
