//! The command line: one file for each verb. Raw flags become settings here, once.

mod attach;
mod check;
mod generate;
mod listen;
mod mitigate;
mod netns;
mod privilege;
mod tail;
mod written;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

/// Finds VXLAN packets whose checksum the kernel got wrong, and says which connection and which NAT did it.
#[derive(Debug, Parser)]
#[command(name = "vxmon", version = VERSION, max_term_width = 100, propagate_version = true)]
struct Cli {
    /// Log more to standard error: what vxmon does, and lines of the kernel program itself; twice for everything.
    /// RUST_LOG, if set, says it instead.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, env = "VXMON_VERBOSE")]
    verbose: u8,
    #[command(subcommand)]
    verb: Verb,
}

/// Version, commit, and what identifies the eBPF objects.
const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("VXMON_COMMIT"), ", eBPF ", env!("VXMON_EBPF_ID"), ")");

#[derive(Debug, Subcommand)]
enum Verb {
    /// Watch devices, and report each packet that leaves with a wrong checksum.
    Attach(attach::Args),
    /// Show the live log of a running `attach --socket`.
    Tail(tail::Args),
    /// Judge the packets of capture files, pcap or pcapng.
    Check(check::Args),
    /// Turn off the checksum offload of VXLAN devices: NAT then breaks no checksum of theirs.
    Mitigate(mitigate::Args),
    /// Write a shell's completions to standard output.
    Completions(generate::Completions),
    /// Write a manual page to standard output.
    Man(generate::ManPages),
}

/// Exit code where something cannot be done.
const CANNOT: u8 = 2;

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(log_filter(cli.verbose)))
        .format_timestamp(None)
        .format_target(false)
        .init();
    let result = match cli.verb {
        Verb::Attach(args) => attach::run(&args),
        Verb::Tail(args) => tail::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Mitigate(args) => mitigate::run(&args),
        Verb::Completions(args) => generate::completions(&args, Cli::command()),
        Verb::Man(args) => generate::man(&args, Cli::command()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            say(&format!("vxmon: {error:#}"));
            ExitCode::from(CANNOT)
        }
    }
}

/// What is logged for so many `-v`. The kernel program's lines come under the name of its crate.
fn log_filter(verbose: u8) -> &'static str {
    match verbose {
        0 => "warn",
        1 => "warn,vxmon=debug,vxmon_ebpf=debug",
        _ => "trace",
    }
}

/// Says a line to people, on standard error. One that is gone is no reason to fail.
fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    /// Every flag that is not hidden can be set in the environment, under a name of one form.
    #[test]
    fn each_flag_has_its_variable() {
        let mut command = Cli::command();
        command.build();
        for verb in command.get_subcommands().filter(|verb| ["attach", "tail"].contains(&verb.get_name())) {
            for arg in verb.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let id = arg.get_id().as_str();
                if ["help", "version"].contains(&id) {
                    continue;
                }
                let flag = arg.get_long().unwrap_or("iface");
                let wanted = format!("VXMON_{}", flag.replace('-', "_").to_uppercase());
                assert_eq!(arg.get_env().and_then(|name| name.to_str()), Some(wanted.as_str()), "{id}");
            }
        }
    }
}
