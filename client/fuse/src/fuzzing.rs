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
#[path = "../../../tests/fuzz/inputs.rs"]
mod inputs;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::inputs::{corpus, like};

    #[test]
    fn the_corpus_is_taken_apart() {
        corpus("fuse").iter().for_each(|input| super::request(input));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20000))]
        #[test]
        fn what_is_like_it_is_taken_apart_or_refused(input in like(corpus("fuse"))) {
            super::request(&input);
        }
    }
}
