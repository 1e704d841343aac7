//! iptables-legacy: the tables of xtables, read with getsockopt as iptables-legacy-save does. It only asks for tables that
//! `/proc/net/ip_tables_names` lists, since asking for another makes the kernel load and create it. It never writes.

use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    fs,
    hash::Hasher as _,
    io,
    net::UdpSocket,
    os::fd::AsRawFd as _,
};

use nix::libc;

use super::{
    model::{Act, Backend, Base, Family, Hook, Kind, Part, Rule, Side, Table, Test, Verdict},
    reach::{self, Keep, Others, note_reached},
    xt::{self, Fields},
};

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`, include/uapi/linux/netfilter_ipv4/ip_tables.h: `IPT_BASE_CTL`.
const GET_INFO: libc::c_int = 64;
/// `IPT_SO_GET_ENTRIES` and `IP6T_SO_GET_ENTRIES`.
const GET_ENTRIES: libc::c_int = 65;
/// Length of a table's name in bytes (`XT_TABLE_MAXNAMELEN`).
const NAME: usize = 32;
/// Length of struct ipt_getinfo in bytes.
const INFO: usize = 84;
/// Where the entries begin in struct ipt_get_entries: name, size, and padding for the counters in them.
const ENTRIES: usize = 40;
/// The largest table that is read, in bytes.
const LARGEST: usize = 256 << 20;
/// How often a table is asked for again that grew between two calls.
const ATTEMPTS: u32 = 4;
/// Length of struct xt_entry_match and xt_entry_target in bytes, both of them without the data.
const PART: usize = 32;

/// Why a table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {what} of {family} {table} (iptables-legacy): {source}")]
    Call {
        /// What was wanted.
        what: &'static str,
        /// `ip` or `ip6`.
        family: &'static str,
        /// The table.
        table: String,
        /// What the system call said.
        source: io::Error,
    },
    /// The kernel's answer contradicts itself.
    #[error("cannot read {family} {table} (iptables-legacy): its entries end wrongly at byte {at}")]
    Malformed {
        /// `ip` or `ip6`.
        family: &'static str,
        /// The table.
        table: String,
        /// Where.
        at: usize,
    },
}

/// struct ipt_getinfo without the name: changes with nearly every change of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bits by hook.
    hooks: u32,
    /// Offset of each hook's first entry.
    entry: [u32; 5],
    /// Offset of each hook's policy.
    underflow: [u32; 5],
    entries: u32,
    size: u32,
}

/// What tells one state of a table from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    family: Family,
    table: String,
    info: Info,
    /// Of the entries without counters.
    hash: u64,
}

/// The tables of one family that exist; none if the kernel has no xtables, or none was used yet.
fn names(family: Family) -> Vec<String> {
    let file = match family {
        Family::Ip6 => "/proc/thread-self/net/ip6_tables_names",
        Family::Ip | Family::Inet => "/proc/thread-self/net/ip_tables_names",
    };
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().filter(|name| ["nat", "mangle"].contains(name)).map(str::to_owned).collect()
}

/// Reads all tables with NAT rules or marks.
pub fn read(keep: Keep) -> (Vec<Table>, Vec<Seen>, Vec<Error>) {
    let (mut tables, mut seen, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for family in [Family::Ip, Family::Ip6] {
        for name in names(family) {
            match entries(family, &name) {
                Ok((info, blob)) => match parse(family, &name, &info, &blob, keep) {
                    Ok(table) => {
                        seen.push(Seen { family, table: name, info, hash: hash(family, &blob) });
                        tables.push(table);
                    }
                    Err(error) => errors.push(error),
                },
                Err(error) => errors.push(error),
            }
        }
    }
    (tables, seen, errors)
}

/// Has the allocator give large blocks back as soon as they are free: a table of ten thousand rules comes as one block of
/// megabytes. Left alone, it would learn from the first one to keep the next (mallopt(3), `M_MMAP_THRESHOLD`).
pub fn keep_no_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Gives back what reading took in small pieces.
pub fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks, and touches only memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether the tables are as they were, as far as their names and sizes tell: two system calls for each table.
pub fn looks_the_same(seen: &[Seen]) -> bool {
    let now = [Family::Ip, Family::Ip6].map(|family| names(family).into_iter().map(move |name| (family, name)));
    let now: Vec<_> = now.into_iter().flatten().collect();
    now.len() == seen.len()
        && now.iter().zip(seen).all(|((family, name), seen)| {
            *family == seen.family && *name == seen.table && info(*family, name).is_ok_and(|info| info == seen.info)
        })
}

/// Whether the tables are as they were, rule by rule.
pub fn is_the_same(seen: &[Seen]) -> bool {
    looks_the_same(seen)
        && seen
            .iter()
            .all(|seen| entries(seen.family, &seen.table).is_ok_and(|(_, blob)| hash(seen.family, &blob) == seen.hash))
}

fn call_error(what: &'static str, family: Family, table: &str, source: io::Error) -> Error {
    Error::Call { what, family: family.name(), table: table.to_owned(), source }
}

fn socket(family: Family) -> io::Result<UdpSocket> {
    UdpSocket::bind(if family == Family::Ip6 { "[::]:0" } else { "0.0.0.0:0" })
}

fn get(family: Family, option: libc::c_int, buffer: &mut [u8]) -> io::Result<usize> {
    let socket = socket(family)?;
    let level = if family == Family::Ip6 { libc::IPPROTO_IPV6 } else { libc::IPPROTO_IP };
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the buffer is valid for `length` bytes, which is all that the kernel writes.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(usize::try_from(length).unwrap_or(0)) }
}

fn put_name(buffer: &mut [u8], name: &str) {
    for (to, from) in buffer.iter_mut().take(NAME - 1).zip(name.bytes()) {
        *to = from;
    }
}

fn info(family: Family, name: &str) -> Result<Info, Error> {
    let mut buffer = [0; INFO];
    put_name(&mut buffer, name);
    get(family, GET_INFO, &mut buffer).map_err(|error| call_error("ask for the size", family, name, error))?;
    Ok(decode_info(&buffer))
}

/// struct ipt_getinfo; ip6t_getinfo is the same.
fn decode_info(buffer: &[u8]) -> Info {
    let fields = Fields(buffer);
    let five = |at: usize| [0, 1, 2, 3, 4].map(|hook| fields.u32(at + 4 * hook).unwrap_or(0));
    let word = |at: usize| fields.u32(at).unwrap_or(0);
    Info { hooks: word(NAME), entry: five(36), underflow: five(56), entries: word(76), size: word(80) }
}

fn entries(family: Family, name: &str) -> Result<(Info, Vec<u8>), Error> {
    let mut attempt = 1;
    loop {
        let info = info(family, name)?;
        let size = usize::try_from(info.size).unwrap_or(usize::MAX);
        if size > LARGEST {
            return Err(call_error("read the entries", family, name, io::Error::other("it is too large")));
        }
        let mut buffer = vec![0; ENTRIES + size];
        put_name(&mut buffer, name);
        for (to, from) in buffer.iter_mut().skip(NAME).zip(info.size.to_ne_bytes()) {
            *to = from;
        }
        match get(family, GET_ENTRIES, &mut buffer) {
            Ok(_) => return Ok((info, buffer.split_off(ENTRIES))),
            // EAGAIN: its size changed in between.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(call_error("read the entries", family, name, error)),
        }
    }
}

/// Offsets within struct ipt_entry and ip6t_entry, bytes.
struct Layout {
    address: usize,
    proto: usize,
    flags: usize,
    invert: usize,
    target: usize,
    counters: usize,
    length: usize,
}

const IPV4: Layout = Layout { address: 4, proto: 80, flags: 82, invert: 83, target: 88, counters: 96, length: 112 };
const IPV6: Layout =
    Layout { address: 16, proto: 128, flags: 131, invert: 132, target: 140, counters: 152, length: 168 };

impl Layout {
    const fn of(family: Family) -> &'static Self {
        match family {
            Family::Ip6 => &IPV6,
            Family::Ip | Family::Inet => &IPV4,
        }
    }
}

/// An entry: where it is, its bytes, and where its target begins.
struct Entry<'a> {
    at: usize,
    bytes: &'a [u8],
    target: usize,
}

impl<'a> Entry<'a> {
    /// struct xt_entry_target, and what follows.
    fn target(&self) -> Fields<'a> {
        Fields(self.bytes.get(self.target..).unwrap_or_default())
    }
}

/// The entries; an error where the offsets in one lead out of it.
fn walk<'a>(layout: &'static Layout, blob: &'a [u8]) -> impl Iterator<Item = Result<Entry<'a>, usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= blob.len() {
            return None;
        }
        let read = || {
            let rest = Fields(blob.get(at..)?);
            let (target, next) = (rest.u16(layout.target)?.into(), rest.u16(layout.target + 2)?.into());
            let fits = layout.length <= target && target + PART <= next;
            fits.then_some(Entry { at, bytes: rest.0.get(..next)?, target })
        };
        let entry = read().ok_or(at);
        at = entry.as_ref().map_or(blob.len(), |entry| at + entry.bytes.len());
        Some(entry)
    })
}

fn hash(family: Family, blob: &[u8]) -> u64 {
    let layout = Layout::of(family);
    let mut hasher = DefaultHasher::new();
    for entry in walk(layout, blob).flatten() {
        hasher.write(entry.bytes.get(..layout.counters).unwrap_or_default());
        // The target of `-m statistic` and limits keeps its state in the rule: not part of what it says.
        hasher.write(entry.bytes.get(entry.target..).unwrap_or_default());
        for (name, revision, info) in matches(layout, &entry) {
            if !matches!(&*name, "statistic" | "limit" | "quota" | "hashlimit" | "recent") {
                hasher.write(name.as_bytes());
                hasher.write_u8(revision);
                hasher.write(info);
            }
        }
    }
    hasher.finish()
}

/// The matches of an entry; one that leads out of it is named `?`, and ends them.
fn matches<'a>(layout: &Layout, entry: &Entry<'a>) -> impl Iterator<Item = (String, u8, &'a [u8])> {
    let (mut at, bytes, end) = (layout.length, entry.bytes, entry.target);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let read = || {
            let part = Fields(bytes.get(at..end)?);
            let size = usize::from(part.u16(0)?);
            Some((size, (part.text(2, 29)?, part.u8(31)?, part.0.get(PART..size)?)))
        };
        let (size, found) = read().unwrap_or((end, ("?".to_owned(), 0, &[])));
        at += size;
        Some(found)
    })
}

/// A table from its entries, or what is kept of it.
fn parse(family: Family, name: &str, info: &Info, blob: &[u8], keep: Keep) -> Result<Table, Error> {
    let malformed = |at| Error::Malformed { family: family.name(), table: name.to_owned(), at };
    let mut parser = Parser::new(family, name, info, blob).map_err(malformed)?;
    let mut others = Others::new(&parser.table);
    let mut postrouting = Vec::new();
    if keep != Keep::All {
        parser.jumps(&mut others);
        postrouting = others.reached_from(&parser.table, reach::is_postrouting);
    }
    parser.rules(|place, rule| {
        let position = others.next(place.chain);
        if keep == Keep::All || postrouting.get(place.chain) == Some(&true) {
            Some(rule(position))
        } else if keep == Keep::WhatMatters && place.target == "MARK" {
            others.mark(place.chain, Some(rule(position)));
            None
        } else {
            None
        }
    });
    let mut table = parser.table;
    match keep {
        Keep::All => note_reached(&mut table),
        Keep::WhatMatters | Keep::Postrouting => others.finish(&mut table),
    }
    Ok(table)
}

/// A rule among the entries.
struct Place<'a> {
    /// Number of its chain.
    chain: usize,
    /// Name of its target; empty for a verdict or a jump.
    target: &'a str,
}

/// Goes through the entries. Chains are where the hooks enter, and after each entry whose target is "ERROR".
struct Parser<'a> {
    family: Family,
    layout: &'static Layout,
    blob: &'a [u8],
    /// The chains, the base chains among them hooked in.
    table: Table,
    /// Names of chains by where they begin.
    starts: HashMap<usize, Box<str>>,
    /// Offsets of the base chains' policies.
    policies: HashSet<usize>,
}

impl<'a> Parser<'a> {
    /// Finds the chains; an error is the offset where the entries end wrongly.
    fn new(family: Family, name: &str, info: &Info, blob: &'a [u8]) -> Result<Self, usize> {
        const HOOKS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
        let layout = Layout::of(family);
        let mut table = Table::new(Backend::IptablesLegacy, family, name);
        let mut starts: HashMap<usize, Box<str>> = HashMap::new();
        let mut policies: HashMap<usize, usize> = HashMap::new();
        for (number, (hook, (entry, underflow))) in HOOKS.iter().zip(info.entry.iter().zip(info.underflow)).enumerate()
        {
            if info.hooks & (1 << number) != 0 {
                let chain = table.chain(hook);
                starts.insert(usize::try_from(*entry).unwrap_or(usize::MAX), (*hook).into());
                policies.insert(usize::try_from(underflow).unwrap_or(usize::MAX), chain);
            }
        }
        let (mut is_in_chain, mut next): (bool, Option<Box<str>>) = (false, None);
        for entry in walk(layout, blob) {
            let entry = entry?;
            if let Some(chain) = next.take() {
                table.chain(&chain);
                starts.insert(entry.at, chain);
            }
            is_in_chain |= starts.contains_key(&entry.at);
            let target = entry.target();
            if is_error(target) {
                next = target.text(PART, 30).map(String::into_boxed_str);
                continue;
            }
            if !is_in_chain {
                return Err(entry.at);
            }
            if let Some(base) = policies.get(&entry.at) {
                let drops = target.i32(PART) == Some(-1);
                if let (Some(hook), Some(chain)) = (hook_of(info, entry.at), table.chains.get_mut(*base)) {
                    chain.base = Some(Base { kind: kind(name), hook, priority: priority(name, hook), drops });
                }
            }
        }
        let policies = policies.into_keys().collect();
        Ok(Self { family, layout, blob, table, starts, policies })
    }

    /// The users' rules, with the numbers of their chains.
    fn entries(&self) -> impl Iterator<Item = (usize, Entry<'a>)> {
        let mut chain = None;
        walk(self.layout, self.blob).flatten().filter_map(move |entry| {
            if let Some(name) = self.starts.get(&entry.at) {
                chain = self.table.by_name.get(name).copied();
            }
            let target = entry.target();
            // What ends a chain of the user's is no rule of theirs.
            let is_rule = !is_error(target)
                && !self.policies.contains(&entry.at)
                && !is_end_of_chain(self.layout, &entry, target, &self.starts, self.blob.len());
            chain.filter(|_| is_rule).map(|chain| (chain, entry))
        })
    }

    /// Notes where rules lead.
    fn jumps(&self, others: &mut Others) {
        for (chain, entry) in self.entries() {
            let target = entry.target();
            let to = target.i32(PART).filter(|_| target.u8(2) == Some(0)).and_then(|to| usize::try_from(to).ok());
            let to = to.and_then(|to| self.table.by_name.get(self.starts.get(&to)?));
            if let Some(to) = to {
                others.jump(chain, *to);
            }
        }
    }

    /// Has `take` say which rules belong into the table; it gets each by its position.
    fn rules(&mut self, mut take: impl FnMut(&Place<'_>, &dyn Fn(u32) -> Rule) -> Option<Rule>) {
        let mut kept: Vec<(usize, Rule)> = Vec::new();
        for (chain, entry) in self.entries() {
            let target = entry.target();
            let name = target.text(2, 29).unwrap_or_default();
            let rule = |position| Rule {
                handle: None,
                position,
                parts: rule(self.layout, self.family, &entry, target, &name, &self.starts).into(),
                comment: None,
            };
            kept.extend(take(&Place { chain, target: &name }, &rule).map(|rule| (chain, rule)));
        }
        for (chain, rule) in kept {
            if let Some(chain) = self.table.chains.get_mut(chain) {
                chain.rules.push(rule);
            }
        }
    }
}

/// Whether an entry begins a chain of the user's, or ends the table.
fn is_error(target: Fields<'_>) -> bool {
    target.text(2, 29).as_deref() == Some("ERROR")
}

fn hook_of(info: &Info, at: usize) -> Option<Hook> {
    let at = u32::try_from(at).ok()?;
    let bit = |number: &u32| info.hooks & (1 << number) != 0;
    let found = (0..5_u32).zip(info.underflow).find(|(number, underflow)| bit(number) && *underflow == at);
    found.map(|(number, _)| number.into())
}

fn kind(table: &str) -> Kind {
    if table == "nat" { Kind::Nat } else { Kind::Other }
}

/// `NF_IP_PRI_*`, include/uapi/linux/netfilter_ipv4.h; NF_IP6_PRI_* are the same.
fn priority(table: &str, hook: Hook) -> i32 {
    match (table, hook) {
        ("nat", Hook::Postrouting | Hook::Input) => 100,
        ("nat", _) => -100,
        (_, Hook::Prerouting | Hook::Input | Hook::Forward | Hook::Output | Hook::Postrouting | Hook::Other) => -150,
    }
}

/// The unconditional RETURN that iptables puts at the end of each chain of the user's.
fn is_end_of_chain(
    layout: &Layout,
    entry: &Entry<'_>,
    target: Fields<'_>,
    starts: &HashMap<usize, Box<str>>,
    blob: usize,
) -> bool {
    let plain = entry.target == layout.length
        && entry.bytes.get(..layout.invert + 1).is_some_and(|ip| ip.iter().all(|byte| *byte == 0))
        && target.u8(2) == Some(0)
        && target.i32(PART) == Some(RETURN);
    // The next chain's header lies between this entry and that chain's first rule.
    let header = layout.length + PART + 32;
    let end = entry.at + entry.bytes.len();
    plain && (starts.contains_key(&(end + header)) || end + header >= blob)
}

/// `XT_RETURN`, include/uapi/linux/netfilter/x_tables.h: -NF_REPEAT - 1.
const RETURN: i32 = -5;

fn rule(
    layout: &Layout,
    family: Family,
    entry: &Entry<'_>,
    target: Fields<'_>,
    target_name: &str,
    starts: &HashMap<usize, Box<str>>,
) -> Vec<Part> {
    let ip = Fields(entry.bytes);
    let mut parts: Vec<Part> = header_tests(layout, family, ip).into_iter().map(Part::Test).collect();
    parts.extend(
        matches(layout, entry).map(|(name, revision, info)| Part::Test(xt::test(&name, revision.into(), info))),
    );
    let info = target.0.get(PART..).unwrap_or_default();
    if target_name.is_empty() {
        let goto = ip.u8(layout.flags).is_some_and(|flags| flags & goto_flag(family) != 0);
        let next = entry.at + entry.bytes.len();
        match standard(target.i32(PART), next, goto, starts) {
            Some(Verdict::Continue) => {}
            Some(verdict) => parts.push(Part::Act(Act::Verdict(verdict))),
            None => parts.push(Part::Act(Act::Unknown("a jump to nowhere".into()))),
        }
    } else {
        let revision = target.u8(31).unwrap_or(0);
        parts.push(Part::Act(xt::act(target_name, revision.into(), info, family == Family::Ip6)));
    }
    parts
}

/// `IPT_F_GOTO`, `IP6T_F_GOTO`.
const fn goto_flag(family: Family) -> u8 {
    match family {
        Family::Ip6 => 4,
        Family::Ip | Family::Inet => 2,
    }
}

fn standard(verdict: Option<i32>, next: usize, goto: bool, starts: &HashMap<usize, Box<str>>) -> Option<Verdict> {
    Some(match verdict? {
        -1 => Verdict::Drop,
        -2 => Verdict::Accept,
        -4 => Verdict::Queue,
        RETURN => Verdict::Return,
        offset => {
            let to = usize::try_from(offset).ok()?;
            if to == next {
                return Some(Verdict::Continue);
            }
            let chain = starts.get(&to)?.clone();
            if goto { Verdict::Goto(chain) } else { Verdict::Jump(chain) }
        }
    })
}

/// What struct ipt_ip and ip6t_ip6 ask: addresses and masks, devices and masks, protocol.
fn header_tests(layout: &Layout, family: Family, ip: Fields<'_>) -> Vec<Test> {
    let invert = ip.u8(layout.invert).unwrap_or(0);
    let inverted = |bit: u8| invert & bit != 0;
    let width = layout.address;
    let address = |at: usize| if family == Family::Ip6 { ip.v6(at) } else { ip.v4(at) };
    let mut tests = Vec::new();
    for (side, at, bit) in [(Side::Source, 0, 8), (Side::Destination, width, 0x10)] {
        if let (Some(address), Some(mask)) = (address(at), address(at + 2 * width))
            && !mask.is_unspecified()
        {
            tests.push(Test::Address { side, address, mask, invert: inverted(bit) });
        }
    }
    let devices = 4 * width;
    for (side, at, bit) in [(Side::Source, 0, 1), (Side::Destination, 16, 2)] {
        let (name, mask) = (ip.text(devices + at, 16), ip.bytes::<16>(devices + 32 + at));
        if let (Some(name), Some(mask)) = (name, mask)
            && mask.iter().any(|byte| *byte != 0)
        {
            let covered = mask.iter().take_while(|byte| **byte != 0).count();
            // iptables leaves the `+` in the name, and out of the mask.
            let beginning = name.get(..covered).map(|name| format!("{name}+"));
            let name = beginning.unwrap_or(name);
            tests.push(Test::Device { side, name: name.into(), invert: inverted(bit) });
        }
    }
    if let Some(number) = ip.u16(layout.proto).and_then(|number| u8::try_from(number).ok())
        && number != 0
    {
        tests.push(Test::Protocol { number, invert: inverted(0x40) });
    }
    if family == Family::Ip && ip.u8(layout.flags).is_some_and(|flags| flags & 1 != 0) {
        tests.push(Test::Fragment { invert: inverted(0x20) });
    }
    tests
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::netlink::attribute::golden as bytes;

    /// A real table of each family, against what iptables-legacy-save prints of it.
    #[test]
    fn a_table_is_what_the_tools_print() {
        for (family, golden) in
            [(Family::Ip, include_str!("golden/legacy-ip.txt")), (Family::Ip6, include_str!("golden/legacy-ip6.txt"))]
        {
            let mut lines = golden.lines().filter(|line| !line.starts_with('#'));
            let info = decode_info(&bytes(lines.next().unwrap()));
            let blob = bytes(lines.next().unwrap());
            assert_eq!(info.size as usize, blob.len());
            let table = parse(family, "nat", &info, &blob, Keep::All).unwrap();
            let rendered: Vec<String> = table
                .chains
                .iter()
                .flat_map(|chain| chain.rules.iter().map(|rule| super::super::render::rule(&table, chain, rule)))
                .collect();
            let printed: Vec<&str> = lines.collect();
            for (rendered, printed) in rendered.iter().zip(&printed) {
                assert_eq!(rendered, printed);
            }
            assert_eq!(rendered.len(), printed.len());
            let bases: Vec<_> =
                table.chains.iter().filter_map(|chain| Some((&*chain.name, chain.base?.priority))).collect();
            assert_eq!(bases, [("PREROUTING", -100), ("INPUT", 100), ("OUTPUT", -100), ("POSTROUTING", 100)]);
            // A change of one byte of a rule is another table; one of a counter is not.
            let layout = Layout::of(family);
            let mut changed = blob.clone();
            changed[layout.counters] ^= 1;
            assert_eq!(hash(family, &blob), hash(family, &changed));
            changed[0] ^= 1;
            assert_ne!(hash(family, &blob), hash(family, &changed));
        }
    }

    proptest! {
        /// Whatever the kernel answers, reading it ends with a table or an error.
        #[test]
        fn garbage_is_an_error_or_a_table(mut blob in proptest::collection::vec(any::<u8>(), 0..1200), six: bool, fix: bool) {
            let family = if six { Family::Ip6 } else { Family::Ip };
            let layout = Layout::of(family);
            // Half of the time the first entry's offsets make sense, so that more than the walk is tried.
            if fix && blob.len() > 320 {
                let (target, next) = (u16::try_from(layout.length + 64).unwrap(), 320_u16);
                blob[layout.target..layout.target + 2].copy_from_slice(&target.to_ne_bytes());
                blob[layout.target + 2..layout.target + 4].copy_from_slice(&next.to_ne_bytes());
                blob[layout.length..layout.length + 2].copy_from_slice(&64_u16.to_ne_bytes());
                blob.truncate(320);
            }
            let info = Info { hooks: 0x1f, entry: [0; 5], underflow: [160; 5], entries: 1, size: 0 };
            for keep in [Keep::All, Keep::WhatMatters] {
                let _ = parse(family, "nat", &info, &blob, keep);
            }
            let _ = hash(family, &blob);
        }
    }
}
