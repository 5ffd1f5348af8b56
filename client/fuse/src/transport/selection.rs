//! Which transport a mount gets, decided before it is mounted: the kernel offers FUSE over io_uring only to mounts made while its
//! switch is on, and after INIT was answered there is hardly a way back.

use std::fmt;
use std::io;
use std::path::Path;

use super::io_uring::{self, cpus, memory};
use crate::options::{MountOptions, TransportChoice};

/// The transport of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    /// A ring for each core, and /dev/fuse for what the kernel sends only there.
    IoUring {
        /// Threads, each with a ring.
        threads: usize,
        /// Queues, one for each possible CPU.
        queues: usize,
        /// Entries of each queue: requests in flight.
        depth: usize,
    },
    /// Reading and writing /dev/fuse.
    DevFuse,
}

/// How the kernel's requests come, and why not otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportInfo {
    /// What is used.
    pub kind: TransportKind,
    /// Why io_uring is not, although it was not ruled out by option.
    pub fallback: Option<String>,
}

impl TransportInfo {
    /// The option's value that would choose it.
    pub fn name(&self) -> &'static str {
        match self.kind {
            TransportKind::IoUring { .. } => "io_uring",
            TransportKind::DevFuse => "dev_fuse",
        }
    }
}

impl fmt::Display for TransportInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, &self.fallback) {
            (TransportKind::IoUring { threads, queues, depth }, _) => {
                write!(f, "io_uring ({threads} threads, {queues} queues of {depth} entries)")
            }
            (TransportKind::DevFuse, Some(reason)) => write!(f, "/dev/fuse, because {reason}"),
            (TransportKind::DevFuse, None) => f.write_str("/dev/fuse"),
        }
    }
}

/// On hosts with many CPUs requests are made smaller, down to this, as long as fewer entries than that fit.
const SIZE_MIN: usize = 128 << 10;
const DEPTH_MIN: usize = 6;

/// What is to be set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    IoUring(Plan),
    DevFuse { fallback: Option<String> },
}

/// Size of the io_uring transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) shares: Vec<cpus::Share>,
    pub(crate) queues: usize,
    pub(crate) depth: usize,
    /// Largest request, bytes.
    pub(crate) size_max: usize,
}

/// Chooses; the error is why the transport that was insisted on is not possible.
pub(crate) fn select(options: &MountOptions) -> Result<Selection, String> {
    if options.transport == TransportChoice::DevFuse {
        return Ok(Selection::DevFuse { fallback: None });
    }
    match probe(options) {
        Ok(plan) => Ok(Selection::IoUring(plan)),
        Err(reason) if options.transport == TransportChoice::IoUring => Err(reason),
        Err(reason) => Ok(Selection::DevFuse { fallback: Some(reason) }),
    }
}

/// How the kernel's requests will come to a mount with these options, unless the kernel refuses it at the beginning, which the mount logs.
///
/// # Errors
/// Why the transport that was insisted on is not possible.
pub fn planned_transport(options: &MountOptions) -> Result<TransportInfo, String> {
    Ok(match select(options)? {
        Selection::IoUring(plan) => TransportInfo { kind: plan.kind(), fallback: None },
        Selection::DevFuse { fallback } => TransportInfo { kind: TransportKind::DevFuse, fallback },
    })
}

impl Plan {
    pub(crate) fn kind(&self) -> TransportKind {
        TransportKind::IoUring { threads: self.shares.len(), queues: self.queues, depth: self.depth }
    }
}

fn probe(options: &MountOptions) -> Result<Plan, String> {
    switch_on(&options.uring.faults.parameter)?;
    io_uring::probe().map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is not permitted here (sysctl kernel.io_uring_disabled, or a container's seccomp profile)".to_owned()
        }
        _ => format!("io_uring cannot be set up: {e}"),
    })?;
    let cpus = |e: io::Error| format!("the CPUs cannot be listed: {e}");
    let queues = cpus::queue_count().map_err(cpus)?;
    let usable = cpus::usable().map_err(cpus)?;
    let (wanted, memory_max) = (options.uring.depth, options.uring.memory_max);
    let size_max = match options.uring.payload {
        Some(max) => max.min(options.request_size_max),
        None => size_for(queues, options.request_size_max, wanted, memory_max),
    };
    let depth = depth(queues, size_max, wanted, memory_max)?;
    Ok(Plan { shares: cpus::share(queues, &usable, options.threads), queues, depth, size_max })
}

/// The kernel's own switch. Turned on where we may, for all later mounts too: their programs choose for themselves.
fn switch_on(parameter: &Path) -> Result<(), String> {
    let read = || std::fs::read_to_string(parameter);
    let state = read().or_else(|_| {
        // The first opening loads the module.
        let _device = super::dev_fuse::open_device();
        read()
    });
    match state {
        Ok(state) if state.trim() == "Y" => return Ok(()),
        Ok(_) => {}
        Err(_) => return Err("this kernel has no FUSE over io_uring (it came with Linux 6.14)".to_owned()),
    }
    let path = parameter.display();
    match std::fs::write(parameter, "Y") {
        Ok(()) => {
            tracing::info!("turned on FUSE over io_uring: wrote Y to {path}");
            Ok(())
        }
        Err(e) => Err(format!("FUSE over io_uring is off; root can turn it on with `echo Y > {path}` ({e})")),
    }
}

/// The largest request for which enough entries fit: a few that wait for a slow server must not keep a CPU from everything else.
fn size_for(queues: usize, size_max: usize, wanted: usize, memory_max: usize) -> usize {
    let mut size = size_max;
    while size / 2 >= SIZE_MIN && memory_max / (queues * memory::entry_len(size)) < DEPTH_MIN.min(wanted) {
        size /= 2;
    }
    size
}

/// As many entries for each queue as were asked for and fit.
fn depth(queues: usize, size_max: usize, wanted: usize, memory_max: usize) -> Result<usize, String> {
    let each = queues * memory::entry_len(size_max);
    let fits = memory_max / each;
    if fits == 0 {
        return Err(format!(
            "one request of {size_max} bytes for each of {queues} possible CPUs needs {each} bytes, more than \
             uring_memory={memory_max}; raise it or lower uring_payload"
        ));
    }
    if fits < wanted {
        tracing::info!(
            "{fits} instead of {wanted} requests in flight per CPU: {queues} queues fit into uring_memory={memory_max} so"
        );
    }
    Ok(wanted.min(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> MountOptions {
        MountOptions::new("m:1", "/mnt")
    }

    #[test]
    fn depth_is_what_fits() {
        assert_eq!(depth(2, 1 << 20, 32, 256 << 20), Ok(32));
        assert_eq!(depth(64, 1 << 20, 32, 256 << 20), Ok(3));
        assert_eq!(depth(64, 1 << 17, 32, 256 << 20), Ok(31));
        let error = depth(512, 1 << 20, 8, 256 << 20).unwrap_err();
        assert!(error.contains("512 possible CPUs") && error.contains("uring_payload"), "{error}");
    }

    #[test]
    fn many_cpus_get_smaller_requests_before_they_get_few() {
        let planned = |queues| {
            let size = size_for(queues, 1 << 20, 32, 256 << 20);
            (size >> 10, depth(queues, size, 32, 256 << 20).unwrap())
        };
        assert_eq!([2, 32, 64, 128, 256].map(planned), [(1024, 32), (1024, 7), (512, 7), (256, 7), (128, 7)]);
        assert_eq!(planned(512), (128, 3), "no smaller");
        assert_eq!(size_for(64, 1 << 20, 3, 256 << 20), 1 << 20, "as deep as was asked for");
    }

    #[test]
    fn dev_fuse_by_option_has_no_reason() {
        let options = MountOptions { transport: TransportChoice::DevFuse, ..options() };
        assert_eq!(select(&options), Ok(Selection::DevFuse { fallback: None }));
    }

    #[test]
    fn what_is_planned_can_be_told_before_mounting() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options();
        options.uring.faults.parameter = folder.path().join("enable_uring");
        let planned = planned_transport(&options).unwrap();
        assert_eq!(planned.name(), "dev_fuse");
        assert!(planned.to_string().contains("because this kernel has no FUSE over io_uring"), "{planned}");
        options.transport = TransportChoice::IoUring;
        assert!(planned_transport(&options).is_err());
    }

    #[test]
    fn a_missing_or_locked_switch_is_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options();
        options.uring.faults.parameter = folder.path().join("enable_uring");
        let Ok(Selection::DevFuse { fallback: Some(reason) }) = select(&options) else { panic!() };
        assert!(reason.contains("Linux 6.14"), "{reason}");
        options.transport = TransportChoice::IoUring;
        assert_eq!(select(&options), Err(reason));
        // A file that says no and cannot be written, whoever we are: the folder of the same name.
        let reason = switch_on(Path::new("/proc/self/comm/enable_uring")).unwrap_err();
        assert!(reason.contains("Linux 6.14"), "{reason}");
    }

    #[test]
    fn the_switch_is_turned_on() {
        let folder = tempfile::tempdir().unwrap();
        let parameter = folder.path().join("enable_uring");
        std::fs::write(&parameter, "N\n").unwrap();
        switch_on(&parameter).unwrap();
        assert_eq!(std::fs::read_to_string(&parameter).unwrap().trim(), "Y");
        // /proc/version says something else than Y, and nobody can write to it.
        let reason = switch_on(Path::new("/proc/version")).unwrap_err();
        assert!(reason.contains("echo Y > /proc/version"), "{reason}");
    }

    #[test]
    fn a_smaller_payload_counts_and_a_larger_does_not() {
        let mut options = options();
        options.uring.memory_max = 1 << 40;
        for (payload, expected) in [(Some(65_536), 65_536), (Some(16 << 20), 1 << 20), (None, 1 << 20)] {
            options.uring.payload = payload;
            // Where io_uring is not possible there is nothing to see.
            if let Ok(plan) = probe(&options) {
                assert_eq!(plan.size_max, expected);
            }
        }
    }

    #[test]
    fn people_can_read_it() {
        let uring = TransportInfo {
            kind: TransportKind::IoUring { threads: 2, queues: 4, depth: 8 },
            fallback: None,
        };
        assert_eq!(uring.to_string(), "io_uring (2 threads, 4 queues of 8 entries)");
        let fallback = TransportInfo { kind: TransportKind::DevFuse, fallback: Some("it is so".to_owned()) };
        assert_eq!(
            (fallback.to_string().as_str(), fallback.name()),
            ("/dev/fuse, because it is so", "dev_fuse")
        );
    }
}
