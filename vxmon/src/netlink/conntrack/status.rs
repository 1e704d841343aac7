//! The status bits of a conntrack entry in words. Needs nothing of netlink: the bits may come from an skb too.

/// Names by bit number: enum ip_conntrack_status of include/uapi/linux/netfilter/nf_conntrack_common.h, without `IPS_`.
const NAMES: [&str; 16] = [
    "expected",
    "seen-reply",
    "assured",
    "confirmed",
    "src-nat",
    "dst-nat",
    "seq-adjust",
    "src-nat-done",
    "dst-nat-done",
    "dying",
    "fixed-timeout",
    "template",
    // IPS_NAT_CLASH inside the kernel since 5.0, where no packet's entry has had IPS_UNTRACKED since 4.12.
    "nat-clash",
    "helper",
    "offload",
    "hw-offload",
];

/// IPS_SRC_NAT: the source is rewritten in the original direction.
pub const SRC_NAT: u32 = 1 << 4;
/// IPS_DST_NAT: the destination is rewritten in the original direction.
pub const DST_NAT: u32 = 1 << 5;

/// The names of the bits set in `status`, lowest first. Bits without a name are left out.
#[must_use]
pub fn names(status: u32) -> Vec<&'static str> {
    NAMES.iter().enumerate().filter(|(bit, _)| status & (1 << bit) != 0).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_the_names_of_the_event_schema() {
        // Seen on real entries (facts.md): an unreplied flow, plain and source-NATed.
        assert_eq!(names(0x188), ["confirmed", "src-nat-done", "dst-nat-done"]);
        assert_eq!(names(0x198), ["confirmed", "src-nat", "src-nat-done", "dst-nat-done"]);
        assert_eq!(names(0), [""; 0]);
        assert_eq!(names(u32::MAX).len(), 16);
        assert_eq!(names(1 << 15), ["hw-offload"]);
        assert_eq!(names(SRC_NAT | DST_NAT), ["src-nat", "dst-nat"]);
    }
}
