"""The instruction set, the machine's clock, and what it refuses: each detector with the bug it is there for."""

from __future__ import annotations

from dataclasses import replace as change
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from silicon import SMALL

from intaglio.chips import chip, replace
from intaglio.silicon import instructions as do
from intaglio.silicon.instruction import (
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
from intaglio.silicon.isa import page
from intaglio.silicon.kernel import Kernel, Stream
from intaglio.silicon.kernels.board import Board
from intaglio.silicon.machine import Machine
from intaglio.silicon.memory import FORMATS, SPACES, MachineError, Memory, Region, Spaces, dense
from intaglio.silicon.timing import pipeline

REPO = Path(__file__).resolve().parent.parent
U32 = st.integers(0, 2**32 - 1)
REGION = st.builds(
    Region, st.sampled_from(SPACES), st.integers(0, 2**40), U32, U32, U32, st.sampled_from(sorted(FORMATS))
)
STEP = st.one_of(
    st.tuples(st.just("number"), st.floats(allow_nan=False)),
    st.sampled_from([("operand", "a"), ("binary", "*"), ("call", "silu"), ("operand", "c")]),
)


def of_kind(kind: Any) -> st.SearchStrategy[Any]:
    """Any value a field of this type may have."""
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
def test_words_and_lines_are_read_back(name: str, data: st.DataObject) -> None:
    cls = REGISTRY[name]
    values = {field: data.draw(of_kind(kind)) for field, kind in own_fields(cls)}
    i = cls(wait=tuple(data.draw(st.lists(U32, min_size=len(ENGINES), max_size=len(ENGINES)))), **values)
    word = encode(i)
    assert len(word) == WORD
    assert decode(word) == i
    required = {field: value for field, value in values.items() if value is not None}
    assert assemble(disassemble(i)) == cls(wait=i.wait, **required)


def test_words_and_lines_that_mean_nothing_are_refused() -> None:
    with pytest.raises(MachineError, match="opcode 0xee is no instruction"):
        decode(b"\xee" + bytes(WORD - 1))
    with pytest.raises(MachineError, match="'Blur' is no instruction; there are Attend"):
        assemble("VEC Blur dst=1")
    with pytest.raises(MachineError, match="Halt has no field 'x'"):
        assemble("SEQ Halt x=1")


def test_an_instruction_without_a_face_or_with_a_taken_opcode_fails_at_import() -> None:
    with pytest.raises(TypeError, match="lacks run, cost, writes"):
        type("Bare", (Instruction,), {}, engine="VEC", opcode=0xE0)
    with pytest.raises(TypeError, match="opcode 0x20 belongs to Matmul"):
        type("Twice", (Instruction,), {}, engine="VEC", opcode=0x20)
    assert 0xE0 not in OPCODES


def test_the_page_is_fresh() -> None:
    assert (REPO / "docs" / "isa.md").read_text() == page(), "run: intaglio isa --page > docs/isa.md"


def spaces(spec: Any = SMALL) -> Spaces:
    return Spaces(Memory("hbm", None), spec.sram_bytes, spec.acc_bytes)


@pytest.mark.parametrize("format", ["e4m3", "int8"])
def test_a_tile_of_the_array_is_exact(format: str) -> None:
    """The sum over 512 products, rounded once: compared with fractions, of which none is rounded."""
    rng = np.random.default_rng()
    at, dtype = spaces(chip("sohu")), FORMATS[format][1]
    raw = (
        rng.integers(-127, 128, (2, 512))
        if format == "int8"
        else rng.normal(size=(2, 512)) * 2.0 ** rng.integers(-8, 8)
    )
    values = np.asarray(raw).astype(dtype)
    a, b = dense("sram", 0, 1, 512, format), dense("sram", 4096, 1, 512, format)
    acc = dense("acc", 0, 1, 1, "f32")
    at.write(a, values[:1])
    at.write(b, values[1:])
    do.Matmul(acc=acc, a=a, b=b).run(at)
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
def test_the_closed_form_is_the_machine(n: int, load: int, work: int, wait: int, depth: int) -> None:
    """n steps of load and work through a ring: the machine runs every instruction, the closed form none."""
    spec = replace(
        SMALL, clock_hz=1e9, hbm_bytes_per_s=64e9, hbm_share=1.0, latency_s=wait * 1e-9, port_bytes_per_cycle=999
    )
    k = Kernel(spec, "loop")
    ring, out = k.ring(depth, 1, load * 16, "f32"), k.tile(1, 64)
    source = dense("hbm", 0, 1, load * 16, "f32")
    lanes = spec.vec_lanes
    for _ in range(n):
        tile = ring.next()
        k.do(do.Load(dst=tile, src=source))
        steps = (("operand", "a"), ("number", 1.0), ("binary", "+")) * 1
        k.do(do.Map(dst=out.shaped(1, 64), a=tile.part(cols=slice(0, 16)).shaped(1, 16), steps=steps))
    streams = [k.stream()]
    cycles = do.Map(dst=out, a=out, steps=(("operand", "a"), ("number", 1.0), ("binary", "+"))).cost(spec).cycles
    assert cycles == 64 / lanes
    run = Machine(replace(spec, vec_lanes=int(64 // work) or 1)).run(streams)
    work_s = 64 / (int(64 // work) or 1) * 1e-9
    assert run.seconds == pytest.approx(float(pipeline(n, load * 1e-9, work_s, wait * 1e-9, depth)), rel=1e-9)


def test_cores_share_hbm() -> None:
    """Two cores that stream at once take as long as one that streams twice as much, if HBM is the limit."""
    spec = replace(SMALL, hbm_bytes_per_s=10e9, latency_s=0.0, hbm_share=1.0)

    def stream(n: int) -> Stream:
        k = Kernel(spec, "s")
        tile = k.tile(1, 1024)
        for _ in range(n):
            k.do(do.Load(dst=tile, src=dense("hbm", 0, 1, 1024, "f32")))
        return k.stream()

    both, alone = Machine(spec).run([stream(8), stream(8)]), Machine(spec).run([stream(16)])
    assert both.seconds == pytest.approx(16 * 4096 / 10e9)
    assert both.seconds == pytest.approx(alone.seconds)


def product(spec: Any = SMALL, site: str = "layers.0.mlp") -> tuple[Board, Kernel, Region]:
    """A small product, as a kernel writes it: loads, a matmul, a drain, a store."""
    board, k = Board(spec), Kernel(spec, site)
    rng = np.random.default_rng()
    for name in ("x", "w"):
        board.put(name, rng.normal(size=(16, 16)).astype(np.float32))
    out = board.room("y", 16, 16, "f32")
    a, b, acc, y = k.tile(16, 16), k.tile(16, 16), k.tile(16, 16, "f32", "acc"), k.tile(16, 16)
    k.do(do.Load(dst=a, src=board.at("x")))
    k.do(do.Load(dst=b, src=board.at("w")))
    k.do(do.Matmul(acc=acc, a=a, b=b))
    k.do(do.Drain(dst=y, acc=acc))
    k.do(do.Store(dst=out, src=y))
    return board, k, out


def planted(k: Kernel, at: int, **fields: Any) -> Stream:
    """The stream with one instruction changed."""
    stream = k.stream()
    changed = [change(i, **fields) if n == at else i for n, i in enumerate(stream.instructions)]
    return change(stream, instructions=tuple(changed))


def test_a_sound_stream_runs() -> None:
    board, k, out = product()
    board.run([k.stream()])
    want = board.get("x").astype(np.float64) @ board.get("w").astype(np.float64).T
    np.testing.assert_allclose(board.memory.read(out), want, rtol=1e-6)


def test_a_race_is_refused() -> None:
    board, k, _ = product()
    with pytest.raises(
        MachineError,
        match=r"site layers.0.mlp, engine MXU, instruction Matmul: race: it reads f32\[16, 16\] at sram:.*"
        r"instruction 1 of DMA writes.*waits for nothing",
    ):
        board.run([planted(k, 2, wait=(0,) * len(ENGINES))])


def test_a_race_with_a_reader_is_refused() -> None:
    """The next load overwrites the tile that the array may still read."""
    board, k, _ = product()
    a = k.instructions[0]
    assert isinstance(a, do.Load)
    k.do(do.Load(dst=a.dst, src=a.src))
    with pytest.raises(MachineError, match=r"engine DMA, instruction Load: race: it writes .* 1 of MXU reads"):
        board.run([planted(k, 5, wait=(2, 0, 0, 0, 0, 0, 0))])


def test_an_overflow_is_refused() -> None:
    board, k, _ = product()
    big = k.tile(1024, 1024)
    k.do(do.Load(dst=big, src=board.heap.place(1024, 1024, "f32")))
    with pytest.raises(
        MachineError,
        match=r"site layers.0.mlp, engine DMA, instruction Load: sram overflow: .* small has 98,304 a core",
    ):
        board.run([k.stream()])


def test_a_read_of_what_nobody_wrote_is_refused() -> None:
    board, k, _ = product()
    blank = k.tile(16, 16)
    k.do(do.Convert(dst=k.tile(16, 16), src=blank))
    with pytest.raises(
        MachineError,
        match=r"site layers.0.mlp, engine VEC, instruction Convert: reads .* row 0 byte 0 was never written",
    ):
        board.run([k.stream()])


def test_a_deadlock_is_refused_and_says_who_waits_for_what() -> None:
    """A load waits for the drain of what it is to feed."""
    board, k, _ = product()
    stuck = [0] * len(ENGINES)
    stuck[ENGINES.index("VEC")] = 1
    with pytest.raises(
        MachineError,
        match=r"deadlock: site layers.0.mlp, engine DMA, instruction Load waits for VEC to finish 1 "
        r"\(it has finished 0\); site layers.0.mlp, engine OUT, instruction Store waits for VEC .*; "
        r".* Matmul waits for DMA to finish 2",
    ):
        board.run([planted(k, 1, wait=tuple(stuck))])


def test_messages_pass_between_chips_and_a_lost_one_is_a_deadlock() -> None:
    spec = replace(SMALL, count=1, bytes_per_s=1e9, hop_s=1e-6)
    boards = [Board(spec) for _ in range(2)]
    x = np.random.default_rng().normal(size=(4, 8)).astype(np.float32)
    boards[0].put("x", x)
    out = boards[1].room("y", 4, 8, "f32")
    there, back = Kernel(spec, "send"), Kernel(spec, "receive", chip=1)
    tile = there.tile(4, 8)
    there.do(do.Load(dst=tile, src=boards[0].at("x")))
    there.do(do.Send(src=tile, peer=1, tag=3))
    landed = back.tile(4, 8)
    back.do(do.Receive(dst=landed, peer=0, tag=3))
    back.do(do.Store(dst=out, src=landed))
    hbm = {c: b.memory for c, b in enumerate(boards)}
    run = Machine(spec, hbm).run([there.stream(), back.stream()])
    np.testing.assert_array_equal(boards[1].memory.read(out), x)
    assert run.seconds > 128 / 1e9 + 1e-6
    with pytest.raises(MachineError, match="engine NET, instruction Receive waits for chip 0 to send tag 3"):
        Machine(spec, hbm).run([back.stream()])


def test_stalls_have_reasons() -> None:
    board, k, _ = product()
    run = board.run([k.stream()])
    assert run.stalls["MXU", "DMA"] > 0
    assert run.busy["DMA"] > 0
    assert run.bytes["hbm"] == 3 * 16 * 16 * 4


def test_a_check_traps_what_is_not_finite() -> None:
    board, k = Board(SMALL), Kernel(SMALL, "norm")
    board.put("x", np.array([[1.0, np.inf]], np.float32))
    tile = k.tile(1, 2)
    k.do(do.Load(dst=tile, src=board.at("x")))
    k.do(do.Check(what=tile))
    with pytest.raises(MachineError, match="site norm, engine SEQ, instruction Check: .* 1 values that are not finite"):
        board.run([k.stream()])


def test_gathers_and_scatters_refuse_rows_there_are_not() -> None:
    board, k = Board(SMALL), Kernel(SMALL, "embed")
    board.put("w", np.zeros((4, 2), np.float32))
    index, rows = k.tile(1, 1, "i32"), k.tile(1, 2)
    k.do(do.Load(dst=index, src=board.table([4])))
    k.do(do.Gather(dst=rows, table=board.at("w"), index=index))
    with pytest.raises(MachineError, match="gathers row 4 of .*, which has 4"):
        board.run([k.stream()])


def test_permute_refuses_columns_there_are_not() -> None:
    board, k = Board(SMALL), Kernel(SMALL, "permute")
    order, src, dst = k.tile(1, 2, "i32"), k.tile(1, 2), k.tile(1, 2)
    k.do(do.Load(dst=order, src=board.table([1, -1])))
    k.do(do.Fill(dst=src, value=1.0))
    k.do(do.Permute(dst=dst, src=src, order=order))
    with pytest.raises(MachineError, match="takes column -1 of .*, which has 2"):
        board.run([k.stream()])
