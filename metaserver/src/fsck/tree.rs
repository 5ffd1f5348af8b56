//! Inodes, entries and link counts.

use std::collections::{BTreeSet, HashMap};

use fjordfs_proto::{InodeId, ROOT_INODE};

use super::{Counted, Fix, Report, Source, each, each_record};
use crate::{
    keys, names,
    records::{Counters, Dirent, Inode},
    store::StoreError,
};

/// What the check of the blocks needs of an inode, and what entries say of it.
pub(super) struct Seen {
    pub(super) inode: Inode,
    entries: u32,
    subdirectories: u32,
    orphan: bool,
}

pub(super) fn check(
    store: &Source<'_>,
    counters: &Counters,
    report: &mut Report,
) -> Result<HashMap<u64, Seen>, StoreError> {
    let mut inodes: HashMap<u64, Seen> = HashMap::new();
    each_record(store, keys::INODE, report, |report, ino, _, inode: Inode| {
        if ino >= counters.next_inode {
            report.problem(format!(
                "i{ino} is beyond the next inode to be given out, i{}",
                counters.next_inode
            ));
        }
        inodes.insert(ino, Seen { inode, entries: 0, subdirectories: 0, orphan: false });
    })?;
    report.inodes = inodes.len() as u64;

    each_record(store, keys::DIRENT, report, |report, parent, key, entry: Dirent| {
        report.entries += 1;
        let Some((cookie, name)) = keys::split_dirent(key) else {
            return report.problem(format!("an entry of i{parent} has a short key"));
        };
        let what = format!("'{}' in i{parent}", names::show(name));
        if cookie != keys::cookie(name) {
            report.problem(format!("{what} has the cookie of another name"));
        }
        let Some(seen) = inodes.get_mut(&entry.ino) else {
            let fix = Fix::Entry { parent, name: name.to_vec(), ino: entry.ino };
            return report.fixable(fix, format!("{what} leads to i{}, which does not exist", entry.ino));
        };
        seen.entries += 1;
        let is_dir = seen.inode.is_dir();
        if seen.inode.kind != entry.kind {
            report.problem(format!("{what} and its inode i{} are of different kinds", entry.ino));
        }
        if is_dir && (seen.inode.parent != parent || seen.inode.name != name) {
            let fix = Fix::Where { ino: entry.ino, parent, name: name.to_vec() };
            report.fixable(fix, format!("directory i{} says it is elsewhere than {what}", entry.ino));
        }
        match inodes.get_mut(&parent) {
            Some(seen) if seen.inode.is_dir() => seen.subdirectories += u32::from(is_dir),
            _ => report.problem(format!("{what}: there is no such directory")),
        }
    })?;

    each(store, keys::ORPHAN, |key, _| {
        report.orphans += 1;
        match keys::first_id(key).and_then(|ino| inodes.get_mut(&ino)) {
            Some(seen) => seen.orphan = true,
            None => {
                let fix = Fix::NoOrphan { ino: keys::first_id(key).unwrap_or_default() };
                report.fixable(fix, format!("orphan record {} has no inode", key.escape_ascii()));
            }
        }
    })?;
    links(&inodes, report);
    reachable(&inodes, report);
    if counters.inodes != report.inodes {
        let by = report.inodes.wrapping_sub(counters.inodes) as i64;
        let what = format!("{} inodes are counted, {} exist", counters.inodes, report.inodes);
        report.fixable(Fix::Count { of: Counted::Inodes, by }, what);
    }
    if counters.orphans != report.orphans {
        let by = report.orphans.wrapping_sub(counters.orphans) as i64;
        let what = format!("{} orphans are counted, {} exist", counters.orphans, report.orphans);
        report.fixable(Fix::Count { of: Counted::Orphans, by }, what);
    }
    Ok(inodes)
}

fn links(inodes: &HashMap<u64, Seen>, report: &mut Report) {
    for (ino, seen) in inodes {
        let nlink = seen.inode.nlink;
        let expected = match (seen.inode.is_dir(), seen.entries) {
            (true, 0) if *ino != ROOT_INODE.0 => 0,
            (true, _) => 2 + seen.subdirectories,
            (false, entries) => entries,
        };
        let nameless = seen.entries == 0 && *ino != ROOT_INODE.0 && !seen.orphan;
        if nlink != expected {
            let what = format!("i{ino} counts {nlink} links and has {expected}");
            if nameless {
                report.problem(what);
            } else {
                report.fixable(Fix::Links { ino: *ino, by: i64::from(expected) - i64::from(nlink) }, what);
            }
        }
        if seen.inode.is_dir() && seen.entries > 1 {
            report.problem(format!("directory i{ino} has {} names", seen.entries));
        }
        if (expected == 0) != seen.orphan {
            if seen.orphan {
                report
                    .fixable(Fix::NoOrphan { ino: *ino }, format!("i{ino} has a name and an orphan record"));
            } else {
                let fix = Fix::Nameless { ino: *ino, subdirectories: seen.subdirectories };
                report.fixable(fix, format!("i{ino} has neither name nor orphan record"));
            }
        }
    }
}

/// Directories whose parents do not lead to the root: a rename went wrong.
fn reachable(inodes: &HashMap<u64, Seen>, report: &mut Report) {
    if !inodes.get(&ROOT_INODE.0).is_some_and(|root| root.inode.is_dir()) {
        return report.problem("there is no root directory");
    }
    let mut reached = BTreeSet::from([ROOT_INODE.0]);
    for (ino, _) in inodes.iter().filter(|(_, seen)| seen.inode.is_dir() && seen.inode.nlink > 0) {
        let (mut path, mut at) = (BTreeSet::new(), *ino);
        while !reached.contains(&at) && path.insert(at) {
            at = inodes.get(&at).map_or(0, |seen| seen.inode.parent);
        }
        if reached.contains(&at) {
            reached.extend(path);
        } else {
            report.problem(format!("directory {} is not below the root", InodeId(*ino)));
        }
    }
}
