//! How much work the verifier has with each program of each object. It gives up after 1,000,000 instructions, along all ways
//! through a program together, and how many it takes differs from kernel to kernel.
//!
//! `verified_insns` of fdinfo came with 5.16; before that only the verifier's log tells, and that comes with errors only. So a
//! program is loaded while this process may not open another file: the verifier has done all of its work by then
//! (`bpf_prog_load()`, kernel/bpf/syscall.c: `bpf_check()` long before `bpf_prog_new_fd()`).

use std::{fs::File, os::fd::AsRawFd as _};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod, VerifierLogLevel,
    programs::{Program, ProgramError},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vxmon::source::{
    btf::{self, Layout},
    object::{self, Object},
    start::csum_chunk,
};
use vxmon_common::{
    config::{CONFIG, skb_access},
    translation,
};
use vxmon_tests::{cleanup::note, skip};

/// Half of what the verifier takes: kernels that nobody has tried may take more.
const LIMIT: u64 = 500_000;

/// `aya_log::LEVEL`.
const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

/// Loads the object, with its settings, and the name that they have there, if it has any.
fn load<T: Pod>(bytes: &[u8], settings: Option<(&str, &T)>) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.btf(None).verifier_log_level(VerifierLogLevel::STATS);
    // No lines of the log, as in the daemon.
    loader.override_global(LOG_LEVEL, &0_u8, false);
    if let Some((name, settings)) = settings {
        loader.override_global(name, settings, true);
    }
    Ok(loader.load(bytes)?)
}

/// The object in all forms in which the daemon may load it here, each with a name.
fn forms(name: &str, bytes: &[u8]) -> Result<Vec<(&'static str, Ebpf)>> {
    match name {
        "vxmon" => {
            let mut found = Layout::detect();
            found.config.csum_chunk = csum_chunk();
            let mut forms = Vec::new();
            let mut add = |form, layout: &Layout| -> Result<()> {
                let object = Object::new(bytes, layout.cast);
                forms.push((form, load(object.bytes(), Some((CONFIG, &layout.config)))?));
                Ok(())
            };
            if found.config.has_skb == skb_access::CAST {
                add("skb in place", &found)?;
                (found.config.has_skb, found.cast) = (skb_access::COPY, None);
            }
            if found.config.has_skb == skb_access::COPY {
                add("skb copied", &found)?;
            }
            let mut blind = Layout::without("not asked for");
            blind.config.csum_chunk = csum_chunk();
            add("no skb", &blind)?;
            Ok(forms)
        }
        // Without the kernel's BTF it is not loaded.
        "vxmon-nat" => match btf::translation(0) {
            Ok(settings) => Ok(vec![("", load(bytes, Some((translation::CONFIG, &settings)))?)]),
            Err(_) => Ok(Vec::new()),
        },
        _ => Ok(vec![("", load::<u8>(bytes, None)?)]),
    }
}

/// Instructions that the verifier has gone over for this program.
fn verified(program: &mut Program) -> Result<u64> {
    let next = File::open("/dev/null")?.as_raw_fd();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(next)?, hard)?;
    let loaded = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::KProbe(program) => program.load(),
        other => bail!("this test does not know how to load a program of type {:?}", other.prog_type()),
    };
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    let log = match loaded {
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            ensure!(io_error.raw_os_error() == Some(nix::errno::Errno::EMFILE as i32), "{io_error}: {log}");
            log
        }
        Err(error) => return Err(error.into()),
        Ok(()) => bail!("it was loaded, though this process has no file descriptor left"),
    };
    let count = log.lines().find_map(|line| line.strip_prefix("processed ")?.split_whitespace().next());
    count.and_then(|count| count.parse().ok()).with_context(|| format!("no number in the verifier's log: {log}"))
}

/// The only test of this binary: another one might open a file at the wrong time.
#[test]
fn programs_are_well_below_the_verifiers_limit() -> Result<()> {
    if !skip::root_or_skip("programs_are_well_below_the_verifiers_limit") {
        return Ok(());
    }
    let mut too_many = Vec::new();
    for (object, bytes) in object::ALL {
        for (form, mut ebpf) in forms(object, bytes).with_context(|| object.to_owned())? {
            for (name, program) in ebpf.programs_mut() {
                let context = || format!("{name}{}{form}", if form.is_empty() { "" } else { ", " });
                let count = verified(program).with_context(context)?;
                note(&format!("{}: {count} instructions verified", context()));
                vxmon_tests::facts::write(&format!("verified instructions, {}", context()), count)?;
                if count > LIMIT {
                    too_many.push(format!("{}: {count}", context()));
                }
            }
        }
    }
    ensure!(too_many.is_empty(), "more than {LIMIT} instructions: {}", too_many.join("; "));
    Ok(())
}
