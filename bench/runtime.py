"""Time of the engine itself: decode steps on a device that takes no time, and what a worker process adds.

All numbers are measured, medians over the steps. There is a row for each kind of sampling parameters and each way to
read the events, since both change the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from idle import VOCABULARY, IdleDevice

from intaglio.devices import ArrayWeights, StateSpec, WorkerDevice
from intaglio.ops import Embed, Linear, Sample, Select
from intaglio.program import Builder, Program
from intaglio.runtime import Engine, Request, SamplingParams

CONTEXT, PROMPT = 4096, 300
MANNERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
}


def nothing() -> Program:
    """A Program of a real vocabulary that no device has to run."""
    b = Builder("nothing", CONTEXT)
    b.weight("embed.weight", (VOCABULARY, 8), "embed")
    x = b.op(Select, "select", b.op(Embed, "embed", "tokens", "embed.weight"), "rows")
    b.op(Linear, "lm_head", x, "embed.weight", out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return b.done()


def milliseconds(sequences: int, manner: str, worker: bool, steps: int) -> float:
    """The median of an engine's decode step with so many sequences."""
    device = WorkerDevice(IdleDevice()) if worker else IdleDevice()
    executable = device.load(nothing(), ArrayWeights({}), StateSpec(sequences * CONTEXT // 64, 32))
    engine = Engine(
        executable, clock=time.monotonic, rng=random.Random(0), max_batch_tokens=8192, max_sequences=sequences
    )
    params = SamplingParams(max_tokens=steps + 100, seed=1, **MANNERS[manner])
    for i in range(sequences):
        engine.add(Request(f"r{i}", [(i + k) % VOCABULARY for k in range(PROMPT)], params))
    while any(s.remaining > 1 for s in engine.scheduler.waiting + engine.scheduler.running):
        engine.step()
    samples = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        samples.append(time.perf_counter() - began)
    return median(samples) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # a worker finds the idle device there
    rows = [
        {"sequences": n, "manner": manner, "worker": worker, "ms": milliseconds(n, manner, worker, a.steps)}
        for n in a.sequences
        for manner in MANNERS
        for worker in (False, True)
    ]
    if a.json:
        print(json.dumps(rows))
        return
    print(f"{'sequences':>9}  {'manner':10} {'engine ms':>10} {'with a worker':>14}")
    for here, there in zip(rows[::2], rows[1::2], strict=True):
        print(f"{here['sequences']:>9}  {here['manner']:10} {here['ms']:>10.3f} {there['ms']:>14.3f}")


if __name__ == "__main__":
    main()
