//! How often and how long a program ran, as the kernel counts it while `kernel.bpf_stats_enabled` is 1.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd},
    time::Duration,
};

use aya::Ebpf;

/// Run time and number of runs of a loaded program, from /proc (bpf_prog_show_fdinfo(), kernel/bpf/syscall.c; since 5.1).
/// None where they are not counted.
pub fn run_stats(program: BorrowedFd<'_>) -> Option<(Duration, u64)> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd())).ok()?;
    let (time, runs) = parse(&text)?;
    let counted = || fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").is_ok_and(|value| value.trim() == "1");
    (runs > 0 || counted()).then_some((time, runs))
}

/// Run times and numbers of runs of an object's loaded programs, by name.
pub fn of_programs(ebpf: &Ebpf) -> Vec<(String, Duration, u64)> {
    let stats = ebpf.programs().filter_map(|(name, program)| {
        let (time, runs) = run_stats(program.fd().ok()?.as_fd())?;
        Some((name.to_owned(), time, runs))
    });
    stats.collect()
}

/// How often a loaded program was left out because one of its kind was running on that CPU; since 5.12, for kprobes since 6.7.
/// None where it is not counted.
pub fn misses(program: BorrowedFd<'_>) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd())).ok()?;
    field(&text, "recursion_misses:")
}

fn field(fdinfo: &str, name: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

fn parse(fdinfo: &str) -> Option<(Duration, u64)> {
    Some((Duration::from_nanos(field(fdinfo, "run_time_ns:")?), field(fdinfo, "run_cnt:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_a_program() {
        // cat /proc/PID/fdinfo/FD of a running vxmon attach, Linux 6.18.
        let text = "pos:\t0\nflags:\t02000002\nprog_type:\t3\nprog_jited:\t1\nprog_tag:\t6deef7357e7b4530\nmemlock:\t4096\n\
                    prog_id:\t13\nrun_time_ns:\t1234\nrun_cnt:\t5\nrecursion_misses:\t0\nverified_insns:\t81000\n";
        assert_eq!(parse(text), Some((Duration::from_nanos(1234), 5)));
        assert_eq!(parse("pos:\t0\n"), None);
        assert_eq!((field(text, "recursion_misses:"), field("pos:\t0\n", "recursion_misses:")), (Some(0), None));
    }
}
