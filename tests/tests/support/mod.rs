//! What several of these tests ask of the kernel by way of aya, which the library beside them does without.

use aya::programs::{SchedClassifier, TcAttachType};

/// Whether this kernel has tcx links (6.6).
pub fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Egress).is_ok()
}
