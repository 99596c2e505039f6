"""The tokens that penalties look at, counted as they come: what is to be done to the logits, without starting over."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from intaglio.batch import Edits
from intaglio.runtime.request import SamplingParams


class Tally:
    """One row an id that any penalty or bias touches, in the order in which they were met."""

    def __init__(self, p: SamplingParams, prompt: Iterable[int]) -> None:
        self.p = p
        self.repeated = p.repetition_penalty != 1
        self.counted = bool(p.presence_penalty or p.frequency_penalty)
        first = sorted((set(prompt) if self.repeated else set()) | p.logit_bias.keys())
        self.place = {id: i for i, id in enumerate(first)}
        self.ids = np.array(first, np.int32)
        self.bias = np.array([p.logit_bias.get(id, 0.0) for id in first])
        self.counts = np.zeros(len(first), np.int32)
        told = set(prompt) if self.repeated else set()
        self.scale = np.array([p.repetition_penalty if id in told else 1.0 for id in first], np.float32)

    def push(self, token: int) -> None:
        """Count one more token of the output."""
        if not (self.repeated or self.counted):
            return
        at = self.place.setdefault(token, len(self.place))
        if at == len(self.ids):
            self._grow()
        self.ids[at] = token
        self.counts[at] += 1
        if self.repeated:
            self.scale[at] = self.p.repetition_penalty

    def edits(self) -> Edits:
        """For the row after the last token."""
        n, p = len(self.place), self.p
        add = self.bias[:n] - p.presence_penalty * (self.counts[:n] > 0) - p.frequency_penalty * self.counts[:n]
        return Edits(self.ids[:n].copy(), self.scale[:n].copy(), add.astype(np.float32))

    def _grow(self) -> None:
        """Room for as many ids again."""
        more = max(8, len(self.ids))
        self.ids, self.counts = (np.append(a, np.zeros(more, np.int32)) for a in (self.ids, self.counts))
        self.bias = np.append(self.bias, np.zeros(more))
        self.scale = np.append(self.scale, np.ones(more, np.float32))
