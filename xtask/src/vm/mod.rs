//! `cargo xtask vm`: the tests and the demo on other kernels, in QEMU. Nothing that a guest does stays: the host's root is
//! shared read-only, what is written goes to the guest's memory.
//!
//! # Layout
//! - [`kernel`]: which kernels, and where they come from. [`fault_a`]: builds the one that has fault A.
//! - [`initramfs`], [`qemu`]: how a guest comes up and ends. `xtask/vm/` has what runs in it.
//! - [`job`]: what a guest runs. [`report`]: what is printed.

mod fault_a;
mod initramfs;
mod job;
mod kernel;
mod qemu;
mod report;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::{
    job::{Job, Outcome},
    kernel::{KERNELS, Kernel},
    qemu::{Accel, Guest},
    report::KernelReport,
};
use crate::{
    cargo, proc,
    setup::{self, Scope},
};

/// The package whose tests run in guests.
const PACKAGE: &str = "vxmon-tests";
/// From power-on until the first job runs, at most.
const BOOT_LIMIT: u64 = 240;
/// For one test binary. A loaded machine that emulates is slow.
const TESTS_LIMIT: u64 = 1800;
const DEMO_LIMIT: u64 = 300;
/// Whether it attaches at all, and what the verifier says.
const SMOKE: &str = "smoke";
const SMOKE_LIMIT: u64 = 120;

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// Kernels by name; default: all
    kernels: Vec<String>,
    /// Name the kernels, and end
    #[arg(long)]
    list: bool,
    /// Only test binaries whose name has one of these in it (and `demo`); default: all
    #[arg(long = "only", value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Only tests whose name has this in it
    #[arg(long, value_name = "TEXT")]
    test: Vec<String>,
    /// The subset that is part of `cargo xtask test`
    #[arg(long)]
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
    /// Write the results there as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The tests of `--quick`, by test binary: each kind of thing that a kernel can do otherwise, in little time.
const QUICK: [(&str, &[&str]); 2] = [
    ("recall", &["with_iptables_legacy", "agree", "without_btf_too", "clsact_too", "stacked"]),
    ("coexistence", &["what_a_killed_one_left", "another_program"]),
];
/// The kernels of `--quick`.
const QUICK_KERNELS: [&str; 2] = ["6.1", "fault-a"];

/// Runs it, and says whether all is well.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for kernel in KERNELS {
            println!("{:8} {}", kernel.name, kernel.describe());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let kernels = choose(&options.kernels, options.quick)?;
    if options.fetch {
        setup::run(Scope::Kernels)?;
        for kernel in kernels {
            match kernel.image(options.update) {
                Ok(image) => println!("{:8} {}", kernel.name, image.vmlinuz.display()),
                Err(error) => println!("{:8} not to be had here: {error:#}", kernel.name),
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let vxmon = if options.dev { cargo::build_dev(Scope::Kernels) } else { cargo::build(Scope::Kernels) }?;
    let jobs = jobs(options, &vxmon)?;
    let reports = run_all(&kernels, &jobs, options)?;
    print!("\n{}", report::text(&reports));
    let json = serde_json::to_string_pretty(&report::json(&reports))?;
    fs::write(kernel::cache()?.join("report.json"), &json)?;
    if let Some(path) = &options.json {
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let sums = reports.iter().map(KernelReport::counts).fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
    println!("{} passed, {} failed, {} skipped", sums.0, sums.1, sums.2);
    Ok(if sums.1 == 0 && sums.0 > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn choose(names: &[String], quick: bool) -> Result<Vec<Kernel>> {
    if names.is_empty() {
        let all = KERNELS.into_iter();
        return Ok(all.filter(|kernel| !quick || QUICK_KERNELS.contains(&kernel.name)).collect());
    }
    let find = |name: &String| {
        KERNELS.into_iter().find(|kernel| kernel.name == name).with_context(|| {
            let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
            format!("no kernel is called `{name}`; there are {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

fn jobs(options: &Options, vxmon: &Path) -> Result<Vec<Job>> {
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|part| name.contains(part.as_str()));
    let quick = |name: &str| QUICK.iter().find(|(binary, _)| *binary == name).map(|(_, tests)| *tests);
    let mut names = test_names()?;
    names.retain(|name| wanted(name) && (!options.quick || quick(name).is_some()));
    let binaries = if names.is_empty() { BTreeMap::new() } else { cargo::test_binaries(PACKAGE, &names)? };
    let mut jobs = Vec::new();
    for (name, binary) in binaries {
        let mut filter: Vec<&str> = options.test.iter().map(String::as_str).collect();
        if options.quick
            && let Some(tests) = quick(&name)
        {
            filter.extend(tests);
        }
        jobs.push(Job::tests(&name, &binary, vxmon, &filter, TESTS_LIMIT));
    }
    if wanted(SMOKE) && options.test.is_empty() {
        let script = cargo::root()?.join("xtask/vm/smoke.sh");
        let command = format!("sh '{}' '{}' /run/results/{SMOKE}.facts", script.display(), vxmon.display());
        jobs.insert(0, Job { name: SMOKE.to_owned(), command, limit: SMOKE_LIMIT, harness: false });
    }
    if wanted("demo") && options.test.is_empty() {
        let xtask = std::env::current_exe()?;
        let command = format!("'{}' demo --binary '{}'", xtask.display(), vxmon.display());
        jobs.push(Job { name: "demo".to_owned(), command, limit: DEMO_LIMIT, harness: false });
    }
    for (variable, value) in [("VXMON_ENGINE", &options.engine), ("VXMON_TRANSPORT", &options.transport)] {
        let Some(value) = value else { continue };
        for job in &mut jobs {
            job.command.insert_str(0, &format!("export {variable}='{value}'; "));
        }
    }
    if jobs.is_empty() {
        bail!("no test is called that");
    }
    Ok(jobs)
}

/// The integration tests of the package, by name.
fn test_names() -> Result<Vec<String>> {
    let directory = cargo::root()?.join("tests/tests");
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let files = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = files.filter_map(|name| name.strip_suffix(".rs").map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

fn run_all(kernels: &[Kernel], jobs: &[Job], options: &Options) -> Result<Vec<KernelReport>> {
    let mut reports = Vec::new();
    for kernel in kernels {
        reports.push(run_one(kernel, jobs, options)?);
        if proc::stop_signal().is_some() {
            bail!("interrupted");
        }
    }
    Ok(reports)
}

fn run_one(kernel: &Kernel, jobs: &[Job], options: &Options) -> Result<KernelReport> {
    let mut report = KernelReport {
        name: kernel.name.to_owned(),
        facts: BTreeMap::new(),
        results: BTreeMap::new(),
        unavailable: None,
        broken: None,
        seconds: 0,
    };
    let image = match kernel.image(options.update) {
        Ok(image) => image,
        Err(error) => {
            eprintln!("vm: kernel {}: {error:#}", kernel.name);
            report.unavailable = Some(format!("{error:#}"));
            return Ok(report);
        }
    };
    let run = kernel::cache()?.join("runs").join(kernel.name);
    let _ = fs::remove_dir_all(&run);
    fs::create_dir_all(&run)?;
    fs::write(run.join("jobs"), jobs.iter().map(Job::line).collect::<String>())?;
    let accel = options.accel.resolve(&image, &kernel::cache()?.join("runs/kvm"))?;
    let limit = Duration::from_secs(BOOT_LIMIT + jobs.iter().map(|job| job.limit + 15).sum::<u64>());
    let start = Instant::now();
    eprintln!("vm: kernel {}: booting ({accel:?}); console in {}", kernel.name, run.join("console.log").display());
    let mut ended = 0;
    let ran = Guest { image: &image, run: &run, accel, limit }.run(|_| {
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
    });
    report.broken = ran.err().map(|error| format!("{error:#}"));
    report.seconds = start.elapsed().as_secs();
    for job in jobs {
        for (name, outcome) in job::results(job, &run)?.unwrap_or_default() {
            report.results.insert(if job.harness { format!("{}::{name}", job.name) } else { name }, outcome);
        }
        read_facts(&run.join(format!("{}.facts", job.name)), &mut report.facts);
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
