//! Rounds, phases, and the threads that run them.

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    plan::{Part, Plan, noise},
    stats::{Figure, Figures, percentile},
    target::{Dice, FileOp, PIECE, Reads, Target},
    watch::{Stopped, Watch},
};

/// How often the progress of a phase of a given length is told.
const TICK: Duration = Duration::from_millis(50);

/// One thing that all threads do at a time.
#[derive(Clone, Debug)]
enum Phase {
    Write,
    Read,
    Random,
    Files(&'static str, FileOp),
}

struct Step {
    phase: Phase,
    /// `None`: only prepares others.
    figure: Option<Figure>,
}

/// The phases of a round in their order.
fn steps(plan: &Plan, small: &Bytes) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut step = |phase, figure| steps.push(Step { phase, figure });
    if plan.streams() {
        step(Phase::Write, plan.has(Part::Write).then_some(Figure::Write));
        if plan.has(Part::Read) {
            step(Phase::Read, Some(Figure::Read));
        }
        if plan.has(Part::Random) {
            step(Phase::Random, Some(Figure::Random));
        }
    }
    if plan.has(Part::Small) {
        let ops = [
            (FileOp::Create(small.clone()), Figure::SmallCreate),
            (FileOp::Read(small.len()), Figure::SmallRead),
            (FileOp::Stat, Figure::SmallStat),
            (FileOp::Delete, Figure::SmallDelete),
        ];
        ops.into_iter().for_each(|(op, figure)| step(Phase::Files("small", op), Some(figure)));
    }
    if plan.has(Part::Meta) {
        let ops = [
            (FileOp::Create(Bytes::new()), Figure::MetaCreate),
            (FileOp::Stat, Figure::MetaStat),
            (FileOp::Delete, Figure::MetaDelete),
        ];
        ops.into_iter().for_each(|(op, figure)| step(Phase::Files("meta", op), Some(figure)));
    }
    steps
}

/// Measures everything.
///
/// # Errors
/// The first thing that went wrong on any side.
pub(super) fn measure(plan: &Plan, targets: &[&dyn Target], watch: &Watch) -> anyhow::Result<Figures> {
    let runner = Runner { plan, watch, piece: noise(PIECE) };
    let steps = steps(plan, &noise(usize::try_from(plan.small_size)?));
    let mut figures = Figures::default();
    for target in targets {
        plan.check_space(*target)?;
        for thread in 0..plan.threads {
            for (part, dir) in [(Part::Small, "small"), (Part::Meta, "meta")] {
                if plan.has(part) {
                    target.make_dir(&format!("{dir}{thread}"))?;
                }
            }
        }
        if plan.streams() {
            target.make_dir("large")?;
        }
    }
    for round in 1..=plan.rounds {
        for step in &steps {
            for (side, target) in targets.iter().enumerate() {
                let what = step.figure.map_or("preparing", |figure| figure.title().trim());
                let what = format!("round {round} of {}, {}: {what}", plan.rounds, target.name());
                let measured = runner.run(&step.phase, *target, &what)?;
                let Some(figure) = step.figure else { continue };
                let mut told = Vec::new();
                for (figure, value) in measured.values(figure) {
                    figures.add(figure, side, value);
                    told.push(format!("{value:.0} {}", figure.unit()));
                }
                watch.end(&what, &told.join(", "));
            }
        }
        if plan.streams() {
            for target in targets {
                target.files(&FileOp::Delete, "large", 0..plan.threads, watch)?;
            }
        }
    }
    Ok(figures)
}

/// What a phase came to.
struct Measured {
    /// Bytes, or operations.
    amount: u64,
    time: Duration,
    latencies_us: Vec<u32>,
}

impl Measured {
    fn values(mut self, figure: Figure) -> Vec<(Figure, f64)> {
        let scale = if figure.unit() == "MiB/s" { (1u64 << 20) as f64 } else { 1.0 };
        let rate = self.amount as f64 / scale / self.time.as_secs_f64().max(1e-9);
        let mut values = vec![(figure, rate)];
        for (figure, share) in [(Figure::RandomP50, 0.5), (Figure::RandomP99, 0.99)] {
            if let Some(time) = percentile(&mut self.latencies_us, share) {
                values.push((figure, time.into()));
            }
        }
        values
    }
}

struct Runner<'a> {
    plan: &'a Plan,
    watch: &'a Watch,
    piece: Bytes,
}

impl Runner<'_> {
    /// Runs a phase on all threads at once.
    fn run(&self, phase: &Phase, target: &dyn Target, what: &str) -> anyhow::Result<Measured> {
        self.watch.check()?;
        if matches!(phase, Phase::Read | Phase::Random | Phase::Files(_, FileOp::Read(_))) {
            target.forget()?;
        }
        self.watch.begin(what, self.total(phase));
        let start = Barrier::new(self.plan.threads as usize + 1);
        let until = self.plan.time;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.plan.threads)
                .map(|thread| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        let done = self.thread(phase, target, thread, Instant::now() + until);
                        if done.is_err() {
                            self.watch.stop();
                        }
                        done.map(|reads| (reads, Instant::now()))
                    })
                })
                .collect();
            start.wait();
            let began = Instant::now();
            while matches!(phase, Phase::Random) && began.elapsed() < until && !self.watch.stopped() {
                self.watch.has_done(began.elapsed().as_millis() as u64);
                std::thread::sleep(TICK);
            }
            let ended: Vec<_> = threads
                .into_iter()
                .map(|t| {
                    t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread of the benchmark panicked")))
                })
                .collect();
            let mut ended_last = began;
            let mut reads = Reads::default();
            let mut failure: Option<anyhow::Error> = None;
            for thread in ended {
                match thread {
                    Ok((more, ended)) => {
                        ended_last = ended_last.max(ended);
                        reads.count += more.count;
                        reads.latencies_us.extend(more.latencies_us);
                    }
                    // The first to fail stops the others, whose errors only say so.
                    Err(e) if failure.as_ref().is_none_or(|f| f.is::<Stopped>()) => failure = Some(e),
                    Err(_) => {}
                }
            }
            match failure {
                Some(e) => Err(e),
                None => Ok(Measured {
                    amount: reads.count,
                    time: ended_last - began,
                    latencies_us: reads.latencies_us,
                }),
            }
        })
    }

    fn total(&self, phase: &Phase) -> u64 {
        match phase {
            Phase::Write | Phase::Read => self.plan.share * self.plan.threads,
            Phase::Random => self.plan.time.as_millis() as u64,
            Phase::Files(..) => self.plan.files,
        }
    }

    fn thread(
        &self,
        phase: &Phase,
        target: &dyn Target,
        thread: u64,
        until: Instant,
    ) -> anyhow::Result<Reads> {
        let large = format!("large/f{thread}");
        let share = self.plan.share;
        let count = match phase {
            Phase::Write => target.write(&large, share, &self.piece, self.watch).map(|()| share)?,
            Phase::Read => target.read(&large, share, self.watch).map(|()| share)?,
            Phase::Random => {
                let mut dice = Dice::new(thread + 1, share);
                return target.random(&large, &mut dice, until, self.watch);
            }
            Phase::Files(dir, op) => {
                let files = self.plan.files_of(thread);
                target.files(op, &format!("{dir}{thread}"), 0..files, self.watch).map(|()| files)?
            }
        };
        Ok(Reads { count, latencies_us: Vec::new() })
    }
}
