//! What the kernel counts for each eBPF program while statistics are on (`BPF_ENABLE_STATS`): runs, and time in them.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};

/// Runs of a program, and the time they took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Runs {
    /// How many.
    pub count: u64,
    /// Nanoseconds, all together.
    pub ns: u64,
}

impl Runs {
    /// Those since an earlier reading.
    pub fn since(self, before: Self) -> Self {
        Self { count: self.count - before.count, ns: self.ns - before.ns }
    }

    /// Nanoseconds a run.
    pub fn mean(self) -> f64 {
        self.ns as f64 / self.count as f64
    }
}

/// The programs that a process holds, by the id that the kernel gave them.
pub fn of_process(pid: u32) -> Result<BTreeMap<u32, Runs>> {
    let dir = format!("/proc/{pid}/fdinfo");
    let mut programs = BTreeMap::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {dir}"))? {
        // A descriptor may be closed by now.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        if let Some((id, runs)) = parse(&text) {
            programs.insert(id, runs);
        }
    }
    Ok(programs)
}

/// Those of one descriptor of this process.
pub fn of_fd(fd: i32) -> Result<Runs> {
    let path = Path::new("/proc/self/fdinfo").join(fd.to_string());
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).map(|(_, runs)| runs).with_context(|| format!("{} is not a program's", path.display()))
}

/// See `bpf_prog_show_fdinfo()`, kernel/bpf/syscall.c.
fn parse(text: &str) -> Option<(u32, Runs)> {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse::<u64>().ok())
    };
    let id = u32::try_from(field("prog_id")?).ok()?;
    // A link shows its program's id too, but has no runs.
    Some((id, Runs { count: field("run_cnt")?, ns: field("run_time_ns")? }))
}
