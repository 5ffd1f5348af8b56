#!/usr/bin/env bash
# What a namespace of many inodes costs: disk and memory of the metaserver, its cold start, and memory of a mount that lists a large
# directory. Needs root and cgroups (memory).
#
# usage: benches/many-inodes.sh [--bin FJORD] [--one N] [--many N] [--limit BYTES] [--work DIR]
#
# Makes, or takes again from DIR, a namespace with N empty files in one directory and N files of 4 KiB in directories of a thousand, by
# the metaserver's own operations (metaserver/src/scale.rs); then starts a metaserver on it that may not have more memory than the
# limit, caches of the kernel included, and does with a mount what is in the table that it prints.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=target/release/fjord one=10000000 many=10000000 limit=1073741824 work=/var/tmp/fjord-many
while (($#)); do
    case $1 in
        --bin) bin=$2 ;;
        --one) one=$2 ;;
        --many) many=$2 ;;
        --limit) limit=$2 ;;
        --work) work=$2 ;;
        *) sed -n '5p' "$0" >&2 && exit 2 ;;
    esac
    shift 2
done
bin=$(realpath "$bin")
mkdir -p "$work/mount"
work=$(realpath "$work")
meta=127.0.0.1:17449
group=/sys/fs/cgroup/memory/fjord-many
stop() {
    umount -l "$work/mount" 2>/dev/null || true
    [[ -z ${client:-} ]] || kill -TERM "$client" 2>/dev/null || true
    [[ -z ${server:-} ]] || { kill -TERM "$server" 2>/dev/null || true; wait "$server" || true; }
    rmdir "$group" 2>/dev/null || true
}
trap stop EXIT

now() { date +%s.%N; }
since() { printf '%.1f s' "$(echo "$(now) - $1" | bc)"; }
status() { awk -v "key=$2:" '$1 == key { printf "%.0f MiB", $2 / 1024 }' "/proc/$1/status"; }
row() { printf '| %s | %s |\n' "$1" "$2"; }

if [[ ! -d $work/meta ]]; then
    FJORD_SCALE_FOLDER=$work/meta FJORD_SCALE_ONE=$one FJORD_SCALE_MANY=$many \
        cargo test --release --quiet -p fjordfs-metaserver --lib scale::fill -- --ignored --exact --nocapture >&2
fi
mkdir -p "$group"
echo "$limit" >"$group/memory.limit_in_bytes"
echo 3 >/proc/sys/vm/drop_caches
printf '| %s and %s files, metaserver limited to %s MiB | |\n|---|---|\n' "$one" "$many" $((limit >> 20))
row "on disk" "$(du -sm "$work/meta" | cut -f1) MiB, $(($(du -sb "$work/meta" | cut -f1) / (one + many))) bytes a file"

began=$(now)
bash -c 'echo $$ >"$1/cgroup.procs"; exec "${@:2}"' - "$group" "$bin" meta --data "$work/meta" --listen "$meta" >"$work/meta.log" 2>&1 &
server=$!
until grep -q "listening on" "$work/meta.log"; do
    kill -0 "$server"
    sleep 0.01
done
row "cold start, until it serves" "$(since "$began")"
row "resident then" "$(status "$server" VmRSS)"

"$bin" mount "$meta" "$work/mount" -f >"$work/mount.log" 2>&1 &
client=$!
until mountpoint -q "$work/mount"; do
    kill -0 "$client"
    sleep 0.05
done
if ((one > 0)); then
    began=$(now)
    # Unsorted, so that the listing is not held by ls.
    found=$(find "$work/mount/one" -maxdepth 1 -type f -printf x | wc -c)
    [[ $found == "$one" ]] || { echo "$found of $one files are listed" >&2 && exit 1; }
    row "listing the directory of $one" "$(since "$began")"
    row "resident after that: metaserver, mount" "$(status "$server" VmRSS), $(status "$client" VmRSS)"
fi
if ((many > 0)); then
    began=$(now)
    for _ in {1..2000}; do
        n=$((RANDOM * 32768 + RANDOM))
        n=$((n % many))
        printf '%s/shard-%06d/sample-%09d.jpg\0' "$work/mount/many" $((n / 1000)) "$n"
    done | xargs -0 stat --format %s >/dev/null
    row "stat of 2,000 files at random, each in another directory" "$(since "$began")"
    began=$(now)
    found=$(find "$work/mount/many" -type f -printf x | wc -c)
    [[ $found == "$many" ]] || { echo "$found of $many files are found" >&2 && exit 1; }
    row "\`find\` over the directories of a thousand" "$(since "$began")"
fi
row "most resident: metaserver, mount" "$(status "$server" VmHWM), $(status "$client" VmHWM)"
row "most charged to the metaserver, kernel's caches included" "$(($(cat "$group/memory.max_usage_in_bytes") >> 20)) MiB"
