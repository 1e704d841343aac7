//! The packets of anomalies as a capture file (pcapng, draft-ietf-opsawg-pcapng), for Wireshark, tcpdump and `vxmon check`: the
//! first bytes of each as it left, with its line of text as comment.

use std::{
    borrow::Cow,
    io::{self, Write},
    time::Duration,
};

use bytes::Bytes;
use pcap_parser::{
    EnhancedPacketBlock, InterfaceDescriptionBlock, Linktype, OptionCode, PcapNGOption, SectionHeaderBlock, ToVec,
};
use vxmon_common::event::HEAD;

use super::{
    paint::Paint,
    text,
    writer::{Broken, Writer},
};
use crate::event::{Anomaly, Record};

/// `epb_flags`: outbound.
const OUTBOUND: [u8; 4] = 2_u32.to_le_bytes();
/// `if_tsresol`: microseconds.
const MICROSECONDS: u8 = 6;

/// A capture that is being written.
#[derive(Debug)]
pub struct Pcapng {
    writer: Writer,
    /// Device and whether its packets begin with an IP header; the interface's number is the place in the list.
    interfaces: Vec<(String, bool)>,
}

impl Pcapng {
    /// Starts writing to `output`, on a thread of its own.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(output: Box<dyn Write + Send>) -> io::Result<(Self, Broken)> {
        let (mut writer, broken) = Writer::start(output)?;
        writer.put(block(&mut SectionHeaderBlock {
            block_type: 0,
            block_len1: 0,
            bom: 0,
            major_version: 0,
            minor_version: 0,
            section_len: -1,
            options: vec![option(OptionCode::ShbUserAppl, concat!("vxmon ", env!("CARGO_PKG_VERSION")).as_bytes())],
            block_len2: 0,
        }));
        Ok((Self { writer, interfaces: Vec::new() }, broken))
    }

    /// Adds the packet, if this is an anomaly.
    pub fn add(&mut self, record: &Record) {
        if let Record::Anomaly(anomaly) = record
            && let Some(interface) = self.interface(anomaly)
        {
            self.writer.put(packet(anomaly, interface, &text::render(record, Paint::PLAIN)));
        }
    }

    /// What could not be written, packets for the most part.
    pub const fn lost(&self) -> u64 {
        self.writer.lost
    }

    /// Ends the file; gives up on a reader that takes nothing for `patience`.
    pub fn finish(self, patience: Duration) -> bool {
        self.writer.finish(None, patience)
    }

    /// The number of the interface by which the packet left, which is described first if it is new.
    fn interface(&mut self, anomaly: &Anomaly) -> Option<u32> {
        let of = |(dev, bare): &(String, bool)| *dev == anomaly.dev && *bare == anomaly.packet.bare;
        let number = match self.interfaces.iter().position(of) {
            Some(number) => number,
            None => {
                if !self.writer.put(interface(anomaly)) {
                    return None;
                }
                self.interfaces.push((anomaly.dev.clone(), anomaly.packet.bare));
                self.interfaces.len() - 1
            }
        };
        u32::try_from(number).ok()
    }
}

fn interface(anomaly: &Anomaly) -> Bytes {
    block(&mut InterfaceDescriptionBlock {
        block_type: 0,
        block_len1: 0,
        linktype: if anomaly.packet.bare { Linktype::RAW } else { Linktype::ETHERNET },
        reserved: 0,
        snaplen: HEAD as u32,
        options: vec![option(OptionCode::IfName, anomaly.dev.as_bytes())],
        block_len2: 0,
        if_tsresol: MICROSECONDS,
        if_tsoffset: 0,
    })
}

fn packet(anomaly: &Anomaly, interface: u32, comment: &str) -> Bytes {
    let time = anomaly.ts.parse::<jiff::Timestamp>().map_or(0, |time| time.as_microsecond().max(0).cast_unsigned());
    let head = &anomaly.packet.head;
    block(&mut EnhancedPacketBlock {
        block_type: 0,
        block_len1: 0,
        if_id: interface,
        ts_high: (time >> 32) as u32,
        ts_low: time as u32,
        caplen: head.len() as u32,
        origlen: anomaly.packet.len.max(head.len() as u32),
        data: head,
        options: vec![option(OptionCode::Comment, comment.as_bytes()), option(EPB_FLAGS, &OUTBOUND)],
        block_len2: 0,
    })
}

/// Of an Enhanced Packet Block.
const EPB_FLAGS: OptionCode = OptionCode(2);

/// An option; one that is too long is cut.
fn option(code: OptionCode, value: &[u8]) -> PcapNGOption<'_> {
    let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
    PcapNGOption { code, len, value: Cow::Borrowed(&value[..usize::from(len)]) }
}

/// Written in memory, where nothing fails.
fn block(block: &mut impl ToVec) -> Bytes {
    block.to_vec().map(Bytes::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{
        io::Cursor,
        sync::{Arc, Mutex},
    };

    use pcap_parser::{Block, PcapBlockOwned, PcapError, create_reader};

    use super::*;
    use crate::{event::Packet, sink::explain::tests::fault_b};

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Interfaces and packets, in words.
    fn read(bytes: Vec<u8>) -> Vec<String> {
        let (mut reader, mut found) = (create_reader(65536, Cursor::new(bytes)).unwrap(), Vec::new());
        loop {
            match reader.next() {
                Ok((offset, PcapBlockOwned::NG(block))) => {
                    match block {
                        Block::SectionHeader(header) => assert!(header.shb_userappl().is_some()),
                        Block::InterfaceDescription(interface) => {
                            found.push(format!("{} {}", interface.if_name().unwrap().unwrap(), interface.linktype.0));
                        }
                        Block::EnhancedPacket(packet) => {
                            let time = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                            let comment =
                                packet.options.iter().find(|option| option.code == OptionCode::Comment).unwrap();
                            let comment = String::from_utf8_lossy(&comment.value[..usize::from(comment.len)]);
                            let data = &packet.data[..packet.caplen as usize];
                            let verdict = comment.split(' ').find(|word| word.starts_with("nat-")).unwrap_or("");
                            found.push(format!("{} {time} {data:?} of {} {verdict}", packet.if_id, packet.origlen));
                        }
                        _ => panic!("another block"),
                    }
                    reader.consume(offset);
                }
                Ok(_) => panic!("no pcapng"),
                Err(PcapError::Eof) => return found,
                Err(PcapError::Incomplete(_)) => reader.refill().unwrap(),
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let memory = Memory::default();
        let (mut capture, _broken) = Pcapng::start(Box::new(memory.clone())).unwrap();
        for (dev, bare, head, len) in [
            ("eth0", false, vec![1, 2, 3, 4, 5], 90_000),
            ("tun0", true, vec![], 60),
            ("eth0", false, vec![6; 192], 192),
        ] {
            let anomaly = Anomaly { dev: dev.to_owned(), packet: Packet { head, len, bare }, ..fault_b() };
            capture.add(&Record::Anomaly(Box::new(anomaly)));
        }
        assert_eq!(capture.lost(), 0);
        assert!(capture.finish(Duration::from_secs(5)));
        let bytes = memory.0.lock().unwrap().clone();
        let time = "1795608054373945"; // 2026-11-25T12:00:54.373945Z
        assert_eq!(
            read(bytes),
            [
                "eth0 1".to_owned(),
                format!("0 {time} [1, 2, 3, 4, 5] of 90000 nat-stale-port"),
                "tun0 101".to_owned(),
                format!("1 {time} [] of 60 nat-stale-port"),
                format!("0 {time} {:?} of 192 nat-stale-port", [6; 192]),
            ]
        );
    }
}
