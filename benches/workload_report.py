"""workload_report.py FJORD.json LOCAL.json OUT NULL.json...: writes OUT.json (the raw lines), OUT.md (figures, ratios, goals, CPU
time) and OUT.svg (bars of the figures that have a goal).

A ratio above 1 is in FjordFS's favour, whether the figure is a rate or a time."""
import json, os, re, sys

import plot
from bench_common import machine, median

# The goals of issues 3 and 4: figure, least ratio, what it is relative to.
LOCAL, NULL = "local", "null FUSE"
GOALS = {
    "seq_write_MBps": (0.85, LOCAL), "seq_read_cold_MBps": (0.85, LOCAL), "par4_read_cold_MBps": (0.85, LOCAL),
    "rand_4k_j1_cold_iops": (0.6, LOCAL), "rand_4k_j8_cold_iops": (0.9, LOCAL),
    "rand_4k_j1_warm_iops": (0.6, NULL), "rand_4k_j8_warm_iops": (0.6, NULL),
    "mmap_4k_cold_t1_pages_per_s": (0.8, LOCAL), "mmap_4k_cold_t8_pages_per_s": (0.8, LOCAL),
    "small_4k_create_per_s": (0.15, LOCAL), "small_100k_create_per_s": (1.0, LOCAL),
    "small_4k_read_cold_t8_per_s": (0.5, LOCAL), "small_100k_read_cold_t8_per_s": (1.0, LOCAL),
    "small_4k_ls_cold_secs": (1 / 1.2, LOCAL), "small_100k_ls_cold_secs": (1 / 1.2, LOCAL),
    "meta_create_t1_per_s": (0.25, LOCAL), "meta_stat_t1_per_s": (0.5, LOCAL), "meta_unlink_t1_per_s": (0.07, LOCAL),
    # A directory for each thread, against what the local filesystem does with eight threads in one.
    "meta_create_t8u_per_s": (0.35, "meta_create_t8_per_s"), "meta_stat_t8u_per_s": (0.5, "meta_stat_t8_per_s"),
    "meta_unlink_t8u_per_s": (0.15, "meta_unlink_t8_per_s"),
}
# With write delegations.
LATER_GOALS = {"small_4k_create_per_s": 0.5, "meta_create_t1_per_s": 0.7, "meta_unlink_t1_per_s": 0.4}
IS_TIME = re.compile(r"(_us|_secs)$")
NO_FIGURE = {"total_secs", "rand_direct", "cores"}
COLOURS = {"FjordFS": "#1f6fb4", "local ext4": "#777777", "null FUSE": "#e07b1a"}


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


def ratio(name, ours, other):
    if not ours or not other:
        return None
    return other / ours if IS_TIME.search(name) else ours / other


def base(name, local, null):
    """What a figure's goal is relative to: a name for it, and its value."""
    _, against = GOALS[name]
    if against == NULL:
        return NULL, null.get(name)
    return (LOCAL, local.get(name)) if against == LOCAL else (f"local's {against}", local.get(against))


def goal_cells(name, ours, local, null):
    """The ratio that counts and whether each goal is met."""
    if name not in GOALS:
        return "", "", ""
    least, _ = GOALS[name]
    against, value = base(name, local, null)
    reached = ratio(name, ours.get(name), value)
    if reached is None:
        return f"{against}: not measured", f"{least:.2f}", ""
    verdict = lambda least: f"{least:.2f} " + ("met" if reached >= least else "**missed**")
    later = verdict(LATER_GOALS[name]) if name in LATER_GOALS else ""
    return f"{reached:.3f} × {against} ({plot.number(value)})", verdict(least), later


# What the workload's tool calls FjordFS's processes, and what they are.
KINDS = {"fjord-mount": "client", "fjord-data": "servers", "fjord-meta": "servers"}
# It leaves out what uses less than this share of a core.
SHARE_MIN = 0.03


def cpu_cost(run, name):
    """CPU time of FjordFS's processes for what the figure counts."""
    phase = re.sub(r"_(MBps|pages_per_s|per_s|iops|secs)$", "", name)
    row, rate = run.get("cpu", {}).get(phase), figures(run).get(name)
    if phase == name or row is None or not rate:
        return ""
    if name.endswith("_MBps"):
        scale, unit = 1000 / rate, "s/GB"
    else:
        scale, unit = (row["wall"], "s") if IS_TIME.search(name) else (1e6 / rate, "µs")
    shares = {}
    for process, share in row.items():
        if process.startswith("fjord"):
            kind = KINDS.get(process, "other")
            shares[kind] = shares.get(kind, 0) + float(share.rstrip("%")) / 100
    told = [f"{kind} {plot.number(share * scale)}" for kind, share in sorted(shares.items())]
    return (", ".join(told) or f"< {plot.number(SHARE_MIN * scale)}") + f" {unit}"


def medians(runs):
    """The figures of several runs."""
    found = [figures(run) for run in runs]
    return {name: median([one[name] for one in found if name in one]) for name in dict.fromkeys(n for one in found for n in one)}


def ratio_cell(name, one, other):
    r = ratio(name, one.get(name), other.get(name))
    return "-" if r is None else f"{r:.3f}"


def table(run, local, null):
    ours = figures(run)
    lines = ["| figure | FjordFS | local ext4 | null FUSE | FjordFS ÷ local | FjordFS ÷ null | null ÷ local | what counts | issue 3 | issue 4 | CPU |",
             "|---|---:|---:|---:|---:|---:|---:|---|---|---|---:|"]
    for name in ours | local:
        cells = [name, *(plot.number(of.get(name)) for of in (ours, local, null)),
                 *(ratio_cell(name, *pair) for pair in ((ours, local), (ours, null), (null, local))),
                 *goal_cells(name, ours, local, null), cpu_cost(run, name)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def panels(ours, local, null):
    """One for each goal."""
    for name, (least, _) in GOALS.items():
        against, value = base(name, local, null)
        if name not in ours or not value:
            continue
        time = IS_TIME.search(name)
        rows = [("FjordFS", ours[name]), ("local ext4", local.get(name) if against == NULL else value), ("null FUSE", null.get(name))]
        heading = f"{name}: goal {'at most' if time else 'at least'} {1 / least if time else least:.2f} × {against}"
        yield heading, [(who, v, v, v) for who, v in rows if v is not None], value / least if time else value * least


def last_line(path):
    with open(path) as f:
        return json.loads(f.read().strip().splitlines()[-1])


def main():
    runs = [last_line(p) for p in sys.argv[1:3]]
    out, env = sys.argv[3], os.environ
    nulls = [last_line(p) for p in sys.argv[4:]]
    null = medians(nulls)
    settings = {k.lower(): env.get(k, "") for k in ("FJORD_VERSION", "COMMIT", "POLICY", "SERVERS", "OPTIONS", "SIZE_GIB", "LOOP_DIRECT", "NOTE")}
    about = machine()
    with open(out + ".json", "w") as f:
        json.dump({"settings": settings, "machine": about, "fjord": runs[0], "local": runs[1], "null_fuse": nulls}, f, indent=1)
        f.write("\n")
    ours, local = map(figures, runs)
    named = {"FjordFS": runs[:1], "local": runs[1:], "null FUSE": nulls}
    spoilt = {name: sorted({phase for run in of for phase in run.get("dirty", [])}) for name, of in named.items()}
    what = os.path.basename(out).split("-", 3)[-1]
    with open(out + ".md", "w") as f:
        f.write(f"# Workload of {runs[0].get('date', '?')[:10]}: {what}\n\n")
        f.write(f"{settings['fjord_version']}, commit {settings['commit']}, {settings['servers']} data servers, {settings['policy']}")
        f.write(f", mount options `{settings['options']}`" if settings["options"] else "")
        f.write(f". Both sides on a fresh {settings['size_gib']} GiB ext4 in a loop device (direct I/O {settings['loop_direct']}) on one disk.\n")
        f.write(f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, Linux {about['kernel']}.\n\n")
        if settings["note"]:
            f.write(settings["note"] + "\n\n")
        f.write("A ratio above 1 is in the favour of the first, for rates and for times. Null FUSE is a filesystem that answers each request "
                "from plain memory at once, through the same session with the kernel: what a mount reaches at most. It was measured before "
                "FjordFS and after it; the mean of both. CPU: what FjordFS's processes used for a GB, for "
                "an operation, or in all (times); from the last repetition of the phase, the figure from the median one. Kinds of processes that "
                "used less than 3% of a core are left out.\n\n")
        f.write(f"![bars]({os.path.basename(out)}.svg)\n\n" + table(runs[0], local, null) + "\n")
        for name, phases in spoilt.items():
            if phases:
                f.write(f"\nOther processes ran beside these phases of {name}, so their figures are doubtful: {', '.join(phases)}.\n")
    with open(out + ".svg", "w") as f:
        subtitle = f"commit {settings['commit']}, {settings['servers']} data servers, {settings['policy']}; the dashed line is the goal"
        f.write(plot.bars(f"Workload: {what}", subtitle, list(panels(ours, local, null)), COLOURS))


if __name__ == "__main__":
    main()
