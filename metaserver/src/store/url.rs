//! Which engine, and where: `fjall:FOLDER`, `etcd://HOST:PORT,.../PREFIX`, `postgres://...`; and as whom.
//!
//! A password is never part of what is shown. It comes from the address (of a configuration file, or the environment),
//! from the file that `password-file=` names, or from the environment.

use std::{fmt, path::PathBuf, str::FromStr};

use super::StoreError;

/// Operations that etcd takes in one transaction unless its members are told otherwise.
const ETCD_WRITES_DEFAULT: usize = 128;

/// The password of either engine, when the address names none.
pub const PASSWORD_VARIABLE: &str = "FJORD_STORE_PASSWORD";

/// A store, as the user names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// The embedded engine in a folder of this host.
    Fjall(PathBuf),
    /// The members of an etcd cluster.
    Etcd {
        /// HOST:PORT of each.
        hosts: Vec<String>,
        /// What all keys begin with.
        prefix: String,
        /// The members' `--max-txn-ops`.
        writes_max: usize,
        /// Who we are; none when the members ask nobody.
        user: Option<String>,
        /// What protects the way there.
        access: Access,
    },
    /// PostgreSQL, or what speaks its protocol.
    Postgres {
        /// As libpq knows it, without what is in `access`.
        url: Secret,
        /// What protects the way there.
        access: Access,
    },
}

/// Password and certificates.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Access {
    /// In the address.
    pub password: Option<Secret>,
    /// Holds the password in its first line.
    pub password_file: Option<PathBuf>,
    /// PEM of the authority that the servers' certificates must come from. With it connections are encrypted.
    pub ca: Option<PathBuf>,
    /// PEM of our own certificate and its key, for servers that ask.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Text that does not appear in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Access {
    /// The password from wherever it is; none when there is none.
    ///
    /// # Errors
    /// Why the file cannot be read.
    pub(super) fn find_password(&self) -> Result<Option<String>, String> {
        if let Some(Secret(password)) = &self.password {
            return Ok(Some(password.clone()));
        }
        let Some(file) = &self.password_file else { return Ok(std::env::var(PASSWORD_VARIABLE).ok()) };
        let text = std::fs::read_to_string(file)
            .map_err(|e| format!("its password-file {} cannot be read: {e}", file.display()))?;
        Ok(Some(text.lines().next().unwrap_or_default().to_owned()))
    }

    /// Takes one option of an address; false when it is none of these.
    fn take(&mut self, option: &str, names: [&str; 3]) -> bool {
        let Some((name, value)) = option.split_once('=') else { return false };
        let file = || Some(PathBuf::from(value));
        let mut identity = self.identity.take().unwrap_or_default();
        match name {
            "password-file" => self.password_file = file(),
            _ if name == names[0] => self.ca = file(),
            _ if name == names[1] => identity.0 = value.into(),
            _ if name == names[2] => identity.1 = value.into(),
            _ => return false,
        }
        self.identity = (identity != Default::default()).then_some(identity);
        true
    }

    fn check(&self, names: [&str; 3]) -> Result<(), String> {
        let [ca, cert, key] = names;
        match (&self.identity, &self.ca) {
            (Some((c, k)), _) if c.as_os_str().is_empty() || k.as_os_str().is_empty() => {
                Err(format!("{cert}= and {key}= go together"))
            }
            (Some(_), None) => {
                Err(format!("with {cert}= it needs {ca}=FILE, the authority of the servers' certificates"))
            }
            _ => Ok(()),
        }
    }
}

const ETCD_FILES: [&str; 3] = ["ca", "cert", "key"];
const POSTGRES_FILES: [&str; 3] = ["sslrootcert", "sslcert", "sslkey"];

impl FromStr for Place {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Place, StoreError> {
        let wrong = |why: String| StoreError::Place { text: hide_password(text), why };
        if let Some(folder) = text.strip_prefix("fjall:") {
            return match folder {
                "" => Err(wrong("it names no folder: write fjall:FOLDER".into())),
                folder => Ok(Place::Fjall(folder.into())),
            };
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return postgres(text).map_err(wrong);
        }
        match text.strip_prefix("etcd://") {
            Some(rest) => etcd(rest).map_err(wrong),
            None => Err(wrong(
                "write fjall:FOLDER, etcd://HOST:PORT,HOST:PORT/PREFIX or postgres://USER@HOST/DATABASE"
                    .into(),
            )),
        }
    }
}

fn etcd(rest: &str) -> Result<Place, String> {
    let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
    let (login, rest) = match rest.rsplit_once('@') {
        Some((login, rest)) => (Some(login), rest),
        None => (None, rest),
    };
    let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let hosts: Vec<String> = hosts.split(',').map(str::to_owned).collect();
    if hosts.iter().any(|host| host.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err())) {
        return Err("each member is HOST:PORT, for example etcd://a:2379,b:2379,c:2379/fjord".into());
    }
    if prefix.trim_matches('/').is_empty() {
        return Err("it names no prefix for the keys: end it with, for example, /fjord".into());
    }
    let mut access = Access::default();
    let mut writes_max = ETCD_WRITES_DEFAULT;
    for option in options.split('&').filter(|option| !option.is_empty()) {
        if access.take(option, ETCD_FILES) {
            continue;
        }
        let number = option.strip_prefix("max-txn-ops=").and_then(|number| number.parse().ok());
        writes_max = number.filter(|number| *number > 1).ok_or(
            "the options are ca=FILE, cert=FILE, key=FILE, password-file=FILE, and max-txn-ops=NUMBER as the members \
             were started with",
        )?;
    }
    access.check(ETCD_FILES)?;
    let user = login.map(|login| {
        let (user, password) = login.split_once(':').map_or((login, None), |(u, p)| (u, Some(p)));
        access.password = password.map(|password| Secret(password.into()));
        user.to_owned()
    });
    Ok(Place::Etcd { hosts, prefix: prefix.into(), writes_max, user, access })
}

fn postgres(text: &str) -> Result<Place, String> {
    let (rest, options) = text.split_once('?').unwrap_or((text, ""));
    let mut access = Access::default();
    let mut others = Vec::new();
    let mut encrypted = None;
    for option in options.split('&').filter(|option| !option.is_empty()) {
        match option.strip_prefix("sslmode=") {
            Some("disable") => encrypted = Some(false),
            Some("require" | "verify-full") => encrypted = Some(true),
            Some(_) => return Err("sslmode is disable, or verify-full with sslrootcert=FILE".into()),
            None if access.take(option, POSTGRES_FILES) => {}
            None => others.push(option),
        }
    }
    access.check(POSTGRES_FILES)?;
    match (encrypted, &access.ca) {
        (Some(true), None) => {
            return Err(
                "encryption needs sslrootcert=FILE, the authority of the servers' certificates".into()
            );
        }
        (Some(false), Some(_)) => return Err("sslmode=disable contradicts sslrootcert=".into()),
        _ => {}
    }
    let url = if others.is_empty() { rest.to_owned() } else { format!("{rest}?{}", others.join("&")) };
    Ok(Place::Postgres { url: Secret(url), access })
}

impl Place {
    /// Whether an address has a password in it: on a command line others could see it.
    pub fn shows_password(text: &str) -> bool {
        let (place, options) = text.split_once('?').unwrap_or((text, ""));
        hide_password(place) != place || options.split('&').any(|option| option.starts_with("password="))
    }
}

/// Without the password: it appears in logs.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Fjall(folder) => write!(f, "fjall:{}", folder.display()),
            Place::Etcd { hosts, prefix, user, .. } => {
                let user = user.as_ref().map(|user| format!("{user}@")).unwrap_or_default();
                write!(f, "etcd://{user}{}/{prefix}", hosts.join(","))
            }
            Place::Postgres { url, .. } => f.write_str(&hide_password(&url.0)),
        }
    }
}

fn hide_password(url: &str) -> String {
    let url = url.split('?').next().unwrap_or_default();
    let shown = url.split_once("://").and_then(|(scheme, rest)| {
        let (login, place) = rest.rsplit_once('@')?;
        let (user, _) = login.split_once(':')?;
        Some(format!("{scheme}://{user}@{place}"))
    });
    shown.unwrap_or_else(|| url.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Place {
        text.parse().unwrap()
    }

    #[test]
    fn places() {
        assert_eq!(place("fjall:/a/b"), Place::Fjall("/a/b".into()));
        let etcd = place("etcd://a:1,b:2/x/y?max-txn-ops=9");
        let hosts = vec!["a:1".to_owned(), "b:2".to_owned()];
        let access = Access::default();
        assert_eq!(etcd, Place::Etcd { hosts, prefix: "x/y".into(), writes_max: 9, user: None, access });
        assert_eq!(etcd.to_string(), "etcd://a:1,b:2/x/y");
        let postgres = place("postgres://u:secret@h/d?password=secret");
        assert_eq!(postgres.to_string(), "postgres://u@h/d");
        for bad in [
            "",
            "/a",
            "fjall:",
            "etcd://a/x",
            "etcd://a:1",
            "etcd://a:1/x?max-txn-ops=1",
            "etcd://a:1/x?y",
            "etcd://u:secret@a:1/x?cert=c&ca=f",
            "etcd://u:secret@a:1/x?cert=c&key=k",
            "postgres://u:secret@h/d?sslmode=verify-full",
            "postgres://u:secret@h/d?sslmode=prefer",
            "postgres://u:secret@h/d?sslmode=disable&sslrootcert=f",
            "mysql://u:secret@h/d",
        ] {
            let error = bad.parse::<Place>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn passwords_are_found_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        std::fs::write(&file, "from file\n").unwrap();
        let files = format!("password-file={}", file.display());
        for (text, user) in [
            (format!("etcd://me@a:1/x?ca=/ca&cert=/c&key=/k&{files}"), "me@"),
            (
                format!("postgres://me@h/d?sslmode=verify-full&sslrootcert=/ca&sslcert=/c&sslkey=/k&{files}"),
                "me@",
            ),
        ] {
            let place = place(&text);
            let (Place::Etcd { access, .. } | Place::Postgres { access, .. }) = &place else { panic!() };
            assert_eq!(access.find_password().unwrap().unwrap(), "from file");
            assert_eq!(access.ca, Some("/ca".into()));
            assert_eq!(access.identity, Some(("/c".into(), "/k".into())));
            assert!(place.to_string().contains(user));
            assert!(!Place::shows_password(&text), "{text}");
        }
        for text in
            ["etcd://me:secret@a:1/x", "postgres://me:secret@h/d", "postgres://h/d?user=me&password=secret"]
        {
            let place = place(text);
            assert!(!format!("{place} {place:?}").contains("secret"), "{place:?}");
            assert!(Place::shows_password(text), "{text}");
        }
        let Place::Etcd { access, .. } = place("etcd://me:secret@a:1/x") else { panic!() };
        assert_eq!(access.find_password().unwrap().unwrap(), "secret");
        let missing = Access { password_file: Some("/no/such".into()), ..Access::default() };
        assert!(missing.find_password().unwrap_err().contains("/no/such"));
    }
}
