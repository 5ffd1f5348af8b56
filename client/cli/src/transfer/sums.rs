//! Checksums of what was copied, chunk by chunk, for `--verify`.

use std::ops::Range;

use xxhash_rust::xxh3::Xxh3;

/// Bytes that are read, written and checked at a time.
pub(crate) const CHUNK: u64 = 4 << 20;

/// Checksum of one chunk of a file. Holes have none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Sum {
    pub(crate) range: Range<u64>,
    pub(crate) hash: u64,
}

impl Sum {
    /// Of bytes that may lie in several buffers.
    pub(crate) fn of<B: AsRef<[u8]>>(offset: u64, parts: &[B]) -> Sum {
        let mut hasher = Xxh3::new();
        let mut length = 0;
        for part in parts {
            hasher.update(part.as_ref());
            length += part.as_ref().len() as u64;
        }
        Sum { range: offset..offset + length, hash: hasher.digest() }
    }

    /// Compares with what was read back.
    ///
    /// # Errors
    /// Says where they differ.
    pub(crate) fn check<B: AsRef<[u8]>>(&self, parts: &[B]) -> anyhow::Result<()> {
        let back = Sum::of(self.range.start, parts);
        anyhow::ensure!(
            back == *self,
            "what was read back differs from the original in bytes {} to {}",
            self.range.start,
            self.range.end
        );
        Ok(())
    }
}

/// Cuts ranges into chunks.
pub(crate) fn chunks(ranges: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> + '_ {
    ranges.iter().flat_map(|range| {
        let end = range.end;
        (range.start..end).step_by(CHUNK as usize).map(move |at| at..(at + CHUNK).min(end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_ranges() {
        let cut: Vec<_> = chunks(&[0..10, CHUNK..3 * CHUNK + 1]).collect();
        assert_eq!(cut, [0..10, CHUNK..2 * CHUNK, 2 * CHUNK..3 * CHUNK, 3 * CHUNK..3 * CHUNK + 1]);
        assert_eq!(chunks(&[]).count(), 0);
    }

    #[test]
    fn differences_and_missing_bytes_are_found() {
        let sum = Sum::of(8, &[b"hello ".as_slice(), b"world"]);
        assert_eq!(sum.range, 8..19);
        assert!(sum.check(&[b"hello world"]).is_ok());
        assert!(sum.check(&[b"hello worle"]).unwrap_err().to_string().contains("bytes 8 to 19"));
        assert!(sum.check(&[b"hello worl"]).is_err());
    }
}
