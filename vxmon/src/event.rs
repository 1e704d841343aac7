//! The schema `vxmon.event/1`: what `attach` says, one JSON object a line. Names and formats are a contract with users'
//! scripts; `docs/event.schema.json` is made from these types. Only data: nothing here decides or prints.

use std::collections::BTreeMap;

use jiff::{Timestamp, fmt::temporal::DateTimePrinter};
use schemars::{JsonSchema, Schema};
use serde::Serialize;
use vxmon_common::{
    event::{self, event_flag},
    judge::{State, Verdict},
};

/// Name and version of the schema.
pub const SCHEMA: &str = "vxmon.event/1";

/// The JSON Schema of a line, as it stands in `docs/event.schema.json`.
pub fn schema() -> Schema {
    schemars::generate::SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<Line>()
}

/// A time as events show it: RFC 3339, UTC, microseconds.
pub fn rfc3339(time: Timestamp) -> String {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = PRINTER.print_timestamp(&time, &mut text);
    text
}

/// The verdicts that are reported, by name.
fn anomaly_names() -> Vec<&'static str> {
    Verdict::ALL.into_iter().filter(|verdict| verdict.is_anomaly()).map(Verdict::name).collect()
}

/// A line that `vxmon attach --format json` writes.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(title = "vxmon.event/1")]
pub struct Line {
    /// Always `vxmon.event/1`. New fields, record types and verdicts may come; a change that breaks readers makes it `/2`.
    #[schemars(extend("const" = SCHEMA))]
    pub schema: &'static str,
    /// What happened.
    #[serde(flatten)]
    pub record: Record,
}

impl From<Record> for Line {
    fn from(record: Record) -> Self {
        Self { schema: SCHEMA, record }
    }
}

/// What happened.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Record {
    /// A packet with a wrong checksum.
    Anomaly(Box<Anomaly>),
    /// A connection that had packets with a wrong checksum has one with a right one.
    Recovered(Box<Ending>),
    /// No more is expected of a connection that had packets with a wrong checksum.
    NotRecovered(Box<Ending>),
    /// A device is watched from now on.
    Attached(Attached),
    /// A device is no longer watched.
    Detached(Detached),
    /// A VXLAN device's checksum offload was switched, or came back with a device made anew.
    Offload(Offload),
    /// Anomalies were counted but could not be reported.
    Lost(Lost),
    /// This reader of the socket was too slow: lines went by that it did not get.
    Missed(Missed),
    /// The last line: everything that was seen.
    Summary(Summary),
}

/// A packet with a wrong checksum.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Anomaly {
    /// When the packet left, RFC 3339, UTC, microseconds.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// Device by which it left.
    pub dev: String,
    /// The device's index.
    pub ifindex: u32,
    /// `uplink` or `vxlan`.
    #[schemars(extend("enum" = ["uplink", "vxlan"]))]
    pub role: &'static str,
    /// `nat-mangled-zero`, `nat-stale-port`, `bad-outer`, `bad-inner`, `zero-outer-v6` or `malformed`.
    #[schemars(extend("enum" = anomaly_names()))]
    pub verdict: &'static str,
    /// The checksum.
    pub csum: Csum,
    /// The outer packet's UDP endpoints; null on a VXLAN device, where there is no outer packet yet.
    pub outer: Option<Endpoints>,
    /// The VXLAN network identifier.
    pub vni: Option<u32>,
    /// The VXLAN device that the packet came from, by VNI and port; left out if that does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vxlan_dev: Option<String>,
    /// The packet inside.
    pub inner: Option<Inner>,
    /// `skb->mark`, hexadecimal; null where it cannot be seen, by a packet socket.
    pub mark: Option<String>,
    /// The outer packet's conntrack entry.
    pub ct: Option<Ct>,
    /// The NAT that rewrote the outer packet.
    pub nat: Option<Nat>,
    /// Why the checksum is wrong.
    pub cause: Option<Cause>,
    /// The story so far of the connection inside.
    pub flow: Option<Flow>,
    /// Anomalies of the same flow since the last one reported, counted but not reported.
    pub suppressed: u64,
    /// Sections that are null, and why.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub missing: BTreeMap<&'static str, String>,
    /// For a capture file, if there is one; no part of the event.
    #[serde(skip)]
    pub packet: Packet,
}

/// The first bytes of a packet, as it was when it was judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// The bytes.
    pub head: Vec<u8>,
    /// Length of the whole packet in bytes.
    pub len: u32,
    /// It begins with its IP header.
    pub bare: bool,
}

impl From<&event::Event> for Packet {
    fn from(event: &event::Event) -> Self {
        Self {
            head: event.head.iter().take(event.head_len as usize).copied().collect(),
            len: event.len,
            bare: event.flags & event_flag::BARE != 0,
        }
    }
}

/// A checksum field. Values are hexadecimal, in network order.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Csum {
    /// What the field holds.
    pub seen: String,
    /// What it should hold; null where no one value is right.
    pub expected: Option<String>,
    /// `skb->ip_summed`: `none`, `unnecessary`, `complete`, `partial`, or `unknown`.
    #[schemars(extend("enum" = State::ALL.map(State::name)))]
    pub state: &'static str,
    /// Where the checksum that is filled in later starts, bytes from the packet's first byte; null unless partial.
    pub start: Option<u32>,
    /// Payload bytes of each segment of a packet that is segmented later; 0 otherwise.
    pub gso_size: u32,
}

/// Addresses and ports of one packet or direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Endpoints {
    /// Source address.
    pub src: String,
    /// Source port.
    pub sport: u16,
    /// Destination address.
    pub dst: String,
    /// Destination port.
    pub dport: u16,
}

/// The packet inside the tunnel packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Inner {
    /// `tcp`, `udp`, `icmp`, `icmpv6`, or the protocol's number.
    pub proto: String,
    /// Source address.
    pub src: String,
    /// Source port, if the protocol has ports.
    pub sport: Option<u16>,
    /// Destination address.
    pub dst: String,
    /// Destination port.
    pub dport: Option<u16>,
    /// TCP flags as tcpdump writes them: `S`, `S.`, `P.`, `F.`, `R`, …
    pub flags: Option<String>,
    /// TCP sequence number.
    pub seq: Option<u32>,
}

/// A conntrack entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Ct {
    /// The original direction, before NAT.
    pub orig: Endpoints,
    /// The reply direction: what answers to the packet after NAT look like.
    pub reply: Endpoints,
    /// Status bits by name (`IPS_*`).
    pub status: Vec<&'static str>,
    /// `skb`: read from the packet itself; `netlink`: looked up afterwards.
    #[schemars(extend("enum" = ["skb", "netlink"]))]
    pub source: &'static str,
}

/// The NAT of the outer packet. Fields after `backend` are left out where there is nothing to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Nat {
    /// How it is known that `--random-fully` chose the port: `observed` in the kernel as it happened, see `range_flags`;
    /// `rule`: a live rule with random-fully is the one that this packet's connection reached; `port-rewritten`: the port was
    /// rewritten, and `reason` says why no rule is named for it; `no`: the port was not rewritten, or by a rule without
    /// random-fully, or, with `range_flags`, the kernel was seen to choose it otherwise; `unknown`: the conntrack entry could
    /// not be had, or the packet is not as the entry has it, and `reason` says which.
    #[schemars(extend("enum" = ["observed", "rule", "port-rewritten", "no", "unknown"]))]
    pub random_fully: &'static str,
    /// The flags by which the kernel was seen to set this connection's NAT up (`NF_NAT_RANGE_*`). Left out if that was not
    /// seen: the connection is older than the monitor, or the kernel has no kprobes (`attached` says so).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range_flags: Option<Vec<&'static str>>,
    /// The rule, as one would type it.
    pub rule: Option<String>,
    /// Where the rule lives: `iptables-legacy`, `iptables-nft` or `nftables`.
    #[schemars(extend("enum" = ["iptables-legacy", "iptables-nft", "nftables", null]))]
    pub backend: Option<&'static str>,
    /// The rule's table, with its family: `ip nat`, `ip6 nat`, `inet fw`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    /// The rule's chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// The rule's number in its chain, from 1, as `iptables -L --line-numbers` counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<u32>,
    /// The rule's handle, as `nft -a list ruleset` shows it; iptables-legacy has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handle: Option<u64>,
    /// Rules were being changed when the packet left, and both the last reading before it and one after it name this rule. It
    /// may have been written anew in between, with the same words: `handle` and `position` are left out where the two readings
    /// differ, and those of other rules are as they were before.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub changing: bool,
    /// Why no rule is named, where one should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The bits of `skb->mark` for which the rule takes the packet, hexadecimal: they were set on the inner packet and
    /// survived its encapsulation. The packet may have lost them since: rules can clear a mark as they masquerade.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
    /// Why the outer packet was masqueraded at all. `mark-not-cleared`: no rule clears the mark (kube-proxy before
    /// 1.16.13, 1.17.9, 1.18.6). `old-rule-first`: `cleared_by` does, but the rule named comes before it. `snat-ahead`:
    /// `cleared_by` does, but `ahead`, another translation, ended the inner packet's way before it. `return-ahead`: likewise,
    /// `ahead` being a RETURN or ACCEPT. `unclear`: `cleared_by` does, and nothing
    /// found keeps the inner packet from it. `no-mark`: the rule does not look at the mark.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["mark-not-cleared", "old-rule-first", "snat-ahead", "return-ahead", "unclear", "no-mark", null]))]
    pub why: Option<&'static str>,
    /// The rules that set these bits.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set_by: Vec<NatRule>,
    /// The rule that clears these bits in POSTROUTING.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cleared_by: Option<NatRule>,
    /// The rule because of which the inner packet does not get to `cleared_by`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ahead: Option<NatRule>,
    /// The rules of which it may be any, if it cannot be told which.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<NatRule>,
    /// Rules on the packet's way with a part that vxmon cannot read or evaluate.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<NatRule>,
}

/// A rule, and where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct NatRule {
    /// The rule, as one would type it.
    pub rule: String,
    /// `iptables-legacy`, `iptables-nft` or `nftables`.
    #[schemars(extend("enum" = ["iptables-legacy", "iptables-nft", "nftables"]))]
    pub backend: &'static str,
    /// The table, with its family.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Its number in the chain, from 1.
    pub position: u32,
    /// Its handle; null in iptables-legacy.
    pub handle: Option<u64>,
}

/// Why the checksum is wrong.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Cause {
    /// The value that the fault leaves, computed from the conntrack entry alone, hexadecimal, network order.
    pub predicted: Option<String>,
    /// The predicted value is the one seen.
    pub proved: bool,
    /// Only where the conntrack entry is not known: the source port with which the seen checksum would be right. If that is
    /// the port before NAT, it is fault B; other errors give some port as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub right_for_sport: Option<u16>,
}

/// The story so far of the connection inside (protocol, addresses, ports and VNI), whatever outer flows carried it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Flow {
    /// Number of this bad packet among those of its connection, from 1; repeats that were not reported are counted.
    pub attempt: u64,
    /// Milliseconds since the first one that was reported.
    pub since_first_ms: u64,
    /// How long the outer conntrack entry, and with it the rewritten port, lives after this packet, by the kernel parameter
    /// as it is now: `nf_conntrack_udp_timeout`, or `nf_conntrack_udp_timeout_stream` for an assured entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conntrack_timeout_s: Option<u64>,
    /// When the retry is expected to leave that gets through, if TCP goes on as the kernel parameters say; left out where
    /// that cannot be told, or none will.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_recovery: Option<String>,
    /// Why that one: `conntrack-timeout`: it comes after the entry has expired; `source-port`: it is the next retry, and
    /// retries change the outer source port (`net.core.txrehash`; before 5.18 all of them from 4.10 on).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["conntrack-timeout", "source-port", null]))]
    pub expected_by: Option<&'static str>,
    /// A retry had a new conntrack entry, and was rewritten and broken again: waiting does not help.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rewritten_anew: bool,
}

/// How the story of a connection with bad packets ended. Times in milliseconds count from its first bad packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Ending {
    /// When: the packet that ended it, or when it was given up, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// Device by which its last packet left.
    pub dev: String,
    /// The device's index.
    pub ifindex: u32,
    /// The VXLAN network identifier.
    pub vni: Option<u32>,
    /// The connection inside; flags and sequence number are null.
    pub inner: Inner,
    /// `connected`: TCP whose bad packets were SYNs; a right packet that is no SYN left, so a SYN was answered.
    /// `good-again`: a right packet left; whether it was answered cannot be seen here. Not recovered: `not-seen-again`: no
    /// further packet came; `not-answered`: a right SYN left, and nothing after it; `reset`: this side aborted it.
    #[schemars(extend("enum" = ["connected", "good-again", "not-seen-again", "not-answered", "reset"]))]
    pub outcome: &'static str,
    /// `ts`.
    pub after_ms: u64,
    /// Bad packets, those included that were not reported.
    pub bad_packets: u64,
    /// TCP SYNs among them.
    pub bad_syns: u64,
    /// The last bad packet.
    pub last_bad_ms: u64,
    /// The first right packet after it.
    pub first_good_ms: Option<u64>,
    /// Why that one was right: `source-port`: it left with another outer source port before NAT; `conntrack-timeout`: with
    /// the same one, longer than the timeout after the last bad one. Null if neither was seen.
    #[schemars(extend("enum" = ["conntrack-timeout", "source-port", null]))]
    pub by: Option<&'static str>,
    /// What the last anomaly said.
    pub expected_recovery: Option<String>,
    /// Its first packets, as far as they were reported.
    pub attempts: Vec<Attempt>,
}

/// A packet of a connection that had bad ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Attempt {
    /// When it left.
    pub after_ms: u64,
    /// Its outer source port as it left.
    pub sport: Option<u16>,
    /// Its checksum was wrong.
    pub bad: bool,
}

/// A device is watched.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Attached {
    /// Since when, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// The device.
    pub dev: String,
    /// Its index.
    pub ifindex: u32,
    /// `uplink` or `vxlan`.
    #[schemars(extend("enum" = ["uplink", "vxlan"]))]
    pub role: &'static str,
    /// Why it is watched.
    pub why: Vec<String>,
    /// How it is watched: by a TC program attached by `tcx` or `clsact`, or by a `packet-socket`.
    #[schemars(extend("enum" = ["tcx", "clsact", "packet-socket"]))]
    pub hook: &'static str,
    /// Where the checksum's state is known from: `skb`; `packet-socket`, the header that it puts in front of each packet;
    /// or `none`, where any consistent reading is accepted.
    #[schemars(extend("enum" = ["skb", "packet-socket", "none"]))]
    pub metadata: &'static str,
    /// How a TC program hands events over: by a ring buffer, or by perf buffers, as on kernels before 5.8; null for a packet
    /// socket.
    #[schemars(extend("enum" = ["ringbuf", "perf", null]))]
    pub transport: Option<&'static str>,
    /// Why it is watched by a packet socket though TC programs were preferred, or by perf buffers though a ring buffer was;
    /// null otherwise.
    pub fallback: Option<String>,
    /// How NAT is seen as it is set up, which is what evidence `observed` needs: by a `kprobe`; null: not, and `missing` says
    /// why.
    #[schemars(extend("enum" = ["kprobe", null]))]
    pub nat_probe: Option<&'static str>,
    /// Sections that are null, and why.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub missing: BTreeMap<&'static str, String>,
}

/// A device is no longer watched.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Detached {
    /// Since when, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// The device.
    pub dev: String,
    /// Its index.
    pub ifindex: u32,
    /// Why it is no longer watched.
    pub why: &'static str,
}

/// Anomalies that were counted but could not be reported, and packets that could not be looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Lost {
    /// When it was noticed, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// Since the last such line: not sent by the kernel program, the ring buffer being full.
    pub ring: u64,
    /// Since the last such line: not written, the reader of the output being slow.
    pub queue: u64,
    /// Since the last such line: packets that were not judged at all, the packet socket's ring being full.
    pub capture: u64,
}

/// A VXLAN device's checksum offload is not what it was. With it on, NAT of the outer packets breaks their checksums.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Offload {
    /// When it was noticed, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// The VXLAN device.
    pub dev: String,
    /// Its index.
    pub ifindex: u32,
    /// The feature, as ethtool names it.
    #[schemars(extend("enum" = ["tx-checksum-ip-generic"]))]
    pub feature: &'static str,
    /// `on` or `off`.
    #[schemars(extend("enum" = ["on", "off"]))]
    pub state: &'static str,
    /// What it was before, on the device or on the one of that name before it.
    #[schemars(extend("enum" = ["on", "off"]))]
    pub was: &'static str,
    /// `switched`: on the same device; `recreated`: the device was made anew.
    #[schemars(extend("enum" = ["switched", "recreated"]))]
    pub why: &'static str,
}

/// Lines that one reader of the socket did not get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Missed {
    /// When it was told, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// How many lines, of whatever type; whether they would have passed the reader's filters is not known.
    pub lines: u64,
}

/// Everything that was seen.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Summary {
    /// When, RFC 3339, UTC.
    pub ts: String,
    /// Host name of the node.
    pub node: String,
    /// Of all devices together. A packet that passes an uplink was, as a frame, also seen by its VXLAN device.
    pub packets: Packets,
    /// By device.
    pub devices: Vec<DeviceSummary>,
    /// Connections that had packets with a wrong checksum.
    pub connections: Connections,
    /// How long it was watched, seconds.
    pub seconds: f64,
}

/// Connections with bad packets by what became of them: all but `bad` and `untold` add up to `bad`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Connections {
    /// All.
    pub bad: u64,
    /// Those with a line `recovered`.
    pub recovered: u64,
    /// Those with a line `not-recovered`.
    pub not_recovered: u64,
    /// Those that had not ended yet.
    pub open: u64,
    /// Those that were forgotten in favour of newer ones.
    pub evicted: u64,
    /// Lines `recovered` and `not-recovered` that could not be written.
    pub untold: u64,
}

/// What one device did.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceSummary {
    /// The device.
    pub dev: String,
    /// Its index; a device made anew has another one, and a line of its own.
    pub ifindex: u32,
    /// `uplink` or `vxlan`.
    #[schemars(extend("enum" = ["uplink", "vxlan"]))]
    pub role: &'static str,
    /// What it sent.
    pub packets: Packets,
}

/// Packets by what came of them. `verdicts` and `unverified` add up to `seen`.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Packets {
    /// VXLAN packets on uplinks, and on VXLAN devices frames with a checksum that vxmon knows.
    pub seen: u64,
    /// Everything else that passed.
    pub other: u64,
    /// Packets that a device stacked on this one had counted already; not in `seen`.
    pub counted_above: u64,
    /// Packets by verdict.
    pub verdicts: BTreeMap<&'static str, u64>,
    /// Packets that could not be judged, by reason.
    pub unverified: BTreeMap<&'static str, u64>,
    /// Anomalies by what became of them; with `lost.ring` and `lost.queue` they add up to the anomalies among the verdicts.
    pub anomalies: Anomalies,
    /// What was lost on the way, by stage.
    pub lost: LostByStage,
}

/// Anomalies by what became of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Anomalies {
    /// Reported, each by a line.
    pub reported: u64,
    /// Counted with the next report of the same flow, as repeats within a second.
    pub suppressed: u64,
}

/// What was lost on the way: anomalies that are counted among the verdicts, or (`capture`) packets that are counted nowhere else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LostByStage {
    /// The ring buffer was full.
    pub ring: u64,
    /// The reader of the output was slow, or gone.
    pub queue: u64,
    /// Packets not judged at all, the packet socket's ring being full. TC programs see every packet.
    pub capture: u64,
}
