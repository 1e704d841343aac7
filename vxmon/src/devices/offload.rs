//! Watches the checksum offload of VXLAN devices: without it NAT breaks no checksum, and what turned it off once is undone
//! when a CNI agent makes its device anew. It only compares; reading is [`crate::ethtool`]'s.

use std::collections::{BTreeMap, BTreeSet};

use super::VxlanDevice;
use crate::{ethtool::Features, event::Offload};

/// The feature, as ethtool names it.
pub const FEATURE: &str = "tx-checksum-ip-generic";
/// Names of devices that are gone, and yet remembered.
const REMEMBERED: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    ifindex: u32,
    on: bool,
    present: bool,
}

/// What is known of the offload, by device name.
#[derive(Debug, Default)]
pub struct Offloads {
    features: Option<Features>,
    known: BTreeMap<String, Known>,
    /// What could not be read was said.
    told: bool,
}

impl Offloads {
    /// Looks at the VXLAN devices; what has changed since the last look, time and node left empty. `removed`: devices that
    /// were deleted since, one of the same index may be another one.
    pub fn look(&mut self, vxlans: &[VxlanDevice], removed: &BTreeSet<u32>) -> Vec<Offload> {
        if vxlans.is_empty() && self.known.is_empty() {
            return Vec::new();
        }
        let mut features = match self.features.take().map_or_else(|| Features::open(FEATURE), Ok) {
            Ok(features) => features,
            Err(error) => {
                self.tell(&error);
                return Vec::new();
            }
        };
        let mut read = Vec::new();
        for VxlanDevice { name, ifindex, .. } in vxlans {
            match features.is_on(name) {
                Ok(on) => read.push((name.as_str(), *ifindex, on)),
                Err(error) => self.tell(&error),
            }
        }
        self.features = Some(features);
        self.compare(&read, removed)
    }

    /// The devices that are there, and whether the offload is on.
    pub fn current(&self) -> impl Iterator<Item = (&str, bool)> {
        self.known.iter().filter(|(_, known)| known.present).map(|(name, known)| (name.as_str(), known.on))
    }

    fn tell(&mut self, error: &crate::ethtool::EthtoolError) {
        let level = if self.told { log::Level::Debug } else { log::Level::Info };
        log::log!(level, "the offload is not watched: {error}");
        self.told = true;
    }

    fn compare(&mut self, read: &[(&str, u32, bool)], removed: &BTreeSet<u32>) -> Vec<Offload> {
        for known in self.known.values_mut() {
            known.present = false;
        }
        let mut changes = Vec::new();
        for &(name, ifindex, on) in read {
            let new = Known { ifindex, on, present: true };
            let Some(old) = self.known.insert(name.to_owned(), new) else { continue };
            let recreated = old.ifindex != ifindex || removed.contains(&ifindex);
            if old.on != on || (recreated && on) {
                changes.push(Offload {
                    ts: String::new(),
                    node: String::new(),
                    dev: name.to_owned(),
                    ifindex,
                    feature: FEATURE,
                    state: state(on),
                    was: state(old.on),
                    why: if recreated { "recreated" } else { "switched" },
                });
            }
        }
        while self.known.len() > REMEMBERED {
            let gone = self.known.iter().find(|(_, known)| !known.present).map(|(name, _)| name.clone());
            let Some(gone) = gone else { break };
            self.known.remove(&gone);
        }
        changes
    }
}

fn state(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(changes: &[Offload]) -> Vec<(&str, &'static str, &'static str, &'static str)> {
        changes.iter().map(|change| (change.dev.as_str(), change.was, change.state, change.why)).collect()
    }

    #[test]
    fn switched_and_recreated_are_told_apart() {
        let (mut offloads, none) = (Offloads::default(), BTreeSet::new());
        assert_eq!(told(&offloads.compare(&[("v", 5, true)], &none)), []);
        assert_eq!(told(&offloads.compare(&[("v", 5, true)], &none)), []);
        assert_eq!(told(&offloads.compare(&[("v", 5, false)], &none)), [("v", "on", "off", "switched")]);
        // Made anew, with a look in between, without one, and under the same index.
        assert_eq!(told(&offloads.compare(&[], &none)), []);
        assert_eq!(offloads.current().count(), 0);
        assert_eq!(told(&offloads.compare(&[("v", 6, true)], &none)), [("v", "off", "on", "recreated")]);
        assert_eq!(told(&offloads.compare(&[("v", 7, true)], &none)), [("v", "on", "on", "recreated")]);
        assert_eq!(told(&offloads.compare(&[("v", 7, true)], &[7].into())), [("v", "on", "on", "recreated")]);
        assert_eq!(told(&offloads.compare(&[("v", 8, false)], &none)), [("v", "on", "off", "recreated")]);
        // Off before and after: nothing is worth a word.
        assert_eq!(told(&offloads.compare(&[("v", 9, false)], &none)), []);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut offloads = Offloads::default();
        for ifindex in 1..2000 {
            let name = format!("v{ifindex}");
            offloads.compare(&[(&name, ifindex, true)], &BTreeSet::new());
        }
        assert!(offloads.known.len() <= REMEMBERED);
        assert_eq!(offloads.current().collect::<Vec<_>>(), [("v1999", true)]);
    }
}
