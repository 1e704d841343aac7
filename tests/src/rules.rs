//! kube-proxy's NAT rules, in each of the three places where a node can have them.

use std::{fmt::Write, process::Command};

use anyhow::{Context, Result};

use crate::{
    Netns, cmd,
    lab::{Family, HTTP_PORT, Side, UDP_PORT, service},
};

/// iptables-legacy has one lock for all namespaces, and other labs may hold it.
const WAIT: [&str; 2] = ["-w", "10"];

/// Where the rules live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// xtables, by `iptables-legacy` and `ip6tables-legacy`.
    IptablesLegacy,
    /// nftables with xtables expressions, by `iptables-nft` and `ip6tables-nft`.
    IptablesNft,
    /// Native nftables, as kube-proxy's nftables mode writes it.
    Nftables,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::IptablesLegacy, Self::IptablesNft, Self::Nftables];
}

/// How the mark is treated in POSTROUTING.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleForm {
    /// kube-proxy before 1.16.13, 1.17.9 and 1.18.6: the mark stays, so the outer packet is masqueraded too.
    Before1179,
    /// Later: the mark is removed before the packet is masqueraded.
    Fixed,
    /// An upgrade without a flush: the old rule is still there, ahead of the fixed ones.
    OldBeforeFixed,
    /// The fixed rules, and ahead of them an SNAT rule for the VXLAN device, which ends the traversal: the mark stays.
    SnatBeforeFixed,
}

/// The rules of a node.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Where they live.
    pub backend: Backend,
    /// What they do.
    pub form: RuleForm,
    /// Port of the TCP service, and of the pod.
    pub tcp_port: u16,
    /// Port of the UDP service, and of the pod.
    pub udp_port: u16,
    /// With kube-proxy's comments (`-m comment --comment …`).
    pub comments: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            backend: Backend::IptablesNft,
            form: RuleForm::Before1179,
            tcp_port: HTTP_PORT,
            udp_port: UDP_PORT,
            comments: false,
        }
    }
}

impl Rules {
    /// Installs them, for IPv4 and IPv6.
    pub fn install(&self, node: &Netns) -> Result<()> {
        let (four, six) = match self.backend {
            Backend::IptablesLegacy => ("iptables-legacy-restore", "ip6tables-legacy-restore"),
            Backend::IptablesNft => ("iptables-nft-restore", "ip6tables-nft-restore"),
            Backend::Nftables => {
                let text = self.nftables(Family::V4)? + &self.nftables(Family::V6)?;
                return restore(node, "nft", &["-f", "-"], &text);
            }
        };
        restore(node, four, &[&WAIT[..], &["--noflush"]].concat(), &self.iptables(Family::V4)?)?;
        restore(node, six, &[&WAIT[..], &["--noflush"]].concat(), &self.iptables(Family::V6)?)
    }

    /// Adds the rules of so many more services of one endpoint each: five rules a service, or as much in maps and chains.
    pub fn add_services(&self, node: &Netns, services: usize) -> Result<()> {
        match self.backend {
            Backend::Nftables => {
                let text = format!("table ip kube-proxy {{\n{}}}\n", services_nftables(services)?);
                restore(node, "nft", &["-f", "-"], &text)
            }
            Backend::IptablesLegacy | Backend::IptablesNft => {
                let text = format!("*nat\n{}COMMIT\n", services_iptables(services)?);
                restore(node, self.iptables_restore(), &[&WAIT[..], &["--noflush"]].concat(), &text)
            }
        }
    }

    /// Writes all of kube-proxy's chains anew in one transaction, as it does at each sync (before 1.27, or when it has
    /// restarted), for IPv4 and with so many more services. Its chains must be there.
    pub fn sync(&self, node: &Netns, services: usize) -> Result<()> {
        // The base chains' rules are not written anew.
        let own = |text: String, base: &[&str]| -> String {
            let lines = text.lines().filter(|line| !base.iter().any(|base| line.starts_with(base)));
            lines.fold(String::new(), |text, line| text + line + "\n")
        };
        if self.backend == Backend::Nftables {
            let mut text = String::new();
            let fixed = ["mark-for-masquerade", "masquerading", "services"].map(str::to_owned);
            let of_service = |name: String| [format!("service-{name}"), format!("endpoint-{name}")];
            let names =
                ["tcp", "udp"].map(str::to_owned).into_iter().chain((0..services).map(|number| number.to_string()));
            for chain in fixed.into_iter().chain(names.flat_map(of_service)) {
                writeln!(text, "flush chain ip kube-proxy {chain}")?;
            }
            let chains = own(self.nftables(Family::V4)?, &["chain nat-", "}"]);
            text += &format!("{chains}{}}}\n", services_nftables(services)?);
            return restore(node, "nft", &["-f", "-"], &text);
        }
        let chains = own(self.iptables(Family::V4)?, &["-A OUTPUT", "-A POSTROUTING", "-I POSTROUTING", "COMMIT"]);
        let text = format!("{chains}{}COMMIT\n", services_iptables(services)?);
        restore(node, self.iptables_restore(), &[&WAIT[..], &["--noflush"]].concat(), &text)
    }

    fn iptables_restore(&self) -> &'static str {
        if self.backend == Backend::IptablesLegacy { "iptables-legacy-restore" } else { "iptables-nft-restore" }
    }

    fn ports(&self) -> [(&'static str, u16); 2] {
        [("tcp", self.tcp_port), ("udp", self.udp_port)]
    }

    /// Text for `iptables-restore`.
    fn iptables(&self, family: Family) -> Result<String> {
        let (service, pod) = (service(family), Side::B.pod(family));
        let comment =
            |text: &str| if self.comments { format!("-m comment --comment \"{text}\" ") } else { String::new() };
        let mut text = format!(
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
             -A OUTPUT {}-j KUBE-SERVICES\n\
             -A POSTROUTING {}-j KUBE-POSTROUTING\n\
             -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n",
            comment("kubernetes service portals"),
            comment("kubernetes postrouting rules"),
        );
        for (protocol, port) in self.ports() {
            let to = std::net::SocketAddr::from((pod, port));
            let comment = comment(&format!("default/{protocol} cluster IP"));
            write!(
                text,
                "-A KUBE-SERVICES -d {service} {comment}-p {protocol} -m {protocol} --dport {port} -j KUBE-MARK-MASQ\n\
                 -A KUBE-SERVICES -d {service} {comment}-p {protocol} -m {protocol} --dport {port} \
                 -j DNAT --to-destination {to}\n"
            )?;
        }
        let why = comment("kubernetes service traffic requiring SNAT");
        let old = format!("-A KUBE-POSTROUTING {why}-m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully\n");
        let fixed = format!(
            "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
             -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
             -A KUBE-POSTROUTING {why}-j MASQUERADE --random-fully\n"
        );
        match self.form {
            RuleForm::Before1179 => text += &old,
            RuleForm::Fixed => text += &fixed,
            RuleForm::OldBeforeFixed => text += &(old + &fixed),
            RuleForm::SnatBeforeFixed => {
                let (net, own) = (pod_network(family), Side::A.overlay(family));
                writeln!(text, "-I POSTROUTING 1 -d {net} -j SNAT --to-source {own}")?;
                text += &fixed;
            }
        }
        Ok(text + "COMMIT\n")
    }

    /// Text for `nft -f`, as kube-proxy's nftables mode writes it, with fewer maps.
    fn nftables(&self, family: Family) -> Result<String> {
        let (ip, service, pod) = (nft_family(family), service(family), Side::B.pod(family));
        let comment = |text: &str| if self.comments { format!(" comment \"{text}\"") } else { String::new() };
        let mut endpoints = String::new();
        let mut services = String::new();
        let mut verdicts = Vec::new();
        for (protocol, port) in self.ports() {
            let to = std::net::SocketAddr::from((pod, port));
            write!(
                endpoints,
                "chain endpoint-{protocol} {{ meta l4proto {protocol} dnat to {to}; }}\n\
                 chain service-{protocol} {{ {ip} daddr {service} {protocol} dport {port} jump mark-for-masquerade; \
                 goto endpoint-{protocol}; }}\n"
            )?;
            verdicts.push(format!("{service} . {protocol} . {port} : goto service-{protocol}"));
        }
        writeln!(
            services,
            "map service-ips {{ type {ip_type} . inet_proto . inet_service : verdict; elements = {{ {} }} }}\n\
             chain services {{ {ip} daddr . meta l4proto . th dport vmap @service-ips; }}",
            verdicts.join(", "),
            ip_type = match family {
                Family::V4 => "ipv4_addr",
                Family::V6 => "ipv6_addr",
            },
        )?;
        let why = comment("masquerade marked traffic");
        let old = format!("meta mark & 0x4000 != 0 masquerade fully-random{why};");
        let fixed =
            format!("meta mark & 0x4000 == 0 return; meta mark set meta mark ^ 0x4000; masquerade fully-random{why};");
        let (masquerading, ahead) = match self.form {
            RuleForm::Before1179 => (old, String::new()),
            RuleForm::Fixed => (fixed, String::new()),
            RuleForm::OldBeforeFixed => (old + &fixed, String::new()),
            RuleForm::SnatBeforeFixed => {
                let snat = format!("{ip} daddr {} snat to {}; ", pod_network(family), Side::A.overlay(family));
                (fixed, snat)
            }
        };
        Ok(format!(
            "table {ip} kube-proxy {{\n\
             chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}\n\
             chain masquerading {{ {masquerading} }}\n\
             {endpoints}{services}\
             chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
             chain nat-postrouting {{ type nat hook postrouting priority 100; {ahead}jump masquerading; }}\n}}\n"
        ))
    }
}

/// Number, address and pod of so many services.
fn services(count: usize) -> impl Iterator<Item = (usize, String, String)> {
    let address = |net: u8, service: usize| format!("10.{net}.{}.{}", 100 + service / 250, 1 + service % 250);
    (0..count).map(move |number| (number, address(96, number), address(244, number)))
}

fn services_nftables(count: usize) -> Result<String> {
    let mut text = String::new();
    for (number, service, pod) in services(count) {
        writeln!(
            text,
            "chain endpoint-{number} {{ ip saddr {pod} jump mark-for-masquerade; meta l4proto tcp dnat to {pod}:80; }}\n\
             chain service-{number} {{ ip daddr {service} tcp dport 80 ip saddr != 10.244.0.0/16 jump mark-for-masquerade; \
             numgen random mod 1 vmap {{ 0 : goto endpoint-{number} }}; }}"
        )?;
    }
    Ok(text)
}

fn services_iptables(count: usize) -> Result<String> {
    let mut text = String::new();
    for (number, service, pod) in services(count) {
        writeln!(
            text,
            ":KUBE-SVC-{number} - [0:0]\n:KUBE-SEP-{number} - [0:0]\n\
             -A KUBE-SERVICES -d {service}/32 -p tcp -m comment --comment \"default/service-{number} cluster IP\" -m tcp \
             --dport 80 -j KUBE-SVC-{number}\n\
             -A KUBE-SVC-{number} ! -s 10.244.0.0/16 -d {service}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{number} -m comment --comment \"default/service-{number}\" -j KUBE-SEP-{number}\n\
             -A KUBE-SEP-{number} -s {pod}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{number} -p tcp -m tcp -j DNAT --to-destination {pod}:80"
        )?;
    }
    Ok(text)
}

/// Removes the NAT rules of all backends, and all connections.
pub(crate) fn flush(node: &Netns) -> Result<()> {
    for restore_program in ["iptables-legacy-restore", "ip6tables-legacy-restore"] {
        restore(node, restore_program, &WAIT, "*nat\nCOMMIT\n")?;
    }
    // The tables of iptables-nft are ordinary nftables tables.
    node.run("nft", &["flush", "ruleset"])?;
    flush_conntrack(node)
}

pub(crate) fn flush_conntrack(node: &Netns) -> Result<()> {
    for family in ["ipv4", "ipv6"] {
        node.run("conntrack", &["-F", "-f", family])?;
    }
    Ok(())
}

fn restore(node: &Netns, program: &str, args: &[&str], text: &str) -> Result<()> {
    let mut command: Command = node.command(program);
    cmd::run_with_input(command.args(args), text).context("cannot install NAT rules").map(drop)
}

fn nft_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn pod_network(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.244.2.0/24",
        Family::V6 => "fd00:244:2::/64",
    }
}
