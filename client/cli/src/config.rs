//! TOML files of the daemons. Every key is also a flag, and the flag wins.

use std::path::{Path, PathBuf};

use anyhow::Context;
use fjordfs_proto::{Domain, Policy};
use serde::{Deserialize, Deserializer, de};

use crate::units::{ByteSize, Span};

/// `fjord meta --config FILE`.
#[derive(Deserialize, Default, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct MetaFile {
    pub(crate) data: Option<PathBuf>,
    pub(crate) store: Option<String>,
    pub(crate) listen: Option<String>,
    #[serde(default, deserialize_with = "policy")]
    pub(crate) policy: Option<Policy>,
    pub(crate) pg_count: Option<usize>,
    pub(crate) session_timeout: Option<Span>,
    pub(crate) heartbeat: Option<Span>,
    pub(crate) down_after: Option<Span>,
    pub(crate) out_after: Option<Span>,
    pub(crate) log_sync: Option<Span>,
    pub(crate) cache: Option<ByteSize>,
    pub(crate) gc_interval: Option<Span>,
    pub(crate) gc_rate: Option<ByteSize>,
}

/// `fjord data --config FILE`.
#[derive(Deserialize, Default, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct DataFile {
    pub(crate) meta: Option<String>,
    pub(crate) listen: Option<String>,
    pub(crate) advertise: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) domain: Option<String>,
    #[serde(default)]
    pub(crate) targets: Vec<TargetEntry>,
    pub(crate) cores: Option<usize>,
    pub(crate) poll_us: Option<u32>,
    pub(crate) volume_size: Option<ByteSize>,
    pub(crate) checkpoint_interval: Option<Span>,
    pub(crate) capacity_max: Option<ByteSize>,
    pub(crate) rebuild_rate: Option<ByteSize>,
    pub(crate) scrub_interval: Option<Span>,
    pub(crate) scrub_rate: Option<ByteSize>,
}

/// One target: `"/mnt/nvme0"`, `"/mnt/nvme0@rack=r7"` or `{ path = "/mnt/nvme0", domain = "rack=r7" }`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TargetEntry {
    pub(crate) path: PathBuf,
    pub(crate) domain: Option<String>,
}

impl std::str::FromStr for TargetEntry {
    type Err = String;

    /// The last `@` parts path and domain, so that a path may contain one if a domain is given.
    fn from_str(text: &str) -> Result<TargetEntry, String> {
        let (path, domain) = match text.rsplit_once('@') {
            Some((path, domain)) => (path, Some(domain)),
            None => (text, None),
        };
        if path.is_empty() {
            return Err(format!("'{text}' is not a target: write PATH or PATH@DOMAIN"));
        }
        // What the server is called is known later; whether this is a domain does not depend on it.
        if let Some(Err(e)) = domain.map(|domain| domain.parse::<Domain>()) {
            return Err(format!("'{text}' is not a target: {e}"));
        }
        Ok(TargetEntry { path: path.into(), domain: domain.map(str::to_owned) })
    }
}

impl<'de> Deserialize<'de> for TargetEntry {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<TargetEntry, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            path: PathBuf,
            domain: Option<String>,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = TargetEntry;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"PATH\", \"PATH@DOMAIN\" or { path = \"…\", domain = \"…\" }")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<TargetEntry, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<TargetEntry, A::Error> {
                let table = Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                if let Some(domain) = &table.domain {
                    domain.parse::<Domain>().map_err(de::Error::custom)?;
                }
                Ok(TargetEntry { path: table.path, domain: table.domain })
            }
        }
        input.deserialize_any(Visitor)
    }
}

fn policy<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Policy>, D::Error> {
    String::deserialize(input)?.parse().map(Some).map_err(de::Error::custom)
}

/// Reads a file, or nothing when there is none to read.
///
/// # Errors
/// Names the file, and for a bad key or value also its line.
pub(crate) fn load<T: Default + for<'de> Deserialize<'de>>(path: Option<&Path>) -> anyhow::Result<T> {
    let Some(path) = path else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    parse(&text).map_err(|e| anyhow::anyhow!("configuration {}: {e}", path.display()))
}

fn parse<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, String> {
    // toml's message shows the line and the key with a marker below.
    toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_examples_in_deploy_are_valid() {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/config");
        let meta: MetaFile = load(Some(&deploy.join("meta.toml"))).unwrap();
        assert!(meta.data.is_some() && meta.listen.is_some());
        let data: DataFile = load(Some(&deploy.join("data.toml"))).unwrap();
        assert!(data.meta.is_some() && !data.targets.is_empty());
    }

    #[test]
    fn every_commented_example_key_is_valid_too() {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/config");
        let uncommented = |name: &str| {
            let text = std::fs::read_to_string(deploy.join(name)).unwrap();
            // Keys that are off by default stand as `#key = value`; prose as `# Prose`.
            text.lines().map(|l| l.strip_prefix('#').filter(|r| !r.starts_with(' ')).unwrap_or(l)).fold(
                String::new(),
                |mut all, line| {
                    all.push_str(line);
                    all.push('\n');
                    all
                },
            )
        };
        let meta: MetaFile = parse(&uncommented("meta.toml")).unwrap();
        assert!(meta.policy.is_some() && meta.pg_count.is_some() && meta.session_timeout.is_some());
        assert!(meta.heartbeat.is_some() && meta.down_after.is_some() && meta.log_sync.is_some());
        assert!(meta.gc_interval.is_some() && meta.gc_rate.is_some());
        let data: DataFile = parse(&uncommented("data.toml")).unwrap();
        assert!(data.advertise.is_some() && data.name.is_some() && data.cores.is_some());
        assert_eq!(data.domain.as_deref(), Some("rack=r7"));
        assert!(data.poll_us.is_some() && data.rebuild_rate.is_some() && meta.out_after.is_some());
        assert!(data.scrub_interval.is_some() && data.scrub_rate.is_some());
        assert!(
            data.volume_size.is_some() && data.checkpoint_interval.is_some() && data.capacity_max.is_some()
        );
    }

    #[test]
    fn targets_have_three_spellings() {
        let file: DataFile = parse(
            "targets = [\"/a\", \"/b@rack1\", { path = \"/c\", domain = \"rack2\" }]\nvolume_size = \"1GiB\"",
        )
        .unwrap();
        let domains: Vec<_> = file.targets.iter().map(|t| t.domain.as_deref()).collect();
        assert_eq!(domains, [None, Some("rack1"), Some("rack2")]);
        assert_eq!(file.volume_size, Some(ByteSize(1 << 30)));
        assert!("@rack".parse::<TargetEntry>().is_err());
        assert!("/a@".parse::<TargetEntry>().is_err());
        assert!("/a@rack=7,host=b".parse::<TargetEntry>().is_ok());
        assert!("/a@row=7".parse::<TargetEntry>().unwrap_err().contains("'row=7' is not a failure domain"));
        let error = parse::<DataFile>("targets = [{ path = \"/c\", domain = \"row=7\" }]\n").unwrap_err();
        assert!(error.contains("row=7"), "{error}");
    }

    #[test]
    fn an_error_names_line_and_key() {
        let error = parse::<MetaFile>("data = \"/x\"\npolcy = \"replica:2\"\n").unwrap_err();
        assert!(error.contains("line 2") && error.contains("polcy"), "{error}");
        let error = parse::<MetaFile>("policy = \"mirror\"\n").unwrap_err();
        assert!(error.contains("line 1") && error.contains("mirror"), "{error}");
        let error = parse::<DataFile>("volume_size = -4\n").unwrap_err();
        assert!(error.contains("line 1") && error.contains("negative"), "{error}");
        let error = parse::<MetaFile>("heartbeat = 1\n").unwrap_err();
        assert!(error.contains("line 1") && error.contains("\"1s\""), "{error}");
        let error = load::<MetaFile>(Some(Path::new("/nonexistent/meta.toml"))).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/meta.toml"));
    }

    #[test]
    fn durations_are_read() {
        let file: MetaFile = parse("session_timeout = \"45s\"\nlog_sync = \"100ms\"\n").unwrap();
        assert_eq!(file.session_timeout, Some(Span(Duration::from_secs(45))));
        assert_eq!(file.log_sync, Some(Span(Duration::from_millis(100))));
    }
}
