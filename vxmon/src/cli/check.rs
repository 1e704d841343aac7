//! `vxmon check`: flags to settings, files opened, and the exit code. The judging is [`crate::check`].

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;

use super::{CANNOT, say, written};
use crate::{
    check::{Check, Tally},
    monitor::WELL_KNOWN_PORTS,
    sink::Printer,
    source::capture::CaptureError,
};

/// Exit code where a packet is wrong.
const WRONG: u8 = 1;

/// Flags of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Capture files, pcap or pcapng; `-` for standard input.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// A UDP port of tunnel packets, beside 4789 and 8472. May be repeated.
    #[arg(long = "port", env = "VXMON_PORT", value_delimiter = ',', value_name = "P", value_parser = clap::value_parser!(u16).range(1..))]
    ports: Vec<u16>,
    #[command(flatten)]
    written: written::Args,
    /// Name of the node where the capture was taken, for the events.
    #[arg(long, env = "VXMON_NODE", value_name = "NAME", default_value = "capture")]
    node: String,
}

/// Runs `check`.
pub fn run(args: &Args) -> Result<ExitCode> {
    let ports = || WELL_KNOWN_PORTS.iter().chain(&args.ports).copied();
    // Which kernel the capture's node has is not known.
    let printer =
        Printer::new(args.written.format, args.written.explain, args.written.paint(true), "its kernel".to_owned());
    let mut check = Check::new(ports(), args.node.clone(), printer, io::stdout().lock());
    let mut all_read = true;
    for path in &args.files {
        let name = if is_stdin(path) { "stdin".to_owned() } else { path.display().to_string() };
        let note = |text: &str| say(&format!("vxmon: {text}"));
        let result = open(path).map_err(CaptureError::Read);
        if let Err(error) = result.and_then(|input| check.capture(&name, input, &note)) {
            note(&format!("{name} {error}"));
            all_read = false;
        }
    }
    let Tally { judged, unverified, wrong } = match check.finish() {
        Ok(tally) => tally,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
        Err(error) => return Err(anyhow::Error::from(error).context("cannot write the result")),
    };
    if judged + unverified == 0 {
        let ports: Vec<String> = ports().map(|port| port.to_string()).collect();
        say(&format!(
            "vxmon: no VXLAN packet (UDP port {}) in it; --port names another one, and the capture must be of the uplink",
            ports.join(", ")
        ));
    }
    Ok(match (wrong > 0, all_read && judged > 0) {
        (true, _) => ExitCode::from(WRONG),
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::from(CANNOT),
    })
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn open(path: &Path) -> io::Result<Box<dyn Read + Send>> {
    Ok(if is_stdin(path) { Box::new(io::stdin()) } else { Box::new(File::open(path)?) })
}
