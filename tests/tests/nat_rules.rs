//! The NAT rule that an anomaly names, and why: each home of rules alone and together, with the rules of kube-proxy in its
//! modes, Calico and flannel, and with rules that must not be named.

use std::{collections::BTreeSet, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vxmon::{
    netlink::ruleset::News,
    rules::{Backend as Home, Keep, Snapshot, render},
};
use vxmon_tests::{
    Backend, Capture, Family, Lab, LabOptions, Netns, RuleForm, Rules, Vxmon, cmd,
    counters::conntrack_vxlan,
    skip,
    traffic::{self, HttpServer, UdpClient, UdpMode},
};

const LIMIT: Duration = Duration::from_secs(10);
/// Long enough for the first SYN, shorter than its retry.
const A_MOMENT: Duration = Duration::from_millis(120);
/// Rules are what is tested here: what the kernel is seen to do is left out (`observed.rs`).
const JSON: [&str; 3] = ["--format", "json", "--no-nat-probe"];
const OLD: &str = "-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully";
const FIXED: &str = "-A KUBE-POSTROUTING -j MASQUERADE --random-fully";
const MARK: &str = "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000";
const CLEAR: &str = "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0";

fn lab(rules: &[Rules]) -> Result<Lab> {
    let lab = LabOptions::default().build()?;
    for rules in rules {
        lab.rules(rules)?;
    }
    Ok(lab)
}

fn of(backend: Backend, form: RuleForm) -> Rules {
    Rules { backend, form, ..Rules::default() }
}

/// Gives text to a program in the namespace.
fn give(node: &Netns, program: &str, args: &[&str], text: &str) -> Result<()> {
    cmd::run_with_input(node.command(program).args(args), text).map(drop)
}

fn iptables(lab: &Lab, text: &str) -> Result<()> {
    give(&lab.a, "iptables-nft-restore", &["--noflush"], &format!("*nat\n{text}COMMIT\n"))
}

/// The first bad packet of a connection to the service, as vxmon tells it.
fn anomaly(lab: &Lab) -> Result<Value> {
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    let event = next(lab, &vxmon, 1)?;
    vxmon.stop()?.adds_up()?;
    Ok(event)
}

/// Opens a connection, and waits for its bad packet, which is number `count` of all.
fn next(lab: &Lab, vxmon: &Vxmon, count: usize) -> Result<Value> {
    ensure!(traffic::http_get(&lab.a, lab.service_socket(Family::V4), A_MOMENT).is_err(), "connected at once");
    let events = vxmon.wait_events(count, LIMIT);
    events.get(count - 1).cloned().with_context(|| format!("event {count} of {events:#?} did not come"))
}

/// Fails unless each of these fields of the section `nat` has this value.
fn says(event: &Value, wanted: &[(&str, Value)]) -> Result<()> {
    for (path, wanted) in wanted {
        let found = event["nat"].pointer(path).unwrap_or(&Value::Null);
        ensure!(found == wanted, "{path} is {found}, not {wanted}, in {:#}", event["nat"]);
    }
    Ok(())
}

const fn name(backend: Backend) -> &'static str {
    match backend {
        Backend::IptablesLegacy => "iptables-legacy",
        Backend::IptablesNft => "iptables-nft",
        Backend::Nftables => "nftables",
    }
}

#[test]
fn each_home_says_why() -> Result<()> {
    if !skip::root_or_skip("each_home_says_why") {
        return Ok(());
    }
    for backend in Backend::ALL {
        let native = backend == Backend::Nftables;
        let words = |iptables: &'static str, nft: &'static str| Value::from(if native { nft } else { iptables });
        let old = || words(OLD, "meta mark & 0x00004000 != 0x00000000 masquerade fully-random");
        let fixed = || words(FIXED, "masquerade fully-random");
        let mark = || words(MARK, "meta mark set meta mark | 0x00004000");
        let clear = || words(CLEAR, "meta mark set meta mark ^ 0x00004000");
        let snat = words(
            "-A POSTROUTING -d 10.244.2.0/24 -j SNAT --to-source 10.244.0.0",
            "ip daddr 10.244.2.0/24 snat to 10.244.0.0",
        );
        let common = [
            ("/random_fully", Value::from("rule")),
            ("/backend", name(backend).into()),
            ("/mark", "0x4000".into()),
            ("/set_by/0/rule", mark()),
            ("/chain", words("KUBE-POSTROUTING", "masquerading")),
            ("/table", words("ip nat", "ip kube-proxy")),
        ];
        for (form, particular) in [
            (
                RuleForm::Before1179,
                vec![("/rule", old()), ("/why", "mark-not-cleared".into()), ("/position", 1.into())],
            ),
            (
                RuleForm::OldBeforeFixed,
                vec![
                    ("/rule", old()),
                    ("/why", "old-rule-first".into()),
                    ("/cleared_by/rule", clear()),
                    ("/cleared_by/position", 3.into()),
                ],
            ),
            (
                RuleForm::SnatBeforeFixed,
                vec![
                    ("/rule", fixed()),
                    ("/why", "snat-ahead".into()),
                    ("/ahead/rule", snat),
                    ("/cleared_by/rule", clear()),
                    ("/position", 3.into()),
                ],
            ),
        ] {
            let event = anomaly(&lab(&[of(backend, form)])?)?;
            let context = || format!("{backend:?} {form:?}: {event:#}");
            says(&event, &common).with_context(context)?;
            says(&event, &particular).with_context(context)?;
            let has_handle = event["nat"]["handle"].is_u64();
            ensure!(has_handle == (backend != Backend::IptablesLegacy), "{}", context());
        }
    }
    Ok(())
}

/// Rules with random-fully that this packet does not meet: mark, device, address, protocol, port, family.
#[test]
fn a_decoy_is_not_named() -> Result<()> {
    if !skip::root_or_skip("a_decoy_is_not_named") {
        return Ok(());
    }
    let decoys = "-A POSTROUTING -m mark --mark 0x8000/0x8000 -j MASQUERADE --random-fully\n\
                  -A POSTROUTING -o elsewhere0 -j MASQUERADE --random-fully\n\
                  -A POSTROUTING ! -o uplin+ -j MASQUERADE --random-fully\n\
                  -A POSTROUTING -d 10.0.101.0/24 -j MASQUERADE --random-fully\n\
                  -A POSTROUTING -p tcp -m tcp --dport 8472 -s 10.0.100.3 -j MASQUERADE --random-fully\n\
                  -A POSTROUTING -p udp -m udp --dport 4789 -j MASQUERADE --random-fully\n\
                  -A POSTROUTING -p udp -m multiport --dports 53,4000:8471 -j SNAT --to-source 10.0.100.3 --random-fully\n\
                  -A POSTROUTING -o uplink -m addrtype --dst-type LOCAL -j MASQUERADE --random-fully\n";
    let native = "table ip decoy { chain post { type nat hook postrouting priority 90; \
                  oifname \"uplink\" meta mark & 0xc000 == 0x8000 masquerade fully-random; \
                  udp dport { 53, 4789, 9000-9999 } masquerade fully-random; \
                  ip daddr { 10.0.101.0/24, 10.0.100.16-10.0.100.20 } oifname \"uplink\" masquerade fully-random; \
                  oifname \"uplink\" fib daddr type local masquerade fully-random; }; }\n\
                  table ip6 decoy { chain post { type nat hook postrouting priority 90; masquerade fully-random; }; }\n";
    for backend in Backend::ALL {
        let lab = LabOptions::default().build()?;
        for program in ["iptables-legacy-restore", "iptables-nft-restore"] {
            give(&lab.a, program, &["--noflush"], &format!("*nat\n{decoys}COMMIT\n"))?;
        }
        give(&lab.a, "nft", &["-f", "-"], native)?;
        lab.rules(&of(backend, RuleForm::Before1179))?;
        let event = anomaly(&lab)?;
        let rule = if backend == Backend::Nftables {
            "meta mark & 0x00004000 != 0x00000000 masquerade fully-random"
        } else {
            OLD
        };
        says(&event, &[("/rule", rule.into()), ("/random_fully", "rule".into()), ("/backend", name(backend).into())])
            .with_context(|| format!("{backend:?}"))?;
    }
    Ok(())
}

/// Old rules in one home and fixed ones in another: which of them came first shows in the mark. Old ones in two: nobody can
/// tell, so nobody is told.
#[test]
fn homes_together() -> Result<()> {
    if !skip::root_or_skip("homes_together") {
        return Ok(());
    }
    let old = of(Backend::IptablesNft, RuleForm::Before1179);
    // What is registered later is asked first, so the old ones are; the fixed ones would clear the inner packet's mark.
    let event = anomaly(&lab(&[of(Backend::IptablesLegacy, RuleForm::Fixed), old])?)?;
    let (backend, rule) = if event["mark"] == "0x4000" { ("iptables-nft", OLD) } else { ("iptables-legacy", FIXED) };
    says(&event, &[("/random_fully", "rule".into()), ("/backend", backend.into()), ("/rule", rule.into())])?;

    let event = anomaly(&lab(&[old, of(Backend::IptablesLegacy, RuleForm::Before1179)])?)?;
    says(&event, &[("/random_fully", "port-rewritten".into()), ("/rule", Value::Null)])?;
    let homes: BTreeSet<_> =
        event["nat"]["candidates"].as_array().into_iter().flatten().map(|rule| rule["backend"].to_string()).collect();
    ensure!(homes.len() == 2 && event["nat"]["reason"].is_string(), "{:#}", event["nat"]);
    Ok(())
}

/// No rule is needed for a stale sum: a packet whose port NAT has given to another connection gets another one, since the answers
/// to the two could not be told apart (`nf_nat_alloc_null_binding()`, net/netfilter/nf_nat_core.c). No rule is named for it.
#[test]
fn a_port_that_is_taken_is_rewritten_without_a_rule() -> Result<()> {
    if !skip::root_or_skip("a_port_that_is_taken_is_rewritten_without_a_rule") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    // All outer packets have this port.
    let range = |ports: &str| lab.a.sysctl(&[("net.ipv4.ip_local_port_range".to_owned(), ports.to_owned())]);
    let port = lab.options().port;
    lab.a.run(
        "nft",
        &[&format!(
            "table ip taken {{ chain output {{ type filter hook output priority -150; udp dport 53 meta mark set 1; }}; \
             chain postrouting {{ type nat hook postrouting priority 100; meta mark 1 udp dport {port} masquerade to :40000; }}; }}"
        )],
    )?;
    range("41000 41000")?;
    UdpClient::connect(&lab.a, lab.pod_udp(Family::V4))?.send(40, UdpMode::Plain)?;
    range("40000 40000")?;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    let capture = Capture::vxlan(&lab)?;
    let connect = traffic::http_get(&lab.a, lab.pod_socket(Family::V4), A_MOMENT);
    let packets = capture.stop()?;
    let entries = conntrack_vxlan(&lab.a, Family::V4, port)?;
    let mut ports: Vec<_> = entries.iter().map(|entry| (entry.orig.sport, entry.reply.dport)).collect();
    ports.sort_unstable();
    ensure!(matches!(ports[..], [(40_000, other), (41_000, 40_000)] if other != 40_000), "{ports:?}");
    ensure!(connect.is_err() && packets.len() == 1 && packets[0].bad, "{packets:#?}");

    let events = vxmon.wait_events(1, LIMIT);
    let event = events.first().context("no event")?;
    says(event, &[("/random_fully", "port-rewritten".into()), ("/rule", Value::Null), ("/candidates", Value::Null)])?;
    let reason = event["nat"]["reason"].as_str().unwrap_or_default();
    ensure!(event["cause"]["proved"] == true && reason.contains("without any rule"), "{event:#}");
    vxmon.stop()?.adds_up()
}

/// A condition that vxmon cannot read: the rule is kept and shown; another one is named only if it alone can have done it.
#[test]
fn an_unreadable_rule_is_shown() -> Result<()> {
    if !skip::root_or_skip("an_unreadable_rule_is_shown") {
        return Ok(());
    }
    let lab = lab(&[of(Backend::IptablesNft, RuleForm::Before1179)])?;
    iptables(&lab, "-I POSTROUTING 1 -m u32 --u32 \"0x6&0xff=0x11\" -j RETURN\n")?;
    lab.flush_conntrack()?;
    // It does not end here after all: nothing else than the rule behind can have translated a packet.
    lab.a.run(
        "iptables-nft",
        &["-t", "nat", "-R", "POSTROUTING", "1", "-m", "u32", "--u32", "0x6&0xff=0x84", "-j", "RETURN"],
    )?;
    let event = anomaly(&lab)?;
    says(&event, &[("/random_fully", "rule".into()), ("/rule", OLD.into())])?;
    let unknown = event["nat"]["unknown"][0]["rule"].as_str().context("not shown")?;
    ensure!(unknown.contains("u32") && unknown.ends_with("-j RETURN"), "{unknown}");

    // Now it may be this one as well.
    iptables(&lab, "-I POSTROUTING 1 -m u32 --u32 \"0x6&0xff=0x84\" -j MASQUERADE --random-fully\n")?;
    lab.flush_conntrack()?;
    let event = anomaly(&lab)?;
    says(&event, &[("/random_fully", "port-rewritten".into()), ("/rule", Value::Null)])?;
    ensure!(event["nat"]["candidates"].as_array().is_some_and(|all| all.len() == 2), "{:#}", event["nat"]);
    ensure!(event["nat"]["reason"].is_string(), "{:#}", event["nat"]);
    Ok(())
}

/// kube-proxy in ipvs mode marks by sets of ipset, and asks one in POSTROUTING. Calico does so too.
#[test]
fn sets_of_ipset_are_read() -> Result<()> {
    if !skip::root_or_skip("sets_of_ipset_are_read") {
        return Ok(());
    }
    if !cmd::exists("ipset") {
        skip::skip("sets_of_ipset_are_read", "there is no ipset");
        return Ok(());
    }
    let lab = lab(&[of(Backend::IptablesNft, RuleForm::Before1179)])?;
    let sets = "create KUBE-CLUSTER-IP hash:ip,port\nadd KUBE-CLUSTER-IP 10.96.0.10,tcp:9153\n\
                create KUBE-LOOP-BACK hash:ip,port,ip\nadd KUBE-LOOP-BACK 10.244.0.73,tcp:9153,10.244.0.73\n\
                create cali40masq-ipam-pools hash:net\nadd cali40masq-ipam-pools 10.244.0.0/16\n\
                create cali40all-ipam-pools hash:net\nadd cali40all-ipam-pools 10.244.0.0/16\n";
    give(&lab.a, "ipset", &["restore"], sets)?;
    iptables(
        &lab,
        "-D KUBE-SERVICES 1\n\
         -I KUBE-SERVICES 1 -m comment --comment \"Kubernetes service cluster ip + port for masquerade purpose\" \
         -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ\n\
         -I KUBE-POSTROUTING 1 -m comment --comment \"Kubernetes endpoints dst ip:port, source ip for solving hairpin \
         purpose\" -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE --random-fully\n\
         -I POSTROUTING 1 -m comment --comment \"cali:Z-c7XtVd2Bq7s_hA\" -m set --match-set cali40masq-ipam-pools src \
         -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE --random-fully\n",
    )?;
    let event = anomaly(&lab)?;
    says(&event, &[("/random_fully", "rule".into()), ("/rule", OLD.into()), ("/unknown", Value::Null)])?;
    says(&event, &[("/why", "mark-not-cleared".into()), ("/set_by/0/rule", MARK.into())])
}

/// kube-proxy's nftables mode clears the mark, unless another table translates the inner packet before it is asked.
#[test]
fn kube_proxys_nftables_mode() -> Result<()> {
    if !skip::root_or_skip("kube_proxys_nftables_mode") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    give(&lab.a, "nft", &["-f", "-"], KUBE_PROXY)?;
    let snat = "table ip first { chain post { type nat hook postrouting priority 90; \
                oifname \"flannel.1\" ip daddr 10.244.0.0/16 snat to 10.244.0.0 comment \"pods\"; }; }\n";
    give(&lab.a, "nft", &["-f", "-"], snat)?;
    says(
        &anomaly(&lab)?,
        &[
            ("/random_fully", "rule".into()),
            ("/rule", "masquerade fully-random".into()),
            ("/backend", "nftables".into()),
            ("/why", "snat-ahead".into()),
            ("/ahead/rule", "oifname \"flannel.1\" ip daddr 10.244.0.0/16 snat to 10.244.0.0 comment \"pods\"".into()),
            ("/ahead/table", "ip first".into()),
            ("/set_by/0/rule", "meta mark set meta mark | 0x00004000".into()),
            ("/set_by/0/chain", "mark-for-masquerade".into()),
            ("/cleared_by/rule", "meta mark set meta mark ^ 0x00004000".into()),
        ],
    )
}

/// As kube-proxy 1.31 writes it with `masqueradeAll`, for a service of one port.
const KUBE_PROXY: &str = r#"
table ip kube-proxy {
	comment "rules for kube-proxy";
	set cluster-ips { type ipv4_addr; comment "Active ClusterIPs"; elements = { 10.96.0.10 } }
	set nodeport-ips { type ipv4_addr; comment "IPs that accept NodePort traffic"; elements = { 10.0.100.3 } }
	map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to services with no endpoints"; }
	map no-endpoint-nodeports { type inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to service nodeports with no endpoints"; }
	map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; comment "destinations that are subject to LoadBalancerSourceRanges"; }
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; comment "ClusterIP, ExternalIP and LoadBalancer IP traffic";
		elements = { 10.96.0.10 . tcp . 9153 : goto service-JXHVCHZZ-kube-system/kube-dns/tcp/metrics } }
	map service-nodeports { type inet_proto . inet_service : verdict; comment "NodePort traffic"; }
	chain filter-prerouting { type filter hook prerouting priority -110; ct state new jump firewall-check; }
	chain filter-input { type filter hook input priority -110; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }
	chain filter-forward { type filter hook forward priority -110; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
	chain filter-output { type filter hook output priority -110; ct state new jump service-endpoints-check; ct state new jump firewall-check; }
	chain filter-output-post-dnat { type filter hook output priority -90; ct state new jump cluster-ips-check; }
	chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
	chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
	chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
	chain services { ip daddr . meta l4proto . th dport vmap @service-ips; ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports; }
	chain masquerading { meta mark & 0x00004000 == 0x00000000 return; meta mark set meta mark ^ 0x00004000; masquerade fully-random; }
	chain cluster-ips-check { ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"; }
	chain mark-for-masquerade { meta mark set meta mark | 0x00004000; }
	chain reject-chain { reject; }
	chain service-JXHVCHZZ-kube-system/kube-dns/tcp/metrics { ip daddr 10.96.0.10 tcp dport 9153 jump mark-for-masquerade; numgen random mod 1 vmap { 0 : goto endpoint-QBSJ2IAB-kube-system/kube-dns/tcp/metrics__10.244.2.73/9153 }; }
	chain endpoint-QBSJ2IAB-kube-system/kube-dns/tcp/metrics__10.244.2.73/9153 { ip saddr 10.244.2.73 jump mark-for-masquerade; meta l4proto tcp dnat to 10.244.2.73:9153; }
}
"#;

/// Beside flannel's and Calico's own rules kube-proxy's is named; and theirs, where it is theirs.
#[test]
fn flannels_and_calicos_rules() -> Result<()> {
    if !skip::root_or_skip("flannels_and_calicos_rules") {
        return Ok(());
    }
    let flannel = ":FLANNEL-POSTRTG - [0:0]\n\
        -A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
        -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN\n\
        -A FLANNEL-POSTRTG -s 10.244.0.0/24 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN\n\
        -A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.0.0/24 -m comment --comment \"flanneld masq\" -j RETURN\n\
        -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/24 -m comment --comment \"flanneld masq\" -j RETURN\n\
        -A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n\
        -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n";
    let calico = ":cali-POSTROUTING - [0:0]\n:cali-nat-outgoing - [0:0]\n:cali-fip-snat - [0:0]\n\
        -I POSTROUTING 1 -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING\n\
        -A cali-POSTROUTING -m comment --comment \"cali:Z-c7XtVd2Bq7s_hA\" -j cali-fip-snat\n\
        -A cali-POSTROUTING -m comment --comment \"cali:nYKhEzDlr11Jccal\" -j cali-nat-outgoing\n\
        -A cali-POSTROUTING -o vxlan.calico -m comment --comment \"cali:e9dnSgSVNmIcpVhP\" -m addrtype ! --src-type LOCAL \
        --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE --random-fully\n";
    for extra in [flannel, calico] {
        let lab = lab(&[Rules { comments: true, ..of(Backend::IptablesNft, RuleForm::Before1179) }])?;
        iptables(&lab, extra)?;
        let event = anomaly(&lab)?;
        let rule = "-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" \
                    -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully";
        says(&event, &[("/random_fully", "rule".into()), ("/rule", rule.into()), ("/why", "mark-not-cleared".into())])?;
    }

    // A way to the world outside the pods' network that takes the outer packets too.
    let lab = self::lab(&[of(Backend::IptablesNft, RuleForm::Before1179)])?;
    iptables(&lab, "-I POSTROUTING 1 ! -d 10.244.0.0/16 -o uplink -j MASQUERADE --random-fully\n")?;
    let event = anomaly(&lab)?;
    says(
        &event,
        &[
            ("/random_fully", "rule".into()),
            ("/rule", "-A POSTROUTING ! -d 10.244.0.0/16 -o uplink -j MASQUERADE --random-fully".into()),
            ("/why", "no-mark".into()),
            ("/mark", Value::Null),
        ],
    )
}

/// The rules are read again when they change.
#[test]
fn changes_are_followed() -> Result<()> {
    if !skip::root_or_skip("changes_are_followed") {
        return Ok(());
    }
    let lab = LabOptions::default().build()?;
    let vxmon = Vxmon::attach_to(&lab.a, 2, &JSON)?;
    let mut count = 0;
    let _http = HttpServer::start(&lab.b, lab.pod_socket(Family::V4))?;
    for backend in Backend::ALL {
        for form in [RuleForm::Before1179, RuleForm::SnatBeforeFixed] {
            lab.rules(&of(backend, form))?;
            // The first one may come while the rules are being read.
            let mut event = Value::Null;
            for _ in 0..10 {
                count += 1;
                event = next(&lab, &vxmon, count)?;
                if event["nat"]["reason"].is_null() {
                    break;
                }
                thread::sleep(Duration::from_millis(300));
            }
            let why = if form == RuleForm::Before1179 { "mark-not-cleared" } else { "snat-ahead" };
            says(&event, &[("/why", why.into()), ("/backend", name(backend).into()), ("/random_fully", "rule".into())])
                .with_context(|| format!("{backend:?} {form:?}"))?;
            lab.flush_rules()?;
        }
    }
    vxmon.stop()?.adds_up()
}

/// What is told of changes: those in tables that no packet meets as it leaves are no reason to doubt the rules.
#[test]
fn changes_elsewhere_are_told_apart() -> Result<()> {
    if !skip::root_or_skip("changes_elsewhere_are_told_apart") {
        return Ok(());
    }
    let netns = Netns::create("rules")?;
    of(Backend::IptablesNft, RuleForm::Before1179).install(&netns)?;
    // More than the socket holds.
    let much = format!("table ip other {{ chain c {{\n{}}}\n}}", "ip saddr 1.2.3.4 counter\n".repeat(2000));
    let mut news = netns.enter(|| Ok(News::open()?))?;
    for (text, concerns) in [
        ("add table ip other\nadd chain ip other c\nadd rule ip other c counter", false),
        ("add chain ip other in { type filter hook input priority 0; }\nadd rule ip other in jump c", false),
        ("add table ip6 nat\nadd chain ip6 nat c\nadd rule ip6 nat c counter", true),
        ("add chain ip other post { type nat hook postrouting priority 100; }", true),
        ("add rule ip other c counter", true),
        ("delete chain ip other post", true),
        ("add rule ip other c counter", false),
        ("add rule ip nat KUBE-SERVICES counter", true),
        ("add set ip nat s { type ipv4_addr; }\nadd element ip nat s { 1.2.3.4 }", true),
        (&much, true),
        ("delete table ip nat", true),
        ("add table inet post { chain c { type nat hook postrouting priority 100; }; }", true),
        ("add table netdev x\nadd table bridge post", false),
    ] {
        let snapshot = netns.enter(|| Ok(Snapshot::read()))?;
        news.take(drop);
        give(&netns, "nft", &["-f", "-"], &format!("{text}\n"))?;
        let mut changes = Vec::new();
        news.take(|change| changes.push(change));
        let found = changes.iter().any(|change| snapshot.is_concerned(change));
        ensure!(!changes.is_empty() && found == concerns, "{}: {changes:?}", text.get(..80).unwrap_or(text));
    }
    Ok(())
}

/// No table is made by looking for one.
#[test]
fn reading_makes_no_table() -> Result<()> {
    if !skip::root_or_skip("reading_makes_no_table") {
        return Ok(());
    }
    let netns = Netns::create("rules")?;
    let names = || netns.run("cat", &["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"]);
    let before = names()?;
    let snapshot = netns.enter(|| Ok(Snapshot::read()))?;
    ensure!(snapshot.ruleset.tables.is_empty() && snapshot.ruleset.unread.is_empty(), "{:?}", snapshot.ruleset);
    ensure!(names()? == before && before.is_empty(), "{before}");
    Ok(())
}

/// All rules in all homes are rendered as the tools themselves print them.
#[test]
fn rules_are_rendered_as_the_tools_do() -> Result<()> {
    if !skip::root_or_skip("rules_are_rendered_as_the_tools_do") {
        return Ok(());
    }
    let netns = Netns::create("rules")?;
    for (four, six) in
        [("iptables-legacy-restore", "ip6tables-legacy-restore"), ("iptables-nft-restore", "ip6tables-nft-restore")]
    {
        give(&netns, four, &[], IPTABLES)?;
        give(&netns, six, &[], IP6TABLES)?;
    }
    give(&netns, "nft", &["-f", "-"], NFT)?;
    give(&netns, "nft", &["-f", "-"], KUBE_PROXY)?;
    let snapshot = netns.enter(|| Ok(Snapshot::read_keeping(Keep::All)))?;
    ensure!(snapshot.ruleset.unread.is_empty(), "{:?}", snapshot.ruleset.unread);
    let rendered = |home: Home| -> BTreeSet<String> {
        let tables = snapshot.ruleset.tables.iter().filter(|table| table.backend == home);
        tables
            .flat_map(|table| {
                table
                    .chains
                    .iter()
                    .flat_map(move |chain| chain.rules.iter().map(move |rule| render::rule(table, chain, rule)))
            })
            .collect()
    };
    for (home, four, six) in [
        (Home::IptablesLegacy, "iptables-legacy-save", "ip6tables-legacy-save"),
        (Home::IptablesNft, "iptables-nft-save", "ip6tables-nft-save"),
    ] {
        let saved = netns.run(four, &[])? + &netns.run(six, &[])?;
        let saved: BTreeSet<String> = saved.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect();
        ensure!(saved.len() > 20, "{saved:#?}");
        same(&rendered(home), &saved).with_context(|| format!("{home:?}"))?;
    }
    let listed: BTreeSet<String> = netns
        .run("nft", &["list", "ruleset"])?
        .split("table ")
        // Tables of iptables-nft come as xtables' expressions.
        .filter(|table| !["ip nat", "ip6 nat", "ip mangle"].iter().any(|name| table.starts_with(name)))
        .flat_map(chain_rules)
        .collect();
    ensure!(listed.len() > 20, "{listed:#?}");
    // Of sets without a name those that POSTROUTING does not ask are not read.
    let read = |rules: BTreeSet<String>| rules.into_iter().filter(|rule| !rule.starts_with("numgen")).collect();
    same(&read(rendered(Home::Nftables)), &read(listed))
}

/// The rules in what nft lists of a table, without counters.
fn chain_rules(table: &str) -> Vec<String> {
    let chains = table.split("\tchain ").skip(1).flat_map(|chain| chain.lines().skip(1));
    let rules = chains.map(str::trim).filter(|line| {
        !["type ", "}", "set ", "map ", "#"].iter().any(|start| line.starts_with(start)) && !line.is_empty()
    });
    rules.map(|line| line.replace("counter packets 0 bytes 0 ", "")).collect()
}

fn same(rendered: &BTreeSet<String>, wanted: &BTreeSet<String>) -> Result<()> {
    let missing: Vec<_> = wanted.difference(rendered).collect();
    let surplus: Vec<_> = rendered.difference(wanted).collect();
    ensure!(missing.is_empty() && surplus.is_empty(), "not rendered: {missing:#?}; rendered instead: {surplus:#?}");
    Ok(())
}

const IPTABLES: &str = r#"*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-X - [0:0]
:EMPTY - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.3.0/24 -o eth+ -p udp -m udp --dport 8472 -j SNAT --to-source 1.2.3.4-1.2.3.9:100-200 --random-fully --persistent
-A POSTROUTING -s 10.3.0.0/17 -j SNAT --to-source 1.2.3.4 --random
-A POSTROUTING -p udp -m udp --sport 1:7 --dport 53 -j MASQUERADE --to-ports 1024-2048
-A POSTROUTING -p tcp -m tcp ! --dport 53 -g EMPTY
-A POSTROUTING -o vxlan.calico -m comment --comment "cali:x" -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE --random-fully
-A POSTROUTING -p tcp -m multiport --dports 80,443,1000:2000 -m statistic --mode random --probability 0.50000000000 -j RETURN
-A POSTROUTING -m conntrack --ctstate NEW -m connmark --mark 0x3 -j ACCEPT
-A POSTROUTING ! -p tcp -j MASQUERADE
-A POSTROUTING ! -o lo -m mark --mark 0x5 -j RETURN
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "kube-system/kube-dns:metrics cluster IP" -m tcp --dport 9153 -j KUBE-SVC-X
-A KUBE-SERVICES -m comment --comment "nodeports \"last\"" -m addrtype --dst-type LOCAL -j KUBE-SVC-X
-A KUBE-SVC-X ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m tcp --dport 9153 -j KUBE-MARK-MASQ
-A KUBE-SVC-X -p tcp -m tcp -j DNAT --to-destination 10.244.2.73:9153
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
COMMIT
*mangle
-A POSTROUTING -o eth0 -j MARK --set-xmark 0x1/0xffffffff
COMMIT
"#;

const IP6TABLES: &str = r#"*nat
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s fd00:244::/48 ! -d ff00::/8 -j MASQUERADE --random-fully
-A POSTROUTING ! -s fd00:244::/48 -d fd00:244:2::/64 -o eth0 -p udp -m udp --dport 8472 -j SNAT --to-source [fd00::1]:100-200 --random-fully
-A POSTROUTING -s fd00:244::5/128 -j SNAT --to-source fd00::1-fd00::9
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
COMMIT
"#;

const NFT: &str = r#"table ip t {
	set nets { type ipv4_addr; flags interval; elements = { 10.1.0.0/16, 10.3.0.1-10.3.0.9 } }
	chain sub { ip saddr 10.1.2.3 return; }
	chain post { type nat hook postrouting priority 100; jump sub; goto sub;
		oifname "eth0" ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 meta l4proto udp snat to 1.2.3.4-1.2.3.9:100-200 fully-random comment "hello";
		masquerade random,persistent;
		meta l4proto udp masquerade to :1024-2048 fully-random;
		tcp dport vmap { 53 : accept, 54 : drop };
		udp dport { 53, 8472 } ip protocol udp return;
		meta mark set 0x123; meta mark set ct mark;
		meta mark & 0xff0 == 0x120 return; meta mark 0x5 accept; meta mark != 0x6 accept; meta mark < 7 drop;
		ip saddr @nets accept; ip saddr != { 1.2.3.4, 5.6.0.0/16 } oifname { "eth0", "eth1" } return;
		ip daddr 10.0.0.0/9 counter return; ct mark 3 return; iifname "foo*" return; fib daddr type local th dport 1-1024 return;
	}
}
table ip6 t { chain post { type nat hook postrouting priority 100; ip6 saddr fd00:244::/48 ip6 daddr != ff00::/8 masquerade fully-random; }; }
table inet t { chain post { type nat hook postrouting priority 105;
	ip saddr 10.0.0.0/8 masquerade; ip6 saddr fd00::/8 udp dport 53 snat ip6 to fd00::1; meta nfproto ipv4 masquerade fully-random; }; }
"#;
