//! `vxmon mitigate`: turns off the device feature without which neither fault comes up, for nodes and containers that have no
//! ethtool. It keeps no record: `--revert` turns the feature on, whoever turned it off.

use std::{
    fmt::Write as _,
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
    /// VXLAN devices; without any, all of the network namespace but those that others control packet by packet (`external`).
    // Not from the environment, which in a container is that of `attach`, and may name uplinks.
    #[arg(value_name = "IFACE")]
    devices: Vec<String>,
    /// Turn the offload on again, whoever turned it off.
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
    let Chosen { devices, external } = choose(&args.devices)?;
    let mut features = Features::open(FEATURE)?;
    // All of them before anything is told, which may fail.
    let results: Vec<_> = devices.iter().map(|device| (device, switch(&mut features, device, args))).collect();
    let (mut told, mut changed, mut failed) = (String::new(), false, false);
    for (device, result) in results {
        match result {
            Ok(Done { what, change }) => {
                changed |= change;
                let _ = writeln!(told, "{device}: {FEATURE} {what}");
            }
            Err(error) => {
                failed = true;
                say(&format!("vxmon: {}", advice(&error)));
            }
        }
    }
    for device in external {
        say(&format!("vxmon: {device} is left alone, it is external: name it if its packets are the bad ones"));
    }
    match (changed, args.revert) {
        (true, false) => say(
            "vxmon: a device that is made anew, after a reboot for instance, has the offload on again: `vxmon attach` tells of it",
        ),
        (true, true) => say("vxmon: NAT can break these devices' packets again"),
        (false, _) => {}
    }
    match io::stdout().lock().write_all(told.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot write what was done"),
        _ => Ok(if failed { ExitCode::from(CANNOT) } else { ExitCode::SUCCESS }),
    }
}

/// The devices that are asked for, and those that would have to be named.
struct Chosen {
    devices: Vec<String>,
    external: Vec<String>,
}

/// None is changed if one of the names is wrong.
fn choose(wanted: &[String]) -> Result<Chosen> {
    let links = Socket::open(Protocol::Route).and_then(|mut socket| link::links(&mut socket));
    let links = links.context("cannot list the network devices")?;
    let vxlans = || links.iter().filter_map(|link| Some((link, link.vxlan.as_ref()?)));
    let names: Vec<&str> = vxlans().map(|(link, _)| link.name.as_str()).collect();
    if names.is_empty() {
        bail!(
            "no VXLAN device in this network namespace: it is to be the node's own (hostNetwork, or --netns /proc/1/ns/net)"
        );
    }
    if wanted.is_empty() {
        let of =
            |external| vxlans().filter(move |(_, vxlan)| vxlan.external == external).map(|(link, _)| link.name.clone());
        return Ok(Chosen { devices: of(false).collect(), external: of(true).collect() });
    }
    let there = || format!("{} {}", if names.len() == 1 { "is" } else { "are" }, names.join(", "));
    let find = |name: &String| {
        let known = links.iter().find(|link| link.name == *name || link.alternative_names.contains(name));
        match known {
            Some(link) if link.vxlan.is_some() => Ok(link.name.clone()),
            Some(link) => bail!("{} is no VXLAN device; there {}", link.name, there()),
            None => bail!("no device named {name} in this network namespace; of VXLAN devices, there {}", there()),
        }
    };
    Ok(Chosen { devices: wanted.iter().map(find).collect::<Result<_>>()?, external: Vec::new() })
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
            format!("{error}: it needs CAP_NET_ADMIN, as root has it (in a container, add NET_ADMIN)")
        }
        _ => error.to_string(),
    }
}
