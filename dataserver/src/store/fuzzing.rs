//! What the fuzzer of `tests/fuzz` reaches: recovery from whatever is on a device.
//!
//! Checksums would keep a fuzzer out, so the input is a list of what to put on the device: headers, records, labels and
//! checkpoints that verify, with contents that nobody would write, and noise.

use fjordfs_proto::{BlockId, PAGE_SIZE, ShardNo, block::page_crcs};

use super::{
    checkpoint::{CheckpointHead, CheckpointVolume, CheckpointWriter},
    device::Device,
    index::Entry,
    record::{RecordHeader, fill_header, fill_table, record_bytes},
    recovery::recover,
    sim::SimDevice,
    volume::{VolumeId, VolumeLabel},
};

const UUID: [u8; 16] = [7; 16];
const SALT: u64 = 0x5a17;
/// Pages of each volume.
const PAGES: u64 = 128;
const SIZE: u64 = PAGES * PAGE_SIZE as u64;

/// Numbers taken from the input; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Mostly one that makes sense.
    fn length(&mut self) -> u32 {
        match self.byte() {
            255 => self.word(),
            few => u32::from(few) * 113 + 1,
        }
    }

    fn header(&mut self) -> RecordHeader {
        RecordHeader {
            block: BlockId(u64::from(self.byte() % 8)),
            shard: ShardNo(self.byte() % 3),
            policy: u16::from_le_bytes([self.byte(), self.byte()]),
            length: self.length(),
            birth_ms: u64::from(self.byte()),
        }
    }

    fn volume(&mut self) -> VolumeId {
        VolumeId(u32::from(self.byte() % 3))
    }
}

/// Lays out a device as `input` says and recovers from it, twice. Whatever is there, nothing panics, and the second time
/// finds what the first has left.
pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let device = SimDevice::new(1 << 30, input.byte() & 1 == 0);
    for id in (0..3).map(VolumeId) {
        let Ok(file) = device.create(id, SIZE) else { return };
        let mut page = vec![0; PAGE_SIZE];
        VolumeLabel { id, uuid: UUID, salt: SALT, size: SIZE, created_ms: 0 }.encode(&mut page);
        let _ = device.write_now(&file, 0, &page);
    }
    // Enough to be interesting, few enough to be quick.
    for _ in 0..24 {
        if input.0.is_empty() {
            break;
        }
        lay(&device, &mut input);
    }
    let Ok(first) = recover(&device, UUID) else { return };
    let Ok(second) = recover(&device, UUID) else { panic!("recovery worked once and not again") };
    assert_eq!((first.shards, first.shard_bytes), (second.shards, second.shard_bytes));
}

/// Puts one thing on the device.
fn lay(device: &SimDevice, input: &mut Input<'_>) {
    let (what, id) = (input.byte() % 7, input.volume());
    let Ok((file, _)) = device.open(id) else { return };
    let position = u64::from(input.byte()) % PAGES * PAGE_SIZE as u64;
    let mut page = vec![0; PAGE_SIZE];
    match what {
        0 => {
            fill_header(&mut page, &input.header(), SALT, position);
            let _ = device.write_now(&file, position, &page);
        }
        1 => {
            let header = input.header();
            let len = record_bytes(header.length);
            if header.length as usize <= fjordfs_proto::BLOCK_SIZE_MAX && position + len <= SIZE {
                let mut record = vec![input.byte(); len as usize];
                let crcs = page_crcs(&record[PAGE_SIZE..PAGE_SIZE + header.length as usize]);
                fill_table(&mut record, header.length, &crcs);
                fill_header(&mut record, &header, SALT, position);
                let _ = device.write_now(&file, position, &record);
            }
        }
        2 => {
            page.fill_with(|| input.byte());
            let _ = device.write_now(&file, position, &page);
        }
        3 => {
            let _ = device.punch_now(&file, position..position + PAGE_SIZE as u64);
        }
        4 => device.truncate(id, position),
        5 => {
            let size = u64::from(input.word()) * if input.byte() & 1 == 0 { 1 } else { u64::from(u32::MAX) };
            VolumeLabel { id: input.volume(), uuid: UUID, salt: SALT, size, created_ms: 0 }.encode(&mut page);
            let _ = device.write_now(&file, 0, &page);
        }
        _ => {
            let _ = device.write_checkpoint(&mut |out| checkpoint(input, out));
            let _ = device.publish_checkpoint();
        }
    }
}

fn checkpoint(input: &mut Input<'_>, out: &mut dyn std::io::Write) -> std::io::Result<()> {
    let volumes = (0..input.byte() % 4).map(|_| CheckpointVolume {
        id: input.volume(),
        salt: if input.byte() & 1 == 0 { SALT } else { u64::from(input.word()) },
        size: if input.byte() & 1 == 0 { SIZE } else { u64::from(input.word()) << 12 },
        position: u64::from(input.word()) << (input.byte() % 24),
    });
    let volumes = volumes.collect();
    let head = CheckpointHead { uuid: UUID, next_volume: input.word(), volumes };
    let mut writer = CheckpointWriter::begin(out, &head)?;
    for _ in 0..input.byte() % 16 {
        let RecordHeader { block, shard, policy, length, .. } = input.header();
        let length = length % (fjordfs_proto::BLOCK_SIZE_MAX as u32 + 1);
        let page = if input.byte() < 250 { u32::from(input.byte()) } else { input.word() % (1 << 20) };
        writer.add(&Entry { block, shard, policy, length, volume: input.volume(), page })?;
    }
    writer.end()
}

#[cfg(test)]
#[path = "../../../tests/fuzz/inputs.rs"]
mod inputs;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::inputs::{corpus, like};

    #[test]
    fn nothing_of_the_corpus_is_recovered_in_two_ways() {
        corpus("volume").iter().for_each(|input| super::run(input));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn nor_is_what_is_like_it(input in like(corpus("volume"))) {
            super::run(&input);
        }
    }
}
