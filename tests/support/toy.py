"""Small Programs written with the Builder, random weights for them, and a sequence of mixed batches. Used by tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intaglio.batch import Batch, Chunk, bind
from intaglio.devices import ArrayWeights, StateSpec, StepRequest, open_device
from intaglio.formats import PLAIN
from intaglio.ops import Attend, Embed, Experts, KvWrite, Linear, Map, Norm, Op, Rope, Route, Sample, Select
from intaglio.program import Builder, Program

VOCABULARY = 61
CONTEXT = 64
PAGE = 4
SAME = 1e-6  # relative: a pass may move one float32 rounding, no more


@dataclass(frozen=True)
class Toy:
    """The features of a small decoder that fusions depend on."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    inner: int = 40
    format: str = "f32"  # of the stored weights
    bias: bool = False
    tied: bool = True
    glu: bool = True
    up_first: bool = False
    activation: str = "silu"
    qk_norm: bool = False
    post_norm: bool = False  # the norm after the block, before the residual (OLMo 2)
    parallel: bool = False  # attention and mlp read one norm (Cohere)
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    window: int = 0
    softcap: float = 0.0


class _Writer(Builder):
    """A Builder that names weights after their site."""

    def __init__(self, name: str, format: str) -> None:
        super().__init__(name, CONTEXT)
        self.format = format

    def vector(self, name: str, length: int) -> str:
        return self.weight(name, (length,), "model." + name, self.format)

    def linear(self, site: str, x: str, n: int, bias: bool = False, **fields: object) -> str:
        k = int(self.tensors[x].shape[1])
        w = self.weight(site + ".weight", (n, k), f"model.{site}.weight", self.format)
        if bias:
            fields["bias"] = self.vector(site + ".bias", n)
        return self.op(Linear, site, x, w, **fields)  # type: ignore[arg-type]

    def norm(self, site: str, x: str, group: int = 0) -> str:
        width = group or int(self.tensors[x].shape[1])
        return self.op(Norm, site, x, weight=self.vector(site + ".weight", width), group=group)

    def add(self, site: str, x: str, y: str, scale: float) -> str:
        return self.op(Map, site, x, b=y, expr="a + b" if scale == 1 else f"a + b * {scale}")

    def finish(self, x: str, head: str | None, logits_scale: float = 1.0) -> Program:
        x = self.op(Select, "select", x, "rows")
        k = int(self.tensors[x].shape[1])
        head = head or self.weight("lm_head.weight", (VOCABULARY, k), "lm_head.weight", self.format)
        if logits_scale == 1:
            self.op(Linear, "lm_head", x, head, out="logits", role="output")
        else:
            y = self.op(Linear, "lm_head", x, head)
            self.op(Map, "logits_scale", y, expr=f"a * {logits_scale}", out="logits", role="output")
        self.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
        return self.done()


def transformer(toy: Toy = Toy()) -> Program:
    """A small decoder, as a port would write it."""
    b = _Writer("toy", toy.format)
    width = toy.heads * toy.head_dim
    pairs = toy.head_dim // 2
    b.const("rope.frequencies", [10000.0 ** (-i / pairs) for i in range(pairs)])
    table = b.weight("embed.weight", (VOCABULARY, width), "model.embed_tokens.weight", toy.format)
    x = b.op(Embed, "embed", "tokens", table)
    for i in range(toy.layers):
        x = _layer(b, f"layers.{i}.", x, toy)
    return b.finish(b.norm("norm", x), table if toy.tied else None, toy.logits_scale)


def _layer(b: _Writer, at: str, x: str, toy: Toy) -> str:
    n = x if toy.post_norm else b.norm(at + "attn.norm", x)
    y = _attention(b, at + "attn.", n, toy)
    y = b.norm(at + "attn.post_norm", y) if toy.post_norm else y
    if toy.parallel:
        both = b.op(Map, at + "attn.add", x, b=y, expr="a + b")
        return b.add(at + "mlp.add", both, _mlp(b, at + "mlp.", n, toy), toy.residual_scale)
    x = b.add(at + "attn.add", x, y, toy.residual_scale)
    y = _mlp(b, at + "mlp.", x if toy.post_norm else b.norm(at + "mlp.norm", x), toy)
    y = b.norm(at + "mlp.post_norm", y) if toy.post_norm else y
    return b.add(at + "mlp.add", x, y, toy.residual_scale)


def _attention(b: _Writer, at: str, n: str, toy: Toy) -> str:
    q = b.linear(at + "q_proj", n, toy.heads * toy.head_dim, toy.bias)
    k = b.linear(at + "k_proj", n, toy.kv_heads * toy.head_dim, toy.bias)
    v = b.linear(at + "v_proj", n, toy.kv_heads * toy.head_dim, toy.bias)
    if toy.qk_norm:
        q, k = b.norm(at + "q_norm", q, toy.head_dim), b.norm(at + "k_norm", k, toy.head_dim)
    q = b.op(Rope, at + "q_rope", q, "positions", "rope.frequencies", head_dim=toy.head_dim)
    k = b.op(Rope, at + "k_rope", k, "positions", "rope.frequencies", head_dim=toy.head_dim)
    stored = "bf16" if toy.format == "bf16" else "f32"
    caches = [b.cache(f"{at}{c}_cache", toy.kv_heads, toy.head_dim, stored) for c in "kv"]
    b.op(KvWrite, at + "kv_write", k, v, *caches)
    own = {"heads": toy.heads, "scale": toy.head_dim**-0.5, "window": toy.window, "softcap": toy.softcap}
    y = b.op(Attend, at + "attend", q, *caches, **own)  # type: ignore[arg-type]
    return b.linear(at + "o_proj", y, toy.heads * toy.head_dim)


def _mlp(b: _Writer, at: str, n: str, toy: Toy) -> str:
    if not toy.glu:
        y = b.linear(at + "fc1", n, toy.inner, toy.bias)
        y = b.op(Map, at + "activation", y, expr=f"{toy.activation}(a)")
    else:
        names = ("up_proj", "gate_proj") if toy.up_first else ("gate_proj", "up_proj")
        made = {name: b.linear(at + name, n, toy.inner, toy.bias) for name in names}
        y = b.op(Map, at + "glu", made["gate_proj"], b=made["up_proj"], expr=f"{toy.activation}(a) * b")
    return b.linear(at + "down_proj", y, toy.heads * toy.head_dim)


MANNERS = {
    "llama": Toy(),
    "qwen2": Toy(bias=True, tied=False),
    "qwen3": Toy(qk_norm=True, kv_heads=4),
    "olmo2": Toy(post_norm=True, tied=False),
    "cohere": Toy(parallel=True, logits_scale=0.25),
    "granite": Toy(residual_scale=0.22, logits_scale=0.125),
    "plain": Toy(glu=False, activation="gelu_tanh", bias=True),
    "gemma": Toy(activation="gelu_tanh", up_first=True, window=5, softcap=20.0),
}

EXPRESSIONS = (
    "a + b", "b + a", "a - b", "a * 0.5", "0.25 * a", "silu(a)", "a + b * 0.5", "b * 2.0 + a", "a + relu(b * 0.5)",
    "gelu_tanh(b) + a", "silu(a) * b", "a * silu(b)", "(a + b) * 0.5", "tanh(a) * 2.0", "a + a", "tanh(a + b + c)",
)  # fmt: skip


def tangle(seed: int) -> Program:
    """A random Program without attention: linears, maps, norms and views of earlier results."""
    rng = np.random.default_rng(seed)
    b = _Writer("tangle", "f32")
    b.const("rope.frequencies", [1.0, 0.1])
    table = b.weight("embed.weight", (VOCABULARY, 24), "model.embed_tokens.weight")
    made = [b.op(Embed, "embed", "tokens", table)]

    def any_of(shape: tuple[int | str, ...] | None = None) -> str:
        fitting = [n for n in made if shape in (None, b.tensors[n].shape)]
        return fitting[-1 - min(int(rng.geometric(0.4)) - 1, len(fitting) - 1)]  # mostly the latest

    for i in range(int(rng.integers(8, 20))):
        block = ("", "layers.0.attn.", "layers.0.mlp.")[rng.integers(3)]
        x, site = any_of(), f"{block}op{i}"
        width = int(b.tensors[x].shape[1])
        match rng.choice(["linear", "pair", "pair", "map", "map", "map", "norm", "view", "experts"]):
            case "linear":
                kept = [w.name for w in b.tensors.values() if w.role == "weight" and w.shape[1:] == (width,)]
                if kept and rng.random() < 0.2:  # a weight two linears share
                    made.append(b.op(Linear, site, x, kept[-1]))
                else:
                    made.append(b.linear(site, x, int(rng.choice([24, 48])), bool(rng.random() < 0.3)))
            case "pair":
                leaves = ["gate_proj", "up_proj"] if rng.random() < 0.5 else ["up_proj", "gate_proj"]
                two = {leaf: b.linear(f"{site}.{leaf}", x, 24) for leaf in leaves}
                expr = str(rng.choice(["silu(a) * b", "b * gelu_tanh(a)", "b + a", "a * 0.5 + b"]))
                made.append(b.op(Map, site, two["gate_proj"], b=two["up_proj"], expr=expr))
                made += list(two.values()) if rng.random() < 0.3 else []
            case "map":
                expr = str(rng.choice(EXPRESSIONS))
                shape = b.tensors[x].shape
                more = {n: any_of(shape) for n in "bc" if n in expr.replace("tanh", "").replace("relu", "")}
                made.append(b.op(Map, site, x, expr=expr, **more))
            case "norm":
                made.append(b.norm(site, x))
            case "experts":
                logits = b.linear(f"{site}.router", x, 5)
                b.op(Route, f"{site}.route", logits, ids=f"{site}.ids", top=2, normalise=True)
                shapes = {"gate": (5, 20, width), "up": (5, 20, width), "down": (5, 24, 20)}
                gate, *rest = [b.weight(f"{site}.{n}", s, f"model.{site}.{n}") for n, s in shapes.items()]
                other = any_of(("T", 24))
                y = b.op(Experts, f"{site}.experts", x, f"{site}.route", f"{site}.ids", *rest, gate=gate)
                made.append(b.op(Map, site, y, b=other, expr="a + b"))
            case "view":
                own = [n for n in made if not b.tensors[n].view and b.tensors[n].shape[1] == 48]
                if own:
                    made.append(b.view(site, own[-1], start := int(rng.choice([0, 8, 24])), start + 24))
    last = any_of()
    return b.finish(b.norm("norm", last), None)


def random_weights(program: Program, seed: int = 0) -> ArrayWeights:
    """Checkpoint tensors for an uncompiled Program: matrices of variance 1 / K, vectors about 1, as stored."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for t in program.of_role("weight"):
        values = rng.normal(size=t.shape) / (int(t.shape[-1]) ** 0.5 if len(t.shape) > 1 else 4) + (len(t.shape) == 1)
        arrays[t.source[0]] = values.astype(np.float32).astype(PLAIN[t.format])
    return ArrayWeights(arrays)


def mixed_batches(seed: int = 0) -> list[Batch]:
    """Three sequences over five steps: prefill whole and in chunks, with decodes, on scattered pages."""
    rng = np.random.default_rng(seed)
    a, b, c = (rng.integers(0, VOCABULARY, n).tolist() for n in (13, 6, 9))
    pages = [[3, 1, 7, 0], [5, 2], [4, 6, 8]]
    plan = [[(a, 0, 5, 0), (b, 0, 3, 1)], [(b, 3, 4, 1), (a, 5, 11, 0), (c, 0, 7, 2)], [(c, 7, 8, 2), (b, 4, 5, 1)],
            [(a, 11, 12, 0), (c, 8, 9, 2)], [(b, 5, 6, 1), (a, 12, 13, 0)]]  # fmt: skip
    return [bind([Chunk(ids[i:j], i, pages[p], range(j - i)) for ids, i, j, p in step], PAGE) for step in plan]


def run(program: Program, weights: ArrayWeights, seed: int = 0) -> np.ndarray:
    """Logits of every token of the mixed batches, [rows, VOCABULARY]."""
    executable = open_device("reference").load(program, weights, StateSpec(pages=9, page_tokens=PAGE))
    steps = [executable.step(StepRequest(batch, logits=True)) for batch in mixed_batches(seed)]
    return np.concatenate([s.logits for s in steps if s.logits is not None])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference relative to the largest value of `b`."""
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))


def site(p: Program, name: str) -> Op:
    return next(op for op in p.ops if op.site == name)


def finish(b: Builder, y: str) -> Program:
    y = b.op(Select, "select", y, "rows")
    w = b.weight("head.weight", (VOCABULARY, int(b.tensors[y].shape[1])), "head")
    b.op(Linear, "head", y, w, out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return b.done()
