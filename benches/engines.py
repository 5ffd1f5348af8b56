#!/usr/bin/env python3
"""Creates files on a mount whose metadata is kept by each engine in turn, and says how fast that is.

usage: benches/engines.py [--bin FJORD] [--files N] [--threads N] [--rounds N] [--engines fjall,etcd,postgres] [--work DIR]
                          [--etcd-ops N]

Three etcd members and a PostgreSQL primary with a synchronous standby run on this machine, all on one disk. Every engine
has its own metaserver, data server and two mounts: one as by default, where a client decides creates by itself and sends them
in batches, and one with -o close=sync, where every create waits for the metaserver. The engines are measured in
turns. A round ends when every directory has been synced, so when all creates are in the store. Needs root, etcd and
PostgreSQL 15; prints a table in Markdown.
"""
import argparse, os, shutil, signal, socket, statistics, subprocess, sys, tempfile, time

from bench_common import HZ, Trouble, cpu_seconds, machine

PG = "/usr/lib/postgresql/15/bin/"
MODES = {"batched": [], "each waits": ["-o", "close=sync"]}


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(what, ready, seconds=60):
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise Trouble(f"{what} is not ready after {seconds} s")
        time.sleep(0.05)


def listens(number):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", number)) == 0


class Session:
    """Everything that was started; ended in reverse."""

    def __init__(self, args):
        self.args, self.running, self.mounts = args, [], []
        self.dir = tempfile.mkdtemp(prefix="fjord-engines-", dir=args.work)
        os.chmod(self.dir, 0o755)

    def start(self, name, *command, **options):
        log = open(os.path.join(self.dir, name + ".log"), "w")
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True, **options)
        self.running.append(process)
        return process

    def run(self, *command):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise Trouble(f"{command[0]} failed: {done.stderr.strip()[-400:]}")
        return done.stdout

    def end(self):
        for mount in self.mounts:
            subprocess.run([self.args.bin, "umount", mount], capture_output=True)
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.running):
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def fjall(self):
        return f"fjall:{self.dir}/fjall", []

    def etcd(self):
        client, peer = [port() for _ in range(3)], [port() for _ in range(3)]
        cluster = ",".join(f"m{n}=http://127.0.0.1:{peer[n]}" for n in range(3))
        members = [
            self.start(
                f"etcd{n}", "etcd", "--name", f"m{n}", "--data-dir", f"{self.dir}/etcd{n}",
                "--listen-client-urls", f"http://127.0.0.1:{client[n]}", "--advertise-client-urls", f"http://127.0.0.1:{client[n]}",
                "--listen-peer-urls", f"http://127.0.0.1:{peer[n]}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer[n]}",
                "--initial-cluster", cluster, "--max-txn-ops", self.args.etcd_ops,
            )
            for n in range(3)
        ]
        wait("etcd", lambda: all(map(listens, client)))
        hosts = ",".join(f"127.0.0.1:{p}" for p in client)
        return f"etcd://{hosts}/bench?max-txn-ops={self.args.etcd_ops}", members

    def postgres(self):
        ports = [port(), port()]
        base = os.path.join(self.dir, "pg")
        os.mkdir(base)
        shutil.chown(base, "postgres", "postgres")
        who = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        self.run(*who, PG + "initdb", "-D", base + "/0", "-A", "trust", "-U", "fjord", "-E", "UTF8", "--locale=C")
        servers = []

        def serve(n, standbys):
            options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", f"synchronous_standby_names={standbys}"]
            servers.append(self.start(f"pg{n}", *who, PG + "postgres", "-D", f"{base}/{n}", "-p", ports[n], *options, cwd=base))
            ready = [PG + "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(ports[n])]
            wait("PostgreSQL", lambda: subprocess.run(ready).returncode == 0)

        serve(0, "*")
        self.run(*who, PG + "pg_basebackup", "-h", "127.0.0.1", "-p", ports[0], "-U", "fjord", "-D", base + "/1", "-R", "-X", "stream", "-c", "fast")
        serve(1, "")
        self.run(*who, "psql", "-h", "127.0.0.1", "-p", ports[0], "-U", "fjord", "-d", "postgres", "-c", "CREATE DATABASE fjord")
        return f"postgres://fjord@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/fjord", servers

    def cluster(self, engine):
        store, servers = getattr(self, engine)()
        meta, data = port(), port()
        metaserver = self.start(f"meta-{engine}", self.args.bin, "meta", "--store", store, "--listen", f"127.0.0.1:{meta}", "--policy", "replica:1")
        wait("the metaserver", lambda: listens(meta))
        target = os.path.join(self.dir, "data-" + engine)
        os.mkdir(target)
        self.start(
            f"data-{engine}", self.args.bin, "data", "--meta", f"127.0.0.1:{meta}", "--listen", f"127.0.0.1:{data}",
            "--target", target, "--volume-size", 256 << 20, "--cores", 1,
        )
        wait("the data server", lambda: listens(data))
        mounts = {}
        for mode, options in MODES.items():
            mounts[mode] = os.path.join(self.dir, f"mnt-{engine}-{len(mounts)}")
            os.mkdir(mounts[mode])
            self.run(self.args.bin, "mount", *options, f"127.0.0.1:{meta}", mounts[mode])
            self.mounts.append(mounts[mode])
        return {"meta": metaserver, "servers": servers, "mounts": mounts}


def tree_cpu(processes):
    """CPU seconds of processes and of their children (PostgreSQL works in those), ended ones included."""
    roots = {p.pid for p in processes}
    ticks = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(entry) in roots:
            ticks += sum(map(int, fields[11:15]))
        elif int(fields[1]) in roots:
            ticks += sum(map(int, fields[11:13]))
    return ticks / HZ


def work(folder, files):
    os.mkdir(folder)
    for n in range(files):
        os.close(os.open(f"{folder}/f{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def round_of(mount, number, threads, files):
    """Creates per second."""
    top = os.path.join(mount, f"{os.path.basename(mount)}-round{number}")
    os.mkdir(top)
    began = time.monotonic()
    workers = []
    for n in range(threads):
        pid = os.fork()
        if pid == 0:
            try:
                work(f"{top}/d{n}", files // threads)
                os._exit(0)
            except OSError as e:
                print(e, file=sys.stderr)
                os._exit(1)
        workers.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in workers):
        raise Trouble(f"creating files in {mount} failed")
    return files // threads * threads / (time.monotonic() - began)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    here = os.path.dirname(os.path.abspath(__file__))
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(here, "../target"))
    parser.add_argument("--bin", default=os.path.join(target, "release/fjord"))
    parser.add_argument("--files", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="fjall,etcd,postgres")
    parser.add_argument("--work", default="/var/tmp")
    parser.add_argument("--etcd-ops", type=int, default=128)
    args = parser.parse_args()
    session = Session(args)
    rates, cost = {}, {}
    try:
        clusters = {engine: session.cluster(engine) for engine in args.engines.split(",")}
        for number in range(args.rounds + 1):
            for mode in MODES:
                for engine, cluster in clusters.items():
                    before = (cpu_seconds([cluster["meta"].pid]), tree_cpu(cluster["servers"]))
                    files = args.files if mode == "batched" else args.files // 4
                    rate = round_of(cluster["mounts"][mode], number, args.threads, files)
                    after = (cpu_seconds([cluster["meta"].pid]), tree_cpu(cluster["servers"]))
                    # The first round warms up.
                    if number:
                        rates.setdefault((mode, engine), []).append(rate)
                        cost.setdefault((mode, engine), []).append([(b - a) * 1e6 / files for a, b in zip(before, after)])
    finally:
        session.end()
    box = machine()
    print(f"{box['cpu']}, {box['cores']} cores, {box['memory_gib']} GiB; {args.threads} threads, {args.rounds} rounds, medians\n")
    print("| creates | engine | per second | to the first | metaserver µs each | engine's servers µs each |")
    print("|---|---|---|---|---|---|")
    for (mode, engine), found in rates.items():
        first = rates[(mode, args.engines.split(",")[0])]
        ratio = statistics.median(a / b for a, b in zip(found, first))
        meta, servers = (statistics.median(c[n] for c in cost[(mode, engine)]) for n in (0, 1))
        print(f"| {mode} | {engine} | {statistics.median(found):,.0f} | {ratio:.2f} | {meta:.0f} | {servers:.0f} |")


if __name__ == "__main__":
    try:
        main()
    except Trouble as e:
        sys.exit(f"engines.py: {e}")
