//! Makes tunnel packets whose checksum state is known, and breaks them.
//!
//! The right sums are computed here by the plainest form of the Internet checksum, over the assembled bytes, by nothing of
//! `vxmon_common`: this is the second opinion that the judge is held against. A sum by Local Checksum Offload is found in
//! the longest way: the inner sum is filled in first, as a device would do it later, and the outer one summed over all of
//! the result. Everything follows from a seed, so that a failure can be repeated.

#![allow(dead_code, reason = "each test that includes this module uses a part of it")]

use vxmon_common::judge::{SKB_GSO_UDP_TUNNEL, SKB_GSO_UDP_TUNNEL_CSUM, Skb, State, Surroundings, Verdict};

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// The Internet checksum's sum, folded, over bytes taken as big-endian words (RFC 1071).
pub fn plain_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    sum as u16
}

/// Equal in ones' complement.
pub fn congruent(a: u16, b: u16) -> bool {
    u32::from(a) % 0xffff == u32::from(b) % 0xffff
}

pub fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Where an IP packet's parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub v6: bool,
    pub l3: usize,
    pub l4: usize,
    pub end: usize,
    pub proto: u8,
}

impl Place {
    /// Offset and length of both addresses.
    pub fn addresses(&self) -> (usize, usize) {
        if self.v6 { (self.l3 + 8, 32) } else { (self.l3 + 12, 8) }
    }

    /// Sum of the pseudo-header, folded, not complemented.
    pub fn pseudo(&self, bytes: &[u8]) -> u16 {
        let (at, len) = self.addresses();
        let mut header = bytes[at..at + len].to_vec();
        header.extend(((self.end - self.l4) as u32).to_be_bytes());
        header.extend([0, self.proto]);
        plain_sum(&header)
    }

    /// The checksum for what stands in the packet now, the field itself taken as 0.
    pub fn full(&self, bytes: &[u8], field: usize) -> u16 {
        let mut data = bytes[self.l4..self.end].to_vec();
        put(&mut data, field, 0);
        let pseudo = if self.proto == ICMP { 0 } else { self.pseudo(bytes) };
        let mut sum = u32::from(plain_sum(&data)) + u32::from(pseudo);
        sum = (sum & 0xffff) + (sum >> 16);
        match !(sum as u16) {
            0 => 0xffff,
            check => check,
        }
    }
}

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const ESP: u8 = 50;

/// Offset of the checksum in an L4 header.
pub fn field_of(proto: u8) -> Option<usize> {
    match proto {
        TCP => Some(16),
        UDP => Some(6),
        ICMP | ICMPV6 => Some(2),
        _ => None,
    }
}

/// What an skb's sums rest on: a row of the judge's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// The tunnel sends no outer sum.
    NoOuter,
    /// The same, to be segmented.
    NoOuterGso,
    /// To be segmented, with an outer sum in each segment.
    Gso,
    /// Local Checksum Offload.
    Lco,
    /// The device fills the outer sum in.
    Outer,
    /// All sums are final.
    Full(State),
}

impl Row {
    pub const ALL: [Self; 8] = [
        Self::NoOuter,
        Self::NoOuterGso,
        Self::Gso,
        Self::Lco,
        Self::Outer,
        Self::Full(State::None),
        Self::Full(State::Unnecessary),
        Self::Full(State::Complete),
    ];

    pub fn verdict(self) -> Verdict {
        match self {
            Self::NoOuter | Self::NoOuterGso => Verdict::Zero,
            Self::Gso | Self::Outer => Verdict::Pending,
            Self::Lco => Verdict::LcoValid,
            Self::Full(_) => Verdict::Valid,
        }
    }

    /// Whether the inner sum is filled in later.
    fn inner_pending(self) -> bool {
        matches!(self, Self::NoOuter | Self::NoOuterGso | Self::Gso | Self::Lco)
    }

    fn gso(self) -> bool {
        matches!(self, Self::NoOuterGso | Self::Gso)
    }
}

/// What is inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inside {
    Ip { v6: bool, proto: u8 },
    Arp,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct Shape {
    pub row: Row,
    pub tags: usize,
    pub v6: bool,
    /// IPv4 options, or IPv6 extension headers.
    pub more_headers: bool,
    pub port: u16,
    pub gpe: bool,
    pub inner_tags: usize,
    pub inside: Inside,
    pub inner_more_headers: bool,
    /// Inner UDP without a checksum, where the row leaves it to the sender.
    pub inner_zero: bool,
    pub payload: usize,
}

impl Shape {
    /// Any shape that the row allows.
    pub fn any(rng: &mut Rng, row: Row, payload: usize) -> Self {
        let v6 = rng.chance(50);
        let inside = if row.gso() {
            Inside::Ip { v6, proto: TCP }
        } else if row.inner_pending() {
            Inside::Ip { v6, proto: rng.pick(&[TCP, UDP]) }
        } else if rng.chance(5) {
            Inside::Arp
        } else {
            Inside::Ip { v6, proto: rng.pick(&[TCP, TCP, UDP, UDP, if v6 { ICMPV6 } else { ICMP }, SCTP, ESP]) }
        };
        Self {
            row,
            tags: rng.pick(&[0, 0, 0, 1, 2]),
            v6: rng.chance(50),
            more_headers: rng.chance(30),
            port: rng.pick(&[4789, 8472]),
            gpe: matches!(inside, Inside::Ip { .. }) && rng.chance(10),
            inner_tags: rng.pick(&[0, 0, 0, 1]),
            inside,
            inner_more_headers: rng.chance(20),
            inner_zero: rng.chance(15),
            payload,
        }
    }
}

/// Payload lengths: mostly what a wire carries, some jumbo frames, a few of what is segmented later.
pub fn payload(rng: &mut Rng) -> usize {
    match rng.below(100) {
        0..15 => rng.below(20),
        15..90 => rng.below(3000),
        90..97 => 3000 + rng.below(6000),
        _ => 9000 + rng.below(56_000),
    }
}

/// A packet and all that is known of it.
#[derive(Clone, Debug)]
pub struct Sample {
    pub shape: Shape,
    pub bytes: Vec<u8>,
    pub skb: Skb,
    pub outer: Place,
    /// The packet inside, if it is IP.
    pub inner: Option<Place>,
}

impl Sample {
    pub fn make(rng: &mut Rng, shape: Shape) -> Self {
        let mut bytes = Vec::with_capacity(shape.payload + 300);
        let ethertype = if shape.v6 { 0x86dd } else { 0x0800 };
        ethernet(rng, &mut bytes, shape.tags, ethertype);
        let mut outer = ip(rng, &mut bytes, shape.v6, UDP, shape.more_headers);
        bytes.extend(rng.bytes(2));
        bytes.extend(shape.port.to_be_bytes());
        bytes.extend([0; 4]); // length and checksum
        vxlan(rng, &mut bytes, &shape);
        let mut inner = None;
        match shape.inside {
            Inside::Arp => {
                ethernet(rng, &mut bytes, shape.inner_tags, 0x0806);
                bytes.extend(rng.bytes(28));
            }
            Inside::Ip { v6, proto } => {
                if !shape.gpe {
                    ethernet(rng, &mut bytes, shape.inner_tags, if v6 { 0x86dd } else { 0x0800 });
                }
                inner = Some(l4(rng, &mut bytes, v6, proto, &shape));
            }
        }
        outer.end = bytes.len();
        lengths(&mut bytes, &outer);
        let skb = sums(&mut bytes, &shape, &outer, inner.as_ref());
        Self { shape, bytes, skb, outer, inner }
    }

    /// Any packet of a row.
    pub fn any(rng: &mut Rng, row: Row) -> Self {
        let payload = payload(rng);
        let shape = Shape::any(rng, row, payload);
        Self::make(rng, shape)
    }

    /// The frame inside, as the VXLAN device sees it, with the inner sum as the row leaves it.
    pub fn frame(&self) -> Option<(Vec<u8>, Skb, Place)> {
        let at = self.outer.l4 + 16;
        let inner = self.inner.filter(|_| !self.shape.gpe)?;
        let place = Place { l3: inner.l3 - at, l4: inner.l4 - at, end: inner.end - at, ..inner };
        let mut skb = if self.shape.row.inner_pending() {
            Skb { csum_start: self.skb.csum_start.wrapping_sub(at as u32), gso_type: 0, ..self.skb }
        } else {
            Skb { state: State::None, ..Skb::UNKNOWN }
        };
        skb.gso_type = if skb.gso_size > 0 { gso_type(inner.v6) } else { 0 };
        Some((self.bytes[at..].to_vec(), skb, place))
    }

    /// Source and destination port and the checksum.
    pub fn outer_check(&self) -> u16 {
        get(&self.bytes, self.outer.l4 + 6)
    }
}

fn ethernet(rng: &mut Rng, bytes: &mut Vec<u8>, tags: usize, ethertype: u16) {
    bytes.extend(rng.bytes(12));
    for tag in 0..tags {
        let outermost_of_two = tag == 0 && tags > 1;
        bytes.extend(if outermost_of_two { 0x88a8_u16 } else { 0x8100 }.to_be_bytes());
        bytes.extend(rng.bytes(2));
    }
    bytes.extend(ethertype.to_be_bytes());
}

/// An IP header whose lengths are still open, with its options or extension headers.
fn ip(rng: &mut Rng, bytes: &mut Vec<u8>, v6: bool, proto: u8, more: bool) -> Place {
    let l3 = bytes.len();
    if v6 {
        let mut chain: Vec<u8> = Vec::new();
        if more {
            // RFC 8200, section 4.1, gives the order; 44 here is an atomic fragment (RFC 6946).
            for header in [0, 60, 43, 44, 60] {
                if rng.chance(40) {
                    chain.push(header);
                }
            }
        }
        chain.push(proto);
        bytes.extend([0x60, 0, 0, 0, 0, 0, chain[0], 64]);
        bytes.extend(rng.bytes(32));
        for link in chain.windows(2) {
            match link[0] {
                44 => bytes.extend([link[1], 0, 0, 0, 1, 2, 3, 4]),
                43 => bytes.extend([link[1], 0, 4, 0, 0, 0, 0, 0]), // no segments left
                _ => {
                    let units = rng.below(3);
                    bytes.extend([link[1], units as u8]);
                    bytes.extend(rng.bytes(6 + 8 * units));
                }
            }
        }
    } else {
        let options = if more { 4 * rng.below(11) } else { 0 };
        let id = rng.bytes(2);
        bytes.extend([0x45 + (options / 4) as u8, 0, 0, 0, id[0], id[1], 0x40, 0, 64, proto, 0, 0]);
        bytes.extend(rng.bytes(8 + options));
    }
    Place { v6, l3, l4: bytes.len(), end: 0, proto }
}

fn vxlan(rng: &mut Rng, bytes: &mut Vec<u8>, shape: &Shape) {
    let next = match shape.inside {
        Inside::Ip { v6: false, .. } => 1,
        Inside::Ip { v6: true, .. } => 2,
        Inside::Arp => 3,
    };
    bytes.extend(if shape.gpe { [0x0c, 0, 0, next] } else { [0x08, 0, 0, 0] });
    bytes.extend(rng.bytes(3));
    bytes.push(0);
}

/// The IP packet inside, its sum still open.
fn l4(rng: &mut Rng, bytes: &mut Vec<u8>, v6: bool, proto: u8, shape: &Shape) -> Place {
    let mut place = ip(rng, bytes, v6, proto, shape.inner_more_headers);
    match proto {
        TCP => {
            bytes.extend(rng.bytes(12));
            bytes.extend([0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
        }
        UDP => {
            // Not to a tunnel port by chance.
            bytes.extend(rng.bytes(2));
            bytes.extend([0, 53, 0, 0, 0, 0]);
        }
        _ => bytes.extend(rng.bytes(8)),
    }
    // The outer lengths have 16 bits, which must do for all headers too.
    let room = 0xffff - (bytes.len() - 14).min(0xffff);
    bytes.extend(rng.bytes(shape.payload.min(room)));
    place.end = bytes.len();
    lengths(bytes, &place);
    place
}

/// Fills in all length fields, and IPv4's own checksum.
pub fn lengths(bytes: &mut [u8], place: &Place) {
    if place.v6 {
        put(bytes, place.l3 + 4, (place.end - place.l3 - 40) as u16);
    } else {
        put(bytes, place.l3 + 2, (place.end - place.l3) as u16);
        put(bytes, place.l3 + 10, 0);
        let check = !plain_sum(&bytes[place.l3..place.l4]);
        put(bytes, place.l3 + 10, check);
    }
    if place.proto == UDP {
        put(bytes, place.l4 + 4, (place.end - place.l4) as u16);
    }
}

fn gso_type(v6: bool) -> u32 {
    if v6 { 1 << 4 } else { 1 } // SKB_GSO_TCPV6, SKB_GSO_TCPV4
}

/// Fills in the sums as the row has them, and says what the skb would.
fn sums(bytes: &mut [u8], shape: &Shape, outer: &Place, inner: Option<&Place>) -> Skb {
    let field = inner.and_then(|inner| field_of(inner.proto).map(|field| (inner, field)));
    let mut partial = Skb { state: State::None, ..Skb::UNKNOWN };
    if let Some((inner, at)) = field {
        let final_sum = inner.full(bytes, at);
        if shape.row.inner_pending() {
            partial = Skb {
                state: State::Partial,
                csum_start: inner.l4 as u32,
                csum_offset: at as u32,
                gso_size: if shape.row.gso() { 1398 } else { 0 },
                gso_type: 0,
            };
            if shape.row == Row::Lco {
                put(bytes, inner.l4 + at, final_sum);
                let outer_sum = outer.full(bytes, 6);
                put(bytes, outer.l4 + 6, outer_sum);
            }
            let pseudo = inner.pseudo(bytes);
            put(bytes, inner.l4 + at, pseudo);
        } else {
            let unused = inner.proto == UDP && shape.inner_zero;
            put(bytes, inner.l4 + at, if unused { 0 } else { final_sum });
        }
    }
    let v6 = matches!(shape.inside, Inside::Ip { v6: true, .. });
    match shape.row {
        Row::NoOuter | Row::Lco => partial,
        Row::NoOuterGso => Skb { gso_type: gso_type(v6) | SKB_GSO_UDP_TUNNEL, ..partial },
        Row::Gso => {
            let pseudo = outer.pseudo(bytes);
            put(bytes, outer.l4 + 6, pseudo);
            Skb { gso_type: gso_type(v6) | SKB_GSO_UDP_TUNNEL_CSUM, ..partial }
        }
        Row::Outer => {
            let pseudo = outer.pseudo(bytes);
            put(bytes, outer.l4 + 6, pseudo);
            Skb { state: State::Partial, csum_start: outer.l4 as u32, csum_offset: 6, ..partial }
        }
        Row::Full(state) => {
            let sum = outer.full(bytes, 6);
            put(bytes, outer.l4 + 6, sum);
            Skb { state, ..partial }
        }
    }
}

/// Ways to break a packet, for each field that the judge reads. Each says what it did.
pub fn break_one(rng: &mut Rng, sample: &mut Sample) -> String {
    const SMALL: [u16; 8] = [0, 1, 7, 8, 9, 0x8000, 0xfffe, 0xffff];
    let any = rng.next();
    let word = if rng.chance(50) { rng.pick(&SMALL) } else { any as u16 };
    let (outer, len) = (sample.outer, sample.bytes.len());
    let inner = sample.inner.unwrap_or(outer);
    if len < outer.l4.max(inner.l4) + 8 {
        return "nothing, too short by now".to_owned();
    }
    match rng.below(14) {
        0 => {
            let at = rng.below(len);
            sample.bytes[at] ^= 1 << rng.below(8);
            format!("a bit of byte {at}")
        }
        1 => {
            let at = rng.below(len.min(200));
            sample.bytes[at] = any as u8;
            format!("byte {at} of the head")
        }
        2 => {
            sample.bytes.truncate(rng.below(len));
            format!("cut to {}", sample.bytes.len())
        }
        3 => {
            let more = 1 + rng.below(70);
            sample.bytes.extend(rng.bytes(more));
            format!("{more} bytes behind the end")
        }
        4 => {
            let place = rng.pick(&[outer, inner]);
            put(&mut sample.bytes, place.l3 + if place.v6 { 4 } else { 2 }, word);
            "an IP length".to_owned()
        }
        5 => {
            let place = rng.pick(&[outer, inner]);
            put(&mut sample.bytes, place.l4 + 4, word);
            "a UDP length".to_owned()
        }
        6 => {
            put(&mut sample.bytes, outer.l4 + 6, word);
            "the outer sum".to_owned()
        }
        7 => {
            if let Some(at) = field_of(inner.proto).filter(|at| inner.l4 + at + 2 <= len) {
                put(&mut sample.bytes, inner.l4 + at, word);
            }
            "the inner sum".to_owned()
        }
        8 => {
            let place = rng.pick(&[outer, inner]);
            sample.bytes[place.l3] = any as u8;
            "version and header length".to_owned()
        }
        9 => {
            let place = rng.pick(&[outer, inner]);
            // IPv4: the fragment field; IPv6: next header, and the first bytes behind the header.
            let at = place.l3 + if place.v6 { rng.pick(&[6, 40, 41, 42, 43]) } else { rng.pick(&[6, 7, 9]) };
            sample.bytes[at] = if rng.chance(50) { rng.pick(&[0, 43, 44, 51, 60, 17, 6, 1]) } else { any as u8 };
            "fragment, protocol or extension header".to_owned()
        }
        10 => {
            let (at, length) = rng.pick(&[outer, inner]).addresses();
            let at = at + rng.below(length);
            sample.bytes[at] ^= 1 | any as u8;
            "an address".to_owned()
        }
        11 => {
            let at = outer.l4 + rng.below(2);
            sample.bytes[at] ^= 1 | any as u8;
            "the source port".to_owned()
        }
        12 => {
            sample.skb.csum_start = csum_start(rng, len, outer.l4);
            sample.skb.csum_offset = if rng.chance(50) { rng.pick(&[0, 6, 16]) } else { any as u32 };
            "csum_start and csum_offset".to_owned()
        }
        _ => {
            sample.skb.state = rng.pick(&State::ALL);
            sample.skb.gso_size = rng.pick(&[0, 0, 1, 1398]);
            sample.skb.gso_type = rng.pick(&[0, SKB_GSO_UDP_TUNNEL, SKB_GSO_UDP_TUNNEL_CSUM, any as u32]);
            "the skb's state".to_owned()
        }
    }
}

fn csum_start(rng: &mut Rng, len: usize, udp: usize) -> u32 {
    let near = |at: usize, by: usize| (at + by).saturating_sub(4) as u32;
    match rng.below(5) {
        0 => near(len, rng.below(9)),
        1 => near(udp, rng.below(16)),
        2 => (udp + 8 + rng.below(len)) as u32,
        3 => u32::MAX - rng.below(20) as u32,
        _ => rng.next() as u32,
    }
}

/// Any skb metadata, also such as no kernel has.
pub fn any_skb(rng: &mut Rng, len: usize) -> Skb {
    Skb {
        state: rng.pick(&State::ALL),
        csum_start: csum_start(rng, len + 1, 34),
        csum_offset: if rng.chance(50) { rng.pick(&[2, 6, 16]) } else { rng.next() as u32 },
        gso_size: rng.pick(&[0, 0, 1398, u32::MAX]),
        gso_type: rng.pick(&[0, SKB_GSO_UDP_TUNNEL, SKB_GSO_UDP_TUNNEL_CSUM, u32::MAX]),
    }
}

/// Surroundings of which the test knows everything. Tunnel ports are 4789 and 8472.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    pub skb: Skb,
    pub sum_payload: bool,
    /// A zero over IPv6 is wrong on port 4789.
    pub no_zero_ipv6: bool,
}

impl Told {
    pub fn new(skb: Skb) -> Self {
        Self { skb, sum_payload: true, no_zero_ipv6: false }
    }
}

impl Surroundings for Told {
    fn is_tunnel_port(&self, port: u16) -> bool {
        matches!(u16::from_be(port), 4789 | 8472)
    }
    fn zero_over_ipv6_is_wrong(&self, port: u16) -> bool {
        self.no_zero_ipv6 && u16::from_be(port) == 4789
    }
    fn skb(&self) -> Skb {
        self.skb
    }
    fn sum_payload(&self) -> bool {
        self.sum_payload
    }
}
