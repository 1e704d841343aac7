//! What developers and CI run: set-up, build, lint, tests, demo and benchmarks.
//!
//! # Layout
//! - [`proc`]: child processes, and what happens to them when this one is interrupted.
//! - [`setup`]: makes the machine able to build and test. [`cargo`]: calls of cargo.
//! - [`mod@test`], [`lint`], [`demo`], [`vm`], [`mod@bench`], [`soak`], [`image`]: the task of that name.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a developer's tool: its output is for people")]

mod bench;
mod cargo;
mod demo;
mod image;
mod lint;
mod proc;
mod setup;
mod soak;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about)]
enum Task {
    /// Install what building and testing need, if it is missing
    Setup,
    /// Build target/release/vxmon; check that it is static and small
    Build,
    /// Check format, clippy and documentation; warnings are errors
    Lint,
    /// Run all tests; those that need root run by sudo
    Test {
        /// Passed to the test binaries: a filter, --nocapture, …
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Show the kernel's fault live, and what vxmon says about it
    Demo {
        /// Show this vxmon instead of building one
        #[arg(long, hide = true)]
        binary: Option<std::path::PathBuf>,
    },
    /// Run the tests and the demo on other kernels, in QEMU
    Vm(vm::Options),
    /// Measure what vxmon costs
    Bench,
    /// Wear vxmon out for minutes; memory, descriptors and counts must hold
    Soak {
        /// For how long
        #[arg(long, default_value_t = 300)]
        seconds: u64,
        /// Use this vxmon instead of building one
        #[arg(long, hide = true)]
        binary: Option<std::path::PathBuf>,
    },
    /// Write the container image, an OCI layout and an archive of it, to target/image
    Image(image::Args),
}

fn main() -> ExitCode {
    let result = proc::init().and_then(|()| run(&Task::parse()));
    // However the task ended: its children end with it.
    proc::end_children();
    match (result, proc::stop_signal()) {
        (_, Some(signal)) => {
            eprintln!("xtask: stopped by {signal}");
            ExitCode::from(128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0)))
        }
        (Ok(code), None) => code,
        (Err(error), None) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<ExitCode> {
    match task {
        Task::Setup => {
            setup::run(setup::Scope::Tests)?;
            setup::schemas()?;
            if let Err(error) = setup::guests().and_then(|()| setup::kernel_build()) {
                eprintln!("setup: {error:#}; tests on other kernels will be skipped");
            }
        }
        Task::Build => cargo::build(setup::Scope::Build).map(drop)?,
        Task::Lint => lint::run()?,
        Task::Test { args } => return test::run(args),
        Task::Demo { binary } => demo::run(binary.clone())?,
        Task::Vm(options) => return vm::run(options),
        Task::Bench => bench::run()?,
        Task::Soak { seconds, binary } => soak::run(*seconds, binary.clone())?,
        Task::Image(args) => image::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}
