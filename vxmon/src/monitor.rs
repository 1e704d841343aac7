//! The daemon's loop: devices come and go, events arrive, counters add up, and at the end comes the summary.
//!
//! One thread does all of it but the writing ([`crate::sink::writer`]). Events wait in what carries them
//! ([`crate::source::events`]), which is the only queue before the output's. Nothing here knows how packets are judged.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::MissedTickBehavior,
};

use crate::{
    account::{self, Account, Accounts},
    attribute::{Attributor, ConntrackSource, Decoded, Observer, Pending, story},
    clock::{monotonic, now, wall_clock},
    devices::{Plan, Selection, Snapshot, Watch, offload::Offloads, plan},
    event::{
        Anomalies, Attached, Connections, Detached, DeviceSummary, Line, Lost, LostByStage, Offload, Packet, Packets,
        Record, Summary,
    },
    held::Held,
    netlink::{
        monitor::{Changes, Monitor, Pace},
        socket::{Protocol, Socket},
    },
    release::release,
    rules::Rules,
    sandbox::{self, Capability},
    sink::{
        Explain, Format, Paint, Printer,
        live::{Listeners, Live},
        metrics::Readings,
        pcapng::Pcapng,
        writer::{Broken, Writer},
    },
    source::{
        engine::{Engine, EngineError},
        events::Events,
        nat_probe::{NatProbe, NatProbeError},
        start::{self, Choice, Kind, Started},
    },
    telemetry::Telemetry,
};

/// What `attach` was asked to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which devices.
    pub selection: Selection,
    /// More UDP ports of tunnel packets, host byte order.
    pub ports: Vec<u16>,
    /// Name of this node in events; else its host name.
    pub node: Option<String>,
    /// How to write events.
    pub format: Format,
    /// When to explain, in text.
    pub explain: Explain,
    /// Whether to colour text.
    pub paint: Paint,
    /// When to end.
    pub duration: Option<Duration>,
    /// After how many reported anomalies to end.
    pub count: Option<u64>,
    /// How to watch.
    pub engine: Choice,
    /// Where conntrack entries come from.
    pub conntrack: ConntrackSource,
    /// Whether to watch NAT being set up.
    pub nat_probe: bool,
}

/// UDP ports of VXLAN: IANA's, and Linux's own from before there was one, which flannel uses.
pub const WELL_KNOWN_PORTS: [u16; 2] = [4789, 8472];
/// How often losses are looked for.
const TICK: Duration = Duration::from_secs(1);
/// Events handled before anything else gets its turn.
const BATCH: usize = 256;
/// How long a slow reader of the output is waited for at the end.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest wait before it is tried again.
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// When a device is tried again that could not be attached to.
const RETRY: Duration = Duration::from_millis(250);

/// Where events go. What is a file is open already.
pub struct Outputs {
    /// Lines.
    pub lines: Box<dyn Write + Send>,
    /// The packets of anomalies.
    pub capture: Option<Box<dyn Write + Send>>,
    /// The live log, and the metrics.
    pub listeners: Listeners,
}

/// Watches until told to end; how many anomalies were seen.
pub async fn run(settings: Settings, outputs: Outputs, say: &dyn Fn(&str)) -> Result<u64> {
    // Before anything is attached: a signal's default action would leave it behind.
    let ends = Ends::listen()?;
    let mut daemon = Daemon::start(settings, outputs, say)?;
    // Not before: reading ten thousand rules would hold up the loading of the programs on a busy machine. Nor after: then
    // there could be an anomaly before it.
    daemon.attributor.begin();
    daemon.follow(None)?;
    daemon.keep_what_is_needed()?;
    daemon.measure()?;
    daemon.first_words();
    daemon.watch(ends).await?;
    daemon.finish()
}

/// The signals that ask it to end.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Ends {
    /// Catches them from now on.
    fn listen() -> Result<Self> {
        let catch = |kind, name: &str| signal(kind).with_context(|| format!("cannot handle {name}"));
        Ok(Self {
            interrupt: catch(SignalKind::interrupt(), "SIGINT")?,
            terminate: catch(SignalKind::terminate(), "SIGTERM")?,
            hangup: catch(SignalKind::hangup(), "SIGHUP")?,
        })
    }
}

struct Daemon<'a> {
    settings: Settings,
    say: &'a dyn Fn(&str),
    node: String,
    engine: Box<dyn Engine>,
    /// Or why there is none.
    nat_probe: Result<NatProbe, String>,
    /// Why the engine is not the one that was preferred.
    fallback: Option<String>,
    events: Option<Events>,
    monitor: Monitor,
    route: Socket,
    attributor: Attributor,
    held: Held,
    printer: Printer,
    writer: Option<Writer>,
    broken: Broken,
    capture: Option<Pcapng>,
    capture_broken: Option<Broken>,
    live: Live,
    telemetry: Telemetry,
    offloads: Offloads,
    accounts: Accounts,
    reported: u64,
    lost_queue: u64,
    /// Events lost on their way to the daemon, as what carries them says.
    lost_events: u64,
    /// Ends of stories that could not be written.
    untold: u64,
    told_lost: LostByStage,
    /// Devices that could not be attached to, so that each is complained of once.
    failed: BTreeMap<String, String>,
    retry_at: Option<tokio::time::Instant>,
    retry_after: Duration,
    /// Who read the output has closed it.
    reader_gone: bool,
    told_notes: Vec<String>,
    waiting: bool,
    started: Instant,
}

impl<'a> Daemon<'a> {
    fn start(settings: Settings, outputs: Outputs, say: &'a dyn Fn(&str)) -> Result<Self> {
        let Outputs { lines, capture, listeners } = outputs;
        // Before the first look at the devices, so that nothing slips through between.
        let monitor = Monitor::open(Pace::default())?;
        let route = Socket::open(Protocol::Route)?;
        // Before privileges are given up.
        let rules = Rules::start().context("cannot start the thread that reads the NAT rules")?;
        let Started { mut engine, fallback } = start::start(&settings.engine, say)?;
        let events = engine.events()?;
        let (nat_probe, observer) = observe(settings.nat_probe);
        // Before any thread is started, which would keep it all; and before any device is attached to, so that none of
        // what comes later can need more.
        let sockets = listeners.socket.as_ref().and_then(|socket| socket.path().parent());
        let mut keeps = keeps(&*engine, &nat_probe);
        if settings.engine.kind == Kind::Auto {
            // For packet sockets, should the programs load and yet not attach; gone once something is watched.
            keeps.push(Capability::CAP_NET_RAW);
        }
        let given_up = sandbox::enter(&keeps, sockets)?;
        log::info!("{given_up}");
        let (writer, broken) = Writer::start(lines).context("cannot start the output thread")?;
        let capture = capture.map(Pcapng::start).transpose().context("cannot start the thread of the capture")?;
        let (capture, capture_broken) = capture.unzip();
        let host = || nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let node = settings.node.clone().unwrap_or_else(host);
        let live = Live::start(listeners, &node).context("cannot start the thread of the socket and the metrics")?;
        let attributor = Attributor::new(node.clone(), settings.conntrack).with_rules(rules).with_observer(observer);
        Ok(Self {
            live,
            telemetry: Telemetry::default(),
            offloads: Offloads::default(),
            held: Held::new(attributor.news()),
            attributor,
            printer: Printer::new(settings.format, settings.explain, settings.paint, release().unwrap_or_default()),
            settings,
            say,
            node,
            engine,
            nat_probe,
            fallback,
            events: Some(events),
            monitor,
            route,
            writer: Some(writer),
            broken,
            capture,
            capture_broken,
            accounts: Accounts::default(),
            reported: 0,
            lost_queue: 0,
            lost_events: 0,
            untold: 0,
            told_lost: LostByStage::default(),
            failed: BTreeMap::new(),
            retry_at: None,
            retry_after: RETRY,
            reader_gone: false,
            told_notes: Vec::new(),
            waiting: false,
            started: Instant::now(),
        })
    }

    /// Looks at the namespace's devices, and attaches to and detaches from them as needed.
    fn follow(&mut self, changes: Option<&Changes>) -> Result<()> {
        // What waits is about devices as they are now.
        self.release(true);
        let first = changes.is_none();
        self.retry_at = None;
        let snapshot = match Snapshot::take_from(&mut self.route) {
            Ok(snapshot) => snapshot,
            Err(error) if first => return Err(error.into()),
            Err(error) => {
                (self.say)(&format!("vxmon: {error}; what is watched stays as it is"));
                return Ok(());
            }
        };
        let plan = plan(&snapshot, &self.settings.selection);
        if first && !plan.missing.is_empty() {
            let names: Vec<&str> = snapshot.links.iter().map(|link| link.name.as_str()).collect();
            bail!(
                "no device named {} in this network namespace; there {}: {}",
                plan.missing.join(", "),
                if names.len() == 1 { "is" } else { "are" },
                names.join(", ")
            );
        }
        self.detach_gone(&plan, changes)?;
        self.set_ports(&plan)?;
        self.attributor.set_vxlans(&plan.vxlans);
        // Upper devices first: what passes a lower one meanwhile is then counted once, not twice.
        let mut wanted: Vec<&Watch> = plan.watches.iter().collect();
        wanted.sort_by_key(|watch| watch.above.len());
        for watch in wanted {
            match self.engine.device(watch.ifindex) {
                Some(known) if known == watch => {}
                Some(_) => self.engine.update(watch)?,
                None => self.attach(watch, first)?,
            }
        }
        let none = BTreeSet::new();
        for change in self.offloads.look(&plan.vxlans, changes.map_or(&none, |changes| &changes.removed)) {
            self.write(Record::Offload(Offload { ts: now(), node: self.node.clone(), ..change }));
        }
        self.retry_after = if self.failed.is_empty() { RETRY } else { (self.retry_after * 2).min(LONGEST_RETRY) };
        // A device the user named must be watched; one that was found may have vanished again.
        let must = matches!(self.settings.selection, Selection::Named(_));
        if first && !self.failed.is_empty() && (must || self.engine.watched().is_empty()) {
            let why = self.failed.values().cloned().collect::<Vec<_>>().join("; ");
            if self.settings.engine.kind != Kind::Auto || self.fallback.is_some() {
                bail!("{why}");
            }
            self.fall_back(why)?;
            return self.follow(changes);
        }
        for note in &plan.notes {
            if !self.told_notes.contains(note) {
                (self.say)(&format!("vxmon: {note}"));
            }
        }
        self.told_notes = plan.notes.clone();
        let nothing = plan.vxlans.is_empty() && self.settings.selection == Selection::Auto;
        if nothing && !self.waiting {
            (self.say)(&format!(
                "vxmon: no VXLAN device in this network namespace (looked at {}); waiting for one, Ctrl-C ends",
                plan.looked_at
            ));
        }
        self.waiting = nothing;
        Ok(())
    }

    /// Gives up what was kept in case that another engine is needed.
    fn keep_what_is_needed(&self) -> Result<()> {
        sandbox::keep_only(&keeps(&*self.engine, &self.nat_probe))?;
        Ok(())
    }

    /// Goes over to packet sockets, before anything is watched.
    fn fall_back(&mut self, why: String) -> Result<()> {
        self.detach_all()?;
        self.failed.clear();
        let Started { mut engine, fallback } = start::instead(&self.settings.engine, why, self.say)?;
        self.events = Some(engine.events()?);
        (self.engine, self.fallback) = (engine, fallback);
        Ok(())
    }

    fn set_ports(&mut self, plan: &Plan) -> Result<(), EngineError> {
        let mut ports = plan.ports.clone();
        for port in WELL_KNOWN_PORTS.iter().chain(&self.settings.ports) {
            ports.entry(*port).or_insert(false);
        }
        if let Ok(probe) = &mut self.nat_probe
            && let Err(error) = probe.set_ports(&ports)
        {
            log::error!("{error}"); // evidence alone is lost by it
        }
        self.engine.set_ports(&ports)
    }

    fn detach_gone(&mut self, plan: &Plan, changes: Option<&Changes>) -> Result<()> {
        let watched: Vec<Watch> = self.engine.watched().into_iter().cloned().collect();
        for watch in watched {
            let removed = changes.is_some_and(|changes| changes.removed.contains(&watch.ifindex));
            let wanted = plan.watches.iter().find(|wanted| wanted.ifindex == watch.ifindex);
            let why = match wanted {
                _ if removed => "it was removed",
                None => "no VXLAN packets leave by it any more, or it is gone",
                Some(wanted) if wanted.role != watch.role || wanted.l2 != watch.l2 => "its kind changed",
                Some(_) => continue,
            };
            self.detach(&watch)?;
            self.write(Record::Detached(Detached {
                ts: now(),
                node: self.node.clone(),
                dev: watch.name.clone(),
                ifindex: watch.ifindex,
                why,
            }));
        }
        let engine = &self.engine;
        self.accounts.close_gone(|ifindex| engine.device(ifindex).is_some());
        Ok(())
    }

    /// Attaches again where somebody else removed the filter.
    fn heal(&mut self) -> Result<()> {
        for watch in self.engine.unhooked() {
            self.detach(&watch)?;
            self.write(Record::Detached(Detached {
                ts: now(),
                node: self.node.clone(),
                dev: watch.name.clone(),
                ifindex: watch.ifindex,
                why: "somebody removed the filter",
            }));
            self.attach(&watch, false)?;
        }
        Ok(())
    }

    fn detach(&mut self, watch: &Watch) -> Result<(), EngineError> {
        let counters = self.engine.detach(watch.ifindex)?;
        self.account(watch.ifindex).counters.add(&counters);
        Ok(())
    }

    fn account(&mut self, ifindex: u32) -> &mut Account {
        self.accounts.of(ifindex, self.engine.device(ifindex))
    }

    fn attach(&mut self, watch: &Watch, first: bool) -> Result<()> {
        let hook = match self.engine.attach(watch) {
            Ok(hook) => hook,
            Err(error) => {
                let text = error.to_string();
                if self.failed.get(&watch.name) != Some(&text) {
                    if !first {
                        (self.say)(&format!("vxmon: {text}"));
                    }
                    self.failed.insert(watch.name.clone(), text);
                }
                self.retry_at = Some(tokio::time::Instant::now() + self.retry_after);
                return Ok(());
            }
        };
        self.failed.remove(&watch.name);
        let account = self.account(watch.ifindex);
        account.dev.clone_from(&watch.name);
        account.role = watch.role.as_str();
        self.write(Record::Attached(Attached {
            ts: now(),
            node: self.node.clone(),
            dev: watch.name.clone(),
            ifindex: watch.ifindex,
            role: watch.role.as_str(),
            why: watch.why.clone(),
            hook,
            metadata: self.engine.metadata(),
            transport: self.engine.transport(),
            fallback: self.fallback.clone(),
            nat_probe: self.nat_probe.as_ref().ok().map(|_| "kprobe"),
            missing: self.nat_probe.as_ref().err().map(|why| ("nat_probe", why.clone())).into_iter().collect(),
        }));
        Ok(())
    }

    fn first_words(&self) {
        let names: Vec<&str> = self.engine.watched().into_iter().map(|watch| watch.name.as_str()).collect();
        if !names.is_empty() {
            (self.say)(&format!("vxmon: watching {}; Ctrl-C ends", names.join(", ")));
        }
    }

    /// Until told to end.
    async fn watch(&mut self, mut ends: Ends) -> Result<()> {
        let until = self.settings.duration.map(|duration| tokio::time::Instant::from_std(self.started) + duration);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Some(mut events) = self.events.take() else {
            bail!("the events are being read already");
        };
        loop {
            tokio::select! {
                _ = ends.interrupt.recv() => break,
                _ = ends.terminate.recv() => break,
                _ = ends.hangup.recv() => break,
                () = at(until) => break,
                error = &mut self.broken => match error {
                    // Who reads the output has seen enough.
                    Ok(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                        self.reader_gone = true;
                        break;
                    }
                    Ok(error) => return Err(error).context("cannot write the output"),
                    Err(_) => break,
                },
                error = cannot_write(&mut self.capture_broken) => return Err(error).context("cannot write the capture"),
                waited = events.wait() => {
                    waited.context("cannot wait for events")?;
                    let (drained, enough) = self.drain(&mut events)?;
                    self.telemetry.behind = !drained;
                    if enough {
                        break;
                    }
                }
                changes = self.monitor.changed() => {
                    let changes = changes?;
                    self.follow(Some(&changes))?;
                }
                () = at(self.retry_at) => self.follow(Some(&Changes::default()))?,
                () = self.held.wait() => {
                    self.release(false);
                    if self.enough() {
                        break;
                    }
                }
                _ = tick.tick() => {
                    self.heal()?;
                    self.end_stories()?;
                    self.tell_lost()?;
                    self.measure()?;
                }
            }
        }
        self.detach_all()?;
        // What the kernel program sent before it was told to stop is still reported.
        if !self.enough() {
            while !self.drain(&mut events)?.0 {}
        }
        while !self.held.is_empty() {
            self.held.wait().await;
            self.release(false);
        }
        Ok(())
    }

    fn enough(&self) -> bool {
        self.settings.count.is_some_and(|count| self.reported + self.held.anomalies() >= count)
    }

    /// Handles waiting events; whether none is left, and whether that was enough.
    fn drain(&mut self, events: &mut Events) -> Result<(bool, bool), EngineError> {
        for _ in 0..BATCH {
            let next = events.take();
            self.lost_events = events.lost();
            match next {
                None => return Ok((true, false)),
                Some(Ok(decoded)) => self.take(&decoded)?,
                Some(Err(error)) => log::error!("from the kernel program: {error}"),
            }
            if self.enough() {
                return Ok((true, true));
            }
        }
        Ok((false, false))
    }

    fn take(&mut self, decoded: &Decoded) -> Result<(), EngineError> {
        if decoded.verdict.is_anomaly() {
            self.report(decoded);
        } else if let Some(ended) = self.attributor.follow_up(decoded) {
            self.tell_end(&ended);
        }
        self.engine.follow(&self.attributor.awaiting())
    }

    fn tell_end(&mut self, ended: &story::Ended) {
        let device = self.accounts.name(ended.ifindex).unwrap_or_default().to_owned();
        let record = self.attributor.ending(ended, &device, &wall_clock);
        self.write(record);
    }

    /// Ends the stories of which nothing more is expected.
    fn end_stories(&mut self) -> Result<(), EngineError> {
        for ended in monotonic().map(|now| self.attributor.expire(now)).unwrap_or_default() {
            self.tell_end(&ended);
        }
        self.engine.follow(&self.attributor.awaiting())
    }

    fn report(&mut self, decoded: &Decoded) {
        let ifindex = decoded.event.ifindex;
        let device = self.account(ifindex).dev.clone();
        let mut attributed = self.attributor.attribute(decoded, &device, wall_clock(decoded.event.time_ns));
        if self.capture.is_some() {
            attributed.anomaly.packet = Packet::from(&decoded.event);
        }
        if attributed.verdict != attributed.counted {
            let packets = attributed.anomaly.suppressed.saturating_add(1);
            self.account(ifindex).rename(attributed.counted, attributed.verdict, packets);
        }
        self.write_or_hold(Record::Anomaly(Box::new(attributed.anomaly)), attributed.pending);
    }

    fn write(&mut self, record: Record) {
        self.write_or_hold(record, None);
    }

    /// Writes a line, as soon as it and those ahead of it need not wait any longer.
    fn write_or_hold(&mut self, record: Record, pending: Option<Box<Pending>>) {
        if self.held.is_empty() && pending.is_none() {
            self.put(record);
        } else {
            self.held.push(record, pending);
            self.release(false);
        }
    }

    /// Writes the lines whose time has come, or all.
    fn release(&mut self, all: bool) {
        while let Some(record) = self.held.next(all, |anomaly, pending| self.attributor.settle(anomaly, pending)) {
            self.put(record);
        }
    }

    /// Writes a line, and counts it.
    fn put(&mut self, record: Record) {
        self.telemetry.note(&record);
        let line = Arc::new(Line::from(record));
        self.live.publish(&line);
        let text = self.printer.render(&line);
        let is_written = self.writer.as_mut().is_some_and(|writer| writer.line(text));
        if let Some(capture) = &mut self.capture {
            capture.add(&line.record);
        }
        match &line.record {
            Record::Anomaly(anomaly) if is_written => {
                self.account(anomaly.ifindex).reported += 1;
                self.reported += 1;
            }
            Record::Anomaly(_) => self.lost_queue += 1,
            Record::Recovered(_) | Record::NotRecovered(_) => self.untold += u64::from(!is_written),
            Record::Lost(Lost { ring, queue, capture, .. }) if is_written => {
                self.told_lost.ring += ring;
                self.told_lost.queue += queue;
                self.told_lost.capture += capture;
            }
            Record::Lost(_)
            | Record::Attached(_)
            | Record::Detached(_)
            | Record::Offload(_)
            | Record::Missed(_)
            | Record::Summary(_) => {}
        }
    }

    fn lost(&self) -> Result<LostByStage, EngineError> {
        let mut lost = LostByStage { queue: self.lost_queue, ..self.accounts.lost() };
        for watch in self.engine.watched() {
            let counters = self.engine.counters(watch.ifindex)?;
            lost.ring += counters.lost_ring;
            lost.capture += counters.lost_capture;
        }
        // One or the other: the program is not told of a full perf buffer before 5.1 (and then counts the event as sent; in the
        // summary it is one that was sent and not reported, by `queue`).
        lost.ring = lost.ring.max(self.lost_events);
        Ok(lost)
    }

    fn tell_lost(&mut self) -> Result<()> {
        self.engine.flush_log();
        let all = self.lost()?;
        let LostByStage { ring, queue, capture } = all;
        let told = &self.told_lost;
        if all != *told {
            let lost = Lost {
                ts: now(),
                node: self.node.clone(),
                ring: ring - told.ring,
                queue: queue - told.queue,
                capture: capture - told.capture,
            };
            self.write(Record::Lost(lost));
        }
        Ok(())
    }

    /// Shows the metrics as they are now.
    fn measure(&mut self) -> Result<(), EngineError> {
        let Some(board) = self.live.board() else {
            return Ok(());
        };
        let mut running = BTreeMap::new();
        for watch in self.engine.watched() {
            running.insert(watch.ifindex, self.engine.counters(watch.ifindex)?);
        }
        let readings = Readings {
            packets: self.accounts.by_name(|ifindex| running.get(&ifindex).copied().unwrap_or_default()),
            lost: self.lost()?,
            offload: self.offloads.current().map(|(name, on)| (name.to_owned(), on)).collect(),
            programs: self.run_stats(),
            readers: self.live.readers(),
            ..self.telemetry.readings()
        };
        board.show(readings, !self.telemetry.behind);
        Ok(())
    }

    fn run_stats(&self) -> Vec<(String, Duration, u64)> {
        let probes = self.nat_probe.iter().flat_map(NatProbe::run_stats);
        self.engine.run_stats().into_iter().chain(probes).collect()
    }

    fn detach_all(&mut self) -> Result<(), EngineError> {
        let watched: Vec<Watch> = self.engine.watched().into_iter().cloned().collect();
        for watch in watched {
            self.detach(&watch)?;
        }
        Ok(())
    }

    fn connections(&self) -> Connections {
        let (story::Tally { opened, recovered, not_recovered, evicted }, open) = self.attributor.stories();
        Connections { bad: opened, recovered, not_recovered, open, evicted, untold: self.untold }
    }

    /// Writes the summary.
    fn finish(mut self) -> Result<u64> {
        self.tell_lost()?;
        let mut total = Packets::default();
        let mut anomalies = 0;
        let devices = self.accounts.devices();
        for DeviceSummary { packets, .. } in &devices {
            let Anomalies { reported, suppressed } = packets.anomalies;
            anomalies += reported + suppressed + packets.lost.ring + packets.lost.queue;
            account::add(&mut total, packets);
        }
        let summary = Summary {
            ts: now(),
            node: self.node.clone(),
            packets: total,
            devices,
            connections: self.connections(),
            seconds: (self.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
        };
        let line = Arc::new(Line::from(Record::Summary(summary)));
        self.live.publish(&line);
        let line = self.printer.render(&line);
        let written = self.writer.take().is_some_and(|writer| writer.finish(Some(line), PATIENCE));
        self.live.finish();
        let (lost, captured) =
            self.capture.take().map_or((0, true), |capture| (capture.lost(), capture.finish(PATIENCE)));
        if lost > 0 {
            (self.say)(&format!("vxmon: {lost} packets are not in the capture: it was not written fast enough"));
        }
        if !written && !self.reader_gone {
            bail!("the last lines, the summary among them, could not be written: the output is full or is not read");
        }
        if !captured {
            bail!("the last packets could not be written to the capture: it is full or is not read");
        }
        Ok(anomalies)
    }
}

/// Starts to see NAT being set up, or why that cannot be; and who tells what was seen.
fn observe(wanted: bool) -> (Result<NatProbe, String>, Option<Box<dyn Observer>>) {
    match if wanted { NatProbe::start() } else { Err(NatProbeError::Off) } {
        Ok((probe, seen)) => (Ok(probe), Some(Box::new(seen))),
        Err(error) => {
            log::info!("NAT is not seen as it is set up, so evidence comes from the rules: {error}");
            (Err(error.to_string()), None)
        }
    }
}

/// The capabilities without which what watches now cannot go on.
fn keeps(engine: &dyn Engine, nat_probe: &Result<NatProbe, String>) -> Vec<Capability> {
    let mut keeps = engine.keeps();
    keeps.extend(nat_probe.iter().flat_map(|_| NatProbe::keeps()));
    keeps
}

/// Resolves when the output can no longer be written to; never, if there is none.
async fn cannot_write(broken: &mut Option<Broken>) -> std::io::Error {
    if let Some(receiver) = broken {
        if let Ok(error) = receiver.await {
            return error;
        }
        // It is not to be asked again.
        *broken = None;
    }
    std::future::pending().await
}

async fn at(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}
