//! Servers of the metadata engines, as processes of the test: three etcd members, a PostgreSQL primary with a synchronous
//! standby. They listen on loopback or on hosts of a test, keep their data in a temporary folder, and end with the test.

#[path = "ports.rs"]
mod ports;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub use ports::free_port;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const POSTGRES_BIN: &str = "/usr/lib/postgresql/15/bin";

fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < START_TIMEOUT, "{what} did not start within {START_TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An authority, and the certificates of a server on loopback and of a client, in a folder.
pub struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    /// Makes them.
    pub fn make() -> Certificates {
        let folder = tempfile::tempdir().expect("no temporary folder");
        let openssl = |args: &str| {
            let out = Command::new("openssl").args(args.split(' ')).current_dir(folder.path()).output();
            let out = out.expect("cannot start openssl: install it");
            assert!(out.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&out.stderr));
        };
        let new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        openssl(&format!("req -x509 {new} -keyout ca.key -out ca.crt -days 2 -subj /CN=test-ca"));
        for (name, extensions) in [
            ("server", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            ("client", "extendedKeyUsage=clientAuth"),
        ] {
            openssl(&format!(
                "req {new} -keyout {name}.key -out {name}.csr -subj /CN={name} -addext {extensions}"
            ));
            openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days 2 -copy_extensions copy"
            ));
        }
        Certificates { folder }
    }

    /// `ca.crt`, `server.crt`, `server.key`, `client.crt` or `client.key`.
    pub fn file(&self, name: &str) -> String {
        text(&self.folder.path().join(name)).to_owned()
    }
}

/// Where the servers of an engine run.
pub trait Hosts {
    /// Address of the host of server `n`.
    fn address(&self, n: usize) -> Ipv4Addr;
    /// Has a command run there.
    fn enter(&self, command: &mut Command, n: usize);
    /// Does something there.
    fn on(&self, n: usize, act: &mut (dyn FnMut() + Send));
}

/// All on this one.
struct Loopback;

impl Hosts for Loopback {
    fn address(&self, _: usize) -> Ipv4Addr {
        Ipv4Addr::LOCALHOST
    }

    fn enter(&self, _: &mut Command, _: usize) {}

    fn on(&self, _: usize, act: &mut (dyn FnMut() + Send)) {
        act();
    }
}

/// Three members.
pub struct Etcd {
    hosts: Box<dyn Hosts>,
    folder: tempfile::TempDir,
    client_ports: [u16; 3],
    peer_ports: [u16; 3],
    members: [Option<Child>; 3],
    args: Vec<String>,
    encrypted: bool,
}

impl Etcd {
    /// Starts the members and waits until they answer.
    pub fn start() -> Etcd {
        Etcd::start_with(Vec::new(), None)
    }

    /// Each on a host of its own.
    pub fn start_on(hosts: Box<dyn Hosts>) -> Etcd {
        Etcd::start_as(hosts, Vec::new(), None)
    }

    /// With more arguments, and with encrypted connections of clients, who must have a certificate, too.
    pub fn start_with(args: Vec<String>, certificates: Option<&Certificates>) -> Etcd {
        Etcd::start_as(Box::new(Loopback), args, certificates)
    }

    fn start_as(hosts: Box<dyn Hosts>, mut args: Vec<String>, certificates: Option<&Certificates>) -> Etcd {
        let folder = tempfile::tempdir().expect("no temporary folder");
        let ports = || [free_port(), free_port(), free_port()];
        if let Some(made) = certificates {
            for (arg, file) in
                [("cert-file", "server.crt"), ("key-file", "server.key"), ("trusted-ca-file", "ca.crt")]
            {
                args.push(format!("--{arg}={}", made.file(file)));
            }
            args.push("--client-cert-auth".into());
        }
        let members = [None, None, None];
        let encrypted = certificates.is_some();
        let mut etcd =
            Etcd { hosts, folder, client_ports: ports(), peer_ports: ports(), members, args, encrypted };
        (0..3).for_each(|n| etcd.start_member(n));
        for n in 0..3 {
            wait_until("etcd", || etcd.is_up(n));
        }
        etcd
    }

    fn client(&self, n: usize) -> SocketAddr {
        (self.hosts.address(n), self.client_ports[n]).into()
    }

    /// By etcd's own health check, which commits something, where one can be read.
    fn is_up(&self, n: usize) -> bool {
        let (address, encrypted, mut up) = (self.client(n), self.encrypted, false);
        self.hosts.on(n, &mut || {
            up = if encrypted { TcpStream::connect(address).is_ok() } else { healthy(address) };
        });
        up
    }

    fn post(&self, n: usize, path: &str, body: &str) -> Option<String> {
        let (address, mut answer) = (self.client(n), None);
        self.hosts.on(n, &mut || answer = post(address, path, body));
        answer
    }

    /// A call of etcd's JSON interface, on the first member that answers; the body of the answer.
    pub fn call(&self, path: &str, body: &str) -> String {
        let mut answers = (0..3).filter_map(|n| self.post(n, path, body));
        answers.next().unwrap_or_else(|| panic!("no member answers {path} {body}"))
    }

    /// The same on every member.
    pub fn call_each(&self, path: &str, body: &str) -> Vec<String> {
        (0..3).filter_map(|n| self.post(n, path, body)).collect()
    }

    /// The member that leads.
    pub fn leader(&self) -> usize {
        let is_leader = |n: &usize| {
            let status = self.post(*n, "/v3/maintenance/status", "{}").unwrap_or_default();
            let after = |key: &str| {
                let rest = status.split(&format!("\"{key}\":\"")).nth(1);
                rest.and_then(|rest| rest.split('"').next()).map(str::to_owned)
            };
            after("leader").is_some_and(|leader| after("member_id") == Some(leader))
        };
        let mut found = None;
        wait_until("a leader of etcd", || {
            found = (0..3).find(is_leader);
            found.is_some()
        });
        found.expect("there is a leader")
    }

    /// Sends a signal to a member.
    pub fn signal_member(&self, n: usize, signal: rustix::process::Signal) {
        let pid = self.members[n].as_ref().and_then(|m| rustix::process::Pid::from_raw(m.id().cast_signed()));
        rustix::process::kill_process(pid.expect("it runs"), signal).expect("it runs");
    }

    /// Starts a member that does not run.
    pub fn start_member(&mut self, n: usize) {
        let peer = |n: usize| format!("http://{}:{}", self.hosts.address(n), self.peer_ports[n]);
        let scheme = if self.encrypted { "https" } else { "http" };
        let client = format!("{scheme}://{}", self.client(n));
        let cluster: Vec<String> = (0..3).map(|n| format!("m{n}={}", peer(n))).collect();
        let log = std::fs::File::create(self.folder.path().join(format!("m{n}.log"))).expect("no log");
        let mut command = Command::new("setpriv");
        self.hosts.enter(&mut command, n);
        let member = command
            .args(["--pdeathsig", "KILL", "etcd", "--name", &format!("m{n}"), "--data-dir"])
            .arg(self.folder.path().join(format!("m{n}")))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer(n), "--initial-advertise-peer-urls", &peer(n)])
            .args(["--initial-cluster", &cluster.join(",")])
            .args(&self.args)
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
        let hosts: Vec<String> = (0..3).map(|n| self.client(n).to_string()).collect();
        format!("etcd://{}/{prefix}", hosts.join(","))
    }
}

/// One that is gone already needs none.
fn signal_process(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        (0..3).for_each(|n| self.kill_member(n));
    }
}

fn post(server: SocketAddr, path: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(server).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    let length = body.len();
    write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| body.to_owned())
}

fn healthy(server: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(server) else { return false };
    let mut answer = String::new();
    stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok()
        && stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.contains("\"true\"")
}

/// A primary and its synchronous standby.
pub struct Postgres {
    hosts: Box<dyn Hosts>,
    folder: tempfile::TempDir,
    ports: [u16; 2],
    servers: [Option<Child>; 2],
    databases: u32,
}

impl Postgres {
    /// Starts both and waits until they answer.
    pub fn start() -> Postgres {
        Postgres::start_on(Box::new(Loopback))
    }

    /// Each on a host of its own.
    pub fn start_on(hosts: Box<dyn Hosts>) -> Postgres {
        let folder = tempfile::tempdir().expect("no temporary folder");
        if rustix::process::geteuid().is_root() {
            let chown = Command::new("chown").arg("postgres:").arg(folder.path()).status();
            assert!(chown.is_ok_and(|s| s.success()), "no user postgres: install Debian's postgresql-15");
        }
        let (ports, none) = ([free_port(), free_port()], [None, None]);
        let mut servers = Postgres { hosts, folder, ports, servers: none, databases: 0 };
        let primary = servers.data(0);
        let init = ["-D", text(&primary), "-A", "trust", "-U", "fjord", "-E", "UTF8", "--locale=C"];
        servers.run(0, "initdb", &init);
        let anybody = "host all all samenet trust\nhost replication all samenet trust\n";
        std::fs::write(primary.join("pg_hba.conf"), anybody).expect("cannot write pg_hba.conf");
        servers.start_server(0);
        let (standby, port) = (servers.data(1), servers.ports[0].to_string());
        let host = servers.hosts.address(0).to_string();
        servers.run(
            1,
            "pg_basebackup",
            &[
                "-h",
                &host,
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

    /// A program to run on the host of a server.
    fn command(&self, n: usize, program: &str) -> Command {
        let program = format!("{POSTGRES_BIN}/{program}");
        let mut command = Command::new("setpriv");
        self.hosts.enter(&mut command, n);
        // It refuses to run as root.
        if rustix::process::geteuid().is_root() {
            command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]);
        }
        command.args(["--pdeathsig", "QUIT"]).arg(program).current_dir(self.folder.path());
        command
    }

    fn run(&self, n: usize, program: &str, args: &[&str]) {
        let out = self.command(n, program).args(args).output().expect("cannot start setpriv");
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Starts a server that does not run: 0 was the primary at first, 1 its standby.
    pub fn start_server(&mut self, n: usize) {
        let log = std::fs::File::create(self.folder.path().join(format!("{n}.log"))).expect("no log");
        let port = self.ports[n].to_string();
        let standbys = if n == 0 { "synchronous_standby_names=*" } else { "synchronous_standby_names=" };
        let address = self.hosts.address(n).to_string();
        let mut command = self.command(n, "postgres");
        command.arg("-D").arg(self.data(n)).args(["-p", &port, "-c", &format!("listen_addresses={address}")]);
        command.args(["-c", "unix_socket_directories=", "-c", standbys]).stdout(Stdio::null()).stderr(log);
        self.servers[n] = Some(command.spawn().expect("cannot start setpriv"));
        wait_until("postgres", || {
            let ready = self.command(n, "pg_isready").args(["-h", &address, "-p", &port]).output();
            ready.is_ok_and(|out| out.status.success())
        });
    }

    /// From now on the primary asks for passwords, and speaks encrypted when there are `certificates`.
    pub fn guard(&mut self, password: &str, certificates: Option<&Certificates>) {
        let sql = format!("ALTER USER fjord PASSWORD '{password}'");
        self.sql(0, &sql);
        let data = self.data(0);
        let way = if certificates.is_some() { "hostssl" } else { "host" };
        let rules =
            format!("{way} all fjord 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 trust\n");
        std::fs::write(data.join("pg_hba.conf"), rules).expect("cannot write pg_hba.conf");
        if let Some(made) = certificates {
            for file in ["server.crt", "server.key", "ca.crt"] {
                let copy = data.join(file);
                std::fs::copy(made.file(file), &copy).expect("cannot copy a certificate");
                let run = |program: &str, what: &str| {
                    let done = Command::new(program).arg(what).arg(&copy).status();
                    assert!(done.is_ok_and(|s| s.success()), "{program} {what}");
                };
                run("chmod", "600");
                if rustix::process::geteuid().is_root() {
                    run("chown", "postgres:");
                }
            }
            self.sql_settings(&["ssl=on", "ssl_ca_file='ca.crt'"]);
        }
        self.run(0, "pg_ctl", &["reload", "-D", text(&data)]);
    }

    fn sql_settings(&self, settings: &[&str]) {
        let file = self.data(0).join("postgresql.auto.conf");
        let before = std::fs::read_to_string(&file).unwrap_or_default();
        std::fs::write(file, before + "\n" + &settings.join("\n") + "\n").expect("cannot write settings");
    }

    /// Runs a statement in the database `postgres` of a server.
    pub fn sql(&self, n: usize, sql: &str) {
        let (host, port) = (self.hosts.address(n).to_string(), self.ports[n].to_string());
        self.run(n, "psql", &["-h", &host, "-p", &port, "-U", "fjord", "-d", "postgres", "-c", sql]);
    }

    /// Stops, continues or kills a server with all of its processes. Each of those is a session of its own: what is sent to the group of
    /// the first reaches none of the others.
    pub fn signal_server(&self, n: usize, signal: rustix::process::Signal) {
        let first = self.servers[n].as_ref().expect("it runs").id();
        // So that it starts no more.
        signal_process(first, rustix::process::Signal::STOP);
        let children = format!("/proc/{first}/task/{first}/children");
        let children = std::fs::read_to_string(children).expect("a kernel that lists children");
        for child in children.split_whitespace() {
            signal_process(child.parse().expect("a number"), signal);
        }
        signal_process(first, signal);
    }

    /// Ends a server at once, without a checkpoint or goodbyes.
    pub fn kill_server(&mut self, n: usize) {
        if self.servers[n].is_some() {
            self.signal_server(n, rustix::process::Signal::KILL);
        }
        if let Some(mut server) = self.servers[n].take() {
            let _ = server.wait();
        }
    }

    /// Makes the standby the primary.
    pub fn promote(&self) {
        let standby = self.data(1);
        self.run(1, "pg_ctl", &["promote", "-w", "-D", text(&standby)]);
    }

    /// Address of a new database, with both servers in it.
    pub fn url(&mut self) -> String {
        self.databases += 1;
        let name = format!("fjord{}", self.databases);
        self.sql(0, &format!("CREATE DATABASE {name}"));
        let server = |n: usize| format!("{}:{}", self.hosts.address(n), self.ports[n]);
        format!("postgres://fjord@{},{}/{name}", server(0), server(1))
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
