//! What tcpdump says about outer checksums, and captures in files.

use std::{
    io::{BufRead, BufReader, Read},
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Child, ChildStderr, ChildStdout, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Lab, Netns, cmd, pace};

/// How long a device must be silent before a capture is taken to be complete.
const SILENCE: Duration = Duration::from_millis(60);
/// How long tcpdump must be silent before it is believed to have written all, though it has not said so.
const LONG_SILENCE: Duration = Duration::from_secs(2);

/// Room for packets that tcpdump has not read yet, in KiB; each takes 64.
const BUFFER: &str = "32768";
/// Length of a VXLAN header.
const VXLAN_HEADER: usize = 8;

/// One UDP packet, as tcpdump saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    /// Seconds since 1970.
    pub time: f64,
    /// Source address.
    pub src: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port.
    pub dport: u16,
    /// The checksum in the packet, if tcpdump shows it: it does so for a wrong one, and for 0.
    pub seen: Option<u16>,
    /// What it should have been, if wrong.
    pub expected: Option<u16>,
    /// Whether tcpdump calls it wrong. Not so for 0, which it calls wrong over IPv6: see `seen`.
    pub bad: bool,
    /// Length of the outer IP packet; more than the MTU for a GSO packet.
    pub length: u32,
    /// From the outer IP header on; empty unless it was asked for.
    pub bytes: Vec<u8>,
}

/// Ends of the packet inside a VXLAN packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Inner {
    /// Source address and port.
    pub src: SocketAddr,
    /// Destination address and port.
    pub dst: SocketAddr,
    /// TCP's sequence number; `None` for UDP.
    pub seq: Option<u32>,
}

impl Captured {
    /// The packet inside, from the bytes: tcpdump takes some outer source ports for those of other protocols, and then does
    /// not show it (4500: IPsec, 1589: VQP).
    #[must_use]
    pub fn inner(&self) -> Option<Inner> {
        let outer = SlicedPacket::from_ip(&self.bytes).ok()?;
        let TransportSlice::Udp(udp) = outer.transport? else { return None };
        let inner = SlicedPacket::from_ethernet(udp.payload().get(VXLAN_HEADER..)?).ok()?;
        let (src, dst): (IpAddr, IpAddr) = match inner.net? {
            NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            NetSlice::Arp(_) => return None,
        };
        let (sport, dport, seq) = match inner.transport? {
            TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port(), Some(tcp.sequence_number())),
            TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port(), None),
            _ => return None,
        };
        Some(Inner { src: (src, sport).into(), dst: (dst, dport).into(), seq })
    }
}

/// A running tcpdump whose output is read as it comes.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Tcpdump,
    lines: Arc<Mutex<Lines>>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Lines {
    all: Vec<String>,
    last: Instant,
}

impl Capture {
    /// Watches `dev` in `node`, with a pcap filter; when this returns, it is listening.
    pub fn start(node: &Netns, dev: &str, filter: &str) -> Result<Self> {
        Self::start_with(node, dev, &[], filter)
    }

    fn start_with(node: &Netns, dev: &str, options: &[&str], filter: &str) -> Result<Self> {
        // -K is not given: checksums are the point. --immediate-mode: no packet waits in a buffer.
        let (tcpdump, stdout) = Tcpdump::start(node, dev, &[&["-tt", "-vv", "-l"], options].concat(), filter)?;
        let lines = Arc::new(Mutex::new(Lines { all: Vec::new(), last: Instant::now() }));
        let into = Arc::clone(&lines);
        let reader = thread::Builder::new().name("capture".to_owned()).spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let mut lines = lock(&into);
                lines.all.push(line);
                lines.last = Instant::now();
            }
        })?;
        Ok(Self { tcpdump, lines, reader: Some(reader) })
    }

    /// Watches the outer packets that node a sends, on the veth.
    pub fn vxlan(lab: &Lab) -> Result<Self> {
        Self::vxlan_with(lab, &[])
    }

    /// As [`vxlan`](Self::vxlan), with the bytes of each packet. Not for bulk transfers: tcpdump writes them all out.
    pub fn vxlan_with_bytes(lab: &Lab) -> Result<Self> {
        Self::vxlan_with(lab, &["-x"])
    }

    fn vxlan_with(lab: &Lab, tcpdump: &[&str]) -> Result<Self> {
        let options = lab.options();
        let source = crate::lab::Side::A.underlay(options.underlay);
        let filter = format!("src host {source} and udp dst port {}", options.port);
        Self::start_with(&lab.a, &options.uplink, tcpdump, &filter)
    }

    /// What has been seen so far.
    #[must_use]
    pub fn packets(&self) -> Vec<Captured> {
        parse(&lock(&self.lines).all)
    }

    /// Waits until a packet satisfies `wanted`, and returns it; an error if `limit` passes first.
    pub fn wait_for(&self, limit: Duration, wanted: impl Fn(&Captured) -> bool) -> Result<Captured> {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.packets().into_iter().find(&wanted) {
                return Ok(packet);
            }
            if start.elapsed() > pace::limit(limit) {
                bail!("no such packet within {limit:?}, among {}", self.packets().len());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Process id of tcpdump.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.tcpdump.pid()
    }

    /// Waits for silence, ends tcpdump and returns everything it saw. Of a bulk transfer that need not be all.
    pub fn stop(mut self) -> Result<Vec<Captured>> {
        let start = Instant::now();
        let silence = pace::limit(SILENCE);
        while start.elapsed() < silence || lock(&self.lines).last.elapsed() < silence {
            thread::sleep(Duration::from_millis(10));
            if start.elapsed() > pace::limit(Duration::from_secs(10)) {
                break;
            }
        }
        // On a busy machine silence may only mean that tcpdump has not run; and what it has not read by its end is lost.
        while self.tcpdump.is_behind()? && lock(&self.lines).last.max(start).elapsed() < LONG_SILENCE {
            thread::sleep(Duration::from_millis(10));
        }
        self.tcpdump.end()?;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        Ok(self.packets())
    }
}

/// A running tcpdump that writes a file.
#[derive(Debug)]
pub struct Recording {
    tcpdump: Tcpdump,
}

impl Recording {
    /// Writes what passes `dev` in `node` to `file`; when this returns, it is listening.
    pub fn start(node: &Netns, dev: &str, filter: &str, file: &Path) -> Result<Self> {
        let name = file.to_str().context("a file name that is not UTF-8")?;
        let (tcpdump, _) = Tcpdump::start(node, dev, &["-w", name, "-U"], filter)?;
        Ok(Self { tcpdump })
    }

    /// Gives the last packets a moment, and ends it.
    pub fn stop(mut self) -> Result<()> {
        thread::sleep(pace::limit(SILENCE));
        self.tcpdump.end()
    }
}

/// Runs tcpdump over a capture file, and parses its verdicts.
pub fn read_file(file: &Path, filter: &str) -> Result<Vec<Captured>> {
    let mut command = std::process::Command::new("tcpdump");
    command.args(["-nn", "-tt", "-vv", "-r"]).arg(file).args(filter.split_whitespace());
    let text = cmd::run(&mut command)?;
    Ok(parse(&text.lines().map(str::to_owned).collect::<Vec<_>>()))
}

#[derive(Debug)]
struct Tcpdump {
    child: Child,
    /// Kept open, so that its closing words find a reader.
    stderr: BufReader<ChildStderr>,
}

impl Tcpdump {
    fn start(node: &Netns, dev: &str, args: &[&str], filter: &str) -> Result<(Self, ChildStdout)> {
        let mut command = node.command("tcpdump");
        // -Z root: a change of user would undo the signal that ends it with us.
        // -B: by default there is room for 32 packets, whatever their length, and on a busy machine a burst is longer.
        command
            .args(["-nn", "-i", dev, "--immediate-mode", "-Z", "root", "-B", BUFFER])
            .args(args)
            .args(filter.split_whitespace());
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run `{}`", cmd::line(&command)))?;
        let stdout = child.stdout.take().context("tcpdump without an output")?;
        let mut stderr = BufReader::new(child.stderr.take().context("tcpdump without an output")?);
        let mut said = String::new();
        while stderr.read_line(&mut said)? > 0 {
            if said.contains("listening on") {
                return Ok((Self { child, stderr }, stdout));
            }
        }
        let status = child.wait()?;
        bail!("`{}` ended with {status}: {}", cmd::line(&command), said.trim_end())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Whether packets wait in the kernel that it has not read, by its answer to SIGUSR1. Those that came before its filter
    /// was in place wait for ever.
    fn is_behind(&mut self) -> Result<bool> {
        kill(self.pid(), Signal::SIGUSR1).context("tcpdump is gone")?;
        let mut said = String::new();
        self.stderr.read_line(&mut said)?;
        let [captured, received, dropped] = statistics(&said).with_context(|| format!("tcpdump said {said:?}"))?;
        Ok(captured + dropped < received)
    }

    fn end(&mut self) -> Result<()> {
        kill(self.pid(), Signal::SIGINT).context("tcpdump is gone")?;
        let mut said = String::new();
        self.stderr.read_to_string(&mut said)?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("tcpdump ended with {status}: {}", said.trim_end());
        }
        Ok(())
    }
}

impl Drop for Tcpdump {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `tcpdump: 3 packets captured, 5 packets received by filter, 0 packets dropped by kernel`
fn statistics(line: &str) -> Option<[u64; 3]> {
    let mut numbers = line.strip_prefix("tcpdump: ")?.split(", ").map(|part| part.split(' ').next()?.parse().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next()??])
}

/// Joins the lines of each packet (those after the first are indented, and the inner packet has a header of its own), and
/// reads the outer UDP header.
fn parse(lines: &[String]) -> Vec<Captured> {
    let mut packets: Vec<(String, Vec<u8>)> = Vec::new();
    for line in lines {
        // A time stamp begins a packet; a line of the inner packet begins with a space or with `IP`.
        match packets.last_mut() {
            Some((packet, bytes)) if !line.starts_with(|first: char| first.is_ascii_digit()) => {
                if let Some(more) = hex_dump(line) {
                    bytes.extend(more);
                } else {
                    packet.push(' ');
                    packet.push_str(line.trim_start());
                }
            }
            _ => packets.push((line.clone(), Vec::new())),
        }
    }
    packets.into_iter().filter_map(|(packet, bytes)| Some(Captured { bytes, ..parse_packet(&packet)? })).collect()
}

/// `\t0x0010:  0a00 640f 6b5e 2118 005a 7b75`, with one byte less at the end of an odd packet.
fn hex_dump(line: &str) -> Option<Vec<u8>> {
    let (_, words) = line.strip_prefix("\t0x")?.split_once(":  ")?;
    let digits: Vec<u8> = words.chars().filter_map(|digit| u8::try_from(digit.to_digit(16)?).ok()).collect();
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// `TIME IP (…, length 110) SRC.SPORT > DST.DPORT: [bad udp cksum 0x76b9 -> 0x4212!] …`
fn parse_packet(packet: &str) -> Option<Captured> {
    let (time, rest) = packet.split_once(' ')?;
    let (before, rest) = rest.split_once(" > ")?;
    let (header, source) = before.rsplit_once(' ')?;
    let (target, text) = rest.split_once(": ")?;
    let (source, target) = (socket(source)?, socket(target)?);
    let length = header.rsplit_once("length").and_then(|(_, length)| {
        length
            .trim_matches(|other: char| !other.is_ascii_digit())
            .split(|other: char| !other.is_ascii_digit())
            .next()?
            .parse()
            .ok()
    });
    // A checksum of the inner packet may be wrong too: only the first bracket is about the outer one.
    let sum = text.strip_prefix('[').and_then(|rest| Some(rest.split_once(']')?.0)).unwrap_or_default();
    let mut values = sum.split("0x").skip(1).map(|value| u16::from_str_radix(value.get(..4)?, 16).ok());
    let seen = if sum == "no cksum" { Some(0) } else { values.next().flatten() };
    let bad = sum.starts_with("bad udp cksum") && seen != Some(0);
    Some(Captured {
        time: time.parse().ok()?,
        src: source.ip(),
        sport: source.port(),
        dst: target.ip(),
        dport: target.port(),
        seen,
        expected: values.next().flatten(),
        bad,
        length: length.unwrap_or(0),
        bytes: Vec::new(),
    })
}

/// `10.0.0.1.53` and `fd00::1.53`: the port after the last dot.
fn socket(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once('.')?;
    Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
}

fn lock(lines: &Mutex<Lines>) -> MutexGuard<'_, Lines> {
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From `tcpdump -nn -tt -vv -i uplink` in the lab.
    const OUTPUT: &str = "\
1795571809.026789 IP (tos 0x0, ttl 64, id 21435, offset 0, flags [none], proto UDP (17), length 110)
    10.0.100.3.27486 > 10.0.100.15.8472: [bad udp cksum 0x7b75 -> 0x99fb!] OTV, flags [I] (0x08), overlay 0, instance 1
IP (tos 0x0, ttl 64, id 1203, offset 0, flags [DF], proto TCP (6), length 60)
    10.244.0.0.40018 > 10.244.2.73.9153: Flags [S], cksum 0x1792 (correct), seq 1279602967, win 65280, length 0
1795571809.041785 IP6 (flowlabel 0x2b0a2, hlim 64, next-header UDP (17) payload length: 63) fd00:100::3.49152 > \
fd00:100::f.8472: [bad udp cksum 0xe127 -> 0x257e!]  BCM-LI-SHIM: direction unknown, unknown payload
1795571809.077775 IP6 (hlim 64, next-header UDP (17) payload length: 63) fd00:100::3.49152 > fd00:100::f.8472: \
[bad udp cksum 0x0000 -> 0x257e!]  BCM-LI-SHIM: direction unknown, unknown payload
1795571809.098 IP (tos 0x0, ttl 64, id 1, offset 0, flags [none], proto UDP (17), length 78)
    10.0.100.3.1 > 10.0.100.15.4789: [no cksum] VXLAN, flags [I] (0x08), vni 1
1795571809.099 IP (tos 0x0, ttl 64, id 1, offset 0, flags [none], proto UDP (17), length 78)
    10.0.100.3.1 > 10.0.100.15.4789: [udp sum ok] VXLAN, flags [I] (0x08), vni 1
";

    #[test]
    fn statistics_are_understood() {
        let line = "tcpdump: 1 packet captured, 5 packets received by filter, 0 packets dropped by kernel\n";
        assert_eq!(statistics(line), Some([1, 5, 0]));
        assert_eq!(statistics("tcpdump: listening on uplink, link-type EN10MB (Ethernet)"), None);
    }

    /// From `tcpdump -nn -tt -vv -x -i uplink` and a VXLAN with `srcport 4500 4501`, a port that tcpdump takes for IPsec's: a SYN
    /// to 10.244.2.73:9153, and `echo -n abc` to its UDP port 53.
    const WITH_BYTES: &str = "\
1795824474.474855 IP (tos 0x0, ttl 64, id 44860, offset 0, flags [none], proto UDP (17), length 110)
    10.0.100.3.4500 > 10.0.100.15.8472: [udp sum ok] UDP-encap: ESP(spi=0x08000000,seq=0x100), length 82
\t0x0000:  4500 006e af3c 0000 4011 ef30 0a00 6403
\t0x0010:  0a00 640f 1194 2118 005a f3c5 0800 0000
\t0x0020:  0000 0100 0200 0000 000b 0200 0000 000a
\t0x0030:  0800 4500 003c 08fe 4000 4006 198e 0af4
\t0x0040:  0000 0af4 0249 a516 23c1 4061 791d 0000
\t0x0050:  0000 a002 fd5c 9f82 0000 0204 0582 0402
\t0x0060:  080a f236 1e92 0000 0000 0103 030a
1795824474.803343 IP (tos 0x0, ttl 64, id 44937, offset 0, flags [none], proto UDP (17), length 81)
    10.0.100.3.4500 > 10.0.100.15.8472: [udp sum ok] UDP-encap: ESP(spi=0x08000000,seq=0x100), length 53
\t0x0000:  4500 0051 af89 0000 4011 ef00 0a00 6403
\t0x0010:  0a00 640f 1194 2118 003d f3ed 0800 0000
\t0x0020:  0000 0100 0200 0000 000b 0200 0000 000a
\t0x0030:  0800 4500 001f 838f 4000 4011 9f0e 0af4
\t0x0040:  0000 0af4 0249 c6d5 0035 000b 5c3a 6162
\t0x0050:  63
";

    #[test]
    fn the_packet_inside_is_found_by_its_bytes() {
        let packets = parse(&WITH_BYTES.lines().map(str::to_owned).collect::<Vec<_>>());
        let ends = |src: &str, dst: &str, seq| Inner { src: src.parse().unwrap(), dst: dst.parse().unwrap(), seq };
        let inner: Vec<_> = packets.iter().map(Captured::inner).collect();
        let syn = ends("10.244.0.0:42262", "10.244.2.73:9153", Some(1_080_129_821));
        assert_eq!(inner, [Some(syn), Some(ends("10.244.0.0:50901", "10.244.2.73:53", None))]);
        assert_eq!(packets.iter().map(|packet| packet.bytes.len()).collect::<Vec<_>>(), [110, 81]);
    }

    #[test]
    fn tcpdump_is_understood() {
        let packets = parse(&OUTPUT.lines().map(str::to_owned).collect::<Vec<_>>());
        let short: Vec<_> = packets
            .iter()
            .map(|packet| (packet.sport, packet.seen, packet.expected, packet.bad, packet.length))
            .collect();
        assert_eq!(
            short,
            [
                (27486, Some(0x7b75), Some(0x99fb), true, 110),
                (49152, Some(0xe127), Some(0x257e), true, 63),
                (49152, Some(0), Some(0x257e), false, 63),
                (1, Some(0), None, false, 78),
                (1, None, None, false, 78),
            ]
        );
        assert_eq!(packets[1].dst.to_string(), "fd00:100::f");
        assert_eq!(packets[0].inner(), None);
    }
}
