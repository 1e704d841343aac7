//! The decision: which devices to watch, as what, and why.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Snapshot, stack,
    uplinks::{self, Uplinks},
};
use crate::netlink::link::{Link, Vxlan};

/// How many devices are named in [`Plan::looked_at`].
const NAMED_DEVICES: usize = 12;

/// What the user asked to be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Every VXLAN device, and the uplinks its packets leave by.
    Auto,
    /// Exactly the devices with these names (or alternative names).
    Named(Vec<String>),
}

/// What a watched device's packets are to vxmon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// VXLAN packets leave by it, among others: the outer checksum is judged.
    Uplink,
    /// A VXLAN device: the frames that it is going to encapsulate are judged.
    Vxlan,
}

impl Role {
    /// As the event schema writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Vxlan => "vxlan",
        }
    }
}

/// A device to watch. Two that are equal need no new attachment; one with the same name and another index does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// Index of the device.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// What its packets are.
    pub role: Role,
    /// A VXLAN device by which packets of another VXLAN device leave: it is both.
    pub also_uplink: bool,
    /// Kind as `ip link add … type KIND` has it; empty for hardware and loopback.
    pub kind: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Frames begin with an Ethernet header; else (WireGuard, tun, ipip) with the IP header.
    pub l2: bool,
    /// Administratively up.
    pub up: bool,
    /// Indexes of other watched uplinks that lie on this one (VLANs and macvlans on it, the bond or bridge it is a port
    /// of, and what lies on those), ascending. A packet that left by one of them passes here a second time.
    pub above: Vec<u32>,
    /// Why it is watched, in words.
    pub why: Vec<String>,
    /// The settings of a VXLAN device.
    pub vxlan: Option<Vxlan>,
}

/// A VXLAN device of the namespace, watched or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Index of the device.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its settings.
    pub settings: Vxlan,
    /// Its packets leave in another network namespace.
    pub elsewhere: bool,
    /// Indexes of the uplinks by which its packets leave, ascending.
    pub uplinks: Vec<u32>,
}

/// What to watch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The devices to watch, by index.
    pub watches: Vec<Watch>,
    /// Selected names that no device has.
    pub missing: Vec<String>,
    /// UDP destination ports of VXLAN devices (host byte order), and whether a zero outer checksum over IPv6 from this
    /// host to that port would be wrong: so it is if no device on the port is allowed to send one (`udp6zerocsumtx`),
    /// or leaves it to each packet's metadata.
    pub ports: BTreeMap<u16, bool>,
    /// All VXLAN devices of the namespace.
    pub vxlans: Vec<VxlanDevice>,
    /// What could not be found out, or is watched in part, in words.
    pub notes: Vec<String>,
    /// The devices looked at, in words, for saying that there is no VXLAN device among them.
    pub looked_at: String,
}

/// Decides what to watch.
#[must_use]
pub fn plan(snapshot: &Snapshot, selection: &Selection) -> Plan {
    let uplinks: BTreeMap<u32, Uplinks> =
        snapshot.vxlans().map(|(link, vxlan)| (link.ifindex, uplinks::of(snapshot, link, vxlan))).collect();
    let (mut why, missing) = match selection {
        Selection::Auto => (automatic(snapshot, &uplinks), Vec::new()),
        Selection::Named(names) => named(snapshot, names),
    };
    let carriers: BTreeSet<u32> = uplinks.values().flat_map(|uplinks| uplinks.why.keys()).copied().collect();
    let watches = snapshot.links.iter().filter_map(|link| {
        let why = why.remove(&link.ifindex)?;
        Some(watch(link, why, carriers.contains(&link.ifindex)))
    });
    let mut watches: Vec<Watch> = watches.collect();
    set_above(snapshot, &mut watches);
    let mut notes = snapshot.notes.clone();
    if *selection == Selection::Auto {
        notes.extend(uplinks.values().flat_map(|uplinks| uplinks.notes.iter().cloned()));
    } else {
        let has_uplink = watches.iter().any(|watch| watch.role == Role::Uplink);
        notes.extend(watches.iter().filter(|watch| watch.role == Role::Vxlan && !has_uplink).map(|watch| {
            format!(
                "{} shows only what goes into the tunnel; outer checksums are judged where packets leave: name the \
                 uplink too, or no device at all",
                watch.name
            )
        }));
    }
    Plan {
        watches,
        missing,
        ports: ports(snapshot),
        vxlans: vxlans(snapshot, &uplinks),
        notes,
        looked_at: looked_at(snapshot),
    }
}

/// Reasons by device index: every VXLAN device, and what carries its packets.
fn automatic(snapshot: &Snapshot, uplinks: &BTreeMap<u32, Uplinks>) -> BTreeMap<u32, Vec<String>> {
    let mut all: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for (link, _) in snapshot.vxlans() {
        all.entry(link.ifindex).or_default().push("VXLAN device".into());
    }
    for (ifindex, why) in uplinks.values().flat_map(|uplinks| &uplinks.why) {
        all.entry(*ifindex).or_default().extend(why.iter().cloned());
    }
    all
}

/// Reasons by device index for the selected names, and the names that no device has.
fn named(snapshot: &Snapshot, names: &[String]) -> (BTreeMap<u32, Vec<String>>, Vec<String>) {
    let (mut found, mut missing) = (BTreeMap::new(), Vec::new());
    for name in names {
        let mut links = snapshot.links.iter();
        match links.find(|link| link.name == *name || link.alternative_names.contains(name)) {
            Some(link) => {
                found.insert(link.ifindex, vec!["named".to_owned()]);
            }
            None if missing.contains(name) => {}
            None => missing.push(name.clone()),
        }
    }
    (found, missing)
}

fn watch(link: &Link, why: Vec<String>, carries: bool) -> Watch {
    let role = if link.vxlan.is_some() { Role::Vxlan } else { Role::Uplink };
    Watch {
        ifindex: link.ifindex,
        name: link.name.clone(),
        role,
        also_uplink: role == Role::Vxlan && carries,
        kind: link.kind.clone(),
        mtu: link.mtu,
        l2: link.has_ethernet_header(),
        up: link.up,
        above: Vec::new(),
        why,
        vxlan: link.vxlan.clone(),
    }
}

fn set_above(snapshot: &Snapshot, watches: &mut [Watch]) {
    let is_uplink = |watch: &Watch| watch.role == Role::Uplink || watch.also_uplink;
    let uplinks: BTreeSet<u32> = watches.iter().filter(|watch| is_uplink(watch)).map(|watch| watch.ifindex).collect();
    for watch in watches.iter_mut().filter(|watch| is_uplink(watch)) {
        watch.above = stack::above(snapshot, watch.ifindex);
        watch.above.retain(|ifindex| uplinks.contains(ifindex));
    }
}

fn ports(snapshot: &Snapshot) -> BTreeMap<u16, bool> {
    let mut ports = BTreeMap::new();
    for (link, vxlan) in snapshot.vxlans() {
        let is_wrong = !vxlan.zero_csum6_tx && !vxlan.external;
        // A forwarding entry can have a port of its own (bridge fdb … dst ADDRESS port PORT).
        let entries = snapshot.fdb.get(&link.ifindex).map(Vec::as_slice).unwrap_or_default();
        for port in std::iter::once(vxlan.port).chain(entries.iter().filter_map(|entry| entry.port)) {
            ports.entry(port).and_modify(|all| *all &= is_wrong).or_insert(is_wrong);
        }
    }
    ports
}

fn vxlans(snapshot: &Snapshot, uplinks: &BTreeMap<u32, Uplinks>) -> Vec<VxlanDevice> {
    let device = |(link, settings): (&Link, &Vxlan)| VxlanDevice {
        ifindex: link.ifindex,
        name: link.name.clone(),
        settings: settings.clone(),
        elsewhere: link.link_netnsid.is_some(),
        uplinks: uplinks.get(&link.ifindex).map(|uplinks| uplinks.why.keys().copied().collect()).unwrap_or_default(),
    };
    snapshot.vxlans().map(device).collect()
}

fn looked_at(snapshot: &Snapshot) -> String {
    let kind = |link: &Link| match link.kind.as_str() {
        "" if link.loopback => "loopback".to_owned(),
        "" => "hardware".to_owned(),
        kind => kind.to_owned(),
    };
    let name = |link: &Link| format!("{} ({})", link.name, kind(link));
    let names: Vec<String> = snapshot.links.iter().take(NAMED_DEVICES).map(name).collect();
    match snapshot.links.len().saturating_sub(NAMED_DEVICES) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}
