"""Fault injection: ranks killed, stopped and aborted at random under a mixed load: `make faults FAULTS=200`.

Every stream must be that of the undisturbed run, and nothing may be left behind: no process, shared memory, descriptor
or thread. Not a test: tests import it.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from support.tiny import tiny

from intaglio.devices.processes import GroupExecutable
from intaglio.llm import LLM, RequestOutput
from intaglio.runtime import Grammar, SamplingParams

LAYOUT, RANKS = "tp2pp2", 4
KINDS = {"kill -9": signal.SIGKILL, "kill -ABRT": signal.SIGABRT, "kill -STOP": signal.SIGSTOP, "abort": None}
SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8], list(range(20, 33)), list(range(40, 70))]
PARAMS = [
    SamplingParams(max_tokens=16, temperature=0.8, seed=1, ignore_eos=True, n=2),
    SamplingParams(max_tokens=17, ignore_eos=True),  # greedy output repeats itself, so drafts are found
    SamplingParams(max_tokens=24, seed=5, temperature=1.0, grammar=Grammar("json_schema", SCHEMA)),
    SamplingParams(max_tokens=16, temperature=1.1, seed=9, top_k=40, repetition_penalty=1.2, ignore_eos=True),
]
GIVE_UP = 120.0  # seconds, far above what any of this takes


@dataclass
class Disturbance:
    """One fault. noticed, resumed: seconds until the group was aborted, and until another one had run a step."""

    kind: str
    rank: int
    cause: str = ""
    noticed: float = 0.0
    resumed: float = 0.0
    kept: bool = False  # the K/V cache outlived the processes


def held() -> tuple[int, int, int]:
    """Descriptors, mappings of shared memory, and threads of this process."""
    gc.collect()
    maps = sum("intaglio" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return len(os.listdir("/proc/self/fd")), maps, threading.active_count()


def alive(pid: int) -> bool:
    """True if there is such a process, which has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def group(llm: LLM) -> GroupExecutable:
    """The group of ranks in use."""
    executable = llm.engine.executable.unwrapped()
    assert isinstance(executable, GroupExecutable)
    return executable


def load(llm: LLM, stop: str) -> list[RequestOutput]:
    """The outputs of the mixed load; one of its requests ends at `stop`."""
    ends = SamplingParams(max_tokens=40, temperature=0.9, seed=3, ignore_eos=True, stop=(stop,) if stop else ())
    return llm.generate(PROMPTS, [*PARAMS, ends])


def inflict(llm: LLM, one: Disturbance, delay: float) -> None:
    """Wait, disturb the group, and note when that is noticed and made good."""
    time.sleep(delay)
    victim, restarts, began = group(llm), llm.engine.counts.restarts, time.monotonic()
    segment, number = victim.processes.segment, KINDS[one.kind]
    if number is None:
        segment.abort(one.rank, "a planted site", "planted")
    else:
        os.kill(victim.pids[one.rank], number)
    while not segment.aborted and time.monotonic() - began < GIVE_UP:
        time.sleep(0.001)
    one.noticed = time.monotonic() - began
    one.cause = segment.abort_reason()
    while llm.engine.counts.restarts == restarts and time.monotonic() - began < GIVE_UP:
        time.sleep(0.001)
    one.resumed = time.monotonic() - began
    one.kept = group(llm).state_kept


def disturb(folder: Path, faults: int, seed: int) -> list[Disturbance]:
    """Inflict so many faults. Raises AssertionError, naming the seed, if a stream differs or something is left."""
    rng, found, pids = random.Random(seed), list[Disturbance](), set[int]()
    tiny("qwen3", folder)
    options = {"kv_tokens": 512, "max_drafts": 2, "max_batch_tokens": 16, "layout": LAYOUT}
    undisturbed = LLM(folder, in_process=True, **options)  # type: ignore[arg-type]
    text = load(undisturbed, "")[-1].text
    stop = text[len(text) // 2 :][:2]
    wanted = load(undisturbed, stop)
    assert wanted[-1].finish_reason == "stop" and undisturbed.engine.counts.accepted_tokens, "the load is no mixed one"
    del undisturbed
    before = held()
    llm = LLM(folder, **options)  # type: ignore[arg-type]
    load(llm, stop)
    began = time.monotonic()
    assert load(llm, stop) == wanted, seed
    took = time.monotonic() - began
    for i in range(faults):
        one = Disturbance(list(KINDS)[i % len(KINDS)], rng.randrange(RANKS))
        pids |= set(group(llm).pids)
        thread = threading.Thread(target=inflict, args=(llm, one, rng.random() * took))
        thread.start()
        while thread.is_alive():  # more than once if the fault came late
            assert load(llm, stop) == wanted, f"seed {seed}, fault {i}: {one}"
        thread.join()
        assert one.cause and one.resumed < GIVE_UP, f"seed {seed}, fault {i}: {one}"
        assert one.kept == (one.kind != "kill -ABRT"), (
            f"seed {seed}, fault {i}: {one}"
        )  # what crashes may write anywhere
        found.append(one)
    pids |= set(group(llm).pids)
    group(llm).close()
    del llm
    left = [pid for pid in pids if alive(pid)]
    assert not left, f"processes are left: {left}"
    assert all(now <= then for now, then in zip(held(), before, strict=True)), f"held {before}, now {held()}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = disturb(Path(folder), given.faults, given.seed)
    for kind in KINDS:
        several = [one for one in found if one.kind == kind]
        for what in ("noticed", "resumed"):
            times = [getattr(one, what) for one in several]
            if times:
                print(f"{kind:10}  {what} after {statistics.median(times):.3f} s, at most {max(times):.3f} s")
    print(f"seed {given.seed}: {len(found)} faults, every stream as undisturbed, nothing left behind")


if __name__ == "__main__":
    main()
