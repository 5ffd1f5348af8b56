//! How a data server can get stored bytes to a client: which way from file to socket costs least.
//!
//! A server thread answers requests for a piece of FILE with a short head and the piece, over a Unix socket; a client
//! thread asks for one piece after the other. Printed are the client's time and the server's CPU time for each piece: the
//! median of ROUNDS rounds, in which the ways take turns. Needs root, to empty the page cache. `read_path FILE [ROUNDS]`

#![allow(clippy::print_stdout, reason = "the table is what this is for")]

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Instant,
};

use tokio_uring::buf::BoundedBuf;

/// Like header and body of an answer.
const HEAD: usize = 48;
const RWF_DONTCACHE: i32 = 0x80;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    Direct,
    Buffered,
    DontCache,
    Sendfile,
    /// As `Buffered`, on a runtime that waits in epoll for its ring. What its workers do is not in its CPU time.
    TokioUring,
}

const WAYS: [Way; 5] = [Way::Direct, Way::Buffered, Way::DontCache, Way::Sendfile, Way::TokioUring];

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    piece: usize,
    count: usize,
    random: bool,
    cold: bool,
}

fn main() -> io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let Some(path) = args.next() else {
        return Err(io::Error::other("usage: read_path FILE [ROUNDS]; FILE of 256 MiB or more"));
    };
    let rounds: usize = args.next().and_then(|n| n.to_str()?.parse().ok()).unwrap_or(5);
    let path = Path::new(&path);
    let size = std::fs::metadata(path)?.len() as usize;
    let case = |name, piece: usize, count: usize, random, cold| Case {
        name,
        piece,
        count: count.min(size / piece),
        random,
        cold,
    };
    let cases = [
        case("4 KiB random, cold", 4096, 4000, true, true),
        case("4 KiB random, warm", 4096, 4000, true, false),
        case("1 MiB in order, cold", 1 << 20, 256, false, true),
        case("1 MiB in order, warm", 1 << 20, 256, false, false),
    ];
    println!("{:<22} {:<10} {:>12} {:>14}", "case", "way", "µs a piece", "server CPU µs");
    for case in cases {
        let mut results: Vec<Vec<(f64, f64)>> = vec![Vec::new(); WAYS.len()];
        for _ in 0..rounds {
            for (way, results) in WAYS.into_iter().zip(&mut results) {
                results.push(run(path, case, way)?);
            }
        }
        for (way, mut results) in WAYS.into_iter().zip(results) {
            let mut median = |of: fn(&(f64, f64)) -> f64| {
                results.sort_by(|a, b| of(a).total_cmp(&of(b)));
                of(&results[results.len() / 2])
            };
            let (wall, cpu) = (median(|r| r.0), median(|r| r.1));
            println!("{:<22} {:<10} {wall:>12.1} {cpu:>14.1}", case.name, format!("{way:?}"));
        }
    }
    Ok(())
}

/// Wall time and the server's CPU time for a piece, microseconds.
fn run(path: &Path, case: Case, way: Way) -> io::Result<(f64, f64)> {
    let file = open(path, way)?;
    if case.random {
        // SAFETY: an open descriptor.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
    }
    let pieces = std::fs::metadata(path)?.len() as usize / case.piece;
    // Each once, so that nothing is warm by accident: a stride that has no factor in common with the number of pieces.
    let stride =
        if case.random { (pieces / 3 * 2 + 1..).find(|s| gcd(*s, pieces) == 1).unwrap_or(1) } else { 1 };
    let offsets: Vec<u64> = (0..case.count).map(|i| (i * stride % pieces * case.piece) as u64).collect();
    if case.cold {
        // SAFETY: no arguments.
        unsafe { libc::sync() };
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    } else {
        let mut warm = vec![0; case.piece];
        let plain = File::open(path)?;
        for offset in &offsets {
            std::os::unix::fs::FileExt::read_exact_at(&plain, &mut warm, *offset)?;
        }
    }
    let (mut client, server) = UnixStream::pair()?;
    for socket in [&client, &server] {
        let size: libc::c_int = 4 << 20;
        // SAFETY: the option's value is an int that lives during the call.
        unsafe {
            let value = (&raw const size).cast();
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value, 4);
        }
    }
    let serving = std::thread::spawn(move || match way {
        Way::TokioUring => serve_on_tokio_uring(file, server, case.piece),
        _ => serve(&file, server, case.piece, way),
    });
    let mut answer = vec![0; HEAD + case.piece];
    let begun = Instant::now();
    for offset in &offsets {
        client.write_all(&offset.to_le_bytes())?;
        client.read_exact(&mut answer)?;
    }
    let wall = begun.elapsed();
    drop(client);
    let cpu = serving.join().map_err(|_| io::Error::other("the server has panicked"))??;
    let count = offsets.len() as f64;
    Ok((wall.as_secs_f64() * 1e6 / count, cpu * 1e6 / count))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn open(path: &Path, way: Way) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let direct = if way == Way::Direct { libc::O_DIRECT } else { 0 };
    // SAFETY: a path that ends in NUL.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC | direct) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Answers until the client has gone; the CPU time that it took, seconds.
fn serve(file: &File, mut socket: UnixStream, piece: usize, way: Way) -> io::Result<f64> {
    let mut memory = vec![0u8; piece + 4096];
    let start = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[start..start + piece];
    let head = [7u8; HEAD];
    let begun = cpu_time()?;
    let mut request = [0; 8];
    while socket.read_exact(&mut request).is_ok() {
        let offset = u64::from_le_bytes(request) as i64;
        if way == Way::Sendfile {
            send(&socket, &[&head], libc::MSG_MORE)?;
            let (mut offset, mut left) = (offset, piece);
            while left > 0 {
                // SAFETY: open descriptors; the offset lives during the call.
                left -=
                    done(unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), &mut offset, left) })?;
            }
            continue;
        }
        let flags = if way == Way::DontCache { RWF_DONTCACHE } else { 0 };
        let vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: piece };
        // SAFETY: the vector describes `buffer`, which nobody else uses.
        let read = done(unsafe { libc::preadv2(file.as_raw_fd(), &vector, 1, offset, flags) })?;
        if read != piece {
            return Err(io::Error::other("the file ends in the middle of a piece"));
        }
        send(&socket, &[&head, buffer], 0)?;
    }
    Ok(cpu_time()? - begun)
}

/// As [`serve`], in tasks.
fn serve_on_tokio_uring(file: File, socket: UnixStream, piece: usize) -> io::Result<f64> {
    let begun = cpu_time()?;
    tokio_uring::start(async move {
        let file = tokio_uring::fs::File::from_std(file);
        let socket = tokio_uring::net::UnixStream::from_std(socket);
        let mut request = vec![0; 8];
        let mut answer = vec![7; HEAD + piece];
        loop {
            let (read, back) = socket.read(request).await;
            request = back;
            let Ok(offset) = <[u8; 8]>::try_from(&request[..]) else {
                unreachable!("the buffer has its length")
            };
            if read? != offset.len() {
                return Ok::<_, io::Error>(());
            }
            let (read, back) = file.read_exact_at(answer.slice(HEAD..), u64::from_le_bytes(offset)).await;
            read?;
            let (sent, back) = socket.write_all(back.into_inner()).await;
            sent?;
            answer = back;
        }
    })?;
    Ok(cpu_time()? - begun)
}

fn send(socket: &UnixStream, parts: &[&[u8]], flags: i32) -> io::Result<()> {
    let mut skip = 0;
    let total: usize = parts.iter().map(|part| part.len()).sum();
    while skip < total {
        let mut before = skip;
        let vectors: Vec<libc::iovec> = parts
            .iter()
            .map(|part| {
                let rest = &part[before.min(part.len())..];
                before -= part.len() - rest.len();
                libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() }
            })
            .collect();
        // SAFETY: all zero is a message without name and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_ptr().cast_mut();
        message.msg_iovlen = vectors.len();
        // SAFETY: the message describes memory that lives during the call.
        skip += done(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags | libc::MSG_NOSIGNAL) })?;
    }
    Ok(())
}

fn done(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Of this thread, seconds.
fn cpu_time() -> io::Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to `time`.
    match unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } {
        0 => Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9),
        _ => Err(io::Error::last_os_error()),
    }
}
