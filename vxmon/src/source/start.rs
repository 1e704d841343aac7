//! Which engine it is to be, and its start: what was asked for, or the best that this kernel and these privileges allow.

use std::thread;

use anyhow::{Context as _, Result, bail};
use aya::{EbpfLoader, maps::MapType, sys::is_map_supported};
use vxmon_common::config::skb_access;

use super::{
    btf::Layout,
    clsact,
    engine::Engine,
    packet_socket::PacketSocket,
    probe,
    programs::Programs,
    tc::{Hook, Tc},
};
use crate::release::release;

/// Which engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TC programs; packet sockets where those cannot be used.
    Auto,
    /// TC programs.
    Tc,
    /// Packet sockets.
    PacketSocket,
}

/// How TC programs hand events over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// By a ring buffer; by perf events where that, or something else that comes with it, cannot be had.
    Auto,
    /// By a ring buffer.
    RingBuffer,
    /// By perf events.
    Perf,
}

/// How to watch.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Which engine.
    pub kind: Kind,
    /// Why TC programs cannot be used, if that is known already.
    pub no_tc: Option<String>,
    /// How TC programs are attached.
    pub hook: Hook,
    /// How TC programs hand events over.
    pub transport: Transport,
    /// Sum the payload of one in so many packets.
    pub sample: u32,
    /// Whether to use the kernel's BTF.
    pub btf: bool,
    /// Whether to read the skb's conntrack entry, where that is possible.
    pub skb_conntrack: bool,
    /// Whether to use a ring buffer, where the kernel has it.
    pub ring_buffer: bool,
    /// Whether packet sockets may have a ring.
    pub packet_ring: bool,
}

/// An engine, ready to watch.
pub struct Started {
    /// The engine.
    pub engine: Box<dyn Engine>,
    /// Why it is not the one that was preferred, if so.
    pub fallback: Option<String>,
}

/// Starts the engine; `say` is told, in lines for people, what it has to do without.
pub fn start(choice: &Choice, say: &dyn Fn(&str)) -> Result<Started> {
    let asked_for = |engine| Started { engine, fallback: None };
    let why = match (&choice.kind, &choice.no_tc) {
        (Kind::PacketSocket, _) => return packet_socket(choice).map(asked_for),
        (Kind::Tc, _) => return tc(choice, say),
        // Asked for by its name: packet sockets are no substitute.
        (Kind::Auto, Some(why)) if choice.transport != Transport::Auto => {
            bail!("--transport is for TC programs, which cannot be used: {why}")
        }
        (Kind::Auto, None) if choice.transport != Transport::Auto => return tc(choice, say),
        (Kind::Auto, Some(why)) => why.clone(),
        (Kind::Auto, None) => match tc(choice, say) {
            Ok(started) => return Ok(started),
            Err(error) => format!("{error:#}"),
        },
    };
    instead(choice, why, say)
}

/// Starts packet sockets in place of TC programs, which cannot be used for this reason.
pub fn instead(choice: &Choice, why: String, say: &dyn Fn(&str)) -> Result<Started> {
    say(&format!("vxmon: by packet sockets, since TC programs cannot be used: {why}"));
    let engine = packet_socket(choice).context(format!("{why}; and without TC programs"))?;
    Ok(Started { engine, fallback: Some(why) })
}

fn packet_socket(choice: &Choice) -> Result<Box<dyn Engine>> {
    Ok(Box::new(PacketSocket::start(choice.sample, choice.packet_ring)?))
}

fn tc(choice: &Choice, say: &dyn Fn(&str)) -> Result<Started> {
    for device in clsact::remove_leftovers()? {
        say(&format!("vxmon: removed from {device} what a vxmon that was killed had left there"));
    }
    let why = match choice.transport {
        Transport::RingBuffer => return by_ring_buffer(choice, say).map(|engine| Started { engine, fallback: None }),
        Transport::Perf => return by_perf(choice, say).map(|engine| Started { engine, fallback: None }),
        Transport::Auto => match by_ring_buffer(choice, say) {
            Ok(engine) => return Ok(Started { engine, fallback: None }),
            Err(error) => format!("{error:#}"),
        },
    };
    say(&format!("vxmon: events come by perf buffers, since they cannot come by a ring buffer: {why}"));
    let engine = by_perf(choice, say).with_context(|| format!("{why}; and by perf buffers"))?;
    Ok(Started { engine, fallback: Some(why) })
}

/// The programs for kernels before 5.8.
fn by_perf(choice: &Choice, say: &dyn Fn(&str)) -> Result<Box<dyn Engine>> {
    let programs = Programs::load_legacy(choice.sample).with_context(|| kernel_needs("4.14"))?;
    // Whoever asked for them by name knows.
    if choice.transport == Transport::Auto {
        say(
            "vxmon: without the skb's metadata (these programs cannot read it), so any checksum that is right by some reading \
             is accepted; conntrack entries are looked up by netlink",
        );
    }
    Ok(Box::new(Tc::new(programs, choice.hook)))
}

fn by_ring_buffer(choice: &Choice, say: &dyn Fn(&str)) -> Result<Box<dyn Engine>> {
    // Tried, since the kernel's version does not tell what a distribution has added.
    if !choice.ring_buffer || matches!(is_map_supported(MapType::RingBuf), Ok(false)) {
        bail!("this kernel has no eBPF ring buffer (Linux 5.8)");
    }
    let detect = || if choice.btf { Layout::detect() } else { Layout::without("not used, as asked for") };
    // Each reads the kernel's BTF, a loader whether or not it is to use it: some 10 ms each.
    let (mut layout, loader, csum_chunk) = thread::scope(|scope| {
        let chunk = scope.spawn(csum_chunk);
        let (layout, loader) = (detect(), EbpfLoader::new());
        (layout, loader, chunk.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    layout.config.sample = choice.sample;
    layout.config.csum_chunk = csum_chunk;
    if !choice.skb_conntrack {
        layout.config.has_conntrack = 0;
    }
    let can_read = layout.config.has_skb + layout.config.has_conntrack;
    let tc = Tc::new(load(&mut layout, loader, say)?, choice.hook);
    if can_read > 0 && layout.config.has_skb + layout.config.has_conntrack == 0 {
        return Ok(Box::new(tc)); // which was said
    }
    if let Err(error) = &layout.skb {
        say(&format!(
            "vxmon: without the skb's metadata ({error}), so any checksum that is right by some reading is accepted"
        ));
    } else if let Err(error) = &layout.conntrack {
        say(&format!("vxmon: conntrack entries are looked up by netlink ({error})"));
    }
    Ok(Box::new(tc))
}

/// Loads the programs with as much as the kernel lets them read.
fn load(layout: &mut Layout, loader: EbpfLoader<'_>, say: &dyn Fn(&str)) -> Result<Programs> {
    let error = match Programs::load(layout, loader) {
        Ok(programs) => return Ok(programs),
        Err(error) => error,
    };
    if layout.config.has_skb == skb_access::CAST {
        log::debug!("the skb cannot be read in place: {error}");
        layout.config.has_skb = skb_access::COPY;
        layout.cast = None;
        return load(layout, EbpfLoader::new(), say);
    }
    if layout.config.has_skb == skb_access::NONE && layout.config.has_conntrack == 0 {
        return Err(error).with_context(|| kernel_needs("5.8"));
    }
    // Reading kernel memory may be forbidden (lockdown) where the rest is not.
    layout.config.has_skb = skb_access::NONE;
    layout.config.has_conntrack = 0;
    let programs = Programs::load(layout, EbpfLoader::new()).with_context(|| kernel_needs("5.8"))?;
    say(&format!("vxmon: without the skb's metadata and conntrack entry: {error}"));
    Ok(programs)
}

/// Bytes that `bpf_csum_diff()` takes at once: since 6.13 it sums in place (net/core/filter.c, "bpf_csum_diff: optimize"),
/// before that by way of a scratchpad of 512 bytes. Found out by a program that tries it, since a distribution may have taken
/// over the one without the version number. Where it cannot be tried (before 4.12, or with test runs refused), the smaller one,
/// which is right everywhere.
pub fn csum_chunk() -> u32 {
    match probe::sums_at_once() {
        Ok(true) => 4096,
        Ok(false) => 512,
        Err(error) => {
            log::debug!("how much bpf_csum_diff() takes at once is not known: {error}");
            512
        }
    }
}

fn kernel_needs(version: &str) -> String {
    format!(
        "cannot watch by these TC programs on this kernel ({}); they need Linux {version} or later with CONFIG_BPF_SYSCALL \
         and CONFIG_NET_CLS_BPF, and no lockdown",
        release().as_deref().unwrap_or("unknown release")
    )
}
