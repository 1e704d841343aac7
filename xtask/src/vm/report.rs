//! What the lab prints: a table of kernel and test for people, and the same as JSON.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde_json::{Value, json};

use super::job::Outcome;
use crate::test::Count;

/// The result, instead of those of tests, of a kernel that does not build.
pub const BUILD: &str = "kernel";

/// What became of a kernel.
#[derive(Debug)]
pub struct KernelReport {
    /// As on the command line.
    pub name: String,
    /// What the guest says of itself (`release`, `btf`, …) and what its tests measured.
    pub facts: BTreeMap<String, String>,
    /// The test binaries of which all tests ran.
    pub whole: BTreeSet<String>,
    /// By test, named `BINARY::TEST`.
    pub results: BTreeMap<String, Outcome>,
    /// Why the kernel could not be had.
    pub unavailable: Option<String>,
    /// Seconds.
    pub seconds: u64,
}

impl KernelReport {
    /// Tests passed, failed, skipped. A kernel that cannot be had counts as one that was skipped.
    pub fn count(&self) -> Count {
        let count =
            |wanted: fn(&Outcome) -> bool| self.results.values().filter(|outcome| wanted(outcome)).count() as u64;
        Count {
            passed: count(|outcome| matches!(outcome, Outcome::Passed)),
            failed: count(|outcome| matches!(outcome, Outcome::Failed(_))),
            skipped: count(|outcome| matches!(outcome, Outcome::Skipped(_))) + u64::from(self.unavailable.is_some()),
        }
    }

    /// The kernel's release, once known.
    pub fn title(&self) -> String {
        match self.facts.get("release") {
            Some(release) => release.clone(),
            None => self.name.clone(),
        }
    }
}

/// The table, the reasons of what was skipped or failed, and a line for each kernel.
pub fn text(reports: &[KernelReport]) -> String {
    let mut out = String::new();
    let shown: Vec<&KernelReport> = reports.iter().filter(|report| report.unavailable.is_none()).collect();
    let mut rows: Vec<&String> = shown.iter().flat_map(|report| report.results.keys()).collect();
    rows.sort();
    rows.dedup();
    let width = rows.iter().map(|row| row.len()).max().unwrap_or(4).max(16);
    let columns: Vec<usize> = shown.iter().map(|report| report.name.len().max(7)).collect();
    let mut line = |first: &str, cells: &[String]| {
        let cells: Vec<String> = cells.iter().zip(&columns).map(|(cell, &width)| format!("{cell:>width$}")).collect();
        let _ = writeln!(out, "{first:width$}  {}", cells.join("  ").trim_end());
    };
    line("", &shown.iter().map(|report| report.name.clone()).collect::<Vec<_>>());
    for row in rows {
        let cell = |report: &&KernelReport| match report.results.get(row) {
            Some(Outcome::Passed) => "ok".to_owned(),
            Some(Outcome::Failed(_)) => "FAILED".to_owned(),
            Some(Outcome::Skipped(_)) => "skip".to_owned(),
            None => "-".to_owned(),
        };
        line(row, &shown.iter().map(cell).collect::<Vec<_>>());
    }
    for report in &shown {
        let _ = writeln!(out, "\n{} ({})", report.name, report.title());
        for (name, value) in report.facts.iter().filter(|(name, _)| *name != "release") {
            let _ = writeln!(out, "  {name}: {value}");
        }
        for (name, outcome) in &report.results {
            match outcome {
                Outcome::Skipped(why) => {
                    let _ = writeln!(out, "  SKIP {name}: {why}");
                }
                Outcome::Failed(why) => {
                    let _ = writeln!(out, "  FAILED {name}:\n    {}", why.replace('\n', "\n    "));
                }
                Outcome::Passed => {}
            }
        }
    }
    out.push('\n');
    for report in reports {
        let (name, count) = (&report.name, report.count());
        let _ = match &report.unavailable {
            Some(why) => writeln!(out, "SKIP kernel {name}: not to be had here: {why}"),
            None => writeln!(out, "kernel {name} ({}): {count}, {} s", report.title(), report.seconds),
        };
    }
    out
}

/// What became of a test, for programs.
pub fn outcome_json(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Passed => json!({"result": "passed"}),
        Outcome::Skipped(why) => json!({"result": "skipped", "why": why}),
        Outcome::Failed(why) => json!({"result": "failed", "why": why}),
    }
}

/// The same as [`text`], for programs.
pub fn json(reports: &[KernelReport]) -> Value {
    let kernels: Vec<Value> = reports
        .iter()
        .map(|report| {
            let tests: BTreeMap<&String, Value> =
                report.results.iter().map(|(name, result)| (name, outcome_json(result))).collect();
            let Count { passed, failed, skipped } = report.count();
            json!({
                "kernel": report.name, "facts": report.facts, "tests": tests, "passed": passed, "failed": failed,
                "skipped": skipped, "unavailable": report.unavailable, "seconds": report.seconds,
            })
        })
        .collect();
    json!({ "kernels": kernels })
}
