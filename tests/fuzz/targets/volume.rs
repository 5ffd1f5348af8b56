//! Volumes and checkpoints, as a data server finds them when it starts.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fjordfs_dataserver::fuzzing::recover(input));
