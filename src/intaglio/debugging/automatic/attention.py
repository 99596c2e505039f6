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
    """Find what an attention block of a traced model computes. Returns (properties, norms).

    The properties are a dict with these keys: heads, kv_heads, head_dim and value_dim (sizes); names, layout,
    transposed and biases (of the q, k and v projections); o_name, o_transposed and o_bias (of the output projection);
    qk_norm and qk_names (see _qk_norm()); rope (a Rotation); scale, softcap, sinks, window and chunk (see _scores());
    gate and inner_norm (see _after()). The norms are [norm of q, norm of k], or [] without norms.

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
    """Find the settings of attention with which queries, keys and values give the traced result. Returns a dict.

    Its keys are scale (float), softcap (float; 0: none), sinks (True if the module has attention sinks), window and
    chunk (in tokens; 0: none). Raises Unmatched if no settings that are tried give the traced result.

    t: the trace. rec: the call of the attention function.
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
    """Find the sliding window and the chunk of an attention mask. Returns (window, chunk), in tokens.

    A number is 0 if the mask has none. seen: the mask, bool [queries, keys], True where a query sees a key. name: name
    of the attention module, for the error. Raises Unmatched if the mask is neither causal, nor causal with a window or
    with chunks.
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
    """Find the modules between attention and its output projection. Returns {"gate": name, "inner_norm": name}.

    The gate is a linear whose sigmoid multiplies attention's result. The inner norm norms attention's result. A name is
    "" if there is no such module.

    Args:
        t: the trace.
        rec: the call of the attention function.
        x: the block's input.
        out: the output projection.
        readers: linears that read `x`.
        found: norms in the block.

    Raises Unmatched if anything else is computed between attention and the output projection.
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
    """Yield the ways in which some linears may compute queries, keys and values, as (layout, linears, [q, k, v]).

    The layout is "separate" (three linears), "rows" (one linear, whose rows are those of q, then k, then v) or "groups"
    (one linear, with q, k and v of the first K/V head, then of the second, and so on). q, k and v are arrays [tokens,
    heads, columns]. readers: the linears that read the block's input. rec: the call of the attention function.
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
    """Find the linears, norms and rope that compute queries, keys and values. Returns [norm of q, norm of k], or [].

    The properties that are found are added to the dict `f`: rope, layout (see _layouts()), names, transposed, biases,
    qk_norm and qk_names. If queries are also multiplied by a factor, f["scale"] is multiplied by this factor.

    Args:
        t: the trace.
        rec: the call of the attention function.
        readers: linears that read the block's input.
        found: norms in the block.
        f: properties of the block so far; changed in place.

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
    """Bring the argument or result of a norm to the shape `shape`, [heads, tokens, head_dim]. Returns the array.

    x: an array of this shape, or an array with as many values whose axes have tokens before heads.
    """
    if x.shape == shape:
        return x
    return x.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)


def _late(found: list[Norm], x: np.ndarray) -> Norm | None:
    """Find the per-head norm whose result is `x`. Returns None if no norm in `found` fits.

    x: queries or keys after rope, [heads, tokens, head_dim].
    """
    return next((n for n in found if n.y.size == x.size and n.x.ndim == 3 and same(_by_head(n.y, x.shape), x)), None)


def _early(found: list[Norm], y: np.ndarray) -> Norm | None:
    """Find the norm that reads the result `y` of a projection. Returns None if no norm in `found` does.

    y: [tokens, heads, head_dim]. The norm may read it with heads before tokens.
    """
    return next((n for n in found if same(n.x, y) or same(n.x, y.swapaxes(0, 1))), None)


def _extra(before: np.ndarray, after: np.ndarray, turn: Rotation) -> float | None:
    """The factor by which a model multiplies queries besides rotating them; 1.0 for no factor.

    Up to three factors are tried. The result is the first with which `before` times the factor is rotated to `after` in
    the same style as the keys, and in as many dimensions. It is None if no factor gives this.

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
    """Find how queries and keys are normed. Returns (value of Decoder.qk_norm, [norm of q, norm of k]).

    The value is "flat" for norms of all heads together before rope, "head" for norms of each head before rope, "late"
    for norms with weights after rope, and "unit" for norms without weights after rope. The result is ("", []) without
    norms.

    Args:
        rec: the call of the attention function.
        q: the norm of queries before rope, or None.
        k: the norm of keys before rope, or None.
        late: [norm of queries after rope, norm of keys after rope], each of which may be None.

    Raises Unmatched for norms both before and after rope.
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
