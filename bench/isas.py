"""Speed of the host device on several of this CPU's instruction sets, on one random checkpoint, in one process.

They take turns in every run. Medians over the runs are printed, and how many times faster the first instruction set is
than each of the others (the median of the runs' ratios).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from checkpoints import OURS, SHAPES, write_random
from engines import Intaglio, pages_each
from host import machine, say, table

from intaglio.devices.host import isa_names

CONTEXT = 128  # tokens of each sequence that is decoded
STEPS = 9  # of a decode sample, the first not counted


def loaded(isa: str, folder: Path, format: str, threads: int, room: list[int]) -> Intaglio:
    """The host device with this instruction set, and room for contexts of these lengths."""
    os.environ["INTAGLIO_ISA"] = isa
    engine = Intaglio(folder, format, threads, room)
    engine.load()
    engine.settle()
    return engine


def turns(engines: dict[str, Intaglio], runs: int, seconds: Callable[[Intaglio], float]) -> dict[str, list[float]]:
    """Seconds by instruction set, one sample a run; a first run is not counted."""
    samples: dict[str, list[float]] = {isa: [] for isa in engines}
    for run in range(runs + 1):
        for isa, engine in engines.items():
            sample = seconds(engine)
            if run:
                samples[isa].append(sample)
    return samples


def line(label: str, tokens: int, samples: dict[str, list[float]]) -> list[str]:
    first, *others = samples
    ratios = [median(b / a for a, b in zip(samples[first], samples[isa], strict=True)) for isa in others]
    spread = max(max(s) / min(s) for s in samples.values())
    return [
        label,
        "tok/s",
        *(f"{tokens / median(s):,.4g}" for s in samples.values()),
        *(f"{r:.2f}x" for r in ratios),
        f"{spread:.2f}",
    ]


def measure(args: argparse.Namespace, shape: str, format: str, folder: Path) -> None:
    say(f"{shape} {format}: checkpoint in {folder}")
    write_random(folder, SHAPES[shape])
    rooms = [[n] for n in args.prefill] + [[CONTEXT + STEPS] * n for n in args.decode]
    room = max(rooms, key=lambda lengths: sum(map(pages_each, lengths)))
    engines = {isa: loaded(isa, folder, format, args.threads, room) for isa in args.isa}
    lines = []
    for n in args.prefill:
        say(f"  prefill {n}")
        lines.append(line(f"prefill {n}", n, turns(engines, args.runs, lambda e, n=n: e.prefill(n))))
    for n in args.decode:
        say(f"  decode batch {n}")
        for engine in engines.values():
            engine.fill([CONTEXT] * n, STEPS)
        lines.append(line(f"decode batch {n}", n, turns(engines, args.runs, lambda e: e.decode())))
    head = ["", "", *args.isa, *(f"vs {isa}" for isa in args.isa[1:]), "spread"]
    print(f"\n{shape}, {format}, {args.threads} threads\n{table(head, lines)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", nargs="+", choices=isa_names(), default=isa_names()[:2])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["135m", "1b"])
    parser.add_argument("--format", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--prefill", nargs="*", type=int, default=[128, 512, 2048], help="tokens of a prompt")
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 4, 16], help="sequences, of 128 tokens each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="keep checkpoints here and use them again; default: a temporary one")
    args = parser.parse_args()
    print(f"{machine()}; processes that wanted a core in the last minute, before the start: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() if args.dir is None else contextlib.nullcontext(args.dir) as root:
        for shape in args.shape:
            for format in args.format:
                measure(args, shape, format, Path(root) / shape)


if __name__ == "__main__":
    main()
