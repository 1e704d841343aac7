//! `cargo xtask vm`: the tests and the demo on other kernels, in QEMU. Nothing that a guest does stays: the host's root is
//! shared read-only, what is written goes to the guest's memory.
//!
//! # Layout
//! - [`kernel`]: which kernels, and where they come from. [`fault_a`]: builds the one that has fault A. [`cache`]: where they
//!   are kept.
//! - [`initramfs`], [`qemu`]: how a guest comes up and ends. `xtask/vm/` has what runs in it.
//! - [`select`], [`job`]: what a guest runs. [`report`]: what is printed. [`kept`]: the results of all runs, and their table.

mod cache;
mod fault_a;
mod initramfs;
mod job;
mod kept;
mod kernel;
mod qemu;
mod report;
mod select;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Add as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    job::{Job, Outcome},
    kept::Kept,
    kernel::{KERNELS, Kernel},
    qemu::{Accel, Guest},
    report::KernelReport,
};
use crate::{
    cargo, proc,
    setup::{self, Scope},
    test::Count,
};

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// Kernels by name; default: all
    kernels: Vec<String>,
    /// Name the kernels, and end
    #[arg(long)]
    list: bool,
    /// Only test binaries, `smoke` and `demo` whose name has one of these in it; default: what depends on the kernel
    #[arg(long = "only", value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Only tests whose name has this in it
    #[arg(long, value_name = "TEXT")]
    test: Vec<String>,
    /// The part that belongs to `cargo xtask test`: a few tests on two kernels
    #[arg(long, conflicts_with_all = ["kernels", "only", "test"])]
    quick: bool,
    /// Get the kernels, build the one that is built, and end
    #[arg(long)]
    fetch: bool,
    /// Build vxmon, too, without optimisation: sooner there, and slower
    #[arg(long)]
    dev: bool,
    /// Have vxmon watch by this engine: tc or packet-socket
    #[arg(long)]
    engine: Option<String>,
    /// Have vxmon's TC programs hand events over this way: ringbuf or perf
    #[arg(long)]
    transport: Option<String>,
    /// What runs the guests' instructions
    #[arg(long, value_enum, default_value = "auto")]
    accel: Accel,
    /// Look for newer kernel packages
    #[arg(long)]
    update: bool,
    /// Use this vxmon instead of building one
    #[arg(long, hide = true)]
    binary: Option<PathBuf>,
    /// Write the results there as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table of all results in this clone there, in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Run nothing: with --markdown, for what earlier runs left
    #[arg(long)]
    kept: bool,
}

/// Runs it, and says whether all is well.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for kernel in KERNELS {
            println!("{:8} {}", kernel.name, kernel.describe());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let kernels = choose(&options.kernels)?;
    if options.fetch {
        setup::guests()?;
        for kernel in kernels {
            match kernel.image(options.update) {
                Ok(image) => println!("{:8} {}", kernel.name, image.vmlinuz.display()),
                Err(_) if proc::stop_signal().is_some() => bail!("interrupted"),
                Err(error) if error.is::<fault_a::DoesNotBuild>() => return Err(error),
                Err(error) => println!("{:8} not to be had here: {error:#}", kernel.name),
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    if options.kept {
        let path = options.markdown.as_deref().context("--kept is for --markdown")?;
        Kept::open()?.write(path)?;
        return Ok(ExitCode::SUCCESS);
    }
    let vxmon = match &options.binary {
        Some(binary) => binary.canonicalize().with_context(|| format!("no {}", binary.display()))?,
        None if options.dev => cargo::build_dev(Scope::Everything)?,
        None => cargo::build(Scope::Everything)?,
    };
    setup::guests()?;
    let runs = if options.quick { select::quick(&vxmon)? } else { select::runs(options, kernels, &vxmon)? };
    let reports = run_all(&runs, options.update, options.accel)?;
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report::json(&reports))?;
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.markdown {
        Kept::open()?.write(path)?;
    }
    let count = reports.iter().map(KernelReport::count).fold(Count::default(), Count::add);
    println!("{count}");
    Ok(if count.failed == 0 && count.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The part that belongs to all tests, with this vxmon; prints its table.
pub fn quick(vxmon: &Path) -> Result<Count> {
    let reports = run_all(&select::quick(vxmon)?, false, Accel::Auto)?;
    Ok(reports.iter().map(KernelReport::count).fold(Count::default(), Count::add))
}

/// How many instructions each kernel's verifier went over for each program, as the last runs in this clone counted them; empty
/// if there were none.
pub fn verified() -> Result<String> {
    Ok(Kept::open()?.verified())
}

/// Runs one guest after the other, keeps their results, and prints the table.
fn run_all(runs: &[(Kernel, Vec<Job>)], update: bool, accel: Accel) -> Result<Vec<KernelReport>> {
    let title = kept::run_title()?;
    let mut reports = Vec::new();
    for (kernel, jobs) in runs {
        let report = run_one(kernel, jobs, update, accel)?;
        // Also if it was interrupted: what has ended has ended.
        Kept::open()?.add(&report, &title)?;
        ensure!(proc::stop_signal().is_none(), "interrupted");
        reports.push(report);
    }
    print!("\n{}", report::text(&reports));
    Ok(reports)
}

/// `target/vm`: what guests ran, and what they said.
fn directory() -> Result<PathBuf> {
    let path = cargo::root()?.join("target/vm");
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// Those with these names; all, if there are none.
fn choose(names: &[String]) -> Result<Vec<Kernel>> {
    if names.is_empty() { Ok(KERNELS.to_vec()) } else { names.iter().map(|name| find(name)).collect() }
}

fn find(name: &str) -> Result<Kernel> {
    KERNELS.into_iter().find(|kernel| kernel.name == name).with_context(|| {
        let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
        format!("no kernel is called `{name}`; there are {}", known.join(", "))
    })
}

fn run_one(kernel: &Kernel, jobs: &[Job], update: bool, accel: Accel) -> Result<KernelReport> {
    let mut report = KernelReport {
        name: kernel.name.to_owned(),
        facts: BTreeMap::new(),
        whole: BTreeSet::new(),
        results: BTreeMap::new(),
        unavailable: None,
        seconds: 0,
    };
    let image = match kernel.image(update) {
        Ok(image) => image,
        Err(error) => {
            ensure!(proc::stop_signal().is_none(), "interrupted");
            eprintln!("vm: kernel {}: {error:#}", kernel.name);
            if error.is::<fault_a::DoesNotBuild>() {
                report.results.insert(report::BUILD.to_owned(), Outcome::Failed(format!("{error:#}")));
            } else {
                report.unavailable = Some(format!("{error:#}"));
            }
            return Ok(report);
        }
    };
    let runs = directory()?.join("runs");
    fs::create_dir_all(&runs)?;
    let _lock = cache::lock(&runs.join(format!("{}.lock", kernel.name)))?;
    let run = runs.join(kernel.name);
    fs::create_dir_all(&run)?;
    // What other jobs left there may still be of use: logs, transcripts.
    for job in jobs {
        job::forget(job, &run)?;
    }
    for file in ["facts", "dmesg.bad"] {
        cache::remove(&run.join(file))?;
    }
    fs::write(run.join("jobs"), jobs.iter().map(Job::line).collect::<String>())?;
    let accel = accel.resolve(&image, &runs.join("kvm"))?;
    let limit = Duration::from_secs(qemu::BOOT_LIMIT.as_secs() + jobs.iter().map(|job| job.limit + 15).sum::<u64>());
    let start = Instant::now();
    eprintln!("vm: kernel {}: booting ({accel:?}); console in {}", kernel.name, run.join("console.log").display());
    let mut ended = 0;
    let guest = Guest { image: &image, run: &run, accel, limit };
    let mut each = |_: &Path| {
        while let Some(job) = jobs.get(ended)
            && let Some(results) = job::results(job, &run)?
        {
            let failed = results.values().filter(|outcome| matches!(outcome, Outcome::Failed(_))).count();
            eprintln!(
                "vm: kernel {}: {}: {} tests, {failed} failed, after {} s",
                kernel.name,
                job.name,
                results.len(),
                start.elapsed().as_secs()
            );
            ended += 1;
        }
        Ok(())
    };
    let mut ran = guest.run(&mut each);
    if let (Err(error), false, None) = (&ran, run.join("facts").exists(), proc::stop_signal()) {
        eprintln!("vm: kernel {}: once more, since it did not start: {error:#}", kernel.name);
        ran = guest.run(&mut each);
    }
    report.seconds = start.elapsed().as_secs();
    for job in jobs {
        let results = job::results(job, &run)?;
        if job.whole && results.is_some() {
            report.whole.insert(job.name.clone());
        }
        for (name, outcome) in results.unwrap_or_default() {
            report.results.insert(if job.harness { format!("{}::{name}", job.name) } else { name }, outcome);
        }
        read_facts(&run.join(format!("{}.facts", job.name)), &mut report.facts);
    }
    if let (Err(error), None) = (ran, proc::stop_signal()) {
        let name = jobs.get(ended).map_or("guest", |job| job.name.as_str());
        report.results.insert(name.to_owned(), Outcome::Failed(format!("{error:#}")));
    }
    read_facts(&run.join("facts"), &mut report.facts);
    let warnings = fs::read_to_string(run.join("dmesg.bad")).unwrap_or_default();
    if !warnings.is_empty() {
        report.facts.insert("kernel's warnings".to_owned(), warnings.lines().collect::<Vec<_>>().join("; "));
    }
    Ok(report)
}

/// Lines `name=value`.
fn read_facts(path: &Path, facts: &mut BTreeMap<String, String>) {
    let text = fs::read_to_string(path).unwrap_or_default();
    facts.extend(
        text.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
}
