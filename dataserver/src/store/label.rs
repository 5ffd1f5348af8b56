//! A target's folder: claimed by one data server at a time, labelled with whose it is.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};

/// Versions of a target folder. 1: first.
pub(crate) const FORMAT_VERSION: u32 = 1;

pub(crate) const LABEL: &str = "label.json";
const LOCK: &str = "lock";

/// `label.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Label {
    pub(crate) format_version: u32,
    /// Made when the folder was formatted; the metaserver knows the target by it.
    pub(crate) uuid: uuid::Uuid,
    /// Empty until registered.
    #[serde(default)]
    pub(crate) cluster_id: String,
    /// 0 until registered.
    #[serde(default)]
    pub(crate) server: u64,
    /// 0 until registered.
    #[serde(default)]
    pub(crate) target: u64,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LabelError {
    #[error("target {path}: {what}: {source}")]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error(
        "target {path} is in use by another data server: stop that one, or give this one a folder of its own"
    )]
    InUse { path: PathBuf },
    #[error(
        "target {path}: label.json does not read as a label ({source}): restore it, or empty the folder to format it \
         anew (its shards are then rebuilt from other copies)"
    )]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error(
        "target {path} has format version {found}, this build knows {FORMAT_VERSION}: install the release that wrote it"
    )]
    Newer { path: PathBuf, found: u32 },
    #[error("target {path} holds something else ({found}): give the data server an empty folder of its own")]
    Foreign { path: PathBuf, found: String },
    #[error(
        "target {path} holds volumes but no label.json: restore the label, or empty the folder to format it anew"
    )]
    Unlabelled { path: PathBuf },
}

/// A claimed folder; the claim ends when this is dropped.
pub(crate) struct Folder {
    path: PathBuf,
    _lock: File,
    label: Label,
}

impl Folder {
    /// Creates, locks, and if needed labels a folder.
    pub(crate) fn claim(path: &Path) -> Result<Folder, LabelError> {
        let io = |what| move |source| LabelError::Io { path: path.to_owned(), what, source };
        std::fs::create_dir_all(path).map_err(io("cannot create the folder"))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK))
            .map_err(io("cannot write to the folder"))?;
        if !lock.try_lock_exclusive().map_err(io("cannot lock the folder"))? {
            return Err(LabelError::InUse { path: path.to_owned() });
        }
        let label = match std::fs::read(path.join(LABEL)) {
            Ok(raw) => parse(path, &raw)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if path.join("volumes").exists() {
                    return Err(LabelError::Unlabelled { path: path.to_owned() });
                }
                if let Some(found) = foreign(path).map_err(io("cannot look into the folder"))? {
                    return Err(LabelError::Foreign { path: path.to_owned(), found });
                }
                let label = Label {
                    format_version: FORMAT_VERSION,
                    uuid: uuid::Uuid::new_v4(),
                    cluster_id: String::new(),
                    server: 0,
                    target: 0,
                };
                replace(path, LABEL, &label).map_err(io("cannot write label.json"))?;
                label
            }
            Err(e) => return Err(io("cannot read label.json")(e)),
        };
        Ok(Folder { path: path.to_owned(), _lock: lock, label })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn label(&self) -> &Label {
        &self.label
    }

    /// Notes what the metaserver has assigned.
    pub(crate) fn assign(&mut self, cluster_id: &str, server: u64, target: u64) -> Result<(), LabelError> {
        let label = Label { cluster_id: cluster_id.to_owned(), server, target, ..self.label.clone() };
        if label != self.label {
            replace(&self.path, LABEL, &label).map_err(|source| LabelError::Io {
                path: self.path.clone(),
                what: "cannot write label.json",
                source,
            })?;
            self.label = label;
        }
        Ok(())
    }
}

/// What is not ours in a folder without a label: another program's files, a metaserver's.
fn foreign(path: &Path) -> io::Result<Option<String>> {
    let ours = [LOCK, "lost+found", &format!("{LABEL}.new")];
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        if !ours.iter().any(|known| name == *known) {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn parse(path: &Path, raw: &[u8]) -> Result<Label, LabelError> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let damaged = |source| LabelError::Damaged { path: path.to_owned(), source };
    // The version first: a newer label may have changed everything else.
    let version: Version = serde_json::from_slice(raw).map_err(damaged)?;
    if version.format_version > FORMAT_VERSION {
        return Err(LabelError::Newer { path: path.to_owned(), found: version.format_version });
    }
    serde_json::from_slice(raw).map_err(damaged)
}

/// Writes a file of the folder, in one step that survives a power failure.
pub(crate) fn replace(folder: &Path, name: &str, content: &impl Serialize) -> io::Result<()> {
    let new = folder.join(format!("{name}.new"));
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(content)?)?;
    file.sync_all()?;
    std::fs::rename(&new, folder.join(name))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_kept_and_a_second_claim_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = Folder::claim(dir.path()).unwrap();
        folder.assign("c1", 2, 3).unwrap();
        let label = folder.label().clone();
        assert!(matches!(Folder::claim(dir.path()), Err(LabelError::InUse { .. })));
        drop(folder);
        assert_eq!(*Folder::claim(dir.path()).unwrap().label(), label);
    }

    #[test]
    fn strange_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let newer = at("newer");
        std::fs::write(newer.join(LABEL), r#"{"format_version": 2, "else": []}"#).unwrap();
        assert!(matches!(Folder::claim(&newer), Err(LabelError::Newer { found: 2, .. })));
        let damaged = at("damaged");
        std::fs::write(damaged.join(LABEL), "{").unwrap();
        assert!(matches!(Folder::claim(&damaged), Err(LabelError::Damaged { .. })));
        let lost = at("lost");
        std::fs::create_dir(lost.join("volumes")).unwrap();
        assert!(matches!(Folder::claim(&lost), Err(LabelError::Unlabelled { .. })));
        let metaserver = at("metaserver");
        std::fs::write(metaserver.join("fjord-meta.json"), "{}").unwrap();
        let refused = Folder::claim(&metaserver).err().unwrap().to_string();
        assert!(refused.contains("fjord-meta.json"), "{refused}");
        assert!(!metaserver.join(LABEL).exists());
        let mounted = at("mounted");
        std::fs::create_dir(mounted.join("lost+found")).unwrap();
        drop(Folder::claim(&mounted).unwrap());
    }
}
