"""Tensors of a checkpoint that no Program reads: for each, the reason why it cannot change results.

Most are known by name; others by their values, such as a bias of zeros or a causal mask.
"""

from __future__ import annotations

import re

import numpy as np

from intaglio.formats import Quantised
from intaglio.models.files.checkpoint import Checkpoint

BY_NAME = {  # what a name ends with, or is, and why its tensor has no use
    r"rotary_(pos_)?emb\.(\w+_)?(inv_freq|cos_cached|sin_cached)$":
        "a table of rope that older versions saved; computed here",
    r"\.(k|v|kv|q|prob|prob_output|k_cache|v_cache|kv_cache)_(scale|zero_point)$":
        "a scale of queries, of attention weights, or of a K/V cache in another format; none is rounded so here",
    r"\.(input|output|activation)_(scale|zero_point|scale_ub|global_scale)$|\.input_scale_ub$|\.act_scales?$":
        "a scale of activations; they are rounded here by their own values, if at all",
    r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$":
        "a decay of lightning attention; computed here",
    r"(^|\.)(position_ids|num_batches_tracked)$": "a counter that computes nothing",
    r"^(v_head|value_head|score|classifier|reward_head|qa_outputs)\.": "a head for another task",
    r"observer\.|fake_quant": "a statistic of quantisation-aware training",
}  # fmt: skip
MASK = re.compile(r"(attn|attention)\.(bias|causal_mask|mask)$")
MASKED = re.compile(r"(attn|attention)\.masked_bias$")
LIMIT = 1 << 24  # values of a tensor that are looked at


def judge_tensor(checkpoint: Checkpoint, name: str) -> str:
    """Returns the reason, as text, why an unread tensor cannot change results; "" if it might.

    checkpoint: the checkpoint. name: name of a tensor of the checkpoint that the port does not read.
    """
    for pattern, why in BY_NAME.items():
        if re.search(pattern, name):
            return why
    if MASKED.search(name) and checkpoint.shape(name) in ((), (1,)):
        return "the score of masked positions in older versions; they have none here"
    size = int(np.prod(checkpoint.shape(name), dtype=object))
    if size == 0:
        return "holds no values"
    if size > LIMIT or not name.endswith(("bias", "mask")) or not checkpoint.readable(name):
        return ""
    x = checkpoint.read(name)
    if isinstance(x, Quantised):
        return ""
    square = x.ndim >= 2 and x.shape[-1] == x.shape[-2] and size == x.shape[-1] ** 2
    if MASK.search(name) and square and np.array_equal(x.reshape(x.shape[-2:]) != 0, np.tri(x.shape[-1], dtype=bool)):
        return "a causal mask, which attention has here without a table"
    return "a bias of zeros" if name.endswith("bias") and not np.any(x) else ""
