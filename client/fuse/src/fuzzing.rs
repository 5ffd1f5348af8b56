//! What the fuzzer of `tests/fuzz` reaches.

use std::hint::black_box;

use bytes::Bytes;

use crate::{request::Request, transport::Message};

/// Takes a message of the kernel apart. Whatever it is, nothing panics.
pub fn request(bytes: &[u8]) {
    let Some(message) = Message::from_bytes(Bytes::copy_from_slice(bytes)) else { return };
    match Request::parse(&message) {
        Ok(request) => _ = black_box((request.is_interruptible(), format!("{request:?}"))),
        Err(e) => _ = black_box((e.errno(), format!("{e:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    fn corpus() -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/corpus/fuse");
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty());
        files.iter().map(|file| std::fs::read(file).unwrap()).collect()
    }

    #[test]
    fn the_corpus_is_taken_apart() {
        corpus().iter().for_each(|input| super::request(input));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20000))]
        /// What the fuzzer does, without its eyes.
        #[test]
        fn what_is_like_it_is_taken_apart_or_refused(
            mut input in proptest::sample::select(corpus()),
            more in proptest::collection::vec(any::<u8>(), 0..40),
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            input.extend(more);
            for (at, byte) in edits {
                let at = at.index(input.len().max(1));
                if let Some(place) = input.get_mut(at) {
                    *place = byte;
                }
            }
            super::request(&input);
        }
    }
}
