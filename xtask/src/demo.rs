//! `cargo xtask demo`: the kernel breaks checksums, and vxmon says which, why, and what to do.
//!
//! Every number shown is measured, and the verdict at the end is a comparison that can fail: what vxmon reported against
//! what tcpdump saw on the wire and what the receiver dropped.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use serde_json::Value;
use vxmon_tests::{
    Backend, Capture, Family, Lab, LabOptions, RuleForm, Rules, Vxmon, cleanup, counters, lab, traffic, vxmon,
};

use crate::{cargo, proc, setup::Scope};

/// How often the service is asked while it hangs.
const REQUESTS: u64 = 3;
/// How long a request may take. The kernel sends the first SYN again after 1 s.
const LIMIT: Duration = Duration::from_secs(5);
/// How long attaching may take: seconds in an emulated machine.
const ATTACHING: Duration = Duration::from_secs(60);
/// A request that takes longer waited for a SYN to be sent again, after 1 s; an emulated machine may need much of that.
const INSTANT: Duration = Duration::from_millis(900);
/// How long an event may take to arrive.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs it; `built` is the binary, if it is built already.
pub fn run(built: Option<PathBuf>) -> Result<()> {
    let binary = match built {
        Some(binary) => binary,
        None => cargo::build(Scope::Everything)?,
    };
    if !Uid::effective().is_root() {
        return as_root(&binary);
    }
    // SAFETY: no other thread has been started.
    unsafe { env::set_var("VXMON_BIN", &binary) };
    cleanup::on_interrupt()?;
    Demo::start()?.run()
}

/// Only the lab needs root, not the build.
fn as_root(binary: &Path) -> Result<()> {
    if proc::output(Command::new("sudo").arg("--version")).is_none() {
        bail!("not root, and there is no sudo: network namespaces need one of them");
    }
    let path = format!("PATH={}", env::var("PATH")?);
    let mut command = Command::new("sudo");
    command.args(["env", &path]).arg(env::current_exe()?).args(["demo", "--binary"]).arg(binary);
    proc::run(&mut command)
}

struct Demo {
    lab: Lab,
    _server: traffic::HttpServer,
    /// tcpdump on the uplink: what really leaves the node.
    wire: Capture,
    /// For people.
    text: Shown,
    /// The same events once more, for the comparison.
    json: Vxmon,
}

impl Demo {
    fn start() -> Result<Self> {
        say(
            "Two network namespaces are two nodes. A VXLAN (flannel.1) joins them over the device `uplink`. Node a has \
             kube-proxy's NAT rules from before 1.17.9, and a service 10.96.0.10 whose pod, 10.244.2.73, is on node b.",
        );
        let lab = LabOptions::default().build()?;
        install(&lab, RuleForm::Before1179)?;
        let server = traffic::HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        let wire = Capture::vxlan(&lab)?;
        step("vxmon attach (in node a; its output is marked vxmon|)");
        let json = Vxmon::attach_to(&lab.a, 2, &["--format", "json"])?;
        let text = Shown::start(&lab)?;
        Ok(Self { lab, _server: server, wire, text, json })
    }

    fn run(self) -> Result<()> {
        self.pod_is_fine()?;
        self.service_hangs()?;
        let bad = self.wire.packets().iter().filter(|packet| packet.bad).count();
        if bad == 0 {
            bail!(
                "this kernel ({}) does not show the fault: no packet left with a wrong checksum, so there is nothing to \
                 demonstrate here",
                nix::sys::utsname::uname()?.release().to_string_lossy()
            );
        }

        step("the fixed rules (kube-proxy 1.17.9 and later): they clear the mark before the packet is masqueraded");
        self.lab.flush_rules()?;
        install(&self.lab, RuleForm::Fixed)?;
        self.service_is_fine()?;

        step(
            "the old rules again, and `ethtool -K flannel.1 tx-checksum-ip-generic off`: what to do until the upgrade",
        );
        self.lab.flush_rules()?;
        install(&self.lab, RuleForm::Before1179)?;
        lab::ethtool(&self.lab.a, &self.lab.options().vxlan, &["tx-checksum-ip-generic", "off"])?;
        self.service_is_fine()?;

        self.verdict()
    }

    fn pod_is_fine(&self) -> Result<()> {
        step("a request to the pod's own address");
        let time = traffic::http_get(&self.lab.a, self.lab.pod_socket(Family::V4), LIMIT)?;
        say(&format!("answered after {}", show(time)));
        ensure!(time < INSTANT, "the lab is broken: even the pod's address took {}", show(time));
        Ok(())
    }

    /// Each request is a new connection, whose first SYN goes out with the mark still on it.
    fn service_hangs(&self) -> Result<()> {
        for number in 1..=REQUESTS {
            step(&format!("request {number} of {REQUESTS} to the service's address"));
            let before = self.dropped()?;
            let seen = self.json.events().len();
            match traffic::http_get(&self.lab.a, self.lab.service_socket(Family::V4), LIMIT) {
                Ok(time) => say(&format!("answered after {}", show(time))),
                Err(_) => say(&format!("no answer within {}", show(LIMIT))),
            }
            say(&format!(
                "node b dropped {} packets because of their checksum (UdpInCsumErrors is {} now)",
                self.dropped()? - before,
                self.dropped()?
            ));
            if let Some(event) = self.json.wait_events(seen + 1, PATIENCE).last() {
                self.show_conntrack(event)?;
            }
        }
        Ok(())
    }

    /// The entry that the event names, as the kernel's own tool shows it.
    fn show_conntrack(&self, event: &Value) -> Result<()> {
        let (Some(before), Some(after)) =
            (event["ct"]["orig"]["sport"].as_u64(), event["ct"]["reply"]["dport"].as_u64())
        else {
            return Ok(());
        };
        let list = self.lab.a.run("conntrack", &["-L", "-p", "udp"])?;
        let (before, after) = (format!("sport={before}"), format!("dport={after}"));
        let is_it = |line: &&str| [&before, &after].iter().all(|word| line.split_whitespace().any(|w| w == *word));
        match list.lines().find(is_it) {
            Some(line) => {
                println!("conntrack| {}", line.split_whitespace().collect::<Vec<_>>().join(" "));
                Ok(())
            }
            None => bail!("`conntrack -L` has no entry with {before} and {after}, which vxmon reported"),
        }
    }

    fn service_is_fine(&self) -> Result<()> {
        let (dropped, events) = (self.dropped()?, self.json.events().len());
        for _ in 0..REQUESTS {
            let time = traffic::http_get(&self.lab.a, self.lab.service_socket(Family::V4), LIMIT)?;
            say(&format!("answered after {}", show(time)));
            ensure!(time < INSTANT, "the service still hangs: {}", show(time));
        }
        // Time enough for an event that should not come.
        thread::sleep(Duration::from_millis(200));
        let (dropped, events) = (self.dropped()? - dropped, self.json.events().len() - events);
        say(&format!("node b dropped {dropped}, vxmon saw {events} bad packets"));
        ensure!(dropped == 0, "there are still packets with a wrong checksum");
        ensure!(events == 0, "vxmon reported {events} packets where none was wrong");
        Ok(())
    }

    fn verdict(self) -> Result<()> {
        step("Ctrl-C");
        let dropped = self.dropped()?;
        let packets = self.wire.stop()?;
        let finished = self.json.stop()?;
        self.text.stop()?;

        let sums = |hex: &Value| hex.as_str().and_then(|text| u16::from_str_radix(text.strip_prefix("0x")?, 16).ok());
        let mut on_wire: Vec<_> = packets
            .iter()
            .filter(|packet| packet.bad)
            .map(|packet| (Some(u64::from(packet.sport)), packet.seen, packet.expected))
            .collect();
        let mut reported: Vec<_> = finished
            .events
            .iter()
            .map(|event| {
                (event["outer"]["sport"].as_u64(), sums(&event["csum"]["seen"]), sums(&event["csum"]["expected"]))
            })
            .collect();
        on_wire.sort_unstable();
        reported.sort_unstable();
        let total: u64 = finished.events.iter().map(|event| 1 + event["suppressed"].as_u64().unwrap_or(0)).sum();
        let proved = finished.events.iter().filter(|event| event["cause"]["proved"] == true).count();

        println!();
        let proofs =
            if proved == finished.events.len() { "all proved".to_owned() } else { format!("{proved} of them proved") };
        println!(
            "The kernel sent {} packets with a wrong checksum (tcpdump), node b dropped {dropped}; vxmon reported {total}, \
             {proofs}.",
            on_wire.len()
        );
        // Repeats of a flow within a second are counted, not listed: then only the numbers can be compared.
        let same = on_wire == reported || total > reported.len() as u64 && total == on_wire.len() as u64;
        ensure!(
            same,
            "vxmon and tcpdump differ:\nport, seen, expected by tcpdump: {on_wire:x?}\nby vxmon: {reported:x?}"
        );
        ensure!(proved == finished.events.len(), "not every report is proved");
        ensure!(dropped == total, "node b dropped {dropped} packets");
        println!("Each has the port, the checksum and the expected checksum that tcpdump shows.");
        Ok(())
    }

    /// Packets that node b dropped for their checksum so far.
    fn dropped(&self) -> Result<u64> {
        counters::udp_csum_errors(&self.lab.b, Family::V4)
    }
}

fn install(lab: &Lab, form: RuleForm) -> Result<()> {
    lab.rules(&Rules { backend: Backend::IptablesNft, form, comments: true, ..Rules::default() })
}

/// A `vxmon attach` whose standard output is shown as it comes.
struct Shown {
    child: Child,
    readers: Vec<JoinHandle<()>>,
}

impl Shown {
    /// When this returns, it is attached.
    fn start(lab: &Lab) -> Result<Self> {
        let mut child = lab
            .a
            .command(vxmon::binary()?)
            .arg("attach")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run vxmon")?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (shown, said) = (Arc::default(), Arc::new(AtomicU64::new(0)));
        let readers = vec![show_lines(stdout, &shown)?, show_lines(stderr, &said)?];
        let shown = Self { child, readers };
        // Its first words on stderr name what it watches.
        let start = Instant::now();
        while said.load(Ordering::Relaxed) == 0 {
            ensure!(start.elapsed() < ATTACHING, "vxmon does not attach");
            thread::sleep(Duration::from_millis(5));
        }
        // Those on stdout are written by a thread of its own.
        thread::sleep(Duration::from_millis(50));
        Ok(shown)
    }

    fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).context("vxmon is gone")?;
        let status = self.child.wait()?;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        ensure!(status.success(), "vxmon ended with {status}");
        Ok(())
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn show_lines(pipe: Option<impl std::io::Read + Send + 'static>, count: &Arc<AtomicU64>) -> Result<JoinHandle<()>> {
    let (pipe, count) = (BufReader::new(pipe.context("vxmon has no output")?), Arc::clone(count));
    Ok(thread::Builder::new().name("shown".to_owned()).spawn(move || {
        for line in pipe.lines().map_while(Result::ok) {
            println!("    vxmon| {line}");
            count.fetch_add(1, Ordering::Relaxed);
        }
    })?)
}

fn step(text: &str) {
    println!("\n==> {text}");
}

fn say(text: &str) {
    println!("{text}");
}

fn show(time: Duration) -> String {
    match time.as_millis() {
        0..1000 => format!("{:.1} ms", time.as_secs_f64() * 1e3),
        _ => format!("{:.2} s", time.as_secs_f64()),
    }
}
