#!/usr/bin/env python3
"""How fast a lost server is rebuilt, and what programs notice of it. Needs root, /dev/fuse and fio.

    benches/rebuild.py FJORD DIR [--gib 2] [--rounds 3] [--policy ec:2+1] [--rebuild-rate 0]

On a cluster of this machine below DIR, with a file of that size. Each round loses a server and, while two threads read the mount:

  before   the server is missing and nothing is rebuilt yet
  during   it is rebuilt
  after    all is rebuilt, on the servers that are left

Then one more server is lost, and rebuilt with nobody reading (`alone`); right before and right after that, the disk of DIR is read
and written, direct I/O in 1 MiB requests.

Prints one JSON object: MiB/s; least and most that `fjord status` showed as the rate of a rebuilding server, and how often one gave way to
users; the share of `during` in the mean of `before` and `after`, which other load on the machine changes
alike; and the share of all bytes that `alone` read and wrote in what the disk reads.
"""
import argparse, json, os, re, shutil, subprocess, sys, time

from bench_common import Stack, Trouble, drop_caches, free_port, machine, median, run, wait_for

OUT_AFTER = 14
READ_SECONDS = 5
# The second reader begins so far behind the first. Neither may go beyond the end: fio would write the file anew.
OFFSET_MIB = 256


def fio(path, rw, size, seconds, jobs=2):
    out = run("fio", "--name=s", f"--filename={path}", f"--rw={rw}", "--bs=1M", "--ioengine=psync", "--direct=1",
              f"--numjobs={jobs}", "--thread", "--group_reporting", "--time_based", f"--runtime={seconds}", f"--size={size}",
              f"--offset_increment={OFFSET_MIB}M", "--norandommap", "--randrepeat=0", "--invalidate=0", "--output-format=json")
    job = json.loads(out[out.index("{"):])["jobs"][0]["read" if "read" in rw else "write"]
    return job["bw_bytes"] / 2**20


class Cluster:
    def __init__(self, stack, fjord, folder, servers, policy, rate):
        self.fjord, self.meta = fjord, f"127.0.0.1:{free_port()}"
        self.servers = []
        meta = self.start(stack, folder, "meta", ["meta", "--data", f"{folder}/meta", "--listen", self.meta, "--policy", policy,
                                           "--down-after", "2s", "--out-after", f"{OUT_AFTER}s"])
        wait_for("the metaserver", lambda: self.ask().stdout, meta, f"{folder}/meta.log")
        for n in range(servers):
            self.servers.append(self.start(stack, folder, f"data{n}", [
                "data", "--meta", self.meta, "--listen", f"127.0.0.1:{free_port()}", "--name", f"data{n}", "--cores", "1",
                "--volume-size", "256MiB", "--rebuild-rate", rate, "--target", f"{folder}/data{n}"]))
        self.mountpoint = f"{folder}/mount"
        os.makedirs(self.mountpoint)
        # Through the servers: a reader of their files would measure the disk.
        mount = self.start(stack, folder, "mount", ["mount", self.meta, self.mountpoint, "-f", "-o", "local_reads=off,memory=256MiB"])
        stack.push(lambda: os.path.ismount(self.mountpoint) and run(fjord, "umount", self.mountpoint))
        wait_for("the mount", lambda: os.path.ismount(self.mountpoint), mount, f"{folder}/mount.log")

    def start(self, stack, folder, name, arguments):
        return stack.start([self.fjord, *arguments], f"{folder}/{name}.log")

    def ask(self):
        # Exit status 1 is "degraded".
        return subprocess.run([self.fjord, "status", "--meta", self.meta, "--json"], capture_output=True, text=True)

    def status(self):
        done = self.ask()
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
        self.until("the loss to be seen", lambda s: sum(t["state"] == "up" for t in s["targets"]) < len(self.servers) - server)

    def whole_without(self, lost):
        return lambda status: self.lost(status) == lost and status["healing"]["moves_left"] == 0

    def begun_without(self, lost):
        return lambda status: self.lost(status) == lost or status["healing"]["moves_left"] > 0

    @staticmethod
    def lost(status):
        return sum(t["state"] == "out" for t in status["targets"])


def disk_speed(folder):
    probe = f"{folder}/probe"
    write, read = fio(probe, "write", "512M", 3), fio(probe, "read", "512M", 3)
    os.unlink(probe)
    return {"write": round(write), "read": round(read)}


def one_round(cluster, server, read):
    """Loses a server under a reader."""
    cluster.lose(server)
    speeds = {"before": round(read(READ_SECONDS))}
    cluster.until("the rebuild to begin", cluster.begun_without(server + 1))
    rates, paces, began = [], [], time.time()
    while True:
        rates.append(read(1))
        status = cluster.status()
        # Of a release that does not tell them there are none.
        paces += status["healing"].get("rates", [])
        if cluster.whole_without(server + 1)(status):
            break
    speeds["during"] = round(sum(rates) / len(rates))
    speeds["seconds"] = round(time.time() - began, 1)
    if paces:
        speeds["pace"] = [round(pick(p["rate"] for p in paces) / 2**20) for pick in (min, max)]
        speeds["gave_way"] = round(sum(p["gives_way"] for p in paces) / len(paces), 2)
    speeds["after"] = round(read(READ_SECONDS))
    speeds["share"] = round(2 * speeds["during"] / max(speeds["before"] + speeds["after"], 1), 2)
    return speeds


def alone(cluster, server, folder, data_shards):
    """Loses a server that nobody reads from."""
    disk = [disk_speed(folder)]
    before = cluster.status()["healing"]["bytes_copied"]
    cluster.lose(server)
    cluster.until("the rebuild to begin", cluster.begun_without(server + 1))
    began = time.time()
    cluster.until("the rebuild", cluster.whole_without(server + 1))
    seconds = time.time() - began
    # The count may begin anew with a rebuild.
    copied = cluster.status()["healing"]["bytes_copied"]
    copied = (copied - before if copied > before else copied) / 2**20
    disk.append(disk_speed(folder))
    moved = copied * (data_shards + 1) / seconds
    return {"disk": disk, "mib": round(copied), "seconds": round(seconds, 1), "restored": round(copied / seconds),
            "read_and_written": round(moved), "share_of_disk_read": round(2 * moved / sum(d["read"] for d in disk), 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fjord")
    parser.add_argument("dir")
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="ec:2+1")
    parser.add_argument("--rebuild-rate", default="0", help="as of `fjord data`, of each server while it rebuilds; 0 is no limit")
    given = parser.parse_args()
    coded = re.fullmatch(r"ec:(\d+)\+(\d+)", given.policy)
    data_shards, width = (int(coded[1]), int(coded[1]) + int(coded[2])) if coded else (1, int(given.policy.removeprefix("replica:")))
    folder = os.path.join(os.path.abspath(given.dir), "rebuild-bench")
    os.makedirs(folder)
    stack = Stack()
    # As many stay as a block has shards.
    servers = width + given.rounds + 1
    result = {"machine": machine(), "policy": given.policy, "servers": servers, "gib": given.gib, "rebuild_rate": given.rebuild_rate}
    try:
        cluster = Cluster(stack, os.path.abspath(given.fjord), folder, servers, given.policy, given.rebuild_rate)
        cluster.until("all targets", lambda s: sum(t["state"] == "up" for t in s["targets"]) == servers)
        path, size = f"{cluster.mountpoint}/data", int(given.gib * 1024)
        run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={size}", "conv=fsync", "status=none")
        drop_caches()
        result["rounds"] = []
        for server in range(given.rounds):
            result["rounds"].append(one_round(cluster, server, lambda seconds: fio(path, "randread", f"{size - OFFSET_MIB}M", seconds)))
            print(f"round {server + 1}: {result['rounds'][-1]}", file=sys.stderr)
        result["share_of_foreground"] = median([r["share"] for r in result["rounds"]])
        result["alone"] = alone(cluster, given.rounds, folder, data_shards)
    finally:
        stack.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    try:
        main()
    except Trouble as e:
        sys.exit(f"rebuild.py: {e}")
