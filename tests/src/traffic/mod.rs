//! Traffic between the nodes. Sockets are made inside a namespace and then used from threads of this process; everything
//! ends by itself, at a time limit or when its handle is dropped.

mod bulk;
mod frame;
mod http;
mod icmp;
mod iperf;
mod raw;
mod udp;

use std::{net::TcpListener, time::Duration};

use anyhow::Result;
use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike},
};

pub use self::{
    bulk::{BulkMode, BulkServer, bulk_send},
    frame::{Frame, OuterSum, ones_complement_sum},
    http::{Get, HttpServer, http_get, http_get_timed},
    icmp::icmp_echo,
    iperf::{Iperf, iperf3},
    raw::{RawSender, Storm, VnetHdr, send_raw},
    udp::{UdpClient, UdpMode, UdpServer, udp_ask},
};

/// How often a server thread looks whether it should end.
const POLL: Duration = Duration::from_millis(50);
/// Limit of every wait inside one exchange, where the caller gives none.
const PATIENCE: Duration = Duration::from_secs(10);

/// Lets `accept` on `listener` fail with `WouldBlock` after [`POLL`], so that its thread can look whether it should end.
fn accept_with_pauses(listener: &TcpListener) -> Result<()> {
    setsockopt(listener, ReceiveTimeout, &TimeVal::microseconds(POLL.as_micros().try_into()?))?;
    Ok(())
}
