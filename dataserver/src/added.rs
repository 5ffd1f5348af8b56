//! Targets that were added to a running data server (`fjord target add`): a list beside the shards of one that it had before, which
//! is taken in at every start.

use std::{
    io,
    path::{Path, PathBuf},
};

use fjordfs_proto::TargetId;
use serde::{Deserialize, Serialize};

use crate::store::label::{Folder, LABEL, LabelError, replace};

/// Name of the list in the folder of a target.
pub const LIST: &str = "targets.json";

/// A target that was added.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Added {
    /// Absolute.
    pub path: PathBuf,
    /// As the administrator wrote it; `None` is the server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

/// What was added to the data server that has the target in `folder`.
///
/// # Errors
/// When there is a list that cannot be read.
pub fn list(folder: &Path) -> io::Result<Vec<Added>> {
    match std::fs::read(folder.join(LIST)) {
        Ok(raw) => Ok(serde_json::from_slice(&raw)?),
        // That it is no folder is said where it is used.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

/// Replaces the list, in one step that survives a power failure.
///
/// # Errors
/// When it cannot be read or written.
pub fn change(folder: &Path, change: impl FnOnce(&mut Vec<Added>)) -> io::Result<()> {
    let mut all = list(folder)?;
    change(&mut all);
    replace(folder, LIST, &all)
}

/// Whether the folder has been made a target.
pub fn is_target(path: &Path) -> bool {
    path.join(LABEL).exists()
}

/// Makes the folder a target, if it is none.
///
/// # Errors
/// When it is in use, or cannot be one.
pub fn make_target(path: &Path) -> Result<(), LabelError> {
    Folder::claim(path).map(drop)
}

/// Whose target the folder was last, as its label says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    /// The cluster.
    pub cluster_id: String,
    /// The target in it.
    pub target: TargetId,
}

/// Whose target the folder was; `None` when it has served nobody yet. It is made a target, if it is none.
///
/// # Errors
/// When it is in use, or cannot be one.
pub fn owner(path: &Path) -> Result<Option<Owner>, LabelError> {
    let folder = Folder::claim(path)?;
    let label = folder.label();
    Ok((label.target > 0)
        .then(|| Owner { cluster_id: label.cluster_id.clone(), target: TargetId(label.target) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_listed_until_it_is_taken_out() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(list(dir.path()).unwrap(), []);
        let added = |name: &str| Added { path: dir.path().join(name), domain: None };
        change(dir.path(), |all| all.push(added("a"))).unwrap();
        change(dir.path(), |all| all.push(added("b"))).unwrap();
        assert_eq!(list(dir.path()).unwrap(), [added("a"), added("b")]);
        change(dir.path(), |all| all.retain(|one| *one != added("a"))).unwrap();
        assert_eq!(list(dir.path()).unwrap(), [added("b")]);
        assert!(!is_target(&added("b").path));
        make_target(&added("b").path).unwrap();
        assert!(is_target(&added("b").path));
        assert_eq!(owner(&added("b").path).unwrap(), None);
        let mut folder = Folder::claim(&added("b").path).unwrap();
        folder.assign("c1", 2, 3).unwrap();
        assert!(matches!(owner(&added("b").path), Err(LabelError::InUse { .. })));
        drop(folder);
        let of_c1 = Owner { cluster_id: "c1".into(), target: TargetId(3) };
        assert_eq!(owner(&added("b").path).unwrap(), Some(of_c1));
        std::fs::write(dir.path().join(LIST), "{").unwrap();
        assert!(list(dir.path()).is_err() && change(dir.path(), |_| {}).is_err());
    }
}
