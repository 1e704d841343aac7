//! A blocking netlink socket: one request, all parts of its answer. It never waits without end, never loses part of an
//! answer to a short buffer, and knows nothing about what the messages mean.

use std::{
    io,
    time::{Duration, Instant},
};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_ALIGNTO, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NetlinkBuffer, NetlinkHeader, NetlinkSerializable,
};
use netlink_sys::{SocketAddr, protocols};
use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};

use super::{Error, attribute::attributes_after};

/// The longest wait for one datagram. Dumps of links take the RTNL lock, which a busy node may hold for seconds.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest wait for a whole answer, retries included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a dump is begun again because something changed during it; the last attempt counts as it is.
const DUMP_ATTEMPTS: u32 = 6;
/// First size of the receive buffer. The kernel fills up to 32 KiB of a dump at once if it is offered that much.
const BUFFER: usize = 32 * 1024;
/// Length of the header of a netlink message, in bytes (struct nlmsghdr).
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG`, include/uapi/linux/netlink.h: the kernel's explanation as text.
const ERROR_TEXT: u16 = 1;

/// Which part of the kernel a socket talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`: links, addresses, routes, neighbours, traffic control.
    Route,
    /// `NETLINK_NETFILTER`: conntrack and nftables.
    Netfilter,
}

impl Protocol {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Netfilter => "netfilter",
        }
    }

    fn number(self) -> isize {
        match self {
            Self::Route => protocols::NETLINK_ROUTE,
            Self::Netfilter => protocols::NETLINK_NETFILTER,
        }
    }
}

/// One message of an answer, without its netlink header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply<'a> {
    /// Type of the message (`nlmsg_type`), for example `RTM_NEWLINK`.
    pub kind: u16,
    /// What follows the header: the family's fixed part, then attributes.
    pub payload: &'a [u8],
}

/// A netlink socket for questions, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Open`] with what the system call said. No privilege is needed.
    pub fn open(protocol: Protocol) -> Result<Self, Error> {
        Self::set_up(protocol).map_err(|source| Error::Open { protocol: protocol.name(), source })
    }

    fn set_up(protocol: Protocol) -> io::Result<Self> {
        let mut inner = netlink_sys::Socket::new(protocol.number())?;
        inner.bind_auto()?;
        inner.connect(&SocketAddr::new(0, 0))?;
        let timeout = TimeVal::new(RECEIVE_TIMEOUT.as_secs().try_into().unwrap_or(libc::time_t::MAX), 0);
        setsockopt(&inner, sockopt::ReceiveTimeout, &timeout)?;
        setsockopt(&inner, sockopt::SendTimeout, &timeout)?;
        // Niceties of newer kernels, done without where they are missing: an explanation with each error (4.12), error
        // messages without a copy of the request (4.2), and filters of dumps applied by the kernel (4.20).
        let _ = inner.set_ext_ack(true);
        let _ = inner.set_cap_ack(true);
        if protocol == Protocol::Route {
            let _ = inner.set_netlink_get_strict_chk(true);
        }
        Ok(Self { inner, sequence: 0, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Sends a request that is answered by an acknowledgement, and maybe by messages before it, which `read` turns into
    /// the result. `request` names it in words, as an infinitive; `flags` are added to `NLM_F_REQUEST | NLM_F_ACK`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the kernel's error number; [`Error::Timeout`], [`Error::Transfer`] or
    /// [`Error::Malformed`] if there was no whole answer.
    pub fn request<M: NetlinkSerializable, T>(
        &mut self,
        request: &str,
        flags: u16,
        message: &M,
        mut read: impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        self.exchange(request, flags | NLM_F_ACK, message, deadline, &mut read).map(|answer| answer.items)
    }

    /// Sends a request for all objects of a kind, and keeps what `read` makes of each. A dump during which something
    /// changed is begun again a few times; on a node that changes all the time the last attempt counts, since the
    /// monitor asks for another soon.
    ///
    /// # Errors
    /// As [`Socket::request`].
    pub fn dump<M: NetlinkSerializable, T>(
        &mut self,
        request: &str,
        message: &M,
        mut read: impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut attempt = 1;
        loop {
            let answer = self.exchange(request, NLM_F_DUMP, message, deadline, &mut read);
            let interrupted = match &answer {
                Ok(answer) => answer.interrupted,
                // An earlier dump, of which the end was not waited for, goes on until it has been read.
                Err(error) => error.errno() == Some(Errno::EBUSY),
            };
            if !interrupted || attempt >= DUMP_ATTEMPTS {
                return answer.map(|answer| answer.items);
            }
            log::debug!("{request}: something changed during attempt {attempt}, asking again");
            attempt += 1;
        }
    }

    /// Sends a request for all objects of a kind, once, and shows each of them to `each`. False if something changed
    /// meanwhile (`NLM_F_DUMP_INTR`, or messages were lost): objects may be missing then, or have come twice.
    ///
    /// # Errors
    /// As [`Socket::request`].
    pub fn visit<M: NetlinkSerializable>(
        &mut self,
        request: &str,
        message: &M,
        mut each: impl FnMut(Reply<'_>),
    ) -> Result<bool, Error> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut read = |reply: Reply<'_>| -> Option<()> {
            each(reply);
            None
        };
        self.exchange(request, NLM_F_DUMP, message, deadline, &mut read).map(|answer| !answer.interrupted)
    }

    fn exchange<M: NetlinkSerializable, T>(
        &mut self,
        request: &str,
        flags: u16,
        message: &M,
        deadline: Instant,
        read: &mut impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<Answer<T>, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = serialize(self.sequence, flags | NLM_F_REQUEST, message);
        self.inner.send(&bytes, 0).map_err(|source| Error::Transfer { request: request.to_owned(), source })?;
        let mut answer = Answer { items: Vec::new(), interrupted: false };
        loop {
            if !self.receive(request, deadline)? {
                answer.interrupted = true;
                continue;
            }
            if take_datagram(request, self.sequence, &self.buffer, &mut answer, read)? {
                return Ok(answer);
            }
        }
    }

    /// Receives one datagram, whole, into the buffer; false if the kernel had no room for one and left it out.
    fn receive(&mut self, request: &str, deadline: Instant) -> Result<bool, Error> {
        loop {
            if Instant::now() >= deadline {
                return Err(Error::Timeout { request: request.to_owned(), seconds: ANSWER_TIMEOUT.as_secs() });
            }
            match self.receive_once() {
                Ok(()) => return Ok(true),
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::Timeout { request: request.to_owned(), seconds: RECEIVE_TIMEOUT.as_secs() });
                }
                Err(source) => return Err(Error::Transfer { request: request.to_owned(), source }),
            }
        }
    }

    fn receive_once(&mut self) -> io::Result<()> {
        self.buffer.clear();
        let length = self.inner.recv(&mut self.buffer, libc::MSG_PEEK | libc::MSG_TRUNC)?;
        self.buffer.clear();
        self.buffer.reserve(length);
        self.inner.recv(&mut self.buffer, 0).map(drop)
    }
}

/// What one request brought.
struct Answer<T> {
    items: Vec<T>,
    /// The dump says of itself that it is not consistent (`NLM_F_DUMP_INTR`).
    interrupted: bool,
}

/// The bytes of a request, netlink header included.
fn serialize<M: NetlinkSerializable>(sequence_number: u32, flags: u16, message: &M) -> Vec<u8> {
    let mut bytes = vec![0; HEADER + message.buffer_len()];
    let mut header = NetlinkHeader::default();
    header.length = bytes.len().try_into().unwrap_or(u32::MAX);
    header.message_type = message.message_type();
    header.flags = flags;
    header.sequence_number = sequence_number;
    let (head, body) = bytes.split_at_mut(HEADER);
    header.emit(head);
    message.serialize(body);
    bytes
}

/// Reads the messages of one datagram; true when the answer is complete.
fn take_datagram<T>(
    request: &str,
    sequence: u32,
    datagram: &[u8],
    answer: &mut Answer<T>,
    read: &mut impl FnMut(Reply<'_>) -> Option<T>,
) -> Result<bool, Error> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest)
            .map_err(|error| Error::Malformed { request: request.to_owned(), detail: error.to_string() })?;
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        let body = rest.get(HEADER..length).unwrap_or_default();
        rest = rest.get(length.next_multiple_of(usize::from(NLMSG_ALIGNTO))..).unwrap_or_default();
        // The late answer to a request that timed out.
        if message.sequence_number() != sequence {
            continue;
        }
        answer.interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
        match message.message_type() {
            NLMSG_NOOP => {}
            kind @ (NLMSG_ERROR | NLMSG_DONE) => {
                return outcome(request, kind, message.flags(), body).map(|()| true);
            }
            kind => answer.items.extend(read(Reply { kind, payload: body })),
        }
    }
    Ok(false)
}

/// What an `NLMSG_ERROR` (0 is an acknowledgement) or `NLMSG_DONE` says.
fn outcome(request: &str, kind: u16, flags: u16, body: &[u8]) -> Result<(), Error> {
    // Old kernels end a dump with an empty NLMSG_DONE.
    let code = body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if code >= 0 {
        return Ok(());
    }
    let detail = (flags & NLM_F_ACK_TLVS != 0)
        .then(|| {
            // struct nlmsgerr holds the request's header; NLMSG_DONE does not.
            let fixed = if kind == NLMSG_ERROR { size_of::<i32>() + HEADER } else { size_of::<i32>() };
            attributes_after(fixed, body).find_map(|(kind, value)| (kind == ERROR_TEXT).then(|| value.text()))
        })
        .flatten();
    Err(Error::Refused { request: request.to_owned(), errno: Errno::from_raw(code.saturating_neg()), detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCE: u32 = 7;

    /// One message as the kernel frames it.
    fn framed(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(HEADER + body.len()).unwrap_or_default().to_ne_bytes().to_vec();
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([sequence.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// Whether the answer is complete, whether it was interrupted, and the bodies of its messages.
    fn take(datagram: &[u8]) -> Result<(bool, bool, Vec<Vec<u8>>), Error> {
        let mut answer = Answer { items: Vec::new(), interrupted: false };
        let mut read = |reply: Reply<'_>| Some(reply.payload.to_vec());
        let complete = take_datagram("list things", SEQUENCE, datagram, &mut answer, &mut read)?;
        Ok((complete, answer.interrupted, answer.items))
    }

    #[test]
    fn a_dump_is_many_messages_and_an_end() -> Result<(), Error> {
        let part = [framed(16, 2, SEQUENCE, b"one"), framed(16, 2, SEQUENCE, b"three")].concat();
        assert_eq!(take(&part)?, (false, false, vec![b"one".to_vec(), b"three".to_vec()]));
        assert_eq!(take(&framed(NLMSG_DONE, 2, SEQUENCE, &[0; 4]))?, (true, false, vec![]));
        assert_eq!(take(&framed(NLMSG_DONE, 2, SEQUENCE, &[]))?, (true, false, vec![]));
        Ok(())
    }

    #[test]
    fn a_dump_says_that_it_is_not_consistent() -> Result<(), Error> {
        let done = framed(NLMSG_DONE, 2 | NLM_F_DUMP_INTR, SEQUENCE, &[0; 4]);
        assert_eq!(take(&done)?, (true, true, vec![]));
        Ok(())
    }

    #[test]
    fn an_answer_to_an_earlier_request_is_left_out() -> Result<(), Error> {
        let late = [framed(16, 0, SEQUENCE - 1, b"late"), framed(NLMSG_ERROR, 0, SEQUENCE - 1, &[0; 20])].concat();
        assert_eq!(take(&late)?, (false, false, vec![]));
        Ok(())
    }

    #[test]
    fn an_error_tells_number_and_words() {
        let mut body = (-(Errno::EEXIST as i32)).to_ne_bytes().to_vec();
        body.extend([0; HEADER]);
        let plain = framed(NLMSG_ERROR, 0, SEQUENCE, &body);
        body.extend([13, 0, 1, 0]);
        body.extend(b"no room!\0\0\0\0");
        let explained = framed(NLMSG_ERROR, NLM_F_ACK_TLVS, SEQUENCE, &body);
        let text = |datagram: &[u8]| take(datagram).err().map(|error| error.to_string());
        assert_eq!(text(&plain).as_deref(), Some("cannot list things: File exists"));
        assert_eq!(text(&explained).as_deref(), Some("cannot list things: File exists (no room!)"));
        assert_eq!(take(&plain).err().and_then(|error| error.errno()), Some(Errno::EEXIST));
    }

    #[test]
    fn a_cut_message_is_an_error_and_no_panic() {
        let whole = framed(16, 0, SEQUENCE, b"four");
        for length in 1..whole.len() {
            assert!(matches!(take(&whole[..length]), Err(Error::Malformed { .. })), "{length} bytes");
        }
        let mut short = whole;
        short[0] = 3;
        assert!(matches!(take(&short), Err(Error::Malformed { .. })));
    }
}
