//! Where packets go: the route to one destination, and the devices of the default routes. It never changes one.

use std::net::IpAddr;

use netlink_packet_core::Emitable;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage},
};
use nix::{errno::Errno, libc};

use super::{
    Error, Socket,
    attribute::{Value, attributes_after},
    nexthop::Nexthops,
    socket::Reply,
};

/// Attributes of a route, include/uapi/linux/rtnetlink.h.
mod rta {
    pub(super) const OIF: u16 = 4;
    pub(super) const MULTIPATH: u16 = 9;
    pub(super) const TABLE: u16 = 15;
    pub(super) const NH_ID: u16 = 30;
}

/// Length of struct rtnexthop in bytes: length (2), flags, hops, device index (4).
const RTNEXTHOP: usize = 8;

/// What to look up: the packet that a VXLAN device would send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Query {
    /// Destination.
    pub destination: IpAddr,
    /// Source address, if it is fixed.
    pub source: Option<IpAddr>,
    /// Device to leave by, if it is fixed.
    pub via: Option<u32>,
    /// UDP destination port, host byte order: rules can choose a table by it.
    pub port: Option<u16>,
}

impl std::fmt::Display for Query {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the route to {}", self.destination)?;
        if let Some(source) = self.source {
            write!(formatter, " from {source}")?;
        }
        if let Some(via) = self.via {
            write!(formatter, " by the device with index {via}")?;
        }
        Ok(())
    }
}

/// Where packets to one destination go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// They stay on this host.
    pub local: bool,
    /// Indexes of the devices by which they can leave, ascending; several if the route has several next hops.
    pub devices: Vec<u32>,
}

/// Looks up a route as the kernel would for such a packet, with all its next hops and not only the one that this packet
/// would take: VXLAN spreads its flows over source ports, so all are used.
///
/// # Errors
/// [`Error::Refused`] with `ENETUNREACH` or `EHOSTUNREACH` if there is none, with `EINVAL` if the source is not an address
/// of this namespace; otherwise see [`Socket::request`].
pub fn lookup(socket: &mut Socket, query: &Query) -> Result<Route, Error> {
    // The matching entry of the table, with all next hops (since 4.13; older kernels ignore the flag).
    let matched = ask(socket, query, RouteFlags::FibMatch);
    match matched {
        Ok(route) if route.local || !route.devices.is_empty() => Ok(route),
        // There need not be an entry: a fixed device without a route means that the destination is on its link.
        _ => ask(socket, query, RouteFlags::empty()),
    }
}

fn ask(socket: &mut Socket, query: &Query, flags: RouteFlags) -> Result<Route, Error> {
    let mut message = RouteMessage::default();
    message.header.flags = flags;
    (message.header.address_family, message.header.destination_prefix_length) = family(query.destination);
    message.attributes.push(RouteAttribute::Destination(query.destination.into()));
    if let Some(source) = query.source.filter(|source| source.is_ipv4() == query.destination.is_ipv4()) {
        message.header.source_prefix_length = message.header.destination_prefix_length;
        message.attributes.push(RouteAttribute::Source(source.into()));
    }
    if let Some(via) = query.via {
        message.attributes.push(RouteAttribute::Oif(via));
    }
    if let Some(port) = query.port {
        // Since 4.18; older kernels ignore them.
        message.attributes.push(RouteAttribute::IpProto(libc::IPPROTO_UDP as u8));
        message.attributes.push(RouteAttribute::Dport(port));
    }
    let found = socket.request(&format!("look up {query}"), 0, &RouteNetlinkMessage::GetRoute(message), |reply| {
        decode(reply, None)
    })?;
    Ok(found.into_iter().next().map(|entry| entry.route).unwrap_or_default())
}

fn family(address: IpAddr) -> (AddressFamily, u8) {
    match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    }
}

/// Indexes of the devices of the default routes, ascending: those of the main tables of IPv4 and IPv6, or if these have
/// none, those of any other table (policy routing).
///
/// # Errors
/// See [`Socket::dump`]. A missing address family or table is none.
pub fn default_devices(socket: &mut Socket) -> Result<Vec<u32>, Error> {
    let nexthops = Nexthops::list(socket)?;
    for table in [RouteHeader::RT_TABLE_MAIN, RouteHeader::RT_TABLE_UNSPEC] {
        let mut devices = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            devices.extend(default_devices_of(socket, family, table, &nexthops)?);
        }
        devices.sort_unstable();
        devices.dedup();
        if !devices.is_empty() {
            return Ok(devices);
        }
    }
    Ok(Vec::new())
}

/// The devices of the default routes of one family in one table; in all tables, if that is 0.
fn default_devices_of(
    socket: &mut Socket,
    family: AddressFamily,
    table: u8,
    nexthops: &Nexthops,
) -> Result<Vec<u32>, Error> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    // A filter for kernels with strict checking (4.20); others send all tables.
    message.header.table = table;
    let request = format!("list {family:?} routes");
    let found = socket.dump(&request, &RouteNetlinkMessage::GetRoute(message), |reply| {
        let entry = decode(reply, Some(nexthops))?;
        let wanted = table == RouteHeader::RT_TABLE_UNSPEC || entry.table == u32::from(table);
        (entry.is_default && wanted).then_some(entry.route.devices)
    });
    match found {
        Ok(devices) => Ok(devices.into_iter().flatten().collect()),
        // Kernels with strict checking refuse a table that does not exist (yet).
        Err(error) if error.is_unsupported() || error.errno() == Some(Errno::ENOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A route message, as far as it matters here.
struct Entry {
    route: Route,
    table: u32,
    /// It leads somewhere and matches every destination.
    is_default: bool,
}

fn decode(reply: Reply<'_>, nexthops: Option<&Nexthops>) -> Option<Entry> {
    if reply.kind != libc::RTM_NEWROUTE {
        return None;
    }
    let header = RouteHeader::parse(reply.payload).ok()?;
    let kind = u8::from(header.kind);
    let mut entry = Entry {
        route: Route { local: kind == libc::RTN_LOCAL, devices: Vec::new() },
        table: header.table.into(),
        is_default: kind == libc::RTN_UNICAST && header.destination_prefix_length == 0,
    };
    for (kind, value) in attributes_after(header.buffer_len(), reply.payload) {
        match kind {
            rta::OIF => entry.route.devices.extend(value.u32()),
            rta::MULTIPATH => entry.route.devices.extend(multipath(value)),
            rta::TABLE => entry.table = value.u32().unwrap_or(entry.table),
            // Said in addition to the device, unless net.ipv4.nexthop_compat_mode is 0.
            rta::NH_ID => {
                let ids = nexthops.zip(value.u32());
                entry.route.devices.extend(ids.into_iter().flat_map(|(nexthops, id)| nexthops.devices(id)));
            }
            _ => {}
        }
    }
    entry.route.devices.retain(|index| *index != 0);
    entry.route.devices.sort_unstable();
    entry.route.devices.dedup();
    Some(entry)
}

/// The device indexes of a `RTA_MULTIPATH`: struct rtnexthop, its attributes, the next one.
fn multipath(value: Value<'_>) -> Vec<u32> {
    let mut devices = Vec::new();
    let mut rest = value.0;
    while let Some((head, _)) = rest.split_first_chunk::<RTNEXTHOP>() {
        let [low, high, _flags, _hops, index @ ..] = *head;
        devices.push(u32::from_ne_bytes(index));
        let length = usize::from(u16::from_ne_bytes([low, high]));
        if length < RTNEXTHOP {
            break;
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip route add 10.9.0.0/16 nexthop via 10.0.100.1 dev eth0 nexthop via 10.0.101.1 dev eth1`, then what Linux 6.18
    /// answers to `ip route get fibmatch 10.9.1.1`.
    #[rustfmt::skip]
    const MULTIPATH: [u8; 64] = [
        2, 16, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0,  // struct rtmsg: AF_INET, /16, main, RTPROT_BOOT, RTN_UNICAST
        8, 0, 15, 0, 254, 0, 0, 0,              // RTA_TABLE
        8, 0, 1, 0, 10, 9, 0, 0,                // RTA_DST
        36, 0, 9, 0,                            // RTA_MULTIPATH
        16, 0, 0, 0, 3, 0, 0, 0,                // struct rtnexthop: device 3
        8, 0, 5, 0, 10, 0, 100, 1,              // RTA_GATEWAY
        16, 0, 0, 0, 5, 0, 0, 0,                // struct rtnexthop: device 5
        8, 0, 5, 0, 10, 0, 101, 1,              // RTA_GATEWAY
    ];

    /// What it answers to `ip route get fibmatch 10.0.100.3`, its own address: the device is not loopback here.
    #[rustfmt::skip]
    const LOCAL: [u8; 44] = [
        2, 32, 0, 0, 254, 2, 254, 2, 0, 0, 0, 0, // struct rtmsg: AF_INET, /32, RTN_LOCAL
        8, 0, 15, 0, 254, 0, 0, 0,               // RTA_TABLE
        8, 0, 1, 0, 10, 0, 100, 3,               // RTA_DST
        8, 0, 7, 0, 10, 0, 100, 3,               // RTA_PREFSRC
        8, 0, 4, 0, 3, 0, 0, 0,                  // RTA_OIF
    ];

    fn read(payload: &[u8]) -> Option<Entry> {
        decode(Reply { kind: libc::RTM_NEWROUTE, payload }, None)
    }

    #[test]
    fn all_next_hops_count() {
        let entry = read(&MULTIPATH);
        assert_eq!(entry.as_ref().map(|entry| entry.route.devices.as_slice()), Some([3, 5].as_slice()));
        assert_eq!(entry.map(|entry| (entry.table, entry.is_default, entry.route.local)), Some((254, false, false)));
    }

    #[test]
    fn an_own_address_is_local() {
        assert_eq!(read(&LOCAL).map(|entry| entry.route.local), Some(true));
    }

    #[test]
    fn only_a_route_that_leads_somewhere_is_a_default_route() {
        let mut route = MULTIPATH;
        route[1] = 0;
        assert_eq!(read(&route).map(|entry| entry.is_default), Some(true));
        route[7] = libc::RTN_UNREACHABLE;
        assert_eq!(read(&route).map(|entry| entry.is_default), Some(false));
    }

    #[test]
    fn cut_or_changed_anywhere_it_never_panics() {
        for length in 0..MULTIPATH.len() {
            let _ = read(&MULTIPATH[..length]);
            for byte in [0, 1, 3, 7, 9, 0x7f, 0xff] {
                let mut changed = MULTIPATH;
                changed[length] = byte;
                let _ = read(&changed);
            }
        }
    }
}
