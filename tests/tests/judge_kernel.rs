//! One judge: what it says in the kernel, compiled for BPF and reading an skb, is what it says in userspace of the same
//! bytes. The packets are run through `BPF_PROG_TEST_RUN`, which makes linear skbs of about a page at most; larger and
//! non-linear ones are the business of the tests with real traffic.

#![expect(clippy::print_stdout, reason = "the counts are for who reads the test's output")]

#[path = "../../vxmon-common/tests/generate/mod.rs"]
mod generate;

use std::{fmt::Write as _, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData},
    programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions},
};
use generate::{Rng, Row, Sample, Shape, Told};
use vxmon::source::{
    btf::Layout,
    object::{self, Object},
};
use vxmon_common::{
    config::{CONFIG, PORTS, PORTS_MAP, port_flag},
    judge::{self, Found, Outcome, Reason, Skb, State, Verdict},
    packet::Bytes,
};
use vxmon_tests::skip;

/// Everything below follows from it.
const SEED: u64 = 0x7678_6d6f_6e00_0001;
/// Packets of any kind, beside those made for their length.
const ANY: usize = 6000;
/// `cb` in `struct __sk_buff` (include/uapi/linux/bpf.h).
const CB: usize = 48;
/// Size of that struct.
const SK_BUFF: usize = 192;
/// In `cb[0]`: payloads are not summed (vxmon-ebpf/src/bin/vxmon-test.rs).
const NO_PAYLOAD: u32 = 1 << 8;

/// What is put before both judges.
struct Case {
    bytes: Vec<u8>,
    skb: Skb,
    sum_payload: bool,
    /// How it was made, for the report.
    story: String,
}

/// `bpf_csum_diff()` sums any length in place.
#[test]
fn kernel_and_userspace_agree() -> Result<()> {
    compare("judge_kernel::kernel_and_userspace_agree", 4096)
}

/// It takes 512 bytes at a time, as on older kernels.
#[test]
fn kernel_and_userspace_agree_by_512_bytes() -> Result<()> {
    compare("judge_kernel::kernel_and_userspace_agree_by_512_bytes", 512)
}

fn compare(name: &str, csum_chunk: u32) -> Result<()> {
    if !skip::root_or_skip(name) {
        return Ok(());
    }
    let mut kernel = Kernel::load(csum_chunk)?;
    let most = kernel.longest_packet()?;
    let cases = corpus(most);
    let start = Instant::now();
    let mut tally = Tally::default();
    for case in &cases {
        for program in [UPLINK, VXLAN] {
            tally.add(case, program, kernel.judge(program, case)?, userspace(program, case));
        }
    }
    tally.tell(csum_chunk, most, cases.len(), start);
    if let Some(first) = tally.differences.first() {
        bail!("{} of {} differ (seed {SEED:#x}), the first:\n{first}", tally.differences.len(), tally.compared);
    }
    // The corpus must reach every answer, or it compares nothing with nothing.
    ensure!(tally.compared >= 10_000, "only {} packets were compared", tally.compared);
    for verdict in Verdict::ALL {
        let reached = tally.verdicts[usize::from(verdict as u8)] > 0;
        let by_name = verdict == Verdict::NatStalePort; // only the connection's tuples give this name
        ensure!(reached != by_name, "{} came {} times", verdict.name(), tally.verdicts[usize::from(verdict as u8)]);
    }
    for reason in Reason::ALL {
        let needs_more_than_a_page = reason == Reason::TooLong;
        ensure!(
            needs_more_than_a_page || tally.reasons[usize::from(reason as u8)] > 0,
            "unverified for {} never came",
            reason.name()
        );
    }
    Ok(())
}

const UPLINK: &str = "judge_uplink";
const VXLAN: &str = "judge_vxlan";

/// The test object, loaded.
struct Kernel {
    ebpf: Ebpf,
    result: Array<MapData, [u32; 6]>,
}

impl Kernel {
    fn load(csum_chunk: u32) -> Result<Self> {
        let mut layout = Layout::detect();
        layout.config.csum_chunk = csum_chunk;
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .override_global(CONFIG, &layout.config, true)
            .load(Object::new(object::TEST, layout.cast).bytes())
            .context("cannot load the test object")?;
        // The whole program is not run, but must pass the verifier with either setting.
        for name in [UPLINK, VXLAN, "whole_uplink"] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load().with_context(|| format!("the kernel refuses {name}"))?;
        }
        let mut ports: Array<MapData, [u8; PORTS]> = ebpf.take_map(PORTS_MAP).context(PORTS_MAP)?.try_into()?;
        let mut table = [0; PORTS];
        table[usize::from(4789_u16.to_be())] = port_flag::TUNNEL | port_flag::NO_ZERO_IPV6;
        table[usize::from(8472_u16.to_be())] = port_flag::TUNNEL;
        ports.set(0, table, 0)?;
        let result = ebpf.take_map("RESULT").context("RESULT")?.try_into()?;
        Ok(Self { ebpf, result })
    }

    /// Runs a program over a packet. `None`: the kernel does not take such a packet for a test run.
    fn judge(&mut self, program: &str, case: &Case) -> Result<Option<[u32; 6]>> {
        let program: &mut SchedClassifier = self.ebpf.program_mut(program).context("no program")?.try_into()?;
        let mut context = [0; SK_BUFF];
        let Skb { state, csum_start, csum_offset, gso_size, gso_type } = case.skb;
        let flags = state as u32 | if case.sum_payload { 0 } else { NO_PAYLOAD };
        for (n, word) in [flags, csum_start, csum_offset, gso_size, gso_type].into_iter().enumerate() {
            context[CB + 4 * n..CB + 4 * n + 4].copy_from_slice(&word.to_ne_bytes());
        }
        // What is left of the packet before must not pass for the answer.
        self.result.set(0, [u32::MAX; 6], 0)?;
        let mut options = TestRunOptions::new();
        options.data_in = Some(&case.bytes);
        options.ctx_in = Some(&context);
        match program.test_run(options) {
            Ok(run) => {
                ensure!(run.return_value == u32::MAX, "returned {}, not TC_ACT_UNSPEC", run.return_value);
                Ok(Some(self.result.get(&0, 0)?))
            }
            Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(EINVAL) => Ok(None),
            Err(error) => Err(error).context("the test run failed"),
        }
    }

    /// The longest packet taken: a page less headroom and the shared info (`bpf_test_init()`, net/bpf/test_run.c).
    fn longest_packet(&mut self) -> Result<usize> {
        let (mut taken, mut refused) = (1000, 1 << 17);
        while refused - taken > 1 {
            let middle = usize::midpoint(taken, refused);
            let case = Case { bytes: vec![0; middle], skb: Skb::UNKNOWN, sum_payload: true, story: String::new() };
            if self.judge(UPLINK, &case)?.is_some() {
                taken = middle;
            } else {
                refused = middle;
            }
        }
        Ok(taken)
    }
}

const EINVAL: i32 = 22;

/// The same in userspace, in the form that the program has its answer in.
fn userspace(program: &str, case: &Case) -> [u32; 6] {
    let told = Told { skb: case.skb, sum_payload: case.sum_payload, no_zero_ipv6: true };
    let packet = Bytes::new(&case.bytes);
    let found = match program {
        UPLINK => judge::uplink(&packet, &told, None),
        _ => judge::vxlan_device(&packet, &told, None),
    };
    let Some(Found { ip, outcome }) = found else { return [0; 6] };
    match outcome {
        Outcome::Unverified(reason) => [2, reason as u32, 0, 0, 0, ip.l4],
        Outcome::Judged(finding) => {
            let expected = u32::from(finding.expected.unwrap_or(0));
            let is_some = u32::from(finding.expected.is_some());
            [3, finding.verdict as u32, u32::from(finding.seen), expected, is_some, ip.l4]
        }
    }
}

/// Packets no longer than `most`: of each length that a loop or a ladder might get wrong, then any, good and broken.
fn corpus(most: usize) -> Vec<Case> {
    let mut rng = Rng(SEED);
    let mut cases = Vec::new();
    let mut payloads: Vec<usize> = (0..=200).collect();
    for step in [64, 512, 1472] {
        for multiple in (step..most).step_by(step) {
            payloads.extend(multiple - 3..=multiple + 3);
        }
    }
    for payload in payloads {
        for row in [Row::Full(State::None), rng.pick(&Row::ALL)] {
            let shape = Shape::any(&mut rng, row, payload);
            add(&mut rng, &mut cases, Sample::make(&mut rng2(payload), shape), "by payload length");
        }
        // The span that is summed has just this length.
        let mut shape = Shape::any(&mut rng, Row::Full(State::None), 0);
        let least = Sample::make(&mut rng2(payload), shape.clone());
        let headers = least.outer.end - least.outer.l4;
        if let Some(rest) = payload.checked_sub(headers) {
            shape.payload = rest;
            add(&mut rng, &mut cases, Sample::make(&mut rng2(payload), shape), "by datagram length");
        }
    }
    // Cut at each of the first bytes.
    for row in Row::ALL {
        let shape = Shape::any(&mut rng, row, 200);
        let sample = Sample::make(&mut rng, shape);
        for length in 14..200 {
            let bytes = sample.bytes[..length.min(sample.bytes.len())].to_vec();
            cases.push(Case { bytes, skb: sample.skb, sum_payload: true, story: format!("{row:?}, cut to {length}") });
        }
    }
    for _ in 0..ANY {
        let row = rng.pick(&Row::ALL);
        let payload = rng.pick(&[0, 1, 40, 1400, 3300]);
        let payload = rng.below(payload + 1);
        let shape = Shape::any(&mut rng, row, payload);
        let mut sample = Sample::make(&mut rng, shape);
        let mut story = String::new();
        if rng.chance(70) {
            for _ in 0..=rng.below(3) {
                story += &generate::break_one(&mut rng, &mut sample);
                story += "; ";
            }
        }
        add(&mut rng, &mut cases, sample, &story);
    }
    cases.retain(|case| case.bytes.len() <= most);
    cases
}

/// So that a shape made twice has headers of the same length.
fn rng2(seed: usize) -> Rng {
    Rng(SEED ^ seed as u64)
}

/// Adds a sample, now and then with other metadata, and the frame inside it.
fn add(rng: &mut Rng, cases: &mut Vec<Case>, sample: Sample, story: &str) {
    let story = format!("{story} {:?}", sample.shape);
    let skb = match rng.below(10) {
        0 | 1 => Skb::UNKNOWN,
        2 => generate::any_skb(rng, sample.bytes.len()),
        _ => sample.skb,
    };
    let sum_payload = !rng.chance(5);
    if sample.outer.l4 + 16 < sample.bytes.len()
        && sample.inner.is_some_and(|inner| inner.end <= sample.bytes.len())
        && let Some((bytes, frame_skb, _)) = sample.frame()
    {
        let skb = if skb == sample.skb { frame_skb } else { skb };
        cases.push(Case { bytes, skb, sum_payload, story: format!("the frame inside: {story}") });
    }
    cases.push(Case { bytes: sample.bytes, skb, sum_payload, story });
}

#[derive(Default)]
struct Tally {
    compared: usize,
    refused: usize,
    other: usize,
    verdicts: [usize; Verdict::ALL.len()],
    reasons: [usize; Reason::ALL.len()],
    differences: Vec<String>,
}

impl Tally {
    fn add(&mut self, case: &Case, program: &str, kernel: Option<[u32; 6]>, userspace: [u32; 6]) {
        let Some(kernel) = kernel else {
            self.refused += 1;
            return;
        };
        self.compared += 1;
        let number = userspace[1] as usize;
        match userspace[0] {
            3 => self.verdicts[number] += 1,
            2 => self.reasons[number] += 1,
            _ => self.other += 1,
        }
        if kernel != userspace {
            self.differences.push(format!(
                "{program}: kernel {kernel:x?}, userspace {userspace:x?}\n{:?}, payload summed: {}\n{}\n{}",
                case.skb,
                case.sum_payload,
                case.story,
                hex(&case.bytes)
            ));
        }
    }

    fn tell(&self, csum_chunk: u32, most: usize, cases: usize, start: Instant) {
        let verdicts: Vec<_> = Verdict::ALL.iter().map(|verdict| verdict.name()).zip(self.verdicts).collect();
        let reasons: Vec<_> = Reason::ALL.iter().map(|reason| reason.name()).zip(self.reasons).collect();
        println!(
            "seed {SEED:#x}, csum_chunk {csum_chunk}: {cases} packets of up to {most} bytes, {} comparisons in {:?}, {} \
             not taken by the kernel, {} none to judge; {verdicts:?}; unverified {reasons:?}",
            self.compared,
            start.elapsed(),
            self.refused,
            self.other,
        );
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
