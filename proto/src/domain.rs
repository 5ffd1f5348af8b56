//! Failure domains: what a target shares with others that may fail at once.
//!
//! Two levels, a rack of hosts, each with targets. As text, on the wire and in the map: `rack=R,host=H`; `host=H` is a host that
//! shares nothing with others; a bare label is short for a rack and a host of that name.

use std::{fmt, str::FromStr};

/// Where a target is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Domain {
    /// What may fail as a whole: a rack, a room, a power feed.
    pub rack: String,
    /// The machine in it.
    pub host: String,
}

/// Text that names no domain.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "'{0}' is not a failure domain: write rack=NAME, host=NAME, rack=NAME,host=NAME, or a NAME for a rack"
)]
pub struct DomainError(pub String);

impl Domain {
    /// A domain of a server called `server`: what `text` leaves out is the server's own. A bare label is a rack.
    ///
    /// # Errors
    /// When it is none of the forms in the module's description.
    pub fn of_server(text: &str, server: &str) -> Result<Domain, DomainError> {
        let (rack, host) = parts(text)?;
        let host = host.unwrap_or(server).to_owned();
        Ok(Domain { rack: rack.map_or_else(|| host.clone(), str::to_owned), host })
    }

    /// From a map. Whatever a server calls its domain is one: what is no text of ours is a label.
    pub fn of_map(text: &str) -> Domain {
        let (rack, host) = match parts(text) {
            Ok((Some(rack), None)) => (rack, rack),
            Ok((rack, Some(host))) => (rack.unwrap_or(host), host),
            _ => (text, text),
        };
        Domain { rack: rack.to_owned(), host: host.to_owned() }
    }
}

/// The text when it shares its rack with nobody is only the name.
impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rack == self.host {
            f.write_str(&self.host)
        } else {
            write!(f, "rack={},host={}", self.rack, self.host)
        }
    }
}

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Domain, DomainError> {
        parts(text).map(|_| Domain::of_map(text))
    }
}

fn parts(text: &str) -> Result<(Option<&str>, Option<&str>), DomainError> {
    let bad = || DomainError(text.to_owned());
    let is_name = |name: &str| !name.is_empty() && !name.contains(['=', ',', '/', '@']);
    if is_name(text) {
        return Ok((Some(text), None));
    }
    let (mut rack, mut host) = (None, None);
    for part in text.split(',') {
        let (key, name) = part.split_once('=').ok_or_else(bad)?;
        let level = match key {
            "rack" => &mut rack,
            "host" => &mut host,
            _ => return Err(bad()),
        };
        if !is_name(name) || level.replace(name).is_some() {
            return Err(bad());
        }
    }
    Ok((rack, host))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(rack: &str, host: &str) -> Domain {
        Domain { rack: rack.into(), host: host.into() }
    }

    #[test]
    fn what_is_left_out_is_the_servers_own() {
        for (text, expected) in [
            ("rack=r7,host=h3", domain("r7", "h3")),
            ("host=h3,rack=r7", domain("r7", "h3")),
            ("rack=r7", domain("r7", "storage1")),
            ("r7", domain("r7", "storage1")),
            ("host=h3", domain("h3", "h3")),
        ] {
            let got = Domain::of_server(text, "storage1").unwrap();
            assert_eq!(got, expected, "{text}");
            assert_eq!(Domain::of_map(&got.to_string()), got, "{text} does not come through the map");
        }
        assert_eq!(Domain::of_map("storage1"), domain("storage1", "storage1"));
    }

    #[test]
    fn other_text_is_refused() {
        for text in
            ["", "rack=", "rack=a,rack=b", "row=3", "rack=a;host=b", "a/b", "rack=a,", "rack=a,host", "a@b"]
        {
            let refused = Domain::of_server(text, "s").unwrap_err().to_string();
            assert!(refused.contains(&format!("'{text}'")), "{refused}");
        }
    }
}
