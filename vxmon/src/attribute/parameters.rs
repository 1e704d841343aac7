//! Kernel parameters that say how long a broken connection stays broken, from `/proc/sys/net` of this thread's network
//! namespace (`--netns` included), read anew at most once a second, as they may be changed any time.

use std::{fs, path::Path};

use super::story::Parameters;
use crate::release::{release, version};

const SECOND: u64 = 1_000_000_000;
/// Each retransmission gets another hash, at the latest (`tcp_write_timeout()` calls `sk_rethink_txhash()`,
/// net/ipv4/tcp_timer.c); `net.core.txrehash`, which may forbid it, came with 5.19.
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
                let parameters = read(Path::new("/proc/sys/net"), release().as_deref().and_then(version));
                self.read = Some((now, parameters));
                parameters
            }
        }
    }
}

/// Those below `net`, on a kernel of this version. What is not there or not a number is not known.
fn read(net: &Path, version: Option<Version>) -> Parameters {
    let number = |path: &str| fs::read_to_string(net.join(path)).ok()?.trim().parse::<u32>().ok();
    let seconds = |path: &str| number(path).map(|seconds| u64::from(seconds) * SECOND);
    Parameters {
        udp_timeout: seconds("netfilter/nf_conntrack_udp_timeout"),
        udp_timeout_stream: seconds("netfilter/nf_conntrack_udp_timeout_stream"),
        txrehash: number("core/txrehash").map(|on| on != 0).or_else(|| (version? >= REHASHES).then_some(true)),
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
        let rehashes = |version| read(&net, Some(version)).txrehash;
        assert_eq!([(3, 10, 0), (4, 14, 0), (5, 10, 262)].map(rehashes), [None, Some(true), Some(true)]);
        for (path, text) in [
            ("netfilter/nf_conntrack_udp_timeout", "30\n"),
            ("netfilter/nf_conntrack_udp_timeout_stream", "120\n"),
            ("core/txrehash", "0\n"),
            ("ipv4/tcp_syn_linear_timeouts", "4\n"),
            ("ipv4/tcp_syn_retries", "soon\n"),
        ] {
            fs::create_dir_all(net.join(path).parent().unwrap()).unwrap();
            fs::write(net.join(path), text).unwrap();
        }
        let parameters = read(&net, Some((6, 1, 0)));
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
}
