"""Find the constants of a chip from measured tables: python scripts/calibrate.py TABLES CHIP [STEPS].

A random search over the eight numbers of Constants, on rows marked fit alone; prints them, and the errors on both
halves. What is lowered: mean |log(predicted / measured)| of each table and format over the error asked of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from intaglio.chips import ChipError, ChipSpec, chip, replace
from intaglio.tools.validate import dtype_of, measured, predict, record, tables

ASKED = {"matmul": 0.05, "attention_prefill": 0.15, "attention_decode": 0.15, "collectives": 0.08, "experts": 0.15}
ABOVE = 20.0  # us; below stands the framework's launch floor. Collectives: all rows
EVERY = 3  # of the larger tables, one row in so many

Part = tuple[str, list[dict[str, str]], np.ndarray]


def parts(folder: Path, name: str, split: str, every: int) -> list[Part]:
    """(table, rows, measured) of each table and format of this chip."""
    out = []
    for (of, table), rows in tables(folder).items():
        for dtype in sorted({dtype_of(r) for r in rows}) if of == name else ():
            floor = 0.0 if table == "collectives" else ABOVE
            mine = [r for r in rows if dtype_of(r) == dtype and r["split"] == split and float(r["us"]) > floor]
            mine = mine[:: every if len(mine) > 200 else 1]
            out.append((table, mine, measured(mine)))
    return out


def loss(spec: ChipSpec, data: list[Part]) -> float:
    """The mean over tables and formats of median and mean error over what is asked; one bad row counts 1 at most."""
    total = 0.0
    for table, rows, us in data:
        error = np.minimum(np.abs(np.log(predict(spec, table, rows) / us)), 1.0)
        total += (float(np.median(error)) + 0.65 * float(error.mean())) / ASKED[table]
    return total / len(data)


def search(spec: ChipSpec, data: list[Part], steps: int) -> ChipSpec:
    rng, width = np.random.default_rng(1), 0.1
    best = loss(spec, data)
    for i in range(steps):
        now: Mapping[str, float] = asdict(spec.constants)
        moved = {n: v * float(np.exp(width * rng.normal())) for n, v in now.items() if rng.random() < 0.35}
        try:
            other = replace(spec, **{n: min(v, 1.0) if n.endswith("share") else v for n, v in moved.items()})
        except ChipError:
            continue
        found = loss(other, data)
        width = min(0.15, width * 1.15) if found < best else max(0.01, width * 0.985)
        if found < best:
            best, spec = found, other
            print(f"step {i}: {best:.4f}", flush=True)
    return spec


def main() -> None:
    folder, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 150
    spec = search(chip(name), parts(folder, name, "fit", EVERY), steps)
    print(", ".join(f"{n}={v:.3g}" for n, v in asdict(spec.constants).items()))
    for split in ("fit", "test"):
        for table, rows, _ in parts(folder, name, split, 1):
            r = record(name, table, dtype_of(rows[0]), rows, predict(spec, table, rows), 0)
            errors = f"median {r.median:5.1f} mean {r.mean:5.1f} bias {r.bias:+5.1f}"
            print(f"{split:4} {table:18} {r.dtype:9} {r.rows:5} {errors}")


if __name__ == "__main__":
    main()
