"""How each row of a sequence is to be drawn: penalties, biases and the grammar, as the device takes them.

A pure function of the tokens so far, so that a draw comes out the same after preemption, replay or a wrong guess.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace

import numpy as np

from intaglio.batch import Edits, Sampling
from intaglio.runtime.request import SamplingParams, Scored
from intaglio.runtime.sequence import Sequence
from intaglio.runtime.tally import Tally


def edits(p: SamplingParams, prompt: Ids[int], output: Ids[int]) -> Edits | None:
    """What SamplingParams say is to be done to the logits after `prompt` and `output`."""
    if not p.edits_logits:
        return None
    tally = Tally(p, prompt)
    for token in output:
        tally.push(token)
    return tally.edits()


def rows(s: Sequence, drafts: Ids[int]) -> list[Sampling]:
    """How to draw the token after the last one, and the one after each of `drafts`, were they drawn."""
    p, drawn = s.request.params, list[Sampling]()
    if s.matcher is None and not p.edits_logits:
        return [s.plain] * (len(drafts) + 1)
    try:
        for i in range(len(drafts) + 1):
            edited = s.tally.edits() if s.tally and i == 0 else edits(p, s.prompt, [*s.output, *drafts[:i]])
            mask = s.matcher.mask() if s.matcher else None
            drawn.append(replace(s.plain, edits=edited, mask=mask))
            if s.matcher and i < len(drafts) and not s.matcher.advance(drafts[i]):
                raise ValueError(f"draft {drafts[i]} was proposed against the grammar")
    finally:
        if s.matcher and len(drawn) > 1:
            s.matcher.rollback(len(drawn) - 1)
    return drawn


def score(logits: np.ndarray, token: int, most: int) -> Scored:
    """A token's log-probability and the `most` likeliest under the softmax of one row; ties go to the lower id."""
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    likely = np.argpartition(-wide, most - 1)[:most] if 0 < most < len(wide) else np.arange(len(wide))[: most or 0]
    floor = wide[likely].min() if most else np.inf  # of equal ones at the edge, argpartition takes any
    likely = np.flatnonzero(wide >= floor)
    likely = likely[np.lexsort((likely, -wide[likely]))][:most]
    return Scored(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in likely))
