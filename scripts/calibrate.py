"""Fit eight parameters of a chip and its kernel library to tables: python scripts/calibrate.py TABLES CHIP [STEPS].

A random search over the eight parameters of FITTED on rows marked `fit`; prints them, and the errors on the `fit` and
`test` rows. Minimises, for each table and format, the error relative to the limit asked of it; see loss().
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from intaglio.chips import ChipError, Target, target
from intaglio.codesign.validate import dtype_of, measured, predict, record, tables

ASKED = {"matmul": 0.05, "attention_prefill": 0.15, "attention_decode": 0.15, "collectives": 0.08, "experts": 0.15}
FITTED = (  # five of the kernel library, three of the chip's memories
    "library.launch_s", "chip.hbm_latency_s", "chip.hbm_efficiency", "chip.l2_efficiency", "library.mxu_efficiency",
    "library.grouped_mxu_efficiency", "library.barrier_s", "library.link_latency_s",
)  # fmt: skip
ABOVE = 20.0  # us; shorter rows are mostly the framework's launch overhead. Collectives use all rows
EVERY = 3  # larger tables are sampled: one row in three

Part = tuple[str, list[dict[str, str]], np.ndarray]


def parts(folder: Path, name: str, split: str, every: int) -> list[Part]:
    """(table, rows, measured microseconds) of each table and format of this chip."""
    out = []
    for (of, table), rows in tables(folder).items():
        for dtype in sorted({dtype_of(r) for r in rows}) if of == name else ():
            floor = 0.0 if table == "collectives" else ABOVE
            mine = [r for r in rows if dtype_of(r) == dtype and r["split"] == split and float(r["us"]) > floor]
            mine = mine[:: every if len(mine) > 200 else 1]
            out.append((table, mine, measured(mine)))
    return out


def loss(on: Target, data: list[Part]) -> float:
    """Mean over tables and formats of (median + 0.65 mean) of |log(predicted / measured)|, over the limit in ASKED."""
    total = 0.0
    for table, rows, us in data:
        error = np.minimum(np.abs(np.log(predict(on, table, rows) / us)), 1.0)
        total += (float(np.median(error)) + 0.65 * float(error.mean())) / ASKED[table]
    return total / len(data)


def search(on: Target, data: list[Part], steps: int) -> Target:
    """The target with the parameters of FITTED that a random search of `steps` steps found."""
    rng, width = np.random.default_rng(1), 0.1
    best = loss(on, data)
    for i in range(steps):
        now = {name: float(on.get(name)) for name in FITTED}
        moved = {n: v * float(np.exp(width * rng.normal())) for n, v in now.items() if rng.random() < 0.35}
        try:
            other = on.changed({n: min(v, 1.0) if n.endswith("efficiency") else v for n, v in moved.items()})
        except ChipError:
            continue
        found = loss(other, data)
        width = min(0.15, width * 1.15) if found < best else max(0.01, width * 0.985)
        if found < best:
            best, on = found, other
            print(f"step {i}: {best:.4f}", flush=True)
    return on


def main() -> None:
    folder, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 150
    on = search(target(name), parts(folder, name, "fit", EVERY), steps)
    print(", ".join(f"{n}={v:.3g}" for n, v in ((n, on.get(n)) for n in FITTED)))
    for split in ("fit", "test"):
        for table, rows, _ in parts(folder, name, split, 1):
            r = record(name, table, dtype_of(rows[0]), rows, predict(on, table, rows), 0)
            errors = f"median {r.median:5.1f} mean {r.mean:5.1f} bias {r.bias:+5.1f}"
            print(f"{split:4} {table:18} {r.dtype:9} {r.rows:5} {errors}")


if __name__ == "__main__":
    main()
