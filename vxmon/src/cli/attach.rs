//! `vxmon attach`: flags to settings, and the way in and out. The watching itself is [`crate::monitor`].

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use super::{listen, netns, privilege, say, written};
use crate::{
    attribute::ConntrackSource,
    devices::Selection,
    monitor::{self, Outputs, Settings},
    source::{
        start::{Choice, Kind, Transport},
        tc::Hook,
    },
};

/// Flags of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Devices to watch; without any, every VXLAN device and the uplinks its packets leave by, as they come and go.
    #[arg(value_name = "IFACE", env = "VXMON_IFACE", value_delimiter = ' ')]
    devices: Vec<String>,
    /// A UDP port of tunnel packets, beside 4789, 8472 and those of the VXLAN devices. May be repeated.
    #[arg(long = "port", env = "VXMON_PORT", value_delimiter = ',', value_name = "P", value_parser = clap::value_parser!(u16).range(1..))]
    ports: Vec<u16>,
    /// Sum the whole payload of only one in N packets that need it; the others count as unverified (sampled).
    #[arg(long, env = "VXMON_SAMPLE", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    #[command(flatten)]
    written: written::Args,
    /// Write events to this file instead of standard output.
    #[arg(long, env = "VXMON_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the first 192 bytes of each packet reported to this file, too, as pcapng with the text as comment.
    #[arg(long, env = "VXMON_PCAP", value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// End after this time: 30s, 5m, 1h30m.
    #[arg(long, env = "VXMON_DURATION", value_name = "T", value_parser = duration)]
    duration: Option<Duration>,
    /// End after this many anomalies were reported.
    #[arg(long, env = "VXMON_COUNT", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Watch the network namespace at this path, for instance /proc/PID/ns/net or /run/netns/NAME.
    #[arg(long, env = "VXMON_NETNS", value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Name of this node in events, instead of its host name.
    #[arg(long, env = "VXMON_NODE", value_name = "NAME")]
    node: Option<String>,
    /// Exit with 1 if an anomaly was seen.
    #[arg(long, env = "VXMON_EXIT_CODE", value_parser = clap::builder::FalseyValueParser::new())]
    exit_code: bool,
    /// How to watch: TC programs (eBPF), or packet sockets, which need no eBPF.
    #[arg(long, env = "VXMON_ENGINE", value_enum, default_value_t = EngineArg::Auto)]
    engine: EngineArg,
    /// How to attach: tcx links (Linux 6.6), or filters in the clsact qdisc.
    #[arg(long, env = "VXMON_HOOK", value_enum, default_value_t = HookArg::Auto)]
    hook: HookArg,
    /// How TC programs hand events over: by a ring buffer (Linux 5.8), or by the programs for older kernels, through perf
    /// buffers and without the skb's metadata.
    #[arg(long, env = "VXMON_TRANSPORT", value_enum, default_value_t = TransportArg::Auto)]
    transport: TransportArg,
    #[command(flatten)]
    listen: listen::Args,
    /// Where to take conntrack entries from.
    #[arg(long, value_enum, default_value_t = ConntrackArg::Auto, hide = true)]
    conntrack: ConntrackArg,
    /// Do as if the kernel had no BTF: judge without the skb's metadata.
    #[arg(long, hide = true)]
    no_btf: bool,
    /// Do as if the kernel had no eBPF ring buffer.
    #[arg(long, hide = true)]
    no_ring_buffer: bool,
    /// Do as if the kernel had no kprobes: NAT is not seen as it is set up.
    #[arg(long, hide = true)]
    no_nat_probe: bool,
    /// Do as if the kernel gave packet sockets no ring: read packet by packet.
    #[arg(long, hide = true)]
    no_packet_ring: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EngineArg {
    /// TC programs; packet sockets where those cannot be used.
    Auto,
    /// TC programs.
    Tc,
    /// Packet sockets.
    PacketSocket,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HookArg {
    /// tcx if the kernel has it, else clsact.
    Auto,
    /// tcx links.
    Tcx,
    /// The clsact qdisc.
    Clsact,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TransportArg {
    /// A ring buffer if the kernel has it, else perf buffers.
    Auto,
    /// A ring buffer.
    Ringbuf,
    /// Perf buffers.
    Perf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ConntrackArg {
    Auto,
    Skb,
    Netlink,
}

/// A duration as people write it.
fn duration(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u64>().ok().map(Duration::from_secs);
    let parsed = seconds.or_else(|| text.parse::<jiff::SignedDuration>().ok().and_then(|d| d.try_into().ok()));
    /// Longer than that, a sum with the time of day could overflow.
    const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    match parsed {
        Some(duration) if duration > Duration::ZERO && duration <= LONGEST => Ok(duration),
        _ => Err("not a duration such as 30s, 5m or 1h30m".to_owned()),
    }
}

/// Runs `attach`.
pub fn run(args: &Args) -> Result<ExitCode> {
    let kind = match args.engine {
        EngineArg::Auto => Kind::Auto,
        EngineArg::Tc => Kind::Tc,
        EngineArg::PacketSocket => Kind::PacketSocket,
    };
    let no_tc = privilege::check(&kind)?;
    let lines: Box<dyn Write + Send> = match &args.output {
        Some(path) => Box::new(create(path, 0o666)?),
        None => Box::new(io::stdout()),
    };
    let capture = match &args.pcap {
        Some(path) => Some(Box::new(create(path, CAPTURE_MODE)?) as Box<dyn Write + Send>),
        None => None,
    };
    let outputs = Outputs { lines, capture, listeners: args.listen.listen()? };
    if let Some(path) = &args.netns {
        netns::enter(path)?;
    }
    let settings = Settings {
        selection: if args.devices.is_empty() { Selection::Auto } else { Selection::Named(args.devices.clone()) },
        ports: args.ports.clone(),
        node: args.node.clone(),
        format: args.written.format,
        explain: args.written.explain,
        paint: args.written.paint(args.output.is_none()),
        duration: args.duration,
        count: args.count,
        conntrack: match args.conntrack {
            ConntrackArg::Auto => ConntrackSource::Auto,
            ConntrackArg::Skb => ConntrackSource::Skb,
            ConntrackArg::Netlink => ConntrackSource::Netlink,
        },
        nat_probe: !args.no_nat_probe,
        engine: Choice {
            kind,
            no_tc,
            hook: match args.hook {
                HookArg::Auto => Hook::Auto,
                HookArg::Tcx => Hook::Tcx,
                HookArg::Clsact => Hook::Clsact,
            },
            transport: match args.transport {
                TransportArg::Auto => Transport::Auto,
                TransportArg::Ringbuf => Transport::RingBuffer,
                TransportArg::Perf => Transport::Perf,
            },
            sample: args.sample,
            btf: !args.no_btf,
            ring_buffer: !args.no_ring_buffer,
            packet_ring: !args.no_packet_ring,
            skb_conntrack: !matches!(args.conntrack, ConntrackArg::Netlink),
        },
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    let anomalies = runtime.block_on(monitor::run(settings, outputs, &say))?;
    Ok(if args.exit_code && anomalies > 0 { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// A capture holds a little payload.
const CAPTURE_MODE: u32 = 0o600;

/// A file that is empty now; `mode` if it is new.
fn create(path: &Path, mode: u32) -> Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).write(true).truncate(true).mode(mode);
    options.open(path).with_context(|| format!("cannot write to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_people_write_them() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("45"), Ok(Duration::from_secs(45)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "0s", "-5s", "18446744073709551615", "soon", "5 parsecs"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
