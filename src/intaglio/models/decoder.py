"""The description of a decoder, which family tables fill in, and the Program it stands for.

Ops come out one by one, as the model's forward() reads; joining them is the compiler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.models.config import Config, PortError
from intaglio.models.latent import Latent, write_latent
from intaglio.models.mixture import Mixture, write_mixture
from intaglio.models.rope import Table, parameters, table
from intaglio.ops import Attend, Embed, KvWrite, Linear, Map, Norm, Permute, Rope, Sample, Select
from intaglio.program import Builder, Program
from intaglio.program.source import names

# Which norms a layer has, by site, and what checkpoints call them: the same name means different things in families.
PRE = {"attn.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"}
POST = {"attn.post_norm": "post_attention_layernorm", "mlp.post_norm": "post_feedforward_layernorm"}
SANDWICH = {"attn.norm": "input_layernorm", "mlp.norm": "pre_feedforward_layernorm", **POST}
ONE = {"attn.norm": "input_layernorm"}
GLM = {
    "attn.norm": "input_layernorm", "attn.post_norm": "post_self_attn_layernorm",
    "mlp.norm": "post_attention_layernorm", "mlp.post_norm": "post_mlp_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What differs between layers: the rope table by name ("" turns nothing), the window or chunk (0 sees all), and
    whether the mixture of experts stands in place of the MLP."""

    rope: str = "rope"
    window: int = 0
    chunk: int = 0
    sparse: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder. Softcaps of 0 are none; `qk_norm` is "" (none), "head" (each head by itself), "flat" (all heads as one
    row), or "unit" (each head, without a weight, after its rope, and only where there is a rope). Layers without rope
    heat their scores by `temper`, as attend says."""

    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    layers: tuple[Layer, ...]
    ropes: Mapping[str, Table]
    activation: str
    eps: float
    tied: bool
    scale: float
    norms: Mapping[str, str]
    parallel: bool = False  # attention and MLP read the same normed input and are added to the same residual
    norm: str = "rms"
    norm_offset: float = 0.0
    qk_norm: str = ""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: tuple[str, ...] = ()  # of qkv_proj, gate_up_proj: those the checkpoint keeps as one
    norm_bias: bool = False
    head_bias: bool = False
    sinks: bool = False
    temper: float = 0.0
    temper_every: int = 1
    mixture: Mixture | None = None
    latent: Latent | None = None
    block: str = "mlp"  # the module of the dense MLP
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    root_scaled: bool = False  # embeddings times sqrt(hidden), rounded to the embedding's format
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    prefix: str = "model."


def sizes(c: Config, act: str = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The fields every family reads alike, checked against each other. `act` and `eps` are the keys that differ."""
    hidden, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    kv_heads = c.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise PortError(f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if c.get("head_dim") is None and hidden % heads:
        raise PortError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; give head_dim"
        )
    head_dim = c.whole("head_dim", hidden // heads)
    return {
        "vocabulary": c.whole("vocab_size"),
        "hidden": hidden,
        "intermediate": c.whole("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": c.whole("max_position_embeddings"),
        "activation": c.activation(act),
        "eps": c.real(eps),
        "tied": c.flag("tie_word_embeddings"),
        "scale": head_dim**-0.5,
    }


def window(c: Config, kind: str) -> int:
    """The window of a layer of this kind; 0 for full attention."""
    return c.whole("sliding_window") if kind == "sliding_attention" else 0


def alike(c: Config, s: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Layers and ropes of a family whose layers share one table; windows by layer_types, which default to full."""
    ropes = {"rope": table(c, parameters(c), s["head_dim"], context)}
    return {"ropes": ropes, "layers": tuple(Layer(window=window(c, kind)) for kind in c.layer_types())}


def sparse(d: Decoder, where: Callable[[int], bool] = lambda i: True) -> Decoder:
    """The decoder with its mixture of experts in the layers `where` names."""
    return replace(d, layers=tuple(replace(layer, sparse=where(i)) for i, layer in enumerate(d.layers)))


class Writer:
    """One Program being written from a Decoder. `format` gives the stored format of a checkpoint tensor, `order` the
    tensor that says in which order its columns stand, or ""."""

    def __init__(
        self, d: Decoder, name: str, context: int, format: Callable[[str], str], order: Callable[[str], str]
    ) -> None:
        self.d, self.format, self.order = d, format, order
        self.permuted: dict[tuple[str, str], str] = {}  # by what it was and its order
        self.b = Builder(name, context)
        self.cache = "f32" if format(d.prefix + "embed_tokens.weight") == "f32" else "bf16"

    def weight(self, site: str, what: str, shape: tuple[int, ...], source: str) -> str:
        return self.b.weight(f"{site}.{what}", shape, f"{source}.{what}", self.format(f"{source}.{what}"))

    def tensor(self, name: str, shape: tuple[int, ...], source: str, plain: bool = False) -> str:
        """A weight that is no module's `weight` or `bias`, from a source as program/source.py reads it. `plain`: codes
        become bf16, for an op that takes none."""
        if ordered := [n for n in names(source) if self.order(n)]:
            raise PortError(f"{ordered[0]}: columns in the order of activations are read of linears and experts only")
        format = self.format(names(source)[0])
        return self.b.weight(name, shape, source, "bf16" if plain and formats.get(format).grouped else format)

    def stack(self, name: str, shape: tuple[int, int, int], source: str) -> str:
        """Experts' matrices, whose columns stand as orders() says."""
        return self.b.weight(name, shape, source, self.format(names(source)[0]))

    def orders(self, name: str, shape: tuple[int, int], *sources: str) -> str | None:
        """The orders of the columns of stacks that meet one input, expert by expert; None where all stand as they
        come."""
        runs = [[self.order(n) for n in names(source)] for source in sources]
        for own in zip(*runs, strict=True):
            if len(set(own)) > 1:
                raise PortError(f"{' and '.join(own)} differ; the matrices that meet one input have one order")
        source = sources[0].removesuffix(".weight") + ".order"
        return self.b.weight(name, shape, source, "i32") if any(runs[0]) else None

    def linear(self, site: str, x: str, rows: int, cols: int, source: str, bias: bool = False) -> str:
        w = self.weight(site, "weight", (rows, cols), source)
        b = self.weight(site, "bias", (rows,), source) if bias else None
        x = self.in_order(site, x, cols, f"{source}.weight")
        return self.b.op(Linear, site, x, w, bias=b, x_format=self.meets(w))

    def in_order(self, site: str, x: str, cols: int, source: str) -> str:
        """x, its columns as those of the weight from `source` stand. Weights of one order share it."""
        order = self.order(source)
        if order and (x, order) not in self.permuted:
            columns = self.b.weight(f"{site}.order", (cols,), order, "i32")
            self.permuted[x, order] = self.b.op(Permute, f"{site}.permute", x, columns)
        return self.permuted[x, order] if order else x

    def meets(self, w: str) -> str:
        """What x must be to meet this weight: as it is, but in int8 where codes are whole numbers."""
        return "int8" if formats.get(self.b.tensors[w].format).integer else "f32"

    def norm(self, site: str, x: str, width: int, source: str, group: int = 0) -> str:
        w = self.weight(site, "weight", (width,), source)
        d = self.d
        bias = self.weight(site, "bias", (width,), source) if d.norm_bias else None
        return self.b.op(Norm, site, x, weight=w, bias=bias, norm=d.norm, eps=d.eps, offset=d.norm_offset, group=group)

    def layer_norm(self, i: int, which: str, x: str) -> str:
        """The norm at a layer's site `which`, or x itself where the family has none there."""
        source = self.d.norms.get(which)
        at = f"{self.d.prefix}layers.{i}.{source}"
        return self.norm(f"layers.{i}.{which}", x, self.d.hidden, at) if source else x

    def parts(self, at: str, source: str, x: str, widths: Mapping[str, int], fused: str, bias: bool) -> list[str]:
        """Linears of one input, by name and width; where the checkpoint joins them, one linear and a view of each."""
        if fused not in self.d.fused:
            return [self.linear(at + n, x, w, self.d.hidden, source + n, bias) for n, w in widths.items()]
        base = self.linear(at + fused, x, sum(widths.values()), self.d.hidden, source + fused, bias)
        out, start = [], 0
        for n, w in widths.items():
            out.append(self.b.view(at + n, base, start, start + w))
            start += w
        return out

    def qk_norms(self, at: str, source: str, q: str, k: str) -> tuple[str, str]:
        """Queries and keys after their norms."""
        d = self.d
        if d.qk_norm == "unit":
            how: dict[str, Any] = {"eps": d.eps, "group": d.head_dim}
            return self.b.op(Norm, at + "q_norm", q, **how), self.b.op(Norm, at + "k_norm", k, **how)
        group = d.head_dim if d.qk_norm == "head" else 0
        q = self.norm(at + "q_norm", q, group or d.heads * d.head_dim, source + "q_norm", group)
        return q, self.norm(at + "k_norm", k, group or d.kv_heads * d.head_dim, source + "k_norm", group)

    def attention(self, i: int, layer: Layer, x: str) -> str:
        d, b, at, source = self.d, self.b, f"layers.{i}.attn.", f"{self.d.prefix}layers.{i}.self_attn."
        if d.latent:
            return write_latent(self, d.latent, i, layer, x)
        heads, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        widths = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
        q, k, v = self.parts(at, source, x, widths, "qkv_proj", d.qkv_bias)
        if d.qk_norm in ("head", "flat"):
            q, k = self.qk_norms(at, source, q, k)
        if layer.rope:
            turn = d.ropes[layer.rope]
            how: dict[str, Any] = {"head_dim": d.head_dim, "style": turn.style, "factor": turn.factor}
            q = b.op(Rope, at + "q_rope", q, "positions", f"{layer.rope}.frequencies", **how)
            k = b.op(Rope, at + "k_rope", k, "positions", f"{layer.rope}.frequencies", **how)
            if d.qk_norm == "unit":
                q, k = self.qk_norms(at, source, q, k)
        k_cache, v_cache = (b.cache(at + n, d.kv_heads, d.head_dim, self.cache) for n in ("k_cache", "v_cache"))
        b.op(KvWrite, at + "kv_write", k, v, k_cache, v_cache)
        how = {
            "heads": d.heads,
            "scale": d.scale,
            "window": layer.window,
            "chunk": layer.chunk,
            "softcap": d.attn_softcap,
        }
        if d.sinks:
            how["sinks"] = self.tensor(at + "sinks", (d.heads,), source + "sinks")
        if d.temper and not layer.rope:
            how |= {"temper": d.temper, "temper_every": d.temper_every}
        a = b.op(Attend, at + "attend", q, k_cache, v_cache, **how)
        return self.linear(at + "o_proj", a, d.hidden, heads, source + "o_proj", d.o_bias)

    def dense(self, at: str, source: str, x: str, width: int, bias: bool, fused: str = "gate_up_proj") -> str:
        """A gated MLP of this width."""
        d = self.d
        gate, up = self.parts(at, source, x, {"gate_proj": width, "up_proj": width}, fused, bias)
        y = self.b.op(Map, at + "glu", gate, b=up, expr=f"{d.activation}(a) * b")
        return self.linear(at + "down_proj", y, d.hidden, width, source + "down_proj", bias)

    def mlp(self, i: int, layer: Layer, x: str) -> str:
        d = self.d
        if layer.sparse and d.mixture:
            return write_mixture(self, d.mixture, i, x)
        return self.dense(f"layers.{i}.mlp.", f"{d.prefix}layers.{i}.{d.block}.", x, d.intermediate, d.mlp_bias)

    def add(self, site: str, x: str, branch: str) -> str:
        scale = "" if self.d.residual_scale == 1 else f" * {self.d.residual_scale!r}"
        return self.b.op(Map, site, x, b=branch, expr=f"a + b{scale}")

    def layer(self, i: int, layer: Layer, x: str) -> str:
        read = self.layer_norm(i, "attn.norm", x)
        y = self.layer_norm(i, "attn.post_norm", self.attention(i, layer, read))
        x = self.add(f"layers.{i}.attn.add", x, y)
        if not self.d.parallel:
            read = self.layer_norm(i, "mlp.norm", x)
        y = self.layer_norm(i, "mlp.post_norm", self.mlp(i, layer, read))
        return self.add(f"layers.{i}.mlp.add", x, y)

    def head(self, x: str) -> None:
        """Rows wanted, final norm, logits, softcap, sample."""
        d, b = self.d, self.b
        x = self.norm("norm", b.op(Select, "select", x, "rows"), d.hidden, d.prefix + "norm")
        outer = "" if d.prefix.startswith("model.") else d.prefix.removesuffix("model.")
        shape = (d.vocabulary, d.hidden)
        w = "embed.weight" if d.tied else self.weight("lm_head", "weight", shape, outer + "lm_head")
        x = x if d.tied else self.in_order("lm_head", x, d.hidden, outer + "lm_head.weight")
        last: dict[str, Any] = {"out": "logits", "role": "output"}
        bias = self.weight("lm_head", "bias", (d.vocabulary,), outer + "lm_head") if d.head_bias else None
        how: dict[str, Any] = {"bias": bias, "scale": d.logit_scale, "x_format": self.meets(w)}
        y = b.op(Linear, "lm_head", x, w, **how, **({} if d.final_softcap else last))
        if d.final_softcap:
            b.op(Map, "softcap", y, expr=f"tanh(a / {d.final_softcap!r}) * {d.final_softcap!r}", **last)
        b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")

    def program(self) -> Program:
        d, b = self.d, self.b
        for name in sorted({layer.rope for layer in d.layers} - {""}):
            b.const(f"{name}.frequencies", d.ropes[name].frequencies)
        w = self.weight("embed", "weight", (d.vocabulary, d.hidden), d.prefix + "embed_tokens")
        scale = d.embed_scale
        if d.root_scaled:
            scale = float(formats.round_to(np.array(d.hidden**0.5, np.float32), b.tensors[w].format))
        x = b.op(Embed, "embed", "tokens", w, scale=scale)
        for i, layer in enumerate(d.layers):
            x = self.layer(i, layer, x)
        self.head(x)
        return b.done()
