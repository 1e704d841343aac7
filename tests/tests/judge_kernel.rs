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
    maps::{Array, MapData, PerCpuArray, PerCpuValues},
    programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions},
    util::nr_cpus,
};
use generate::{Rng, Row, Sample, Shape, Told};
use vxmon::source::{
    btf::Layout,
    object::{self, Object},
};
use vxmon_common::{
    config::{
        CONFIG, COUNTERS_MAP, PORTS, PORTS_MAP, UPLINK_PROGRAM, VXLAN_PROGRAM,
        legacy::{self, Judged},
        port_flag,
    },
    counters::Counters,
    judge::{self, Found, Outcome, Packed, Reason, Skb, State, Verdict},
    packet::{Bytes, Ip},
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
    let name = "judge_kernel::kernel_and_userspace_agree";
    if !skip::root_or_skip(name) {
        return Ok(());
    }
    compare(&mut Kernel::load(4096)?)
}

/// It takes 512 bytes at a time, as on older kernels.
#[test]
fn kernel_and_userspace_agree_by_512_bytes() -> Result<()> {
    let name = "judge_kernel::kernel_and_userspace_agree_by_512_bytes";
    if !skip::root_or_skip(name) {
        return Ok(());
    }
    compare(&mut Kernel::load(512)?)
}

/// The object for kernels before 5.8, as the daemon loads it. It knows no metadata.
#[test]
fn old_kernels_and_userspace_agree() -> Result<()> {
    if !skip::root_or_skip("judge_kernel::old_kernels_and_userspace_agree") {
        return Ok(());
    }
    let mut legacy = Legacy::load()?;
    compare(&mut legacy)?;
    legacy.counted_as_judged()
}

/// The judge in some object.
trait InKernel {
    /// Its name, for the report.
    fn name(&self) -> String;
    /// Whether it is told the metadata.
    const HAS_METADATA: bool;
    /// Runs a program over a packet. `None`: the kernel does not take such a packet for a test run.
    fn judge(&mut self, program: &str, case: &Case) -> Result<Option<[u32; 6]>>;

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

fn compare<K: InKernel>(kernel: &mut K) -> Result<()> {
    let most = kernel.longest_packet()?;
    let mut cases = corpus(most);
    if !K::HAS_METADATA {
        for case in &mut cases {
            case.skb = Skb::UNKNOWN;
        }
    }
    let start = Instant::now();
    let mut tally = Tally::default();
    for case in &cases {
        for program in [UPLINK, VXLAN] {
            tally.add(case, program, kernel.judge(program, case)?, userspace(program, case));
        }
    }
    tally.tell(&kernel.name(), most, cases.len(), start);
    if let Some(first) = tally.differences.first() {
        bail!("{} of {} differ (seed {SEED:#x}), the first:\n{first}", tally.differences.len(), tally.compared);
    }
    // The corpus must reach every answer, or it compares nothing with nothing.
    ensure!(tally.compared >= 10_000, "only {} packets were compared", tally.compared);
    for verdict in Verdict::ALL {
        let reached = tally.verdicts[usize::from(verdict as u8)] > 0;
        // Only the connection's tuples give the first name; only metadata shows that the field must be 0.
        let never = verdict == Verdict::NatStalePort || verdict == Verdict::NatMangledZero && !K::HAS_METADATA;
        ensure!(reached != never, "{} came {} times", verdict.name(), tally.verdicts[usize::from(verdict as u8)]);
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
    csum_chunk: u32,
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
        set_ports(&mut ebpf, PORTS_MAP)?;
        let result = ebpf.take_map("RESULT").context("RESULT")?.try_into()?;
        Ok(Self { ebpf, result, csum_chunk })
    }
}

impl InKernel for Kernel {
    const HAS_METADATA: bool = true;

    fn name(&self) -> String {
        format!("csum_chunk {}", self.csum_chunk)
    }

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
        if run(program, options)? { Ok(Some(self.result.get(&0, 0)?)) } else { Ok(None) }
    }
}

/// Runs a program; whether the kernel took the packet for a test run.
fn run(program: &SchedClassifier, options: TestRunOptions<'_>) -> Result<bool> {
    match program.test_run(options) {
        Ok(run) => {
            ensure!(run.return_value == u32::MAX, "returned {}, not TC_ACT_UNSPEC", run.return_value);
            Ok(true)
        }
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(EINVAL) => Ok(false),
        Err(error) => Err(error).context("the test run failed"),
    }
}

fn set_ports(ebpf: &mut Ebpf, map: &str) -> Result<()> {
    let mut ports: Array<_, [u8; PORTS]> = ebpf.map_mut(map).context("no map of ports")?.try_into()?;
    let mut table = [0; PORTS];
    table[usize::from(4789_u16.to_be())] = port_flag::TUNNEL | port_flag::NO_ZERO_IPV6;
    table[usize::from(8472_u16.to_be())] = port_flag::TUNNEL;
    Ok(ports.set(0, table, 0)?)
}

/// The object for kernels before 5.8, watching loopback, the device that a test run gives its packets.
struct Legacy {
    ebpf: Ebpf,
    sum_payload: bool,
    runs: u64,
    /// Judged, unverified, none to judge.
    answers: [u64; 3],
}

/// What the stages hand on.
#[derive(Clone, Copy)]
#[repr(C)]
struct Work {
    judged: Judged,
    rest: [u8; legacy::WORK_SIZE - size_of::<Judged>()],
}

#[expect(unsafe_code, reason = "aya's Pod is an unsafe marker")]
// SAFETY: integers and bytes, without padding.
unsafe impl aya::Pod for Work {}

impl Legacy {
    const LOOPBACK: u32 = 1;
    const SLOT: u32 = 1;

    fn load() -> Result<Self> {
        let mut ebpf = vxmon::source::programs::legacy_object()?;
        set_ports(&mut ebpf, legacy::PORTS_MAP)?;
        let mut slots: Array<_, [u8; PORTS]> = ebpf.map_mut(legacy::SLOTS_MAP).context("no slots")?.try_into()?;
        let mut table = [0; PORTS];
        table[Self::LOOPBACK as usize] = Self::SLOT as u8;
        slots.set(0, table, 0)?;
        Ok(Self { ebpf, sum_payload: true, runs: 0, answers: [0; 3] })
    }

    /// Each packet was counted once, by what was said of it.
    fn counted_as_judged(&self) -> Result<()> {
        let map = self.ebpf.map(COUNTERS_MAP).context("no counters")?;
        let mut sum = Counters::default();
        for counters in PerCpuArray::<_, Counters>::try_from(map)?.get(&Self::SLOT, 0)?.iter() {
            sum.add(counters);
        }
        let unverified: u64 = sum.unverified.iter().sum();
        let counted = [sum.seen() - unverified, unverified, sum.other];
        ensure!(counted == self.answers && self.runs > 10_000, "{sum:?}, but was told {:?}", self.answers);
        // Nobody reads the events, so those that were due are lost.
        ensure!(sum.lost_ring > 0 && sum.lost_ring + sum.suppressed == sum.anomalies(), "{sum:?}");
        Ok(())
    }
}

impl InKernel for Legacy {
    const HAS_METADATA: bool = false;

    fn name(&self) -> String {
        "for kernels before 5.8".to_owned()
    }

    fn judge(&mut self, program: &str, case: &Case) -> Result<Option<[u32; 6]>> {
        if case.sum_payload != self.sum_payload {
            // One in 2^32: none.
            let sample = if case.sum_payload { 1 } else { u32::MAX };
            let map = self.ebpf.map_mut(legacy::SAMPLE_MAP).context("no sample")?;
            Array::<_, u32>::try_from(map)?.set(0, sample, 0)?;
            self.sum_payload = case.sum_payload;
        }
        // What is left of the packet before must not pass for the answer.
        const NONE: Work = Work {
            judged: Judged { outcome: u64::MAX, ip: 0, l3: 0, reserved: 0 },
            rest: [0xff; legacy::WORK_SIZE - size_of::<Judged>()],
        };
        let mut work: PerCpuArray<_, Work> = self.ebpf.map_mut(legacy::WORK_MAP).context("no work")?.try_into()?;
        let cpus = nr_cpus().map_err(|(what, error)| anyhow::anyhow!("{what}: {error}"))?;
        work.set(0, PerCpuValues::try_from(vec![NONE; cpus])?, 0)?;
        let name = if program == UPLINK { UPLINK_PROGRAM } else { VXLAN_PROGRAM };
        let program: &SchedClassifier = self.ebpf.program(name).context("no program")?.try_into()?;
        if !run(program, TestRunOptions { data_in: Some(&case.bytes), ..TestRunOptions::new() })? {
            return Ok(None);
        }
        self.runs += 1;
        let work: PerCpuArray<_, Work> = self.ebpf.map(legacy::WORK_MAP).context("no work")?.try_into()?;
        let judged = work.get(&0, 0)?.iter().map(|work| work.judged).find(|judged| judged.outcome != u64::MAX);
        let Some(judged) = judged else {
            self.answers[2] += 1;
            return Ok(Some([0; 6]));
        };
        let ip = Ip::unpack(judged.ip, judged.l3).ok().context("no header was noted")?;
        let outcome = Packed::from_bits(judged.outcome);
        self.answers[usize::from(!outcome.is_judged())] += 1;
        Ok(Some(answer(&ip, outcome.outcome())))
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
    found.map_or([0; 6], |Found { ip, outcome }| answer(&ip, outcome))
}

/// The form that answers are compared in.
fn answer(ip: &Ip, outcome: Outcome) -> [u32; 6] {
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

    fn tell(&self, name: &str, most: usize, cases: usize, start: Instant) {
        let verdicts: Vec<_> = Verdict::ALL.iter().map(|verdict| verdict.name()).zip(self.verdicts).collect();
        let reasons: Vec<_> = Reason::ALL.iter().map(|reason| reason.name()).zip(self.reasons).collect();
        println!(
            "seed {SEED:#x}, {name}: {cases} packets of up to {most} bytes, {} comparisons in {:?}, {} \
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
