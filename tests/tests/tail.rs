//! The live log's socket and `vxmon tail`: what each reader gets, and what readers cannot do to the monitor.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::{
        fs::{MetadataExt, symlink},
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vxmon_tests::{
    Lab, LabOptions, Scratch, Vxmon, skip,
    traffic::{self, OuterSum, RawSender},
    vxmon::{self, Finished},
};

#[path = "../../vxmon/tests/support/mod.rs"]
mod support;

/// Far longer than anything takes: the tests wait for what happens, not for times.
const LIMIT: Duration = Duration::from_secs(20);
const UPLINK: &str = "uplink";
const MAX_READERS: usize = 64;
const KEPT: u64 = 1024;
/// A user and group without any right.
const NOBODY: u32 = 65534;

fn socket(directory: &Scratch) -> String {
    directory.0.join("vxmon.sock").display().to_string()
}

fn send_bad(lab: &Lab, sport: u16) -> Result<()> {
    let mut frame = lab.frame();
    (frame.sport, frame.sum) = (sport, OuterSum::Value(0x1234));
    traffic::send_raw(&lab.a, UPLINK, &frame.bytes())
}

fn attach(lab: &Lab, socket: &str) -> Result<Vxmon> {
    Vxmon::attach_to(&lab.a, 2, &["--format", "json", "--socket", socket])
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A running `vxmon tail`.
struct Tail {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Tail {
    fn start(args: &[&str]) -> Result<Self> {
        let mut command = Command::new(vxmon::binary()?);
        command.arg("tail").args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self { child, stdout })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "it ended, or half a line: {line:?}");
        Ok(line.trim_end().to_owned())
    }

    fn json(&mut self) -> Result<Value> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }

    /// What is left to read, the exit code, and what it said.
    fn end(mut self) -> Result<(String, Option<i32>, String)> {
        let (mut rest, mut said) = (String::new(), String::new());
        self.stdout.read_to_string(&mut rest)?;
        let status = self.child.wait()?;
        self.child.stderr.take().context("no stderr")?.read_to_string(&mut said)?;
        Ok((rest, status.code(), said))
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(args: &[&str]) -> Result<Output> {
    Command::new(vxmon::binary()?).arg("tail").args(args).stdin(Stdio::null()).output().context("cannot run tail")
}

fn sports(text: &str) -> Vec<u64> {
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|line| line["outer"]["sport"].as_u64()).collect()
}

/// A refused vxmon: one line, exit code 2.
fn refused(finished: &Finished, part: &str) -> Result<()> {
    ensure!(finished.status.code() == Some(2), "{finished:#?}");
    ensure!(finished.stderr.lines().count() == 1 && finished.stderr.contains(part), "{}", finished.stderr);
    Ok(())
}

#[test]
fn readers_get_the_backlog_and_then_live_lines() -> Result<()> {
    if !skip::root_or_skip("readers_get_the_backlog_and_then_live_lines") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("backlog")?);
    let socket = socket(&scratch);
    let vxmon = attach(&lab, &socket)?;
    for sport in 20_000..20_003 {
        send_bad(&lab, sport)?;
    }
    ensure!(vxmon.wait_events(3, LIMIT).len() == 3, "not reported");
    let args = ["--socket", &socket, "--format", "json"];
    let (mut all, mut one) = (Tail::start(&args)?, Tail::start(&[&args[..], &["--lines", "1"]].concat())?);
    let mut text = Tail::start(&["--socket", &socket, "--lines", "1"])?;
    let schema = support::Schema::of_docs();
    for wanted in ["attached", "attached", "anomaly", "anomaly", "anomaly"] {
        let line = all.json()?;
        schema.check(&line).map_err(anyhow::Error::msg)?;
        ensure!(line["type"] == wanted, "{line}");
    }
    ensure!(one.json()?["outer"]["sport"] == 20_002, "not the last line");
    ensure!(text.line()?.contains(":20002 > 10.0.100.15:8472 checksum 0x1234 instead of"), "not text");
    send_bad(&lab, 20_003)?;
    ensure!(all.json()?["outer"]["sport"] == 20_003 && one.json()?["outer"]["sport"] == 20_003, "not live");
    ensure!(text.line()?.contains(":20003 >"), "not live");
    // Filters.
    let wanted: [(&[&str], &[u64]); 8] = [
        (&["--verdict", "bad-outer"], &[20_000, 20_001, 20_002, 20_003]),
        (&["--verdict", "nat-stale-port"], &[]),
        (&["--verdict", "nat-stale-port,bad-outer", "--outer", ":20001"], &[20_001]),
        (&["--outer", "10.0.100.0/24", "--dev", UPLINK], &[20_000, 20_001, 20_002, 20_003]),
        (&["--outer", "10.0.100.3:20002", "--outer", "10.0.100.3:20000"], &[20_000, 20_002]),
        (&["--dev", "flannel.1"], &[]),
        (&["--inner", "10.244.0.0/16"], &[20_000, 20_001, 20_002, 20_003]),
        (&["--inner", "10.96.0.0/16"], &[]),
    ];
    for (filter, sport) in wanted {
        let output = tail(&[&args[..], &["--no-wait"], filter].concat())?;
        ensure!(output.status.code() == Some(0) && output.stderr.is_empty(), "{filter:?}: {output:?}");
        ensure!(sports(std::str::from_utf8(&output.stdout)?) == sport, "{filter:?}: {output:?}");
    }
    // By hand, without a request, as with socat.
    let mut bare = UnixStream::connect(&socket)?;
    bare.shutdown(Shutdown::Write)?;
    bare.set_read_timeout(Some(LIMIT))?;
    let mut line = String::new();
    BufReader::new(&mut bare).read_line(&mut line)?;
    ensure!(line.starts_with("{\"schema\":\"vxmon.event/1\""), "{line}");

    vxmon.stop()?.adds_up()?;
    for reader in [all, one] {
        let (rest, code, said) = reader.end()?;
        ensure!(code == Some(0) && said.is_empty(), "{code:?} {said}");
        ensure!(rest.lines().count() == 1 && rest.contains("\"type\":\"summary\""), "{rest}");
    }
    ensure!(text.end()?.0.contains("4 with a wrong checksum"), "no summary");
    Ok(())
}

/// As under `kubectl exec … | head -1`.
#[test]
fn tail_ends_quietly_when_its_output_is_closed() -> Result<()> {
    if !skip::root_or_skip("tail_ends_quietly_when_its_output_is_closed") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("closed")?);
    let vxmon = attach(&lab, &socket(&scratch))?;
    for follow in [&[][..], &["--follow"]] {
        let mut reader = Tail::start(&[&["--socket", &socket(&scratch)], follow].concat())?;
        let line = reader.line()?;
        ensure!(line.contains("watched as"), "{line}");
        let Tail { child, stdout } = &mut reader;
        // Nothing more comes: that nobody reads any more has to be noticed without writing.
        drop(std::mem::replace(stdout, BufReader::new(cat()?)));
        until("it ends", || Ok(child.try_wait()?.is_some()))?;
        let (_, code, said) = reader.end()?;
        ensure!(code == Some(0) && said.is_empty(), "{follow:?}: {code:?} {said}");
    }
    vxmon.stop()?.adds_up()
}

/// Something to read that has ended.
fn cat() -> Result<std::process::ChildStdout> {
    let mut child = Command::new("true").stdout(Stdio::piped()).spawn()?;
    child.wait()?;
    child.stdout.take().context("no stdout")
}

#[test]
fn follow_survives_restarts() -> Result<()> {
    if !skip::root_or_skip("follow_survives_restarts") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("follow")?);
    let socket = socket(&scratch);
    // Before there is any monitor; without --follow it says so.
    let none = tail(&["--socket", &socket])?;
    let said = String::from_utf8(none.stderr)?;
    ensure!(none.status.code() == Some(2) && said.lines().count() == 1, "{said}");
    ensure!(said.contains("attach --socket=") && said.contains(&socket), "{said}");
    let mut follower = Tail::start(&["--socket", &socket, "--follow", "--format", "json", "--verdict", "bad-outer"])?;
    for (round, kill) in [(0_u16, false), (1, true), (2, false)] {
        let vxmon = attach(&lab, &socket)?;
        send_bad(&lab, 30_000 + round)?;
        let line = follower.json()?;
        ensure!(line["outer"]["sport"] == 30_000 + round, "round {round}: {line}");
        if kill {
            vxmon.kill()?;
            ensure!(fs::symlink_metadata(&socket).is_ok(), "SIGKILL removed a file");
            let stale = tail(&["--socket", &socket])?;
            ensure!(stale.status.code() == Some(2) && stale.stdout.is_empty(), "{stale:?}");
        } else {
            vxmon.stop()?.adds_up()?;
            ensure!(fs::symlink_metadata(&socket).is_err(), "the socket is still there");
            let line = follower.json()?;
            ensure!(line["type"] == "summary", "{line}");
        }
    }
    follower.child.kill()?;
    let (rest, _, said) = follower.end()?;
    ensure!(rest.is_empty(), "{rest}");
    // Told once each time, not at each attempt; the last time it may have been killed before.
    ensure!((3..=4).contains(&said.lines().count()) && said.lines().all(|line| line.contains("waiting for")), "{said}");
    Ok(())
}

/// A reader that never reads costs the monitor nothing, and learns what it missed once it reads.
#[test]
fn a_reader_that_never_reads_holds_up_nobody() -> Result<()> {
    if !skip::root_or_skip("a_reader_that_never_reads_holds_up_nobody") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("slow")?);
    let socket = socket(&scratch);
    let vxmon = attach(&lab, &socket)?;
    let mut slow = UnixStream::connect(&socket)?;
    slow.write_all(b"{}\n")?;
    let mut dead = UnixStream::connect(&socket)?;
    dead.write_all(b"{\"format\":\"text\"}\n")?;
    let sender = RawSender::open(&lab.a, UPLINK)?;
    let flows: u16 = 8000;
    let frames: Vec<Vec<u8>> = (0..flows)
        .map(|flow| {
            let mut frame = lab.frame();
            (frame.sport, frame.sum) = (1000 + flow, OuterSum::Value(0x1234));
            frame.bytes()
        })
        .collect();
    let mut reported = 0;
    for part in frames.chunks(500) {
        sender.storm(part, part.len() as u64)?;
        reported += part.len();
        // The monitor keeps up, whatever its readers do.
        let told = vxmon.wait_events(reported, LIMIT).len();
        ensure!(told >= reported, "told {told} of {reported}");
    }
    // A reader that comes now is served at once.
    let output = tail(&["--socket", &socket, "--no-wait", "--format", "json"])?;
    ensure!(sports(std::str::from_utf8(&output.stdout)?).len() as u64 == KEPT, "not the backlog");
    let finished = thread::scope(|scope| -> Result<Finished> {
        let reader = scope.spawn(move || -> Result<String> {
            let mut text = String::new();
            slow.set_read_timeout(Some(LIMIT))?;
            slow.read_to_string(&mut text)?;
            Ok(text)
        });
        // Not before it has caught up, or the end would cut it short.
        thread::sleep(Duration::from_millis(500));
        let finished = vxmon.stop()?;
        let Ok(text) = reader.join() else { bail!("the reader panicked") };
        let text = text?;
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let missed: u64 = lines.iter().filter_map(|line| line["lines"].as_u64()).sum();
        let got = lines.iter().filter(|line| line["type"] != "missed").count() as u64;
        ensure!(missed > 0, "it missed nothing of {} lines", finished.all.len());
        ensure!(got + missed == finished.all.len() as u64, "{got} and {missed} missed of {}", finished.all.len());
        ensure!(lines.last().is_some_and(|line| line["type"] == "summary"), "no summary");
        Ok(finished)
    })?;
    ensure!(finished.total("anomalies/reported") >= u64::from(flows), "{}", finished.summary);
    ensure!(finished.total("lost/queue") == 0, "{}", finished.summary);
    drop(dead);
    finished.adds_up()
}

#[test]
fn garbage_is_refused_and_hurts_nobody() -> Result<()> {
    if !skip::root_or_skip("garbage_is_refused_and_hurts_nobody") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("garbage")?);
    let socket = socket(&scratch);
    let mut vxmon = attach(&lab, &socket)?;
    let mut good = Tail::start(&["--socket", &socket, "--format", "json", "--verdict", "bad-outer"])?;
    let noise: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let no_newline: Vec<u8> = noise.iter().copied().filter(|byte| *byte != b'\n').collect();
    let cases: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0\n",
        b"{\"format\":\"yaml\"}\n",
        b"{\"filter\":{\"inner\":[\"nowhere\"]}}\n",
        b"{\"format\":",
        &noise,
        &no_newline,
    ];
    for garbage in cases {
        let mut stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        // It may be turned away before all is written.
        let _ = stream.write_all(garbage);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer)?;
        ensure!(answer.starts_with("{\"error\":\"") && answer.lines().count() == 1, "{answer}");
    }
    // Further garbage after a good request is not even read.
    let mut stream = UnixStream::connect(&socket)?;
    stream.write_all(b"{}\n")?;
    stream.set_nonblocking(true)?;
    let _ = stream.write(&noise);
    send_bad(&lab, 20_000)?;
    ensure!(good.json()?["outer"]["sport"] == 20_000, "a good reader suffers");
    ensure!(vxmon.is_running()?, "it ended");
    vxmon.stop()?.adds_up()
}

#[test]
fn hundreds_of_connections_are_bounded() -> Result<()> {
    if !skip::root_or_skip("hundreds_of_connections_are_bounded") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("many")?);
    let socket = socket(&scratch);
    let vxmon = attach(&lab, &socket)?;
    let descriptors = || Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{}/fd", vxmon.pid()))?.count());
    // The second device's come a moment after it is said that the first is attached.
    until("both are attached", || {
        let count = descriptors()?;
        thread::sleep(Duration::from_millis(200));
        Ok(vxmon.wait_type("attached", 2, Duration::ZERO).len() == 2 && descriptors()? == count)
    })?;
    let before = descriptors()?;
    let (mut served, mut turned_away) = (Vec::new(), 0);
    for _ in 0..300 {
        let mut stream = UnixStream::connect(&socket)?;
        let _ = stream.write_all(b"{}\n");
        stream.set_read_timeout(Some(LIMIT))?;
        let mut line = String::new();
        BufReader::new(&mut stream).read_line(&mut line)?;
        if line.contains("{\"error\":\"64 readers are connected already\"}") {
            turned_away += 1;
        } else {
            ensure!(line.contains("\"type\":\"attached\""), "{line}");
            served.push(stream);
        }
    }
    ensure!(served.len() == MAX_READERS && turned_away == 300 - MAX_READERS, "{} {turned_away}", served.len());
    ensure!(descriptors()? <= before + MAX_READERS + 1, "{} descriptors", descriptors()?);
    let output = tail(&["--socket", &socket])?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(2) && said.contains("64 readers are connected already"), "{said}");
    // Where readers leave, others have room again, though nothing is written meanwhile.
    drop(served);
    until("room again", || Ok(tail(&["--socket", &socket, "--no-wait"])?.status.success()))?;
    until("descriptors are closed", || Ok(descriptors()? <= before))?;
    vxmon.stop()?.adds_up()
}

#[test]
fn only_one_listens_and_a_stale_file_is_replaced() -> Result<()> {
    if !skip::root_or_skip("only_one_listens_and_a_stale_file_is_replaced") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("one")?);
    let socket = socket(&scratch);
    // A file that nobody listens on any more.
    drop(UnixListener::bind(&socket)?);
    let vxmon = attach(&lab, &socket)?;
    // A second one is refused, and the first goes on.
    let second = Vxmon::start(&lab.a, &["--socket", &socket])?.wait(LIMIT)?;
    refused(&second, "another vxmon is listening")?;
    ensure!(tail(&["--socket", &socket, "--no-wait"])?.status.success(), "the first suffered");
    vxmon.stop()?.adds_up()?;
    ensure!(fs::symlink_metadata(&socket).is_err(), "the socket is still there");
    // Several at once, on a stale file: one and only one gets it.
    for _ in 0..3 {
        drop(UnixListener::bind(&socket)?);
        let args = ["--format", "json", "--socket", &socket, "--duration", "3s"];
        let started: Vec<Vxmon> = (0..4).map(|_| Vxmon::start(&lab.a, &args)).collect::<Result<_>>()?;
        let ended: Vec<Finished> = started.into_iter().map(|vxmon| vxmon.wait(LIMIT)).collect::<Result<_>>()?;
        let (won, lost): (Vec<_>, Vec<_>) = ended.iter().partition(|finished| finished.status.success());
        ensure!(won.len() == 1, "{} listened", won.len());
        lost.into_iter().try_for_each(|finished| refused(finished, "another vxmon"))?;
        ensure!(fs::symlink_metadata(&socket).is_err(), "the socket is still there");
    }
    Ok(())
}

/// What is not a socket is never deleted, nor a socket that took the place of one's own.
#[test]
fn what_is_not_its_own_is_never_deleted() -> Result<()> {
    if !skip::root_or_skip("what_is_not_its_own_is_never_deleted") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("foreign")?);
    let (file, link, directory) = (scratch.0.join("file"), scratch.0.join("link"), scratch.0.join("directory"));
    fs::write(&file, "precious")?;
    symlink(&file, &link)?;
    fs::create_dir(&directory)?;
    for path in [&file, &link, &directory] {
        let finished = Vxmon::start(&lab.a, &["--socket", &path.display().to_string()])?.wait(LIMIT)?;
        refused(&finished, "is not a socket; it is left as it is")?;
    }
    ensure!(
        fs::read_to_string(&file)? == "precious" && fs::symlink_metadata(&link)?.is_symlink() && directory.is_dir()
    );
    let unlike = Vxmon::start(&lab.a, &["--socket", "/proc/no/such/vxmon.sock"])?.wait(LIMIT)?;
    refused(&unlike, "/proc/no/such")?;

    let socket = socket(&scratch);
    let vxmon = attach(&lab, &socket)?;
    fs::remove_file(&socket)?;
    let _other = UnixListener::bind(&socket)?;
    let inode = fs::symlink_metadata(&socket)?.ino();
    vxmon.stop()?.adds_up()?;
    ensure!(fs::symlink_metadata(&socket)?.ino() == inode, "another's socket was removed");
    Ok(())
}

#[test]
fn only_the_user_and_the_group_given_may_read() -> Result<()> {
    if !skip::root_or_skip("only_the_user_and_the_group_given_may_read") {
        return Ok(());
    }
    let (lab, scratch) = (LabOptions::default().build()?, Scratch::directory("mode")?);
    let socket = socket(&scratch);
    // The binary's own directory may be closed to others.
    let copy = scratch.0.join("vxmon");
    fs::copy(vxmon::binary()?, &copy)?;
    let as_nobody = || -> Result<Output> {
        let mut command = Command::new(&copy);
        command.args(["tail", "--socket", &socket, "--no-wait"]).uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
        Ok(command.output()?)
    };
    for (args, mode, may) in [(&[][..], 0o600, false), (&["--socket-group", "65534"], 0o660, true)] {
        let vxmon = Vxmon::attach(&lab.a, &[&["--socket", &socket], args].concat())?;
        ensure!(fs::symlink_metadata(&socket)?.mode() & 0o777 == mode, "mode");
        let output = as_nobody()?;
        ensure!(output.status.success() == may, "{args:?}: {output:?}");
        let said = String::from_utf8(output.stderr)?;
        ensure!(may || (said.contains("--socket-group") && said.lines().count() == 1), "{said}");
        vxmon.stop()?;
    }
    let unknown = Vxmon::start(&lab.a, &["--socket", &socket, "--socket-group", "no-such-group"])?.wait(LIMIT)?;
    refused(&unknown, "no group `no-such-group`")
}
