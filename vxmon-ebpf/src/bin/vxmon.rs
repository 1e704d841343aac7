//! The object that the daemon loads: a TC egress program for uplinks, and one for VXLAN devices.

#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macro makes public functions without the comments")]

use aya_ebpf::{macros::classifier, programs::TcContext};
use vxmon_ebpf::{TC_ACT_UNSPEC, watch};

/// Judges the outer packet.
#[classifier]
pub fn vxmon_uplink(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    watch::uplink(skb, &watch::Kernel::of(skb));
    TC_ACT_UNSPEC
}

/// Judges the frame about to be encapsulated.
#[classifier]
pub fn vxmon_vxlan(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    watch::vxlan(skb, &watch::Kernel::of(skb));
    TC_ACT_UNSPEC
}
