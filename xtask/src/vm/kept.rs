//! The results of all runs in this clone, by kernel and test, each with the run that it is of; and the table made of them, for
//! docs/kernels.md. A run of a few tests on one kernel renews those, and no others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    directory,
    kernel::KERNELS,
    report::{BUILD, KernelReport, outcome_json},
    select::LAB,
};
use crate::{cargo, proc};

const VERIFIED: &str = "verified instructions, ";

/// What is kept.
pub struct Kept {
    path: PathBuf,
    /// By kernel: `title`, `facts`, and `tests`, by name, with `result`, `why` and `run`.
    kernels: BTreeMap<String, Value>,
}

impl Kept {
    /// Reads what is there.
    pub fn open() -> Result<Self> {
        Self::at(directory()?.join("results.json"))
    }

    fn at(path: PathBuf) -> Result<Self> {
        let kernels = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("cannot read {}", path.display()))?,
            Err(_) => BTreeMap::new(),
        };
        Ok(Self { path, kernels })
    }

    /// Takes in the results of a run, and writes everything.
    pub fn add(&mut self, report: &KernelReport, run: &str) -> Result<()> {
        let kernel = self.kernels.entry(report.name.clone()).or_insert_with(|| json!({"facts": {}, "tests": {}}));
        if let Some(why) = &report.unavailable {
            kernel["unavailable"] = why.lines().next().into();
        } else {
            kernel["unavailable"] = Value::Null;
            if let Some(release) = report.facts.get("release") {
                kernel["title"] = release.clone().into();
            }
        }
        if let Some(tests) = kernel["tests"].as_object_mut()
            && report.unavailable.is_none()
        {
            // That a kernel does not build holds until it builds; what a test binary no longer has is forgotten.
            tests.retain(|name, _| name != BUILD && !report.whole.contains(binary(name)));
        }
        for (name, value) in report.facts.iter().filter(|(name, _)| *name != "release") {
            kernel["facts"][name] = value.clone().into();
        }
        for (name, outcome) in &report.results {
            let mut record = outcome_json(outcome);
            record["run"] = run.into();
            kernel["tests"][name] = record;
        }
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(&self.kernels)?)?;
        Ok(fs::rename(new, &self.path)?)
    }

    /// The tables, in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::from(
            "# Tests by kernel\n\nWritten by `cargo xtask vm --markdown docs/kernels.md` from what its runs printed; not \
             edited by hand. The kernels run in QEMU, emulated. Rows are test binaries of `tests/tests` and what \
             `xtask/vm/smoke.sh` and `cargo xtask demo` do; a number is how many tests passed.\n\n",
        );
        let columns: Vec<(&str, &Value)> =
            KERNELS.iter().map(|kernel| (kernel.name, self.kernels.get(kernel.name).unwrap_or(&Value::Null))).collect();
        let title = |(name, kernel): &(&str, &Value)| match (&kernel["unavailable"], kernel["title"].as_str()) {
            (Value::String(_), _) => format!("{name} (not to be had)"),
            (_, Some(title)) => format!("{name} ({title})"),
            _ => (*name).to_owned(),
        };
        let titles: Vec<String> = columns.iter().map(title).collect();
        let mut rows: Vec<String> = LAB.iter().map(|((name, _), _)| (*name).to_owned()).collect();
        let others: BTreeSet<String> = columns
            .iter()
            .flat_map(|(_, kernel)| tests(kernel).map(|(name, _)| binary(name).to_owned()))
            .filter(|name| !rows.contains(name))
            .collect();
        rows.extend(others);
        line(&mut out, "test", &titles);
        rule(&mut out, titles.len());
        for row in &rows {
            let cells: Vec<String> = columns.iter().map(|(_, kernel)| cell(kernel, row)).collect();
            line(&mut out, row, &cells);
        }
        out.push_str("\n## Skipped and failed\n\n");
        for (name, kernel) in &columns {
            if let Some(why) = kernel["unavailable"].as_str() {
                let _ = writeln!(out, "- {name}: not to be had: {why}");
            }
            for (test, record) in tests(kernel).filter(|(_, record)| record["result"] != "passed") {
                let why = record["why"].as_str().unwrap_or_default().lines().next().unwrap_or_default();
                let _ = writeln!(out, "- {name}: `{test}` {}: {why}", record["result"].as_str().unwrap_or_default());
            }
        }
        out.push_str(
            "\n## What the kernels told\n\nInstructions that the verifier went over, of 1,000,000, and others.\n\n",
        );
        let facts: BTreeSet<&String> =
            columns.iter().flat_map(|(_, kernel)| facts(kernel).map(|(name, _)| name)).collect();
        line(&mut out, "", &titles);
        rule(&mut out, titles.len());
        for fact in facts {
            let value = |(_, kernel): &(&str, &Value)| kernel["facts"][fact].as_str().unwrap_or("").trim().to_owned();
            line(&mut out, fact.strip_prefix(VERIFIED).unwrap_or(fact), &columns.iter().map(value).collect::<Vec<_>>());
        }
        out.push_str("\n## Runs\n\n");
        let mut runs: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (name, kernel) in &columns {
            for (_, record) in tests(kernel) {
                runs.entry(record["run"].as_str().unwrap_or_default()).or_default().insert(name);
            }
        }
        for (run, kernels) in runs {
            let kernels: Vec<&str> = kernels.into_iter().collect();
            let _ = writeln!(out, "- {run}: {}", kernels.join(", "));
        }
        out
    }

    /// Instructions verified, a line a program and a column a kernel; empty if none were counted.
    pub fn verified<'a>(&'a self) -> String {
        let counts: Vec<(&str, BTreeMap<&str, &str>)> = KERNELS
            .iter()
            .filter_map(|kernel| Some((kernel.name, self.kernels.get(kernel.name)?)))
            .map(|(name, kernel)| {
                let count =
                    |(name, value): (&'a String, &'a Value)| Some((name.strip_prefix(VERIFIED)?, value.as_str()?));
                (name, facts(kernel).filter_map(count).collect())
            })
            .filter(|(_, counts): &(_, BTreeMap<_, _>)| !counts.is_empty())
            .collect();
        let programs: BTreeSet<&str> = counts.iter().flat_map(|(_, counts)| counts.keys().copied()).collect();
        let mut out = String::new();
        let mut line = |first: &str, cells: Vec<&str>| {
            let cells: String = cells.iter().map(|cell| format!("{cell:>10}")).collect();
            let _ = writeln!(out, "{first:32}{cells}");
        };
        if !programs.is_empty() {
            line("", counts.iter().map(|(name, _)| *name).collect());
        }
        for program in programs {
            line(program, counts.iter().map(|(_, counts)| counts.get(program).copied().unwrap_or("-")).collect());
        }
        out
    }

    /// Writes the tables to a file.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.markdown()).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Day, command and version of a run that begins now.
pub fn run_title() -> Result<String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let day = proc::output(Command::new("date").args(["-u", "+%F"])).context("date does not run")?;
    let mut git = Command::new("git");
    git.current_dir(cargo::root()?).args(["describe", "--always", "--dirty"]);
    let version = proc::output(&mut git).map_or_else(String::new, |version| format!(" ({version})"));
    Ok(format!("{day}, `cargo xtask {}`{version}", words.join(" ")))
}

fn tests(kernel: &Value) -> impl Iterator<Item = (&String, &Value)> {
    kernel["tests"].as_object().into_iter().flatten()
}

fn facts(kernel: &Value) -> impl Iterator<Item = (&String, &Value)> {
    kernel["facts"].as_object().into_iter().flatten()
}

/// `recall::TEST` is of `recall`, `demo` is of itself.
fn binary(test: &str) -> &str {
    test.split("::").next().unwrap_or(test)
}

fn cell(kernel: &Value, row: &str) -> String {
    let count =
        |wanted: &str| tests(kernel).filter(|(name, record)| binary(name) == row && record["result"] == wanted).count();
    let (passed, failed, skipped) = (count("passed"), count("failed"), count("skipped"));
    let mut parts = Vec::new();
    if passed > 0 {
        parts.push(passed.to_string());
    }
    if failed > 0 {
        parts.push(format!("**{failed} failed**"));
    }
    if skipped > 0 {
        parts.push(format!("{skipped} skipped"));
    }
    if parts.is_empty() { "not run".to_owned() } else { parts.join(", ") }
}

fn line(out: &mut String, first: &str, cells: &[String]) {
    let _ = writeln!(out, "| {first} | {} |", cells.join(" | "));
}

fn rule(out: &mut String, columns: usize) {
    let _ = writeln!(out, "|{}", "---|".repeat(columns + 1));
}

#[cfg(test)]
mod tests_of_it {
    use std::{collections::BTreeSet, fs};

    use super::{BUILD, Kept};
    use crate::vm::{job::Outcome, report::KernelReport};

    fn report(results: &[(&str, Outcome)]) -> KernelReport {
        KernelReport {
            name: "6.1".to_owned(),
            facts: [("release", "6.1.0-1"), ("verified instructions, vxmon_any", "43775"), ("jit", "1")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            results: results.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect(),
            whole: BTreeSet::new(),
            unavailable: None,
            seconds: 1,
        }
    }

    #[test]
    fn a_run_renews_its_own_tests_only() {
        let path = std::env::temp_dir().join(format!("vxmon-kept-{}", std::process::id()));
        let mut kept = Kept::at(path.clone()).unwrap();
        let failed = Outcome::Failed("1 is not 2\nand more".to_owned());
        kept.add(&report(&[("recall::a", failed), ("recall::b", Outcome::Passed)]), "first").unwrap();
        kept.add(&report(&[("recall::a", Outcome::Passed), ("demo", Outcome::Skipped("no".to_owned()))]), "second")
            .unwrap();
        let mut whole = report(&[("lab::new", Outcome::Passed)]);
        kept.add(&report(&[("lab::old", Outcome::Passed), (BUILD, Outcome::Failed(String::new()))]), "third").unwrap();
        whole.whole.insert("lab".to_owned());
        kept.add(&whole, "fourth").unwrap();
        let kept = Kept::at(path.clone()).unwrap();
        fs::remove_file(path).unwrap();
        let text = kept.markdown();
        let counts = kept.verified();
        let words: Vec<&str> = counts.split_whitespace().collect();
        assert_eq!(words, ["6.1", "vxmon_any", "43775"]);
        let row = |name: &str| text.lines().find(|line| line.starts_with(&format!("| {name} |"))).unwrap().to_owned();
        assert_eq!(row("recall"), "| recall | not run | not run | 2 | not run | not run | not run |");
        assert_eq!(row("demo"), "| demo | not run | not run | 1 skipped | not run | not run | not run |");
        assert!(row("test").contains("6.1 (6.1.0-1)"));
        assert_eq!(row("lab"), "| lab | not run | not run | 1 | not run | not run | not run |");
        assert!(!text.contains("| kernel |"));
        assert!(text.contains("- 6.1: `demo` skipped: no\n") && !text.contains("1 is not 2"));
        assert!(text.contains("- first: 6.1\n") && text.contains("- second: 6.1\n"));
    }
}
