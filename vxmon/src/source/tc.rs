//! The engine by TC egress programs: attached to each watched device, whose counters and events are read.
//!
//! tcx links where the kernel has them (6.6): the kernel removes them with the process, whatever ends it. Elsewhere
//! filters in the clsact qdisc, which stay: see [`crate::source::clsact`]. Knows nothing of what events mean.

use std::{collections::BTreeMap, time::Duration};

use aya::{
    maps::MapError,
    programs::{
        LinkOrder, ProgramError, TcAttachType,
        tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions},
    },
    util::KernelVersion,
};
use vxmon_common::{
    config::{self, Device, Devices, device_flag, port_flag, slot_bits},
    counters::Counters,
};

use super::{
    clsact,
    engine::{Engine, EngineError},
    events::Events,
    programs::{Programs, Table, refused},
};
use crate::{
    attribute::story::Awaiting,
    devices::{Role, Watch},
    netlink,
    sandbox::{self, Capability},
};

/// What the daemon could not do with the programs.
#[derive(Debug, thiserror::Error)]
pub enum TcError {
    /// The object, a map or a program was refused.
    #[error("the kernel refused vxmon's eBPF {what}: {reason}")]
    Refused {
        /// Which part.
        what: String,
        /// What the kernel or the loader said, on one line.
        reason: String,
    },
    /// A device could not be attached to.
    #[error("cannot attach to {device}: {reason}")]
    Attach {
        /// The device.
        device: String,
        /// What the kernel said.
        reason: String,
    },
    /// A map could not be read or written.
    #[error("cannot use the eBPF map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// Too many devices.
    #[error("more than {} devices to watch at once; name the ones that matter", config::SLOTS - 1)]
    TooMany,
    /// The events cannot be waited for.
    #[error("cannot wait for events: {0}")]
    Events(std::io::Error),
    /// No number is free for this instance's filters.
    #[error("cannot take a number for this instance of vxmon: {0}")]
    Instance(std::io::Error),
    /// A device's clsact qdisc could not be handled.
    #[error(transparent)]
    Clsact(#[from] clsact::ClsactError),
    /// What others left could not be looked for.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
}

/// How to attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tcx if the kernel has it, else clsact.
    Auto,
    /// tcx links.
    Tcx,
    /// The clsact qdisc.
    Clsact,
}

/// How a device's program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// By a tcx link.
    Tcx,
    /// By a filter in the clsact qdisc.
    Clsact,
}

impl Attachment {
    /// Name in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// The last priority tried for a filter in the clsact qdisc.
const LAST_PRIORITY: u16 = 16;

/// A watched device.
struct Slot {
    watch: Watch,
    link: Option<SchedClassifierLinkId>,
    attachment: Attachment,
    made_clsact: bool,
}

/// The loaded programs.
pub struct Tc {
    programs: Programs,
    hook: Hook,
    instance: Option<clsact::Instance>,
    slots: BTreeMap<u32, Slot>,
    ports: BTreeMap<u16, bool>,
    awaiting: Awaiting,
}

/// The capability without which maps can no longer be used, if there is one. Where kernel.unprivileged_bpf_disabled is set,
/// before 5.19 (c8644cd0efe7) every bpf(2) needs CAP_BPF, before 5.8 CAP_SYS_ADMIN; from then on only what makes something new.
pub(super) fn for_bpf() -> Option<Capability> {
    let version = KernelVersion::current().unwrap_or(KernelVersion::new(0, 0, 0));
    if version >= KernelVersion::new(5, 19, 0) {
        return None;
    }
    let bpf = version >= KernelVersion::new(5, 8, 0) && sandbox::has(Capability::CAP_BPF);
    Some(if bpf { Capability::CAP_BPF } else { Capability::CAP_SYS_ADMIN })
}

impl Tc {
    /// Attaches these.
    pub fn new(programs: Programs, hook: Hook) -> Self {
        Self {
            programs,
            hook,
            instance: None,
            slots: BTreeMap::new(),
            ports: BTreeMap::new(),
            awaiting: Awaiting::default(),
        }
    }

    fn link(&mut self, watch: &Watch) -> Result<(SchedClassifierLinkId, Attachment, bool), TcError> {
        let failed = |error: ProgramError| {
            let TcError::Refused { reason, .. } = refused("", &error) else {
                return TcError::TooMany;
            };
            TcError::Attach { device: watch.name.clone(), reason }
        };
        let name = match watch.role {
            Role::Uplink => config::UPLINK_PROGRAM,
            Role::Vxlan => config::VXLAN_PROGRAM,
        };
        // aya attaches by name, and the slot is by index: a device renamed or made anew since the look is not the one.
        if nix::net::if_::if_nametoindex(watch.name.as_str()) != Ok(watch.ifindex) {
            return Err(TcError::Attach { device: watch.name.clone(), reason: "it has just changed".into() });
        }
        if self.hook != Hook::Clsact {
            // First in the chain: what a program ahead decides could end it.
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            match self.programs.program(name)?.attach_with_options(&watch.name, TcAttachType::Egress, options) {
                Ok(link) => return Ok((link, Attachment::Tcx, false)),
                Err(error) if self.hook == Hook::Tcx => return Err(failed(error)),
                Err(error) => log::debug!("{}: no tcx: {error}", watch.name),
            }
        }
        let instance = match &self.instance {
            Some(instance) => instance,
            None => self.instance.insert(clsact::Instance::claim().map_err(TcError::Instance)?),
        };
        let made_clsact = clsact::prepare(&watch.name, watch.ifindex)?;
        let handle = instance.handle(made_clsact);
        let program = self.programs.program(name)?;
        let mut result = Err(TcError::TooMany);
        // A priority belongs to one kind of filter and one protocol; where others have the first, the next free one.
        for priority in 1..=LAST_PRIORITY {
            let options = NlOptions { priority, handle: handle.into(), ..NlOptions::default() };
            let options = TcAttachOptions::Netlink(options);
            match program.attach_with_options(&watch.name, TcAttachType::Egress, options) {
                Ok(link) => return Ok((link, Attachment::Clsact, made_clsact)),
                Err(error) => result = Err(failed(error)),
            }
        }
        clsact::tidy(&watch.name, watch.ifindex, made_clsact);
        result
    }

    /// Writes which device has which slot, and what lies on what.
    fn write_tables(&mut self) -> Result<(), TcError> {
        self.write_devices()?;
        let mut table = Box::new(Table([0; 1 << 16]));
        for (slot, Slot { watch, .. }) in &self.slots {
            let bare = if watch.l2 { 0 } else { slot_bits::BARE };
            table.0[usize::from(watch.ifindex as u16)] = *slot as u8 | bare;
        }
        self.programs.set(self.programs.generation.slots(), *table)
    }

    /// Writes what the kernel program knows of each device.
    fn write_devices(&mut self) -> Result<(), TcError> {
        let slot_of: BTreeMap<u32, u32> = self.slots.iter().map(|(slot, s)| (s.watch.ifindex, *slot)).collect();
        let mut devices = Devices([Device::default(); config::SLOTS as usize]);
        for (slot, Slot { watch, .. }) in &self.slots {
            let mut above = [0_u64; 2];
            for upper in watch.above.iter().filter_map(|ifindex| slot_of.get(ifindex)) {
                above[(upper / 64) as usize] |= 1 << (upper % 64);
            }
            let has_lower = self.slots.values().any(|other| other.watch.above.contains(&watch.ifindex));
            let follows = match watch.role {
                Role::Uplink => self.awaiting.uplinks,
                Role::Vxlan => self.awaiting.devices.contains(&watch.ifindex),
            };
            let flags =
                if has_lower { device_flag::HAS_LOWER } else { 0 } | if follows { device_flag::FOLLOW } else { 0 };
            if let Some(device) = devices.0.get_mut(*slot as usize) {
                *device = Device { ifindex: watch.ifindex, flags, above };
            }
        }
        self.programs.set(self.programs.generation.devices(), devices)
    }
}

impl Engine for Tc {
    fn metadata(&self) -> &'static str {
        self.programs.metadata
    }

    fn transport(&self) -> Option<&'static str> {
        Some(self.programs.generation.transport())
    }

    fn keeps(&self) -> Vec<Capability> {
        // For both kinds of attachment, and for questions about conntrack entries.
        let mut keeps = vec![Capability::CAP_NET_ADMIN];
        keeps.extend(for_bpf());
        keeps
    }

    fn events(&mut self) -> Result<Events, EngineError> {
        Ok(self.programs.events()?)
    }

    fn set_ports(&mut self, ports: &BTreeMap<u16, bool>) -> Result<(), EngineError> {
        if *ports == self.ports {
            return Ok(());
        }
        let mut table = Box::new(Table([0; 1 << 16]));
        for (port, no_zero_ipv6) in ports {
            let flags = port_flag::TUNNEL | if *no_zero_ipv6 { port_flag::NO_ZERO_IPV6 } else { 0 };
            table.0[usize::from(port.to_be())] = flags;
        }
        self.programs.set(self.programs.generation.ports(), *table)?;
        self.ports = ports.clone();
        Ok(())
    }

    fn follow(&mut self, awaiting: &Awaiting) -> Result<(), EngineError> {
        if *awaiting != self.awaiting {
            self.awaiting = awaiting.clone();
            self.write_devices()?;
        }
        Ok(())
    }

    fn watched(&self) -> Vec<&Watch> {
        self.slots.values().map(|slot| &slot.watch).collect()
    }

    fn attach(&mut self, watch: &Watch) -> Result<&'static str, EngineError> {
        let slot = (1..config::SLOTS).find(|slot| !self.slots.contains_key(slot)).ok_or(TcError::TooMany)?;
        let collides = |other: &Watch| other.ifindex as u16 == watch.ifindex as u16;
        if self.watched().into_iter().any(collides) {
            return Err(TcError::Attach {
                device: watch.name.clone(),
                reason: "its index and another watched device's differ by a multiple of 65536".into(),
            }
            .into());
        }
        self.programs.reset_counters(slot)?;
        self.slots
            .insert(slot, Slot { watch: watch.clone(), link: None, attachment: Attachment::Tcx, made_clsact: false });
        let attached = self.write_tables().and_then(|()| self.link(watch));
        match attached {
            Ok((link, attachment, made_clsact)) => {
                if let Some(slot) = self.slots.get_mut(&slot) {
                    slot.link = Some(link);
                    slot.attachment = attachment;
                    slot.made_clsact = made_clsact;
                }
                Ok(attachment.as_str())
            }
            Err(error) => {
                self.slots.remove(&slot);
                self.write_tables()?;
                Err(error.into())
            }
        }
    }

    fn update(&mut self, watch: &Watch) -> Result<(), EngineError> {
        if let Some(slot) = self.slots.values_mut().find(|slot| slot.watch.ifindex == watch.ifindex) {
            slot.watch = watch.clone();
        }
        Ok(self.write_tables()?)
    }

    fn detach(&mut self, ifindex: u32) -> Result<Counters, EngineError> {
        let Some((&slot, _)) = self.slots.iter().find(|(_, slot)| slot.watch.ifindex == ifindex) else {
            return Ok(Counters::default());
        };
        let Some(Slot { watch, link, attachment: _, made_clsact }) = self.slots.remove(&slot) else {
            return Ok(Counters::default());
        };
        if let Some(link) = link {
            let name = match watch.role {
                Role::Uplink => config::UPLINK_PROGRAM,
                Role::Vxlan => config::VXLAN_PROGRAM,
            };
            // A device that has vanished took the attachment with it.
            if let Err(error) = self.programs.program(name)?.detach(link) {
                log::debug!("{}: {error}", watch.name);
            }
        }
        clsact::tidy(&watch.name, ifindex, made_clsact);
        self.write_tables()?;
        Ok(self.programs.counters(slot)?)
    }

    fn counters(&self, ifindex: u32) -> Result<Counters, EngineError> {
        match self.slots.iter().find(|(_, slot)| slot.watch.ifindex == ifindex) {
            Some((slot, _)) => Ok(self.programs.counters(*slot)?),
            None => Ok(Counters::default()),
        }
    }

    fn unhooked(&self) -> Vec<Watch> {
        let by_filter = self.slots.values().filter(|slot| slot.attachment == Attachment::Clsact);
        by_filter.filter(|slot| !clsact::holds(slot.watch.ifindex)).map(|slot| slot.watch.clone()).collect()
    }

    fn run_stats(&self) -> Vec<(String, Duration, u64)> {
        self.programs.run_stats()
    }

    fn flush_log(&mut self) {
        self.programs.flush_log();
    }
}

impl Drop for Tc {
    fn drop(&mut self) {
        let watched: Vec<u32> = self.slots.values().map(|slot| slot.watch.ifindex).collect();
        for ifindex in watched {
            if let Err(error) = self.detach(ifindex) {
                log::warn!("{error}");
            }
        }
    }
}
