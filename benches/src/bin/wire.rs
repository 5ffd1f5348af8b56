//! The floor of the wire: the data protocol's frames over a socket, with nothing behind them.
//!
//! `wire serve unix:PATH|tcp:HOST:PORT` answers every read from memory, a thread for each connection.
//! `wire read ADDRESS BYTES THREADS IN_FLIGHT SECONDS` reads from it, a connection for each thread, and prints the reads and
//! the seconds they took. Checksums travel, but are neither computed nor verified.

use std::{
    io::{self, BufReader, IoSlice, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    process::ExitCode,
    time::{Duration, Instant},
};

use fjordfs_proto::{
    PAGE_SIZE,
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::data::{Range, ReadShardReply, ReadShardRequest},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Receive buffer: many requests of 4 KiB are taken from the socket at once, as a real server does.
const BUFFER: usize = 64 << 10;

/// The largest read.
static ZEROS: [u8; 16 << 20] = [0; 16 << 20];

trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

fn connect(address: &str) -> Result<Box<dyn Socket>> {
    match address.split_once(':') {
        Some(("unix", path)) => Ok(Box::new(UnixStream::connect(path)?)),
        Some(("tcp", address)) => {
            let socket = TcpStream::connect(address)?;
            socket.set_nodelay(true)?;
            Ok(Box::new(socket))
        }
        _ => Err(format!("'{address}' is neither unix:PATH nor tcp:HOST:PORT").into()),
    }
}

fn serve(address: &str) -> Result<()> {
    match address.split_once(':') {
        Some(("unix", path)) => {
            let listener = UnixListener::bind(path)?;
            loop {
                answer(Box::new(listener.accept()?.0));
            }
        }
        Some(("tcp", address)) => {
            let listener = TcpListener::bind(address)?;
            loop {
                let socket = listener.accept()?.0;
                socket.set_nodelay(true)?;
                answer(Box::new(socket));
            }
        }
        _ => Err(format!("'{address}' is neither unix:PATH nor tcp:HOST:PORT").into()),
    }
}

/// Answers requests on a thread of its own until the other side hangs up.
fn answer(socket: Box<dyn Socket>) {
    std::thread::spawn(move || {
        let mut socket = BufReader::with_capacity(BUFFER, socket);
        while let Ok((header, body)) = receive(&mut socket) {
            if reply(socket.get_mut(), header, &body).is_err() {
                return;
            }
        }
    });
}

fn reply(socket: &mut impl Write, header: Header, body: &[u8]) -> Result<()> {
    let request: ReadShardRequest = frame::decode_body(header.opcode, body)?;
    let length = request.ranges.first().map_or(0, |r| r.length as usize).min(ZEROS.len());
    let reply = ReadShardReply {
        lengths: vec![length as u32],
        page_crcs: ZEROS[..4 * length.div_ceil(PAGE_SIZE)].to_vec().into(),
        shard_length: length as u32,
    };
    let head = frame::encode(header.opcode, true, header.request, &reply, length);
    Ok(send(socket, &head, &ZEROS[..length])?)
}

/// Both in as few calls as the socket takes.
fn send(socket: &mut impl Write, head: &[u8], payload: &[u8]) -> io::Result<()> {
    let sent = socket.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)])?;
    socket.write_all(head.get(sent..).unwrap_or_default())?;
    socket.write_all(&payload[sent.saturating_sub(head.len())..])
}

fn receive(socket: &mut impl Read) -> Result<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_LEN];
    socket.read_exact(&mut head)?;
    let header = Header::decode(&head)?;
    let mut body = vec![0; header.body_len as usize];
    socket.read_exact(&mut body)?;
    Ok((header, body))
}

/// One thread's reads; how many there were.
fn read(address: &str, bytes: usize, in_flight: usize, until: Instant) -> Result<u64> {
    let mut socket = BufReader::with_capacity(BUFFER, connect(address)?);
    let mut payload = vec![0; bytes];
    let ask = |socket: &mut BufReader<Box<dyn Socket>>, id| {
        let request = ReadShardRequest {
            target: 1,
            block: id,
            shard: 0,
            ranges: vec![Range { offset: 0, length: bytes as u32 }],
            integrity: true,
        };
        socket.get_mut().write_all(&frame::encode(Opcode::ReadShard, false, id, &request, 0))
    };
    for id in 0..in_flight as u64 {
        ask(&mut socket, id)?;
    }
    let mut done = 0;
    loop {
        let (header, _) = receive(&mut socket)?;
        if header.payload_len as usize != bytes {
            return Err(format!("{} bytes came, {bytes} were asked for", header.payload_len).into());
        }
        socket.read_exact(&mut payload)?;
        done += 1;
        if Instant::now() >= until {
            return Ok(done);
        }
        ask(&mut socket, header.request)?;
    }
}

#[allow(clippy::print_stdout, reason = "a program")]
fn run(args: &[&str]) -> Result<()> {
    match args {
        ["serve", address] => serve(address),
        ["read", address, bytes, threads, in_flight, seconds] => {
            let (bytes, threads): (usize, usize) = (bytes.parse()?, threads.parse()?);
            let (in_flight, seconds): (usize, f64) = (in_flight.parse()?, seconds.parse()?);
            if !(1..=ZEROS.len()).contains(&bytes)
                || threads == 0
                || in_flight == 0
                || !(0.01..1e6).contains(&seconds)
            {
                return Err("BYTES up to 16 MiB, THREADS and IN_FLIGHT from 1, SECONDS from 0.01".into());
            }
            let began = Instant::now();
            let until = began + Duration::from_secs_f64(seconds);
            let reads = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..threads).map(|_| scope.spawn(|| read(address, bytes, in_flight, until))).collect();
                threads
                    .into_iter()
                    .map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into())))
                    .sum::<Result<u64>>()
            })?;
            println!("{reads} {:.6}", began.elapsed().as_secs_f64());
            Ok(())
        }
        _ => Err("usage: wire serve ADDRESS | wire read ADDRESS BYTES THREADS IN_FLIGHT SECONDS".into()),
    }
}

#[allow(clippy::print_stderr, reason = "a program")]
fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("wire: {e}");
            ExitCode::FAILURE
        }
    }
}
