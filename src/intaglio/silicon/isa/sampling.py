"""Instruction Sample: samples the next token from a row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.batch import Edits, Sampling
from intaglio.chips import Target
from intaglio.ops.sample import draw
from intaglio.silicon.isa.cycles import sample_cycles, vector_cycles
from intaglio.silicon.isa.instruction import Cost, Instruction, Shapes
from intaglio.silicon.memory import CoreMemory, Region

EDIT_OPS = 5  # operations to edit one logit: read, compare, multiply, add, write


@dataclass(frozen=True, kw_only=True)
class Sample(Instruction, engine="VEC", opcode=0x48):
    """Sample one token id from a row of logits: token i32 [1, 1], from logits f32 [1, vocabulary].

    1. Edit single logits (penalties and logit bias). ids i32, factors f32 and terms f32 are [1, k]. For each i, the
       logit l of the token ids[0, i] is divided by factors[0, i] if l is above 0, and multiplied by it otherwise. Then
       terms[0, i] is added.
    2. Exclude tokens by the grammar mask i32 [1, words]: bit b of word w is 0 if the token 32 * w + b must not be
       drawn.
    3. If `temperature` is 0, take the token with the largest logit. Otherwise divide the logits by the temperature,
       keep the tokens that top_k, top_p and min_p allow, in this order, and draw one of them. top_k 0, top_p 1 and
       min_p 0 allow all tokens. The random number depends only on `seed` and `position`.

    logprob f32 [1, 1] is the natural logarithm of the token's probability under the softmax of the unedited logits. If
    a logit is NaN, or if the largest logit is infinite before or after steps 1 and 2, the token is -1 and logprob is
    NaN.
    """

    token: Region
    logprob: Region
    logits: Region
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    ids: Region | None = None
    factors: Region | None = None
    terms: Region | None = None
    mask: Region | None = None
    writes = ("token", "logprob")

    def shapes(self) -> Shapes:
        one, edits = dict.fromkeys(("token", "logprob"), (1, 1)), dict.fromkeys(("ids", "factors", "terms"), (1, "k"))
        return {"logits": (1, "vocabulary"), **one, **edits, "mask": (1, "words")}

    def run(self, mem: CoreMemory) -> None:
        x = mem.read(self.logits)[0]
        how = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed, *self._changes(mem))
        token, logprob = draw(x, how, self.position), np.nan
        if token >= 0:
            up = x.astype(np.float64)
            logprob = up[token] - up.max() - np.log(np.exp(up - up.max()).sum())
        mem.write(self.token, np.array([[token]]))
        mem.write(self.logprob, np.array([[logprob]]))

    def _changes(self, mem: CoreMemory) -> tuple[Edits | None, np.ndarray | None]:
        """Read this instruction's logit edits and grammar mask from memory. Returns (edits, mask).

        edits: an Edits with three arrays [k]: the token ids, factors and terms of the logits to change; None if the
        instruction has no regions for them. mask: uint32 [words], one bit for each token id; None if the instruction
        has no mask.
        """
        edits = None
        if self.ids is not None and self.factors is not None and self.terms is not None:
            edits = Edits(*(mem.read(r)[0] for r in (self.ids, self.factors, self.terms)))
        return edits, None if self.mask is None else mem.read(self.mask)[0].view(np.uint32)

    def cost(self, target: Target) -> Cost:
        filtered = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)
        cycles = float(sample_cycles(target.chip, self.logits.cols, filtered))
        changed = EDIT_OPS * (self.ids.cols if self.ids else 0) + (self.logits.cols if self.mask else 0)
        return Cost(cycles=cycles + float(vector_cycles(target.chip, changed)))
