//! The `vxmon` program; see the library for how it is laid out.

use std::process::ExitCode;

fn main() -> ExitCode {
    vxmon::cli::main()
}
