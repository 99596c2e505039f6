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
    """Merge scores into each row's list of its best entries: ids i32 [m, top], and their scores best f32 [m, top].

    A list has the `top` entries with the highest scores, in ascending order of entry; of equal scores, the lower entry
    is kept. Places without an entry come first, with id -1; in a new list all are -1.

    Column j of scores f32 [m, n] is the score of entry first + j. For the same list, `first` rises from one instruction
    to the next. Row i belongs to the query at position query + i: only entries before (query + i + 1) // every take
    part. A score that is NaN counts as -inf.
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
    """Find the rows of a K/V cache that hold given positions of a sequence: dst and positions i32 [1, n].

    For a position p: dst = (table[0, p // size] * size + p % size) * heads + head. table i32 [1, blocks] is the
    sequence's block table. A block holds `size` tokens, and a token has `heads` rows, one for each head. A position
    below 0 counts as 0. Raises MachineError for a position beyond the table.
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
