//! The NAT rules of this node, from all three homes in one model: which of them translated a packet, and why it was asked to.
//!
//! ```text
//! legacy, nft  readers: xtables by getsockopt; nftables (iptables-nft and native) by netlink
//! xt           structures of xtables' matches and targets, which both readers meet
//! reach        which chains matter: the others are not kept
//! model        the ruleset
//! matching     the rule that a packet reaches: yes, no, cannot tell
//! explain      from that to a finding: the rule, its mark, who set it, why nobody cleared it
//! render       rules as one would type them
//! watch        threads that read, and read again when something changed
//! ```
//! It changes nothing, it creates no table, and it never runs on the thread that handles events but for looking things up.

pub mod explain;
pub mod ipset;
pub mod legacy;
pub mod matching;
pub mod model;
pub mod nft;
pub mod reach;
pub mod render;
pub mod snapshot;
pub mod watch;
mod xt;

pub use explain::{Finding, Question, Why};
pub use matching::{Device, Packet, World};
pub use model::{Backend, RuleId, Ruleset};
pub use reach::Keep;
pub use snapshot::Snapshot;
pub use watch::{Now, Reading, Rules};
