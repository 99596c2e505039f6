"""Modelled times of kernels with recurrent state, for tables of engines: short convolutions and gated delta rule.

These are formulas of the kernels that engines run. `intaglio simulate` times the ops by their work alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from intaglio.chips import Target
from intaglio.codesign.table_rows import CONVOLUTION, integers
from intaglio.silicon.kernels.experts import core_rate, elementwise_seconds
from intaglio.silicon.timing import Timing

CHUNK = 64  # tokens that the chunked kernels of the gated delta rule process at a time
STATE_BYTES = 4  # of a value of the state


def convolution(on: Target, row: Mapping[str, str]) -> Timing:
    """The modelled Timing of one call of a short causal convolution, as used in state-space layers.

    In phase "context" the call processes prompts. One core then processes one channel of one sequence at a time. This
    takes library.row_cycles cycles, and the time to move the channel's bytes at core_bytes_per_cycle. In phase
    "generation" the call processes one token of each decoding sequence, and also reads and writes the state: the last
    inputs of each channel.

    row: a row of a measured table, {column: text}, with phase, batch (number of sequences), tokens (of all sequences),
    channels and conv_width.
    """
    tokens, channels, width = integers(row, "tokens", "channels", "conv_width")
    moved = 4.0 * tokens * channels
    if row["phase"] == "generation":
        moved += 4.0 * tokens * channels * (width - 1)
    seconds = elementwise_seconds(on, moved)
    if row["phase"] == "context":
        rows = int(row["batch"]) * channels / on.chip.cores
        rows_s = rows * on.library.row_cycles / on.chip.clock_hz
        seconds = max(seconds, on.library.launch_s + rows_s + moved / core_rate(on))
    return Timing(seconds, {"HBM": moved / on.chip.hbm_rate}, moved, moved)


def delta_rule(on: Target, row: Mapping[str, str]) -> Timing:
    """The modelled Timing of one call of the gated delta rule (Yang et al. 2025), a linear-attention recurrence.

    In phase "generation" the call processes one token of each decoding sequence. In phase "context" it processes
    prompts in chunks of CHUNK tokens. The chunks of one head of a sequence run one after another, because each chunk
    starts from the state that the previous chunk leaves. The library's `scan_kernels` is the number of kernels that a
    call in phase "context" launches. Several kernels pass their results on through HBM. With one kernel, a core
    processes one head of a sequence from beginning to end, after row_cycles cycles of setup.

    row: a row of a measured table, {column: text}, with phase, batch, tokens, n_k_heads, head_k_dim, n_v_heads and
    head_v_dim.
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
    rounds = -(-jobs // chip.cores)
    serial = rounds * chunks * (across / (rate / chip.cores) + chip.constants.hbm_latency_s)
    if lib.scan_kernels == 1:
        parallel = rounds * (chunks * within / (rate / chip.cores) + lib.row_cycles / chip.clock_hz)
        moved = values + 2.0 * STATE_BYTES * jobs * state
    else:
        parallel = jobs * chunks * within / rate
        moved = 3 * values + 4.0 * jobs * chunks * state
    hbm_s = moved / min(chip.hbm_rate, core_rate(on))
    seconds = lib.scan_kernels * lib.launch_s + max(hbm_s, parallel + serial)
    flops = jobs * chunks * (within + across)
    return Timing(seconds, {"HBM": hbm_s, "MXU": parallel + serial}, moved, moved, 0.0, flops, "bf16", jobs=float(jobs))


def recurrent(on: Target, row: Mapping[str, str]) -> Timing:
    """The modelled Timing of the recurrent layer's kernel call that a row of a measured table describes.

    It is convolution() if the text in column `kernel` begins with "causal_conv1d", otherwise delta_rule().
    """
    return convolution(on, row) if row["kernel"].startswith(CONVOLUTION) else delta_rule(on, row)
