"""The host device: the whole step in one native call, at SIMD speed. Translates a Program once, at load.

Results do not depend on batch, chunking or thread count: every reduction has a fixed order (see csrc/).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from intaglio import _native, formats
from intaglio.batch import SHARE, Batch, Sampling
from intaglio.devices.device import (
    DeviceError,
    Executable,
    Rounds,
    StateSpec,
    StepResult,
    Weights,
    alone,
    assemble,
    check_batch,
    limits,
)
from intaglio.devices.image import WORTH, Image, default_folder, gather, layout
from intaglio.formats import Quantised
from intaglio.ops import (
    Attend,
    Collective,
    Embed,
    Experts,
    HeadLinear,
    KvWrite,
    Linear,
    Map,
    Norm,
    Op,
    Permute,
    Rope,
    Route,
    Sample,
    Select,
    Tensor,
    Value,
)  # fmt: skip
from intaglio.ops.elementwise import postfix
from intaglio.ops.experts import SCORES
from intaglio.program import Program, verify
from intaglio.program.source import strips

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp")  # order of csrc's Act
NORMS = ("rms", "layer", "l2")
STEPS = {"operand": 0, "number": 1, "call": 2, "+": 3, "-": 4, "*": 5, "/": 6}
STACK = 16  # depth of csrc's map machine
PAGE_MULTIPLE = 16
PANEL = 32  # rows of csrc's panels: each matrix of a stack begins at one
LEVEL = np.zeros(25, np.uint8)  # of mxfp4's codes -12..12, the nibble
LEVEL[[12, 13, 14, 15, 16, 18, 20, 24]] = range(8)
LEVEL[[11, 10, 9, 8, 6, 4, 0]] = range(9, 16)
MOST = {"top": 64, "groups": 256}  # csrc's kMaxTop, kMaxGroups


def isa_names() -> list[str]:
    """Instruction sets this build has and this machine runs, best first."""
    return list(_native.isas())


def _source_name(array: np.ndarray, name: str) -> str:
    for known in ("f32", "f16", "bf16"):
        if array.dtype == formats.get(known).dtype:
            return known
    raise DeviceError(f"weight {name} is stored as {array.dtype}; the host reads f32, f16 and bf16")


def native_codes(codes: np.ndarray, format: str) -> np.ndarray:
    """Codes as csrc keeps them, one a byte: whole numbers above an offset, bits of E4M3, numbers of E2M1's levels."""
    fmt = formats.get(format)
    if fmt.family == "mxfp4":
        return LEVEL[codes.astype(np.int16) + 12]
    return codes.view(np.uint8) - np.uint8(fmt.lowest & 255) if fmt.integer else codes.view(np.uint8)


def fill_codes(weight: _native.Weight, rows: Quantised, first: int, threads: int) -> None:
    """Codes, and what goes with them, as a native weight's rows from `first` on."""
    own = {name: np.ascontiguousarray(x, np.float32) for name, x in rows.arrays.items() if name != "codes"}
    codes, lows = np.ascontiguousarray(native_codes(rows.codes, rows.format)), own.get("zeros", own.get("minima"))
    weight.fill_codes(codes, own["scales"], lows, own.get("units"), own.get("low_units"), first, threads)


@dataclass(frozen=True)
class Home:
    """Where a tensor's rows lie in a native weight: its matrices of `rows` rows begin at `first`, `step` apart."""

    weight: _native.Weight
    first: int
    rows: int
    step: int


@dataclass(frozen=True)
class Draws:
    """The numbers by which rows are drawn as the native part takes them: those of the last step are used again, for
    what comes after a step finds the caches full of weights, and a few arrays made of Python's numbers cost 40 us."""

    ways: tuple[Sampling, ...]
    native: _native.Draws

    @classmethod
    def of(cls, ways: tuple[Sampling, ...]) -> Draws:
        numbers = [(s.temperature, s.top_p, s.min_p, s.top_k) for s in ways]
        seeds = [s.seed & 0xFFFFFFFFFFFFFFFF for s in ways]
        return cls(ways, _native.Draws(np.array(numbers, np.float32).reshape(-1, 4), np.array(seeds, np.uint64)))


class Timings(Mapping[str, float]):
    """Seconds by site. A dict only when somebody looks: making it takes as long as the rest of a small step's Python,
    and nobody should find that in the step."""

    def __init__(self, sites: list[str], seconds: np.ndarray) -> None:
        self._sites, self._seconds = sites, seconds

    @cached_property
    def _held(self) -> dict[str, float]:
        return dict(zip(self._sites, self._seconds.tolist(), strict=True))

    def __getitem__(self, site: str) -> float:
        return self._held[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class HostExecutable:
    """A Program translated to native ops, its weights packed or found packed, its state zeroed."""

    def __init__(
        self, program: Program, weights: Weights, state: StateSpec, threads: int, isa: str, cache: str | Path | None
    ) -> None:
        self.program, self.state, self.threads, self.isa = program, state, threads, isa
        token, position, slot, block = limits(program, state).values()
        self.native = _native.Executable(isa, threads, state.page_tokens, (token, position, slot, block))
        self._glu = {op.w for op in program.ops if isinstance(op, Linear) and op.glu}
        self._glu |= {w for op in program.ops if isinstance(op, Experts) for w in (op.gate, op.up)}
        self._matrices = self._laid_out()
        gather(self._matrices)
        self.packed_bytes = sum(packed.nbytes for packed in self._matrices.values())
        self._keys = {op.k_cache for op in program.ops if isinstance(op, KvWrite)}
        self._keys |= {op.rope_cache for op in program.ops if isinstance(op, Attend) and op.rope_cache}
        mixed = [op for op in program.ops if isinstance(op, Experts)]
        self._pairs = {op.gate_bias: op.up_bias for op in mixed if op.gate_bias and op.up_bias}
        self._buffers: dict[str | int, int] = {}
        self.image = self._image(weights, cache)
        with self.image or nullcontext():
            self.ids = {t.name: self._declare(t, weights) for t in self._in_order()}
        self._sites = [op.site for op in program.ops]
        self._draws = Draws.of(())
        self._stops = [(i, op) for i, op in enumerate(program.ops) if isinstance(op, Collective)]
        self._drawn = [self.ids[name] for name in ("next_tokens", "logprobs") if name in self.ids]
        for op in program.ops:
            self._translate(op)

    def _layout(self, t: Tensor) -> tuple[str, int, bool]:
        """How the native part keeps this matrix: its format there, its group, and whether gate and up alternate."""
        fmt = formats.get(t.format)
        return fmt.family, fmt.group_of(int(t.shape[-1])) if fmt.grouped else 0, t.name in self._glu

    def _laid_out(self) -> dict[str, _native.Weight]:
        """The native weights by the name of a tensor in them, and the home of each tensor; no memory is touched yet."""
        self._homes: dict[str, Home] = {}
        up = {op.gate: op.up for op in self.program.ops if isinstance(op, Experts)}
        used = {op.w for op in self.program.ops if isinstance(op, Linear | Embed | HeadLinear)}
        used |= {w for op in self.program.ops if isinstance(op, Experts) for w in (op.gate, op.down)}
        matrices = {}
        for t in self.program.of_role("weight"):
            if t.name in used:
                *stack, rows, columns = map(int, t.shape)
                step = -(-rows // PANEL) * PANEL if stack else rows
                n = step * (stack[0] if stack else 1)
                format, group, glu = self._layout(t)
                weight = _native.Weight(format, 2 * n if t.name in up else n, columns, group, glu)
                matrices[t.name], self._homes[t.name] = weight, Home(weight, 0, rows, step)
                if t.name in up:
                    self._homes[up[t.name]] = Home(weight, n, rows, step)
        return matrices

    def _image(self, weights: Weights, cache: str | Path | None) -> Image | None:
        """Where on disk the packed matrices are kept, if they are."""
        if cache is None or (cache == "auto" and self.packed_bytes < WORTH):
            return None
        identity = weights.identity()
        if identity is None:
            return None
        tensors = [self.program.tensors[name] for name in self._homes]
        facts = [[t.name, str(t.type), t.source, self._layout(t), layout(*self._layout(t))] for t in tensors]
        key = hashlib.sha256(json.dumps([identity, facts]).encode()).hexdigest()
        folder = default_folder() if cache == "auto" else Path(cache)
        return Image(folder, self.program.name, key, self._matrices)

    def _in_order(self) -> list[Tensor]:
        """Tensors as they are declared: buffers need the widest holder, so widths come first."""
        self._widths: dict[str | int, int] = {}
        for t in self.program.tensors.values():
            if t.role in ("temp", "output") and not t.view:
                key = self._buffer_key(t)
                self._widths[key] = max(self._widths.get(key, 0), self._columns(t))
        return [t for t in self.program.tensors.values() if t.role != "input"]

    @staticmethod
    def _columns(t: Tensor) -> int:
        return int(t.shape[1]) if len(t.shape) == 2 else 1

    @staticmethod
    def _buffer_key(t: Tensor) -> str | int:
        return t.name if t.buffer is None else t.buffer

    def _declare(self, t: Tensor, weights: Weights) -> int:
        if t.role == "const":
            return self.native.vector(np.array(t.values, np.float32))
        if t.role == "state":
            _, _, heads, head_dim = t.shape
            return self.native.cache(
                self.state.pages, int(heads), int(head_dim), formats.get(t.format).family, t.name in self._keys
            )
        if t.role == "weight":
            return self._matrix(t, weights) if t.name in self._homes else self._vector(t, weights)
        base = self.program.tensors[t.view[0]] if t.view else t
        key = self._buffer_key(base)
        if key not in self._buffers:
            match = SHARE.fullmatch(str(base.shape[0]))
            share, shares = (int(match[1]), int(match[2])) if match else (0, 1)
            self._buffers[key] = self.native.buffer(self._widths[key] * 4, base.shape[0] == "R", share, shares)
        column = t.view[1] if t.view else 0
        return self.native.columns(self._buffers[key], self._columns(t), self._columns(base), column)

    def _vector(self, t: Tensor, weights: Weights) -> int:
        """A vector, or a stack of them in a row. Biases of gate and up stand side by side, expert by expert."""
        parts = [t, *([self.program.tensors[self._pairs[t.name]]] if t.name in self._pairs else [])]
        values = [np.asarray(assemble(part, weights), np.float32) for part in parts]
        return self.native.vector(np.concatenate(values, axis=-1).reshape(-1))

    def _matrix(self, t: Tensor, weights: Weights) -> int:
        home, k = self._homes[t.name], int(t.shape[-1])
        if not (self.image and self.image.ready):
            at = 0
            for source in t.source:
                for name, x in strips(source, weights.read, weights.strips):
                    at = self._fill(t, home, name, x, at)
                    weights.release(name)
            wanted = int(np.prod([int(d) for d in t.shape[:-1]]))
            if at != wanted:
                raise DeviceError(f"weight {t.name} is {t.type} but {' + '.join(t.source)} holds {at} rows of {k}")
        return self.native.weight(home.weight)

    def _fill(self, t: Tensor, home: Home, name: str, x: Value, at: int) -> int:
        """Pack rows of one checkpoint tensor as those from `at` on; returns where the next begin."""
        held, total = list(x.shape), math.prod(x.shape[:-1])
        if len(held) < 2 or held[-1] != t.shape[-1] or at + total > math.prod(map(int, t.shape[:-1])):
            raise DeviceError(f"weight {t.name} is {t.type} but its source {name} is {held}")
        coded = isinstance(x, Quantised) and x.format == t.format
        if not coded and formats.get(t.format).published:
            had = f"{x.format} in other blocks" if isinstance(x, Quantised) and x.format else "plain values"
            raise DeviceError(
                f"weight {t.name} is {t.type}, a format that is only read, but {name} is {had}; load it with weights "
                "int8 or int4, which quantise it anew"
            )
        plain = x if isinstance(x, np.ndarray) else x.rows(slice(None))
        rows = x if coded else np.ascontiguousarray(plain).reshape(-1, held[-1])
        if isinstance(rows, Quantised):
            rows = rows.each(lambda part: part.reshape(-1, part.shape[-1]))
        step = home.rows if home.step > home.rows else total
        for first in range(0, total, step):
            matrix, row = divmod(at + first, home.rows)
            self._pack(home.weight, rows, first, min(step, total - first), home.first + matrix * home.step + row, name)
        return at + total

    def _pack(self, weight: _native.Weight, rows: Value, first: int, count: int, to: int, name: str) -> None:
        """Rows first .. first + count, as the native weight's rows from `to` on."""
        if isinstance(rows, Quantised):
            fill_codes(weight, rows.each(lambda x: x[first : first + count]), to, self.threads)
        else:
            bytes = rows[first : first + count].reshape(-1).view(np.uint8)
            weight.fill(bytes, _source_name(rows, name), to, count, self.threads)

    def _translate(self, op: Op) -> None:
        """One native op; the order of tensors, ints and floats is csrc/executable.cpp's."""
        ints: list[int] = []
        floats: list[float] = []
        code: list[int] = []
        numbers: list[float] = []
        names: list[str | None]
        match op:
            case Embed():
                names, floats = [op.w, op.out], [op.scale]
            case Select():
                names = [op.x, op.out]
            case Permute():
                names = [op.x, op.order, op.out]
            case Norm():
                names = [op.x, op.weight, op.bias, op.residual, op.out]
                ints, floats = [NORMS.index(op.norm), op.group], [op.eps, op.offset]
            case Linear():
                _check_rounding(op)
                names = [op.x, op.w, op.bias, op.residual, op.out]
                ints, floats = [op.x_format == "bf16", ACTIVATIONS.index(op.activation)], [op.scale]
            case Rope():
                names, floats = [op.x, op.frequencies, op.out], [op.factor]
                ints = [op.head_dim, op.style == "interleaved", op.trailing]
            case KvWrite():
                names = [op.k, op.v, op.k_cache, op.v_cache]
            case Attend():
                names = [op.q, op.k_cache, op.v_cache, op.rope_cache, op.sinks, op.out]
                ints = [op.heads, op.window, op.chunk, op.temper_every]
                floats = [op.scale, op.softcap, op.temper]
            case Route():
                self._bounded(op, top=op.top, groups=op.groups)
                names = [op.logits, op.bias, op.weights, op.ids]
                ints = [op.top, SCORES.index(op.score), op.groups, op.kept_groups, op.group_best, op.normalise]
                floats = [op.scale, op.jitter]
            case Experts():
                _check_rounding(op)
                count, inner, _ = map(int, self.program.tensors[op.gate].shape)
                names = [op.x, op.weights, op.ids, op.gate, op.down, op.gate_bias, op.down_bias]
                names += [op.order, op.down_order, op.residual, op.out]
                act = ACTIVATIONS.index(op.activation)
                ints = [count, inner, op.x_format == "bf16", act, op.scale_input, op.first]
                floats = [op.alpha, op.limit, op.shift]
            case HeadLinear():
                names, ints = [op.x, op.w, op.out], [int(d) for d in self.program.tensors[op.w].shape[:2]]
            case Map():
                names = [op.a, op.b, op.c, op.out]
                code, numbers = self._map_code(op)
            case Sample():
                names = [op.logits, op.tokens, op.logprobs]
            case Collective():
                return self.native.op("exchange", [], [], [], [], [])
            case _:
                raise DeviceError(f"{op.site}: the host has no kernel for op {op.kind}")
        tensors = [-1 if name is None else self.ids[name] for name in names]
        self.native.op(op.kind, tensors, [int(i) for i in ints], floats, code, numbers)

    @staticmethod
    def _bounded(op: Op, **values: int) -> None:
        for name, value in values.items():
            if value > MOST[name]:
                raise DeviceError(f"{op.site}: {name}={value}; the host's {op.kind} takes up to {MOST[name]}")

    @staticmethod
    def _map_code(op: Map) -> tuple[list[int], list[float]]:
        code: list[int] = []
        numbers: list[float] = []
        depth = deepest = 0
        for step, value in postfix(op.expr):
            if step == "operand":
                code += [STEPS[step], "abc".index(str(value))]
            elif step == "number":
                code += [STEPS[step], len(numbers)]
                numbers.append(float(value))
            elif step == "call":
                code += [STEPS[step], ACTIVATIONS.index(str(value))]
            else:
                code += [STEPS[str(value)], 0]
            depth += {"operand": 1, "number": 1, "call": 0}.get(step, -1)
            deepest = max(deepest, depth)
        if deepest > STACK:
            raise DeviceError(f"{op.site}: expression {op.expr!r} needs a stack of {deepest}; the host has {STACK}")
        return code, numbers

    def step(
        self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False
    ) -> StepResult:
        """One step in one native call; the interpreter's lock is released."""
        if self._stops:
            return alone(self.program, self.rounds(batch, logits=logits, taps=taps, timed=timed))
        return self._last(batch, *self._inputs(batch, taps, timed), 0, logits)

    def rounds(self, batch: Batch, *, logits: bool = False, taps: Collection[str] = (), timed: bool = False) -> Rounds:
        """A step as one rank of a mesh: a native call for the ops up to each collective."""
        inputs, seconds, taken = self._inputs(batch, taps, timed)
        first = 0
        for at, op in self._stops:
            self._run(batch, *inputs, first, at, [])
            first = at + 1
            got = yield op, self._brought(op, batch)
            if got is not None:
                self.native.copy_in(self.ids[op.outputs[0]], len(got), np.ascontiguousarray(got, np.float32))
                taken |= {op.site: got} if op.site in taps else {}
        return self._last(batch, inputs, seconds, taken, first, logits)

    def _inputs(
        self, batch: Batch, taps: Collection[str], timed: bool
    ) -> tuple[tuple[Any, ...], np.ndarray | None, dict[str, np.ndarray]]:
        """What every native call of a step takes; where it leaves the seconds of the ops, and what is tapped."""
        if batch.block_size != self.state.page_tokens:
            check_batch(self.program, self.state, batch)
        if batch.sampling != self._draws.ways:
            self._draws = Draws.of(batch.sampling)
        seconds = np.zeros(len(self._sites)) if timed else None
        taken, wanted = self._taps(batch, taps) if taps else ({}, [])
        inputs = (batch.numbers, batch.counts, self._draws.native, self._edits(batch), wanted, seconds)
        return inputs, seconds, taken

    def _last(
        self, batch: Batch, inputs: tuple[Any, ...], seconds: np.ndarray | None, taken: dict[str, np.ndarray],
        first: int, logits: bool,
    ) -> StepResult:  # fmt: skip
        """The ops from `first` on, and what the whole step gives back."""
        rows = batch.counts[2]
        draws = rows if self._drawn else 0  # a stage of a pipeline may draw none
        tokens, logprobs = np.empty(draws, np.int32), np.empty(draws, np.float32)
        outs: list[tuple[int, np.ndarray]] = [*zip(self._drawn, (tokens, logprobs), strict=True)] if draws else []
        wide = np.empty((rows, self.program.vocabulary), np.float32) if logits and self.program.vocabulary else None
        if wide is not None and rows:
            outs.append((self.ids["logits"], wide))
        self._run(batch, *inputs, first, len(self._sites), outs)
        return StepResult(tokens, logprobs, wide, taken, {} if seconds is None else Timings(self._sites, seconds))

    def _run(self, batch: Batch, *inputs: Any) -> None:
        try:
            self.native.step(*inputs)
        except IndexError:  # the native part sees at less cost that a batch is out of range, but not what to say of it
            check_batch(self.program, self.state, batch)
            raise

    def _edits(self, batch: Batch) -> _native.Edits | None:
        """Every row's edits and mask as flat arrays, None if there are none. Raises DeviceError if they do not fit."""
        if not self._drawn or all(s.edits is None and s.mask is None for s in batch.sampling):
            return None
        edits = [s.edits for s in batch.sampling]
        masks = [s.mask for s in batch.sampling if s.mask is not None]
        words = -(-self.program.vocabulary // 32)
        for mask in masks:
            if mask.shape != (words,) or mask.dtype != np.uint32:
                raise DeviceError(f"a mask is {mask.dtype} {list(mask.shape)}; the vocabulary takes uint32 [{words}]")
        there = [e for e in edits if e is not None]
        ids = np.concatenate([np.empty(0, np.int32), *(e.ids for e in there)])
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.program.vocabulary:
            raise DeviceError(f"edits touch ids {ids.min()}..{ids.max()}, outside 0..{self.program.vocabulary - 1}")
        scale, add = (np.concatenate([np.empty(0, np.float32), *parts]) for parts in (
            [e.scale for e in there], [e.add for e in there]
        ))  # fmt: skip
        first = np.cumsum([0, *(0 if e is None else len(e.ids) for e in edits)], dtype=np.int32)
        has = np.array([s.mask is not None for s in batch.sampling])
        mask_of = np.where(has, np.cumsum(has) - 1, -1).astype(np.int32)
        packed = np.stack(masks) if masks else np.empty((0, words), np.uint32)
        return _native.Edits(first, ids, scale, add, mask_of, packed)

    def _brought(self, op: Collective, batch: Batch) -> np.ndarray | None:
        """What this rank brings to a collective."""
        if not op.inputs:
            return None
        t = self.program.tensors[op.inputs[0]]
        return self._copy(t.name, np.empty((batch.sizes[str(t.shape[0])], int(t.shape[1])), np.float32))

    def _copy(self, name: str, out: np.ndarray) -> np.ndarray:
        if len(out) == 0:
            return out
        self.native.copy_out(self.ids[name], len(out), out)
        return out

    def _taps(
        self, batch: Batch, sites: Collection[str]
    ) -> tuple[dict[str, np.ndarray], list[tuple[int, int, np.ndarray]]]:
        """Arrays for the first result of each tapped site, or for a tapped view, and where native code takes them."""
        taken, wanted = {}, []
        for i, op in enumerate(self.program.ops):
            views = [t.name for t in self.program.tensors.values() if t.view and t.view[0] in op.outputs]
            for site, name in [(op.site, op.outputs[0] if op.outputs else None), *((v, v) for v in views)]:
                if site in sites and name is not None and self.program.tensors[name].format == "f32":
                    t = self.program.tensors[name]
                    taken[site] = np.empty((batch.sizes[str(t.shape[0])], self._columns(t)), np.float32)
                    wanted.append((i, self.ids[name], taken[site]))
        return taken, wanted


def _check_rounding(op: Linear | Experts) -> None:
    if op.x_format not in ("f32", "bf16", "int8"):
        raise DeviceError(f"{op.site}: x_format={op.x_format}; the host rounds activations to f32, bf16 or int8")


class HostDevice:
    """The CPU this runs on. `threads` defaults to the cores there are; `isa` to the best there is, or INTAGLIO_ISA.

    cache: the folder where packed weights are kept for the next start; "auto" is $INTAGLIO_CACHE or
    ~/.cache/intaglio/packed, for weights of 64 MB or more; None keeps nothing.
    """

    name = "host"

    def __init__(
        self, threads: int | None = None, isa: str | None = None, *, cache: str | Path | None = "auto"
    ) -> None:
        self.cache = cache
        self.threads = threads or len(os.sched_getaffinity(0))
        self.isa = isa or os.environ.get("INTAGLIO_ISA") or isa_names()[0]
        if not 1 <= self.threads <= 256:
            raise DeviceError(f"threads={threads} is outside 1..256")
        if self.isa not in isa_names():
            raise DeviceError(f"instruction set {self.isa!r} is not to be had here; there are {', '.join(isa_names())}")

    def load(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        """Translate and pack. Raises DeviceError for a page size the kernels cannot take."""
        verify(program)
        if state.page_tokens % PAGE_MULTIPLE or state.page_tokens < PAGE_MULTIPLE:
            raise DeviceError(
                f"page_tokens={state.page_tokens}; the host needs a multiple of {PAGE_MULTIPLE}, such as 32"
            )
        return HostExecutable(program, weights, state, self.threads, self.isa, self.cache)
