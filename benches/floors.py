#!/usr/bin/env python3
"""FjordFS beside its floors, in one paired run: what a mount costs (a FUSE filesystem in memory, on both transports),
what the wire costs (the data protocol's frames over a Unix and a TCP socket, answered from memory), and the device (ext4).

Every round measures every figure on every subject, one after the other, so that whatever else the machine does meets all of
them. Writes results/<date>-<what>.json (every round), .md (medians, ratios, CPU per operation) and .svg (bars).

Needs root, fio, mkfs.ext4, losetup and cargo (or --bin with fjord, null_fuse, wire and library_read built in release mode).
"""
import argparse, datetime, json, os, shutil, signal, subprocess, sys, tempfile, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import plot
from bench_common import (Stack, Trouble, built, children, cpu_seconds, drop_caches, fio_random, free_port, fresh_ext4, machine, median,
                          null_fuse, run, stolen, wait_for)

HERE = os.path.dirname(os.path.abspath(__file__))
KIB = 1 << 10
# Subjects and their colours, in the order in which they are shown.
COLOURS = {"FjordFS mount": "#1f6fb4", "FjordFS library": "#63a8de", "null FUSE, io_uring": "#e07b1a", "null FUSE, /dev/fuse": "#f3b87a",
           "frames, Unix socket": "#3d9a4a", "frames, TCP": "#98d19d", "local ext4": "#777777"}
# Name, unit, and what is done: bytes of a read, threads, reads of each thread under way.
READS = [("read 4 KiB, 1 thread", 4 * KIB, 1, 1), ("read 4 KiB, 8 threads", 4 * KIB, 8, 1), ("read 4 KiB, 1 thread with 8 under way", 4 * KIB, 1, 8),
         ("read 4 KiB, 8 threads with 64 under way", 4 * KIB, 8, 64), ("read 1 MiB, 1 thread", KIB * KIB, 1, 1), ("read 1 MiB, 8 threads", KIB * KIB, 8, 1)]
STREAMS = ["sequential write with fsync", "sequential read, cold"]


class Sample:
    """One figure of one subject in one round."""

    def __init__(self, operations, seconds, size, cpu):
        self.rate = operations / seconds
        self.bytes = operations * size
        self.value = self.bytes / seconds / 1e6 if size >= 64 * KIB else self.rate
        self.operations, self.cpu = operations, cpu

    def as_json(self):
        return {"value": round(self.value, 2), "operations": self.operations, "cpu_s": {k: round(v, 2) for k, v in self.cpu.items()}}


class Cluster:
    """fjord up on a fresh filesystem, and the processes that its CPU time is taken from."""

    def __init__(self, stack, fjord, work, servers):
        self.dir, self.meta = f"{work}/fjord", f"127.0.0.1:{free_port()}"
        os.makedirs(self.dir)
        log = f"{work}/up.log"
        self.up = stack.start([fjord, "up", self.dir, "--data", f"{work}/backing/fjord", "--servers", servers, "--policy", "replica:1",
                               "--meta-listen", self.meta], log)
        wait_for("fjord up", lambda: os.path.ismount(self.dir), self.up, log)
        # The mount's process may be started again, the servers are not.
        self.servers = [p for p, c in children(self.up.pid).items() if len(c) > 1 and c[1] in ("meta", "data")]

    def client(self):
        return [p for p, c in children(self.up.pid).items() if len(c) > 1 and c[1] == "mount"]


def noise_file(path, mib):
    with open("/dev/urandom", "rb") as noise, open(path, "wb") as f:
        for _ in range(mib):
            f.write(noise.read(1 << 20))
        f.flush()
        os.fsync(f.fileno())


def timed(groups, work):
    """Runs work; its (operations, seconds) and the CPU time of each group of processes meanwhile."""
    before = {name: cpu_seconds(pids) for name, pids in groups.items()}
    result = work()
    return result, {name: cpu_seconds(pids) - before[name] for name, pids in groups.items()}


class Bench:
    def __init__(self, stack, work, options):
        self.options, self.work = options, work
        program = lambda name: os.path.join(options.bin, name)
        self.wire, self.library = program("wire"), program("library_read")
        for name in ("fjord", "null_fuse", "wire", "library_read"):
            if not os.access(program(name), os.X_OK):
                raise Trouble(f"{program(name)} is missing: build with cargo build --release -p fjordfs-cli -p fjordfs-benches")
        direct = [fresh_ext4(stack, f"{work}/{name}.img", f"{work}/{name}", options.size_gib) for name in ("backing", "local")]
        self.loop_direct = all(direct)
        self.cluster = Cluster(stack, program("fjord"), work, options.servers)
        self.nulls = {}
        for title, transport in (("null FUSE, io_uring", "io_uring"), ("null FUSE, /dev/fuse", "dev_fuse")):
            directory = f"{work}/{transport}"
            self.nulls[title] = directory, null_fuse(stack, program("null_fuse"), directory, f"transport={transport}", directory + ".log").pid
        self.wires = {}
        for title, address in (("frames, Unix socket", f"unix:{work}/wire.sock"), ("frames, TCP", f"tcp:127.0.0.1:{free_port()}")):
            server = stack.start([self.wire, "serve", address], f"{work}/wire-{len(self.wires)}.log")
            self.wires[title] = address, server.pid
        for directory in (self.cluster.dir, f"{work}/local"):
            noise_file(f"{directory}/data", options.file_mib)
        time.sleep(0.5)

    def reads(self, subject, size, threads, in_flight):
        """A sample, or None where the figure means nothing."""
        seconds = self.options.time
        if subject == "FjordFS library":
            command = [self.library, self.cluster.meta, "/data", size, threads, in_flight, seconds]
            return self.counted({"servers": self.cluster.servers}, command, size, "client")
        if subject in self.wires:
            address, server = self.wires[subject]
            return self.counted({"server": [server]}, [self.wire, "read", address, size, threads, in_flight, seconds], size, "client")
        if in_flight > 1:
            return None
        if subject == "local ext4":
            path, groups = f"{self.work}/local/data", {}
        elif subject in self.nulls:
            directory, pid = self.nulls[subject]
            path, groups = f"{directory}/fdata", {"filesystem": [pid]}
        else:
            path, groups = f"{self.cluster.dir}/data", {"client": self.cluster.client(), "servers": self.cluster.servers}
        row, cpu = timed(groups, lambda: fio_random(path, size, threads, seconds, f"{self.options.file_mib}m"))
        return Sample(row["total_ios"], row["runtime"] / 1000, size, cpu)

    def counted(self, groups, command, size, own):
        """A program of ours that prints operations and seconds; its own CPU time counts, too."""
        before = os.times()
        out, cpu = timed(groups, lambda: run(*command).split())
        after = os.times()
        cpu[own] = after.children_user + after.children_system - before.children_user - before.children_system
        return Sample(int(out[0]), float(out[1]), size, cpu)

    def stream(self, subject, figure):
        if subject not in ("FjordFS mount", "local ext4"):
            return None
        directory = self.cluster.dir if subject == "FjordFS mount" else f"{self.work}/local"
        path, piece, count = f"{directory}/stream", b"\x5a" * (1 << 20), self.options.file_mib
        groups = {"client": self.cluster.client(), "servers": self.cluster.servers} if subject == "FjordFS mount" else {}

        def write():
            with open(path, "wb", buffering=0) as f:
                began = time.perf_counter()
                for _ in range(count):
                    f.write(piece)
                os.fsync(f.fileno())
                return time.perf_counter() - began

        def read():
            drop_caches()
            buffer, total = bytearray(1 << 20), 0
            with open(path, "rb", buffering=0) as f:
                began = time.perf_counter()
                while n := f.readinto(buffer):
                    total += n
                if total != count << 20:
                    raise Trouble(f"{path} has {total} bytes, {count << 20} were written")
                return time.perf_counter() - began

        seconds, cpu = timed(groups, write if figure == STREAMS[0] else read)
        if figure == STREAMS[1]:
            os.unlink(path)
        return Sample(count, seconds, 1 << 20, cpu)

    def round(self, figures, note):
        for figure in figures:
            if figure in STREAMS:
                for subject in COLOURS:
                    note(figure, subject, self.stream(subject, figure))
                continue
            name, size, threads, in_flight = next(r for r in READS if r[0] == figure)
            for subject in COLOURS:
                note(figure, subject, self.reads(subject, size, threads, in_flight))


def unit(figure):
    return "MB/s" if "1 MiB" in figure or figure in STREAMS else "reads/s"


def summary(rows, subject):
    values = [s.value for s in rows.get(subject, [])]
    return (median(values), min(values), max(values)) if values else None


def cpu_cell(samples, figure):
    """CPU by group: microseconds an operation, or seconds a GB."""
    groups = {}
    for sample in samples:
        for group, seconds in sample.cpu.items():
            per = seconds / (sample.bytes / 1e9) if unit(figure) == "MB/s" else seconds / sample.operations * 1e6
            groups.setdefault(group, []).append(per)
    return ", ".join(f"{group} {plot.number(median(v))}" for group, v in groups.items())


def tables(samples):
    names = list(COLOURS)
    lines = ["| figure | unit | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for figure, rows in samples.items():
        cells = [s and f"{plot.number(s[0])} ({plot.number(s[1])}–{plot.number(s[2])})" or "" for s in (summary(rows, n) for n in names)]
        lines.append(f"| {figure} | {unit(figure)} | " + " | ".join(cells) + " |")
    pairs = [("FjordFS mount", "null FUSE, io_uring"), ("FjordFS mount", "frames, Unix socket"), ("FjordFS mount", "local ext4"),
             ("FjordFS library", "FjordFS mount"), ("FjordFS library", "frames, TCP"), ("null FUSE, io_uring", "null FUSE, /dev/fuse"),
             ("frames, Unix socket", "frames, TCP")]
    lines += ["", "Ratios: the median of the rounds' ratios.", "", "| figure | " + " | ".join(f"{a} ÷ {b}" for a, b in pairs) + " |", "|---|" + "---:|" * len(pairs)]
    for figure, rows in samples.items():
        cells = []
        for a, b in pairs:
            ratios = [x.value / y.value for x, y in zip(rows.get(a, []), rows.get(b, [])) if y.value]
            cells.append(f"{median(ratios):.2f}" if ratios else "")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    lines += ["", "CPU time (user and system, of each kind of process): µs for a read of 4 KiB, seconds for a GB of the others. The load generator's own is "
              "in \"client\" for the library and the frames, and left out elsewhere.", "", "| figure | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for figure, rows in samples.items():
        lines.append(f"| {figure} | " + " | ".join(cpu_cell(rows.get(n, []), figure) for n in names) + " |")
    return "\n".join(lines) + "\n"


def write_results(options, bench, samples, steal):
    out = os.path.join(options.results, f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{options.what}")
    os.makedirs(options.results, exist_ok=True)
    about = machine()
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True).stdout.strip()
    settings = {"commit": commit, "rounds": options.rounds, "seconds": options.time, "file_mib": options.file_mib, "servers": options.servers,
                "loop_direct": bench.loop_direct, "steal_percent": round(steal, 1), "note": options.note}
    with open(out + ".json", "w") as f:
        raw = {figure: {s: [x.as_json() for x in rows] for s, rows in subjects.items()} for figure, subjects in samples.items()}
        json.dump({"settings": settings, "machine": about, "samples": raw}, f, indent=1)
        f.write("\n")
    subtitle = f"{about['cores']} cores, Linux {about['kernel']}, {options.servers} data servers on this machine, replica:1, commit {commit}"
    with open(out + ".md", "w") as f:
        f.write(f"# FjordFS and its floors, {os.path.basename(out)[:10]}\n\n{subtitle}. {options.rounds} rounds of {options.time:g} s in alternation; medians "
                f"(lowest–highest). {about['cpu']}, {about['memory_gib']} GiB. The host took {steal:.1f}% of the CPU time away.\n\n")
        if options.note:
            f.write(options.note + "\n\n")
        f.write("Reads are at random offsets of one file, past the page cache of the client. "
                "\"Under way\" means requests that one thread does not wait for one by one, which a mount cannot be asked for with read(2).\n\n")
        f.write(f"![bars]({os.path.basename(out)}.svg)\n\n" + tables(samples))
    panels = []
    for figure, rows in samples.items():
        found = [(name, *s) for name in COLOURS if (s := summary(rows, name))]
        panels.append((f"{figure} ({unit(figure)})", found, None))
    with open(out + ".svg", "w") as f:
        f.write(plot.bars("FjordFS and its floors", subtitle, panels, COLOURS))
    return out + ".md"


def parse():
    every = [r[0] for r in READS] + STREAMS
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="figures:\n  " + "\n  ".join(every))
    p.add_argument("--rounds", type=int, default=5, help="rounds [5]")
    p.add_argument("--time", type=float, default=2, metavar="SECONDS", help="length of each measurement of reads [2]")
    p.add_argument("--file-mib", type=int, default=1024, help="size of the file that is read, and of the streams [1024]")
    p.add_argument("--size-gib", type=int, default=8, help="size of each of the two filesystems [8]")
    p.add_argument("--servers", type=int, default=3, help="data servers [3]")
    p.add_argument("--only", action="append", default=[], metavar="TEXT", help="figures whose name contains this; may be repeated")
    p.add_argument("--bin", help="folder with the programs [what cargo builds]")
    p.add_argument("--work", default="/var/tmp", help="where the images lie [/var/tmp]")
    p.add_argument("--results", default=os.path.join(HERE, "results"), help="where the results go [benches/results]")
    p.add_argument("--what", default="floors", help="names the result files [floors]")
    p.add_argument("--note", default="", help="a sentence for the result page")
    options = p.parse_args()
    options.figures = [f for f in every if not options.only or any(text in f for text in options.only)]
    if not options.figures:
        p.error(f"no figure's name contains {' or '.join(options.only)}")
    if options.rounds < 1 or options.time < 1 or options.file_mib < 16 or options.servers < 1:
        p.error("--rounds and --servers from 1, --time from 1 (fio counts whole seconds), --file-mib from 16")
    if options.size_gib * 1024 < 4 * options.file_mib:
        p.error("--size-gib must be four times --file-mib at least: a stream is written beside the file, and deleted data goes later")
    options.time = int(options.time)
    return options


def main():
    options = parse()
    if os.geteuid():
        raise Trouble("must run as root (loop devices, mounts, dropping caches)")
    for tool in ("fio", "mkfs.ext4", "losetup", "fallocate"):
        if not shutil.which(tool):
            raise Trouble(f"{tool} is not installed (Debian: fio e2fsprogs util-linux)")
    options.bin = built(options.bin)
    # As after Ctrl-C, everything is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stack = Stack()
    work = tempfile.mkdtemp(prefix="fjord-floors.", dir=options.work)
    stack.push(lambda: shutil.rmtree(work))
    try:
        bench = Bench(stack, work, options)
        samples = {figure: {} for figure in options.figures}
        before = stolen()

        def note(figure, subject, sample):
            if sample:
                samples[figure].setdefault(subject, []).append(sample)
                print(f"{figure}: {subject}: {plot.number(sample.value)} {unit(figure)}", file=sys.stderr, flush=True)
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
            bench.round(options.figures, note)
        after = stolen()
        steal = 100 * (after[0] - before[0]) / max(after[1] - before[1], 1)
        print(write_results(options, bench, samples, steal))
    finally:
        stack.close()


if __name__ == "__main__":
    try:
        main()
    except Trouble as e:
        sys.exit(f"floors: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
