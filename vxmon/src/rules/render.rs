//! Rules as one would type them: `iptables-save`'s words for iptables' rules, nft's for native ones. Only text.

mod nft;

use std::{fmt::Write as _, net::IpAddr};

use super::model::{
    Act, Backend, Chain, Nat, NatKind, PERSISTENT, Part, RANDOM, RANDOM_FULLY, Rule, Side, Table, Test, Verdict,
};

/// A rule of a chain in a table.
#[must_use]
pub fn rule(table: &Table, chain: &Chain, rule: &Rule) -> String {
    match table.backend {
        Backend::IptablesLegacy | Backend::IptablesNft => iptables(table, chain, rule),
        Backend::Nftables => nft::rule(table, rule),
    }
}

fn iptables(table: &Table, chain: &Chain, rule: &Rule) -> String {
    let tests = || rule.parts.iter().filter_map(|part| if let Part::Test(test) = part { Some(test) } else { None });
    let mut text = format!("-A {}", chain.name);
    // What is in the IP header first, in this order, wherever it stands.
    let ranks: [fn(&Test) -> bool; 6] = [
        |test| matches!(test, Test::Address { side: Side::Source, .. }),
        |test| matches!(test, Test::Address { side: Side::Destination, .. }),
        |test| matches!(test, Test::Device { side: Side::Source, .. }),
        |test| matches!(test, Test::Device { side: Side::Destination, .. }),
        |test| matches!(test, Test::Protocol { .. }),
        |test| matches!(test, Test::Fragment { .. }),
    ];
    for rank in ranks {
        for test in tests().filter(|test| rank(test)) {
            text.push(' ');
            text += &iptables_test(table, test);
        }
    }
    for part in
        rule.parts.iter().filter(|part| !matches!(part, Part::Test(test) if ranks.iter().any(|rank| rank(test))))
    {
        let word = match part {
            Part::Test(test) => iptables_test(table, test),
            Part::Act(act) => iptables_act(act),
        };
        if !word.is_empty() {
            text.push(' ');
            text += &word;
        }
    }
    text
}

const fn not(invert: bool) -> &'static str {
    if invert { "! " } else { "" }
}

const fn protocol_name(number: u8) -> Option<&'static str> {
    Some(match number {
        1 => "icmp",
        6 => "tcp",
        17 => "udp",
        58 => "ipv6-icmp",
        132 => "sctp",
        136 => "udplite",
        33 => "dccp",
        50 => "esp",
        51 => "ah",
        47 => "gre",
        _ => return None,
    })
}

fn protocol(number: u8) -> String {
    protocol_name(number).map_or_else(|| number.to_string(), str::to_owned)
}

/// Length of a mask's prefix; none if it has gaps.
fn prefix(mask: IpAddr) -> Option<u32> {
    let (bits, width) = match mask {
        IpAddr::V4(mask) => (u128::from(mask.to_bits()) << 96, 32),
        IpAddr::V6(mask) => (mask.to_bits(), 128),
    };
    let ones = bits.leading_ones();
    (ones <= width && bits.count_ones() == ones).then_some(ones)
}

fn ports((from, to): (u16, u16)) -> String {
    if from == to { from.to_string() } else { format!("{from}:{to}") }
}

fn quoted(text: &str) -> String {
    let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    if plain { text.to_owned() } else { format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")) }
}

fn iptables_test(table: &Table, test: &Test) -> String {
    match test {
        Test::Address { side, address, mask, invert } => {
            let flag = if *side == Side::Source { "-s" } else { "-d" };
            let mask = prefix(*mask).map_or_else(|| mask.to_string(), |prefix| prefix.to_string());
            format!("{}{flag} {address}/{mask}", not(*invert))
        }
        Test::Device { side, name, invert } => {
            format!("{}{} {name}", not(*invert), if *side == Side::Source { "-i" } else { "-o" })
        }
        Test::Protocol { number, invert } => format!("{}-p {}", not(*invert), protocol(*number)),
        Test::Fragment { invert } => format!("{}-f", not(*invert)),
        Test::Mark { connection, value, mask, invert } => {
            let name = if *connection { "connmark" } else { "mark" };
            let mask = if *mask == u32::MAX { String::new() } else { format!("/{mask:#x}") };
            format!("-m {name} {}--mark {value:#x}{mask}", not(*invert))
        }
        Test::Ports { protocol: number, source, destination, invert, more } => {
            let mut text = format!("-m {}", protocol(*number));
            if let Some(range) = source {
                let _ = write!(text, " {}--sport {}", not(invert.0), ports(*range));
            }
            if let Some(range) = destination {
                let _ = write!(text, " {}--dport {}", not(invert.1), ports(*range));
            }
            if let Some(more) = more {
                let _ = write!(text, " {more}");
            }
            text
        }
        Test::Multiport { side, ranges, invert } => {
            let flag = match side {
                Side::Source => "--sports",
                Side::Destination => "--dports",
                Side::Either => "--ports",
            };
            let ranges: Vec<String> = ranges.iter().map(|range| ports(*range)).collect();
            format!("-m multiport {}{flag} {}", not(*invert), ranges.join(","))
        }
        Test::AddrType { source, destination, invert, limit } => addrtype(*source, *destination, *invert, *limit),
        Test::State { mask, invert, old } => {
            let (name, flag) = if *old { ("state", "--state") } else { ("conntrack", "--ctstate") };
            format!("-m {name} {}{flag} {}", not(*invert), states(*mask))
        }
        Test::IpSet { index, name, sides, invert, more } => {
            let name = name.as_deref().map_or_else(|| format!("[set number {index}]"), str::to_owned);
            let sides: Vec<&str> = sides.iter().map(|side| if *side == Side::Source { "src" } else { "dst" }).collect();
            let more = if *more { " [and more]" } else { "" };
            format!("-m set {}--match-set {name} {}{more}", not(*invert), sides.join(","))
        }
        Test::Comment(text) => format!("-m comment --comment {}", quoted(text)),
        // iptables-nft has nftables' own expression for `-m limit`.
        Test::Chance(text) if !text.starts_with('-') => format!("-m {text}"),
        Test::Chance(text) => text.to_string(),
        Test::Unknown(name) => format!("-m [{name}: not known to vxmon]"),
        Test::Compare { .. } | Test::Range { .. } | Test::Lookup { .. } => format!("[{}]", nft::test(table, test)),
    }
}

fn addrtype(source: u16, destination: u16, invert: (bool, bool), limit: (bool, bool)) -> String {
    let mut text = "-m addrtype".to_owned();
    for (flag, types, invert) in [("--src-type", source, invert.0), ("--dst-type", destination, invert.1)] {
        if types != 0 {
            let names: Vec<&str> = nft::TYPES
                .iter()
                .enumerate()
                .filter(|(bit, _)| types & (1 << bit) != 0)
                .map(|(_, name)| *name)
                .collect();
            let _ = write!(text, " {}{flag} {}", not(invert), names.join(",").to_uppercase());
        }
    }
    text += if limit.0 { " --limit-iface-in" } else { "" };
    text += if limit.1 { " --limit-iface-out" } else { "" };
    text
}

/// The order in which iptables prints them.
fn states(mask: u16) -> String {
    const NAMES: [(u16, &str); 7] = [
        (1, "INVALID"),
        (8, "NEW"),
        (4, "RELATED"),
        (2, "ESTABLISHED"),
        (1 << 8, "UNTRACKED"),
        (1 << 6, "SNAT"),
        (1 << 7, "DNAT"),
    ];
    let names: Vec<&str> = NAMES.iter().filter(|(bit, _)| mask & bit != 0).map(|(_, name)| *name).collect();
    names.join(",")
}

fn iptables_act(act: &Act) -> String {
    match act {
        Act::Verdict(verdict) => match verdict {
            Verdict::Accept => "-j ACCEPT".to_owned(),
            Verdict::Drop => "-j DROP".to_owned(),
            Verdict::Reject => "-j REJECT".to_owned(),
            Verdict::Queue => "-j QUEUE".to_owned(),
            Verdict::Return => "-j RETURN".to_owned(),
            Verdict::Continue => String::new(),
            Verdict::Jump(chain) => format!("-j {chain}"),
            Verdict::Goto(chain) => format!("-g {chain}"),
        },
        Act::SetMark { and, xor } => format!("-j MARK --set-xmark {xor:#x}/{:#x}", !and),
        Act::Nat(nat) => iptables_nat(nat),
        // Counters are not shown.
        Act::Nothing(text) if text.starts_with('-') => text.to_string(),
        Act::Nothing(_) => String::new(),
        Act::SetMarkFrom(text) => text.to_string(),
        Act::VerdictMap { map, .. } => format!("[vmap @{map}]"),
        Act::Unknown(name) => format!("-j [{name}: not known to vxmon]"),
    }
}

fn iptables_nat(nat: &Nat) -> String {
    let mut text = match nat.kind {
        NatKind::Snat => "-j SNAT",
        NatKind::Masquerade => "-j MASQUERADE",
        NatKind::Dnat => "-j DNAT",
        NatKind::Redirect => "-j REDIRECT",
    }
    .to_owned();
    let range = |(from, to): (u16, u16)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    match nat.kind {
        NatKind::Snat | NatKind::Dnat => {
            let flag = if nat.kind == NatKind::Snat { "--to-source" } else { "--to-destination" };
            // Of a range of IPv6 it brackets the whole, nft each end.
            let _ = write!(text, " {flag} {}", target(nat, range).replace("]-[", "-"));
        }
        NatKind::Masquerade | NatKind::Redirect => {
            if let Some(ports) = nat.ports {
                let _ = write!(text, " --to-ports {}", range(ports));
            }
        }
    }
    for (flag, name) in [(RANDOM, " --random"), (RANDOM_FULLY, " --random-fully"), (PERSISTENT, " --persistent")] {
        text += if nat.flags & flag != 0 { name } else { "" };
    }
    text
}

/// `ADDRESS[-ADDRESS][:PORT[-PORT]]`.
fn target(nat: &Nat, range: impl Fn((u16, u16)) -> String) -> String {
    let bracket = |address: IpAddr| {
        if address.is_ipv6() && nat.ports.is_some() { format!("[{address}]") } else { address.to_string() }
    };
    let mut text = match nat.addresses {
        Some((from, to)) if from == to => bracket(from),
        Some((from, to)) => format!("{}-{}", bracket(from), bracket(to)),
        None => nat.dynamic.as_deref().unwrap_or_default().to_owned(),
    };
    if let Some(ports) = nat.ports {
        let _ = write!(text, ":{}", range(ports));
    }
    text
}
