//! `attach --metrics`: the numbers against the summary, against Prometheus' own checks, and scraped by a real Prometheus
//! whose alerts and dashboard queries are answered from the lab; the offload's drift; and what clients cannot do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vxmon_tests::{
    Family, Lab, LabOptions, Netns, Rules, Scratch, Vxmon, cmd,
    counters::udp_csum_errors,
    lab::{Side, ethtool},
    skip,
    traffic::{self, HttpServer, OuterSum, RawSender},
};

#[path = "../../vxmon/tests/support/mod.rs"]
mod support;

/// Far longer than anything takes.
const LIMIT: Duration = Duration::from_secs(60);
const A_MOMENT: Duration = Duration::from_millis(150);
const PORT: &str = "9560";
const VXLAN: &str = "flannel.1";
const FEATURE: &str = "tx-checksum-ip-generic";

fn attach(lab: &Lab, args: &[&str]) -> Result<Vxmon> {
    Vxmon::attach_to(&lab.a, 2, &[&["--format", "json", "--metrics", PORT], args].concat())
}

fn get(node: &Netns, path: &str, args: &[&str]) -> Result<String> {
    let url = format!("http://127.0.0.1:{PORT}{path}");
    node.run("curl", &[&["-s", "-S", "--max-time", "30"], args, &[&url]].concat())
}

fn status(node: &Netns, path: &str, args: &[&str]) -> Result<String> {
    get(node, path, &[&["-o", "/dev/null", "-w", "%{http_code}"], args].concat())
}

/// Samples by name and labels, as they are written.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(name, n)| Some((name.to_owned(), n.parse().ok()?)))
        .collect()
}

/// The sum of a metric's samples that have all these labels.
fn sum(samples: &BTreeMap<String, f64>, name: &str, labels: &[&str]) -> f64 {
    let named = samples.iter().filter(|(key, _)| key.split('{').next() == Some(name));
    named.filter(|(key, _)| labels.iter().all(|label| key.contains(label))).map(|(_, n)| n).sum()
}

fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn until_sample(node: &Netns, name: &str, labels: &[&str], wanted: f64) -> Result<BTreeMap<String, f64>> {
    until(&format!("{name} {labels:?} is {wanted}"), || {
        let samples = samples(&get(node, "/metrics", &[])?);
        Ok((sum(&samples, name, labels) == wanted).then_some(samples))
    })
}

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file)
}

fn promtool(args: &[&str], input: &str) -> Result<()> {
    let mut command = Command::new("promtool");
    command.args(args);
    cmd::run_with_input(&mut command, input).map(drop)
}

#[test]
fn the_numbers_are_those_of_the_summary() -> Result<()> {
    if !skip::root_or_skip("the_numbers_are_those_of_the_summary") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    let _server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let socket = Scratch::directory("numbers")?;
    let vxmon = attach(&lab, &["--socket", &socket.0.join("s").display().to_string()])?;
    let from_start = samples(&get(&lab.a, "/metrics", &[])?);
    // There from the start, at 0: what appears later with 1 did not increase to Prometheus.
    let counter = "vxmon_packets_total{device=\"uplink\",role=\"uplink\",verdict=\"nat-stale-port\"}";
    ensure!(from_start.get(counter) == Some(&0.0), "{from_start:#?}");
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "no fault");
    ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "not reported");
    until_sample(&lab.a, "vxmon_anomalies_total", &["nat-stale-port", "proved=\"true\""], 1.0)?;
    // Until nothing changes any more.
    let seen = until("it is quiet", || {
        let before = samples(&get(&lab.a, "/metrics", &[])?);
        thread::sleep(Duration::from_millis(2500));
        let after = samples(&get(&lab.a, "/metrics", &[])?);
        let packets = |samples: &BTreeMap<String, f64>| sum(samples, "vxmon_packets_total", &[]);
        Ok((packets(&before) == packets(&after)).then_some(after))
    })?;
    let text = get(&lab.a, "/metrics", &[])?;
    promtool(&["check", "metrics"], &text)?;
    let open = get(&lab.a, "/metrics", &["-H", "Accept: application/openmetrics-text;version=1.0.0"])?;
    ensure!(open.ends_with("# EOF\n") && samples(&open).keys().eq(seen.keys()), "{open}");
    ensure!(status(&lab.a, "/readyz", &[])? == "200" && status(&lab.a, "/healthz", &[])? == "200", "not ready");

    let finished = vxmon.stop()?;
    finished.adds_up()?;
    for device in finished.summary["devices"].as_array().context("no devices")? {
        let dev = format!("device={}", device["dev"]);
        for (section, metric) in [("verdicts", "vxmon_packets_total"), ("unverified", "vxmon_unverified_packets_total")]
        {
            for (name, count) in device["packets"][section].as_object().into_iter().flatten() {
                let shown = sum(&seen, metric, &[&dev, &format!("=\"{name}\"")]);
                ensure!(Some(shown) == count.as_f64(), "{dev} {name}: {shown}, and in the summary {count}");
            }
        }
    }
    ensure!(sum(&seen, "vxmon_device_attached", &["hook=\"tcx\""]) == 2.0, "{seen:#?}");
    ensure!(sum(&seen, "vxmon_offload_enabled", &[VXLAN, FEATURE]) == 1.0, "{seen:#?}");
    ensure!(sum(&seen, "vxmon_build_info", &["version=", "commit=", "ebpf="]) == 1.0, "{seen:#?}");
    ensure!(sum(&seen, "process_resident_memory_bytes", &[]) > f64::from(1 << 20), "{seen:#?}");
    Ok(())
}

/// The node that receives the packets counts them.
#[test]
fn the_receiver_shows_what_it_dropped() -> Result<()> {
    if !skip::root_or_skip("the_receiver_shows_what_it_dropped") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach_to(&lab.b, 2, &["--format", "json", "--metrics", PORT])?;
    let mut frame = lab.frame();
    frame.sum = OuterSum::Value(0x1234);
    for _ in 0..3 {
        traffic::send_raw(&lab.a, "uplink", &frame.bytes())?;
    }
    let errors = udp_csum_errors(&lab.b, Family::V4)?;
    ensure!(errors == 3, "{errors}");
    until_sample(&lab.b, "vxmon_node_udp_in_csum_errors_total", &["ipv4"], 3.0)?;
    vxmon.stop()?.adds_up()
}

#[test]
fn ready_means_that_something_is_watched() -> Result<()> {
    if !skip::root_or_skip("ready_means_that_something_is_watched") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    lab.delete_vxlan(Side::A)?;
    let vxmon = Vxmon::start(&lab.a, &["--format", "json", "--metrics", PORT])?;
    until("it is healthy", || Ok((status(&lab.a, "/healthz", &[]).ok().as_deref() == Some("200")).then_some(())))?;
    ensure!(status(&lab.a, "/readyz", &[])? == "503", "ready with no device");
    ensure!(get(&lab.a, "/readyz", &[])?.contains("no device is watched"), "no reason");
    lab.create_vxlan(Side::A)?;
    until("it is ready", || Ok((status(&lab.a, "/readyz", &[])? == "200").then_some(())))?;
    vxmon.stop()?.adds_up()
}

#[test]
fn offload_that_changes_is_told() -> Result<()> {
    if !skip::root_or_skip("offload_that_changes_is_told") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let vxmon = attach(&lab, &[])?;
    let told = |count: usize| -> Result<Value> {
        let lines = vxmon.wait_type("offload", count, LIMIT);
        ensure!(lines.len() == count, "{lines:#?}");
        lines.last().cloned().context("nothing told")
    };
    until_sample(&lab.a, "vxmon_offload_enabled", &[VXLAN], 1.0)?;
    let schema = support::Schema::of_docs();
    ethtool(&lab.a, VXLAN, &[FEATURE, "off"])?;
    let line = told(1)?;
    schema.check(&line).map_err(anyhow::Error::msg)?;
    ensure!(line["dev"] == VXLAN && line["feature"] == FEATURE, "{line}");
    ensure!(line["was"] == "on" && line["state"] == "off" && line["why"] == "switched", "{line}");
    until_sample(&lab.a, "vxmon_offload_enabled", &[VXLAN], 0.0)?;
    // As flanneld does it when it restarts.
    lab.delete_vxlan(Side::A)?;
    lab.create_vxlan(Side::A)?;
    let line = told(2)?;
    ensure!(line["was"] == "off" && line["state"] == "on" && line["why"] == "recreated", "{line}");
    let samples = until_sample(&lab.a, "vxmon_offload_enabled", &[VXLAN], 1.0)?;
    ensure!(sum(&samples, "vxmon_offload_changes_total", &[]) == 2.0, "{samples:#?}");
    // What has nothing to do with it is not told.
    ethtool(&lab.a, VXLAN, &["gro", "off"])?;
    ethtool(&lab.a, "uplink", &["gro", "off"])?;
    thread::sleep(A_MOMENT * 4);
    told(2)?;
    vxmon.stop()?.adds_up()
}

#[test]
fn traffic_makes_no_series_and_clients_are_bounded() -> Result<()> {
    if !skip::root_or_skip("traffic_makes_no_series_and_clients_are_bounded") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let mut vxmon = attach(&lab, &[])?;
    let mut frame = lab.frame();
    frame.sum = OuterSum::Value(0x1234);
    traffic::send_raw(&lab.a, "uplink", &frame.bytes())?;
    let before = until_sample(&lab.a, "vxmon_packets_total", &["bad-outer", "uplink"], 1.0)?;
    let frames: Vec<Vec<u8>> = (0..3000)
        .map(|flow| {
            (frame.sport, frame.vni) = (1 + flow, u32::from(flow));
            frame.bytes()
        })
        .collect();
    RawSender::open(&lab.a, "uplink")?.storm(&frames, frames.len() as u64)?;
    let after = until("all are counted", || {
        let samples = samples(&get(&lab.a, "/metrics", &[])?);
        Ok((sum(&samples, "vxmon_packets_total", &["bad-outer", "uplink"]) >= 3001.0).then_some(samples))
    })?;
    let names = |samples: &BTreeMap<String, f64>| samples.keys().cloned().collect::<BTreeSet<_>>();
    ensure!(names(&before) == names(&after), "{:#?}", names(&after).difference(&names(&before)).collect::<Vec<_>>());

    for (path, args, wanted) in [
        ("/metrics", &["-X", "POST", "-d", "x"][..], "405"),
        ("/metrics", &["-I"], "200"),
        ("/secret", &[], "404"),
        ("/", &[], "200"),
    ] {
        let got = status(&lab.a, path, args)?;
        ensure!(got == wanted, "{args:?} {path}: {got}");
    }
    let long = format!("X-Long: {}", "x".repeat(100_000));
    // Refused, or cut off while curl is still sending.
    let long = status(&lab.a, "/metrics", &["-H", &long]);
    ensure!(long.as_ref().map_or(true, |code| code == "431"), "a long head was taken: {long:?}");
    // Clients that say nothing, or no HTTP, are put out in time, and others get their turn.
    let open = || lab.a.enter(|| Ok(TcpStream::connect(("127.0.0.1", PORT.parse()?))?));
    let mut silent: Vec<TcpStream> = (0..40).map(|_| open()).collect::<Result<_>>()?;
    let mut noise = open()?;
    noise.write_all(b"\0\xff\x16\x03\x01garbage\r\n\r\n")?;
    ensure!(get(&lab.a, "/metrics", &[])?.contains("vxmon_build_info"), "nobody else is served");
    let mut rest = Vec::new();
    noise.set_read_timeout(Some(LIMIT))?;
    let _ = noise.read_to_end(&mut rest);
    let silent_one = &mut silent[0];
    silent_one.set_read_timeout(Some(LIMIT))?;
    ensure!(silent_one.read(&mut [0; 64]).is_ok(), "it is kept for ever");
    ensure!(vxmon.is_running()?, "it ended");
    drop(silent);
    vxmon.stop()?.adds_up()
}

/// The commands of README's "Leave it running", in a mount namespace of their own, so that paths are those of README.
#[test]
fn the_commands_of_readme_run() -> Result<()> {
    if !skip::root_or_skip("the_commands_of_readme_run") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    let _server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let readme = support::read("README.md");
    let section = readme.split("## Leave it running").nth(1).context("no such section")?;
    let commands = section.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).context("no commands")?;
    // A request between the start and the first look.
    let (first, rest) = commands.split_once("vxmon tail").context("no tail")?;
    let url = format!("http://{}/", lab.service_socket(Family::V4));
    let script = format!(
        "mount -t tmpfs none /run; mount -t tmpfs none /var/log; set -e\ntrap 'kill $! 2>/dev/null || true' EXIT\nmkdir /run/bin; ln -s '{}' /run/bin/vxmon; \
         PATH=/run/bin:$PATH\n{first}\ncurl -s --max-time 0.2 {url} || true; sleep 2.5\nvxmon tail{rest}\n\
         kill $!; wait $! || true; cat /var/log/vxmon.log\n",
        vxmon_tests::vxmon::binary()?.display()
    );
    let mut command = lab.a.command("bash");
    let output = command.args(["-c", &script]).stdin(Stdio::null()).output()?;
    let (said, warned) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{said}{warned}");
    let lines: Vec<&str> = said.lines().collect();
    let count = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
    ensure!(lines.first() == Some(&"ok"), "{said}");
    // By tail, and in the file.
    ensure!(count("uplink nat-stale-port 10.0.100.3:") == 2, "{said}");
    ensure!(count("\"verdict\":\"nat-stale-port\"") == 1, "{said}");
    ensure!(
        count("vxmon_packets_total{device=\"uplink\",role=\"uplink\",verdict=\"nat-stale-port\"} 1") == 1,
        "{said}"
    );
    ensure!(count("packets checked in") == 1, "no summary in the file: {said}");
    Ok(())
}

#[test]
fn an_address_that_is_taken_is_said() -> Result<()> {
    if !skip::root_or_skip("an_address_that_is_taken_is_said") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let vxmon = attach(&lab, &[])?;
    let second = Vxmon::start(&lab.a, &["--metrics", PORT])?.wait(LIMIT)?;
    ensure!(second.status.code() == Some(2) && second.stderr.lines().count() == 1, "{second:#?}");
    ensure!(second.stderr.contains("127.0.0.1:9560") && second.stderr.contains("--metrics ADDR"), "{}", second.stderr);
    // On loopback only, since no host was given.
    let outside = format!("http://{}:{PORT}/metrics", Side::A.underlay(Family::V4));
    ensure!(lab.a.run("curl", &["-s", "--max-time", "5", &outside]).is_err(), "not on loopback only");
    vxmon.stop()?.adds_up()
}

#[test]
fn alert_rules_do_what_they_say() -> Result<()> {
    if Command::new("promtool").arg("--version").output().is_err() {
        bail!("there is no promtool: `cargo xtask setup`");
    }
    let rules = deploy("prometheus/vxmon.rules.yml").display().to_string();
    promtool(&["check", "rules", &rules], "")?;
    promtool(&["check", "config", &deploy("prometheus/prometheus.yml").display().to_string()], "")?;
    promtool(&["test", "rules", &deploy("prometheus/vxmon.rules.test.yml").display().to_string()], "")?;
    // The tests know each alert.
    let tests = fs::read_to_string(deploy("prometheus/vxmon.rules.test.yml"))?;
    for alert in alerts()? {
        ensure!(tests.matches(&format!("alertname: {alert}\n")).count() > 0, "{alert} is not tested");
    }
    Ok(())
}

fn alerts() -> Result<Vec<String>> {
    let text = fs::read_to_string(deploy("prometheus/vxmon.rules.yml"))?;
    Ok(text.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).map(str::to_owned).collect())
}

/// Prometheus in node a. Killed when dropped.
struct Prometheus<'lab> {
    child: Child,
    node: &'lab Netns,
    directory: Scratch,
}

impl<'lab> Prometheus<'lab> {
    fn start(node: &'lab Netns) -> Result<Self> {
        let directory = Scratch::directory("prometheus")?;
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [\"{}\"]\n\
             scrape_configs: [{{ job_name: vxmon, static_configs: [{{ targets: [\"127.0.0.1:{PORT}\"] }}] }}]\n",
            deploy("prometheus/vxmon.rules.yml").display()
        );
        let file = directory.0.join("prometheus.yml");
        fs::write(&file, config)?;
        let log = fs::File::create(directory.0.join("log"))?;
        let child = node
            .command("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.0.join("data").display()))
            .arg("--web.listen-address=127.0.0.1:9090")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot run prometheus: `cargo xtask setup`")?;
        Ok(Self { child, node, directory })
    }

    fn api(&self, path: &str, query: Option<&str>) -> Result<Value> {
        let url = format!("http://127.0.0.1:9090/api/v1/{path}");
        let query = query.map(|query| format!("query={query}"));
        let mut args = vec!["-s", "-S", "-G", "--max-time", "30"];
        if let Some(query) = &query {
            args.extend(["--data-urlencode", query]);
        }
        args.push(&url);
        let text = self.node.run("curl", &args)?;
        let answer: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        ensure!(answer["status"] == "success", "{query:?}: {answer}");
        Ok(answer["data"].clone())
    }

    /// The result of a query: values by labels.
    fn query(&self, query: &str) -> Result<Vec<Value>> {
        Ok(self.api("query", Some(query))?["result"].as_array().cloned().unwrap_or_default())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.0.join("log")).unwrap_or_default()
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_real_prometheus_scrapes_a_live_lab_and_alerts() -> Result<()> {
    if !skip::root_or_skip("a_real_prometheus_scrapes_a_live_lab_and_alerts") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    lab.rules(&Rules::default())?;
    let _server = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let statistics = BpfStatistics::on()?;
    let socket = Scratch::directory("scraped")?;
    let vxmon = attach(&lab, &["--socket", &socket.0.join("s").display().to_string()])?;
    let prometheus = Prometheus::start(&lab.a)?;
    let broken = "sum(vxmon_packets_total{verdict=\"nat-stale-port\"})";
    let value = |result: &[Value]| result.first().and_then(|sample| sample["value"][1].as_str()?.parse::<f64>().ok());
    let scraped = until("a first scrape", || Ok(prometheus.query(broken).ok().as_deref().and_then(value)));
    let scraped = scraped.with_context(|| prometheus.log())?;
    ensure!(scraped == 0.0, "{scraped}");
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "no fault");
    ensure!(vxmon.wait_events(1, LIMIT).len() == 1, "not reported");
    until("the fault is scraped", || Ok(value(&prometheus.query(broken)?).filter(|n| *n == 1.0)))?;
    // Nothing that Prometheus could not read.
    let targets = prometheus.api("targets", None)?;
    let target = &targets["activeTargets"][0];
    ensure!(target["health"] == "up" && target["lastError"] == "", "{target}");
    let alerts = until("the alert", || {
        let firing = prometheus.api("alerts", None)?["alerts"].as_array().cloned().unwrap_or_default();
        let named = |name: &str| firing.iter().any(|alert| alert["labels"]["alertname"] == name);
        Ok(named("VxmonNatBreaksChecksums").then_some(firing))
    })?;
    let others = alerts.iter().filter(|alert| alert["labels"]["alertname"] != "VxmonNatBreaksChecksums").count();
    ensure!(alerts[0]["state"] == "firing" && others == 0, "{alerts:#?}");
    // A second look for `rate`, then each query of the dashboard has an answer.
    for query in dashboard_queries()? {
        until(&format!("an answer to {query}"), || Ok((!prometheus.query(&query)?.is_empty()).then_some(())))?;
    }
    drop(statistics);
    // Each metric that rules and dashboard name is one that there is.
    let known: BTreeSet<String> = samples(&get(&lab.a, "/metrics", &[])?)
        .into_keys()
        .map(|key| key.split('{').next().unwrap_or_default().to_owned())
        .collect();
    // README has each, and no other.
    let readme = support::read("README.md");
    let table = readme.split("| metric |").nth(1).and_then(|rest| rest.split("\n\n").next()).context("no table")?;
    let rows = table.lines().filter_map(|row| row.split(" | ").next());
    let documented: BTreeSet<String> =
        rows.flat_map(|row| row.split('`')).filter(|word| word.starts_with("vxmon_")).map(str::to_owned).collect();
    let missing: Vec<_> =
        known.iter().filter(|name| name.starts_with("vxmon_")).filter(|name| !documented.contains(*name)).collect();
    ensure!(missing.is_empty(), "README does not explain {missing:?}");
    // Comes only once a connection has ended.
    let absent: Vec<_> =
        documented.difference(&known).filter(|name| *name != "vxmon_affected_connections_total").collect();
    ensure!(absent.is_empty(), "README explains {absent:?}, which there are not");
    let rules = fs::read_to_string(deploy("prometheus/vxmon.rules.yml"))?;
    let dashboard = fs::read_to_string(deploy("grafana/vxmon.json"))?;
    let named: BTreeSet<&str> = [&rules, &dashboard]
        .into_iter()
        .flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter(|word| word.starts_with("vxmon_") || word.starts_with("process_"))
        .collect();
    ensure!(named.len() > 8, "{named:?}");
    for name in named {
        ensure!(known.contains(name), "{name} is not among {known:#?}");
    }
    vxmon.stop()?.adds_up()
}

/// The dashboard's queries, with Grafana's variables filled in.
fn dashboard_queries() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(deploy("grafana/vxmon.json"))?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let queries: Vec<String> = targets
        .filter_map(|target| target["expr"].as_str())
        .map(|expr| expr.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$instance", ".*"))
        .collect();
    ensure!(queries.len() > 10 && queries.iter().all(|query| !query.contains('$')), "{queries:#?}");
    Ok(queries)
}

/// The kernel counts run times as long as this lives. They cost each run some nanoseconds, on the whole machine.
struct BpfStatistics(String);

impl BpfStatistics {
    const PATH: &str = "/proc/sys/kernel/bpf_stats_enabled";

    fn on() -> Result<Self> {
        let before = fs::read_to_string(Self::PATH)?;
        fs::write(Self::PATH, "1")?;
        Ok(Self(before))
    }
}

impl Drop for BpfStatistics {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, self.0.trim());
    }
}
