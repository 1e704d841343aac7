//! `vxmon mitigate`: turns off the one device feature without which neither fault comes up, for nodes and containers that have
//! no ethtool. It changes nothing else, and keeps no record: `--revert` turns the feature on.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};

use super::{CANNOT, netns, say};
use crate::{
    devices::offload::FEATURE,
    ethtool::{EthtoolError, Features},
    netlink::{Protocol, Socket, link},
};

/// Flags of `mitigate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// VXLAN devices; without any, all of the network namespace.
    // Not from the environment, which in a container is that of `attach`, and may name uplinks.
    #[arg(value_name = "IFACE")]
    devices: Vec<String>,
    /// Turn the offload on again.
    #[arg(long)]
    revert: bool,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Do it in the network namespace at this path, for instance /proc/PID/ns/net or /run/netns/NAME.
    #[arg(long, env = "VXMON_NETNS", value_name = "PATH")]
    netns: Option<PathBuf>,
}

/// Runs `mitigate`.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(path) = &args.netns {
        netns::enter(path)?;
    }
    let devices = choose(&args.devices)?;
    let mut features = Features::open(FEATURE)?;
    let (mut changed, mut failed) = (false, false);
    for device in &devices {
        match switch(&mut features, device, args) {
            Ok(Done { what, change }) => {
                changed |= change;
                match writeln!(io::stdout(), "{device}: {FEATURE} {what}") {
                    Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
                    _ => {}
                }
            }
            Err(error) => {
                failed = true;
                say(&format!("vxmon: {}", advice(&error)));
            }
        }
    }
    if changed && !args.revert {
        say(
            "vxmon: a device that is made anew has the offload on again, and flannel and Calico make theirs anew when they \
             restart: `vxmon attach` tells of it",
        );
    }
    Ok(if failed { ExitCode::from(CANNOT) } else { ExitCode::SUCCESS })
}

/// The devices that are asked for. None is changed if one of them is none.
fn choose(wanted: &[String]) -> Result<Vec<String>> {
    let links = Socket::open(Protocol::Route).and_then(|mut socket| link::links(&mut socket));
    let links = links.context("cannot list the network devices")?;
    let vxlans = links.iter().filter(|link| link.vxlan.is_some());
    let names: Vec<String> = vxlans.map(|link| link.name.clone()).collect();
    if names.is_empty() {
        bail!(
            "no VXLAN device in this network namespace: run it in the node's own (hostNetwork), or name one with --netns"
        );
    }
    if wanted.is_empty() {
        return Ok(names);
    }
    let find = |name: &String| {
        let known = links.iter().find(|link| link.name == *name || link.alternative_names.contains(name));
        match known {
            Some(link) if link.vxlan.is_some() => Ok(link.name.clone()),
            Some(link) => bail!("{} is no VXLAN device; there {}", link.name, there(&names)),
            None => bail!("no device named {name} in this network namespace; VXLAN devices: there {}", there(&names)),
        }
    };
    wanted.iter().map(find).collect()
}

fn there(names: &[String]) -> String {
    format!("{} {}", if names.len() == 1 { "is" } else { "are" }, names.join(", "))
}

/// What was done, in words, and whether that changed anything.
struct Done {
    what: &'static str,
    change: bool,
}

fn switch(features: &mut Features, device: &str, args: &Args) -> Result<Done, EthtoolError> {
    let (was, wanted) = (features.is_on(device)?, args.revert);
    let change = was != wanted && !args.dry_run;
    if change {
        features.switch(device, wanted)?;
    }
    let what = match (was, wanted, args.dry_run) {
        (true, true, _) => "is on already",
        (false, false, _) => "is off already",
        (_, true, true) => "is off, would be turned on",
        (_, false, true) => "is on, would be turned off",
        (_, true, false) => "was off, is on now",
        (_, false, false) => "was on, is off now",
    };
    Ok(Done { what, change })
}

/// The error, and the way out.
fn advice(error: &EthtoolError) -> String {
    match error {
        EthtoolError::Ask { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            format!("{error}: it needs CAP_NET_ADMIN; run it as root (sudo vxmon mitigate), or with that capability")
        }
        _ => error.to_string(),
    }
}
