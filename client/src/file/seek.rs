//! Finding data and holes, with what this client has written and not committed.

use fjordfs_proto::{FsError, FsResult, error::Errno};

use super::{Handle, view::Seek};

/// What is sought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Whence {
    Data,
    Hole,
}

impl Handle {
    pub(super) async fn seek(&self, whence: Whence, offset: u64) -> FsResult<u64> {
        loop {
            let found = self.state.lock().view.seek(whence == Whence::Data, offset);
            match found {
                Seek::At(at) => return Ok(at),
                Seek::Nowhere => {
                    let message = format!("{}: no {whence:?} from {offset} on", self.state.ino);
                    return Err(FsError::new(Errno::ENXIO, message));
                }
                // Each turn learns a page more, unless somebody changes the file all the while; then it begins again.
                Seek::Extents(from) => self.client.fetch_extents(&self.state, from).await?,
            }
        }
    }
}
