//! A file as this client sees it: what the server has committed, under what this client has written since.
//!
//! Pure: no I/O, no locks, no clocks. [`super::FileState`] wraps it in a lock and does the rest.
//!
//! # Invariants
//! - `local` holds every byte written here whose commit has not been answered; it hides `committed`.
//! - `committed` is right for the ranges in `known`, as of `extents_version`. The version grows by one with every
//!   change on the server, so an answer whose version is not the next one means that somebody else changed the file:
//!   then everything known is forgotten and fetched again.
//! - A segment belongs to at most one unit. What is overwritten while its unit is on its way leaves the unit, so an
//!   older unit can never undo a newer write.

mod plan;
mod seek;

use std::ops::{Range, RangeInclusive};

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, Extent, ExtentMap, FsError, FsResult, InodeId, Layout, Policy,
    error::Errno,
    interval::{IntervalMap, Run},
    mode::without_suid,
    operation::access_is_due,
    pb::meta::{Attr, ExtentsReply, FileCommit, FileCommitReply, SetAttr, Time},
};

pub(crate) use plan::{Part, ReadPlan};
pub(crate) use seek::Seek;

use super::segment::{Body, Segment, Taken, UnitId};

/// A known range of the committed extents.
#[derive(Clone, Debug)]
struct Known(u64);

impl Run for Known {
    fn len(&self) -> u64 {
        self.0
    }
    fn slice(&self, range: Range<u64>) -> Known {
        Known(range.end - range.start)
    }
    fn join(&mut self, next: Known) -> Result<(), Known> {
        self.0 += next.0;
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct View {
    attr: Attr,
    extents_version: u64,
    /// Every change after this version, up to `extents_version`, was this client's.
    own_since: u64,
    committed: ExtentMap,
    known: IntervalMap<Known>,
    local: IntervalMap<Segment>,
    dirty_bytes: u64,
    /// Of the last local write that is not committed.
    mtime: Option<Time>,
    /// Of the last change of attributes since that write.
    ctime: Option<Time>,
    /// What is local was written without the right to keep suid and sgid.
    clear_suid: bool,
    /// Everything local from here on was appended while this was the end of the file.
    append_base: Option<u64>,
    /// Truncates on their way: sizes in other answers may be from before.
    truncating: u32,
    /// Where the file ended before bytes at its end were lost; 0 when none were.
    lost_end: u64,
    /// How often something local was written over.
    overwritten: u64,
}

impl View {
    pub(crate) fn new(attr: Attr) -> View {
        View {
            extents_version: attr.data_version,
            own_since: attr.data_version,
            attr,
            committed: ExtentMap::default(),
            known: IntervalMap::default(),
            local: IntervalMap::default(),
            dirty_bytes: 0,
            mtime: None,
            ctime: None,
            clear_suid: false,
            append_base: None,
            truncating: 0,
            lost_end: 0,
            overwritten: 0,
        }
    }

    pub(crate) fn ino(&self) -> InodeId {
        InodeId(self.attr.ino)
    }

    /// Redundancy of this file's new blocks.
    pub(crate) fn policy(&self) -> FsResult<Policy> {
        Policy::from_code(self.attr.policy).ok_or_else(|| {
            FsError::new(
                Errno::EIO,
                format!(
                    "{} has policy code {}, which this release does not know",
                    self.ino(),
                    self.attr.policy
                ),
            )
        })
    }

    /// Bytes in the file, local writes included.
    pub(crate) fn size(&self) -> u64 {
        self.attr.size.max(self.local.end())
    }

    /// Attributes, local writes included.
    pub(crate) fn attr(&self) -> Attr {
        let mut attr = self.attr;
        attr.size = self.size();
        attr.allocated += self.local.iter().map(|(_, s)| s.length).sum::<u64>();
        if let Some(mtime) = self.mtime {
            attr.mtime = Some(mtime);
            attr.ctime = Some(self.ctime.unwrap_or(mtime));
        }
        if self.clear_suid {
            attr.mode = without_suid(attr.mode);
        }
        attr
    }

    /// Bytes that no unit has taken.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }

    /// Changes when something local is written over, which its unit does not commit then.
    pub(crate) fn overwritten(&self) -> u64 {
        self.overwritten
    }

    /// Whether anything is not committed.
    pub(crate) fn has_local(&self) -> bool {
        !self.local.is_empty()
    }

    // ---- what the server tells ----

    /// Attributes from any answer. Ones from before what is known already change nothing.
    pub(crate) fn learn_attr(&mut self, attr: Attr) {
        if attr.data_version < self.attr.data_version || self.truncating > 0 {
            return;
        }
        if attr.data_version != self.extents_version {
            self.forget_extents(attr.data_version);
        }
        self.attr = attr;
    }

    /// Attributes were set here, which gave `attr`. That may be of before the last commit: then what was set counts, and nothing else.
    pub(crate) fn set_attr(&mut self, set: &SetAttr, attr: Attr) {
        if attr.data_version >= self.attr.data_version {
            return self.learn_attr(attr);
        }
        if set.mode.is_some() || set.uid.is_some() || set.gid.is_some() || set.clear_suid {
            (self.attr.mode, self.attr.uid, self.attr.gid) = (attr.mode, attr.uid, attr.gid);
        }
        if set.atime.is_some() || set.atime_now {
            self.attr.atime = attr.atime;
        }
        if set.mtime.is_some() || set.mtime_now {
            self.attr.mtime = attr.mtime;
        }
        self.attr.ctime = attr.ctime;
    }

    /// A page of extents that was asked for from `from` on.
    pub(crate) fn learn_extents(&mut self, from: u64, reply: ExtentsReply) -> FsResult<()> {
        if reply.data_version < self.extents_version {
            return Ok(());
        }
        if reply.data_version > self.extents_version {
            self.forget_extents(reply.data_version);
        }
        let end = reply.next_offset;
        if end <= from {
            return Err(FsError::new(
                Errno::EPROTO,
                format!("{}: extents end at {end}, before {from}", self.ino()),
            ));
        }
        let fresh = from..end;
        self.committed.remove(fresh.clone());
        for extent in reply.extents {
            let (offset, extent) = Extent::from_pb(extent)?;
            let (start, stop) = (offset.max(fresh.start), (offset + extent.length).min(fresh.end));
            if start < stop {
                self.committed.insert(start, extent.slice(start - offset..stop - offset));
            }
        }
        self.known.insert(from, Known(end - from));
        Ok(())
    }

    /// Everything known about extents may be stale.
    pub(crate) fn forget_extents(&mut self, version: u64) {
        self.committed.clear();
        self.known.clear();
        if version != self.extents_version {
            self.own_since = version;
        }
        self.extents_version = version;
    }

    /// Version that a page of extents has to have to be of use.
    pub(crate) fn extents_version(&self) -> u64 {
        self.extents_version
    }

    /// Versions between which nobody but this client changed the bytes: who cached them as of the first, and wrote
    /// through this client only, has them as of the last.
    pub(crate) fn own_versions(&self) -> RangeInclusive<u64> {
        self.own_since..=self.extents_version
    }

    // ---- writing ----

    /// Where an append goes, or `None` when what is local was not all appended: commit it first.
    pub(crate) fn append_offset(&mut self) -> Option<u64> {
        if self.append_base.is_none() && self.local.end() <= self.attr.size {
            self.append_base = Some(self.attr.size);
        }
        // Not the size: when others append meanwhile it grows, and a gap would stay in the middle of what is appended here.
        self.append_base.map(|base| self.local.end().max(base))
    }

    /// Whether a plain write up to `end` would mix with appended bytes: commit those first.
    pub(crate) fn mixes_with_appends(&self, end: u64) -> bool {
        self.append_base.is_some_and(|base| end > base && self.local.end() > base)
    }

    /// Puts written bytes in place. Returns the bytes of memory that this freed.
    pub(crate) fn write(&mut self, offset: u64, data: Bytes, now: Time, append: bool) -> u64 {
        if !append && self.append_base.is_some_and(|base| offset + data.len() as u64 > base) {
            self.append_base = None;
        }
        self.dirty_bytes += data.len() as u64;
        (self.mtime, self.ctime) = (Some(now), None);
        let replaced = self.local.insert(offset, Segment::dirty(data));
        self.overwritten += u64::from(!replaced.is_empty());
        self.dropped(&replaced)
    }

    /// Whether reading has to be noted: the access time that is too old then. Without `now` only changes are looked at.
    pub(crate) fn access_due(&self, now: Option<Time>) -> Option<Option<Time>> {
        let Attr { atime, mtime, ctime, .. } = self.attr;
        let changes = [self.mtime.or(mtime), self.ctime.or(self.mtime).or(ctime)];
        access_is_due(atime, changes, now).then_some(atime)
    }

    /// It was read.
    pub(crate) fn set_access_time(&mut self, time: Time) {
        self.attr.atime = Some(time);
    }

    /// Suid and sgid go with the next commit, also those that another client has set since; says whether there are any as far as
    /// is known here.
    pub(crate) fn drop_suid(&mut self) -> bool {
        self.clear_suid = true;
        without_suid(self.attr.mode) != self.attr.mode
    }

    /// Whether the next commit takes suid and sgid away.
    pub(crate) fn drops_suid(&self) -> bool {
        self.clear_suid
    }

    /// Attributes were changed after what is local was written, the modification time perhaps among them: the commit that is to come
    /// must not go back behind that.
    pub(crate) fn set_times(&mut self, mtime: Option<Time>, ctime: Option<Time>) {
        if self.has_local() {
            self.mtime = mtime.or(self.mtime);
            self.ctime = ctime;
        }
    }

    /// Nobody will read what is local. Returns the memory freed.
    pub(crate) fn forget_local(&mut self) -> u64 {
        let gone = self.local.remove(0..u64::MAX);
        let freed = self.dropped(&gone);
        self.settle();
        freed
    }

    /// Accounts for segments that are gone; the bytes of memory they held.
    fn dropped(&mut self, segments: &[(u64, Segment)]) -> u64 {
        let dirty: u64 = segments.iter().filter(|(_, s)| s.is_dirty()).map(|(_, s)| s.length).sum();
        self.dirty_bytes -= dirty;
        segments.iter().map(|(_, s)| s.memory()).sum()
    }

    /// The file is about to be truncated: nothing beyond `size` is left to commit. Returns the memory freed.
    pub(crate) fn begin_truncate(&mut self, size: u64) -> u64 {
        self.truncating += 1;
        let gone = self.local.remove(size..u64::MAX);
        self.attr.size = size;
        // The end of the file is now where we say: what was appended before it stays where it is.
        self.append_base = None;
        let freed = self.dropped(&gone);
        self.settle();
        freed
    }

    /// The truncate was answered.
    pub(crate) fn end_truncate(&mut self, size: u64, attr: Option<Attr>) {
        self.truncating -= 1;
        match attr {
            Some(attr) if attr.data_version == self.extents_version + 1 => {
                self.committed.remove(size..u64::MAX);
                self.known.insert(size, Known(u64::MAX - size));
                self.extents_version = attr.data_version;
                self.attr = attr;
            }
            // It had that size already.
            Some(attr) if attr.data_version == self.extents_version => self.attr = attr,
            Some(attr) => {
                self.forget_extents(attr.data_version);
                self.attr = attr;
            }
            // The server still has the old size; the next answer tells.
            None => self.forget_extents(self.extents_version),
        }
    }

    /// A range is about to be cleared: nothing in it is left to commit. Returns the memory freed.
    pub(crate) fn begin_clear(&mut self, range: Range<u64>) -> u64 {
        let gone = self.local.remove(range);
        let freed = self.dropped(&gone);
        self.settle();
        freed
    }

    /// The clear, or another change of extents in `range` alone, was answered. `known`: the range is a hole now.
    pub(crate) fn end_change(&mut self, range: Range<u64>, known: bool, attr: Attr) {
        if attr.data_version == self.extents_version + 1 {
            self.committed.remove(range.clone());
            self.known.remove(range.clone());
            if known && !range.is_empty() {
                self.known.insert(range.start, Known(range.end - range.start));
            }
            self.extents_version = attr.data_version;
        }
        self.learn_attr(attr);
        self.settle();
    }

    /// Whether anything in a range is not committed.
    pub(crate) fn has_local_in(&self, range: Range<u64>) -> bool {
        self.local.overlapping(range).next().is_some()
    }

    /// End of what is local; 0 when nothing is.
    pub(crate) fn local_end(&self) -> u64 {
        self.local.end()
    }

    /// Contiguous dirty bytes from `from` on, up to `max` of them, wherever the first are found. Gives them to `unit`,
    /// placing them in its block from `at` on.
    pub(crate) fn take_dirty(&mut self, unit: UnitId, at: u32, max: u64) -> Vec<Bytes> {
        let mut pieces = Vec::new();
        let mut room = max;
        let dirty: Vec<(u64, u64)> = (self.local.iter())
            .filter(|(_, s)| s.is_dirty())
            .scan(0u64, |sum, (offset, s)| {
                let before = *sum;
                *sum += s.length;
                (before < max).then_some((offset, s.length))
            })
            .collect();
        for (offset, length) in dirty {
            let length = length.min(room);
            let place = at + (max - room) as u32;
            pieces.extend(self.give(unit, place, offset..offset + length));
            room -= length;
        }
        pieces
    }

    /// A run of exactly `length` contiguous dirty bytes, if there is one; gives it to `unit` as a whole block.
    pub(crate) fn take_run(&mut self, unit: UnitId, length: u64) -> Option<Vec<Bytes>> {
        if self.dirty_bytes < length {
            return None;
        }
        let start = self.find_run(length)?;
        Some(self.give_run(unit, start..start + length))
    }

    /// Start of the first run of at least `length` contiguous dirty bytes.
    fn find_run(&self, length: u64) -> Option<u64> {
        let (mut start, mut end) = (0, 0);
        for (offset, segment) in self.local.iter() {
            if !segment.is_dirty() {
                (start, end) = (0, 0);
                continue;
            }
            if offset != end || end == 0 {
                start = offset;
            }
            end = offset + segment.length;
            if end - start >= length {
                return Some(start);
            }
        }
        None
    }

    fn give_run(&mut self, unit: UnitId, range: Range<u64>) -> Vec<Bytes> {
        let segments: Vec<Range<u64>> =
            self.local.get(range.clone()).map(|(offset, s)| offset..offset + s.length).collect();
        segments.into_iter().flat_map(|r| self.give(unit, (r.start - range.start) as u32, r)).collect()
    }

    /// Gives one dirty segment, or its beginning, to a unit.
    fn give(&mut self, unit: UnitId, at: u32, range: Range<u64>) -> Option<Bytes> {
        let (offset, mut segment) = self.local.remove(range).into_iter().next()?;
        let bytes = segment.take(Taken { unit, at });
        if bytes.is_some() {
            self.dirty_bytes -= segment.length;
        }
        self.local.insert(offset, segment);
        bytes
    }

    /// Offsets of the segments a unit still has.
    fn of_unit(&self, unit: UnitId) -> Vec<(u64, u64)> {
        self.local
            .iter()
            .filter(|(_, s)| s.taken.is_some_and(|t| t.unit == unit))
            .map(|(o, s)| (o, s.length))
            .collect()
    }

    /// The unit's block is stored. Returns the memory freed.
    pub(crate) fn unit_stored(&mut self, unit: UnitId, block: BlockId, layout: Layout) -> u64 {
        let mut freed = 0;
        for (offset, length) in self.of_unit(unit) {
            for (at, mut segment) in self.local.remove(offset..offset + length) {
                freed += segment.memory();
                segment.stored(block, layout);
                self.local.insert(at, segment);
            }
        }
        freed
    }

    /// What to commit of a unit: nothing when all of it was overwritten or cut off meanwhile.
    pub(crate) fn commit_of(&self, unit: UnitId) -> Option<FileCommit> {
        let mut extents = ExtentMap::default();
        for (offset, segment) in self.local.iter() {
            if segment.taken.is_some_and(|t| t.unit == unit) {
                let extent = match &segment.body {
                    Body::Memory(bytes) => Extent::inline(bytes.clone()),
                    Body::Growing(bytes) => Extent::inline(Bytes::copy_from_slice(bytes)),
                    Body::Stored(addr, layout) => Extent::blocks(*addr, segment.length, *layout),
                };
                extents.insert(offset, extent);
            }
        }
        if extents.is_empty() {
            return None;
        }
        let append_base =
            self.append_base.and_then(|base| extents.iter().map(|(at, _)| at).find(|at| *at >= base));
        Some(FileCommit {
            ino: self.attr.ino,
            size: extents.end(),
            extents: extents.iter().map(|(offset, e)| e.to_pb(offset)).collect(),
            mtime: self.mtime,
            ctime: self.ctime,
            append_base,
            clear_suid: self.clear_suid,
        })
    }

    /// Whether everything local can move by `shift` and still lie within a file: what a sane server answers.
    pub(crate) fn can_shift(&self, sent: &FileCommit, shift: i64) -> bool {
        let Some(base) = sent.append_base else { return shift == 0 };
        let end = sent.size.max(self.local.end());
        let inside =
            |at: u64| at.checked_add_signed(shift).is_some_and(|at| at <= fjordfs_proto::FILE_SIZE_MAX);
        inside(base) && inside(end)
    }

    /// The commit of a unit was answered. Returns the memory freed and whether appended bytes moved.
    pub(crate) fn unit_committed(
        &mut self,
        unit: UnitId,
        sent: &FileCommit,
        reply: FileCommitReply,
    ) -> (u64, bool) {
        let freed = self.drop_unit(unit);
        let shift = reply.appended_shift;
        let attr = reply.attr.unwrap_or(self.attr);
        if attr.data_version == self.extents_version + 1 {
            for extent in &sent.extents {
                let appended = sent.append_base.is_some_and(|base| extent.offset >= base);
                if let Ok((offset, e)) = Extent::from_pb(extent.clone()) {
                    let offset = if appended { offset.wrapping_add_signed(shift) } else { offset };
                    self.known.insert(offset, Known(e.length));
                    self.committed.insert(offset, e);
                }
            }
            self.extents_version = attr.data_version;
        } else {
            self.forget_extents(attr.data_version.max(self.extents_version));
        }
        if attr.data_version >= self.attr.data_version && self.truncating == 0 {
            self.attr = attr;
        }
        if let Some(base) = sent.append_base {
            if shift != 0 {
                self.shift_from(base, shift);
                // Whoever cached the bytes has them where they were written, not where they are.
                self.own_since = self.extents_version;
            }
            self.append_base = self.append_base.map(|_| sent.size.wrapping_add_signed(shift));
        }
        self.settle();
        (freed, shift != 0)
    }

    /// Others appended first: what was appended here since lies further on.
    fn shift_from(&mut self, base: u64, shift: i64) {
        for (offset, segment) in self.local.remove(base..u64::MAX) {
            self.local.insert(offset.wrapping_add_signed(shift), segment);
        }
    }

    /// The unit will never be committed: its bytes are lost. Returns the memory freed.
    pub(crate) fn unit_failed(&mut self, unit: UnitId) -> u64 {
        let end = self.size();
        let freed = self.drop_unit(unit);
        self.settle();
        if self.size() < end {
            self.lost_end = end.max(self.lost_end);
        }
        freed
    }

    /// Where the file ended before bytes at its end were lost, if that was further on.
    pub(crate) fn lost_end(&self) -> u64 {
        self.lost_end
    }

    /// Nobody takes the file to be longer than it is any more.
    pub(crate) fn lost_end_is_known(&mut self) {
        self.lost_end = 0;
    }

    /// Once nothing is local, the attributes are the server's.
    fn settle(&mut self) {
        if self.local.is_empty() {
            (self.mtime, self.ctime) = (None, None);
            self.clear_suid = false;
            self.append_base = None;
        }
    }

    fn drop_unit(&mut self, unit: UnitId) -> u64 {
        let mut freed = 0;
        for (offset, length) in self.of_unit(unit) {
            let gone = self.local.remove(offset..offset + length);
            freed += self.dropped(&gone);
        }
        freed
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
