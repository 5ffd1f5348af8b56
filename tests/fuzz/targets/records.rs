//! Keys and values of the metadata store.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fjordfs_metaserver::fuzzing::record(input));
