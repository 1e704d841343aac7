//! VXLAN frames made by hand.

use std::net::{IpAddr, Ipv4Addr};

use crate::lab::Side;

/// What goes into the outer UDP checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterSum {
    /// The right one.
    Right,
    /// 0: none.
    Zero,
    /// This value, right or not.
    Value(u16),
    /// The sum that would be right for another source port: fault B.
    StalePort(u16),
}

/// An Ethernet frame that carries a VXLAN packet. Addresses and ports are those of [`Lab::frame`](crate::Lab::frame), or
/// made up; all lengths are right.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Outer source MAC address.
    pub src_mac: [u8; 6],
    /// Outer destination MAC address.
    pub dst_mac: [u8; 6],
    /// VLAN tags, outermost first: protocol (0x8100, 0x88a8) and tag control information.
    pub vlans: Vec<(u16, u16)>,
    /// Outer source address; of the family of `dst`.
    pub src: IpAddr,
    /// Outer destination address.
    pub dst: IpAddr,
    /// Outer source port.
    pub sport: u16,
    /// Outer destination port.
    pub dport: u16,
    /// Outer UDP checksum.
    pub sum: OuterSum,
    /// Network identifier.
    pub vni: u32,
    /// The inner frame, from its Ethernet header on.
    pub inner: Vec<u8>,
}

impl Default for Frame {
    fn default() -> Self {
        Self {
            src_mac: [2, 0, 0, 0, 1, 0x0a],
            dst_mac: [2, 0, 0, 0, 1, 0x0b],
            vlans: Vec::new(),
            src: Ipv4Addr::new(10, 0, 100, 3).into(),
            dst: Ipv4Addr::new(10, 0, 100, 15).into(),
            sport: 49_152,
            dport: 8472,
            sum: OuterSum::Right,
            vni: 1,
            inner: Self::inner_udp(b"vxmon"),
        }
    }
}

impl Frame {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut udp = self.udp(0);
        let right = match udp_sum(self.src, self.dst, &udp) {
            0 => 0xffff,
            sum => sum,
        };
        let sum = match self.sum {
            OuterSum::Right => right,
            OuterSum::Zero => 0,
            OuterSum::Value(value) => value,
            OuterSum::StalePort(port) => {
                let before = Self { sport: port, ..self.clone() }.udp(0);
                udp_sum(self.src, self.dst, &before)
            }
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut frame = [self.dst_mac, self.src_mac].concat();
        for (protocol, tag) in &self.vlans {
            frame.extend(protocol.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(ip_packet(self.src, self.dst, 17, &udp));
        frame
    }

    /// An inner frame from the VXLAN device of node a to that of node b, with a UDP datagram whose sum is right.
    #[must_use]
    pub fn inner_udp(payload: &[u8]) -> Vec<u8> {
        let (src, dst) = (Side::A.overlay(crate::Family::V4), Side::B.pod(crate::Family::V4));
        let length = payload.len() as u16 + 8;
        let mut udp = [40_000_u16, 53, length, 0].map(u16::to_be_bytes).concat();
        udp.extend(payload);
        let sum = udp_sum(src, dst, &udp);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut frame = [Side::B.overlay_mac(), Side::A.overlay_mac()].concat();
        frame.extend(ip_packet(src, dst, 17, &udp));
        frame
    }

    /// Folded sum of the outer pseudo-header, not complemented: what the field holds while a device has to fill it in.
    #[must_use]
    pub fn pseudo_sum(&self) -> u16 {
        pseudo_sum(self.src, self.dst, self.inner.len() + 16)
    }

    /// From the outer UDP header on.
    fn udp(&self, sum: u16) -> Vec<u8> {
        let length = self.inner.len() as u16 + 16;
        let mut udp = [self.sport, self.dport, length, sum].map(u16::to_be_bytes).concat();
        udp.extend([8, 0, 0, 0]);
        udp.extend((self.vni << 8).to_be_bytes());
        udp.extend(&self.inner);
        udp
    }
}

/// Folded ones' complement sum of `data` as big-endian words, on top of `start`; not complemented.
#[must_use]
pub fn ones_complement_sum(data: &[u8], start: u32) -> u16 {
    let mut sum = u64::from(start);
    for pair in data.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of a UDP datagram whose checksum field is 0.
fn udp_sum(src: IpAddr, dst: IpAddr, udp: &[u8]) -> u16 {
    !ones_complement_sum(udp, u32::from(pseudo_sum(src, dst, udp.len())))
}

fn pseudo_sum(src: IpAddr, dst: IpAddr, length: usize) -> u16 {
    let addresses = [octets(src), octets(dst)].concat();
    ones_complement_sum(&addresses, 17 + length as u32)
}

/// The Ethernet type, and an IP packet.
fn ip_packet(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let addresses = [octets(src), octets(dst)].concat();
    let size = payload.len() as u16;
    let mut packet = Vec::with_capacity(payload.len() + 42);
    if dst.is_ipv4() {
        let mut header = vec![0x45, 0];
        header.extend((size + 20).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
        header.extend(addresses);
        let sum = !ones_complement_sum(&header, 0);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend([0x08, 0x00]);
        packet.extend(header);
    } else {
        packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        packet.extend(size.to_be_bytes());
        packet.extend([protocol, 64]);
        packet.extend(addresses);
    }
    packet.extend(payload);
    packet
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
