//! The story from the field, end to end: a service behind IPVS hangs for 63 seconds, vxmon tells of each lost SYN, and each
//! of the remedies by itself cures it. `VXMON_TRANSCRIPT` names a file that the run is written to.
//!
//! Needs IPVS and ipset. With fault A where the kernel has it (then the VXLAN has no outer checksums), else with fault B.

use std::{
    fmt::Display,
    fs,
    io::Write,
    iter,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Capture, Family, Lab, LabOptions, RuleForm, Vxmon,
    cleanup::note,
    counters::{conntrack_vxlan, udp_csum_errors},
    ipvs,
    lab::{UDP_PORT, ethtool, service},
    pace, skip,
    traffic::{self, HttpServer, UdpClient, UdpServer},
    vxmon::{Finished, anomalies, by_packet_socket, seconds_between},
};

/// Long enough to see that no answer comes.
const A_MOMENT: Duration = Duration::from_millis(900);

/// What is written down.
struct Transcript {
    start: Instant,
    file: Option<Mutex<fs::File>>,
}

impl Transcript {
    fn new() -> Result<Self> {
        let open = |path| fs::OpenOptions::new().create(true).append(true).open(path);
        let file = std::env::var_os("VXMON_TRANSCRIPT").map(open).transpose().context("cannot write the transcript")?;
        Ok(Self { start: Instant::now(), file: file.map(Mutex::new) })
    }

    fn say(&self, what: impl Display) {
        let line = format!("{:7.2} s  {what}\n", self.start.elapsed().as_secs_f64());
        note(line.trim_end());
        if let Some(file) = &self.file {
            let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
        }
    }

    fn heading(&self, what: &str) {
        self.say(format_args!("== {what}"));
    }
}

/// Two nodes with the service, old rules, and no rehash of retransmits: as kernels before 4.10 have it, of which RHEL 7's is one.
fn node(udpcsum: bool) -> Result<Lab> {
    let lab = LabOptions { udpcsum, txrehash: Some(false), ..LabOptions::default() }.build()?;
    Ok(lab)
}

/// Whether NAT mangles a checksum of 0 on this kernel.
fn has_fault_a() -> Result<bool> {
    let lab = node(false)?;
    ipvs::install(&lab, RuleForm::Before1179)?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let capture = Capture::vxlan(&lab)?;
    let _ = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?.ask(40, Duration::from_millis(200))?;
    Ok(capture.stop()?.iter().any(|packet| packet.bad))
}

/// Writes down what vxmon said; the rule and what comes next only of the first packet of a connection.
fn report(transcript: &Transcript, events: &[Value]) {
    for event in events {
        transcript.say(format_args!(
            "vxmon: {} {}:{} > {}:{} checksum {} | {} {} > {} {} | mark {} | conntrack {} became {} | proved: {}",
            text(&event["verdict"]),
            text(&event["outer"]["src"]),
            event["outer"]["sport"],
            text(&event["outer"]["dst"]),
            event["outer"]["dport"],
            text(&event["csum"]["seen"]),
            text(&event["inner"]["proto"]),
            text(&event["inner"]["src"]),
            text(&event["inner"]["dst"]),
            text(&event["inner"]["flags"]),
            event["mark"].as_str().unwrap_or("not told"),
            event["ct"]["orig"]["sport"],
            event["ct"]["reply"]["dport"],
            event["cause"]["proved"],
        ));
        if event["flow"]["attempt"] != 1 {
            continue;
        }
        let (nat, flow) = (&event["nat"], &event["flow"]);
        if let Some(rule) = nat["rule"].as_str() {
            transcript.say(format_args!(
                "vxmon: rule {rule} ({}), random-fully: {}, mark: {}",
                text(&nat["backend"]),
                text(&nat["random_fully"]),
                text(&nat["why"])
            ));
        }
        if let Some(expected) = flow["expected_recovery"].as_str() {
            let by = text(&flow["expected_by"]);
            let after = seconds_between(&event["ts"], &flow["expected_recovery"]).unwrap_or(f64::NAN);
            transcript.say(format_args!("vxmon: expected to get through after {after:.1} s, at {expected}, by {by}"));
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

/// Asks the service once, and tells what is seen meanwhile. Returns how long the connect took.
fn connect_and_watch(lab: &Lab, vxmon: &Vxmon, transcript: &Transcript) -> Result<Duration> {
    let limit = Duration::from_secs(150);
    thread::scope(|scope| {
        let client = scope.spawn(|| traffic::http_get(&lab.a, lab.service_socket(Family::V4), limit));
        let (mut told, mut states) = (0, Vec::new());
        while !client.is_finished() {
            let events = vxmon.events();
            if events.len() > told {
                report(transcript, &events[told..]);
                told = events.len();
                for line in ipvs::connections(lab)? {
                    transcript.say(format_args!("ipvsadm -lnc: {line}"));
                    states.push(line);
                }
            }
            thread::sleep(Duration::from_millis(100));
        }
        let time = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        ensure!(told == 0 || states.iter().any(|line| line.contains("SYN_RECV")), "no SYN_RECV: {states:#?}");
        Ok(time)
    })
}

/// A remedy by itself: the service answers at once, and vxmon has nothing to say.
fn cured(transcript: &Transcript, udpcsum: bool, remedy: &str, apply: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    transcript.heading(remedy);
    let lab = node(udpcsum)?;
    ipvs::install(&lab, RuleForm::Before1179)?;
    apply(&lab)?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    let time = traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(100))?;
    transcript.say(format_args!("TCP: connected after {:.3} s", time.as_secs_f64()));
    let answer = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?.ask(40, Duration::from_secs(2))?;
    transcript.say(format_args!("UDP: {}", if answer.is_some() { "answered" } else { "no answer" }));
    thread::sleep(Duration::from_millis(200));
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    let seen = finished.total("seen");
    transcript.say(format_args!("vxmon: {seen} packets checked, {} wrong", anomalies(&finished.summary["packets"])));
    ensure!(time < Duration::from_millis(900), "{remedy}: it still took {time:?}");
    ensure!(answer.is_some(), "{remedy}: no answer over UDP");
    ensure!(seen > 0 && finished.events.is_empty(), "{:#?}", finished.events);
    Ok(())
}

/// The rule is named, and the time at which the connection recovered was told when its first packet left.
fn foretold(finished: &Finished) -> Result<()> {
    let first = finished.events.first().context("no event")?;
    let rule = text(&first["nat"]["rule"]);
    ensure!(rule.contains("KUBE-POSTROUTING") && rule.contains("MASQUERADE"), "{first:#}");
    ensure!(first["flow"]["expected_by"] == "conntrack-timeout", "{first:#}");
    let recovered = finished.all.iter().find(|line| line["type"] == "recovered").context("not recovered")?;
    ensure!(recovered["by"] == "conntrack-timeout", "{recovered:#}");
    let off = seconds_between(&first["flow"]["expected_recovery"], &recovered["ts"])?;
    // Timers are late by up to an eighth.
    ensure!(off.abs() < 10.0, "{off} s from what was expected: {recovered:#}");
    Ok(())
}

#[test]
fn the_service_hangs_until_a_remedy() -> Result<()> {
    let test = "the_service_hangs_until_a_remedy";
    if !skip::root_or_skip(test) {
        return Ok(());
    }
    if let Some(why) = ipvs::missing(&node(true)?) {
        skip::skip(test, &why);
        return Ok(());
    }
    let udpcsum = !has_fault_a()?;
    let verdict = if udpcsum { "nat-stale-port" } else { "nat-mangled-zero" };
    let transcript = Transcript::new()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let device = if udpcsum { "udpcsum" } else { "noudpcsum" };
    transcript.say(format_args!("Linux {}, VXLAN device with {device}", release.trim()));

    let lab = node(udpcsum)?;
    ipvs::install(&lab, RuleForm::Before1179)?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    transcript.heading("the pod's own address");
    let direct = traffic::http_get(&lab.a, lab.pod_socket(Family::V4), Duration::from_secs(10))?;
    transcript.say(format_args!("connected after {:.3} s", direct.as_secs_f64()));

    transcript.heading("the service's address, TCP");
    let capture = Capture::vxlan(&lab)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    // The rules are read meanwhile, by a thread of its own.
    thread::sleep(pace::limit(Duration::from_millis(500)));
    let before = udp_csum_errors(&lab.b, Family::V4)?;
    let time = connect_and_watch(&lab, &vxmon, &transcript)?;
    transcript.say(format_args!("connected after {:.2} s", time.as_secs_f64()));
    for line in vxmon.wait_type("recovered", 1, Duration::from_secs(5)) {
        transcript.say(format_args!(
            "vxmon: recovered: {} after {:.1} s and {} bad SYNs, by {}",
            text(&line["outcome"]),
            line["after_ms"].as_f64().unwrap_or(f64::NAN) / 1e3,
            line["bad_syns"],
            text(&line["by"])
        ));
    }
    let dropped = udp_csum_errors(&lab.b, Family::V4)? - before;
    for entry in conntrack_vxlan(&lab.a, Family::V4, lab.options().port)? {
        transcript.say(format_args!("conntrack -L: sport={} became {}", entry.orig.sport, entry.reply.dport));
    }
    let bad = capture.stop()?.iter().filter(|packet| packet.bad).count() as u64;
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    let counted = finished.total(&format!("verdicts/{verdict}"));
    transcript.say(format_args!("tcpdump: {bad} bad packets; node b dropped {dropped}; vxmon: {counted} {verdict}"));
    ensure!(bad >= 6 && dropped == bad && counted == bad, "{}", finished.summary);
    ensure!(finished.events.iter().all(|event| event["cause"]["proved"] == true), "{:#?}", finished.events);
    // Retries are not marked: the inner connection is known by then, and the rules are not asked again.
    let (first, retry) = if by_packet_socket() { (Value::Null, Value::Null) } else { ("0x4000".into(), "0x0".into()) };
    let marks: Vec<&Value> = finished.events.iter().map(|event| &event["mark"]).collect();
    let wanted = iter::once(&first).chain(iter::repeat(&retry));
    ensure!(marks.iter().zip(wanted).all(|(mark, wanted)| *mark == wanted), "{marks:?}");
    // Without the mark it cannot be told which rule it was, nor whether a retry will meet it again.
    if !by_packet_socket() {
        foretold(&finished)?;
    }
    // Until the outer entry has expired: 30 s after the last SYN of those sent within 30 s of each other.
    ensure!(time > Duration::from_secs(55), "connected after {time:?}");

    transcript.heading("the service's address, UDP (as DNS): one question after the other, each from a new port");
    let vxmon = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
    for number in 1..=3 {
        let client = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?;
        let answer = client.ask(40, A_MOMENT)?;
        let service = service(Family::V4);
        transcript.say(format_args!(
            "question {number} to {service}:{UDP_PORT}: {}",
            if answer.is_some() { "answered".to_owned() } else { format!("no answer within {A_MOMENT:?}") }
        ));
        ensure!(answer.is_none(), "answered");
    }
    report(&transcript, &vxmon.wait_events(3, Duration::from_secs(2)));
    let finished = vxmon.stop()?;
    finished.adds_up()?;
    ensure!(finished.total(&format!("verdicts/{verdict}")) == 3, "{}", finished.summary);
    drop(lab);

    cured(&transcript, udpcsum, "remedy 1: tx-checksum-ip-generic off on the VXLAN device", |lab| {
        ethtool(&lab.a, &lab.options().vxlan, &["tx-checksum-ip-generic", "off"])
    })?;
    cured(&transcript, udpcsum, "remedy 2: kube-proxy's rules of 1.16.13, 1.17.9, 1.18.6 and later", |lab| {
        ipvs::rules(lab, RuleForm::Fixed)
    })?;
    if udpcsum {
        transcript.say("remedy 3, a fixed kernel: there is none for nat-stale-port");
    } else {
        transcript.say("remedy 3, a fixed kernel: see the same test on the others, where a checksum of 0 stays 0");
    }
    Ok(())
}

/// The third remedy: on a kernel without fault A, a VXLAN without outer checksums has no fault, whatever the rules.
#[test]
fn a_fixed_kernel_is_a_remedy() -> Result<()> {
    let test = "a_fixed_kernel_is_a_remedy";
    if !skip::root_or_skip(test) {
        return Ok(());
    }
    if let Some(why) = ipvs::missing(&node(true)?) {
        skip::skip(test, &why);
        return Ok(());
    }
    if has_fault_a()? {
        skip::skip(test, "this kernel has fault A");
        return Ok(());
    }
    let transcript = Transcript::new()?;
    cured(&transcript, false, "remedy 3: a kernel that leaves a checksum of 0 alone; old rules, noudpcsum", |_| Ok(()))
}
