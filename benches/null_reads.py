"""null_reads.py PROGRAM FOLDER: warm random reads of 4 KiB of a filesystem that does nothing, as the shared workload makes them:
one JSON line of every repetition. The floor of a mount, to be measured in the same session as the mount."""
import json, sys

from bench_common import Stack, Trouble, fio_random, null_fuse

REPETITIONS, SECONDS = 3, 3


def main():
    program, folder = sys.argv[1:3]
    stack = Stack()
    try:
        null_fuse(stack, program, f"{folder}/null", "", f"{folder}/null.log")
        got = {}
        for jobs in (1, 8):
            rows = [fio_random(f"{folder}/null/fdata", "4k", jobs, SECONDS) for _ in range(REPETITIONS)]
            got[f"rand_4k_j{jobs}_warm_iops"] = [round(r["iops"]) for r in rows]
        print(json.dumps(got))
    finally:
        stack.close()


try:
    main()
except Trouble as e:
    sys.exit(f"null_reads: {e}")
