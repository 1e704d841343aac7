//! The one place that speaks netlink: questions to the kernel about links, addresses, routes, forwarding entries, traffic
//! control and conntrack, and the news that one of them changed.
//!
//! It never decides anything (what to watch is [`crate::devices`]), never loads or attaches programs, never reads `/sys`,
//! and never starts another program. A socket belongs to the network namespace of the thread that opened it.
//!
//! Requests are built from the types of the netlink-packet crates. Replies are read one attribute at a time: those crates
//! refuse a whole message for one attribute that they cannot read, and a new kernel's statistics field must not hide the
//! uplink it belongs to.
//!
//! # Layout
//! - [`socket`]: request, dump, acknowledgement; [`monitor`]: multicast news
//! - [`link`], [`address`], [`fdb`], [`route`], [`nexthop`]: what the devices of the namespace are and where packets go
//! - [`tc`]: the clsact qdisc and its filters
//! - [`conntrack`]: one entry by its tuple; [`nftables`]: the ruleset; [`ipset`]: its sets;
//!   [`ruleset`]: news that nftables changed

pub mod address;
pub(crate) mod attribute;
pub mod conntrack;
mod error;
pub mod fdb;
pub mod ipset;
pub mod link;
pub mod monitor;
pub mod nexthop;
pub mod nftables;
pub mod route;
pub mod ruleset;
pub mod socket;
pub mod tc;

pub use error::Error;
pub use socket::{Protocol, Socket};
