"""Ranks as processes: the same bits as the mesh in one process; failures are DeviceLost and leave nothing behind."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from devices.test_worker import gone
from support.faults import disturb
from support.tiny import FAMILIES, MIXTURES, RECURRENT, tiny

from intaglio.batch import Batch, Chunk, Edits, Sampling, bind
from intaglio.compiler import build_mesh
from intaglio.devices import (
    ArrayWeights,
    DeviceError,
    DeviceLost,
    Executable,
    MeshDevice,
    RanksDevice,
    ReplacementRefused,
    StateSpec,
    StepRequest,
    StepResult,
)
from intaglio.devices.host import HostDevice, isa_names
from intaglio.devices.processes import GroupExecutable, Job, RankStart
from intaglio.devices.processes.board import Board
from intaglio.devices.processes.messages import (
    MessageError,
    RequestReader,
    error_parts,
    read_result,
    request_parts,
    result_parts,
)
from intaglio.devices.ranks import share_cores
from intaglio.llm import LLM
from intaglio.models import Checkpoint, port
from intaglio.models.files.checkpoint import IDENTITY_BYTES, IDENTITY_SAMPLES
from intaglio.ops import AllReduce
from intaglio.program.source import names
from intaglio.runtime import Engine, Grammar, Refused, Request, SamplingParams

PAGE, STATE = 16, StateSpec(6, 16)
SLOTS = replace(STATE, slots=6)  # for recurrent state
PATIENT = 60.0  # seconds of silence, where a test is not about it: the machine may be busy
FAULTS = 3  # at random moments; `make faults` has more
ALL = bool(os.environ.get("INTAGLIO_ALL_FAMILIES"))  # also through processes; test_communicator.py has them in threads
CASES = [(f, layout) for f in FAMILIES for layout in ("tp2", "tp2pp2")] + [(f, "ep2") for f in MIXTURES]
CASES += [(f, "tp2") for f in RECURRENT]
FEW = [("qwen3", "tp2pp2"), (next(iter(MIXTURES)), "ep2"), ("qwen3_next", "tp2pp2"), ("mamba2", "tp2")]


def open_tiny(family: str, folder: Path, **sizes: int) -> Checkpoint:
    return Checkpoint.open(tiny(family, folder / family, **sizes))


def start(checkpoint: Checkpoint, layout: str = "tp2", state: StateSpec = STATE, **options: float) -> GroupExecutable:
    device = RanksDevice(2, cache=None, **{"silence": PATIENT, **options})  # type: ignore[arg-type]
    group = device.load(build_mesh(port(checkpoint), layout), checkpoint, state)
    assert isinstance(group, GroupExecutable)
    return group


def one_token(token: int = 1) -> Batch:
    return bind([Chunk([token], 0, [1], [0])], PAGE)


@pytest.mark.parametrize(("family", "layout"), CASES if ALL else FEW)
def test_processes_have_the_bits_of_the_mesh(tmp_path: Path, family: str, layout: str) -> None:
    """Prefill in two chunks beside another sequence, decoding, with several steps under way at a time."""
    c = open_tiny(family, tmp_path)
    mesh = build_mesh(port(c), layout)
    here, there = MeshDevice(HostDevice(1)).load(mesh, c, SLOTS), start(c, layout, SLOTS)
    tokens = np.random.default_rng(len(family)).integers(0, 263, 14).tolist()
    batches = []
    for first, end, slots in ((0, 9, (-1, 0)), (9, 12, (0, 1)), (12, 13, (1, 0)), (13, 14, (0, 1))):
        beside = [Chunk(tokens[:3], 0, [2], [0, 2], Sampling(0.7, seed=3), state=(-1, 4))] if first == 0 else []
        mine = Chunk(tokens[first:end], first, [4, 1], range(end - first), state=slots)
        batches.append(bind([mine, *beside], PAGE))
    requests = [StepRequest(b, logits=i != 2) for i, b in enumerate([*batches, *batches])]
    pending = [there.launch(r) for r in requests]
    for request, step in zip(requests, pending, strict=True):
        wanted, got = here.step(request), step.result()
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.logprobs, wanted.logprobs)
        assert (got.logits is None) == (wanted.logits is None)
        if got.logits is not None and wanted.logits is not None:
            np.testing.assert_array_equal(got.logits, wanted.logits)
    assert all(step.done() for step in pending)
    there.close()


def test_taps_and_timings_of_every_rank(tmp_path: Path) -> None:
    """Also of an all_reduce and the addition after it, which native code runs together unless the sum is tapped."""
    c = open_tiny("llama", tmp_path)
    mesh = build_mesh(port(c), "tp2")
    ops = mesh.last.ops
    site, after = next((op.site, ops[i + 1].site) for i, op in enumerate(ops) if isinstance(op, AllReduce))
    there, here = start(c), MeshDevice(HostDevice(1)).load(mesh, c, STATE)
    for sites in ([site], [after], [site, after]):
        request = StepRequest(one_token(), taps=sites, timed=True)
        got, wanted = there.step(request), here.step(request)
        assert list(got.taps) == list(wanted.taps) == [f"{s}@{r}" for r in (0, 1) for s in sites]
        for name, x in wanted.taps.items():
            np.testing.assert_array_equal(got.taps[name], x)
        assert set(got.timings) == set(wanted.timings) and got.timings[site] > 0
    there.close()


def test_a_batch_that_does_not_fit_is_refused_and_the_group_lives(tmp_path: Path) -> None:
    there = start(open_tiny("llama", tmp_path))
    far = Edits(np.array([1 << 20], np.int32), *np.ones((2, 1), np.float32))
    wrong = [
        (one_token(100_000), "token id 100000 is outside"),
        (bind([Chunk([1], 0, [1], [0])], 2 * PAGE), "tokens per page"),
        (bind([Chunk([1], 0, [1], [0], Sampling(mask=np.zeros(1, np.uint32)))], PAGE), "a mask is"),
        (bind([Chunk([1], 0, [1], [0], Sampling(edits=far))],
              PAGE), "edits touch ids"),
    ]  # fmt: skip
    for batch, why in wrong:
        with pytest.raises(DeviceError, match=why) as caught:
            there.step(StepRequest(batch))
        assert not isinstance(caught.value, DeviceLost)
    assert len(there.step(StepRequest(one_token())).tokens) == 1
    there.close()


def test_a_load_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    c = open_tiny("llama", tmp_path)
    files = os.listdir("/proc/self/fd")
    with pytest.raises(DeviceError, match="^rank 0: KeyError: 'model.embed_tokens.weight'") as caught:
        RanksDevice(2, cache=None).load(build_mesh(port(c), "tp2"), ArrayWeights({}), STATE)
    del caught
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= len(files)

    class Unknown(ArrayWeights):
        pass

    class Weights:
        read = strips = release = identity = None

    with pytest.raises(DeviceError, match="weights of type Weights have no recipe"):
        RanksDevice(2).load(build_mesh(port(c), "tp2"), Weights(), STATE)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_that_dies_or_hangs_is_the_loss_of_all(tmp_path: Path, victim: int, number: signal.Signals) -> None:
    files = len(os.listdir("/proc/self/fd"))
    there = start(open_tiny("qwen3", tmp_path), "tp2pp2", **({"silence": 0.5} if number == signal.SIGSTOP else {}))
    there.step(StepRequest(one_token()))
    pending = there.launch(StepRequest(one_token()))
    os.kill(there.pids[victim], number)
    why = r"hangs: no sign of life in 0\.\d+ s" if number == signal.SIGSTOP else "exited"
    with pytest.raises(DeviceLost, match=f"of rank {victim} {why}|is gone"):
        pending.result()  # it may have ended before
        there.step(StepRequest(one_token()))
    with pytest.raises(DeviceLost):
        there.step(StepRequest(one_token()))
    assert all(gone(pid) for pid in there.pids)
    del pending, there
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_group_that_nobody_holds_ends(tmp_path: Path) -> None:
    pids = start(open_tiny("llama", tmp_path)).pids
    gc.collect()
    assert all(gone(pid) for pid in pids)


def test_streams_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The engine's recovery over real processes: a rank killed in the middle, seeds, n = 2, a grammar, speculation."""
    tiny("qwen3", tmp_path)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    params = [
        SamplingParams(max_tokens=12, temperature=0.8, seed=1, ignore_eos=True, n=2),
        SamplingParams(max_tokens=16, ignore_eos=True),
        SamplingParams(max_tokens=8, seed=5, temperature=1.0, grammar=Grammar("regex", "(a|b)+")),
    ]
    here = LLM(tmp_path, layout="tp2", in_process=True, kv_tokens=256, max_drafts=2)
    wanted = here.generate(prompts, params)
    there = LLM(tmp_path, layout="tp2", kv_tokens=256, max_drafts=2)
    executable = there.engine.executable
    assert isinstance(executable, GroupExecutable)
    steps = [0]
    launch: Callable[[StepRequest], object] = executable.launch

    def killing(request: StepRequest) -> object:
        steps[0] += 1
        if steps[0] == 5:  # all prompts are computed
            os.kill(executable.pids[1], signal.SIGKILL)
        return launch(request)

    executable.launch = killing  # type: ignore[method-assign, assignment]
    assert there.generate(prompts, params) == wanted
    counts = there.engine.counts
    assert counts.restarts == 1 and there.engine.executable.state_kept
    assert counts.preemptions == here.engine.counts.preemptions == 0  # nothing was recomputed
    there.engine.executable.close()


@pytest.mark.parametrize("crash", [signal.SIGKILL, signal.SIGABRT])
def test_a_replacement_maps_the_packed_weights(tmp_path: Path, crash: signal.Signals) -> None:
    """The checkpoint could no longer be read, and the bits are the same; whatever happened to the K/V cache.

    What is sampled for the identity of the weights stays, for other weights would be packed again.
    """
    c = open_tiny("qwen3", tmp_path, hidden_size=256, intermediate_size=1024)
    mesh, device = build_mesh(port(c), "tp2"), RanksDevice(2, cache=None, silence=PATIENT)
    first = device.load(mesh, c, STATE)
    wanted = first.step(StepRequest(one_token(), logits=True)).logits
    assert isinstance(first, GroupExecutable) and wanted is not None
    weights, identity = tmp_path / "qwen3" / "model.safetensors", c.identity()
    matrices = [t.source for p in mesh.programs for t in p.tensors.values() if t.role == "weight" and len(t.shape) == 2]
    stat, zeroed = weights.stat(), bytearray(weights.read_bytes())
    for name in {name for sources in matrices for source in sources for name in names(source)}:
        entry = c.entry(name)
        zeroed[entry.start : entry.stop] = bytes(entry.stop - entry.start)
    for i in range(IDENTITY_SAMPLES):
        sampled = slice(start := stat.st_size * i // IDENTITY_SAMPLES, start + IDENTITY_BYTES)
        zeroed[sampled] = weights.read_bytes()[sampled]
    weights.write_bytes(zeroed)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert c.identity() == identity
    os.kill(first.pids[0], crash)
    with pytest.raises(DeviceLost):
        while True:
            first.step(StepRequest(one_token()))
    second = device.reload(first, mesh, c, STATE)
    np.testing.assert_array_equal(second.step(StepRequest(one_token(), logits=True)).logits, wanted)
    other = RanksDevice(2, cache=None, silence=PATIENT).load(mesh, c, STATE)
    assert (other.step(StepRequest(one_token(), logits=True)).logits != wanted).any()  # what packing again would give
    for group in (second, other):
        group.close()


def test_a_group_without_its_server_is_replaced_by_recomputing(tmp_path: Path) -> None:
    c = open_tiny("llama", tmp_path)
    mesh = build_mesh(port(c), "tp2")
    device = RanksDevice(2, cache=None, silence=PATIENT)
    first = device.load(mesh, c, STATE)
    assert isinstance(first, GroupExecutable) and device.server.process
    os.kill(device.server.process.pid, signal.SIGKILL)
    os.kill(first.pids[0], signal.SIGKILL)
    assert all(gone(pid) for pid in first.pids[:1])
    first.processes.close()
    assert first.processes.spoilt() and [p.returncode for p in first.processes.processes] == [None, None]
    second = device.reload(first, mesh, c, STATE)
    assert isinstance(second, GroupExecutable) and not second.state_kept
    os.kill(second.pids[0], signal.SIGKILL)
    second.processes.close()
    assert [p.returncode for p in second.processes.processes] == [-signal.SIGKILL] * 2
    device.server.close()


def test_a_pipeline_has_a_step_under_way_for_each_stage(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    params = [SamplingParams(max_tokens=7 + i, temperature=0.9, seed=i, ignore_eos=True) for i in range(6)]
    wanted = LLM(tmp_path, layout="pp4", in_process=True, kv_tokens=512).generate(prompts, params)
    there = LLM(tmp_path, layout="pp4", kv_tokens=512)
    under_way = list[int]()
    there.engine.launcher.before_launch = lambda: under_way.append(len(there.engine.launcher.under_way))
    assert there.generate(prompts, params) == wanted
    assert max(under_way) == 3  # beside the one that is launched
    there.engine.executable.close()


def test_faults_at_random_moments_change_no_stream(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    found = disturb(tmp_path, FAULTS, seed)
    assert len(found) == FAULTS and all(one.cause for one in found), seed


def test_a_rank_that_dies_on_every_try_ends_the_engine_with_the_reason(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    llm = LLM(tmp_path, layout="tp2", kv_tokens=64)
    tries = [0]

    def doomed() -> Executable:
        executable = llm.reload()
        assert isinstance(executable, GroupExecutable)
        tries[0] += 1
        os.kill(executable.pids[1], signal.SIGKILL)
        return executable

    llm.engine.recovery.restart = doomed
    lost = llm.engine.executable
    assert isinstance(lost, GroupExecutable)
    os.kill(lost.pids[0], signal.SIGKILL)
    [output] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    assert output.finish_reason == "error" and output.error and tries[0] == 5
    assert re.search("the device was lost: .* of rank 0 exited", output.error)
    assert re.search(r"attempt 5 of 5 to replace it failed too: .* (of rank 1 exited|is gone)", output.error)
    with pytest.raises(Refused, match="attempt 5 of 5"):
        llm.generate([[1]])


@pytest.mark.skipif(len(isa_names()) < 2, reason="this machine runs one instruction set only")
def test_a_replacement_with_another_instruction_set_is_refused(tmp_path: Path) -> None:
    best, other = isa_names()[:2]
    c = open_tiny("llama", tmp_path)
    mesh = build_mesh(port(c), "tp2")
    first = RanksDevice(2, best, cache=None).load(mesh, c, STATE)
    first.close()
    device = RanksDevice(2, other, cache=None)
    with pytest.raises(ReplacementRefused, match=f"rank 0 runs instruction set {other}, the group had {best}"):
        device.reload(first, mesh, c, STATE)
    starts = [
        RankStart(Job(HostDevice(1, isa, cache=None).recipe(), (p,), "tp2", c, STATE))
        for isa, p in zip((best, other), mesh.programs, strict=True)
    ]
    with pytest.raises(DeviceError, match=f"rank 1 runs instruction set {other}, rank 0 {best}"):
        GroupExecutable(starts, True, PATIENT, PATIENT)
    engine = Engine(
        first, clock=lambda: 0.0, rng=random.Random(0), restart=lambda: device.reload(first, mesh, c, STATE)
    )
    [sequence] = engine.add(Request("r", [1, 2], SamplingParams(max_tokens=3)))
    engine.run()
    assert sequence.fault and f"instruction set {other}, the group had {best}" in sequence.fault.message
    assert "attempt 1 of 5" in sequence.fault.message  # another would be refused as well


def test_cores_are_dealt_out_if_there_are_enough() -> None:
    assert share_cores([0, 1, 4, 5], 2, 2) == [(0, 1), (4, 5)]
    assert share_cores([3, 7, 9], 3, 1) == [(3,), (7,), (9,)]
    assert share_cores([0, 1], 4, 1) == [()] * 4


def test_requests_and_results_come_back_as_they_were() -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    board, reader = Board(), RequestReader()
    there = Board(os.dup(board.file))
    for _ in range(30):
        vocabulary, chunks = int(rng.integers(1, 200)), []
        for i in range(int(rng.integers(1, 5))):
            n = int(rng.integers(1, 40))
            rows = sorted(rng.choice(n, int(rng.integers(0, n + 1)), replace=False).tolist())
            ids = rng.permutation(vocabulary)[: int(rng.integers(0, vocabulary + 1))].astype(np.int32)
            edits = Edits(ids, *rng.random((2, len(ids))).astype(np.float32))
            mask = rng.integers(0, 2**32, -(-vocabulary // 32), np.uint32)
            ways = [
                Sampling(float(rng.random()), int(rng.integers(9)), 0.5, 0.25, 2**63 + int(rng.integers(99)),
                         edits if rng.random() < 0.3 else None, mask if rng.random() < 0.3 else None)
                for _ in rows
            ]  # fmt: skip
            chunks.append(Chunk(rng.integers(0, 99, n).tolist(), 0, [3 * i, 3 * i + 1, 3 * i + 2], rows, ways))
        request = StepRequest(bind(chunks, PAGE), bool(rng.integers(2)), ("a.b", "ü")[: rng.integers(3)], True)
        board.write(request_parts(request))
        got = reader.read(there.read())
        assert (got.logits, got.taps, got.timed) == (request.logits, request.taps, request.timed), seed
        assert (got.batch.counts, got.batch.block_size) == (request.batch.counts, PAGE)
        np.testing.assert_array_equal(got.batch.numbers, request.batch.numbers)
        assert got.batch.sampling == request.batch.sampling
        for a, b in zip(got.batch.sampling, request.batch.sampling, strict=True):
            assert (a.edits is None, a.mask is None) == (b.edits is None, b.mask is None)
            if a.edits is not None and b.edits is not None:
                for x, y in zip(vars(a.edits).values(), vars(b.edits).values(), strict=True):
                    np.testing.assert_array_equal(x, y)
            if a.mask is not None and b.mask is not None:
                np.testing.assert_array_equal(a.mask, b.mask)
        drawn = len(request.batch.rows)
        result = StepResult(
            rng.integers(0, 9, drawn).astype(np.int32), rng.random(drawn, np.float32),
            rng.random((drawn, vocabulary), np.float32) if rng.integers(2) else None,
            {"s": rng.random((3, 5), np.float32)} if rng.integers(2) else {}, {"a": 0.5, "b": 2.0},
        )  # fmt: skip
        there.write(result_parts(result))
        back = read_result(board.read())
        assert isinstance(back, StepResult) and back.timings == result.timings and list(back.taps) == list(result.taps)
        for x, y in [(back.tokens, result.tokens), (back.logprobs, result.logprobs), (back.logits, result.logits),
                     *zip(back.taps.values(), result.taps.values(), strict=True)]:  # fmt: skip
            np.testing.assert_array_equal(x, y)
    there.write(error_parts(KeyError("a")))
    assert read_result(board.read()) == "KeyError: 'a'"
    with pytest.raises(MessageError, match="ends before"):
        reader.read(board.read()[:24])
    board.close()
    with pytest.raises(MessageError, match="a board of 4096 bytes holds no message of"):
        short = Board(os.memfd_create("short"))
        os.ftruncate(short.file, 4096)
        os.pwrite(short.file, (1 << 40).to_bytes(8, "little"), 0)
        short.read()
    there.close()
    short.close()
