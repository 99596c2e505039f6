"""Penalties and logit biases of one sequence: keeps its token counts and computes the logit edits from them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from intaglio.batch import Edits
from intaglio.runtime.request import SamplingParams


class Penalties:
    """Computes how penalties and logit biases change the logits of one sequence.

    The object counts the sequence's output tokens, because penalties depend on them.
    """

    def __init__(self, p: SamplingParams, prompt: Iterable[int]) -> None:
        self.p = p
        self.repeated = p.repetition_penalty != 1
        self.counted = bool(p.presence_penalty or p.frequency_penalty)
        in_prompt = set(prompt) if self.repeated else set()
        first = sorted(in_prompt | p.logit_bias.keys())
        self.row = {id: i for i, id in enumerate(first)}
        self.ids = np.array(first, np.int32)
        self.bias = np.array([p.logit_bias.get(id, 0.0) for id in first])
        self.counts = np.zeros(len(first), np.int32)
        self.scale = np.array([p.repetition_penalty if id in in_prompt else 1.0 for id in first], np.float32)

    def push(self, token: int) -> None:
        """Count one more output token, if the request has a penalty that depends on output tokens. Returns nothing."""
        if not (self.repeated or self.counted):
            return
        row = self.row.setdefault(token, len(self.row))
        if row == len(self.ids):
            self._grow()
        self.ids[row] = token
        self.counts[row] += 1
        if self.repeated:
            self.scale[row] = self.p.repetition_penalty

    def edits(self) -> Edits:
        """Returns the changes (Edits) to apply to the logits before the next token is sampled.

        They are a factor and an addend for each token id that has a penalty or a bias.
        """
        n, p = len(self.row), self.p
        add = self.bias[:n] - p.presence_penalty * (self.counts[:n] > 0) - p.frequency_penalty * self.counts[:n]
        return Edits(self.ids[:n].copy(), self.scale[:n].copy(), add.astype(np.float32))

    def _grow(self) -> None:
        """Double the length of the arrays, or add 8 rows if that is more. Returns nothing.

        The arrays have one row for each token id that has a penalty or a bias.
        """
        more = max(8, len(self.ids))
        self.ids, self.counts = (np.append(a, np.zeros(more, np.int32)) for a in (self.ids, self.counts))
        self.bias = np.append(self.bias, np.zeros(more))
        self.scale = np.append(self.scale, np.ones(more, np.float32))
