//! Reading netlink attributes one by one, with every bound checked. It never fails: what has the wrong length reads as
//! absent, so an attribute that is unknown, or longer in a newer kernel, costs itself and nothing else.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_core::{NLA_HEADER_SIZE, NlasIterator};

/// The value of one attribute, without its header and padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Value<'a>(pub(super) &'a [u8]);

/// The attributes in `bytes` as (type without flag bits, value); ends at the first one whose length is impossible.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, Value<'_>)> {
    NlasIterator::new(bytes).map_while(|attribute| {
        let attribute = attribute.ok()?;
        let (kind, end) = (attribute.kind(), usize::from(attribute.length()));
        Some((kind, Value(attribute.into_inner().get(NLA_HEADER_SIZE..end)?)))
    })
}

/// The attributes of a message whose fixed header is `header` bytes long; none if it is shorter than that.
pub(super) fn attributes_after(header: usize, payload: &[u8]) -> impl Iterator<Item = (u16, Value<'_>)> {
    attributes(payload.get(header..).unwrap_or_default())
}

impl<'a> Value<'a> {
    /// The bytes as an array of exactly this length.
    pub(super) fn array<const N: usize>(self) -> Option<[u8; N]> {
        self.0.try_into().ok()
    }

    pub(super) fn u8(self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Network byte order on the wire, host order in the result.
    pub(super) fn u16_be(self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Host byte order.
    pub(super) fn u32(self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    /// Network byte order on the wire, host order in the result.
    pub(super) fn u32_be(self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Host byte order.
    pub(super) fn i32(self) -> Option<i32> {
        self.array().map(i32::from_ne_bytes)
    }

    /// An IPv4 or IPv6 address, by the length.
    pub(super) fn ip(self) -> Option<IpAddr> {
        self.array::<4>()
            .map(|octets| Ipv4Addr::from(octets).into())
            .or_else(|| self.array::<16>().map(|octets| Ipv6Addr::from(octets).into()))
    }

    /// Text up to the first NUL. Bytes that are not UTF-8 are replaced: names of devices may hold any byte.
    pub(super) fn text(self) -> String {
        self.name().into_owned()
    }

    /// The same, where it is, if it is UTF-8.
    pub(super) fn name(self) -> Cow<'a, str> {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        String::from_utf8_lossy(self.0.get(..end).unwrap_or_default())
    }

    /// The attributes nested in this one.
    pub(super) fn nested(self) -> impl Iterator<Item = (u16, Value<'a>)> {
        attributes(self.0)
    }
}

/// Bytes that a test has in hexadecimal.
#[cfg(test)]
pub(crate) fn golden(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks_exact(2).map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_length_reads_as_absent() {
        let value = Value(&[1, 2, 3]);
        assert_eq!((value.u8(), value.u16_be(), value.u32(), value.ip()), (None, None, None, None));
        assert_eq!(Value(&[0x12, 0x34]).u16_be(), Some(0x1234));
        assert_eq!(Value(b"eth0\0junk").text(), "eth0");
        assert_eq!(Value(b"").text(), "");
    }

    #[test]
    fn iteration_stops_at_an_impossible_length() {
        // One good attribute (type 3, "ab"), then one that claims 200 bytes.
        let bytes = [6, 0, 3, 0, b'a', b'b', 0, 0, 200, 0, 1, 0, 9];
        let seen: Vec<_> = attributes(&bytes).collect();
        assert_eq!(seen, [(3, Value(b"ab"))]);
        // A length below the header's own size would never advance.
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0);
        assert_eq!(attributes_after(16, &bytes).count(), 0);
    }

    #[test]
    fn flag_bits_are_not_part_of_the_type() {
        let bytes = [8, 0, 2, 0x80, 1, 2, 3, 4];
        assert_eq!(attributes(&bytes).map(|(kind, _)| kind).collect::<Vec<_>>(), [2]);
    }
}
