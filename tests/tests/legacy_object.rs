//! The object for kernels before 5.8, looked at instruction by instruction: what the verifiers of 4.14 to 5.7 would refuse is
//! not in it. Those kernels themselves are not to be had here, so this and the counts below stand in for them.
//!
//! The limits are those of 4.14 (kernel/bpf/verifier.c, include/uapi/linux/bpf_common.h, net/core/filter.c:
//! `tc_cls_act_func_proto()`, `tc_cls_act_is_valid_access()`), the strictest of them.

#[path = "support/verifier.rs"]
mod verifier;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::RawFd,
};

use anyhow::{Context, Result, bail, ensure};
use aya::programs::SchedClassifier;
use aya_obj::{Map, Object, generated::bpf_insn};
use vxmon::source::object;
use vxmon_common::config::{UPLINK_PROGRAM, VXLAN_PROGRAM, legacy};
use vxmon_tests::skip;

use self::verifier::Spilled;

/// `BPF_MAXINSNS` before 5.2 (a096309bc467), where it became the limit of the unprivileged.
const MAX_INSTRUCTIONS: usize = 4096;
/// `BPF_COMPLEXITY_LIMIT_INSNS` from 4.14 to 5.1.
const MAX_VERIFIED: u32 = 131_072;
/// The same from 5.2 on.
const MAX_VERIFIED_5_2: u32 = 1_000_000;
/// `offsetof(struct __sk_buff, data_end)` and its size: the last field that a sched_cls program had on 4.14 and can use.
const CONTEXT_END: i32 = 84;
/// `offsetof(struct __sk_buff, data)`.
const DATA: i32 = 76;

/// Numbers in include/uapi/linux/bpf.h, of helpers that `tc_cls_act_func_proto()` of 4.14 gives out.
const HELPERS: [(i32, &str); 9] = [
    (1, "map_lookup_elem"),
    (2, "map_update_elem"),
    (5, "ktime_get_ns"),
    (7, "get_prandom_u32"),
    (8, "get_smp_processor_id"),
    (12, "tail_call"),
    (25, "perf_event_output"),
    (26, "skb_load_bytes"),
    (28, "csum_diff"),
];

/// Kinds of maps of 4.14 (enum bpf_map_type).
const MAPS: [(u32, &str); 5] =
    [(2, "ARRAY"), (3, "PROG_ARRAY"), (4, "PERF_EVENT_ARRAY"), (6, "PERCPU_ARRAY"), (9, "LRU_HASH")];

mod class {
    pub const LD: u8 = 0;
    pub const LDX: u8 = 1;
    pub const ST: u8 = 2;
    pub const STX: u8 = 3;
    pub const ALU: u8 = 4;
    pub const JMP: u8 = 5;
    pub const ALU64: u8 = 7;
}

/// `BPF_LD | BPF_IMM | BPF_DW`, of two instructions.
const LD_IMM64: u8 = 0x18;
const JA: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const BPF_X: u8 = 8;
const CONTEXT_REGISTER: u8 = 1;
const STACK_REGISTER: u8 = 10;

fn class_of(instruction: &bpf_insn) -> u8 {
    instruction.code & 7
}

/// Bytes that a load or store moves.
fn size_of_access(instruction: &bpf_insn) -> i32 {
    match instruction.code & 0x18 {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

fn object() -> Result<Object> {
    Ok(Object::parse(object::LEGACY)?)
}

/// The programs' instructions by name.
type Programs = BTreeMap<String, Vec<bpf_insn>>;

fn programs(object: &Object) -> Result<Programs> {
    let code = |key: (usize, u64)| object.functions.get(&key).map(|function| function.instructions.clone());
    let of = |(name, program): (&String, &aya_obj::Program)| {
        Ok((name.clone(), code(program.function_key()).with_context(|| format!("{name} has no code"))?))
    };
    object.programs.iter().map(of).collect()
}

/// Where an instruction may lead.
fn successors(code: &[bpf_insn], at: usize) -> Result<Vec<usize>> {
    let instruction = code.get(at).with_context(|| format!("{at} is behind the end"))?;
    let jump = || at.checked_add_signed(isize::from(instruction.off) + 1).context("a jump to before the start");
    Ok(match instruction.code {
        EXIT => Vec::new(),
        JA => vec![jump()?],
        LD_IMM64 => vec![at + 2],
        CALL => vec![at + 1],
        _ if class_of(instruction) == class::JMP => vec![at + 1, jump()?],
        _ => vec![at + 1],
    })
}

/// Fails at a loop, as `check_cfg()` does ("back-edge"): an edge to an instruction that is on the way there. And at code that
/// nothing leads to ("unreachable insn").
fn no_loop(code: &[bpf_insn]) -> Result<()> {
    let mut state = vec![0_u8; code.len()]; // 1: on the way, 2: done
    let mut way = vec![(0, successors(code, 0)?)];
    state[0] = 1;
    while let Some((at, next)) = way.last_mut() {
        match next.pop() {
            Some(next) => match state.get(next).with_context(|| format!("{at} leads behind the end"))? {
                0 => {
                    state[next] = 1;
                    way.push((next, successors(code, next)?));
                }
                1 => bail!("back-edge from {at} to {next}"),
                _ => {}
            },
            None => {
                state[*at] = 2;
                way.pop();
            }
        }
    }
    let second_half = |at: usize| at > 0 && code[at - 1].code == LD_IMM64;
    match (0..code.len()).find(|at| state[*at] == 0 && !second_half(*at)) {
        Some(at) => bail!("nothing leads to {at}"),
        None => Ok(()),
    }
}

/// Fails at an instruction that 4.14 does not have, or that calls what it does not have.
fn known_instruction(instruction: &bpf_insn) -> Result<()> {
    let code = instruction.code;
    match class_of(instruction) {
        class::LD => ensure!(code == LD_IMM64 || code == 0, "LD {code:#x}"),
        class::LDX | class::ST => ensure!(code & 0xe0 == 0x60, "mode of {code:#x}"), // BPF_MEM
        // BPF_MEM, or BPF_XADD that returns nothing.
        class::STX => ensure!(
            code & 0xe0 == 0x60 || code & 0xe0 == 0xc0 && instruction.imm == 0 && size_of_access(instruction) >= 4,
            "{code:#x} with {:#x}",
            instruction.imm
        ),
        // Up to BPF_END, without the offsets of signed moves and divisions (6.6).
        class::ALU => ensure!(code >> 4 <= 0xd && instruction.off == 0, "{code:#x}"),
        class::ALU64 => ensure!(code >> 4 <= 0xc && instruction.off == 0, "{code:#x}"),
        class::JMP if code == CALL => {
            ensure!(instruction.src_reg() == 0, "a call of a function, or of a kernel function");
            ensure!(HELPERS.iter().any(|(number, _)| *number == instruction.imm), "helper {}", instruction.imm);
        }
        class::JMP => ensure!(code >> 4 <= 0xd && (code & BPF_X == 0 || code != JA | BPF_X), "{code:#x}"),
        other => bail!("class {other} (JMP32 is of 5.1)"),
    }
    Ok(())
}

/// Registers and stack slots that may hold the context.
type Holders = BTreeSet<Place>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Register(u8),
    Stack(i16),
}

/// Fails where the context is read beyond what 4.14 has, written to, or computed with. Follows where it may be by all ways.
fn context_is_old(code: &[bpf_insn]) -> Result<()> {
    let mut known: Vec<Option<Holders>> = vec![None; code.len()];
    let mut open = vec![(0, Holders::from([Place::Register(CONTEXT_REGISTER)]))];
    while let Some((at, holders)) = open.pop() {
        let slot = known.get_mut(at).context("behind the end")?;
        let merged: Holders = slot.iter().flatten().copied().chain(holders).collect();
        if slot.as_ref() == Some(&merged) {
            continue;
        }
        *slot = Some(merged.clone());
        let after = context_step(&code[at], merged).with_context(|| format!("at {at}"))?;
        for next in successors(code, at)? {
            open.push((next, after.clone()));
        }
    }
    Ok(())
}

fn context_step(instruction: &bpf_insn, mut holders: Holders) -> Result<Holders> {
    let (to, from) = (Place::Register(instruction.dst_reg()), Place::Register(instruction.src_reg()));
    match class_of(instruction) {
        class::LDX => {
            let context = holders.contains(&from);
            if context {
                let (off, size) = (i32::from(instruction.off), size_of_access(instruction));
                ensure!(off >= 0 && off + size <= CONTEXT_END && size <= 4, "reads {size} bytes at {off} of __sk_buff");
                // bpf_skb_is_valid_access(): a part is the first part of a field, and not of an address.
                let whole = size == 4 || off < DATA;
                ensure!(off % 4 == 0 && whole, "reads {size} bytes at {off} of __sk_buff");
            }
            let stack = from == Place::Register(STACK_REGISTER);
            if stack && holders.contains(&Place::Stack(instruction.off)) {
                holders.insert(to);
            } else {
                holders.remove(&to);
            }
        }
        class::ST | class::STX => {
            ensure!(!holders.contains(&to), "writes to __sk_buff");
            if to == Place::Register(STACK_REGISTER) {
                if class_of(instruction) == class::STX && holders.contains(&from) {
                    holders.insert(Place::Stack(instruction.off));
                } else {
                    holders.remove(&Place::Stack(instruction.off));
                }
            }
        }
        class::ALU64 if instruction.code == 0xbf => {
            if holders.contains(&from) {
                holders.insert(to)
            } else {
                holders.remove(&to)
            };
        }
        class::ALU | class::ALU64 => {
            let by_register = instruction.code & BPF_X != 0 && holders.contains(&from);
            let overwrites = instruction.code >> 4 == 0xb;
            ensure!(!by_register && (overwrites || !holders.contains(&to)), "computes with the context");
            holders.remove(&to);
        }
        class::LD => {
            holders.remove(&to);
        }
        _ if instruction.code == CALL => {
            for register in 0..=5 {
                holders.remove(&Place::Register(register));
            }
        }
        _ => {}
    }
    Ok(holders)
}

/// All that is asked of a program's code.
fn check(code: &[bpf_insn]) -> Result<()> {
    ensure!(code.len() < MAX_INSTRUCTIONS, "{} instructions", code.len());
    for (at, instruction) in code.iter().enumerate() {
        if at == 0 || code[at - 1].code != LD_IMM64 {
            known_instruction(instruction).with_context(|| format!("at {at}"))?;
        }
    }
    no_loop(code)?;
    context_is_old(code)
}

#[test]
fn old_verifiers_find_nothing_to_refuse() -> Result<()> {
    let object = object()?;
    ensure!(object.btf.is_none() && object.btf_ext.is_none(), "has BTF");
    ensure!(object.license.to_str()?.contains("GPL"), "{:?}", object.license);
    let programs = programs(&object)?;
    let mut names: Vec<&str> = [UPLINK_PROGRAM, VXLAN_PROGRAM].into_iter().chain(legacy::STAGES).collect();
    names.sort_unstable();
    ensure!(programs.keys().map(String::as_str).eq(names), "{:?}", programs.keys());
    for (name, code) in &programs {
        check(code).with_context(|| name.clone())?;
        println!("{name}: {} instructions", code.len());
    }
    for (name, map) in &object.maps {
        let Map::Legacy(map) = map else { bail!("{name} is a map by BTF") };
        let kind = map.def.map_type;
        ensure!(MAPS.iter().any(|(number, _)| *number == kind), "{name} is a map of type {kind}");
        ensure!(map.section_kind == aya_obj::EbpfSectionKind::Maps, "{name} is a global");
        // Kernels from 4.15 to 5.1 take no dot in a name.
        ensure!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{name}");
    }
    Ok(())
}

/// The programs as they are loaded, with the indexes of maps in place of their descriptors; and these maps.
fn linked() -> Result<(Programs, Vec<verifier::Shape>)> {
    let mut object = object()?;
    let maps = object.maps.clone();
    let names: Vec<&String> = maps.keys().collect();
    let numbered = names.iter().enumerate().map(|(fd, name)| (name.as_str(), fd as RawFd, &maps[*name]));
    object.relocate_maps(numbered, &std::collections::HashSet::new())?;
    let shape = |name: &&String| {
        let map = &maps[*name];
        verifier::Shape { kind: map.map_type(), key: map.key_size(), value: map.value_size() }
    };
    Ok((programs(&object)?, names.iter().map(shape).collect()))
}

/// An old verifier comes to the end of each program, and soon.
#[test]
fn an_old_verifier_comes_to_the_end() -> Result<()> {
    let (programs, maps) = linked()?;
    for (name, code) in programs {
        for (spilled, limit) in [(Spilled::Forgotten, MAX_VERIFIED), (Spilled::Kept, MAX_VERIFIED_5_2)] {
            let context = || format!("{name}, numbers on the stack {spilled:?}");
            let verified = verifier::verify(&code, &maps, spilled, limit as usize).with_context(context)?;
            println!("{}: {verified:?}", context());
        }
    }
    Ok(())
}

/// The one for newer kernels has most of what is looked for, so that the checks above can fail.
#[test]
fn the_checks_can_fail() -> Result<()> {
    let newer = Object::parse(object::MAIN)?;
    ensure!(newer.btf.is_some());
    ensure!(newer.maps.values().any(|map| map.section_kind() != aya_obj::EbpfSectionKind::Maps));
    ensure!(newer.maps.values().any(|map| MAPS.iter().all(|(number, _)| *number != map.map_type())));
    for (name, code) in programs(&newer)? {
        let error = check(&code).err().with_context(|| format!("{name} passes"))?;
        println!("{name}: {error:#}");
    }

    let exit = instruction(EXIT, 0, 0, 0);
    let refused: [(&str, Vec<bpf_insn>); 11] = [
        ("back-edge", vec![instruction(0xb7, 0, 0, 0), instruction(JA, 0, -2, 0), exit]),
        ("nothing leads to", vec![instruction(JA, 0, 1, 0), exit, exit]),
        ("4096 instructions", vec![exit; 4096]),
        ("a call of a function", vec![instruction(CALL, 0x10, 0, 0), exit]),
        ("helper 113", vec![instruction(CALL, 0, 0, 113), exit]),
        ("class 6", vec![instruction(0x16, 0, 0, 0), exit]),
        ("reads 4 bytes at 176", vec![instruction(0xbf, 0x16, 0, 0), instruction(0x61, 0x60, 176, 0), exit]),
        ("reads 2 bytes at 42", vec![instruction(0x69, 0x10, 42, 0), exit]),
        ("reads 2 bytes at 76", vec![instruction(0x69, 0x10, 76, 0), exit]),
        (
            "writes to __sk_buff",
            vec![instruction(0x7b, 0x1a, -8, 0), instruction(0x79, 0xa7, -8, 0), instruction(0x62, 0x07, 8, 1), exit],
        ),
        ("computes with the context", vec![instruction(0x07, 1, 0, 4), exit]),
    ];
    for (why, code) in refused {
        let error = check(&code).err().with_context(|| format!("{why}: passes"))?;
        ensure!(format!("{error:#}").contains(why), "{why}: {error:#}");
    }
    check(&[instruction(0x61, 0x10, 80, 0), exit])
}

/// An instruction; the registers as they stand in it, destination in the lower half.
fn instruction(code: u8, registers: u8, off: i16, imm: i32) -> bpf_insn {
    let mut instruction = bpf_insn { code, _bitfield_align_1: [], _bitfield_1: Default::default(), off, imm };
    instruction.set_dst_reg(registers & 0xf);
    instruction.set_src_reg(registers >> 4);
    instruction
}

/// How much work each program is to this kernel's verifier, which must be well below what the old ones do at most.
#[test]
fn little_is_left_to_verify() -> Result<()> {
    if !skip::root_or_skip("legacy_object::little_is_left_to_verify") {
        return Ok(());
    }
    let mut ebpf = vxmon::source::programs::legacy_object()?;
    for (name, program) in ebpf.programs_mut() {
        let program: &mut SchedClassifier = program.try_into()?;
        let Some(verified) = program.info()?.verified_instruction_count() else {
            skip::skip("legacy_object::little_is_left_to_verify", "this kernel does not tell (5.16)");
            return Ok(());
        };
        println!("{name}: {verified} instructions verified");
        ensure!(verified < MAX_VERIFIED / 2, "{name}: {verified}");
    }
    Ok(())
}

/// What that verifier is there for: a program that differs in one thing passes, and does not.
#[test]
fn the_old_verifier_can_refuse() -> Result<()> {
    const MAPS: [verifier::Shape; 2] =
        [verifier::Shape { kind: 2, key: 4, value: 64 }, verifier::Shape { kind: 3, key: 4, value: 4 }];
    let exit = [instruction(0xb7, 0, 0, 0), instruction(EXIT, 0, 0, 0)];
    // r0 = map_lookup_elem(map 0, &0 at r10 - 8); if r0 == 0 goto the end, `behind` instructions further
    let lookup = |behind: i16| {
        vec![
            instruction(0x62, 10, -8, 0),
            instruction(0xbf, 0xa2, 0, 0),
            instruction(0x07, 2, 0, -8),
            instruction(LD_IMM64, 0x11, 0, 0),
            instruction(0, 0, 0, 0),
            instruction(CALL, 0, 0, 1),
            instruction(0x15, 0, behind, 0),
        ]
    };
    let verify = |code: Vec<Vec<bpf_insn>>| {
        verifier::verify(&[code.concat(), exit.to_vec()].concat(), &MAPS, Spilled::Forgotten, 1000)
    };
    let refuses = |why: &str, code: Vec<Vec<bpf_insn>>| -> Result<()> {
        let error = verify(code).err().with_context(|| format!("{why}: passes"))?;
        ensure!(format!("{error:#}").contains(why), "{why}: {error:#}");
        Ok(())
    };
    let length = instruction(0x61, 0x71, 0, 0); // r1 = skb->len, of r7
    let keep = instruction(0xbf, 0x17, 0, 0); // r7 = r1
    let mask = |bits| instruction(0x57, 1, 0, bits); // r1 &= bits
    let spill = instruction(0x7b, 0x1a, -16, 0); // *(r10 - 16) = r1
    let fill = instruction(0x79, 0xa1, -16, 0); // r1 = *(r10 - 16)
    let add = instruction(0x0f, 0x10, 0, 0); // r0 += r1
    let read = |off| instruction(0x71, 0x03, off, 0); // r3 = *(u8 *)(r0 + off)

    verify(vec![vec![keep], lookup(4), vec![length, mask(63), add, read(0)]])?;
    refuses("1 to 65 of 64 bytes", vec![vec![keep], lookup(4), vec![length, mask(63), add, read(1)]])?;
    refuses("an unbounded offset", vec![vec![keep], lookup(3), vec![length, add, read(0)]])?;
    // A bounded number that went through the stack is not bounded any more.
    verify(vec![vec![keep], lookup(6), vec![length, spill, fill, mask(63), add, read(0)]])?;
    refuses("adds Number", vec![vec![keep], lookup(6), vec![length, mask(63), spill, fill, add, read(0)]])?;
    // The address is added to the offset.
    let other_way = [instruction(0x0f, 0x01, 0, 0), instruction(0x71, 0x13, 0, 0)]; // r1 += r0, r3 = *(u8 *)(r1 + 0)
    refuses("to a number", vec![vec![keep], lookup(4), vec![length, mask(63)], other_way.to_vec()])?;
    // Null, unless it was looked at.
    refuses("reads by ValueOrNull", vec![lookup(0)[..6].to_vec(), vec![read(0)]])?;
    // A key in a map, as 4.18 is the first to take.
    let key_in_map = [instruction(0xbf, 0x02, 0, 0), instruction(LD_IMM64, 0x11, 0, 0), instruction(0, 0, 0, 0)];
    refuses("argument 2 of helper 1", vec![lookup(4), key_in_map.to_vec(), vec![instruction(CALL, 0, 0, 1)]])?;
    // A map of another kind than the helper's.
    let of_programs = instruction(LD_IMM64, 0x11, 0, 1);
    let lookup_of_programs = [&lookup(0)[..3], &[of_programs], &lookup(0)[4..6]].concat();
    refuses("helper 1 with map 1, of type 3", vec![lookup_of_programs])?;
    // Null that was on the stack when it was found to be null, and is read in half; then as a whole.
    let spilled_null = |half: u8| {
        let behind = [instruction(0x7b, 0x0a, -16, 0), instruction(0x55, 0, 1, 0), instruction(half, 0xa3, -16, 0)];
        vec![lookup(0)[..6].to_vec(), behind.to_vec()]
    };
    refuses("part of a pointer", spilled_null(0x61))?;
    verify(spilled_null(0x79))?;
    // One read of the context, or of what was looked up.
    let either = [instruction(0x15, 0, 1, 0), instruction(0xbf, 0x07, 0, 0), instruction(0x61, 0x73, 0, 0)];
    refuses("by something else", vec![vec![keep], lookup(0)[..6].to_vec(), either.to_vec()])?;
    // 14 bytes of a packet, asked for with an address that may have been moved to itself before.
    let packet = |to: u8| {
        vec![
            instruction(0x61, 0x12, 76, 0),     // r2 = skb->data
            instruction(0x61, 0x13, 80, 0),     // r3 = skb->data_end
            instruction(0xbf, 0x24, 0, 0),      // r4 = r2
            instruction(0x07, 4, 0, 14),        // r4 += 14
            instruction(0xbf, 0x40 | to, 0, 0), // r5 = r4, or r4 = r4
            instruction(0x2d, 0x34, 1, 0),      // if r4 > r3 goto + 1
            instruction(0x71, 0x21, 13, 0),     // r1 = *(u8 *)(r2 + 13)
        ]
    };
    verify(vec![packet(5)])?;
    refuses("compares Number", vec![packet(4)])?;
    // Part of the stack that one way leaves unset.
    let skip = instruction(0x15, 1, 1, 7); // if r1 == 7 goto + 1
    refuses("of the stack, which is not set", vec![vec![keep, length, skip, spill, fill]])?;
    // A length of 0.
    let load = |least: i32| {
        vec![
            keep,
            instruction(0x61, 0x14, 0, 0),  // r4 = skb->len
            instruction(0x57, 4, 0, 7),     // r4 &= 7
            instruction(0x07, 4, 0, least), // r4 += least
            instruction(0x7a, 10, -8, 0),   // all of what is filled is set
            instruction(0x7a, 10, -16, 0),
            instruction(0xbf, 0xa3, 0, 0),
            instruction(0x07, 3, 0, -16),
            instruction(0xb7, 2, 0, 0),
            instruction(CALL, 0, 0, 26),
        ]
    };
    verify(vec![load(1)])?;
    refuses("a size that may be 0", vec![load(0)])?;
    // The same of memory to be summed, though the helper takes 0 bytes of no memory.
    let sum = |memory: bpf_insn, most: i32| {
        let size = [instruction(0x61, 0x12, 0, 0), instruction(0x57, 2, 0, most)]; // r2 = skb->len & most
        let none = [instruction(0xb7, 3, 0, 0), instruction(0xb7, 4, 0, 0), instruction(0xb7, 5, 0, 0)];
        vec![
            vec![instruction(0x7a, 10, -8, 0)],
            size.to_vec(),
            none.to_vec(),
            vec![memory, instruction(0x07, 1, 0, if most == 0 { 0 } else { -8 }), instruction(CALL, 0, 0, 28)],
        ]
    };
    verify(sum(instruction(0xb7, 1, 0, 0), 0))?;
    refuses("a size that may be 0", sum(instruction(0xbf, 0xa1, 0, 0), 4))?;
    // And it does not go on for ever: twelve branches in a row, each of which leaves another number behind.
    let branch = [instruction(0x25, 1, 1, 7), instruction(0x07, 6, 0, 1), instruction(0x67, 6, 0, 1)];
    let many = std::iter::repeat_n(branch, 12).flatten().collect();
    refuses(
        "more than 1000",
        vec![vec![keep, length, instruction(0xb7, 6, 0, 0)], many, vec![instruction(0xbf, 0x60, 0, 0)]],
    )
}
