"""Writes the ops of blocks with recurrent state: Mamba, Mamba-2, gated delta nets, Griffin, lightning attention.

Also of gated short convolutions. mixers.py describes the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from intaglio.models.decoder.mixers import (
    ConvMixer,
    DeltaMixer,
    LightningMixer,
    LruMixer,
    Mixer,
    ScanMixer,
    SsmMixer,
)
from intaglio.models.decoder.writer import Writer
from intaglio.ops import Decay, HeadLinear, Linear, LinearAttention, Map, Norm, RgLru, SelectiveScan, ShortConv
from intaglio.program.source import parts_of


def write_mixer(w: Writer, m: Mixer, i: int, x: str) -> str:
    """Add the ops of a layer's recurrent block or short convolution.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block; its class says which kind of block it is.
        i: number of the layer.
        x: name of the input tensor.
    """
    at, source = f"layers.{i}.{m.block}.", f"{w.d.prefix}layers.{i}.{m.block}."
    match m:
        case ConvMixer():
            return write_conv(w, m, at, source, x)
        case SsmMixer():
            return write_ssm(w, m, at, source, x)
        case ScanMixer():
            return (write_head_scans if m.heads else write_scan)(w, m, at, source, x)
        case DeltaMixer():
            return write_delta(w, m, at, source, x)
        case LruMixer():
            return write_lru(w, m, at, source, x)
        case LightningMixer():
            return write_lightning(w, m, at, source, x)


def write_conv(w: Writer, m: ConvMixer, at: str, source: str, x: str) -> str:
    """Add the ops of a gated short convolution (LFM2). Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, n = w.b, w.d.hidden
    joint = w.linear(at + "in_proj", x, 3 * n, n, source + "in_proj", m.bias)
    gate, out, value = w.views(joint, {at + "b": n, at + "c": n, at + "x": n})
    y = b.op(Map, at + "gated", value, b=gate, expr="a * b")
    y = short_conv(w, at + "conv", source + "conv", y, n, m.taps, m.bias)
    y = b.op(Map, at + "out", y, b=out, expr="a * b")
    return w.linear(at + "out_proj", y, n, n, source + "out_proj", m.bias)


def write_ssm(w: Writer, m: SsmMixer, at: str, source: str, x: str) -> str:
    """Add the ops of a Mamba-2 block. Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, inner, group = w.b, m.heads * m.head_dim, m.groups * m.state
    wide = inner + 2 * group
    joint = w.linear(at + "in_proj", x, inner + wide + m.heads, w.d.hidden, source + "in_proj", m.bias)
    if m.scales:
        widths = {"gate": inner, "x_in": inner, "b_in": group, "c_in": group, "dt": m.heads}
        parts = zip(w.views(joint, {at + n: width for n, width in widths.items()}), m.scales, strict=True)
        gate, *mixed, step = (w.scaled(f"{n}_scale", n, by) for n, by in parts)
        value, keys, queries = (
            convolved(w, f"{at}{n}_", source + "conv1d", part, width, m.taps, m.conv_bias, (start, wide))
            for n, part, width, start in zip(
                "xbc", mixed, (inner, group, group), (0, inner, inner + group), strict=True
            )
        )
    else:
        gate, together, step = w.views(joint, {at + "gate": inner, at + "mixed": wide, at + "dt": m.heads})
        y = convolved(w, at, source + "conv1d", together, wide, m.taps, m.conv_bias)
        value, keys, queries = w.views(y, {at + "x": inner, at + "b": group, at + "c": group})
    step, log_decay = decay(w, at, source, step, m.heads, m.low, m.high)
    skip = w.tensor(at + "skip", (m.heads,), source + "D", plain=True)
    y = b.op(
        LinearAttention, at + "scan", queries, keys, value, b.state(at + "state", m.heads, m.state, m.head_dim),
        decay=log_decay, beta=step, skip=skip, heads=m.heads,
    )  # fmt: skip
    y = gated_norm(w, m, at, source, y, gate)
    return w.linear(at + "out_proj", y, w.d.hidden, inner, source + "out_proj", m.out_bias)


def gated_norm(w: Writer, m: SsmMixer, at: str, source: str, y: str, gate: str) -> str:
    """Add the ops that gate and norm `y`, the result of a Mamba-2 block. Returns the name of the new tensor.

    Args:
        w: the Writer that adds the ops.
        m: description of the block. `m.norm` says whether the gate or the norm comes first; with "" there is no norm.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        y: name of the tensor that is gated and normed, [tokens, heads * head_dim].
        gate: name of the gate's tensor, of the same shape.
    """
    inner = m.heads * m.head_dim
    if m.norm != "first":
        y = w.b.op(Map, at + "gated", y, b=gate, expr="a * silu(b)")
    if m.norm:
        weight = w.weight(at + "norm", "weight", (inner,), source + "norm")
        y = w.b.op(Norm, at + "norm", y, weight=weight, eps=m.eps, group=inner // m.groups if m.groups > 1 else 0)
    return w.b.op(Map, at + "gated", y, b=gate, expr="a * silu(b)") if m.norm == "first" else y


def write_scan(w: Writer, m: ScanMixer, at: str, source: str, x: str) -> str:
    """Add the ops of a Mamba block. Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, n = w.b, m.inner
    joint = w.linear(at + "in_proj", x, 2 * n, w.d.hidden, source + "in_proj", m.bias)
    value, gate = w.views(joint, {at + "value": n, at + "gate": n})
    value = convolved(w, at, source + "conv1d", value, n, m.taps, m.conv_bias)
    selected = w.linear(at + "x_proj", value, m.rank + 2 * m.state, n, source + "x_proj")
    widths = {"dt": m.rank, "b": m.state, "c": m.state}
    parts = w.views(selected, {at + name: width for name, width in widths.items()})
    if m.eps:
        for j, (name, width) in enumerate(widths.items()):
            weight = (
                w.weight(f"{at}{name}_norm", "weight", (width,), f"{source}{name}_layernorm") if m.weights else None
            )
            parts[j] = b.op(Norm, f"{at}{name}_norm", parts[j], weight=weight, eps=m.eps)
    step = w.linear(at + "dt_proj", parts[0], n, m.rank, source + "dt_proj", bias=True)
    rate = w.tensor(at + "rate", (n, m.state), source + "A_log", plain=True)
    skip = w.tensor(at + "skip", (n,), source + "D", plain=True)
    state = b.state(at + "state", n, m.state)
    y = b.op(SelectiveScan, at + "scan", value, step, parts[1], parts[2], rate, skip, state)
    y = b.op(Map, at + "gated", y, b=gate, expr="a * silu(b)")
    return w.linear(at + "out_proj", y, w.d.hidden, n, source + "out_proj", m.bias)


def write_head_scans(w: Writer, m: ScanMixer, at: str, source: str, x: str) -> str:
    """Add the ops of a Mamba block with heads (Zamba). Returns the name of the result's tensor, [tokens, hidden].

    Each head is a Mamba block that has its own columns; the results of the heads are added.

    Args:
        w: the Writer that adds the ops.
        m: description of the block. Its in_proj and out_proj must have no biases.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, d, n = w.b, w.d.hidden, m.inner // m.heads
    sum_of = ""
    for h in range(m.heads):
        own, cut = f"{at}heads.{h}.", f"{h * n}:{(h + 1) * n}/{m.inner}"
        rows = f"{source}in_proj.weight|r{2 * h * n}:{2 * (h + 1) * n}/{2 * m.inner}"
        value, gate = (
            part_linear(w, own + name, x, (n, d), f"{rows}|r{j}:{j + 1}/2") for j, name in enumerate(("value", "gate"))
        )
        value = convolved(w, own, source + "conv1d", value, n, m.taps, m.conv_bias, (h * n, m.inner))
        wide = (m.rank, m.state, m.state)
        cuts = parts_of(f"{source}x_proj_weight|s{h}:{h + 1}/{m.heads}|m", wide)
        step, keys, queries = (
            part_linear(w, own + name, value, (width, n), part)
            for name, width, part in zip(("dt", "b", "c"), wide, cuts, strict=True)
        )
        bias = w.tensor(own + "dt_proj.bias", (n,), f"{source}dt_proj_bias|f|c{cut}", plain=True)
        step = part_linear(w, own + "dt_proj", step, (n, m.rank), f"{source}dt_proj_weight|m|r{cut}", bias)
        rate = w.tensor(own + "rate", (n, m.state), f"{source}A_log|m|r{cut}", plain=True)
        skip = w.tensor(own + "skip", (n,), f"{source}D|f|c{cut}", plain=True)
        y = b.op(
            SelectiveScan, own + "scan", value, step, keys, queries, rate, skip, b.state(own + "state", n, m.state)
        )
        y = b.op(Map, own + "gated", y, b=gate, expr="a * silu(b)")
        y = part_linear(w, own + "out_proj", y, (d, n), f"{source}out_proj.weight|c{cut}")
        sum_of = b.op(Map, own + "add", sum_of, b=y, expr="a + b") if sum_of else y
    return sum_of


def part_linear(w: Writer, site: str, x: str, shape: tuple[int, int], source: str, bias: str | None = None) -> str:
    """Add a linear layer whose weight is a part of a checkpoint tensor. Returns the name of its result, [tokens, rows].

    Args:
        w: the Writer that adds the op.
        site: name of the op.
        x: name of the input tensor, [tokens, columns].
        shape: (rows, columns) of the weight.
        source: the part of the tensor, in the notation of program/source.py.
        bias: name of the bias in the Program; None: no bias.
    """
    weight = w.tensor(f"{site}.weight", shape, source)
    return w.b.op(Linear, site, x, weight, bias=bias, x_format=w.x_format(weight))


def write_delta(w: Writer, m: DeltaMixer, at: str, source: str, x: str) -> str:
    """Add the ops of a gated delta net. Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, value, separate = w.b, m.heads * m.values, m.stored == "separate"
    if separate:
        q, k, v, gate, beta, step = separate_inputs(w, m, at, source, x)
    else:
        key = m.key_heads * m.keys
        y, gate, beta, step = (fused_inputs if m.stored == "fused" else inputs)(w, m, at, source, x)
        y = convolved(w, at, source + "conv1d", y, 2 * key + value, m.taps, bias=False)
        q, k, v = w.views(y, {at + "q": key, at + "k": key, at + "v": value})
    q, k = (
        b.op(Norm, f"{at}{n}_norm", y, norm="l2", eps=1e-6, group=m.keys) for n, y in zip("qk", (q, k), strict=True)
    )
    beta = b.op(Map, at + "beta", beta, expr="sigmoid(a)" + (f" * {m.beta!r}" if m.beta != 1 else ""))
    _, log_decay = decay(w, at, source, step, m.heads, width=m.heads * m.keys if m.by_key else 0, floor=m.floor)
    y = b.op(
        LinearAttention, at + "scan", q, k, v, b.state(at + "state", m.heads, m.keys, m.values), decay=log_decay,
        beta=beta, heads=m.heads, delta=True, scale=m.keys**-0.5,
    )  # fmt: skip
    norm, out = ("o_norm", "o_proj") if separate else ("norm", "out_proj")
    weight = w.weight(at + norm, "weight", (m.values,), source + norm)
    y = b.op(Norm, at + norm, y, weight=weight, eps=m.eps, group=m.values)
    y = b.op(Map, at + "gated", y, b=gate, expr=f"a * {m.gate}(b)")
    return w.linear(at + out, y, w.d.hidden, value, source + out)


def write_lru(w: Writer, m: LruMixer, at: str, source: str, x: str) -> str:
    """Add the ops of a recurrent block of Griffin, with its gated linear recurrence.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, n, dim = w.b, m.width, m.width // m.heads
    y = w.linear(at + "linear_y", x, n, w.d.hidden, source + "linear_y", bias=True)
    y = b.op(Map, at + "y_act", y, expr=f"{w.d.activation}(a)")
    value = w.linear(at + "linear_x", x, n, w.d.hidden, source + "linear_x", bias=True)
    value = short_conv(w, at + "conv", source + "conv_1d", value, n, m.taps, bias=True)
    gates, biases = [], []
    for name in ("input_gate", "recurrent_gate"):
        matrix = w.tensor(f"{at}{name}.weight", (m.heads, dim, dim), f"{source}rg_lru.{name}_weight|T", plain=True)
        gates.append(b.op(HeadLinear, at + name, value, matrix))
        biases.append(w.tensor(f"{at}{name}.bias", (n,), f"{source}rg_lru.{name}_bias|f", plain=True))
    rate = w.tensor(at + "rate", (n,), source + "rg_lru.recurrent_param", plain=True)
    h = b.op(RgLru, at + "lru", value, *gates, rate, *biases, b.state(at + "state", n))
    h = b.op(Map, at + "gated", h, b=y, expr="a * b")
    return w.linear(at + "linear_out", h, w.d.hidden, n, source + "linear_out", bias=True)


def write_lightning(w: Writer, m: LightningMixer, at: str, source: str, x: str) -> str:
    """Add the ops of lightning attention, a kind of linear attention.

    Returns the name of the result's tensor, [tokens, hidden].

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    b, n, dim = w.b, m.heads * m.head_dim, m.head_dim
    y = w.joined(at + "qkv_proj", x, 3 * n, parts_of(f"{source}qkv_proj.weight", (dim, dim, dim)))
    y = b.op(Map, at + "qkv_act", y, expr=f"{w.d.activation}(a)")
    q, k, v = w.views(y, {at + "q": n, at + "k": n, at + "v": n})
    rates = b.const(at + "rates", m.rates)
    y = b.op(
        LinearAttention, at + "scan", q, k, v, b.state(at + "state", m.heads, dim, dim), rates=rates, heads=m.heads
    )
    y = b.op(Norm, at + "norm", y, weight=w.weight(at + "norm", "weight", (n,), source + "norm"), eps=m.eps)
    gate = w.linear(at + "output_gate", x, n, w.d.hidden, source + "output_gate")
    y = b.op(Map, at + "gated", y, b=gate, expr="a * sigmoid(b)")
    return w.linear(at + "out_proj", y, w.d.hidden, n, source + "out_proj")


def inputs(w: Writer, m: DeltaMixer, at: str, source: str, x: str) -> list[str]:
    """Add the input projections of a gated delta net. Returns the names of four tensors as a list.

    - q, k and v side by side, [tokens, 2 * key_heads * keys + heads * values]
    - z, the gate, [tokens, heads * values]
    - b, from which beta is computed, [tokens, heads]
    - a, from which the decay is computed, [tokens, heads]

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    value = m.heads * m.values
    widths = {"qkv": 2 * m.key_heads * m.keys + value, "z": value, "b": m.heads, "a": m.heads}
    return [w.linear(f"{at}in_proj_{n}", x, width, w.d.hidden, f"{source}in_proj_{n}") for n, width in widths.items()]


def fused_inputs(w: Writer, m: DeltaMixer, at: str, source: str, x: str) -> list[str]:
    """Add the input projections of a gated delta net whose checkpoint has only two weights for them (Qwen3-Next).

    Returns the names of four tensors as a list: q, k and v side by side; the gate z; b (for beta); a (for the decay).
    Their shapes are as in inputs(). The weight in_proj_qkvz has the rows of q, k, v and z for the first key head, then
    for the next key head, and so on. The weight in_proj_ba has the rows of b and a in the same order of heads.

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    shared = m.heads // m.key_heads  # value heads of a key head
    value = shared * m.values
    *qkv, gate = parts_of(f"{source}in_proj_qkvz.weight", (m.keys, m.keys, value, value))
    beta, step = parts_of(f"{source}in_proj_ba.weight", (shared, shared))
    return [
        w.joined(at + "in_proj_qkv", x, m.key_heads * (2 * m.keys + value), qkv),
        w.joined(at + "in_proj_z", x, m.heads * m.values, [gate]),
        w.joined(at + "in_proj_b", x, m.heads, [beta]),
        w.joined(at + "in_proj_a", x, m.heads, [step]),
    ]


def separate_inputs(w: Writer, m: DeltaMixer, at: str, source: str, x: str) -> list[str]:
    """Add the input projections of a gated delta net, stored as one matrix per projection (OLMo Hybrid, Kimi).

    Returns the names of six tensors as a list:

    - q and k, [tokens, key_heads * keys], and v, [tokens, heads * values], each after its convolution
    - the gate, [tokens, heads * values]
    - b, from which beta is computed, [tokens, heads]
    - the input of the decay, [tokens, heads], or [tokens, heads * keys] if m.by_key is True

    Args:
        w: the Writer that adds the ops.
        m: description of the block.
        at: prefix of the ops' names in the Program.
        source: prefix of the modules' names in the checkpoint.
        x: name of the input tensor.
    """
    hidden, key, value = w.d.hidden, m.key_heads * m.keys, m.heads * m.values
    out, first = [], 0
    for n, width in zip("qkv", (key, key, value), strict=True):
        y = w.linear(f"{at}{n}_proj", x, width, hidden, f"{source}{n}_proj")
        parts = held_in(m.conv_rows, range(first, first + width), [f"{source}{n}_conv1d.weight|m" for n in "qkv"])
        out.append(convolved(w, f"{at}{n}_", f"{source}{n}_conv1d", y, width, m.taps, bias=False, sources=parts))
        first += width
    widths = {"g": value, "b": m.heads, "f" if m.by_key else "a": m.heads * (m.keys if m.by_key else 1)}
    for n, width in widths.items():
        if m.rank and n != "b":
            y = w.linear(f"{at}{n}_a_proj", x, m.rank, hidden, f"{source}{n}_a_proj")
            out.append(w.linear(f"{at}{n}_b_proj", y, width, m.rank, f"{source}{n}_b_proj"))
        else:
            out.append(w.linear(f"{at}{n}_proj", x, width, hidden, f"{source}{n}_proj"))
    return out


def held_in(lengths: Sequence[int], rows: range, sources: Sequence[str]) -> list[str]:
    """Find rows of a matrix that a checkpoint stores as several tensors, one below the other.

    Returns a list of texts "TENSOR|rA:B/N", in order. Each means the rows A to B (without B) of the N rows of one
    tensor. The list is empty if `lengths` is (), which means that the matrix is not stored in this way.

    Args:
        lengths: number of rows of each tensor.
        rows: the rows of the matrix to find.
        sources: names of the tensors.
    """
    found, first = list[str](), 0
    for source, n in zip(sources, lengths, strict=False):
        start, stop = max(rows.start - first, 0), min(rows.stop - first, n)
        if start < stop:
            found.append(f"{source}|r{start}:{stop}/{n}")
        first += n
    return found


def decay(
    w: Writer, at: str, source: str, step: str, heads: int, low: float = 0.0, high: float = 0.0, width: int = 0,
    floor: float = 0.0,
) -> tuple[str, str]:  # fmt: skip
    """Add the op Decay of a recurrent block. Returns the names of two tensors: (dt, log decay).

    dt = clamp(softplus(x + dt_bias)) and log decay = -exp(A_log) * dt, where A_log and dt_bias are tensors of the
    checkpoint. Both results are as wide as x.

    Args:
        w: the Writer that adds the op.
        at: prefix of the op's name in the Program.
        source: prefix of the tensors' names in the checkpoint.
        step: name of the tensor x, [tokens, heads], or [tokens, width] if `width` is given.
        heads: number of heads.
        low: lower limit of dt.
        high: upper limit of dt; 0: none.
        width: columns of x, if each head has several; 0: each head has one. With a width, A_log may have any shape of
            `heads` values.
        floor: lower bound of the log decay, below 0; the log decay is then floor * sigmoid(exp(A_log) * (x + dt_bias)).
            0: no lower bound; the log decay is -exp(A_log) * dt.
    """
    rate = w.tensor(at + "rate", (heads,), source + "A_log" + ("|f" if width else ""), plain=True)
    bias = w.tensor(at + "dt_bias", (width or heads,), source + "dt_bias", plain=True)
    name = w.b.op(Decay, at + "step", step, rate, bias=bias, low=low, high=high, floor=floor)
    return name, f"{name}.decay"


def convolved(
    w: Writer, at: str, source: str, x: str, width: int, taps: int, bias: bool, part: tuple[int, int] | None = None,
    sources: Sequence[str] = (),
) -> str:  # fmt: skip
    """Add a short causal convolution over tokens, and the activation silu.

    Returns the name of the result's tensor, [tokens, width].

    Args:
        w: the Writer that adds the ops.
        at: prefix of the ops' names in the Program.
        source: name of the convolution's module in the checkpoint.
        x: name of the input tensor, [tokens, width].
        width: number of channels; each channel is convolved separately.
        taps: tokens that the convolution reads: the current token and the taps - 1 tokens before it.
        bias: True if the convolution has a bias.
        part: (first channel, number of all channels of the module), if only some of the module's channels are used;
            None: all are used.
        sources: parts of checkpoint tensors that make up the weight, in the notation of program/source.py; (): the
            module's own weight.
    """
    y = short_conv(w, at + "conv", source, x, width, taps, bias, part, sources)
    return w.b.op(Map, at + "conv_act", y, expr="silu(a)")


def short_conv(
    w: Writer, site: str, source: str, x: str, width: int, taps: int, bias: bool, part: tuple[int, int] | None = None,
    sources: Sequence[str] = (),
) -> str:  # fmt: skip
    """Add a short causal convolution over tokens, with the state that keeps the last tokens of each sequence.

    Returns the name of the result's tensor, [tokens, width].

    Args:
        w: the Writer that adds the op.
        site: name of the op in the Program.
        source: name of the convolution's module in the checkpoint.
        x: name of the input tensor, [tokens, width].
        width: number of channels; each channel is convolved separately.
        taps: tokens that the convolution reads: the current token and the taps - 1 tokens before it.
        bias: True if the convolution has a bias.
        part: (first channel, number of all channels of the module), if only some of the module's channels are used;
            None: all are used.
        sources: parts of checkpoint tensors that make up the weight, in the notation of program/source.py; (): the
            module's own weight.
    """
    cut = f"{part[0]}:{part[0] + width}/{part[1]}" if part else ""
    found = sources or [f"{source}.weight|m" + (f"|r{cut}" if cut else "")]
    weight = w.tensor(f"{site}.weight", (width, taps), found, plain=True)
    more = {}
    if bias:
        more["bias"] = w.tensor(f"{site}.bias", (width,), f"{source}.bias" + (f"|c{cut}" if cut else ""), plain=True)
    return w.b.op(ShortConv, site, x, weight, w.b.state(f"{site}.state", taps - 1, width), **more)
