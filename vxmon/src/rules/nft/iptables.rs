//! iptables-nft writes addresses, devices, protocols, marks and ports as nftables' own expressions. Here they become
//! iptables' conditions again; what cannot is left as it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::model::{Change, Op, Part, Side, Source, Test, Value};

/// The parts of a rule of iptables-nft.
pub(super) fn convert(parts: Vec<Part>, v6: bool) -> Vec<Part> {
    let mut found: Vec<Part> = Vec::with_capacity(parts.len());
    let mut protocol = None;
    for part in parts {
        let part = match part {
            Part::Test(test) => Part::Test(convert_test(test, &mut protocol, v6)),
            Part::Act(act) => Part::Act(act),
        };
        if !merged(found.last_mut(), &part) {
            found.push(part);
        }
    }
    found
}

fn convert_test(test: Test, protocol: &mut Option<u8>, v6: bool) -> Test {
    let converted = match &test {
        Test::Compare { value, op: op @ (Op::Eq | Op::Ne), with } => equal(value, *op == Op::Ne, with, *protocol, v6),
        // Halves of a range: the other one is merged with it.
        Test::Compare { value, op: Op::Ge, with } => {
            port_of(with).and_then(|least| ports(value, *protocol, (least, u16::MAX), false))
        }
        Test::Compare { value, op: Op::Le, with } => {
            port_of(with).and_then(|most| ports(value, *protocol, (0, most), false))
        }
        Test::Range { value, from, to, invert } => {
            port_of(from).zip(port_of(to)).and_then(|range| ports(value, *protocol, range, *invert))
        }
        _ => None,
    };
    if let Some(Test::Protocol { number, invert: false }) = converted {
        *protocol = Some(number);
    }
    converted.unwrap_or(test)
}

fn equal(value: &Value, invert: bool, with: &[u8], protocol: Option<u8>, v6: bool) -> Option<Test> {
    let mask: Option<&[u8]> = match &*value.changes {
        [] => None,
        [Change::Bits { and, xor }] if xor.iter().all(|byte| *byte == 0) => Some(and),
        _ => return None,
    };
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_ne_bytes);
    match &value.source {
        Source::Mark | Source::CtMark => Some(Test::Mark {
            connection: value.source == Source::CtMark,
            value: word(with)?,
            mask: mask.map_or(Some(u32::MAX), word)?,
            invert,
        }),
        Source::DeviceName(side) if mask.is_none() => {
            let end = with.iter().position(|byte| *byte == 0);
            let mut name = String::from_utf8_lossy(with.get(..end.unwrap_or(with.len()))?).into_owned();
            if end.is_none() && with.len() < 16 {
                name.push('+');
            }
            Some(Test::Device { side: *side, name: name.into(), invert })
        }
        Source::L4Proto if mask.is_none() => Some(Test::Protocol { number: *with.first()?, invert }),
        // `-f`: a fragment offset that is not 0.
        Source::Payload { transport: false, offset: 6 } if !v6 && mask == Some(&[0x1f, 0xff]) && with == [0, 0] => {
            Some(Test::Fragment { invert: !invert })
        }
        Source::Payload { transport: false, offset } => {
            let side = match (v6, offset) {
                (false, 12) | (true, 8) => Side::Source,
                (false, 16) | (true, 24) => Side::Destination,
                _ => return None,
            };
            let full = vec![0xff; with.len()];
            Some(Test::Address { side, address: address(with, v6)?, mask: address(mask.unwrap_or(&full), v6)?, invert })
        }
        Source::Payload { transport: true, .. } if mask.is_none() => {
            let port = port_of(with)?;
            ports(value, protocol, (port, port), invert)
        }
        _ => None,
    }
}

/// An address of which the kernel compares only the first bytes.
fn address(bytes: &[u8], v6: bool) -> Option<IpAddr> {
    let mut octets = [0; 16];
    if bytes.len() > if v6 { 16 } else { 4 } {
        return None;
    }
    for (to, from) in octets.iter_mut().zip(bytes) {
        *to = *from;
    }
    let [a, b, c, d, ..] = octets;
    Some(if v6 { Ipv6Addr::from(octets).into() } else { Ipv4Addr::new(a, b, c, d).into() })
}

fn port_of(bytes: &[u8]) -> Option<u16> {
    bytes.try_into().ok().map(u16::from_be_bytes)
}

fn ports(value: &Value, protocol: Option<u8>, range: (u16, u16), invert: bool) -> Option<Test> {
    let Source::Payload { transport: true, offset } = value.source else { return None };
    if !value.changes.is_empty() {
        return None;
    }
    let protocol = protocol.filter(|number| [6, 17].contains(number))?;
    let (source, destination) = match offset {
        0 => (Some(range), None),
        2 => (None, Some(range)),
        _ => return None,
    };
    Some(Test::Ports {
        protocol,
        source,
        destination,
        invert: (invert && offset == 0, invert && offset == 2),
        more: None,
    })
}

/// Source and destination ports, or the halves of a range, are one condition of iptables.
fn merged(last: Option<&mut Part>, next: &Part) -> bool {
    let Some(Part::Test(Test::Ports { protocol, source, destination, invert, more: None })) = last else {
        return false;
    };
    let Part::Test(Test::Ports {
        protocol: other,
        source: more_source,
        destination: more_destination,
        invert: inverts,
        ..
    }) = next
    else {
        return false;
    };
    let both = (join(*source, *more_source), join(*destination, *more_destination));
    let (Some(joined_source), Some(joined_destination)) = both else { return false };
    if protocol != other {
        return false;
    }
    (*source, *destination) = (joined_source, joined_destination);
    *invert = (invert.0 || inverts.0, invert.1 || inverts.1);
    true
}

/// One of them, or the range of which they are the halves; none if they are two conditions.
#[expect(clippy::option_option, reason = "no range, and no joining, are different answers")]
fn join(one: Option<(u16, u16)>, other: Option<(u16, u16)>) -> Option<Option<(u16, u16)>> {
    match (one, other) {
        (one, None) => Some(one),
        (None, other) => Some(other),
        (Some((least, u16::MAX)), Some((0, most))) => Some(Some((least, most))),
        (Some(_), Some(_)) => None,
    }
}
