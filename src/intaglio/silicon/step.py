"""One step of a Program on a chip, timed: each op's kernel by its closed form, ops one after the other, weights fetched
ahead, and collectives under the work of the other half of the batch, where the chip can.

Ops alike (the layers of a model) cost one: what an op takes depends on its shapes and on the batch's sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from intaglio import formats
from intaglio.batch import Batch, Sizes
from intaglio.chips import ChipError, ChipSpec
from intaglio.ops import Op, Tensor
from intaglio.program import Program
from intaglio.silicon.instructions import norm_cycles, sample_cycles, vector_cycles
from intaglio.silicon.kernels.attention import Chunks, Heads, attend_timing, chunks, kv_write_timing
from intaglio.silicon.kernels.experts import experts_timing
from intaglio.silicon.kernels.linear import KEPT, linear_timing
from intaglio.silicon.network import collective_timing
from intaglio.silicon.timeline import Entry, Timeline
from intaglio.silicon.timing import Timing

TEMP_BYTES = 2  # of a value between ops: kernels keep it in bf16, whatever the reference carries
HALF = 128  # rows of half a batch, at least, for two halves to take turns
ARRAY_FORMAT = {"int8": "int8", "int4": "int4", "mxfp4": "e2m1", "fp8": "e4m3", "int8row": "int8", "fp8row": "e4m3"}


@dataclass(frozen=True)
class Load:
    """The sizes of a batch, which is all that time depends on: T, S, R, and the sequences' queries and keys."""

    tokens: int
    rows: int
    sequences: Chunks
    filtered: bool = False  # whether any row is drawn with top-k or top-p

    @property
    def sizes(self) -> Sizes:
        return Sizes(T=self.tokens, S=sum(n for *_, n in self.sequences), R=self.rows)


def load_of(batch: Batch) -> Load:
    """The sizes of a bound batch."""
    filtered = any(s.temperature > 0 and (s.top_k or s.top_p < 1) for s in batch.sampling)
    pieces = chunks(batch.q_len.tolist(), batch.context_len.tolist())
    return Load(len(batch.tokens), len(batch.rows), pieces, filtered)


Key = tuple[Any, ...]


def array_format(tensor: Tensor) -> str:
    """What the array takes values of this tensor as."""
    fmt = formats.get(tensor.format)
    return ARRAY_FORMAT.get(fmt.family, fmt.name)


def bits_of(tensor: Tensor) -> float:
    """Bits of a value with its share of scales."""
    rows, cols = prod(int(d) for d in tensor.shape[:-1]), int(tensor.shape[-1])
    return formats.get(tensor.format).nbytes(rows, cols) * 8 / (rows * cols)


def key_of(op: Op, t: Mapping[str, Tensor]) -> Key:
    """What the time of an op depends on besides the batch: ops with equal keys cost the same."""
    o: Any = op
    match op.kind:
        case "linear":
            w, plain = t[o.w], array_format(t[o.w])
            x = {"fp8row": "e4m3"}.get(o.x_format, o.x_format)
            n, k = int(w.shape[0]), int(w.shape[1])
            return op.kind, t[o.x].shape[0], n, k, x, plain, bits_of(w), bool(o.glu)
        case "head_linear":
            w = t[o.w]
            return op.kind, t[o.x].shape[0], tuple(w.shape), array_format(w), bits_of(w)
        case "attend" | "kv_write":
            keys = t[o.k_cache]
            kv_heads, d = int(keys.shape[2]), int(keys.shape[3])
            d += int(t[o.rope_cache].shape[3]) if getattr(o, "rope_cache", None) else 0
            dv = int(t[o.v_cache].shape[3]) if o.v_cache else int(getattr(o, "v_dim", 0) or d)
            # A query sees up to a chunk of keys: it is counted as a window, whose keys it sees all
            window = int(getattr(o, "window", 0)) or int(getattr(o, "chunk", 0))
            capped = bool(getattr(o, "softcap", 0.0))
            heads = int(getattr(o, "heads", kv_heads))
            return op.kind, Heads(heads, kv_heads, d, dv, window, formats.get(keys.format).bits, capped)
        case "experts":
            up = t[o.up]
            n, inner, hidden = (int(d) for d in up.shape)
            x = {"fp8row": "e4m3"}.get(o.x_format, o.x_format)
            return op.kind, int(t[o.ids].shape[1]), n, o.of or n, hidden, inner, x, array_format(up), bits_of(up)
        case "all_reduce" | "all_gather" | "reduce_scatter" | "all_to_all":
            whole = op.inputs[0] if op.kind in ("reduce_scatter", "all_to_all") else op.outputs[0]
            shape = t[whole].shape
            return op.kind, shape[0], int(shape[1]), formats.get(o.wire).bits, len(o.group)
        case "send" | "recv":
            shape = t[op.inputs[0] if op.kind == "send" else op.outputs[0]].shape
            return op.kind, shape[0], int(shape[1]), formats.get(o.wire).bits
        case _:
            names = [n for n in (*op.inputs, *op.outputs) if t[n].role in ("temp", "output", "weight")]
            wide = t[op.outputs[0]].shape if op.outputs else t[op.inputs[0]].shape
            flops = getattr(o, "expr", "")
            return op.kind, tuple(wide), len(names), flops


def rows_of(dim: Any, load: Load) -> int:
    return load.sizes[dim] if isinstance(dim, str) else int(dim)


def elementwise(spec: ChipSpec, rows: int, width: int, operands: int, cycles: float) -> Timing:
    """A kernel that reads and writes `operands` matrices [rows, width] once and computes for `cycles` of one core."""
    moved = float(rows * width * operands * TEMP_BYTES)
    kept = moved < spec.shared_bytes * KEPT
    lanes = cycles / spec.cores / spec.clock_hz
    there = moved / (spec.shared_rate if kept else spec.hbm_rate)
    seconds = spec.constants.launch_s + (0.0 if kept else spec.constants.latency_s) + max(lanes, there)
    return Timing(seconds, {"VEC": lanes, "shared" if kept else "HBM": there}, 0.0 if kept else moved, moved)


def _linear(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    _, dim, n, k, x, w, bits, glu = key
    rows = rows_of(dim, load)
    return linear_timing(spec, rows, n, k, x, w, bits, TEMP_BYTES, glu, there) if rows else Timing(0.0)


def _head_linear(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    _, dim, (heads, n, k), w, bits = key
    return linear_timing(spec, rows_of(dim, load), heads * n, k, "bf16", w, bits, TEMP_BYTES, False, there)


def _experts(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    _, top, held, n, hidden, inner, x, w, bits = key
    rows = load.tokens * top
    even = np.full(n, rows // n) + (np.arange(n) < rows % n)
    return experts_timing(spec, load.tokens, top, tuple(even[:held].tolist()), n, hidden, inner, x, w, bits)


def _collective(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    kind, dim, width, bits, n = key
    return collective_timing(spec, kind, n, rows_of(dim, load) * width * bits // 8)


def _link(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    kind, dim, width, bits = key
    return collective_timing(spec, "send", 2, rows_of(dim, load) * width * bits // 8) if kind == "send" else Timing(0.0)


def _plain(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    """Norms, rope, maps, rows in and out, routing: bytes and lanes."""
    kind, shape, operands, expr = key
    rows, width = rows_of(shape[0], load), int(shape[-1]) if len(shape) > 1 else 1
    n = rows * width
    if not n:
        return Timing(0.0)
    cycles = {
        "norm": lambda: float(norm_cycles(spec, n)),
        "rope": lambda: float(vector_cycles(spec, 3 * n, n)),
        "sample": lambda: 0.0,
    }.get(
        kind,
        lambda: float(vector_cycles(spec, (1 + expr.count("(") + sum(map(expr.count, "+-*/"))) * n, n * ("(" in expr))),
    )()
    return elementwise(spec, rows, width, max(1, operands), cycles)


def _sample(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    """Over the logits' width, which the key of a sample does not hold: see op_timing."""
    _, rows, width = key
    n = rows_of(rows, load) * width
    return (
        elementwise(spec, rows_of(rows, load), width, 1, float(sample_cycles(spec, n, load.filtered)))
        if n
        else Timing(0.0)
    )


def _attend(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    return attend_timing(spec, key[1], load.sequences)


def _kv_write(spec: ChipSpec, key: Key, load: Load, there: bool) -> Timing:
    return kv_write_timing(spec, load.tokens, key[1])


Timer = Callable[[ChipSpec, Key, Load, bool], Timing]
TIMERS: dict[str, Timer] = {
    "linear": _linear, "head_linear": _head_linear, "attend": _attend, "kv_write": _kv_write, "experts": _experts,
    "all_reduce": _collective, "all_gather": _collective, "reduce_scatter": _collective, "all_to_all": _collective,
    "send": _link, "recv": _link, "norm": _plain, "rope": _plain, "map": _plain, "embed": _plain, "select": _plain,
    "permute": _plain, "route": _plain, "sample": _sample,
}  # fmt: skip


@lru_cache(maxsize=65536)
def timing(spec: ChipSpec, key: Key, load: Load, there: bool = False) -> Timing:
    """Seconds of an op with this key. `there`: its weights are on the chip already."""
    return TIMERS[key[0]](spec, key, load, there)


def exposed(seconds: Sequence[float], link: Sequence[bool]) -> dict[int, float]:
    """What is seen of each collective when two halves of the batch take turns: one works while the other's
    is under way.

    seconds: of each op, of which a half takes half; link: whether it is a collective. Each half does its ops in order,
    the second never ahead; where both could work, the one that is nearer to its next collective does, so that links are
    soon busy again. Time in which neither works is the collective's that is waited for.
    """
    work = 0.0
    nearer = [0.0] * len(seconds)  # seconds of work from an op to the next collective
    for i in reversed(range(len(seconds))):
        nearer[i] = work = 0.0 if link[i] else work + seconds[i]
    n, at, ready, last = len(seconds), [0, 0], [0.0, 0.0], [-1, -1]  # a half's next op, from when, its last collective
    free, seen = [0.0, 0.0], {i: 0.0 for i, far in enumerate(link) if far}  # of work, of links: from when they are free
    while at[1] < n:
        h, (i, j) = 0, at
        if i == n:
            h = 1
        elif j < i:
            first, second = max(ready[0], free[link[i]]), max(ready[1], free[link[j]])
            h = 1 if second < first or (second == first and nearer[j] < nearer[i]) else 0
        i = at[h]
        far = link[i]
        start = max(ready[h], free[far])
        if far:
            last[h] = i
        elif last[h] >= 0:
            seen[last[h]] += start - free[0]
        ready[h] = free[far] = start + seconds[i] / 2
        at[h] = i + 1
    if last[1] >= 0:
        seen[last[1]] += max(0.0, ready[1] - free[0])
    return seen


class Plan:
    """A Program made ready for one chip: keys of its ops, each counted once, and what a step's ops wait for."""

    def __init__(self, program: Program, spec: ChipSpec) -> None:
        self.program, self.spec = program, spec
        t = program.tensors
        missing = sorted({op.kind for op in program.ops} - TIMERS.keys())
        if missing:
            raise ChipError(f"no kernel for op {', '.join(missing)}; there are kernels for {', '.join(sorted(TIMERS))}")
        self.keys = [self._key(op, t) for op in program.ops]
        self.weights = sum(w.nbytes({}) for w in program.of_role("weight"))
        for w in program.of_role("weight"):
            if len(w.shape) > 1:
                spec.runs_as(array_format(w))  # raises for a format the arrays do not take

    @staticmethod
    def _key(op: Op, t: Mapping[str, Tensor]) -> Key:
        if op.kind == "sample":
            shape = t[op.inputs[0]].shape
            return op.kind, shape[0], int(shape[1])
        return key_of(op, t)

    @classmethod
    def of(cls, stages: Sequence[Program], spec: ChipSpec) -> tuple[Plan, ...]:
        """A Plan a stage, from one rank's Program of each. Raises ChipError if a rank's weights exceed a chip's HBM."""
        plans = tuple(cls(p, spec) for p in stages)
        most = max(plan.weights for plan in plans)
        if most > spec.hbm_bytes:
            held = f"{spec.name} has {spec.hbm_bytes / 1e9:,.0f} GB of HBM"
            raise ChipError(f"{most / 1e9:,.1f} GB of weights a chip; {held}; use more chips or fewer bits")
        return plans

    def run(self, load: Load) -> Timeline:
        """The step, op by op."""
        entries: list[Entry] = []
        spec, now, fetched = self.spec, 0.0, 0.0  # fetched: until when HBM is taken by weights asked for so far
        ahead = spec.shared_bytes * KEPT / spec.hbm_rate if spec.prefetch else 0.0  # seconds of weights it can hold
        cold = {key: timing(spec, key, load) for key in set(self.keys)}
        warm = {key: timing(spec, key, load, True) for key in cold} if spec.prefetch else cold
        turns: dict[int, float] = {}
        if spec.prefetch and load.tokens >= 2 * HALF and any(cold[k].link_bytes for k in cold):
            turns = exposed([warm[k].seconds for k in self.keys], [cold[k].link_bytes > 0 for k in self.keys])
        for i, (op, key) in enumerate(zip(self.program.ops, self.keys, strict=True)):
            whole, bare = cold[key], warm[key]
            end, waits = now + bare.seconds, ""
            if spec.prefetch and whole.weight_bytes:
                fetch = whole.weight_bytes / spec.hbm_rate
                fetched = max(fetched, now - ahead) + fetch
                if fetched > end:
                    end, waits = fetched, "HBM"
            elif spec.prefetch and whole.hbm_bytes:
                fetched = max(fetched, now) + whole.hbm_bytes / spec.hbm_rate
            if whole.link_bytes and i in turns:
                end = now + turns[i]
            entries.append(Entry(op.site, op.kind, now, end, whole, waits))
            now = end
        return Timeline(spec, tuple(entries))
