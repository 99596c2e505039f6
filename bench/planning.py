"""Time of planning a step on the host, alone and on two ranks: for sizes that were planned before, and for new sizes.

The model is the bundled one. All numbers are measured; those of a mesh are sums over its ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

from host import table

from intaglio.batch import Batch, Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import Executable, MeshDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice, HostExecutable
from intaglio.model import BUNDLED
from intaglio.models import Checkpoint, port

PAGE = 32
CONTEXT = 400  # tokens before a decode step
NEW = 12  # more sizes than plans are kept


def decode(sequences: int, step: int) -> Batch:
    pages = CONTEXT // PAGE + 2
    return bind([Chunk([1 + step % 50], CONTEXT + step % PAGE, range(s * pages, (s + 1) * pages), [0])
                 for s in range(sequences)], PAGE)  # fmt: skip


def prefill(tokens: int, step: int) -> Batch:
    return bind([Chunk([(i + step) % 50 for i in range(tokens)], 0, range(-(-tokens // PAGE)), [tokens - 1])], PAGE)


def measure(
    executable: Executable, ranks: Sequence[HostExecutable], batches: Callable[[int], Batch], steps: int
) -> tuple[float, float, int]:
    """(median seconds of a step, mean seconds of planning per step, number of plans made), a tuple."""
    executable.step(StepRequest(batches(0)))
    plans, planning = sum(r.plans for r in ranks), sum(r.planning_seconds for r in ranks)
    times = []
    for step in range(1, steps + 1):
        batch = batches(step)
        start = time.perf_counter()
        executable.step(StepRequest(batch))
        times.append(time.perf_counter() - start)
    spent = sum(r.planning_seconds for r in ranks) - planning
    return median(times), spent / steps, sum(r.plans for r in ranks) - plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of each row")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    checkpoint, state = Checkpoint.open(BUNDLED), StateSpec(16 * (CONTEXT // PAGE + 2), PAGE)
    device = HostDevice(args.threads, cache=None)
    alone = device.load(build(port(checkpoint)), checkpoint, state)
    mesh = MeshDevice(device).load(build_mesh(port(checkpoint), "tp2"), checkpoint, state)
    assert isinstance(alone, HostExecutable)
    ranks = [rank for rank in mesh.ranks if isinstance(rank, HostExecutable)]
    lines = []
    for layout, executable, parts in (("alone", alone, [alone]), ("tp2", mesh, ranks)):
        for what, batches in (
            ("decode, 1 sequence", lambda step: decode(1, step)),
            ("decode, 16 sequences", lambda step: decode(16, step)),
            ("prefill, 128 tokens", lambda step: prefill(128, step)),
            ("prefill, sizes all new", lambda step: prefill(128 + step % NEW, step)),
        ):
            step, planning, plans = measure(executable, parts, batches, args.steps)
            lines.append([layout, what, f"{step * 1e6:.0f} us", f"{planning * 1e6:.1f} us", str(plans)])
    print(f"{args.threads} threads, {args.steps} steps a row")
    print(table(["layout", "step", "time of a step", "planning a step", "plans made"], lines))


if __name__ == "__main__":
    main()
