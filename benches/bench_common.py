"""What the whole-system benchmarks share: the machine, CPU time of processes, fio, fresh filesystems, clusters."""
import json, os, platform, shlex, signal, socket, subprocess, sys, time

HZ = os.sysconf("SC_CLK_TCK")


class Trouble(Exception):
    """Told to the user without a trace."""


def machine():
    with open("/proc/cpuinfo") as f:
        model = next((l.split(":", 1)[1].strip() for l in f if l.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": memory, "kernel": platform.release()}


def cpu_seconds(pids):
    """User and system time of processes, their threads included; 0 for those that have ended."""
    total = 0.0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / HZ
    return total


def stolen():
    """CPU time that the host took away, and all CPU time, in ticks."""
    with open("/proc/stat") as f:
        ticks = [int(x) for x in f.readline().split()[1:9]]
    return ticks[7], sum(ticks)


def children(pid):
    """Child processes with their command lines."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as f:
                parent = int(f.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/cmdline") as f:
                command = f.read().split("\0")
        except OSError:
            continue
        if parent == pid:
            found[int(entry)] = command
    return found


def run(*command, **options):
    """Output of a command; says what failed and why."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode:
        raise Trouble(f"{shlex.join(map(str, command))} failed: {done.stderr.strip()[-600:]}")
    return done.stdout


def fio_random(path, bs, jobs, seconds, size="1G"):
    """Direct random reads as the shared workload makes them: reads a second."""
    out = run("fio", "--name=r", f"--filename={path}", "--rw=randread", f"--bs={bs}", "--ioengine=psync", "--direct=1",
              f"--numjobs={jobs}", "--thread", "--group_reporting", "--time_based", f"--runtime={seconds}", f"--size={size}",
              "--norandommap", "--randrepeat=0", "--readonly", "--invalidate=0", "--output-format=json")
    return json.loads(out[out.index("{"):])["jobs"][0]["read"]


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("3\n")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(what, test, process, log, seconds=60):
    end = time.time() + seconds
    while not test():
        if process.poll() is not None or time.time() > end:
            with open(log) as f:
                raise Trouble(f"{what}: {'ended' if process.poll() is not None else 'not within a minute'}; its log ends with\n{f.read()[-1500:]}")
        time.sleep(0.05)


class Stack:
    """What was started, ended in reverse whatever happens."""

    def __init__(self):
        self.ends = []

    def push(self, end):
        self.ends.append(end)

    def start(self, command, log):
        process = subprocess.Popen([str(c) for c in command], stdout=open(log, "w"), stderr=subprocess.STDOUT)

        def end():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()
        self.push(end)
        return process

    def close(self):
        while self.ends:
            try:
                self.ends.pop()()
            except (OSError, Trouble) as e:
                print(f"cleaning up: {e}", file=sys.stderr)


def fresh_ext4(stack, image, mountpoint, gib):
    """An ext4 of its own in a preallocated image; says whether the loop device uses direct I/O."""
    run("fallocate", "-l", f"{gib}G", image)
    run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    direct = True
    try:
        loop = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
    except Trouble:
        direct, loop = False, run("losetup", "--find", "--show", image).strip()
    stack.push(lambda: run("losetup", "-d", loop))
    os.makedirs(mountpoint)
    run("mount", loop, mountpoint)
    stack.push(lambda: run("umount", mountpoint))
    return direct


def built(folder):
    """The folder with the programs to be measured: a given one, or where cargo puts what it builds for release."""
    if folder:
        return folder
    here = os.path.dirname(os.path.abspath(__file__))
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "fjordfs-cli", "-p", "fjordfs-benches"], cwd=here, check=True)
    return os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(here, "../target")), "release")


def is_in_mount_table(directory):
    """Also where the process that served the mount is gone, which looks like no mount to `os.path.ismount`."""
    with open("/proc/self/mounts") as f:
        return any(line.split()[1] == directory for line in f)


def null_fuse(stack, program, directory, options, log):
    """Mounts the filesystem in memory."""
    os.makedirs(directory)
    process = stack.start([program, directory, options], log)
    stack.push(lambda: is_in_mount_table(directory) and run("umount", "--lazy", directory))
    wait_for(f"null_fuse with {options}", lambda: os.path.ismount(directory), process, log)
    return process


def median(values):
    values = sorted(values)
    n = len(values)
    return None if not n else values[n // 2] if n % 2 else (values[n // 2 - 1] + values[n // 2]) / 2
