//! Recalls against a kernel that takes its time to take answers in.

use std::cell::RefCell;
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// An inode of the kernel. Values stand for attributes; `None` is that it would ask.
#[derive(Clone, Copy, Debug, Default)]
struct Cached {
    version: u64,
    value: Option<u64>,
    answers: u64,
}

/// An answer on its way, with the version and evictions noted when it was asked for; CREATE's has none.
#[derive(Clone, Copy, Debug)]
struct OnItsWay {
    ino: u64,
    value: Option<u64>,
    asked: Option<(u64, u64)>,
}

/// What fs/fuse does with attributes.
#[derive(Debug, Default)]
struct Model {
    inodes: HashMap<u64, Cached>,
    version: u64,
    evictions: u64,
}

impl Model {
    fn take_in(&mut self, answer: OnItsWay) {
        self.version += 1;
        let is_new = !self.inodes.contains_key(&answer.ino);
        let cached = self.inodes.entry(answer.ino).or_default();
        cached.answers += 1;
        let Some((version, evictions)) = answer.asked else {
            (cached.version, cached.value) = (self.version, answer.value);
            return;
        };
        if cached.version <= version {
            // An inode made anew after an eviction gets a version from the answer, but not its attributes.
            let is_evicted = is_new && evictions < self.evictions;
            (cached.version, cached.value) = (self.version, answer.value.filter(|_| !is_evicted));
        }
    }
}

#[derive(Debug, Default)]
struct Fake(RefCell<Model>);

impl Kernel for &Fake {
    fn drop_attributes(&self, ino: InodeId) -> io::Result<()> {
        let mut model = self.0.borrow_mut();
        model.version += 1;
        let version = model.version;
        let cached = model.inodes.get_mut(&ino.0).ok_or(io::Error::from_raw_os_error(libc::ENOENT))?;
        (cached.version, cached.value) = (version, None);
        Ok(())
    }

    fn drop_names(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A LOOKUP is asked for; it is answered, and taken in, by later steps.
    Ask(u64),
    Answer(usize),
    Create(u64),
    TakeIn(usize),
    /// A request about the inode itself.
    Use(u64),
    Evict(u64),
    Forget(usize),
    Recall(u64),
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    let ino = 1..4u64;
    prop_oneof![
        3 => ino.clone().prop_map(Step::Ask),
        3 => any::<usize>().prop_map(Step::Answer),
        2 => ino.clone().prop_map(Step::Create),
        4 => any::<usize>().prop_map(Step::TakeIn),
        1 => ino.clone().prop_map(Step::Use),
        1 => ino.clone().prop_map(Step::Evict),
        2 => any::<usize>().prop_map(Step::Forget),
        2 => ino.prop_map(Step::Recall),
        3 => Just(Step::Retry),
    ]
}

fn pick<T>(from: &mut Vec<T>, index: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.swap_remove(index % from.len()))
}

proptest! {
    #[test]
    fn nothing_recalled_is_used_or_taken_in_later(steps in prop::collection::vec(step(), 1..60)) {
        let fake = Fake::default();
        let held = Arc::new(Held::default());
        let mut recaller = Recaller::new(&fake, Arc::clone(&held));
        let (mut asked, mut on_its_way, mut forgets) = (Vec::new(), Vec::<OnItsWay>::new(), Vec::new());
        // What the server says, what this client may still cache of it, and recalls that are not done.
        let mut current = HashMap::<u64, u64>::new();
        let mut leased = HashMap::<u64, u64>::new();
        let mut recalls: Vec<(u64, u64, oneshot::Receiver<()>)> = Vec::new();
        let mut recalled = HashMap::<u64, u64>::new();
        for step in steps {
            match step {
                Step::Ask(ino) => {
                    let model = fake.0.borrow();
                    asked.push((ino, (model.version, model.evictions)));
                }
                Step::Answer(index) => {
                    if let Some((ino, noted)) = pick(&mut asked, index) {
                        held.lookups.add(InodeId(ino));
                        // The server grants no lease while a recall is not done.
                        if !recalls.iter().any(|(recalled, ..)| *recalled == ino) {
                            leased.insert(ino, *current.entry(ino).or_default());
                        }
                        let value = leased.get(&ino).copied();
                        on_its_way.push(OnItsWay { ino, value, asked: Some(noted) });
                    }
                }
                Step::Create(ino) => {
                    if !recalls.iter().any(|(recalled, ..)| *recalled == ino) {
                        leased.insert(ino, *current.entry(ino).or_default());
                    }
                    let is_first = held.lookups.add(InodeId(ino));
                    let may = is_first && held.unsettled.create(InodeId(ino));
                    let value = leased.get(&ino).copied().filter(|_| may);
                    on_its_way.push(OnItsWay { ino, value, asked: None });
                }
                Step::TakeIn(index) => {
                    if let Some(answer) = pick(&mut on_its_way, index) {
                        fake.0.borrow_mut().take_in(answer);
                    }
                }
                Step::Use(ino) => {
                    if fake.0.borrow().inodes.contains_key(&ino) {
                        held.asked_about(InodeId(ino));
                    }
                }
                Step::Evict(ino) => {
                    let mut model = fake.0.borrow_mut();
                    if let Some(cached) = model.inodes.remove(&ino) {
                        model.evictions += 1;
                        forgets.push((ino, cached.answers));
                    }
                }
                Step::Forget(index) => {
                    if let Some((ino, answers)) = pick(&mut forgets, index) {
                        held.lookups.subtract(InodeId(ino), answers);
                    }
                }
                Step::Recall(ino) => {
                    *current.entry(ino).or_default() += 1;
                    leased.remove(&ino);
                    let (done, waiting) = oneshot::channel();
                    recalls.push((ino, current[&ino], waiting));
                    recaller.begin(Recall { inodes: vec![InodeId(ino)], names: false, done });
                }
                Step::Retry => recaller.go_on(),
            }
            recalls.retain_mut(|(ino, since, waiting)| {
                let is_done = waiting.try_recv().is_ok();
                if is_done {
                    recalled.insert(*ino, *since);
                }
                !is_done
            });
            for (ino, cached) in &fake.0.borrow().inodes {
                if let (Some(value), Some(since)) = (cached.value, recalled.get(ino)) {
                    prop_assert!(value >= *since, "inode {ino} shows {value}, recalled when it became {since}");
                }
            }
        }
        // Every answer taken in, every FORGET read: nothing is waited for.
        for answer in on_its_way {
            fake.0.borrow_mut().take_in(answer);
        }
        for (ino, answers) in forgets {
            held.lookups.subtract(InodeId(ino), answers);
        }
        for ino in 1..4 {
            held.unsettled.settle_creation(InodeId(ino));
        }
        recaller.go_on();
        prop_assert!(recaller.unfinished.is_empty());
    }
}

#[test]
fn names_on_their_way_are_dropped_once_they_have_come() {
    #[derive(Default)]
    struct Epochs(RefCell<u32>);
    impl Kernel for &Epochs {
        fn drop_attributes(&self, _: InodeId) -> io::Result<()> {
            Ok(())
        }
        fn drop_names(&self) -> io::Result<()> {
            *self.0.borrow_mut() += 1;
            Ok(())
        }
    }
    let epochs = Epochs::default();
    let held = Arc::new(Held::default());
    let mut recaller = Recaller::new(&epochs, Arc::clone(&held));
    held.unsettled.list(InodeId(5), 1);
    let (done, mut waiting) = oneshot::channel();
    recaller.begin(Recall { inodes: vec![InodeId(5), InodeId(6)], names: true, done });
    recaller.go_on();
    assert_eq!((*epochs.0.borrow(), waiting.try_recv().is_err()), (1, true));
    held.unsettled.settle_listing(InodeId(5), 1);
    recaller.go_on();
    assert_eq!((*epochs.0.borrow(), waiting.try_recv().is_ok()), (2, true));
}

#[test]
fn counts_of_answers_that_never_came_are_given_up_with_the_recall() {
    let fake = Fake::default();
    let held = Arc::new(Held::default());
    let mut recaller = Recaller::new(&fake, Arc::clone(&held));
    held.lookups.add(InodeId(5));
    let (done, waiting) = oneshot::channel();
    recaller.begin(Recall { inodes: vec![InodeId(5)], names: false, done });
    assert_eq!(recaller.unfinished.len(), 1);
    drop(waiting);
    recaller.go_on();
    assert_eq!((recaller.unfinished.len(), held.lookups.count(InodeId(5))), (0, 0));
}

#[test]
fn a_lookup_that_holds_a_recall_up_is_given_up() {
    let fake = Fake::default();
    let held = Arc::new(Held::default());
    let mut recaller = Recaller::new(&fake, Arc::clone(&held));
    held.unsettled.list(InodeId(5), 1);
    held.lookups.add(InodeId(6));
    let lookup = held.asked.ask(InodeId(5), &bytes::Bytes::from_static(b"name"), 1);
    let (done, _waiting) = oneshot::channel();
    recaller.begin(Recall { inodes: vec![InodeId(6)], names: false, done });
    recaller.unfinished[0].since = Instant::now().checked_sub(2 * HELD_UP).unwrap();
    // The lookup itself has to have waited, too.
    std::thread::sleep(HELD_UP);
    recaller.go_on();
    assert!(futures_util::FutureExt::now_or_never(lookup.given_up()).is_some());
}
