"""Instructions of sparse attention on the vector lanes: Choose keeps the best entries, Locate finds cached rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.chips import Target
from intaglio.silicon.isa.cycles import choose_cycles, vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.isa.transfer import check_within
from intaglio.silicon.memory import CoreMemory, Region


@dataclass(frozen=True, kw_only=True)
class Choose(Instruction, engine="VEC", opcode=0x4F):
    """Add new scores to each row's list of the `top` entries with the highest scores.

    ids i32 [m, top] holds the entries of each list, and best f32 [m, top] their scores. A list is sorted by entry
    number, in ascending order. Of entries with equal scores, the one with the lower number is kept. If a list has fewer
    than `top` entries, its first places are empty: their id is -1. In a new list all places are empty.

    scores f32 [m, n] has the new scores: column j is the score of entry first + j. `first` must rise from one
    instruction to the next for the same list. Row i belongs to the query at position query + i. An entry stands for
    `every` tokens, and the query sees only entries whose tokens are all at its position or before. So row i uses only
    scores of entries with numbers below (query + i + 1) // every. A score that is NaN counts as -inf.
    """

    ids: Region
    best: Region
    scores: Region
    first: int = 0
    query: int = 0
    every: int = 1
    writes = ("ids", "best")
    updates = ("ids", "best")

    def shapes(self) -> Shapes:
        return {"ids": ("m", "top"), "best": ("m", "top"), "scores": ("m", "n")}

    def run(self, mem: CoreMemory) -> None:
        ids, best, scores = mem.read(self.ids).copy(), mem.read32(self.best), mem.read32(self.scores)
        for i in range(len(ids)):
            held, new = ids[i] >= 0, max(0, (self.query + i + 1) // self.every - self.first)
            score = np.concatenate([best[i][held], scores[i, :new]])
            entries = np.concatenate([ids[i][held], self.first + np.arange(len(scores[i, :new]))])
            score = np.where(np.isnan(score), np.float32(-np.inf), score)
            kept = np.sort(np.argsort(-score, kind="stable")[: ids.shape[1]])
            free = ids.shape[1] - len(kept)
            ids[i, :free], best[i, :free] = -1, -np.inf
            ids[i, free:], best[i, free:] = entries[kept], score[kept]
        mem.write(self.ids, ids)
        mem.write(self.best, best)

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(choose_cycles(target.chip, self.ids.rows, self.scores.cols, self.ids.cols)))


@dataclass(frozen=True, kw_only=True)
class Locate(Instruction, engine="VEC", opcode=0x41):
    """Compute the row numbers in a K/V cache that belong to given positions of a sequence.

    positions i32 [1, n]; dst i32 [1, n], the row numbers; table i32 [1, blocks], the sequence's block table. A block
    holds `size` tokens, and a token has `heads` rows, one for each head.

    The row of position p is (table[0, p // size] * size + p % size) * heads + head. A position below 0 counts as 0.
    Raises MachineError for a position beyond the table.
    """

    dst: Region
    positions: Region
    table: Region
    size: int
    heads: int = 1
    head: int = 0
    writes = ("dst",)

    def shapes(self) -> Shapes:
        return {"dst": (1, "n"), "positions": (1, "n"), "table": (1, "blocks")}

    def run(self, mem: CoreMemory) -> None:
        p, table = np.maximum(mem.read(self.positions)[0], 0), mem.read(self.table)[0]
        check_within("looks up block", p // self.size, self.table.cols, self.table)
        mem.write(self.dst, ((table[p // self.size] * self.size + p % self.size) * self.heads + self.head)[None])

    def cost(self, target: Target) -> Cost:
        return Cost(cycles=float(vector_cycles(target.chip, 4 * self.dst.cols)))
