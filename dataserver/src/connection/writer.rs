//! Sends the answers of a connection, one after the other.
//!
//! PERFORMANCE-CRITICAL. Answers that wait together go out in one vectored send, with payloads straight from the buffers
//! they were read into.

use std::{net::Shutdown, ops::Range, sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::{
    buffer::PageBuf,
    listen::Socket,
    runtime::timeout,
    uring::{Piece, send},
};

/// Answers in one send.
const TOGETHER_MAX: usize = 64;

/// One answer, and what is held until it is out.
pub(crate) struct Answer {
    pieces: Vec<Piece>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Answer {
    pub(crate) fn new(head: Vec<u8>, permit: Option<OwnedSemaphorePermit>) -> Answer {
        Answer { pieces: vec![Piece::Head(head)], _permit: permit }
    }

    pub(crate) fn with_payload(mut self, payload: Vec<(PageBuf, Range<usize>)>) -> Answer {
        self.pieces.extend(payload.into_iter().map(|(buf, range)| Piece::Pages(buf, range)));
        self
    }
}

/// Sends until nobody is left who could answer, or the peer is gone.
pub(super) async fn run(
    socket: Arc<Socket>,
    mut inbox: mpsc::UnboundedReceiver<Answer>,
    stall_max: Duration,
) {
    let mut waiting = Vec::new();
    while inbox.recv_many(&mut waiting, TOGETHER_MAX).await > 0 {
        let (mut pieces, mut permits) = (Vec::new(), Vec::new());
        for answer in waiting.drain(..) {
            pieces.extend(answer.pieces);
            permits.extend(answer._permit);
        }
        let sent = timeout(stall_max, send(&socket, pieces)).await;
        drop(permits);
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(e)) => {
                tracing::debug!("sending answers: {e}");
                return hang_up(&socket, inbox);
            }
            Err(_) => {
                tracing::warn!("a connection is closed: it does not take its answers");
                return hang_up(&socket, inbox);
            }
        }
    }
}

/// Wakes the reader, which waits for a peer that will not be answered any more, and ends a send in flight.
fn hang_up(socket: &Socket, mut inbox: mpsc::UnboundedReceiver<Answer>) {
    inbox.close();
    // Fails when the peer has hung up already.
    let _ = socket.shutdown(Shutdown::Both);
}
