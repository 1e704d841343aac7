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
const GROUPS: [u32; 7] = [
    1,  // LINK
    3,  // NEIGH, which carries forwarding entries too
    5,  // IPV4_IFADDR
    7,  // IPV4_ROUTE
    9,  // IPV6_IFADDR
    11, // IPV6_ROUTE
    32, // NEXTHOP, since 5.3
];

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

/// Listens to the network namespace of the thread that opened it.
pub struct Monitor {
    socket: TokioSocket,
    pace: Pace,
    buffer: Vec<u8>,
    pending: Changes,
    /// When the first of the pending changes arrived.
    since: Option<Instant>,
    told: Option<Instant>,
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
            match inner.add_membership(group) {
                Ok(()) => {}
                // A kernel without that group has nothing to say on it.
                Err(error) if group > 31 => log::debug!("netlink group {group}: {error}"),
                Err(error) => return Err(open(error)),
            }
        }
        Ok(Self {
            socket,
            pace,
            buffer: Vec::with_capacity(MESSAGE),
            pending: Changes::default(),
            since: None,
            told: None,
        })
    }

    /// Waits until something has changed, and tells it; at most once per [`Pace::links`], however much changes. Dropping
    /// the future loses nothing: what was gathered is told by the next call.
    ///
    /// # Errors
    /// [`Error::Transfer`] if the socket fails. Losing notifications is no error but [`Changes::lost`].
    pub async fn changed(&mut self) -> Result<Changes, Error> {
        loop {
            for _ in 0..BURST {
                let due = self.due();
                tokio::select! {
                    biased;
                    () = until(due) => {
                        self.since = None;
                        self.told = Some(Instant::now());
                        return Ok(std::mem::take(&mut self.pending));
                    }
                    received = receive(&self.socket, &mut self.buffer) => self.gather(received)?,
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// When the pending changes are to be told, if there are any.
    fn due(&self) -> Option<Instant> {
        let settled = self.since? + self.pace.settle;
        let interval = if self.pending.is_urgent() { self.pace.links } else { self.pace.others };
        Some(self.told.map_or(settled, |told| settled.max(told + interval)))
    }

    fn gather(&mut self, received: io::Result<()>) -> Result<(), Error> {
        match received {
            Ok(()) => note_datagram(&self.buffer, &mut self.pending),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => self.pending.lost = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(Error::Transfer { request: "listen to changes of links and routes".into(), source });
            }
        }
        if self.since.is_none() && !self.pending.is_empty() {
            self.since = Some(Instant::now());
        }
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
