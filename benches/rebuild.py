#!/usr/bin/env python3
"""How fast a lost server is rebuilt, and what programs notice of it. Needs root, /dev/fuse and fio.

    benches/rebuild.py FJORD DIR [--gib 2] [--servers 5] [--policy ec:2+1]

On a cluster of this machine below DIR, with a file of that size:

  disk     what the disk of DIR reads and writes, direct I/O in 1 MiB requests
  whole    a reader of the mount, two threads, all servers up
  without  the same while a server is missing and nothing is rebuilt yet
  during   the same while it is rebuilt
  alone    a second server is lost and rebuilt with nobody reading

Prints one JSON object: MiB/s, the share of `during` in `without`, and of all bytes that `alone` read and wrote in what the disk reads.
"""
import argparse, json, os, re, shutil, subprocess, sys, time

from bench_common import Stack, Trouble, drop_caches, free_port, machine, run, wait_for

OUT_AFTER = 14
FIO_SECONDS = 7


def fio(path, rw, size, seconds, jobs=2):
    out = run("fio", "--name=s", f"--filename={path}", f"--rw={rw}", "--bs=1M", "--ioengine=psync", "--direct=1",
              f"--numjobs={jobs}", "--thread", "--group_reporting", "--time_based", f"--runtime={seconds}", f"--size={size}",
              "--offset_increment=256M", "--norandommap", "--randrepeat=0", "--invalidate=0", "--output-format=json")
    job = json.loads(out[out.index("{"):])["jobs"][0]["read" if "read" in rw else "write"]
    return job["bw_bytes"] / 2**20


class Cluster:
    def __init__(self, stack, fjord, folder, servers, policy):
        self.fjord, self.meta = fjord, f"127.0.0.1:{free_port()}"
        self.servers = []
        self.start(stack, folder, "meta", ["meta", "--data", f"{folder}/meta", "--listen", self.meta, "--policy", policy,
                                           "--down-after", "2s", "--out-after", f"{OUT_AFTER}s"])
        for n in range(servers):
            self.servers.append(self.start(stack, folder, f"data{n}", [
                "data", "--meta", self.meta, "--listen", f"127.0.0.1:{free_port()}", "--name", f"data{n}", "--cores", "1",
                "--volume-size", "256MiB", "--rebuild-rate", "0", "--target", f"{folder}/data{n}"]))
        self.mountpoint = f"{folder}/mount"
        os.makedirs(self.mountpoint)
        # Through the servers: a reader of their files would measure the disk.
        mount = self.start(stack, folder, "mount", ["mount", self.meta, self.mountpoint, "-f", "-o", "local_reads=off,memory=256MiB"])
        stack.push(lambda: os.path.ismount(self.mountpoint) and run(fjord, "umount", self.mountpoint))
        wait_for("the mount", lambda: os.path.ismount(self.mountpoint), mount, f"{folder}/mount.log")

    def start(self, stack, folder, name, arguments):
        return stack.start([self.fjord, *arguments], f"{folder}/{name}.log")

    def status(self):
        # Exit status 1 is "degraded".
        done = subprocess.run([self.fjord, "status", "--meta", self.meta, "--json"], capture_output=True, text=True)
        if not done.stdout:
            raise Trouble(f"fjord status: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def until(self, what, fits, seconds=240):
        end = time.time() + seconds
        while True:
            status = self.status()
            if fits(status):
                return status
            if time.time() > end:
                raise Trouble(f"{what}: not within {seconds} s; {json.dumps(status['healing'])}")
            time.sleep(0.1)

    def lose(self, server):
        self.servers[server].kill()
        self.until("the loss to be seen", lambda s: sum(t["state"] == "up" for t in s["targets"]) < len(self.servers) - self.lost(s))

    @staticmethod
    def lost(status):
        return sum(t["state"] == "out" for t in status["targets"])

    def rebuilt(self, status, lost):
        return self.lost(status) == lost and status["healing"]["moves_left"] == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fjord")
    parser.add_argument("dir")
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--servers", type=int, default=5)
    parser.add_argument("--policy", default="ec:2+1")
    given = parser.parse_args()
    data_shards = int(re.fullmatch(r"(?:ec:(\d+)\+\d+|replica:\d+)", given.policy)[1] or 1)
    folder = os.path.join(os.path.abspath(given.dir), "rebuild-bench")
    os.makedirs(folder)
    stack = Stack()
    result = {"machine": machine(), "policy": given.policy, "servers": given.servers, "gib": given.gib}
    try:
        probe = f"{folder}/probe"
        disk_write = fio(probe, "write", "1G", 4)
        disk_read = fio(probe, "read", "512M", 4)
        os.unlink(probe)
        result["disk"] = {"write": round(disk_write), "read": round(disk_read)}
        cluster = Cluster(stack, os.path.abspath(given.fjord), folder, given.servers, given.policy)
        cluster.until("all targets", lambda s: sum(t["state"] == "up" for t in s["targets"]) == given.servers)
        path, size = f"{cluster.mountpoint}/data", int(given.gib * 1024)
        run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={size}", "conv=fsync", "status=none")
        drop_caches()
        read = lambda seconds: fio(path, "randread", f"{size}M", seconds)
        result["whole"] = round(read(FIO_SECONDS))
        cluster.lose(0)
        result["without"] = round(read(FIO_SECONDS))
        cluster.until("the rebuild to begin", lambda s: s["healing"]["moves_left"] > 0 or cluster.rebuilt(s, 1))
        rates, began = [], time.time()
        while True:
            rates.append(read(1))
            if cluster.rebuilt(cluster.status(), 1):
                break
        result["during"] = round(sum(rates) / len(rates))
        result["during_seconds"] = round(time.time() - began, 1)
        result["during_share_of_without"] = round(result["during"] / max(result["without"], 1), 2)
        before = cluster.status()["healing"]["bytes_copied"]
        cluster.lose(1)
        cluster.until("the second rebuild to begin", lambda s: s["healing"]["moves_left"] > 0)
        began = time.time()
        cluster.until("the second rebuild", lambda s: cluster.rebuilt(s, 2))
        seconds = time.time() - began
        copied = cluster.status()["healing"]["bytes_copied"]
        copied = (copied - before if copied > before else copied) / 2**20
        result["alone"] = {"restored": round(copied / seconds), "mib": round(copied), "seconds": round(seconds, 1),
                           "read_and_written": round(copied * (data_shards + 1) / seconds)}
        result["alone_share_of_disk_read"] = round(result["alone"]["read_and_written"] / disk_read, 2)
    finally:
        stack.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    try:
        main()
    except Trouble as e:
        sys.exit(f"rebuild.py: {e}")
