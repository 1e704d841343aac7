//! Capture files, pcap and pcapng: their packets, one after the other, as the judge takes them. Judges nothing, and keeps
//! no packet: a file may be longer than memory, or a pipe that goes on.
//!
//! The formats are pcap-parser's; what a link type puts before the IP header is here.

use std::{
    io::{Cursor, Read},
    ops::ControlFlow,
};

use pcap_parser::{
    Block, InterfaceDescriptionBlock, Linktype, PcapBlockOwned, PcapError, create_reader,
    traits::{PcapNGPacketBlock as _, PcapReaderIterator},
};
use vxmon_common::packet::{Bytes, ethertype, is_tag};

/// Room for a block at the start; it grows with longer blocks, but not beyond [`LONGEST_BLOCK`].
const BUFFER: usize = 1 << 17;
/// No packet is that long: 256 KiB is the longest that libpcap captures (MAXIMUM_SNAPLEN).
const LONGEST_BLOCK: usize = 1 << 24;
/// Bytes that tell one format from the other, a pcap header as a whole.
const HEADER: usize = 24;
/// The longest pcapng section header that is read: comments may be in it.
const LONGEST_SECTION_HEADER: usize = 1 << 16;
/// First bytes of a pcapng file (draft-ietf-opsawg-pcapng, section 4.1), of a gzip and of a zstd file.
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Why a capture could not be read, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Reading failed.
    #[error("cannot be read: {0}")]
    Read(#[source] std::io::Error),
    /// No bytes at all.
    #[error("is empty")]
    Empty,
    /// Packed.
    #[error("is compressed; unpack it: {0} -dc FILE | vxmon check -")]
    Compressed(&'static str),
    /// Something else.
    #[error("is neither pcap nor pcapng (tcpdump -w FILE writes pcap)")]
    NotACapture,
    /// It ends within a packet.
    #[error("ends within a packet, after {0} whole ones")]
    Truncated(u64),
    /// It contradicts itself.
    #[error("is damaged after {0} packets")]
    Damaged(u64),
}

/// Where packets were captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the file, from 0, counted on through the sections of a pcapng file.
    pub number: u32,
    /// Its name, if the capture tells it.
    pub name: Option<String>,
    link: Linktype,
    /// Units of its time stamps in a second.
    per_second: u128,
    /// Added to its time stamps, seconds.
    offset: i64,
}

impl Interface {
    /// The link type's number (`LINKTYPE_*`), if its packets cannot be read.
    #[must_use]
    pub fn unknown_link(&self) -> Option<i32> {
        match self.link {
            Linktype::ETHERNET | Linktype::LINUX_SLL | Linktype::LINUX_SLL2 => None,
            Linktype::RAW | Linktype::IPV4 | Linktype::IPV6 | RAW_BSD | RAW_OPENBSD => None,
            Linktype(number) => Some(number),
        }
    }

    fn time_ns(&self, units: u64) -> u64 {
        let ns = u128::from(units) * 1_000_000_000 / self.per_second;
        let ns = i128::try_from(ns).unwrap_or(i128::MAX).saturating_add(i128::from(self.offset) * 1_000_000_000);
        u64::try_from(ns.max(0)).unwrap_or(u64::MAX)
    }
}

/// `DLT_RAW` as it is numbered on most systems, and on OpenBSD; files of some programs have it in place of `LINKTYPE_RAW`.
const RAW_BSD: Linktype = Linktype(12);
const RAW_OPENBSD: Linktype = Linktype(14);

/// A packet of a capture.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// The packet from its Ethernet or IP header on.
    pub bytes: Bytes<'a>,
    /// The same bytes, as far as they were captured.
    pub head: &'a [u8],
    /// EtherType (memory order) if there is no Ethernet header.
    pub bare: Option<u16>,
    /// When it was captured, ns since 1970.
    pub time_ns: u64,
}

/// Hands on each packet of a capture, with its interface, until told to break off. A packet of a link type that is not known
/// is handed on without bytes.
pub fn read(
    input: impl Read + Send,
    mut each: impl FnMut(&Interface, Option<Packet<'_>>) -> ControlFlow<()>,
) -> Result<(), CaptureError> {
    let (head, input) = header(input)?;
    let mut reader = create_reader(BUFFER, Cursor::new(head).chain(input)).map_err(|error| match error {
        PcapError::ReadError => CaptureError::Read(std::io::ErrorKind::Other.into()),
        _ => CaptureError::NotACapture,
    })?;
    let mut packets = 0;
    let mut capacity = BUFFER;
    let mut interfaces = Interfaces::default();
    loop {
        match reader.next() {
            Ok((length, block)) => {
                if let Some((interface, packet)) = interfaces.block(&block) {
                    packets += 1;
                    if each(interface, packet).is_break() {
                        return Ok(());
                    }
                }
                reader.consume(length);
            }
            Err(PcapError::Eof) => return Ok(()),
            Err(PcapError::Incomplete(_)) => refill(&mut *reader)?,
            Err(PcapError::BufferTooSmall) if capacity < LONGEST_BLOCK => {
                capacity *= 2;
                reader.grow(capacity);
                refill(&mut *reader)?;
            }
            Err(PcapError::UnexpectedEof) => return Err(CaptureError::Truncated(packets)),
            Err(_) => return Err(CaptureError::Damaged(packets)),
        }
    }
}

fn refill(reader: &mut dyn PcapReaderIterator) -> Result<(), CaptureError> {
    reader.refill().map_err(|_| CaptureError::Read(std::io::ErrorKind::Other.into()))
}

/// The first bytes, by which it is known what this is: for the parser, which wants the first header at once, where a pipe may
/// give it in pieces.
fn header<R: Read>(mut input: R) -> Result<(Vec<u8>, R), CaptureError> {
    let mut head = Vec::new();
    let mut more = |head: &mut Vec<u8>, until: usize| {
        let missing = until.saturating_sub(head.len()) as u64;
        (&mut input).take(missing).read_to_end(head).map_err(CaptureError::Read)
    };
    more(&mut head, HEADER)?;
    if head.is_empty() {
        return Err(CaptureError::Empty);
    }
    if head.starts_with(&GZIP) {
        return Err(CaptureError::Compressed("gzip"));
    }
    if head.starts_with(&ZSTD) {
        return Err(CaptureError::Compressed("zstd"));
    }
    if let (true, Some(Ok(length)), Some(order)) =
        (head.starts_with(&PCAPNG), head.get(4..8).map(<[u8; 4]>::try_from), head.get(8..12))
    {
        let length =
            if order == [0x1a, 0x2b, 0x3c, 0x4d] { u32::from_be_bytes(length) } else { u32::from_le_bytes(length) };
        more(&mut head, (length as usize).min(LONGEST_SECTION_HEADER))?;
    }
    Ok((head, input))
}

/// The interfaces of a capture, as far as it has been read.
#[derive(Default)]
struct Interfaces {
    /// Of this section of a pcapng file; the only one of a pcap file.
    current: Vec<Interface>,
    /// How many there were before this section.
    before: usize,
}

impl Interfaces {
    fn add(&mut self, name: Option<String>, link: Linktype, per_second: u128, offset: i64) {
        let number = u32::try_from(self.before + self.current.len()).unwrap_or(u32::MAX);
        self.current.push(Interface { number, name, link, per_second, offset });
    }

    /// Takes a block in, and gives the packet, if it is one.
    fn block<'a>(&mut self, block: &'a PcapBlockOwned<'_>) -> Option<(&Interface, Option<Packet<'a>>)> {
        let (interface, time, captured, length) = match block {
            PcapBlockOwned::LegacyHeader(header) => {
                let per_second = if header.is_nanosecond_precision() { 1_000_000_000 } else { 1_000_000 };
                // The upper half tells of a frame check sequence at the end (draft-ietf-opsawg-pcap, section 4).
                self.add(None, Linktype(header.network.0 & 0xffff), per_second, 0);
                return None;
            }
            PcapBlockOwned::Legacy(packet) => {
                let interface = self.current.first()?;
                let per_second = u64::try_from(interface.per_second).unwrap_or(u64::MAX);
                let time = u64::from(packet.ts_sec).saturating_mul(per_second).saturating_add(packet.ts_usec.into());
                (interface, time, packet.data, packet.origlen)
            }
            PcapBlockOwned::NG(Block::SectionHeader(_)) => {
                self.before += self.current.len();
                self.current.clear();
                return None;
            }
            PcapBlockOwned::NG(Block::InterfaceDescription(description)) => {
                let name = description.if_name().and_then(Result::ok).map(str::to_owned);
                self.add(name, description.linktype, per_second(description), description.if_tsoffset);
                return None;
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                let interface = self.current.get(packet.if_id as usize)?;
                let time = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                (interface, time, packet.packet_data(), packet.origlen)
            }
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                // The first interface's, without a time (section 4.4); padded to whole words.
                let interface = self.current.first()?;
                (interface, 0, packet.packet_data(), packet.origlen)
            }
            PcapBlockOwned::NG(_) => return None,
        };
        Some((interface, packet(interface, time, captured, length)))
    }
}

/// Units of time stamps in a second: a power of 10, or with the upper bit set of 2 (section 4.2, if_tsresol). Those of a
/// number that cannot be meant are taken for the default.
fn per_second(description: &InterfaceDescriptionBlock<'_>) -> u128 {
    let power = u32::from(description.if_tsresol & 0x7f);
    let units = if description.if_tsresol & 0x80 == 0 { 10_u128.checked_pow(power) } else { 1_u128.checked_shl(power) };
    units.unwrap_or(1_000_000)
}

/// The packet behind what the link type puts before it.
fn packet<'a>(interface: &Interface, time: u64, captured: &'a [u8], length: u32) -> Option<Packet<'a>> {
    if interface.unknown_link().is_some() {
        return None;
    }
    let (start, bare) = network(interface.link, captured);
    let head = captured.get(start..).unwrap_or_default();
    let bytes = Bytes::truncated(head, length.saturating_sub(u32::try_from(start).unwrap_or(u32::MAX)));
    Some(Packet { bytes, head, bare, time_ns: interface.time_ns(time) })
}

/// Where the judge begins, and the EtherType (memory order) of what is there unless that is an Ethernet header. 0, which is
/// no EtherType, where the packet was cut off before it.
fn network(link: Linktype, captured: &[u8]) -> (usize, Option<u16>) {
    let word = |at: usize| captured.get(at..at + 2).and_then(|two| two.try_into().ok()).map_or(0, u16::from_ne_bytes);
    let (mut start, mut ethertype) = match link {
        Linktype::ETHERNET => return (0, None),
        // "Linux cooked" captures: the EtherType is the last field of the first form's header, the first of the second's.
        Linktype::LINUX_SLL => (16, word(14)),
        Linktype::LINUX_SLL2 => (20, word(0)),
        _ if captured.first().is_some_and(|first| first >> 4 == 6) => (0, ethertype::IPV6),
        _ => (0, ethertype::IPV4),
    };
    // libpcap puts a VLAN tag back there: the TCI, then the EtherType of what follows.
    while is_tag(ethertype) {
        ethertype = word(start + 2);
        start += 4;
    }
    (start, Some(ethertype))
}
