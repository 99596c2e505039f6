"""Finds the likely cause of a difference from transformers at a site.

For each common mistake of an op (an omitted bias, a wrong epsilon), computes the op again without that mistake. A
mistake is reported if its correction gives transformers' value. check.py decides whether a site differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from intaglio.batch import Batch
from intaglio.debugging.layer_causes import layer_variants
from intaglio.ops import Attend, Experts, Linear, Map, Norm, Op, Rope, Route, Value
from intaglio.ops.elementwise import FUNCTIONS
from intaglio.program import Program

Values = Mapping[str, Value]
NEAR = 0.05  # an explanation must take away all but this share of the error
SPARE = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")


@dataclass(frozen=True)
class Scene:
    """The values of one step on the reference device, from which ops can be computed again.

    Attributes:
        program: the Program.
        batch: the batch of the step.
        values: {name: value after the step}, for all tensors of the Program (K/V caches included) and all of `spare`.
        spare: vectors of the checkpoint that the Program does not read: {name: vector}.
    """

    program: Program
    batch: Batch
    values: Values
    spare: Mapping[str, np.ndarray]


def explain(scene: Scene, site: str, theirs: np.ndarray, good: set[str]) -> str:
    """Return the likely cause of the difference at `site` (an op's name), as text.

    If no common mistake explains the difference, the text describes the difference instead.

    Args:
        scene: the values of our step.
        site: the name of the op whose result differs from transformers.
        theirs: transformers' value of that result.
        good: the sites whose values agree with transformers.
    """
    name = _result(scene.program, site)
    ours = np.asarray(scene.values[name], np.float64)
    theirs = theirs.astype(np.float64).reshape(ours.shape)
    error = np.linalg.norm(ours - theirs)
    chain = _chain(scene.program, name, good)
    best = (NEAR, "")
    single = ((op.site, words, {op.site: changed}) for op in chain for words, changed in variants(scene, op))
    assert isinstance(scene.values, dict)
    for at, words, changed in itertools.chain(single, layer_variants(scene.program, scene.values, chain)):
        got = rerun(scene, chain, changed, name)
        if got is not None and got.shape == theirs.shape:
            left = float(np.linalg.norm(got - theirs) / error)
            if left < best[0] and (not best[1] or left < best[0] / 4):  # of two that say the same, the first
                best = (left, f"{at}: {words}")
    return best[1] or describe(ours, theirs)


def _result(p: Program, site: str) -> str:
    """Return the name of the tensor to compare at `site`.

    If `site` is the name of an op, the tensor is the op's first result. Otherwise `site` is the name of a view (a slice
    of a tensor's columns), and is returned unchanged.
    """
    return next((op.outputs[0] for op in p.ops if op.site == site and op.outputs), site)


def _chain(p: Program, name: str, good: set[str]) -> list[Op]:
    """Return the ops that compute the tensor `name`, starting from values known to be correct, as a list in order.

    `good` has the names of the correct values. If one of the ops reads a K/V cache, the ops that wrote the cache are in
    the list too.
    """
    wanted, seen = {p.base(name)}, []
    for op in reversed(p.ops):
        writes = {*op.outputs, *op.writes_state}
        if writes & wanted:
            seen.append(op)
            wanted |= {p.base(n) for n in op.inputs if p.base(n) not in good and n not in good}
    return seen[::-1]


def rerun(scene: Scene, chain: list[Op], changed: Mapping[str, Op], name: str) -> np.ndarray | None:
    """Run the ops of `chain` again with some of them replaced. Returns the new value of the tensor `name`, as float64.

    Returns None if an op refuses its operands.

    Args:
        scene: the values from which the ops start.
        chain: the ops to run, in order.
        changed: {site (an op's name): the op to run instead of the op with this name}.
        name: the tensor to return.
    """
    p, v = scene.program, dict(scene.values)
    for n in {n for op in chain for n in op.inputs if p.tensors.get(n) and p.tensors[n].role == "state"}:
        held = v[n]
        v[n] = held.copy() if isinstance(held, np.ndarray) else held
    for op in chain:
        try:
            results = changed.get(op.site, op).reference(v, scene.batch)
        except (ValueError, IndexError, KeyError):
            return None
        v |= results
        for t in p.tensors.values():
            if t.view and t.view[0] in results:
                v[t.name] = results[t.view[0]][:, t.view[1] : t.view[1] + int(t.shape[1])]
    return np.asarray(v[name], np.float64)


def variants(scene: Scene, op: Op) -> Iterator[tuple[str, Op]]:
    """Yield possible corrections of `op`, which may have been ported wrongly, as pairs (text, corrected op).

    There is one pair for each common porting mistake in this kind of op. The text describes the mistake; the corrected
    op is a copy of `op` without it. Nothing is yielded for a kind of op that has no list of mistakes.
    """
    kinds: dict[type, Callable[..., Iterator[tuple[str, Op]]]] = {
        Rope: _rope, Norm: _norm, Linear: _linear, Attend: _attend, Map: _map, Route: _route, Experts: _experts,
    }  # fmt: skip
    return kinds.get(type(op), lambda *_: iter(()))(scene, op)


def _rope(scene: Scene, op: Rope) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting a rope op.

    The text describes the mistake. The yielded op is a copy of `op` with one change: the other way to pair columns, the
    other end of a head's columns, another number of rotated columns, no attention factor, or another rope table of the
    Program.
    """
    other = "half" if op.style == "interleaved" else "interleaved"
    yield f"the wrong rope style: pairs are {other}, not {op.style}", replace(op, style=other)
    end = "last" if not op.trailing else "first"
    yield f"rope turns the {end} columns of a head", replace(op, trailing=not op.trailing)
    if op.factor != 1:
        yield "the rope's attention factor does not belong there", replace(op, factor=1.0)
    yield from _rotated(scene, op)
    for t in scene.program.of_role("const"):
        if t.name != op.frequencies:
            yield f"the wrong rope table: {t.name} fits", replace(op, frequencies=t.name)


def _rotated(scene: Scene, op: Rope) -> Iterator[tuple[str, Op]]:
    """Yield copies of `op` that rotate another number of a head's columns, as pairs (text, op).

    The text describes the change. About 64 numbers are tried, from 2 columns to the whole head. The frequencies for n
    pairs of columns are theta^(-i / n), where i counts the pairs and theta is found from `op`'s table of frequencies.
    The new tables are added to scene.values. Nothing is yielded if `op`'s table has fewer than two frequencies, or if
    its second frequency is not less than its first.
    """
    values, have = scene.values, np.asarray(scene.values[op.frequencies], np.float64)
    assert isinstance(values, dict)
    n = len(have)
    if n < 2 or not 0 < have[1] < have[0]:
        return
    theta = (have[0] / have[1]) ** n
    for m in range(1, op.head_dim // 2 + 1, max(1, op.head_dim // 64)):
        if m != n:
            name = f"{op.frequencies}.{m}"
            values[name] = (have[0] * theta ** (-np.arange(m) / m)).astype(np.float32)
            words = f"rope turns {2 * m} of {op.head_dim} columns of a head, not {2 * n}"
            yield words, replace(op, frequencies=name)


def _norm(scene: Scene, op: Norm) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting a norm.

    The text describes the mistake. The yielded op is a copy of `op` without it. The mistakes are a wrong offset of the
    weight, a wrong kind of norm, a wrong epsilon, a wrong weight, and a residual that should not be added.
    """
    offset = 1.0 - op.offset
    yield f"the norm's offset: the weight is stored as weight - {offset:.0f}", replace(op, offset=offset)
    for kind in ("rms", "layer", "l2") if op.norm != "none" else ():
        if kind == op.norm:
            continue
        yield f"the wrong norm: {kind}, not {op.norm}", replace(op, norm=kind)
    for eps in {1e-12, 1e-6, 1e-5, 1e-3} - {op.eps}:
        yield f"the norm's eps: {eps}, not {op.eps}", replace(op, eps=eps)
    if op.weight is not None:
        for other in _alike(scene, op.weight):
            yield f"the wrong norm's weight (a norm misplaced or swapped): {other} fits", replace(op, weight=other)
            bias = other.removesuffix("weight") + "bias"
            if op.bias is not None and bias in scene.values:
                yield (
                    f"the wrong norm's weight and bias (norms swapped): {other} and {bias} fit",
                    replace(op, weight=other, bias=bias),
                )
    if op.residual is not None:
        yield "a residual that does not belong there", replace(op, residual=None)


def _linear(scene: Scene, op: Linear) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting a linear op.

    The text describes the mistake. The yielded op is a copy of `op` with one change: no bias, a bias that is in the
    checkpoint and that the port does not use, another weight, the transposed weight, no scale, or another activation.
    """
    if op.bias is not None:
        yield "a bias that does not belong there", replace(op, bias=None)
    else:
        for name in _spare(scene, op, "bias"):
            yield f"a missing bias: {name} fits", replace(op, bias=name)
    s = scene.program.tensors[op.w].shape
    if len(s) == 2 and s[0] == s[1]:
        yield "a transposed weight", _turned(scene, op)
    for other in _alike(scene, op.w):
        yield f"the wrong weight: {other} fits", replace(op, w=other)
    if op.scale != 1:
        yield f"a scale of {op.scale:g} that does not belong there", replace(op, scale=1.0)
    for act in ("", *SPARE):
        if act != op.activation and not op.glu:
            yield f"the activation: {act or 'none'}, not {op.activation or 'none'}", replace(op, activation=act)


def _turned(scene: Scene, op: Linear) -> Op:
    """Return a copy of the linear `op` with the transposed weight, to try in case the port forgot to transpose.

    The transposed weight is added to scene.values under the weight's name plus ".turned". A quantised weight is not
    transposed, and nothing is added. rerun() then returns None for the copy.
    """
    values = scene.values
    assert isinstance(values, dict)
    w = values[op.w]
    if isinstance(w, np.ndarray):
        values[op.w + ".turned"] = w.T
    return replace(op, w=op.w + ".turned")


def _attend(scene: Scene, op: Attend) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting attention.

    The text describes the mistake. The yielded op is a copy of `op` with one change: another window, chunk, softcap or
    scale, no temperature, no sinks, or sinks that are in the checkpoint and that the port does not use.
    """
    length = len(scene.batch.tokens)
    windows = [w for w in (0, op.window - 1, op.window + 1, *range(1, length)) if w >= 0 and w != op.window]
    for w in dict.fromkeys(windows):
        yield f"the window: {w or 'none'}, not {op.window or 'none'}", replace(op, window=w, chunk=0)
    for c in dict.fromkeys([0, *range(2, length)]):
        if c != op.chunk:
            yield f"the chunk: {c or 'none'}, not {op.chunk or 'none'}", replace(op, chunk=c, window=0)
    if op.softcap:
        yield "a softcap that does not belong there", replace(op, softcap=0.0)
    for cap in (50.0, 30.0, 4.0):
        yield f"a missing softcap: {cap:g} fits", replace(op, softcap=cap)
    width = int(scene.program.tensors[op.q].shape[1]) // op.heads
    for n in dict.fromkeys([width, *range(8, 257, 8)]):
        yield f"the attention scale: 1 / sqrt({n}), not {op.scale:g}", replace(op, scale=n**-0.5)
    if op.sinks is not None:
        yield "sinks that do not belong there", replace(op, sinks=None)
    else:
        for name in _spare(scene, op, "sinks"):
            yield f"missing attention sinks: {name} fits", replace(op, sinks=name)
    if op.temper:
        yield "a temperature that does not belong there", replace(op, temper=0.0)


def _map(scene: Scene, op: Map) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting an elementwise op.

    The text describes the mistake. The yielded op is a copy of `op` without it. The mistakes are swapped operands, a
    wrong activation, and a wrong scale of the residual.
    """
    if op.b is not None and op.c is None:
        yield "gate and up are swapped" if "(a)" in op.expr else "operands are swapped", replace(op, a=op.b, b=op.a)
    for old in FUNCTIONS:
        if f"{old}(" in op.expr:
            for new in SPARE:
                if new != old:
                    yield f"the activation: {new}, not {old}", replace(op, expr=op.expr.replace(f"{old}(", f"{new}("))
    if op.expr.startswith("a + b"):
        for scale in (1.0, 0.22, 0.5, 2.0):
            expr = f"a + b * {scale}"
            if expr != op.expr and not (scale == 1 and op.expr == "a + b"):
                yield f"the residual's scale: {scale:g}", replace(op, expr=expr)


def _route(scene: Scene, op: Route) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting expert routing.

    The text describes the mistake. The yielded op is a copy of `op` with one change: the other setting of `normalise`,
    another score function, another scale or none, no groups, no correction bias, or a correction bias that is in the
    checkpoint and that the port does not use.
    """
    does = "are not" if op.normalise else "are"
    yield f"the wrong renormalisation: weights {does} divided by their sum", replace(op, normalise=not op.normalise)
    for score in ("softmax", "sigmoid", "chosen"):
        if score != op.score:
            yield (
                f"the routing score: {score}, not {op.score}",
                replace(op, score=score, bias=None if score == "chosen" else op.bias),
            )
    if op.bias is not None:
        yield "a correction bias that does not belong there", replace(op, bias=None)
    else:
        for name in _spare(scene, op, "correction_bias"):
            yield f"a missing correction bias: {name} fits", replace(op, bias=name)
    if op.scale != 1:
        yield f"a routing scale of {op.scale:g} that does not belong there", replace(op, scale=1.0)
    for scale in (2.5, 1.5, 16.0):
        yield f"the routing scale: {scale:g}, not {op.scale:g}", replace(op, scale=scale)
    if op.groups:
        yield "groups of experts that do not belong there", replace(op, groups=0)


def _experts(scene: Scene, op: Experts) -> Iterator[tuple[str, Op]]:
    """Yield a pair (text, op) for each common mistake in porting the experts of a layer.

    The text describes the mistake. The yielded op is a copy of `op` with one change: gate and up swapped, transposed
    matrices, another activation or clamp, no biases, or routing weights multiplied with the experts' input instead of
    their result (or the reverse).
    """
    if op.gate is not None:
        yield "gate and up of the experts are swapped", replace(op, gate=op.up, up=op.gate)
    for act in SPARE:
        if act != op.activation:
            yield f"the experts' activation: {act}, not {op.activation}", replace(op, activation=act)
    where = "result" if op.scale_input else "input"
    yield f"routing weights belong on the experts' {where}", replace(op, scale_input=not op.scale_input)
    if op.limit:
        yield "the experts' clamp does not belong there", replace(op, limit=0.0)
    for alpha, limit, shift in ((1.702, 7.0, 1.0), (1.0, 10.0, 0.0), (1.702, 1.5, 1.0)):
        if op.gate is not None and (alpha, limit, shift) != (op.alpha, op.limit, op.shift):
            words = f"the experts' gate: alpha {alpha:g}, limit {limit:g}, shift {shift:g}"
            yield words, replace(op, alpha=alpha, limit=limit, shift=shift)
    for n in ("gate", "up", "down"):
        if getattr(op, n) is not None:
            yield f"the experts' {n} matrices are transposed", _turned_stack(scene, op, n)
    if op.up_bias is not None:
        yield "experts' biases that do not belong there", replace(op, gate_bias=None, up_bias=None, down_bias=None)


def _turned_stack(scene: Scene, op: Experts, which: str) -> Op:
    """Return a copy of the experts op `op` that multiplies with transposed matrices.

    `which` says which matrices are transposed: "gate", "up" or "down". The transposed matrices are added to
    scene.values under the weight's name plus ".turned". Quantised matrices are not transposed, and nothing is added.
    rerun() then returns None for the copy.
    """
    values, name = scene.values, getattr(op, which)
    assert isinstance(values, dict)
    w = values[name]
    if isinstance(w, np.ndarray):
        values[name + ".turned"] = w.swapaxes(1, 2)
    return replace(op, **{which: name + ".turned"})


def _alike(scene: Scene, weight: str) -> list[str]:
    """Return the names of up to 12 other weights that have the shape of the weight named `weight`, as a list.

    The names nearest to `weight` in the Program's list of weights come first. The list is empty if the Program has no
    tensor `weight`.
    """
    tensors = scene.program.tensors
    names = [t.name for t in scene.program.of_role("weight")]
    at = names.index(weight) if weight in names else 0
    same = [n for n in names if n != weight and tensors[n].shape == tensors[weight].shape]
    return sorted(same, key=lambda n: abs(names.index(n) - at))[:12] if weight in tensors else []


def _spare(scene: Scene, op: Op, ending: str) -> list[str]:
    """Return a list of names of vectors in the checkpoint that the port does not read and that `op` may need.

    They are the names in scene.spare that end with `ending`. If `op` is in a layer, only vectors of that layer are
    returned.
    """
    layer = ".".join(op.site.split(".")[:2]) + "."
    return [n for n in scene.spare if n.endswith(ending) and (layer in n or not op.site.startswith("layers."))]


def describe(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Return a text that describes how our values differ from those of transformers.

    It is for differences that no known mistake explains. The text names a factor, a bias, NaN or infinite values, or
    the tokens that differ.

    Args:
        ours: our values [tokens, columns].
        theirs: transformers' values [tokens, columns].
    """
    bad = ~np.isfinite(ours)
    if bad.any():
        first = int(np.flatnonzero(bad.any(axis=1))[0])
        return f"{int(bad.sum())} values are NaN or infinite here, the first in row {first}"
    scale = float((ours * theirs).sum() / max((ours * ours).sum(), 1e-300))
    error = np.linalg.norm(ours - theirs)
    if np.linalg.norm(scale * ours - theirs) < NEAR * error:
        return f"a scale: theirs is {scale:.6g} times ours"
    gap = theirs - ours
    if len(gap) > 2 and np.linalg.norm(gap - gap.mean(axis=0)) < NEAR * np.linalg.norm(gap):
        return "a missing or wrong bias: theirs is ours plus one vector for every token"
    rows = np.linalg.norm(gap, axis=1) / np.maximum(np.linalg.norm(theirs, axis=1), 1e-300)
    off = np.flatnonzero(rows > max(1e-4, NEAR * rows.max()))
    if len(off) and off[0] > 0 and len(off) >= (len(rows) - off[0]) // 2:
        agree = "token 0 agrees" if off[0] == 1 else f"tokens 0 to {int(off[0]) - 1} agree"
        return f"{agree}, later tokens differ: a rope table, a window or a mask"
    if len(off) < len(rows) // 3:
        return f"only {len(off)} of {len(rows)} tokens differ: routing, or a mask"
    return "no single known fault explains it"
