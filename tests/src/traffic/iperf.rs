//! Throughput by iperf3.

use std::{
    io::{BufRead, BufReader},
    net::IpAddr,
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{Netns, cmd};

/// What one run of iperf3 measured.
#[derive(Clone, Copy, Debug)]
pub struct Iperf {
    /// Payload received, in Gbit/s.
    pub gbits: f64,
    /// Segments sent again.
    pub retransmits: u64,
    /// CPU use of the sending host, in percent of one CPU.
    pub cpu_sender: f64,
}

/// Runs iperf3 over TCP from `client` to `address` in `server`, for `seconds`.
pub fn iperf3(client: &Netns, server: &Netns, address: IpAddr, seconds: u32, more: &[&str]) -> Result<Iperf> {
    let address = address.to_string();
    let mut listening = server
        .command("iperf3")
        .args(["--server", "--one-off", "--forceflush", "--bind", &address])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start iperf3")?;
    let result = wait_until_listening(&mut listening).and_then(|()| {
        let time = seconds.to_string();
        let mut command = client.command("iperf3");
        command.args(["--json", "--connect-timeout", "5000", "--time", &time, "--client", &address]).args(more);
        let text = cmd::run(&mut command)?;
        parse(&text)
    });
    let _ = listening.kill();
    let _ = listening.wait();
    result
}

fn wait_until_listening(server: &mut Child) -> Result<()> {
    let mut output = BufReader::new(server.stdout.take().context("iperf3 without an output")?);
    let mut line = String::new();
    while output.read_line(&mut line)? > 0 {
        if line.contains("Server listening") {
            // The rest of its output is small: it fits the pipe.
            server.stdout = Some(output.into_inner());
            return Ok(());
        }
    }
    bail!("the iperf3 server ended: {line}")
}

fn parse(text: &str) -> Result<Iperf> {
    let report: serde_json::Value = serde_json::from_str(text).context("iperf3 wrote no JSON")?;
    if let Some(error) = report.get("error") {
        bail!("iperf3: {error}");
    }
    let end = &report["end"];
    let bits = end["sum_received"]["bits_per_second"].as_f64().context("iperf3 reports no throughput")?;
    Ok(Iperf {
        gbits: bits / 1e9,
        retransmits: end["sum_sent"]["retransmits"].as_u64().unwrap_or_default(),
        cpu_sender: end["cpu_utilization_percent"]["host_total"].as_f64().unwrap_or_default(),
    })
}
