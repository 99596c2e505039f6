"""Faults planted in the streams of real kernels: each is refused, and the error names what is wrong and where.

A fault of order is found by vector clocks in intaglio.silicon.checks; here a slow definition in sets says which
instruction pairs a changed stream leaves unordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import CHIPS, SMALL, batch_of, normal

from intaglio import formats
from intaglio.chips import ChipError, Target
from intaglio.ops import AllGather, AllReduce, Attend, Embed, KvWrite, Linear, Norm, Op, Select, Tensor, Value
from intaglio.silicon import isa
from intaglio.silicon.checks import check
from intaglio.silicon.isa import ENGINES, Instruction
from intaglio.silicon.kernels import ChipMemory, kernel_class
from intaglio.silicon.kernels.collectives import CollectiveRun
from intaglio.silicon.machine import Machine
from intaglio.silicon.memory import MachineError, Memory, Region
from intaglio.silicon.plan import Plan
from intaglio.silicon.stream import Stream

Edit = Callable[[list[Instruction]], list[Instruction]]


@dataclass(frozen=True)
class Case:
    """The streams of a kernel, one a core, and the memory that they run on, by chip."""

    on: Target
    streams: tuple[Stream, ...]
    hbm: dict[int, Memory]

    def run(self, streams: Sequence[Stream]) -> None:
        """Run other streams on a copy of the memory."""
        copies = {}
        for chip, memory in self.hbm.items():
            copies[chip] = Memory("hbm", None)
            copies[chip].bytes, copies[chip].written = memory.bytes.copy(), memory.written.copy()
        Machine(self.on, copies).run(streams)


def op_case(on: Target, op: Op, tensors: list[Tensor], values: dict[str, Value], chunks: list[tuple[int, int]]) -> Case:
    """The streams of one op."""
    rng, table = np.random.default_rng(1), {t.name: t for t in tensors}
    batch, memory = batch_of(rng, chunks), ChipMemory(on)
    for name, value in values.items():
        memory.put(name, value)
    for name, (shape, fmt) in op.shapes(table).items():
        dims = [batch.sizes[d] if isinstance(d, str) else d for d in shape]
        memory.allocate(name, dims[0], dims[-1], fmt)
        table[name] = Tensor(name, shape, fmt, "temp")
    return Case(on, tuple(kernel_class(op).streams(memory, op, table, batch)), {0: memory.hbm})


@cache
def case(name: str) -> Case:
    """A kernel's streams: linear, norm, embed, select, kv_write, attend on four chips, all_reduce."""
    rng = np.random.default_rng(7)
    match name.split():
        case ["linear"]:
            op: Op = Linear(site="l0.up", x="x", w="w", out="y", x_format="int8", bias="b", residual="r")
            tensors = [Tensor("x", ("T", 64), "f32", "temp"), Tensor("w", (64, 64), "int8g32", "weight"),
                       Tensor("b", (64,), "f32", "weight"), Tensor("r", ("T", 64), "f32", "temp")]  # fmt: skip
            values: dict[str, Value] = {"x": normal(rng, 40, 64), "b": normal(rng, 64), "r": normal(rng, 40, 64),
                                        "w": formats.quantise(normal(rng, 64, 64), "int8g32")}  # fmt: skip
            return op_case(SMALL, op, tensors, values, [(40, 0)])
        case ["norm"]:
            op = Norm(site="l0.norm", x="x", out="y", weight="w")
            tensors = [Tensor("x", ("T", 24), "f32", "temp"), Tensor("w", (24,), "f32", "weight")]
            return op_case(SMALL, op, tensors, {"x": normal(rng, 70, 24), "w": normal(rng, 24)}, [(70, 0)])
        case ["embed"]:
            op = Embed(site="embed", tokens="t", w="w", out="y", scale=1.5)
            tensors = [Tensor("t", ("T",), "i32", "input"), Tensor("w", (50, 64), "int8g32", "weight")]
            table = formats.quantise(normal(rng, 50, 64), "int8g32")
            tokens = rng.integers(0, 50, 70).astype(np.int32)
            return op_case(SMALL, op, tensors, {"t": tokens, "w": table}, [(70, 0)])
        case ["select"]:
            op = Select(site="l0.last", x="x", rows="r", out="y")
            tensors = [Tensor("x", ("T", 24), "f32", "temp"), Tensor("r", ("R",), "i32", "input")]
            values = {"x": normal(rng, 60, 24), "r": np.arange(60, dtype=np.int32)}
            return op_case(SMALL, op, tensors, values, [(1, 0)] * 60)
        case ["kv_write"]:
            op = KvWrite(site="l0.kv", k="k", v="v", k_cache="kc", v_cache="vc")
            tensors = [Tensor(n, ("T", 16), "f32", "temp") for n in "kv"]
            tensors += [Tensor(n, ("P", "B", 2, 8), "bf16", "state") for n in ("kc", "vc")]
            values = {n: normal(rng, 70, 16) for n in "kv"}
            values |= {n: normal(rng, 64, 4, 2, 8).astype(formats.BF16) for n in ("kc", "vc")}
            return op_case(SMALL, op, tensors, values, [(70, 0)])
        case ["attend", chip]:
            op = Attend(site="l0.attn", q="q", k_cache="kc", v_cache="vc", out="y", heads=2, scale=0.25, sinks="s")
            tensors = [Tensor("q", ("T", 32), "f32", "temp"), Tensor("s", (2,), "f32", "weight")]
            tensors += [Tensor(n, ("P", "B", 2, 16), "f32", "state") for n in ("kc", "vc")]
            values = {n: normal(rng, 64, 4, 2, 16) for n in ("kc", "vc")}
            values |= {"q": normal(rng, 140, 32), "s": normal(rng, 2)}
            on = CHIPS[chip].with_library(key_tile=32, query_tiles=(32,), fused_query_tiles=(32,))
            return op_case(on, op, tensors, values, [(140, 60)])
        case ["all_reduce"]:
            reduce = AllReduce(site="l0.sum", x="x", out="out", group=(0, 1, 2), wire="bf16")
            links = CollectiveRun(reduce, SMALL, [normal(rng, 40, 300) for _ in range(3)])
            return Case(SMALL, tuple(links.streams()), {i: m.hbm for i, m in enumerate(links.memories)})
        case ["all_gather"]:
            gather = AllGather(site="l0.join", x="x", out="out", group=(0, 1), wire="f32", tokens=True, width=30)
            links = CollectiveRun(gather, SMALL, [normal(rng, 70, 30) for _ in range(2)])
            return Case(SMALL, tuple(links.streams()), {i: m.hbm for i, m in enumerate(links.memories)})
    raise AssertionError(name)


CASES = (
    "linear",
    "norm",
    "embed",
    "select",
    "kv_write",
    "attend small",
    "attend stepped",
    "attend fused",
    "all_reduce",
    "all_gather",
)


def test_the_kernels_without_a_fault_run() -> None:
    for name in CASES:
        case(name).run(case(name).streams)


@cache
def bytes_of(r: Region) -> frozenset[tuple[str, int]]:
    return frozenset((r.space, r.address + row * r.stride + b) for row in range(r.rows) for b in range(r.row_bytes))


@cache
def shared(a: tuple[Region, ...], b: tuple[Region, ...]) -> bool:
    """True if a region of a and one of b have a byte in common."""
    return any(bytes_of(r) & bytes_of(s) for r in a for s in b if r.space == s.space)


def unordered(stream: Stream) -> list[tuple[int, int]]:
    """Pairs (place of the later, place of the earlier instruction) that conflict and that no chain of waits orders.

    By definition: `before` holds all instructions that have finished when another one starts.
    """
    places: list[list[int]] = [[] for _ in ENGINES]
    before: list[set[int]] = []
    touched = [[tuple(i.regions(w)) for w in (False, True)] for i in stream.instructions]
    found = []
    for at, i in enumerate(stream.instructions):
        engine = ENGINES.index(i.engine)
        mine = set(before[places[engine][-1]]) if places[engine] else set()
        for other, n in enumerate(i.wait):
            for place in places[other][:n]:
                mine |= {place} | before[place]
        before.append(mine)
        places[engine].append(at)
        reads, writes = touched[at]
        for earlier in set(range(at)) - mine:
            read, wrote = touched[earlier]
            same = stream.instructions[earlier].engine == i.engine
            if shared(wrote, reads) or (not same and shared(wrote + read, writes)):
                found.append((at, earlier))
    return found


def without_wait(stream: Stream, at: int, engine: str) -> Stream:
    """A copy of the stream in which the instruction at index `at` does not wait for `engine`."""
    return waiting(stream, at, engine, 0)


DROPPED = [  # kernel, engine that no longer waits, engine that it waited for
    ("linear", "MXU", "DMA"), ("linear", "VEC", "DMA"), ("linear", "VEC", "MXU"),
    ("linear", "VEC", "OUT"), ("attend small", "DMA", "MXU"), ("linear", "DMA", "VEC"), ("linear", "OUT", "VEC"),
    ("linear", "MXU", "MXU"), ("embed", "DMA", "DMA"), ("embed", "VEC", "VEC"), ("norm", "OUT", "VEC"),
    ("select", "OUT", "DMA"), ("select", "DMA", "OUT"), ("attend fused", "ATT", "DMA"),
    ("attend fused", "DMA", "ATT"), ("attend fused", "VEC", "ATT"), ("attend fused", "DMA", "VEC"),
    ("attend small", "MXU", "VEC"), ("attend stepped", "VEC", "MXU"), ("all_reduce", "NET", "VEC"),
    ("all_reduce", "VEC", "NET"), ("all_gather", "NET", "OUT"), ("all_gather", "OUT", "NET"),
    ("all_gather", "NET", "DMA"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "engine", "producer"), DROPPED)
def test_a_dropped_wait_is_a_race(name: str, engine: str, producer: str) -> None:
    """The first wait between the two engines without which something is unordered; the first such pair is named."""
    cores = case(name)
    stream = cores.streams[0]
    waits = [
        at for at, i in enumerate(stream.instructions) if i.engine == engine and i.wait[ENGINES.index(producer)] > 0
    ]
    for at in waits:
        planted = without_wait(stream, at, producer)
        if pairs := unordered(planted):
            break
    else:
        raise AssertionError(f"no wait of {engine} for {producer} is needed in {name}; choose another pair")
    later = planted.instructions[min(pairs)[0]]
    site = f"site {stream.site}, engine {later.engine}, instruction {type(later).__name__}: race: "
    with pytest.raises(MachineError, match=f"^{site}.* instruction [0-9]+ of {producer} (writes|reads)"):
        cores.run([planted, *cores.streams[1:]])


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(CASES), data=st.data())
def test_exactly_the_streams_with_an_unordered_pair_are_refused(name: str, data: st.DataObject) -> None:
    """Streams with one or two waits dropped anywhere, against the definition in sets."""
    stream = data.draw(st.sampled_from(case(name).streams))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(stream.instructions) - 1))
        stream = without_wait(stream, at, data.draw(st.sampled_from(ENGINES)))
    if pairs := unordered(stream):
        later = stream.instructions[min(pairs)[0]]
        with pytest.raises(MachineError, match=f"engine {later.engine}, instruction {type(later).__name__}: race: "):
            check(case(name).on, stream)
    else:
        check(case(name).on, stream)


def first(stream: Stream, kind: type[Any], nth: int = 0) -> int:
    """Index in the stream of the nth instruction of a kind, counted from 0."""
    return [at for at, i in enumerate(stream.instructions) if isinstance(i, kind)][nth]


def changed(stream: Stream, at: int, **fields: Any) -> Stream:
    """A copy of the stream in which the instruction at index `at` has these fields."""
    i = replace(stream.instructions[at], **fields)
    return replace(stream, instructions=(*stream.instructions[:at], i, *stream.instructions[at + 1 :]))


def waiting(stream: Stream, at: int, engine: str, n: int) -> Stream:
    """A copy of the stream in which the instruction at index `at` waits until `engine` has finished n instructions."""
    wait = tuple(n if e == engine else old for e, old in zip(ENGINES, stream.instructions[at].wait, strict=True))
    return changed(stream, at, wait=wait)


def refused(cores: Case, streams: Sequence[Stream], *words: str, on: Target | None = None) -> None:
    """Assert that the streams are refused with a short error that has these words."""
    with pytest.raises(MachineError) as error:
        replace(cores, on=on or cores.on).run(streams)
    text = str(error.value)
    assert len(text) < 700
    for word in words:
        assert word in text


def test_instructions_that_the_chip_does_not_have() -> None:
    stepped, fused, links = case("attend stepped"), case("attend fused"), case("all_reduce")
    step = "site l0.attn, engine VEC, instruction SoftmaxStep: stepped does not have this instruction; its "
    refused(
        stepped, stepped.streams, step + "extra_instructions are none", on=stepped.on.with_chip(extra_instructions=())
    )
    engine = "site l0.attn, engine ATT, instruction Attend: fused has no fused attention engine (att_lanes=0)"
    refused(fused, fused.streams, engine, on=fused.on.with_chip(att_lanes=0))
    alone = links.on.with_chip(topology="none", max_chips=1)
    refused(links, links.streams, "site l0.sum, engine NET, instruction Receive: small has no links", on=alone)
    tensors = [Tensor("x", ("T", 8), "bf16", "temp"), Tensor("w", (8, 8), "bf16", "weight")]
    op, rng = Linear(site="l0.up", x="x", w="w", out="y", x_format="f32"), np.random.default_rng()
    values: dict[str, Value] = {"x": normal(rng, 4, 8), "w": normal(rng, 8, 8)}
    plain = op_case(SMALL, op, tensors, values, [(4, 0)])
    eight = plain.on.with_chip(macs=(("int8", 64), ("bf16", 32)))
    refused(
        plain, plain.streams, "site l0.up, engine MXU, instruction Matmul: small has no matrix rate for f32", on=eight
    )


@pytest.mark.parametrize(("name", "why"), [("Nonsense", "there is no such instruction"), ("Matmul", "every chip has")])
def test_unknown_names_of_extra_instructions_are_refused(name: str, why: str) -> None:
    on = SMALL.with_chip(extra_instructions=(name,))
    for use in (lambda: Machine(on), lambda: Plan.of((), on)):
        with pytest.raises(ChipError, match=f"chip 'small': extra_instructions has '{name}': {why}.*; known: Softm"):
            use()


def test_two_cores_that_store_to_the_same_bytes() -> None:
    cores = case("linear")
    one, two = cores.streams
    store = one.instructions[first(one, isa.Store)]
    assert isinstance(store, isa.Store)
    planted = changed(two, first(two, isa.Store), dst=store.dst)
    refused(cores, (one, planted), f"site l0.up, engine OUT, instruction Store: core 1 writes {store.dst}",
            "which core 0 (instruction 1 of OUT, Store) writes in the same run")  # fmt: skip


def test_two_cores_that_scatter_to_the_same_rows() -> None:
    cores = case("kv_write")
    one, two = cores.streams
    at, other = (first(s, isa.Load) for s in (one, two))  # a core loads its slots first
    index = one.instructions[at]
    assert isinstance(index, isa.Load) and index.src.format == "i32"
    planted = changed(two, other, src=index.src)
    scatter = one.instructions[first(one, isa.Scatter)]
    assert isinstance(scatter, isa.Scatter)
    planted = changed(planted, first(planted, isa.Scatter), table=scatter.table)
    refused(cores, (one, planted), "instruction Scatter: core", "writes in the same run")


def test_a_core_that_loads_what_another_stores() -> None:
    cores = case("norm")
    cores.hbm[0].written[:] = True  # or a load before the store would read unwritten bytes
    one, two = cores.streams
    store = one.instructions[first(one, isa.Store)]
    assert isinstance(store, isa.Store)
    late = changed(two, first(two, isa.Load, 2), src=store.dst)
    for planted in ((one, late), (late, one)):
        refused(cores, planted, "site l0.norm, engine ", "in the same run; cores have no order among them")


def test_a_wait_for_a_number_that_never_comes() -> None:
    cores = case("linear")
    planted = waiting(cores.streams[0], first(cores.streams[0], isa.Matmul), "DMA", 4096)
    refused(cores, [planted], "deadlock: site l0.up, engine MXU, instruction Matmul waits for DMA to finish 4096, "
            "which never comes: the stream has ")  # fmt: skip


def test_a_cycle_of_waits_is_named_and_short() -> None:
    """A load waits for the drain of the product that needs the loaded tile; on H100 with all its cores."""
    cores = case("linear")
    planted = waiting(cores.streams[0], first(cores.streams[0], isa.Load), "VEC", 1)
    where = "site l0.up, engine {}, instruction {} waits for {} to finish"
    refused(cores, [planted] * 2, "deadlock: " + where.format("DMA", "Load", "VEC"),
            where.format("VEC", "Drain", "DMA"), "which waits for the first")  # fmt: skip
    itself = waiting(cores.streams[0], first(cores.streams[0], isa.Matmul), "MXU", 1)
    refused(
        cores, [itself], "deadlock: site l0.up, engine MXU, instruction Matmul waits for MXU to finish 1, which waits"
    )


def test_chips_that_each_receive_before_they_send() -> None:
    cores = case("all_reduce")
    streams = []
    for s in cores.streams:
        if s.chip < 2:  # its first Send waits for its first Receive
            s = waiting(s, first(s, isa.Send), "NET", 0)
            net = [i for i in s.instructions if i.engine == "NET"]
            swapped = iter(
                [*(i for i in net if isinstance(i, isa.Receive)), *(i for i in net if isinstance(i, isa.Send))]
            )
            plain = [next(swapped) if i.engine == "NET" else i for i in s.instructions]
            s = replace(s, instructions=tuple(replace(i, wait=tuple(0 for _ in i.wait)) for i in plain
                                              if isinstance(i, isa.Send | isa.Receive) and i.peer < 2))  # fmt: skip
            streams.append(s)
    refused(cores, streams, "deadlock: chip 0, core 0, site l0.sum, engine NET, instruction Receive waits for chip 1 "
            "to send tag", "which waits for the first")  # fmt: skip


def test_a_message_that_nobody_sends() -> None:
    cores = case("all_reduce")
    rest = [s for s in cores.streams if s.chip != 2]
    refused(cores, rest, "deadlock: chip ", "instruction Receive waits for chip 2 to send tag", "which no stream sends")


@pytest.mark.parametrize(
    ("name", "kind", "field"),
    [("linear", isa.Matmul, "b"), ("linear", isa.Matmul, "row_scale"), ("linear", isa.Drain, "residual"),
     ("linear", isa.Matmul, "col_scale"), ("norm", isa.Norm, "weight"), ("norm", isa.Store, "src"),
     ("embed", isa.Gather, "index"), ("embed", isa.Dequantise, "scales"), ("kv_write", isa.Scatter, "index"),
     ("attend fused", isa.Attend, "v"), ("attend small", isa.Softmax, "alpha"), ("all_reduce", isa.Map, "b")],
)  # fmt: skip
def test_wrong_shapes(name: str, kind: type[Instruction], field: str) -> None:
    """A region with one more row and one more column."""
    cores = case(name)
    stream = cores.streams[0]
    at = first(stream, kind)
    old = getattr(stream.instructions[at], field)
    wrong = old.shaped(old.rows + 1, old.cols + 1)
    where = f"site {stream.site}, engine {kind.engine}, instruction {kind.__name__}: {field} is {wrong}; wanted ["
    refused(cores, [changed(stream, at, **{field: wrong})], where)


def test_a_message_of_another_shape_than_its_destination() -> None:
    cores = case("all_reduce")
    at = first(cores.streams[0], isa.Receive)
    receive = cores.streams[0].instructions[at]
    assert isinstance(receive, isa.Receive)
    wrong, rows, cols = receive.dst.shaped(2, 9), receive.dst.rows, receive.dst.cols
    planted = changed(cores.streams[0], at, dst=wrong)
    refused(
        cores,
        [planted, *cores.streams[1:]],
        f"engine NET, instruction Receive: dst is {wrong}; the message of chip {receive.peer} has shape "
        f"[{rows}, {cols}]",
    )


def test_an_engine_that_reads_memory_it_cannot_address() -> None:
    cores = case("linear")
    stream = cores.streams[0]
    load = stream.instructions[first(stream, isa.Load)]
    assert isinstance(load, isa.Load)
    at = first(stream, isa.Drain)
    planted = changed(stream, at, residual=load.src)
    refused(
        cores,
        [planted],
        f"engine VEC, instruction Drain: residual is {load.src}; VEC takes it",
        "only from sram or acc",
    )
