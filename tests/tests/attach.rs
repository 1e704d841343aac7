//! `vxmon attach` as people run it: devices that come and go, its flags, its ends, and what it says to bad input.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use vxmon_tests::{
    Family, Lab, LabOptions, Netns, Rules, Scratch, Vxmon,
    lab::Side,
    skip,
    traffic::{self, HttpServer, OuterSum, UdpClient, UdpMode, UdpServer},
    vxmon::{self, anomalies, number},
};

use self::support::has_tcx;

const LIMIT: Duration = Duration::from_secs(5);
const A_MOMENT: Duration = Duration::from_millis(150);
const JSON: [&str; 2] = ["--format", "json"];
const UPLINK: &str = "uplink";
const VXLAN: &str = "flannel.1";

fn lab() -> Result<Lab> {
    LabOptions::default().build()
}

/// Sends a packet with a wrong sum and a flow of its own.
fn send_bad(lab: &Lab, sport: u16) -> Result<()> {
    let mut frame = lab.frame();
    (frame.sport, frame.sum) = (sport, OuterSum::Value(0x1234));
    traffic::send_raw(&lab.a, UPLINK, &frame.bytes())
}

fn ifindex(node: &Netns, dev: &str) -> Result<u64> {
    let text = node.run("ip", &["-j", "link", "show", "dev", dev])?;
    serde_json::from_str::<Value>(&text)?[0]["ifindex"].as_u64().context("no ifindex")
}

fn wait_for(limit: Duration, what: &str, done: impl Fn() -> bool) -> Result<Duration> {
    let start = Instant::now();
    while !done() {
        ensure!(start.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(start.elapsed())
}

/// Whether the last that was said of the device is that it is watched.
fn watched(vxmon: &Vxmon, dev: &str, ifindex: u64) -> bool {
    let said = |kind| {
        let lines = vxmon.wait_type(kind, 0, Duration::ZERO);
        lines.iter().filter(|line| line["dev"] == dev && line["ifindex"] == ifindex).count()
    };
    said("attached") > said("detached")
}

/// All lines are JSON of the schema, and the last is the summary.
fn well_formed(stdout: &[String]) -> Result<Vec<Value>> {
    let lines = stdout.iter().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")));
    let lines: Vec<Value> = lines.collect::<Result<_>>()?;
    for line in &lines {
        ensure!(line["schema"] == "vxmon.event/1" && line["type"].is_string(), "{line}");
        ensure!(line["ts"].as_str().is_some_and(|ts| ts.ends_with('Z')) && line["node"].is_string(), "{line}");
    }
    ensure!(lines.last().is_some_and(|last| last["type"] == "summary"), "the last line is no summary");
    Ok(lines)
}

#[test]
fn a_device_made_again_is_watched_again() -> Result<()> {
    if !skip::root_or_skip("a_device_made_again_is_watched_again") {
        return Ok(());
    }
    for hook in has_tcx().then_some("tcx").into_iter().chain(["clsact"]) {
        // As flanneld does it, at once; and with a gap in which vxmon notices that the device is gone.
        for gap in [false, true] {
            let lab = lab()?;
            lab.rules(&Rules::default())?;
            let _server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
            let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--hook", hook]].concat())?;
            let (old, uplink) = (ifindex(&lab.a, VXLAN)?, ifindex(&lab.a, UPLINK)?);
            ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "no fault");
            ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "the first is not reported");
            lab.delete_vxlan(Side::A)?;
            if gap {
                wait_for(LIMIT, "detached", || !watched(&vxmon, VXLAN, old) && !watched(&vxmon, UPLINK, uplink))?;
            }
            lab.create_vxlan(Side::A)?;
            let new = ifindex(&lab.a, VXLAN)?;
            let took =
                wait_for(LIMIT, "watched again", || watched(&vxmon, VXLAN, new) && watched(&vxmon, UPLINK, uplink))?;
            vxmon_tests::cleanup::note(&format!("{hook}, gap {gap}: watched again after {took:?}"));
            // From the end of `ip` on: the device was there a little before that.
            ensure!(took < Duration::from_secs(1), "{took:?}");
            ensure!(new == old || !watched(&vxmon, VXLAN, old), "the old one is still watched");
            ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "no fault");
            let events = vxmon.wait_events(2, LIMIT);
            ensure!(events.len() == 2 && events[1]["cause"]["proved"] == true, "{events:#?}");
            let finished = vxmon.stop()?;
            finished.adds_up().with_context(|| format!("{hook}, gap {gap}: {}", finished.summary))?;
            ensure!(finished.total("verdicts/nat-stale-port") == 2, "{}", finished.summary);
            well_formed(&finished.stdout)?;
        }
    }
    Ok(())
}

#[test]
fn waits_for_a_device() -> Result<()> {
    if !skip::root_or_skip("waits_for_a_device") {
        return Ok(());
    }
    let lab = lab()?;
    lab.delete_vxlan(Side::A)?;
    let vxmon = Vxmon::start(&lab.a, &JSON)?;
    wait_for(LIMIT, "a note", || vxmon.stderr().contains('\n'))?;
    let said = vxmon.stderr();
    for part in ["no VXLAN device", "uplink (veth)", "lo (loopback)", "cni0 (bridge)", "waiting"] {
        ensure!(said.contains(part), "no {part:?} in {said}");
    }
    ensure!(said.lines().count() == 1, "{said}");
    lab.create_vxlan(Side::A)?;
    let (vxlan, uplink) = (ifindex(&lab.a, VXLAN)?, ifindex(&lab.a, UPLINK)?);
    wait_for(LIMIT, "picked up", || watched(&vxmon, VXLAN, vxlan) && watched(&vxmon, UPLINK, uplink))?;
    send_bad(&lab, 20_000)?;
    ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "not reported");
    vxmon.stop()?.adds_up()
}

#[test]
fn ends_after_a_count() -> Result<()> {
    if !skip::root_or_skip("ends_after_a_count") {
        return Ok(());
    }
    let lab = lab()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--count", "2"]].concat())?;
    for sport in 20_000..20_005 {
        send_bad(&lab, sport)?;
    }
    let finished = vxmon.wait(LIMIT)?;
    finished.adds_up()?;
    ensure!(finished.events.len() == 2, "{:#?}", finished.events);
    Ok(())
}

#[test]
fn ends_after_a_time() -> Result<()> {
    if !skip::root_or_skip("ends_after_a_time") {
        return Ok(());
    }
    let lab = lab()?;
    let finished = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--duration", "1s"]].concat())?.wait(LIMIT)?;
    finished.adds_up()?;
    let seconds = finished.summary["seconds"].as_f64();
    ensure!(seconds.is_some_and(|seconds| (1.0..3.0).contains(&seconds)), "{}", finished.summary);
    Ok(())
}

#[test]
fn each_signal_ends_it_with_a_summary() -> Result<()> {
    if !skip::root_or_skip("each_signal_ends_it_with_a_summary") {
        return Ok(());
    }
    let lab = lab()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
        send_bad(&lab, 20_000)?;
        // Not waited for: what was sent before the signal is still reported.
        vxmon.signal(signal)?;
        let finished = vxmon.wait(LIMIT)?;
        finished.adds_up()?;
        ensure!(finished.events.len() == 1 && finished.total("anomalies/reported") == 1, "{signal}: {finished:#?}");
        well_formed(&finished.stdout)?;
    }
    Ok(())
}

#[test]
fn output_goes_to_a_file() -> Result<()> {
    if !skip::root_or_skip("output_goes_to_a_file") {
        return Ok(());
    }
    let (lab, file) = (lab()?, Scratch::new("output"));
    fs::write(&file.0, "old\n")?;
    let vxmon = Vxmon::attach(&lab.a, &[&JSON[..], &["--output", file.text()?]].concat())?;
    send_bad(&lab, 20_000)?;
    let written = || fs::read_to_string(&file.0).unwrap_or_default();
    // Written at once, not when the file is closed.
    wait_for(LIMIT, "in the file", || written().contains("bad-outer"))?;
    let finished = vxmon.stop()?;
    ensure!(finished.status.success() && finished.stdout.is_empty(), "{finished:#?}");
    let lines = well_formed(&written().lines().map(str::to_owned).collect::<Vec<_>>())?;
    ensure!(lines.iter().filter(|line| line["type"] == "anomaly").count() == 1, "{lines:#?}");
    Ok(())
}

#[test]
fn a_further_port_is_watched() -> Result<()> {
    if !skip::root_or_skip("a_further_port_is_watched") {
        return Ok(());
    }
    let lab = lab()?;
    for (args, wanted) in [(&[][..], 2), (&["--port", "5555", "--port", "5556"], 4)] {
        let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], args].concat())?;
        for dport in [8472, 4789, 5555, 5556, 5557] {
            let mut frame = lab.frame();
            (frame.dport, frame.sum) = (dport, OuterSum::Value(0x1234));
            traffic::send_raw(&lab.a, UPLINK, &frame.bytes())?;
        }
        let events = vxmon.wait_events(wanted, LIMIT).len();
        let finished = vxmon.stop()?;
        finished.adds_up()?;
        ensure!(events == wanted && finished.total("verdicts/bad-outer") == wanted as u64, "{}", finished.summary);
    }
    Ok(())
}

/// What sampling leaves out is counted. Without the VXLAN device's offload its frames come with full sums.
#[test]
fn sampled_packets_are_counted() -> Result<()> {
    if !skip::root_or_skip("sampled_packets_are_counted") {
        return Ok(());
    }
    let lab = LabOptions { vxlan_tx_offload: false, ..LabOptions::default() }.build()?;
    for (sample, most_verified) in [("1", 2000), ("1000000", 10)] {
        let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], &["--sample", sample]].concat())?;
        // It need not keep up: what was sent counts.
        let _server = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), false)?;
        let client = UdpClient::connect(&lab.a, lab.pod_udp(Family::V4))?;
        for _ in 0..1000 {
            client.send(1000, UdpMode::Plain)?;
        }
        let finished = vxmon.stop()?;
        finished.adds_up()?;
        let frames = &finished.device(VXLAN).context("no VXLAN device")?["packets"];
        let (seen, sampled) = (number(frames, "seen"), number(frames, "unverified/sampled"));
        ensure!(seen >= 1000 && anomalies(frames) == 0, "{frames}");
        ensure!(seen - sampled <= most_verified, "--sample {sample}: {frames}");
        ensure!((sampled == 0) == (sample == "1"), "--sample {sample}: {frames}");
    }
    Ok(())
}

#[test]
fn watches_another_namespace() -> Result<()> {
    if !skip::root_or_skip("watches_another_namespace") {
        return Ok(());
    }
    let (lab, elsewhere) = (lab()?, Netns::create("elsewhere")?);
    let path = lab.a.path().display().to_string();
    for args in [&[][..], &["--hook", "clsact"]] {
        let vxmon = Vxmon::attach_to(&elsewhere, 2, &[&JSON[..], &["--netns", &path], args].concat())?;
        send_bad(&lab, 20_000)?;
        ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "not reported");
        vxmon.stop()?.adds_up()?;
    }
    ensure!(!lab.a.run("tc", &["qdisc", "show"])?.contains("clsact"), "left there");
    Ok(())
}

#[test]
fn the_exit_code_tells_of_anomalies_if_asked() -> Result<()> {
    if !skip::root_or_skip("the_exit_code_tells_of_anomalies_if_asked") {
        return Ok(());
    }
    let lab = lab()?;
    for (args, bad, code) in
        [(&["--exit-code"][..], true, 1), (&["--exit-code"], false, 0), (&["--count", "9"], true, 0)]
    {
        let vxmon = Vxmon::attach_to(&lab.a, 2, &[&JSON[..], args].concat())?;
        if bad {
            send_bad(&lab, 20_000)?;
            ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "not reported");
        }
        let finished = vxmon.stop()?;
        ensure!(finished.status.code() == Some(code), "{args:?} {bad}: {}", finished.status);
    }
    Ok(())
}

#[test]
fn text_has_a_line_for_each_anomaly() -> Result<()> {
    if !skip::root_or_skip("text_has_a_line_for_each_anomaly") {
        return Ok(());
    }
    let lab = lab()?;
    lab.rules(&Rules::default())?;
    let vxmon = Vxmon::attach(&lab.a, &["--count", "3"])?;
    wait_for(LIMIT, "attached", || vxmon.stdout().iter().filter(|line| line.contains("watched as")).count() == 2)?;
    let server = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let answer = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?.ask(40, A_MOMENT)?;
    ensure!(answer.is_none(), "answered");
    drop(server);
    for sport in [20_000, 20_001] {
        send_bad(&lab, sport)?;
    }
    let finished = vxmon.wait(LIMIT)?;
    ensure!(finished.status.success(), "{finished:#?}");
    let of = |verdict: &str| -> Vec<&String> {
        finished.stdout.iter().filter(|line| line.contains(&format!("{UPLINK} {verdict} "))).collect()
    };
    let (proved, unknown) = (of("nat-stale-port"), of("bad-outer"));
    ensure!(proved.len() == 1 && unknown.len() == 2, "{:#?}", finished.stdout);
    for part in ["10.0.100.15:8472", "became 10.0.100.3:", "mark 0x4000", "proved", "10.244.2.73:53"] {
        ensure!(proved[0].contains(part), "no {part:?} in {}", proved[0]);
    }
    ensure!(unknown.iter().all(|line| line.contains("0x1234 instead of 0x")), "{unknown:#?}");
    ensure!(finished.stdout.iter().any(|line| line.contains("3 with a wrong checksum")), "{:#?}", finished.stdout);
    ensure!(!finished.stdout.iter().any(|line| line.contains('\u{1b}')), "colour without a terminal");
    Ok(())
}

/// As in `vxmon attach | head -1`.
#[test]
fn a_reader_that_leaves_ends_it_quietly() -> Result<()> {
    if !skip::root_or_skip("a_reader_that_leaves_ends_it_quietly") {
        return Ok(());
    }
    let lab = lab()?;
    for format in ["json", "text"] {
        let mut command = lab.a.command(vxmon::binary()?);
        command.args(["attach", "--format", format, "--duration", "5s"]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        ensure!(line.contains(UPLINK) || line.contains(VXLAN), "{line}");
        drop(stdout);
        let start = Instant::now();
        let mut sport = 20_000;
        while child.try_wait()?.is_none() {
            ensure!(start.elapsed() < Duration::from_secs(8), "does not end");
            send_bad(&lab, sport)?;
            sport += 1;
            thread::sleep(Duration::from_millis(20));
        }
        let ended = start.elapsed();
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(0), "{}: {said}", output.status);
        ensure!(ended < Duration::from_secs(3), "only the --duration ended it");
        ensure!(said.lines().all(|line| line.contains("watching")), "{said}");
    }
    Ok(())
}

/// Exit 2, nothing on stdout, and one line on stderr that has these parts.
fn refuses(what: &str, (status, stdout, stderr): (ExitStatus, usize, &str), parts: &[&str]) -> Result<()> {
    ensure!(status.code() == Some(2), "{what}: {status}: {stderr}");
    ensure!(stdout == 0, "{what}: something on stdout");
    ensure!(stderr.lines().count() == 1 && stderr.starts_with("vxmon: "), "{what}: not one line: {stderr}");
    for part in parts {
        ensure!(stderr.contains(part), "{what}: no {part:?} in {stderr}");
    }
    Ok(())
}

#[test]
fn bad_input_is_refused_in_one_line() -> Result<()> {
    if !skip::root_or_skip("bad_input_is_refused_in_one_line") {
        return Ok(());
    }
    let lab = lab()?;
    let cases: [(&[&str], &[&str]); 6] = [
        (&["eth7"], &["eth7", "uplink", "flannel.1", "lo", "cni0"]),
        (&["uplink", "eth7", "eth8"], &["eth7, eth8"]),
        (&["--netns", "/run/netns/not-there"], &["/run/netns/not-there", "No such file"]),
        (&["--netns", "/proc/self/status"], &["/proc/self/status", "network namespace"]),
        (&["--output", "/not-there/events.json"], &["/not-there/events.json", "No such file"]),
        (&["--output", "/proc"], &["/proc", "directory"]),
    ];
    for (args, parts) in cases {
        let finished = Vxmon::start(&lab.a, args)?.wait(LIMIT)?;
        refuses(&args.join(" "), (finished.status, finished.stdout.len(), &finished.stderr), parts)?;
    }
    Ok(())
}

/// A disk that fills up is an error, not a reader that has seen enough.
#[test]
fn an_output_that_fails_is_an_error() -> Result<()> {
    if !skip::root_or_skip("an_output_that_fails_is_an_error") {
        return Ok(());
    }
    let lab = lab()?;
    let finished = Vxmon::start(&lab.a, &["--output", "/dev/full"])?.wait(LIMIT)?;
    ensure!(finished.status.code() == Some(2), "{}: {}", finished.status, finished.stderr);
    ensure!(finished.stderr.contains("No space left"), "{}", finished.stderr);
    Ok(())
}

#[test]
fn missing_privilege_is_named() -> Result<()> {
    if !skip::root_or_skip("missing_privilege_is_named") {
        return Ok(());
    }
    let lab = lab()?;
    // Where anybody may run it.
    let copy = Scratch::new("binary");
    fs::copy(vxmon::binary()?, &copy.0)?;
    let cases: [(&[&str], &[&str]); 4] = [
        (&["--reuid=65534", "--regid=65534", "--clear-groups"], &["CAP_BPF", "CAP_NET_ADMIN", "root"]),
        (&["--bounding-set=-net_admin"], &["CAP_NET_ADMIN is missing"]),
        (&["--bounding-set=-bpf,-sys_admin"], &["CAP_BPF is missing"]),
        (&["--bounding-set=-perfmon,-sys_admin"], &["CAP_PERFMON is missing"]),
    ];
    for (drop, parts) in cases {
        let mut command: Command = lab.a.command("timeout");
        command.args(["10", "setpriv"]).args(drop).arg(&copy.0).args(["attach", "--engine", "tc"]);
        let output = command.stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.starts_with("setpriv: ") {
            bail!("{said}");
        }
        refuses(&drop.join(" "), (output.status, output.stdout.len(), &said), parts)?;
    }
    Ok(())
}

/// Which programs are used, and what they know of the skb, is what was asked for or what the kernel has; and `attached` says it.
#[test]
fn the_transport_is_told() -> Result<()> {
    if !skip::root_or_skip("the_transport_is_told") {
        return Ok(());
    }
    let lab = lab()?;
    let no_ring_buffer = "this kernel has no eBPF ring buffer";
    let cases: [(&[&str], &str, &str, Option<&str>); 4] = [
        (&["--transport", "auto"], "ringbuf", "skb", None),
        (&["--transport", "ringbuf"], "ringbuf", "skb", None),
        (&["--transport", "perf"], "perf", "none", None),
        (&["--transport", "auto", "--no-ring-buffer"], "perf", "none", Some(no_ring_buffer)),
    ];
    for (args, transport, metadata, fallback) in cases {
        let finished = Vxmon::attach_to(&lab.a, 2, &[&["--format", "json"], args].concat())?.stop()?;
        finished.adds_up()?;
        let attached: Vec<_> = finished.all.iter().filter(|line| line["type"] == "attached").collect();
        ensure!(attached.len() == 2, "{:#?}", finished.all);
        for line in attached {
            ensure!(line["transport"] == transport && line["metadata"] == metadata, "{args:?}: {line}");
            let told = line["fallback"].as_str();
            ensure!(told.is_some() == fallback.is_some(), "{args:?}: {line}");
            ensure!(fallback.is_none_or(|why| told.is_some_and(|told| told.contains(why))), "{args:?}: {line}");
        }
        ensure!(fallback.is_none_or(|why| finished.stderr.contains(why)), "{args:?}: {}", finished.stderr);
        // Not to those who asked for it by name.
        let blind = finished.stderr.contains("without the skb's metadata");
        ensure!(blind == fallback.is_some(), "{args:?}: {}", finished.stderr);
    }
    let args = ["--transport", "ringbuf", "--no-ring-buffer"];
    let finished = Vxmon::start(&lab.a, &args)?.wait(LIMIT)?;
    refuses("a ring buffer", (finished.status, finished.stdout.len(), &finished.stderr), &[no_ring_buffer])
}
