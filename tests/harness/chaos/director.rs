//! Plays a schedule: begins and ends faults on real processes, links and disks.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::schedule::{Fault, Schedule, Shape, Step};
use crate::{
    Cluster, MountPoint, Network, Setup,
    disk::{FaultyDisk, Trouble},
    network::HostNo,
    rng,
};

/// How late a delayed packet is.
const DELAY: Duration = Duration::from_millis(60);
/// How many of 1,000 packets a lossy link loses.
const LOSS_PER_MILLE: u32 = 50;
/// How long a slow disk takes.
const SLOW: Duration = Duration::from_millis(120);

/// A client's mount; `None` while it is dead.
struct Client {
    dir: PathBuf,
    options: String,
    mount: Option<MountPoint>,
}

/// The cluster and everything that can go wrong with it. Dropped from the first field on: disks go last.
pub(super) struct Director {
    clients: Vec<Client>,
    pub(super) cluster: Cluster,
    pub(super) network: Arc<Network>,
    pub(super) faults: BTreeMap<String, u64>,
    shape: Shape,
    disks: Vec<FaultyDisk>,
    meta_disk: FaultyDisk,
    /// The metaserver's disk answers EIO: it takes no new sessions until it is started again.
    meta_fails: bool,
}

impl Director {
    pub(super) fn new(
        cluster: Cluster,
        network: Arc<Network>,
        disks: Vec<FaultyDisk>,
        meta_disk: FaultyDisk,
        shape: Shape,
    ) -> Director {
        Director {
            clients: Vec::new(),
            cluster,
            network,
            faults: BTreeMap::new(),
            shape,
            disks,
            meta_disk,
            meta_fails: false,
        }
    }

    /// Mounts a client for the first time.
    pub(super) fn mount(&mut self, client: usize, options: &str) {
        let dir = self.cluster.dir(&format!("client{client}"));
        self.clients.push(Client { dir, options: options.to_owned(), mount: None });
        self.mount_again(client);
    }

    pub(super) fn client_dir(&self, client: usize) -> PathBuf {
        self.clients[client].dir.clone()
    }

    pub(super) fn disk_hits(&self) -> u64 {
        self.disks.iter().chain([&self.meta_disk]).map(FaultyDisk::hits).sum()
    }

    fn mount_again(&mut self, client: usize) {
        let Client { dir, options, .. } = &self.clients[client];
        let command = self.cluster.mount_command(client, dir, options);
        let mount = MountPoint::of(command, dir, self.cluster.folder());
        self.clients[client].mount = Some(mount);
    }

    /// Unmounts all clients; what they have not written yet they write now.
    pub(super) fn unmount_clients(&mut self) {
        for client in &mut self.clients {
            if let Some(mount) = client.mount.take() {
                mount.unmount_after_trouble();
            }
        }
    }

    /// Begins and ends every fault in its time. In the end nothing is wrong any more, and everything runs.
    pub(super) fn play(&mut self, schedule: &Schedule) {
        let began = Instant::now();
        // What is to be done next: when, whether it ends, which step.
        let mut events: Vec<(Duration, bool, usize)> = Vec::new();
        for (n, step) in schedule.steps.iter().enumerate() {
            events.push((step.at, false, n));
            events.push((step.at + step.lasts, true, n));
        }
        events.sort();
        for (when, ends, n) in events {
            thread::sleep(when.saturating_sub(began.elapsed()));
            let Step { fault, .. } = schedule.steps[n];
            let now = began.elapsed().as_secs_f64();
            eprintln!("chaos: {now:7.3} s {} {fault:?}", if ends { "ends  " } else { "begins" });
            if ends {
                self.end(fault);
            } else {
                *self.faults.entry(fault.kind()).or_default() += 1;
                self.begin(fault, n as u64);
            }
        }
        self.network.mend();
        for disk in self.disks.iter().chain([&self.meta_disk]) {
            disk.set(Trouble::None);
        }
        // A mount needs all of these, so the dead clients come last.
        for client in 0..self.clients.len() {
            if self.clients[client].mount.is_none() {
                self.mount_again(client);
            }
        }
    }

    fn begin(&mut self, fault: Fault, purpose: u64) {
        match fault {
            Fault::KillMeta => self.cluster.kill_meta(),
            Fault::KillData(n) => self.cluster.kill_data(n),
            Fault::KillClient(n) => drop(self.clients[n].mount.take()),
            Fault::PauseMeta => self.cluster.meta().signal(Signal::STOP),
            Fault::PauseData(n) => self.cluster.data(n).signal(Signal::STOP),
            Fault::PauseClient(n) => self.signal_client(n, Signal::STOP),
            Fault::DelayData(n) => self.network.delay(Setup::data_host(n), DELAY),
            Fault::DelayMeta => self.network.delay(Setup::META_HOST, DELAY),
            Fault::LossyData(n) => self.network.lose(Setup::data_host(n), LOSS_PER_MILLE),
            Fault::LossyClient(n) => self.network.lose(self.cluster.client_host(n), LOSS_PER_MILLE),
            Fault::DiskErrors(n) => self.disks[n].set(Trouble::Errors),
            Fault::DiskFull(n) => self.disks[n].set(Trouble::Full),
            Fault::DiskSlow(n) => self.disks[n].set(Trouble::Slow(SLOW)),
            Fault::DiskFlips(n) => self.disks[n].set(Trouble::Flips),
            Fault::DiskLoses(n) => self.disks[n].set(Trouble::Loses),
            Fault::DiskTears(n) => self.disks[n].set(Trouble::Tears),
            Fault::DiskRots(n) => {
                let changed = super::rot(self.disks[n].backing(), &mut rng::stream(purpose, 0x207));
                eprintln!("chaos: {changed} places have rotted");
            }
            Fault::MetaDiskSlow => self.meta_disk.set(Trouble::Slow(SLOW)),
            Fault::MetaDiskErrors => {
                self.meta_disk.set(Trouble::Errors);
                self.meta_fails = true;
            }
            Fault::PowerOutData(n) => {
                self.cluster.kill_data(n);
                let taken = self.disks[n].cut_power();
                eprintln!("chaos: {taken} bytes were not synced");
            }
            Fault::PowerOutAll => {
                for n in 0..self.disks.len() {
                    self.cluster.kill_data(n);
                }
                self.cluster.kill_meta();
                let taken: u64 = self.disks.iter().map(FaultyDisk::cut_power).sum();
                let of_meta = self.meta_disk.cut_power();
                eprintln!("chaos: {taken} bytes of shards and {of_meta} of metadata were not synced");
            }
            Fault::KillRack(n) => self.shape.rack_of(n).for_each(|n| self.cluster.kill_data(n)),
            Fault::PowerOutRack(n) => {
                let rack = self.shape.rack_of(n);
                rack.clone().for_each(|n| self.cluster.kill_data(n));
                let taken: u64 = rack.map(|n| self.disks[n].cut_power()).sum();
                eprintln!("chaos: {taken} bytes were not synced");
            }
            Fault::CutData(_)
            | Fault::CutRack(_)
            | Fault::MuteData(_)
            | Fault::DeafData(_)
            | Fault::CutDataFromMeta(_)
            | Fault::CutClientFromData(..)
            | Fault::CutClientFromMeta(_)
            | Fault::DeafClient(_) => {
                for (from, to) in self.links(fault) {
                    self.network.cut(from, to);
                }
            }
        }
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            Fault::KillMeta => self.cluster.start_meta(),
            Fault::KillData(n) | Fault::PowerOutData(n) => self.cluster.start_data(n),
            Fault::KillClient(n) => self.revive_client(n),
            Fault::PauseMeta => self.cluster.meta().signal(Signal::CONT),
            Fault::PauseData(n) => self.cluster.data(n).signal(Signal::CONT),
            Fault::PauseClient(n) => self.signal_client(n, Signal::CONT),
            Fault::DelayData(n) => self.network.delay(Setup::data_host(n), Duration::ZERO),
            Fault::DelayMeta => self.network.delay(Setup::META_HOST, Duration::ZERO),
            Fault::LossyData(n) => self.network.lose(Setup::data_host(n), 0),
            Fault::LossyClient(n) => self.network.lose(self.cluster.client_host(n), 0),
            // A device that has failed is looked at again when its server starts.
            Fault::DiskErrors(n) => {
                self.disks[n].set(Trouble::None);
                self.cluster.kill_data(n);
                self.cluster.start_data(n);
            }
            Fault::DiskFull(n)
            | Fault::DiskSlow(n)
            | Fault::DiskFlips(n)
            | Fault::DiskLoses(n)
            | Fault::DiskTears(n) => self.disks[n].set(Trouble::None),
            Fault::DiskRots(_) => {}
            Fault::MetaDiskSlow => self.meta_disk.set(Trouble::None),
            Fault::MetaDiskErrors => {
                self.meta_disk.set(Trouble::None);
                self.cluster.kill_meta();
                self.cluster.start_meta();
                self.meta_fails = false;
            }
            Fault::PowerOutAll => {
                self.cluster.start_meta();
                for n in 0..self.disks.len() {
                    self.cluster.start_data(n);
                }
            }
            Fault::KillRack(n) | Fault::PowerOutRack(n) => {
                self.shape.rack_of(n).for_each(|n| self.cluster.start_data(n));
            }
            Fault::CutData(_)
            | Fault::CutRack(_)
            | Fault::MuteData(_)
            | Fault::DeafData(_)
            | Fault::CutDataFromMeta(_)
            | Fault::CutClientFromData(..)
            | Fault::CutClientFromMeta(_)
            | Fault::DeafClient(_) => {
                for (from, to) in self.links(fault) {
                    self.network.join(from, to);
                }
            }
        }
    }

    /// A client that the metaserver cannot serve now is mounted at the end of the schedule.
    fn revive_client(&mut self, client: usize) {
        if !self.meta_fails && self.cluster.try_status().is_ok() {
            self.mount_again(client);
        }
    }

    fn signal_client(&mut self, client: usize, signal: Signal) {
        if let Some(mount) = &mut self.clients[client].mount {
            mount.process().signal(signal);
        }
    }

    /// Which directions a partition cuts.
    fn links(&self, fault: Fault) -> Vec<(HostNo, HostNo)> {
        let others = |host: HostNo| (0..self.network.hosts()).filter(move |other| *other != host);
        let both = |a: HostNo, b: HostNo| vec![(a, b), (b, a)];
        let data = Setup::data_host;
        let meta = Setup::META_HOST;
        match fault {
            Fault::CutData(n) => others(data(n)).flat_map(|other| both(data(n), other)).collect(),
            Fault::CutRack(n) => {
                let rack: Vec<HostNo> = self.shape.rack_of(n).map(data).collect();
                let outside = (0..self.network.hosts()).filter(|host| !rack.contains(host));
                outside.flat_map(|other| rack.iter().flat_map(move |host| both(*host, other))).collect()
            }
            Fault::MuteData(n) => others(data(n)).map(|other| (data(n), other)).collect(),
            Fault::DeafData(n) => others(data(n)).map(|other| (other, data(n))).collect(),
            Fault::CutDataFromMeta(n) => both(data(n), meta),
            Fault::CutClientFromData(client, n) => both(self.cluster.client_host(client), data(n)),
            Fault::CutClientFromMeta(client) => both(self.cluster.client_host(client), meta),
            Fault::DeafClient(client) => vec![(meta, self.cluster.client_host(client))],
            _ => Vec::new(),
        }
    }
}
