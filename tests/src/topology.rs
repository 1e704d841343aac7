//! What carries the underlay addresses of a node: the veth, or devices that are stacked on it.

use std::{fmt::Write, process::Command};

use anyhow::Result;

use crate::{Netns, cmd, lab::Side};

/// What carries the underlay addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// The veth itself.
    Plain,
    /// The bridge `br0` of node a, whose port is the veth.
    Bridge,
    /// The macvlan device `mv0` of node a, on the veth.
    Macvlan,
    /// An 802.1Q VLAN on the veth, in both nodes, as all below.
    Vlan,
    /// Likewise, but packets have their tag already when they pass it (`reorder_hdr off`).
    TaggedVlan,
    /// An 802.1Q VLAN in an 802.1ad one.
    Qinq,
    /// A bond of two veths, of which one sends.
    Bond,
    /// A bond of two veths, which send in turn.
    BondInTurn,
    /// A VLAN on a bond.
    BondVlan,
    /// A bridge, whose port is a VLAN.
    VlanBridge,
}

/// A device on the one below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Bridge,
    Macvlan,
    Vlan { protocol: &'static str, id: u16, reorder: bool },
    Bond { mode: &'static str },
}

const VLAN: Layer = Layer::Vlan { protocol: "802.1q", id: 100, reorder: true };
const ACTIVE_BACKUP: Layer = Layer::Bond { mode: "active-backup" };

impl Topology {
    /// Those with devices that not every kernel has.
    pub const RARE: [Self; 7] =
        [Self::Vlan, Self::TaggedVlan, Self::Qinq, Self::Bond, Self::BondInTurn, Self::BondVlan, Self::VlanBridge];

    /// From the lowest to the one that has the addresses.
    fn layers(self, side: Side) -> &'static [Layer] {
        const TAGGED: Layer = Layer::Vlan { protocol: "802.1q", id: 100, reorder: false };
        const SERVICE: Layer = Layer::Vlan { protocol: "802.1ad", id: 200, reorder: true };
        match (self, side) {
            (Self::Plain, _) | (Self::Bridge | Self::Macvlan, Side::B) => &[],
            (Self::Bridge, Side::A) => &[Layer::Bridge],
            (Self::Macvlan, Side::A) => &[Layer::Macvlan],
            (Self::Vlan, _) => &[VLAN],
            (Self::TaggedVlan, _) => &[TAGGED],
            (Self::Qinq, _) => &[SERVICE, VLAN],
            (Self::Bond, _) => &[ACTIVE_BACKUP],
            (Self::BondInTurn, _) => &[Layer::Bond { mode: "balance-rr" }],
            (Self::BondVlan, _) => &[ACTIVE_BACKUP, VLAN],
            (Self::VlanBridge, _) => &[VLAN, Layer::Bridge],
        }
    }

    /// Names of the veths.
    #[must_use]
    pub fn wires(self, uplink: &str) -> Vec<String> {
        let bond = self.layers(Side::A).iter().any(|layer| matches!(layer, Layer::Bond { .. }));
        let second = bond.then(|| format!("{uplink}2"));
        [uplink.to_owned()].into_iter().chain(second).collect()
    }

    /// Names of the devices on the veths, the lowest first.
    #[must_use]
    pub fn stacked(self, side: Side, uplink: &str) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for layer in self.layers(side) {
            let below = names.last().map_or(uplink, String::as_str);
            names.push(match layer {
                Layer::Bridge => "br0".to_owned(),
                Layer::Macvlan => "mv0".to_owned(),
                Layer::Vlan { id, .. } => format!("{below}.{id}"),
                Layer::Bond { .. } => "bond0".to_owned(),
            });
        }
        names
    }

    /// By how much packets grow on their way down to the veth, in bytes.
    pub(crate) fn tag_bytes(self) -> u32 {
        tag_bytes(self.layers(Side::A))
    }

    /// Lines of `ip` that stack the devices on the veths and set all of them up; the uppermost gets this address.
    pub(crate) fn lines(self, side: Side, uplink: &str, mtu: u32, mac: &str) -> Result<String> {
        let names = self.stacked(side, uplink);
        let wires = self.wires(uplink);
        let mut lines = String::new();
        let mut below = uplink;
        let layers = self.layers(side);
        for (index, (layer, name)) in layers.iter().zip(&names).enumerate() {
            let above = &layers[index + 1..];
            let address = if above.is_empty() { format!("address {mac}") } else { String::new() };
            let mtu = mtu + tag_bytes(above);
            match layer {
                Layer::Bridge => {
                    write!(lines, "link add {name} mtu {mtu} {address} type bridge\nlink set {below} master {name}\n")?;
                }
                Layer::Macvlan => {
                    writeln!(lines, "link add {name} link {below} mtu {mtu} {address} type macvlan mode bridge")?;
                }
                Layer::Vlan { protocol, id, reorder } => {
                    let reorder = if *reorder { "on" } else { "off" };
                    writeln!(
                        lines,
                        "link add {name} link {below} mtu {mtu} {address} type vlan protocol {protocol} id {id} reorder_hdr {reorder}"
                    )?;
                }
                Layer::Bond { mode } => {
                    writeln!(lines, "link add {name} mtu {mtu} {address} type bond mode {mode} miimon 100")?;
                    // Ports must be down to be taken.
                    for wire in &wires {
                        writeln!(lines, "link set {wire} master {name}")?;
                    }
                }
            }
            below = name;
        }
        for dev in wires.iter().chain(&names) {
            writeln!(lines, "link set {dev} up")?;
        }
        Ok(lines)
    }

    /// What this kernel lacks for it; `None` if nothing.
    pub fn missing(self) -> Result<Option<String>> {
        let node = Netns::create("try")?;
        node.ip("link add uplink type veth peer uplink2\n")?;
        let mut command = Command::new("ip");
        command.args(["-n", node.name(), "-batch", "-"]);
        let made = cmd::run_with_input(&mut command, &self.lines(Side::A, "uplink", 1400, "02:00:00:00:00:01")?);
        match made.err().map(|error| format!("{error:#}")) {
            None => Ok(None),
            Some(error) if ["Unknown device type", "not supported"].iter().any(|why| error.contains(why)) => {
                Ok(Some(format!("this kernel cannot make the devices of {self:?}: it has no such device type")))
            }
            Some(error) => anyhow::bail!(error),
        }
    }
}

fn tag_bytes(layers: &[Layer]) -> u32 {
    layers.iter().map(|layer| if matches!(layer, Layer::Vlan { .. }) { 4 } else { 0 }).sum()
}
