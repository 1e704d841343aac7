//! Plans of snapshots made by hand, one for each way in which nodes are wired.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Lookup, Plan, Role, Selection, Snapshot, Watch, plan, snapshot};
use crate::netlink::{
    address::Address,
    fdb,
    link::{Link, Vxlan},
    route::{Query, Route},
};

const ETHERNET: u16 = 1;
const NONE: u16 = 65534;
const LOOPBACK: u16 = 772;

fn link(ifindex: u32, name: &str, kind: &str) -> Link {
    Link { ifindex, name: name.into(), kind: kind.into(), hardware: ETHERNET, up: true, mtu: 1500, ..Link::default() }
}

fn loopback() -> Link {
    Link { loopback: true, hardware: LOOPBACK, ..link(1, "lo", "") }
}

fn vxlan(ifindex: u32, name: &str, settings: Vxlan) -> Link {
    Link { vxlan: Some(settings), mtu: 1450, ..link(ifindex, name, "vxlan") }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::from([0; 4]))
}

fn address(ifindex: u32, text: &str) -> Address {
    Address { ifindex, address: ip(text), prefix: 24, scope: 0 }
}

fn entry(ifindex: u32, remote: &str) -> fdb::Entry {
    fdb::Entry { ifindex, remote: Some(ip(remote)), ..fdb::Entry::default() }
}

fn fdb(entries: &[fdb::Entry]) -> BTreeMap<u32, Vec<fdb::Entry>> {
    let mut fdb: BTreeMap<u32, Vec<fdb::Entry>> = BTreeMap::new();
    for entry in entries {
        fdb.entry(entry.ifindex).or_default().push(*entry);
    }
    fdb
}

fn query(destination: &str, source: Option<&str>, port: u16) -> Query {
    Query { destination: ip(destination), source: source.map(ip), via: None, port: Some(port) }
}

fn leads(query: Query, devices: &[u32]) -> Lookup {
    Lookup { query, result: Ok(Route { local: false, devices: devices.to_vec() }) }
}

fn flannel(lower: u32) -> Vxlan {
    Vxlan { vni: 1, lower: Some(lower), port: 8472, local: Some(ip("10.0.100.3")), udp_csum: true, ..Vxlan::default() }
}

fn calico() -> Vxlan {
    Vxlan { vni: 4096, port: 4789, local: Some(ip("10.0.100.3")), udp_csum: true, ..Vxlan::default() }
}

fn auto(snapshot: &Snapshot) -> Plan {
    plan(snapshot, &Selection::Auto)
}

fn names(plan: &Plan, role: Role) -> Vec<&str> {
    plan.watches.iter().filter(|watch| watch.role == role).map(|watch| watch.name.as_str()).collect()
}

fn watch<'a>(plan: &'a Plan, name: &str) -> Option<&'a Watch> {
    plan.watches.iter().find(|watch| watch.name == name)
}

fn why(plan: &Plan, name: &str) -> String {
    watch(plan, name).map(|watch| watch.why.join("; ")).unwrap_or_default()
}

#[test]
fn flannel_has_a_lower_device() {
    let snapshot = Snapshot {
        links: vec![loopback(), link(2, "eth0", ""), link(3, "eth1", ""), vxlan(4, "flannel.1", flannel(2))],
        addresses: vec![address(2, "10.0.100.3"), address(3, "10.0.200.3")],
        // No route matters: eth1 does not carry its packets.
        default_devices: vec![3],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Vxlan), ["flannel.1"]);
    assert_eq!(names(&plan, Role::Uplink), ["eth0"]);
    assert_eq!(why(&plan, "eth0"), "lower device of flannel.1");
    assert_eq!(plan.ports.into_iter().collect::<Vec<_>>(), [(8472, true)]);
    assert_eq!(plan.notes, [""; 0]);
    assert_eq!(plan.looked_at, "lo (loopback), eth0 (hardware), eth1 (hardware), flannel.1 (vxlan)");
    assert_eq!(
        plan.vxlans.first().map(|device| (device.ifindex, device.uplinks.as_slice())),
        Some((4, [2].as_slice()))
    );
}

#[test]
fn calico_has_only_a_local_address() {
    let from = Some("10.0.100.3");
    let snapshot = Snapshot {
        links: vec![loopback(), link(2, "eth0", ""), link(3, "eth1", ""), vxlan(4, "vxlan.calico", calico())],
        addresses: vec![address(1, "127.0.0.1"), address(2, "10.0.100.3")],
        fdb: fdb(&["10.0.100.15", "10.0.100.16", "10.0.200.17", "10.0.100.3"].map(|remote| entry(4, remote))),
        lookups: vec![
            leads(query("10.0.100.15", from, 4789), &[2]),
            leads(query("10.0.100.16", from, 4789), &[2]),
            leads(query("10.0.200.17", from, 4789), &[2, 3]),
            Lookup { query: query("10.0.100.3", from, 4789), result: Ok(Route { local: true, devices: vec![1] }) },
        ],
        default_devices: vec![2],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0", "eth1"]);
    assert_eq!(
        why(&plan, "eth0"),
        "route of vxlan.calico to 10.0.100.15 and 2 others; holds 10.0.100.3, the local address of vxlan.calico"
    );
    assert_eq!(why(&plan, "eth1"), "route of vxlan.calico to 10.0.200.17");
    assert_eq!(plan.notes, [""; 0]);
}

#[test]
fn without_any_hint_the_default_route_counts() {
    let settings = Vxlan { vni: 7, port: 4789, ..Vxlan::default() };
    let snapshot = Snapshot {
        links: vec![loopback(), link(2, "eth0", ""), vxlan(4, "vx7", settings)],
        addresses: vec![address(2, "10.0.100.3")],
        default_devices: vec![2],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0"]);
    assert_eq!(why(&plan, "eth0"), "default route, as destinations of vx7 are not known");
}

#[test]
fn a_local_address_on_loopback_names_no_uplink() {
    let from = Some("10.255.0.1");
    let settings = Vxlan { local: Some(ip("10.255.0.1")), ..calico() };
    let snapshot = Snapshot {
        links: vec![loopback(), link(2, "eth0", ""), link(3, "dummy0", "dummy"), vxlan(4, "vni10", settings)],
        addresses: vec![address(1, "10.255.0.1"), address(3, "10.255.0.1"), address(2, "10.0.0.1")],
        fdb: fdb(&[entry(4, "10.255.0.2"), entry(4, "10.255.0.3")]),
        lookups: vec![
            leads(query("10.255.0.2", from, 4789), &[2]),
            Lookup { query: query("10.255.0.3", from, 4789), result: Err("no route".into()) },
        ],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0"]);
    assert_eq!(plan.notes, ["vni10: no route"]);
}

#[test]
fn a_remote_and_an_entry_with_its_own_device() {
    let settings = Vxlan { remote: Some(ip("fd00::2")), local: None, ..calico() };
    let snapshot = Snapshot {
        links: vec![loopback(), link(2, "eth0", ""), link(3, "eth1", ""), vxlan(4, "vx0", settings)],
        fdb: fdb(&[
            fdb::Entry { via: Some(3), ..entry(4, "fd01::9") },
            fdb::Entry { port: Some(9999), ..entry(4, "fd00::3") },
        ]),
        lookups: vec![leads(query("fd00::2", None, 4789), &[2]), leads(query("fd00::3", None, 9999), &[2])],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(why(&plan, "eth0"), "route of vx0 to fd00::2 and 1 other");
    assert_eq!(why(&plan, "eth1"), "named by a forwarding entry of vx0");
}

#[test]
fn a_bond_a_vlan_on_it_and_its_ports() {
    let port = |ifindex, name| Link { master: Some(4), ..link(ifindex, name, "") };
    let snapshot = Snapshot {
        links: vec![
            loopback(),
            port(2, "eth0"),
            port(3, "eth1"),
            link(4, "bond0", "bond"),
            Link { link: Some(4), ..link(5, "bond0.100", "vlan") },
            vxlan(6, "flannel.1", flannel(5)),
        ],
        addresses: vec![address(5, "10.0.100.3")],
        ..Snapshot::default()
    };
    assert_eq!(names(&auto(&snapshot), Role::Uplink), ["bond0.100"]);

    let all = ["eth0", "eth1", "bond0", "bond0.100", "flannel.1"].map(String::from).to_vec();
    let named = plan(&snapshot, &Selection::Named(all));
    let above = |name| watch(&named, name).map(|watch| watch.above.clone());
    assert_eq!(above("eth0"), Some(vec![4, 5]));
    assert_eq!(above("eth1"), Some(vec![4, 5]));
    assert_eq!(above("bond0"), Some(vec![5]));
    assert_eq!(above("bond0.100"), Some(vec![]));
    assert_eq!(above("flannel.1"), Some(vec![]));
    // Only what is watched too.
    let some = plan(&snapshot, &Selection::Named(vec!["eth0".into(), "bond0.100".into()]));
    assert_eq!(watch(&some, "eth0").map(|watch| watch.above.clone()), Some(vec![5]));
}

#[test]
fn a_bridge_and_its_port_are_one_way_out() {
    let snapshot = Snapshot {
        links: vec![
            loopback(),
            Link { master: Some(3), ..link(2, "eth0", "") },
            link(3, "br0", "bridge"),
            vxlan(4, "flannel.1", flannel(3)),
            vxlan(5, "flannel-v6.1", flannel(2)),
        ],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0", "br0"]);
    assert_eq!(watch(&plan, "eth0").map(|watch| watch.above.clone()), Some(vec![3]));
    assert_eq!(watch(&plan, "br0").map(|watch| watch.above.clone()), Some(vec![]));
}

#[test]
fn what_only_looks_like_a_stack_is_none() {
    let snapshot = Snapshot {
        links: vec![
            loopback(),
            // Two ends of a veth name each other.
            Link { link: Some(3), ..link(2, "veth0", "veth") },
            Link { link: Some(2), ..link(3, "veth1", "veth") },
            // A VLAN whose parent is in another namespace, where it has index 2 by chance.
            Link { link: Some(2), link_netnsid: Some(0), ..link(4, "vlan", "vlan") },
            // Packets do not pass the egress hook of a VRF.
            link(5, "blue", "vrf"),
            Link { master: Some(5), ..link(6, "eth0", "") },
            // A tunnel hides the packet.
            Link { link: Some(6), hardware: NONE, ..link(7, "gre1", "gre") },
        ],
        ..Snapshot::default()
    };
    let names = snapshot.links.iter().map(|link| link.name.clone()).collect();
    let plan = plan(&snapshot, &Selection::Named(names));
    assert_eq!(plan.watches.len(), 7);
    for watch in &plan.watches {
        assert_eq!(watch.above, [0; 0], "{}", watch.name);
    }
}

#[test]
fn a_loop_of_masters_ends() {
    let snapshot = Snapshot {
        links: vec![
            Link { master: Some(3), ..link(2, "br0", "bridge") },
            Link { master: Some(2), ..link(3, "br1", "bridge") },
        ],
        ..Snapshot::default()
    };
    let plan = plan(&snapshot, &Selection::Named(vec!["br0".into(), "br1".into()]));
    assert_eq!(plan.watches.iter().map(|watch| watch.above.clone()).collect::<Vec<_>>(), [vec![3], vec![2]]);
}

#[test]
fn two_devices_share_an_uplink_and_a_port() {
    let with_zero = Vxlan { zero_csum6_tx: true, ..flannel(2) };
    let snapshot = Snapshot {
        links: vec![
            link(2, "eth0", ""),
            vxlan(4, "flannel.1", flannel(2)),
            vxlan(5, "flannel-v6.1", with_zero),
            vxlan(6, "other", Vxlan { port: 4789, ..flannel(2) }),
        ],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0"]);
    assert_eq!(why(&plan, "eth0"), "lower device of flannel.1; lower device of flannel-v6.1; lower device of other");
    assert_eq!(plan.ports.into_iter().collect::<Vec<_>>(), [(4789, true), (8472, false)]);
}

#[test]
fn who_takes_destinations_from_metadata_may_send_by_any_device() {
    let settings = Vxlan { port: 8472, external: true, ..Vxlan::default() };
    let snapshot = Snapshot {
        links: vec![
            loopback(),
            link(2, "eth0", ""),
            Link { master: Some(4), ..link(3, "eth1", "") },
            link(4, "br0", "bridge"),
            link(5, "docker0", "bridge"),
            vxlan(6, "cilium_vxlan", settings),
            link(7, "eth2", ""),
        ],
        addresses: vec![
            address(1, "10.255.0.1"),
            address(2, "192.0.2.3"),
            address(4, "10.0.100.3"),
            address(5, "172.17.0.1"),
            Address { scope: 253, ..address(7, "fe80::1") },
        ],
        default_devices: vec![2],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    // br0 lies on hardware; docker0 does not, and eth2 has no address that reaches beyond its link.
    assert_eq!(names(&plan, Role::Uplink), ["eth0", "br0"]);
    assert_eq!(why(&plan, "br0"), "holds 10.0.100.3, and cilium_vxlan can send by any device");
    assert_eq!(plan.ports.into_iter().collect::<Vec<_>>(), [(8472, false)]);
}

#[test]
fn an_underlay_in_another_namespace_is_watched_there() {
    let elsewhere = Link { link_netnsid: Some(0), ..vxlan(4, "vx0", flannel(2)) };
    let snapshot = Snapshot {
        // Index 2 is another device here.
        links: vec![loopback(), link(2, "eth0", "veth"), elsewhere],
        default_devices: vec![2],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), [""; 0]);
    assert_eq!(names(&plan, Role::Vxlan), ["vx0"]);
    assert_eq!(plan.notes, ["the packets of vx0 leave in another network namespace; watch them there"]);
    assert!(plan.vxlans.iter().all(|device| device.elsewhere));
}

#[test]
fn a_vrf_is_no_way_out_but_chooses_the_routes() {
    let to_peer = Query { via: Some(5), ..query("10.0.100.15", Some("10.0.100.3"), 8472) };
    let snapshot = Snapshot {
        links: vec![
            loopback(),
            Link { master: Some(5), ..link(2, "eth0", "") },
            vxlan(4, "vx0", flannel(5)),
            link(5, "blue", "vrf"),
        ],
        fdb: fdb(&[entry(4, "10.0.100.15")]),
        lookups: vec![leads(to_peer, &[2])],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0"]);
    assert_eq!(why(&plan, "eth0"), "route of vx0 to 10.0.100.15");
}

#[test]
fn vxlan_over_another_overlay() {
    let snapshot = Snapshot {
        links: vec![
            link(2, "eth0", ""),
            Link { hardware: NONE, ..link(3, "wg0", "wireguard") },
            vxlan(4, "over-wg", flannel(3)),
            vxlan(5, "below", flannel(2)),
            vxlan(6, "over-below", Vxlan { port: 4789, ..flannel(5) }),
        ],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), ["eth0", "wg0"]);
    let l2 = |name| watch(&plan, name).map(|watch| watch.l2);
    assert_eq!((l2("eth0"), l2("wg0"), l2("over-wg")), (Some(true), Some(false), Some(true)));
    let both = |name| watch(&plan, name).map(|watch| watch.also_uplink);
    assert_eq!((both("below"), both("over-below"), both("eth0")), (Some(true), Some(false), Some(false)));
    assert_eq!(why(&plan, "below"), "VXLAN device; lower device of over-below");
}

#[test]
fn named_devices_are_exactly_these() {
    let mut links = vec![loopback(), link(2, "eth0", ""), vxlan(4, "flannel.1", flannel(2))];
    links.extend((10..40).map(|ifindex| link(ifindex, &format!("veth{ifindex}"), "veth")));
    if let Some(eth0) = links.get_mut(1) {
        eth0.alternative_names = vec!["enp0s3".into()];
    }
    let snapshot = Snapshot { links, ..Snapshot::default() };
    let names = ["enp0s3", "lo", "nosuch", "eth0", "nosuch"].map(String::from).to_vec();
    let plan = plan(&snapshot, &Selection::Named(names));
    assert_eq!(plan.watches.iter().map(|watch| watch.name.as_str()).collect::<Vec<_>>(), ["lo", "eth0"]);
    assert_eq!(plan.missing, ["nosuch"]);
    assert_eq!(plan.vxlans.len(), 1);
    assert!(plan.looked_at.ends_with("and 21 more"), "{}", plan.looked_at);
}

#[test]
fn an_empty_namespace_has_an_empty_plan() {
    let plan = auto(&Snapshot { links: vec![loopback()], ..Snapshot::default() });
    assert_eq!(plan, Plan { looked_at: "lo (loopback)".into(), ..Plan::default() });
}

#[test]
fn what_vanished_between_two_questions_is_left_out() {
    // The lower device is gone, the entry names a device that never was, and the route names the VXLAN device itself.
    let snapshot = Snapshot {
        links: vec![vxlan(4, "flannel.1", flannel(2)), vxlan(5, "vxlan.calico", calico())],
        fdb: fdb(&[fdb::Entry { via: Some(99), ..entry(4, "10.0.100.15") }, entry(5, "10.0.100.15")]),
        lookups: vec![leads(query("10.0.100.15", Some("10.0.100.3"), 4789), &[5])],
        ..Snapshot::default()
    };
    let plan = auto(&snapshot);
    assert_eq!(names(&plan, Role::Uplink), [""; 0]);
    assert_eq!(
        plan.notes,
        ["flannel.1", "vxlan.calico"]
            .map(|name| format!("no device is known by which packets of {name} leave this host"))
    );
}

#[test]
fn a_sample_is_even_and_bounded() {
    let all: Vec<usize> = (0..1000).collect();
    let some = snapshot::sample(&all, 256);
    assert_eq!(some.len(), 256);
    assert_eq!((some.first(), some.last()), (Some(&0), Some(&996)));
    assert!(some.windows(2).all(|pair| matches!(pair, [a, b] if b - a >= 3 && b - a <= 4)));
    assert_eq!(snapshot::sample(&all[..3], 256), [0, 1, 2]);
}
