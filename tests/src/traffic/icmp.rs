//! ICMP echo: packets that leave the sender with their sum complete.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv, send,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike},
    },
};

use super::ones_complement_sum;
use crate::{Netns, pace};

/// Sends one echo request with `size` bytes of payload. `Ok(None)` if no answer comes within `limit`.
pub fn icmp_echo(node: &Netns, target: IpAddr, size: usize, limit: Duration) -> Result<Option<Duration>> {
    let (family, protocol, request, reply) = match target {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let socket: OwnedFd = node
        .enter(|| Ok(socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?))
        .context("cannot open a raw socket")?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(std::net::SocketAddr::from((target, 0))))
        .with_context(|| format!("no way to {target}"))?;
    let limit = pace::answer(limit);
    let limit_us = TimeVal::microseconds(limit.as_micros().try_into()?);
    setsockopt(&socket, ReceiveTimeout, &limit_us)?;

    let id = (std::process::id() as u16).to_be_bytes();
    let mut message = vec![request, 0, 0, 0, id[0], id[1], 0, 1];
    message.extend((0..size).map(|index| index as u8));
    if target.is_ipv4() {
        // Over IPv6 the kernel fills the sum in: it covers the addresses.
        let sum = !ones_complement_sum(&message, 0);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    let start = Instant::now();
    send(socket.as_raw_fd(), &message, MsgFlags::empty()).with_context(|| format!("cannot send to {target}"))?;
    let mut answer = vec![0; size + 128];
    while start.elapsed() < limit {
        match recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()) {
            Ok(count) => {
                // A raw IPv4 socket gets the IP header too.
                let header = if target.is_ipv4() { usize::from(answer[0] & 0xf) * 4 } else { 0 };
                let icmp = answer.get(header..count).unwrap_or_default();
                if icmp.first() == Some(&reply) && icmp.get(4..6) == Some(&id) {
                    return Ok(Some(start.elapsed()));
                }
            }
            Err(Errno::EAGAIN) => break,
            Err(error) => return Err(error).with_context(|| format!("no answer from {target}")),
        }
    }
    Ok(None)
}
