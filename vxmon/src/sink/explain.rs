//! What an anomaly means, and what to do about it: a pure function from the event to text. It says what was seen and what
//! follows from that, nothing else: what the event does not hold is left out, or said to be unknown.

use crate::{
    event::{Anomaly, Nat, NatRule},
    release::version,
};

/// A part of an explanation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is about: `what`, `why`, `rule`, `mark`, `then`, `now`, `cure`, `kernel`.
    pub about: &'static str,
    /// In words.
    pub text: String,
    /// A command to type.
    pub command: Option<String>,
}

fn part(about: &'static str, text: impl Into<String>) -> Part {
    Part { about, text: text.into(), command: None }
}

/// Why the checksum is wrong, as far as that decides on what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Fault A: NAT "updated" a zero.
    MangledZero,
    /// Fault B: NAT left the checksum as it was.
    StalePort,
    /// Neither.
    Other,
}

impl Fault {
    fn of(anomaly: &Anomaly) -> Self {
        match anomaly.verdict {
            "nat-mangled-zero" => Self::MangledZero,
            "nat-stale-port" => Self::StalePort,
            _ => Self::Other,
        }
    }
}

/// Explains an anomaly seen on a kernel of this release (`uname -r`).
pub fn explain(anomaly: &Anomaly, release: &str) -> Vec<Part> {
    let fault = Fault::of(anomaly);
    let mut parts = vec![what(anomaly), why(anomaly, fault)];
    if fault != Fault::Other {
        parts.extend(anomaly.nat.as_ref().and_then(rule));
        parts.extend(mark(anomaly));
        parts.extend(then(anomaly));
    }
    parts.extend(to_do(anomaly, fault, release));
    parts
}

/// Two anomalies with the same cause have the same key: what is to be done about them is the same.
pub fn cause_key(anomaly: &Anomaly) -> String {
    let nat = anomaly.nat.as_ref();
    let proved = anomaly.cause.as_ref().map(|cause| (cause.proved, cause.predicted.is_some()));
    let rule = nat.map(|nat| (nat.random_fully, &nat.rule, nat.why, nat.handle, &nat.reason, &nat.ahead));
    let ct = (anomaly.ct.is_some(), anomaly.missing.get("ct"));
    format!(
        "{:?}",
        (anomaly.verdict, anomaly.role, &anomaly.dev, &anomaly.vxlan_dev, anomaly.csum.state, proved, rule, ct)
    )
}

fn what(anomaly: &Anomaly) -> Part {
    let inner = anomaly.inner.as_ref();
    let is_syn = inner.and_then(|inner| inner.flags.as_deref()).is_some_and(|flags| flags.starts_with('S'));
    let packet = match inner {
        Some(_) if is_syn => "the SYN",
        Some(_) => "a packet",
        None => "a packet that could not be read further",
    };
    let of = inner.map(|inner| format!(" of {}", super::text::connection(inner))).unwrap_or_default();
    let attempt = match &anomaly.flow {
        Some(flow) if flow.attempt > 1 => {
            format!(
                " (bad packet {} of this connection, {:.1} s after the first)",
                flow.attempt,
                flow.since_first_ms as f64 / 1e3
            )
        }
        _ => String::new(),
    };
    let text = match anomaly.verdict {
        "bad-inner" => format!("{packet}{of}{attempt} had a wrong checksum when it entered {}", anomaly.dev),
        "malformed" => format!("{packet}{of}{attempt} has length fields that contradict each other"),
        "zero-outer-v6" => format!("{packet}{of}{attempt} left over IPv6 without an outer UDP checksum"),
        _ => format!(
            "{packet}{of}{attempt} left with a wrong outer UDP checksum; a receiver that checks it drops the packet (its \
             UdpInCsumErrors rises)"
        ),
    };
    part("what", text)
}

fn why(anomaly: &Anomaly, fault: Fault) -> Part {
    let cause = anomaly.cause.as_ref();
    let proved = cause.is_some_and(|cause| cause.proved);
    let seen = &anomaly.csum.seen;
    let text = match (fault, &anomaly.ct) {
        (Fault::StalePort, Some(ct)) if proved => format!(
            "NAT made {} of {}, and the kernel left the checksum of the packet before that: computed from the conntrack entry, \
             {seen}, as in the packet (fault B)",
            super::text::end(&ct.reply.dst, ct.reply.dport),
            super::text::end(&ct.orig.src, ct.orig.sport),
        ),
        (Fault::MangledZero, Some(ct)) if proved => format!(
            "the VXLAN device sends no checksum, but NAT, which made {} of {}, \"updated\" the 0: computed from the conntrack \
             entry, {seen}, as in the packet (fault A)",
            super::text::end(&ct.reply.dst, ct.reply.dport),
            super::text::end(&ct.orig.src, ct.orig.sport),
        ),
        (Fault::MangledZero, _) => format!(
            "{seen} where the VXLAN device sends no checksum is what fault A leaves (NAT \"updates\" the 0); not proved{}",
            because(anomaly)
        ),
        (Fault::StalePort, _) => {
            format!("the checksum is that of the packet before NAT; not proved{}", because(anomaly))
        }
        (Fault::Other, _) => other(anomaly),
    };
    part("why", text)
}

fn because(anomaly: &Anomaly) -> String {
    anomaly.missing.get("ct").map(|why| format!(", for the conntrack entry is not known: {why}")).unwrap_or_default()
}

fn other(anomaly: &Anomaly) -> String {
    let predicted = anomaly.cause.as_ref().and_then(|cause| cause.predicted.as_ref());
    match (anomaly.verdict, predicted) {
        ("bad-inner", _) => {
            "whoever sent the packet, or changed it on its way to the device, got it wrong; the tunnel has no part in it".to_owned()
        }
        ("malformed", _) => "it was built or changed wrongly before it came here".to_owned(),
        ("zero-outer-v6", _) => "no VXLAN device of this port may leave it out (udp6zerocsumtx)".to_owned(),
        (_, Some(predicted)) => {
            format!("not known: NAT rewrote the packet, but that would have left {predicted}")
        }
        (_, None) if anomaly.ct.is_some() => {
            "not known: by its conntrack entry NAT rewrote nothing, so it is neither of the two NAT faults".to_owned()
        }
        (_, None) => {
            let why = match anomaly.missing.get("ct") {
                Some(why) => format!("it cannot be told without the conntrack entry ({why})"),
                None => "there is no conntrack entry to explain it by".to_owned(),
            };
            let port = anomaly.cause.as_ref().and_then(|cause| cause.right_for_sport);
            let port = port.zip(anomaly.outer.as_ref()).map(|(port, outer)| {
                format!(
                    ". With source port {port} the checksum would be right: if `conntrack -L` on the sender shows that {port} \
                     became {}, it is fault B (nat-stale-port)",
                    outer.sport
                )
            });
            format!("not known: {why}{}", port.unwrap_or_default())
        }
    }
}

/// Where a rule stands.
fn place(backend: &str, table: &str, chain: &str, position: Option<u32>, handle: Option<u64>) -> String {
    let number = position.map(|position| format!(", rule {position}")).unwrap_or_default();
    let handle = handle.map(|handle| format!(", handle {handle}")).unwrap_or_default();
    format!("{backend}, table {table}, chain {chain}{number}{handle}")
}

fn rule_text(rule: &NatRule) -> String {
    let NatRule { rule, backend, table, chain, position, handle } = rule;
    format!("`{rule}` ({})", place(backend, table, chain, Some(*position), *handle))
}

fn rule(nat: &Nat) -> Option<Part> {
    let evidence = match nat.random_fully {
        "observed" => "the kernel was seen to choose the port for it by random-fully",
        "rule" => "it has random-fully, and the packet's connection reached it",
        "no" if nat.range_flags.is_some() => "the kernel was seen to choose the port for it without random-fully",
        "no" => "it has no random-fully",
        _ => "",
    };
    if let Some(rule) = &nat.rule {
        let backend = nat.backend.unwrap_or("unknown backend");
        let place = match (&nat.table, &nat.chain) {
            (Some(table), Some(chain)) => place(backend, table, chain, nat.position, nat.handle),
            _ => backend.to_owned(),
        };
        let evidence = if evidence.is_empty() { String::new() } else { format!("; {evidence}") };
        let changing = if nat.changing {
            "; rules were being changed when the packet left, but this one was there before as well as after"
        } else {
            ""
        };
        return Some(part("rule", format!("`{rule}` ({place}){evidence}{changing}")));
    }
    let seen = match (nat.random_fully, &nat.range_flags) {
        ("observed", _) => "; the kernel was seen to choose the port by random-fully",
        (_, Some(_)) => "; the kernel was seen to choose the port without random-fully",
        (_, None) => "",
    };
    if !nat.candidates.is_empty() {
        let rules: Vec<String> = nat.candidates.iter().map(rule_text).collect();
        let reason = nat.reason.as_deref().unwrap_or("it cannot be told which");
        let candidates = if rules.len() == 1 { "candidate" } else { "candidates" };
        return Some(part("rule", format!("not certain: {reason}; {candidates}: {}{seen}", rules.join(", or "))));
    }
    nat.reason.as_ref().map(|reason| part("rule", format!("not known: {reason}{seen}")))
}

fn mark(anomaly: &Anomaly) -> Option<Part> {
    let nat = anomaly.nat.as_ref();
    let mark = nat.and_then(|nat| nat.mark.as_deref()).or(anomaly.mark.as_deref()).unwrap_or("a mark");
    let set_by = match nat.map(|nat| nat.set_by.as_slice()).unwrap_or_default() {
        [] => String::new(),
        [rule] => format!(", set by {},", rule_text(rule)),
        [rule, others @ ..] => format!(", set by {} or {} others,", rule_text(rule), others.len()),
    };
    let cleared_by = || nat.and_then(|nat| nat.cleared_by.as_ref()).map_or("a rule".to_owned(), rule_text);
    let survived = format!("{mark} on the inner packet{set_by} survived its encapsulation");
    let text = match nat.and_then(|nat| nat.why) {
        Some("mark-not-cleared") => format!("{survived}: no rule clears it"),
        Some("old-rule-first") => {
            format!("{survived}: {} clears it, but the rule named above comes first", cleared_by())
        }
        Some("snat-ahead" | "return-ahead") => {
            let ahead = nat.and_then(|nat| nat.ahead.as_ref()).map_or("another rule".to_owned(), rule_text);
            format!("{survived}: {} clears it, but {ahead} ends the inner packet's way before", cleared_by())
        }
        Some("unclear") => {
            format!("{survived}, though {} clears it and nothing was found that keeps it from that", cleared_by())
        }
        Some("no-mark") => {
            "the rule does not look at the mark: it takes the outer packet for another reason".to_owned()
        }
        // The rules are not known: what can be said is what is on the packet itself.
        _ => match anomaly.mark.as_deref() {
            Some("0x0") | None => return None,
            Some(mark) => format!("the outer packet has mark {mark}"),
        },
    };
    Some(part("mark", text))
}

fn then(anomaly: &Anomaly) -> Option<Part> {
    let flow = anomaly.flow.as_ref()?;
    let expected = flow.expected_recovery.as_deref().map(super::text::time_of_day);
    let text = match (flow.expected_by, expected, flow.conntrack_timeout_s) {
        _ if flow.rewritten_anew => {
            "a retry had a new conntrack entry and was rewritten and broken again: waiting does not help".to_owned()
        }
        (Some("source-port"), Some(at), _) => format!(
            "retries leave with another outer source port (net.core.txrehash, where the kernel has that): the next one, expected about {at}, should get through"
        ),
        (Some("conntrack-timeout"), Some(at), Some(seconds)) => format!(
            "each packet keeps the conntrack entry, and so the rewrite, for another {seconds} s: the first retry that comes later, \
             expected about {at}, should get through"
        ),
        (_, _, Some(seconds)) => format!(
            "each packet keeps the conntrack entry, and so the rewrite, for another {seconds} s: retries on the same outer flow \
             within that time are broken too"
        ),
        (_, _, None) => return None,
    };
    Some(part("then", text))
}

fn to_do(anomaly: &Anomaly, fault: Fault, release: &str) -> Vec<Part> {
    match fault {
        Fault::MangledZero => vec![offload(anomaly), cure(anomaly), fix_of_a(release)],
        Fault::StalePort => vec![
            offload(anomaly),
            cure(anomaly),
            part("kernel", "no kernel fixes this fault (every one since 4.6 has it), so an update does not help"),
        ],
        Fault::Other => match anomaly.verdict {
            "bad-inner" => vec![part(
                "now",
                "look at where the packet comes from: capture on the device by which it enters this node",
            )],
            "malformed" => {
                vec![part("now", "look at where the packet comes from; `--format json` has its first bytes' fields")]
            }
            "zero-outer-v6" => vec![part(
                "now",
                "let the device leave the checksum out, if the receivers accept that (udp6zerocsumrx), or find who sends these \
                 packets",
            )],
            _ if anomaly.cause.as_ref().is_some_and(|cause| cause.right_for_sport.is_some()) => vec![part(
                "now",
                "run `vxmon attach` on the node that sends these packets: with the conntrack entry it proves fault B, or rules it \
                 out",
            )],
            _ => vec![part(
                "now",
                "neither offload nor kube-proxy's rules are known to cause this: look for TC or XDP programs and devices that \
                 change packets between the VXLAN device and this one",
            )],
        },
    }
}

fn offload(anomaly: &Anomaly) -> Part {
    let device = anomaly.vxlan_dev.as_deref();
    let name = device.unwrap_or("the VXLAN device");
    // The inner checksum was left to be filled in later: that is what offload on the VXLAN device does.
    let text = if anomaly.csum.state == "partial" {
        format!(
            "checksum offload of {name} is on, as the packet shows; off, it ends this at once, at the cost of throughput"
        )
    } else {
        format!(
            "if tx-checksum-ip-generic of {name} is on, turning it off ends this at once, at the cost of throughput"
        )
    };
    let command = device.map(|device| format!("ethtool -K {device} tx-checksum-ip-generic off"));
    Part { command, ..part("now", text) }
}

/// The oldest kube-proxy versions that clear the mark.
const FIXED_KUBE_PROXY: &str = "1.16.13, 1.17.9, 1.18.6 or later";

fn cure(anomaly: &Anomaly) -> Part {
    let nat = anomaly.nat.as_ref();
    let is_kube = nat.is_some_and(|nat| {
        let chain = nat.chain.as_deref().unwrap_or_default();
        chain.starts_with("KUBE-") || nat.table.as_deref().is_some_and(|table| table.ends_with("kube-proxy"))
    });
    match nat.and_then(|nat| nat.why) {
        Some("old-rule-first") => Part {
            command: nat.and_then(deletion),
            ..part("cure", "the rules that clear the mark are there; the old one before them must go")
        },
        Some("snat-ahead" | "return-ahead") => {
            part("cure", "the rule ahead must come after the one that clears the mark, or leave marked packets alone")
        }
        Some("no-mark") => {
            let port = anomaly.outer.as_ref().map_or(8472, |outer| outer.dport);
            part("cure", format!("let the rule leave VXLAN packets (UDP port {port}) alone: they need no masquerading"))
        }
        Some("mark-not-cleared") if is_kube => {
            part("cure", format!("kube-proxy {FIXED_KUBE_PROXY} has rules that clear the mark before they masquerade"))
        }
        Some("mark-not-cleared") => part("cure", "clear the mark in the rule before the one that masquerades"),
        Some("unclear") => part("cure", "find what keeps the inner packet from the rule that clears the mark"),
        _ => part(
            "cure",
            format!(
                "the outer packet must not be masqueraded: where its mark is kube-proxy's, version {FIXED_KUBE_PROXY} clears it, if no \
                 older rule is left in front"
            ),
        ),
    }
}

/// The command that deletes the rule named.
fn deletion(nat: &Nat) -> Option<String> {
    let (rule, table, chain) = (nat.rule.as_deref()?, nat.table.as_deref()?, nat.chain.as_deref()?);
    let (family, name) = table.split_once(' ')?;
    let program = match (nat.backend?, family) {
        ("nftables", _) => return nat.handle.map(|handle| format!("nft delete rule {table} {chain} handle {handle}")),
        ("iptables-legacy", "ip6") => "ip6tables-legacy",
        ("iptables-legacy", _) => "iptables-legacy",
        ("iptables-nft", "ip6") => "ip6tables-nft",
        ("iptables-nft", _) => "iptables-nft",
        _ => return None,
    };
    Some(format!("{program} -t {name} -D {}", rule.strip_prefix("-A ")?))
}

/// The first versions with the fix of fault A, ea64d8d6c675, by series.
const FIXED_IN: [(u32, u32, u32); 4] = [(4, 14, 181), (4, 19, 123), (5, 4, 41), (5, 6, 13)];

/// Which kernel fixes fault A, for one who has it on this release.
fn fix_of_a(release: &str) -> Part {
    let version = version(release);
    let series = FIXED_IN.iter().find(|(major, minor, _)| version.is_some_and(|v| (v.0, v.1) == (*major, *minor)));
    let is_fixed = match (version, series) {
        (Some((_, _, patch)), Some((_, _, first))) => patch >= *first,
        (Some((major, minor, _)), None) => (major, minor) >= (5, 7),
        (None, _) => false,
    };
    let text = match series {
        _ if is_fixed => format!(
            "{release} should have the fix of this fault, and yet it does it: ask who builds that kernel for ea64d8d6c675"
        ),
        Some((major, minor, patch)) => {
            format!("{release} has a fix: {major}.{minor}.{patch} or later of the same series")
        }
        None => format!(
            "4.14.181, 4.19.123, 5.4.41, 5.6.13 and 5.7 have the fix (ea64d8d6c675); ask who builds {release} whether theirs does"
        ),
    };
    part("kernel", text)
}

#[cfg(test)]
#[path = "explain/tests.rs"]
pub(crate) mod tests;
