//! Work that blocks, on threads of its own: a core must not wait for it.

use std::io;

/// Runs `work` on a new thread. It is rare work, or long: making a volume, listing everything, saving an index, reading a client's memory.
///
/// # Errors
/// When there is no thread to be had, or `work` has panicked.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (answer, result) = tokio::sync::oneshot::channel();
    // Whoever wanted the result may have given up.
    let work = move || drop(answer.send(work()));
    std::thread::Builder::new().name("fjord-blocking".to_owned()).spawn(work)?;
    result.await.map_err(|_| io::Error::other("it has panicked; the message is on standard error"))
}
