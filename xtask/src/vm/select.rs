//! What a guest runs: which test binaries, and which of their tests.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::{Options, find, job::Job, kernel::Kernel};
use crate::cargo;

/// The package whose tests run in guests.
const PACKAGE: &str = "vxmon-tests";
/// Whether vxmon attaches at all, and how: `smoke.sh`.
const SMOKE: &str = "smoke";
const DEMO: &str = "demo";
/// For one test binary, in seconds. A loaded machine that emulates is slow.
const TESTS_LIMIT: u64 = 2400;
const SMOKE_LIMIT: u64 = 240;
const DEMO_LIMIT: u64 = 600;

/// A test binary, and parts of the names of its tests that are run; all of them, if there are none.
type Choice = (&'static str, &'static [&'static str]);

/// Kernels by name; all, if there are none.
type On = &'static [&'static str];

const EACH: On = &[];
/// The oldest and the newest: what both can do, those in between could hardly do otherwise.
const ENDS: On = &["5.10", "newest"];

/// What is run, in this order, and where: what depends on the kernel. The rest (manifests, log and metrics, readers of the live
/// log) is the same everywhere, and the whole matrix of `no_false_alarm`, hundreds of labs, would take an emulated machine a
/// day. All of this is meant to take an hour and a half on two cores.
pub const LAB: [(Choice, On); 18] = [
    ((SMOKE, &[]), EACH),
    (("verifier", &[]), EACH),
    (("fault_a", &[]), EACH),
    (("recall", &[]), EACH),
    (("coexistence", &[]), EACH),
    (("stacked", &[]), EACH),
    (("observed", &[]), EACH),
    (("capabilities", &[]), EACH),
    (("mitigate", &[]), EACH),
    (("attach", &[]), ENDS),
    (("nat_rules", &[]), ENDS),
    (("packet_socket", &[]), ENDS),
    (("netlink", &[]), ENDS),
    (("story", &[]), ENDS),
    (("lab", &[]), ENDS),
    (("no_false_alarm", &["fixed_rules", "stacked_devices"]), ENDS),
    (("replay", &[]), &["6.1", "fault-a"]),
    ((DEMO, &[]), EACH),
];

/// What is run as part of all tests, by kernel: what differs most, in little time.
const QUICK: [(&str, &[Choice]); 2] = [
    (
        "fault-a",
        &[
            (SMOKE, &[]),
            ("verifier", &[]),
            ("fault_a", &[]),
            ("observed", &["kube_proxys_rules_are_seen_at_work"]),
            (DEMO, &[]),
        ],
    ),
    (
        "5.10",
        &[
            (SMOKE, &[]),
            ("verifier", &[]),
            ("recall", &["every_bad_packet_is_reported_with_nftables"]),
            ("coexistence", &["what_a_killed_one_left"]),
            ("stacked", &["a_vlan_on_a_bond"]),
        ],
    ),
];

/// What these options ask for, on these kernels.
pub fn runs(options: &Options, kernels: Vec<Kernel>, vxmon: &Path) -> Result<Vec<(Kernel, Vec<Job>)>> {
    let named = named(options)?;
    let mut runs = Vec::new();
    for kernel in kernels {
        let of_kernel = LAB.iter().filter(|(_, on)| on.is_empty() || on.contains(&kernel.name));
        let mut choices: Vec<_> = match &named {
            Some(names) => names.iter().map(|name| (name.clone(), Vec::new())).collect(),
            None => of_kernel.map(|&(choice, _)| owned(choice)).collect(),
        };
        if !options.test.is_empty() {
            choices.retain(|(name, _)| name != SMOKE && name != DEMO);
            for (_, tests) in &mut choices {
                tests.clone_from(&options.test);
            }
        }
        let mut jobs = make(&choices, vxmon)?;
        for (variable, value) in [("VXMON_ENGINE", &options.engine), ("VXMON_TRANSPORT", &options.transport)] {
            let Some(value) = value else { continue };
            for job in &mut jobs {
                job.command.insert_str(0, &format!("export {variable}='{value}'; "));
            }
        }
        if jobs.is_empty() {
            bail!("no test is called that");
        }
        runs.push((kernel, jobs));
    }
    Ok(runs)
}

/// The names that `--only` stands for, those of [`LAB`] first; `None` without it.
fn named(options: &Options) -> Result<Option<Vec<String>>> {
    if options.only.is_empty() {
        return Ok(None);
    }
    let known: Vec<String> = LAB.iter().map(|((name, _), _)| (*name).to_owned()).collect();
    let others = test_names()?.into_iter().filter(|name| !known.contains(name));
    let mut names: Vec<String> = known.iter().cloned().chain(others).collect();
    names.retain(|name| options.only.iter().any(|part| name.contains(part.as_str())));
    Ok(Some(names))
}

/// The kernels of [`QUICK`], and what is run on each.
pub fn quick(vxmon: &Path) -> Result<Vec<(Kernel, Vec<Job>)>> {
    let run = |(kernel, choices): &(&str, &[Choice])| {
        let choices: Vec<_> = choices.iter().map(|&choice| owned(choice)).collect();
        Ok((find(kernel)?, make(&choices, vxmon)?))
    };
    QUICK.iter().map(run).collect()
}

fn owned((name, tests): Choice) -> (String, Vec<String>) {
    (name.to_owned(), tests.iter().map(|&test| test.to_owned()).collect())
}

fn make(choices: &[(String, Vec<String>)], vxmon: &Path) -> Result<Vec<Job>> {
    let names: Vec<String> =
        choices.iter().map(|(name, _)| name.clone()).filter(|name| name != SMOKE && name != DEMO).collect();
    let binaries = if names.is_empty() { BTreeMap::new() } else { cargo::test_binaries(PACKAGE, &names)? };
    choices
        .iter()
        .map(|(name, tests)| match name.as_str() {
            SMOKE => {
                let script = cargo::root()?.join("xtask/vm/smoke.sh");
                let command = format!("sh '{}' '{}' /run/results/{SMOKE}.facts", script.display(), vxmon.display());
                Ok(Job { name: SMOKE.to_owned(), command, limit: SMOKE_LIMIT, harness: false, whole: true })
            }
            DEMO => {
                let command = format!("'{}' demo --binary '{}'", std::env::current_exe()?.display(), vxmon.display());
                Ok(Job { name: DEMO.to_owned(), command, limit: DEMO_LIMIT, harness: false, whole: true })
            }
            name => {
                let binary: &PathBuf = binaries.get(name).with_context(|| format!("cargo built no test {name}"))?;
                Ok(Job::tests(name, binary, vxmon, tests, TESTS_LIMIT))
            }
        })
        .collect()
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
