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
