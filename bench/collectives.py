"""All-reduce between two processes over shared memory, beside gloo (torch.distributed) in one run, and lower bounds.

    python bench/collectives.py [--rounds 2000] [--json]

The bounds are the time of a message there and back, and of a copy into shared memory and out. Gloo and the communicator
take turns in the same two processes, pinned to a core each. A figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median

import numpy as np

from intaglio import _native

SIZES = (4 << 10, 64 << 10, 1 << 20)  # bytes
RING = 1 << 19
Take = Callable[[], object]


def timed(run: Take, rounds: int) -> float:
    """The median of so many rounds, in microseconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def copies(size: int) -> Take:
    """Copy so many bytes into shared memory and out again."""
    import mmap

    values, room = np.ones(size // 4, np.float32), mmap.mmap(-1, size)
    shared = np.frombuffer(room, np.float32)

    def run() -> None:
        shared[:] = values
        values[:] = shared

    return run


def rank(number: int, file: int, port: int, rounds: int, out: Connection) -> None:
    """One of the two processes."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    import torch
    import torch.distributed as gloo

    torch.set_num_threads(1)
    gloo.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=number)
    end = _native.Communicator(_native.Segment(file), number)
    found: dict[str, float] = {}
    tiny = np.zeros((1, 1), np.float32)
    found["there and back"] = timed(lambda: end.all_reduce("ping", (0, 1), tiny, tiny.copy()), rounds)
    for size in SIZES:
        x, y = np.ones((1, size // 4), np.float32), np.empty((1, size // 4), np.float32)
        theirs = torch.ones(size // 4)
        few = max(50, rounds * (64 << 10) // max(size, 64 << 10))
        ours, gloos = [], []
        for _ in range(5):  # in turns, so that both see the same machine
            ours.append(timed(lambda: end.all_reduce("x", (0, 1), x, y), few // 5))  # noqa: B023
            gloos.append(timed(lambda: gloo.all_reduce(theirs), few // 5))  # noqa: B023
        found[f"ours {size}"], found[f"gloo {size}"] = median(ours), median(gloos)
        found[f"copy {size}"] = timed(copies(size), few)
    out.send(found)
    gloo.destroy_process_group()


def measure(rounds: int) -> dict[str, float]:
    """Microseconds by what was measured: the slower of the two processes."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    file = os.memfd_create("bench")
    os.ftruncate(file, _native.Segment.bytes_for(2, RING))
    _native.Segment.format(file, 2, RING, 1)
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe() for _ in range(2)]
    processes = [fork.Process(target=rank, args=(i, file, port, rounds, ends[i][1])) for i in range(2)]
    for process in processes:
        process.start()
    both = [mine.recv() for mine, _ in ends]
    for process in processes:
        process.join()
    return {name: max(b[name] for b in both) for name in both[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    found = measure(a.rounds)
    if a.json:
        print(json.dumps(found))
        return
    print(f"smallest all-reduce (a message there and back): {found['there and back']:.1f} us")
    print(f"{'bytes':>9} {'all-reduce us':>14} {'gloo us':>9} {'times':>6} {'copy in and out us':>19}")
    for size in SIZES:
        ours, gloo = found[f"ours {size}"], found[f"gloo {size}"]
        print(f"{size:>9} {ours:>14.1f} {gloo:>9.1f} {gloo / ours:>6.1f} {found[f'copy {size}']:>19.1f}")


if __name__ == "__main__":
    main()
