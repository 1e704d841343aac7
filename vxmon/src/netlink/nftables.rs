//! The nftables ruleset: tables, chains, rules with their expressions, sets and their elements. It only reads, and it does
//! not know what an expression means for a packet.

pub mod expression;

use std::borrow::Cow;

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};
use nix::errno::Errno;

use self::expression::{Data, Expression};
use super::{
    Error, Socket,
    attribute::{Value, attributes_after},
    socket::Reply,
};

/// `NFNL_SUBSYS_NFTABLES`, include/uapi/linux/netfilter/nfnetlink.h.
const SUBSYSTEM: u8 = 10;
/// Length of struct nfgenmsg in bytes.
const NFGENMSG: usize = 4;

/// Messages, include/uapi/linux/netfilter/nf_tables.h (enum nf_tables_msg_types).
mod message {
    pub(super) const NEW_CHAIN: u8 = 3;
    pub(super) const GET_CHAIN: u8 = 4;
    pub(super) const DELETE_CHAIN: u8 = 5;
    pub(super) const GET_RULE: u8 = 7;
    pub(super) const GET_SET: u8 = 10;
    pub(super) const GET_ELEMENTS: u8 = 13;
    pub(super) const NEW_GENERATION: u8 = 15;
    pub(super) const GET_GENERATION: u8 = 16;
}

/// Attributes, the same file.
mod nfta {
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_POLICY: u16 = 5;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_NUMBER: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_HANDLE: u16 = 3;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const RULE_USERDATA: u16 = 7;
    pub(super) const SET_TABLE: u16 = 1;
    pub(super) const SET_NAME: u16 = 2;
    pub(super) const SET_FLAGS: u16 = 3;
    pub(super) const SET_KEY_LEN: u16 = 5;
    pub(super) const ELEMENTS_TABLE: u16 = 1;
    pub(super) const ELEMENTS_SET: u16 = 2;
    pub(super) const ELEMENTS_LIST: u16 = 3;
    pub(super) const ELEMENT_KEY: u16 = 1;
    pub(super) const ELEMENT_DATA: u16 = 2;
    pub(super) const ELEMENT_FLAGS: u16 = 3;
    pub(super) const ELEMENT_KEY_END: u16 = 10;
    pub(super) const GENERATION_ID: u16 = 1;
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// `NFPROTO_*` of its table.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Hook and priority, if it is hooked in.
    pub hook: Option<(u32, i32)>,
    /// `nat`, `filter`, `route`.
    pub kind: Option<String>,
    /// The policy is drop.
    pub drops: bool,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `NFPROTO_*` of its table.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Its handle.
    pub handle: u64,
    /// What it asks and does.
    pub expressions: Vec<Expression>,
    /// nft's comment.
    pub comment: Option<String>,
}

/// A set or a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// `NFPROTO_*` of its table.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// `NFT_SET_*`.
    pub flags: u32,
    /// Length of a key in bytes.
    pub key_len: u32,
}

/// `NFT_SET_ANONYMOUS`.
pub const SET_ANONYMOUS: u32 = 1;
/// `NFT_SET_INTERVAL`.
pub const SET_INTERVAL: u32 = 4;

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// Its key; empty for the one that stands for all others.
    pub key: Vec<u8>,
    /// The end of the interval, inclusive, in sets of concatenations.
    pub key_end: Option<Vec<u8>>,
    /// It only ends, exclusively, the interval before it (`NFT_SET_ELEM_INTERVAL_END`).
    pub ends_interval: bool,
    /// What it maps to.
    pub data: Option<Data>,
}

fn get(kind: u8, family: u8, attributes: Vec<DefaultNla>) -> NetfilterMessage {
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::from(family), 0, 0),
        NetfilterMessageInner::Other { subsys: NetfilterSubsystem::NfTables, message_type: kind, attributes },
    )
}

fn text(kind: u16, text: &str) -> DefaultNla {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    DefaultNla::new(kind, bytes)
}

/// What kind of message it is, and the family it says.
fn kind(reply: &Reply<'_>) -> Option<(u8, u8)> {
    let [subsystem, kind] = reply.kind.to_be_bytes();
    (subsystem == SUBSYSTEM).then_some((kind, *reply.payload.first()?))
}

/// Number of the ruleset's state, one more with each transaction; none if the kernel has no nftables.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN; otherwise see [`Socket::request`].
pub fn generation(socket: &mut Socket) -> Result<Option<u32>, Error> {
    let read = |reply: Reply<'_>| {
        attributes_after(NFGENMSG, reply.payload)
            .find_map(|(kind, value)| (kind == nfta::GENERATION_ID).then(|| value.u32_be()))
            .flatten()
    };
    match socket.request("ask for the nftables generation", 0, &get(message::GET_GENERATION, 0, vec![]), read) {
        Ok(found) => Ok(found.first().copied()),
        // The subsystem is unknown: "nfnetlink_rcv_msg()" answers EINVAL.
        Err(error) if error.is_unsupported() || error.errno() == Some(Errno::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All chains.
///
/// # Errors
/// See [`Socket::dump`].
pub fn chains(socket: &mut Socket) -> Result<Vec<Chain>, Error> {
    socket.dump("list nftables chains", &get(message::GET_CHAIN, 0, vec![]), decode_chain)
}

fn decode_chain(reply: Reply<'_>) -> Option<Chain> {
    let (_, family) = kind(&reply)?;
    let (mut table, mut name, mut hook, mut chain_type, mut drops) = (None, None, None, None, false);
    for (kind, value) in attributes_after(NFGENMSG, reply.payload) {
        match kind {
            nfta::CHAIN_TABLE => table = Some(value.text()),
            nfta::CHAIN_NAME => name = Some(value.text()),
            nfta::CHAIN_TYPE => chain_type = Some(value.text()),
            nfta::CHAIN_POLICY => drops = value.u32_be() == Some(0),
            nfta::CHAIN_HOOK => {
                let priority = nested_number(value, nfta::HOOK_PRIORITY).map(u32::cast_signed);
                hook = nested_number(value, nfta::HOOK_NUMBER).zip(priority);
            }
            _ => {}
        }
    }
    Some(Chain { family, table: table?, name: name?, hook, kind: chain_type, drops })
}

/// A number among nested attributes.
fn nested_number(value: Value<'_>, wanted: u16) -> Option<u32> {
    value.nested().find_map(|(kind, value)| (kind == wanted).then(|| value.u32_be())).flatten()
}

/// The rules of one chain, in order.
///
/// # Errors
/// See [`Socket::dump`].
pub fn chain_rules(socket: &mut Socket, family: u8, table: &str, chain: &str) -> Result<Vec<Rule>, Error> {
    let attributes = vec![text(nfta::RULE_TABLE, table), text(nfta::RULE_CHAIN, chain)];
    let request = format!("list the rules of nftables chain {chain}");
    socket.dump(&request, &get(message::GET_RULE, family, attributes), |reply| {
        let rule = decode_rule(reply)?;
        // Before 4.10 the kernel passes over the names, and lists everything.
        (rule.family == family && rule.table == table && rule.chain == chain).then(|| rule.decode())
    })
}

/// Goes through all rules, in order within each chain; whether they are of one moment: if not, some may be left out, or come
/// twice.
///
/// # Errors
/// See [`Socket::visit`].
pub fn visit_rules(socket: &mut Socket, mut each: impl FnMut(&RawRule<'_>)) -> Result<bool, Error> {
    socket.visit("list nftables rules", &get(message::GET_RULE, 0, vec![]), |reply| {
        if let Some(rule) = decode_rule(reply) {
            each(&rule);
        }
    })
}

/// A rule as it came, of which only what is asked for is made out.
#[derive(Clone, Debug)]
pub struct RawRule<'a> {
    /// `NFPROTO_*` of its table.
    pub family: u8,
    /// Its table.
    pub table: Cow<'a, str>,
    /// Its chain.
    pub chain: Cow<'a, str>,
    /// Its handle.
    pub handle: u64,
    expressions: Value<'a>,
    user_data: &'a [u8],
}

impl RawRule<'_> {
    /// Those of its expressions that go by one of these names.
    pub fn named(&self, names: &[&str]) -> impl Iterator<Item = Expression> {
        self.expressions
            .nested()
            .filter(|(_, value)| Expression::name(*value).is_some_and(|name| names.contains(&&*name)))
            .map(|(_, value)| Expression::read(value))
    }

    /// All of it.
    #[must_use]
    pub fn decode(&self) -> Rule {
        Rule {
            family: self.family,
            table: self.table.to_string(),
            chain: self.chain.to_string(),
            handle: self.handle,
            expressions: self.expressions.nested().map(|(_, value)| Expression::read(value)).collect(),
            comment: decode_comment(self.user_data),
        }
    }
}

fn decode_rule(reply: Reply<'_>) -> Option<RawRule<'_>> {
    let (_, family) = kind(&reply)?;
    let (mut table, mut chain, mut handle, mut expressions, mut user_data) = (None, None, None, Value(&[]), &[][..]);
    for (kind, value) in attributes_after(NFGENMSG, reply.payload) {
        match kind {
            nfta::RULE_TABLE => table = Some(value.name()),
            nfta::RULE_CHAIN => chain = Some(value.name()),
            nfta::RULE_HANDLE => handle = value.array().map(u64::from_be_bytes),
            nfta::RULE_EXPRESSIONS => expressions = value,
            nfta::RULE_USERDATA => user_data = value.0,
            _ => {}
        }
    }
    Some(RawRule { family, table: table?, chain: chain?, handle: handle?, expressions, user_data })
}

/// A rule from a message's payload.
#[cfg(test)]
pub(crate) fn decode_golden(payload: &[u8]) -> Option<Rule> {
    decode_rule(Reply { kind: u16::from(SUBSYSTEM) << 8 | 6, payload }).map(|rule| rule.decode())
}

/// libnftnl's own encoding of user data: type, length, value; type 0 is the comment.
fn decode_comment(mut bytes: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(Value(value).text());
        }
        bytes = rest.get(usize::from(*length)..)?;
    }
    None
}

/// All sets and maps, without their elements.
///
/// # Errors
/// See [`Socket::dump`].
pub fn sets(socket: &mut Socket) -> Result<Vec<Set>, Error> {
    socket.dump("list nftables sets", &get(message::GET_SET, 0, vec![]), decode_set)
}

fn decode_set(reply: Reply<'_>) -> Option<Set> {
    let (_, family) = kind(&reply)?;
    let (mut table, mut name, mut flags, mut key_len) = (None, None, 0, 0);
    for (kind, value) in attributes_after(NFGENMSG, reply.payload) {
        match kind {
            nfta::SET_TABLE => table = Some(value.text()),
            nfta::SET_NAME => name = Some(value.text()),
            nfta::SET_FLAGS => flags = value.u32_be().unwrap_or(0),
            nfta::SET_KEY_LEN => key_len = value.u32_be().unwrap_or(0),
            _ => {}
        }
    }
    Some(Set { family, table: table?, name: name?, flags, key_len })
}

/// The elements of a set.
///
/// # Errors
/// See [`Socket::dump`].
pub fn elements(socket: &mut Socket, family: u8, table: &str, set: &str) -> Result<Vec<Element>, Error> {
    let attributes = vec![text(nfta::ELEMENTS_TABLE, table), text(nfta::ELEMENTS_SET, set)];
    let request = format!("list the elements of nftables set {set}");
    let parts = socket
        .dump(&request, &get(message::GET_ELEMENTS, family, attributes), |reply| Some(decode_elements(&reply)))?;
    Ok(parts.into_iter().flatten().collect())
}

fn decode_elements(reply: &Reply<'_>) -> Vec<Element> {
    attributes_after(NFGENMSG, reply.payload)
        .filter(|(kind, _)| *kind == nfta::ELEMENTS_LIST)
        .flat_map(|(_, value)| value.nested())
        .filter_map(|(_, value)| decode_element(value))
        .collect()
}

fn decode_element(value: Value<'_>) -> Option<Element> {
    let (mut key, mut key_end, mut flags, mut data) = (None, None, 0, None);
    for (kind, value) in value.nested() {
        match kind {
            nfta::ELEMENT_KEY => key = expression::value(value),
            nfta::ELEMENT_KEY_END => key_end = expression::value(value),
            nfta::ELEMENT_FLAGS => flags = value.u32_be().unwrap_or(0),
            nfta::ELEMENT_DATA => data = Data::read(value),
            _ => {}
        }
    }
    // NFT_SET_ELEM_CATCHALL has no key.
    let key = if flags & 2 != 0 { Vec::new() } else { key? };
    Some(Element { key, key_end, ends_interval: flags & 1 != 0, data })
}

/// A change of the ruleset, as the multicast group tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Of a table, or of something in it.
    Table {
        /// `NFPROTO_*` of the table.
        family: u8,
        /// Its name.
        name: String,
        /// Where a chain is hooked in, if it is that which is new or changed.
        hook: Option<u32>,
    },
    /// Of what, is not known.
    Unknown,
}

/// What a message of the group tells; none if it only ends what was told before (`NFT_MSG_NEWGEN`).
pub(super) fn decode_change(reply: Reply<'_>) -> Option<Change> {
    let Some((message, family)) = kind(&reply) else { return Some(Change::Unknown) };
    if message == message::NEW_GENERATION {
        return None;
    }
    let (mut table, mut hook) = (None, None);
    for (kind, value) in attributes_after(NFGENMSG, reply.payload) {
        match kind {
            // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE and so on are the first of their messages all.
            nfta::RULE_TABLE => table = Some(value.text()),
            nfta::CHAIN_HOOK if matches!(message, message::NEW_CHAIN | message::DELETE_CHAIN) => {
                hook = nested_number(value, nfta::HOOK_NUMBER);
            }
            _ => {}
        }
    }
    Some(table.map_or(Change::Unknown, |name| Change::Table { family, name, hook }))
}

/// Number of the multicast group that tells of changes (`NFNLGRP_NFTABLES`, include/uapi/linux/netfilter/nfnetlink.h).
pub const GROUP: u32 = 7;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::attribute::golden, *};

    /// What the kernel (6.18) answers to NFT_MSG_GETCHAIN, GETSET and GETSETELEM for this, given to nft 1.0.6:
    ///
    /// ```text
    /// table ip t {
    ///   map m { type ipv4_addr . inet_proto . inet_service : verdict; elements = { 10.96.0.10 . tcp . 53 : goto c } }
    ///   set n { type ipv4_addr; flags interval; elements = { 10.1.0.0/16, 10.3.0.1-10.3.0.9 } }
    ///   chain c { }
    ///   chain post { type nat hook postrouting priority 100; policy drop; }
    /// }
    /// ```
    #[test]
    fn chains_sets_and_elements_are_those_of_nft() {
        let chain = |hex: &str| decode_chain(Reply { kind: 0x0a03, payload: &golden(hex) }).unwrap();
        let table = || "t".to_owned();
        assert_eq!(
            chain("020000c2060001007400000006000300630000000c00020000000000000000010800060000000001"),
            Chain { family: 2, table: table(), name: "c".into(), hook: None, kind: None, drops: false }
        );
        let post = "020000c2060001007400000009000300706f7374000000000c00020000000000000000021400040008000100000000040800\
             0200000000640800050000000000080007006e61740008000a00000000010800060000000000";
        let hook = Some((4, 100));
        assert_eq!(
            chain(post),
            Chain { family: 2, table: table(), name: "post".into(), hook, kind: Some("nat".into()), drops: true }
        );
        let changed = decode_change(Reply { kind: 0x0a03, payload: &golden(post) });
        assert_eq!(changed, Some(Change::Table { family: 2, name: table(), hook: Some(4) }));

        let set = |hex: &str| decode_set(Reply { kind: 0x0a09, payload: &golden(hex) }).unwrap();
        let found =
            set("020000c20600010074000000060002006d0000000c00100000000000000000030800030000000008080004000000730d0800\
             05000000000c08000600ffffff00080007000000001020000d00000400000000010400000000030800040d00000001000604\
             00000000040009001700130030786666666666666666383235303766343000000800140000000001");
        // NFT_SET_MAP
        assert_eq!(found, Set { family: 2, table: table(), name: "m".into(), flags: 8, key_len: 12 });
        let found =
            set("020000c20600010074000000060002006e0000000c0010000000000000000004080003000000000408000400000000070800\
             0500000000040a000d0000040200000000000400090017001300307866666666666666663832353038306530000008001400\
             00000002");
        assert_eq!(found, Set { family: 2, table: table(), name: "n".into(), flags: SET_INTERVAL, key_len: 4 });

        let elements = |hex: &str| decode_elements(&Reply { kind: 0x0a0c, payload: &golden(hex) });
        let found = elements(
            "020000c20600010074000000060002006d000000340003003000010014000100100001000a60000a06000000003500001800\
             02001400020008000100fffffffc0600020063000000",
        );
        let key = vec![10, 96, 0, 10, 6, 0, 0, 0, 0, 53, 0, 0];
        let data = Some(Data::Verdict(-4, Some("c".into())));
        assert_eq!(found, [Element { key, key_end: None, ends_interval: false, data }]);
        let found = elements(
            "020000c20600010074000000060002006e0000006c000300180001000c000100080001000a03000a08000300000000011000\
             01000c000100080001000a030001180001000c000100080001000a0200000800030000000001100001000c00010008000100\
             0a010000180001000c00010008000100000000000800030000000001",
        );
        let keys: Vec<_> = found.iter().map(|one| (one.key.as_slice(), one.ends_interval)).collect();
        let wanted: [(&[u8], bool); 5] = [
            (&[10, 3, 0, 10], true),
            (&[10, 3, 0, 1], false),
            (&[10, 2, 0, 0], true),
            (&[10, 1, 0, 0], false),
            (&[0, 0, 0, 0], true),
        ];
        assert_eq!(keys, wanted);
    }

    proptest! {
        /// Whatever the kernel answers, reading it ends.
        #[test]
        fn garbage_is_left_out(kind in 0_u16..0x0a20, bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let reply = || Reply { kind, payload: &bytes };
            let _ = (decode_chain(reply()), decode_set(reply()), decode_elements(&reply()), decode_change(reply()));
            if let Some(rule) = decode_rule(reply()) {
                let _ = (rule.named(&["meta", "immediate"]).count(), rule.decode());
            }
            let _ = Expression::read(Value(&bytes));
        }
    }
}
