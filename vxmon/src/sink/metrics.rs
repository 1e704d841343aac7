//! The numbers that `--metrics` shows, in OpenMetrics or the older Prometheus text. The monitor puts a whole set of
//! readings on the [`Board`] once a second; a scrape only formats them, so scrapes cost the monitor nothing. Every label's
//! values are bounded, whatever the traffic: device names by [`crate::account`], all others by the schema.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use super::socket::Counts;
use crate::event::{LostByStage, Packets};

/// The monitor's loop turns at least once a second; longer than that, and it is stuck.
const STUCK: Duration = Duration::from_secs(30);
/// Events wait in the ring buffer for longer than that only if the monitor cannot keep up.
const BEHIND: Duration = Duration::from_secs(10);

/// Anomalies by verdict, whether the cause is proved, and evidence of `--random-fully`.
pub type ByCause = BTreeMap<(&'static str, bool, &'static str), u64>;

/// All numbers at one moment.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// Packets by device name and role.
    pub packets: BTreeMap<(String, &'static str), Packets>,
    /// Reported anomalies and the repeats counted with them.
    pub anomalies: ByCause,
    /// Connections that had bad packets, by how that ended.
    pub endings: BTreeMap<&'static str, u64>,
    /// Anomalies not sent, the ring buffer being full; and not written, the reader being slow.
    pub lost: LostByStage,
    /// Watched devices: name, role, hook.
    pub attached: Vec<(String, &'static str, &'static str)>,
    /// VXLAN devices, and whether their checksum offload is on.
    pub offload: Vec<(String, bool)>,
    /// How often an offload was switched, or came back with a device made anew.
    pub offload_changes: u64,
    /// `UdpInCsumErrors` of this network namespace, by family.
    pub checksum_errors: Vec<(&'static str, u64)>,
    /// The programs' run time and number of runs, by name, where the kernel counts them.
    pub programs: Vec<(String, Duration, u64)>,
    /// Readers of the socket, if there is one.
    pub readers: Option<Counts>,
    /// This process.
    pub process: Process,
}

/// What the process itself uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// Resident memory, bytes.
    pub resident: u64,
    /// CPU time in user and kernel mode.
    pub cpu: Duration,
    /// Open file descriptors.
    pub descriptors: u64,
}

#[derive(Debug, Default)]
struct Shown {
    readings: Readings,
    /// When the monitor's loop last turned.
    turned: Option<Instant>,
    /// When it had last handled all events that there were.
    drained: Option<Instant>,
    /// The same as Unix time.
    drained_at: Option<SystemTime>,
}

/// The readings of the last second.
#[derive(Debug, Default)]
pub struct Board {
    shown: Mutex<Shown>,
}

impl Board {
    /// Shows new readings; `drained`: all events that there were have been handled.
    pub fn show(&self, mut readings: Readings, drained: bool) {
        let mut shown = self.lock();
        readings.never_less_than(&shown.readings);
        let now = Instant::now();
        if drained {
            shown.drained = Some(now);
            shown.drained_at = Some(SystemTime::now());
        }
        shown.turned = Some(now);
        shown.readings = readings;
    }

    /// Whether the monitor is alive; else what is wrong.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn healthy(&self) -> Result<(), String> {
        match self.lock().turned {
            Some(turned) if turned.elapsed() < STUCK => Ok(()),
            Some(turned) => Err(format!("the monitor has been stuck for {} s", turned.elapsed().as_secs())),
            None => Err("starting".to_owned()),
        }
    }

    /// Whether devices are watched and events handled; else what is missing.
    ///
    /// # Errors
    /// What is missing, in one line.
    pub fn ready(&self) -> Result<(), String> {
        self.healthy()?;
        let shown = self.lock();
        if shown.readings.attached.is_empty() {
            return Err("no device is watched: there is no VXLAN device, or none can be attached to".to_owned());
        }
        match shown.drained {
            Some(drained) if drained.elapsed() < BEHIND => Ok(()),
            Some(drained) => Err(format!("events have been waiting for {} s", drained.elapsed().as_secs())),
            None => Err("events were not handled yet".to_owned()),
        }
    }

    /// The page.
    pub fn expose(self: &Board, exposition: Exposition) -> String {
        let shown = self.lock();
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Page(Arc::new((shown.readings.clone(), shown.drained_at)))));
        drop(shown);
        let mut page = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut page, &registry);
        match exposition {
            Exposition::OpenMetrics => page,
            Exposition::Text => classic(&page),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Readings {
    /// A packet can move from one verdict to another when more is known about it; to who reads a counter, one that falls
    /// by one began anew from zero, and jumped. So no number falls: it stays until the others have come up to it.
    fn never_less_than(&mut self, before: &Self) {
        for (key, packets) in &mut self.packets {
            let Some(before) = before.packets.get(key) else { continue };
            for (verdict, n) in &mut packets.verdicts {
                *n = (*n).max(before.verdicts.get(verdict).copied().unwrap_or(0));
            }
        }
    }
}

/// In which form the page is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus text, version 0.0.4: what `curl` shows and older scrapers read.
    Text,
}

impl Exposition {
    /// What the Accept headers of a request ask for.
    pub fn accepted<'headers>(mut accepts: impl Iterator<Item = &'headers str>) -> Self {
        let open = accepts.any(|accept| accept.to_ascii_lowercase().contains("application/openmetrics-text"));
        if open { Self::OpenMetrics } else { Self::Text }
    }

    /// As HTTP names it.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// OpenMetrics as the older text: a counter is described under its full name, there are no units and no end mark.
fn classic(page: &str) -> String {
    let counters: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut text = String::with_capacity(page.len());
    for line in page.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF" | "UNIT"), _, _) => {}
            (Some("#"), Some(keyword), Some(name), Some(rest)) if counters.contains(&name) => {
                text += &format!("# {keyword} {name}_total {rest}\n");
            }
            _ => {
                text += line;
                text.push('\n');
            }
        }
    }
    text
}

#[derive(Debug)]
struct Page(Arc<(Readings, Option<SystemTime>)>);

/// A label's name and value.
type Label<'page> = (&'static str, &'page str);

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let (readings, drained) = &*self.0;
        packets(&mut encoder, readings)?;
        monitor(&mut encoder, readings, *drained)?;
        node(&mut encoder, readings)?;
        programs(&mut encoder, readings)?;
        process(&mut encoder, readings)
    }
}

fn packets(encoder: &mut DescriptorEncoder, readings: &Readings) -> fmt::Result {
    let devices = || readings.packets.iter().map(|((device, role), packets)| (&**device, *role, packets));
    counters(
        encoder,
        "vxmon_packets",
        "Packets judged, by verdict; VXLAN packets on uplinks, frames about to be encapsulated on VXLAN devices",
        devices().flat_map(|(device, role, packets)| {
            packets
                .verdicts
                .iter()
                .map(move |(verdict, n)| (vec![("device", device), ("role", role), ("verdict", *verdict)], *n))
        }),
    )?;
    counters(
        encoder,
        "vxmon_unverified_packets",
        "Packets that could not be judged, by reason; never counted as wrong",
        devices().flat_map(|(device, role, packets)| {
            packets
                .unverified
                .iter()
                .map(move |(reason, n)| (vec![("device", device), ("role", role), ("reason", *reason)], *n))
        }),
    )?;
    counters(
        encoder,
        "vxmon_other_packets",
        "Packets that carry no checksum to judge here",
        devices().map(|(device, role, packets)| (vec![("device", device), ("role", role)], packets.other)),
    )?;
    counters(
        encoder,
        "vxmon_anomalies",
        "Reported packets with a wrong checksum and their repeats, by verdict, whether the cause is proved, and how it is \
         known that --random-fully chose the port",
        readings.anomalies.iter().map(|((verdict, proved, random_fully), n)| {
            let proved = if *proved { "true" } else { "false" };
            (vec![("verdict", *verdict), ("proved", proved), ("random_fully", *random_fully)], *n)
        }),
    )?;
    counters(
        encoder,
        "vxmon_affected_connections",
        "Connections that had packets with a wrong checksum and no longer do, by outcome",
        readings.endings.iter().map(|(outcome, n)| (vec![("outcome", *outcome)], *n)),
    )?;
    let missed = readings.readers.map(|readers| ("socket", readers.missed));
    counters(
        encoder,
        "vxmon_lost",
        "Counted but not shown, by stage: anomalies that the ring buffer (ring) or the output (queue) had no room for, \
         lines that slow readers of the socket missed (socket), and packets that packet sockets left unseen (capture)",
        [("ring", readings.lost.ring), ("queue", readings.lost.queue), ("capture", readings.lost.capture)]
            .into_iter()
            .chain(missed)
            .map(|(stage, n)| (vec![("stage", stage)], n)),
    )
}

fn monitor(encoder: &mut DescriptorEncoder, readings: &Readings, drained: Option<SystemTime>) -> fmt::Result {
    gauges(
        encoder,
        "vxmon_device_attached",
        "1 for each watched device: its role, and how the program is attached",
        readings
            .attached
            .iter()
            .map(|(device, role, hook)| (vec![("device", &**device), ("role", *role), ("hook", *hook)], 1.0)),
    )?;
    let drained = drained.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    gauges(
        encoder,
        "vxmon_events_drained_timestamp_seconds",
        "When all events that there were had last been handled, Unix time",
        drained.map(|time| (Vec::new(), time.as_secs_f64())).into_iter(),
    )?;
    if let Some(readers) = readings.readers {
        gauges(
            encoder,
            "vxmon_socket_readers",
            "Readers of the live log",
            std::iter::once((Vec::new(), readers.connected as f64)),
        )?;
        counters(
            encoder,
            "vxmon_socket_refused_readers",
            "Readers of the live log turned away, there being too many",
            std::iter::once((Vec::new(), readers.refused)),
        )?;
    }
    let version =
        [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("VXMON_COMMIT")), ("ebpf", env!("VXMON_EBPF_ID"))];
    gauges(
        encoder,
        "vxmon_build_info",
        "1; version, commit, and what identifies the eBPF objects",
        std::iter::once((version.to_vec(), 1.0)),
    )
}

fn node(encoder: &mut DescriptorEncoder, readings: &Readings) -> fmt::Result {
    gauges(
        encoder,
        "vxmon_offload_enabled",
        "Whether a VXLAN device's checksum offload is on, without which NAT breaks no checksum",
        readings.offload.iter().map(|(device, on)| {
            (vec![("device", &**device), ("feature", crate::devices::offload::FEATURE)], f64::from(u8::from(*on)))
        }),
    )?;
    counters(
        encoder,
        "vxmon_offload_changes",
        "How often a VXLAN device's checksum offload was switched, or was on in a device made anew",
        std::iter::once((Vec::new(), readings.offload_changes)),
    )?;
    counters(
        encoder,
        "vxmon_node_udp_in_csum_errors",
        "UDP packets that this node received and dropped for a wrong checksum (UdpInCsumErrors): another node's fault",
        readings.checksum_errors.iter().map(|(family, n)| (vec![("family", *family)], *n)),
    )
}

fn programs(encoder: &mut DescriptorEncoder, readings: &Readings) -> fmt::Result {
    if readings.programs.is_empty() {
        return Ok(());
    }
    let labels = |name: &'_ str| -> Vec<(&'static str, String)> { vec![("program", name.to_owned())] };
    {
        let help = "Time spent in the eBPF programs; counted while kernel.bpf_stats_enabled is 1";
        let mut family =
            encoder.encode_descriptor("vxmon_bpf_run_time", help, Some(&Unit::Seconds), MetricType::Counter)?;
        for (name, time, _) in &readings.programs {
            ConstCounter::new(time.as_secs_f64()).encode(family.encode_family(&labels(name))?)?;
        }
    }
    counters(
        encoder,
        "vxmon_bpf_runs",
        "Runs of the eBPF programs; counted while kernel.bpf_stats_enabled is 1",
        readings.programs.iter().map(|(name, _, runs)| (vec![("program", &**name)], *runs)),
    )
}

fn process(encoder: &mut DescriptorEncoder, readings: &Readings) -> fmt::Result {
    let Process { resident, cpu, descriptors } = readings.process;
    {
        let help = "CPU time in user and kernel mode";
        let mut metric = encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, f64>(&cpu.as_secs_f64(), None)?;
    }
    for (name, help, value) in [
        ("process_resident_memory_bytes", "Resident memory", resident),
        ("process_open_fds", "Open file descriptors", descriptors),
    ] {
        gauges(encoder, name, help, std::iter::once((Vec::new(), value as f64)))?;
    }
    Ok(())
}

/// A family of counters; the encoder adds `_total`. A family of which nothing is known is left out.
fn counters<'page>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Vec<Label<'page>>, u64)>,
) -> fmt::Result {
    family(encoder, name, help, MetricType::Counter, values.map(|(labels, n)| (labels, ConstCounter::new(n))))
}

/// A family of gauges.
fn gauges<'page>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Vec<Label<'page>>, f64)>,
) -> fmt::Result {
    family(encoder, name, help, MetricType::Gauge, values.map(|(labels, n)| (labels, ConstGauge::new(n))))
}

fn family<'page, M: EncodeMetric>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    kind: MetricType,
    values: impl Iterator<Item = (Vec<Label<'page>>, M)>,
) -> fmt::Result {
    let mut values = values.peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut family: MetricEncoder = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, metric) in values {
        if labels.is_empty() {
            return metric.encode(family);
        }
        metric.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(valid: u64) -> Readings {
        let packets = Packets { verdicts: [("valid", valid), ("bad-outer", 2)].into(), ..Packets::default() };
        Readings {
            packets: [(("a\"b\\c".to_owned(), "uplink"), packets)].into(),
            attached: vec![("eth0".to_owned(), "uplink", "tcx")],
            programs: vec![("vxmon_uplink".to_owned(), Duration::from_millis(1500), 7)],
            ..Readings::default()
        }
    }

    #[test]
    fn both_forms_say_the_same() {
        let board = Board::default();
        board.show(readings(5), true);
        let (open, text) = (board.expose(Exposition::OpenMetrics), board.expose(Exposition::Text));
        assert!(open.ends_with("# EOF\n") && !text.contains("# EOF"));
        assert!(
            open.contains("# TYPE vxmon_packets counter\n") && text.contains("# TYPE vxmon_packets_total counter\n")
        );
        let samples =
            |page: &str| page.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(samples(&open), samples(&text));
        assert!(
            text.contains("vxmon_packets_total{device=\"a\\\"b\\\\c\",role=\"uplink\",verdict=\"valid\"} 5\n"),
            "{text}"
        );
        assert!(text.contains("vxmon_bpf_run_time_seconds_total{program=\"vxmon_uplink\"} 1.5\n"), "{text}");
    }

    #[test]
    fn a_counter_never_falls() {
        let board = Board::default();
        board.show(readings(5), true);
        board.show(readings(4), true);
        assert!(board.expose(Exposition::Text).contains("verdict=\"valid\"} 5\n"));
        board.show(readings(6), true);
        assert!(board.expose(Exposition::Text).contains("verdict=\"valid\"} 6\n"));
    }

    #[test]
    fn ready_only_where_something_is_watched_and_handled() {
        let board = Board::default();
        assert!(board.healthy().is_err() && board.ready().is_err());
        board.show(Readings::default(), true);
        assert!(board.healthy().is_ok());
        assert!(board.ready().is_err_and(|why| why.contains("no device")));
        let board = Board::default();
        board.show(readings(1), false);
        assert!(board.ready().is_err_and(|why| why.contains("events")));
        board.show(readings(1), true);
        assert!(board.ready().is_ok());
    }

    #[test]
    fn the_form_is_the_one_asked_for() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain";
        assert_eq!(Exposition::accepted([prometheus].into_iter()), Exposition::OpenMetrics);
        assert_eq!(Exposition::accepted(["*/*"].into_iter()), Exposition::Text);
        assert_eq!(Exposition::accepted(std::iter::empty()), Exposition::Text);
    }
}
