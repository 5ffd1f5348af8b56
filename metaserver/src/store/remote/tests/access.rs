//! Stores that want credentials, that are of no use, and that are full.

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
