"""Sampling of the next token: logit edits and grammar mask, then greedy, or temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch, Sampling
from intaglio.ops.op import Op, Results, Tensors, Value, Work, array, operand, result

MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """Returns a pseudo-random number in [0, 1) that depends only on `seed` and `position`.

    It is the output of the generator splitmix64 (Steele et al. 2014).
    """
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & MASK
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        z = ((z ^ (z >> shift)) * multiplier) & MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def kept_mass(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Returns the sampling weight of each token id, float64 [vocabulary]; 0 for ids that the filters drop.

    The weight of an id with logit l is exp((l - max) / temperature), where max is the largest logit. The temperature
    must be above 0. The filters are applied in the order of transformers' generate(): top-k, then top-p over the ids
    that top-k kept, then min-p. Of ids with equal logits, the lower id is kept first.

    logits: [vocabulary]. s: temperature and filters.
    """
    wide = logits.astype(np.float64)
    p = np.exp((wide - wide.max()) / s.temperature)
    if s.top_k or s.top_p < 1:
        order = np.argsort(-wide, kind="stable")[: s.top_k or None]
        if s.top_p < 1:
            mass = np.cumsum(p[order])
            order = order[: int(np.searchsorted(mass, s.top_p * mass[-1])) + 1]
        kept = np.zeros(len(p), bool)
        kept[order] = True
        p = np.where(kept, p, 0)
    return np.where(p >= s.min_p, p, 0)  # the largest p is 1


def edited(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Returns the logits after penalties, logit bias and grammar mask, float32 [vocabulary].

    The token is sampled from these logits. logits: the model's logits, [vocabulary]. s: `s.edits` holds penalties and
    logit bias, or is None. `s.mask` has a bit for each token id, or is None; an id whose bit is 0 gets -inf.
    """
    if s.edits is not None:
        at, scale, add = s.edits.ids, s.edits.scale, s.edits.add
        x = logits[at]
        logits = logits.copy()
        logits[at] = np.where(x > 0, x / scale, x * scale) + add
    if s.mask is not None:
        allowed = np.unpackbits(s.mask.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        logits = np.where(allowed, logits, np.float32(-np.inf))
    return logits


def draw(logits: np.ndarray, s: Sampling, position: int) -> int:
    """Returns the token id sampled from logits with the settings `s`, an int; -1 if the logits are unusable.

    Logits are unusable if one of them is NaN, or if the largest is infinite, before or after edits and mask.

    Greedy sampling (temperature 0) takes the lower id of equal largest logits. Otherwise the ids' sampling weights are
    added up in ascending order of id, and the result is the first id at which the sum passes the fraction
    uniform(s.seed, position) of the total.

    Args:
        logits: float32 [vocabulary].
        s: the Sampling (temperature, filters, edits and mask).
        position: position of the new token in its sequence.
    """
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        return -1
    logits = edited(logits, s)
    if not np.isfinite(logits.max()):
        return -1
    if s.temperature == 0:
        return int(logits.argmax())
    mass = np.cumsum(kept_mass(logits, s))
    return int(np.searchsorted(mass, uniform(s.seed, position) * mass[-1], side="right"))


@dataclass(frozen=True, kw_only=True)
class Sample(Op, kind="sample"):
    """Op that samples a token from each of R rows of logits.

    tokens[r] is sampled from logits[r] with the settings batch.sampling[r]. logits is f32 [R, vocabulary], tokens int32
    [R], logprobs f32 [R]. logprobs[r] is the token's natural log-probability under the softmax of the model's logits,
    before penalties, bias and mask. If a row has a NaN, or its largest logit is infinite (before or after edits and
    mask), its token is -1 and its logprob is NaN. The random numbers depend only on the seed in the row's settings and
    on the new token's position in its sequence.
    """

    logits: str = operand()
    tokens: str = result()
    logprobs: str = result()

    def shapes(self, t: Tensors) -> Results:
        rows, _ = self.rows_cols(t, self.logits)
        return {self.tokens: ((rows,), "i32"), self.logprobs: ((rows,), "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        logits = array(v, self.logits)
        at = batch.positions[batch.rows] + 1
        pairs = zip(logits, batch.sampling, at, strict=True)
        tokens = np.array([draw(row, s, int(p)) for row, s, p in pairs], np.int32)
        logprobs = np.full(len(tokens), np.nan, np.float32)
        for r, token in enumerate(tokens):
            if token >= 0:
                wide = logits[r].astype(np.float64)
                top = wide.max()
                logprobs[r] = wide[token] - top - np.log(np.exp(wide - top).sum())
        return {self.tokens: tokens, self.logprobs: logprobs}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 4 * (t[self.logits].nbytes(batch.sizes) // 4))
