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
    """Returns the changes (Edits) to apply to the logits before the next token is sampled.

    Returns None if the request changes no logits. The changes come from the penalties and logit biases in the sampling
    parameters `p`. The next token is the token after `prompt` and `output`, which are token ids.
    """
    if not p.edits_logits:
        return None
    penalties = Penalties(p, prompt)
    for token in output:
        penalties.push(token)
    return penalties.edits()


def sampling_rows(s: Sequence, drafts: TokenIds) -> list[Sampling]:
    """Returns a list of Samplings, the sampling parameters of the rows of logits from which a sequence samples.

    The list has len(drafts) + 1 items: one for the row of the sequence's last token, then one for the row of each draft
    token, in order. Raises ValueError if the grammar does not allow a draft.

    s: the sequence. drafts: the ids of its draft tokens.
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
    """Returns a Scored: the log-probability and rank of a token, and the log-probabilities of other tokens.

    Args:
        logits: logits at the token's position, [vocabulary]. Log-probabilities are the logarithm of their softmax.
        token: id of the token.
        top: number of likeliest tokens to include. Of equal logits, the lower id comes first.
        ids: if not empty, include these token ids instead of the likeliest.
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
