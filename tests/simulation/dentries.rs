//! Names that a client's kernel caches above the library, by the rules of Linux and of `client/fuse`.
//!
//! A name is cached for as long as the library says, and only while the epoch is the one that was noted before the library was asked;
//! a recall of names begins a new epoch. Attributes are not cached: a name that is leads to a question about its inode alone,
//! so a name may stay when the lease on its inode has gone. A rename takes what is cached along to the new name.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use fjordfs_client::{Client, FsResult, InodeId};
use fjordfs_proto::error::Errno;
use tokio::{sync::RwLock, task::JoinSet, time::Instant};

/// How long a thread of the kernel takes to be woken.
const MOMENT: Duration = Duration::from_millis(1);

const EXCHANGE: u32 = 2;

/// A name in a directory.
pub(crate) type Name = (InodeId, &'static [u8]);

#[derive(Clone, Copy)]
struct Dentry {
    ino: Option<InodeId>,
    until: Instant,
    epoch: u64,
}

#[derive(Default)]
struct State {
    dentries: BTreeMap<(InodeId, Vec<u8>), Dentry>,
    epoch: u64,
}

/// See the module.
pub(crate) struct Dentries {
    client: Client,
    state: Mutex<State>,
    /// Whoever changes names has the directories locked, all of them here.
    directories: RwLock<()>,
}

impl Dentries {
    pub(crate) fn new(client: Client) -> Dentries {
        Dentries { client, state: Mutex::default(), directories: RwLock::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Obeys recalls, as long as the result lives.
    pub(crate) fn start(self: &Arc<Self>) -> JoinSet<()> {
        let (dentries, mut kernel) = (self.clone(), JoinSet::new());
        kernel.spawn(async move { dentries.obey().await });
        kernel
    }

    async fn obey(&self) {
        let mut recalls = self.client.recalls();
        while let Some(recalled) = recalls.recv().await {
            tokio::time::sleep(MOMENT).await;
            if recalled.names {
                self.state().epoch += 1;
            }
            // The stream may have broken meanwhile.
            let _ = recalled.done.send(());
        }
    }

    fn cached(&self, (parent, name): (InodeId, &[u8])) -> Option<Option<InodeId>> {
        let state = self.state();
        let dentry = state.dentries.get(&(parent, name.to_owned()))?;
        (dentry.epoch == state.epoch && Instant::now() < dentry.until).then_some(dentry.ino)
    }

    /// What is under a name, if anything.
    pub(crate) async fn lookup(&self, name: (InodeId, &[u8])) -> FsResult<Option<InodeId>> {
        if let Some(found) = self.cached(name) {
            return Ok(found);
        }
        let _shared = self.directories.read().await;
        self.ask(name).await
    }

    async fn ask(&self, (parent, name): (InodeId, &[u8])) -> FsResult<Option<InodeId>> {
        let epoch = self.state().epoch;
        let found = match self.client.lookup(parent, name).await {
            Ok(attr) => Some(InodeId(attr.ino)),
            Err(e) if e.errno == Errno::ENOENT => None,
            Err(e) => return Err(e),
        };
        let left = self.client.name_left(parent, name, found);
        tokio::time::sleep(MOMENT).await;
        self.state()
            .dentries
            .insert((parent, name.to_owned()), Dentry { ino: found, until: Instant::now() + left, epoch });
        Ok(found)
    }

    /// As `stat(2)`: what is under a name, by its attributes.
    pub(crate) async fn stat(&self, name: (InodeId, &[u8])) -> FsResult<Option<InodeId>> {
        match self.lookup(name).await? {
            Some(ino) => Ok(Some(InodeId(self.client.getattr(ino).await?.ino))),
            None => Ok(None),
        }
    }

    pub(crate) async fn rename(&self, from: Name, to: Name, flags: u32) -> FsResult<()> {
        let _alone = self.directories.write().await;
        for name in [from, to] {
            if self.cached(name).is_none() {
                self.ask(name).await?;
            }
        }
        self.client.rename(from.0, from.1, to.0, to.1, flags).await?;
        let mut state = self.state();
        let moved = state.dentries.remove(&(from.0, from.1.to_owned()));
        let replaced = state.dentries.remove(&(to.0, to.1.to_owned()));
        state.dentries.extend(moved.map(|moved| ((to.0, to.1.to_owned()), moved)));
        if flags == EXCHANGE {
            state.dentries.extend(replaced.map(|replaced| ((from.0, from.1.to_owned()), replaced)));
        }
        Ok(())
    }

    pub(crate) async fn link(&self, ino: InodeId, to: Name) -> FsResult<()> {
        let _alone = self.directories.write().await;
        let epoch = self.state().epoch;
        self.client.link(ino, to.0, to.1).await?;
        let left = self.client.name_left(to.0, to.1, Some(ino));
        let dentry = Dentry { ino: Some(ino), until: Instant::now() + left, epoch };
        self.state().dentries.insert((to.0, to.1.to_owned()), dentry);
        Ok(())
    }

    pub(crate) async fn unlink(&self, name: Name) -> FsResult<()> {
        let _alone = self.directories.write().await;
        self.client.unlink(name.0, name.1).await?;
        self.state().dentries.remove(&(name.0, name.1.to_owned()));
        Ok(())
    }
}
