"""Collectives executed by chip instructions equal the ops bit for bit, on every chip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import CHIPS

from intaglio.batch import shared_rows
from intaglio.ops import AllGather, AllReduce, AllToAll, Grouped, ReduceScatter, Send
from intaglio.ops.collective import WIRES
from intaglio.silicon.isa.instruction import assemble, decode, disassemble, encode
from intaglio.silicon.kernels.collectives import CollectiveRun, run_collective
from intaglio.silicon.machine import Machine
from intaglio.silicon.memory import MachineError

CHIP = st.sampled_from(sorted(CHIPS))
SEED = st.integers(0, 2**32 - 1)


def normal(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return rng.normal(size=(rows, cols)).astype(np.float32)


def some(kind: str, ranks: int, rows: int, width: int, wire: str, seed: int) -> tuple[Grouped, list[np.ndarray]]:
    """A collective over `ranks` ranks with random inputs; gathers along columns have unequal widths."""
    rng, group = np.random.default_rng(seed), tuple(range(ranks))
    if kind == "all_reduce":
        return AllReduce(site="s", x="x", out="y", group=group, wire=wire), [normal(rng, rows, width) for _ in group]
    if kind == "reduce_scatter":
        op = ReduceScatter(site="s", x="x", out="y", group=group, share=0, wire=wire)
        return op, [normal(rng, rows, width) for _ in group]
    if kind == "rows":
        parts = [normal(rng, len(shared_rows(rows, i, ranks)), width) for i in group]
        return AllGather(site="s", x="x", out="y", group=group, width=width, tokens=True, wire=wire), parts
    parts = [normal(rng, rows, int(rng.integers(1, width + 1))) for _ in group]
    total = sum(part.shape[1] for part in parts)
    if kind == "all_gather":
        return AllGather(site="s", x="x", out="y", group=group, width=total, wire=wire), parts
    return AllToAll(site="s", x="x", out="y", group=group, share=0, width=total, wire=wire), parts


@settings(max_examples=60, deadline=None)
@given(CHIP, st.sampled_from(["all_reduce", "reduce_scatter", "all_gather", "rows", "all_to_all"]), st.integers(1, 8),
       st.integers(1, 40), st.integers(1, 300), st.sampled_from(WIRES), SEED)  # fmt: skip
def test_collectives(chip: str, kind: str, ranks: int, rows: int, width: int, wire: str, seed: int) -> None:
    op, parts = some(kind, ranks, rows, width, wire, seed)
    got, run = run_collective(CHIPS[chip], op, parts)
    for mine, wanted in zip(got, op.exchange(parts), strict=True):
        np.testing.assert_array_equal(mine, wanted)
    assert rows == 1 or (run.bytes["link"] > 0) == (ranks > 1)  # with one row an all_to_all may send nothing


@settings(max_examples=20, deadline=None)
@given(CHIP, st.integers(1, 40), st.integers(1, 600), st.sampled_from(WIRES), SEED)
def test_send_and_recv(chip: str, rows: int, width: int, wire: str, seed: int) -> None:
    x = normal(np.random.default_rng(seed), rows, width)
    op = Send(site="s", x="x", peer=1, wire=wire)
    (got,), run = run_collective(CHIPS[chip], op, [x, x[:0]])
    np.testing.assert_array_equal(got, op.exchange([x])[0])
    assert run.bytes["link"] == x.size * (4 if wire == "f32" else 2)


def test_link_bytes_equal_those_of_the_schedule() -> None:
    """One-shot all_reduce sends each rank's input to every other rank; slower links take longer."""
    op, parts = some("all_reduce", 4, 64, 256, "bf16", 3)
    _, run = run_collective(CHIPS["sohu"], op, parts)
    assert run.bytes["link"] == 4 * 3 * 64 * 256 * 2
    slow = run_collective(CHIPS["sohu"].with_chip(bytes_per_s=1e9), op, parts)[1]
    assert slow.seconds > 64 * 256 * 2 * 3 / 4e9 > run.seconds


def test_streams_of_collectives_can_be_encoded() -> None:
    op, parts = some("reduce_scatter", 3, 9, 20, "bf16", 5)
    for stream in CollectiveRun(op, CHIPS["small"], parts).streams():
        for i in stream.instructions:
            assert decode(encode(i)) == i and assemble(disassemble(i)) == i


def test_the_deadlock_error_names_the_chip_without_a_stream() -> None:
    op, parts = some("all_reduce", 3, 4, 8, "f32", 7)
    links = CollectiveRun(op, CHIPS["small"], parts)
    streams = [s for s in links.streams() if s.chip != 2]
    memories = {chip: memory.hbm for chip, memory in enumerate(links.memories)}
    with pytest.raises(MachineError, match=r"deadlock: .*engine NET, instruction Receive waits for chip 2 to send"):
        Machine(CHIPS["small"], memories).run(streams)
