//! Two nodes joined by a veth pair, with a flannel-like VXLAN between them.
//!
//! | | node a | node b |
//! |---|---|---|
//! | underlay | 10.0.100.3, fd00:100::3 | 10.0.100.15, fd00:100::f |
//! | VXLAN device | 10.244.0.0, fd00:244:: | 10.244.2.0, fd00:244:2:: |
//! | pod (on `cni0`) | 10.244.0.73, fd00:244::73 | 10.244.2.73, fd00:244:2::73 |
//!
//! The services 10.96.0.10 and fd00:96::10 lead to the pod on node b, once [`Lab::rules`] has run. All routes and
//! neighbours are static, so that nothing but the traffic of a test crosses the wire (multicast reports of IPv6 aside).

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{Netns, Rules, Topology, cmd, rules, skip::has_parameter, traffic::Frame};

/// Whether a retransmit gets another hash, and so a tunnel's packet another source port: since 5.18 a parameter, always from
/// 4.10 on before that.
pub const TXREHASH: &str = "net.core.txrehash";
/// Port of the HTTP service and of the pod behind it.
pub const HTTP_PORT: u16 = 9153;
/// Port of the UDP service and of the pod behind it.
pub const UDP_PORT: u16 = 53;

/// An address family: of the underlay, or of the packets inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// How to wire a [`Lab`]. The default is the case in which fault B shows.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// Family of the outer packets.
    pub underlay: Family,
    /// Outer UDP checksums, at both ends: `udpcsum`; over IPv6, `noudp6zerocsumtx`.
    pub udpcsum: bool,
    /// Checksum offload of the veth, both ends. On, the receiver never verifies what it gets.
    pub uplink_tx_offload: bool,
    /// `tx-checksum-ip-generic` of the VXLAN device, both ends. Off is the usual mitigation.
    pub vxlan_tx_offload: bool,
    /// TSO, GSO and tunnel segmentation of the uplink and the VXLAN device, both ends. With it, GSO packets reach the TC
    /// egress of the uplink, whatever the checksum offload.
    pub segmentation: bool,
    /// MTU of the underlay. The VXLAN device gets 50 less (over IPv6: 70).
    pub mtu: u32,
    /// The VXLAN device is bound to the lower device (`dev`), as flannel makes it; else only to `local`, as Calico does.
    pub fixed_lower: bool,
    /// What carries the underlay addresses.
    pub topology: Topology,
    /// Name of the veth, in both nodes.
    pub uplink: String,
    /// Name of the VXLAN device, in both nodes.
    pub vxlan: String,
    /// Network identifier.
    pub vni: u32,
    /// Destination port of the VXLAN.
    pub port: u16,
    /// [`TXREHASH`]: whether a retransmit changes the source port of the VXLAN.
    pub txrehash: Option<bool>,
    /// `nf_conntrack_udp_timeout`, in seconds.
    pub udp_timeout: Option<u32>,
    /// Further kernel parameters, for both nodes.
    pub sysctls: Vec<(String, String)>,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            underlay: Family::V4,
            udpcsum: true,
            uplink_tx_offload: false,
            vxlan_tx_offload: true,
            segmentation: true,
            mtu: 1500,
            fixed_lower: true,
            topology: Topology::Plain,
            uplink: "uplink".to_owned(),
            vxlan: "flannel.1".to_owned(),
            vni: 1,
            port: 8472,
            txrehash: None,
            udp_timeout: None,
            sysctls: Vec::new(),
        }
    }
}

impl LabOptions {
    /// Builds the lab.
    pub fn build(self) -> Result<Lab> {
        Lab::new(self)
    }

    /// MTU of the VXLAN device.
    #[must_use]
    pub fn vxlan_mtu(&self) -> u32 {
        let overhead = match self.underlay {
            Family::V4 => 50,
            Family::V6 => 70,
        };
        self.mtu - overhead
    }
}

/// Which of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client's node, which has the NAT rules.
    A,
    /// The pod's node.
    B,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Third octet of the pod network.
    fn net(self) -> u16 {
        match self {
            Self::A => 0,
            Self::B => 2,
        }
    }

    /// Last octet of the MAC addresses.
    fn mac(self) -> u8 {
        match self {
            Self::A => 0x0a,
            Self::B => 0x0b,
        }
    }

    /// Address on the underlay.
    #[must_use]
    pub fn underlay(self, family: Family) -> IpAddr {
        match (family, self) {
            (Family::V4, Self::A) => Ipv4Addr::new(10, 0, 100, 3).into(),
            (Family::V4, Self::B) => Ipv4Addr::new(10, 0, 100, 15).into(),
            (Family::V6, Self::A) => Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0, 3).into(),
            (Family::V6, Self::B) => Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0, 0xf).into(),
        }
    }

    /// Address of the VXLAN device: the source of inner packets that the node itself sends.
    #[must_use]
    pub fn overlay(self, family: Family) -> IpAddr {
        self.in_pod_network(family, 0)
    }

    /// Address of the pod.
    #[must_use]
    pub fn pod(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.in_pod_network(family, 73),
            Family::V6 => self.in_pod_network(family, 0x73),
        }
    }

    fn in_pod_network(self, family: Family, host: u8) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, 244, self.net().to_be_bytes()[1], host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x244, self.net(), 0, 0, 0, 0, host.into()).into(),
        }
    }

    /// MAC address of the VXLAN device.
    #[must_use]
    pub fn overlay_mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 0, self.mac()]
    }
}

/// Address of the service.
#[must_use]
pub fn service(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, 10).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10).into(),
    }
}

/// The two nodes. Dropping it removes them.
#[derive(Debug)]
pub struct Lab {
    /// The node with the NAT rules, where clients run.
    pub a: Netns,
    /// The node with the pod.
    pub b: Netns,
    options: LabOptions,
    stacked: [Vec<String>; 2],
}

impl Lab {
    /// Builds the lab: see [`LabOptions`].
    pub fn new(options: LabOptions) -> Result<Self> {
        if options.mtu < 1280 + 70 {
            bail!("MTU {} leaves less than IPv6 needs inside: at least 1350", options.mtu);
        }
        let (a, b) = Netns::pair()?;
        let stacked = [Side::A, Side::B].map(|side| options.topology.stacked(side, &options.uplink));
        let lab = Self { a, b, options, stacked };
        lab.kernel_parameters()?;
        lab.join()?;
        for side in [Side::A, Side::B] {
            lab.links(side)?;
        }
        for side in [Side::A, Side::B] {
            lab.addresses(side)?;
            lab.create_vxlan(side)?;
        }
        Ok(lab)
    }

    /// How it was built.
    #[must_use]
    pub fn options(&self) -> &LabOptions {
        &self.options
    }

    /// The namespace of a node.
    #[must_use]
    pub fn node(&self, side: Side) -> &Netns {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// Name of the device with the underlay addresses, by which outer packets leave: the veth, or what is stacked on it.
    #[must_use]
    pub fn lower(&self, side: Side) -> &str {
        self.stacked(side).last().unwrap_or(&self.options.uplink)
    }

    /// Names of the devices on the veth, the lowest first.
    #[must_use]
    pub fn stacked(&self, side: Side) -> &[String] {
        match side {
            Side::A => &self.stacked[0],
            Side::B => &self.stacked[1],
        }
    }

    /// Names of the veths: more than one if a bond is on them.
    #[must_use]
    pub fn wires(&self) -> Vec<String> {
        self.options.topology.wires(&self.options.uplink)
    }

    /// The pod on node b, at the HTTP port.
    #[must_use]
    pub fn pod_socket(&self, family: Family) -> SocketAddr {
        (Side::B.pod(family), HTTP_PORT).into()
    }

    /// The service, at the HTTP port: by the NAT rules to the pod on node b.
    #[must_use]
    pub fn service_socket(&self, family: Family) -> SocketAddr {
        (service(family), HTTP_PORT).into()
    }

    /// The pod on node b, at the UDP port.
    #[must_use]
    pub fn pod_udp(&self, family: Family) -> SocketAddr {
        (Side::B.pod(family), UDP_PORT).into()
    }

    /// The service, at the UDP port: by the NAT rules to the pod on node b.
    #[must_use]
    pub fn service_udp(&self, family: Family) -> SocketAddr {
        (service(family), UDP_PORT).into()
    }

    /// Installs NAT rules on node a, beside those that are there.
    pub fn rules(&self, rules: &Rules) -> Result<()> {
        rules.install(&self.a)
    }

    /// Removes all NAT rules of all backends, and all conntrack entries, from node a.
    pub fn flush_rules(&self) -> Result<()> {
        rules::flush(&self.a)
    }

    /// Forgets all connections of node a.
    pub fn flush_conntrack(&self) -> Result<()> {
        rules::flush_conntrack(&self.a)
    }

    /// Makes the VXLAN device of a node, with its routes, neighbours and offloads.
    pub fn create_vxlan(&self, side: Side) -> Result<()> {
        let options = &self.options;
        let (dev, port, vni, mtu) = (&options.vxlan, options.port, options.vni, options.vxlan_mtu());
        let (local, remote) = (side.underlay(options.underlay), side.other().underlay(options.underlay));
        let lower = if options.fixed_lower { format!("dev {}", self.lower(side)) } else { String::new() };
        let sums = match (options.underlay, options.udpcsum) {
            (Family::V4, true) => "udpcsum",
            (Family::V4, false) => "noudpcsum",
            (Family::V6, true) => "noudp6zerocsumtx udp6zerocsumrx",
            (Family::V6, false) => "udp6zerocsumtx udp6zerocsumrx",
        };
        let (mac, peer_mac) = (mac_text(side.overlay_mac()), mac_text(side.other().overlay_mac()));
        let mut lines = format!(
            "link add {dev} mtu {mtu} address {mac} type vxlan id {vni} dstport {port} local {local} {lower} nolearning {sums}\n\
             link set {dev} up\n"
        );
        for (family, host, pods, services) in
            [(Family::V4, 32, 24, "10.96.0.0/12"), (Family::V6, 128, 64, "fd00:96::/112")]
        {
            let (own, peer) = (side.overlay(family), side.other().overlay(family));
            let nodad = if family == Family::V6 { "nodad" } else { "" };
            write!(
                lines,
                "addr add {own}/{host} dev {dev} {nodad}\n\
                 neigh add {peer} lladdr {peer_mac} dev {dev} nud permanent\n\
                 route add {peer}/{pods} via {peer} dev {dev} onlink\n\
                 route add {services} dev {dev}\n"
            )?;
        }
        let node = self.node(side);
        node.ip(&lines)?;
        let name = node.name();
        cmd::run(Command::new("bridge").args([
            "-n",
            name,
            "fdb",
            "add",
            &peer_mac,
            "dev",
            dev,
            "dst",
            &remote.to_string(),
        ]))?;
        let mut features = Vec::new();
        if !options.vxlan_tx_offload {
            features.extend(["tx-checksum-ip-generic", "off"]);
        }
        if !options.segmentation {
            features.extend(["tso", "off", "gso", "off"]);
        }
        ethtool(node, dev, &features)
    }

    /// Deletes the VXLAN device of a node.
    pub fn delete_vxlan(&self, side: Side) -> Result<()> {
        self.node(side).ip(&format!("link del {}\n", self.options.vxlan))
    }

    /// A frame from node a to node b, as its VXLAN device would send it, to be changed and sent by hand.
    #[must_use]
    pub fn frame(&self) -> Frame {
        let options = &self.options;
        Frame {
            src_mac: self.lower_mac(Side::A),
            dst_mac: self.lower_mac(Side::B),
            src: Side::A.underlay(options.underlay),
            dst: Side::B.underlay(options.underlay),
            dport: options.port,
            vni: options.vni,
            ..Frame::default()
        }
    }

    fn lower_mac(&self, side: Side) -> [u8; 6] {
        let kind = if self.lower(side) == self.options.uplink { 1 } else { 2 };
        [2, 0, 0, 0, kind, side.mac()]
    }

    fn kernel_parameters(&self) -> Result<()> {
        let mut settings: Vec<(String, String)> = [
            // No duplicate address detection, no link-local addresses, hence no router solicitations.
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.default.addr_gen_mode", "1"),
            ("net.ipv6.conf.default.router_solicitations", "0"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        if let Some(on) = self.options.txrehash
            && (!on || has_parameter(TXREHASH))
        {
            settings.push((TXREHASH.to_owned(), u8::from(on).to_string()));
        }
        if let Some(seconds) = self.options.udp_timeout {
            const UDP_TIMEOUT: &str = "net.netfilter.nf_conntrack_udp_timeout";
            if !has_parameter(UDP_TIMEOUT) {
                // A module that no rule has asked for yet. What is missing without it is said below.
                let _ = cmd::run(Command::new("modprobe").arg("nf_conntrack"));
            }
            settings.push((UDP_TIMEOUT.to_owned(), seconds.to_string()));
        }
        settings.extend(self.options.sysctls.iter().cloned());
        self.a.sysctl(&settings)?;
        self.b.sysctl(&settings)
    }

    /// The veth pairs.
    fn join(&self) -> Result<()> {
        // Of a device with a tag inside its packets, the MTU is that without the tag.
        let mtu = self.options.mtu + self.options.topology.tag_bytes();
        let mut features = Vec::new();
        if !self.options.uplink_tx_offload {
            features.extend(["tx", "off"]);
        }
        if !self.options.segmentation {
            features.extend(["tso", "off", "gso", "off"]);
            features.extend(["tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off"]);
        }
        for (kind, wire) in [1, 3].into_iter().zip(self.wires()) {
            let end = |side: Side, netns: &Netns| {
                let mac = mac_text([2, 0, 0, 0, kind, side.mac()]);
                format!("name {wire} mtu {mtu} address {mac} netns {}", netns.name())
            };
            let (a, b) = (end(Side::A, &self.a), end(Side::B, &self.b));
            let line = format!("link add {a} type veth peer {b}\n");
            cmd::run_with_input(Command::new("ip").args(["-batch", "-"]), &line)?;
            ethtool(&self.a, &wire, &features)?;
            ethtool(&self.b, &wire, &features)?;
        }
        Ok(())
    }

    /// All devices but the VXLAN, up.
    fn links(&self, side: Side) -> Result<()> {
        let LabOptions { uplink, mtu, topology, .. } = &self.options;
        let stacked = topology.lines(side, uplink, *mtu, &mac_text(self.lower_mac(side)))?;
        self.node(side).ip(&format!("link set lo up\n{stacked}link add cni0 type bridge\nlink set cni0 up\n"))
    }

    /// Addresses and neighbours of the underlay, and the pod.
    fn addresses(&self, side: Side) -> Result<()> {
        let (lower, peer_mac) = (self.lower(side), mac_text(self.lower_mac(side.other())));
        let mut lines = String::new();
        for (family, prefix, nodad) in [(Family::V4, 24, ""), (Family::V6, 64, "nodad")] {
            let (own, peer, pod) = (side.underlay(family), side.other().underlay(family), side.pod(family));
            write!(
                lines,
                "addr add {own}/{prefix} dev {lower} {nodad}\n\
                 neigh add {peer} lladdr {peer_mac} dev {lower} nud permanent\n\
                 addr add {pod}/{prefix} dev cni0 {nodad}\n"
            )?;
        }
        self.node(side).ip(&lines)
    }
}

/// Sets features of a device inside; nothing to set is fine.
pub fn ethtool(node: &Netns, dev: &str, features: &[&str]) -> Result<()> {
    if features.is_empty() {
        return Ok(());
    }
    node.run("ethtool", &[&["-K", dev], features].concat()).map(drop)
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
