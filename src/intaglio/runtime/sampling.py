"""Per-row sampling inputs for the device: penalties, logit bias, grammar mask; and the log-probabilities of a row.

Sampling inputs are a pure function of the tokens so far, so preemption, replay and rejected drafts do not change which
token is sampled.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from intaglio.batch import Edits, Sampling
from intaglio.runtime.penalties import Penalties
from intaglio.runtime.request import SamplingParams, Scored, TokenIds
from intaglio.runtime.sequence import Sequence


def edits(p: SamplingParams, prompt: TokenIds, output: TokenIds) -> Edits | None:
    """The Edits of the logits from which the token after `prompt` and `output` is sampled; None if nothing edits them.

    They are the penalties and logit biases of the sampling parameters `p`.
    """
    if not p.edits_logits:
        return None
    penalties = Penalties(p, prompt)
    for token in output:
        penalties.push(token)
    return penalties.edits()


def sampling_rows(s: Sequence, drafts: TokenIds) -> list[Sampling]:
    """The sampling parameters of the rows from which a sequence samples, as a list of len(drafts) + 1 Samplings.

    The first is for the row of the sequence's last token, the others for the rows of the draft tokens, in order. Raises
    ValueError if the grammar does not allow a draft.
    """
    p, rows = s.request.params, list[Sampling]()
    if s.matcher is None and s.token_filter is None and not p.edits_logits:
        return [s.base_sampling] * (len(drafts) + 1)
    try:
        for i in range(len(drafts) + 1):
            edited = s.penalties.edits() if s.penalties and i == 0 else edits(p, s.prompt, [*s.output, *drafts[:i]])
            mask = s.matcher.mask() if s.matcher else None
            if s.token_filter:
                mask = s.token_filter.mask(s.output, drafts[:i], mask)
            rows.append(replace(s.base_sampling, edits=edited, mask=mask))
            if s.matcher and i < len(drafts) and not s.matcher.advance(drafts[i]):
                raise ValueError(f"draft {drafts[i]} was proposed against the grammar")
    finally:
        if s.matcher and len(rows) > 1:
            s.matcher.rollback(len(rows) - 1)
    return rows


def score(logits: np.ndarray, token: int, top: int, ids: TokenIds = ()) -> Scored:
    """Log-probability and rank of a token, and the log-probabilities of the likeliest tokens, as a Scored.

    logits: the row [vocabulary] at the token's position. Log-probabilities are those of its softmax. top: number of the
    likeliest tokens to include; of equal logits the lower id comes first. ids: if given, include these tokens instead.
    """
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    rank = 1 + int((wide > wide[token]).sum())
    if ids:
        return Scored(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in ids), rank)
    likely = np.argpartition(-wide, top - 1)[:top] if 0 < top < len(wide) else np.arange(len(wide))[: top or 0]
    floor = wide[likely].min() if top else np.inf  # argpartition takes any of the logits equal to the lowest it keeps
    likely = np.flatnonzero(wide >= floor)
    likely = likely[np.lexsort((likely, -wide[likely]))][:top]
    return Scored(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in likely), rank)
