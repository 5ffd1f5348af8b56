//! Which thread serves the queues of which CPUs.
//!
//! The kernel puts a request into the queue of the CPU that its caller runs on, and has one for every *possible* CPU. A thread serves the
//! queues of the CPUs it may run on, so that caller, request and answer stay in one CPU's caches. Queues of CPUs that are
//! offline, or closed to us, are shared out.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What one thread does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Queues, which are numbered as the possible CPUs.
    pub(crate) queues: Vec<u16>,
    /// CPUs to run on.
    pub(crate) cpus: Vec<usize>,
}

/// How many queues the kernel has.
pub(crate) fn queue_count() -> io::Result<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    count(&list)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not a list of CPUs: {list}")))
}

/// CPUs in a list like `0-3,8`.
fn count(list: &str) -> Option<usize> {
    list.trim().split(',').try_fold(0usize, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// CPUs that this process may run on.
pub(crate) fn usable() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

/// Shares `queues` out among at most `threads` threads, as many as there are CPUs to run on.
pub(crate) fn share(queues: usize, usable: &[usize], threads: usize) -> Vec<Share> {
    let threads = threads.min(usable.len()).max(1);
    let mut shares = vec![Share { queues: Vec::new(), cpus: Vec::new() }; threads];
    for (index, &cpu) in usable.iter().enumerate() {
        shares[index % threads].cpus.push(cpu);
    }
    let mut next = 0;
    // A queue number is 16 bits in the kernel's command.
    for queue in 0..u16::try_from(queues).unwrap_or(u16::MAX) {
        let own = shares.iter().position(|share| share.cpus.contains(&usize::from(queue)));
        let owner = own.unwrap_or_else(|| {
            next += 1;
            (next - 1) % threads
        });
        shares[owner].queues.push(queue);
    }
    shares
}

/// Keeps the calling thread on some CPUs.
pub(crate) fn stay_on(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|&cpu| set.set(cpu));
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_counted() {
        assert_eq!(count("0-1\n"), Some(2));
        assert_eq!(count("0"), Some(1));
        assert_eq!(count("0-3,8,10-11"), Some(7));
        for bad in ["", "x", "3-1", "0-18446744073709551615", "1-"] {
            assert_eq!(count(bad), None, "{bad}");
        }
    }

    fn shares(queues: usize, usable: &[usize], threads: usize) -> Vec<(Vec<u16>, Vec<usize>)> {
        share(queues, usable, threads).into_iter().map(|share| (share.queues, share.cpus)).collect()
    }

    #[test]
    fn a_thread_serves_its_own_cpu() {
        assert_eq!(shares(2, &[0, 1], 8), [(vec![0], vec![0]), (vec![1], vec![1])]);
        assert_eq!(shares(3, &[0, 1, 2], 2), [(vec![0, 2], vec![0, 2]), (vec![1], vec![1])]);
        assert_eq!(shares(2, &[0, 1], 1), [(vec![0, 1], vec![0, 1])]);
    }

    #[test]
    fn queues_of_other_cpus_are_shared_out() {
        // CPUs 0 and 3 are ours, 1, 2, 4 and 5 are offline or others'.
        assert_eq!(shares(6, &[0, 3], 2), [(vec![0, 1, 4], vec![0]), (vec![2, 3, 5], vec![3])]);
        assert_eq!(shares(2, &[], 2), [(vec![0, 1], vec![])]);
    }

    #[test]
    fn every_queue_has_one_owner() {
        for (queues, usable, threads) in [(64, vec![1, 5, 9], 2), (8, (0..8).collect(), 3), (1, vec![0], 4)] {
            let mut all: Vec<u16> =
                share(queues, &usable, threads).into_iter().flat_map(|s| s.queues).collect();
            all.sort_unstable();
            assert_eq!(all, (0..queues as u16).collect::<Vec<_>>());
        }
    }

    #[test]
    fn this_machine_has_queues_and_cpus() {
        assert!(queue_count().unwrap() >= usable().unwrap().len());
    }
}
