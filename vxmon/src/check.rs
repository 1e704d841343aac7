//! Judges capture files: what `vxmon check` does with each packet, and what came of all of them. Asks this machine's kernel
//! nothing: a capture may come from any node.
//!
//! A capture holds no conntrack entry, no mark and no checksum state. So the judge accepts what any row of its table allows,
//! and a cause is named only where the bytes alone show it.

use std::{
    io::{self, Read, Write},
    ops::ControlFlow,
};

use jiff::Timestamp;
use vxmon_common::{counters::Counters, judge::Skb};

use crate::{
    account::{self, Accounts},
    attribute::{Attributor, Decoded, decode, story},
    devices::Role,
    event::{Connections, Line, Packets, Record, Summary, rfc3339},
    sink::Printer,
    source::{
        capture::{self, CaptureError, Interface, Packet},
        userspace::{Judge, Sighting},
    },
};

/// How often, in the capture's time, it is looked which connections have ended, ns.
const TICK: u64 = 1_000_000_000;

/// What came of all captures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets that were judged.
    pub judged: u64,
    /// Packets that were not, for whatever reason.
    pub unverified: u64,
    /// Anomalies among the judged.
    pub wrong: u64,
}

/// Judges captures, and writes what is wrong with their packets.
pub struct Check<W> {
    judge: Judge,
    attributor: Attributor,
    accounts: Accounts,
    printer: Printer,
    out: W,
    node: String,
    /// Interfaces of the captures before this one.
    before: u32,
    /// Time of the first packet and of the latest, ns since 1970.
    span: Option<(u64, u64)>,
    looked: u64,
    /// What could not be written.
    failed: Option<io::Error>,
}

impl<W: Write> Check<W> {
    /// For captures of tunnel packets to these UDP ports, host byte order.
    pub fn new(ports: impl IntoIterator<Item = u16>, node: String, printer: Printer, out: W) -> Self {
        let mut judge = Judge::of_each();
        judge.set_ports(ports);
        Self {
            judge,
            attributor: Attributor::of_captures(node.clone()),
            accounts: Accounts::default(),
            printer,
            out,
            node,
            before: 0,
            span: None,
            looked: 0,
            failed: None,
        }
    }

    /// Judges the packets of a capture called `name`. `note` is told, in lines for people, what is left out.
    ///
    /// # Errors
    /// [`CaptureError`] if it cannot be read to its end; what came before was judged.
    pub fn capture(&mut self, name: &str, input: impl Read + Send, note: &dyn Fn(&str)) -> Result<(), CaptureError> {
        let mut last = None;
        let result = capture::read(input, |interface, packet| {
            let is_new = last.replace(interface.number) != Some(interface.number);
            if is_new && let Some(link) = interface.unknown_link() {
                let device = device(name, interface);
                note(&format!("{device}: packets of link type {link} cannot be read, and are left out"));
            }
            if let Some(packet) = packet {
                self.packet(name, interface, &packet);
            }
            // Whoever read the output is gone: a pipe that goes on need not be read to its end.
            if self.failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        self.before = self.before.saturating_add(last.map_or(0, |last| last.saturating_add(1)));
        result
    }

    fn packet(&mut self, name: &str, interface: &Interface, packet: &Packet<'_>) {
        let Packet { bytes, head, bare, time_ns } = *packet;
        let ifindex = self.before.saturating_add(interface.number).saturating_add(1);
        let first = self.span.map_or(time_ns, |(first, _)| first.min(time_ns));
        let latest = self.span.map_or(time_ns, |(_, latest)| latest.max(time_ns));
        self.span = Some((first, latest));
        let mut counters = Counters::default();
        let sighting = Sighting { bytes, head, bare, skb: Skb::UNKNOWN, time_ns, ifindex, role: Role::Uplink };
        let event = self.judge.look(&sighting, &mut counters);
        if self.accounts.name(ifindex).is_none() {
            self.accounts.close_gone(|open| open == ifindex);
            self.accounts.of(ifindex, None).dev = device(name, interface);
        }
        self.accounts.of(ifindex, None).counters.add(&counters);
        if latest >= self.looked.saturating_add(TICK) {
            self.looked = latest;
            for ended in self.attributor.expire(latest) {
                self.tell_end(&ended);
            }
        }
        if let Some(decoded) = event.and_then(|event| decode(zerocopy::IntoBytes::as_bytes(&*event)).ok()) {
            self.tell(&decoded);
        }
    }

    fn tell(&mut self, decoded: &Decoded) {
        if !decoded.verdict.is_anomaly() {
            if let Some(ended) = self.attributor.follow_up(decoded) {
                self.tell_end(&ended);
            }
            return;
        }
        let account = self.accounts.of(decoded.event.ifindex, None);
        account.reported += 1;
        let device = account.dev.clone();
        let attributed = self.attributor.attribute(decoded, &device, wall_clock(decoded.event.time_ns));
        self.write(Record::Anomaly(Box::new(attributed.anomaly)));
    }

    fn tell_end(&mut self, ended: &story::Ended) {
        let device = self.accounts.name(ended.ifindex).unwrap_or_default().to_owned();
        let record = self.attributor.ending(ended, &device, &wall_clock);
        self.write(record);
    }

    fn write(&mut self, record: Record) {
        if self.failed.is_none() {
            let line = self.printer.render(&Line::from(record));
            // A pipe that goes on is read as it comes.
            self.failed = writeln!(self.out, "{line}").and_then(|()| self.out.flush()).err();
        }
    }

    /// Writes the summary.
    ///
    /// # Errors
    /// The first failure to write, now or earlier.
    pub fn finish(mut self) -> io::Result<Tally> {
        let devices = self.accounts.devices();
        let mut packets = Packets::default();
        for device in &devices {
            account::add(&mut packets, &device.packets);
        }
        let tally = Tally {
            judged: packets.verdicts.values().sum(),
            unverified: packets.unverified.values().sum(),
            wrong: packets.anomalies.reported,
        };
        let (story::Tally { opened, recovered, not_recovered, evicted }, open) = self.attributor.stories();
        let (first, latest) = self.span.unwrap_or_default();
        self.write(Record::Summary(Summary {
            ts: wall_clock(latest),
            node: self.node.clone(),
            packets,
            devices,
            connections: Connections { bad: opened, recovered, not_recovered, open, evicted, untold: 0 },
            seconds: ((latest - first) / 1_000_000) as f64 / 1e3,
        }));
        self.failed.map_or(Ok(tally), Err)
    }
}

/// What stands for the device: the capture, and which of its interfaces if it tells.
fn device(capture: &str, interface: &Interface) -> String {
    interface.name.as_ref().map_or_else(|| capture.to_owned(), |name| format!("{capture}:{name}"))
}

/// A capture's time, ns since 1970, as events show it.
fn wall_clock(ns: u64) -> String {
    rfc3339(Timestamp::from_nanosecond(ns.into()).unwrap_or(Timestamp::MAX))
}
