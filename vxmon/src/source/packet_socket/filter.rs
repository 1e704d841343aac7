//! The classic BPF filter that keeps other traffic away from the packet socket: it runs in the kernel, on each packet, and
//! only accepts or refuses. It lets through more than the judge wants rather than less; what it refuses is never judged.

use nix::libc::{self, sock_filter};

/// What a device's socket is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// Nothing.
    Nothing,
    /// Each packet that leaves.
    All,
    /// UDP packets that leave for one of these ports (host byte order); `l2`: behind an Ethernet header.
    Ports {
        /// The ports.
        ports: &'a [u16],
        /// Whether the device's packets have Ethernet headers.
        l2: bool,
    },
}

/// Whole packets: more than the longest.
const ACCEPT: u32 = 0x10_0000;
/// `SKF_AD_OFF + SKF_AD_PKTTYPE` (include/uapi/linux/filter.h).
const PACKET_TYPE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
/// `PACKET_OUTGOING`.
const OUTGOING: u32 = 4;
/// Tags before the IP header that the judge walks through.
const TAGS: u32 = 3;
/// EtherTypes of VLAN tags.
const TAG_TYPES: [u32; 3] = [0x8100, 0x88a8, 0x9100];
/// IPv6 extension headers before which a UDP header may stand: hop-by-hop, routing, fragment, authentication, destination.
const EXTENSIONS: [u32; 5] = [0, 43, 44, 51, 60];

const LD_B_IND: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_IND;
const LD_H_IND: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_IND;
const LD_H_ABS: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LD_W_ABS: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const JEQ: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;

/// The program.
pub fn program(wanted: Wanted<'_>) -> Vec<sock_filter> {
    let mut program = Vec::new();
    if wanted != Wanted::Nothing {
        program.push(op(LD_W_ABS, PACKET_TYPE));
        refuse_unless(&mut program, JEQ, OUTGOING);
    }
    rest(&mut program, wanted);
    program
}

/// All but the direction, which a test has no packets to show with.
fn rest(program: &mut Vec<sock_filter>, wanted: Wanted<'_>) {
    match wanted {
        Wanted::Nothing => program.push(op(libc::BPF_RET, 0)),
        Wanted::All => program.push(op(libc::BPF_RET, ACCEPT)),
        Wanted::Ports { ports, l2 } => udp(program, ports, l2),
    }
}

fn udp(program: &mut Vec<sock_filter>, ports: &[u16], l2: bool) {
    let (v4, v6) = (ipv4(ports), ipv6(ports));
    if l2 {
        for n in 0..TAGS {
            program.push(op(libc::BPF_LDX | libc::BPF_IMM, 14 + 4 * n));
            program.push(op(LD_H_ABS, 12 + 4 * n));
            by_version(program, 0x0800, 0x86dd, &v4, &v6);
            let refuse = TAG_TYPES.len() as u8;
            // Past the refusal to the next tag, or on to the next comparison; behind the last stands the refusal.
            for (n, tag) in TAG_TYPES.iter().enumerate() {
                program.push(jump(JEQ, *tag, refuse - n as u8, 0));
            }
            program.push(op(libc::BPF_RET, 0));
        }
        program.push(op(libc::BPF_LDX | libc::BPF_IMM, 14 + 4 * TAGS));
        program.push(op(LD_H_ABS, 12 + 4 * TAGS));
        by_version(program, 0x0800, 0x86dd, &v4, &v6);
    } else {
        program.push(op(libc::BPF_LDX | libc::BPF_IMM, 0));
        program.push(op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0));
        program.push(op(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 4));
        by_version(program, 4, 6, &v4, &v6);
    }
    program.push(op(libc::BPF_RET, 0));
}

/// Runs one of two parts that each end in a verdict, by what was loaded; else goes on behind them.
fn by_version(program: &mut Vec<sock_filter>, four: u32, six: u32, v4: &[sock_filter], v6: &[sock_filter]) {
    for (version, part) in [(four, v4), (six, v6)] {
        program.push(jump(JEQ, version, 1, 0));
        program.push(op(libc::BPF_JMP | libc::BPF_JA, part.len() as u32));
        program.extend_from_slice(part);
    }
}

/// X: offset of the IPv4 header. Later fragments have no ports, and the judge does not want them either.
fn ipv4(ports: &[u16]) -> Vec<sock_filter> {
    let mut part = vec![op(LD_B_IND, 9)];
    refuse_unless(&mut part, JEQ, 17);
    part.push(op(LD_H_IND, 6));
    part.push(jump(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0x1fff, 0, 1));
    part.push(op(libc::BPF_RET, 0));
    part.push(op(LD_B_IND, 0));
    part.push(op(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0xf));
    part.push(op(libc::BPF_ALU | libc::BPF_LSH | libc::BPF_K, 2));
    part.push(op(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0));
    part.push(op(libc::BPF_MISC | libc::BPF_TAX, 0));
    part.push(op(LD_H_IND, 2));
    one_of(&mut part, ports);
    part
}

/// X: offset of the IPv6 header. With extension headers accepted as it is, for the judge to walk through.
fn ipv6(ports: &[u16]) -> Vec<sock_filter> {
    let mut part = vec![op(LD_B_IND, 6)];
    for extension in EXTENSIONS {
        part.push(jump(JEQ, extension, 0, 1));
        part.push(op(libc::BPF_RET, ACCEPT));
    }
    refuse_unless(&mut part, JEQ, 17);
    part.push(op(LD_H_IND, 42));
    one_of(&mut part, ports);
    part
}

fn one_of(part: &mut Vec<sock_filter>, ports: &[u16]) {
    for port in ports {
        part.push(jump(JEQ, u32::from(*port), 0, 1));
        part.push(op(libc::BPF_RET, ACCEPT));
    }
    part.push(op(libc::BPF_RET, 0));
}

fn refuse_unless(part: &mut Vec<sock_filter>, code: u32, k: u32) {
    part.push(jump(code, k, 1, 0));
    part.push(op(libc::BPF_RET, 0));
}

fn op(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        os::{fd::AsRawFd as _, unix::net::UnixDatagram},
    };

    use super::*;

    /// Has the kernel run the filter, on datagrams between two sockets.
    struct Kernel(UnixDatagram, UnixDatagram);

    impl Kernel {
        fn new(wanted: Wanted<'_>) -> io::Result<Self> {
            let (from, to) = UnixDatagram::pair()?;
            to.set_nonblocking(true)?;
            let mut part = Vec::new();
            rest(&mut part, wanted);
            super::super::ring::set_filter(to.as_raw_fd(), &part)?;
            Ok(Self(from, to))
        }

        fn accepts(&self, packet: &[u8]) -> io::Result<bool> {
            match self.0.send(packet) {
                Ok(_) => {}
                Err(error) => return Err(error),
            }
            match self.1.recv(&mut [0; 2048]) {
                Ok(length) => {
                    assert_eq!(length, packet.len());
                    Ok(true)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error),
            }
        }
    }

    fn ethernet(tags: &[u16], ethertype: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 7]);
        }
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn v4(options: usize, fragment: u16, proto: u8, port: u16) -> Vec<u8> {
        let mut packet = vec![0; 20 + options];
        packet[0] = 0x40 | ((20 + options) / 4) as u8;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = proto;
        packet.extend([0x12, 0x34]);
        packet.extend(port.to_be_bytes());
        packet.extend([0; 20]);
        packet
    }

    fn v6(next: u8, port: u16) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[6] = next;
        packet.extend([0x12, 0x34]);
        packet.extend(port.to_be_bytes());
        packet.extend([0; 20]);
        packet
    }

    #[test]
    fn the_kernel_lets_tunnel_packets_through_and_nothing_else() -> io::Result<()> {
        let ports: Vec<u16> = (8000..8100).chain([4789, 8472]).collect();
        let kernel = Kernel::new(Wanted::Ports { ports: &ports, l2: true })?;
        let cases: [(&str, bool, Vec<u8>); 16] = [
            ("IPv4", true, ethernet(&[], 0x0800, &v4(0, 0, 17, 8472))),
            ("the first port", true, ethernet(&[], 0x0800, &v4(0, 0, 17, 8000))),
            ("another port", false, ethernet(&[], 0x0800, &v4(0, 0, 17, 8473))),
            ("TCP", false, ethernet(&[], 0x0800, &v4(0, 0, 6, 8472))),
            ("options", true, ethernet(&[], 0x0800, &v4(8, 0, 17, 4789))),
            ("the first fragment", true, ethernet(&[], 0x0800, &v4(0, 0x2000, 17, 4789))),
            ("a later fragment", false, ethernet(&[], 0x0800, &v4(0, 0x2001, 17, 4789))),
            ("not to fragment", true, ethernet(&[], 0x0800, &v4(0, 0x4000, 17, 4789))),
            ("IPv6", true, ethernet(&[], 0x86dd, &v6(17, 8472))),
            ("IPv6, another port", false, ethernet(&[], 0x86dd, &v6(17, 53))),
            ("IPv6, extension header", true, ethernet(&[], 0x86dd, &v6(60, 53))),
            ("IPv6, TCP", false, ethernet(&[], 0x86dd, &v6(6, 8472))),
            ("one tag", true, ethernet(&[0x8100], 0x0800, &v4(0, 0, 17, 8472))),
            ("three tags", true, ethernet(&[0x88a8, 0x8100, 0x9100], 0x86dd, &v6(17, 8472))),
            ("a tag, another port", false, ethernet(&[0x88a8], 0x0800, &v4(0, 0, 17, 80))),
            ("ARP", false, ethernet(&[], 0x0806, &[0; 40])),
        ];
        for (name, wanted, packet) in &cases {
            assert_eq!(kernel.accepts(packet)?, *wanted, "{name}");
        }
        assert!(!kernel.accepts(&ethernet(&[], 0x0800, &[0x45]))?, "cut off");
        Ok(())
    }

    #[test]
    fn the_kernel_lets_bare_packets_through() -> io::Result<()> {
        let kernel = Kernel::new(Wanted::Ports { ports: &[8472], l2: false })?;
        assert!(kernel.accepts(&v4(0, 0, 17, 8472))?);
        assert!(kernel.accepts(&v6(17, 8472))?);
        assert!(!kernel.accepts(&v4(0, 0, 17, 1))?);
        assert!(!kernel.accepts(&v6(17, 1))?);
        assert!(Kernel::new(Wanted::All)?.accepts(&[0; 60])?);
        assert!(!Kernel::new(Wanted::Nothing)?.accepts(&v4(0, 0, 17, 8472))?);
        Ok(())
    }

    /// The kernel refuses more than BPF_MAXINSNS.
    #[test]
    fn a_great_many_ports_fit() -> io::Result<()> {
        let ports: Vec<u16> = (1..=200).collect();
        let program = program(Wanted::Ports { ports: &ports, l2: true });
        assert!(program.len() < 4096, "{}", program.len());
        let kernel = Kernel::new(Wanted::Ports { ports: &ports, l2: true })?;
        assert!(kernel.accepts(&ethernet(&[0x8100], 0x86dd, &v6(17, 200)))?);
        assert!(!kernel.accepts(&ethernet(&[0x8100], 0x86dd, &v6(17, 201)))?);
        Ok(())
    }
}
