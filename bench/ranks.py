"""tp2 and pp2 as two processes of one thread each, beside the whole model in one process with two threads.

    python bench/ranks.py [--shape 1b] [--weights bf16,int8,int4] [--rounds 9]

All have their weights loaded; they take turns step by step, so that all see the same machine, and the ratio is the
median of the rounds' ratios. `us a collective`: what a rank spends inside a collective, waiting for the other included.
pp2 has two micro-batches of half the batch under way, and each stage reads its weights once for each of them. Its
`bound` is the ratio for the model in one process that does the same: two steps of half the batch in place of one.
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
from intaglio.devices import Executable, PendingStep, RanksDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice
from intaglio.models import Checkpoint, port
from intaglio.ops.collective import Collective

PAGE = 32
CONTEXT = 256  # tokens before a decode step
PAGES = CONTEXT // PAGE + 2
ROWS = (("decode, 1 sequence", 1, 0), ("decode, 8 sequences", 8, 0), ("prefill, 512 tokens", 0, 512))
PIPELINED = 32  # sequences


def batch(sequences: int, tokens: int, step: int, first: int = 0) -> Batch:
    """A prefill of so many tokens, or a decode step of so many sequences, from number `first` on."""
    if tokens:
        return bind([Chunk([(i + step) % 50 for i in range(tokens)], 0, range(-(-tokens // PAGE)), [tokens - 1])], PAGE)
    return bind([Chunk([1 + step % 50], CONTEXT + step % PAGE, range(s * PAGES, (s + 1) * PAGES), [0])
                 for s in range(first, first + sequences)], PAGE)  # fmt: skip


def seconds(executable: Executable, make: Callable[[int], Batch], steps: int) -> float:
    """Median seconds of so many steps."""
    times = []
    for step in range(steps):
        request = StepRequest(make(step))
        start = time.perf_counter()
        executable.step(request)
        times.append(time.perf_counter() - start)
    return median(times)


def halves(executable: Executable, steps: int) -> float:
    """Mean seconds of a step of PIPELINED sequences that is run as two micro-batches, both of them under way.

    An executable without stages runs one after the other.
    """
    half, ends = PIPELINED // 2, list[float]()
    under_way: list[PendingStep] = []
    for i in range(2 * steps + 3):
        under_way.append(executable.launch(StepRequest(batch(half, 0, i // 2, i % 2 * half))))
        if len(under_way) == 2:
            under_way.pop(0).result()
            ends.append(time.perf_counter())
    under_way.pop().result()
    return (ends[-1] - ends[1]) / steps  # in the first two the pipeline fills


def in_collectives(ranks: Executable, make: Callable[[int], Batch], sites: set[str], steps: int) -> float:
    """Median microseconds that one rank spends in one collective."""
    spent = []
    for step in range(steps):
        timings = ranks.step(StepRequest(make(step), timed=True)).timings
        spent.append(sum(timings[site] for site in sites) / len(sites) / 2)
    return median(spent) * 1e6


def pipelined(whole: Executable, ranks: Executable, rounds: int) -> list[str]:
    """The cells of a line: milliseconds of the whole model and of two stages, their ratio, and its bound."""

    def make(step: int) -> Batch:
        return batch(PIPELINED, 0, step)

    for executable in (whole, ranks):
        halves(executable, 1)
    turns = [(seconds(whole, make, 5), halves(ranks, 5), halves(whole, 5)) for _ in range(rounds)]
    times = [median(times) * 1e3 for times in zip(*turns, strict=True)]
    ratio, bound = median(a / b for a, b, _ in turns), median(a / c for a, _, c in turns)
    return [*(f"{ms:.2f}" for ms in times[:2]), f"{ratio:.2f}", f"{bound:.2f}", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--weights", default="bf16,int8,int4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/intaglio/bench").expanduser())
    a = parser.parse_args()
    checkpoint = Checkpoint.open(write_random(a.folder / a.shape, SHAPES[a.shape]))
    ported, state = port(checkpoint, 1024), StateSpec(PIPELINED * PAGES, PAGE)
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
            lines.append([weights, what, "tp2", *(f"{ms:.2f}" for ms in times), f"{ratio:.2f}", "", f"{spent:.0f}"])
        ranks.close()
        ranks = RanksDevice(2).load(build_mesh(ported, "pp2", weights), checkpoint, state)
        lines.append([weights, f"decode, {PIPELINED} sequences", "pp2", *pipelined(whole, ranks, a.rounds)])
        ranks.close()
    print(f"{a.shape}, {os.cpu_count()} cores, {a.rounds} rounds")
    head = ["weights", "step", "layout", "one process ms", "two ranks ms", "speed of ranks", "bound", "us a collective"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
