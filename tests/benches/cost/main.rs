//! What vxmon costs, beside a baseline measured in the same run. `cargo xtask bench` builds and starts it, as root.
//!
//! A limit that is missed is marked, and no failure: machines differ. What cannot be measured is one.

mod daemon;
mod program;
mod rules;
mod sockets;
mod stats;
mod table;
mod traffic;

use anyhow::Result;
use vxmon_tests::cleanup;

use crate::table::Table;

/// A part of the benchmark: measures, and adds its lines.
type Part = fn(&mut Table) -> Result<()>;

fn main() -> Result<()> {
    // `cargo test --all-targets` starts every bench; without its driver this one has nothing to say.
    if std::env::var_os("VXMON_BENCH").is_none() {
        return Ok(());
    }
    cleanup::on_interrupt()?;
    let mut table = Table::new();
    let parts: [(&str, Part); 5] = [
        ("program", program::measure),
        ("traffic", traffic::measure),
        ("sockets", sockets::measure),
        ("daemon", daemon::measure),
        ("rules", rules::measure),
    ];
    // One of them alone, for whoever tunes it.
    let only = std::env::var("VXMON_BENCH_ONLY").unwrap_or_default();
    for (_, measure) in parts.iter().filter(|(name, _)| only.is_empty() || only == *name) {
        measure(&mut table)?;
    }
    table.end();
    Ok(())
}
