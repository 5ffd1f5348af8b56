//! How much of a directory to fetch ahead of the names that are looked up in it, in proportion to what comes of it.
//!
//! A lookup that has to ask the metaserver earns a few neighbours, one that is answered from here a lot more; the next
//! that asks spends what was earned. So whoever goes through a directory in any order soon has all of it, and whoever looks up a
//! few names of a huge one fetches little: where next to nothing of what was fetched is used, hardly more is.

/// What a lookup that asks earns, and one that is answered from here.
const PER_MISS: u32 = 8;
const PER_HIT: u32 = 64;

/// Most neighbours that are asked for at once.
const MOST: u32 = 512;

/// So many are fetched before it is judged what comes of it.
const TRIAL: u32 = 1024;
/// Of so many that were fetched one has to be used.
const USED_OF: u32 = 256;
/// Else one miss in so many earns something, to see whether that has changed.
const PROBE: u32 = 16;

/// What was long ago counts half.
const FORGET: u32 = 1 << 16;

/// Of one directory.
#[derive(Debug)]
pub(super) struct Ahead {
    earned: u32,
    asked: u32,
    hits: u32,
    misses: u32,
    /// More than that would be looked for in vain, or be too much for an answer.
    most: u32,
}

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead { earned: 0, asked: 0, hits: 0, misses: 0, most: MOST }
    }
}

impl Ahead {
    /// A lookup was answered from here.
    pub(super) fn hit(&mut self) {
        // Without anything asked for, it is no merit of it.
        if self.asked > 0 {
            self.hits = self.hits.saturating_add(1);
            self.earned = (self.earned + PER_HIT).min(MOST);
        }
    }

    /// A name is about to be asked for: how many neighbours to ask for with it.
    pub(super) fn miss(&mut self) -> u32 {
        self.misses = self.misses.wrapping_add(1);
        let pays = self.asked < TRIAL || self.hits.saturating_mul(USED_OF) >= self.asked;
        if pays || self.misses.is_multiple_of(PROBE) {
            self.earned = (self.earned + PER_MISS).min(MOST);
        }
        let neighbours = std::mem::take(&mut self.earned).min(self.most);
        self.asked += neighbours;
        if self.asked >= FORGET {
            (self.asked, self.hits) = (self.asked / 2, self.hits / 2);
        }
        neighbours
    }

    /// So many came of those that were asked for.
    pub(super) fn came(&mut self, came: u32, asked: u32) {
        match came < asked {
            true => self.most = (2 * came).clamp(PER_MISS, MOST),
            false => self.most = (2 * self.most).min(MOST),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use fjordfs_proto::cluster::mix;

    use super::*;

    /// Looks names up at random; how many lookups asked, and how many entries were fetched.
    fn look_up(entries: u64, lookups: u64) -> (u32, u32) {
        let (mut ahead, mut known) = (Ahead::default(), HashSet::new());
        let (mut asked, mut fetched) = (0, 0);
        for i in 0..lookups {
            let name = mix(i) % entries;
            if known.contains(&name) {
                ahead.hit();
                continue;
            }
            known.insert(name);
            asked += 1;
            // As the metaserver does: those that follow, but for known ones, which it passes some of.
            let wanted = ahead.miss();
            let following = (1..2 * u64::from(wanted) + 16).map(|next| (name + next) % entries);
            let news: Vec<u64> =
                following.filter(|name| !known.contains(name)).take(wanted as usize).collect();
            ahead.came(news.len() as u32, wanted);
            fetched += news.len() as u32;
            known.extend(news);
        }
        (asked, fetched)
    }

    #[test]
    fn whoever_goes_through_a_directory_soon_has_it() {
        let (asked, fetched) = look_up(5_000, 5_000);
        assert!(asked < 400 && fetched < 5_000, "{asked} {fetched}");
        let (asked, _) = look_up(100_000, 100_000);
        assert!(asked < 10_000, "{asked}");
    }

    #[test]
    fn where_nothing_comes_little_is_asked_for() {
        let mut ahead = Ahead::default();
        ahead.miss();
        (0..9).for_each(|_| ahead.hit());
        assert_eq!(ahead.miss(), MOST);
        ahead.came(3, MOST);
        (0..9).for_each(|_| ahead.hit());
        assert_eq!(ahead.miss(), PER_MISS, "others have it, or it is known");
        let mut asked = 0;
        while asked < MOST {
            (0..9).for_each(|_| ahead.hit());
            asked = ahead.miss();
            ahead.came(asked, asked);
        }
    }

    #[test]
    fn whoever_looks_up_a_few_names_of_a_huge_one_fetches_little() {
        let (asked, fetched) = look_up(10_000_000, 100);
        assert!(asked >= 98 && fetched <= 800, "{asked} {fetched}");
        let (asked, fetched) = look_up(10_000_000, 10_000);
        assert!(asked > 9_000 && fetched < 10_000, "{asked} {fetched}");
    }
}
