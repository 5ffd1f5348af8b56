//! What a cluster of `fjord up` consists of. Kept as `up.json` in its data folder, so that the same command goes on
//! with the same cluster.

use std::{fs, io, path::Path};

use anyhow::{Context, bail, ensure};
use fjordfs_proto::Policy;
use serde::{Deserialize, Serialize};

/// Version of `up.json`. 1: first.
const FORMAT_VERSION: u32 = 1;

/// Data servers of a new cluster that is not told otherwise.
pub(crate) const SERVERS_DEFAULT: usize = 3;

/// More processes than this on one machine are a typing error.
const SERVERS_MAX: usize = 64;

/// Volume files on a shared disk: small enough not to preallocate a small disk away.
const VOLUME_SIZE: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 30;

/// `up.json`.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    format_version: u32,
    pub(crate) servers: usize,
    policy: String,
    /// Where the namespace is kept, when that is not the data folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) store: Option<String>,
    /// Bytes; as it was when the cluster was made.
    pub(crate) volume_size: u64,
}

/// What the flags ask for.
#[derive(Clone, Default, Debug)]
pub(crate) struct Wish {
    pub(crate) servers: Option<usize>,
    pub(crate) policy: Option<Policy>,
    /// The address of a store.
    pub(crate) store: Option<String>,
}

impl Plan {
    /// The stored plan with the changes wished for, or a new one.
    ///
    /// # Errors
    /// When the wish cannot be had, with what to do instead.
    pub(crate) fn reconcile(
        stored: Option<Plan>,
        wish: Wish,
        room: u64,
        folder: &Path,
    ) -> anyhow::Result<Plan> {
        if let Some(servers) = wish.servers {
            ensure!(
                (1..=SERVERS_MAX).contains(&servers),
                "--servers {servers}: from 1 to {SERVERS_MAX} are possible"
            );
        }
        let plan = match stored {
            Some(stored) => stored.changed(wish, folder)?,
            None => {
                let servers = wish.servers.unwrap_or(SERVERS_DEFAULT);
                // What the servers are enough for.
                let policy = match servers {
                    1 => Policy::replica(1),
                    2 => Policy::replica(2),
                    _ => Policy::ec(2, 1),
                };
                let policy = wish.policy.or(policy).context("no policy")?;
                let volume_size = volume_size(room / servers as u64);
                Plan {
                    format_version: FORMAT_VERSION,
                    servers,
                    policy: policy.to_string(),
                    store: wish.store,
                    volume_size,
                }
            }
        };
        let policy = plan.policy()?;
        ensure!(
            policy.width() <= plan.servers,
            "{policy} needs at least {} data servers: give --servers {0} or another --policy",
            policy.width()
        );
        Ok(plan)
    }

    fn changed(self, wish: Wish, folder: &Path) -> anyhow::Result<Plan> {
        if let Some(policy) = wish.policy.filter(|p| p.to_string() != self.policy) {
            bail!(
                "this filesystem was made with --policy {}; leave --policy out, and change the policy of a mounted folder \
                 with: fjord layout set PATH {policy}",
                self.policy
            );
        }
        if let Some(store) = wish.store.filter(|store| Some(store) != self.store.as_ref()) {
            let from = match &self.store {
                Some(store) => store.clone(),
                None => format!("fjall:{}/meta", folder.display()),
            };
            bail!(
                "this filesystem keeps its namespace in {from}: leave --store out, or stop it and move that with: \
                 fjord meta migrate {from} {store}, then change \"store\" in {}",
                folder.join("up.json").display()
            );
        }
        let servers = wish.servers.unwrap_or(self.servers);
        ensure!(
            servers >= self.servers,
            "this filesystem has {} data servers and their data; it cannot go on with {servers}: leave --servers out",
            self.servers
        );
        Ok(Plan { servers, ..self })
    }

    /// # Errors
    /// When the file was edited into nonsense.
    pub(crate) fn policy(&self) -> anyhow::Result<Policy> {
        self.policy.parse().with_context(|| "up.json is damaged")
    }

    /// Reads a data folder's plan; `None` when there is none yet.
    ///
    /// # Errors
    /// When it cannot be read, or a newer version wrote it.
    pub(crate) fn load(folder: &Path) -> anyhow::Result<Option<Plan>> {
        let file = folder.join("up.json");
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", file.display())),
        };
        let plan: Plan = serde_json::from_str(&text).with_context(|| {
            format!("{} is damaged: restore it, or begin anew with another --data folder", file.display())
        })?;
        ensure!(
            plan.format_version <= FORMAT_VERSION,
            "{} was written by a newer fjord (format {}, this one knows {FORMAT_VERSION}): use that one",
            file.display(),
            plan.format_version
        );
        Ok(Some(plan))
    }

    /// Writes it, so that after a power failure either the old or the new plan is there.
    pub(crate) fn store(&self, folder: &Path) -> anyhow::Result<()> {
        let write = || -> io::Result<()> {
            let partial = folder.join("up.json.new");
            let mut text = serde_json::to_string_pretty(self)?;
            text.push('\n');
            fs::write(&partial, text)?;
            fs::File::open(&partial)?.sync_all()?;
            fs::rename(&partial, folder.join("up.json"))?;
            fs::File::open(folder)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", folder.join("up.json").display()))
    }
}

/// An eighth of a server's share, in steps of 64 MiB.
fn volume_size(share: u64) -> u64 {
    let step = *VOLUME_SIZE.start();
    (share / 8 / step * step).clamp(step, *VOLUME_SIZE.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 300 << 30;

    fn wish(servers: Option<usize>, policy: Option<&str>) -> Wish {
        Wish { servers, policy: policy.map(|p| p.parse().unwrap()), store: None }
    }

    fn new(servers: Option<usize>, policy: Option<&str>) -> anyhow::Result<Plan> {
        Plan::reconcile(None, wish(servers, policy), ROOM, Path::new("/data"))
    }

    #[test]
    fn a_new_cluster() {
        let plan = new(None, None).unwrap();
        assert_eq!((plan.servers, plan.policy.as_str(), plan.volume_size), (3, "ec:2+1", 1 << 30));
        assert_eq!(new(Some(1), None).unwrap().policy, "replica:1");
        assert_eq!(new(Some(2), None).unwrap().policy, "replica:2");
        assert_eq!(new(Some(4), Some("replica:3")).unwrap().policy, "replica:3");
        assert!(new(Some(3), Some("ec:4+2")).unwrap_err().to_string().contains("--servers 6"));
        assert!(new(Some(2), Some("replica:3")).unwrap_err().to_string().contains("--servers 3"));
        assert!(new(Some(0), None).is_err() && new(Some(1000), None).is_err());
    }

    #[test]
    fn a_stored_cluster_grows_but_does_not_shrink_or_change() {
        let stored = || Some(new(Some(3), Some("replica:2")).unwrap());
        let go = |servers, policy| Plan::reconcile(stored(), wish(servers, policy), ROOM, Path::new("/data"));
        assert_eq!(go(None, None).unwrap(), stored().unwrap());
        assert_eq!(go(Some(3), Some("replica:2")).unwrap(), stored().unwrap());
        assert_eq!(go(Some(5), None).unwrap().servers, 5);
        assert!(go(Some(2), None).unwrap_err().to_string().contains("has 3 data servers"));
        assert!(go(None, Some("replica:3")).unwrap_err().to_string().contains("fjord layout set"));
        let store = |plan, store: &str| {
            let wish = Wish { store: Some(store.to_owned()), ..Wish::default() };
            Plan::reconcile(plan, wish, ROOM, Path::new("/data"))
        };
        let moved = store(stored(), "etcd://a/x").unwrap_err().to_string();
        assert!(moved.contains("fjord meta migrate fjall:/data/meta etcd://a/x"), "{moved}");
        let on_etcd = store(None, "etcd://a/x").unwrap();
        assert_eq!(store(Some(on_etcd.clone()), "etcd://a/x").unwrap(), on_etcd);
        assert!(store(Some(on_etcd), "etcd://b/x").is_err());
    }

    #[test]
    fn it_is_kept_in_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Plan::load(dir.path()).unwrap(), None);
        let plan = new(None, None).unwrap();
        plan.store(dir.path()).unwrap();
        assert_eq!(Plan::load(dir.path()).unwrap(), Some(plan));
    }

    #[test]
    fn damaged_and_newer_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("up.json");
        fs::write(&file, "{").unwrap();
        assert!(format!("{:#}", Plan::load(dir.path()).unwrap_err()).contains("up.json is damaged"));
        fs::write(&file, r#"{"format_version":9,"servers":1,"policy":"replica:1","volume_size":1}"#).unwrap();
        assert!(Plan::load(dir.path()).unwrap_err().to_string().contains("newer"));
    }

    #[test]
    fn volumes_fit_the_disk() {
        assert_eq!(volume_size(0), 64 << 20);
        assert_eq!(volume_size(2 << 30), 256 << 20);
        assert_eq!(volume_size(1 << 40), 1 << 30);
    }
}
