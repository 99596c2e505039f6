"""Instruction encoding, the simulator's modelled time, and its checks (races, overflow, deadlock), by planted bugs."""

from __future__ import annotations

from dataclasses import replace as change
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.silicon import SMALL

from intaglio.chips import Target, target
from intaglio.formats import ELEMENTS
from intaglio.silicon import isa
from intaglio.silicon.isa.instruction import (
    ENGINES,
    MOST_STEPS,
    OPCODES,
    REGISTRY,
    WORD,
    Instruction,
    Steps,
    assemble,
    decode,
    disassemble,
    encode,
    own_fields,
)  # fmt: skip
from intaglio.silicon.isa.page import page
from intaglio.silicon.kernels.chip_memory import ChipMemory
from intaglio.silicon.machine import Machine
from intaglio.silicon.memory import FORMATS, SPACES, CoreMemory, MachineError, Memory, Region, dense
from intaglio.silicon.stream import Stream, StreamBuilder
from intaglio.silicon.timing import pipeline

REPO = Path(__file__).resolve().parent.parent.parent
U32 = st.integers(0, 2**32 - 1)
REGION = st.builds(
    Region, st.sampled_from(SPACES), st.integers(0, 2**40), U32, U32, U32, st.sampled_from(sorted(FORMATS))
)
STEP = st.one_of(
    st.tuples(st.just("number"), st.floats(allow_nan=False)),
    st.sampled_from([("operand", "a"), ("binary", "*"), ("call", "silu"), ("operand", "c")]),
)


def of_kind(kind: Any) -> st.SearchStrategy[Any]:
    """Strategy for values of a field of this type."""
    if kind is Region:
        return REGION
    if Region in get_args(kind):
        return st.none() | REGION
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind == Steps:
        return st.lists(STEP, min_size=1, max_size=MOST_STEPS).map(tuple)
    return {bool: st.booleans(), int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False)}[kind]


@pytest.mark.parametrize("name", sorted(REGISTRY))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_encoding_and_assembly_round_trip(name: str, data: st.DataObject) -> None:
    cls = REGISTRY[name]
    values = {field: data.draw(of_kind(kind)) for field, kind in own_fields(cls)}
    i = cls(wait=tuple(data.draw(st.lists(U32, min_size=len(ENGINES), max_size=len(ENGINES)))), **values)
    word = encode(i)
    assert len(word) == WORD
    assert decode(word) == i
    required = {field: value for field, value in values.items() if value is not None}
    assert assemble(disassemble(i)) == cls(wait=i.wait, **required)


def test_invalid_words_and_lines_are_refused() -> None:
    with pytest.raises(MachineError, match="unknown opcode 0xee; known: 0x10"):
        decode(b"\xee" + bytes(WORD - 1))
    with pytest.raises(MachineError, match="unknown instruction 'Blur'; known: Attend"):
        assemble("VEC Blur dst=1")
    with pytest.raises(MachineError, match="Halt has no field 'x'"):
        assemble("SEQ Halt x=1")


def test_an_incomplete_instruction_or_a_taken_opcode_fails_at_import() -> None:
    with pytest.raises(TypeError, match="must define run, cost, shapes, writes"):
        type("Bare", (Instruction,), {}, engine="VEC", opcode=0xE0)
    with pytest.raises(TypeError, match="opcode 0x20 belongs to Matmul"):
        type("Twice", (Instruction,), {}, engine="VEC", opcode=0x20)
    assert 0xE0 not in OPCODES


def test_the_isa_page_is_up_to_date() -> None:
    assert (REPO / "docs" / "isa.md").read_text() == page(), "run: intaglio isa --page > docs/isa.md"


def spaces(on: Target = SMALL) -> CoreMemory:
    return CoreMemory(Memory("hbm", None), on.chip.sram_bytes, on.chip.acc_bytes)


@pytest.mark.parametrize("format", ["e4m3", "int8"])
def test_a_tile_of_the_array_is_exact(format: str) -> None:
    """The sum of 512 products is exact and rounded once: compared with exact fractions."""
    rng = np.random.default_rng()
    at, dtype = spaces(target("sohu")), ELEMENTS[format][1]
    raw: np.ndarray = rng.integers(-127, 128, (2, 512))
    if format == "e4m3":  # its largest value is 448; above 464 is NaN
        raw = np.clip(rng.normal(size=(2, 512)) * 2.0 ** rng.integers(-8, 8), -448, 448)
    values = raw.astype(dtype)
    a, b = dense("sram", 0, 1, 512, format), dense("sram", 4096, 1, 512, format)
    acc = dense("acc", 0, 1, 1, "f32")
    at.write(a, values[:1])
    at.write(b, values[1:])
    isa.Matmul(acc=acc, a=a, b=b).run(at)
    exact = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(values[0], values[1], strict=True))
    assert at.read(acc)[0, 0] == np.float32(float(exact))  # float() of a fraction rounds once; 52 bits hold the sum


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    load=st.integers(1, 9),
    work=st.integers(1, 9),
    wait=st.integers(0, 30),
    depth=st.integers(2, 6),
)
def test_the_closed_form_equals_the_simulator(n: int, load: int, work: int, wait: int, depth: int) -> None:
    """n iterations of load and compute through a ring of tiles: pipeline() gives the simulator's time."""
    on = SMALL.with_chip(
        clock_hz=1e9, hbm_bytes_per_s=64e9, hbm_efficiency=1.0, hbm_latency_s=wait * 1e-9, port_bytes_per_cycle=999,
        l2_bytes=0,
    )  # fmt: skip
    k = StreamBuilder("loop")
    ring, out = k.ring(depth, 1, load * 16, "f32"), k.tile(1, 16)
    source = dense("hbm", 0, 1, load * 16, "f32")
    lanes = on.chip.vec_lanes
    for _ in range(n):
        tile = ring.next()
        k.emit(isa.Load(dst=tile, src=source))
        steps = (("operand", "a"), ("number", 1.0), ("binary", "+")) * 1
        k.emit(isa.Map(dst=out.shaped(1, 16), a=tile.part(cols=slice(0, 16)), steps=steps))
    streams = [k.stream()]
    cycles = isa.Map(dst=out, a=out, steps=(("operand", "a"), ("number", 1.0), ("binary", "+"))).cost(on).cycles
    assert cycles == 2 * 16 / lanes  # the sum, and writing it
    run = Machine(on.with_chip(vec_lanes=int(16 // work) or 1)).run(streams)
    work_s = 2 * 16 / (int(16 // work) or 1) * 1e-9
    assert run.seconds == pytest.approx(float(pipeline(n, load * 1e-9, work_s, wait * 1e-9, depth)), rel=1e-9)


def test_cores_share_hbm() -> None:
    """If HBM is the bottleneck, two cores that each load n bytes take as long as one that loads 2 n."""
    on = SMALL.with_chip(hbm_bytes_per_s=10e9, hbm_latency_s=0.0, hbm_efficiency=1.0, l2_bytes=0)

    def stream(n: int) -> Stream:
        k = StreamBuilder("s")
        tile = k.tile(1, 1024)
        for _ in range(n):
            k.emit(isa.Load(dst=tile, src=dense("hbm", 0, 1, 1024, "f32")))
        return k.stream()

    both, alone = Machine(on).run([stream(8), stream(8)]), Machine(on).run([stream(16)])
    assert both.seconds == pytest.approx(16 * 4096 / 10e9)
    assert both.seconds == pytest.approx(alone.seconds)


def product(on: Target = SMALL, site: str = "layers.0.mlp") -> tuple[ChipMemory, StreamBuilder, Region]:
    """A small product: two loads, a matmul, a drain, a store."""
    memory, k = ChipMemory(on), StreamBuilder(site)
    rng = np.random.default_rng()
    for name in ("x", "w"):
        memory.put(name, rng.normal(size=(16, 16)).astype(np.float32))
    out = memory.allocate("y", 16, 16, "f32")
    a, b, acc, y = k.tile(16, 16), k.tile(16, 16), k.tile(16, 16, "f32", "acc"), k.tile(16, 16)
    k.emit(isa.Load(dst=a, src=memory.region("x")))
    k.emit(isa.Load(dst=b, src=memory.region("w")))
    k.emit(isa.Matmul(acc=acc, a=a, b=b))
    k.emit(isa.Drain(dst=y, acc=acc))
    k.emit(isa.Store(dst=out, src=y))
    return memory, k, out


def planted(k: StreamBuilder, at: int, **fields: Any) -> Stream:
    """The stream with the fields of instruction number `at` changed."""
    stream = k.stream()
    changed = [change(i, **fields) if n == at else i for n, i in enumerate(stream.instructions)]
    return change(stream, instructions=tuple(changed))


def test_a_correct_stream_runs() -> None:
    memory, k, out = product()
    memory.run([k.stream()])
    want = memory.read("x").astype(np.float64) @ memory.read("w").astype(np.float64).T
    np.testing.assert_allclose(memory.hbm.read(out), want, rtol=1e-6)


def test_a_race_is_refused() -> None:
    memory, k, _ = product()
    with pytest.raises(
        MachineError,
        match=r"site layers.0.mlp, engine MXU, instruction Matmul: race: it reads f32\[16, 16\] at sram:.*"
        r"instruction 1 of DMA writes.*waits for nothing",
    ):
        memory.run([planted(k, 2, wait=(0,) * len(ENGINES))])


def test_a_write_that_races_with_a_read_is_refused() -> None:
    """A load overwrites a tile that the array may still be reading."""
    memory, k, _ = product()
    a = k.instructions[0]
    assert isinstance(a, isa.Load)
    k.emit(isa.Load(dst=a.dst, src=a.src))
    with pytest.raises(MachineError, match=r"engine DMA, instruction Load: race: it writes .* 1 of MXU reads"):
        memory.run([planted(k, 5, wait=(2, 0, 0, 0, 0, 0, 0))])


def test_an_overflow_is_refused() -> None:
    memory, k, _ = product()
    big = k.tile(1024, 1024)
    k.emit(isa.Load(dst=big, src=memory.heap.allocate(1024, 1024, "f32")))
    with pytest.raises(
        MachineError,
        match=r"site layers.0.mlp, engine DMA, instruction Load: sram overflow: .* small has 98,304 a core",
    ):
        memory.run([k.stream()])


def test_a_read_of_unwritten_bytes_is_refused() -> None:
    memory, k, _ = product()
    blank = k.tile(16, 16)
    k.emit(isa.Convert(dst=k.tile(16, 16), src=blank))
    with pytest.raises(
        MachineError,
        match=r"site layers.0.mlp, engine VEC, instruction Convert: reads .* row 0 byte 0 was never written",
    ):
        memory.run([k.stream()])


def test_messages_arrive_and_a_missing_one_is_a_deadlock() -> None:
    on = SMALL.with_chip(count=1, bytes_per_s=1e9).with_library(link_latency_s=1e-6)
    memories = [ChipMemory(on) for _ in range(2)]
    x = np.random.default_rng().normal(size=(4, 8)).astype(np.float32)
    memories[0].put("x", x)
    out = memories[1].allocate("y", 4, 8, "f32")
    there, back = StreamBuilder("send"), StreamBuilder("receive", chip=1)
    tile = there.tile(4, 8)
    there.emit(isa.Load(dst=tile, src=memories[0].region("x")))
    there.emit(isa.Send(src=tile, peer=1, tag=3))
    landed = back.tile(4, 8)
    back.emit(isa.Receive(dst=landed, peer=0, tag=3))
    back.emit(isa.Store(dst=out, src=landed))
    hbm = {c: b.hbm for c, b in enumerate(memories)}
    run = Machine(on, hbm).run([there.stream(), back.stream()])
    np.testing.assert_array_equal(memories[1].hbm.read(out), x)
    assert run.seconds > 128 / 1e9 + 1e-6
    with pytest.raises(
        MachineError, match="engine NET, instruction Receive waits for chip 0 to send tag 3, which no stream sends"
    ):
        Machine(on, hbm).run([back.stream()])


def test_stalls_name_the_engine_waited_for() -> None:
    memory, k, _ = product()
    run = memory.run([k.stream()])
    assert run.stalls["MXU", "DMA"] > 0
    assert run.busy["DMA"] > 0
    assert run.bytes["l2"] == 3 * 16 * 16 * 4
    assert run.bytes["hbm"] == 2 * 16 * 16 * 4  # the result stays in the L2


def test_check_traps_values_that_are_not_finite() -> None:
    memory, k = ChipMemory(SMALL), StreamBuilder("norm")
    memory.put("x", np.array([[1.0, np.inf]], np.float32))
    tile = k.tile(1, 2)
    k.emit(isa.Load(dst=tile, src=memory.region("x")))
    k.emit(isa.Check(src=tile))
    with pytest.raises(MachineError, match="site norm, engine SEQ, instruction Check: .* 1 values that are not finite"):
        memory.run([k.stream()])


def test_gather_and_scatter_refuse_rows_out_of_range() -> None:
    memory, k = ChipMemory(SMALL), StreamBuilder("embed")
    memory.put("w", np.zeros((4, 2), np.float32))
    index, rows = k.tile(1, 1, "i32"), k.tile(1, 2)
    k.emit(isa.Load(dst=index, src=memory.put_indices([4])))
    k.emit(isa.Gather(dst=rows, table=memory.region("w"), index=index))
    with pytest.raises(MachineError, match="gathers row 4 of .*, which has 4"):
        memory.run([k.stream()])


def test_permute_refuses_columns_out_of_range() -> None:
    memory, k = ChipMemory(SMALL), StreamBuilder("permute")
    order, src, dst = k.tile(1, 2, "i32"), k.tile(1, 2), k.tile(1, 2)
    k.emit(isa.Load(dst=order, src=memory.put_indices([1, -1])))
    k.emit(isa.Fill(dst=src, value=1.0))
    k.emit(isa.Permute(dst=dst, src=src, order=order))
    with pytest.raises(MachineError, match="takes column -1 of .*, which has 2"):
        memory.run([k.stream()])
