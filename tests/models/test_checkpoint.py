"""Checkpoints: tensors are read bit for bit, memory is released, and every kind of damaged file has a clear error."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.tiny import tiny

from intaglio.models import Checkpoint, CheckpointError
from intaglio.models.files.checkpoint import CHUNK, find_nonfinite
from intaglio.models.files.header import DTYPES

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2, 0.1], ml_dtypes.bfloat16),
    "odd": np.array([1, 2, 3], np.uint8),
    "c": np.array([[0.5]], np.float16),
    "none": np.zeros((0, 4), np.float32),
}
CODES = {v: k for k, v in DTYPES.items()}


def raw(tensors, change=lambda header: None, tail=b""):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        data += x.tobytes()
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data + tail


def folder(path, blob=None, config='{"architectures": ["LlamaForCausalLM"]}'):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(raw(TENSORS) if blob is None else blob)
    return path


def test_reads_what_was_written(tmp_path):
    c = Checkpoint.open(folder(tmp_path))
    assert c.names == set(TENSORS)
    assert c.architecture == "LlamaForCausalLM"
    for name, x in TENSORS.items():
        assert (c.dtype(name), c.shape(name)) == (CODES[x.dtype], x.shape)
        got = c.read(name)
        assert got.dtype == x.dtype
        assert got.tobytes() == x.tobytes()
        assert not got.flags.writeable
        c.release(name)
        assert c.read(name).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", ["5GB", "200KB"])
def test_reads_what_transformers_writes(tmp_path, dtype, shards):
    safetensors = pytest.importorskip("safetensors")
    c = Checkpoint.open(tiny("llama", tmp_path / "m", dtype, max_shard_size=shards))
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "200KB")
    names = set()
    for file in files:
        with safetensors.safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                names.add(name)
                assert np.array_equal(c.read(name).astype(np.float32), f.get_tensor(name).float().numpy())
    assert names == c.names


def resident(path):
    """Bytes of the file at `path` that this process holds in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line[0].isupper():
            inside = line.rstrip().endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_release_drops_the_pages(tmp_path):
    big = {"x": np.ones((1 << 20,), np.float32), "y": np.ones((1 << 20,), np.float32)}
    c = Checkpoint.open(folder(tmp_path, raw(big)))
    file = tmp_path / "model.safetensors"
    assert c.read("x").sum() == c.read("y").sum() == 1 << 20
    assert resident(file) > 7 << 20
    c.release("x")
    assert 3 << 20 < resident(file) < 5 << 20
    c.release("y")
    assert resident(file) < 1 << 20
    assert c.read("x")[-1] == 1


def test_identity_tells_files_of_equal_size_and_time_from_each_other(tmp_path):
    """Such as two fine-tunes in images that set all times to the same."""
    rng, identities = np.random.default_rng(0), []
    first, second = (rng.standard_normal((300, 1000)).astype(np.float32) for _ in range(2))
    for name, values in (("one", first), ("other", second), ("again", second)):
        made = folder(tmp_path / name, raw({"a": values}))
        os.utime(made / "model.safetensors", (1, 1))
        identities.append(Checkpoint.open(made).identity())
    assert identities[0] != identities[1] == identities[2]


def test_warns_once_of_nan_and_inf(tmp_path):
    x = np.ones((3, 4), ml_dtypes.bfloat16)
    x[1, 2], x[2, 0] = np.nan, -np.inf
    c = Checkpoint.open(folder(tmp_path, raw({"bad": x, "good": np.ones(4, np.float32)})))
    with pytest.warns(UserWarning, match=r"tensor bad holds 2 NaN or Inf of 12 values, the first at \[1, 2\]"):
        c.read("bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.read("bad")
        c.read("good")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_nonfinite_values_are_found_across_chunks(dtype):
    x = np.full(2 * CHUNK + 7, 3.0, DTYPES[dtype])
    assert find_nonfinite(x, dtype) is None
    x[CHUNK + 5], x[-1] = np.inf, np.nan
    assert find_nonfinite(x, dtype) == ((CHUNK + 5,), 2)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32)))
def test_nonfinite_agrees_with_numpy(x):
    bad = np.argwhere(~np.isfinite(x))
    wanted = (tuple(int(i) for i in bad[0]), len(bad)) if len(bad) else None
    assert find_nonfinite(x, "F32") == wanted


def edit(name, **change):
    return lambda header: header[name].update(change)


GOOD = raw(TENSORS)
BROKEN = {
    "empty file": (b"", "is truncated or not a safetensors file: it has 0 bytes"),
    "text file": (b"version https://git-lfs.github.com/spec/v1\n", "truncated or not a safetensors file"),
    "header cut": (GOOD[:40], "truncated"),
    "header not json": ((9).to_bytes(8, "little") + b"{nothing}" + b"", "the header is not JSON"),
    "header a list": ((2).to_bytes(8, "little") + b"[]", "it is a JSON list"),
    "data cut": (GOOD[:-3], r"tensor odd should lie at .* but the file ends at \d+"),
    "bytes left over": (GOOD + b"12345", "5 bytes follow the last tensor"),
    "size and shape": (raw(TENSORS, edit("a", shape=[2, 4])), r"a is F32\[2, 4\], 32 bytes, but its offsets 0..24"),
    "huge shape": (raw(TENSORS, edit("a", shape=[1 << 40, 1 << 40])), "but its offsets 0..24 span 24"),
    "negative shape": (raw(TENSORS, edit("a", shape=[-2, -3])), "the header is damaged"),
    "overlap": (raw(TENSORS, edit("b", data_offsets=[20, 26])), "tensor b at .* overlaps a"),
    "gap": (raw(TENSORS, lambda h: h.pop("b")), "leaves a gap after a"),
    "negative offset": (raw(TENSORS, edit("a", data_offsets=[-24, 0])), "tensor a should lie at"),
    "no offsets": (raw(TENSORS, lambda h: h["a"].pop("data_offsets")), "header's entry for a is"),
    "entry no table": (raw(TENSORS, lambda h: h.update(a=3)), "header's entry for a is 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
    blob, says = BROKEN[case]
    with pytest.raises(CheckpointError, match=says) as e:
        Checkpoint.open(folder(tmp_path, blob))
    assert "model.safetensors" in str(e.value)


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, len(GOOD) - 1))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, cut):
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder(tmp_path_factory.getbasetemp() / "cut", GOOD[:cut]))


def test_broken_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file; download model.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"it has pytorch_model.bin; convert with transformers"):
        Checkpoint.open(tmp_path)
    folder(tmp_path, config="{}")
    with pytest.raises(CheckpointError, match=r"has architectures=None"):
        _ = Checkpoint.open(tmp_path).architecture
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        Checkpoint.open(tmp_path).read("nothing")


def test_a_dtype_that_is_not_known_matters_only_if_read(tmp_path):
    c = Checkpoint.open(folder(tmp_path, raw(TENSORS, edit("a", dtype="F4"))))
    assert np.array_equal(c.read("b"), TENSORS["b"])
    with pytest.raises(CheckpointError, match="tensor a has dtype 'F4'; known are F64"):
        c.read("a")


def test_broken_shards(tmp_path):
    folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(raw({"z": np.ones(2, np.float32)}))
    with pytest.raises(CheckpointError, match=r"has 2 safetensors files .* but no model.safetensors and no"):
        Checkpoint.open(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "z": "model-3.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names the shard model-3.safetensors, which is missing"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"y": "model-1.safetensors", "z": "model-2.safetensors"}}))
    assert Checkpoint.open(tmp_path).names == {*TENSORS, "z"}  # what an index does not list is there all the same
