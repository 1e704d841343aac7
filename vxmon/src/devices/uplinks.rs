//! The devices by which one VXLAN device's packets leave, and why.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Snapshot, stack};
use crate::netlink::link::{Link, Vxlan};

/// The uplinks of one VXLAN device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Uplinks {
    /// Reasons by device index.
    pub(super) why: BTreeMap<u32, Vec<String>>,
    /// What stood in the way of knowing more.
    pub(super) notes: Vec<String>,
}

impl Uplinks {
    fn add(&mut self, ifindex: u32, why: String) {
        self.why.entry(ifindex).or_default().push(why);
    }
}

/// Finds the uplinks of a VXLAN device. Loopback is none: what goes there stays on this host.
pub(super) fn of(snapshot: &Snapshot, device: &Link, vxlan: &Vxlan) -> Uplinks {
    let mut uplinks = Uplinks::default();
    let name = &device.name;
    if device.link_netnsid.is_some() {
        uplinks.notes.push(format!("the packets of {name} leave in another network namespace; watch them there"));
        return uplinks;
    }
    for entry in snapshot.entries(device.ifindex) {
        if let Some(via) = entry.via.filter(|via| !uplinks.why.contains_key(via)) {
            uplinks.add(via, format!("named by a forwarding entry of {name}"));
        }
    }
    if snapshot.needs_routes(device, vxlan) {
        by_routes(snapshot, device, vxlan, &mut uplinks);
    } else if let Some(lower) = vxlan.lower {
        uplinks.add(lower, format!("lower device of {name}"));
    }
    uplinks
        .why
        .retain(|ifindex, _| *ifindex != device.ifindex && snapshot.link(*ifindex).is_some_and(|link| !link.loopback));
    if uplinks.why.is_empty() {
        uplinks.notes.push(format!("no device is known by which packets of {name} leave this host"));
    }
    uplinks
}

/// A device that is not bound to another: routes decide, for each destination.
fn by_routes(snapshot: &Snapshot, device: &Link, vxlan: &Vxlan, uplinks: &mut Uplinks) {
    let name = &device.name;
    by_destinations(snapshot, device, vxlan, uplinks);
    let holders = snapshot.addresses.iter().filter(|address| Some(address.address) == vxlan.local);
    for holder in holders.filter_map(|address| snapshot.link(address.ifindex)) {
        // Nothing leaves by those two: they hold addresses that are reachable by several devices.
        if !holder.loopback && holder.kind != "dummy" {
            let local = vxlan.local.map(|address| address.to_string()).unwrap_or_default();
            uplinks.add(holder.ifindex, format!("holds {local}, the local address of {name}"));
        }
    }
    if vxlan.external {
        by_addresses(snapshot, name, uplinks);
    }
    if vxlan.external || uplinks.why.is_empty() {
        for ifindex in &snapshot.default_devices {
            uplinks.add(*ifindex, format!("default route, as destinations of {name} are not known"));
        }
    }
}

fn by_destinations(snapshot: &Snapshot, device: &Link, vxlan: &Vxlan, uplinks: &mut Uplinks) {
    let name = &device.name;
    let queries = snapshot.queries(device, vxlan);
    let mut routes: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
    let mut failed = Vec::new();
    for lookup in snapshot.lookups.iter().filter(|lookup| queries.binary_search(&lookup.query).is_ok()) {
        match &lookup.result {
            Ok(route) if route.local => {}
            Ok(route) => {
                for ifindex in &route.devices {
                    routes.entry(*ifindex).or_default().push(lookup.query.destination);
                }
            }
            Err(error) => failed.push(error),
        }
    }
    for (ifindex, destinations) in routes {
        if let Some(list) = listed(&destinations) {
            uplinks.add(ifindex, format!("route of {name} to {list}"));
        }
    }
    if let Some(first) = failed.first() {
        let others = failed.len() - 1;
        let more = if others == 0 { String::new() } else { format!(", and {others} more such errors") };
        uplinks.notes.push(format!("{name}: {first}{more}"));
    }
}

/// Who takes the destination from each packet's metadata can send by any device that reaches other hosts. Missing the one
/// that is used would be a silent miss, while a device too many costs a few nanoseconds for each of its packets.
fn by_addresses(snapshot: &Snapshot, name: &str, uplinks: &mut Uplinks) {
    for address in snapshot.addresses.iter().filter(|address| address.is_global()) {
        let known = uplinks.why.contains_key(&address.ifindex);
        if !known && stack::is_on_hardware(snapshot, address.ifindex) {
            uplinks.add(address.ifindex, format!("holds {}, and {name} can send by any device", address.address));
        }
    }
}

/// "a", "a and 1 other", "a and 2 others".
fn listed(destinations: &[IpAddr]) -> Option<String> {
    let (first, others) = destinations.split_first()?;
    Some(match others.len() {
        0 => first.to_string(),
        1 => format!("{first} and 1 other"),
        more => format!("{first} and {more} others"),
    })
}
