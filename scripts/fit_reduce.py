"""Fit serving engines' own all_reduce to tables of its latency.

    python scripts/fit_reduce.py DIR

DIR holds `<chip>/<engine>_custom_allreduce.csv` with columns num_gpus, message_size (values of two bytes), us and
kernel_source. Rows of graphs with at most 4 MiB are used. It prints small_reduce_s and small_reduce_efficiency of
src/intaglio/data/engines/NAME.toml for each chip and engine, and the errors of the library without and with them.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from itertools import product
from pathlib import Path

from intaglio.chips import Target, target
from intaglio.silicon.kernels.collectives import collective_timing

MOST_BYTES = 4 << 20
SECONDS = [x / 10 * 1e-6 for x in range(20, 91)]
EFFICIENCY = [x / 20 for x in range(2, 21)]
Rows = list[tuple[int, int, float]]  # chips, bytes, seconds


def errors(on: Target, rows: Rows) -> list[float]:
    """Relative errors of the modelled times."""
    return [abs(collective_timing(on, "all_reduce", n, size).seconds / s - 1) for n, size, s in rows]


def own_errors(on: Target, rows: Rows, seconds: float, efficiency: float) -> float:
    """What the fit minimises: the median relative error of the engine's own all_reduce kernels plus 0.3 of their mean.

    rows: (chips, bytes, measured seconds). seconds, efficiency: the two constants to try.
    """
    links = on.chip.links.count * on.chip.links.bytes_per_s * efficiency
    times = [min(seconds + (n - 1) * b / links, 1.5 * seconds + 2 * (n - 1) / n * b / links) for n, b, _ in rows]
    found = [abs(t / s - 1) for t, (_, _, s) in zip(times, rows, strict=True)]
    return statistics.median(found) + 0.3 * statistics.fmean(min(e, 1.0) for e in found)


def main() -> None:
    """Print the constants and errors of each table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.glob("*/*_custom_allreduce.csv")):
        with path.open(newline="") as file:
            read = [
                (int(r["num_gpus"]), 2 * int(r["message_size"]), float(r["us"]) * 1e-6)
                for r in csv.DictReader(file) if not r["kernel_source"].endswith("eager")
            ]  # fmt: skip
        rows = [r for r in read if r[1] <= MOST_BYTES]
        on = target(path.parent.name)
        s, e = min(product(SECONDS, EFFICIENCY), key=lambda x: own_errors(on, rows, *x))
        fitted = on.with_library(small_reduce_s=s, small_reduce_efficiency=e)
        before, after = (statistics.median(errors(t, rows)) for t in (on, fitted))
        print(f"{path.parent.name} {path.stem}: {len(rows)} rows, median error {before:.1%} -> {after:.1%}")
        print(f"small_reduce_s = {s:.2g}\nsmall_reduce_efficiency = {e:g}", flush=True)


if __name__ == "__main__":
    main()
