//! What the kernel program and the daemon share: the checksum judge, and the layout of what crosses between them.
//!
//! ```text
//! checksum   ones' complement arithmetic; the values that the two kernel faults leave on the wire
//! packet     reading and summing bytes (a trait); the header walk: Ethernet, VLAN, IPv4/IPv6, UDP, VXLAN, inner
//! judge      is this packet's checksum right, and if not, why
//! conntrack  a connection's two tuples, and what NAT would have left in the checksum
//! story      the connection inside, and what is remembered of one that had bad packets
//! event      what crosses the ring buffer: integers only, explicit padding
//! config     what the daemon tells the kernel program: read-only globals and small tables
//! counters   what the kernel program counts, by device and CPU
//! translation what the probe on NAT's set-up notes
//! ```
//!
//! `no_std`, no allocation, no panic; `unsafe` only to mark the shared types for aya. The same code runs in the kernel (TC program) and in userspace; only
//! the reading of bytes differs, behind [`packet::Packet`].
//!
//! # Byte order
//! Checksums, ports and sums are kept **as they lie in memory** (network order, read without conversion), as the kernel
//! does: ones' complement sums are independent of byte order as long as every operand is treated alike (RFC 1071,
//! section 2 (B)). Only presentation converts, with [`u16::from_be`].

#![no_std]
#![deny(unsafe_code)]

pub mod checksum;
pub mod config;
pub mod conntrack;
pub mod counters;
pub mod event;
pub mod judge;
pub mod packet;
pub mod story;
pub mod translation;
