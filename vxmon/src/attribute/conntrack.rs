//! The outer packet's connection: the entry the packet itself carried, which cannot be the wrong one; by netlink where
//! the kernel program could not read it.

use std::net::IpAddr;

use vxmon_common::{
    conntrack::Tuple,
    event::{Event, event_flag},
    packet::Family,
};

use super::{headers::address, status_names};
use crate::{
    event::{Ct, Endpoints},
    netlink::conntrack as ctnetlink,
};

/// `AF_INET` and `AF_INET6` as they stand in a tuple.
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Where entries are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The skb, and netlink where the skb does not tell.
    Auto,
    /// The skb alone.
    Skb,
    /// Netlink alone.
    Netlink,
    /// None: the packet comes from a capture.
    Nowhere,
}

/// An entry for the event, and its tuples for the prediction.
pub struct Found {
    /// For the event.
    pub ct: Ct,
    /// Original direction.
    pub orig: Tuple,
    /// Reply direction.
    pub reply: Tuple,
}

/// What is known of a packet's entry.
pub enum Entry {
    /// It has this one.
    Found(Box<Found>),
    /// The packet itself said that it has none: conntrack's NAT did not touch it.
    None,
    /// None was listed when it was looked for: there may have been one as the packet left.
    NoneListed,
}

/// Finds entries.
#[derive(Debug)]
pub struct Lookup {
    source: Source,
    netlink: Option<ctnetlink::Conntrack>,
}

impl Lookup {
    pub fn new(source: Source) -> Self {
        Self { source, netlink: None }
    }

    /// The entry of the event's packet, or that it has none; an error in words if that could not be found out.
    pub fn find(&mut self, event: &Event, outer: &Endpoints) -> Result<Entry, String> {
        if self.source == Source::Nowhere {
            return Err("a capture does not hold it".to_owned());
        }
        if self.source != Source::Netlink {
            if event.flags & event_flag::CONNTRACK != 0 {
                return Ok(Entry::Found(Box::new(from_skb(event))));
            }
            if event.flags & event_flag::NO_CONNTRACK != 0 {
                return Ok(Entry::None);
            }
            if self.source == Source::Skb {
                return Err("the skb's entry cannot be read on this kernel".to_owned());
            }
        }
        self.by_netlink(outer)
    }

    fn by_netlink(&mut self, outer: &Endpoints) -> Result<Entry, String> {
        let (Ok(src), Ok(dst)) = (outer.src.parse(), outer.dst.parse()) else {
            return Err("the packet's addresses could not be read".to_owned());
        };
        let netlink = match &mut self.netlink {
            Some(netlink) => netlink,
            None => self.netlink.insert(ctnetlink::Conntrack::open().map_err(|error| error.to_string())?),
        };
        let packet = ctnetlink::Tuple::udp(src, outer.sport, dst, outer.dport);
        let entry = netlink.by_packet(packet, 0).map_err(|error| error.to_string())?;
        Ok(entry.map_or(Entry::NoneListed, |entry| {
            Entry::Found(Box::new(Found {
                ct: Ct {
                    orig: endpoints_of(&entry.orig),
                    reply: endpoints_of(&entry.reply),
                    status: status_names(u64::from(entry.status)),
                    source: "netlink",
                },
                orig: tuple_of(&entry.orig),
                reply: tuple_of(&entry.reply),
            }))
        }))
    }
}

fn from_skb(event: &Event) -> Found {
    let side = |tuple: &Tuple| {
        let family = if tuple.family == AF_INET6 { Family::V6 } else { Family::V4 };
        Endpoints {
            src: address(family, &tuple.src).to_string(),
            sport: u16::from_be(tuple.sport),
            dst: address(family, &tuple.dst).to_string(),
            dport: u16::from_be(tuple.dport),
        }
    };
    Found {
        ct: Ct {
            orig: side(&event.ct_orig),
            reply: side(&event.ct_reply),
            status: status_names(event.ct_status),
            source: "skb",
        },
        orig: event.ct_orig,
        reply: event.ct_reply,
    }
}

fn endpoints_of(tuple: &ctnetlink::Tuple) -> Endpoints {
    Endpoints { src: tuple.src.to_string(), sport: tuple.sport, dst: tuple.dst.to_string(), dport: tuple.dport }
}

/// An entry of netlink's as the kernel keeps it.
fn tuple_of(tuple: &ctnetlink::Tuple) -> Tuple {
    Tuple {
        src: words(tuple.src),
        sport: tuple.sport.to_be(),
        family: if tuple.src.is_ipv4() { AF_INET } else { AF_INET6 },
        dst: words(tuple.dst),
        dport: tuple.dport.to_be(),
        proto: tuple.proto,
        direction: 0,
    }
}

fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
        IpAddr::V6(address) => {
            let mut words = [0; 4];
            for (word, four) in words.iter_mut().zip(address.octets().chunks_exact(4)) {
                *word = four.try_into().map_or(0, u32::from_ne_bytes);
            }
            words
        }
    }
}
