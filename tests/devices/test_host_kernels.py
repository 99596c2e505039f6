"""The registry of host kernels: Python kernels for ops of this file, on one rank and in a mesh, and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.host_bench import PAGE, Bench, finish
from support.tiny import tiny

from intaglio import _native
from intaglio.batch import Batch, Chunk, bind
from intaglio.compiler import build, build_mesh
from intaglio.devices import ArrayWeights, DeviceError, MeshDevice, StateSpec, StepRequest
from intaglio.devices.host import HostDevice, HostLayout, host_kernel
from intaglio.devices.host.kernels import KERNELS, native_kernel
from intaglio.devices.reference import ReferenceDevice
from intaglio.models import Checkpoint, port
from intaglio.ops import REGISTRY, AllReduce, Linear, Map, Norm, Op, Value, Work
from intaglio.ops.op import Results, Tensors, array, operand, result
from intaglio.program import Program


@dataclass(frozen=True, kw_only=True)
class Swing(Op, kind="test_swing"):
    """out = sin(x) * w + shift. x, out f32 [rows, width], w [width]."""

    x: str = operand()
    w: str = operand("vector")
    out: str = result()
    shift: float = 0.0

    def shapes(self, t: Tensors) -> Results:
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        return {self.out: (np.sin(array(v, self.x)) * array(v, self.w) + np.float32(self.shift)).astype(np.float32)}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 0)


@dataclass(frozen=True, kw_only=True)
class Tally(Op, kind="test_tally"):
    """Adds each token's x to its slot of `total` [P, B, 1, width], and out = what the slot holds then."""

    x: str = operand()
    total: str = operand("pages", access="write")
    out: str = result()

    def shapes(self, t: Tensors) -> Results:
        return {self.out: (t[self.x].shape, "f32")}

    def reference(self, v: Mapping[str, Value], batch: Batch) -> dict[str, np.ndarray]:
        total = array(v, self.total)
        pages, at = np.divmod(batch.slots, batch.block_size)
        total[pages, at, 0] += array(v, self.x)
        return {self.out: total[pages, at, 0].copy()}

    def work(self, t: Tensors, batch: Batch) -> Work:
        return self.moved(t, batch, 0)


OWN = {
    op.kind: REGISTRY.pop(op.kind) for op in (Swing, Tally)
}  # removed from the registry, since other tests iterate over all registered ops


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Register this file's ops for a test, and remove the kernels that the test registers afterwards."""
    before = dict(KERNELS)
    REGISTRY.update(OWN)
    yield
    for kind in OWN:
        del REGISTRY[kind]
    KERNELS.clear()
    KERNELS.update(before)


def swinging(rng: np.random.Generator) -> tuple[Program, dict[str, Value], str]:
    """A Program with the op between native ops, once on a view and once on a whole matrix."""
    bench = Bench(rng, 9, 48)
    w = bench.weight("w", rng.normal(size=48))
    y = bench.b.op(Swing, "swing", bench.x, w, shift=0.5)
    z = bench.b.op(Map, "twice", y, expr="a * 2.0")
    half = bench.b.view("half", z, 8, 24)
    again = bench.b.op(Swing, "again", half, bench.weight("w2", rng.normal(size=16)))
    bench.b.op(Map, "end", again, expr="a + 1.0")
    return finish(bench), bench.arrays, "end"


def batches() -> list[Batch]:
    three = [Chunk([4, 0, 8], 0, [0], [2]), Chunk([1], 0, [1], [0]), Chunk([7, 7], 0, [2], [0, 1])]
    return [bind(three, PAGE), bind([Chunk([3], 0, [3], [0])], PAGE)]


def test_an_op_with_a_python_kernel_runs_between_native_ops(rng: np.random.Generator) -> None:
    host_kernel(Swing)(Swing.reference)
    program, arrays, end = swinging(rng)
    state = StateSpec(8, PAGE)
    reference = ReferenceDevice().load(program, ArrayWeights(arrays), state)
    sites = [op.site for op in program.ops] + ["half"]
    for threads in (1, 2):
        host = HostDevice(threads).load(program, ArrayWeights(arrays), state)
        for batch in batches():
            want, got = (ex.step(StepRequest(batch, logits=True, taps=sites, timed=True)) for ex in (reference, host))
            assert got.timings["swing"] > 0 and set(got.timings) == set(want.timings)
            np.testing.assert_array_equal(got.tokens, want.tokens)
            assert set(want.taps) - set(got.taps) <= {"sample"}  # the host taps f32 alone
            for site in got.taps:
                np.testing.assert_allclose(got.taps[site], want.taps[site], rtol=1e-5, atol=1e-5, err_msg=site)
            np.testing.assert_array_equal(got.taps[end], host.step(StepRequest(batch, taps=[end])).taps[end])


def test_state_of_a_python_kernel_is_kept_between_steps(rng: np.random.Generator) -> None:
    host_kernel(Tally)(Tally.reference)
    bench = Bench(rng, 9, 16)
    y = bench.b.op(Tally, "tally", bench.x, bench.b.cache("total", 1, 16, "f32"))
    bench.b.op(Map, "end", y, expr="a * 1.0")
    program = finish(bench)
    host = HostDevice(1).load(program, ArrayWeights(bench.arrays), StateSpec(8, PAGE))
    table = np.asarray(bench.arrays["x.table"], np.float32)
    for tokens in ([3, 5], [6, 1]):
        batch = bind([Chunk(tokens, 0, [2], [0])], PAGE)
        got = host.step(StepRequest(batch, taps=["end"])).taps["end"]
    np.testing.assert_array_equal(got, table[[3, 5]] + table[[6, 1]])


def with_swings(program: Program, before: str) -> Program:
    """A Swing by an array of ones in front of each op at a site that ends in `before`."""
    tensors, ops = dict(program.tensors), list[Op]()
    for op in program.ops:
        if op.site.endswith(before) and isinstance(op, Linear):
            x = tensors[op.x]
            tensors[f"{op.site}.w"] = replace(x, name=f"{op.site}.w", shape=x.shape[1:], role="const", view=None,
                                              values=(1.0,) * int(x.shape[1]), buffer=None)  # fmt: skip
            tensors[f"{op.site}.x"] = replace(x, name=f"{op.site}.x", view=None, buffer=None)
            ops.append(Swing(site=f"{op.site}.swing", x=op.x, w=f"{op.site}.w", out=f"{op.site}.x"))
            op = replace(op, x=f"{op.site}.x")
        ops.append(op)
    return replace(program, tensors=tensors, ops=tuple(ops))


def test_python_kernels_and_collectives_in_one_step(tmp_path: Path) -> None:
    """Two ranks, each of which stops at its collectives and Python kernels, give the reference's logits."""
    host_kernel(Swing)(Swing.reference)
    checkpoint = Checkpoint.open(tiny("llama", tmp_path / "model"))
    mesh = build_mesh(port(checkpoint), "tp2", "f32", "f32")
    mesh = replace(mesh, programs=tuple(with_swings(p, "o_proj") for p in mesh.programs))
    assert all(any(isinstance(op, AllReduce) for op in p.ops) for p in mesh.programs)
    state, batch = StateSpec(8, PAGE), bind([Chunk(range(20), 0, [1, 2], [19]), Chunk([5], 0, [3], [0])], PAGE)
    want, got = (
        MeshDevice(device).load(mesh, checkpoint, state).step(StepRequest(batch, logits=True)).logits
        for device in (ReferenceDevice(), HostDevice(2, cache=None))
    )
    assert want is not None and got is not None and np.isfinite(want).all()
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_weight_layout_follows_from_uses(tmp_path: Path) -> None:
    """Weights of products are packed, gate and up together; weights used only by Python kernels stay arrays."""
    host_kernel(Swing)(Swing.reference)
    program = with_swings(build(port(Checkpoint.open(tiny("llama", tmp_path / "model"))), "f32"), "o_proj")
    layout = HostLayout.of(program)
    products = {w for op in program.ops for w in op.operands("matrix", "table")}
    assert products == set(layout.homes) and set(layout.matrices) <= products
    swings = [i for i, op in enumerate(program.ops) if isinstance(op, Swing)]
    assert [stop.at for stop in layout.stops] == swings and swings
    assert layout.arrays == {op.w for op in program.ops if isinstance(op, Swing)}
    assert not layout.arrays & layout.native
    caches = {t.name for t in program.of_role("state")}
    assert layout.keys == {name for name in caches if name.endswith("k_cache")} and layout.keys


def test_refusals(rng: np.random.Generator) -> None:
    program, arrays, _ = swinging(rng)
    state = StateSpec(8, PAGE)
    with pytest.raises(
        DeviceError, match="swing: the host has no kernel for op test_swing; rebuild the native module if"
    ):
        HostDevice(1).load(program, ArrayWeights(arrays), state)
    with pytest.raises(
        TypeError, match="the native module has no kernel 'test_swing'; it has all_gather, all_reduce, "
    ):
        native_kernel(Swing)
    with pytest.raises(TypeError, match="op norm has a host kernel already"):
        host_kernel(Norm)(Norm.reference)
    host_kernel(Swing)(lambda op, values, batch: {op.out: values[op.x][:, :1]})
    host = HostDevice(1).load(program, ArrayWeights(arrays), state)
    with pytest.raises(
        DeviceError, match=r"swing \(test_swing\): the host kernel returned \{.*\(1, 1\)\}; the op decl"
    ):
        host.step(StepRequest(batches()[1]))


def test_every_op_of_the_package_has_a_host_kernel() -> None:
    own = {op for op in REGISTRY.values() if op.__module__.startswith("intaglio.ops.")}
    assert own == set(KERNELS)
    # `done` stands for an op that the one before it computes
    assert {op.kind for op in KERNELS} | {"done"} == set(_native.op_kinds())


def test_native_kernels_refuse_unknown_operands_and_attributes() -> None:
    native = _native.Executable("scalar", 1, PAGE, (10, 10, 10, 10, 0, 0, 0))
    buffer = native.buffer(64, False, 0, 1)
    x, y = (native.columns(buffer, 16, 16, 0) for _ in range(2))
    norm = {"norm": "rms", "eps": 1e-5, "offset": 0.0, "group": 0}
    for kind, operands, attributes, message in (
        ("nothing", {}, {}, "no kernel for op nothing"),
        ("norm", {"x": x}, norm, "takes out as rows"),
        ("norm", {"x": x, "out": y, "more": x}, norm, "does not know operand more"),
        ("norm", {"x": x, "out": y}, norm | {"power": 2}, "does not know attribute power"),
        ("norm", {"x": x, "out": y}, norm | {"norm": "batch"}, "norm='batch'; the host knows rms, layer, l2"),
        ("norm", {"x": x, "out": y}, norm | {"group": 0.5}, "takes group as an integer"),
        ("norm", {"x": x, "out": y}, {k: v for k, v in norm.items() if k != "eps"}, "needs attribute eps"),
        ("map", {"a": x, "out": y}, {"expr": ["a"] * 17 + ["+"] * 16}, "needs a stack of 17; the host's has 16"),
        ("map", {"a": x, "out": y}, {"expr": ["a", "cosh"]}, "function='cosh'; the host knows silu"),
    ):
        with pytest.raises(ValueError, match=message):
            native.op(kind, operands, attributes)
