//! What a guest runs, and what became of it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::cache::remove;

/// A command in a guest.
#[derive(Clone, Debug)]
pub struct Job {
    /// The name of the test binary, or `demo`.
    pub name: String,
    /// Run by a shell.
    pub command: String,
    /// Seconds.
    pub limit: u64,
    /// The tests are those of Rust's harness; else the job as a whole is one test.
    pub harness: bool,
    /// All of its tests are run.
    pub whole: bool,
}

impl Job {
    /// The tests `filter` (all, if there is none) of a test binary.
    pub fn tests(name: &str, binary: &Path, vxmon: &Path, filter: &[String], limit: u64) -> Self {
        let mut command = format!(
            "VXMON_BIN='{}' VXMON_SKIP_FILE=/run/results/{name}.skip VXMON_FACTS=/run/results/{name}.facts \
             VXMON_TRANSCRIPT=/run/results/{name}.transcript '{}'",
            vxmon.display(),
            binary.display()
        );
        for word in filter {
            command.push(' ');
            command.push_str(word);
        }
        Self { name: name.to_owned(), command, limit, harness: true, whole: filter.is_empty() }
    }

    /// A line of the file that `guest.sh` reads.
    pub fn line(&self) -> String {
        format!("{}\t{}\t{}\n", self.name, self.limit, self.command)
    }
}

/// What became of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It cannot run on that kernel: why.
    Skipped(String),
    /// It failed: what it said.
    Failed(String),
}

/// Removes all that the job left in earlier runs.
pub fn forget(job: &Job, run: &Path) -> Result<()> {
    for extension in ["log", "err", "status", "skip", "facts", "transcript"] {
        remove(&run.join(format!("{}.{extension}", job.name)))?;
    }
    Ok(())
}

/// Results of a job, by test; `None` if it has not ended.
pub fn results(job: &Job, run: &Path) -> Result<Option<BTreeMap<String, Outcome>>> {
    let file = |extension: &str| -> PathBuf { run.join(format!("{}.{extension}", job.name)) };
    let Ok(status) = fs::read_to_string(file("status")) else { return Ok(None) };
    let status: i32 = status.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(-1);
    let read = |extension| String::from_utf8_lossy(&fs::read(file(extension)).unwrap_or_default()).into_owned();
    let (log, err) = (read("log"), read("err"));
    let mut results = BTreeMap::new();
    if job.harness {
        results = harness(&log);
        for line in read("skip").lines() {
            if let Some((name, why)) = line.trim_start_matches("SKIP ").split_once(": ")
                && let Some(outcome) = results.get_mut(name)
                && *outcome == Outcome::Passed
            {
                *outcome = Outcome::Skipped(why.to_owned());
            }
        }
    }
    let failed = results.values().any(|outcome| matches!(outcome, Outcome::Failed(_)));
    if status == 0 && !job.harness {
        results.insert(job.name.clone(), Outcome::Passed);
    } else if status != 0 && !failed || results.is_empty() {
        let why = match status {
            124 | 137 => format!("not ended after {} s: {}", job.limit, tail(&log)),
            _ => format!("exit status {status}: {}", tail(&(log + &err))),
        };
        results.insert(job.name.clone(), Outcome::Failed(why));
    }
    Ok(Some(results))
}

/// `test NAME ... ok`, and what failed tests said below `---- NAME stdout ----`.
fn harness(log: &str) -> BTreeMap<String, Outcome> {
    let mut results = BTreeMap::new();
    for line in log.lines() {
        let Some((name, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) else {
            continue;
        };
        let outcome = match result {
            "ok" => Outcome::Passed,
            "FAILED" => Outcome::Failed(said(log, name)),
            _ => Outcome::Skipped(result.to_owned()),
        };
        results.insert(name.to_owned(), outcome);
    }
    results
}

fn said(log: &str, name: &str) -> String {
    let Some((_, rest)) = log.split_once(&format!("---- {name} stdout ----\n")) else { return String::new() };
    let end = rest.find("\n---- ").or_else(|| rest.find("\nfailures:\n")).unwrap_or(rest.len());
    rest[..end].trim().to_owned()
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::{Outcome, harness};

    #[test]
    fn results_of_the_harness_are_read() {
        let log = "running 3 tests\ntest one ... ok\ntest two ... FAILED\ntest three ... ignored\n\nfailures:\n\n\
                   ---- two stdout ----\nError: 1 is not 2\n\nfailures:\n    two\n\ntest result: FAILED. 1 passed";
        let results = harness(log);
        assert_eq!(results["one"], Outcome::Passed);
        assert_eq!(results["two"], Outcome::Failed("Error: 1 is not 2".to_owned()));
        assert_eq!(results["three"], Outcome::Skipped("ignored".to_owned()));
        assert_eq!(results.len(), 3);
    }
}
