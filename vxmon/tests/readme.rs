//! Keeps README.md true: its options, verdicts, samples and commands are compared with the program.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    process::{Command, Stdio},
};

use serde_json::Value;
use support::{Schema, read};
use vxmon::{
    event::{
        Anomalies, Anomaly, Attached, Attempt, Cause, Connections, Csum, Ct, DeviceSummary, Ending, Endpoints, Flow,
        Inner, Line, LostByStage, Nat, NatRule, Packet, Packets, Record, Summary,
    },
    sink::{Explain, Format, Paint, Printer, render},
};
use vxmon_common::judge::{Reason, Verdict};

const SAMPLE: &str = "docs/event.sample.jsonl";

/// The first column of the table whose header begins with `header`, and each whole row.
fn table(readme: &str, header: &str) -> Vec<(String, String)> {
    let start = format!("| {header} |");
    let rows: Vec<_> = readme
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .filter_map(|row| Some((row.split('`').nth(1)?.to_owned(), row.to_owned())))
        .collect();
    assert!(!rows.is_empty(), "README has no table {header}");
    rows
}

/// The code blocks of a language.
fn blocks<'readme>(readme: &'readme str, language: &str) -> Vec<&'readme str> {
    let fence = format!("```{language}\n");
    readme.split(fence.as_str()).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

fn vxmon(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_vxmon")).args(args).output().unwrap()
}

fn samples() -> Vec<Value> {
    read(SAMPLE).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn options_are_those_of_the_help() {
    let readme = read("README.md");
    // In `--format text|json`, the bar is escaped for Markdown.
    let documented = table(&readme, "option");
    let help = String::from_utf8(vxmon(&["attach", "--help"]).stdout).unwrap();
    let flags = |text: &str| -> BTreeSet<String> {
        text.split_whitespace()
            .filter(|word| word.starts_with("--"))
            .map(|word| word.trim_end_matches([',', '.']).to_owned())
            .collect()
    };
    let visible: BTreeSet<String> = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .flat_map(flags)
        .filter(|flag| flag != "--help" && flag != "--version")
        .collect();
    let named: BTreeSet<String> = documented.iter().flat_map(|(option, _)| flags(option)).collect();
    assert_eq!(named, visible);
    assert!(readme.contains(help.lines().find_map(|line| line.strip_prefix("Usage: ")).unwrap()));

    for (option, row) in &documented {
        let flag = option.split(' ').next().unwrap();
        let about = help.split(&format!("{flag} <")).nth(1).unwrap_or_default();
        let about = about.split("\n      --").next().unwrap();
        // Default and possible values, where there are any.
        if let Some(default) = about.split("[default: ").nth(1).and_then(|rest| rest.split(']').next()) {
            assert!(row.contains(&format!("| {default} |")), "default of {flag}: {default}");
        }
        let values: Vec<_> = about
            .lines()
            .filter_map(|line| Some(line.trim().strip_prefix("- ")?.split(':').next().unwrap_or_default()))
            .collect();
        if !values.is_empty() {
            assert_eq!(option.replace('\\', ""), format!("{flag} {}", values.join("|")));
        }
    }
}

/// The options of other verbs than `attach` are in tables of their own.
#[test]
fn options_of_other_verbs_are_those_of_the_help() {
    for verb in ["tail", "check", "mitigate"] {
        options_are_documented(verb);
    }
}

fn options_are_documented(verb: &str) {
    let flags = |text: &str| -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        words.filter(|word| word.starts_with("--") && word.len() > 2).map(str::to_owned).collect()
    };
    let help = String::from_utf8(vxmon(&[verb, "--help"]).stdout).unwrap();
    let visible = help.lines().filter(|line| line.trim_start().starts_with('-')).flat_map(flags);
    let general = ["--help", "--version", "--verbose"];
    let visible: BTreeSet<String> = visible.filter(|flag| !general.contains(&flag.as_str())).collect();
    let named: BTreeSet<String> =
        table(&read("README.md"), &format!("`{verb}` option")).iter().flat_map(|(_, row)| flags(row)).collect();
    assert_eq!(named, visible);
}

#[test]
fn documented_commands_are_refused_or_run_as_said() {
    let unknown = vxmon(&["attach", "--no-such-option"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(unknown.stdout.is_empty());
    let cannot = vxmon(&["attach", "--duration", "1s", "--output", "/no/such/directory/file"]);
    assert_eq!(cannot.status.code(), Some(2));
    assert_eq!(String::from_utf8(cannot.stderr).unwrap().lines().count(), 1);
}

#[test]
fn every_verdict_and_reason_is_explained() {
    let readme = read("README.md");
    let verdicts = table(&readme, "verdict");
    assert_eq!(verdicts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), Verdict::ALL.map(Verdict::name));
    for (verdict, (_, row)) in Verdict::ALL.into_iter().zip(&verdicts) {
        assert_eq!(row.contains("| yes |"), verdict.is_anomaly(), "{row}");
    }
    let reasons = table(&readme, "reason");
    assert_eq!(reasons.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), Reason::ALL.map(Reason::name));
}

#[test]
fn samples_are_as_the_schema_says() {
    let (readme, kept) = (read("README.md"), read(SAMPLE));
    let schema = Schema::of_docs();
    for line in samples() {
        assert_eq!(schema.check(&line), Ok(()), "{line}");
    }
    let json = blocks(&readme, "json");
    assert_eq!(json.len(), 1);
    assert!(kept.lines().any(|line| line == json[0].trim_end()), "the line in README is not one of {SAMPLE}");

    let summary = samples().pop().unwrap();
    assert_eq!(summary["type"], "summary");
    let packets = &summary["packets"];
    let names = |field: &str| packets[field].as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names("verdicts"), Verdict::ALL.map(|verdict| verdict.name().to_owned()).into());
    assert_eq!(names("unverified"), Reason::ALL.map(|reason| reason.name().to_owned()).into());
    let sum = |field: &str| packets[field].as_object().unwrap().values().filter_map(Value::as_u64).sum::<u64>();
    assert_eq!(Some(sum("verdicts") + sum("unverified")), packets["seen"].as_u64());
}

/// The text in README is what the program makes of the events in the sample file: both formats, byte by byte.
/// `VXMON_BLESS=1 cargo test -p vxmon --test readme` takes both over from that file, which is a real run's output.
#[test]
fn the_text_sample_is_what_is_printed() {
    let readme = read("README.md");
    let mut text = String::new();
    let mut printer = Printer::new(Format::Text, Explain::Auto, Paint::PLAIN, String::new());
    for (value, written) in samples().iter().zip(read(SAMPLE).lines()) {
        let record = match value["type"].as_str().unwrap() {
            "attached" => attached(value),
            "anomaly" => anomaly(value),
            "recovered" => Record::Recovered(Box::new(ending(value))),
            "summary" => summary(value),
            other => panic!("a sample of type {other}"),
        };
        let line = Line::from(record);
        assert_eq!(render(Format::Json, &line).trim_end(), written);
        text += printer.render(&line).trim_end();
        text += "\n";
    }
    if std::env::var_os("VXMON_BLESS").is_some_and(|bless| bless == "1") {
        let kept = read(SAMPLE);
        let anomaly = kept.lines().find(|line| line.contains("\"type\":\"anomaly\"")).unwrap();
        let blessed = readme
            .replace(blocks(&readme, "text")[0], &text)
            .replace(blocks(&readme, "json")[0], &format!("{anomaly}\n"));
        std::fs::write(support::path("README.md"), blessed).unwrap();
        return;
    }
    assert_eq!(blocks(&readme, "text"), [text]);
}

/// The commands in README that read something do with it what README says.
#[test]
fn filters_do_what_is_said() {
    let readme = read("README.md");
    let shell: Vec<&str> = blocks(&readme, "sh").into_iter().flat_map(str::lines).collect();

    let rules = shell.iter().find_map(|line| line.strip_prefix("iptables-save -t nat | ")).unwrap();
    let old = ":KUBE-POSTROUTING - [0:0]\n-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring \
               SNAT\" -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully\n";
    let fixed = "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
                 -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
                 -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
                 -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE \
                 --random-fully\n";
    assert_eq!(pipe(rules, old).lines().count(), 1);
    assert_eq!(pipe(rules, fixed), "");

    if Command::new("jq").arg("--version").output().is_err() {
        println!("skipped: there is no jq");
        return;
    }
    let printed: Vec<String> =
        shell.iter().filter(|line| line.starts_with("jq ")).map(|filter| pipe(filter, &read(SAMPLE))).collect();
    let samples = samples();
    let of_type = |kind: &str| samples.iter().find(|sample| sample["type"] == kind).unwrap();
    let (bad, recovered) = (of_type("anomaly"), of_type("recovered"));
    assert_eq!(
        printed,
        [
            format!(
                "{}\tnat-stale-port\t{}\t{}\t10.244.0.0\t10.244.2.73\n",
                bad["ts"].as_str().unwrap(),
                bad["ct"]["orig"]["sport"],
                bad["outer"]["sport"]
            ),
            format!("10.244.0.0\t10.244.2.73\tconnected\t{}\t1\tsource-port\n", recovered["after_ms"]),
            "{\"lco-valid\":6,\"nat-stale-port\":1,\"pending\":7}\n".to_owned(),
            "{\"ring\":0,\"queue\":0,\"capture\":0}\n".to_owned(),
        ]
    );
}

/// Runs a shell command on some text.
fn pipe(command: &str, input: &str) -> String {
    let mut shell = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    shell.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = shell.wait_with_output().unwrap();
    assert!(output.stderr.is_empty(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn files_that_are_linked_to_exist() {
    for document in ["README.md", "CHANGELOG.md", "docs/architecture.md", "docs/journal.md", "docs/security.md"] {
        let directory = support::path(document).parent().unwrap().to_owned();
        for target in read(document).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.starts_with('#') && !target.contains("://") {
                assert!(directory.join(target).exists(), "{document} links to {target}");
            }
        }
    }
}

fn leak(value: &Value) -> &'static str {
    text(value).leak()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn number<T: TryFrom<u64, Error: std::fmt::Debug>>(value: &Value) -> T {
    value.as_u64().unwrap().try_into().unwrap()
}

fn attached(value: &Value) -> Record {
    Record::Attached(Attached {
        ts: text(&value["ts"]),
        node: text(&value["node"]),
        dev: text(&value["dev"]),
        ifindex: number(&value["ifindex"]),
        role: leak(&value["role"]),
        why: value["why"].as_array().unwrap().iter().map(text).collect(),
        hook: leak(&value["hook"]),
        metadata: leak(&value["metadata"]),
        transport: value["transport"].as_str().map(|transport| &*transport.to_owned().leak()),
        fallback: value["fallback"].as_str().map(str::to_owned),
        nat_probe: value["nat_probe"].as_str().map(|probe| &*probe.to_owned().leak()),
        missing: value["missing"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, why)| (&*name.clone().leak(), text(why)))
            .collect(),
    })
}

fn endpoints(value: &Value) -> Endpoints {
    Endpoints {
        src: text(&value["src"]),
        sport: number(&value["sport"]),
        dst: text(&value["dst"]),
        dport: number(&value["dport"]),
    }
}

fn nat_rule(value: &Value) -> NatRule {
    NatRule {
        rule: text(&value["rule"]),
        backend: leak(&value["backend"]),
        table: text(&value["table"]),
        chain: text(&value["chain"]),
        position: number(&value["position"]),
        handle: value["handle"].as_u64(),
    }
}

fn nat(value: &Value) -> Nat {
    let some = |field: &str| value[field].as_str().map(str::to_owned);
    let rule = |field: &str| value.get(field).map(nat_rule);
    let rules = |field: &str| value[field].as_array().into_iter().flatten().map(nat_rule).collect();
    Nat {
        random_fully: leak(&value["random_fully"]),
        range_flags: value["range_flags"].as_array().map(|flags| flags.iter().map(leak).collect()),
        rule: some("rule"),
        backend: value["backend"].as_str().map(|backend| &*backend.to_owned().leak()),
        table: some("table"),
        chain: some("chain"),
        position: value.get("position").map(number),
        handle: value["handle"].as_u64(),
        changing: value["changing"] == true,
        reason: some("reason"),
        mark: some("mark"),
        why: value["why"].as_str().map(|why| &*why.to_owned().leak()),
        set_by: rules("set_by"),
        cleared_by: rule("cleared_by"),
        ahead: rule("ahead"),
        candidates: rules("candidates"),
        unknown: rules("unknown"),
    }
}

fn anomaly(value: &Value) -> Record {
    let (csum, inner, ct, nat) = (&value["csum"], &value["inner"], &value["ct"], &value["nat"]);
    Record::Anomaly(Box::new(Anomaly {
        ts: text(&value["ts"]),
        node: text(&value["node"]),
        dev: text(&value["dev"]),
        ifindex: number(&value["ifindex"]),
        role: leak(&value["role"]),
        verdict: leak(&value["verdict"]),
        csum: Csum {
            seen: text(&csum["seen"]),
            expected: csum["expected"].as_str().map(str::to_owned),
            state: leak(&csum["state"]),
            start: Some(number(&csum["start"])),
            gso_size: number(&csum["gso_size"]),
        },
        outer: Some(endpoints(&value["outer"])),
        vni: Some(number(&value["vni"])),
        vxlan_dev: value["vxlan_dev"].as_str().map(str::to_owned),
        inner: Some(Inner {
            proto: text(&inner["proto"]),
            src: text(&inner["src"]),
            sport: Some(number(&inner["sport"])),
            dst: text(&inner["dst"]),
            dport: Some(number(&inner["dport"])),
            flags: inner["flags"].as_str().map(str::to_owned),
            seq: Some(number(&inner["seq"])),
        }),
        mark: value["mark"].as_str().map(str::to_owned),
        ct: Some(Ct {
            orig: endpoints(&ct["orig"]),
            reply: endpoints(&ct["reply"]),
            status: ct["status"].as_array().unwrap().iter().map(leak).collect(),
            source: leak(&ct["source"]),
        }),
        nat: Some(self::nat(nat)),
        cause: Some(Cause {
            predicted: value["cause"]["predicted"].as_str().map(str::to_owned),
            proved: value["cause"]["proved"] == true,
            right_for_sport: None,
        }),
        flow: Some(Flow {
            attempt: number(&value["flow"]["attempt"]),
            since_first_ms: number(&value["flow"]["since_first_ms"]),
            conntrack_timeout_s: value["flow"]["conntrack_timeout_s"].as_u64(),
            expected_recovery: value["flow"]["expected_recovery"].as_str().map(str::to_owned),
            expected_by: value["flow"]["expected_by"].as_str().map(|_| leak(&value["flow"]["expected_by"])),
            rewritten_anew: value["flow"]["rewritten_anew"] == true,
        }),
        suppressed: number(&value["suppressed"]),
        missing: BTreeMap::new(),
        packet: Packet::default(),
    }))
}

fn ending(value: &Value) -> Ending {
    let inner = &value["inner"];
    Ending {
        ts: text(&value["ts"]),
        node: text(&value["node"]),
        dev: text(&value["dev"]),
        ifindex: number(&value["ifindex"]),
        vni: value["vni"].as_u64().map(|vni| vni as u32),
        inner: Inner {
            proto: text(&inner["proto"]),
            src: text(&inner["src"]),
            sport: Some(number(&inner["sport"])),
            dst: text(&inner["dst"]),
            dport: Some(number(&inner["dport"])),
            flags: None,
            seq: None,
        },
        outcome: leak(&value["outcome"]),
        after_ms: number(&value["after_ms"]),
        bad_packets: number(&value["bad_packets"]),
        bad_syns: number(&value["bad_syns"]),
        last_bad_ms: number(&value["last_bad_ms"]),
        first_good_ms: value["first_good_ms"].as_u64(),
        by: value["by"].as_str().map(|_| leak(&value["by"])),
        expected_recovery: value["expected_recovery"].as_str().map(str::to_owned),
        attempts: value["attempts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|attempt| Attempt {
                after_ms: number(&attempt["after_ms"]),
                sport: attempt["sport"].as_u64().map(|port| port as u16),
                bad: attempt["bad"] == true,
            })
            .collect(),
    }
}

fn summary(value: &Value) -> Record {
    let devices = value["devices"].as_array().unwrap().iter().map(|device| DeviceSummary {
        dev: text(&device["dev"]),
        ifindex: number(&device["ifindex"]),
        role: leak(&device["role"]),
        packets: packets(&device["packets"]),
    });
    Record::Summary(Summary {
        ts: text(&value["ts"]),
        node: text(&value["node"]),
        packets: packets(&value["packets"]),
        devices: devices.collect(),
        connections: Connections {
            bad: number(&value["connections"]["bad"]),
            recovered: number(&value["connections"]["recovered"]),
            not_recovered: number(&value["connections"]["not_recovered"]),
            open: number(&value["connections"]["open"]),
            evicted: number(&value["connections"]["evicted"]),
            untold: number(&value["connections"]["untold"]),
        },
        seconds: value["seconds"].as_f64().unwrap(),
    })
}

fn packets(value: &Value) -> Packets {
    let counts = |field: &str| -> BTreeMap<&'static str, u64> {
        let counts = value[field].as_object().unwrap();
        counts.iter().map(|(name, count)| (&*name.clone().leak(), number(count))).collect()
    };
    let (anomalies, lost) = (&value["anomalies"], &value["lost"]);
    Packets {
        seen: number(&value["seen"]),
        other: number(&value["other"]),
        counted_above: number(&value["counted_above"]),
        verdicts: counts("verdicts"),
        unverified: counts("unverified"),
        anomalies: Anomalies { reported: number(&anomalies["reported"]), suppressed: number(&anomalies["suppressed"]) },
        lost: LostByStage {
            ring: number(&lost["ring"]),
            queue: number(&lost["queue"]),
            capture: number(&lost["capture"]),
        },
    }
}
