//! Ones' complement arithmetic of the Internet checksum (RFC 1071, RFC 1624).
//!
//! Everything here works on 16-bit words as they lie in memory; see the crate's note on byte order. Nothing here knows
//! packets.

/// A running ones' complement sum of 16-bit words, not folded and not complemented.
///
/// Adding at most 2^31 words of 32 bits cannot overflow; a packet has at most 2^14.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The empty sum.
    pub const ZERO: Self = Self(0);

    /// Adds one 16-bit word, as it lies in memory.
    #[inline(always)]
    pub const fn add_u16(self, word: u16) -> Self {
        Self(self.0.wrapping_add(word as u64))
    }

    /// Adds two adjacent 16-bit words read as one 32-bit word, as they lie in memory.
    #[inline(always)]
    pub const fn add_u32(self, words: u32) -> Self {
        Self(self.0.wrapping_add(words as u64))
    }

    /// Adds four adjacent 16-bit words read as one 64-bit word, as they lie in memory.
    #[inline(always)]
    pub const fn add_u64(self, words: u64) -> Self {
        self.add_u32(words as u32).add_u32((words >> 32) as u32)
    }

    /// Adds another sum. Both must start at an even offset of the summed data.
    #[inline(always)]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// Takes one 16-bit word out again: adds its ones' complement (RFC 1624, equation 3).
    #[inline(always)]
    pub const fn minus_u16(self, word: u16) -> Self {
        self.add_u16(!word)
    }

    /// Takes another sum out again.
    #[inline(always)]
    pub const fn minus(self, other: Self) -> Self {
        self.add_u16(!other.fold())
    }

    /// The sum as it is, to pass it on as a number.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Back from [`Sum::to_bits`].
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Folds to 16 bits, not complemented. Zero only if every word added was zero.
    #[inline(always)]
    pub const fn fold(self) -> u16 {
        let s = (self.0 & 0xffff_ffff) + (self.0 >> 32); // at most 33 bits
        let s = (s & 0xffff) + ((s >> 16) & 0xffff) + (s >> 32); // at most 17 bits
        let s = (s & 0xffff) + (s >> 16); // at most 0x1_0000
        ((s & 0xffff) + (s >> 16)) as u16
    }

    /// Whether data that includes its own checksum field sums to "correct": all ones (RFC 1071, section 1).
    #[inline(always)]
    pub const fn is_all_ones(self) -> bool {
        self.fold() == 0xffff
    }

    /// The checksum to send for data whose checksum field was left out of this sum: the complement, and a computed 0
    /// is sent as 0xffff, since 0 means "none" in UDP (RFC 768).
    #[inline(always)]
    pub const fn to_check(self) -> u16 {
        match !self.fold() {
            0 => 0xffff,
            check => check,
        }
    }
}

/// Whether two folded values are the same number in ones' complement, which has two zeros (0 and 0xffff).
#[inline(always)]
pub const fn same(a: u16, b: u16) -> bool {
    a == b || ((a == 0 || a == 0xffff) && (b == 0 || b == 0xffff))
}

/// Sums bytes; an odd last byte is padded with a zero byte behind it (RFC 1071, section 4.1).
pub fn sum_bytes(bytes: &[u8]) -> Sum {
    let mut words = bytes.chunks_exact(8);
    let mut sum = Sum::ZERO;
    for word in &mut words {
        if let Ok(word) = <[u8; 8]>::try_from(word) {
            sum = sum.add_u64(u64::from_ne_bytes(word));
        }
    }
    for pair in words.remainder().chunks(2) {
        sum = sum.add_u16(match *pair {
            [a, b] => u16::from_ne_bytes([a, b]),
            [a] => u16::from_ne_bytes([a, 0]),
            _ => 0,
        });
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, section 3: the bytes 00 01 f2 03 f4 f5 f6 f7 sum to ddf2 (network order).
    #[test]
    fn rfc_1071_example() {
        let sum = sum_bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(u16::from_be(sum.fold()), 0xddf2);
    }

    /// RFC 1624, section 4: a header with sum 0xdd2f, in which 0x5555 becomes 0x3285, has sum 0x0000 by equation 3.
    #[test]
    fn rfc_1624_example() {
        let old_check = 0xdd2f_u16;
        let new = Sum::ZERO.add_u16(!old_check).minus_u16(0x5555).add_u16(0x3285);
        assert_eq!(!new.fold(), 0x0000);
    }

    /// The plainest possible form, as a second opinion.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_form(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert!(same(u16::from_be(sum_bytes(&bytes).fold()), slow(&bytes)));
        }

        #[test]
        fn parts_add_up(bytes in proptest::collection::vec(any::<u8>(), 0..2000), cut in 0_usize..1000) {
            let cut = (cut * 2).min(bytes.len() & !1);
            let parts = sum_bytes(&bytes[..cut]).plus(sum_bytes(&bytes[cut..]));
            prop_assert_eq!(parts.fold(), sum_bytes(&bytes).fold());
        }

        /// Changing a word incrementally and summing anew agree.
        #[test]
        fn incremental_and_full_agree(mut words in proptest::collection::vec(any::<u16>(), 1..700), at in any::<prop::sample::Index>(), new in any::<u16>()) {
            let sum = |words: &[u16]| words.iter().fold(Sum::ZERO, |sum, word| sum.add_u16(*word));
            let before = sum(&words);
            let at = at.index(words.len());
            let incremental = before.minus_u16(words[at]).add_u16(new);
            words[at] = new;
            prop_assert!(same(incremental.fold(), sum(&words).fold()));
        }

        #[test]
        fn a_sum_with_its_check_is_all_ones(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let sum = sum_bytes(&bytes);
            prop_assert!(sum.add_u16(sum.to_check()).is_all_ones());
        }

        #[test]
        fn fold_of_anything_is_zero_only_for_zero(a in any::<u32>(), b in any::<u32>(), c in any::<u64>()) {
            let sum = Sum::ZERO.add_u32(a).add_u32(b).add_u64(c);
            prop_assert_eq!(sum.fold() == 0, a == 0 && b == 0 && c == 0);
        }
    }
}
