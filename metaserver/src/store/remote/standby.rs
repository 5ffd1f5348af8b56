//! Standing by: looking for the owner's silence, and giving signs meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Fault, Link, TAKE_OVER_SILENCE,
    owner::{self, Owner, STANDBYS},
    worker::{Complaints, timed},
};
use crate::store::{Order, Pair, StoreResult};

/// How often a standby looks at the owner's record.
const LOOK: Duration = Duration::from_millis(200);
/// Looks after which it gives a sign.
const LOOKS_PER_SIGN: u64 = 5;
/// Longer than between two signs, also of one that is slow.
const SIGN_PATIENCE: Duration = Duration::from_millis(1500);

/// What a standby writes, whoever owns the store: its name, and a number that changes.
pub(super) struct Sign {
    key: Vec<u8>,
    name: String,
    number: u64,
}

impl Sign {
    pub(super) fn new(holder: u64, name: &str) -> Sign {
        Sign { key: owner::standby(holder), name: name.to_owned(), number: 0 }
    }

    /// A sign that cannot be given now is given later.
    async fn give(&mut self, link: &dyn Link) {
        self.number += 1;
        let value = [&self.number.to_be_bytes(), self.name.as_bytes()].concat();
        let _ = timed(link.note(self.key.clone(), Some(value.into()))).await;
    }
}

/// Names of the standbys that give signs.
pub(super) async fn alive(link: &Arc<dyn Link>) -> Vec<String> {
    let signs = || timed(link.scan(STANDBYS.0.to_vec()..STANDBYS.1.to_vec(), Order::Ascending, usize::MAX));
    let before = signs().await.unwrap_or_default();
    tokio::time::sleep(SIGN_PATIENCE).await;
    let after = signs().await.unwrap_or_default();
    let name = |(_, value): &Pair| String::from_utf8_lossy(value.get(8..).unwrap_or_default()).into_owned();
    let mut names: Vec<String> = after.iter().filter(|sign| !before.contains(sign)).map(name).collect();
    names.sort();
    names
}

/// When a record has not changed for [`TAKE_OVER_SILENCE`], as far as one has looked. By this host's clock only: nobody
/// need agree on the time.
#[derive(Default)]
pub(super) struct Silence {
    seen: Option<(Owner, Instant)>,
}

impl Silence {
    /// Whether the store may be taken from the record `found` at `now`: nobody owns it, its owner has let go, or is silent.
    pub(super) fn look(&mut self, found: Option<Owner>, now: Instant) -> bool {
        let Some(found) = found.filter(|owner| !owner.released) else { return true };
        match self.seen {
            Some((seen, since)) if seen == found => now.duration_since(since) >= TAKE_OVER_SILENCE,
            _ => {
                self.seen = Some((found, now));
                false
            }
        }
    }

    /// The record could not be read: the owner's silence is not to be told from the store's.
    pub(super) fn blind(&mut self) {
        self.seen = None;
    }
}

/// Waits until the store may be taken. The record found; none when it was stopped.
pub(super) async fn await_silence(
    link: &Arc<dyn Link>,
    stop: &AtomicBool,
    mut sign: Option<Sign>,
) -> StoreResult<Option<Option<Owner>>> {
    let found = look_for_silence(link, stop, sign.as_mut()).await;
    if let Some(sign) = sign {
        // The next owner removes it otherwise.
        let _ = timed(link.note(sign.key, None)).await;
    }
    found
}

async fn look_for_silence(
    link: &Arc<dyn Link>,
    stop: &AtomicBool,
    mut sign: Option<&mut Sign>,
) -> StoreResult<Option<Option<Owner>>> {
    let mut silence = Silence::default();
    let mut complaints = Complaints::default();
    let mut looks = 0u64;
    let mut unseen = None;
    while !stop.load(Ordering::Relaxed) {
        match timed(link.read_owner()).await {
            Ok(found) if silence.look(found, Instant::now()) => return Ok(Some(found)),
            Ok(_) => unseen = None,
            Err(Fault::Fatal(e)) => return Err(e),
            Err(Fault::Unavailable(why)) => {
                complaints.hear(&**link, &why, "cannot see who owns the store");
                silence.blind();
                unseen = Some(why);
            }
        }
        if let Some(sign) = sign.as_mut().filter(|_| looks.is_multiple_of(LOOKS_PER_SIGN)) {
            sign.give(&**link).await;
        }
        looks += 1;
        tokio::time::sleep(LOOK).await;
    }
    match unseen {
        // Nobody stands by: somebody asks whether there is an owner, and that could not be seen.
        Some(why) if sign.is_none() => Err(link.error(why)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_silent_when_it_was_seen_unchanged_for_long_enough() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        let beat = |sequence| Some(Owner { fence: 1, sequence, holder: 7, ..Owner::default() });
        let mut silence = Silence::default();
        assert!(silence.look(None, now), "nobody owns it");
        // It beats, at times late.
        for (sequence, at) in [(1, 0), (1, 2900), (2, 3100), (2, 6000), (3, 6099)] {
            assert!(!silence.look(beat(sequence), now + ms(at)), "{sequence} at {at} ms");
        }
        assert!(!silence.look(beat(3), now + ms(9098)));
        assert!(silence.look(beat(3), now + ms(9099)));
        silence.blind();
        assert!(!silence.look(beat(3), now + ms(9100)), "what was not seen does not count");
        assert!(!silence.look(beat(3), now + ms(12_099)));
        assert!(silence.look(beat(3), now + ms(12_100)));
        let released = beat(4).map(|owner| Owner { released: true, ..owner });
        assert!(silence.look(released, now + ms(12_101)));
    }
}
