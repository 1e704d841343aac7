//! vxmon: finds VXLAN packets whose checksum the kernel got wrong, and says which connection and which NAT did it.
//!
//! # Layout
//! ```text
//! cli/        one file for each verb
//! monitor     the daemon's loop
//! check       judges capture files
//! account     what is kept of each device's packets
//! source/     where observations come from: TC programs, packet sockets, capture files
//! netlink/    the kernel's wire formats: links, addresses, routes, tc, conntrack
//! devices     which devices to watch
//! rules/      the NAT rules of the node: read, matched, rendered
//! attribute/  the sections of an anomaly that the packet itself does not hold: its conntrack entry, the cause
//! telemetry   what is noted for the metrics
//! ethtool     a device's offload features
//! event       the schema vxmon.event/1
//! release     the kernel's release
//! held        lines that wait for a moment, for rules that are just being read
//! sandbox     what the daemon gives up before it attaches
//! sink/       text and JSON; the live log's socket and the metrics
//! ```
//! Arrows go one way: source, attribute, sink. Sinks never ask the kernel.

pub mod account;
pub mod attribute;
pub mod check;
pub mod cli;
pub mod clock;
pub mod devices;
pub mod ethtool;
pub mod event;
pub mod held;
pub mod monitor;
pub mod netlink;
pub mod release;
pub mod rules;
pub mod sandbox;
pub mod sink;
pub mod source;
pub mod telemetry;
