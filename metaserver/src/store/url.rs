//! Which engine, and where: `fjall:FOLDER`, `etcd://HOST:PORT,.../PREFIX`, `postgres://...`.

use std::{fmt, path::PathBuf, str::FromStr};

use super::StoreError;

/// Operations that etcd takes in one transaction unless its members are told otherwise.
const ETCD_WRITES_DEFAULT: usize = 128;

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
    },
    /// PostgreSQL, or what speaks its protocol.
    Postgres {
        /// As libpq knows it.
        url: String,
    },
}

impl FromStr for Place {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Place, StoreError> {
        let wrong = |why: &str| StoreError::Place { text: hide_password(text), why: why.into() };
        if let Some(folder) = text.strip_prefix("fjall:") {
            return match folder {
                "" => Err(wrong("it names no folder: write fjall:FOLDER")),
                folder => Ok(Place::Fjall(folder.into())),
            };
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Place::Postgres { url: text.into() });
        }
        let Some(rest) = text.strip_prefix("etcd://") else {
            return Err(wrong(
                "write fjall:FOLDER, etcd://HOST:PORT,HOST:PORT/PREFIX or postgres://USER@HOST/DATABASE",
            ));
        };
        let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let hosts: Vec<String> = hosts.split(',').map(str::to_owned).collect();
        if hosts.iter().any(|host| host.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()))
        {
            return Err(wrong("each member is HOST:PORT, for example etcd://a:2379,b:2379,c:2379/fjord"));
        }
        if prefix.trim_matches('/').is_empty() {
            return Err(wrong("it names no prefix for the keys: end it with, for example, /fjord"));
        }
        let mut writes_max = ETCD_WRITES_DEFAULT;
        for option in options.split('&').filter(|option| !option.is_empty()) {
            writes_max = option
                .strip_prefix("max-txn-ops=")
                .and_then(|number| number.parse().ok())
                .filter(|number| *number > 1)
                .ok_or_else(|| {
                    wrong("the only option is max-txn-ops=NUMBER, as the members were started with")
                })?;
        }
        Ok(Place::Etcd { hosts, prefix: prefix.into(), writes_max })
    }
}

/// Without the password: it appears in logs.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Fjall(folder) => write!(f, "fjall:{}", folder.display()),
            Place::Etcd { hosts, prefix, .. } => write!(f, "etcd://{}/{prefix}", hosts.join(",")),
            Place::Postgres { url } => f.write_str(&hide_password(url)),
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

    #[test]
    fn places() {
        assert_eq!("fjall:/a/b".parse::<Place>().unwrap(), Place::Fjall("/a/b".into()));
        let etcd = "etcd://a:1,b:2/x/y?max-txn-ops=9".parse::<Place>().unwrap();
        let hosts = vec!["a:1".to_owned(), "b:2".to_owned()];
        assert_eq!(etcd, Place::Etcd { hosts, prefix: "x/y".into(), writes_max: 9 });
        assert_eq!(etcd.to_string(), "etcd://a:1,b:2/x/y");
        let postgres = "postgres://u:secret@h/d?password=secret".parse::<Place>().unwrap();
        assert_eq!(postgres.to_string(), "postgres://u@h/d");
        for bad in [
            "",
            "/a",
            "fjall:",
            "etcd://a/x",
            "etcd://a:1",
            "etcd://a:1/x?max-txn-ops=1",
            "etcd://a:1/x?y",
            "mysql://u:secret@h/d",
        ] {
            let error = bad.parse::<Place>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
