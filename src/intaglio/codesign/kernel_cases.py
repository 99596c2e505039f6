"""Random calls of every chip kernel that runs on one chip, to compare closed form and simulator (agreement.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch, Chunk, bind
from intaglio.chips import Target
from intaglio.ops import (
    Attend,
    AttendPooled,
    ChooseKeys,
    Concat,
    Decay,
    Embed,
    Experts,
    HeadLinear,
    KvWrite,
    Linear,
    LinearAttention,
    Map,
    MixStreams,
    Moment,
    Norm,
    Op,
    Permute,
    PoolKeys,
    RgLru,
    Rope,
    Route,
    Sample,
    Select,
    SelectiveScan,
    ShortConv,
    Sinkhorn,
    Sinusoid,
    Tensor,
)
from intaglio.silicon.sizes import BLOCK

LATENT, LATENT_ROPE = 512, 64  # widths of the latent and of the rotated part of a key, as in DeepSeek-V3
MAPS = ("silu(a) * b", "a + b", "tanh(a / 30.0) * 30.0", "a + b * sigmoid(c)")


@dataclass(frozen=True)
class Case:
    """One call of an op, for comparing its closed-form time with the time of its simulated instruction streams.

    Attributes:
        op: the op.
        tensors: the op's operands and results, by name.
        batch: the tokens and sequences of the step.
        words: the sizes of the call as text, such as "m=64 n=4096 k=4096 bf16".
    """

    op: Op
    tensors: Mapping[str, Tensor]
    batch: Batch
    words: str


def power(rng: np.random.Generator, low: int, high: int, step: int = 1) -> int:
    """Returns a random number from `low` to `high`, rounded down to a multiple of `step`, but at least `step`.

    The logarithm of the number is evenly distributed before the rounding.
    """
    return max(step, int(low * (high / low) ** rng.uniform()) // step * step)


def batch_of(chunks: list[tuple[int, int]]) -> Batch:
    """Returns a Batch with one sequence for each of `chunks`. The logits of each sequence's last token are wanted.

    chunks: (number of new tokens, number of keys before them) of each sequence. Each sequence has two slots of
    recurrent state. It writes one, and reads the other if it has keys before the new tokens.
    """
    made, used = [], 0
    for i, (n, before) in enumerate(chunks):
        blocks, state = -(-(n + before) // BLOCK), (2 * i if before else -1, 2 * i + 1)
        made.append(Chunk([0] * n, before, range(used, used + blocks), rows=(n - 1,), state=state))
        used += blocks
    return bind(made, BLOCK)


def tokens(rng: np.random.Generator, most: int) -> Batch:
    """Returns a random Batch of 1 to `most` tokens: one prompt, or sequences of one token each."""
    n = power(rng, 1, most)
    return batch_of([(n, 0)] if rng.random() < 0.5 else [(1, 0)] * n)


def case(op: Op, tensors: list[Tensor], batch: Batch, words: str) -> Case:
    """Returns the Case (one call to time) of an op on a batch. Tensors for the results are added.

    Args:
        op: the op.
        tensors: the op's operands.
        batch: the tokens and sequences of the step.
        words: the call's sizes as text, such as "m=64 width=4096", which reports show.
    """
    table = {t.name: t for t in tensors}
    table |= {n: Tensor(n, shape, fmt, "temp") for n, (shape, fmt) in op.shapes(table).items()}
    return Case(op, table, batch, words)


def temp(name: str, width: int, format: str = "f32", rows: str = "T") -> Tensor:
    """Returns a temporary Tensor (role "temp") of shape [rows, width], which holds activations.

    rows: symbolic dimension: "T" for the tokens of the step, "R" for the rows whose logits are wanted.
    """
    return Tensor(name, (rows, width), format, "temp")


def weight_format(rng: np.random.Generator, on: Target) -> tuple[str, str]:
    """Returns two random names of number formats for a matrix product: (format of activations, format of weights).

    Both are bf16 or both are fp8row, with equal probability. They are always bf16 if the chip's matrix arrays do not
    multiply FP8 numbers (E4M3).
    """
    kinds = [("bf16", "bf16"), *([("fp8row", "fp8row")] if "e4m3" in dict(on.chip.macs) else [])]
    return kinds[rng.integers(len(kinds))]


def linear(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of a matrix product.

    The result has 1 to 2,048 rows and 128 to 8,192 columns. The inner dimension K is 256 to 8,192.
    """
    x_format, w_format = weight_format(rng, on)
    n, k, batch = power(rng, 128, 8192, 16), power(rng, 256, 8192, 64), tokens(rng, 2048)
    op = Linear(site="linear", x="x", w="w", out="y", x_format=x_format)
    words = f"m={len(batch.tokens)} n={n} k={k} {w_format}"
    return case(op, [temp("x", k), Tensor("w", (n, k), w_format, "weight")], batch, words)


def head_linear(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op HeadLinear.

    The op multiplies each head of its input by a matrix of the head's own. There are 4 to 128 heads.
    """
    heads, n, k, batch = power(rng, 4, 128), power(rng, 64, 512, 16), power(rng, 64, 512, 64), tokens(rng, 512)
    op = HeadLinear(site="head_linear", x="x", w="w", out="y")
    words = f"m={len(batch.tokens)} heads={heads} n={n} k={k}"
    return case(op, [temp("x", heads * k), Tensor("w", (heads, n, k), "bf16", "weight")], batch, words)


def experts(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Experts.

    There are 8 to 64 experts. Each token gets 1 to 8 of them.
    """
    x_format, w_format = weight_format(rng, on)
    n, hidden, inner = power(rng, 8, 64), power(rng, 256, 2048, 128), power(rng, 128, 2048, 128)
    top, batch = min(n, power(rng, 1, 8)), tokens(rng, 512)
    op = Experts(
        site="experts", x="x", weights="p", ids="i", out="y", gate="g", up="u", down="d", x_format=x_format,
        activation="silu",
    )  # fmt: skip
    stacks = [Tensor(name, (n, inner, hidden), w_format, "weight") for name in ("g", "u")]
    stacks.append(Tensor("d", (n, hidden, inner), w_format, "weight"))
    words = f"m={len(batch.tokens)} experts={n} top={top} hidden={hidden} inner={inner} {w_format}"
    return case(op, [temp("x", hidden), temp("p", top), temp("i", top, "i32"), *stacks], batch, words)


def attend(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of attention: a prompt, or sequences that decode.

    There are 1 to 4 K/V heads, each with 1 to 8 query heads; heads are 64 or 128 wide. One case in four has a sliding
    window, one in eight latent attention with 4 to 32 heads.
    """
    kv, group, d = power(rng, 1, 4), int(2 ** rng.integers(0, 4)), int(rng.choice([64, 128]))
    latent, window = rng.random() < 1 / 8, power(rng, 128, 2048) if rng.random() < 1 / 4 else 0
    if rng.random() < 0.5:
        q = power(rng, 2, 1024)
        batch = batch_of([(q, power(rng, 1, 2048) - 1)])
    else:
        batch = batch_of([(1, power(rng, 1, 4096))] * power(rng, 1, 16))
    words = f"q={batch.q_len[0]} keys={batch.context_len[0]} batch={len(batch.q_len)} window={window}"
    if latent:
        heads, widths = 4 * group, {"kc": LATENT, "rc": LATENT_ROPE}
        op = Attend(
            site="attend", q="q", k_cache="kc", v_cache="kc", rope_cache="rc", out="y", heads=heads, scale=d**-0.5,
            window=window,
        )  # fmt: skip
        caches = [Tensor(n, ("P", "B", 1, width), "bf16", "state") for n, width in widths.items()]
        return case(op, [temp("q", heads * sum(widths.values())), *caches], batch, f"{words} heads={heads} latent")
    op = Attend(
        site="attend", q="q", k_cache="kc", v_cache="vc", out="y", heads=kv * group, scale=d**-0.5, window=window
    )
    caches = [Tensor(n, ("P", "B", kv, d), "bf16", "state") for n in ("kc", "vc")]
    return case(op, [temp("q", kv * group * d), *caches], batch, f"{words} heads={kv * group} kv={kv} d={d}")


def kv_write(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the write of keys and values of 1 to 16 heads to the K/V cache."""
    heads, d, batch = power(rng, 1, 16), int(rng.choice([64, 128])), tokens(rng, 2048)
    op = KvWrite(site="kv_write", k="k", v="v", k_cache="kc", v_cache="vc")
    caches = [Tensor(n, ("P", "B", heads, d), "bf16", "state") for n in ("kc", "vc")]
    words = f"m={len(batch.tokens)} heads={heads} d={d}"
    return case(op, [temp("k", heads * d), temp("v", heads * d), *caches], batch, words)


def widest(on: Target, most: int, tiles: int) -> int:
    """Returns the largest number of columns, at most `most`, with which a kernel's rows fit into the SRAM of one core.

    The kernel keeps `tiles` rows of FP32 values in SRAM. Room for one more row is left free.
    """
    return min(most, on.chip.sram_bytes // (4 * tiles + 4))


def norm(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of an RMS norm, which has a residual with probability 1/2."""
    width, batch, residual = power(rng, 256, widest(on, 16384, 4), 16), tokens(rng, 2048), rng.random() < 0.5
    op = Norm(site="norm", x="x", out="y", weight="w", residual="r" if residual else None, norm="rms")
    tensors = [temp("x", width), temp("r", width), Tensor("w", (width,), "f32", "weight")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} width={width} residual={residual}")


def rope(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of rotary position embedding of 1 to 64 heads."""
    heads, d, batch = power(rng, 1, 64), int(rng.choice([64, 128])), tokens(rng, 2048)
    op = Rope(site="rope", x="x", positions="p", frequencies="f", out="y", head_dim=d)
    tensors = [temp("x", heads * d), Tensor("p", ("T",), "i32", "input"), Tensor("f", (d // 2,), "f32", "const")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} heads={heads} d={d}")


def elementwise(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of an elementwise expression over one to three tensors."""
    expr = MAPS[rng.integers(len(MAPS))]
    width, batch = power(rng, 256, 28672, 16), tokens(rng, 2048)
    given = ["a", *(n for n in "bc" if f" {n}" in expr or f"({n})" in expr)]
    op = Map(site="map", out="y", expr=expr, **{n: n for n in given})
    return case(op, [temp(n, width) for n in given], batch, f"m={len(batch.tokens)} width={width} {expr}")


def embed(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of an embedding from a table of 32,000 rows."""
    width, batch = power(rng, 256, widest(on, 16384, 3), 16), tokens(rng, 2048)
    op = Embed(site="embed", tokens="t", w="w", out="y")
    tensors = [Tensor("t", ("T",), "i32", "input"), Tensor("w", (32000, width), "bf16", "weight")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} width={width}")


def select(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Select, which picks rows of a tensor.

    The batch has 1 to 512 sequences of one token, and every row is picked.
    """
    width, batch = power(rng, 256, widest(on, 16384, 1), 16), batch_of([(1, 0)] * power(rng, 1, 512))
    op = Select(site="select", x="x", rows="rows", out="y")
    tensors = [temp("x", width), Tensor("rows", ("R",), "i32", "input")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} width={width}")


def permute(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Permute, which reorders the columns of a tensor."""
    width, batch = power(rng, 256, widest(on, 16384, 3), 16), tokens(rng, 2048)
    op = Permute(site="permute", x="x", order="o", out="y")
    tensors = [temp("x", width), Tensor("o", (width,), "i32", "weight")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} width={width}")


def concat(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Concat, which puts the columns of two tensors side by side."""
    left, right = (power(rng, 128, widest(on, 8192, 3), 16) for _ in "ab")
    batch, op = tokens(rng, 2048), Concat(site="concat", a="a", b="b", out="y")
    return case(op, [temp("a", left), temp("b", right)], batch, f"m={len(batch.tokens)} widths={left}+{right}")


def route(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Route, which chooses experts for each token.

    Each token gets 1 to 8 out of 8 to 256 experts. Scores are by softmax. In one case of four, the experts of a token
    are not chosen but read from a table.
    """
    n, batch = power(rng, 8, 256), tokens(rng, 2048)
    top, table = min(n, power(rng, 1, 8)), "t" if rng.random() < 0.25 else None
    op = Route(site="route", logits="x", weights="w", ids="i", table=table, top=top, score="softmax")
    tensors = [temp("x", n), Tensor("t", (1024, top), "i32", "weight")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} experts={n} top={top}{' by table' if table else ''}")


def sinusoid(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Sinusoid.

    The op computes sines and cosines of 1 to 2,048 positions. Each position has 64 to 2,048 frequencies.
    """
    n, batch = power(rng, 64, 2048), tokens(rng, 2048)
    op = Sinusoid(site="sinusoid", positions="p", frequencies="f", out="y")
    tensors = [Tensor("p", ("T",), "i32", "input"), Tensor("f", (n,), "f32", "const")]
    return case(op, tensors, batch, f"m={len(batch.tokens)} pairs={n}")


def sample(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of greedy sampling from a vocabulary of 4,096 to 131,072 tokens."""
    n, batch = power(rng, 4096, widest(on, 131072, 1), 64), batch_of([(1, 0)] * power(rng, 1, 256))
    op = Sample(site="sample", logits="x", tokens="t", logprobs="p")
    return case(op, [temp("x", n, rows="R")], batch, f"m={len(batch.tokens)} vocabulary={n}")


def moment(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Moment: the mean or the standard deviation of each row."""
    width, batch, of = power(rng, 256, widest(on, 16384, 2), 16), tokens(rng, 2048), str(rng.choice(["mean", "std"]))
    op = Moment(site="moment", x="x", out="y", of=of)
    return case(op, [temp("x", width)], batch, f"m={len(batch.tokens)} width={width} {of}")


def sinkhorn(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Sinkhorn.

    The op changes matrices so that each row and column sums to about 1. A matrix has 2 to 8 rows and as many columns.
    """
    n, batch = power(rng, 2, 8), tokens(rng, 2048)
    op = Sinkhorn(site="sinkhorn", x="x", out="y")
    return case(op, [temp("x", n * n)], batch, f"m={len(batch.tokens)} n={n}")


def mix_streams(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op MixStreams.

    The op mixes 2 or 4 residual streams. A stream has 256 to 4,096 columns. The result is the same number of streams,
    with a layer's output added, or a single stream, with nothing added. Both are equally likely.
    """
    n, width, batch = int(rng.choice([2, 4])), power(rng, 256, 4096, 16), tokens(rng, 1024)
    m, added = (n, {"branch": "b", "gains": "g"}) if rng.random() < 0.5 else (1, {})
    op = MixStreams(site="mix_streams", x="x", weights="w", out="y", streams=n, **added)
    tensors = [temp("x", n * width), temp("w", n * m), *([temp("b", width), temp("g", m)] if added else [])]
    return case(op, tensors, batch, f"m={len(batch.tokens)} streams={n} to {m} width={width}")


def pool_keys(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op PoolKeys.

    The op pools 4 or 64 tokens into one cache entry. The tokens are consecutive: a run. A run of 4 tokens is pooled
    together with the preceding run. The batch is a prompt, or sequences of one token each; this token completes a run.
    """
    overlap, d = bool(rng.random() < 0.5), int(rng.choice([64, 128, 512]))
    every = 4 if overlap else 64
    prompt, decodes = [(power(rng, every, 2048), 0)], [(1, 64 * power(rng, 1, 32) - 1)] * power(rng, 1, 32)
    batch = batch_of(prompt if rng.random() < 0.5 else decodes)
    op = PoolKeys(
        site="pool_keys", value_cache="v", gate_cache="g", bias="b", weight="w", frequencies="f", entries="e",
        every=every, overlap=overlap,
    )  # fmt: skip
    caches = [Tensor(n, ("P", "B", 1 + overlap, d), "bf16", "state") for n in "vg"]
    caches.append(Tensor("e", ("P", f"B/{every}", 1, d), "bf16", "state"))
    vectors = [Tensor("w", (d,), "f32", "weight"), Tensor("f", (d // 4,), "f32", "const")]
    bias = Tensor("b", (every, (1 + overlap) * d), "f32", "weight")
    words = f"m={len(batch.tokens)} keys={batch.context_len[0]} every={every} d={d}"
    return case(op, [*caches, *vectors, bias], batch, words)


def stateful(rng: np.random.Generator, most: int) -> Batch:
    """Returns a random Batch of 1 to `most` tokens for an op with recurrent state.

    The batch is one prompt, with or without an earlier token, or sequences of one token each, which have an earlier
    token.
    """
    n = power(rng, 1, most)
    return batch_of([(n, int(rng.integers(0, 2)))] if rng.random() < 0.5 else [(1, 1)] * n)


def decay(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op Decay, which computes the decay rates of a recurrence.

    There are 4 to 128 heads, each of 1 or 64 columns.
    """
    heads, per, batch = power(rng, 4, 128), int(rng.choice([1, 64])), tokens(rng, 2048)
    op = Decay(site="decay", x="x", rate="r", bias="b", step="s", decay="d")
    tensors = [
        temp("x", heads * per),
        *(Tensor(n, (w,), "f32", "weight") for n, w in (("r", heads), ("b", heads * per))),
    ]
    return case(op, tensors, batch, f"m={len(batch.tokens)} heads={heads} of {per}")


def short_conv(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op ShortConv, a causal convolution with 3 or 4 taps.

    It has 256 to 8,192 channels.
    """
    width, taps, batch = power(rng, 256, 8192, 16), int(rng.integers(3, 5)), stateful(rng, 512)
    op = ShortConv(site="short_conv", x="x", w="w", state="s", out="y")
    tensors = [temp("x", width), Tensor("w", (width, taps), "f32", "weight")]
    tensors.append(Tensor("s", ("N", taps - 1, width), "f32", "state"))
    words = f"m={len(batch.tokens)} sequences={len(batch.q_len)} width={width} taps={taps}"
    return case(op, tensors, batch, words)


def rg_lru(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op RgLru (gated linear recurrence) on 256 to 4,096 channels."""
    width, batch = power(rng, 256, 4096, 16), stateful(rng, 512)
    names = {"x": "x", "input_gate": "i", "decay_gate": "g", "rate": "r", "input_bias": "ib", "decay_bias": "gb"}
    op = RgLru(site="rg_lru", **names, state="s", out="y")
    tensors = [*(temp(n, width) for n in "xig"), *(Tensor(n, (width,), "f32", "weight") for n in ("r", "ib", "gb"))]
    words = f"m={len(batch.tokens)} sequences={len(batch.q_len)} width={width}"
    return case(op, [*tensors, Tensor("s", ("N", width), "f32", "state")], batch, words)


def selective_scan(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op SelectiveScan, the state space model of Mamba.

    It has 128 to 4,096 channels, each with 16 values of state.
    """
    width, n, batch = power(rng, 128, 4096, 16), 16, stateful(rng, 64)
    op = SelectiveScan(site="selective_scan", x="x", step="d", b="b", c="c", rate="r", skip="k", state="s", out="y")
    tensors = [*(temp(name, columns) for name, columns in (("x", width), ("d", width), ("b", n), ("c", n)))]
    tensors += [Tensor("r", (width, n), "f32", "weight"), Tensor("k", (width,), "f32", "weight")]
    words = f"m={len(batch.tokens)} sequences={len(batch.q_len)} width={width}"
    return case(op, [*tensors, Tensor("s", ("N", width, n), "f32", "state")], batch, words)


def linear_attention(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op LinearAttention, either as a gated delta net or as in Mamba-2.

    There are 4 to 32 heads, each with a state of 64 x 64 or 128 x 128 values.
    """
    heads, d, delta = 4 * int(2 ** rng.integers(0, 4)), int(rng.choice([64, 128])), bool(rng.random() < 0.5)
    batch, groups = stateful(rng, 64), heads // 4
    op = LinearAttention(
        site="linear_attention", q="q", k="k", v="v", decay="a", beta="b", state="s", out="y", heads=heads, delta=delta
    )  # fmt: skip
    columns = {"q": groups * d, "k": groups * d, "v": heads * d, "a": heads, "b": heads}
    tensors = [*(temp(name, n) for name, n in columns.items()), Tensor("s", ("N", heads, d, d), "f32", "state")]
    words = f"m={len(batch.tokens)} sequences={len(batch.q_len)} heads={heads} d={d} delta={delta}"
    return case(op, tensors, batch, words)


def choose_keys(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op ChooseKeys.

    The op is the indexer of sparse attention. There are 4 to 32 heads. The op chooses 32 to 512 of up to 3,000
    positions for each token, or in half of the cases 32 to 512 entries that each stand for 4 positions. Heads are 64
    wide. The batch is a prompt, or sequences that decode.
    """
    heads, top, every = power(rng, 4, 32), power(rng, 32, 512), int(rng.choice([1, 4]))
    prompt, decodes = [(power(rng, 2, 512), power(rng, 1, 2500))], [(1, power(rng, 1, 3000))] * power(rng, 1, 32)
    batch = batch_of(prompt if rng.random() < 0.5 else decodes)
    op = ChooseKeys(site="choose_keys", q="q", weights="w", cache="k", chosen="c", heads=heads, top=top, every=every)
    cache = Tensor("k", ("P", "B" if every == 1 else f"B/{every}", 1, 64), "bf16", "state")
    words = f"m={len(batch.tokens)} keys={batch.context_len[0]} every={every} heads={heads} top={top}"
    return case(op, [temp("q", heads * 64), temp("w", heads), cache], batch, words)


def attend_chosen(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of latent attention to 32 to 512 chosen positions, with 4 to 32 heads.

    The batch is a short prompt, or sequences that decode.
    """
    heads, top, widths = 4 * int(2 ** rng.integers(0, 4)), power(rng, 32, 512), {"kc": LATENT, "rc": LATENT_ROPE}
    prompt, decodes = [(power(rng, 2, 64), power(rng, 1, 2500))], [(1, power(rng, 1, 3000))] * power(rng, 1, 32)
    batch = batch_of(prompt if rng.random() < 0.5 else decodes)
    op = Attend(
        site="attend_chosen", q="q", k_cache="kc", v_cache="kc", rope_cache="rc", chosen="c", out="y", heads=heads,
        scale=0.1,
    )  # fmt: skip
    caches = [Tensor(n, ("P", "B", 1, width), "bf16", "state") for n, width in widths.items()]
    words = f"m={len(batch.tokens)} keys={batch.context_len[0]} heads={heads} top={top}"
    return case(op, [temp("q", heads * sum(widths.values())), temp("c", top, "i32"), *caches], batch, words)


def attend_pooled(rng: np.random.Generator, on: Target) -> Case:
    """Returns a random Case (one call to time) of the op AttendPooled, with 4 to 32 heads.

    Each token attends to a window of 128 keys and to entries, each pooled from 4 or 64 tokens. Of the entries of 4
    tokens, only 32 to 256 chosen ones are attended to. The batch is a short prompt, or sequences that decode.
    """
    heads, d, chosen = 4 * int(2 ** rng.integers(0, 4)), int(rng.choice([64, 128])), bool(rng.random() < 0.5)
    every, top = 4 if chosen else 64, power(rng, 32, 256)
    prompt, decodes = [(power(rng, 2, 64), power(rng, 1, 2500))], [(1, power(rng, 1, 3000))] * power(rng, 1, 32)
    batch = batch_of(prompt if rng.random() < 0.5 else decodes)
    op = AttendPooled(
        site="attend_pooled", q="q", cache="k", entries="e", sinks="s", chosen="c" if chosen else None, out="y",
        heads=heads, scale=0.1, window=128, every=every,
    )  # fmt: skip
    caches = [Tensor("k", ("P", "B", 1, d), "bf16", "state"), Tensor("e", ("P", f"B/{every}", 1, d), "bf16", "state")]
    tensors = [temp("q", heads * d), Tensor("s", (heads,), "f32", "weight"), *caches]
    words = f"m={len(batch.tokens)} keys={batch.context_len[0]} every={every} heads={heads} d={d} chosen={chosen}"
    return case(op, [*tensors, *([temp("c", top, "i32")] if chosen else [])], batch, words)


CASES: dict[str, Callable[[np.random.Generator, Target], Case]] = {
    "linear": linear, "head_linear": head_linear, "experts": experts, "attend": attend, "kv_write": kv_write,
    "norm": norm, "rope": rope, "map": elementwise, "embed": embed, "select": select, "permute": permute,
    "concat": concat, "route": route, "sinusoid": sinusoid, "sample": sample, "moment": moment, "sinkhorn": sinkhorn,
    "mix_streams": mix_streams, "pool_keys": pool_keys, "decay": decay, "short_conv": short_conv, "rg_lru": rg_lru,
    "selective_scan": selective_scan, "linear_attention": linear_attention, "choose_keys": choose_keys,
    "attend_chosen": attend_chosen, "attend_pooled": attend_pooled,
}  # fmt: skip
