//! What each set of capabilities is good for on this kernel: the fallback that `auto` chooses, what it can tell of a bad packet,
//! and whether it says what is missing. The outcomes go into the table of kernels.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Backend, Family, Lab, LabOptions, Rules, Vxmon, facts, skip,
    traffic::{UdpClient, UdpServer},
};

const LIMIT: Duration = Duration::from_secs(30);
/// Long enough to see that a packet which should not arrive does not.
const A_MOMENT: Duration = Duration::from_millis(120);

/// What a set is good for.
#[derive(Debug, PartialEq, Eq)]
enum Good {
    /// TC programs, and the entry from the packet itself.
    Tc,
    /// Packet sockets, and the entry by netlink.
    Sockets,
    /// Packet sockets, and no entry.
    SocketsBlind,
    /// It does not start, and names each of these.
    Nothing(&'static [&'static str]),
}

/// As `setpriv` writes them.
const SETS: [(&str, Good); 9] = [
    ("bpf,perfmon,net_admin", Good::Tc),
    ("bpf,perfmon,net_admin,net_raw", Good::Tc),
    ("sys_admin,net_admin", Good::Tc),
    ("bpf,net_admin,net_raw", Good::Sockets),
    ("perfmon,net_admin,net_raw", Good::Sockets),
    ("net_admin,net_raw", Good::Sockets),
    ("bpf,perfmon,net_raw", Good::SocketsBlind),
    ("net_raw", Good::SocketsBlind),
    ("bpf,net_admin", Good::Nothing(&["CAP_PERFMON is missing"])),
];

fn start(lab: &Lab, set: &str) -> Result<Vxmon> {
    let mut command = lab.a.command("setpriv");
    let all: String = set.split(',').map(|name| format!(",+{name}")).collect();
    command.arg(format!("--bounding-set=-all{all}")).args(["--inh-caps=-all", "--"]);
    command.arg(vxmon_tests::vxmon::binary()?).args(["attach", "--format", "json"]);
    Vxmon::spawn(command)
}

/// Sends one bad packet by way of the service; what vxmon says of it.
fn event(lab: &Lab, vxmon: &Vxmon) -> Result<Value> {
    // A collision of ports with an earlier connection would let the question through.
    for _ in 0..3 {
        let _ = UdpClient::connect(&lab.a, lab.service_udp(Family::V4))?.ask(40, A_MOMENT)?;
        if let Some(event) = vxmon.wait_events(1, Duration::from_secs(2)).pop() {
            return Ok(event);
        }
    }
    anyhow::bail!("no event; it said: {}", vxmon.stderr())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("none")
}

fn check(set: &str, good: &Good) -> Result<()> {
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules { backend: Backend::IptablesNft, ..Rules::default() })?;
    let _udp = UdpServer::start(&lab.b, lab.pod_udp(Family::V4), true)?;
    let vxmon = start(&lab, set)?;
    let name = format!("with {set}");
    if let Good::Nothing(words) = good {
        let finished = vxmon.wait(LIMIT)?;
        ensure!(finished.status.code() == Some(2) && finished.stdout.is_empty(), "{finished:#?}");
        ensure!(words.iter().all(|word| finished.stderr.contains(word)), "{}", finished.stderr);
        return facts::write(&name, "does not start, and says why");
    }
    let attached = vxmon.wait_type("attached", 2, LIMIT).into_iter().next();
    let attached = attached.with_context(|| format!("not attached; it said: {}", vxmon.stderr()))?;
    let event = event(&lab, &vxmon)?;
    let (hook, ct, proved) = (text(&attached["hook"]), text(&event["ct"]["source"]), event["cause"]["proved"] == true);
    let by_tc = hook == "tcx" || hook == "clsact";
    let found = match (by_tc, ct, proved) {
        (true, "skb", true) => Good::Tc,
        (false, "netlink", true) => Good::Sockets,
        (false, "none", false) => Good::SocketsBlind,
        _ => anyhow::bail!("{attached:#}\n{event:#}\n{}", vxmon.stderr()),
    };
    ensure!(found == *good, "{attached:#}\n{event:#}\n{}", vxmon.stderr());
    if !by_tc {
        // Which of those that it lacks, and so why it is packet sockets.
        let why = text(&attached["fallback"]);
        for name in ["bpf", "perfmon", "net_admin"] {
            let lacks = !set.split(',').any(|has| has == name);
            ensure!(why.contains(&format!("CAP_{}", name.to_uppercase())) == lacks, "{set}: {why}");
        }
    }
    if *good == Good::SocketsBlind {
        ensure!(!event["missing"]["ct"].is_null(), "{event:#}");
        ensure!(vxmon.stderr().contains("without CAP_NET_ADMIN"), "{}", vxmon.stderr());
    }
    let (nat, metadata) = (text(&event["nat"]["random_fully"]), text(&attached["metadata"]));
    vxmon.stop()?.adds_up()?;
    facts::write(&name, format!("{hook}, metadata {metadata}, conntrack {ct}, NAT {nat}"))
}

#[test]
fn each_set_is_good_for_what_is_said_of_it() -> Result<()> {
    if !skip::root_or_skip("each_set_is_good_for_what_is_said_of_it") {
        return Ok(());
    }
    for (set, good) in &SETS {
        check(set, good).with_context(|| format!("with {set}"))?;
    }
    Ok(())
}
