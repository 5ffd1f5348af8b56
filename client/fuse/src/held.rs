//! What the kernel holds, or is about to: inodes that answers brought it, and answers that it may not have taken in.
//!
//! A recall must reach attributes and names in whatever state they are: cached in the kernel, or in an answer that a thread
//! of the kernel has yet to take in. What is on its way cannot be invalidated, so the recall waits for it.
//!
//! # Attributes
//! The kernel compares the version of an inode's attributes with the one it noted before it asked, so an invalidation voids
//! answers on their way too, if the inode exists (and evictions meanwhile void answers that make it anew; Linux 6.13). For an
//! inode that an answer is only about to make, an invalidation fails with `ENOENT`. It also does when the
//! kernel never had the inode, or has evicted it. The kernel tells the difference itself: it counts the answers that
//! brought an inode and returns the count when it forgets it. While our count ([`Lookups`]) is above zero, an answer or
//! a FORGET is on its way, and the invalidation is repeated.
//!
//! # Answers that are taken in whatever happened meanwhile
//! Two kinds are, and for those [`Unsettled`] remembers that they were given: attributes with the answer to CREATE (no version
//! is compared), and names with the answer to READDIRPLUS (they get the epoch of the moment in which they are linked). A later request
//! that the kernel can only send after it has taken in the answer settles it; else it counts as taken in after a second.
//! Other answers of these kinds (MKDIR, LINK …) bring attributes that are not to be cached.

//! # What a recall must not wait for
//! Answers that wait for others: an answer to LOOKUP may wait for the very recall. While the kernel waits for one, it cannot
//! link the same name of a listing. So a listing leaves out names that are being looked up ([`Asked`]), and when a recall
//! is held up nevertheless, because the LOOKUP came in between, lookups in directories that are being listed are given up:
//! the kernel takes `ESTALE` as a reason to walk the path again, and asks again. Not for a name that is about to be made, though: there
//! the program sees it. Therefore listings of directories that others have changed lately bring names only.

mod asked;
mod lookups;
mod unsettled;

use std::time::Duration;

use fjordfs_proto::InodeId;

pub(crate) use asked::Asked;
pub(crate) use lookups::Lookups;
pub(crate) use unsettled::Unsettled;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) lookups: Lookups,
    pub(crate) unsettled: Unsettled,
    pub(crate) asked: Asked,
}

impl Held {
    /// A request about an inode came. That settles the answer that made it, unless others have brought it to the kernel as well.
    pub(crate) fn asked_about(&self, ino: InodeId) {
        if self.unsettled.has_creations() && self.lookups.count(ino) <= 1 {
            self.unsettled.settle_creation(ino);
        }
    }

    /// Gives up lookups that may have kept the kernel from taking in a listing for so long.
    pub(crate) fn give_up_lookups(&self, held_up: Duration) {
        self.asked.give_up(held_up, |directory| self.unsettled.is_listed(directory));
    }
}
