//! What is kept of each device's packets, watched or no longer: for the summary, and by device name for the metrics. It
//! only adds up; the counters themselves are the kernel program's. What it keeps is bounded, however many devices come
//! and go.

use std::collections::{BTreeMap, BTreeSet};

use vxmon_common::{
    counters::Counters,
    judge::{Reason, Verdict},
};

use crate::{
    devices::Watch,
    event::{Anomalies, DeviceSummary, LostByStage, Packets},
};

/// Devices whose accounts are kept apart.
const MAX_ACCOUNTS: usize = 256;
/// Device names that are told apart once their accounts are closed, and in metrics.
const MAX_NAMES: usize = 128;
/// Stands for all further names.
const OTHER_NAMES: &str = "(other devices)";

/// What is kept of one device, by index: a device made anew has another account.
#[derive(Debug)]
pub struct Account {
    /// Its name.
    pub dev: String,
    /// `uplink` or `vxlan`.
    pub role: &'static str,
    /// Of the times it was watched before; what it counts now is in the kernel.
    pub counters: Counters,
    /// Anomalies reported by a line.
    pub reported: u64,
    /// Anomalies that the kernel program counted under one verdict and that turned out to be of another.
    renamed: BTreeMap<(Verdict, Verdict), u64>,
}

impl Account {
    /// Notes that so many packets counted under one verdict are of another.
    pub fn rename(&mut self, from: Verdict, to: Verdict, packets: u64) {
        *self.renamed.entry((from, to)).or_default() += packets;
    }

    /// The account as the summary shows it, with what the kernel program has counted since the device was attached to.
    #[must_use]
    pub fn packets(&self, running: &Counters) -> Packets {
        let mut counters = self.counters;
        counters.add(running);
        let mut verdicts: BTreeMap<&'static str, u64> =
            Verdict::ALL.iter().zip(counters.verdicts).map(|(verdict, n)| (verdict.name(), n)).collect();
        for ((from, to), n) in &self.renamed {
            let moved = (*n).min(verdicts.get(from.name()).copied().unwrap_or(0));
            *verdicts.entry(from.name()).or_default() -= moved;
            *verdicts.entry(to.name()).or_default() += moved;
        }
        Packets {
            seen: counters.seen(),
            other: counters.other,
            counted_above: counters.counted_above,
            verdicts,
            unverified: Reason::ALL.iter().zip(counters.unverified).map(|(reason, n)| (reason.name(), n)).collect(),
            anomalies: Anomalies { reported: self.reported, suppressed: counters.suppressed },
            lost: LostByStage {
                ring: counters.lost_ring,
                // Also what was sent and never read, because enough was seen.
                queue: counters.sent.saturating_sub(self.reported),
                capture: counters.lost_capture,
            },
        }
    }
}

/// The accounts of all devices.
#[derive(Debug, Default)]
pub struct Accounts {
    /// By interface index.
    open: BTreeMap<u32, Account>,
    /// By name and role: the devices whose accounts were closed.
    closed: BTreeMap<(String, &'static str), Packets>,
    /// The names that are told apart. It only grows, so that a name's numbers never change places.
    names: BTreeSet<String>,
}

impl Accounts {
    /// The account of a device, opened if there is none; `watch` is the device if it is watched.
    pub fn of(&mut self, ifindex: u32, watch: Option<&Watch>) -> &mut Account {
        self.open.entry(ifindex).or_insert_with(|| Account {
            dev: watch.map_or_else(|| format!("if{ifindex}"), |watch| watch.name.clone()),
            role: watch.map_or("uplink", |watch| watch.role.as_str()),
            counters: Counters::default(),
            reported: 0,
            renamed: BTreeMap::new(),
        })
    }

    /// A device's name, if it has an account.
    #[must_use]
    pub fn name(&self, ifindex: u32) -> Option<&str> {
        self.open.get(&ifindex).map(|account| account.dev.as_str())
    }

    /// Closes the accounts of devices that are gone where a great many came and went.
    pub fn close_gone(&mut self, is_watched: impl Fn(u32) -> bool) {
        while self.open.len() > MAX_ACCOUNTS {
            let gone = self.open.keys().copied().find(|ifindex| !is_watched(*ifindex));
            let Some(account) = gone.and_then(|ifindex| self.open.remove(&ifindex)) else {
                return;
            };
            let name = self.label(&account.dev);
            add(self.closed.entry((name, account.role)).or_default(), &account.packets(&Counters::default()));
        }
    }

    /// What was lost on the way to the daemon (its own queue aside), but for what was counted since attaching.
    #[must_use]
    pub fn lost(&self) -> LostByStage {
        let mut lost = LostByStage::default();
        for packets in self.closed.values() {
            lost.ring += packets.lost.ring;
            lost.capture += packets.lost.capture;
        }
        for account in self.open.values() {
            lost.ring += account.counters.lost_ring;
            lost.capture += account.counters.lost_capture;
        }
        lost
    }

    /// Packets by name and role, for metrics; `running` is what the kernel program has counted since attaching.
    pub fn by_name(&mut self, running: impl Fn(u32) -> Counters) -> BTreeMap<(String, &'static str), Packets> {
        let mut all = self.closed.clone();
        let open = std::mem::take(&mut self.open);
        for (ifindex, account) in &open {
            let name = self.label(&account.dev);
            add(all.entry((name, account.role)).or_default(), &account.packets(&running(*ifindex)));
        }
        self.open = open;
        all
    }

    /// The devices for the summary, closed accounts by role first; their kernel counters have been added before.
    pub fn devices(&self) -> Vec<DeviceSummary> {
        let mut earlier: BTreeMap<&'static str, Packets> = BTreeMap::new();
        for ((_, role), packets) in &self.closed {
            add(earlier.entry(role).or_default(), packets);
        }
        let earlier = earlier.into_iter().map(|(role, packets)| ("(earlier devices)", 0, role, packets));
        let open = self
            .open
            .iter()
            .map(|(ifindex, account)| (&*account.dev, *ifindex, account.role, account.packets(&Counters::default())));
        earlier
            .chain(open)
            .map(|(dev, ifindex, role, packets)| DeviceSummary { dev: dev.to_owned(), ifindex, role, packets })
            .collect()
    }

    /// The name, or what stands for it where too many came before.
    fn label(&mut self, name: &str) -> String {
        if self.names.len() < MAX_NAMES {
            self.names.insert(name.to_owned());
        }
        if self.names.contains(name) { name.to_owned() } else { OTHER_NAMES.to_owned() }
    }
}

/// Adds a device's packets to a sum.
pub fn add(total: &mut Packets, packets: &Packets) {
    total.seen += packets.seen;
    total.other += packets.other;
    total.counted_above += packets.counted_above;
    for (name, n) in &packets.verdicts {
        *total.verdicts.entry(name).or_default() += n;
    }
    for (name, n) in &packets.unverified {
        *total.unverified.entry(name).or_default() += n;
    }
    total.anomalies.reported += packets.anomalies.reported;
    total.anomalies.suppressed += packets.anomalies.suppressed;
    total.lost.ring += packets.lost.ring;
    total.lost.queue += packets.lost.queue;
    total.lost.capture += packets.lost.capture;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(valid: u64, sent: u64) -> Counters {
        let mut counters = Counters { sent, ..Counters::default() };
        let verdicts = Verdict::ALL.iter().zip(&mut counters.verdicts);
        for (verdict, n) in verdicts {
            match verdict.name() {
                "valid" => *n = valid,
                "bad-outer" => *n = sent,
                _ => {}
            }
        }
        counters
    }

    #[test]
    fn a_thousand_devices_lose_nothing_and_are_bounded() {
        let mut accounts = Accounts::default();
        for ifindex in 1..=1000 {
            let account = accounts.of(ifindex, None);
            account.counters.add(&counters(2, 1));
            account.reported += 1;
            accounts.close_gone(|watched| watched == ifindex);
        }
        let devices = accounts.devices();
        assert_eq!(devices.len(), MAX_ACCOUNTS + 1);
        assert_eq!(devices.iter().map(|device| device.packets.seen).sum::<u64>(), 3000);
        assert_eq!(devices.iter().map(|device| device.packets.anomalies.reported).sum::<u64>(), 1000);
        let names = accounts.by_name(|_| Counters::default());
        assert!(names.len() <= MAX_NAMES + 1, "{}", names.len());
        assert_eq!(names.values().map(|packets| packets.verdicts["bad-outer"]).sum::<u64>(), 1000);
        assert!(names.contains_key(&(OTHER_NAMES.to_owned(), "uplink")));
    }

    #[test]
    fn a_device_made_anew_goes_on_under_its_name() {
        let mut accounts = Accounts::default();
        for ifindex in [5, 6] {
            let account = accounts.of(ifindex, None);
            "flannel.1".clone_into(&mut account.dev);
            account.counters.add(&counters(10, 0));
        }
        let names = accounts.by_name(|ifindex| if ifindex == 6 { counters(1, 0) } else { Counters::default() });
        assert_eq!(names.len(), 1);
        assert_eq!(names[&("flannel.1".to_owned(), "uplink")].verdicts["valid"], 21);
        assert_eq!(accounts.devices().len(), 2);
    }

    #[test]
    fn what_was_named_anew_moves() {
        let mut accounts = Accounts::default();
        let account = accounts.of(1, None);
        account.counters.add(&counters(0, 3));
        account.rename(Verdict::BadOuter, Verdict::NatStalePort, 2);
        let packets = account.packets(&Counters::default());
        assert_eq!((packets.verdicts["bad-outer"], packets.verdicts["nat-stale-port"]), (1, 2));
    }
}
