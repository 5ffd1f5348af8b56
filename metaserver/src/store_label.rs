//! What a store says of itself, whichever engine keeps it: the format of its records, and whether they may be served.

use bytes::Bytes;
use fjordfs_proto::{FsError, FsResult, error::Errno};

use crate::{
    keys,
    label::FORMAT_VERSION,
    store::{MetaStore, Order, StoreResult},
};

/// First byte of the record at [`keys::CLOSED`]; the rest is a sentence for people.
const UNFINISHED: u8 = b'u';
const RESTORING: u8 = b'r';
const MOVED: u8 = b'm';

/// Why a store is not to be served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Closed {
    /// A migration into it did not end.
    Unfinished(String),
    /// A restore into it did not end.
    Restoring(String),
    /// Its records are elsewhere now.
    Moved(String),
}

impl Closed {
    /// While a backup is loaded.
    pub(crate) fn restoring() -> Closed {
        let what = "a backup or a dump was being loaded into it and is not all there: restore again, with \
                    `fjord meta restore --force` or `fjord meta load --force`";
        Closed::Restoring(what.to_owned())
    }

    /// Nothing in it is anybody's only copy.
    pub(crate) fn is_unfinished(&self) -> bool {
        matches!(self, Closed::Unfinished(_) | Closed::Restoring(_))
    }

    pub(crate) fn encode(&self) -> Bytes {
        let (mark, text) = match self {
            Closed::Unfinished(text) => (UNFINISHED, text),
            Closed::Restoring(text) => (RESTORING, text),
            Closed::Moved(text) => (MOVED, text),
        };
        [&[mark], text.as_bytes()].concat().into()
    }

    pub(crate) fn text(&self) -> &str {
        let (Closed::Unfinished(text) | Closed::Restoring(text) | Closed::Moved(text)) = self;
        text
    }
}

/// Whether the store is closed.
pub(crate) fn closed(store: &dyn MetaStore) -> StoreResult<Option<Closed>> {
    let Some(value) = store.get(keys::CLOSED)? else { return Ok(None) };
    let text = String::from_utf8_lossy(value.get(1..).unwrap_or_default()).into_owned();
    // What this release does not know is at least not open.
    Ok(Some(match value.first() {
        Some(&UNFINISHED) => Closed::Unfinished(text),
        Some(&RESTORING) => Closed::Restoring(text),
        _ => Closed::Moved(text),
    }))
}

/// Refuses a store that is closed, that a newer release has written, or that holds something else.
pub(crate) fn check(store: &dyn MetaStore) -> FsResult<()> {
    let engine = |e| FsError::from(&e);
    if let Some(closed) = closed(store).map_err(engine)? {
        return Err(FsError::new(Errno::EIO, closed.text().to_owned()));
    }
    let found = store.get(keys::FORMAT).map_err(engine)?;
    let version = found.and_then(|v| v.as_ref().try_into().ok()).map_or(0, u32::from_be_bytes);
    if version > FORMAT_VERSION {
        let text = format!(
            "its records have format version {version}, this release knows {FORMAT_VERSION}: use the release that wrote \
             them, or a newer one"
        );
        return Err(FsError::new(Errno::EIO, text));
    }
    if store.get(&[keys::COUNTERS]).map_err(engine)?.is_none() {
        let all = keys::everything();
        let found =
            store.scan(all.start.as_slice()..all.end.as_slice(), Order::Ascending, 1).map_err(engine)?;
        if let Some((key, _)) = found.first() {
            let text = format!(
                "there is no filesystem, but something else, whose first key is '{}': give it an empty place, as etcd://.../PREFIX \
                 with a prefix of its own",
                key.escape_ascii()
            );
            return Err(FsError::new(Errno::EIO, text));
        }
    }
    Ok(())
}

/// The record at [`keys::FORMAT`].
pub(crate) fn format() -> Bytes {
    Bytes::copy_from_slice(&FORMAT_VERSION.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        store::{MemoryStore, conformance::put},
        testing::World,
    };

    fn refusal(pairs: &[(&str, &str)]) -> String {
        let store = MemoryStore::default();
        let fence = store.take_over().unwrap();
        store.commit(put(pairs), fence).unwrap();
        check(&store).unwrap_err().message
    }

    #[test]
    fn what_is_no_filesystem_is_refused() {
        assert!(check(&MemoryStore::default()).is_ok());
        assert!(check(&*World::new().store).is_ok());
        let text = refusal(&[("registry/pods", "x"), ("zebra", "y")]);
        assert!(text.contains("'registry/pods'") && text.contains("PREFIX"), "{text}");
        let text = refusal(&[("F", "\0\0\u{1}\0")]);
        assert!(text.contains("format version 256"), "{text}");
    }
}
