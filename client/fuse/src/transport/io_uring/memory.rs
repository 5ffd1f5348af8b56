//! The memory of a ring's entries, shared with the kernel.
//!
//! ```text
//! headers of entry 0, 1, …   512 bytes each: in_out, op_in, ring_in_out (abi::uring)
//! ── huge page, as far as there are any ──
//! payload of entry 0, 1, …   whole pages each
//! ```
//!
//! # Who may touch an entry
//! The kernel, from REGISTER or COMMIT_AND_FETCH until its completion; and it does so only in the ring's thread, inside a system
//! call. Between a completion and the commit that answers it the entry is its [`super::UringSlot`]'s, and nobody else's.
//!
//! Pages are resident only once touched, and the kernel takes the entry that was used last, so a mount that never has
//! many requests in flight never pays for the others. Large payloads lie in huge pages: the kernel finds and pins 256 pages of an
//! entry for each copy.

use std::io;
use std::ptr::NonNull;

use memmap2::{Advice, MmapMut};

use crate::abi::{self, InHeader, OutHeader, Pod, UringInOut, uring};

const HUGE_PAGE: usize = 2 << 20;
const HEADERS_STRIDE: usize = 512;
const _: () = assert!(HEADERS_STRIDE >= uring::HEADERS_SIZE);

/// The payload buffer for requests of up to `size_max` bytes. The kernel takes none with less room than the pages that INIT was answered
/// with (fs/fuse/dev_uring.c, `fuse_uring_create`).
pub(crate) fn payload_len(size_max: usize) -> usize {
    size_max.next_multiple_of(abi::page_size()).max(uring::PAYLOAD_MIN)
}

/// Memory of one entry for requests of up to `size_max` bytes.
pub(crate) fn entry_len(size_max: usize) -> usize {
    HEADERS_STRIDE + payload_len(size_max)
}

/// Maps the buffers of `entries` entries for requests of up to `size_max` bytes; they are valid as long as the map.
pub(super) fn map(entries: usize, size_max: usize) -> io::Result<(MmapMut, Vec<EntryBuffers>)> {
    let headers_len = (entries * HEADERS_STRIDE).next_multiple_of(abi::page_size());
    let payload_len = payload_len(size_max);
    let is_large = payload_len >= HUGE_PAGE / 2;
    let align = if is_large { HUGE_PAGE } else { abi::page_size() };
    let mut map = MmapMut::map_anon(headers_len + align + entries * payload_len)?;
    let payloads_offset = headers_len + map[headers_len..].as_ptr().align_offset(align);
    if is_large {
        // Without huge pages it works too.
        let _ = map.advise_range(Advice::HugePage, payloads_offset, entries * payload_len);
    }
    let start = NonNull::from(&mut map[..]).cast::<u8>();
    // SAFETY: both offsets are within the map, whose length is computed from them above.
    let at = |offset: usize| unsafe { start.add(offset) };
    let buffers = (0..entries)
        .map(|index| EntryBuffers {
            headers: at(index * HEADERS_STRIDE),
            payload: at(payloads_offset + index * payload_len),
            payload_len,
        })
        .collect();
    Ok((map, buffers))
}

/// The two buffers of one entry; to be touched only by who may, see above.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryBuffers {
    headers: NonNull<u8>,
    payload: NonNull<u8>,
    payload_len: usize,
}

impl EntryBuffers {
    /// What REGISTER is given.
    pub(super) fn iovecs(&self) -> [libc::iovec; 2] {
        [
            libc::iovec { iov_base: self.headers.as_ptr().cast(), iov_len: uring::HEADERS_SIZE },
            libc::iovec { iov_base: self.payload.as_ptr().cast(), iov_len: self.payload_len },
        ]
    }

    fn headers(&self) -> &[u8] {
        // SAFETY: the headers are this long, initialised (mapped as zeros), and the caller is the one who may touch them.
        unsafe { std::slice::from_raw_parts(self.headers.as_ptr(), uring::HEADERS_SIZE) }
    }

    fn headers_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `headers`; nobody else refers to them meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.headers.as_ptr(), uring::HEADERS_SIZE) }
    }

    /// The header of the request.
    pub(super) fn in_header(&self) -> InHeader {
        InHeader::from_prefix(&self.headers()[uring::IN_OUT..uring::OP_IN])
    }

    /// The first `len` bytes of the structure of the request's opcode.
    pub(super) fn op_in(&self, len: usize) -> &[u8] {
        let op_in = &self.headers()[uring::OP_IN..uring::RING_IN_OUT];
        &op_in[..len.min(op_in.len())]
    }

    /// What the kernel says of the request.
    pub(super) fn ring_in_out(&self) -> UringInOut {
        UringInOut::from_prefix(&self.headers()[uring::RING_IN_OUT..])
    }

    /// Names or data of a request.
    pub(super) fn payload(&self) -> &[u8] {
        // SAFETY: the payload is this long, initialised (mapped as zeros), and the caller is the one who may touch it.
        unsafe { std::slice::from_raw_parts(self.payload.as_ptr(), self.payload_len) }
    }

    /// Where the data of an answer goes.
    pub(super) fn payload_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `payload`; nobody else refers to it meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.payload.as_ptr(), self.payload_len) }
    }

    /// Puts the head of an answer in place.
    pub(super) fn set_answer(&mut self, header: &OutHeader, payload: UringInOut) {
        let headers = self.headers_mut();
        headers[..size_of::<OutHeader>()].copy_from_slice(header.as_bytes());
        headers[uring::RING_IN_OUT..].copy_from_slice(payload.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_do_not_overlap() {
        let (map, entries) = map(9, 10_000).unwrap();
        let mut parts = Vec::new();
        for entry in &entries {
            let [headers, payload] = entry.iovecs();
            assert_eq!((headers.iov_len, payload.iov_len), (288, 12_288));
            assert_eq!(payload.iov_base.addr() % abi::page_size(), 0);
            parts.extend(
                [headers, payload].map(|part| (part.iov_base.addr(), part.iov_base.addr() + part.iov_len)),
            );
        }
        parts.sort_unstable();
        assert!(parts.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        let start = map.as_ptr().addr();
        assert!(parts[0].0 >= start && parts[17].1 <= start + map.len());
    }

    #[test]
    fn an_answer_replaces_the_request() {
        let (_map, mut entries) = map(1, 4096).unwrap();
        let entry = &mut entries[0];
        let header = OutHeader { len: 16, error: -5, unique: 77 };
        entry.set_answer(&header, UringInOut { payload_sz: 3, ..UringInOut::default() });
        assert_eq!(entry.headers()[..16], *header.as_bytes());
        assert_eq!(entry.ring_in_out().payload_sz, 3);
        entry.payload_mut()[4095] = 1;
        assert_eq!((entry.payload().len(), entry.payload()[4095]), (uring::PAYLOAD_MIN, 1));
    }
}
