"""Finds out from a Trace what an attention block computes: projections, norms, rope, scale, mask, gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from intaglio.debugging.automatic.modules import Linear, Norm, linears, norms
from intaglio.debugging.automatic.rotation import Rotation, observe_rotation
from intaglio.debugging.automatic.trace import Attention, Trace, Unmatched, same

Facts = dict[str, Any]


def attention_facts(t: Trace, rec: Attention, x: np.ndarray, result: np.ndarray) -> tuple[Facts, list[Norm]]:
    """What an attention block computes. Returns (facts, norms): a dict, and [norm of q, norm of k] or [].

    The dict has the sizes (heads, kv_heads, head_dim, value_dim), the projections (names, layout, transposed, biases,
    o_name, o_transposed, o_bias), qk_norm and qk_names, rope (a Rotation), scale, softcap, sinks, window, chunk, gate
    and inner_norm.

    Args:
        t: the trace.
        rec: the block's call of the attention function.
        x: the block's input.
        result: the block's result.

    Raises Unmatched if the fields of Decoder cannot express the block.
    """
    own = list(linears(t, rec.name))
    readers = [n for n in own if same(n.x, x)]
    out = next((n for n in own if same(n.y, result)), None)
    if out is None:
        raise Unmatched(rec.name, "its result is not that of a linear", "o_proj")
    found = norms(t, rec.name)
    f: Facts = {
        "heads": rec.q.shape[0], "kv_heads": rec.k.shape[0], "head_dim": rec.k.shape[-1], "value_dim": rec.v.shape[-1],
        "o_bias": out.bias, "o_name": _relative(out.name, rec.name), "o_transposed": out.transposed,
    }  # fmt: skip
    f |= _scores(t, rec) | _after(t, rec, x, out, readers, found)
    used = _projections(t, rec, readers, found, f)
    return f, used


def _relative(name: str, under: str) -> str:
    return name.removeprefix(f"{under}.")


def _scores(t: Trace, rec: Attention) -> Facts:
    """How the traced result follows from queries, keys and values: a dict {scale, softcap, sinks, window, chunk}.

    scale and softcap are floats (0: no softcap), sinks is True if the module has attention sinks, window and chunk are
    tokens (0: none). Raises Unmatched if softmax attention does not give the traced result with any values tried.

    Args:
        t: the trace.
        rec: the call of the attention function.
    """
    heads, n = rec.q.shape[:2]
    seen = np.tri(n, dtype=bool) if rec.mask is None else rec.mask > -1e30
    window, chunk = visible(seen, rec.name)
    sinks = t.parameters.get(f"{rec.name}.sinks")
    softcap = rec.given.get("softcap", 0.0)
    k, v = (np.repeat(x, heads // len(x), axis=0).astype(np.float64) for x in (rec.k, rec.v))
    raw = rec.q.astype(np.float64) @ k.swapaxes(1, 2) * rec.scale
    for cap in dict.fromkeys((softcap, 0.0)):
        for sink in (sinks, None) if sinks is not None else (None,):
            s = np.tanh(raw / cap) * cap if cap else raw
            s = np.where(seen, s, -np.inf)
            top = s.max(axis=-1, keepdims=True)
            e = np.exp(s - top)
            total = e.sum(axis=-1, keepdims=True)
            if sink is not None:
                total = total + np.exp(sink.astype(np.float64)[:, None, None] - top)
            made = (e / total @ v).swapaxes(0, 1).reshape(n, -1)
            if same(made, rec.out, 1e-4):
                return {
                    "scale": rec.scale, "softcap": cap, "sinks": sink is not None, "window": window, "chunk": chunk,
                }  # fmt: skip
    raise Unmatched(
        rec.name, "attention that is not softmax(scale * q k^T) v, with a softcap or sinks or without", "attend"
    )


def visible(seen: np.ndarray, name: str) -> tuple[int, int]:
    """(window, chunk) of an attention mask, in tokens; 0 for none. Raises Unmatched for any other mask.

    seen: bool [queries, keys], True where a query sees a key. name: the module's name, for the error.
    """
    n = len(seen)
    at, to = np.arange(n)[:, None], np.arange(n)[None]
    causal = to <= at
    if np.array_equal(seen, causal):
        return 0, 0
    width = int(seen[-1].sum())
    if np.array_equal(seen, causal & (at - to < width)):
        return width, 0
    for chunk in range(2, n):
        if np.array_equal(seen, causal & (at // chunk == to // chunk)):
            return 0, chunk
    raise Unmatched(name, "a mask that is neither causal nor a window nor chunks", "attend's window and chunk")


def _after(t: Trace, rec: Attention, x: np.ndarray, out: Linear, readers: list[Linear], found: list[Norm]) -> Facts:
    """A dict {"gate": name, "inner_norm": name} of modules between attention and output projection; "" for none.

    Args:
        t: the trace.
        rec: the call of the attention function.
        x: the block's input.
        out: the output projection.
        readers: linears that read x.
        found: norms in the block.

    Raises Unmatched if anything else lies between them.
    """
    f: Facts = {"gate": "", "inner_norm": ""}
    held = rec.out
    gated = [g for g in readers if g.y.shape == held.shape and same(held / (1 + np.exp(-g.y)), out.x, 1e-4)]
    if gated and not gated[0].bias:
        return f | {"gate": _relative(gated[0].name, rec.name)}
    normed = next((n for n in found if same(n.x, held) and same(n.y, out.x)), None)
    if normed is not None:
        return f | {"inner_norm": _relative(normed.name, rec.name)}
    if not same(held, out.x):
        raise Unmatched(out.name, "an input that is not attention's result, nor that gated or normed", "attn_gate")
    return f


def _layouts(readers: list[Linear], rec: Attention) -> Iterator[tuple[str, list[Linear], list[np.ndarray]]]:
    """Yield (layout, linears, [q, k, v]) for each way in which the linears `readers` may hold the projections.

    layout: "separate" (three linears), "rows" (one linear with the rows of q, then k, then v) or "groups" (one linear
    with q, k and v of one K/V head after the other). q, k, v: arrays [tokens, heads, columns].
    """
    (h, n, d), g, e = rec.q.shape, rec.k.shape[0], rec.v.shape[-1]
    widths = (h * d, g * d, g * e)
    for a in readers:
        if a.y.shape[1] == sum(widths):
            cut = np.split(a.y, np.cumsum(widths)[:2], axis=1)
            yield "rows", [a], [cut[0].reshape(n, h, d), cut[1].reshape(n, g, d), cut[2].reshape(n, g, e)]
            y = a.y.reshape(n, g, -1)
            part = np.split(y, np.cumsum((h // g * d, d)), axis=2)
            yield "groups", [a], [part[0].reshape(n, h, d), part[1], part[2]]
    of = {w: [r for r in readers if r.y.shape[1] == w] for w in widths}
    for q in of[widths[0]]:
        for k in of[widths[1]]:
            for v in of[widths[2]]:
                if len({q.name, k.name, v.name}) == 3:
                    ys = (q.y.reshape(n, h, d), k.y.reshape(n, g, d), v.y.reshape(n, g, e))
                    yield "separate", [q, k, v], list(ys)


def _projections(t: Trace, rec: Attention, readers: list[Linear], found: list[Norm], f: Facts) -> list[Norm]:
    """Find the linears, norms and rope that make queries, keys and values from the block's input, and add them to `f`.

    The keys added to `f` are rope, layout (see _layouts()), names, transposed, biases, qk_norm and qk_names. If queries
    have a further factor, f["scale"] is multiplied by it. Returns [norm of q, norm of k], or [] without norms.

    Args:
        t: the trace.
        rec: the call of the attention function.
        readers: linears that read the block's input.
        found: norms in the block.
        f: facts of the block so far.

    Raises Unmatched if queries, keys and values are computed in any other way.
    """
    q, k, late = rec.q, rec.k, [_late(found, x) for x in (rec.q, rec.k)]
    if late[0] is not None and late[1] is not None:
        q, k = (_by_head(n.x, x.shape) for n, x in zip(late, (rec.q, rec.k), strict=True) if n)
    for layout, source, (yq, yk, yv) in _layouts(readers, rec):
        if not same(yv.swapaxes(0, 1), rec.v):
            continue
        for early in (True, False):
            pq, pk = (_early(found, y) for y in (yq, yk)) if early else (None, None)
            if early and (pq is None or pk is None):
                continue
            bq = _by_head(pq.y, q.shape) if pq else yq.swapaxes(0, 1)
            bk = _by_head(pk.y, k.shape) if pk else yk.swapaxes(0, 1)
            turn = observe_rotation(bk, k)
            extra = _extra(bq, q, turn) if turn is not None else None
            if turn is None or extra is None:
                continue
            f["scale"] *= 1.0 if abs(extra - 1) < 1e-5 else extra
            f |= {"rope": turn, "layout": layout, "names": tuple(_relative(s.name, rec.name) for s in source)}
            f |= {"transposed": source[0].transposed, "biases": tuple(s.bias for s in source)}
            f["qk_norm"], used = _qk_norm(rec, pq, pk, late)
            if f["qk_norm"] == "late" and not turn.dim:
                f["qk_norm"] = "head"  # without rope the order does not matter
            f["qk_names"] = tuple(_relative(n.name, rec.name) for n in used)
            return used
    raise Unmatched(
        rec.name, "queries, keys and values are not linears of the block's input, normed or turned by rope",
        "q_proj, k_proj and v_proj with qk_norm and rope",
    )  # fmt: skip


def _by_head(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A norm's argument or result as an array of `shape`, [heads, tokens, head_dim].

    x: has this shape already, or as many values ordered by token, then head.
    """
    if x.shape == shape:
        return x
    return x.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)


def _late(found: list[Norm], x: np.ndarray) -> Norm | None:
    """The norm in `found` that norms each head by itself and has x [heads, tokens, head_dim] as its result, or None."""
    return next((n for n in found if n.y.size == x.size and n.x.ndim == 3 and same(_by_head(n.y, x.shape), x)), None)


def _early(found: list[Norm], y: np.ndarray) -> Norm | None:
    """The norm that reads a projection's result y [tokens, heads, head_dim]; None if no norm does.

    The norm may read y with heads before tokens.
    """
    return next((n for n in found if same(n.x, y) or same(n.x, y.swapaxes(0, 1))), None)


def _extra(before: np.ndarray, after: np.ndarray, turn: Rotation) -> float | None:
    """The factor by which a model scales queries while it rotates them; 1.0 if it does not scale them.

    Three candidate factors are tried. The result is the first one with which `before`, scaled, is rotated to `after`
    in as many dimensions and in the same style as the keys; None if no candidate is.

    Args:
        before: the queries before rope, [heads, tokens, head_dim].
        after: the queries after rope, in the same shape.
        turn: the rotation of the keys.
    """
    length = [np.linalg.norm(x.astype(np.float64), axis=-1) for x in (before, after)]
    last = [float(np.linalg.norm(x[..., -1].astype(np.float64))) for x in (before, after)]  # not turned, if a part is
    whole = float(length[1].sum() / max(length[0].sum(), 1e-30)) / (turn.factor if turn.dim else 1.0)
    for f in (whole, last[1] / max(last[0], 1e-30), 1.0):
        f = 1.0 if abs(f - 1) < 1e-5 else f
        found = observe_rotation(before * np.float32(f), after)
        if found is not None and (found.dim, found.style) == (turn.dim, turn.style):
            return f
    return None


def _qk_norm(rec: Attention, q: Norm | None, k: Norm | None, late: list[Norm | None]) -> tuple[str, list[Norm]]:
    """(value of Decoder.qk_norm, [norm of q, norm of k]); ("", []) without norms.

    The value is "flat" for norms of all heads together before rope, "head" for norms of each head before rope, "late"
    for norms with weights after rope, "unit" for norms without weights after rope. q, k: the norms before rope. late:
    the norms of q and k after rope. Raises Unmatched for norms both before and after rope.
    """
    if late[0] is not None and late[1] is not None:
        if q is not None:
            raise Unmatched(rec.name, "norms of queries and keys before rope and after it", "qk_norm")
        return ("late" if late[0].weight else "unit"), [late[0], late[1]]
    if q is None or k is None:
        return "", []
    if q.x.shape[-1] == rec.q.shape[0] * rec.q.shape[2] and rec.q.shape[0] > 1:
        return "flat", [q, k]
    return "head", [q, k]
