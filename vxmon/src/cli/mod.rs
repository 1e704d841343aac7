//! The command line: one file for each verb. Raw flags become settings here, once.

mod attach;
mod privilege;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Finds VXLAN packets whose checksum the kernel got wrong, and says which connection and which NAT did it.
#[derive(Debug, Parser)]
#[command(name = "vxmon", version = VERSION, max_term_width = 100, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// Version and commit.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("VXMON_COMMIT"), ")");

#[derive(Debug, Subcommand)]
enum Verb {
    /// Watch devices, and report each packet that leaves with a wrong checksum.
    Attach(attach::Args),
}

/// Exit code where something cannot be done.
const CANNOT: u8 = 2;

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp(None)
        .format_target(false)
        .init();
    let result = match cli.verb {
        Verb::Attach(args) => attach::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            say(&format!("vxmon: {error:#}"));
            ExitCode::from(CANNOT)
        }
    }
}

/// Says a line to people, on standard error. One that is gone is no reason to fail.
fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
