//! The receiver against an oracle: whatever pieces a stream of answers comes in, whoever drives, and whoever has gone,
//! each waiting request gets its own bytes.

use std::collections::{BTreeMap, VecDeque};

use fjordfs_proto::pb::data::{ErrorBody, ReadShardReply};
use proptest::prelude::*;
use prost::Message;

use super::*;

/// A stream that comes in pieces, with a pause after each.
struct Pieces(VecDeque<Vec<u8>>);

impl Source for Pieces {
    fn receive(&mut self, into: &mut [MaybeUninit<u8>]) -> Poll<io::Result<usize>> {
        let Some(mut piece) = self.0.pop_front() else { return Poll::Ready(Ok(0)) };
        if piece.is_empty() {
            return Poll::Pending;
        }
        let n = piece.len().min(into.len());
        for (to, from) in into.iter_mut().zip(&piece[..n]) {
            to.write(*from);
        }
        if n < piece.len() {
            self.0.push_front(piece.split_off(n));
        } else {
            self.0.push_front(Vec::new());
        }
        Poll::Ready(Ok(n))
    }
}

#[derive(Clone, Debug)]
struct Sent {
    payload: Vec<u8>,
    status: u16,
    /// The caller's memory; `None` without.
    room: Option<usize>,
    /// Whether somebody still waits for it.
    waits: bool,
    /// Whether its caller comes when it is its turn.
    comes: bool,
}

fn sent() -> impl Strategy<Value = Sent> {
    let size = prop_oneof![0..100usize, 4000..5000usize, 15_000..70_000usize];
    (size, any::<u8>(), prop_oneof![4 => Just(0u16), 1 => Just(5u16)], 0..80_000usize, any::<[bool; 3]>())
        .prop_map(|(len, seed, status, room, [has_room, waits, comes])| Sent {
            payload: (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect(),
            status,
            room: has_room.then_some(room),
            waits,
            comes,
        })
}

fn encoded(request: u64, sent: &Sent) -> Vec<u8> {
    let body = match sent.status {
        0 => ReadShardReply { shard_length: request as u32, ..Default::default() }.encode_to_vec(),
        _ => ErrorBody { message: format!("no {request}") }.encode_to_vec(),
    };
    let header = Header {
        opcode: frame::Opcode::ReadShard,
        reply: true,
        status: sent.status,
        request,
        body_len: body.len() as u32,
        payload_len: sent.payload.len() as u32,
    };
    [&header.encode()[..], &body, &sent.payload].concat()
}

fn cut(mut stream: &[u8], sizes: &[usize]) -> Pieces {
    let mut pieces = VecDeque::new();
    for size in sizes.iter().cycle() {
        let n = (*size).min(stream.len());
        pieces.push_back(stream[..n].to_vec());
        stream = &stream[n..];
        if stream.is_empty() {
            break;
        }
    }
    Pieces(pieces)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn everyone_gets_what_was_sent(
        all in proptest::collection::vec(sent(), 1..8),
        sizes in proptest::collection::vec(prop_oneof![1..40usize, 1..3000usize, 10_000..90_000usize], 1..6),
        driver in 0..8u64,
    ) {
        let stream: Vec<u8> = all.iter().enumerate().flat_map(|(i, sent)| encoded(i as u64, sent)).collect();
        let mut source = cut(&stream, &sizes);
        let mut receiver = Receiver::new(crate::data::memory::Pool::new(0, 64 << 20));
        let of = |request: u64| &all[request as usize];
        let room = |request: u64| of(request).waits.then(|| of(request).room);
        let mut memories: BTreeMap<u64, Vec<u8>> =
            (0..).zip(&all).map(|(i, sent)| (i, vec![0; sent.room.unwrap_or_default()])).collect();
        let mut answers = BTreeMap::new();
        let mut driving = driver % all.len() as u64;
        loop {
            let memory = memories.get_mut(&driving).unwrap();
            let caller = of(driving).waits.then_some(Caller { request: driving, memory });
            match receiver.next(&mut source, caller, room).unwrap() {
                Event::Idle => {}
                Event::Answer(request, answer) => prop_assert!(answers.insert(request, answer).is_none()),
                Event::Turn(request) => {
                    prop_assert!(request != driving);
                    match of(request).comes {
                        true => driving = request,
                        false => receiver.keep(),
                    }
                }
                Event::Closed => break,
            }
        }
        for (request, sent) in (0..).zip(&all) {
            let Some(answer) = answers.remove(&request) else {
                prop_assert!(!sent.waits);
                continue;
            };
            match answer {
                Ok(answer) => {
                    prop_assert_eq!(sent.status, 0);
                    let body = ReadShardReply::decode(answer.body).unwrap();
                    prop_assert_eq!(u64::from(body.shard_length), request);
                    let got = [&memories[&request][..answer.direct], &answer.payload].concat();
                    prop_assert!(got == sent.payload);
                }
                Err(e) => {
                    prop_assert_eq!(e.errno.code(), i32::from(sent.status));
                    prop_assert_eq!(e.message, format!("no {request}"));
                }
            }
        }
        prop_assert!(answers.is_empty());
    }

    #[test]
    fn a_cut_stream_is_an_error(sent in sent(), at in any::<prop::sample::Index>()) {
        let stream = encoded(0, &Sent { waits: true, ..sent.clone() });
        let at = 1 + at.index(stream.len() - 1);
        let mut receiver = Receiver::new(crate::data::memory::Pool::new(0, 64 << 20));
        let mut source = cut(&stream[..at], &[7777]);
        let outcome = loop {
            match receiver.next(&mut source, None, |_| Some(None)) {
                Ok(Event::Idle) => {}
                other => break other,
            }
        };
        prop_assert!(outcome.is_err());
    }
}

#[test]
fn a_caller_that_leaves_in_the_middle_of_its_payload_leaves_the_stream_in_order() {
    let one = Sent { payload: vec![1; 60_000], status: 0, room: Some(60_000), waits: true, comes: true };
    let two = Sent { payload: vec![2; 100], ..one.clone() };
    let stream = [encoded(0, &one), encoded(1, &two)].concat();
    let mut source = cut(&stream, &[30_000]);
    let mut receiver = Receiver::new(crate::data::memory::Pool::new(0, 64 << 20));
    let mut memory = vec![0; 60_000];
    let caller = Caller { request: 0, memory: &mut memory };
    let both = |request| Some((request == 0).then_some(60_000));
    assert!(matches!(receiver.next(&mut source, Some(caller), both), Ok(Event::Idle)));
    assert_eq!(receiver.turn(), Some(0));
    loop {
        match receiver.next(&mut source, None, |request| (request == 1).then_some(None)).unwrap() {
            Event::Answer(1, Ok(answer)) => break assert_eq!(answer.payload, two.payload),
            Event::Idle => {}
            other => panic!("{other:?}"),
        }
    }
}
