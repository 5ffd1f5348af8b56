"""workload_report.py FJORD.json LOCAL.json OUT: writes OUT.json (both raw lines) and OUT.md (figures and ratios).

A ratio above 1 is in FjordFS's favour, whether the figure is a rate or a time."""
import json, os, platform, re, sys

# What the workload gave JuiceFS 1.4 with Redis on such a machine, relative to local ext4 (issue 2): to be passed.
GOALS = {"seq_write_MBps": 0.35, "seq_read_cold_MBps": 0.4, "small_4k_create_per_s": 0.017,
         "meta_create_t1_per_s": 0.02, "small_100k_read_cold_t8_per_s": 0.17}
IS_TIME = re.compile(r"(_us|_secs)$")
NO_FIGURE = {"total_secs", "rand_direct", "cores"}


def figures(run):
    """Every number of a run by name; rows of random reads are opened."""
    found = {}
    for key, value in run.items():
        if key in NO_FIGURE or isinstance(value, bool):
            continue
        if isinstance(value, dict) and "iops" in value:
            found |= {f"{key}_{k}": v for k, v in value.items() if k in ("iops", "p50_us", "p99_us")}
        elif isinstance(value, (int, float)):
            found[key] = value
    return found


def ratio(name, ours, local):
    if not ours or not local:
        return None
    return local / ours if IS_TIME.search(name) else ours / local


def number(x):
    if x is None:
        return "-"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def table(ours, local):
    lines = ["| figure | FjordFS | local ext4 | ratio | to pass |", "|---|---:|---:|---:|---:|"]
    for name in ours | local:
        a, b = ours.get(name), local.get(name)
        r, goal = ratio(name, a, b), GOALS.get(name)
        verdict = "" if goal is None else f"{goal} " + ("passed" if r is not None and r >= goal else "**missed**")
        lines.append(f"| {name} | {number(a)} | {number(b)} | {'-' if r is None else f'{r:.3f}'} | {verdict} |")
    return "\n".join(lines)


def cpu_model():
    with open("/proc/cpuinfo") as f:
        return next((l.split(":", 1)[1].strip() for l in f if l.startswith("model name")), platform.machine())


def main():
    runs = [json.loads(open(p).read().strip().splitlines()[-1]) for p in sys.argv[1:3]]
    out, env = sys.argv[3], os.environ
    settings = {k.lower(): env.get(k, "") for k in ("FJORD_VERSION", "COMMIT", "POLICY", "SERVERS", "OPTIONS", "SIZE_GIB", "LOOP_DIRECT", "NOTE")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "memory_gib": memory, "kernel": platform.release()}
    with open(out + ".json", "w") as f:
        json.dump({"settings": settings, "machine": machine, "fjord": runs[0], "local": runs[1]}, f, indent=1)
        f.write("\n")
    ours, local = map(figures, runs)
    spoilt = {name: sorted(set(run["dirty"])) for name, run in zip(("FjordFS", "local"), runs) if run.get("dirty")}
    with open(out + ".md", "w") as f:
        f.write(f"# Workload of {runs[0].get('date', '?')[:10]}: {os.path.basename(out).split('-', 3)[-1]}\n\n")
        f.write(f"{settings['fjord_version']}, commit {settings['commit']}, {settings['servers']} data servers, {settings['policy']}")
        f.write(f", mount options `{settings['options']}`" if settings["options"] else "")
        f.write(f". Both sides on a fresh {settings['size_gib']} GiB ext4 in a loop device (direct I/O {settings['loop_direct']}) on one disk.\n")
        f.write(f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, Linux {machine['kernel']}.\n\n")
        if settings["note"]:
            f.write(settings["note"] + "\n\n")
        f.write("A ratio above 1 is in FjordFS's favour, for rates and for times. \"To pass\": what JuiceFS 1.4 with Redis reached.\n\n")
        f.write(table(ours, local) + "\n")
        for name, phases in spoilt.items():
            f.write(f"\nOther processes ran beside these phases of {name}, so their figures are doubtful: {', '.join(phases)}.\n")


main()
