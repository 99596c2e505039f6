"""The on-disk cache of packed weights: same bits, no second read, shared by processes, damaged files ignored."""

from __future__ import annotations

import errno
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny

import intaglio.devices.host.image
from intaglio import LLM
from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.devices import DeviceError, StateSpec, StepRequest
from intaglio.devices.host import HostDevice, HostExecutable
from intaglio.models import Checkpoint, port

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
STATE = StateSpec(8, 16)


@dataclass
class Counting:
    """Weights that count the reads of each tensor."""

    inner: Checkpoint
    names: list[str] = field(default_factory=list)

    def read(self, name: str) -> np.ndarray:
        self.names.append(name)
        return self.inner.read(name)

    def strips(self, name: str) -> Iterator[np.ndarray]:
        self.names.append(name)
        return self.inner.strips(name)

    def release(self, name: str) -> None:
        self.inner.release(name)

    def identity(self) -> str:
        return self.inner.identity()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("cache") / "tiny", "bfloat16")


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may change."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in shared.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def load(folder: Path, cache: Path | str | None, weights: str = "auto") -> HostExecutable:
    """Load the model, and wait until its cache file is written."""
    checkpoint = Checkpoint.open(folder)
    executable = HostDevice(2, cache=cache).load(build(port(checkpoint), weights), checkpoint, STATE)
    assert isinstance(executable, HostExecutable)
    if executable.image:
        executable.image.wait()
    return executable


def quietly(folder: Path, cache: Path | str | None, weights: str = "auto") -> HostExecutable:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, cache, weights)


def logits(executable: HostExecutable) -> np.ndarray:
    got = executable.step(
        StepRequest(bind([Chunk(IDS, 0, [0], range(len(IDS)))], STATE.page_tokens), logits=True)
    ).logits
    assert got is not None
    return got


def was_ready(executable: HostExecutable) -> bool:
    return executable.image is not None and executable.image.ready


def files(cache: Path) -> list[str]:
    return sorted(f.name for f in cache.iterdir())


@pytest.mark.parametrize("weights", ["auto", "f32", "int8", "int4"])
def test_logits_are_the_same_with_and_without_the_cache(shared: Path, tmp_path: Path, weights: str) -> None:
    without, making, found = (quietly(shared, cache, weights) for cache in (None, tmp_path, tmp_path))
    assert [was_ready(e) for e in (without, making, found)] == [False, False, True]
    for other in (making, found):
        np.testing.assert_array_equal(logits(other), logits(without))
        assert other.packed_bytes == without.packed_bytes
        assert all(w.image() == without.matrices[name].image() for name, w in other.matrices.items())
    assert len(files(tmp_path)) == 1


def test_a_second_load_reads_no_matrix(shared: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(shared)
    program = build(port(checkpoint))
    reads = []
    for _ in range(2):
        counting = Counting(checkpoint)
        executable = HostDevice(2, cache=tmp_path).load(program, counting, STATE)
        executable.image.wait()  # type: ignore[attr-defined]
        reads.append(counting.names)
    matrices = {source for name in executable.matrices for source in program.tensors[name].source}  # type: ignore[attr-defined]
    assert matrices <= set(reads[0]) and not matrices & set(reads[1])
    assert set(reads[1]) == set(reads[0]) - matrices


def test_mapped_weights_are_read_only(shared: Path, tmp_path: Path) -> None:
    for _ in range(2):
        weight = next(iter(load(shared, tmp_path).matrices.values()))
        with pytest.raises(ValueError, match="read-only"):
            weight.fill(np.zeros(0, np.uint8), "f32", 0, 0, 1)


def mapped_inodes(path: Path) -> set[str]:
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))}


def other_process(folder: Path, cache: Path) -> tuple[set[str], bytes]:
    executable = load(folder, cache)
    assert was_ready(executable) and executable.image
    return mapped_inodes(executable.image.path), logits(executable).tobytes()


def test_processes_map_the_same_file(shared: Path, tmp_path: Path) -> None:
    mine = load(shared, tmp_path)
    assert mine.image
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        inodes, bits = pool.apply(other_process, (shared, tmp_path))
    assert bits == logits(mine).tobytes()
    assert inodes == {str(mine.image.path.stat().st_ino)}
    again = load(shared, tmp_path)
    assert again.image and mapped_inodes(again.image.path) == inodes


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5000)


def other_key(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    at = raw.index(b'"key": "') + 8
    raw[at : at + 64] = b"0" * 64
    path.write_bytes(raw)


def damage_table(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(b'"matrices"') + 30] ^= 1
    path.write_bytes(raw)


def unfinished(path: Path) -> None:
    """Leave the file as a crash before the header was written would."""
    raw = path.read_bytes()
    path.write_bytes(bytes(4096) + raw[4096:])


@pytest.mark.parametrize("spoil", [truncate, other_key, damage_table, unfinished, lambda p: p.write_bytes(b"")])
def test_a_damaged_file_is_replaced(shared: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    first = load(shared, tmp_path)
    assert first.image
    before, good = logits(first), first.image.path.read_bytes()
    spoiled = tmp_path / "spoiled"
    spoiled.write_bytes(good)
    spoil(spoiled)
    spoiled.replace(first.image.path)
    with pytest.warns(UserWarning, match="packing the weights again") as noted:
        again = load(shared, tmp_path)
    assert len(noted) == 1 and not was_ready(again)
    np.testing.assert_array_equal(logits(again), before)
    assert first.image.path.read_bytes() == good and len(files(tmp_path)) == 1
    assert was_ready(quietly(shared, tmp_path))


def test_changed_weights_get_a_new_file(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = folder / "model.safetensors"
    load(folder, cache)
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert not was_ready(load(folder, cache)) and len(files(cache)) == 2
    raw = bytearray(file.read_bytes())
    raw[-2000:] = bytes(2000)
    file.write_bytes(raw)
    changed = quietly(folder, cache)
    assert not was_ready(changed) and len(files(cache)) == 3
    np.testing.assert_array_equal(logits(changed), logits(load(folder, None)))


def test_the_cache_key_depends_on_the_matrices_alone(shared: Path, tmp_path: Path) -> None:
    """A copy of the folder and another context length use the same file; other weights do not."""
    for context, ready in ((None, False), (64, True)):
        llm = LLM(shared, threads=1, cache=tmp_path, context=context)
        executable = llm.engine.executable
        assert isinstance(executable, HostExecutable) and executable.image
        executable.image.wait()
        assert executable.image.ready == ready
    assert not was_ready(load(shared, tmp_path, "int8")) and len(files(tmp_path)) == 2


def test_unwritable_folder(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="packed weights are not kept in") as noted:
        executable = load(shared, tmp_path / "file" / "cache")
    assert len(noted) == 1
    np.testing.assert_array_equal(logits(executable), logits(load(shared, None)))


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "pwrite"])
def test_full_disk(shared: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(intaglio.devices.host.image.os, call, full)
    with pytest.warns(UserWarning, match="not kept in .*No space left") as noted:
        executable = load(shared, tmp_path)
    assert len(noted) == 1 and files(tmp_path) == []
    np.testing.assert_array_equal(logits(executable), logits(load(shared, None)))


def test_a_failed_load_leaves_no_file(shared: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(shared)

    class Short(Counting):
        def read(self, name: str) -> np.ndarray:
            return super().read(name)[:-1]

    with pytest.raises(DeviceError):
        HostDevice(1, cache=tmp_path).load(build(port(checkpoint)), Short(checkpoint), STATE)
    assert files(tmp_path) == []


def test_files_of_dead_processes_are_removed(shared: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for part in (old, new):
        part.write_bytes(b"x")
    os.utime(old, (1, 1))
    load(shared, tmp_path)
    assert not old.exists() and new.exists()


def test_auto_caches_only_large_weights(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_CACHE", str(tmp_path / "cache"))
    assert load(shared, "auto").image is None
    monkeypatch.setattr(intaglio.devices.host.image, "WORTH", 1)
    load(shared, "auto")
    assert len(files(tmp_path / "cache")) == 1
    assert was_ready(load(shared, "auto"))
    assert load(shared, None).image is None
