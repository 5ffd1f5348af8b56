//! Stores that want credentials, that are of no use, and that are full.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use super::{
    CACHE_BYTES, RemoteStore,
    engines::{Certificates, Etcd, Postgres},
    open,
};
use crate::store::{Late, MetaStore, conformance::put};

fn refusal(url: &str) -> String {
    RemoteStore::open(&url.parse().unwrap(), CACHE_BYTES).err().expect("it was opened").to_string()
}

/// Something can be stored and read back by another.
fn works(url: &str) {
    let store = open(url);
    let fence = store.take_over().unwrap();
    store.commit(put(&[("k", "v")]), fence).unwrap();
    store.sync().unwrap();
    let other = open(url);
    other.take_over().unwrap();
    assert_eq!(other.get(b"k").unwrap().unwrap(), "v");
}

fn password_file(password: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{password}\n")).unwrap();
    file
}

#[test]
fn etcd_with_users() {
    let etcd = Etcd::start();
    let base64 = |text: &str| {
        // Keys of one letter, as etcd's JSON interface wants them.
        let out =
            std::process::Command::new("sh").arg("-c").arg(format!("printf '{text}' | base64")).output();
        String::from_utf8(out.unwrap().stdout).unwrap().trim().to_owned()
    };
    etcd.call("/v3/auth/user/add", r#"{"name": "root", "password": "root"}"#);
    etcd.call("/v3/auth/user/grant", r#"{"user": "root", "role": "root"}"#);
    etcd.call("/v3/auth/user/add", r#"{"name": "fjord", "password": "secret"}"#);
    etcd.call("/v3/auth/role/add", r#"{"name": "fjord"}"#);
    let (from, to) = (base64("mine/"), base64("mine0"));
    let right = format!(r#"{{"permType": "READWRITE", "key": "{from}", "range_end": "{to}"}}"#);
    etcd.call("/v3/auth/role/grant", &format!(r#"{{"name": "fjord", "perm": {right}}}"#));
    etcd.call("/v3/auth/user/grant", r#"{"user": "fjord", "role": "fjord"}"#);
    etcd.call("/v3/auth/enable", "{}");

    let anonymous = etcd.url("mine");
    let url = |user: &str, prefix: &str, file: &tempfile::NamedTempFile| {
        let place = etcd.url(prefix).replace("etcd://", &format!("etcd://{user}@"));
        format!("{place}?password-file={}", file.path().display())
    };
    let (right, wrong) = (password_file("secret"), password_file("hidden-word"));
    works(&url("fjord", "mine", &right));
    let text = refusal(&anonymous);
    assert!(text.contains("credentials"), "{text}");
    let text = refusal(&url("fjord", "mine", &wrong));
    assert!(text.contains("'fjord' with this password") && !text.contains("hidden-word"), "{text}");
    let text = refusal(&url("fjord", "yours", &right));
    assert!(text.contains("may not read and write"), "{text}");
}

#[test]
fn etcd_encrypted() {
    let (made, others) = (Certificates::make(), Certificates::make());
    let etcd = Etcd::start_with(Vec::new(), Some(&made));
    let url = |ca: &Certificates, own: &Certificates| {
        let (ca, cert, key) = (ca.file("ca.crt"), own.file("client.crt"), own.file("client.key"));
        format!("{}?ca={ca}&cert={cert}&key={key}", etcd.url("test"))
    };
    works(&url(&made, &made));
    // Nobody can tell a server that may yet come from one whose certificate is wrong: it is waited for, and said why.
    let store = open(&url(&others, &made));
    let (said, answer) = std::sync::mpsc::channel();
    store.report(Box::new(move |report| drop(said.send(report.servers))));
    let servers = answer.recv().unwrap();
    assert!(servers.iter().all(|server| server.contains("certificate")), "{servers:?}");
    let text = refusal(&format!("{}?ca=/no/such/file", etcd.url("test")));
    assert!(text.contains("/no/such/file"), "{text}");
}

#[test]
fn postgres_with_passwords_and_encrypted() {
    let mut postgres = Postgres::start();
    let url = postgres.url();
    let made = Certificates::make();
    postgres.guard("secret", Some(&made));
    let (right, wrong) = (password_file("secret"), password_file("hidden-word"));
    let with = |file: &tempfile::NamedTempFile, ca: &Certificates| {
        format!(
            "{url}?sslmode=verify-full&sslrootcert={}&password-file={}",
            ca.file("ca.crt"),
            file.path().display()
        )
    };
    works(&with(&right, &made));
    let text = refusal(&with(&wrong, &made));
    assert!(text.contains("password authentication failed") && !text.contains("hidden-word"), "{text}");
    let text = refusal(&format!("{url}?password-file={}", right.path().display()));
    assert!(text.contains("pg_hba.conf"), "it speaks encrypted only: {text}");
    let missing = with(&right, &made).replace("/fjord1", "/nothere");
    let text = refusal(&missing);
    assert!(text.contains("nothere"), "{text}");
}

#[test]
fn a_full_etcd_is_waited_for() {
    let etcd = Etcd::start_with(vec!["--quota-backend-bytes=8388608".into()], None);
    let store = open(&etcd.url("test"));
    let fence = store.take_over().unwrap();
    let value = "x".repeat(500_000);
    let mut written = 0;
    // It is refused by the members' quota at some time, and waits from then on.
    let trouble = loop {
        let ticket = store.commit(put(&[(&format!("k{}", written % 4), &value)]), fence).unwrap();
        written += 1;
        let (said, answer) = std::sync::mpsc::channel();
        let trouble = loop {
            if store.acknowledged().unwrap() >= ticket {
                break String::new();
            }
            let said = said.clone();
            store.report(Box::new(move |report| drop(said.send(report.trouble))));
            let trouble = answer.recv().unwrap();
            if trouble.contains("members are full") {
                break trouble;
            }
        };
        if !trouble.is_empty() {
            break trouble;
        }
        assert!(written < 200, "the quota was not noticed");
    };
    assert!(trouble.contains("alarm disarm"), "it says what to do: {trouble}");
    // What an administrator does.
    let status = etcd.call("/v3/kv/range", r#"{"key": "AA==", "range_end": "AA==", "count_only": true}"#);
    let revision = status.split("\"revision\":\"").nth(1).unwrap().split('"').next().unwrap();
    etcd.call("/v3/kv/compaction", &format!(r#"{{"revision": "{revision}", "physical": true}}"#));
    etcd.call_each("/v3/maintenance/defragment", "{}");
    let alarms = etcd.call("/v3/maintenance/alarm", r#"{"action": "GET"}"#);
    for member in alarms.split("\"memberID\":\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let disarm = format!(r#"{{"action": "DEACTIVATE", "memberID": "{member}", "alarm": "NOSPACE"}}"#);
        etcd.call("/v3/maintenance/alarm", &disarm);
    }
    store.sync().unwrap();
    let last = open(&etcd.url("test"));
    last.take_over().unwrap();
    assert_eq!(last.get(format!("k{}", (written - 1) % 4).as_bytes()).unwrap().unwrap(), value.as_str());
}

/// Forwards connections, and has a server say `lie` wherever it says `truth`, which is as long. Its address.
fn liar(server: SocketAddr, truth: &'static str, lie: &'static str) -> SocketAddr {
    assert_eq!(truth.len(), lie.len());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let copy = |mut from: TcpStream, mut to: TcpStream, change: Option<(&'static str, &'static str)>| {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            let text = &mut bytes[..n];
            if let Some((truth, lie)) = change {
                for at in 0..n.saturating_sub(truth.len() - 1) {
                    if text[at..].starts_with(truth.as_bytes()) {
                        text[at..at + lie.len()].copy_from_slice(lie.as_bytes());
                    }
                }
            }
            if to.write_all(text).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    };
    // Ends with the test process.
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(server).unwrap();
            let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || copy(from, to, None));
            thread::spawn(move || copy(server, client, Some((truth, lie))));
        }
    });
    address
}

#[test]
fn an_engine_of_an_unsupported_version_is_refused() {
    let etcd = Etcd::start();
    let said = etcd.call("/v3/maintenance/status", "{}");
    let version = said.split("\"version\":\"").nth(1).unwrap().split('"').next().unwrap();
    let (truth, lie) = (version.to_owned().leak(), version.replacen("3.4", "3.3", 1).leak());
    assert_ne!(truth, lie, "the test is for etcd 3.4");
    let first = etcd.url("x").split("//").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    works(&format!("etcd://{}/mine", liar(first, truth, truth)));
    let text = refusal(&format!("etcd://{}/mine", liar(first, truth, lie)));
    assert!(text.contains("3.4 or newer") && text.contains(&*lie), "{text}");

    let mut postgres = Postgres::start();
    let url = postgres.url();
    let (server, database) = url.split('@').nth(1).unwrap().rsplit_once('/').unwrap();
    let first = server.split(',').next().unwrap().parse().unwrap();
    let to = |address: SocketAddr| format!("postgres://fjord@{address}/{database}");
    works(&to(liar(first, "1500", "1500")));
    let text = refusal(&to(liar(first, "1500", "1100")));
    assert!(text.contains("12 or newer") && text.contains("PostgreSQL 1100"), "{text}");
}
