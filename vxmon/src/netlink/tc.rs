//! The clsact qdisc and the filters on it, for kernels without tcx: whether it is there, who else uses it, and removing
//! what is ours. It never attaches a program (aya does), and never removes what it was not told to remove.
//!
//! Errors say what was asked for, and leave it to the caller to name the device, which is known here by its index only.

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcHeader, TcMessage},
};
use nix::{errno::Errno, libc};

use super::{
    Error, Socket,
    attribute::{Value, attributes_after},
    socket::Reply,
};

/// Attributes of a qdisc or filter, include/uapi/linux/rtnetlink.h.
mod tca {
    pub(super) const KIND: u16 = 1;
    pub(super) const OPTIONS: u16 = 2;
    pub(super) const CHAIN: u16 = 11;
}

/// Attributes of a bpf filter within `TCA_OPTIONS`, include/uapi/linux/pkt_cls.h.
mod tca_bpf {
    pub(super) const NAME: u16 = 7;
    pub(super) const FLAGS: u16 = 8;
    pub(super) const TAG: u16 = 10;
    pub(super) const ID: u16 = 11;
    /// In FLAGS.
    pub(super) const FLAG_ACT_DIRECT: u32 = 1;
}

const CLSACT: &str = "clsact";

/// The side of a device's clsact qdisc that a filter is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Packets that come in by the device.
    Ingress,
    /// Packets that leave by it.
    Egress,
}

impl Direction {
    /// The parent to which filters of this side are attached (include/uapi/linux/pkt_sched.h).
    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { minor, ..TcHandle::CLSACT }
    }
}

impl std::fmt::Display for Direction {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// Whether [`clsact_add`] made the qdisc or found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// It was not there: whoever asked is its owner now.
    Created,
    /// It was there: somebody else owns it.
    Existed,
}

/// A filter on a clsact qdisc.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// `tc`'s `pref`: lower runs first.
    pub priority: u16,
    /// Its number within that priority.
    pub handle: u32,
    /// What it matches on, ETH_P_* in host byte order: 3 is all.
    pub protocol: u16,
    /// Chain it belongs to; packets begin with 0.
    pub chain: u32,
    /// Classifier: `bpf`, `flower`, `u32`.
    pub kind: String,
    /// Name given to a bpf filter.
    pub name: Option<String>,
    /// Id of a bpf filter's program, as `bpftool prog` shows it (since 4.13).
    pub program: Option<u32>,
    /// Tag of a bpf filter's program: the start of a hash of its instructions.
    pub tag: Option<[u8; 8]>,
    /// The program's return value is the verdict (`direct-action`).
    pub direct_action: bool,
}

/// The kind of qdisc at the device's ingress hook: `clsact`, or `ingress`, which has no egress side and is in the way of a
/// clsact; `None` if there is none.
///
/// # Errors
/// [`Error::Refused`] with `ENODEV` if there is no such device; otherwise see [`Socket::request`].
pub fn hook_qdisc(socket: &mut Socket, ifindex: u32) -> Result<Option<String>, Error> {
    let message = RouteNetlinkMessage::GetQueueDiscipline(message(ifindex, TcHandle::CLSACT));
    // Without the flag the answer goes to the listeners of the TC group, and not to who asked (qdisc_notify,
    // net/sched/sch_api.c).
    let found = socket.request("read the clsact qdisc", NLM_F_ECHO, &message, decode_qdisc);
    match found {
        Ok(kinds) => Ok(kinds.into_iter().next()),
        // ENOENT: no such qdisc. EINVAL: a built-in one, which is not shown.
        Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EINVAL)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the device has a clsact qdisc.
///
/// # Errors
/// As [`hook_qdisc`].
pub fn clsact_exists(socket: &mut Socket, ifindex: u32) -> Result<bool, Error> {
    Ok(hook_qdisc(socket, ifindex)?.as_deref() == Some(CLSACT))
}

/// Adds a clsact qdisc to the device, unless it has one, and says which of both was so. Needs CAP_NET_ADMIN.
///
/// # Errors
/// [`Error::Refused`] with `EEXIST` if an `ingress` qdisc is in the way, `EPERM` without the privilege, `ENODEV` if there is
/// no such device, `ENOENT` or `EINVAL` if the kernel has no clsact (before 4.5); otherwise see [`Socket::request`].
pub fn clsact_add(socket: &mut Socket, ifindex: u32) -> Result<Added, Error> {
    let mut message = message(ifindex, TcHandle::CLSACT);
    message.header.handle = TcHandle { minor: 0, ..TcHandle::CLSACT };
    message.attributes.push(TcAttribute::Kind(CLSACT.into()));
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    let added = socket.request("add a clsact qdisc", NLM_F_CREATE | NLM_F_EXCL, &message, |_| None::<()>);
    match added {
        Ok(_) => Ok(Added::Created),
        Err(error) if error.errno() == Some(Errno::EEXIST) => match hook_qdisc(socket, ifindex)? {
            Some(kind) if kind == CLSACT => Ok(Added::Existed),
            _ => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// Removes the device's clsact qdisc, and **every filter on it**, whoever put it there. Needs CAP_NET_ADMIN.
///
/// # Errors
/// [`Error::Refused`] with `ENOENT` or `EINVAL` if there is none; otherwise see [`Socket::request`].
pub fn clsact_del(socket: &mut Socket, ifindex: u32) -> Result<(), Error> {
    let mut message = message(ifindex, TcHandle::CLSACT);
    message.header.handle = TcHandle { minor: 0, ..TcHandle::CLSACT };
    message.attributes.push(TcAttribute::Kind(CLSACT.into()));
    let message = RouteNetlinkMessage::DelQueueDiscipline(message);
    socket.request("remove the clsact qdisc", 0, &message, |_| None::<()>).map(drop)
}

/// Removes the device's clsact qdisc if no filter is left on either side, and says whether it did. A filter that somebody
/// adds between the look and the removal is lost with it, as the kernel has no such operation in one step.
///
/// # Errors
/// As [`filters`] and [`clsact_del`].
pub fn clsact_del_if_unused(socket: &mut Socket, ifindex: u32) -> Result<bool, Error> {
    for direction in [Direction::Egress, Direction::Ingress] {
        if !filters(socket, ifindex, direction)?.is_empty() {
            return Ok(false);
        }
    }
    clsact_del(socket, ifindex).map(|()| true)
}

/// The filters on one side of the device's clsact qdisc, in the order in which they run; none without the qdisc.
///
/// # Errors
/// See [`Socket::dump`].
pub fn filters(socket: &mut Socket, ifindex: u32, direction: Direction) -> Result<Vec<Filter>, Error> {
    let parent = direction.parent();
    let message = RouteNetlinkMessage::GetTrafficFilter(message(ifindex, parent));
    let found = socket.dump(&format!("list {direction} filters"), &message, decode);
    match found {
        Ok(mut filters) => {
            filters.sort_by_key(|filter| (filter.chain, filter.priority));
            Ok(filters)
        }
        // Without the qdisc most kernels answer with an empty list, some with an error.
        Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::ENOENT)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Removes one filter. `protocol` is in host byte order, as in [`Filter`]. Needs CAP_NET_ADMIN.
///
/// # Errors
/// [`Error::Refused`] with `ENOENT` or `EINVAL` if there is no such filter, or if `priority` is 0 (which would mean every
/// filter there); otherwise see [`Socket::request`].
pub fn filter_del(
    socket: &mut Socket,
    ifindex: u32,
    direction: Direction,
    priority: u16,
    handle: u32,
    protocol: u16,
) -> Result<(), Error> {
    let request = format!("remove {direction} filter {priority}:{handle:#x}");
    if priority == 0 || handle == 0 {
        let detail = Some("0 would mean every filter".to_owned());
        return Err(Error::Refused { request, errno: Errno::EINVAL, detail });
    }
    let mut message = message(ifindex, direction.parent());
    message.header.handle = handle.into();
    message.header.info = u32::from(priority) << 16 | u32::from(protocol.to_be());
    socket.request(&request, 0, &RouteNetlinkMessage::DelTrafficFilter(message), |_| None::<()>).map(drop)
}

fn message(ifindex: u32, parent: TcHandle) -> TcMessage {
    // Indexes are positive ints in the kernel.
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = parent;
    message
}

/// The kind of a qdisc that sits at the ingress hook.
fn decode_qdisc(reply: Reply<'_>) -> Option<String> {
    if reply.kind != libc::RTM_NEWQDISC {
        return None;
    }
    let header = TcHeader::parse(reply.payload).ok()?;
    if header.parent != TcHandle::CLSACT {
        return None;
    }
    let mut attributes = attributes_after(header.buffer_len(), reply.payload);
    attributes.find_map(|(kind, value)| (kind == tca::KIND).then(|| value.text()))
}

fn decode(reply: Reply<'_>) -> Option<Filter> {
    if reply.kind != libc::RTM_NEWTFILTER {
        return None;
    }
    let header = TcHeader::parse(reply.payload).ok()?;
    let [high, low, protocol @ ..] = header.info.to_be_bytes();
    let mut filter = Filter {
        priority: u16::from_be_bytes([high, low]),
        handle: header.handle.into(),
        // The lower half holds it as it is in a frame.
        protocol: u16::from_be(u16::from_be_bytes(protocol)),
        ..Filter::default()
    };
    let mut has_options = false;
    for (kind, value) in attributes_after(header.buffer_len(), reply.payload) {
        match kind {
            tca::KIND => filter.kind = value.text(),
            tca::CHAIN => filter.chain = value.u32().unwrap_or_default(),
            tca::OPTIONS => {
                has_options = true;
                if filter.kind == "bpf" {
                    decode_bpf(value, &mut filter);
                }
            }
            _ => {}
        }
    }
    // Each priority is announced first, by a message without handle and options, which is no filter.
    (has_options || filter.handle != 0).then_some(filter)
}

fn decode_bpf(options: Value<'_>, filter: &mut Filter) {
    for (kind, value) in options.nested() {
        match kind {
            tca_bpf::NAME => filter.name = Some(value.text()),
            tca_bpf::FLAGS => {
                filter.direct_action = value.u32().is_some_and(|flags| flags & tca_bpf::FLAG_ACT_DIRECT != 0);
            }
            tca_bpf::TAG => filter.tag = value.array(),
            tca_bpf::ID => filter.program = value.u32(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tc filter add dev eth0 egress pref 7 bpf da bytecode '1,6 0 0 0'`, then what Linux 6.18 answers to
    /// `tc filter show dev eth0 egress`: first the priority, then the filter.
    #[rustfmt::skip]
    const PRIORITY: [u8; 36] = [
        0, 0, 0, 0, 3, 0, 0, 0,                 // struct tcmsg: device 3
        0, 0, 0, 0, 0xf3, 0xff, 0xff, 0xff, 0, 3, 7, 0, // handle 0, parent ffff:fff3, priority 7 and ETH_P_ALL
        8, 0, 1, 0, b'b', b'p', b'f', 0,        // TCA_KIND
        8, 0, 11, 0, 0, 0, 0, 0,                // TCA_CHAIN
    ];
    #[rustfmt::skip]
    const FILTER: [u8; 76] = [
        0, 0, 0, 0, 3, 0, 0, 0,                 // struct tcmsg: device 3
        1, 0, 0, 0, 0xf3, 0xff, 0xff, 0xff, 0, 3, 7, 0, // handle 1
        8, 0, 1, 0, b'b', b'p', b'f', 0,        // TCA_KIND
        8, 0, 11, 0, 0, 0, 0, 0,                // TCA_CHAIN
        40, 0, 2, 0,                            // TCA_OPTIONS
        6, 0, 4, 0, 1, 0, 0, 0,                 // TCA_BPF_OPS_LEN
        12, 0, 5, 0, 6, 0, 0, 0, 0, 0, 0, 0,    // TCA_BPF_OPS
        8, 0, 8, 0, 1, 0, 0, 0,                 // TCA_BPF_FLAGS: TCA_BPF_FLAG_ACT_DIRECT
        8, 0, 9, 0, 8, 0, 0, 0,                 // TCA_BPF_FLAGS_GEN: not in hardware
    ];

    #[test]
    fn a_filter_and_the_announcement_of_its_priority() {
        assert_eq!(decode(Reply { kind: libc::RTM_NEWTFILTER, payload: &PRIORITY }), None);
        let expected = Filter {
            priority: 7,
            handle: 1,
            protocol: libc::ETH_P_ALL as u16,
            kind: "bpf".into(),
            direct_action: true,
            ..Filter::default()
        };
        assert_eq!(decode(Reply { kind: libc::RTM_NEWTFILTER, payload: &FILTER }), Some(expected));
    }

    #[test]
    fn cut_anywhere_it_never_panics() {
        for length in 0..FILTER.len() {
            let _ = decode(Reply { kind: libc::RTM_NEWTFILTER, payload: &FILTER[..length] });
        }
    }
}
