//! What goes wrong, and when: a pure function of a seed.

use std::{collections::BTreeSet, fmt, time::Duration};

use rand::Rng;

use crate::rng::{self, TestRng};

/// What the cluster of a schedule looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Data servers, each with one disk.
    pub servers: usize,
    /// Redundancy.
    pub policy: &'static str,
    /// A disk that lies, beside one other server in trouble at a time: the policy covers both.
    pub liar: Option<usize>,
    /// Servers of a rack, which is a failure domain.
    pub rack: usize,
    /// So many servers may be in trouble at a time, beside the liar.
    pub troubled_max: usize,
}

impl Shape {
    /// The servers of a rack.
    pub fn rack_of(self, server: usize) -> std::ops::Range<usize> {
        let first = server / self.rack * self.rack;
        first..(first + self.rack).min(self.servers)
    }

    /// `--domain` of each server; none where each is a rack of its own.
    pub fn domains(self) -> Vec<String> {
        match self.rack {
            1 => Vec::new(),
            rack => (0..self.servers).map(|n| format!("rack=r{},host=h{n}", n / rack)).collect(),
        }
    }
}

/// Something that goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// kill -9; started again at the end.
    KillMeta,
    /// kill -9; started again at the end.
    KillData(usize),
    /// kill -9; mounted again at the end.
    KillClient(usize),
    /// SIGSTOP, SIGCONT at the end.
    PauseMeta,
    /// SIGSTOP, SIGCONT at the end.
    PauseData(usize),
    /// SIGSTOP, SIGCONT at the end.
    PauseClient(usize),
    /// Nothing reaches the host of a server, and nothing comes from it.
    CutData(usize),
    /// What the host of a server sends is lost; what is sent to it arrives.
    MuteData(usize),
    /// What is sent to the host of a server is lost; what it sends arrives.
    DeafData(usize),
    /// A server and the metaserver do not reach each other; clients reach both.
    CutDataFromMeta(usize),
    /// A client does not reach one server.
    CutClientFromData(usize, usize),
    /// A client and the metaserver do not reach each other.
    CutClientFromMeta(usize),
    /// What a client sends to the metaserver arrives; answers do not.
    DeafClient(usize),
    /// Packets of a server's host arrive late.
    DelayData(usize),
    /// Packets of the metaserver's host arrive late.
    DelayMeta,
    /// Some packets of a server's host are lost.
    LossyData(usize),
    /// Some packets of a client's host are lost.
    LossyClient(usize),
    /// The disk of a server answers EIO; the server is started again at the end.
    DiskErrors(usize),
    /// The disk of a server has no room.
    DiskFull(usize),
    /// The disk of a server takes its time.
    DiskSlow(usize),
    /// The disk of a server returns wrong bits at times.
    DiskFlips(usize),
    /// The disk of a server forgets writes at times.
    DiskLoses(usize),
    /// The disk of a server writes in part at times.
    DiskTears(usize),
    /// Some stored bits have changed for good.
    DiskRots(usize),
    /// The disk of the metaserver takes its time.
    MetaDiskSlow,
    /// The disk of the metaserver answers EIO; it is started again at the end.
    MetaDiskErrors,
    /// A server loses its power and what its disk had not synced.
    PowerOutData(usize),
    /// All servers lose their power at once, the metaserver too.
    PowerOutAll,
    /// kill -9 of all servers of the rack of this one; started again at the end.
    KillRack(usize),
    /// Nothing reaches the rack of this server, and nothing comes from it.
    CutRack(usize),
    /// The rack of this server loses its power and what its disks had not synced.
    PowerOutRack(usize),
}

/// Who is in trouble.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Subject {
    Meta,
    Data(usize),
    Client(usize),
}

impl Fault {
    fn subjects(self, shape: Shape) -> BTreeSet<Subject> {
        use Subject::*;
        match self {
            Fault::KillMeta
            | Fault::PauseMeta
            | Fault::DelayMeta
            | Fault::MetaDiskSlow
            | Fault::MetaDiskErrors => [Meta].into(),
            Fault::KillData(n)
            | Fault::PauseData(n)
            | Fault::CutData(n)
            | Fault::MuteData(n)
            | Fault::DeafData(n)
            | Fault::CutDataFromMeta(n)
            | Fault::DelayData(n)
            | Fault::LossyData(n)
            | Fault::DiskErrors(n)
            | Fault::DiskFull(n)
            | Fault::DiskSlow(n)
            | Fault::DiskFlips(n)
            | Fault::DiskLoses(n)
            | Fault::DiskTears(n)
            | Fault::DiskRots(n)
            | Fault::PowerOutData(n) => [Data(n)].into(),
            Fault::KillClient(n)
            | Fault::PauseClient(n)
            | Fault::CutClientFromMeta(n)
            | Fault::DeafClient(n)
            | Fault::LossyClient(n) => [Client(n)].into(),
            Fault::CutClientFromData(client, server) => [Client(client), Data(server)].into(),
            Fault::PowerOutAll => (0..shape.servers).map(Data).chain([Meta]).collect(),
            Fault::KillRack(n) | Fault::CutRack(n) | Fault::PowerOutRack(n) => {
                shape.rack_of(n).map(Data).collect()
            }
        }
    }

    /// The name without numbers.
    pub fn kind(self) -> String {
        let all = format!("{self:?}");
        all.split('(').next().unwrap_or(&all).to_owned()
    }
}

/// A fault, from when to when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// After the beginning.
    pub at: Duration,
    /// What.
    pub fault: Fault,
    /// For how long.
    pub lasts: Duration,
}

impl Step {
    fn end(&self) -> Duration {
        self.at + self.lasts
    }
}

/// All of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Of the cluster.
    pub shape: Shape,
    /// In the order of their beginnings.
    pub steps: Vec<Step>,
}

/// Faults of a schedule.
const STEPS: usize = 12;

/// Clients, as in the parent.
const CLIENTS: usize = super::CLIENTS;

impl Schedule {
    /// The schedule of a seed.
    pub fn new(seed: u64) -> Schedule {
        let mut rng = rng::stream(seed, 0x5c4ed);
        let shape = if rng.random() {
            Shape { servers: 5, policy: "ec:2+1", liar: None, rack: 1, troubled_max: 2 }
        } else {
            let liar = Some(rng.random_range(0..6));
            Shape { servers: 6, policy: "ec:2+2", liar, rack: 1, troubled_max: 1 }
        };
        Schedule::of(shape, &mut rng)
    }

    /// A schedule for racks of servers that fail together. Of a block's six shards no rack has more than two, so that one rack, or
    /// any two targets, are as many as may be lost.
    pub fn of_racks(seed: u64) -> Schedule {
        let shape = Shape { servers: 8, policy: "ec:4+2", liar: None, rack: 2, troubled_max: 2 };
        Schedule::of(shape, &mut rng::stream(seed, 0x5c4ed))
    }

    fn of(shape: Shape, rng: &mut TestRng) -> Schedule {
        let mut steps: Vec<Step> = Vec::new();
        let mut at = Duration::from_millis(500);
        while steps.len() < STEPS {
            let fault = draw(rng, shape);
            let millis = match fault {
                // Longer than a lease; at times longer than a session.
                Fault::PauseClient(_) | Fault::CutClientFromMeta(_) | Fault::DeafClient(_) => {
                    rng.random_range(500..11_000)
                }
                Fault::DiskRots(_) => 0,
                _ => rng.random_range(300..5000),
            };
            let step = Step { at, fault, lasts: Duration::from_millis(millis) };
            if admits(&steps, &step, shape) {
                steps.push(step);
            }
            at += Duration::from_millis(rng.random_range(100..2500));
        }
        Schedule { shape, steps }
    }

    /// Whether more targets lose what was not synced than the policy covers.
    pub fn forgets(&self) -> bool {
        // Of one after the other, the second may come before what the first has lost is restored.
        let lost = |step: &Step| match step.fault {
            Fault::PowerOutAll => self.shape.servers,
            Fault::PowerOutRack(n) => self.shape.rack_of(n).len(),
            Fault::PowerOutData(_) if self.shape.rack > 1 => 1,
            _ => 0,
        };
        self.steps.iter().map(lost).sum::<usize>() > 2
    }
}

/// Whether a fault can be added: nobody is in two kinds of trouble at once, and at most two servers, the liar included, are.
fn admits(steps: &[Step], step: &Step, shape: Shape) -> bool {
    let subjects = step.fault.subjects(shape);
    // Some time to come back is part of the trouble.
    let meanwhile = || steps.iter().filter(|other| other.end() + Duration::from_millis(1500) > step.at);
    let in_trouble: BTreeSet<Subject> = meanwhile().flat_map(|other| other.fault.subjects(shape)).collect();
    if !subjects.is_disjoint(&in_trouble) {
        return false;
    }
    let liar = shape.liar.map(Subject::Data);
    let servers: BTreeSet<Subject> = (in_trouble.union(&subjects).copied())
        .filter(|subject| matches!(subject, Subject::Data(_)) && Some(*subject) != liar)
        .collect();
    step.fault == Fault::PowerOutAll || servers.len() <= shape.troubled_max
}

fn draw(rng: &mut TestRng, shape: Shape) -> Fault {
    let server = rng.random_range(0..shape.servers);
    let client = rng.random_range(0..CLIENTS);
    if let Some(liar) = shape.liar
        && rng.random_ratio(1, 3)
    {
        return match rng.random_range(0..4) {
            0 => Fault::DiskFlips(liar),
            1 => Fault::DiskLoses(liar),
            2 => Fault::DiskTears(liar),
            _ => Fault::DiskRots(liar),
        };
    }
    if shape.rack > 1 && rng.random_ratio(1, 3) {
        return match rng.random_range(0..3) {
            0 => Fault::KillRack(server),
            1 => Fault::CutRack(server),
            _ => Fault::PowerOutRack(server),
        };
    }
    match rng.random_range(0..27) {
        0 | 1 => Fault::KillMeta,
        2 | 3 => Fault::KillData(server),
        4 | 5 => Fault::KillClient(client),
        6 => Fault::PauseMeta,
        7 => Fault::PauseData(server),
        8 => Fault::PauseClient(client),
        9 => Fault::CutData(server),
        10 => Fault::MuteData(server),
        11 => Fault::DeafData(server),
        12 => Fault::CutDataFromMeta(server),
        13 => Fault::CutClientFromData(client, server),
        14 => Fault::CutClientFromMeta(client),
        15 => Fault::DeafClient(client),
        16 => Fault::DelayData(server),
        17 => Fault::DelayMeta,
        18 => Fault::LossyData(server),
        19 => Fault::LossyClient(client),
        20 => Fault::DiskErrors(server),
        21 => Fault::DiskFull(server),
        22 => Fault::DiskSlow(server),
        23 => Fault::MetaDiskSlow,
        24 => Fault::MetaDiskErrors,
        25 => Fault::PowerOutData(server),
        _ => Fault::PowerOutAll,
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.shape)?;
        for Step { at, fault, lasts } in &self.steps {
            writeln!(f, "{:7.3} s  {fault:?} for {:.3} s", at.as_secs_f64(), lasts.as_secs_f64())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_follows_from_its_seed_and_spares_enough_servers() {
        let mut kinds = BTreeSet::new();
        for (seed, schedule) in
            (0..400).flat_map(|seed| [(seed, Schedule::new(seed)), (seed, Schedule::of_racks(seed))])
        {
            assert!([Schedule::new(seed), Schedule::of_racks(seed)].contains(&schedule));
            assert!(schedule.steps.is_sorted_by_key(|step| step.at));
            for step in &schedule.steps {
                kinds.insert(step.fault.kind());
                let servers: BTreeSet<Subject> = (schedule.steps.iter())
                    .filter(|other| other.at <= step.at && step.at < other.end())
                    .filter(|other| other.fault != Fault::PowerOutAll)
                    .flat_map(|other| other.fault.subjects(schedule.shape))
                    .filter(|subject| matches!(subject, Subject::Data(_)))
                    .collect();
                assert!(servers.len() <= 2, "seed {seed} at {:?}: {servers:?}", step.at);
            }
        }
        assert_eq!(kinds.len(), 31, "{kinds:?}");
        let racks = Schedule::of_racks(1).shape;
        assert_eq!((racks.rack_of(5), racks.domains()[5].as_str()), (4..6, "rack=r2,host=h5"));
    }
}
