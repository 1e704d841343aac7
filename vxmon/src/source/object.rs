//! The eBPF objects, built by `build.rs` and embedded, and the one instruction in them that depends on the running kernel.

use vxmon_common::config::CAST;
use zerocopy::IntoBytes as _;

/// The object that the daemon loads.
pub static MAIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon"));

/// The object for kernels before 5.8, in stages: see [`vxmon_common::config::legacy`].
pub static LEGACY: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon-legacy"));

/// The object that sees NAT being set up.
pub static NAT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon-nat"));

/// The object that tries what the kernel can do.
pub static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon-probe"));

/// The same judge with the skb's metadata handed in, for tests and benchmarks. Not used by the daemon, and so not in its
/// binary.
#[doc(hidden)]
pub static TEST: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxmon-test"));

/// Every object that the daemon may load, by the name of the program it is built from: for tests that count.
#[doc(hidden)]
pub static ALL: [(&str, &[u8]); 4] =
    [("vxmon", MAIN), ("vxmon-legacy", LEGACY), ("vxmon-probe", PROBE), ("vxmon-nat", NAT)];

/// `BPF_JMP | BPF_CALL` (include/uapi/linux/bpf.h).
const CALL: u8 = 0x85;
/// `BPF_PSEUDO_KFUNC_CALL` as the source register of a call: the number is that of a kernel function.
const KFUNC: u8 = 2 << 4;
/// `r0 = r1`: `BPF_ALU64 | BPF_MOV | BPF_X`.
const R0_IS_R1: [u8; 8] = [0xbf, 1 << 4, 0, 0, 0, 0, 0, 0];

/// An object for the running kernel, aligned for the loader's parser.
pub struct Object {
    words: Vec<u64>,
    len: usize,
}

impl Object {
    /// Takes a copy in which every call of [`CAST`] is one of the kernel function with this number in the kernel's BTF, or
    /// nothing but a move where there is none: such a program must not get there ([`vxmon_common::config::skb_access`]).
    pub fn new(object: &[u8], cast: Option<u32>) -> Self {
        let call = |source: u8, number: u32| {
            let [a, b, c, d] = number.to_ne_bytes();
            u64::from_ne_bytes([CALL, source, 0, 0, a, b, c, d])
        };
        let marker = call(0, CAST.cast_unsigned());
        let patched = cast.map_or(u64::from_ne_bytes(R0_IS_R1), |number| call(KFUNC, number));
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = *from;
            }
            // Sections of instructions are aligned to instructions.
            match u64::from_ne_bytes(word) {
                word if word == marker => patched,
                word => word,
            }
        };
        Self { words: object.chunks(8).map(word).collect(), len: object.len() }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.words.as_bytes().get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often an instruction stands in an object.
    fn count(object: &[u8], instruction: [u8; 8]) -> usize {
        object.chunks_exact(8).filter(|bytes| **bytes == instruction).count()
    }

    /// Else nobody would notice that the verifier comes near its limit with one of them.
    #[test]
    fn all_objects_but_that_of_tests_are_counted() {
        let lines = include_str!("object.rs").lines();
        let embedded = lines.filter(|line| line.starts_with("pub static") && line.contains("include_bytes_aligned"));
        assert_eq!(ALL.len(), embedded.filter(|line| !line.contains(" TEST:")).count());
    }

    /// Sections are found by their names. Debug information is more than all the rest; without its BTF an object has no names of
    /// types and lines, and with it the one for old kernels would not load there.
    #[test]
    fn debug_information_is_gone_and_btf_is_not() {
        let has = |object: &[u8], name: &[u8]| object.windows(name.len()).any(|bytes| bytes == name);
        for (name, object) in ALL {
            assert!(!has(object, b".debug_"), "{name}");
            assert_eq!(has(object, b".BTF.ext\0"), name != "vxmon-legacy", "{name}");
            assert!(has(object, b".symtab\0"), "{name}");
        }
    }

    #[test]
    fn only_the_marked_calls_change() {
        let [a, b, c, d] = CAST.to_ne_bytes();
        let marker = [CALL, 0, 0, 0, a, b, c, d];
        let [a, b, c, d] = 63_539_u32.to_ne_bytes();
        let call = [CALL, 0x20, 0, 0, a, b, c, d];
        for object in [MAIN, TEST] {
            let marked = count(object, marker);
            assert!(marked > 0);
            let patched = Object::new(object, Some(63_539));
            assert_eq!((count(patched.bytes(), marker), count(patched.bytes(), call)), (0, marked));
            let without = Object::new(object, None);
            assert_eq!(count(without.bytes(), R0_IS_R1), count(object, R0_IS_R1) + marked);
            for patched in [patched, without] {
                assert_eq!(patched.bytes().len(), object.len());
                let differing = patched.bytes().iter().zip(object).filter(|(new, old)| new != old).count();
                assert!(differing <= 8 * marked);
            }
        }
    }
}
