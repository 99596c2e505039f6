"""Trace: the values that a tiny transformers model computes, module by module, for one prompt.

The other files of this package read values from a Trace as NumPy arrays; only this file and tiny.py touch torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NEAR = 2e-5  # relative difference below which two traced values count as equal


class Unmatched(ValueError):
    """Raised for a part of a model that this package's model description (Decoder) cannot express.

    Attributes:
        module: name of the transformers module.
        missing: the module's computation that no op and no field of Decoder can express.
        nearest: the op or field that comes nearest to it.
    """

    def __init__(self, module: str, missing: str, nearest: str) -> None:
        super().__init__(f"{module}: {missing}; the nearest is {nearest}")
        self.module, self.missing, self.nearest = module, missing, nearest


@dataclass(frozen=True)
class Call:
    """One traced call of a transformers module.

    Attributes:
        name: the module's name.
        inputs: the module's tensor arguments, without the batch dimension of 1.
        outputs: the module's tensor results, without the batch dimension of 1.
    """

    name: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]

    @property
    def x(self) -> np.ndarray:
        """The first tensor argument of the call, as an array."""
        return self.inputs[0]

    @property
    def y(self) -> np.ndarray:
        """The first tensor result of the call, as an array."""
        return self.outputs[0]


@dataclass(frozen=True)
class Attention:
    """One traced call of transformers' attention function.

    Attributes:
        name: name of the attention module.
        q: queries [heads, tokens, head_dim].
        k: keys [kv heads, tokens, head_dim].
        v: values [kv heads, tokens, value_dim].
        mask: the array [tokens, tokens] that is added to the scores; None without a mask.
        out: the result [tokens, heads * value_dim].
        scale: the factor by which the scores q @ k.T are multiplied.
        given: the function's other numeric arguments, such as softcap: {name: value}.
    """

    name: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray | None
    out: np.ndarray
    scale: float
    given: Mapping[str, float]


@dataclass
class Trace:
    """The values that a transformers model computes in one run, module by module.

    Attributes:
        tokens: token ids of the prompt.
        calls: the calls of modules, in the order in which they ended.
        attention: the calls of the attention function, in order.
        logits: the logits [tokens, vocabulary].
        parameters: the model's parameters and buffers: {name: values}.
        lists: length of each list of modules (torch.nn.ModuleList): {name: length}.
        embedding: name of the module of the token embedding.
        head: name of the module of the output head; "" if there is none.
        config: the model's configuration as a dict.
        probe: function that takes (module name, array), runs the module on the array and returns the module's result.
        norms: cache that modules.norms() fills: {id() of a Call: its Norm, or None if the call computes no norm}.
    """

    tokens: Sequence[int]
    calls: list[Call] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, int] = field(default_factory=dict)
    embedding: str = ""
    head: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    probe: Callable[[str, np.ndarray], np.ndarray] = field(default_factory=lambda: lambda name, x: x)
    norms: dict[int, Any] = field(default_factory=dict)

    def uncalled(self) -> list[str]:
        """Return a sorted list of the names of modules that have parameters but were not used in the run.

        A module was not used if neither it nor a module inside it was called.
        """
        called = {c.name for c in self.calls}
        held = {n.rpartition(".")[0] for n in self.parameters}
        return sorted(m for m in held if m not in called and not any(c.startswith(f"{m}.") for c in called))

    def below(self, name: str) -> list[Call]:
        """Return the calls of modules inside the module `name`, at any depth, as a list.

        The calls are in the order in which they ended.
        """
        return [c for c in self.calls if c.name.startswith(f"{name}.")]

    def of(self, name: str) -> Call | None:
        """Return the first call of the module `name`; None if the module was not called."""
        return next((c for c in self.calls if c.name == name), None)

    def weight(self, name: str, what: str = "weight") -> np.ndarray | None:
        """Return the parameter `what` of the module `name` as an array; None if the module has no such parameter."""
        return self.parameters.get(f"{name}.{what}")


def record(model: Any, tokens: Sequence[int]) -> Trace:
    """Run a transformers model on the token ids `tokens`, and return the Trace of all values that it computes."""
    import torch

    trace = Trace(tokens, config=model.config.get_text_config().to_dict())
    trace.parameters = {n: p.detach().float().numpy() for n, p in model.state_dict(keep_vars=False).items()}
    modules = dict(model.named_modules())
    trace.lists = {n: len(m) for n, m in modules.items() if isinstance(m, torch.nn.ModuleList) and len(m)}
    names = {id(m): n for n, m in modules.items()}
    trace.embedding = names[id(model.get_input_embeddings())]
    head = model.get_output_embeddings()
    trace.head = names.get(id(head), "") if head is not None else ""

    def keep(name: str) -> Callable[..., None]:
        def after(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = [plain(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            made = [plain(x) for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
            if given and made:
                trace.calls.append(Call(name, tuple(given), tuple(made)))

        return after

    def plain(x: Any) -> np.ndarray:
        kept = x.detach().float() if x.is_floating_point() else x.detach()
        return kept[0].numpy().copy() if kept.dim() > 2 and kept.shape[0] == 1 else kept.numpy().copy()

    def probe(name: str, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = modules[name](torch.from_numpy(np.asarray(x, np.float32)))
        return np.asarray((out[0] if isinstance(out, tuple) else out).float().numpy())

    trace.probe = probe
    handles = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in modules.items() if n]
    patched = _watch_attention(trace, modules, names)
    try:
        with torch.no_grad():
            out = model(torch.tensor([list(tokens)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for place, old in patched.items():
            sys.modules[place].eager_attention_forward = old  # type: ignore[attr-defined]
    trace.logits = out.logits[0].float().numpy()
    return trace


def _watch_attention(trace: Trace, modules: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """Replace transformers' attention function by one that also appends each call to trace.attention.

    Returns {name of a Python module: its original function}. With it the caller can undo the replacement.

    Args:
        trace: the trace to which calls are appended.
        modules: the model's modules: {name: module}.
        names: {id() of a module: its name}.
    """
    import torch

    def plain(x: Any) -> np.ndarray:
        return np.asarray(x[0].detach().float().numpy().copy())

    patched: dict[str, Any] = {}
    for place in {type(m).__module__ for m in modules.values()}:
        old = getattr(sys.modules[place], "eager_attention_forward", None)
        if old is None:
            continue

        def watch(
            module: Any,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any = None,
            *args: Any,
            old: Any = old,
            **kwargs: Any,
        ) -> Any:
            q, k, v, mask = query, key, value, attention_mask
            out = old(module, q, k, v, mask, *args, **kwargs)
            scale = kwargs.get("scaling", args[0] if args and isinstance(args[0], float) else None)
            scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
            given = {n: float(x) for n, x in kwargs.items() if isinstance(x, int | float) and not isinstance(x, bool)}
            bias = mask[0, -1].float().numpy().copy() if isinstance(mask, torch.Tensor) else None
            flat = out[0][0].detach().float().numpy().copy().reshape(q.shape[2], -1)
            trace.attention.append(Attention(names[id(module)], plain(q), plain(k), plain(v), bias, flat, scale, given))
            return out

        patched[place] = old
        sys.modules[place].eager_attention_forward = watch  # type: ignore[attr-defined]
    return patched


def same(a: np.ndarray, b: np.ndarray, near: float = NEAR) -> bool:
    """True if two arrays have equally many values and ||a - b|| <= near * ||b||. Their shapes may differ."""
    if a.size != b.size:
        return False
    x, y = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    return bool(np.linalg.norm(x - y) <= near * max(float(np.linalg.norm(y)), 1e-30))


def factors(y: np.ndarray, *terms: np.ndarray) -> tuple[float, ...] | None:
    """Express `y` as a weighted sum of the arrays `terms`. Returns the weights as a tuple, one for each term.

    The weights are fitted by least squares. A weight within 2e-5 of 1 is returned as exactly 1. Returns None if the
    fitted sum differs from `y` by more than same() allows, or if a term and `y` have different sizes.
    """
    if any(t.size != y.size for t in terms):
        return None
    a = np.stack([t.reshape(-1).astype(np.float64) for t in terms], axis=1)
    found, *_ = np.linalg.lstsq(a, y.reshape(-1).astype(np.float64), rcond=None)
    if not same(a @ found, y):
        return None
    return tuple(1.0 if abs(f - 1) < NEAR else float(f) for f in found)
