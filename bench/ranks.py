"""tp2 as two processes of one thread each, beside the whole model in one process with two threads, on the same machine.

    python bench/ranks.py [--shape 1b] [--weights bf16,int8,int4] [--rounds 9]

Both have their weights loaded; they take turns step by step, so that both see the same machine, and the ratio is the
median of the rounds' ratios. `collectives`: what a rank spends inside a collective, waiting for the other included.
Weights are random (bench/checkpoints.py).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from checkpoints import SHAPES, write_random
from host import table

from intaglio.batch import Batch, Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import Executable, RanksDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.models import Checkpoint, port
from intaglio.ops.collective import Collective

PAGE = 32
CONTEXT = 256  # tokens before a decode step
PAGES = CONTEXT // PAGE + 2
ROWS = (("decode, 1 sequence", 1, 0), ("decode, 8 sequences", 8, 0), ("prefill, 512 tokens", 0, 512))


def batch(sequences: int, tokens: int, step: int) -> Batch:
    """A prefill of so many tokens, or a decode step of so many sequences."""
    if tokens:
        return bind([Chunk([(i + step) % 50 for i in range(tokens)], 0, range(-(-tokens // PAGE)), [tokens - 1])], PAGE)
    return bind([Chunk([1 + step % 50], CONTEXT + step % PAGE, range(s * PAGES, (s + 1) * PAGES), [0])
                 for s in range(sequences)], PAGE)  # fmt: skip


def seconds(executable: Executable, make: Callable[[int], Batch], steps: int) -> float:
    """Median seconds of so many steps."""
    times = []
    for step in range(steps):
        request = StepRequest(make(step))
        start = time.perf_counter()
        executable.step(request)
        times.append(time.perf_counter() - start)
    return median(times)


def in_collectives(ranks: Executable, make: Callable[[int], Batch], sites: set[str], steps: int) -> float:
    """Median microseconds that one rank spends in one collective."""
    spent = []
    for step in range(steps):
        timings = ranks.step(StepRequest(make(step), timed=True)).timings
        spent.append(sum(timings[site] for site in sites) / len(sites) / 2)
    return median(spent) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--weights", default="bf16,int8,int4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/intaglio/bench").expanduser())
    a = parser.parse_args()
    checkpoint = Checkpoint.open(write_random(a.folder / a.shape, SHAPES[a.shape]))
    ported, state = port(checkpoint, 1024), StateSpec(max(8 * PAGES, 16), PAGE)
    lines = []
    for weights in a.weights.split(","):
        mesh = build_mesh(ported, "tp2", weights)
        sites = {op.site for op in mesh.last.ops if isinstance(op, Collective)}
        whole = HostDevice(2).load(build(ported, weights), checkpoint, state)
        ranks = RanksDevice(2).load(mesh, checkpoint, state)
        for what, sequences, tokens in ROWS:

            def make(step: int, sequences: int = sequences, tokens: int = tokens) -> Batch:
                return batch(sequences, tokens, step)

            steps = 1 if tokens else 5
            for executable in (whole, ranks):
                seconds(executable, make, 1)
            pairs = [(seconds(whole, make, steps), seconds(ranks, make, steps)) for _ in range(a.rounds)]
            times = [median(times) * 1e3 for times in zip(*pairs, strict=True)]
            ratio = median(one / two for one, two in pairs)
            spent = in_collectives(ranks, make, sites, a.rounds)
            lines.append([weights, what, *(f"{ms:.2f}" for ms in times), f"{ratio:.2f}", f"{spent:.0f}"])
        ranks.close()
    print(f"{a.shape}, {os.cpu_count()} cores, {a.rounds} rounds")
    head = ["weights", "step", "one process ms", "two ranks ms", "speed of ranks", "us a collective"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
