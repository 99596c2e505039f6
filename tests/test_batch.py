"""Batches: layout of bound chunks, and the errors of bind() for invalid chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.batch import GREEDY, BatchError, Chunk, Sampling, bind


def test_layout_of_a_mixed_batch() -> None:
    hot = Sampling(temperature=1.0, seed=5)
    prefill = Chunk([10, 11, 12, 13, 14], 0, [4, 2], rows=[4])
    decode = Chunk([20], 9, [7, 0, 3], rows=[0], sampling=hot)
    later = Chunk([30, 31, 32], 3, [5, 6], rows=[0, 2], sampling=hot)
    silent = Chunk([40, 41], 2, [1], state=(3, 1))
    b = bind([prefill, decode, later, silent], block_size=4)
    assert b.tokens.tolist() == [10, 11, 12, 13, 14, 20, 30, 31, 32, 40, 41]
    assert b.positions.tolist() == [0, 1, 2, 3, 4, 9, 3, 4, 5, 2, 3]
    assert b.slots.tolist() == [16, 17, 18, 19, 8, 13, 23, 24, 25, 6, 7]
    assert b.first_row.tolist() == [0, 5, 6, 9]
    assert b.q_len.tolist() == [5, 1, 3, 2]
    assert b.context_len.tolist() == [5, 10, 6, 4]
    assert b.block_table.tolist() == [[4, 2, -1], [7, 0, 3], [5, 6, -1], [1, -1, -1]]
    assert b.state_from.tolist() == [-1, -1, -1, 3] and b.state_to.tolist() == [-1, -1, -1, 1]
    assert b.rows.tolist() == [4, 5, 6, 8]
    assert b.sampling == (GREEDY, hot, hot, hot)
    assert b.sizes == {"T": 11, "S": 4, "R": 4} and b.block_size == 4
    arrays = (b.tokens, b.positions, b.slots, b.first_row, b.q_len, b.context_len, b.block_table, b.rows)
    assert {a.dtype for a in arrays} == {np.dtype(np.int32)}


def test_a_batch_may_want_no_rows() -> None:
    b = bind([Chunk([1], 0, [0])], 4)
    assert b.rows.shape == (0,) and b.rows.dtype == np.int32 and b.sizes["R"] == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 8))
def test_slots_follow_the_block_table(data: st.DataObject, block_size: int) -> None:
    chunks, free = [], data.draw(st.permutations(range(90)))
    for _ in range(data.draw(st.integers(1, 4))):
        n, start = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 9))
        blocks = [free.pop() for _ in range(-(-(start + n) // block_size))]
        chunks.append(Chunk(range(n), start, blocks, rows=data.draw(st.sets(st.integers(0, n - 1)).map(sorted))))
    b = bind(chunks, block_size)
    for s, chunk in enumerate(chunks):
        for i in range(len(chunk.tokens)):
            row, position = b.first_row[s] + i, chunk.start + i
            assert b.positions[row] == position
            assert b.slots[row] == chunk.blocks[position // block_size] * block_size + position % block_size
    wanted = [b.first_row[s] + r for s, chunk in enumerate(chunks) for r in chunk.rows]
    assert b.rows.tolist() == wanted and len(b.sampling) == len(wanted)


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([], "at least one chunk"),
        ([Chunk([1], 0, [0]), Chunk([], 0, [1])], "chunk 1 has no tokens"),
        ([Chunk([1, 2], 3, [0])], r"chunk 0: positions 3\.\.4 do not fit its 1 blocks of 4"),
        ([Chunk([1], 0, [])], r"chunk 0: positions 0\.\.0 do not fit its 0 blocks of 4"),
        ([Chunk([1], -1, [0])], r"chunk 0: positions -1\.\.-1 do not fit"),
        ([Chunk([1, 2], 0, [0], rows=[0, 2])], "chunk 0: wanted row 2 is outside its 2 tokens"),
        ([Chunk([1, 2], 0, [0], rows=[-1])], "chunk 0: wanted row -1 is outside its 2 tokens"),
        ([Chunk([1], 4, [7, 3]), Chunk([1, 2], 3, [2, 3])], "chunks 0 and 1 both write slot 0 of block 3"),
        ([Chunk([1] * 5, 0, [7, 7])], "chunks 0 and 0 both write slot 0 of block 7"),
        ([Chunk([1], 0, [0], state=(0, 1))], r"chunk 0 starts at position 0 with state=\(0, 1\)"),
        ([Chunk([1], 2, [0], state=(-1, 1))], r"chunk 0 starts at position 2 with state=\(-1, 1\)"),
        ([Chunk([1], 2, [0], state=(1, -1))], r"chunk 0 starts at position 2 with state=\(1, -1\)"),
        ([Chunk([1], 2, [0], state=(1, 1))], "state slot 1 is read and written in one step"),
        (
            [Chunk([1], 2, [0], state=(1, 0)), Chunk([1], 2, [1], state=(3, 0))],
            "two chunks write their state to slot 0",
        ),
    ],
)
def test_contradictions_are_refused(chunks: list[Chunk], says: str) -> None:
    with pytest.raises(BatchError, match=says):
        bind(chunks, 4)
