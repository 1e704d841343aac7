//! Flags of `attach` that let others look on: the live log's socket and the metrics. Listens before anything else is done,
//! and before another network namespace is entered.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
};

use anyhow::{Context as _, Result, bail};

use super::say;
use crate::sink::{
    live::Listeners,
    socket::{self, Socket},
};

/// The flags.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// Let `vxmon tail` read the live log from this Unix socket; without PATH, /run/vxmon/vxmon.sock.
    #[arg(
        long, env = "VXMON_SOCKET", value_name = "PATH", num_args = 0..=1, default_missing_value = socket::DEFAULT_PATH,
        value_parser = path
    )]
    socket: Option<PathBuf>,
    /// Let members of this group read the socket too, not only the user.
    #[arg(long, env = "VXMON_SOCKET_GROUP", value_name = "GROUP")]
    socket_group: Option<String>,
    /// Serve metrics, /healthz and /readyz by HTTP at this address: PORT or :PORT (of 127.0.0.1), or ADDRESS:PORT.
    #[arg(long, env = "VXMON_METRICS", value_name = "ADDR", value_parser = address)]
    metrics: Option<SocketAddr>,
}

impl Args {
    /// Listens as asked for.
    pub fn listen(&self) -> Result<Listeners> {
        if self.socket.is_none() && self.socket_group.is_some() {
            bail!("--socket-group is of no use without --socket");
        }
        let socket = match &self.socket {
            Some(path) => Some(Socket::listen(path, self.socket_group.as_deref())?),
            None => None,
        };
        let metrics = match self.metrics {
            Some(address) => Some(bind(address)?),
            None => None,
        };
        Ok(Listeners { socket, metrics })
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot serve metrics at {address}: give another address (--metrics ADDR)"))?;
    let address = listener.local_addr().unwrap_or(address);
    say(&format!("vxmon: metrics at http://{address}/metrics"));
    Ok(listener)
}

/// With an optional value, the device after `--socket` could be taken for it; a socket's path has a directory.
fn path(text: &str) -> Result<PathBuf, String> {
    if text.contains('/') {
        Ok(PathBuf::from(text))
    } else {
        Err(format!("a path has a slash: ./{text}; if it is a device, name devices before --socket"))
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let loopback = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    if let ("" | "localhost", Ok(port)) = (host, port.parse()) {
        return Ok(loopback(port));
    }
    text.parse()
        .map_err(|_| "not PORT, :PORT, ADDRESS:PORT or [ADDRESS]:PORT; ADDRESS is a number, not a name".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_unless_a_host_is_given() {
        let to = |text: &str| address(text).map(|address| address.to_string());
        for text in ["9560", ":9560", "localhost:9560", "127.0.0.1:9560"] {
            assert_eq!(to(text).as_deref(), Ok("127.0.0.1:9560"), "{text}");
        }
        assert_eq!(to("0.0.0.0:9560").as_deref(), Ok("0.0.0.0:9560"));
        assert_eq!(to("[::]:9560").as_deref(), Ok("[::]:9560"));
        for bad in ["", ":", "host:9560", "10.0.0.1", "::1", "70000", "9560:"] {
            assert!(to(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_is_not_taken_for_a_path() {
        assert!(path("eth0").is_err_and(|why| why.contains("./eth0")));
        assert_eq!(path("./eth0"), Ok(PathBuf::from("./eth0")));
    }
}
