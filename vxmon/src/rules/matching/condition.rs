//! Whether a condition holds for a packet: yes, no, or it cannot be told.

use std::net::IpAddr;

use super::{
    super::model::{Change, Element, Op, Side, Source, Table, Test, Value},
    Packet, World,
};

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It holds.
    Yes,
    /// It does not.
    No,
    /// It cannot be told.
    Unknown,
}

impl Truth {
    fn of(known: Option<bool>) -> Self {
        match known {
            Some(true) => Self::Yes,
            Some(false) => Self::No,
            None => Self::Unknown,
        }
    }

    fn invert(self, invert: bool) -> Self {
        match (self, invert) {
            (Self::Yes, true) => Self::No,
            (Self::No, true) => Self::Yes,
            (truth, _) => truth,
        }
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Yes, Self::Yes) => Self::Yes,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
        }
    }

    fn or(self, other: Self) -> Self {
        self.invert(true).and(other.invert(true)).invert(true)
    }
}

/// `RTN_LOCAL`, include/uapi/linux/rtnetlink.h.
const RTN_LOCAL: u32 = 2;
/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
const NEW: u32 = 1 << 3;

/// Whether a condition of a rule in `table` holds for the packet, whose mark is now `mark`.
pub(super) fn holds(test: &Test, table: &Table, packet: &Packet, mark: Option<u32>, world: &World) -> Truth {
    match test {
        Test::Address { side, address, mask, invert } => {
            let own = end(packet, *side);
            Truth::of(own.map(|own| masked(own, *mask) == masked(*address, *mask))).invert(*invert)
        }
        Test::Device { side: Side::Destination, name, invert } => device_is(packet, name).invert(*invert),
        // Of a packet that was sent by this host it is not the same on every kernel.
        Test::Device { .. } => Truth::Unknown,
        Test::Protocol { number, invert } => {
            Truth::of(packet.protocol.map(|protocol| protocol == *number)).invert(*invert)
        }
        // Conntrack puts fragments together before they come here.
        Test::Fragment { invert } => Truth::No.invert(*invert),
        Test::Mark { connection: false, value, mask, invert } => {
            Truth::of(mark.map(|mark| mark & mask == *value)).invert(*invert)
        }
        Test::Mark { connection: true, .. } => Truth::Unknown,
        Test::Ports { protocol, source, destination, invert, more } => {
            let within = |port: Option<u16>, range: &Option<(u16, u16)>| match range {
                None => Truth::Yes,
                Some(range) => Truth::of(port.map(|port| (range.0..=range.1).contains(&port))),
            };
            let more = if more.is_some() { Truth::Unknown } else { Truth::Yes };
            Truth::of(packet.protocol.map(|own| own == *protocol))
                .and(within(packet.sport, source).invert(invert.0))
                .and(within(packet.dport, destination).invert(invert.1))
                .and(more)
        }
        Test::Multiport { side, ranges, invert } => {
            let within = |port: Option<u16>| {
                Truth::of(port.map(|port| ranges.iter().any(|(from, to)| (*from..=*to).contains(&port))))
            };
            match side {
                Side::Source => within(packet.sport),
                Side::Destination => within(packet.dport),
                Side::Either => within(packet.sport).or(within(packet.dport)),
            }
            .invert(*invert)
        }
        Test::AddrType { source, destination, invert, limit } => {
            let limited = limit.0 || limit.1;
            let one = |side, types: u16| match types {
                0 => Truth::Yes,
                _ => has_type(packet, world, side, types, limited),
            };
            one(Side::Source, *source).invert(invert.0).and(one(Side::Destination, *destination).invert(invert.1))
        }
        // NAT is asked for the first packet of a connection: NEW. Whether it has NAT (bits 6 and 7) shows later.
        Test::State { mask, invert, .. } => match u32::from(*mask) & NEW {
            0 if mask & 0xc0 != 0 => Truth::Unknown,
            0 => Truth::No,
            _ => Truth::Yes,
        }
        .invert(*invert),
        Test::IpSet { index, sides, invert, more: false, .. } => {
            world.sets.holds(*index, sides, packet).invert(*invert)
        }
        Test::IpSet { more: true, .. } | Test::Chance(_) | Test::Unknown(_) => Truth::Unknown,
        Test::Comment(_) => Truth::Yes,
        Test::Compare { value, op, with } => compare(value, *op, with, packet, mark, world),
        Test::Range { value, from, to, invert } => Truth::of(
            bytes(value, packet, mark, world)
                .map(|own| (&**from..=&**to).contains(&own.get(..from.len()).unwrap_or(&own))),
        )
        .invert(*invert),
        Test::Lookup { key, set, invert } => {
            let elements = table.sets.get(set).and_then(|set| set.elements.as_ref());
            let found = elements.map(|elements| find(key, elements, packet, mark, world));
            match found {
                Some(Ok(element)) => Truth::of(Some(element.is_some())),
                Some(Err(())) | None => Truth::Unknown,
            }
            .invert(*invert)
        }
    }
}

/// An end's address.
pub(in super::super) fn end(packet: &Packet, side: Side) -> Option<IpAddr> {
    match side {
        Side::Source => packet.src,
        Side::Destination => packet.dst,
        Side::Either => None,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn masked(address: IpAddr, mask: IpAddr) -> Vec<u8> {
    octets(address).iter().zip(octets(mask)).map(|(byte, mask)| byte & mask).collect()
}

fn device_is(packet: &Packet, name: &str) -> Truth {
    let Some(device) = &packet.out else { return Truth::Unknown };
    let same = match name.strip_suffix('+') {
        Some(beginning) => device.name.starts_with(beginning),
        None => device.name == name,
    };
    if device.below { Truth::Unknown } else { Truth::of(Some(same)) }
}

/// `inet_addr_type()`: of all types only whether it is an address of this host is known here.
fn has_type(packet: &Packet, world: &World, side: Side, types: u16, limited: bool) -> Truth {
    let (Some(address), Some(own)) = (end(packet, side), &world.addresses) else { return Truth::Unknown };
    let is_local = own.contains(&address) || address.is_loopback();
    let asks_local = u32::from(types) & (1 << RTN_LOCAL) != 0;
    match (is_local, asks_local) {
        // Limited to a device, an address of another one does not count.
        (true, _) if limited => Truth::Unknown,
        (true, asked) => Truth::of(Some(asked)),
        (false, true) if u32::from(types) == 1 << RTN_LOCAL => Truth::No,
        (false, _) => Truth::Unknown,
    }
}

fn compare(value: &Value, op: Op, with: &[u8], packet: &Packet, mark: Option<u32>, world: &World) -> Truth {
    // The route's type: only whether it is this host's is known, see above.
    if let Source::AddrType { side, device } = &value.source
        && value.changes.is_empty()
        && let Ok(kind) = with.try_into().map(u32::from_ne_bytes)
        && kind < 16
        && matches!(op, Op::Eq | Op::Ne)
    {
        return has_type(packet, world, *side, 1 << kind, device.is_some()).invert(op == Op::Ne);
    }
    let Some(own) = bytes(value, packet, mark, world) else { return Truth::Unknown };
    let Some(own) = own.get(..with.len()) else { return Truth::Unknown };
    Truth::of(Some(match op {
        Op::Eq => own == with,
        Op::Ne => own != with,
        Op::Lt => own < with,
        Op::Le => own <= with,
        Op::Gt => own > with,
        Op::Ge => own >= with,
    }))
}

/// The bytes of a value; none if they are not known.
fn bytes(value: &Value, packet: &Packet, mark: Option<u32>, world: &World) -> Option<Vec<u8>> {
    let mut found = match &value.source {
        Source::Constant(bytes) => bytes.to_vec(),
        Source::Mark => mark?.to_ne_bytes().to_vec(),
        Source::DeviceIndex(Side::Destination) => device(packet)?.index.to_ne_bytes().to_vec(),
        Source::DeviceName(Side::Destination) => {
            let mut name = device(packet)?.name.as_bytes().to_vec();
            name.resize(16, 0);
            name
        }
        Source::L4Proto => vec![packet.protocol?],
        Source::NfProto => vec![if packet.v6 { 10 } else { 2 }],
        Source::Protocol => if packet.v6 { 0x86dd_u16 } else { 0x0800 }.to_be_bytes().to_vec(),
        Source::Payload { transport, offset } => payload(packet, *transport, *offset, value.len)?,
        Source::AddrType { side, device: None } => (has_type(packet, world, *side, 1 << RTN_LOCAL, false)
            == Truth::Yes)
            .then_some(RTN_LOCAL)?
            .to_ne_bytes()
            .to_vec(),
        Source::CtState => NEW.to_ne_bytes().to_vec(),
        Source::CtMark
        | Source::DeviceIndex(_)
        | Source::DeviceName(_)
        | Source::AddrType { .. }
        | Source::Other(_) => return None,
    };
    for change in &value.changes {
        match change {
            Change::Bits { and, xor } => {
                for (byte, (and, xor)) in found.iter_mut().zip(and.iter().zip(xor)) {
                    *byte = (*byte & and) ^ xor;
                }
            }
            Change::Swap(size) => found.chunks_mut(usize::from(*size).max(1)).for_each(<[u8]>::reverse),
            Change::Unknown => return None,
        }
    }
    Some(found)
}

fn device(packet: &Packet) -> Option<&super::Device> {
    packet.out.as_ref().filter(|device| !device.below)
}

/// Bytes of the headers, as far as they are addresses, protocol and ports.
fn payload(packet: &Packet, transport: bool, offset: u32, len: u8) -> Option<Vec<u8>> {
    let (at, len) = (usize::try_from(offset).ok()?, usize::from(len));
    let mut known: Vec<Option<u8>> = vec![None; 40];
    let mut put = |at: usize, bytes: &[u8]| {
        for (place, byte) in known.iter_mut().skip(at).zip(bytes) {
            *place = Some(*byte);
        }
    };
    if transport {
        // TCP, UDP and SCTP begin with the ports.
        if let Some(port) = packet.sport {
            put(0, &port.to_be_bytes());
        }
        if let Some(port) = packet.dport {
            put(2, &port.to_be_bytes());
        }
    } else {
        let (protocol, src, dst) = if packet.v6 { (6, 8, 24) } else { (9, 12, 16) };
        if let Some(number) = packet.protocol {
            put(protocol, &[number]);
        }
        if let Some(address) = packet.src {
            put(src, &octets(address));
        }
        if let Some(address) = packet.dst {
            put(dst, &octets(address));
        }
    }
    known.get(at..at.checked_add(len)?)?.iter().copied().collect()
}

/// The element that a key finds; an error if the key is not known.
pub(super) fn find<'a>(
    key: &[Value],
    elements: &'a [Element],
    packet: &Packet,
    mark: Option<u32>,
    world: &World,
) -> Result<Option<&'a Element>, ()> {
    let mut own: Vec<Vec<u8>> = Vec::with_capacity(key.len());
    for value in key {
        own.push(bytes(value, packet, mark, world).ok_or(())?);
    }
    // Fields of a concatenation each begin a register of 4 bytes.
    let joined: Vec<u8> = match own.as_slice() {
        [one] => one.clone(),
        fields => fields.iter().flat_map(|field| padded(field)).collect(),
    };
    let within = |element: &Element| match &element.end {
        None => element.key.len() <= joined.len() && joined.starts_with(&element.key) && !element.key.is_empty(),
        Some(end) if own.len() > 1 => fields_within(&own, &element.key, end),
        Some(end) => {
            let own = joined.get(..element.key.len()).unwrap_or(&joined);
            (&*element.key..=&**end).contains(&own)
        }
    };
    let found = elements.iter().find(|element| within(element));
    Ok(found.or_else(|| elements.iter().find(|element| element.key.is_empty())))
}

fn padded(field: &[u8]) -> Vec<u8> {
    let mut field = field.to_vec();
    field.resize(field.len().next_multiple_of(4), 0);
    field
}

/// Whether each field is within its own interval.
fn fields_within(own: &[Vec<u8>], from: &[u8], to: &[u8]) -> bool {
    let mut at = 0;
    own.iter().all(|field| {
        let place = at..at + field.len();
        at += field.len().next_multiple_of(4);
        match (from.get(place.clone()), to.get(place)) {
            (Some(from), Some(to)) => (from..=to).contains(&field.as_slice()),
            _ => false,
        }
    })
}
