//! Client CPU time of writing through the library, by policy.
//!
//! `write_policy META MIB ROUNDS POLICY...` writes a file of MIB mebibytes under each policy in turn, ROUNDS times, and
//! prints the CPU time of this process per mebibyte, user and system: encoding, checksums and sending.
#![allow(clippy::print_stdout, reason = "its report")]

use std::time::{Duration, Instant};

use bytes::Bytes;
use fjordfs_client::{AttrChange, Client, InodeId, Options};
use fjordfs_proto::Policy;

/// Bytes handed over at a time, as the kernel does with large writes.
const PIECE: usize = 1 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [meta, mib, rounds, policies @ ..] = &arguments[..] else {
        return Err("usage: write_policy META MIB ROUNDS POLICY...".into());
    };
    let (mib, rounds): (u64, u32) = (mib.parse()?, rounds.parse()?);
    let policies = policies.iter().map(|text| text.parse()).collect::<Result<Vec<Policy>, _>>()?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(meta, mib, rounds, &policies))
}

async fn measure(
    meta: &str,
    mib: u64,
    rounds: u32,
    policies: &[Policy],
) -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::connect(meta, Options { local_sockets: false, ..Options::default() }).await?;
    for policy in policies {
        let dir = InodeId(client.create_dir_all(&format!("/write_policy/{policy}")).await?.ino);
        client.setattr(dir, AttrChange { policy: Some(*policy), ..AttrChange::default() }).await?;
    }
    println!("policy      user ms/MiB  system ms/MiB  total ms/MiB  MiB/s");
    for round in 0..rounds {
        for policy in policies {
            let path = format!("/write_policy/{policy}/{round}");
            let data = Bytes::from((0..PIECE as u32).map(|i| ((i * 7) >> 3) as u8).collect::<Vec<u8>>());
            let file = client.create_path(&path).await?;
            let (before, began) = (cpu()?, Instant::now());
            for i in 0..mib {
                file.write_at(i * PIECE as u64, data.clone()).await?;
            }
            file.fsync().await?;
            let (after, seconds) = (cpu()?, began.elapsed().as_secs_f64());
            let per_mib = |d: Duration| d.as_secs_f64() * 1e3 / mib as f64;
            let (user, system) = (per_mib(after.0 - before.0), per_mib(after.1 - before.1));
            println!(
                "{policy:<10} {user:>12.3} {system:>14.3} {:>13.3} {:>6.0}",
                user + system,
                mib as f64 / seconds
            );
            client.remove_file(&path).await?;
        }
    }
    client.shutdown().await?;
    Ok(())
}

/// User and system time of this process.
fn cpu() -> std::io::Result<(Duration, Duration)> {
    // SAFETY: plain old data that the call below fills in.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a live rusage.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok((time(usage.ru_utime), time(usage.ru_stime)))
}
