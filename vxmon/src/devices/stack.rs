//! Which device lies on which, as far as one packet passes both: a VLAN and its parent, a bond and its ports.

use std::collections::BTreeSet;

use super::Snapshot;
use crate::netlink::link::Link;

/// Kinds whose packets pass the device that IFLA_LINK names, still recognisable. Not veth, whose IFLA_LINK is its peer, and
/// not tunnels and MACsec, which hide the packet in another.
const ON_LINK: [&str; 5] = ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"];

/// Kinds of masters whose own packets leave by their ports. Not VRF, whose egress hook packets do not pass
/// (`vrf_ip_out_direct`, drivers/net/vrf.c), and not Open vSwitch, where the port's master is not the device sent by.
const OF_PORTS: [&str; 4] = ["bond", "bridge", "team", "hsr"];

/// The devices that lie directly on this one.
fn on<'a>(snapshot: &'a Snapshot, below: &Link) -> impl Iterator<Item = &'a Link> {
    let (ifindex, master) = (below.ifindex, below.master);
    snapshot.links.iter().filter(move |link| {
        let is_on_link =
            link.link == Some(ifindex) && link.link_netnsid.is_none() && ON_LINK.contains(&link.kind.as_str());
        let is_master = master == Some(link.ifindex) && OF_PORTS.contains(&link.kind.as_str());
        (is_on_link || is_master) && link.ifindex != ifindex
    })
}

/// Indexes of all devices that lie on this one, directly or not, ascending.
pub(super) fn above(snapshot: &Snapshot, ifindex: u32) -> Vec<u32> {
    let mut found = BTreeSet::new();
    let mut next: Vec<&Link> = snapshot.link(ifindex).into_iter().collect();
    while let Some(link) = next.pop() {
        next.extend(on(snapshot, link).filter(|upper| found.insert(upper.ifindex)));
    }
    found.remove(&ifindex);
    found.into_iter().collect()
}

/// Whether the device is hardware, or lies on hardware.
pub(super) fn is_on_hardware(snapshot: &Snapshot, ifindex: u32) -> bool {
    let hardware = |link: &&Link| link.kind.is_empty() && !link.loopback && link.has_ethernet_header();
    let mut all = snapshot.links.iter().filter(hardware);
    all.any(|link| link.ifindex == ifindex || above(snapshot, link.ifindex).contains(&ifindex))
}
