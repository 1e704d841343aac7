//! Beside other TC programs, other instances of itself, and what a killed instance left: all others' programs still see
//! every packet, their clsact stays, and nothing of vxmon does.

mod support;

use std::{fs, os::fd::AsFd as _, os::fd::AsRawFd as _, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{NlOptions, TcAttachOptions, qdisc_add_clsact},
    },
    sys::{Stats, enable_stats},
};
use nix::sys::signal::Signal;
use vxmon::source::object;
use vxmon_tests::{
    Capture, Family, Lab, LabOptions, Rules, Vxmon, skip,
    traffic::{self, BulkMode, BulkServer, OuterSum, UdpClient, UdpMode, UdpServer},
    vxmon::{Finished, number},
};

use self::support::has_tcx;

const LIMIT: Duration = Duration::from_secs(5);
const UPLINK: &str = "uplink";
const VXLAN: &str = "flannel.1";
/// Packets of the kernel's own (multicast reports) that may pass between two looks at counters.
const STRAY: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hook {
    Tcx,
    Clsact,
}

impl Hook {
    /// Those that this kernel has.
    fn all() -> Vec<Self> {
        let tcx = has_tcx().then_some(Self::Tcx);
        tcx.into_iter().chain([Self::Clsact]).collect()
    }

    fn args(self) -> [&'static str; 4] {
        match self {
            Self::Tcx => ["--format", "json", "--hook", "tcx"],
            Self::Clsact => ["--format", "json", "--hook", "clsact"],
        }
    }
}

/// Somebody else's program at the uplink's egress, which lets packets go on to the next one.
struct Other {
    ebpf: Ebpf,
}

impl Other {
    fn attach(lab: &Lab, hook: Hook) -> Result<Self> {
        lab.a.enter(|| {
            let mut ebpf = EbpfLoader::new().load(object::TEST)?;
            let program: &mut SchedClassifier = ebpf.program_mut("empty").context("no such program")?.try_into()?;
            program.load()?;
            let options = match hook {
                Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
                Hook::Clsact => {
                    // There already if vxmon came first.
                    let _ = qdisc_add_clsact(UPLINK);
                    TcAttachOptions::Netlink(NlOptions { priority: 50, ..NlOptions::default() })
                }
            };
            program.attach_with_options(UPLINK, TcAttachType::Egress, options)?;
            Ok(Self { ebpf })
        })
    }

    /// How often it ran, as the kernel counts while statistics are enabled.
    fn runs(&self) -> Result<u64> {
        let program: &SchedClassifier = self.ebpf.program("empty").context("no such program")?.try_into()?;
        let descriptor = program.fd()?.as_fd().as_raw_fd();
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
        let count = text.lines().find_map(|line| line.strip_prefix("run_cnt:"));
        count.and_then(|count| count.trim().parse().ok()).context("no run_cnt in fdinfo")
    }

    fn detach(self, lab: &Lab) -> Result<()> {
        lab.a.enter(move || {
            drop(self);
            Ok(())
        })
    }
}

fn has_clsact(lab: &Lab, dev: &str) -> Result<bool> {
    Ok(lab.a.run("tc", &["qdisc", "show", "dev", dev])?.contains("clsact"))
}

/// `tc filter show` at the egress.
fn filters(lab: &Lab, dev: &str) -> Result<String> {
    if has_clsact(lab, dev)? { lab.a.run("tc", &["filter", "show", "dev", dev, "egress"]) } else { Ok(String::new()) }
}

/// Names of the programs in the tcx chain.
fn tcx(lab: &Lab, dev: &str) -> Result<Vec<String>> {
    if !has_tcx() {
        return Ok(Vec::new());
    }
    lab.a.enter(|| {
        let (_, programs) = SchedClassifier::query_tcx(dev, TcAttachType::Egress)?;
        Ok(programs.iter().filter_map(|program| program.name_as_str().map(str::to_owned)).collect())
    })
}

/// Nothing of vxmon is attached anywhere in node a.
fn nothing_attached(lab: &Lab) -> Result<()> {
    for dev in [UPLINK, VXLAN] {
        let (filters, tcx) = (filters(lab, dev)?, tcx(lab, dev)?);
        ensure!(!filters.contains("vxmon"), "{dev}: {filters}");
        ensure!(!tcx.iter().any(|name| name.contains("vxmon")), "{dev}: {tcx:?}");
    }
    Ok(())
}

fn nothing_left(lab: &Lab) -> Result<()> {
    nothing_attached(lab)?;
    for dev in [UPLINK, VXLAN] {
        ensure!(!has_clsact(lab, dev)?, "{dev} still has a clsact qdisc");
    }
    Ok(())
}

fn packets(lab: &Lab) -> Result<()> {
    let server = BulkServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    traffic::bulk_send(&lab.a, lab.pod_socket(Family::V4), 1 << 20, BulkMode::Write)?;
    ensure!(server.received() == 1 << 20);
    let udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V6), true)?;
    let client = UdpClient::connect(&lab.a, lab.pod_udp(Family::V6))?;
    for size in 0..100 {
        client.send(size, UdpMode::Plain)?;
    }
    ensure!(udp.wait(100, LIMIT), "{} datagrams", udp.datagrams());
    Ok(())
}

/// Everything that the uplink's program ran on.
fn uplink_packets(finished: &Finished) -> Result<u64> {
    let packets = &finished.device(UPLINK).context("no uplink in the summary")?["packets"];
    Ok(["seen", "other", "counted_above"].iter().map(|path| number(packets, path)).sum())
}

fn send_bad(lab: &Lab, sport: u16) -> Result<()> {
    let mut frame = lab.frame();
    (frame.sport, frame.sum) = (sport, OuterSum::Value(0x1234));
    traffic::send_raw(&lab.a, UPLINK, &frame.bytes())
}

#[test]
fn another_program_behind_ours_sees_every_packet() -> Result<()> {
    if !skip::root_or_skip("another_program_behind_ours_sees_every_packet") {
        return Ok(());
    }
    let _counting = enable_stats(Stats::RunTime)?;
    for ours in Hook::all() {
        for theirs in Hook::all() {
            for ours_first in [false, true] {
                let context = || format!("ours {ours:?}, theirs {theirs:?}, ours first {ours_first}");
                let lab = LabOptions::default().build()?;
                let early = if ours_first { Some(Vxmon::attach_to(&lab.a, 2, &ours.args())?) } else { None };
                let other = Other::attach(&lab, theirs)?;
                let before = other.runs()?;
                let vxmon = early.map_or_else(|| Vxmon::attach_to(&lab.a, 2, &ours.args()), Ok)?;
                packets(&lab).with_context(context)?;
                let finished = vxmon.stop()?;
                let after = other.runs()?;
                finished.adds_up()?;
                let (own, others) = (uplink_packets(&finished)?, after - before);
                ensure!(own > 100, "{}: only {own} packets", context());
                ensure!(own.abs_diff(others) <= STRAY, "{}: ours saw {own}, theirs {others}", context());
                // And still does, now that ours is gone.
                let before = other.runs()?;
                packets(&lab)?;
                ensure!(other.runs()? - before > 100, "{}: gone with ours", context());
                nothing_attached(&lab).with_context(context)?;
                if theirs == Hook::Clsact {
                    ensure!(filters(&lab, UPLINK)?.contains("empty"), "{}", filters(&lab, UPLINK)?);
                }
                other.detach(&lab)?;
            }
        }
    }
    Ok(())
}

/// A bad packet reaches the wire as it is, and the receiver still drops it: vxmon looks, and does no more.
#[test]
fn packets_are_left_as_they_are() -> Result<()> {
    if !skip::root_or_skip("packets_are_left_as_they_are") {
        return Ok(());
    }
    for hook in Hook::all() {
        let lab = LabOptions::default().build()?;
        let capture = Capture::vxlan(&lab)?;
        let vxmon = Vxmon::attach_to(&lab.a, 2, &hook.args())?;
        for sport in 20_000..20_050 {
            send_bad(&lab, sport)?;
        }
        let seen = capture.stop()?;
        ensure!(vxmon.wait_events(50, LIMIT).len() == 50, "{hook:?}");
        ensure!(seen.len() == 50 && seen.iter().all(|packet| packet.seen == Some(0x1234)), "{hook:?}: {seen:#?}");
        vxmon.stop()?.adds_up()?;
    }
    Ok(())
}

#[test]
fn a_clean_end_leaves_nothing() -> Result<()> {
    if !skip::root_or_skip("a_clean_end_leaves_nothing") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    for hook in Hook::all() {
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            let vxmon = Vxmon::attach_to(&lab.a, 2, &hook.args())?;
            // The checks below can fail.
            ensure!(nothing_attached(&lab).is_err(), "{hook:?}: not attached");
            vxmon.signal(signal)?;
            let finished = vxmon.wait(LIMIT)?;
            finished.adds_up().with_context(|| format!("{signal}"))?;
            nothing_left(&lab).with_context(|| format!("{hook:?} {signal}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_clsact_of_others_stays() -> Result<()> {
    if !skip::root_or_skip("a_clsact_of_others_stays") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    // An empty one too: whoever made it may be about to use it.
    lab.a.run("tc", &["qdisc", "add", "dev", UPLINK, "clsact"])?;
    Vxmon::attach_to(&lab.a, 2, &Hook::Clsact.args())?.stop()?.adds_up()?;
    nothing_attached(&lab)?;
    ensure!(has_clsact(&lab, UPLINK)? && !has_clsact(&lab, VXLAN)?, "after a clean end");
    Vxmon::attach_to(&lab.a, 2, &Hook::Clsact.args())?.kill()?;
    Vxmon::attach_to(&lab.a, 2, &Hook::Clsact.args())?.stop()?.adds_up()?;
    nothing_attached(&lab)?;
    ensure!(has_clsact(&lab, UPLINK)? && !has_clsact(&lab, VXLAN)?, "after SIGKILL and a clean end");
    Ok(())
}

/// Others start to use the qdisc that vxmon made: then it stays for them.
#[test]
fn a_clsact_that_others_came_to_use_stays() -> Result<()> {
    if !skip::root_or_skip("a_clsact_that_others_came_to_use_stays") {
        return Ok(());
    }
    let _counting = enable_stats(Stats::RunTime)?;
    let lab = LabOptions::default().build()?;
    let killed = Vxmon::attach_to(&lab.a, 2, &Hook::Clsact.args())?;
    let other = Other::attach(&lab, Hook::Clsact)?;
    killed.kill()?;
    Vxmon::attach_to(&lab.a, 2, &Hook::Clsact.args())?.stop()?.adds_up()?;
    nothing_attached(&lab)?;
    let before = other.runs()?;
    packets(&lab)?;
    ensure!(other.runs()? - before > 100, "their filter was removed");
    other.detach(&lab)
}

#[test]
fn what_a_killed_one_left_is_removed_by_the_next() -> Result<()> {
    if !skip::root_or_skip("what_a_killed_one_left_is_removed_by_the_next") {
        return Ok(());
    }
    for next in Hook::all() {
        let lab = LabOptions::default().build()?;
        Vxmon::attach_to(&lab.a, 2, &Hook::Clsact.args())?.kill()?;
        for dev in [UPLINK, VXLAN] {
            ensure!(filters(&lab, dev)?.contains("vxmon"), "{dev}: SIGKILL left nothing to be removed");
        }
        // What is left does no harm.
        packets(&lab)?;
        let vxmon = Vxmon::attach_to(&lab.a, 2, &next.args())?;
        send_bad(&lab, 20_000)?;
        ensure!(vxmon.wait_events(1, LIMIT).len() == 1);
        let finished = vxmon.stop()?;
        finished.adds_up()?;
        for dev in [UPLINK, VXLAN] {
            let wanted = format!("removed from {dev} what a vxmon that was killed had left");
            ensure!(finished.stderr.contains(&wanted), "{next:?}: {}", finished.stderr);
        }
        nothing_left(&lab).with_context(|| format!("{next:?}"))?;
    }
    Ok(())
}

#[test]
fn tcx_links_go_with_a_killed_one() -> Result<()> {
    if !skip::root_or_skip("tcx_links_go_with_a_killed_one") {
        return Ok(());
    }
    if !has_tcx() {
        skip::skip("tcx_links_go_with_a_killed_one", "this kernel has no tcx links");
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &Hook::Tcx.args())?;
    ensure!(tcx(&lab, UPLINK)?.iter().any(|name| name.starts_with("vxmon")), "{:?}", tcx(&lab, UPLINK)?);
    vxmon.kill()?;
    nothing_left(&lab)
}

/// Two in one namespace: neither removes the other's filters, both report, and the last leaves nothing.
#[test]
fn two_at_once_leave_each_other_alone() -> Result<()> {
    if !skip::root_or_skip("two_at_once_leave_each_other_alone") {
        return Ok(());
    }
    let pairs = [(Hook::Clsact, Hook::Clsact), (Hook::Clsact, Hook::Tcx), (Hook::Tcx, Hook::Tcx)];
    for (first, second) in pairs.into_iter().filter(|(_, second)| Hook::all().contains(second)) {
        for first_ends_first in [true, false] {
            let context = || format!("{first:?} {second:?}, first ends first {first_ends_first}");
            let lab = LabOptions::default().build()?;
            lab.rules(&Rules::default())?;
            let one = Vxmon::attach_to(&lab.a, 2, &first.args())?;
            let two = Vxmon::attach_to(&lab.a, 2, &second.args())?;
            send_bad(&lab, 20_000)?;
            for vxmon in [&one, &two] {
                ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "{}", context());
                ensure!(!vxmon.stderr().contains("removed"), "{}: {}", context(), vxmon.stderr());
            }
            let (ends, stays) = if first_ends_first { (one, two) } else { (two, one) };
            ends.stop()?.adds_up()?;
            send_bad(&lab, 20_001)?;
            ensure!(stays.wait_events(2, LIMIT).len() == 2, "{}: the other's end took it along", context());
            stays.stop()?.adds_up()?;
            nothing_left(&lab).with_context(context)?;
        }
    }
    Ok(())
}
