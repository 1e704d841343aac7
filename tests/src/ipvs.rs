//! A service as kube-proxy's ipvs mode makes it: the service's address on `kube-ipvs0`, IPVS in front of the pod, and NAT
//! rules that mark by ipset.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{
    Lab, cmd,
    lab::{Family, HTTP_PORT, Side, UDP_PORT, service},
    rules::RuleForm,
};

/// Installs the services (TCP [`HTTP_PORT`], UDP [`UDP_PORT`]) on node a, with iptables-legacy. IPv4 only.
pub fn install(lab: &Lab, form: RuleForm) -> Result<()> {
    let node = &lab.a;
    let (vip, pod) = (service(Family::V4), Side::B.pod(Family::V4));
    // As kube-proxy sets them.
    node.sysctl(&[("net.ipv4.vs.conntrack", "1"), ("net.ipv4.vs.conn_reuse_mode", "0")])?;
    node.ip(&format!("link add kube-ipvs0 type dummy\naddr add {vip}/32 dev kube-ipvs0\n"))?;
    for (flag, port) in [("-t", HTTP_PORT), ("-u", UDP_PORT)] {
        let (virtual_server, real) = (format!("{vip}:{port}"), format!("{pod}:{port}"));
        node.run("ipvsadm", &["-A", flag, &virtual_server, "-s", "rr"])?;
        node.run("ipvsadm", &["-a", flag, &virtual_server, "-r", &real, "-m"])?;
    }
    node.run("ipset", &["create", "KUBE-CLUSTER-IP", "hash:ip,port"])?;
    node.run("ipset", &["create", "KUBE-LOOP-BACK", "hash:ip,port,ip"])?;
    for (protocol, port) in [("tcp", HTTP_PORT), ("udp", UDP_PORT)] {
        node.run("ipset", &["add", "KUBE-CLUSTER-IP", &format!("{vip},{protocol}:{port}")])?;
        node.run("ipset", &["add", "KUBE-LOOP-BACK", &format!("{pod},{protocol}:{port},{pod}")])?;
    }
    rules(lab, form)
}

/// Puts the NAT rules of kube-proxy's ipvs mode in place of those that are there.
pub fn rules(lab: &Lab, form: RuleForm) -> Result<()> {
    let old = "-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully\n";
    let fixed = "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
                 -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
                 -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n";
    let snat = "-I POSTROUTING 1 -d 10.244.2.0/24 -j MASQUERADE\n";
    let masquerading = match form {
        RuleForm::Before1179 => old.to_owned(),
        RuleForm::Fixed => fixed.to_owned(),
        RuleForm::OldBeforeFixed => format!("{old}{fixed}"),
        RuleForm::SnatBeforeFixed => format!("{snat}{fixed}"),
    };
    let text = format!(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-SERVICES ! -s 10.244.0.0/16 -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ\n\
         -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT\n\
         -A KUBE-POSTROUTING -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE\n\
         {masquerading}COMMIT\n"
    );
    let mut command: Command = lab.a.command("iptables-legacy-restore");
    cmd::run_with_input(command.args(["-w", "10"]), &text).context("cannot install NAT rules").map(drop)
}

/// The connections of IPVS, as `ipvsadm -lnc` shows them.
pub fn connections(lab: &Lab) -> Result<Vec<String>> {
    let text = lab.a.run("ipvsadm", &["-lnc"])?;
    Ok(text.lines().skip(2).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
}

/// Why there is no IPVS here; `None` if there is.
pub fn missing(lab: &Lab) -> Option<String> {
    for program in ["ipvsadm", "ipset"] {
        if !cmd::exists(program) {
            return Some(format!("no {program} on this machine"));
        }
    }
    let says = |error: anyhow::Error| format!("{error:#}").lines().next().unwrap_or_default().to_owned();
    if let Err(error) = lab.a.run("ipvsadm", &["-L"]) {
        return Some(format!("no IPVS in this kernel: {}", says(error)));
    }
    let ipset = lab.a.run("ipset", &["create", "vxmon-try", "hash:ip,port"]);
    ipset
        .and_then(|_| lab.a.run("ipset", &["destroy", "vxmon-try"]))
        .err()
        .map(|error| format!("no ipset: {}", says(error)))
}
