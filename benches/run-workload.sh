#!/usr/bin/env bash
# The shared workload (measure.sh of a bench folder) on a FjordFS mount and on a local ext4 beside it, in one session.
# Writes results/<date>-<what>.json (the raw lines), .md (figures, ratios, goals, CPU time) and .svg (bars). What any mount can reach at
# most is measured too, before FjordFS and after it: the same workload on a FUSE filesystem that answers from plain memory at once, over
# the same transport (null_fuse).
#
# Both sides get a fresh ext4 of the same size in a loop device on the same disk: ext4 creates slow down tenfold after
# mass deletes, and a filesystem shared with anything else would compare histories. The images are preallocated and the
# loop devices use direct I/O, so that neither the disk's allocator nor a second page cache is measured.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: benches/run-workload.sh --bench-dir DIR [options]

  --bench-dir DIR     folder with measure.sh, measure.py and fsb.c
  --what NAME         names the result files                                 [workload]
  --policy replica:N  redundancy of the files                                [replica:1]
  --servers N         data servers                                           [3]
  --mount-options O   -o options of the FjordFS mount
  --store URL         where the metadata is kept; under `with-engine` $FJORD_STORE [the embedded engine]
  --size-gib N        size of each of the two filesystems                    [20]
  --work DIR          where the images lie                                   [/var/tmp]
  --only PARTS        of the workload: seq,par,rand,small,meta,mmap          [all]
  --results DIR       where the results go                                   [benches/results]
  --note TEXT         a sentence for the result page

Environment: FJORD_BIN is the binary to measure, NULL_FUSE the filesystem in memory; without them the release builds of this work
tree are.
Needs root, fio, gcc, python3, mkfs.ext4 and loop devices. Takes 12 to 25 minutes; keep the machine quiet meanwhile.
USAGE
}
die() { echo "run-workload: $*" >&2; exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bench_dir='' what=workload policy=replica:1 servers=3 options='' store='' size_gib=20 base=/var/tmp only='' note='' results=$here/results
while [ $# -gt 0 ]; do
    case $1 in
        -h|--help) usage; exit 0 ;;
        --bench-dir|--what|--policy|--servers|--mount-options|--store|--size-gib|--work|--only|--results|--note)
            [ $# -ge 2 ] || die "$1 needs a value" ;;
        *) usage >&2; die "unknown option $1" ;;
    esac
    case $1 in
        --bench-dir) bench_dir=$2 ;;
        --what) what=$2 ;;
        --policy) policy=$2 ;;
        --servers) servers=$2 ;;
        --mount-options) options=$2 ;;
        --store) store=$2 ;;
        --size-gib) size_gib=$2 ;;
        --work) base=$2 ;;
        --only) only=$2 ;;
        --results) results=$2 ;;
        --note) note=$2 ;;
    esac
    shift 2
done
[ -n "$bench_dir" ] || { usage >&2; die "--bench-dir is missing"; }
for file in measure.sh measure.py fsb.c; do
    [ -f "$bench_dir/$file" ] || die "$bench_dir has no $file: is it the bench folder?"
done
[ "$(id -u)" = 0 ] || die "must run as root (loop devices, mounts, dropping caches)"
for tool in fio gcc python3 mkfs.ext4 losetup fallocate; do
    command -v "$tool" >/dev/null || die "$tool is not installed (Debian: fio gcc python3 e2fsprogs util-linux)"
done

if [ -n "${FJORD_BIN:-}" ]; then
    fjord=$(realpath "$FJORD_BIN")
else
    (cd "$here/.." && cargo build --release --quiet -p fjordfs-cli)
    fjord=${CARGO_TARGET_DIR:-$here/../target}/release/fjord
fi
[ -x "$fjord" ] || die "$fjord is no program"
if [ -n "${NULL_FUSE:-}" ]; then
    null_fuse=$(realpath "$NULL_FUSE")
else
    (cd "$here/.." && cargo build --release --quiet -p fjordfs-benches --bin null_fuse)
    null_fuse=${CARGO_TARGET_DIR:-$here/../target}/release/null_fuse
fi
[ -x "$null_fuse" ] || die "$null_fuse is no program"

work=$(mktemp -d "$base/fjord-workload.XXXXXX")
up_pid=''
null_pid='' null_dir=''
loops=()
stop_fjord() {
    [ -n "$up_pid" ] || return 0
    "$fjord" umount --lazy "$work/fjord" 2>/dev/null || true
    kill -TERM "$up_pid" 2>/dev/null || true
    for _ in $(seq 300); do kill -0 "$up_pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$up_pid" 2>/dev/null || true
    wait "$up_pid" 2>/dev/null || true
    up_pid=''
}
stop_null() {
    [ -n "$null_pid" ] || return 0
    umount --lazy "$null_dir" 2>/dev/null || true
    # It ends with its mount, which may live on in another mount namespace that was made meanwhile.
    kill -TERM "$null_pid" 2>/dev/null || true
    wait "$null_pid" 2>/dev/null || true
    null_pid=''
}
cleanup() {
    code=$?
    trap - EXIT INT TERM
    set +e
    stop_fjord
    stop_null
    for side in backing local; do mountpoint -q "$work/$side" && umount "$work/$side"; done
    for loop in "${loops[@]}"; do losetup -d "$loop"; done
    if [ "$code" != 0 ] && [ -f "$work/up.log" ]; then
        echo "run-workload: failed; the end of the log of fjord up:" >&2
        tail -n 30 "$work/up.log" >&2
    fi
    rm -rf --one-file-system "$work"
    exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

direct=on
fresh_ext4() { # fresh_ext4 IMAGE MOUNTPOINT
    fallocate -l "${size_gib}G" "$1"
    # Nothing is left for the kernel to initialise in the background while figures are taken.
    mkfs.ext4 -q -m 0 -E lazy_itable_init=0,lazy_journal_init=0 "$1"
    local loop
    if ! loop=$(losetup --find --show --direct-io=on "$1" 2>/dev/null); then
        direct=off
        loop=$(losetup --find --show "$1")
    fi
    loops+=("$loop")
    mkdir -p "$2"
    mount "$loop" "$2"
}
fresh_ext4 "$work/backing.img" "$work/backing"
fresh_ext4 "$work/local.img" "$work/local"

# measure.py looks for NAME.sh beside itself, hence a copy of the bench files, next to which the script for FjordFS is generated.
mkdir "$work/bench"
cp "$bench_dir"/{measure.sh,measure.py,fsb.c} "$work/bench/"
export PEERS_WORK=$work/peers ONLY=$only
run() { # run NAME DIR
    echo "run-workload: measuring $1" >&2
    bash "$work/bench/measure.sh" "$2" "$1" >"$work/$1.json" || die "measuring $1 failed: $(cat "$work/$1.json")"
}
nulls=()
floor() { # floor NAME
    null_dir=$work/$1
    mkdir "$null_dir"
    "$null_fuse" "$null_dir" >"$null_dir.log" 2>&1 &
    null_pid=$!
    for _ in $(seq 100); do
        mountpoint -q "$null_dir" && break
        kill -0 "$null_pid" 2>/dev/null || break
        sleep 0.1
    done
    mountpoint -q "$null_dir" || die "null_fuse has not mounted: $(cat "$null_dir.log")"
    PEER_PROCS='^null_fuse' run "$1" "$null_dir"
    stop_null
    nulls+=("$work/$1.json")
}
floor null-before

meta=127.0.0.1:$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mount_args=()
[ -z "$options" ] || mount_args=(-o "$options")
mkdir "$work/fjord"
store_args=()
[ -z "$store" ] || store_args=(--store "$store")
"$fjord" up "$work/fjord" --data "$work/backing/fjord" --servers "$servers" --policy "$policy" \
    --meta-listen "$meta" "${store_args[@]}" "${mount_args[@]}" >"$work/up.log" 2>&1 &
up_pid=$!
for _ in $(seq 600); do
    mountpoint -q "$work/fjord" && break
    kill -0 "$up_pid" 2>/dev/null || die "fjord up ended by itself"
    sleep 0.1
done
mountpoint -q "$work/fjord" || die "fjord up has not mounted within a minute"

# Unmounting ends the client process and with it its caches; the servers run on this machine, so dropping the kernel's caches
# empties theirs.
{
    echo '#!/usr/bin/env bash'
    echo 'set -euo pipefail'
    echo '[ "${1:-}" = cold ] || { echo "usage: $0 cold" >&2; exit 2; }'
    printf '%q umount %q\n' "$fjord" "$work/fjord"
    printf '%q mount %q %q' "$fjord" "$meta" "$work/fjord"
    [ -z "$options" ] || printf ' -o %q' "$options"
    printf '\nsync\necho 3 >/proc/sys/vm/drop_caches\n'
} >"$work/bench/fjord.sh"
chmod +x "$work/bench/fjord.sh"
"$work/bench/fjord.sh" cold

PEER_PROCS='^fjord' run fjord "$work/fjord"
# Nothing of FjordFS, not even its heartbeats, runs beside the other figures; what still does counts as foreign.
stop_fjord
floor null-after
run local "$work/local"

mkdir -p "$results"
out=$results/$(date -u +%F)-$what
FJORD_VERSION=$("$fjord" --version) LOOP_DIRECT=$direct POLICY=$policy SERVERS=$servers OPTIONS=$options SIZE_GIB=$size_gib \
    NOTE=$note COMMIT=$(git -C "$here" describe --always --dirty 2>/dev/null || echo unknown) \
    python3 "$here/workload_report.py" "$work/fjord.json" "$work/local.json" "$out" "${nulls[@]}"
echo "$out.md"
