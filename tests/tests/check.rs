//! `vxmon check`: captures of the lab's own packets give what tcpdump and `attach` say of them; each format and link type is
//! read; what is no capture, or only the beginning of one, is one clear line.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proptest::prelude::*;
use serde_json::Value;
use vxmon::{
    check::{Check, Tally},
    sink::{Explain, Format, Paint, Printer},
    source::capture::CaptureError,
};
use vxmon_tests::{
    Backend, Captured, Family, Lab, LabOptions, RuleForm, Rules, Scratch, Vxmon,
    capture::{self, Recording},
    lab::Side,
    skip,
    traffic::{self, Frame, HttpServer, OuterSum},
    vxmon::binary,
};

#[path = "../../vxmon/tests/support/mod.rs"]
mod support;

const JSON: [&str; 2] = ["--format", "json"];
/// A time with microseconds: 2026-11-23T12:00:54.373945Z.
const TIME: (u32, u32) = (1_795_435_254, 373_945);

fn check(file: &Path, args: &[&str]) -> Result<Output> {
    Ok(Command::new(binary()?).arg("check").arg(file).args(args).output()?)
}

fn lines(output: &Output) -> Result<Vec<Value>> {
    let text = std::str::from_utf8(&output.stdout)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn of_type<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["type"] == kind).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What passes the uplink while `requests` connections to the service are made, in a file; and what `attach` says of it.
fn recorded(lab: &Lab, file: &Path, requests: usize) -> Result<(Vec<Captured>, Vec<Value>)> {
    let options = lab.options();
    let recording = Recording::start(&lab.a, &options.uplink, "udp", file)?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    let family = Family::V4;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(family))?;
    for _ in 0..requests {
        traffic::http_get(&lab.a, lab.service_socket(family), Duration::from_secs(5))?;
    }
    let events = vxmon.wait_events(0, Duration::ZERO);
    let _ = vxmon.stop()?;
    recording.stop()?;
    let filter = format!("src host {} and udp dst port {}", Side::A.underlay(options.underlay), options.port);
    Ok((capture::read_file(file, &filter)?, events))
}

#[test]
fn a_capture_gives_what_tcpdump_and_attach_say() -> Result<()> {
    if !skip::root_or_skip("a_capture_gives_what_tcpdump_and_attach_say") {
        return Ok(());
    }
    for underlay in [Family::V4, Family::V6] {
        let lab = LabOptions { underlay, ..LabOptions::default() }.build()?;
        lab.rules(&Rules { backend: Backend::IptablesNft, ..Rules::default() })?;
        let file = Scratch::new("lab.pcap");
        let (packets, events) = recorded(&lab, &file.0, 3)?;
        let bad: Vec<&Captured> = packets.iter().filter(|packet| packet.bad).collect();
        ensure!(!bad.is_empty() && bad.len() == events.len(), "{} bad packets, {} events", bad.len(), events.len());

        let output = check(&file.0, &JSON)?;
        let lines = lines(&output)?;
        let found = of_type(&lines, "anomaly");
        ensure!(output.status.code() == Some(1) && found.len() == bad.len(), "{lines:#?} {}", said(&output));
        for ((found, bad), event) in found.iter().zip(&bad).zip(&events) {
            let hex = |value: Option<u16>| value.map(|value| format!("{value:#06x}"));
            ensure!(found["csum"]["seen"].as_str() == hex(bad.seen).as_deref(), "{found} {bad:?}");
            ensure!(found["csum"]["expected"].as_str() == hex(bad.expected).as_deref(), "{found} {bad:?}");
            ensure!(found["outer"] == event["outer"] && found["inner"] == event["inner"], "{found} {event}");
            // Without the conntrack entry it cannot be proved, but the port before NAT is told.
            ensure!(found["verdict"] == "bad-outer" && found["cause"]["proved"] == false, "{found}");
            ensure!(found["cause"]["right_for_sport"] == event["ct"]["orig"]["sport"], "{found} {event}");
            ensure!(found["missing"]["ct"] == "a capture does not hold it" && found["mark"].is_null(), "{found}");
        }
        let recovered = of_type(&lines, "recovered");
        ensure!(recovered.len() == 3 && recovered.iter().all(|line| line["outcome"] == "connected"), "{recovered:#?}");
        let summary = lines.last().context("no lines")?;
        let verdicts = summary["packets"]["verdicts"].as_object().context("no verdicts")?;
        let judged: u64 = verdicts.values().filter_map(Value::as_u64).sum();
        // The replies of node b are in the capture too.
        ensure!(judged == summary["packets"]["seen"] && judged > packets.len() as u64, "{summary}");
    }
    Ok(())
}

/// Captured on the sender, whose NIC fills the checksums in, tcpdump calls each packet wrong; nothing is.
#[test]
fn what_offload_fills_in_later_is_not_wrong() -> Result<()> {
    if !skip::root_or_skip("what_offload_fills_in_later_is_not_wrong") {
        return Ok(());
    }
    let lab = LabOptions { uplink_tx_offload: true, ..LabOptions::default() }.build()?;
    lab.rules(&Rules { backend: Backend::IptablesNft, form: RuleForm::Fixed, ..Rules::default() })?;
    let file = Scratch::new("offload.pcap");
    let (packets, _) = recorded(&lab, &file.0, 2)?;
    ensure!(packets.iter().any(|packet| packet.bad), "tcpdump is content: the test shows nothing");
    let output = check(&file.0, &JSON)?;
    ensure!(output.status.code() == Some(0), "{:#?} {}", lines(&output)?, said(&output));
    Ok(())
}

fn bad_frame() -> Frame {
    Frame { sum: OuterSum::StalePort(36_512), sport: 49_991, ..Frame::default() }
}

/// A pcap file of one packet; `swap` is for the other byte order.
fn pcap(magic: u32, link: u32, packet: &[u8], fraction: u32, swap: bool) -> Vec<u8> {
    let length = packet.len() as u32;
    let words = [magic, 4 << 16 | 2, 0, 0, 262_144, link, TIME.0, fraction, length, length];
    let mut file: Vec<u8> = words
        .into_iter()
        .enumerate()
        .flat_map(|(n, word)| match (swap, n) {
            // The version is two numbers.
            (true, 1) => [0, 2, 0, 4],
            (true, _) => word.to_be_bytes(),
            (false, _) => word.to_le_bytes(),
        })
        .collect();
    file.extend(packet);
    file
}

const MICRO: u32 = 0xa1b2_c3d4;
const NANO: u32 = 0xa1b2_3c4d;

/// A pcapng block.
fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let padding = body.len().next_multiple_of(4) - body.len();
    let length = (12 + body.len() + padding) as u32;
    [&kind.to_le_bytes()[..], &length.to_le_bytes(), body, &[0; 3][..padding], &length.to_le_bytes()].concat()
}

fn option(code: u16, value: &[u8]) -> Vec<u8> {
    let padding = value.len().next_multiple_of(4) - value.len();
    [&code.to_le_bytes()[..], &(value.len() as u16).to_le_bytes(), value, &[0; 3][..padding]].concat()
}

/// A pcapng file of two interfaces: one of a link type that is not known, one that counts nanoseconds.
fn pcapng(packet: &[u8]) -> Vec<u8> {
    let section = [&0x1a2b_3c4d_u32.to_le_bytes()[..], &1_u16.to_le_bytes(), &[0; 2], &[0xff; 8]].concat();
    let interface = |link: u16, options: &[u8]| [&link.to_le_bytes()[..], &[0; 6], options].concat();
    let packet_of = |interface: u32, per_second: u64| {
        let time = u64::from(TIME.0) * per_second + u64::from(TIME.1) * (per_second / 1_000_000);
        let length = packet.len() as u32;
        let words = [interface, (time >> 32) as u32, time as u32, length, length].map(u32::to_le_bytes).concat();
        let padding = packet.len().next_multiple_of(4) - packet.len();
        [&words, packet, &[0; 3][..padding]].concat()
    };
    let nanoseconds = [option(2, b"eth0"), option(9, &[9]), option(0, &[])].concat();
    [
        block(0x0a0d_0d0a, &section),
        block(1, &interface(189, &[])),
        block(1, &interface(1, &nanoseconds)),
        block(6, &packet_of(0, 1_000_000)),
        block(6, &packet_of(1, 1_000_000_000)),
    ]
    .concat()
}

/// What comes of a capture, in this process: the lines, the tally, and how reading it ended.
#[expect(clippy::expect_used, reason = "a test may fail loudly")]
fn judge(bytes: &[u8]) -> (Vec<Value>, Tally, Result<(), CaptureError>) {
    let printer = Printer::new(Format::Json, Explain::Never, Paint::PLAIN, String::new());
    let mut out = Vec::new();
    let mut check = Check::new([8472], "node".to_owned(), printer, &mut out);
    let result = check.capture("file", bytes, &|_| ());
    let tally = check.finish().expect("a vector takes all");
    let lines = std::str::from_utf8(&out).expect("text").lines();
    (lines.map(|line| serde_json::from_str(line).expect("JSON")).collect(), tally, result)
}

/// That the one packet is found wrong, with its time and what it should have been.
fn is_found(what: &str, bytes: &[u8], device: &str) -> Result<()> {
    let (lines, tally, result) = judge(bytes);
    result.with_context(|| what.to_owned())?;
    let found = of_type(&lines, "anomaly");
    ensure!(tally == Tally { judged: 1, unverified: 0, wrong: 1 } && found.len() == 1, "{what}: {tally:?} {lines:#?}");
    let found = found[0];
    ensure!(found["ts"] == "2026-11-23T12:00:54.373945Z" && found["dev"] == device, "{what}: {found}");
    ensure!(found["outer"]["sport"] == 49_991 && found["cause"]["right_for_sport"] == 36_512, "{what}: {found}");
    Ok(())
}

#[test]
fn each_format_and_link_type_is_read() -> Result<()> {
    let frame = bad_frame().bytes();
    let ip = &frame[14..];
    let micro = |link, packet: &[u8]| pcap(MICRO, link, packet, TIME.1, false);
    is_found("microseconds", &micro(1, &frame), "file")?;
    is_found("nanoseconds", &pcap(NANO, 1, &frame, TIME.1 * 1000, false), "file")?;
    is_found("the other byte order", &pcap(MICRO, 1, &frame, TIME.1, true), "file")?;
    is_found("with a frame check sequence", &micro(1 | 0x5400_0000, &frame), "file")?;
    for raw in [101, 12, 14, 228] {
        is_found("raw IP", &micro(raw, ip), "file")?;
    }
    let v6 = Frame { src: "fd00::3".parse()?, dst: "fd00::f".parse()?, ..bad_frame() }.bytes();
    is_found("raw IPv6", &micro(229, &v6[14..]), "file")?;
    // tcpdump -i any: packet type, ARPHRD, address and its length, EtherType.
    let cooked = [&[0, 4, 0, 1, 0, 6, 2, 0, 0, 0, 1, 10, 0, 0, 8, 0][..], ip].concat();
    is_found("Linux cooked", &micro(113, &cooked), "file")?;
    let cooked = [&[8, 0, 0, 0, 0, 0, 0, 2, 0, 1, 4, 6, 2, 0, 0, 0, 1, 10, 0, 0][..], ip].concat();
    is_found("Linux cooked, second form", &micro(276, &cooked), "file")?;
    let tagged = [&[0, 4, 0, 1, 0, 6, 2, 0, 0, 0, 1, 10, 0, 0, 0x81, 0, 0, 7, 8, 0][..], ip].concat();
    is_found("Linux cooked with a VLAN tag", &micro(113, &tagged), "file")?;
    let vlan = Frame { vlans: vec![(0x88a8, 5), (0x8100, 7)], ..bad_frame() }.bytes();
    is_found("QinQ", &micro(1, &vlan), "file")?;
    is_found("pcapng", &pcapng(&frame), "file:eth0")
}

/// Wherever it ends, what came before is judged, and it is said that it is not whole.
#[test]
fn the_beginning_of_a_capture_is_judged_and_called_so() {
    let frame = bad_frame().bytes();
    let header = 24;
    let one = pcap(MICRO, 1, &frame, TIME.1, false);
    let two = [&one[..], &one[header..]].concat();
    for end in 0..two.len() {
        let (_, tally, result) = judge(&two[..end]);
        let whole = (end.saturating_sub(header) / (one.len() - header)) as u64;
        assert_eq!(tally.wrong, whole, "{end}");
        match result {
            Ok(()) => assert!(end == header || end == one.len(), "{end} bytes are no whole capture"),
            Err(CaptureError::Truncated(packets)) => assert_eq!(packets, whole),
            Err(CaptureError::Empty) => assert_eq!(end, 0),
            Err(CaptureError::NotACapture) => assert!(end < header),
            Err(error) => panic!("{end}: {error}"),
        }
    }
}

proptest! {
    /// Whatever a file holds, reading it ends, and without a panic.
    #[test]
    fn garbage_is_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), flip in any::<prop::sample::Index>(), to in any::<u8>(), ng in any::<bool>()) {
        let _ = judge(&bytes);
        let frame = bad_frame().bytes();
        let mut capture = if ng { pcapng(&frame) } else { pcap(MICRO, 1, &frame, TIME.1, false) };
        let at = flip.index(capture.len());
        capture[at] = to;
        let _ = judge(&capture);
        capture.truncate(at);
        capture.extend(bytes);
        let _ = judge(&capture);
    }
}

/// Each in one line with the way out, and exit code 2: it could not be told.
#[test]
fn what_cannot_be_told_is_said() -> Result<()> {
    let good = Frame::default().bytes();
    let other = Frame { dport: 53, ..Frame::default() }.bytes();
    let mut cut = pcap(MICRO, 1, &good, TIME.1, false);
    let kept = 60;
    cut[32..36].copy_from_slice(&(kept as u32).to_le_bytes());
    cut.truncate(24 + 16 + kept);
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("empty", Vec::new(), "is empty"),
        ("text", b"not a capture, but a text of some length".to_vec(), "is neither pcap nor pcapng"),
        ("packed", vec![0x1f, 0x8b, 8, 0], "gzip -dc FILE | vxmon check -"),
        ("truncated", pcap(MICRO, 1, &good, TIME.1, false)[..100].to_vec(), "ends within a packet, after 0 whole ones"),
        ("usb", pcap(MICRO, 189, &good, TIME.1, false), "link type 189 cannot be read"),
        ("other", pcap(MICRO, 1, &other, TIME.1, false), "no VXLAN packet (UDP port 4789, 8472)"),
        ("cut", cut, ""),
    ];
    for (name, bytes, wanted) in cases {
        let file = Scratch::of(name, &bytes)?;
        let output = check(&file.0, &[])?;
        let said = said(&output);
        ensure!(output.status.code() == Some(2) && said.contains(wanted), "{name}: {output:?}");
        ensure!(said.lines().all(|line| line.starts_with("vxmon: ")), "{name}: {said}");
    }
    for path in ["/nowhere/at/all.pcap", "/"] {
        let output = check(Path::new(path), &[])?;
        ensure!(output.status.code() == Some(2) && said(&output).contains("cannot be read"), "{output:?}");
    }
    Ok(())
}

/// Several files, one of them from a pipe; the wrong one decides.
#[test]
fn files_and_a_pipe_are_judged_together() -> Result<()> {
    let good = Scratch::of("good", &pcap(MICRO, 1, &Frame::default().bytes(), TIME.1, false))?;
    ensure!(check(&good.0, &[])?.status.code() == Some(0));
    let mut child = Command::new(binary()?)
        .arg("check")
        .args([good.0.as_os_str(), "-".as_ref()])
        .args(["--node", "worker-1"])
        .args(JSON)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no pipe")?.write_all(&pcapng(&bad_frame().bytes()))?;
    let output = child.wait_with_output()?;
    let lines = lines(&output)?;
    ensure!(output.status.code() == Some(1), "{lines:#?}");
    let found = of_type(&lines, "anomaly");
    ensure!(found.len() == 1 && found[0]["dev"] == "stdin:eth0" && found[0]["node"] == "worker-1", "{found:#?}");
    let summary = lines.last().context("no lines")?;
    ensure!(summary["packets"]["seen"] == 2 && summary["devices"].as_array().map(Vec::len) == Some(2), "{summary}");
    Ok(())
}

/// As README has them, on an uplink called eth0.
#[test]
fn the_commands_of_readme_run() -> Result<()> {
    if !skip::root_or_skip("the_commands_of_readme_run") {
        return Ok(());
    }
    let lab = LabOptions { uplink: "eth0".to_owned(), ..LabOptions::default() }.build()?;
    lab.rules(&Rules { backend: Backend::IptablesNft, ..Rules::default() })?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let directory = Scratch::new("readme");
    // tcpdump writes as a user of its own.
    fs::create_dir_all(&directory.0)?;
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o777))?;
    let readme = support::read("README.md");
    let section = readme.split("## Check a capture").nth(1).context("no such section")?;
    let commands: Vec<&str> = section.split("```").nth(1).context("no commands")?.lines().skip(1).collect();
    let path = binary()?.parent().context("no directory")?.display().to_string();
    let path = format!("{path}:{}", std::env::var("PATH")?);
    for command in &commands {
        // Those that capture go on until they are told to end.
        let limit = if command.starts_with("tcpdump") { "timeout --signal=INT 3 " } else { "" };
        let mut shell = lab.a.command("sh");
        shell.current_dir(&directory.0).env("PATH", &path).args(["-c", &format!("{limit}{command}")]);
        let child = shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if !limit.is_empty() {
            std::thread::sleep(Duration::from_millis(500));
            traffic::http_get(&lab.a, lab.service_socket(Family::V4), Duration::from_secs(5))?;
        }
        let output = child.wait_with_output()?;
        if command.contains("vxmon") {
            let text = String::from_utf8(output.stdout)?;
            ensure!(output.status.code() == Some(1) && text.contains("right for source port"), "{command}: {text}");
        }
    }
    fs::remove_dir_all(&directory.0)?;
    Ok(())
}

/// A pipe that goes on is left when nobody reads the output any more.
#[test]
fn a_reader_that_leaves_ends_it_quietly() -> Result<()> {
    let mut child = Command::new(binary()?)
        .args(["check", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let mut pipe = child.stdin.take().context("no pipe")?;
    let capture = pcap(MICRO, 1, &bad_frame().bytes(), TIME.1, false);
    pipe.write_all(&capture)?;
    // The first packet's line does not get out, so it ends, and the pipe with it.
    let record = &capture[24..];
    let broken = (0..10_000).any(|_| pipe.write_all(record).is_err());
    let output = child.wait_with_output()?;
    ensure!(broken && output.status.success() && output.stderr.is_empty(), "{broken} {output:?}");
    Ok(())
}
