#!/usr/bin/env python3
"""What `-o poll_us` is worth: mounts that look for requests for 0, 20, 50 and 100 µs before they sleep, one thread, in turns.

    benches/polling.py --bench-dir ../shared/bench >benches/results/$(date -u +%F)-polling.md

Mounts one cluster of this machine once for each of the values, and as often a filesystem in memory (null_fuse), which shows what polling does
to the session with the kernel alone. Every round measures every figure on every mount: random direct reads of 4 KiB (of a file in the
client's memory, and of one that is eight times its memory), creating, looking at (dentries dropped) and removing empty files, by the load generator
of the shared workload (fsb.c in --bench-dir).

Prints medians, the ratio to the mount that does not poll (median of the rounds' ratios), the CPU time of the mount's process for an operation,
and every round. Polling burns CPU that others may need: on few cores it helps only while they have nothing to do.
Needs root, fio, gcc and FUSE over io_uring; takes 2 to 3 minutes.
"""
import argparse, json, os, shutil, signal, sys, tempfile

import plot
from bench_common import Stack, Trouble, built, fio_random, fresh_ext4, machine, median, null_fuse, run, wait_for
from floors import Cluster, noise_file, timed

POLLS = (0, 20, 50, 100)
KINDS = ("FjordFS", "null FUSE")
# Bytes of file data in a client's memory: the least that a mount takes. The file that is read from memory is a quarter of it.
MEMORY_MIB = 128
READ_MEMORY, READ_SERVERS = "read 4 KiB, in client memory", "read 4 KiB, from the servers"
VERBS = {"create": "create", "stat": "stat", "unlink": "unlink"}
FIGURES = {"FjordFS": (READ_MEMORY, READ_SERVERS, *VERBS), "null FUSE": (READ_MEMORY, *VERBS)}


class Mount:
    def __init__(self, directory, pid, small, large=None):
        self.directory, self.pid, self.small, self.large = directory, pid, small, large


def mount_fjord(stack, fjord, cluster, directory, poll):
    """A mount of its own, whose small file is in its memory."""
    os.makedirs(directory)
    process = stack.start([fjord, "mount", cluster.meta, directory, "-f", "-o", f"transport=io_uring,poll_us={poll},memory={MEMORY_MIB}MiB"],
                          directory + ".log")
    stack.push(lambda: os.path.ismount(directory) and run(fjord, "umount", directory))
    wait_for(f"the mount with poll_us={poll}", lambda: os.path.ismount(directory), process, directory + ".log")
    return Mount(directory, process.pid, f"{directory}/small", f"{directory}/large")


def mount_null(stack, program, directory, poll):
    process = null_fuse(stack, program, directory, f"transport=io_uring,poll_us={poll}", directory + ".log")
    return Mount(directory, process.pid, f"{directory}/fdata")


def forget_names():
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("2\n")


def measure(mount, fsb, seconds, files):
    """One round of a mount: figure to operations a second, and to microseconds of its CPU for one."""
    rates, cpu = {}, {}

    def note(figure, operations, took, spent):
        rates[figure], cpu[figure] = operations / took, spent["mount"] / operations * 1e6
    pids = {"mount": [mount.pid]}
    for figure, path, mib in ((READ_MEMORY, mount.small, MEMORY_MIB // 4), (READ_SERVERS, mount.large, 8 * MEMORY_MIB)):
        if path is None:
            continue
        if figure == READ_MEMORY:
            # Reads of the other file have taken its place since the last round.
            run("dd", f"if={path}", "of=/dev/null", "bs=1M", f"count={mib}", "iflag=direct")
        row, spent = timed(pids, lambda: fio_random(path, "4k", 1, seconds, f"{mib}m"))
        note(figure, row["total_ios"], row["runtime"] / 1000, spent)
    directory = f"{mount.directory}/names-{mount.pid}"
    os.mkdir(directory)
    for figure, verb in VERBS.items():
        if verb == "stat":
            forget_names()
        row, spent = timed(pids, lambda: json.loads(run(fsb, verb, directory, files, 1)))
        note(figure, files, row["secs"], spent)
    os.rmdir(directory)
    return {"rate": rates, "cpu": cpu}


def table(rounds, kind):
    """rounds: of each, kind to poll to figure's rate and CPU time."""
    lines = [f"| {kind} | " + " | ".join(f"{poll} µs" for poll in POLLS) + " |", "|---|" + "---:|" * len(POLLS)]
    for figure in FIGURES[kind]:
        cells = []
        for poll in POLLS:
            samples = [one[kind][poll] for one in rounds]
            rates = [s["rate"][figure] for s in samples]
            gain = median([rate / one[kind][0]["rate"][figure] for rate, one in zip(rates, rounds)])
            cpu = median([s["cpu"][figure] for s in samples])
            cells.append(f"{plot.number(median(rates))}/s, {gain:.2f} ×, {plot.number(cpu)} µs")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench-dir", required=True, help="folder with fsb.c")
    p.add_argument("--rounds", type=int, default=3, help="rounds [3]")
    p.add_argument("--time", type=int, default=1, metavar="SECONDS", help="length of each measurement of reads [1]")
    p.add_argument("--files", type=int, default=5000, help="files that are made, looked at and removed [5000]")
    p.add_argument("--servers", type=int, default=3, help="data servers [3]")
    p.add_argument("--bin", help="folder with fjord and null_fuse [what cargo builds]")
    p.add_argument("--work", default="/var/tmp", help="where the image lies [/var/tmp]")
    options = p.parse_args()
    if min(options.rounds, options.time, options.files, options.servers) < 1:
        p.error("--rounds, --time, --files and --servers from 1")
    return options


def bench(stack, work, options):
    folder = built(options.bin)
    fjord, null_program = os.path.join(folder, "fjord"), os.path.join(folder, "null_fuse")
    fsb = f"{work}/fsb"
    run("gcc", "-O2", "-pthread", "-o", fsb, os.path.join(options.bench_dir, "fsb.c"))
    fresh_ext4(stack, f"{work}/backing.img", f"{work}/backing", 4)
    cluster = Cluster(stack, fjord, work, options.servers)
    noise_file(f"{cluster.dir}/small", MEMORY_MIB // 4)
    noise_file(f"{cluster.dir}/large", 8 * MEMORY_MIB)
    mounts = {"FjordFS": {poll: mount_fjord(stack, fjord, cluster, f"{work}/fjord-{poll}", poll) for poll in POLLS},
              "null FUSE": {poll: mount_null(stack, null_program, f"{work}/null-{poll}", poll) for poll in POLLS}}
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append({kind: {} for kind in KINDS})
        for kind, poll in ((kind, poll) for kind in KINDS for poll in POLLS):
            print(f"round {number} of {options.rounds}: {kind}, {poll} µs", file=sys.stderr, flush=True)
            rounds[-1][kind][poll] = measure(mounts[kind][poll], fsb, options.time, options.files)
    return rounds


def main():
    options = parse()
    if os.geteuid():
        raise Trouble("must run as root (loop devices, mounts, dropping caches)")
    for tool in ("fio", "gcc", "mkfs.ext4", "losetup", "fallocate"):
        if not shutil.which(tool):
            raise Trouble(f"{tool} is not installed (Debian: fio gcc e2fsprogs util-linux)")
    # As after Ctrl-C, everything is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stack = Stack()
    work = tempfile.mkdtemp(prefix="fjord-polling.", dir=options.work)
    stack.push(lambda: shutil.rmtree(work))
    try:
        rounds = bench(stack, work, options)
    finally:
        stack.close()
    about = machine()
    print(f"# Polling before sleeping, one thread\n\n{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, Linux {about['kernel']}, "
          f"{options.servers} data servers, replica:1. {options.rounds} rounds in turns, reads of {options.time} s, {options.files} files. In each cell: "
          "median, ratio to the mount that does not poll, CPU time of the mount for an operation.\n")
    print("\n\n".join(table(rounds, kind) for kind in KINDS))
    print("\n```json\n" + "\n".join(json.dumps(one) for one in rounds) + "\n```")


if __name__ == "__main__":
    try:
        main()
    except Trouble as e:
        sys.exit(f"polling: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
