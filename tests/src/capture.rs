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
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Lab, Netns, cmd, pace};

/// How long a device must be silent before a capture is taken to be complete.
const SILENCE: Duration = Duration::from_millis(60);

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
    /// The rest of what tcpdump wrote on it.
    pub text: String,
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
        // -K is not given: checksums are the point. --immediate-mode: no packet waits in a buffer.
        let (tcpdump, stdout) = Tcpdump::start(node, dev, &["-tt", "-vv", "-l"], filter)?;
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
        let options = lab.options();
        let source = crate::lab::Side::A.underlay(options.underlay);
        Self::start(&lab.a, &options.uplink, &format!("src host {source} and udp dst port {}", options.port))
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

    /// Waits for silence, ends tcpdump and returns everything it saw.
    pub fn stop(mut self) -> Result<Vec<Captured>> {
        let start = Instant::now();
        let silence = pace::limit(SILENCE);
        while start.elapsed() < silence || lock(&self.lines).last.elapsed() < silence {
            thread::sleep(Duration::from_millis(10));
            if start.elapsed() > pace::limit(Duration::from_secs(10)) {
                break;
            }
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
        command.args(["-nn", "-i", dev, "--immediate-mode", "-Z", "root"]).args(args).args(filter.split_whitespace());
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

    fn end(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).context("tcpdump is gone")?;
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

/// Joins the lines of each packet (those after the first are indented, and the inner packet has a header of its own), and
/// reads the outer UDP header.
fn parse(lines: &[String]) -> Vec<Captured> {
    let mut packets: Vec<String> = Vec::new();
    for line in lines {
        // A time stamp begins a packet; a line of the inner packet begins with a space or with `IP`.
        match packets.last_mut() {
            Some(packet) if !line.starts_with(|first: char| first.is_ascii_digit()) => {
                packet.push(' ');
                packet.push_str(line.trim_start());
            }
            _ => packets.push(line.clone()),
        }
    }
    packets.iter().filter_map(|packet| parse_packet(packet)).collect()
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
        text: text.to_owned(),
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
        assert!(packets[0].text.contains("10.244.2.73.9153"));
    }
}
