//! `vxmon tail`: the live log of a running `attach`, read from its socket. It filters and renders nothing itself: it says
//! what it wants, and writes what comes, whole lines only. It needs no privilege but to open the socket.

use std::{
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vxmon_common::judge::Verdict;

use super::say;
use crate::sink::{
    Format,
    filter::{End, Filter},
    socket::{self, Refusal, Request},
};

/// How long until it is tried again to reach a monitor that is not there.
const RETRY: Duration = Duration::from_millis(250);
/// How often, while nothing comes, it is looked whether the output's reader is still there, ms.
const LOOK: u16 = 500;

/// Flags of `tail`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The socket that `attach --socket` listens on.
    #[arg(long, env = "VXMON_SOCKET", value_name = "PATH", default_value = socket::DEFAULT_PATH)]
    socket: PathBuf,
    /// Go on when the monitor ends: wait for the next one.
    #[arg(long, env = "VXMON_FOLLOW", value_parser = clap::builder::FalseyValueParser::new())]
    follow: bool,
    /// Begin with at most so many of the recent lines; all that are kept (1024), if not given.
    #[arg(long, env = "VXMON_LINES", value_name = "N")]
    lines: Option<usize>,
    /// End after the recent lines.
    #[arg(long, env = "VXMON_NO_WAIT", conflicts_with = "follow", value_parser = clap::builder::FalseyValueParser::new())]
    no_wait: bool,
    /// Only anomalies of this verdict. This and the following filters may be repeated, to let more pass.
    #[arg(long, env = "VXMON_VERDICT", value_name = "V", value_parser = verdict, value_delimiter = ',')]
    verdict: Vec<String>,
    /// Only what is about this device.
    #[arg(long, env = "VXMON_DEV", value_name = "DEV")]
    dev: Vec<String>,
    /// Only anomalies with this end of the packet inside: ADDRESS, ADDRESS/LENGTH, ADDRESS:PORT or :PORT.
    #[arg(long, env = "VXMON_INNER", value_name = "END", value_delimiter = ',')]
    inner: Vec<End>,
    /// Only anomalies with this end of the outer packet.
    #[arg(long, env = "VXMON_OUTER", value_name = "END", value_delimiter = ',')]
    outer: Vec<End>,
    /// How to write events.
    #[arg(long, env = "VXMON_FORMAT", value_enum, default_value_t = Format::Text)]
    format: Format,
}

fn verdict(text: &str) -> Result<String, String> {
    let mut names = Verdict::ALL.iter().filter(|verdict| verdict.is_anomaly()).map(|verdict| verdict.name());
    if names.clone().any(|name| name == text) {
        return Ok(text.to_owned());
    }
    Err(format!("no such verdict; there are: {}", names.by_ref().collect::<Vec<_>>().join(", ")))
}

/// Runs `tail`.
pub fn run(args: &Args) -> Result<ExitCode> {
    let filter = Filter {
        verdict: args.verdict.clone(),
        dev: args.dev.clone(),
        inner: args.inner.clone(),
        outer: args.outer.clone(),
    };
    let mut request = Request { format: args.format, lines: args.lines, wait: !args.no_wait, filter };
    let mut waiting = false;
    loop {
        match connect(&args.socket) {
            Ok(stream) => {
                waiting = false;
                let ended = copy(stream, &request)?;
                match ended {
                    Ended::OutputClosed => return Ok(ExitCode::SUCCESS),
                    Ended::Monitor if !args.follow => return Ok(ExitCode::SUCCESS),
                    Ended::Monitor => {}
                    Ended::Refused(why) if !args.follow => bail!("{}: {why}", args.socket.display()),
                    Ended::Refused(why) => {
                        say(&format!("vxmon: {}: {why}; trying again", args.socket.display()));
                        thread::sleep(4 * RETRY);
                        continue;
                    }
                }
                // The next monitor's lines are all new.
                request.lines = None;
            }
            Err(error) if !args.follow || !may_come(&error) => return Err(unreachable(&args.socket, &error)),
            Err(_) => {}
        }
        if !waiting {
            say(&format!("vxmon: waiting for a vxmon attach --socket={}", args.socket.display()));
            waiting = true;
        }
        if output_closed(RETRY.as_millis() as u16)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path)
}

/// Whether a monitor that starts will put it right.
fn may_come(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock)
}

fn unreachable(path: &Path, error: &io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => {
            anyhow!("no {path}: is `vxmon attach --socket={path}` running? (--follow waits for it)")
        }
        io::ErrorKind::ConnectionRefused => {
            anyhow!("nobody listens on {path}, or it is no socket: the monitor has ended (--follow waits for the next)")
        }
        io::ErrorKind::PermissionDenied => {
            anyhow!("may not open {path}: run it as the user of the monitor, or start that with --socket-group")
        }
        _ => anyhow!("cannot connect to {path}: {error}"),
    }
}

/// Why a connection ended.
enum Ended {
    /// The monitor has nothing more.
    Monitor,
    /// Who read the output has seen enough.
    OutputClosed,
    /// The monitor would not.
    Refused(String),
}

/// Writes what comes, whole lines only.
fn copy(mut stream: UnixStream, request: &Request) -> Result<Ended> {
    let line = serde_json::to_string(request).context("cannot say what is wanted")? + "\n";
    // A monitor that turns readers away closes without having read; what it says is still to be read.
    let _ = stream.write_all(line.as_bytes());
    let (mut pending, mut first) = (Vec::new(), true);
    loop {
        if wait(&stream)? {
            return Ok(Ended::OutputClosed);
        }
        let mut part = [0; 16 * 1024];
        let length = match stream.read(&mut part) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // How a connection ends that was refused, or whose monitor was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error).context("cannot read from the socket"),
        };
        if length == 0 {
            return Ok(Ended::Monitor);
        }
        pending.extend_from_slice(part.get(..length).unwrap_or_default());
        let Some(end) = pending.iter().rposition(|byte| *byte == b'\n').map(|last| last + 1) else {
            continue;
        };
        let lines: Vec<u8> = pending.drain(..end).collect();
        if first && let Ok(Refusal { error }) = serde_json::from_slice(&lines) {
            return Ok(Ended::Refused(error));
        }
        first = false;
        let mut stdout = io::stdout().lock();
        match stdout.write_all(&lines).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Ended::OutputClosed),
            Err(error) => return Err(error).context("cannot write the output"),
        }
    }
}

/// Waits until something can be read; whether the output's reader has gone instead.
fn wait(stream: &UnixStream) -> Result<bool> {
    loop {
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(LOOK)) {
            Ok(0) if output_closed(0)? => return Ok(true),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(error).context("cannot wait for the socket"),
        }
    }
}

/// Whether nobody reads the output any more; waits for so many milliseconds for that to happen.
fn output_closed(milliseconds: u16) -> Result<bool> {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        thread::sleep(Duration::from_millis(milliseconds.into()));
        return Ok(false);
    }
    // No event is asked for; a closed pipe or socket is told of nevertheless (POLLERR, POLLHUP).
    let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::from(milliseconds)) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(error) => Err(error).context("cannot look at the output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_those_that_are_reported() {
        assert_eq!(verdict("bad-outer").as_deref(), Ok("bad-outer"));
        assert!(verdict("valid").is_err_and(|why| why.contains("nat-stale-port") && !why.contains("lco-valid")));
    }
}
