//! Frames to a peer that takes in some bytes and then no more.

use std::{
    io::Read,
    net::{TcpListener, TcpStream},
};

use super::*;

const HEAD: &[u8] = b"head";

/// A connected socket, and its peer, which reads nothing yet.
async fn connected() -> (Socket, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = Socket::tcp(&listener.local_addr().unwrap().to_string()).await.unwrap();
    (socket, listener.accept().unwrap().0)
}

fn push(sender: &Sender, request: u64, len: usize) {
    sender.push(request, Bytes::from_static(HEAD), vec![Bytes::from(vec![request as u8; len])]);
}

#[tokio::test]
async fn what_is_not_begun_is_taken_back_and_what_is_begun_is_not() {
    let sender = Sender::default();
    let (socket, mut peer) = connected().await;
    push(&sender, 1, 32 << 20);
    assert!(!sender.flush(&socket).unwrap(), "the peer reads nothing");
    push(&sender, 2, 100);
    push(&sender, 3, 100);
    assert!(!sender.flush(&socket).unwrap());
    push(&sender, 4, 100);
    assert!(sender.take_back(2) && sender.take_back(4), "not begun");
    assert!(!sender.take_back(1), "the stream would have no meaning");
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        all
    });
    while !sender.flush(&socket).unwrap() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    push(&sender, 5, 10);
    assert!(sender.flush(&socket).unwrap());
    assert!(sender.take_back(5), "written, so there is nothing to take back");
    drop((sender, socket));
    let all = reader.join().unwrap();
    let frame = |request: u8, len| [HEAD, &vec![request; len]].concat();
    assert!(all == [frame(1, 32 << 20), frame(3, 100), frame(5, 10)].concat());
}
