#!/usr/bin/env bash
# The floor of a mount: a filesystem in memory, over io_uring and over /dev/fuse in turns. Prints a table of medians and ratios, with
# every round below it. The kernel is given no leases, so that it asks at every stat. Needs root, fio, jq and the release build of
# null_fuse; takes 25 s per round.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
rounds=${1:-5} extra=${2:-}
bin=${NULL_FUSE:-${CARGO_TARGET_DIR:-$here/../target}/release/null_fuse}
transports=(io_uring dev_fuse)
work=$(mktemp -d)
declare -A servers

finish() {
    for transport in "${!servers[@]}"; do
        umount "$work/$transport" 2>/dev/null || true
        wait "${servers[$transport]}" || true
    done
    rm -r "$work"
}
trap finish EXIT

for transport in "${transports[@]}"; do
    mkdir "$work/$transport"
    "$bin" "$work/$transport" "transport=$transport,lease=0${extra:+,$extra}" >"$work/$transport.log" &
    servers[$transport]=$!
done
for transport in "${transports[@]}"; do
    until grep -q 'mounted over' "$work/$transport.log"; do
        kill -0 "${servers[$transport]}" || exit 1
        sleep 0.1
    done
done

# Figure, its unit, the field of fio's report, and what divides it.
figures='
read-4k-1|k/s|.read.iops|1000|--rw=randread --bs=4k --direct=1 --filename=fdata
read-4k-4|k/s|.read.iops|1000|--rw=randread --bs=4k --direct=1 --filename=fdata --numjobs=4
write-4k-1|k/s|.write.iops|1000|--rw=randwrite --bs=4k --direct=1 --filename=fdata
stat-1|k/s|.read.iops|1000|--ioengine=filestat --nrfiles=500 --filesize=4k --filename_format=f.$filenum
stat-4|k/s|.read.iops|1000|--ioengine=filestat --nrfiles=500 --filesize=4k --filename_format=f.$filenum --numjobs=4
read-1m-1|MiB/s|.read.bw|1024|--rw=read --bs=1m --direct=1 --filename=fdata
write-1m-1|MiB/s|.write.bw|1024|--rw=write --bs=1m --direct=1 --filename=fdata
buffered-read-1|MiB/s|.read.bw|1024|--rw=read --bs=1m --filename=fdata
buffered-read-2|MiB/s|.read.bw|1024|--rw=read --bs=1m --filename_format=f.$jobnum --numjobs=2
'
run() { # DIR FIELD DIVISOR ARGUMENTS
    # shellcheck disable=SC2086
    fio --name=null --directory="$1" --ioengine=psync --size=16g --thread --time_based --runtime=1 \
        --group_reporting --output-format=json $4 | jq ".jobs[0]$2 / $3 * 10 | round / 10"
}
for ((round = 1; round <= rounds; round++)); do
    while IFS='|' read -r figure unit field divisor arguments; do
        [ -n "$figure" ] || continue
        for transport in "${transports[@]}"; do
            echo "$figure $unit $transport $(run "$work/$transport" "$field" "$divisor" "$arguments")"
        done
    done <<<"$figures"
done >"$work/rounds"

median() { awk -v f="$1" -v t="$2" '$1 == f && $3 == t { print $4 }' "$work/rounds" | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
echo '| figure | io_uring | /dev/fuse | ratio |'
echo '|---|---|---|---|'
while IFS='|' read -r figure unit _; do
    [ -n "$figure" ] || continue
    uring=$(median "$figure" io_uring) dev=$(median "$figure" dev_fuse)
    echo "| $figure, $unit | $uring | $dev | $(awk -v a="$uring" -v b="$dev" 'BEGIN { printf "%.2f", a / b }') |"
done <<<"$figures"
echo
cat "$work/rounds"
