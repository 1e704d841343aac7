//! A verifier as old kernels have it, so far as the object for them goes: what it follows, what it knows of each register, when
//! it takes a way for one that it has seen, and what it refuses. After kernel/bpf/verifier.c of 4.14.336: `do_check()`,
//! `check_alu_op()`, `adjust_ptr_min_max_vals()`, `adjust_scalar_min_max_vals()`, `check_cond_jmp_op()`, `reg_set_min_max()`,
//! `check_mem_access()`, `check_func_arg()`, `check_map_func_compatibility()`, `is_state_visited()`, `states_equal()`; the helpers'
//! arguments after net/core/filter.c. Where it differs from those it knows less, goes on for longer, or refuses more:
//!
//! - A register counts as read by what follows if any way there reads it, not only one that was gone; stack slots always.
//! - Packets are read at constant offsets only, no operation has 32 bits, and the context is only read, copied and handed to
//!   helpers.
//! - No address is added to a number, though 4.14.336 has that: see `compute()`.
//!
//! How it compares with the kernel's own: docs/compatibility.md, "Before 5.8".

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use aya_obj::generated::bpf_insn;

/// Ways that wait to be followed, at most (`BPF_COMPLEXITY_LIMIT_STACK`).
const MAX_WAITING: usize = 1024;
const STACK: i64 = 512;
/// `BPF_MAX_VAR_OFF` and `BPF_MAX_VAR_SIZ`.
const MAX_VARIABLE: u64 = 1 << 29;
const FRAME: usize = 10;
/// `BPF_MAP_TYPE_PROG_ARRAY` and `BPF_MAP_TYPE_PERF_EVENT_ARRAY`.
const PROG_ARRAY: u32 = 3;
const PERF_EVENT_ARRAY: u32 = 4;

/// What the verifier looks at in a map.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// `enum bpf_map_type`.
    pub kind: u32,
    pub key: u32,
    pub value: u32,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Instructions followed.
    pub processed: usize,
    /// Ways that waited at a time.
    pub waiting: usize,
}

/// A number: the bits that are known, and its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Number {
    /// Known bits, where `mask` is 0.
    value: u64,
    mask: u64,
    smin: i64,
    smax: i64,
    umin: u64,
    umax: u64,
}

impl Number {
    const UNKNOWN: Self = Self { value: 0, mask: u64::MAX, smin: i64::MIN, smax: i64::MAX, umin: 0, umax: u64::MAX };

    fn known(value: u64) -> Self {
        let signed = value.cast_signed();
        Self { value, mask: 0, smin: signed, smax: signed, umin: value, umax: value }
    }

    fn constant(&self) -> Option<u64> {
        (self.mask == 0).then_some(self.value)
    }

    /// Of so many bytes, without a sign.
    fn of_bytes(bytes: i64) -> Self {
        if bytes == 8 {
            return Self::UNKNOWN;
        }
        let most = (1_u64 << (8 * bytes)) - 1;
        Self { value: 0, mask: most, smin: 0, smax: most.cast_signed(), umin: 0, umax: most }
    }

    /// `__update_reg_bounds()`
    fn updated(mut self) -> Self {
        let sign = 1_u64 << 63;
        self.smin = self.smin.max((self.value | self.mask & sign).cast_signed());
        self.smax = self.smax.min((self.value | self.mask & !sign).cast_signed());
        self.umin = self.umin.max(self.value);
        self.umax = self.umax.min(self.value | self.mask);
        self
    }

    /// `__reg_deduce_bounds()`, `__reg_bound_offset()`
    fn deduced(mut self) -> Self {
        if self.smin >= 0 || self.smax < 0 {
            self.umin = self.umin.max(self.smin.cast_unsigned());
            self.smin = self.umin.cast_signed();
            self.umax = self.umax.min(self.smax.cast_unsigned());
            self.smax = self.umax.cast_signed();
        } else if self.umax.cast_signed() >= 0 {
            self.smin = self.umin.cast_signed();
            self.umax = self.umax.min(self.smax.cast_unsigned());
            self.smax = self.umax.cast_signed();
        } else if self.umin.cast_signed() < 0 {
            self.umin = self.umin.max(self.smin.cast_unsigned());
            self.smin = self.umin.cast_signed();
            self.smax = self.umax.cast_signed();
        }
        // tnum_intersect() with tnum_range().
        let differing = self.umin ^ self.umax;
        let bits = 64 - differing.leading_zeros();
        let delta = if bits > 63 { u64::MAX } else { (1 << bits) - 1 };
        let (value, mask) = (self.umin & !delta, delta);
        let mask = self.mask & mask;
        self.value = (self.value | value) & !mask;
        self.mask = mask;
        self
    }

    /// Of a way that cannot be gone: what is known of it contradicts itself.
    fn is_absurd(&self) -> bool {
        let known = self.constant().is_some() && (self.smin != self.smax || self.umin != self.umax);
        known || self.umin > self.umax || self.smin > self.smax
    }

    /// Whether all that this may be, `other` may be too.
    fn is_within(&self, other: &Self) -> bool {
        other.umin <= self.umin
            && self.umax <= other.umax
            && other.smin <= self.smin
            && self.smax <= other.smax
            && self.mask & !other.mask == 0
            && self.value & !other.mask == other.value
    }

    fn plus(&self, other: &Self) -> Self {
        let mut sum = Self::UNKNOWN;
        if let (Some(low), Some(high)) = (self.smin.checked_add(other.smin), self.smax.checked_add(other.smax)) {
            (sum.smin, sum.smax) = (low, high);
        }
        if let (Some(low), Some(high)) = (self.umin.checked_add(other.umin), self.umax.checked_add(other.umax)) {
            (sum.umin, sum.umax) = (low, high);
        }
        // tnum_add()
        let masks = self.mask.wrapping_add(other.mask);
        let values = self.value.wrapping_add(other.value);
        let changed = masks.wrapping_add(values) ^ values;
        sum.mask = changed | self.mask | other.mask;
        sum.value = values & !sum.mask;
        sum.updated().deduced()
    }

    fn compute(&self, operation: u8, other: &Self) -> Self {
        if other.is_absurd() || other.constant().is_none() && !matches!(operation, 0x0 | 0x1 | 0x5) {
            return Self::UNKNOWN;
        }
        if let (Some(a), Some(b)) = (self.constant(), other.constant()) {
            let known = match operation {
                0x0 => Some(a.wrapping_add(b)),
                0x1 => Some(a.wrapping_sub(b)),
                0x2 => Some(a.wrapping_mul(b)),
                0x4 => Some(a | b),
                0x5 => Some(a & b),
                0x6 if b < 64 => Some(a << b),
                0x7 if b < 64 => Some(a >> b),
                _ => None,
            };
            return known.map_or(Self::UNKNOWN, Self::known);
        }
        let mut result = Self::UNKNOWN;
        match operation {
            0x0 => return self.plus(other),
            0x1 => {
                if let (Some(low), Some(high)) = (self.smin.checked_sub(other.smax), self.smax.checked_sub(other.smin))
                {
                    (result.smin, result.smax) = (low, high);
                }
                if self.umin >= other.umax {
                    (result.umin, result.umax) = (self.umin - other.umax, self.umax - other.umin);
                }
            }
            0x2 => {
                let small = self.smin >= 0 && other.smin >= 0;
                if small && self.umax <= u32::MAX.into() && other.umax <= u32::MAX.into() {
                    (result.umin, result.umax) = (self.umin * other.umin, self.umax * other.umax);
                    if result.umax.cast_signed() >= 0 {
                        (result.smin, result.smax) = (result.umin.cast_signed(), result.umax.cast_signed());
                    }
                }
            }
            0x5 => {
                let (a, b) = (self.value | self.mask, other.value | other.mask);
                result.value = self.value & other.value;
                result.mask = a & b & !result.value;
                (result.umin, result.umax) = (result.value, self.umax.min(other.umax));
                if self.smin >= 0 && other.smin >= 0 {
                    (result.smin, result.smax) = (result.umin.cast_signed(), result.umax.cast_signed());
                }
            }
            0x4 => {
                result.value = self.value | other.value;
                result.mask = (self.mask | other.mask) & !result.value;
                (result.umin, result.umax) = (self.umin.max(other.umin), result.value | result.mask);
                if self.smin >= 0 && other.smin >= 0 {
                    (result.smin, result.smax) = (result.umin.cast_signed(), result.umax.cast_signed());
                }
            }
            0x6 | 0x7 => {
                let Some(bits) = other.constant().filter(|bits| *bits < 64) else { return Self::UNKNOWN };
                if operation == 0x6 {
                    if self.umax <= 1 << (63 - bits) {
                        (result.umin, result.umax) = (self.umin << bits, self.umax << bits);
                    }
                    (result.value, result.mask) = (self.value << bits, self.mask << bits);
                } else {
                    (result.umin, result.umax) = (self.umin >> bits, self.umax >> bits);
                    (result.value, result.mask) = (self.value >> bits, self.mask >> bits);
                }
            }
            _ => return Self::UNKNOWN,
        }
        result.updated().deduced()
    }

    /// What is known of it where a comparison with a constant came out so.
    fn compared(mut self, operation: u8, with: u64, holds: bool) -> Self {
        let signed = with.cast_signed();
        match (operation, holds) {
            (0x1, true) | (0x5, false) => return Self::known(with),
            (0x2, true) | (0xb, false) => self.umin = self.umin.max(with.wrapping_add(1)),
            (0x2, false) | (0xb, true) => self.umax = self.umax.min(with),
            (0x3, true) | (0xa, false) => self.umin = self.umin.max(with),
            (0x3, false) | (0xa, true) => self.umax = self.umax.min(with.wrapping_sub(1)),
            (0x6, true) | (0xd, false) => self.smin = self.smin.max(signed.wrapping_add(1)),
            (0x6, false) | (0xd, true) => self.smax = self.smax.min(signed),
            (0x7, true) | (0xc, false) => self.smin = self.smin.max(signed),
            (0x7, false) | (0xc, true) => self.smax = self.smax.min(signed.wrapping_sub(1)),
            _ => return self,
        }
        self.deduced().updated()
    }
}

/// A register, or what was put on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Unset,
    Number(Number),
    Context,
    Map(usize),
    /// Of one lookup.
    ValueOrNull {
        map: usize,
        lookup: u32,
    },
    Value {
        map: usize,
        off: i64,
        variable: Number,
    },
    Stack(i64),
    /// `range` bytes from the packet's start are known to be there.
    Packet {
        off: i64,
        range: i64,
    },
    PacketEnd,
}

impl Register {
    fn is_pointer(&self) -> bool {
        !matches!(self, Self::Unset | Self::Number(_))
    }

    /// `regsafe()`: whether what was safe with `old` is with this. `lookups`: which of the one state are which of the other.
    fn is_covered_by(&self, old: &Self, lookups: &mut BTreeMap<u32, u32>) -> bool {
        match (old, self) {
            (Self::Unset, _) => true,
            (Self::Number(old), Self::Number(new)) => new.is_within(old),
            (Self::Value { map: a, off: b, variable: old }, Self::Value { map: c, off: d, variable: new }) => {
                a == c && b == d && new.is_within(old)
            }
            (Self::ValueOrNull { map: a, lookup: old }, Self::ValueOrNull { map: b, lookup: new }) => {
                a == b && lookups.entry(*old).or_insert(*new) == new
            }
            (Self::Packet { off: a, range: old }, Self::Packet { off: b, range: new }) => a == b && old <= new,
            (old, new) => old == new,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// A bit for each of the eight bytes that was written.
    Bytes(u8),
    /// Or the 0 that it turned out to be, which still can only be read as a whole.
    Pointer(Register),
}

#[derive(Clone, Debug)]
struct State {
    registers: [Register; 11],
    stack: [Slot; 64],
    /// What is kept of numbers in whole slots, where numbers are kept.
    numbers: [Option<Number>; 64],
}

impl State {
    fn is_covered_by(&self, old: &Self, live: u16) -> bool {
        let mut lookups = BTreeMap::new();
        let mut covered = |new: &Register, old: &Register| new.is_covered_by(old, &mut lookups);
        let registers = (0..11).all(|n| live >> n & 1 == 0 || covered(&self.registers[n], &old.registers[n]));
        registers
            && old.stack.iter().zip(&self.stack).all(|(old, new)| match (old, new) {
                (Slot::Bytes(old), Slot::Bytes(new)) => old & !new == 0,
                (Slot::Pointer(old), Slot::Pointer(new)) => covered(new, old),
                _ => false,
            })
            && old.numbers.iter().zip(&self.numbers).all(|(old, new)| match (old, new) {
                (None, _) => true,
                (Some(old), new) => new.is_some_and(|new| new.is_within(old)),
            })
    }

    fn number(&self, register: u8) -> Result<Number> {
        match self.registers[usize::from(register)] {
            Register::Number(number) => Ok(number),
            other => bail!("r{register} is {other:?}, not a number"),
        }
    }

    /// All registers and slots that hold pointers.
    fn each(&mut self, mut change: impl FnMut(&mut Register)) {
        self.registers.iter_mut().for_each(&mut change);
        for slot in &mut self.stack {
            if let Slot::Pointer(pointer) = slot {
                change(pointer);
            }
        }
    }
}

/// An argument of a helper (`enum bpf_arg_type`).
#[derive(Clone, Copy)]
enum Argument {
    Context,
    Map,
    Key,
    NewValue,
    Anything,
    Memory,
    MemoryOrNull,
    Room,
    Size,
    SizeOrZero,
}

/// `struct bpf_func_proto` of the helpers.
fn arguments(helper: i32) -> Result<&'static [Argument]> {
    use Argument::{Anything, Context, Key, Map, Memory, MemoryOrNull, NewValue, Room, Size, SizeOrZero};
    Ok(match helper {
        1 => &[Map, Key],
        2 => &[Map, Key, NewValue, Anything],
        5 | 7 | 8 => &[],
        12 => &[Context, Map, Anything],
        25 => &[Context, Map, Anything, Memory, Size],
        26 => &[Context, Anything, Room, Size],
        28 => &[MemoryOrNull, SizeOrZero, MemoryOrNull, SizeOrZero, Anything],
        other => bail!("helper {other}"),
    })
}

/// A program, and where it may be left to be seen again.
struct Verifier<'a> {
    code: &'a [bpf_insn],
    maps: &'a [Shape],
    /// Registers that are read later, by instruction.
    live: Vec<u16>,
    seen: BTreeMap<usize, Vec<Seen>>,
    prune_at: BTreeSet<usize>,
    lookups: u32,
    /// Whether it was by the context that an instruction read.
    by_context: BTreeMap<usize, bool>,
    spilled: Spilled,
}

/// A state that was followed from, how often it spared another, and how often it did not.
struct Seen {
    state: State,
    hits: u32,
    misses: u32,
}

/// What becomes of a number that is put on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spilled {
    /// It comes back unknown, as before 5.3.
    Forgotten,
    /// It comes back with its bounds, as from 5.10 on. (In between only constants do.)
    Kept,
}

/// Follows a program in which each map is named by its index in `maps`, as the number of a file descriptor.
pub fn verify(code: &[bpf_insn], maps: &[Shape], spilled: Spilled, limit: usize) -> Result<Verified> {
    let mut verifier = Verifier {
        code,
        maps,
        live: live(code)?,
        seen: BTreeMap::new(),
        prune_at: prune_points(code),
        lookups: 0,
        by_context: BTreeMap::new(),
        spilled,
    };
    let mut state = State { registers: [Register::Unset; 11], stack: [Slot::Bytes(0); 64], numbers: [None; 64] };
    state.registers[1] = Register::Context;
    state.registers[FRAME] = Register::Stack(0);
    let mut waiting = vec![(0, state)];
    let mut verified = Verified::default();
    while let Some((mut at, mut state)) = waiting.pop() {
        loop {
            verified.processed += 1;
            ensure!(verified.processed <= limit, "more than {limit} instructions to follow");
            if verifier.is_seen(at, &state) {
                break;
            }
            let next = verifier.step(at, &mut state, &mut waiting).with_context(|| format!("at {at}"))?;
            verified.waiting = verified.waiting.max(waiting.len());
            ensure!(waiting.len() <= MAX_WAITING, "{} ways wait", waiting.len());
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
    }
    Ok(verified)
}

fn target(at: usize, instruction: &bpf_insn) -> Result<usize> {
    at.checked_add_signed(isize::from(instruction.off) + 1).context("a jump to before the start")
}

fn is_conditional(instruction: &bpf_insn) -> bool {
    instruction.code & 7 == 5 && !matches!(instruction.code, 0x05 | 0x85 | 0x95)
}

/// Where `check_cfg()` has states remembered.
fn prune_points(code: &[bpf_insn]) -> BTreeSet<usize> {
    let mut points = BTreeSet::new();
    for (at, instruction) in code.iter().enumerate() {
        if is_conditional(instruction) {
            points.extend([Some(at), target(at, instruction).ok()].into_iter().flatten());
        } else if matches!(instruction.code, 0x05 | 0x85) {
            points.insert(at + 1);
        }
    }
    points
}

/// For each instruction, the registers that something after it, or it, reads first.
fn live(code: &[bpf_insn]) -> Result<Vec<u16>> {
    let mut live = vec![0_u16; code.len() + 1];
    // Jumps may lead back in the text, though never in a circle.
    loop {
        let before = live.clone();
        for (at, instruction) in code.iter().enumerate().rev() {
            let (to, from) = (1 << instruction.dst_reg(), 1 << instruction.src_reg());
            let by_register = if instruction.code & 8 == 0 { 0 } else { from };
            let next = live[at + 1];
            live[at] = match (instruction.code & 7, instruction.code) {
                (_, 0x95) => 1,
                (_, 0x05) => live[target(at, instruction)?],
                (_, 0x85) => next & !0x3f | ((1 << arguments(instruction.imm)?.len()) - 1) << 1,
                (5, _) => next | live[target(at, instruction)?] | to | by_register,
                (0, 0x18) => live[at + 2] & !to,
                (0, _) => next,
                (1, _) => next & !to | from,
                (2, _) => next | to,
                (3, _) => next | to | from,
                (_, code) if code >> 4 == 0xb => next & !to | by_register,
                _ => next | to | by_register,
            };
        }
        if live == before {
            return Ok(live);
        }
    }
}

impl Verifier<'_> {
    fn is_seen(&mut self, at: usize, state: &State) -> bool {
        if !self.prune_at.contains(&at) {
            return false;
        }
        let (seen, live) = (self.seen.entry(at).or_default(), self.live[at]);
        for old in &mut *seen {
            if state.is_covered_by(&old.state, live) {
                old.hits += 1;
                return true;
            }
            old.misses += 1;
        }
        if self.spilled == Spilled::Kept {
            // States of little use are dropped since 5.1 (9f4686c41bdf).
            seen.retain(|old| old.misses <= 3 * old.hits + 3);
        }
        seen.push(Seen { state: state.clone(), hits: 0, misses: 0 });
        false
    }

    /// One instruction. Where it goes on, if it does; the other way of a branch waits.
    fn step(&mut self, at: usize, state: &mut State, waiting: &mut Vec<(usize, State)>) -> Result<Option<usize>> {
        let instruction = self.code.get(at).context("behind the end")?;
        let (to, from) = (usize::from(instruction.dst_reg()), usize::from(instruction.src_reg()));
        match (instruction.code & 7, instruction.code) {
            (_, 0x95) => {
                state.number(0)?;
                return Ok(None);
            }
            (_, 0x05) => return target(at, instruction).map(Some),
            (_, 0x85) => self.call(instruction.imm, state)?,
            (5, _) => return self.branch(at, instruction, state, waiting).map(Some),
            (0, 0x18) => {
                let high = self.code.get(at + 1).context("half an instruction")?.imm;
                state.registers[to] = if from == 1 {
                    Register::Map(usize::try_from(instruction.imm)?)
                } else {
                    Register::Number(Number::known(
                        u64::from(instruction.imm.cast_unsigned()) | u64::from(high.cast_unsigned()) << 32,
                    ))
                };
                return Ok(Some(at + 2));
            }
            (1, code) => {
                let size = bytes(code);
                let by_context = state.registers[from] == Register::Context;
                let before = *self.by_context.entry(at).or_insert(by_context);
                ensure!(before == by_context, "reads by the context, and by something else");
                let loaded = self.load(state, state.registers[from], instruction.off.into(), size)?;
                state.registers[to] = loaded;
            }
            (2 | 3, code) => {
                let value = if code & 7 == 3 { state.registers[from] } else { Register::Number(Number::UNKNOWN) };
                ensure!(value != Register::Unset, "r{from} is not set");
                let (size, off) = (bytes(code), i64::from(instruction.off));
                if code & 0xe0 == 0xc0 {
                    ensure!(!value.is_pointer(), "adds a pointer");
                    let aligned = matches!(state.registers[to], Register::Value { off: start, variable, .. }
                        if variable.constant().is_some_and(|at| (start + off + at.cast_signed()) % size == 0));
                    ensure!(aligned, "an atomic addition at a place that is not known to be aligned");
                }
                self.store(state, state.registers[to], off, size, value)?;
            }
            (4, code) => {
                // 32 bits, or a change of byte order.
                state.number(instruction.dst_reg())?;
                ensure!(code >> 4 == 0xd, "an operation of 32 bits");
                state.registers[to] = Register::Number(Number::UNKNOWN);
            }
            // Taken for a number where it was an address, before 4.19: the destination is forgotten before the source is read.
            (_, 0xbf) if to == from => state.registers[to] = Register::Number(Number::UNKNOWN),
            (_, code) => {
                let operand = if code & 8 == 0 {
                    Register::Number(Number::known(i64::from(instruction.imm).cast_unsigned()))
                } else {
                    state.registers[from]
                };
                state.registers[to] = compute(code >> 4, state.registers[to], operand)?;
            }
        }
        Ok(Some(at + 1))
    }

    fn within_value(&self, map: usize, off: i64, variable: &Number, size: i64) -> Result<()> {
        let most = i64::from(self.maps.get(map).context("no such map")?.value);
        ensure!(variable.smin >= 0, "a negative offset into map {map}");
        ensure!(variable.umax < MAX_VARIABLE, "an unbounded offset into map {map}");
        let (low, high) = (off + variable.smin, off + variable.umax.cast_signed() + size);
        ensure!(low >= 0 && high <= most, "{low} to {high} of {most} bytes of map {map}");
        Ok(())
    }

    fn load(&self, state: &State, base: Register, off: i64, size: i64) -> Result<Register> {
        match base {
            Register::Context => Ok(match off {
                76 => Register::Packet { off: 0, range: 0 },
                80 => Register::PacketEnd,
                _ => Register::Number(Number::of_bytes(size)),
            }),
            Register::Value { map, off: start, variable } => {
                self.within_value(map, start + off, &variable, size)?;
                Ok(Register::Number(Number::of_bytes(size)))
            }
            Register::Packet { off: start, range } => {
                ensure!(
                    start + off >= 0 && start + off + size <= range,
                    "{} of {range} bytes of the packet",
                    start + off
                );
                Ok(Register::Number(Number::of_bytes(size)))
            }
            Register::Stack(start) => {
                let (slot, bits) = stack(start + off, size)?;
                match state.stack[slot] {
                    Slot::Pointer(pointer) => {
                        ensure!(bits == 0xff, "part of a pointer");
                        Ok(pointer)
                    }
                    Slot::Bytes(written) => {
                        ensure!(bits & !written == 0, "reads {} of the stack, which is not set", start + off);
                        let kept = state.numbers[slot].filter(|_| bits == 0xff);
                        Ok(Register::Number(kept.unwrap_or_else(|| Number::of_bytes(size))))
                    }
                }
            }
            other => bail!("reads by {other:?}"),
        }
    }

    fn store(&self, state: &mut State, base: Register, off: i64, size: i64, value: Register) -> Result<()> {
        match base {
            Register::Value { map, off: start, variable } => {
                ensure!(!value.is_pointer(), "writes a pointer to map {map}");
                self.within_value(map, start + off, &variable, size)
            }
            Register::Stack(start) => {
                let (slot, bits) = stack(start + off, size)?;
                state.numbers[slot] = match value {
                    Register::Number(number) if bits == 0xff && self.spilled == Spilled::Kept => Some(number),
                    _ => None,
                };
                state.stack[slot] = match state.stack[slot] {
                    _ if value.is_pointer() => {
                        ensure!(bits == 0xff, "part of a pointer");
                        Slot::Pointer(value)
                    }
                    Slot::Bytes(written) => Slot::Bytes(written | bits),
                    Slot::Pointer(_) => {
                        ensure!(bits == 0xff, "writes over part of a pointer");
                        Slot::Bytes(bits)
                    }
                };
                Ok(())
            }
            other => bail!("writes by {other:?}"),
        }
    }

    /// `check_helper_mem_access()`. `room`: the helper fills it.
    fn memory(&self, state: &mut State, base: Register, size: i64, room: bool) -> Result<()> {
        match base {
            Register::Stack(start) => {
                for at in start..start + size {
                    let (slot, bit) = stack(at, 1)?;
                    match &mut state.stack[slot] {
                        Slot::Bytes(written) if room => {
                            *written |= bit;
                            state.numbers[slot] = None;
                        }
                        Slot::Bytes(written) => ensure!(*written & bit != 0, "{at} of the stack is not set"),
                        Slot::Pointer(_) => bail!("a pointer on the stack is handed out"),
                    }
                }
                Ok(())
            }
            Register::Value { map, off, variable } => self.within_value(map, off, &variable, size),
            Register::Packet { off, range } => {
                ensure!(off + size <= range, "{off} of {range} bytes of the packet");
                Ok(())
            }
            other => bail!("memory by {other:?}"),
        }
    }

    fn call(&mut self, helper: i32, state: &mut State) -> Result<()> {
        let mut map = None;
        let kinds = arguments(helper)?;
        for (n, kind) in (1_u8..).zip(kinds) {
            let register = state.registers[usize::from(n)];
            let sizes = || map.and_then(|map: usize| self.maps.get(map)).context("no map before it");
            let on_stack = matches!(register, Register::Stack(_));
            let check = match kind {
                Argument::Context => register == Register::Context,
                Argument::Map => {
                    if let Register::Map(number) = register {
                        map = Some(number);
                    }
                    map.is_some()
                }
                Argument::Key => on_stack && self.memory(state, register, sizes()?.key.into(), false).map(|()| true)?,
                Argument::NewValue => {
                    on_stack && self.memory(state, register, sizes()?.value.into(), false).map(|()| true)?
                }
                Argument::Anything => register != Register::Unset,
                // Looked at with the size that follows.
                Argument::Memory | Argument::Room => register.is_pointer(),
                Argument::MemoryOrNull => register.is_pointer() || state.number(n)?.constant() == Some(0),
                Argument::Size | Argument::SizeOrZero => {
                    let size = state.number(n)?;
                    let memory = state.registers[usize::from(n) - 1];
                    let none = matches!(kind, Argument::SizeOrZero) && matches!(memory, Register::Number(_));
                    ensure!(size.smin >= 0 && size.umax < MAX_VARIABLE, "an unbounded size: {size:?}");
                    // Of no memory only: check_stack_boundary() and check_map_access() of 4.14 refuse 0 bytes.
                    ensure!(none || size.umin > 0, "a size that may be 0");
                    // A size that is not known must find all of it set.
                    let room = matches!(kinds[usize::from(n) - 2], Argument::Room) && size.constant().is_some();
                    if size.umax > 0 {
                        self.memory(state, memory, size.umax.cast_signed(), room)?;
                    }
                    true
                }
            };
            ensure!(check, "argument {n} of helper {helper} is {register:?}");
        }
        if let Some(map) = map {
            let kind = self.maps.get(map).context("no such map")?.kind;
            let fits = match helper {
                12 => kind == PROG_ARRAY,
                25 => kind == PERF_EVENT_ARRAY,
                _ => !matches!(kind, PROG_ARRAY | PERF_EVENT_ARRAY),
            };
            ensure!(fits, "helper {helper} with map {map}, of type {kind}");
        }
        for register in &mut state.registers[1..=5] {
            *register = Register::Unset;
        }
        state.registers[0] = match (helper, map) {
            (1, Some(map)) => {
                self.lookups += 1;
                Register::ValueOrNull { map, lookup: self.lookups }
            }
            _ => Register::Number(Number::UNKNOWN),
        };
        Ok(())
    }

    /// Goes on behind a branch that is not taken; the other way waits.
    fn branch(
        &self,
        at: usize,
        instruction: &bpf_insn,
        state: &mut State,
        waiting: &mut Vec<(usize, State)>,
    ) -> Result<usize> {
        let (operation, by_register) = (instruction.code >> 4, instruction.code & 8 != 0);
        let (to, from) = (usize::from(instruction.dst_reg()), usize::from(instruction.src_reg()));
        let (left, immediate) = (state.registers[to], i64::from(instruction.imm).cast_unsigned());
        let right = if by_register { state.registers[from] } else { Register::Number(Number::known(immediate)) };
        let taken = target(at, instruction)?;
        let mut other = state.clone();
        match (left, right) {
            (Register::Number(number), Register::Number(with)) => {
                // Only this way of knowing an outcome is as old as 4.14; that a number is another one, 4.19 knows.
                if !by_register && matches!(operation, 0x1 | 0x5) && number.constant().is_some() {
                    let equal = number.constant() == Some(immediate);
                    if equal || self.spilled == Spilled::Kept {
                        return Ok(if equal == (operation == 0x1) { taken } else { at + 1 });
                    }
                }
                if let Some(with) = with.constant() {
                    other.registers[to] = Register::Number(number.compared(operation, with, true));
                    state.registers[to] = Register::Number(number.compared(operation, with, false));
                } else if let Some(number) = number.constant() {
                    let turned = match operation {
                        0x2 => 0xa,
                        0x3 => 0xb,
                        0xa => 0x2,
                        0xb => 0x3,
                        0x6 => 0xc,
                        0x7 => 0xd,
                        0xc => 0x6,
                        0xd => 0x7,
                        same => same,
                    };
                    other.registers[from] = Register::Number(with.compared(turned, number, true));
                    state.registers[from] = Register::Number(with.compared(turned, number, false));
                }
            }
            (Register::ValueOrNull { map, lookup }, _) => {
                ensure!(!by_register && immediate == 0 && matches!(operation, 0x1 | 0x5), "compares what may be null");
                let (null, found) =
                    if operation == 0x1 { (&mut other, &mut *state) } else { (&mut *state, &mut other) };
                let same =
                    |register: &Register| matches!(register, Register::ValueOrNull { lookup: l, .. } if *l == lookup);
                found.each(|register| {
                    if same(register) {
                        *register = Register::Value { map, off: 0, variable: Number::known(0) };
                    }
                });
                null.each(|register| {
                    if same(register) {
                        *register = Register::Number(Number::known(0));
                    }
                });
            }
            (Register::Packet { off, .. }, Register::PacketEnd) => {
                let inside = match operation {
                    0x2 => &mut *state, // packet > end
                    0xb => &mut other,  // packet <= end
                    _ => bail!("compares a packet in another way"),
                };
                inside.each(|register| {
                    if let Register::Packet { range, .. } = register {
                        *range = off.max(*range);
                    }
                });
            }
            (Register::PacketEnd, Register::Packet { off, .. }) => {
                let inside = match operation {
                    0x3 => &mut other,  // end >= packet
                    0xa => &mut *state, // end < packet
                    _ => bail!("compares a packet in another way"),
                };
                inside.each(|register| {
                    if let Register::Packet { range, .. } = register {
                        *range = off.max(*range);
                    }
                });
            }
            (left, right) => bail!("compares {left:?} with {right:?}"),
        }
        waiting.push((taken, other));
        Ok(at + 1)
    }
}

fn bytes(code: u8) -> i64 {
    match code & 0x18 {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

/// The slot and the bits of its bytes.
fn stack(at: i64, size: i64) -> Result<(usize, u8)> {
    ensure!((-STACK..0).contains(&at) && at % size == 0, "{at} of the stack");
    let from_bottom = STACK + at;
    let first = from_bottom % 8;
    let bits = if size == 8 { 0xff } else { (((1_u16 << size) - 1) << first) as u8 };
    Ok((usize::try_from(from_bottom / 8)?, bits))
}

/// An operation of 64 bits.
fn compute(operation: u8, left: Register, right: Register) -> Result<Register> {
    if operation == 0xb {
        ensure!(right != Register::Unset, "copies what is not set");
        return Ok(right);
    }
    match (left, right) {
        (Register::Number(a), Register::Number(b)) => Ok(Register::Number(a.compute(operation, &b))),
        // Not an address any more, from 4.14.9 on.
        (_, Register::Number(number)) if number.is_absurd() => Ok(Register::Number(Number::UNKNOWN)),
        (pointer, Register::Number(number)) if operation == 0 => {
            let constant = number.constant().map(u64::cast_signed);
            // check_reg_sane_offset()
            let most = MAX_VARIABLE.cast_signed();
            ensure!((1 - most..most).contains(&number.smin), "adds {number:?} to {pointer:?}");
            let sum = match (pointer, constant) {
                (Register::Stack(off), Some(by)) => Register::Stack(off + by),
                (Register::Packet { off, range }, Some(by)) => Register::Packet { off: off + by, range },
                (Register::Value { map, off, variable }, Some(by)) => Register::Value { map, off: off + by, variable },
                (Register::Value { map, off, variable }, None) => {
                    Register::Value { map, off, variable: variable.plus(&number) }
                }
                (pointer, _) => bail!("adds to {pointer:?}"),
            };
            if let Register::Stack(off) | Register::Packet { off, .. } | Register::Value { off, .. } = sum {
                ensure!((1 - most..most).contains(&off), "an address at {off}");
            }
            if let Register::Value { variable, .. } = sum {
                ensure!((1 - most..most).contains(&variable.smin), "an address at {variable:?}");
            }
            Ok(sum)
        }
        // Until 0962590e5533 (4.20, and in later 4.14.y and 4.19.y) the sum is one of a map that adjust_ptr_min_max_vals() did not
        // set, and check_map_access() reads from wherever that is.
        (Register::Number(_), pointer) => bail!("adds {pointer:?} to a number"),
        (left, right) => bail!("operation {operation:#x} of {left:?} and {right:?}"),
    }
}
