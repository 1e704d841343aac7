//! The programs for kernels from 4.14 to 5.7, in stages that jump to each other.
//!
//! ```text
//! bin/vxmon-legacy  the programs: two entries, and one for each stage
//! stage             what each stage does
//! work              the packet at hand, as one stage hands it to the next
//! window            reading its bytes (vxmon_common::packet::Packet)
//! sum               summing them
//! maps              maps in place of ring buffer and globals
//! ```
//!
//! The judge is the same code. What those kernels lack is worked around here (kernel/bpf/verifier.c of 4.14 to 5.7):
//!
//! - No loops before 5.3, no calls of functions before 4.16, at most 4096 instructions before 5.2, 131,072 followed by the
//!   verifier before 5.2. So the work is cut into stages, each a program of its own, that end in a tail call. What they know
//!   is in a map of one value for each CPU ([`work::Work`]), so that each stage begins with numbers of which the verifier
//!   knows nothing, and what it did before does not multiply.
//! - Where the judge asks for an IP header to be walked through or for a sum, a stage of its own does that, and the judge
//!   begins anew and finds the answer ([`window::Window`]).
//! - A number that was put on the stack has lost its bounds there before 5.3. So an offset is bounded where it is used, in one
//!   piece of assembly ([`window::Integer`]). And whether an `Option` has something is not kept: behind the stack it is asked again,
//!   with either answer. What goes on is in the map.
//! - Map keys and new values must be on the stack before 4.18.
//! - An address that is moved to the register it is in is a number from then on before 4.19, and one that is added to a number is of
//!   no map before 4.20: see [`crate::skb::opaque`], [`window::Integer`].
//! - `__sk_buff` ends at `data_end`, and kernel memory cannot be read: there is no metadata.

pub mod maps;
pub mod stage;
pub mod sum;
pub mod window;
pub mod work;
