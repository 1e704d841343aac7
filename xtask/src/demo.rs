//! `cargo xtask demo`.

use anyhow::{Result, bail};

use crate::{cargo, setup::Scope};

/// Runs it.
pub fn run() -> Result<()> {
    let _vxmon = cargo::build(Scope::Everything)?;
    bail!("the demo is not written yet")
}
