//! What `vxmon::netlink` and `vxmon::devices` say of a real kernel, beside what iproute2 and conntrack-tools say. Each test
//! has a network namespace of its own without a name, which ends with the test's thread.

use std::{
    collections::BTreeSet,
    net::{IpAddr, UdpSocket},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use vxmon::{
    devices::{self, Plan, Role, Selection, Snapshot},
    netlink::{
        Protocol, Socket, address,
        conntrack::{Conntrack, Tuple, status},
        fdb, link,
        monitor::{Changes, Monitor, Pace},
        route::{self, Query},
        tc::{self, Added, Direction},
    },
};
use vxmon_tests::{cmd, pace, skip};

/// Two veth pairs, up, with addresses: the uplinks of a node. Their other ends answer nothing.
const UPLINKS: &str = "link set lo up
link add eth0 type veth peer name peer0
link add eth1 type veth peer name peer1
link set eth0 up
link set peer0 up
link set eth1 up
link set peer1 up
addr add 10.0.100.3/24 dev eth0
addr add fd00:100::3/64 dev eth0 nodad
addr add 10.0.101.3/24 dev eth1
addr add fd00:101::3/64 dev eth1 nodad
";

/// Runs `work` in a new network namespace, or says why not.
fn isolated(name: &str, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    if !skip::root_or_skip(name) {
        return Ok(());
    }
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            // No address comes by itself, seconds after its device.
            for (setting, value) in [("addr_gen_mode", "1"), ("accept_dad", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/default/{setting}"), value)?;
            }
            work()
        });
        inside.join().map_err(|_| anyhow!("the test's thread panicked"))?
    })
}

/// Lines for `ip`, in one process.
fn ip(lines: &str) -> Result<()> {
    cmd::run_with_input(Command::new("ip").args(["-batch", "-"]), lines).map(drop)
}

fn run(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("no program")?;
    cmd::run(Command::new(program).args(words))
}

fn json(line: &str) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&run(line)?)?)
}

fn index(name: &str) -> Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

fn address(text: &str) -> Result<IpAddr> {
    Ok(text.parse()?)
}

#[test]
fn links_are_those_of_ip_link() -> Result<()> {
    isolated("links_are_those_of_ip_link", || {
        ip(UPLINKS)?;
        ip("link add br0 type bridge
            link set eth1 master br0
            link property add dev eth0 altname enp0s3
            link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 local 10.0.100.3 nolearning udp6zerocsumrx
            link add calico6 type vxlan id 4097 dstport 4789 local fd00:100::3 udp6zerocsumtx noudpcsum
            link add to-peer type vxlan id 42 remote fd00:100::9 dstport 4790 dev eth1
            link add cilium_vxlan type vxlan external dstport 8473
            link add macvlan0 link eth0 type macvlan
            link set flannel.1 mtu 1400 up")?;
        // The kernel works the operational state out a moment after what it depends on.
        let begun = Instant::now();
        loop {
            match compare_all() {
                Err(_) if begun.elapsed() < Duration::from_secs(3) => thread::sleep(Duration::from_millis(100)),
                result => return result,
            }
        }
    })
}

fn compare_all() -> Result<()> {
    let links = link::links(&mut Socket::open(Protocol::Route)?)?;
    let shown = json("ip -d -j link show")?;
    ensure!(links.len() == shown.len(), "{} links, ip shows {}", links.len(), shown.len());
    for (link, shown) in links.iter().zip(&shown) {
        compare(link, shown).with_context(|| format!("{link:?}\n{shown}"))?;
    }
    Ok(())
}

fn compare(link: &link::Link, shown: &Value) -> Result<()> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let name_of = |value: &Value| value.as_str().map(index).transpose();
    ensure!(Some(link.ifindex.into()) == shown["ifindex"].as_u64(), "index");
    ensure!(Some(&link.name) == text(&shown["ifname"]).as_ref(), "name");
    ensure!(Some(link.mtu.into()) == shown["mtu"].as_u64(), "mtu");
    ensure!(link.kind == text(&shown["linkinfo"]["info_kind"]).unwrap_or_default(), "kind");
    ensure!(link.master == name_of(&shown["master"])?, "master");
    ensure!(link.loopback == (shown["link_type"] == "loopback"), "loopback");
    ensure!(link.has_ethernet_header(), "all of these have an Ethernet header");
    let flags: Vec<&str> = shown["flags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(link.up == flags.contains(&"UP"), "up");
    ensure!(format!("{:?}", link.state).to_uppercase() == shown["operstate"].as_str().unwrap_or_default(), "state");
    let names: Vec<&str> = shown["altnames"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(link.alternative_names == names, "alternative names");
    let mac = link.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
    ensure!(mac == text(&shown["address"]), "mac");
    let Some(vxlan) = &link.vxlan else {
        // For a VXLAN device, ip fills this in from its settings.
        ensure!(link.link == name_of(&shown["link"])?, "link");
        return Ok(());
    };
    let data = &shown["linkinfo"]["info_data"];
    let is_set = |key: &str| data[key].as_bool().unwrap_or_default();
    let ip_at = |keys: [&str; 2]| keys.iter().find_map(|key| data[*key].as_str()).map(str::parse).transpose();
    ensure!(Some(vxlan.port.into()) == data["port"].as_u64(), "port");
    ensure!(vxlan.vni == data["id"].as_u64().unwrap_or_default() as u32, "vni");
    ensure!(vxlan.lower == name_of(&data["link"])?, "lower");
    ensure!(vxlan.local == ip_at(["local", "local6"])?, "local");
    ensure!(vxlan.remote == ip_at(["remote", "remote6"])?, "remote");
    ensure!(vxlan.external == is_set("external"), "external");
    ensure!(vxlan.learning == is_set("learning"), "learning");
    ensure!(vxlan.udp_csum == is_set("udp_csum"), "udp_csum");
    ensure!(vxlan.zero_csum6_tx == is_set("udp_zero_csum6_tx"), "udp_zero_csum6_tx");
    ensure!(vxlan.zero_csum6_rx == is_set("udp_zero_csum6_rx"), "udp_zero_csum6_rx");
    Ok(())
}

#[test]
fn a_device_whose_underlay_is_elsewhere_says_so() -> Result<()> {
    isolated("a_device_whose_underlay_is_elsewhere_says_so", || {
        ip("link add vx0 type vxlan id 1 dstport 4789")?;
        let (ready, is_ready) = mpsc::channel();
        let (moved, is_moved) = mpsc::channel();
        let snapshot = thread::scope(|scope| {
            let other = scope.spawn(move || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                ready.send(nix::unistd::gettid())?;
                is_moved.recv()?;
                Ok::<_, anyhow::Error>(Snapshot::take()?)
            });
            let thread = is_ready.recv()?;
            run(&format!("ip link set vx0 netns {thread}"))?;
            moved.send(())?;
            other.join().map_err(|_| anyhow!("the thread panicked"))?
        })?;
        let vx0 = snapshot.links.iter().find(|link| link.name == "vx0").context("vx0 was not moved")?;
        ensure!(vx0.link_netnsid.is_some(), "{vx0:?}");
        let plan = devices::plan(&snapshot, &Selection::Auto);
        ensure!(plan.vxlans.iter().all(|device| device.elsewhere) && plan.watches.len() == 1, "{plan:?}");
        Ok(())
    })
}

#[test]
fn addresses_are_those_of_ip_addr() -> Result<()> {
    isolated("addresses_are_those_of_ip_addr", || {
        ip(UPLINKS)?;
        ip("addr add 192.0.2.1 peer 192.0.2.9/32 dev eth1")?;
        let found = address::addresses(&mut Socket::open(Protocol::Route)?)?;
        let mut shown = BTreeSet::new();
        for device in json("ip -j addr show")? {
            for entry in device["addr_info"].as_array().into_iter().flatten() {
                let index = device["ifindex"].as_u64().context("no index")?;
                let local = address(entry["local"].as_str().context("no address")?)?;
                shown.insert((index, local, entry["prefixlen"].as_u64(), entry["scope"] == "global"));
            }
        }
        let found: BTreeSet<_> = found
            .iter()
            .map(|entry| (entry.ifindex.into(), entry.address, Some(entry.prefix.into()), entry.is_global()))
            .collect();
        ensure!(found == shown, "{found:?}\nip: {shown:?}");
        Ok(())
    })
}

#[test]
fn forwarding_entries_are_those_of_the_device_asked_for() -> Result<()> {
    isolated("forwarding_entries_are_those_of_the_device_asked_for", || {
        ip(UPLINKS)?;
        ip("link add vx0 type vxlan id 1 dstport 4789
            link add vx1 type vxlan id 2 dstport 4790 local fd00:100::3
            link add br0 type bridge
            link set eth1 master br0")?;
        run("bridge fdb add 02:00:00:00:00:01 dev vx0 dst 10.0.100.15")?;
        run("bridge fdb add 02:00:00:00:00:02 dev vx0 dst 10.0.101.15 port 8472 vni 7 via eth1")?;
        run("bridge fdb append 00:00:00:00:00:00 dev vx0 dst 10.0.100.16")?;
        run("bridge fdb append 00:00:00:00:00:00 dev vx0 dst 10.0.100.17")?;
        run("bridge fdb add 02:00:00:00:00:09 dev vx1 dst fd00:100::99")?;
        let mut socket = Socket::open(Protocol::Route)?;
        let vx0 = index("vx0")?;
        let entries = fdb::entries(&mut socket, vx0)?;
        ensure!(entries.iter().all(|entry| entry.ifindex == vx0), "{entries:?}");
        let found: BTreeSet<_> = entries.iter().filter_map(|entry| Some((entry.mac, entry.remote?))).collect();
        let expected = BTreeSet::from([
            ([2, 0, 0, 0, 0, 1], address("10.0.100.15")?),
            ([2, 0, 0, 0, 0, 2], address("10.0.101.15")?),
            ([0; 6], address("10.0.100.16")?),
            ([0; 6], address("10.0.100.17")?),
        ]);
        ensure!(found == expected, "{entries:?}");
        let full = entries.iter().find(|entry| entry.mac == [2, 0, 0, 0, 0, 2]).context("no such entry")?;
        ensure!((full.port, full.vni, full.via) == (Some(8472), Some(7), Some(index("eth1")?)), "{full:?}");
        let others: Vec<_> =
            fdb::entries(&mut socket, index("vx1")?)?.into_iter().filter_map(|entry| entry.remote).collect();
        ensure!(others == [address("fd00:100::99")?], "{others:?}");
        let all = fdb::all(&mut socket)?;
        ensure!(all.len() == 5 && all.iter().all(|entry| entry.remote.is_some()), "{all:?}");
        Ok(())
    })
}

#[test]
fn many_entries_come_in_many_parts() -> Result<()> {
    isolated("many_entries_come_in_many_parts", || {
        const COUNT: usize = 3000;
        ip("link add vx0 type vxlan id 1 dstport 4789")?;
        let lines: String = (0..COUNT)
            .map(|number| {
                let (high, low) = (number / 250, number % 250 + 1);
                format!("fdb add 02:00:00:00:{high:02x}:{low:02x} dev vx0 dst 10.1.{high}.{low}\n")
            })
            .collect();
        cmd::run_with_input(Command::new("bridge").args(["-batch", "-"]), &lines)?;
        let mut socket = Socket::open(Protocol::Route)?;
        let entries = fdb::entries(&mut socket, index("vx0")?)?;
        let remotes: BTreeSet<_> = entries.iter().filter_map(|entry| entry.remote).collect();
        ensure!(remotes.len() == COUNT, "{} of {COUNT}", remotes.len());
        // No route matters to a device of which so much is known that it is sampled.
        let begun = Instant::now();
        let snapshot = Snapshot::take_from(&mut socket)?;
        ensure!(snapshot.lookups.len() == devices::MAX_LOOKUPS, "{} lookups", snapshot.lookups.len());
        ensure!(snapshot.notes.iter().any(|note| note.contains("3000 destinations")), "{:?}", snapshot.notes);
        ensure!(begun.elapsed() < Duration::from_secs(2), "took {:?}", begun.elapsed());
        Ok(())
    })
}

/// The devices by which a packet to that address leaves; their names, in order.
fn ways(socket: &mut Socket, query: &Query) -> Result<Vec<String>> {
    let route = route::lookup(socket, query)?;
    ensure!(!route.local, "{query} is local");
    names(&route.devices)
}

fn names(devices: &[u32]) -> Result<Vec<String>> {
    devices.iter().map(|index| Ok(nix::net::if_::if_indextoname(*index)?.into_string()?)).collect()
}

fn to(destination: &str) -> Result<Query> {
    Ok(Query { destination: address(destination)?, source: None, via: None, port: Some(4789) })
}

#[test]
fn routes_lead_where_the_kernel_sends() -> Result<()> {
    isolated("routes_lead_where_the_kernel_sends", || {
        ip(UPLINKS)?;
        ip("nexthop add id 1 via 10.0.100.1 dev eth0
            nexthop add id 2 via 10.0.101.1 dev eth1
            nexthop add id 3 group 1/2
            route add 10.9.0.0/16 nexthop via 10.0.100.1 dev eth0 nexthop via 10.0.101.1 dev eth1
            route add 10.8.0.0/16 nhid 3
            route add 10.7.0.0/16 via 10.0.101.1 mtu 1400
            route add unreachable 10.6.0.0/16
            route add 10.5.0.0/16 dev eth0 table 100
            rule add from 10.0.101.3 table 100
            route add fd09::/16 nexthop via fd00:100::1 dev eth0 nexthop via fd00:101::1 dev eth1
            route add fd07::/16 via fd00:101::1")?;
        let mut socket = Socket::open(Protocol::Route)?;
        for (destination, expected) in [
            ("10.0.100.15", &["eth0"][..]),
            ("fd00:100::15", &["eth0"]),
            ("10.9.1.1", &["eth0", "eth1"]),
            ("10.8.1.1", &["eth0", "eth1"]),
            ("10.7.1.1", &["eth1"]),
            ("fd09::1", &["eth0", "eth1"]),
            ("fd07::1", &["eth1"]),
        ] {
            let found = ways(&mut socket, &to(destination)?)?;
            ensure!(found == expected, "{destination}: {found:?}, expected {expected:?}");
        }
        // Only what is asked with that source goes by table 100.
        let from = Query { source: Some(address("10.0.101.3")?), ..to("10.5.1.1")? };
        ensure!(ways(&mut socket, &from)? == ["eth0"]);
        ensure!(route::lookup(&mut socket, &to("10.5.1.1")?).is_err());
        // A fixed device needs no route.
        let via = Query { via: Some(index("eth1")?), ..to("192.0.2.1")? };
        ensure!(ways(&mut socket, &via)? == ["eth1"]);
        for own in ["10.0.100.3", "fd00:100::3", "127.0.0.1"] {
            // The kernel adds the route to an own IPv6 address a moment after the address.
            let begun = Instant::now();
            while !route::lookup(&mut socket, &to(own)?)?.local {
                ensure!(begun.elapsed() < Duration::from_secs(2), "{own} is not local");
                thread::sleep(Duration::from_millis(5));
            }
        }
        let nowhere = route::lookup(&mut socket, &to("10.6.1.1")?);
        let text = nowhere.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(text == "cannot look up the route to 10.6.1.1: No route to host", "{text}");
        let stranger = Query { source: Some(address("192.0.2.77")?), ..to("10.0.100.15")? };
        ensure!(route::lookup(&mut socket, &stranger).is_err(), "a source that is not of this host");
        Ok(())
    })
}

#[test]
fn default_routes_are_found_in_all_their_forms() -> Result<()> {
    isolated("default_routes_are_found_in_all_their_forms", || {
        ip(UPLINKS)?;
        let mut socket = Socket::open(Protocol::Route)?;
        let mut default = || names(&route::default_devices(&mut socket)?);
        ensure!(default()? == [""; 0]);
        ip("route add default via 10.0.100.1\nroute add unreachable default metric 9999")?;
        ensure!(default()? == ["eth0"]);
        ip("route add default via fd00:101::1")?;
        ensure!(default()? == ["eth0", "eth1"]);
        ip("route del default via 10.0.100.1\nroute del default via fd00:101::1")?;
        ensure!(default()? == [""; 0], "a route that leads nowhere");
        ip("nexthop add id 1 via 10.0.100.1 dev eth0
            nexthop add id 2 via 10.0.101.1 dev eth1
            nexthop add id 3 group 1/2
            route add default nhid 3")?;
        ensure!(default()? == ["eth0", "eth1"]);
        std::fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", "0")?;
        ensure!(default()? == ["eth0", "eth1"], "without the devices in the route");
        ip("route del default nhid 3\nroute add default via 10.0.101.1 table 200")?;
        ensure!(default()? == ["eth1"], "a table of its own");
        Ok(())
    })
}

#[test]
fn clsact_is_made_once_and_left_to_its_owner() -> Result<()> {
    isolated("clsact_is_made_once_and_left_to_its_owner", || {
        ip(UPLINKS)?;
        let mut socket = Socket::open(Protocol::Route)?;
        let eth0 = index("eth0")?;
        ensure!(!tc::clsact_exists(&mut socket, eth0)?);
        ensure!(tc::filters(&mut socket, eth0, Direction::Egress)?.is_empty());
        ensure!(tc::clsact_add(&mut socket, eth0)? == Added::Created);
        ensure!(tc::clsact_exists(&mut socket, eth0)?);
        ensure!(tc::clsact_add(&mut socket, eth0)? == Added::Existed);
        ensure!(run("tc qdisc show dev eth0")?.contains("qdisc clsact"));

        add_bytecode_filter("ingress", "5")?;
        ensure!(!tc::clsact_del_if_unused(&mut socket, eth0)?, "somebody's filter was on it");
        run("tc filter del dev eth0 ingress")?;
        ensure!(tc::clsact_del_if_unused(&mut socket, eth0)?);
        ensure!(!run("tc qdisc show dev eth0")?.contains("clsact"));
        ensure!(tc::clsact_del(&mut socket, eth0).is_err(), "there was none left");

        run("tc qdisc add dev eth1 ingress")?;
        let eth1 = index("eth1")?;
        ensure!(tc::hook_qdisc(&mut socket, eth1)?.as_deref() == Some("ingress"));
        ensure!(!tc::clsact_exists(&mut socket, eth1)?);
        ensure!(tc::clsact_add(&mut socket, eth1).is_err(), "an ingress qdisc is in the way");
        let missing = tc::clsact_add(&mut socket, 9999).err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(missing == "cannot add a clsact qdisc: No such device", "{missing}");
        Ok(())
    })
}

/// A classic BPF program that returns 0, on eth0.
fn add_bytecode_filter(direction: &str, priority: &str) -> Result<()> {
    let words = ["filter", "add", "dev", "eth0", direction, "pref", priority, "bpf", "da", "bytecode", "1,6 0 0 0"];
    cmd::run(Command::new("tc").args(words)).map(drop)
}

#[test]
fn filters_are_those_of_tc() -> Result<()> {
    isolated("filters_are_those_of_tc", || {
        ip(UPLINKS)?;
        let mut socket = Socket::open(Protocol::Route)?;
        let eth0 = index("eth0")?;
        tc::clsact_add(&mut socket, eth0)?;
        let pinned = Pinned::new()?;
        run(&format!("tc filter add dev eth0 egress pref 9 handle 3 bpf da object-pinned {}", pinned.path()))?;
        run(&format!(
            "tc filter add dev eth0 egress pref 9 protocol all handle 2 bpf object-pinned {}",
            pinned.path()
        ))?;
        run("tc filter add dev eth0 egress pref 20 protocol ip u32 match u32 0 0 classid 1:1")?;
        add_bytecode_filter("egress", "7")?;
        add_bytecode_filter("ingress", "4")?;
        run("tc filter add dev eth0 egress pref 1 chain 5 protocol ipv6 u32 match u32 0 0 classid 1:1")?;

        let egress = tc::filters(&mut socket, eth0, Direction::Egress)?;
        let ours: Vec<_> = egress.iter().filter(|filter| filter.kind == "bpf").collect();
        let seen: Vec<_> = ours.iter().map(|filter| (filter.priority, filter.handle, filter.direct_action)).collect();
        ensure!(
            seen.contains(&(7, 1, true)) && seen.contains(&(9, 3, true)) && seen.contains(&(9, 2, false)),
            "{seen:?}"
        );
        ensure!(ours.len() == 3 && ours.iter().all(|filter| filter.protocol == 3), "{ours:?}");
        let loaded = ours.iter().find(|filter| filter.handle == 3).context("no such filter")?;
        let shown = run("tc filter show dev eth0 egress pref 9")?;
        ensure!(shown.contains(&format!(" id {} ", loaded.program.context("no id")?)), "{loaded:?}\n{shown}");
        let tag = loaded.tag.context("no tag")?.map(|byte| format!("{byte:02x}")).concat();
        ensure!(shown.contains(&tag), "{tag}\n{shown}");
        let name = loaded.name.as_deref().context("no name")?;
        ensure!(shown.contains(name), "{name}\n{shown}");
        let protocols: Vec<_> = egress.iter().map(|filter| (filter.chain, filter.priority, filter.protocol)).collect();
        ensure!(protocols.contains(&(0, 20, 0x0800)) && protocols.contains(&(5, 1, 0x86dd)), "{protocols:?}");
        ensure!(protocols.is_sorted_by_key(|(chain, priority, _)| (*chain, *priority)), "{protocols:?}");
        let ingress = tc::filters(&mut socket, eth0, Direction::Ingress)?;
        ensure!(ingress.len() == 1 && ingress.iter().all(|filter| filter.priority == 4), "{ingress:?}");

        tc::filter_del(&mut socket, eth0, Direction::Egress, 9, 3, 3)?;
        let left = tc::filters(&mut socket, eth0, Direction::Egress)?;
        ensure!(left.len() == egress.len() - 1 && left.iter().all(|filter| filter.handle != 3), "{left:?}");
        ensure!(tc::filter_del(&mut socket, eth0, Direction::Egress, 9, 3, 3).is_err(), "it was gone");
        ensure!(tc::filter_del(&mut socket, eth0, Direction::Egress, 0, 0, 3).is_err(), "0 is every filter");
        ensure!(tc::filters(&mut socket, eth0, Direction::Egress)?.len() == left.len());
        Ok(())
    })
}

/// A loaded program, pinned where only this thread and its children see it.
struct Pinned {
    directory: std::path::PathBuf,
}

impl Pinned {
    fn new() -> Result<Self> {
        use nix::mount::{MsFlags, mount};
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)?;
        let directory = std::env::temp_dir().join(format!("vxmon-pin-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let pinned = Self { directory };
        mount(Some("bpf"), &pinned.directory, Some("bpf"), MsFlags::empty(), None::<&str>)?;
        let program = bpf::load_classifier()?;
        bpf::pin(&program, &pinned.path())?;
        Ok(pinned)
    }

    fn path(&self) -> String {
        self.directory.join("program").display().to_string()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.directory);
        let _ = std::fs::remove_dir(&self.directory);
    }
}

/// As much of bpf(2) as it takes to have a program without an object file.
mod bpf {
    use std::{
        ffi::CString,
        io,
        os::fd::{AsRawFd, FromRawFd, OwnedFd},
    };

    use nix::libc;

    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_OBJ_PIN: libc::c_int = 6;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    /// `r0 = -1; exit`: TC_ACT_UNSPEC.
    const INSTRUCTIONS: [u64; 2] = [0xffff_ffff_0000_00b7, 0x0000_0000_0000_0095];

    /// The fields of `union bpf_attr` for BPF_PROG_LOAD, as far as they are used.
    #[repr(C)]
    struct Load {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        kernel_version: u32,
        flags: u32,
    }

    /// The fields of `union bpf_attr` for BPF_OBJ_PIN.
    #[repr(C)]
    struct Pin {
        path: u64,
        descriptor: u32,
        flags: u32,
    }

    fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
        // SAFETY: `attributes` is the head of a union bpf_attr of the size given; what it points to outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *const T, size_of::<T>()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    pub(super) fn load_classifier() -> io::Result<OwnedFd> {
        let license = c"GPL";
        let descriptor = bpf(
            BPF_PROG_LOAD,
            &Load {
                kind: BPF_PROG_TYPE_SCHED_CLS,
                instruction_count: 2,
                instructions: INSTRUCTIONS.as_ptr() as u64,
                license: license.as_ptr() as u64,
                log: [0; 2],
                kernel_version: 0,
                flags: 0,
            },
        )?;
        // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor as libc::c_int) })
    }

    pub(super) fn pin(program: &OwnedFd, path: &str) -> io::Result<()> {
        let path = CString::new(path)?;
        let pin = Pin { path: path.as_ptr() as u64, descriptor: program.as_raw_fd() as u32, flags: 0 };
        bpf(BPF_OBJ_PIN, &pin).map(drop)
    }
}

/// The value of the `occurrence`-th `key=` in a line of `conntrack -L`.
fn field<'a>(line: &'a str, key: &str, occurrence: usize) -> Result<&'a str> {
    let mut values = line.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    values.nth(occurrence).with_context(|| format!("no {key} in {line}"))
}

/// One direction of a line of `conntrack -L`: 0 is the original one.
fn tuple_of(line: &str, direction: usize) -> Result<Tuple> {
    let port = |key| Ok::<u16, anyhow::Error>(field(line, key, direction)?.parse()?);
    let end = |key| address(field(line, key, direction)?);
    Ok(Tuple::udp(end("src")?, port("sport")?, end("dst")?, port("dport")?))
}

#[test]
fn conntrack_entries_are_those_of_conntrack() -> Result<()> {
    isolated("conntrack_entries_are_those_of_conntrack", || {
        ip(UPLINKS)?;
        ip("neigh add 10.0.100.15 lladdr 02:00:00:00:00:0f dev eth0
            neigh add fd00:100::15 lladdr 02:00:00:00:00:0f dev eth0")?;
        for (iptables, family, from, to) in
            [("iptables", "ipv4", "10.0.100.3", "10.0.100.15"), ("ip6tables", "ipv6", "fd00:100::3", "fd00:100::15")]
        {
            run(&format!("{iptables} -t nat -A POSTROUTING -p udp --dport 8472 -j MASQUERADE --random-fully"))?;
            run(&format!("{iptables} -t mangle -A OUTPUT -p udp --dport 8472 -j CONNMARK --set-mark 0x4000"))?;
            let sender = UdpSocket::bind((address(from)?, 0))?;
            sender.send_to(b"rewritten", (address(to)?, 8472))?;
            sender.send_to(b"as it is", (address(to)?, 4789))?;
            let listed = run(&format!("conntrack -L -f {family} -p udp -o extended,id"))?;
            let lines: Vec<&str> = listed.lines().filter(|line| line.contains("dport=")).collect();
            ensure!(lines.len() == 2, "{listed}");
            for line in lines {
                let (orig, reply) = (tuple_of(line, 0)?, tuple_of(line, 1)?);
                let packet = reply.inverse();
                let is_rewritten = orig.dport == 8472;
                ensure!((packet.sport != orig.sport) == is_rewritten, "{line}");
                let mut conntrack = Conntrack::open()?;
                let entry = conntrack.by_packet(packet, 0)?.with_context(|| format!("not found: {packet}\n{line}"))?;
                ensure!((entry.orig, entry.reply) == (orig, reply), "{entry:?}\n{line}");
                let mark: Option<u32> = field(line, "mark", 0).ok().map(str::parse).transpose()?;
                ensure!(entry.mark.unwrap_or_default() == mark.unwrap_or_default(), "{entry:?}\n{line}");
                ensure!((entry.mark == Some(0x4000)) == is_rewritten, "{entry:?}");
                ensure!(entry.id == Some(field(line, "id", 0)?.parse()?), "{entry:?}\n{line}");
                ensure!(entry.timeout_s.is_some_and(|seconds| (25..=30).contains(&seconds)), "{entry:?}");
                ensure!(entry.zone == 0);
                let names = status::names(entry.status);
                ensure!(names.contains(&"confirmed") && !names.contains(&"seen-reply"), "{names:?}");
                ensure!(names.contains(&"src-nat") == is_rewritten, "{names:?}");
                ensure!(conntrack.by_original(orig, 0)?.as_ref() == Some(&entry));
                let unknown = Tuple { sport: packet.sport ^ 1, ..packet };
                ensure!(conntrack.by_packet(unknown, 0)?.is_none());
                ensure!(conntrack.by_packet(packet, 9)?.is_none(), "another zone");
            }
        }
        Ok(())
    })
}

#[test]
fn conntrack_zones_are_kept_apart() -> Result<()> {
    isolated("conntrack_zones_are_kept_apart", || {
        ip(UPLINKS)?;
        ip("neigh add 10.0.100.15 lladdr 02:00:00:00:00:0f dev eth0")?;
        let rules = "table ip t {
            chain zone { type filter hook output priority raw; udp dport 8472 ct zone set 5; }
            chain track { type filter hook output priority 0; ct state new accept; }
        }";
        if let Err(error) = cmd::run_with_input(Command::new("nft").args(["-f", "-"]), rules) {
            skip::skip("conntrack_zones_are_kept_apart", &format!("no zones here: {error}"));
            return Ok(());
        }
        let sender = UdpSocket::bind("10.0.100.3:0")?;
        sender.send_to(b"zone 5", "10.0.100.15:8472")?;
        let packet = Tuple::udp(address("10.0.100.3")?, sender.local_addr()?.port(), address("10.0.100.15")?, 8472);
        let mut conntrack = Conntrack::open()?;
        ensure!(conntrack.by_packet(packet, 0)?.is_none());
        let entry = conntrack.by_packet(packet, 5)?.context("not found in its zone")?;
        ensure!(entry.zone == 5 && entry.orig == packet, "{entry:?}");
        Ok(())
    })
}

/// Runs `work` with a monitor of this thread's namespace, once all is quiet.
fn monitored(work: impl AsyncFnOnce(&mut Monitor) -> Result<()>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut monitor = Monitor::open(Pace::default())?;
        while told(&mut monitor, Duration::from_millis(1200)).await?.is_some() {}
        work(&mut monitor).await
    })
}

/// What is told within that time.
async fn told(monitor: &mut Monitor, limit: Duration) -> Result<Option<Changes>> {
    match tokio::time::timeout(limit, monitor.changed()).await {
        Ok(changes) => Ok(Some(changes?)),
        Err(_) => Ok(None),
    }
}

/// How soon a change must be told, with some room for a busy machine.
const SOON: Duration = Duration::from_millis(100);

#[test]
fn a_device_that_comes_back_is_told_at_once() -> Result<()> {
    isolated("a_device_that_comes_back_is_told_at_once", || {
        ip(UPLINKS)?;
        ip("link add vx0 index 77 type vxlan id 1 dstport 4789 dev eth0")?;
        monitored(async |monitor| {
            ip("link del vx0\nlink add vx0 index 77 type vxlan id 1 dstport 4789 dev eth0")?;
            let begun = Instant::now();
            let changes = told(monitor, SOON).await?.context("nothing was told")?;
            ensure!(changes.links && changes.removed == BTreeSet::from([77]) && !changes.lost, "{changes:?}");
            ensure!(begun.elapsed() < Duration::from_millis(60), "{:?}", begun.elapsed());
            Ok(())
        })
    })
}

#[test]
fn what_matters_is_told_and_what_does_not_is_not() -> Result<()> {
    isolated("what_matters_is_told_and_what_does_not_is_not", || {
        ip(UPLINKS)?;
        ip(
            "link add br0 type bridge\nlink set eth1 master br0\nlink add vx0 type vxlan id 1 dstport 4789\nlink set vx0 up",
        )?;
        monitored(async |monitor| {
            let quiet = Duration::from_millis(1100);

            ip("neigh add 10.0.100.15 lladdr 02:00:00:00:00:0f dev eth0")?;
            run("bridge fdb add 02:00:00:00:00:01 dev eth1 master static")?;
            let changes = told(monitor, quiet).await?;
            ensure!(changes.is_none(), "a neighbour, and an entry of a bridge: {changes:?}");

            run("bridge fdb add 02:00:00:00:00:01 dev vx0 dst 10.0.100.15")?;
            let changes = told(monitor, SOON).await?.context("a forwarding entry was not told")?;
            ensure!(changes == Changes { fdb: true, ..Changes::default() }, "{changes:?}");
            tokio::time::sleep(quiet).await;

            ip("route add 10.9.0.0/16 via 10.0.100.1")?;
            let changes = told(monitor, SOON).await?.context("a route was not told")?;
            ensure!(changes == Changes { routes: true, ..Changes::default() }, "{changes:?}");
            tokio::time::sleep(quiet).await;

            ip("addr add 192.0.2.1/32 dev eth0")?;
            let changes = told(monitor, SOON).await?.context("an address was not told")?;
            ensure!(changes.addresses && !changes.links, "{changes:?}");
            // Soon after, routes wait, but a device does not.
            ip("route add 10.8.0.0/16 via 10.0.100.1")?;
            ensure!(told(monitor, Duration::from_millis(300)).await?.is_none(), "routes were told too often");
            ip("link set eth0 mtu 1400")?;
            let changes = told(monitor, SOON).await?.context("a device was not told")?;
            ensure!(changes.links && changes.routes, "{changes:?}");
            tokio::time::sleep(quiet).await;

            ip("nexthop add id 1 via 10.0.100.1 dev eth0")?;
            ensure!(told(monitor, SOON).await?.is_some_and(|changes| changes.routes), "a next hop was not told");
            Ok(())
        })
    })
}

/// Changes the MTU of eth0 that many times.
fn storm(changes: usize) -> Result<()> {
    ip(&(0..changes).map(|number| format!("link set eth0 mtu {}\n", 1400 + number % 2)).collect::<String>())
}

#[test]
fn a_storm_is_told_a_bounded_number_of_times() -> Result<()> {
    isolated("a_storm_is_told_a_bounded_number_of_times", || {
        ip(UPLINKS)?;
        monitored(async |monitor| {
            let begun = Instant::now();
            // A thread has the namespace of the one that started it.
            let stirring = thread::spawn(move || {
                while begun.elapsed() < pace::limit(Duration::from_secs(1)) {
                    storm(100)?;
                }
                Ok::<_, anyhow::Error>(())
            });
            let mut times = 0;
            while told(monitor, pace::limit(Duration::from_millis(300))).await?.is_some() {
                times += 1;
            }
            stirring.join().map_err(|_| anyhow!("the thread panicked"))??;
            let most = begun.elapsed().as_millis() / 100 + 1;
            ensure!(times >= 5 && times <= most, "told {times} times in {:?}", begun.elapsed());
            Ok(())
        })
    })
}

#[test]
fn what_is_lost_is_told_as_lost() -> Result<()> {
    isolated("what_is_lost_is_told_as_lost", || {
        ip(UPLINKS)?;
        monitored(async |monitor| {
            storm(5000)?;
            let mut lost = false;
            while let Some(changes) = told(monitor, Duration::from_millis(500)).await? {
                lost |= changes.lost;
            }
            ensure!(lost, "5000 changes, unread, fit into the buffer");
            // It goes on listening.
            ip("link add late type vxlan id 9 dstport 4799")?;
            ensure!(told(monitor, SOON).await?.is_some_and(|changes| changes.links && !changes.lost));
            Ok(())
        })
    })
}

fn watched(plan: &Plan, role: Role) -> Vec<&str> {
    plan.watches.iter().filter(|watch| watch.role == role).map(|watch| watch.name.as_str()).collect()
}

fn auto() -> Result<Plan> {
    Ok(devices::plan(&Snapshot::take()?, &Selection::Auto))
}

#[test]
fn a_plan_follows_the_devices_of_a_node() -> Result<()> {
    isolated("a_plan_follows_the_devices_of_a_node", || {
        ip(UPLINKS)?;
        let plan = auto()?;
        ensure!(plan.watches.is_empty() && plan.vxlans.is_empty(), "{plan:?}");
        ensure!(
            plan.looked_at.contains("lo (loopback)") && plan.looked_at.contains("eth0 (veth)"),
            "{}",
            plan.looked_at
        );

        ip("link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 local 10.0.100.3 nolearning")?;
        let plan = auto()?;
        ensure!(watched(&plan, Role::Vxlan) == ["flannel.1"] && watched(&plan, Role::Uplink) == ["eth0"], "{plan:?}");
        ensure!(plan.notes.is_empty() && plan.watches.iter().all(|watch| watch.l2), "{plan:?}");

        // No lower device: the address says eth0, one destination leaves by eth1.
        ip("link del flannel.1
            link add vxlan.calico type vxlan id 4096 dstport 4789 local 10.0.100.3 nolearning
            route add 10.0.200.0/24 via 10.0.101.1")?;
        ensure!(watched(&auto()?, Role::Uplink) == ["eth0"]);
        run("bridge fdb add 02:00:00:00:00:0f dev vxlan.calico dst 10.0.200.17")?;
        run("bridge fdb add 02:00:00:00:00:10 dev vxlan.calico dst 10.0.100.3")?;
        run("bridge fdb add 02:00:00:00:00:11 dev vxlan.calico dst 192.0.2.1")?;
        let plan = auto()?;
        ensure!(watched(&plan, Role::Uplink) == ["eth0", "eth1"], "{plan:?}");
        let eth1 = plan.watches.iter().find(|watch| watch.name == "eth1").context("no eth1")?;
        ensure!(eth1.why == ["route of vxlan.calico to 10.0.200.17"], "{eth1:?}");
        ensure!(plan.notes.iter().any(|note| note.contains("192.0.2.1")), "{:?}", plan.notes);
        ensure!(plan.ports.iter().eq([(&4789, &true)]), "{:?}", plan.ports);

        // Who takes all from metadata: where there is no other hint, the default route.
        ip("link del vxlan.calico
            link add cilium_vxlan type vxlan external dstport 8472
            route add default via fd00:101::1")?;
        let plan = auto()?;
        ensure!(watched(&plan, Role::Uplink) == ["eth1"] && plan.ports.iter().eq([(&8472, &false)]), "{plan:?}");
        Ok(())
    })
}

#[test]
fn many_devices_are_asked_for_at_once() -> Result<()> {
    isolated("many_devices_are_asked_for_at_once", || {
        ip(UPLINKS)?;
        let device = |vni| format!("link add vni{vni} type vxlan id {vni} dstport 4789 local 10.0.100.3\n");
        ip(&(1..=40).map(device).collect::<String>())?;
        run("bridge fdb add 02:00:00:00:00:0f dev vni7 dst 10.0.101.15")?;
        let plan = auto()?;
        ensure!(plan.vxlans.len() == 40 && watched(&plan, Role::Uplink) == ["eth0", "eth1"], "{plan:?}");
        let vni7 = plan.vxlans.iter().find(|device| device.name == "vni7").context("no vni7")?;
        ensure!(names(&vni7.uplinks)? == ["eth0", "eth1"], "{vni7:?}");
        Ok(())
    })
}

#[test]
fn entries_with_next_hop_objects_lead_somewhere() -> Result<()> {
    isolated("entries_with_next_hop_objects_lead_somewhere", || {
        ip(UPLINKS)?;
        ip("link add vni10 type vxlan id 10 dstport 4789 nolearning
            nexthop add id 101 via 10.0.100.15 fdb
            nexthop add id 102 via 10.0.101.15 fdb
            nexthop add id 110 group 101/102 fdb")?;
        run("bridge fdb add 02:00:00:00:00:0f dev vni10 nhid 110")?;
        let plan = auto()?;
        ensure!(watched(&plan, Role::Uplink) == ["eth0", "eth1"], "{plan:?}");
        Ok(())
    })
}

#[test]
fn named_devices_know_what_lies_on_them() -> Result<()> {
    isolated("named_devices_know_what_lies_on_them", || {
        ip(UPLINKS)?;
        ip("link add br0 type bridge
            link set eth0 master br0
            link add macvlan0 link br0 type macvlan
            link property add dev eth1 altname enp0s9
            link add flannel.1 type vxlan id 1 dev br0 dstport 8472")?;
        let names = ["eth0", "br0", "macvlan0", "enp0s9", "flannel.1", "nosuch"].map(String::from).to_vec();
        let plan = devices::plan(&Snapshot::take()?, &Selection::Named(names));
        ensure!(plan.missing == ["nosuch"], "{:?}", plan.missing);
        ensure!(watched(&plan, Role::Vxlan) == ["flannel.1"], "{plan:?}");
        let above = |name| {
            let watch = plan.watches.iter().find(|watch| watch.name == name);
            watch.map(|watch| watch.above.clone()).with_context(|| format!("no {name}"))
        };
        ensure!(above("eth0")? == [index("br0")?, index("macvlan0")?]);
        ensure!(above("br0")? == [index("macvlan0")?]);
        ensure!(above("macvlan0")?.is_empty() && above("eth1")?.is_empty());
        Ok(())
    })
}
