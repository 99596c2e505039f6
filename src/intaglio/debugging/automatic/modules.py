"""Finds the linear modules and norms in a Trace, and of a norm its kind, epsilon, offset, weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from intaglio.debugging.automatic.trace import Call, Trace, Unmatched, same


@dataclass(frozen=True)
class Linear:
    """One traced call of a linear module, which computes y = x @ weight.T + bias.

    Attributes:
        name: the module's name.
        transposed: True if the weight is stored as [inputs, outputs].
        bias: True if the module has a bias.
        x: the argument [tokens, inputs].
        y: the result [tokens, outputs].
    """

    name: str
    transposed: bool
    bias: bool
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Norm:
    """One traced call of a normalisation module (RMS norm, layer norm or L2 norm).

    Attributes:
        name: the module's name.
        kind: "rms", "layer" or "l2".
        eps: epsilon: added to the mean square (rms), the variance (layer) or the sum of squares (l2).
        offset: number that the module adds to its weight before it multiplies: 0 or 1.
        weight: True if the module has a weight.
        bias: True if the module has a bias.
        x: the module's argument, which is normalised along the last dimension.
        y: the module's result, in the shape of `x`.
    """

    name: str
    kind: str
    eps: float
    offset: float
    weight: bool
    bias: bool
    x: np.ndarray
    y: np.ndarray

    @property
    def family(self) -> tuple[str, float, float, bool, bool]:
        """This norm's settings as a tuple (kind, eps, offset, weight, bias).

        All norms of a model must have the same settings. A model whose norms differ in one of the settings cannot be
        ported.
        """
        return self.kind, self.eps, self.offset, self.weight, self.bias


def linears(t: Trace, under: str) -> Iterator[Linear]:
    """Yield a Linear for each call of a linear module inside `under`, in the order in which the calls ended."""
    for call in t.below(under):
        w = t.weight(call.name)
        if w is None or w.ndim != 2 or call.x.dtype.kind != "f":
            continue
        x, b = call.x.reshape(-1, call.x.shape[-1]), t.weight(call.name, "bias")
        for transposed in (False, True):
            m = w if transposed else w.T
            if x.shape[1] == m.shape[0] and call.y.size == len(x) * m.shape[1]:
                made = x @ m + (0 if b is None else b)
                if same(made, call.y):
                    yield Linear(call.name, transposed, b is not None, x, call.y.reshape(len(x), -1))
                    break


def norms(t: Trace, under: str, but: str = "") -> list[Norm]:
    """Return a list of the normalisation modules called inside the module `under` ("" means the whole model).

    Each item is a Norm. The list is in the order in which the calls ended. Modules inside the module `but` are left
    out; "" leaves out none. A module counts as a norm if it has no child modules, all its parameters are vectors, and
    its result is its argument after an RMS, layer or L2 norm.
    """
    calls = t.below(under) if under else t.calls
    calls = [c for c in calls if not but or not c.name.startswith(f"{but}.")]
    parents = {c.name.rpartition(".")[0] for c in calls}
    found = []
    for call in calls:
        if call.name in parents or call.x.dtype.kind != "f" or call.x.shape != call.y.shape:
            continue
        if id(call) not in t.norms:
            t.norms[id(call)] = norm_of(t, call)
        if (norm := t.norms[id(call)]) is not None:
            found.append(norm)
    return found


def norm_of(t: Trace, call: Call) -> Norm | None:
    """Return a Norm that describes `call`; None if the called module computes no RMS, layer or L2 norm.

    The kind of norm and its settings are found by comparing the call's result with norms computed from its argument.
    """
    own = {n.rpartition(".")[2]: v for n, v in t.parameters.items() if n.rpartition(".")[0] == call.name}
    if any(v.ndim > 1 for v in own.values()):
        return None
    w, b = own.get("weight"), own.get("bias")
    if any(v is not None and v.shape[-1] != call.x.shape[-1] for v in (w, b)):
        return None
    x, y = call.x.astype(np.float64), call.y.astype(np.float64)
    shift = 0.0 if b is None else b.astype(np.float64)
    for kind in ("rms", "layer", "l2"):
        centred = x - x.mean(axis=-1, keepdims=True) if kind == "layer" else x
        squares = (centred**2).sum(axis=-1, keepdims=True) / (1 if kind == "l2" else x.shape[-1])
        for offset in (0.0, 1.0) if w is not None else (0.0,):
            scale = 1.0 if w is None else w.astype(np.float64) + offset
            if same(centred / np.sqrt(squares) * scale + shift, y, 2e-2):
                eps = _eps(t, call.name, kind, scale, shift, x.shape)
                if same(centred / np.sqrt(squares + eps) * scale + shift, y, 1e-4):
                    return Norm(call.name, kind, eps, offset, w is not None, b is not None, call.x, call.y)
    return None


def _eps(
    t: Trace, name: str, kind: str, scale: np.ndarray | float, shift: np.ndarray | float, shape: tuple[int, ...]
) -> float:
    """Measure a norm's epsilon. Returns a float with two significant digits; 0.0 if the epsilon is below 1e-9.

    The module is run on random values of about 2e-3. Their squares are so small that the epsilon changes the result
    visibly.

    Args:
        t: the trace, whose probe() runs the module.
        name: the module's name.
        kind: "rms", "layer" or "l2".
        scale: factor on the normalised values: the module's weight plus its offset.
        shift: the module's bias, added to the scaled values; 0.0 without one.
        shape: shape of the module's input.
    """
    x = np.random.default_rng(0).standard_normal(shape) * 2e-3
    if kind == "l2":
        x /= shape[-1] ** 0.5
    y = (t.probe(name, x.astype(np.float32)) - shift) / scale
    centred = x - x.mean(axis=-1, keepdims=True) if kind == "layer" else x
    squares = (centred**2).sum(axis=-1) / (1 if kind == "l2" else shape[-1])
    ratio = (centred * y).sum(axis=-1) / (centred**2).sum(axis=-1)  # 1 / sqrt(squares + eps)
    eps = float(np.median(1 / ratio**2 - squares))
    return float(f"{eps:.1e}") if eps > 1e-9 else 0.0


def one_family(found: list[Norm]) -> Norm:
    """Check that all norms in the list `found` have the same settings (Norm.family). Returns the first norm.

    `found` must not be empty. Raises Unmatched for the first norm whose settings differ.
    """
    first = found[0]
    for n in found:
        if n.family != first.family:
            say = [
                f"{x.kind} norm, eps {x.eps:g}, offset {x.offset:g}, weight {x.weight}, bias {x.bias}"
                for x in (n, first)
            ]
            raise Unmatched(
                n.name, f"a {say[0]}, where {first.name} is a {say[1]}", "Decoder's norm, one for all sites"
            )
    return first
