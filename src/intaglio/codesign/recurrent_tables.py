"""Modelled times of kernels with recurrent state, for tables of engines: short convolutions and gated delta rule.

These are formulas of the kernels that engines run. `intaglio simulate` times the ops by their work alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from intaglio.chips import Target
from intaglio.codesign.table_rows import CONVOLUTION, integers
from intaglio.silicon.kernels.experts import elementwise_seconds
from intaglio.silicon.timing import Timing

CHUNK = 64  # tokens that the chunked kernels of the gated delta rule process at a time
CHUNK_KERNELS = 6  # of them: sums of decays, products of keys, inverse, two for states, outputs
STATE_BYTES = 4  # of a value of the state


def convolution(on: Target, row: Mapping[str, str]) -> Timing:
    """The Timing of a causal convolution over some tokens, or of one step of it for each decoding sequence.

    A step also reads and writes the state, the last inputs of each channel. Some kernels process prompts row by row: a
    channel of a sequence at a time, which takes a core library.row_cycles.
    """
    tokens, channels, width = integers(row, "tokens", "channels", "conv_width")
    moved = 4.0 * tokens * channels
    if row["phase"] == "generation":
        moved += 4.0 * tokens * channels * (width - 1)
    seconds = elementwise_seconds(on, moved)
    if row["phase"] == "context":
        rows = int(row["batch"]) * channels / on.chip.cores
        seconds = max(seconds, on.library.launch_s + rows * on.library.row_cycles / on.chip.clock_hz)
    return Timing(seconds, {"HBM": moved / on.chip.hbm_rate}, moved, moved)


def delta_rule(on: Target, row: Mapping[str, str]) -> Timing:
    """The Timing of a call of the gated delta rule (Yang et al. 2025) that a row of a table describes.

    It is a step of decoding if the row's `phase` is "generation". Otherwise the call processes prompts in chunks of
    CHUNK tokens. The chunks of one head and sequence run one after another, since each needs the state after the one
    before.
    """
    batch, tokens, k_heads, dk, heads, dv = integers(
        row, "batch", "tokens", "n_k_heads", "head_k_dim", "n_v_heads", "head_v_dim"
    )
    chip, lib = on.chip, on.library
    state, values = dk * dv, 2.0 * tokens * (2 * k_heads * dk + 2 * heads * dv)  # bytes of q, k, v and the result
    if row["phase"] == "generation":
        moved = values + 2.0 * STATE_BYTES * batch * heads * state
        seconds = lib.launch_s + chip.constants.hbm_latency_s + moved / chip.hbm_rate
        return Timing(seconds, {"HBM": moved / chip.hbm_rate}, moved, moved)
    chunks = -(-tokens // batch // CHUNK)
    rate = chip.peak_flops("bf16") * lib.mxu_efficiency
    within = 2.0 * CHUNK * CHUNK * (2 * dk + 2 * dv + CHUNK)  # FLOPs of a chunk of a head apart from its state
    across = 6.0 * CHUNK * state
    jobs = batch * heads
    parallel = jobs * chunks * within / rate
    rounds = -(-jobs // chip.cores)
    serial = rounds * chunks * (across / (rate / chip.cores) + chip.constants.hbm_latency_s)
    moved = 3 * values + 4.0 * jobs * chunks * state
    hbm_s = moved / chip.hbm_rate
    seconds = CHUNK_KERNELS * lib.launch_s + max(hbm_s, parallel + serial)
    flops = jobs * chunks * (within + across)
    return Timing(seconds, {"HBM": hbm_s, "MXU": parallel + serial}, moved, moved, 0.0, flops, "bf16", jobs=float(jobs))


def recurrent(on: Target, row: Mapping[str, str]) -> Timing:
    """The Timing of a row's call, by the name of its kernel: a convolution, or the gated delta rule."""
    return convolution(on, row) if row["kernel"].startswith(CONVOLUTION) else delta_rule(on, row)
