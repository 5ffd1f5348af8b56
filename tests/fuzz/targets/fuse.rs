//! Messages of the kernel.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fjordfs_fuse::fuzzing::request(input));
