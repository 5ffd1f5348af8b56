//! The record that says who owns a store across a network, and the engine's own keys beside it.

use bytes::{Buf, BufMut, Bytes};

use crate::store::{Fence, Pair};

/// The owner's record.
pub(super) const OWNER: &[u8] = b"\0owner";
/// Range of the parts of a batch that is too large for one transaction.
pub(super) const INTENTS: (&[u8], &[u8]) = (b"\0intent", b"\0intenu");

/// Range of the signs that standbys give.
pub(super) const STANDBYS: (&[u8], &[u8]) = (b"\0standby", b"\0standbz");

const VERSION: u8 = 1;

/// Every transaction names the record that it expects, and writes the next: so a transaction is applied at most once, in
/// order, and only for the owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Owner {
    pub(super) fence: u64,
    /// Transactions so far, of all owners.
    pub(super) sequence: u64,
    /// Random number of the one who wrote it: two who take over at the same time must not write the same record.
    pub(super) holder: u64,
    /// The owner let go of the store: nobody need wait for its silence.
    pub(super) released: bool,
    /// Parts of a batch that is decided and perhaps not applied yet; 0 for none.
    pub(super) parts: u32,
}

impl Owner {
    pub(super) fn fence(&self) -> Fence {
        Fence(self.fence)
    }

    /// The record after one more transaction.
    pub(super) fn next(self) -> Owner {
        Owner { sequence: self.sequence + 1, ..self }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(30);
        out.put_u8(VERSION);
        out.put_u64(self.fence);
        out.put_u64(self.sequence);
        out.put_u64(self.holder);
        out.put_u8(self.released.into());
        out.put_u32(self.parts);
        out.into()
    }

    /// `None` for what this release cannot read.
    pub(super) fn decode(mut value: &[u8]) -> Option<Owner> {
        if value.len() != 30 || value.get_u8() != VERSION {
            return None;
        }
        Some(Owner {
            fence: value.get_u64(),
            sequence: value.get_u64(),
            holder: value.get_u64(),
            released: value.get_u8() != 0,
            parts: value.get_u32(),
        })
    }
}

/// A write: key, and its new value or `None` to remove it.
pub(super) type Write = (Vec<u8>, Option<Bytes>);

/// Key of one part.
pub(super) fn intent(index: u32) -> Vec<u8> {
    [INTENTS.0, &index.to_be_bytes()].concat()
}

/// Key of a standby's signs.
pub(super) fn standby(holder: u64) -> Vec<u8> {
    [STANDBYS.0, &holder.to_be_bytes()].concat()
}

/// What a write takes in a transaction, about.
pub(super) fn cost((key, value): &Write) -> usize {
    key.len() + value.as_ref().map_or(0, Bytes::len) + 32
}

/// Writes in parts of at most `bytes_max`, or a little more when one write alone is that large.
pub(super) fn encode_parts(writes: &[Write], bytes_max: usize) -> Vec<Bytes> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    for write in writes {
        if !part.is_empty() && part.len() + cost(write) > bytes_max {
            parts.push(Bytes::from(std::mem::take(&mut part)));
        }
        let (key, value) = write;
        part.put_u32(key.len() as u32);
        part.put_slice(key);
        part.put_u8(value.is_some().into());
        if let Some(value) = value {
            part.put_u32(value.len() as u32);
            part.put_slice(value);
        }
    }
    parts.push(part.into());
    parts
}

/// The writes of all parts; `None` when they are damaged.
pub(super) fn decode_parts(parts: &[Pair]) -> Option<Vec<Write>> {
    let mut writes = Vec::new();
    for (_, part) in parts {
        let mut rest = part.clone();
        while rest.has_remaining() {
            let key = take(&mut rest)?.to_vec();
            let value = match rest.try_get_u8().ok()? {
                0 => None,
                _ => Some(take(&mut rest)?),
            };
            writes.push((key, value));
        }
    }
    Some(writes)
}

fn take(rest: &mut Bytes) -> Option<Bytes> {
    let len = rest.try_get_u32().ok()? as usize;
    (len <= rest.len()).then(|| rest.split_to(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_parts_come_back() {
        let owner = Owner { fence: 3, sequence: 9, holder: 7, released: true, parts: 4 };
        assert_eq!(Owner::decode(&owner.encode()), Some(owner));
        assert_eq!(Owner::decode(b""), None);
        let writes: Vec<Write> =
            (0..100u8).map(|n| (vec![n], (n % 3 > 0).then(|| Bytes::from(vec![n; n.into()])))).collect();
        let parts = encode_parts(&writes, 500);
        assert!(parts.len() > 3);
        let mut stored: Vec<Pair> = (0u32..).zip(parts).map(|(n, p)| (intent(n), p)).collect();
        assert_eq!(decode_parts(&stored), Some(writes));
        stored[1].1.truncate(10);
        assert_eq!(decode_parts(&stored), None);
    }
}
