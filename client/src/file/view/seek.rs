//! Where a file has data and where holes, as far as the view knows.

use super::View;

/// Where a seek for data or a hole leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Seek {
    /// There.
    At(u64),
    /// The end of the file comes first.
    Nowhere,
    /// The extents from this offset on are needed first.
    Extents(u64),
}

impl View {
    /// Where the next data, or the next hole, is from `offset` on.
    pub(crate) fn seek(&self, data: bool, offset: u64) -> Seek {
        let size = self.size();
        let mut at = offset;
        while at < size {
            let local = self.local.overlapping(at..at + 1).next().map(|(start, run)| start + run.length);
            // What is local hides what is committed, known or not.
            let covered = match local {
                None if at < self.attr.size && self.known.overlapping(at..at + 1).next().is_none() => {
                    return Seek::Extents(at);
                }
                None => self.committed.overlapping(at..at + 1).next().map(|(start, run)| start + run.length),
                local => local,
            };
            match covered {
                Some(_) if data => return Seek::At(at),
                Some(end) => at = end,
                None if !data => return Seek::At(at),
                None => at = self.hole_end(at),
            }
        }
        if data || offset >= size { Seek::Nowhere } else { Seek::At(size) }
    }

    /// Where the hole at `at` ends, or where what is known of it ends.
    fn hole_end(&self, at: u64) -> u64 {
        let next = |found: Option<u64>| found.unwrap_or(u64::MAX);
        let local = next(self.local.overlapping(at..u64::MAX).next().map(|(start, _)| start));
        let committed = next(self.committed.overlapping(at..u64::MAX).next().map(|(start, _)| start));
        let known = match self.known.overlapping(at..at + 1).next() {
            Some((start, run)) => start + run.0,
            // Beyond the committed size there is nothing to know.
            None => u64::MAX,
        };
        local.min(committed).min(known)
    }
}
