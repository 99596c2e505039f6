"""The part of a decoder that is a mixture of experts: how a family routes, names and joins its experts, and the ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from intaglio.ops import Experts, Map, Route

if TYPE_CHECKING:
    from intaglio.models.decoder import Writer

# How checkpoints keep experts: sources of gate, up and down, as program/source.py reads them.
NAMED = ("experts.{run}.gate_proj.weight", "experts.{run}.up_proj.weight", "experts.{run}.down_proj.weight")
NUMBERED = ("experts.{run}.w1.weight", "experts.{run}.w3.weight", "experts.{run}.w2.weight")
STACKED = ("experts.gate_up_proj|r0:{i}/{2i}", "experts.gate_up_proj|r{i}:{2i}/{2i}", "experts.down_proj")
TURNED = ("experts.gate_up_proj|T|r0:{i}/{2i}", "experts.gate_up_proj|T|r{i}:{2i}/{2i}", "experts.down_proj|T")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """`count` experts of `width`, `top` of them for each token. `block` is the module that holds them, `router` its
    linear; `route` and `glu` go to the ops as they are. `correction` is the bias that only chooses. A shared expert of
    width `shared` takes every token, times sigmoid of `shared_gate` if that names a linear."""

    count: int
    top: int
    width: int
    sources: tuple[str, str, str]
    biases: tuple[str, str, str] | None = None
    block: str = "mlp"
    router: str = "gate"
    router_bias: bool = False
    correction: str = ""
    route: Mapping[str, Any] = field(default_factory=dict)
    glu: Mapping[str, Any] = field(default_factory=dict)
    shared: int = 0
    shared_source: str = "shared_experts"
    shared_gate: str = ""

    def source(self, template: str) -> str:
        """A source with the run of experts and the widths filled in."""
        run = f"{{0..{self.count - 1}}}"
        return template.replace("{run}", run).replace("{i}", str(self.width)).replace("{2i}", str(2 * self.width))


def write_mixture(w: Writer, m: Mixture, i: int, x: str) -> str:
    """The ops of layer `i`'s mixture; returns the result's name."""
    b, at, source = w.b, f"layers.{i}.mlp.", f"{w.d.prefix}layers.{i}.{m.block}."
    logits = w.linear(at + "router", x, m.count, w.d.hidden, source + m.router, m.router_bias)
    bias = w.tensor(at + "router.correction", (m.count,), source + m.correction) if m.correction else None
    weights = b.op(Route, at + "route", logits, bias=bias, ids=at + "route.ids", top=m.top, **m.route)
    inner, outer = (m.count, m.width, w.d.hidden), (m.count, w.d.hidden, m.width)
    names = ("gate", "up", "down")
    stacks = [
        w.stack(f"{at}experts.{n}", shape, source + m.source(s))
        for n, shape, s in zip(names, (inner, inner, outer), m.sources, strict=True)
    ]
    gate, up, down = (source + m.source(s) for s in m.sources)
    orders = {
        "order": w.orders(f"{at}experts.order", inner[::2], gate, up),
        "down_order": w.orders(f"{at}experts.down_order", outer[::2], down),
    }
    biases = {
        f"{n}_bias": w.tensor(f"{at}experts.{n}_bias", shape, source + m.source(s))
        for n, shape, s in zip(names, (inner[:2], inner[:2], outer[:2]), m.biases or (), strict=False)
    }
    how = {"activation": w.d.activation, "x_format": w.meets(stacks[0]), **m.glu, **biases, **orders}
    y = b.op(Experts, at + "experts", x, weights, at + "route.ids", *stacks, **how)
    return write_shared(w, m, i, x, y) if m.shared else y


def write_shared(w: Writer, m: Mixture, i: int, x: str, y: str) -> str:
    """The shared expert, added to the chosen ones' result `y`."""
    at, source = f"layers.{i}.mlp.shared.", f"{w.d.prefix}layers.{i}.{m.block}.{m.shared_source}."
    shared = w.dense(at, source, x, m.shared, bias=False, fused="")
    if not m.shared_gate:
        return w.b.op(Map, f"layers.{i}.mlp.join", y, b=shared, expr="a + b")
    gate = w.linear(
        f"layers.{i}.mlp.shared_gate", x, 1, w.d.hidden, f"{w.d.prefix}layers.{i}.{m.block}.{m.shared_gate}"
    )
    return w.b.op(Map, f"layers.{i}.mlp.join", y, b=shared, c=gate, expr="a + b * sigmoid(c)")
