"""Pipeline stages: cuts one lane's Program by layers, and sends results to the later stages that read them.

Runs after the layers are split among lanes: a lane of one stage communicates with the same lane of another.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod

from intaglio.compiler.layout import Layout, LayoutError
from intaglio.ops import Grouped, Op, Recv, Send, Tensor
from intaglio.ops.op import WEIGHT_MATRICES
from intaglio.program import Program

LAYER = re.compile(r"layers\.(\d+)\.")
WORTH = 0.05  # share of the longest stage: stages stay equal for less, since a prefill wants equal numbers of layers


def stage_of(p: Program, stages: int) -> list[int]:
    """The number of the pipeline stage of each op, from 0, as a list in the order of the ops.

    Each stage has a run of consecutive layers. Ops before all layers are in the first stage, ops after all layers in
    the last. Stages send each other only activations. If a layer reads the K/V cache of an earlier layer, or positions
    that an earlier layer has chosen, these two layers and all layers between them are therefore in one stage. Raises
    LayoutError if a stage would have no layers.
    """
    numbers = [int(match[1]) if (match := LAYER.match(op.site)) else None for op in p.ops]
    layers = max((n for n in numbers if n is not None), default=-1) + 1
    if layers < stages and stages > 1:
        raise LayoutError(f"pp={stages} stages, but {p.name} has {layers} layers; use pp{max(layers, 1)} or less")
    maker = {name: n for op, n in zip(p.ops, numbers, strict=True) for name in (*op.outputs, *op.writes_state)}
    joined = set[int]()  # layers that are in the stage of the layer before
    for op, n in zip(p.ops, numbers, strict=True):
        for name in map(p.base, op.inputs):
            kept = p.tensors[name].format == "i32" or p.tensors[name].role == "state"
            if n is not None and (m := maker.get(name)) is not None and kept:
                joined |= set(range(m + 1, n + 1))
    home = list(range(layers))  # the layer in whose stage a layer is
    for n in sorted(joined):
        home[n] = home[n - 1]
    found, last = [], max((i for i, n in enumerate(numbers) if n is not None), default=0)
    head = 0.0 if joined else _layers_worth(p, numbers, last)
    runs = _runs(layers, stages, head)
    stage = 0
    for i, n in enumerate(numbers):
        stage = stages - 1 if i > last else stage if n is None else runs[home[n]]
        found.append(stage)
    if stages > 1 and len(set(found)) < stages:
        raise LayoutError(
            f"pp={stages} leaves a stage of {p.name} without layers, since layers stay with the one whose K/V cache or "
            f"chosen positions they read; use {_fitting(home, stages)}"
        )
    return found


def _layers_worth(p: Program, numbers: list[int | None], last: int) -> float:
    """Estimated time of the ops after the last layer (mostly the output head), as a multiple of a layer's time.

    It is half the number of weight elements that matrix products read after the last layer, divided by the mean number
    per layer. It is halved because the output head runs for every token only in decoding: in a prefill it runs for one
    token of each prompt. It is 0.0 if layers have no such weights.

    Args:
        p: the Program.
        numbers: for each op, the number of its layer; None: it belongs to no layer.
        last: index of the last op that belongs to a layer.
    """
    sizes = [sum(prod(map(int, p.tensors[w].shape)) for w in op.operands(*WEIGHT_MATRICES)) for op in p.ops]
    layers = len({n for n in numbers if n is not None})
    inside = sum(size for size, n in zip(sizes, numbers, strict=True) if n is not None)
    return sum(sizes[last + 1 :]) * layers / inside / 2 if inside else 0.0


def _runs(layers: int, stages: int, head: float) -> list[int]:
    """The number of the pipeline stage of each layer, from 0, as an ascending list.

    Stages get near-equal numbers of layers. The last stage, which also has the output head, gets fewer layers if this
    makes the longest stage at least 5 % (WORTH) shorter.

    Args:
        layers: number of layers.
        stages: number of pipeline stages.
        head: time of the output head, as a number of layers.
    """
    equal = [n * stages // max(layers, 1) for n in range(layers)]
    if stages == 1 or layers <= stages:
        return equal

    def longest(last: int) -> float:
        return max(-(-(layers - last) // (stages - 1)), last + head)

    now = equal.count(stages - 1)
    best = min(range(now, 0, -1), key=longest)
    before = layers - best
    if longest(best) > (1 - WORTH) * longest(now):
        return equal
    return [n * (stages - 1) // before for n in range(before)] + [stages - 1] * best


def _fitting(home: list[int], stages: int) -> str:
    """Advice for an error message: which pipeline degree to use instead of `stages`, as text.

    It is "ppN" with the largest N below `stages` for which every stage has layers; "tp, or no pp" if N would be 1.
    home: for each layer, the number of the first layer that must be in the same stage as this layer.
    """
    fit = max(n for n in range(1, stages) if len({m * n // len(home) for m in home} | {n - 1}) == n)
    return f"pp{fit}" if fit > 1 else "tp, or no pp"


def cut_stages(p: Program, layout: Layout, lane: int, stage: int, wire: str) -> Program:
    """The Program of one rank: the ops of pipeline stage number `stage`, with sends to and receives from other stages.

    Args:
        p: the ops of all stages, already divided for tensor and expert parallelism: the part of lane `lane`.
        layout: degrees of parallelism.
        lane: number of the rank within its stage, from 0.
        stage: number of the stage, from 0.
        wire: name of the number format to which values are rounded before they are sent, such as "bf16".

    Raises LayoutError if a stage would have no layers.
    """
    at = stage_of(p, layout.pp)
    maker = {name: at[i] for i, op in enumerate(p.ops) for name in op.outputs}
    readers: dict[str, set[int]] = {}
    for i, op in enumerate(p.ops):
        for name in map(p.base, op.inputs):
            if name in maker and maker[name] != at[i]:
                readers.setdefault(name, set()).add(at[i])

    def peer(other: int) -> int:
        return layout.rank(other, lane)

    first: list[Op] = [
        Recv(
            site=f"{name}.recv",
            out=name,
            peer=peer(maker[name]),
            width=int(t.shape[1]),
            rows=str(t.shape[0]),
            wire=wire,
        )
        for name, stages in readers.items()
        if stage in stages and (t := p.tensors[name])
    ]
    last: list[Op] = [
        Send(site=f"{name}.send{other}" if len(stages) > 1 else f"{name}.send", x=name, peer=peer(other), wire=wire)
        for name, stages in readers.items()
        if maker[name] == stage
        for other in sorted(stages)
    ]
    own = [_moved(op, layout, stage) for i, op in enumerate(p.ops) if at[i] == stage]
    ops = [*first, *own, *last]
    mesh = replace(p, mesh=layout.ranks, rank=layout.rank(stage, lane))
    return mesh.with_ops(ops, _tensors(p, ops))


def _moved(op: Op, layout: Layout, stage: int) -> Op:
    """A copy of the collective `op` for pipeline stage number `stage`; `op` itself if it is not a collective.

    The group of `op` has the numbers of lanes, which are ranks counted from 0 within a stage. The group of the copy has
    the numbers of the same ranks among all ranks.
    """
    if isinstance(op, Grouped):
        return replace(op, group=tuple(layout.rank(stage, lane) for lane in op.group))
    return op


def _tensors(p: Program, ops: list[Op]) -> dict[str, Tensor]:
    """The tensors of a Program with only the ops `ops`, as a dict {name: Tensor}.

    They are the tensors that these ops read or write, the tensors of which they read or write views (column ranges),
    and all inputs of the Program.
    """
    named = {x for op in ops for name in (*op.inputs, *op.outputs) for x in (name, p.base(name))}
    return {name: t for name, t in p.tensors.items() if t.role == "input" or name in named}
