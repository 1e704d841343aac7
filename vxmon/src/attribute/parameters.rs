//! Kernel parameters that say how long a broken connection stays broken, from `/proc/sys/net` of this thread's network
//! namespace (`--netns` included), read anew at most once a second, as they may be changed any time.

use std::{fs, os::fd::AsRawFd as _, path::Path};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use super::story::Parameters;
use crate::release::{release, version};

const SECOND: u64 = 1_000_000_000;
/// `SO_TXREHASH`, include/uapi/asm-generic/socket.h, since 5.18.
const SO_TXREHASH: libc::c_int = 74;
/// From then on each retransmission gets another hash, at the latest (`tcp_write_timeout()` calls `sk_rethink_txhash()`,
/// net/ipv4/tcp_timer.c), until `net.core.txrehash`, which may forbid it, came with [`SO_TXREHASH`].
const REHASHES: Version = (4, 10, 0);

type Version = (u32, u32, u32);

/// Reads them.
#[derive(Debug, Default)]
pub struct Reader {
    read: Option<(u64, Parameters)>,
    /// Those of another machine are meant, which are not known.
    elsewhere: bool,
}

impl Reader {
    /// Of a machine that cannot be asked: knows none.
    pub fn elsewhere() -> Self {
        Self { elsewhere: true, ..Self::default() }
    }

    /// As they are at `now`, CLOCK_MONOTONIC, ns.
    pub fn at(&mut self, now: u64) -> Parameters {
        if self.elsewhere {
            return Parameters::default();
        }
        match self.read {
            Some((then, parameters)) if now.abs_diff(then) < SECOND => parameters,
            _ => {
                let version = || release().as_deref().and_then(version);
                let parameters = read(Path::new("/proc/sys/net"), rehashes(client_rehashes(), version));
                self.read = Some((now, parameters));
                parameters
            }
        }
    }
}

/// What a TCP socket that is to connect has for [`SO_TXREHASH`]. `net.core.txrehash` does not tell: from 5.18 to 6.2 sockets took
/// it over only when they began to listen ("txhash: fix sk->sk_txrehash default", net/core/sock.c).
fn client_rehashes() -> Result<libc::c_int, Errno> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes of an integer, and `value` and `len` outlive the call.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_TXREHASH, (&raw mut value).cast(), &raw mut len)
    };
    Errno::result(result).map(|_| value)
}

/// Whether retransmissions are rehashed: 1 (`SOCK_TXREHASH_ENABLED`) says so, and any other number that they are not.
fn rehashes(of_client: Result<libc::c_int, Errno>, version: impl FnOnce() -> Option<Version>) -> Option<bool> {
    match of_client {
        Ok(value) => Some(value == 1),
        Err(Errno::ENOPROTOOPT) => (version()? >= REHASHES).then_some(true),
        Err(_) => None,
    }
}

/// Those below `net`, beside the one that a socket tells. What is not there or not a number is not known.
fn read(net: &Path, txrehash: Option<bool>) -> Parameters {
    let number = |path: &str| fs::read_to_string(net.join(path)).ok()?.trim().parse::<u32>().ok();
    let seconds = |path: &str| number(path).map(|seconds| u64::from(seconds) * SECOND);
    Parameters {
        udp_timeout: seconds("netfilter/nf_conntrack_udp_timeout"),
        udp_timeout_stream: seconds("netfilter/nf_conntrack_udp_timeout_stream"),
        txrehash,
        syn_linear_timeouts: number("ipv4/tcp_syn_linear_timeouts").unwrap_or(0),
        syn_retries: number("ipv4/tcp_syn_retries"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_read() {
        let net = std::env::temp_dir().join(format!("vxmon-parameters-{}", std::process::id()));
        assert_eq!(read(&net, None), Parameters::default());
        for (path, text) in [
            ("netfilter/nf_conntrack_udp_timeout", "30\n"),
            ("netfilter/nf_conntrack_udp_timeout_stream", "120\n"),
            ("ipv4/tcp_syn_linear_timeouts", "4\n"),
            ("ipv4/tcp_syn_retries", "soon\n"),
        ] {
            fs::create_dir_all(net.join(path).parent().unwrap()).unwrap();
            fs::write(net.join(path), text).unwrap();
        }
        let parameters = read(&net, Some(false));
        fs::remove_dir_all(&net).unwrap();
        assert_eq!(
            parameters,
            Parameters {
                udp_timeout: Some(30 * SECOND),
                udp_timeout_stream: Some(120 * SECOND),
                txrehash: Some(false),
                syn_linear_timeouts: 4,
                syn_retries: None,
            }
        );
    }

    #[test]
    fn sockets_tell_whether_they_rehash() {
        let old = || rehashes(Err(Errno::ENOPROTOOPT), || Some((5, 10, 262)));
        assert_eq!(old(), Some(true));
        assert_eq!(rehashes(Err(Errno::ENOPROTOOPT), || Some((3, 10, 0))), None);
        assert_eq!(rehashes(Err(Errno::EPERM), || Some((5, 10, 262))), None);
        // 255: not decided when it connects.
        assert_eq!([1, 0, 255].map(|value| rehashes(Ok(value), || None)), [Some(true), Some(false), Some(false)]);
        assert!(matches!(client_rehashes(), Ok(0 | 1 | 255) | Err(Errno::ENOPROTOOPT)));
    }
}
