//! Two files that go here and there among a few names: [`Steps`](super::steps::Steps) of one kind.

use rand::Rng;

use crate::rng::TestRng;

/// The names, in a directory and in one below it.
pub const PATHS: [&str; 4] = ["a", "d/a", "b", "d/b"];

/// Where the two files are, 1 and 2; one may have several names at times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// File under each of the names.
    pub at: [Option<u64>; PATHS.len()],
}

/// Where they are in the beginning.
pub const FIRST: Names = Names { at: [Some(1), None, Some(2), None] };

/// What somebody saw.
#[derive(Clone, Debug)]
pub enum Seen {
    /// What one name led to.
    Name(usize, Option<u64>),
    /// What a directory, the one below if so, listed of its two names.
    Listing(bool, Vec<usize>),
}

/// What is done, to names by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// The first file gets the second name as well.
    Link(usize, usize),
    /// The first name becomes the second, which is free.
    Rename(usize, usize),
    /// Both names change places.
    Exchange(usize, usize),
    /// A name goes whose file has another.
    Remove(usize),
}

/// Whether a name is in the directory below.
pub fn is_below(name: usize) -> bool {
    PATHS[name].starts_with("d/")
}

impl Names {
    /// Whether they explain what was seen.
    pub fn show(&self, seen: &Seen) -> bool {
        match seen {
            Seen::Name(name, file) => self.at[*name] == *file,
            Seen::Listing(below, found) => {
                let there =
                    (0..PATHS.len()).filter(|name| is_below(*name) == *below && self.at[*name].is_some());
                there.eq(found.iter().copied())
            }
        }
    }

    /// Something that can be done, if the dice say so, and what comes of it.
    pub fn choose(&self, random: &mut TestRng) -> Option<(Move, Names)> {
        let there: Vec<usize> = (0..PATHS.len()).filter(|name| self.at[*name].is_some()).collect();
        let from = there[random.random_range(0..there.len())];
        let to = random.random_range(0..PATHS.len());
        let mut next = *self;
        let done = match (self.at[from], self.at[to]) {
            (Some(one), None) if random.random_bool(0.3) => {
                next.at[to] = Some(one);
                Move::Link(from, to)
            }
            (_, None) => {
                next.at.swap(from, to);
                Move::Rename(from, to)
            }
            (Some(one), Some(other)) if one != other => {
                next.at.swap(from, to);
                Move::Exchange(from, to)
            }
            _ if from != to => {
                next.at[from] = None;
                Move::Remove(from)
            }
            _ => return None,
        };
        Some((done, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    #[test]
    fn no_file_is_ever_without_a_name() {
        let (mut names, mut random) = (FIRST, rng::stream(7, 0));
        let mut kinds = [0; 4];
        for _ in 0..1000 {
            let Some((done, next)) = names.choose(&mut random) else { continue };
            kinds[match done {
                Move::Link(..) => 0,
                Move::Rename(..) => 1,
                Move::Exchange(..) => 2,
                Move::Remove(_) => 3,
            }] += 1;
            assert!([1, 2].iter().all(|file| next.at.contains(&Some(*file))), "{done:?} of {names:?}");
            names = next;
        }
        assert!(kinds.iter().all(|count| *count > 50), "{kinds:?}");
    }

    #[test]
    fn a_listing_shows_one_directory() {
        assert!(FIRST.show(&Seen::Listing(false, vec![0, 2])) && FIRST.show(&Seen::Listing(true, vec![])));
        assert!(!FIRST.show(&Seen::Listing(false, vec![0])) && !FIRST.show(&Seen::Name(1, Some(1))));
    }
}
