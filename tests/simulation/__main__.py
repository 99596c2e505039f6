"""Command line of the simulation: runs engines under faults; with --groups, groups of ranks on several hosts.

`PYTHONPATH=tests python -m simulation --seeds 5000 --jobs 2`, or `--seed 7` to see one history.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from simulation.history import failure, group_failure, play, play_group


def judge(seeds: range, groups: bool) -> list[str]:
    """Run these seeds. Returns one line for each that fails."""
    return [line for seed in seeds if (line := (group_failure if groups else failure)(seed))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run one seed and print its history")
    parser.add_argument("--seeds", type=int, default=5000, help="number of seeds to run")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--groups", action="store_true", help="simulate groups of ranks")
    a = parser.parse_args()
    if a.seed is not None:
        lines, wrong = play_group(a.seed) if a.groups else play(a.seed)
        print(*lines, *([f"VIOLATION: {wrong!r}"] if wrong else []), sep="\n")
        return int(wrong is not None)
    began, size = time.monotonic(), 50
    parts = [range(i, min(i + size, a.first + a.seeds)) for i in range(a.first, a.first + a.seeds, size)]
    with ProcessPoolExecutor(a.jobs) as pool:
        failed = [line for lines in pool.map(judge, parts, repeat(a.groups)) for line in lines]
    print(*failed, sep="\n", end="\n" if failed else "")
    print(f"{a.seeds} seeds, {len(failed)} violations, {time.monotonic() - began:.0f} s with {a.jobs} processes")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
