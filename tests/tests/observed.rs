//! Evidence `observed`: NAT as the kernel was seen to set it up. Where rules say something else, or cannot tell, that is what
//! counts; and it is never said of another connection.

use std::{net::UdpSocket, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon_tests::{
    Backend, Family, Lab, LabOptions, RuleForm, Rules, Vxmon, cmd,
    counters::{CtEntry, conntrack_vxlan},
    facts,
    lab::Side,
    skip,
    traffic::{self, HttpServer},
    vxmon::sees_nat,
};

const LIMIT: Duration = Duration::from_secs(30);
/// Long enough for the first SYN, shorter than its retry.
const A_MOMENT: Duration = Duration::from_millis(120);
const JSON: [&str; 2] = ["--format", "json"];
/// The same in each lab, so that the outer flows have the same ends too.
const SPORT: u16 = 40_123;
/// Other ports, but not random ones.
const PLAIN: &str = "-A POSTROUTING -p udp -m udp --dport 8472 -j MASQUERADE --to-ports 20000-20100";
const RANDOM: &str = "-A POSTROUTING -p udp -m udp --dport 8472 -j MASQUERADE --random";
const RANDOM_FULLY: &str = "-A POSTROUTING -p udp -m udp --dport 8472 -j MASQUERADE --random-fully";

/// Whether the kernel can show NAT being set up to a program; else the test is skipped.
fn has_kprobes(test: &str) -> bool {
    let has = sees_nat();
    if !has {
        skip::skip(test, "this kernel has no kprobes");
    }
    has
}

fn can_run(test: &str) -> bool {
    skip::root_or_skip(test) && has_kprobes(test)
}

/// Puts this in place of what is in the nat table.
fn iptables(lab: &Lab, backend: Backend, rule: &str) -> Result<()> {
    let program = if backend == Backend::IptablesLegacy { "iptables-legacy-restore" } else { "iptables-nft-restore" };
    let text = format!("*nat\n{rule}\nCOMMIT\n");
    cmd::run_with_input(lab.a.command(program).args(["-w", "10"]), &text).map(drop)
}

fn offload(lab: &Lab, state: &str) -> Result<()> {
    lab.a.run("ethtool", &["-K", "flannel.1", "tx-checksum-ip-generic", state]).map(drop)
}

/// Sends a packet from node a to the pod on node b, always between the same ends.
fn send(lab: &Lab) -> Result<()> {
    let to = lab.pod_udp(Family::V4);
    lab.a.enter(|| {
        let socket = UdpSocket::bind(("0.0.0.0", SPORT))?;
        socket.send_to(b"hello", to)?;
        Ok(())
    })
}

/// The outer connection from node a; node b answers that nobody listens.
fn entry(lab: &Lab) -> Result<CtEntry> {
    let mut entries = conntrack_vxlan(&lab.a, Family::V4, 8472)?;
    entries.retain(|entry| entry.orig.src == Side::A.underlay(Family::V4));
    ensure!(entries.len() == 1, "{entries:#?}");
    entries.pop().context("no entry")
}

/// vxmon, which says that it sees NAT.
fn watch(lab: &Lab) -> Result<Vxmon> {
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    for attached in vxmon.wait_type("attached", 2, LIMIT) {
        ensure!(attached["nat_probe"] == "kprobe", "{attached}");
    }
    Ok(vxmon)
}

fn event(vxmon: &Vxmon, count: usize) -> Result<Value> {
    let events = vxmon.wait_events(count, LIMIT);
    events.get(count - 1).cloned().with_context(|| format!("no event {count}: {events:#?}; {}", vxmon.stderr()))
}

fn flags(event: &Value) -> (&str, Vec<&str>) {
    let flags = event["nat"]["range_flags"].as_array().into_iter().flatten().filter_map(Value::as_str);
    (event["nat"]["random_fully"].as_str().unwrap_or_default(), flags.collect())
}

#[test]
fn kube_proxys_rules_are_seen_at_work() -> Result<()> {
    if !can_run("kube_proxys_rules_are_seen_at_work") {
        return Ok(());
    }
    for backend in Backend::ALL {
        let lab = LabOptions::default().build()?;
        lab.rules(&Rules { backend, form: RuleForm::Before1179, ..Rules::default() })?;
        let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
        let vxmon = watch(&lab)?;
        ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "connected at once");
        let event = event(&vxmon, 1)?;
        let context = || format!("{backend:?}: {event:#}");
        ensure!(flags(&event) == ("observed", vec!["map-ips", "proto-random-fully"]), "{}", context());
        // Whether the packet meets the rule hangs on its mark.
        let named = event["nat"]["rule"].as_str().is_some_and(|rule| rule.contains("random"));
        ensure!(named || event["mark"].is_null(), "{}", context());
        ensure!(event["cause"]["proved"] == true, "{}", context());
        vxmon.stop()?.adds_up()?;
    }
    Ok(())
}

/// Ports that are changed in another way are not said to be random.
#[test]
fn other_ways_are_told_apart() -> Result<()> {
    if !can_run("other_ways_are_told_apart") {
        return Ok(());
    }
    for backend in [Backend::IptablesLegacy, Backend::IptablesNft] {
        for (rule, level, flag) in [
            (PLAIN, "no", "proto-specified"),
            (RANDOM, "no", "proto-random"),
            (RANDOM_FULLY, "observed", "proto-random-fully"),
        ] {
            let lab = LabOptions::default().build()?;
            iptables(&lab, backend, rule)?;
            let vxmon = watch(&lab)?;
            send(&lab)?;
            let event = event(&vxmon, 1)?;
            ensure!(flags(&event) == (level, vec!["map-ips", flag]), "{backend:?} {rule}: {event:#}");
            ensure!(event["nat"]["rule"] == rule, "{backend:?} {rule}: {event:#}");
            vxmon.stop()?.adds_up()?;
        }
    }
    Ok(())
}

/// The connection was set up by one rule, and when its first bad packet leaves there is another: the rules alone would say
/// what is not so, either way.
#[test]
fn rules_that_came_later_do_not_count() -> Result<()> {
    if !can_run("rules_that_came_later_do_not_count") {
        return Ok(());
    }
    for (first, then, level) in [(PLAIN, RANDOM_FULLY, "no"), (RANDOM_FULLY, PLAIN, "observed")] {
        let lab = LabOptions::default().build()?;
        let vxmon = watch(&lab)?;
        iptables(&lab, Backend::IptablesNft, first)?;
        // Without offload NAT does no harm.
        offload(&lab, "off")?;
        send(&lab)?;
        let before = entry(&lab)?;
        ensure!(before.port_rewritten(), "{before:?}");
        iptables(&lab, Backend::IptablesNft, then)?;
        offload(&lab, "on")?;
        send(&lab)?;
        let event = event(&vxmon, 1)?;
        ensure!(flags(&event).0 == level && event["nat"]["rule"].is_null(), "{first}, {then}: {event:#}");
        ensure!(event["ct"]["reply"]["dport"] == before.reply.dport, "another connection: {event:#}");
        vxmon.stop()?.adds_up()?;
    }
    Ok(())
}

/// What was there before vxmon is known by its rules only.
#[test]
fn older_connections_are_known_by_rules() -> Result<()> {
    if !can_run("older_connections_are_known_by_rules") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    iptables(&lab, Backend::IptablesNft, RANDOM_FULLY)?;
    send(&lab)?;
    let vxmon = watch(&lab)?;
    send(&lab)?;
    let event = event(&vxmon, 1)?;
    ensure!(flags(&event) == ("rule", vec![]), "{event:#}");
    vxmon.stop()?.adds_up()
}

/// A connection between the same ends in another network namespace, set up in another way, is another one.
#[test]
fn other_namespaces_do_not_count() -> Result<()> {
    if !can_run("other_namespaces_do_not_count") {
        return Ok(());
    }
    let (lab, other) = (LabOptions::default().build()?, LabOptions::default().build()?);
    iptables(&lab, Backend::IptablesNft, PLAIN)?;
    iptables(&other, Backend::IptablesNft, RANDOM_FULLY)?;
    let vxmon = watch(&lab)?;
    offload(&lab, "off")?;
    send(&lab)?;
    send(&other)?;
    let (ours, theirs) = (entry(&lab)?, entry(&other)?);
    ensure!(ours.orig == theirs.orig, "not the same ends, so nothing is tested: {ours:?} {theirs:?}");
    offload(&lab, "on")?;
    send(&lab)?;
    let event = event(&vxmon, 1)?;
    ensure!(flags(&event) == ("no", vec!["map-ips", "proto-specified"]), "{event:#}");
    vxmon.stop()?.adds_up()
}

/// A kernel parameter, put back at the end.
struct Sysctl {
    path: &'static str,
    was: String,
}

impl Sysctl {
    fn set(path: &'static str, value: &str) -> Result<Self> {
        let was = std::fs::read_to_string(path)?.trim().to_owned();
        std::fs::write(path, value).with_context(|| format!("cannot write {value} to {path}"))?;
        Ok(Self { path, was })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        let _ = std::fs::write(self.path, &self.was);
    }
}

/// No more capabilities than the deployment gives, if the node lets those who have them use kprobes; otherwise, and without
/// CAP_PERFMON, it does without, and says why.
#[test]
fn few_capabilities_do() -> Result<()> {
    if !can_run("few_capabilities_do") {
        return Ok(());
    }
    const ALL: &str = "+bpf,+perfmon,+net_admin,+net_raw";
    for (capabilities, paranoid, always) in
        [(ALL, "2", Some(true)), (ALL, "3", None), ("+net_admin,+net_raw", "2", Some(false))]
    {
        let _setting = Sysctl::set("/proc/sys/kernel/perf_event_paranoid", paranoid)?;
        let lab = LabOptions::default().build()?;
        iptables(&lab, Backend::IptablesNft, RANDOM_FULLY)?;
        let mut command = lab.a.command("setpriv");
        command.arg(format!("--bounding-set=-all,{capabilities}")).args(["--inh-caps=-all", "--"]);
        command.arg(vxmon_tests::vxmon::binary()?).arg("attach").args(JSON).args(["--engine", "packet-socket"]);
        let vxmon = Vxmon::spawn(command)?;
        let attached = vxmon.wait_type("attached", 2, LIMIT);
        ensure!(attached.len() == 2, "{}", vxmon.stderr());
        let has = attached[0]["nat_probe"] == "kprobe";
        let context = || format!("{capabilities}, perf_event_paranoid {paranoid}: {attached:#?}");
        ensure!(always.is_none_or(|always| has == always), "{}", context());
        let why = attached[0]["missing"]["nat_probe"].as_str();
        ensure!(why.is_none() == has, "{}", context());
        // Only some distributions' kernels have a third level, which asks for CAP_SYS_ADMIN.
        ensure!(always.is_some() || has || why.is_some_and(|why| why.contains("paranoid is 3")), "{}", context());
        send(&lab)?;
        let event = event(&vxmon, 1)?;
        ensure!(flags(&event).0 == if has { "observed" } else { "rule" }, "{}: {event:#}", context());
        vxmon.stop()?.adds_up()?;
    }
    Ok(())
}

/// What a new connection costs, by the kernel's own count; a fact for the table of the lab.
#[test]
fn what_a_new_connection_costs() -> Result<()> {
    const CONNECTIONS: usize = 300;
    if !can_run("what_a_new_connection_costs") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    iptables(&lab, Backend::IptablesNft, RANDOM_FULLY)?;
    let switch = "/proc/sys/kernel/bpf_stats_enabled";
    let vxmon = watch(&lab)?;
    let counting = Sysctl::set(switch, "1")?;
    let to = lab.pod_udp(Family::V4);
    let sent = lab.a.enter(|| {
        for _ in 0..CONNECTIONS {
            UdpSocket::bind("0.0.0.0:0")?.send_to(b"hello", to)?;
        }
        Ok(())
    });
    drop(counting);
    sent?;
    let mut costs = Vec::new();
    for file in std::fs::read_dir(format!("/proc/{}/fdinfo", vxmon.pid()))?.flatten() {
        let text = std::fs::read_to_string(file.path()).unwrap_or_default();
        let number = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        // BPF_PROG_TYPE_KPROBE. A program has several descriptors.
        if let (Some(2), Some(id), Some(time), Some(runs)) =
            (number("prog_type:"), number("prog_id:"), number("run_time_ns:"), number("run_cnt:"))
        {
            costs.push((id, runs, time / runs.max(1)));
        }
    }
    costs.sort_unstable();
    costs.dedup();
    ensure!(costs.len() == 2 && costs.iter().all(|(_, runs, _)| *runs >= CONNECTIONS as u64), "{costs:?}");
    let fact = costs.iter().map(|(_, runs, cost)| format!("{cost} ns in {runs} runs")).collect::<Vec<_>>().join(", ");
    println!("NAT's set-up seen, start and return: {fact}");
    facts::write("NAT's set-up seen, ns a run, start and return", &fact)?;
    vxmon.stop()?.adds_up()
}
