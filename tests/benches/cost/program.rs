//! The kernel programs by themselves: ns a packet over an empty program, by BPF_PROG_TEST_RUN; and what loading takes.
//!
//! The kernel runs a program a million times over one packet. Its own clock would count whatever else the CPU did
//! meanwhile, so what is taken is the CPU time of this thread. Programs take turns, and the difference to the empty
//! program counts within a turn.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::Array,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use nix::time::{ClockId, clock_gettime};
use vxmon::source::{
    btf::Layout,
    object::{self, Object},
    programs::Table as Bytes,
};
use vxmon_common::{
    config::{self, Config, Device, Devices, device_flag, legacy, port_flag, skb_access},
    judge::{self, Finding, Outcome, Skb, State, Surroundings},
    packet::Bytes as PacketBytes,
};
use vxmon_tests::traffic::{Frame, OuterSum};

use crate::table::{Limit, Table, median};

/// Runs of a program in one go.
const REPEAT: u32 = 1_000_000;
/// Turns.
const ROUNDS: usize = 9;
/// Loopback: the device that BPF_PROG_TEST_RUN gives its packets.
const LOOPBACK: u32 = 1;
/// UDP port of the VXLAN.
const PORT: u16 = 8472;
/// Offsets in a VXLAN packet over IPv4: inner IP header, and inner UDP header.
const INNER_L4: u32 = 14 + 20 + 8 + 8 + 14 + 20;
/// Offset of the outer checksum.
const OUTER_CHECK: usize = 14 + 20 + 6;
/// In cb[0] of the test programs: CHECKSUM_PARTIAL, and read the skb's metadata as the daemon's program does.
const PARTIAL_AND_READ: u32 = 3 | 1 << 9;

pub fn measure(table: &mut Table) -> Result<()> {
    costs(table)?;
    loading(table)
}

/// What the program may use of the kernel.
enum Variant {
    /// Everything.
    WholeMtu,
    /// `bpf_csum_diff()` takes only 512 bytes.
    Chunks,
    /// The skb's metadata has to be copied.
    Copied,
    /// Everything; and some connection's recovery is waited for, so that each good packet is looked up.
    Following,
    /// What kernels before 5.8 have: the object for these.
    Legacy,
}

struct Case {
    what: &'static str,
    limit: Limit,
    program: &'static str,
    object: Variant,
    packet: Vec<u8>,
    cb: [u32; 5],
}

fn costs(table: &mut Table) -> Result<()> {
    let layout = Layout::detect();
    let whole_mtu = load(&layout, Config { csum_chunk: 4096, ..layout.config }, 0)?;
    let chunks = load(&layout, Config { csum_chunk: 512, ..layout.config }, 0)?;
    let copied = load(&layout, Config { csum_chunk: 4096, has_skb: skb_access::COPY, ..layout.config }, 0)?;
    let following = load(&layout, Config { csum_chunk: 4096, ..layout.config }, device_flag::FOLLOW)?;
    let legacy = load_legacy()?;
    let (cases, small) = (cases(), vxlan(18, OuterSum::Right));

    let mut empty = Vec::new();
    let mut added = vec![Vec::new(); cases.len()];
    for round in 0..=ROUNDS {
        let nothing = run(&whole_mtu, "empty", &small, [0; 5])?;
        for (case, added) in cases.iter().zip(&mut added) {
            let object = match case.object {
                Variant::WholeMtu => &whole_mtu,
                Variant::Chunks => &chunks,
                Variant::Copied => &copied,
                Variant::Following => &following,
                Variant::Legacy => &legacy,
            };
            let time = run(object, case.program, &case.packet, case.cb)?;
            // The first one warms up.
            if round > 0 {
                added.push(time - nothing);
            }
        }
        if round > 0 {
            empty.push(nothing);
        }
    }
    table.section(&format!(
        "ns a packet over an empty TC program (BPF_PROG_TEST_RUN, median of {ROUNDS} x {REPEAT} runs)"
    ));
    let baseline = format!("empty {:.1} ns", median(&empty));
    for (case, added) in cases.iter().zip(&added) {
        table.line(case.what, median(added), "ns", &baseline, case.limit);
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let whole = |what, limit, packet| Case {
        what,
        limit: Limit::AtMost(limit),
        program: "whole_uplink",
        object: Variant::WholeMtu,
        packet,
        cb: [0; 5],
    };
    let mtu = || vxlan(1500 - 78, OuterSum::Right);
    let legacy = |what, packet| Case {
        program: config::UPLINK_PROGRAM,
        object: Variant::Legacy,
        limit: Limit::None,
        ..whole(what, 0.0, packet)
    };
    let tcp = || {
        let mut tcp = vxlan(18, OuterSum::Right);
        tcp[14 + 9] = 6;
        tcp
    };
    let mut arp = vec![0; 60];
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    let dns = Frame { dport: 53, ..Frame::default() }.bytes();
    vec![
        whole("other traffic: TCP", 5.0, tcp()),
        whole("other traffic: ARP", 5.0, arp),
        whole("other traffic: UDP to another port", 5.0, dns),
        whole("header only: no checksum (zero)", 25.0, vxlan(1500 - 78, OuterSum::Zero)),
        Case {
            what: "header only: Local Checksum Offload",
            program: "whole_uplink_told",
            packet: lco(),
            cb: [PARTIAL_AND_READ, INNER_L4, 6, 0, 0],
            ..whole("", 25.0, Vec::new())
        },
        Case {
            what: "header only: LCO, metadata copied (before 6.2)",
            program: "whole_uplink_told",
            object: Variant::Copied,
            packet: lco(),
            cb: [PARTIAL_AND_READ, INNER_L4, 6, 0, 0],
            ..whole("", 25.0, Vec::new())
        },
        Case {
            object: Variant::Following,
            limit: Limit::None,
            ..whole("header only: zero, while a recovery is waited for", 0.0, vxlan(1500 - 78, OuterSum::Zero))
        },
        whole("full sum of 1500 bytes, linear", 80.0, mtu()),
        Case {
            object: Variant::Chunks,
            ..whole("full sum of 1500 bytes, as before 6.13 (512 at a time)", 80.0, mtu())
        },
        legacy("before 5.8: other traffic: TCP", tcp()),
        legacy("before 5.8: no checksum (zero)", vxlan(1500 - 78, OuterSum::Zero)),
        legacy("before 5.8: Local Checksum Offload", lco()),
        legacy("before 5.8: full sum of 1500 bytes", mtu()),
    ]
}

/// A VXLAN packet with an inner UDP datagram of so many bytes.
fn vxlan(payload: usize, sum: OuterSum) -> Vec<u8> {
    Frame { sum, inner: Frame::inner_udp(&vec![0x5a; payload]), dport: PORT, ..Frame::default() }.bytes()
}

/// One whose inner checksum is left to the device, and whose outer one is right for that.
fn lco() -> Vec<u8> {
    struct Partial;
    impl Surroundings for Partial {
        fn is_tunnel_port(&self, _: u16) -> bool {
            true
        }
        fn zero_over_ipv6_is_wrong(&self, _: u16) -> bool {
            false
        }
        fn skb(&self) -> Skb {
            Skb { state: State::Partial, csum_start: INNER_L4, csum_offset: 6, gso_size: 0, gso_type: 0 }
        }
        fn sum_payload(&self) -> bool {
            true
        }
    }
    let mut packet = vxlan(1500 - 78, OuterSum::Right);
    let found = judge::uplink(&PacketBytes::new(&packet), &Partial, None).map(|found| found.outcome);
    if let Some(Outcome::Judged(Finding { expected: Some(expected), .. })) = found {
        packet[OUTER_CHECK..OUTER_CHECK + 2].copy_from_slice(&expected.to_ne_bytes());
    }
    packet
}

fn load(layout: &Layout, config: Config, flags: u32) -> Result<Ebpf> {
    let mut ebpf = EbpfLoader::new()
        .btf(None)
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global(config::CONFIG, &config, true)
        .load(Object::new(object::TEST, layout.cast).bytes())
        .context("cannot load the test object")?;
    for name in ["empty", "whole_uplink", "whole_uplink_told"] {
        program(&mut ebpf, name)?.load().with_context(|| format!("the kernel refused {name}"))?;
    }
    fill(&mut ebpf, flags, [config::SLOTS_MAP, config::PORTS_MAP, config::DEVICES_MAP])?;
    Ok(ebpf)
}

fn load_legacy() -> Result<Ebpf> {
    let mut ebpf = vxmon::source::programs::legacy_object()?;
    fill(&mut ebpf, 0, [legacy::SLOTS_MAP, legacy::PORTS_MAP, legacy::DEVICES_MAP])?;
    Ok(ebpf)
}

/// Has loopback be a watched uplink.
fn fill(ebpf: &mut Ebpf, flags: u32, [slots_map, ports_map, devices_map]: [&str; 3]) -> Result<()> {
    let mut slots = Box::new(Bytes([0; 1 << 16]));
    slots.0[LOOPBACK as usize] = 1;
    Array::<_, Bytes>::try_from(ebpf.map_mut(slots_map).context("no slots")?)?.set(0, *slots, 0)?;
    let mut ports = Box::new(Bytes([0; 1 << 16]));
    ports.0[usize::from(PORT.to_be())] = port_flag::TUNNEL;
    Array::<_, Bytes>::try_from(ebpf.map_mut(ports_map).context("no ports")?)?.set(0, *ports, 0)?;
    let device = Device { ifindex: LOOPBACK, flags, ..Device::default() };
    let mut devices = Devices([Device::default(); config::SLOTS as usize]);
    devices.0[1] = device;
    Array::<_, Devices>::try_from(ebpf.map_mut(devices_map).context("no devices")?)?.set(0, devices, 0)?;
    Ok(())
}

fn program<'ebpf>(ebpf: &'ebpf mut Ebpf, name: &str) -> Result<&'ebpf mut SchedClassifier> {
    Ok(ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

/// Nanoseconds a run.
fn run(ebpf: &Ebpf, name: &str, packet: &[u8], cb: [u32; 5]) -> Result<f64> {
    let program: &SchedClassifier = ebpf.program(name).with_context(|| format!("no program {name}"))?.try_into()?;
    // struct __sk_buff, include/uapi/linux/bpf.h: cb is at 48.
    let mut context = [0_u8; 192];
    for (bytes, word) in context[48..68].chunks_mut(4).zip(cb) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let options =
        TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), repeat: REPEAT, ..TestRunOptions::new() };
    let start = cpu_time()?;
    let result = program.test_run(options).with_context(|| format!("BPF_PROG_TEST_RUN of {name}"))?;
    let time = cpu_time()? - start;
    ensure!(result.return_value.cast_signed() == -1, "{name} returned {}", result.return_value);
    Ok(time.as_nanos() as f64 / f64::from(REPEAT))
}

fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// Where the time to readiness goes.
fn loading(table: &mut Table) -> Result<()> {
    table.section("loading");
    let start = Instant::now();
    let layout = Layout::detect();
    table.line("offsets from the kernel's BTF", ms(start), "ms", "", Limit::None);
    let start = Instant::now();
    let config = Config { csum_chunk: 4096, ..layout.config };
    let object = Object::new(object::MAIN, layout.cast);
    let mut ebpf = EbpfLoader::new().btf(None).override_global(config::CONFIG, &config, true).load(object.bytes())?;
    table.line("object and maps", ms(start), "ms", "", Limit::None);
    for name in [config::UPLINK_PROGRAM, config::VXLAN_PROGRAM] {
        let start = Instant::now();
        program(&mut ebpf, name)?.load().with_context(|| format!("the kernel refused {name}"))?;
        let took = ms(start);
        let verified = format!("{} insns verified", verified(&mut ebpf, name)?);
        table.line(&format!("{name}: verified and compiled"), took, "ms", &verified, Limit::None);
    }
    let start = Instant::now();
    let mut ebpf = vxmon::source::programs::legacy_object()?;
    let took = ms(start);
    let mut counts = Vec::new();
    for name in [config::UPLINK_PROGRAM, config::VXLAN_PROGRAM].into_iter().chain(legacy::STAGES) {
        counts.push(verified(&mut ebpf, name)?);
    }
    let most = counts.iter().max().copied().unwrap_or(0);
    let verified = format!("{} insns verified, {most} in one", counts.iter().sum::<u32>());
    table.line("the object for kernels before 5.8, whole", took, "ms", &verified, Limit::None);
    Ok(())
}

/// Instructions that the verifier followed; 0 where the kernel does not tell.
fn verified(ebpf: &mut Ebpf, name: &str) -> Result<u32> {
    Ok(program(ebpf, name)?.info()?.verified_instruction_count().unwrap_or(0))
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
