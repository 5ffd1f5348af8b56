//! Bytes that tell what they are: every page says of which seed, file, offset and version it is, and the rest of it follows
//! from that.

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
/// Bytes that say what a page is; every page of a file has at least these.
pub(super) const HEADER: usize = 32;

const MAGIC: u64 = 0x6c62_6174_736f_6c66;

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    fjordfs_proto::cluster::mix(*state)
}

/// What a file is known by: the seed of the run, and its number in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Id {
    pub(super) seed: u64,
    pub(super) file: u64,
}

impl Id {
    /// A page of a version.
    pub(super) fn page(self, version: u64, offset: u64) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE);
        for word in [MAGIC ^ self.seed, self.file, version, offset] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        let mut state =
            self.seed ^ self.file.rotate_left(17) ^ version.rotate_left(34) ^ offset.rotate_left(51);
        while page.len() < PAGE {
            page.extend_from_slice(&next(&mut state).to_le_bytes());
        }
        page
    }

    /// `len` bytes from `offset` on, all of one version.
    pub(super) fn bytes(self, version: u64, offset: u64, len: usize) -> Vec<u8> {
        let skipped = (offset % PAGE as u64) as usize;
        let mut bytes = Vec::with_capacity(len + 2 * PAGE);
        let mut at = offset - skipped as u64;
        while bytes.len() < skipped + len {
            bytes.extend_from_slice(&self.page(version, at));
            at += PAGE as u64;
        }
        bytes.drain(..skipped);
        bytes.truncate(len);
        bytes
    }

    /// The version of a page that was read, if it is one of this file and right.
    pub(super) fn version_of(self, page: &[u8], offset: u64) -> Option<u64> {
        let version = u64::from_le_bytes(page.get(16..24)?.try_into().ok()?);
        (page == &self.page(version, offset)[..page.len()]).then_some(version)
    }

    /// Length of a version that is replaced as a whole. Small ones, page ones, and ones of several blocks' shards.
    pub(super) fn len(self, version: u64) -> usize {
        let mut state = self.seed ^ self.file << 32 ^ version;
        let draw = next(&mut state);
        let max = match draw % 8 {
            0..3 => 2 << 10,
            3..6 => 100 << 10,
            6 => 700 << 10,
            _ => 3 << 20,
        };
        HEADER + (next(&mut state) % max) as usize
    }

    /// Whether in this version there is no such file.
    pub(super) fn absent(version: u64) -> bool {
        version.is_multiple_of(6)
    }
}

/// Why bytes are not a version's, for people.
pub(super) fn describe(page: &[u8]) -> String {
    if page.iter().all(|b| *b == 0) {
        return format!("{} zeros", page.len());
    }
    let word = |at: usize| page.get(at..at + 8).and_then(|w| w.try_into().ok()).map(u64::from_le_bytes);
    format!("{} bytes that say file {:?}, version {:?}, offset {:?}", page.len(), word(8), word(16), word(24))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_recognised_and_damage_is_seen() {
        let id = Id { seed: 5, file: 9 };
        let mut bytes = id.bytes(3, 0, 10_000);
        assert_eq!(id.version_of(&bytes[4096..8192], 4096), Some(3));
        assert_eq!(id.version_of(&bytes[8192..], 8192), Some(3));
        assert_eq!(id.bytes(3, 5000, 4000), bytes[5000..9000]);
        assert_eq!(id.version_of(&bytes[4096..8192], 0), None);
        assert_eq!(Id { seed: 5, file: 8 }.version_of(&bytes[..4096], 0), None);
        bytes[7000] ^= 1;
        assert_eq!(id.version_of(&bytes[4096..8192], 4096), None);
        assert_eq!(id.version_of(&[0; 4096], 0), None);
    }
}
