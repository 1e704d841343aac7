//! What an engine is to the daemon: something that watches devices, counts, and hands out events. The daemon knows no more.

use std::{collections::BTreeMap, time::Duration};

use vxmon_common::counters::Counters;

use super::{events::Events, packet_socket::PacketSocketError, tc::TcError};
use crate::{attribute::story::Awaiting, devices::Watch, sandbox::Capability};

/// What an engine could not do.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// By TC programs.
    #[error(transparent)]
    Tc(#[from] TcError),
    /// By packet sockets.
    #[error(transparent)]
    PacketSocket(#[from] PacketSocketError),
}

/// Watches devices. Dropped, it leaves nothing of itself behind.
pub trait Engine {
    /// Where the checksum's state is known from, as `attached` names it.
    fn metadata(&self) -> &'static str;

    /// How TC programs hand events over, as `attached` names it.
    fn transport(&self) -> Option<&'static str> {
        None
    }

    /// The capabilities without which devices can no longer be attached to and detached from; all others are given up
    /// before the first is attached to.
    fn keeps(&self) -> Vec<Capability>;

    /// The events of all devices. Once.
    fn events(&mut self) -> Result<Events, EngineError>;

    /// Sets the UDP ports of tunnel packets (host byte order), and whether a zero outer sum over IPv6 is wrong there.
    fn set_ports(&mut self, ports: &BTreeMap<u16, bool>) -> Result<(), EngineError>;

    /// Which devices are watched.
    fn watched(&self) -> Vec<&Watch>;

    /// The watched device with this index.
    fn device(&self, ifindex: u32) -> Option<&Watch> {
        self.watched().into_iter().find(|watch| watch.ifindex == ifindex)
    }

    /// Watches a device, its counters starting at zero; how, as `attached` names it.
    fn attach(&mut self, watch: &Watch) -> Result<&'static str, EngineError>;

    /// Takes up what changed about a device that stays watched: its name, what lies on it.
    fn update(&mut self, watch: &Watch) -> Result<(), EngineError>;

    /// Stops watching a device, and gives its counters.
    fn detach(&mut self, ifindex: u32) -> Result<Counters, EngineError>;

    /// A watched device's counters.
    fn counters(&self, ifindex: u32) -> Result<Counters, EngineError>;

    /// Devices that somebody else stopped from being watched, to be detached and attached again.
    fn unhooked(&self) -> Vec<Watch>;

    /// Tells whose good packets are waited for: those of connections with bad ones come as events too. An engine that has
    /// no way to do so does nothing.
    fn follow(&mut self, _awaiting: &Awaiting) -> Result<(), EngineError> {
        Ok(())
    }

    /// Run times and numbers of runs of its programs by name, where the kernel counts them.
    fn run_stats(&self) -> Vec<(String, Duration, u64)> {
        Vec::new()
    }

    /// Hands the engine's own log lines, if any were asked for, to this process's log. Called each second.
    fn flush_log(&mut self) {}
}
