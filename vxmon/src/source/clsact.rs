//! The clsact qdisc, for kernels without tcx: others use it too, and what is put there stays when a process is killed.
//!
//! So each filter of vxmon says by its handle which running vxmon it belongs to and whether that one made the qdisc, and
//! each running vxmon holds an abstract Unix socket of its number, which the kernel closes with it. A filter whose number
//! nobody holds is left over, and the next start removes it; a qdisc goes with it only if vxmon made it and nobody else
//! uses it. All of it in one network namespace: abstract sockets are per namespace, as filters are.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

use nix::errno::Errno;
use vxmon_common::config;

use super::tc::TcError;
use crate::netlink::{
    self, link,
    socket::{Protocol, Socket},
    tc::{self, Added, Direction, Filter},
};

/// Upper half of the handle of vxmon's filters: "vx".
const HANDLE_MAJOR: u32 = 0x7678;
/// Running instances of vxmon in a namespace, at most.
const INSTANCES: u16 = 256;

/// The number of this running vxmon.
#[derive(Debug)]
pub struct Instance {
    number: u16,
    /// Held as long as this vxmon runs.
    _socket: UnixDatagram,
}

impl Instance {
    /// Takes the lowest number that is free.
    pub fn claim() -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for number in 0..INSTANCES {
            match hold(number) {
                Ok(socket) => return Ok(Self { number, _socket: socket }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The handle of this instance's filters.
    pub fn handle(&self, made_clsact: bool) -> u32 {
        HANDLE_MAJOR << 16 | u32::from(self.number) << 1 | u32::from(made_clsact)
    }
}

fn hold(number: u16) -> io::Result<UnixDatagram> {
    UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(format!("vxmon/clsact/{number}"))?)
}

/// What went wrong with a device's clsact qdisc.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {source}")]
pub struct ClsactError {
    /// The device, by name.
    device: String,
    /// What could not be done, and why.
    source: netlink::Error,
}

/// Makes sure the device has a clsact qdisc; whether vxmon made it: now, or another one that watches the device too, so
/// that whoever ends last removes it.
pub fn prepare(device: &str, ifindex: u32) -> Result<bool, ClsactError> {
    made_by_vxmon(ifindex).map_err(|source| ClsactError { device: device.to_owned(), source })
}

fn made_by_vxmon(ifindex: u32) -> Result<bool, netlink::Error> {
    let mut socket = Socket::open(Protocol::Route)?;
    if matches!(tc::clsact_add(&mut socket, ifindex)?, Added::Created) {
        return Ok(true);
    }
    let filters = tc::filters(&mut socket, ifindex, Direction::Egress)?;
    Ok(filters.iter().any(|filter| is_ours(filter) && filter.handle & 1 == 1))
}

/// Whether a vxmon made the filter. The loader gives it the program's name, and none where programs have no names: before 4.15
/// (cb4d2b3f03d8), and without CONFIG_BPF_EVENTS, as it asks for names with a tracepoint program.
fn is_ours(filter: &Filter) -> bool {
    filter.handle >> 16 == HANDLE_MAJOR
        && filter.kind == "bpf"
        && filter.direct_action
        && matches!(filter.name.as_deref(), Some(config::UPLINK_PROGRAM | config::VXLAN_PROGRAM | "") | None)
}

/// Whether a filter of vxmon's is there. Yes where that cannot be found out: a device that vanished is noticed elsewhere.
pub fn holds(ifindex: u32) -> bool {
    Socket::open(Protocol::Route)
        .and_then(|mut socket| tc::filters(&mut socket, ifindex, Direction::Egress))
        .map_or(true, |filters| filters.iter().any(is_ours))
}

/// Removes the qdisc that vxmon made, unless it is in use by others by now.
pub fn tidy(device: &str, ifindex: u32, made_clsact: bool) {
    if !made_clsact {
        return;
    }
    let removed = Socket::open(Protocol::Route).and_then(|mut socket| tc::clsact_del_if_unused(&mut socket, ifindex));
    if let Err(error) = removed {
        log::debug!("{device}: {error}"); // a device that has vanished took it along
    }
}

/// Removes what killed instances left in this namespace; the devices concerned, by name.
pub fn remove_leftovers() -> Result<Vec<String>, TcError> {
    let mut socket = Socket::open(Protocol::Route)?;
    let mut cleaned = Vec::new();
    for link in link::links(&mut socket)? {
        match remove_leftovers_of(&mut socket, link.ifindex) {
            Ok(true) => cleaned.push(link.name),
            Ok(false) => {}
            // The device, or the filter, has vanished meanwhile.
            Err(error) if matches!(error.errno(), Some(Errno::ENODEV | Errno::ENOENT | Errno::EINVAL)) => {}
            Err(source) => return Err(ClsactError { device: link.name, source }.into()),
        }
    }
    Ok(cleaned)
}

fn remove_leftovers_of(socket: &mut Socket, ifindex: u32) -> Result<bool, netlink::Error> {
    let mut removed = false;
    if tc::clsact_exists(socket, ifindex)? {
        for filter in tc::filters(socket, ifindex, Direction::Egress)? {
            if !is_ours(&filter) {
                continue;
            }
            // Whoever holds the number is alive; and holding it here keeps a new one from taking it meanwhile.
            let Ok(_held) = hold((filter.handle as u16) >> 1) else {
                continue;
            };
            let (priority, handle, protocol) = (filter.priority, filter.handle, filter.protocol);
            tc::filter_del(socket, ifindex, Direction::Egress, priority, handle, protocol)?;
            if handle & 1 == 1 {
                tc::clsact_del_if_unused(socket, ifindex)?;
            }
            removed = true;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_vxmon_are_known_with_and_without_names() {
        let filter = |handle, name: Option<&str>| Filter {
            handle,
            kind: "bpf".to_owned(),
            name: name.map(ToOwned::to_owned),
            direct_action: true,
            ..Filter::default()
        };
        for name in [Some(config::UPLINK_PROGRAM), Some(config::VXLAN_PROGRAM), Some(""), None] {
            assert!(is_ours(&filter(0x7678_0003, name)), "{name:?}");
            assert!(!is_ours(&filter(0x7679_0003, name)), "{name:?}");
            assert!(!is_ours(&Filter { direct_action: false, ..filter(0x7678_0003, name) }), "{name:?}");
            assert!(!is_ours(&Filter { kind: "u32".to_owned(), ..filter(0x7678_0003, name) }), "{name:?}");
        }
        assert!(!is_ours(&filter(0x7678_0003, Some("from-container"))));
    }
}
