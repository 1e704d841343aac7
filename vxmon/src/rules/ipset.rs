//! The sets of ipset that rules ask (`-m set`): whether a packet is in one. It never asks the kernel.

use std::{collections::HashMap, net::IpAddr};

use super::{
    matching::{Packet, Truth},
    model::Side,
};

/// Sets by number.
#[derive(Clone, Debug, Default)]
pub struct IpSets(pub HashMap<u16, IpSet>);

/// A set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IpSet {
    /// Its name.
    pub name: String,
    /// Its type, for instance `hash:ip,port,ip`.
    pub kind: String,
    /// Its elements; none: not read.
    pub elements: Option<Vec<Element>>,
}

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// The first address, and the length of its prefix.
    pub first: Option<(IpAddr, u8)>,
    /// The second one.
    pub second: Option<(IpAddr, u8)>,
    /// IP protocol and port.
    pub port: Option<(u8, u16)>,
    /// It is an exception (`nomatch`), or has what is not read here.
    pub odd: bool,
}

impl IpSets {
    /// Whether the packet is in set `index`, of whose dimensions each takes this end of the packet.
    pub fn holds(&self, index: u16, sides: &[Side], packet: &Packet) -> Truth {
        let Some((set, elements)) = self.0.get(&index).and_then(|set| Some((set, set.elements.as_ref()?))) else {
            return Truth::Unknown;
        };
        let fields: Vec<&str> = match set.kind.split_once(':') {
            Some(("hash", fields)) => fields.split(',').collect(),
            _ => return Truth::Unknown,
        };
        if fields.len() != sides.len() || elements.iter().any(|element| element.odd) {
            return Truth::Unknown;
        }
        let mut known = true;
        let found = elements.iter().any(|element| {
            is_in(element, &fields, sides, packet).unwrap_or_else(|| {
                known = false;
                false
            })
        });
        match (found, known) {
            (true, _) => Truth::Yes,
            (false, true) => Truth::No,
            (false, false) => Truth::Unknown,
        }
    }
}

/// Whether the packet is this element; none if that is not known.
fn is_in(element: &Element, fields: &[&str], sides: &[Side], packet: &Packet) -> Option<bool> {
    let mut addresses = [element.first, element.second].into_iter();
    for (field, side) in fields.iter().zip(sides) {
        let is = match *field {
            "ip" | "net" => {
                let own = match side {
                    Side::Source => packet.src?,
                    Side::Destination | Side::Either => packet.dst?,
                };
                within(own, addresses.next()??)
            }
            "port" => {
                let own = match side {
                    Side::Source => packet.sport?,
                    Side::Destination | Side::Either => packet.dport?,
                };
                element.port? == (packet.protocol?, own)
            }
            _ => return None,
        };
        if !is {
            return Some(false);
        }
    }
    Some(true)
}

fn within(own: IpAddr, (net, prefix): (IpAddr, u8)) -> bool {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    let ((own, own_width), (net, width)) = (number(own), number(net));
    own_width == width && (prefix == 0 || (own ^ net) >> (128 - u32::from(prefix.min(width))) == 0)
}
