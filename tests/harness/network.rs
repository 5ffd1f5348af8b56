//! Several hosts on one machine: a network namespace each, and between them a switch that can be told to cut, delay and
//! lose.
//!
//! The switch is this process: every host has one TUN device, whose other end is read here, and a packet is written to the device
//! of whom it is for, or not. So a fault needs nothing of the kernel but `CONFIG_TUN` (no netem, no filter tables), works in one
//! direction if wanted, and which packet is lost follows from the seed and the order of packets alone. Namespaces have no names
//! and go with the last process in them: a test that dies leaves nothing behind.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    ffi::CString,
    fs::File,
    io::{self, Read, Write},
    net::Ipv4Addr,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rand::Rng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::rng::{self, TestRng};

/// Jumbo frames: bulk data costs a ninth of the packets.
const MTU: usize = 9000;

/// Number of a host in its network.
pub type HostNo = usize;

/// What the switch does to packets.
#[derive(Debug, Default)]
struct Rules {
    cut: BTreeSet<(HostNo, HostNo)>,
    delay: BTreeMap<HostNo, Duration>,
    loss_per_mille: BTreeMap<HostNo, u32>,
}

/// A host's namespace, and our end of its device.
#[derive(Debug)]
struct Host {
    namespace: File,
    device: File,
}

#[derive(Debug)]
struct Shared {
    hosts: Vec<Host>,
    rules: Mutex<Rules>,
    stopped: AtomicBool,
    forwarded: AtomicU64,
    dropped: AtomicU64,
}

/// Hosts and the switch between them. Gone when dropped.
#[derive(Debug)]
pub struct Network {
    shared: Arc<Shared>,
    switch: Option<JoinHandle<()>>,
}

/// A packet that waits: when it is due, in which order it came, for whom.
type Waiting = Reverse<(Instant, u64, HostNo, Vec<u8>)>;

impl Network {
    /// Makes hosts 0 to `hosts` - 1, all connected.
    ///
    /// # Panics
    /// When the kernel refuses: it takes root, `/dev/net/tun`, and the program `ip`.
    pub fn new(hosts: usize, seed: u64) -> Network {
        let made = (0..hosts).map(|no| {
            let maker = std::thread::spawn(move || make_host(no));
            maker.join().expect("the thread that makes a host").unwrap_or_else(|e| panic!("host {no}: {e}"))
        });
        let shared = Arc::new(Shared {
            hosts: made.collect(),
            rules: Mutex::default(),
            stopped: AtomicBool::new(false),
            forwarded: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        });
        let of_switch = Arc::clone(&shared);
        let rng = rng::stream(seed, 0x5717c4);
        let switch = std::thread::spawn(move || Switch::new(&of_switch, rng).run());
        Network { shared, switch: Some(switch) }
    }

    /// Address of a host.
    pub fn address(host: HostNo) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, host as u8 + 1)
    }

    /// Has a command run on a host.
    pub fn enter(&self, command: &mut Command, host: HostNo) {
        let fd = self.shared.hosts[host].namespace.as_raw_fd();
        // By way of /proc: the process that is to run it may not have our descriptors.
        let link = CString::new(format!("/proc/{}/fd/{fd}", std::process::id())).expect("no NUL");
        // SAFETY: open, setns and close are async-signal-safe, and the string was made before.
        unsafe {
            command.pre_exec(move || {
                let fd = libc::open(link.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
                if fd < 0 || libc::setns(fd, libc::CLONE_NEWNET) != 0 {
                    return Err(io::Error::last_os_error());
                }
                libc::close(fd);
                Ok(())
            });
        }
    }

    /// Does something on a host.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn on<T: Send>(&self, host: HostNo, act: impl FnOnce() -> T + Send) -> T {
        let namespace = &self.shared.hosts[host].namespace;
        let there = || {
            // SAFETY: only this thread changes its namespace, and it ends with what it does there.
            let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(entered, 0, "{}", io::Error::last_os_error());
            act()
        };
        std::thread::scope(|scope| scope.spawn(there).join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.shared.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops what goes from one host to another, in that direction only.
    pub fn cut(&self, from: HostNo, to: HostNo) {
        self.rules().cut.insert((from, to));
    }

    /// Ends a [`Network::cut`].
    pub fn join(&self, from: HostNo, to: HostNo) {
        self.rules().cut.remove(&(from, to));
    }

    /// Everything that a host sends and gets arrives this much later, by up to a half more; zero ends it.
    pub fn delay(&self, host: HostNo, by: Duration) {
        if by.is_zero() {
            self.rules().delay.remove(&host);
        } else {
            self.rules().delay.insert(host, by);
        }
    }

    /// Loses this share of what a host sends and gets; 0 ends it.
    pub fn lose(&self, host: HostNo, per_mille: u32) {
        self.rules().loss_per_mille.insert(host, per_mille);
    }

    /// All connected again, nothing delayed, nothing lost.
    pub fn mend(&self) {
        *self.rules() = Rules::default();
    }

    /// How many hosts there are.
    pub fn hosts(&self) -> usize {
        self.shared.hosts.len()
    }

    /// Packets delivered, and packets dropped by rule.
    pub fn counts(&self) -> (u64, u64) {
        (self.shared.forwarded.load(Ordering::Relaxed), self.shared.dropped.load(Ordering::Relaxed))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        if let Some(switch) = self.switch.take() {
            let _ = switch.join();
        }
    }
}

/// Runs in a thread of its own, which the new namespace is of.
fn make_host(no: HostNo) -> io::Result<Host> {
    // SAFETY: only this thread changes its namespace, and it ends soon.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let namespace = File::open("/proc/thread-self/ns/net")?;
    let device = open_tun("tun0")?;
    let address = format!("{}/24", Network::address(no));
    for line in [
        "link set lo up".to_owned(),
        format!("addr add {address} dev tun0"),
        format!("link set tun0 mtu {MTU} txqueuelen 5000 up"),
    ] {
        let status = Command::new("ip").args(line.split(' ')).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("`ip {line}` ended with {status}")));
        }
    }
    Ok(Host { namespace, device })
}

fn open_tun(name: &str) -> io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq of zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is a TUN's, the request lives until the call returns.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::io::ioctl_fionbio(&device, true)?;
    Ok(device)
}

/// The thread that moves packets.
struct Switch<'a> {
    shared: &'a Shared,
    rng: TestRng,
    waiting: BinaryHeap<Waiting>,
    order: u64,
}

impl<'a> Switch<'a> {
    fn new(shared: &'a Shared, rng: TestRng) -> Switch<'a> {
        Switch { shared, rng, waiting: BinaryHeap::new(), order: 0 }
    }

    fn run(&mut self) {
        let mut buffer = vec![0; MTU + 64];
        while !self.shared.stopped.load(Ordering::Relaxed) {
            let devices: Vec<BorrowedFd<'_>> = self.shared.hosts.iter().map(|h| h.device.as_fd()).collect();
            let mut ready: Vec<PollFd<'_>> =
                devices.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
            let due = self.waiting.peek().map(|Reverse((due, ..))| *due);
            let patience = due.map_or(Duration::from_millis(100), |due| {
                due.saturating_duration_since(Instant::now()).min(Duration::from_millis(100))
            });
            let patience = Timespec { tv_sec: 0, tv_nsec: patience.as_nanos() as i64 };
            if poll(&mut ready, Some(&patience)).is_err() {
                continue;
            }
            let readable: Vec<HostNo> =
                (0..ready.len()).filter(|i| ready[*i].revents().contains(PollFlags::IN)).collect();
            for from in readable {
                // Some at a time, so that nobody starves the others.
                for _ in 0..64 {
                    match (&self.shared.hosts[from].device).read(&mut buffer) {
                        Ok(len) => self.forward(from, &buffer[..len]),
                        Err(_) => break,
                    }
                }
            }
            self.deliver_due();
        }
    }

    fn forward(&mut self, from: HostNo, packet: &[u8]) {
        let Some(to) = receiver(packet).filter(|to| *to < self.shared.hosts.len()) else { return };
        let rules = self.shared.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let share = |host| rules.loss_per_mille.get(&host).copied().unwrap_or(0);
        let lost = (share(from) + share(to)).min(1000);
        let delay: Duration = [from, to].iter().filter_map(|host| rules.delay.get(host)).sum();
        let cut = rules.cut.contains(&(from, to));
        drop(rules);
        if cut || (lost > 0 && self.rng.random_range(0..1000) < lost) {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        } else if delay.is_zero() {
            self.deliver(to, packet);
        } else {
            let late = delay + delay.mul_f64(self.rng.random_range(0.0..0.5));
            self.order += 1;
            self.waiting.push(Reverse((Instant::now() + late, self.order, to, packet.to_vec())));
        }
    }

    fn deliver_due(&mut self) {
        let now = Instant::now();
        while self.waiting.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            if let Some(Reverse((_, _, to, packet))) = self.waiting.pop() {
                self.deliver(to, &packet);
            }
        }
    }

    fn deliver(&self, to: HostNo, packet: &[u8]) {
        // A queue that is full loses packets, as in any network.
        if (&self.shared.hosts[to].device).write(packet).is_ok() {
            self.shared.forwarded.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Whom an IPv4 packet is for.
fn receiver(packet: &[u8]) -> Option<HostNo> {
    let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let ours = packet[0] >> 4 == 4 && to[..3] == Network::address(0).octets()[..3];
    ours.then(|| usize::from(to[3]).checked_sub(1)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::run;

    fn says(network: &Network, host: HostNo, line: &str) -> bool {
        let mut command = Command::new("bash");
        command.args(["-c", line]);
        network.enter(&mut command, host);
        run(command).status.success()
    }

    #[test]
    fn hosts_reach_each_other_until_they_are_cut_off() {
        let network = Network::new(3, 1);
        let mut listen = Command::new("python3");
        listen.args(["-m", "http.server", "8000", "--bind", "10.77.0.2"]);
        network.enter(&mut listen, 1);
        let scratch = crate::Scratch::new("network");
        let mut server = crate::Process::start("a server", listen, &scratch.path().join("log"));
        // A connection is attempted once and has a bound of its own, so that a cut is seen as one.
        let connect = "timeout 3 bash -c '</dev/tcp/10.77.0.2/8000'";
        crate::wait::wait_until("a connection", crate::wait::SOON, || says(&network, 0, connect));
        network.delay(1, Duration::from_millis(5));
        assert!(says(&network, 2, connect));
        network.cut(1, 0);
        assert!(!says(&network, 0, connect), "answers arrive through a cut");
        assert!(says(&network, 2, connect), "a third host is cut off as well");
        network.mend();
        assert!(says(&network, 0, connect));
        network.lose(2, 1000);
        assert!(!says(&network, 2, connect), "nothing was lost");
        let (forwarded, dropped) = network.counts();
        assert!(forwarded > 10 && dropped > 0, "{forwarded} forwarded, {dropped} dropped");
        server.assert_running();
    }
}
