//! What the kernel says of a namespace's devices at one moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::netlink::{
    Error, Protocol, Socket,
    address::{self, Address},
    fdb,
    link::{self, Link, Vxlan},
    nexthop::Nexthops,
    route::{self, Query, Route},
};

/// The most routes looked up for one snapshot. Each takes some 10 µs, and the destinations of a cluster share a few
/// routes: of more, this many are taken evenly.
pub const MAX_LOOKUPS: usize = 256;

/// Up to so many VXLAN devices, each is asked for its forwarding entries. The kernel walks all devices for each such
/// question, so of more, all entries are asked for at once, though those of bridges come too.
const ASKED_ONE_BY_ONE: usize = 16;

/// A route that was looked up, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// What was asked.
    pub query: Query,
    /// The route, or why there is none, in words.
    pub result: Result<Route, String>,
}

/// Devices, addresses, forwarding entries and routes of one network namespace. The parts were asked for one after the
/// other, so they may contradict each other where something changed meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// All devices.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<Address>,
    /// Forwarding entries of VXLAN devices (and maybe other tunnels), by the device's index.
    pub fdb: BTreeMap<u32, Vec<fdb::Entry>>,
    /// Next hop objects, if a forwarding entry refers to one.
    pub nexthops: Nexthops,
    /// Routes to where VXLAN devices without a lower device send.
    pub lookups: Vec<Lookup>,
    /// Devices of the default routes; asked for only if a VXLAN device has no lower device.
    pub default_devices: Vec<u32>,
    /// What could not be asked, or was asked in part, in words.
    pub notes: Vec<String>,
}

impl Snapshot {
    /// Takes one of the calling thread's network namespace.
    ///
    /// # Errors
    /// If the devices or addresses cannot be listed; what else fails is in [`Snapshot::notes`].
    pub fn take() -> Result<Self, Error> {
        Self::take_from(&mut Socket::open(Protocol::Route)?)
    }

    /// Takes one of the namespace to which a route socket belongs.
    ///
    /// # Errors
    /// As [`Snapshot::take`].
    pub fn take_from(socket: &mut Socket) -> Result<Self, Error> {
        let mut snapshot =
            Self { links: link::links(socket)?, addresses: address::addresses(socket)?, ..Self::default() };
        snapshot.ask_fdb(socket);
        snapshot.ask_routes(socket);
        Ok(snapshot)
    }

    /// The device with that index.
    #[must_use]
    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }

    /// The VXLAN devices and their settings.
    pub fn vxlans(&self) -> impl Iterator<Item = (&Link, &Vxlan)> {
        self.links.iter().filter_map(|link| Some((link, link.vxlan.as_ref()?)))
    }

    /// The forwarding entries of a VXLAN device.
    pub(super) fn entries(&self, ifindex: u32) -> &[fdb::Entry] {
        self.fdb.get(&ifindex).map(Vec::as_slice).unwrap_or_default()
    }

    fn ask_fdb(&mut self, socket: &mut Socket) {
        let vxlans: Vec<(u32, String)> = self.vxlans().map(|(link, _)| (link.ifindex, link.name.clone())).collect();
        if vxlans.len() > ASKED_ONE_BY_ONE {
            match fdb::all(socket) {
                Ok(entries) => {
                    entries.into_iter().for_each(|entry| self.fdb.entry(entry.ifindex).or_default().push(entry));
                }
                Err(error) => self.notes.push(error.to_string()),
            }
        } else {
            for (ifindex, name) in vxlans {
                match fdb::entries(socket, ifindex) {
                    Ok(entries) => drop(self.fdb.insert(ifindex, entries)),
                    Err(error) => self.notes.push(format!("{name}: {error}")),
                }
            }
        }
        if self.fdb.values().flatten().any(|entry| entry.nexthop.is_some()) {
            match Nexthops::list(socket) {
                Ok(nexthops) => self.nexthops = nexthops,
                Err(error) => self.notes.push(error.to_string()),
            }
        }
    }

    fn ask_routes(&mut self, socket: &mut Socket) {
        let queries: BTreeSet<Query> = self.vxlans().flat_map(|(link, vxlan)| self.queries(link, vxlan)).collect();
        let all: Vec<Query> = queries.into_iter().collect();
        let chosen = sample(&all, MAX_LOOKUPS);
        if chosen.len() < all.len() {
            self.notes.push(format!(
                "VXLAN devices without a lower device send to {} destinations; the routes to {} of them were looked up",
                all.len(),
                chosen.len()
            ));
        }
        self.lookups = chosen.into_iter().map(|query| look_up(socket, query)).collect();
        if self.vxlans().any(|(link, vxlan)| self.needs_routes(link, vxlan)) {
            match route::default_devices(socket) {
                Ok(devices) => self.default_devices = devices,
                Err(error) => self.notes.push(error.to_string()),
            }
        }
    }

    /// Whether routes of this namespace decide where the device's packets leave.
    pub(super) fn needs_routes(&self, link: &Link, vxlan: &Vxlan) -> bool {
        // A VRF is no device to leave by: it only chooses the table.
        link.link_netnsid.is_none() && vxlan.lower.is_none_or(|lower| self.is_vrf(lower))
    }

    pub(super) fn is_vrf(&self, ifindex: u32) -> bool {
        self.link(ifindex).is_some_and(|link| link.kind == "vrf")
    }

    /// The routes that decide where the device's packets leave, one for each destination.
    pub(super) fn queries(&self, link: &Link, vxlan: &Vxlan) -> Vec<Query> {
        if !self.needs_routes(link, vxlan) {
            return Vec::new();
        }
        let query = |destination, port| Query { destination, source: vxlan.local, via: vxlan.lower, port: Some(port) };
        let entries = self.entries(link.ifindex).iter().filter(|entry| entry.via.is_none());
        let remotes = entries.flat_map(|entry| {
            let port = entry.port.unwrap_or(vxlan.port);
            self.remotes(entry).into_iter().map(move |remote| query(remote, port))
        });
        let mut queries: Vec<Query> = vxlan.remote.map(|remote| query(remote, vxlan.port)).into_iter().collect();
        queries.extend(remotes);
        queries.sort_unstable();
        queries.dedup();
        queries
    }

    /// Where a forwarding entry sends to.
    fn remotes(&self, entry: &fdb::Entry) -> Vec<IpAddr> {
        match (entry.remote, entry.nexthop) {
            (Some(remote), _) => vec![remote],
            (None, Some(id)) => self.nexthops.gateways(id),
            (None, None) => Vec::new(),
        }
    }
}

fn look_up(socket: &mut Socket, query: Query) -> Lookup {
    let found = route::lookup(socket, &query).or_else(|error| {
        // A source that is not (or not yet) an address of this host cannot be asked with, only without.
        let without = Query { source: None, ..query };
        if query.source.is_some() { route::lookup(socket, &without) } else { Err(error) }
    });
    Lookup { query, result: found.map_err(|error| error.to_string()) }
}

/// At most `limit` of them, evenly.
pub(super) fn sample<T: Copy>(all: &[T], limit: usize) -> Vec<T> {
    if all.len() <= limit {
        return all.to_vec();
    }
    (0..limit).filter_map(|position| all.get(position * all.len() / limit)).copied().collect()
}
