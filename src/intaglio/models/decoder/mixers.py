"""Descriptions of the blocks with recurrent state ("mixers") that replace attention in a layer; plain data.

recurrent.py writes their ops.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvMixer:
    """Description of a gated short convolution (LFM2).

    The block computes out_proj(c * conv(b * x)), where in_proj gives b, c and x.

    Attributes:
        taps: tokens that the convolution reads: the current token and the taps - 1 tokens before it.
        bias: True if projections and convolution have biases.
        block: name of the block's module in a layer of the checkpoint.
    """

    taps: int
    bias: bool
    block: str = "conv"


@dataclass(frozen=True, kw_only=True)
class SsmMixer:
    """Description of a Mamba-2 block.

    The projection in_proj gives gate, x, B, C and dt (step size); x, B and C go through a short convolution and silu.

    Attributes:
        heads: number of heads.
        head_dim: columns of x per head.
        groups: number of groups of heads; the heads of a group share B and C.
        state: columns of B and C per group.
        taps: tokens that the convolution reads.
        eps: epsilon of the norm.
        norm: order of norm and gate: "gated" (times silu(gate), then normed), "first" (normed, then times silu(gate))
            or "" (times silu(gate), no norm). The columns of each group are normed separately.
        bias: True if the projections have biases.
        conv_bias: True if the convolution has a bias.
        out_bias: True if out_proj has a bias.
        low: lower limit of dt; smaller values become `low`.
        high: upper limit of dt; larger values become `high`. 0: no limit.
        scales: five factors by which gate, x, B, C and dt are multiplied after in_proj (Falcon-H1); (): none.
        block: name of the block's module in a layer of the checkpoint.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    eps: float
    norm: str = "gated"
    bias: bool = False
    conv_bias: bool = True
    out_bias: bool = False
    low: float = 0.0
    high: float = 0.0
    scales: tuple[float, ...] = ()
    block: str = "mamba"


@dataclass(frozen=True, kw_only=True)
class ScanMixer:
    """Description of a Mamba block.

    The projection in_proj gives x and gate; x goes through a short convolution and silu. From x, x_proj gives dt (the
    step size), B and C; dt_proj projects dt to as many columns as x.

    Attributes:
        inner: columns of x.
        state: columns of B and C.
        rank: columns of dt before dt_proj (dt_rank).
        taps: tokens that the convolution reads.
        eps: epsilon of the RMS norms of dt, B and C; 0: they are not normed.
        weights: True if these norms have weights.
        bias: True if in_proj and out_proj have biases.
        conv_bias: True if the convolution has a bias.
        heads: number of heads (Zamba); 0: no heads. Each head is a Mamba block of inner / heads columns with its own
            x_proj and dt_proj. The checkpoint stores these as one tensor for all heads, and in in_proj the rows for x
            and for gate alternate.
        block: name of the block's module in a layer of the checkpoint.
    """

    inner: int
    state: int
    rank: int
    taps: int
    eps: float = 0.0
    weights: bool = False
    bias: bool = False
    conv_bias: bool = True
    heads: int = 0
    block: str = "mixer"


@dataclass(frozen=True, kw_only=True)
class DeltaMixer:
    """Description of a gated delta net.

    q, k and v go through a short convolution and silu; q and k are normed to length 1. Two more projections give beta
    (b) and the decay (a) of each head, or of each key column (Kimi delta attention).

    Attributes:
        key_heads: heads of q and k.
        heads: heads of v.
        keys: columns of a key head.
        values: columns of a value head.
        taps: tokens that the convolution reads.
        eps: epsilon of the norm of the result, which comes before the gate.
        stored: how the checkpoint stores the projections. "parts": in_proj_qkv, in_proj_z, in_proj_b and in_proj_a.
            "fused": q, k, v and gate (z) in in_proj_qkvz, and b and a in in_proj_ba, each grouped by key head
            (Qwen3-Next). "separate": q_proj, k_proj and v_proj, each with a convolution of its own (q_conv1d), and
            g_proj (the gate), b_proj, a_proj and o_proj.
        conv_rows: numbers of rows of the tensors q_conv1d, k_conv1d and v_conv1d, if they differ from the numbers of
            columns of q, k and v; (): they do not differ. Only for stored="separate".
        beta: factor by which beta is multiplied after the sigmoid. The update multiplies the state's old value for a
            key by 1 - beta, which may be negative if the factor is 2.
        gate: function of the gate that multiplies the normed result, "silu" or "sigmoid".
        by_key: True if each key column has a decay (f_proj), False if each head has one (a_proj).
        rank: columns between the two linear layers that compute the gate (g_a_proj, g_b_proj), and between the two that
            compute the decay (f_a_proj, f_b_proj), as in Kimi. Needs by_key. 0: one linear layer computes each.
        floor: lower bound of the log decay, a negative number: the log decay is then floor * sigmoid(...) (see the op
            Decay). 0: no lower bound.
        block: name of the block's module in a layer of the checkpoint.
    """

    key_heads: int
    heads: int
    keys: int
    values: int
    taps: int
    eps: float
    stored: str = "parts"
    conv_rows: tuple[int, ...] = ()
    beta: float = 1.0
    gate: str = "silu"
    by_key: bool = False
    rank: int = 0
    floor: float = 0.0
    block: str = "linear_attn"


@dataclass(frozen=True, kw_only=True)
class LruMixer:
    """Description of a recurrent block of Griffin.

    The block computes linear_out(lru(conv(linear_x(x))) * activation(linear_y(x))) from its input x. All linear layers
    and the convolution have biases.

    Attributes:
        width: columns of the recurrence (lru).
        heads: number of blocks of columns. Each block has its own matrices for the gates of the recurrence.
        taps: tokens that the convolution reads.
        block: name of the block's module in a layer of the checkpoint.
    """

    width: int
    heads: int
    taps: int
    block: str = "temporal_block"


@dataclass(frozen=True, kw_only=True)
class LightningMixer:
    """Description of lightning attention: linear attention with a constant decay per head, a norm, and a sigmoid gate.

    Attributes:
        heads: number of heads.
        head_dim: columns of a head.
        rates: log decay of each head.
        eps: epsilon of the norm.
        block: name of the block's module in a layer of the checkpoint.
    """

    heads: int
    head_dim: int
    rates: tuple[float, ...]
    eps: float = 1e-6
    block: str = "self_attn"


Mixer = ConvMixer | SsmMixer | ScanMixer | DeltaMixer | LruMixer | LightningMixer
