//! What a supervisor and its worker say to each other: short messages on a socket pair, some with descriptors.
//!
//! Both may be of different releases: the supervisor of the one that mounted, the worker of the one that it was upgraded to. So
//! messages only grow, and unknown ones are ignored.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use fjordfs_fuse::Agreed;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::{io::Interest, net::UnixStream};

/// `SCM_MAX_FD`: the kernel passes no more in one message.
const DESCRIPTORS_MAX: usize = 253;

/// Descriptors of the device that fit beside the handover memory.
pub(super) const DEVICES_MAX: usize = DESCRIPTORS_MAX - 1;

const BYTES_MAX: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) enum Message {
    /// To the worker, first: the handover memory. With what a former worker has left, to be taken over, or to mount anew.
    Begin { memory: OwnedFd, left: Option<Kept> },
    /// From the worker that has mounted: to be kept for others.
    Keep(Kept),
    /// From the worker: requests are served.
    Serving,
    /// To the worker: hand over and end.
    Leave,
    /// From the worker: everything is handed over, it ends.
    Left,
}

/// What a worker needs to take over a mount.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) devices: Vec<OwnedFd>,
    pub(super) agreed: Agreed,
}

/// First byte of a message.
mod tag {
    pub(super) const BEGIN: u8 = b'B';
    pub(super) const RESUME: u8 = b'R';
    pub(super) const KEEP: u8 = b'K';
    pub(super) const SERVING: u8 = b'S';
    pub(super) const LEAVE: u8 = b'E';
    pub(super) const LEFT: u8 = b'L';
}

/// One end. A `UnixStream` as far as tokio is concerned, though it keeps messages apart.
#[derive(Debug)]
pub(super) struct Channel(UnixStream);

impl Channel {
    /// Two ends: the first for here, the second to be passed on. Inside a runtime.
    pub(super) fn pair() -> io::Result<(Channel, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Channel::of(here)?, there))
    }

    /// The end that was passed on. Inside a runtime.
    pub(super) fn of(socket: OwnedFd) -> io::Result<Channel> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Channel(UnixStream::from_std(socket)?))
    }

    /// Sends without waiting: there is always room for the few messages that there are.
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let plain = |tag| (vec![tag], Vec::new());
        let (bytes, descriptors) = match message {
            Message::Begin { memory, left: None } => (vec![tag::BEGIN], vec![memory.as_fd()]),
            Message::Begin { memory, left: Some(kept) } => {
                let memory = [memory.as_fd()].into_iter();
                (agreed_bytes(tag::RESUME, kept.agreed), memory.chain(kept.borrowed()).collect())
            }
            Message::Keep(kept) => (agreed_bytes(tag::KEEP, kept.agreed), kept.borrowed().collect()),
            Message::Serving => plain(tag::SERVING),
            Message::Leave => plain(tag::LEAVE),
            Message::Left => plain(tag::LEFT),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
        }
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message; `None` when the other end is closed. Safe to cancel.
    pub(super) async fn receive(&self) -> io::Result<Option<Message>> {
        loop {
            match self.0.async_io(Interest::READABLE, || receive_now(&self.0)).await {
                Ok(Received::Unknown) => tracing::debug!("a message that this release does not know"),
                Ok(Received::Message(message)) => return Ok(Some(message)),
                Ok(Received::Closed) => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

enum Received {
    Message(Message),
    Unknown,
    Closed,
}

fn receive_now(socket: &UnixStream) -> io::Result<Received> {
    let mut bytes = [0; BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("descriptors were lost: the limit of open files is too low"));
    }
    let Some((tag, rest)) = bytes[..received.bytes].split_first() else { return Ok(Received::Closed) };
    Ok(parse(*tag, rest, descriptors).map_or(Received::Unknown, Received::Message))
}

fn parse(tag: u8, rest: &[u8], descriptors: Vec<OwnedFd>) -> Option<Message> {
    let mut descriptors = descriptors.into_iter();
    Some(match tag {
        tag::BEGIN => Message::Begin { memory: descriptors.next()?, left: None },
        tag::RESUME => {
            let memory = descriptors.next()?;
            Message::Begin { memory, left: Some(kept(rest, descriptors)?) }
        }
        tag::KEEP => Message::Keep(kept(rest, descriptors)?),
        tag::SERVING => Message::Serving,
        tag::LEAVE => Message::Leave,
        tag::LEFT => Message::Left,
        _ => return None,
    })
}

fn kept(rest: &[u8], devices: impl Iterator<Item = OwnedFd>) -> Option<Kept> {
    let (minor, rest) = rest.split_first_chunk()?;
    let (size, _) = rest.split_first_chunk()?;
    let agreed = Agreed { kernel_minor: u32::from_le_bytes(*minor), size_max: u32::from_le_bytes(*size) };
    Some(Kept { devices: devices.collect(), agreed })
}

fn agreed_bytes(tag: u8, agreed: Agreed) -> Vec<u8> {
    let numbers = [agreed.kernel_minor, agreed.size_max];
    [tag].into_iter().chain(numbers.into_iter().flat_map(u32::to_le_bytes)).collect()
}

impl Kept {
    fn borrowed(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().map(AsFd::as_fd)
    }

    pub(super) fn try_clone(&self) -> io::Result<Kept> {
        let devices = self.devices.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        Ok(Kept { devices, agreed: self.agreed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[tokio::test]
    async fn messages_arrive_with_their_descriptors() {
        let (one, other) = Channel::pair().unwrap();
        let other = Channel::of(other).unwrap();
        let agreed = Agreed { kernel_minor: 45, size_max: 1 << 20 };
        let devices = || (0..3).map(|_| descriptor()).collect();
        one.send(&Message::Begin { memory: descriptor(), left: None }).unwrap();
        let left = Some(Kept { devices: devices(), agreed });
        one.send(&Message::Begin { memory: descriptor(), left }).unwrap();
        other.send(&Message::Keep(Kept { devices: devices(), agreed })).unwrap();
        other.send(&Message::Serving).unwrap();
        assert!(matches!(other.receive().await.unwrap(), Some(Message::Begin { left: None, .. })));
        let Some(Message::Begin { left: Some(kept), .. }) = other.receive().await.unwrap() else { panic!() };
        assert_eq!((kept.devices.len(), kept.agreed), (3, agreed));
        let Some(Message::Keep(kept)) = one.receive().await.unwrap() else { panic!() };
        assert_eq!((kept.devices.len(), kept.agreed), (3, agreed));
        assert!(matches!(one.receive().await.unwrap(), Some(Message::Serving)));
        drop(other);
        assert!(one.receive().await.unwrap().is_none());
    }

    #[test]
    fn unknown_and_short_messages_are_nothing() {
        assert!(parse(b'?', &[], Vec::new()).is_none());
        assert!(parse(tag::KEEP, &[1, 2, 3], Vec::new()).is_none());
        assert!(parse(tag::BEGIN, &[], Vec::new()).is_none());
        assert!(parse(tag::KEEP, &[0; 30], Vec::new()).is_some(), "a later release says more");
    }
}
