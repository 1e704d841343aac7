//! The object that the daemon loads on kernels before 5.8: as `vxmon`, in stages. See [`vxmon_ebpf::legacy`].

#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macro makes public functions without the comments")]

use aya_ebpf::{macros::classifier, programs::TcContext};
use vxmon_ebpf::{TC_ACT_UNSPEC, legacy::stage};

macro_rules! programs {
    ($($name:ident $stage:ident)*) => {
        $(
            #[classifier]
            pub fn $name(ctx: TcContext) -> i32 {
                stage::$stage(ctx.skb.skb);
                TC_ACT_UNSPEC
            }
        )*
    };
}

programs! {
    vxmon_uplink uplink
    vxmon_vxlan vxlan
    vxmon_tunnel tunnel
    vxmon_frame frame
    vxmon_walk walk
    vxmon_any any
    vxmon_sum sum
    vxmon_whose whose
    vxmon_count count
    vxmon_send send
}
