//! All tests: unit and property tests, documentation examples, and the privileged tests of package `vxmon-tests`.
//!
//! The tests themselves are built without optimisation, beside clippy's and xtask's own dependencies; the vxmon that they run
//! is the release binary that users get (`VXMON_BIN`). cargo prints a result for each test binary; the last line here is their
//! sum.

use std::{
    fmt, fs,
    ops::{Add, AddAssign},
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Uid;

use crate::{
    cargo, proc,
    setup::{self, Scope},
    vm,
};

/// The package whose tests need root.
const PRIVILEGED: &str = "vxmon-tests";
/// Those of its tests that watch traffic by TC programs, run once more with the programs for kernels before 5.8. Left out are
/// those about what these do not have: the skb's metadata (`evidence`, `readme`), lines of their own (`logging`), those that
/// say themselves how to watch (`capabilities`, `container`, `packet_socket`), and those that only a guest's kernel can run.
const ONCE_MORE: [&str; 12] = [
    "attach",
    "coexistence",
    "many_rules",
    "metrics",
    "mitigate",
    "nat_rules",
    "no_false_alarm",
    "pcap",
    "recall",
    "storm",
    "story",
    "tail",
];
/// How they are told to.
const TRANSPORT: (&str, &str) = ("VXMON_TRANSPORT", "perf");
/// Parts of names of tests that would do the same again: without eBPF, or without metadata.
const NOT_AGAIN: [&str; 3] = ["by_packet_sockets", "without_btf", "by_skb"];

/// Runs all tests, with `args` passed to their binaries.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let vxmon = cargo::build(Scope::Tests)?;
    setup::schemas()?;
    let skip_file = vxmon.with_file_name("skipped-tests");
    fs::write(&skip_file, "").with_context(|| format!("cannot write {}", skip_file.display()))?;

    let mut total = Count::default();
    let mut success = true;
    for Call { options, tests, variables } in calls(&vxmon, &skip_file)? {
        let mut command = cargo::command()?;
        command.args(["test", "--locked", "--no-fail-fast"]).args(options).arg("--").args(args).args(tests);
        command.envs(variables);
        let mut count = Count::default();
        let status = proc::run_lines(&mut command, |line| {
            println!("{line}");
            if let Some(result) = Count::parse(line) {
                count += result;
            }
        })?;
        success &= status.success();
        if !status.success() && count.failed == 0 {
            // It did not compile, or a test binary died before it printed its result.
            eprintln!("xtask: `{}`: {status}, without a failed test", proc::line(&command));
            count.failed = 1;
        }
        total += count;
    }

    let skipped = fs::read_to_string(&skip_file)?;
    for line in skipped.lines() {
        println!("{line}");
        // The harness counts a test that returned early as passed.
        total.passed = total.passed.saturating_sub(1);
        total.skipped += 1;
    }
    // Those who name tests have others in mind.
    if args.is_empty() {
        total += guests(&vxmon)?;
    }
    println!("{total}");
    Ok(if success && total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A few tests on other kernels, in QEMU; where that cannot be had, it counts as one that is skipped.
fn guests(vxmon: &Path) -> Result<Count> {
    if let Err(error) = setup::guests() {
        println!("SKIP vm: {error:#}");
        return Ok(Count { skipped: 1, ..Count::default() });
    }
    vm::quick(vxmon)
}

/// A call of `cargo test`.
struct Call {
    /// Its options.
    options: Vec<String>,
    /// Options of the test binaries.
    tests: Vec<String>,
    /// Where the tests find the daemon, where they note those that cannot run on this machine, and what the daemon is told.
    variables: Vec<(&'static str, String)>,
}

/// The calls: all tests, if this is root, else those that need root apart; and some once more in another way.
fn calls(vxmon: &Path, skip_file: &Path) -> Result<Vec<Call>> {
    let variables =
        vec![("VXMON_BIN", vxmon.display().to_string()), ("VXMON_SKIP_FILE", skip_file.display().to_string())];
    let with_transport = [&variables[..], &[(TRANSPORT.0, TRANSPORT.1.to_owned())]].concat();
    let skips: Vec<String> = NOT_AGAIN.iter().flat_map(|part| ["--skip".to_owned(), (*part).to_owned()]).collect();
    let everything = ["--workspace", "--exclude=vxmon-ebpf"].map(str::to_owned).to_vec();
    // Of their package alone, dependencies would have fewer features, and would be built a second time.
    let once_more = ONCE_MORE.iter().map(|binary| format!("--test={binary}"));
    let again: Vec<String> = everything.iter().cloned().chain(once_more).collect();
    if Uid::effective().is_root() {
        return Ok(vec![
            Call { options: everything, tests: Vec::new(), variables },
            Call { options: again, tests: skips, variables: with_transport },
        ]);
    }
    if proc::output(Command::new("sudo").arg("--version")).is_none() {
        bail!("not root, and there is no sudo: the tests of network namespaces need one of them");
    }
    let unprivileged = [everything, vec![format!("--exclude={PRIVILEGED}")]].concat();
    let privileged = |mut options: Vec<String>, tests, variables: Vec<(&'static str, String)>| -> Result<Call> {
        // sudo may refuse to keep the environment, but not a command that sets it.
        let mut runner = vec!["sudo".to_owned(), "env".to_owned(), format!("PATH={}", std::env::var("PATH")?)];
        runner.extend(variables.iter().map(|(name, value)| format!("{name}={value}")));
        options.push("--config".to_owned());
        // A JSON array of strings is a TOML one as well.
        options.push(format!("target.'cfg(target_os = \"linux\")'.runner = {}", serde_json::to_string(&runner)?));
        Ok(Call { options, tests, variables })
    };
    Ok(vec![
        Call { options: unprivileged, tests: Vec::new(), variables: variables.clone() },
        privileged(vec![format!("--package={PRIVILEGED}")], Vec::new(), variables)?,
        privileged(again, skips, with_transport)?,
    ])
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// They did as they should.
    pub passed: u64,
    /// They did not.
    pub failed: u64,
    /// They could not run here.
    pub skipped: u64,
}

impl Count {
    /// Reads the last line of a test binary: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let mut count = Self::default();
        for part in counts.split("; ") {
            match part.split_once(' ') {
                Some((number, "passed")) => count.passed = number.parse().ok()?,
                Some((number, "failed")) => count.failed = number.parse().ok()?,
                Some((number, "ignored")) => count.skipped = number.parse().ok()?,
                _ => {}
            }
        }
        Some(count)
    }
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::Count;

    #[test]
    fn results_of_test_binaries_are_read() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s";
        assert_eq!(Count::parse(line), Some(Count { passed: 3, failed: 2, skipped: 1 }));
        assert_eq!(Count::parse("test result of another kind ... ok"), None);
        assert_eq!(Count::parse("running 3 tests"), None);
    }
}
