//! How servers are reached: over TCP, or through whatever a program that embeds the client puts in its place.

use std::{fmt::Debug, io};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection: bytes in both directions, each in their order. A flush is over when it has room again.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Makes connections. With one in [`Options::network`](crate::Options::network), all work of the client is done by the
/// runtime that [`Client::connect`](crate::Client::connect) is called in.
pub trait Network: Debug + Send + Sync {
    /// Connects to `HOST:PORT`. Whoever waits does so for a bounded time.
    ///
    /// # Errors
    /// Why nobody can be reached there.
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Wire>>>;
}
