//! Options of the transport between kernel and mount: `transport=`, `uring_depth=`, `uring_payload=`, `uring_memory=`, `poll_us=`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{OptionError, REQUEST_SIZE_MAX, REQUEST_SIZE_MIN, expected, number};

/// Entries of a queue. The kernel has no bound; beyond this a queue only hides that the servers are too slow.
const DEPTH_MAX: u64 = 1024;
const MEMORY_MIN: u64 = 64 << 10;
const MEMORY_MAX: u64 = 1 << 40;
/// Polling longer than the slowest wake-up only burns a core.
const POLL_US_MAX: u64 = 1000;

/// Which transport to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TransportChoice {
    /// io_uring where it is possible, else /dev/fuse, with the reason in the log.
    #[default]
    Auto,
    /// io_uring, or no mount.
    IoUring,
    /// /dev/fuse.
    DevFuse,
}

/// How the io_uring transport is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UringOptions {
    /// Requests in flight per possible CPU; fewer if they do not fit into `memory_max`.
    pub depth: usize,
    /// Largest read or write in one request, bytes, if smaller than the mount's `request_size_max`.
    pub payload: Option<usize>,
    /// Most memory for all entries of all CPUs, bytes. Only what requests have touched is resident.
    pub memory_max: usize,
    /// How long an idle thread looks for requests before it sleeps. Costs that much of its core after each request.
    pub poll: Duration,
    /// For tests.
    #[doc(hidden)]
    pub faults: UringFaults,
}

/// What tests make fail; in service nothing is.
#[doc(hidden)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UringFaults {
    /// The kernel's switch.
    pub parameter: PathBuf,
    /// The thread of this index gets no ring.
    pub no_ring: Option<usize>,
    /// The kernel is given entries of this queue that it must refuse.
    pub bad_queue: Option<u16>,
    /// What threads in service hand to the kernel is refused this often.
    pub busy: Busy,
}

/// How often a submission still fails as if the kernel had no memory for it. Clones count together.
#[doc(hidden)]
#[derive(Clone, Debug, Default)]
pub struct Busy(Arc<AtomicU32>);

impl Busy {
    /// So often.
    pub fn times(times: u32) -> Busy {
        Busy(Arc::new(AtomicU32::new(times)))
    }

    /// How often from now on.
    pub fn left(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether it is the turn of one that fails.
    pub(crate) fn again(&self) -> bool {
        self.left() > 0
            && self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
    }
}

impl PartialEq for Busy {
    fn eq(&self, other: &Busy) -> bool {
        self.left() == other.left()
    }
}

impl Eq for Busy {}

impl Default for UringOptions {
    fn default() -> UringOptions {
        UringOptions {
            depth: 32,
            payload: None,
            memory_max: 256 << 20,
            poll: Duration::ZERO,
            faults: UringFaults {
                parameter: PathBuf::from("/sys/module/fuse/parameters/enable_uring"),
                no_ring: None,
                bad_queue: None,
                busy: Busy::default(),
            },
        }
    }
}

/// `transport=`.
pub(super) fn choice(option: &str, value: Option<&str>) -> Result<TransportChoice, OptionError> {
    match value {
        Some("auto") => Ok(TransportChoice::Auto),
        Some("io_uring") => Ok(TransportChoice::IoUring),
        Some("dev_fuse") => Ok(TransportChoice::DevFuse),
        _ => Err(expected(option, "give auto, io_uring or dev_fuse")),
    }
}

impl UringOptions {
    /// Applies one option; false when it is none of these.
    pub(super) fn apply(
        &mut self,
        option: &str,
        key: &str,
        value: Option<&str>,
    ) -> Result<bool, OptionError> {
        match key {
            "uring_depth" => self.depth = number(option, value, 1, DEPTH_MAX)? as usize,
            "uring_payload" => {
                let size = size(option, value, REQUEST_SIZE_MIN, REQUEST_SIZE_MAX)? as usize;
                self.payload = Some(size & !(REQUEST_SIZE_MIN as usize - 1));
            }
            "uring_memory" => self.memory_max = size(option, value, MEMORY_MIN, MEMORY_MAX)? as usize,
            "poll_us" => self.poll = Duration::from_micros(number(option, value, 0, POLL_US_MAX)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Bytes, as `65536`, `64K`, `64KiB` or `1M`.
fn size(option: &str, value: Option<&str>, min: u64, max: u64) -> Result<u64, OptionError> {
    value
        .and_then(|value| {
            let digits = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
            let (count, unit) = value.split_at(digits);
            let shift = match unit {
                "" => 0,
                "K" | "KiB" => 10,
                "M" | "MiB" => 20,
                "G" | "GiB" => 30,
                _ => return None,
            };
            count.parse::<u64>().ok()?.checked_mul(1 << shift)
        })
        .filter(|size| (min..=max).contains(size))
        .ok_or_else(|| {
            expected(option, format!("give a size from {min} to {max} bytes, as 65536, 64K or 1M"))
        })
}

#[cfg(test)]
mod tests {
    use crate::options::MountOptions;

    use super::*;

    #[test]
    fn values_and_units() {
        let mut options = MountOptions::new("m:1", "/mnt");
        let list = "transport=io_uring,uring_depth=4,uring_payload=130K,uring_memory=64MiB,poll_us=50";
        assert!(options.apply(list, &[]).unwrap().is_empty());
        assert_eq!(options.transport, TransportChoice::IoUring);
        assert_eq!((options.uring.depth, options.uring.payload), (4, Some(128 << 10)), "whole pages");
        assert_eq!((options.uring.memory_max, options.uring.poll), (64 << 20, Duration::from_micros(50)));
    }

    #[test]
    fn errors_say_what_to_give() {
        for (list, part) in [
            ("transport", "auto, io_uring or dev_fuse"),
            ("transport=uring", "auto, io_uring or dev_fuse"),
            ("uring_depth=0", "whole number from 1 to 1024"),
            ("uring_depth=lots", "mount option `uring_depth=lots`"),
            ("uring_payload=100", "from 4096 to 16777216 bytes"),
            ("uring_payload=1X", "as 65536, 64K or 1M"),
            ("uring_memory=99999999999G", "size from"),
            ("uring_memory", "size from"),
            ("poll_us=1001", "from 0 to 1000"),
        ] {
            let message = MountOptions::new("m:1", "/mnt").apply(list, &[]).unwrap_err().to_string();
            assert!(message.contains(part), "{list}: {message}");
        }
    }
}
