//! Servers of the metadata engines, as processes of the test: three etcd members, a PostgreSQL primary with a synchronous
//! standby. They listen on loopback, keep their data in a temporary folder, and end with the test.

use std::{
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const START_TIMEOUT: Duration = Duration::from_secs(60);
const POSTGRES_BIN: &str = "/usr/lib/postgresql/15/bin";

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("no free port").port()
}

fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < START_TIMEOUT, "{what} did not start within {START_TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Three members on this host.
pub struct Etcd {
    folder: tempfile::TempDir,
    client_ports: [u16; 3],
    peer_ports: [u16; 3],
    members: [Option<Child>; 3],
}

impl Etcd {
    /// Starts the members and waits until they answer.
    pub fn start() -> Etcd {
        let folder = tempfile::tempdir().expect("no temporary folder");
        let ports = || [free_port(), free_port(), free_port()];
        let mut etcd =
            Etcd { folder, client_ports: ports(), peer_ports: ports(), members: [None, None, None] };
        (0..3).for_each(|n| etcd.start_member(n));
        for port in etcd.client_ports {
            wait_until("etcd", || healthy(port));
        }
        etcd
    }

    /// Starts a member that does not run.
    pub fn start_member(&mut self, n: usize) {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let cluster: Vec<String> =
            self.peer_ports.iter().enumerate().map(|(n, port)| format!("m{n}={}", url(*port))).collect();
        let log = std::fs::File::create(self.folder.path().join(format!("m{n}.log"))).expect("no log");
        let member = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd", "--name", &format!("m{n}"), "--data-dir"])
            .arg(self.folder.path().join(format!("m{n}")))
            .args(["--listen-client-urls", &url(self.client_ports[n])])
            .args(["--advertise-client-urls", &url(self.client_ports[n])])
            .args(["--listen-peer-urls", &url(self.peer_ports[n])])
            .args(["--initial-advertise-peer-urls", &url(self.peer_ports[n])])
            .args(["--initial-cluster", &cluster.join(",")])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("cannot start etcd: install Debian's etcd-server");
        self.members[n] = Some(member);
    }

    /// `kill -9` of a member.
    pub fn kill_member(&mut self, n: usize) {
        if let Some(mut member) = self.members[n].take() {
            let _ = member.kill();
            let _ = member.wait();
        }
    }

    /// Address of a store below a prefix.
    pub fn url(&self, prefix: &str) -> String {
        let hosts: Vec<String> = self.client_ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("etcd://{}/{prefix}", hosts.join(","))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..3).for_each(|n| self.kill_member(n));
    }
}

/// By etcd's own health check, which commits something.
fn healthy(port: u16) -> bool {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut answer = String::new();
    stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok()
        && stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.contains("\"true\"")
}

/// A primary and its synchronous standby.
pub struct Postgres {
    folder: tempfile::TempDir,
    ports: [u16; 2],
    servers: [Option<Child>; 2],
    databases: u32,
}

impl Postgres {
    /// Starts both and waits until they answer.
    pub fn start() -> Postgres {
        let folder = tempfile::tempdir().expect("no temporary folder");
        if rustix::process::geteuid().is_root() {
            let chown = Command::new("chown").arg("postgres:").arg(folder.path()).status();
            assert!(chown.is_ok_and(|s| s.success()), "no user postgres: install Debian's postgresql-15");
        }
        let mut servers =
            Postgres { folder, ports: [free_port(), free_port()], servers: [None, None], databases: 0 };
        let primary = servers.data(0);
        servers
            .run("initdb", &["-D", text(&primary), "-A", "trust", "-U", "fjord", "-E", "UTF8", "--locale=C"]);
        servers.start_server(0);
        let (standby, port) = (servers.data(1), servers.ports[0].to_string());
        servers.run(
            "pg_basebackup",
            &[
                "-h",
                "127.0.0.1",
                "-p",
                &port,
                "-U",
                "fjord",
                "-D",
                text(&standby),
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
            ],
        );
        servers.start_server(1);
        servers
    }

    fn data(&self, n: usize) -> PathBuf {
        self.folder.path().join(["primary", "standby"][n])
    }

    fn command(&self, program: &str) -> Command {
        let program = format!("{POSTGRES_BIN}/{program}");
        let mut command = Command::new("setpriv");
        // It refuses to run as root.
        if rustix::process::geteuid().is_root() {
            command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]);
        }
        command.args(["--pdeathsig", "QUIT"]).arg(program).current_dir(self.folder.path());
        command
    }

    fn run(&self, program: &str, args: &[&str]) {
        let out = self.command(program).args(args).output().expect("cannot start setpriv");
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Starts a server that does not run: 0 was the primary at first, 1 its standby.
    pub fn start_server(&mut self, n: usize) {
        let log = std::fs::File::create(self.folder.path().join(format!("{n}.log"))).expect("no log");
        let port = self.ports[n].to_string();
        let standbys = if n == 0 { "synchronous_standby_names=*" } else { "synchronous_standby_names=" };
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data(n)).args(["-p", &port, "-c", "listen_addresses=127.0.0.1"]);
        command.args(["-c", "unix_socket_directories=", "-c", standbys]).stdout(Stdio::null()).stderr(log);
        self.servers[n] = Some(command.process_group(0).spawn().expect("cannot start setpriv"));
        wait_until("postgres", || {
            let ready = self.command("pg_isready").args(["-h", "127.0.0.1", "-p", &port]).output();
            ready.is_ok_and(|out| out.status.success())
        });
    }

    /// Ends a server at once, without a checkpoint or goodbyes.
    pub fn kill_server(&mut self, n: usize) {
        let Some(mut server) = self.servers[n].take() else { return };
        // `setpriv` became the server. Its processes share a group, and must all be gone before another may start here.
        if let Some(group) = rustix::process::Pid::from_raw(server.id().cast_signed()) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = server.wait();
    }

    /// Makes the standby the primary.
    pub fn promote(&self) {
        let standby = self.data(1);
        self.run("pg_ctl", &["promote", "-w", "-D", text(&standby)]);
    }

    /// Address of a new database, with both servers in it.
    pub fn url(&mut self) -> String {
        self.databases += 1;
        let name = format!("fjord{}", self.databases);
        let port = self.ports[0].to_string();
        let sql = format!("CREATE DATABASE {name}");
        self.run("psql", &["-h", "127.0.0.1", "-p", &port, "-U", "fjord", "-d", "postgres", "-c", &sql]);
        let [a, b] = self.ports;
        format!("postgres://fjord@127.0.0.1:{a},127.0.0.1:{b}/{name}")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        (0..2).for_each(|n| self.kill_server(n));
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}
