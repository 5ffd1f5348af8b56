//! A bounded number of tasks that work through a queue.

use std::{future::Future, sync::Arc};

use tokio::{
    sync::{Mutex, mpsc},
    task::JoinSet,
};

/// Takes items while there is a free place in the queue, so that whoever finds work is held back by those who do it.
pub(crate) struct Workers<T> {
    queue: mpsc::Sender<T>,
    tasks: JoinSet<()>,
}

impl<T: Send + 'static> Workers<T> {
    /// Starts `count` tasks that each run `work` on one item at a time.
    pub(crate) fn start<F, W>(count: usize, work: W) -> Workers<T>
    where
        W: Fn(T) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        let (queue, inbox) = mpsc::channel(4 * count);
        let inbox = Arc::new(Mutex::new(inbox));
        let mut tasks = JoinSet::new();
        for _ in 0..count.max(1) {
            let (inbox, work) = (inbox.clone(), work.clone());
            tasks.spawn(async move {
                loop {
                    // The lock is only held while waiting for an item: the others wait for one too.
                    let item = inbox.lock().await.recv().await;
                    match item {
                        Some(item) => work(item).await,
                        None => return,
                    }
                }
            });
        }
        Workers { queue, tasks }
    }

    /// Hands over an item; waits while all are busy.
    pub(crate) async fn give(&self, item: T) {
        if self.queue.send(item).await.is_err() {
            tracing::error!("every worker has ended early");
        }
    }

    /// Waits until everything given is done.
    pub(crate) async fn finish(mut self) {
        drop(self.queue);
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(e) = ended {
                tracing::error!("a worker failed: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    #[tokio::test]
    async fn everything_is_done_once_and_not_too_much_at_a_time() {
        static DONE: AtomicUsize = AtomicUsize::new(0);
        static NOW: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        let workers = Workers::start(3, |n: usize| async move {
            MOST.fetch_max(NOW.fetch_add(1, SeqCst) + 1, SeqCst);
            tokio::task::yield_now().await;
            NOW.fetch_sub(1, SeqCst);
            DONE.fetch_add(n, SeqCst);
        });
        for n in 1..=100 {
            workers.give(n).await;
        }
        workers.finish().await;
        assert_eq!(DONE.load(SeqCst), 5050);
        assert!((2..=3).contains(&MOST.load(SeqCst)));
    }
}
