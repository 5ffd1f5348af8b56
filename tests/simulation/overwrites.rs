//! Files are synced, then written over without a sync, and all hosts lose their power. Each file must be there as it was synced, or
//! as it was written over.

use std::time::Duration;

use bytes::Bytes;
use fjordfs_client::{CopiedRange, FsResult, InodeId, ROOT_INODE};
use fjordfs_proto::Policy;
use fjordfs_tests::rng;
use rand::Rng;

use crate::{
    cluster::Cluster,
    network::{Net, Weather},
    programs::{NEW, content},
    run::{Outcome, simulate, trace, violation},
};

const FILES: u64 = 12;
const SIZE: usize = 50_000;
/// What is written over lies in the middle.
const PART: std::ops::Range<usize> = 8_000..40_000;

/// Runs a seed.
///
/// # Errors
/// What did not hold.
pub(crate) fn run(seed: u64) -> Result<Outcome, String> {
    simulate(seed, async {
        if let Err(e) = play(seed).await {
            violation(format!("nothing else may fail: {e}"));
        }
        (2 * FILES, 1)
    })
}

async fn play(seed: u64) -> FsResult<()> {
    let mut random = rng::stream(seed, 0);
    let (policy, servers) = if random.random() { ("replica:2", 3) } else { ("ec:2+1", 4) };
    let policy: Policy = policy.parse().unwrap();
    let net = Net::new(seed, Weather { delay_ms: 1, lost_in: 1_000_000 });
    let mut cluster = Cluster::new(net, seed, servers, policy);
    cluster.start_meta();
    (0..servers).for_each(|at| cluster.start_data(at));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let host = cluster.new_client_host();
    // Every close commits, so that each file has its own blocks.
    let client = cluster.client(host, false).await?;
    let mut files = Vec::new();
    for at in 0..FILES {
        let (attr, file) = client.create(ROOT_INODE, format!("f{at}").as_bytes(), NEW).await?;
        file.write_at(0, content(at, SIZE)).await?;
        file.fsync().await?;
        files.push(InodeId(attr.ino));
    }
    for (ino, at) in files.iter().zip(0..) {
        let (_, file) = client.open(*ino).await?;
        let (to, new) = (PART.start as u64, content(FILES + at, PART.len()));
        if at % 2 == 0 {
            file.write_at(to, new).await?;
        } else {
            // Out of a file that was not synced either.
            let (_, source) = client.create(ROOT_INODE, format!("s{at}").as_bytes(), NEW).await?;
            source.write_at(0, new).await?;
            let length = PART.len() as u64;
            let range = CopiedRange { from: 0, to, length, clear_suid: false, same_as: None };
            assert_eq!(file.copy_from(&source, range).await?, length);
        }
        file.close().await?;
    }
    tokio::time::sleep(Duration::from_millis(random.random_range(0..4000))).await;
    trace(format_args!("the power fails"));
    cluster.net.kill_for_good(host);
    cluster.kill_meta(true);
    for at in 0..servers {
        cluster.kill_data(at, true);
        cluster.start_data(at);
    }
    cluster.start_meta();
    let host = cluster.new_client_host();
    let client = cluster.client(host, true).await?;
    for (ino, at) in files.iter().zip(0..) {
        let old = content(at, SIZE);
        let new = [&old[..PART.start], &content(FILES + at, PART.len()), &old[PART.end..]].concat();
        match client.open(*ino).await?.1.read_at(0, SIZE + 1).await {
            Ok(parts) if [old, Bytes::from(new)].contains(&parts.concat().into()) => {}
            Ok(_) => violation(format!("file {at} is neither what it was nor what it became")),
            Err(e) => violation(format!("file {at}: {e}")),
        }
    }
    client.shutdown().await
}
