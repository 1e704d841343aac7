//! News from the kernel that links, addresses, routes or VXLAN forwarding entries changed, gathered so that a storm of
//! them costs a bounded number of dumps. It says that something changed and never what it is now: whoever needs that asks
//! again, so a lost notification costs no more than one question.

use std::{collections::BTreeSet, io, time::Duration};

use netlink_packet_core::{NLMSG_ALIGNTO, NetlinkBuffer};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};
use tokio::time::{Instant, sleep_until};

use super::{Error, fdb, link, socket::Protocol};

/// Room for notifications that arrive while nobody reads, in bytes.
const RECEIVE_BUFFER: usize = 1 << 20;
/// More than any one notification: the kernel builds them in a page or so, and a link's in at most 64 KiB.
const MESSAGE: usize = 64 * 1024;
/// How many datagrams are read before other tasks of the runtime get their turn.
const BURST: usize = 256;

/// The groups listened to: RTNLGRP_* of include/uapi/linux/rtnetlink.h (enum rtnetlink_groups).
const GROUPS: [u32; 6] = [
    1,  // LINK
    3,  // NEIGH, which carries forwarding entries too
    5,  // IPV4_IFADDR
    7,  // IPV4_ROUTE
    9,  // IPV6_IFADDR
    11, // IPV6_ROUTE
];
/// RTNLGRP_NEXTHOP, since 5.3.
const NEXTHOP_GROUP: u32 = 32;

/// How long news is gathered before it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// From the first change to telling it, when nothing was told lately: what belongs together arrives within it.
    pub settle: Duration,
    /// The least time between two tellings, if a link changed.
    pub links: Duration,
    /// The least time between two tellings, if only addresses, routes or forwarding entries changed.
    pub others: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            settle: Duration::from_millis(20),
            links: Duration::from_millis(100),
            others: Duration::from_millis(1000),
        }
    }
}

/// What has changed since it was last told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// A device came, went, or changed: name, state, master, offloads.
    pub links: bool,
    /// An address came or went.
    pub addresses: bool,
    /// A route or a next hop came, went or changed.
    pub routes: bool,
    /// A forwarding entry with a remote address (those of VXLAN devices) came or went.
    pub fdb: bool,
    /// Notifications were lost: anything may have changed.
    pub lost: bool,
    /// Indexes of devices that were deleted, or moved to another namespace. A device may have come back since under the
    /// same index and name: it is another one, and nothing is attached to it.
    pub removed: BTreeSet<u32>,
}

impl Changes {
    /// Whether there is anything to tell.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn is_urgent(&self) -> bool {
        self.links || self.lost
    }
}

/// Changes that were not told yet, and when they are to be.
#[derive(Debug, Default)]
struct Pending {
    changes: Changes,
    /// When the first of them arrived.
    since: Option<Instant>,
    /// When others were told last.
    told: Option<Instant>,
}

impl Pending {
    /// When to tell, if there is something to tell.
    fn due(&self, pace: &Pace) -> Option<Instant> {
        let settled = self.since? + pace.settle;
        let interval = if self.changes.is_urgent() { pace.links } else { pace.others };
        Some(self.told.map_or(settled, |told| settled.max(told + interval)))
    }

    /// Notes that something may have arrived.
    fn touch(&mut self, now: Instant) {
        if self.since.is_none() && !self.changes.is_empty() {
            self.since = Some(now);
        }
    }

    fn tell(&mut self, now: Instant) -> Changes {
        self.since = None;
        self.told = Some(now);
        std::mem::take(&mut self.changes)
    }
}

/// Listens to the network namespace of the thread that opened it.
pub struct Monitor {
    socket: TokioSocket,
    pace: Pace,
    buffer: Vec<u8>,
    pending: Pending,
}

impl Monitor {
    /// Begins to listen. What changes from now on is told; take the first snapshot after this call, so that nothing
    /// falls between. Needs a Tokio runtime with I/O and time, and no privilege.
    ///
    /// # Errors
    /// [`Error::Open`] with what the system call said.
    pub fn open(pace: Pace) -> Result<Self, Error> {
        let open = |source| Error::Open { protocol: Protocol::Route.name(), source };
        let mut socket = TokioSocket::new(protocols::NETLINK_ROUTE).map_err(open)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0)).map_err(open)?;
        let inner = socket.socket_ref();
        // Beyond net.core.rmem_max where that is allowed, else as much as is.
        if setsockopt(inner, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            let _ = setsockopt(inner, sockopt::RcvBuf, &RECEIVE_BUFFER);
        }
        for group in GROUPS {
            inner.add_membership(group).map_err(open)?;
        }
        // A kernel without next hop objects has nothing to say on them.
        if let Err(error) = inner.add_membership(NEXTHOP_GROUP) {
            log::debug!("not listening to changes of next hops: {error}");
        }
        Ok(Self { socket, pace, buffer: Vec::with_capacity(MESSAGE), pending: Pending::default() })
    }

    /// Waits until something has changed, and tells it; at most once per [`Pace::links`], however much changes. Dropping
    /// the future loses nothing: what was gathered is told by the next call.
    ///
    /// # Errors
    /// [`Error::Transfer`] if the socket fails. Losing notifications is no error but [`Changes::lost`].
    pub async fn changed(&mut self) -> Result<Changes, Error> {
        loop {
            for _ in 0..BURST {
                let due = self.pending.due(&self.pace);
                tokio::select! {
                    biased;
                    () = until(due) => return Ok(self.pending.tell(Instant::now())),
                    received = receive(&self.socket, &mut self.buffer) => self.gather(received)?,
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn gather(&mut self, received: io::Result<()>) -> Result<(), Error> {
        let changes = &mut self.pending.changes;
        match received {
            Ok(()) => note_datagram(&self.buffer, changes),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => changes.lost = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(Error::Transfer { request: "listen to changes of links and routes".into(), source });
            }
        }
        self.pending.touch(Instant::now());
        Ok(())
    }
}

/// Waits for that moment, or for ever.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn receive(socket: &TokioSocket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    socket.recv(buffer).await
}

/// Notes what the notifications of one datagram say; what cannot be read counts as lost.
fn note_datagram(datagram: &[u8], changes: &mut Changes) {
    let mut rest = datagram;
    while !rest.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(rest) else {
            changes.lost = true;
            return;
        };
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        note(message.message_type(), message.payload(), changes);
        rest = rest.get(length.next_multiple_of(usize::from(NLMSG_ALIGNTO))..).unwrap_or_default();
    }
}

fn note(kind: u16, payload: &[u8], changes: &mut Changes) {
    match kind {
        libc::RTM_NEWLINK => changes.links = true,
        libc::RTM_DELLINK => {
            changes.links = true;
            // With another family it only says that a port left its bridge.
            if payload.first() == Some(&(libc::AF_UNSPEC as u8)) {
                changes.removed.extend(link::index(payload));
            }
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => changes.addresses = true,
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => changes.routes = true,
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => changes.fdb |= fdb::has_remote(payload),
        super::nexthop::RTM_NEWNEXTHOP | super::nexthop::RTM_DELNEXTHOP => changes.routes = true,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace {
        settle: Duration::from_millis(20),
        links: Duration::from_millis(100),
        others: Duration::from_millis(1000),
    };

    fn after(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    /// A message about a device: struct ifinfomsg.
    fn link_message(family: i32, ifindex: u8) -> [u8; 16] {
        let mut message = [0; 16];
        message[0] = family as u8;
        message[4] = ifindex;
        message
    }

    #[test]
    fn the_first_change_is_told_as_soon_as_it_has_settled() {
        let start = Instant::now();
        let mut pending = Pending::default();
        pending.touch(start);
        assert_eq!(pending.due(&PACE), None);
        pending.changes.routes = true;
        pending.touch(start);
        pending.touch(after(start, 19));
        assert_eq!(pending.due(&PACE), Some(after(start, 20)));
    }

    #[test]
    fn later_ones_wait_for_their_interval() {
        let start = Instant::now();
        let mut pending = Pending { told: Some(start), ..Pending::default() };
        pending.changes.routes = true;
        pending.touch(after(start, 5));
        assert_eq!(pending.due(&PACE), Some(after(start, 1000)));
        pending.changes.links = true;
        assert_eq!(pending.due(&PACE), Some(after(start, 100)));
        assert!(pending.tell(after(start, 100)).links);
        assert_eq!(pending.due(&PACE), None);
        // Long after, a change is told at once again.
        pending.changes.links = true;
        pending.touch(after(start, 5000));
        assert_eq!(pending.due(&PACE), Some(after(start, 5020)));
    }

    #[test]
    fn a_port_that_leaves_its_bridge_is_not_gone() {
        let mut changes = Changes::default();
        note(libc::RTM_DELLINK, &link_message(libc::AF_BRIDGE, 5), &mut changes);
        assert_eq!(changes, Changes { links: true, ..Changes::default() });
        note(libc::RTM_DELLINK, &link_message(libc::AF_UNSPEC, 6), &mut changes);
        assert_eq!(changes.removed, BTreeSet::from([6]));
    }

    #[test]
    fn what_cannot_be_read_counts_as_lost() {
        let mut changes = Changes::default();
        note_datagram(&[1, 2, 3], &mut changes);
        assert!(changes.lost);
    }
}
