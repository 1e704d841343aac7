//! What the running kernel can do, found out by trying it.

use aya::{
    EbpfLoader,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use vxmon_common::config::probe;

use super::object;

/// Why something could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The object was refused.
    #[error(transparent)]
    Object(#[from] aya::EbpfError),
    /// The program was refused, or its run.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The object is not as expected.
    #[error("program {0} is not in the object")]
    Missing(&'static str),
    /// The program returned what it never should.
    #[error("program {0} returned {1}")]
    Answer(&'static str, u32),
}

/// Whether `bpf_csum_diff()` takes [`probe::LONG`] bytes at once.
pub fn sums_at_once() -> Result<bool, ProbeError> {
    let mut ebpf = EbpfLoader::new().btf(None).load(object::PROBE)?;
    let program = ebpf.program_mut(probe::PROGRAM).ok_or(ProbeError::Missing(probe::PROGRAM))?;
    let program: &mut SchedClassifier = program.try_into()?;
    program.load()?;
    let packet = [0; probe::LONG as usize + 64];
    let run = program.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() })?;
    match run.return_value {
        probe::TAKEN => Ok(true),
        probe::REFUSED => Ok(false),
        other => Err(ProbeError::Answer(probe::PROGRAM, other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs privileges; without them it must say so.
    #[test]
    fn sums_at_once_or_says_why_it_is_not_known() {
        match sums_at_once() {
            Ok(at_once) => println!("bpf_csum_diff() takes {} bytes at once: {at_once}", probe::LONG),
            Err(ProbeError::Object(error)) => println!("not tried: {error}"),
            Err(ProbeError::Program(error)) => println!("not tried: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
}
