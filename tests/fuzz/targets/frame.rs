//! Frames, as they come from a socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fjordfs_proto::fuzzing::frame(input));
