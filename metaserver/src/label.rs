//! The data folder: whose it is, and that only one process uses it.
//!
//! ```text
//! DATA/
//!   fjord-meta.json    {"kind": "meta", "format_version": 2, "cluster_id": "..."}   written before anything else, with "new": true
//!                      until there is a store (by a restore: when its store is closed), and by the first release that writes
//!                      newer records
//!   fjord-meta.lock    locked (flock) by the running metaserver
//!   store/             the storage engine's
//! ```

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Format of the records; older ones are read as they are. 1: first. 2: extended attributes, files without a name, blocks
/// shared between files.
pub(crate) const FORMAT_VERSION: u32 = 2;
const LABEL: &str = "fjord-meta.json";
const LOCK: &str = "fjord-meta.lock";
const STORE: &str = "store";
const STORE_SYNCED: &str = "store.synced";
const KIND: &str = "meta";

#[derive(Serialize, Deserialize)]
struct Label {
    kind: String,
    format_version: u32,
    cluster_id: String,
    /// There is no store yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    new: bool,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It is a file, or its parent cannot hold folders.
    #[error("{} is not a folder: name one for the metadata", .0.display())]
    NotAFolder(PathBuf),
    /// It belongs to a data server.
    #[error("{} holds a data server's target ({label}): give the metaserver a folder of its own", folder.display())]
    HoldsTarget {
        /// The folder.
        folder: PathBuf,
        /// The label found in it.
        label: String,
    },
    /// A newer release wrote it.
    #[error("{} has format version {found}, this release knows {FORMAT_VERSION}: use the release that wrote it, or a newer one", folder.display())]
    Newer {
        /// The folder.
        folder: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The label cannot be understood.
    #[error("{} is damaged: {what}; restore it from a backup", file.display())]
    BadLabel {
        /// The label file.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another metaserver runs on it.
    #[error("{} is in use by another metaserver: stop it first", .0.display())]
    Locked(PathBuf),
    /// It belongs to another cluster.
    #[error("{} belongs to cluster {found}: name another folder", folder.display())]
    OtherCluster {
        /// The folder.
        folder: PathBuf,
        /// Its cluster.
        found: String,
    },
    /// There was metadata in it.
    #[error(
        "{} has lost its metadata: there is no {STORE} in it. Bring it back, or restore a backup: `fjord meta restore`", .0.display()
    )]
    StoreLost(PathBuf),
    /// There is no metadata in it.
    #[error("{} holds no metadata: name the metaserver's data folder", .0.display())]
    Empty(PathBuf),
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A folder in use; released when dropped.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) cluster_id: String,
    pub(crate) store: PathBuf,
    new: bool,
    /// Holds the lock.
    _lock: File,
}

impl Folder {
    /// Claims `folder`; a new one gets a label with a new cluster id.
    pub(crate) fn claim(folder: &Path) -> Result<Folder, FolderError> {
        Folder::claim_or_make(folder, || uuid::Uuid::new_v4().to_string())
    }

    /// Claims a folder that is new, or a cluster's already.
    pub(crate) fn claim_for(folder: &Path, cluster_id: &str) -> Result<Folder, FolderError> {
        let claimed = Folder::claim_or_make(folder, || cluster_id.to_owned())?;
        if claimed.cluster_id != cluster_id {
            return Err(FolderError::OtherCluster { folder: folder.to_owned(), found: claimed.cluster_id });
        }
        Ok(claimed)
    }

    fn claim_or_make(folder: &Path, cluster_id: impl FnOnce() -> String) -> Result<Folder, FolderError> {
        let lock = occupy(folder)?;
        let label = match read(folder)? {
            // With the count of what was synced beside it, the store itself says how much is missing.
            Some(label)
                if !label.new && [STORE, STORE_SYNCED].iter().all(|name| !folder.join(name).exists()) =>
            {
                return Err(FolderError::StoreLost(folder.to_owned()));
            }
            Some(label) if label.format_version == FORMAT_VERSION => label,
            // From here on an older release would take the records for damaged.
            Some(older) => write(folder, older.cluster_id, older.new)?,
            None => write(folder, cluster_id(), true)?,
        };
        Ok(Folder { cluster_id: label.cluster_id, store: folder.join(STORE), new: label.new, _lock: lock })
    }

    /// Claims a folder that is new, or a cluster's already, without a label: that follows when its store cannot be taken for an empty one
    /// any more ([`Folder::label`]).
    pub(crate) fn claim_unlabelled(folder: &Path, cluster_id: &str) -> Result<Folder, FolderError> {
        let lock = occupy(folder)?;
        if let Some(label) = read(folder)?.filter(|label| label.cluster_id != cluster_id) {
            return Err(FolderError::OtherCluster { folder: folder.to_owned(), found: label.cluster_id });
        }
        Ok(Folder { cluster_id: cluster_id.to_owned(), store: folder.join(STORE), new: true, _lock: lock })
    }

    /// Notes that there is a store now, and writes the label if need be.
    pub(crate) fn label(&mut self) -> Result<(), FolderError> {
        if !std::mem::take(&mut self.new) {
            return Ok(());
        }
        let folder = self.store.parent().unwrap_or(&self.store);
        write(folder, self.cluster_id.clone(), false).map(drop)
    }

    /// Claims a folder that must hold metadata already.
    pub(crate) fn claim_existing(folder: &Path) -> Result<Folder, FolderError> {
        if !folder.is_dir() {
            return Err(FolderError::NotAFolder(folder.to_owned()));
        }
        if read(folder)?.is_none() {
            return Err(FolderError::Empty(folder.to_owned()));
        }
        Folder::claim(folder)
    }
}

/// Makes the folder when it is missing, and locks it.
fn occupy(folder: &Path) -> Result<File, FolderError> {
    match fs::create_dir_all(folder) {
        Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory) => {
            return Err(FolderError::NotAFolder(folder.to_owned()));
        }
        Err(source) => return Err(FolderError::Io { path: folder.to_owned(), source }),
        Ok(()) => {}
    }
    // A data server may have been started on it by mistake: what is ours stays ours.
    if read(folder)?.is_none() {
        refuse_targets(folder)?;
    }
    lock(folder)
}

fn lock(folder: &Path) -> Result<File, FolderError> {
    let path = folder.join(LOCK);
    let io = |source| FolderError::Io { path: path.clone(), source };
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(FolderError::Locked(folder.to_owned())),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

fn read(folder: &Path) -> Result<Option<Label>, FolderError> {
    let file = folder.join(LABEL);
    let text = match fs::read(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(FolderError::Io { path: file, source }),
    };
    // The version first: a newer label may lack what this release expects.
    let label: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| FolderError::BadLabel { file: file.clone(), what: e.to_string() })?;
    if let Some(found) = label.get("format_version").and_then(serde_json::Value::as_u64)
        && found > FORMAT_VERSION.into()
    {
        let found = u32::try_from(found).unwrap_or(u32::MAX);
        return Err(FolderError::Newer { folder: folder.to_owned(), found });
    }
    let label: Label = serde_json::from_value(label)
        .map_err(|e| FolderError::BadLabel { file: file.clone(), what: e.to_string() })?;
    if label.kind != KIND {
        return Err(FolderError::BadLabel {
            file,
            what: format!("its kind is '{}', not '{KIND}'", label.kind),
        });
    }
    Ok(Some(label))
}

/// Whole or not at all: a metaserver that starts after a crash must not make a second cluster id.
fn write(folder: &Path, cluster_id: String, new: bool) -> Result<Label, FolderError> {
    let label = Label { kind: KIND.into(), format_version: FORMAT_VERSION, cluster_id, new };
    let write = || {
        let temporary = folder.join(format!("{LABEL}.new"));
        let mut file = File::create(&temporary)?;
        file.write_all(serde_json::to_string_pretty(&label)?.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, folder.join(LABEL))?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| FolderError::Io { path: folder.join(LABEL), source })?;
    Ok(label)
}

/// A data server's folder has a label of its own: any `*.json` at its top whose content names a target.
fn refuse_targets(folder: &Path) -> Result<(), FolderError> {
    let io = |source| FolderError::Io { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == LABEL || path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let label: Option<serde_json::Value> =
            fs::read(&path).ok().and_then(|t| serde_json::from_slice(&t).ok());
        let is_target = label.is_some_and(|l| l.get("format_version").is_some() && l.get("uuid").is_some());
        if is_target {
            return Err(FolderError::HoldsTarget { folder: folder.to_owned(), label: name });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_cluster_and_has_one_user() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/meta");
        let first = Folder::claim(&path).unwrap();
        assert!(matches!(Folder::claim(&path), Err(FolderError::Locked(_))));
        let id = first.cluster_id.clone();
        drop(first);
        assert_eq!(Folder::claim(&path).unwrap().cluster_id, id);
        let mut claimed = Folder::claim_existing(&path).unwrap();
        assert_eq!(claimed.cluster_id, id);
        fs::create_dir(&claimed.store).unwrap();
        claimed.label().unwrap();
        drop(claimed);
        assert_eq!(Folder::claim(&path).unwrap().cluster_id, id);
        // What had a store once is never opened without it.
        fs::remove_dir(path.join(STORE)).unwrap();
        assert!(matches!(Folder::claim(&path), Err(FolderError::StoreLost(_))));
        assert!(matches!(Folder::claim_existing(folder.path()), Err(FolderError::Empty(_))));
    }

    #[test]
    fn an_older_folder_is_raised_to_this_releases_format() {
        let folder = tempfile::tempdir().unwrap();
        let older = r#"{"kind": "meta", "format_version": 1, "cluster_id": "c"}"#;
        fs::write(folder.path().join(LABEL), older).unwrap();
        fs::create_dir(folder.path().join(STORE)).unwrap();
        assert_eq!(Folder::claim(folder.path()).unwrap().cluster_id, "c");
        assert_eq!(read(folder.path()).unwrap().unwrap().format_version, FORMAT_VERSION);
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(Folder::claim(&file), Err(FolderError::NotAFolder(_))));
        assert!(matches!(Folder::claim(&file.join("below")), Err(FolderError::NotAFolder(_))));

        let newer = folder.path().join("newer");
        fs::create_dir(&newer).unwrap();
        fs::write(newer.join(LABEL), r#"{"format_version": 7}"#).unwrap();
        assert!(matches!(Folder::claim(&newer), Err(FolderError::Newer { found: 7, .. })));

        fs::write(newer.join(LABEL), "{").unwrap();
        assert!(matches!(Folder::claim(&newer), Err(FolderError::BadLabel { .. })));

        let target = folder.path().join("target");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("fjord-target.json"), r#"{"format_version": 1, "uuid": "u"}"#).unwrap();
        assert!(matches!(Folder::claim(&target), Err(FolderError::HoldsTarget { .. })));
        // Unless a metaserver's folder was given to a data server by mistake.
        let ours = folder.path().join("ours");
        drop(Folder::claim(&ours).unwrap());
        fs::copy(target.join("fjord-target.json"), ours.join("label.json")).unwrap();
        drop(Folder::claim(&ours).unwrap());
    }
}
