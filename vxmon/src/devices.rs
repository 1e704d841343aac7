//! Which devices to watch: VXLAN devices, and the uplinks their packets leave by. A [`Snapshot`] holds what the kernel says
//! of the namespace, and [`plan`] decides on nothing but that, so every decision can be tested on values made by hand.
//!
//! It never attaches anything and never changes a device. Whoever follows a plan takes a new snapshot when
//! [`crate::netlink::monitor`] tells of a change, and compares the plans.
//!
//! # Layout
//! - `snapshot`: asking the kernel, with a bound on how much
//! - `stack`: which device lies on which
//! - `uplinks`: the devices by which one VXLAN device's packets leave
//! - `plan`: the decision
//! - `offload`: whether VXLAN devices' checksum offload changes

pub mod offload;
mod plan;
mod snapshot;
mod stack;
#[cfg(test)]
mod tests;
mod uplinks;

pub use plan::{Plan, Role, Selection, VxlanDevice, Watch, plan};
pub use snapshot::{Lookup, MAX_LOOKUPS, Snapshot};
