"""Instruction of indexers: Choose keeps the entries with the highest scores, on the vector lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.chips import Target
from intaglio.silicon.isa.cycles import choose_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
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
