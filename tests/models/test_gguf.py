"""GGUF files, written by llama.cpp's library: number formats, metadata, split files, files that are refused or damaged.

The values are those that the library dequantises, the logits those of the model.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.gguf_files import TYPES, encoded, in_halves, write
from support.published import logits, typical
from support.tiny import tiny, truth

from intaglio import formats
from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.devices.host import HostDevice
from intaglio.formats import Quantised
from intaglio.models import Checkpoint, CheckpointError, PortError, port
from intaglio.models.files.gguf.header import KINDS, HeaderError, read_header

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")
GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
BIASES = {"attention_bias": True, "mlp_bias": True, "rope_parameters": None}
LIMITS = {"F32": 2e-4, "F16": 0.02, "BF16": 0.02}  # of formats that are values: K and V in bf16 but for the first
CODED = 0.1  # of codes: x is rounded to 1 / 254 of the largest of 128 values in each of some 14 products
ROUNDED = ("Q2_K", "IQ2_XS", "IQ2_S", "IQ1_M")  # that become bf16
BITS = {"Q5_0": 8.5, "Q3_K": 6.57, "IQ4_NL": 8.5, "MXFP4": 4.5}  # in memory, where codes are wider than in the file


def values(x):
    return x.rows(slice(None)) if isinstance(x, Quantised) else x


@pytest.mark.parametrize("kind", TYPES)
def test_types(tmp_path, kind):
    """Codes stand for exactly the values that the library dequantises; bf16 is those values rounded to nearest."""
    path = tiny("llama", tmp_path / "source", **SIZES, **BIASES)
    file, plain, wanted = write(path, tmp_path / "out", kind, seed=np.random.SeedSequence().entropy % 2**32)
    c = Checkpoint.open(file)
    assert c.names == set(wanted)
    for name, want in wanted.items():
        got, matrix = c.read(name), want.ndim == 2
        assert isinstance(got, Quantised) == (matrix and kind not in (*LIMITS, *ROUNDED))
        rounded = want.astype(ml_dtypes.bfloat16) if matrix and kind in ROUNDED else want
        np.testing.assert_array_equal(values(got), rounded)
    truths = truth(plain, list(range(40)))
    for device in ("reference", "host"):
        assert typical(logits(file, device), truths) < LIMITS.get(kind, 0.02 if kind in ROUNDED else CODED)
    matrix = c.format("model.layers.0.mlp.up_proj.weight")
    assert {c.format(n) for n, x in wanted.items() if x.ndim == 2} == {matrix}
    held = open_device("host").load(build(port(c)), c, StateSpec(4, 16)).packed_bytes
    assert held < 1.15 * sum(
        formats.get(matrix).nbytes(*x.shape) if x.ndim == 2 else 4 * x.size for x in wanted.values()
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_blocks_stay_as_they_are(tmp_path, arch, kind):
    """In memory the matrices are no larger than in the file."""
    file, plain, wanted = write(tiny(arch, tmp_path / "source", **SIZES), tmp_path / "out", kind)
    c = Checkpoint.open(file)
    for name, want in wanted.items():
        np.testing.assert_array_equal(values(c.read(name)), want)
    for device in ("reference", "host"):
        assert typical(logits(file, device), truth(plain, list(range(40)))) < 0.05
    held = open_device("host").load(build(port(c)), c, StateSpec(4, 16)).packed_bytes
    assert held < 1.1 * file.stat().st_size
    assert c.identity() == Checkpoint.open(file.parent).identity()  # the folder of an only GGUF file is that file


def test_mixed_types(tmp_path):
    """As files called Q4_K_M are whose rows are no multiple of 256: Q5_0 and Q8_0 beside Q4_K and Q6_K."""
    types = {"ffn_down": "Q6_K", "attn_v": "Q8_0", "attn_q": "Q5_0", "token_embd": "Q5_1", "ffn_up": "Q4_K"}

    def kind(name):
        return next((t for part, t in types.items() if part in name), "F16")

    file, plain, wanted = write(tiny("qwen2", tmp_path / "source", **SIZES), tmp_path / "out", kind)
    c = Checkpoint.open(file)
    for name, want in wanted.items():
        got = c.read(name)
        limit = 0 if isinstance(got, Quantised) or name != "model.embed_tokens.weight" else 2**-8
        np.testing.assert_allclose(values(got).astype(np.float32), want, rtol=limit, atol=0)
    for device in ("reference", "host"):
        assert typical(logits(file, device), truth(plain, list(range(40)))) < 0.05


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_types_are_refused(tmp_path, kind):
    path = tiny("qwen2", tmp_path / "source", **SIZES)
    with pytest.raises(
        PortError, match=rf"tensor \S+ is {kind}, which is not read \(ternary.*known are F32, F16, BF16"
    ):
        Checkpoint.open(write(path, tmp_path / "out", kind)[0])


def test_k_quants_as_llama_cpp_chooses_them(tmp_path):
    """A file by llama.cpp's own quantiser (scripts/goldens.py), which gguf-py reads but does not write."""
    c = Checkpoint.open(GOLDEN / "q4_k_m.gguf")
    config = {**c.config, "model_type": "llama", "dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    blocks = {t.name: t for t in gguf.GGUFReader(GOLDEN / "q4_k_m.gguf").tensors}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    plain = {}
    for name in c.names:
        t = blocks[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        x = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        turned = heads.get(name.split(".")[-2])
        plain[name] = in_halves(x, turned) if turned else x
        np.testing.assert_array_equal(values(c.read(name)), plain[name])
    assert {c.format(n) for n, x in plain.items() if x.ndim == 2} == {"q4_k", "q6_k"}
    safetensors.save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device in ("reference", "host"):
        assert typical(logits(GOLDEN / "q4_k_m.gguf", device), truth(tmp_path, list(range(40)))) < 0.05


def test_blocks_packed_on_disk_are_the_same(tmp_path):
    """The second start maps the file that the first one wrote, and computes the same bits."""
    path = tiny("qwen3", tmp_path / "source", **SIZES)
    c = Checkpoint.open(write(path, tmp_path / "out", "Q4_K")[0])
    program, found = build(port(c)), []
    for ready in (False, True):
        ex = HostDevice(2, cache=tmp_path / "cache").load(program, c, StateSpec(4, 16))
        assert ex.image is not None and ex.image.ready == ready
        ex.image.wait()
        batch = bind([Chunk(range(40), 0, range(4), range(40))], 16)
        found.append(ex.step(StepRequest(batch, logits=True)).logits)
    np.testing.assert_array_equal(*found)


def test_the_program_names_the_blocks(tmp_path):
    path = tiny("qwen3", tmp_path / "source", **SIZES)
    file, _, _ = write(path, tmp_path / "out", "Q4_K")
    p = port(Checkpoint.open(file))
    assert {t.format for t in p.of_role("weight") if len(t.shape) == 2} == {"q4_k"}
    held = sum(t.nbytes({}) for t in p.of_role("weight"))
    assert held < 1.1 * file.stat().st_size


def empty(path, arch):
    w = gguf.GGUFWriter(path, arch)
    w.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_an_architecture_nobody_ported(tmp_path):
    empty(tmp_path / "model.gguf", "rwkv7")
    with pytest.raises(PortError, match="architecture 'rwkv7' is not read; known are llama, .*qwen2, .*qwen3"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_damaged_files(tmp_path):
    file, _, _ = write(tiny("qwen2", tmp_path / "source"), tmp_path / "out", "F16")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    for path, content in ((cut, None), (tmp_path / "text.gguf", b"no model at all"), (tmp_path / "none.gguf", b"")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{path.name} is no GGUF file, or damaged or truncated"):
            Checkpoint.open(path)
    empty(tmp_path / "little.gguf", "llama")
    with pytest.raises(CheckpointError, match=r"little.gguf lacks llama.attention.head_count;"):
        Checkpoint.open(tmp_path / "little.gguf")


@pytest.mark.parametrize(
    "name", [b"blk.X.attn_q.weight", b"blk.-.attn_q.weight", b"blk..attn_qq.weight", b"blk.0_attn_q_weight"]
)
def test_a_tensor_name_without_a_layer_number(tmp_path, name):
    file, _, _ = write(tiny("qwen2", tmp_path / "source"), tmp_path / "out", "F16")
    whole = file.read_bytes()
    assert whole.count(b"blk.0.attn_q.weight") == 1 and len(name) == 19
    file.write_bytes(whole.replace(b"blk.0.attn_q.weight", name))
    with pytest.raises(
        CheckpointError, match=re.escape(f"{file}: tensor {name.decode()!r} has no layer number; wanted")
    ):
        Checkpoint.open(file)


def split(file, folder, parts):
    """The same tensors in several files, as llama-gguf-split makes them: metadata in the first."""
    reader = gguf.GGUFReader(file)
    arch = reader.get_field("general.architecture").contents()
    tensors, each = reader.tensors, -(-len(reader.tensors) // parts)
    for i in range(parts):
        w = gguf.GGUFWriter(folder / f"model-{i + 1:05}-of-{parts:05}.gguf", arch)
        for field in reader.fields.values() if i == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                array = field.types[0] == gguf.GGUFValueType.ARRAY
                w.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
        w.add_uint16("split.no", i)
        w.add_uint16("split.count", parts)
        for t in tensors[i * each : (i + 1) * each]:
            shape = None if t.data.dtype == np.uint8 else t.shape.tolist()[::-1]
            w.add_tensor(t.name, np.array(t.data), raw_shape=shape, raw_dtype=t.tensor_type)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()


@pytest.mark.parametrize("parts", [2, 3])
def test_split_files(tmp_path, parts):
    """The parts are one model, by the name of any or of their folder; a missing one is named."""
    path = tiny("llama", tmp_path / "source", **SIZES, **BIASES)
    file, _, wanted = write(path, tmp_path / "out", "Q4_K")
    folder = tmp_path / "split"
    folder.mkdir()
    split(file, folder, parts)
    pieces = sorted(folder.iterdir())
    for at in (folder, *pieces):
        c = Checkpoint.open(at)
        assert c.names == set(wanted)
        for name, want in wanted.items():
            np.testing.assert_array_equal(values(c.read(name)), want)
    np.testing.assert_array_equal(logits(folder, "host"), logits(file, "host"))
    identity = Checkpoint.open(folder).identity()
    shutil.copy(pieces[-1], tmp_path / "kept")
    pieces[-1].unlink()
    for at in (folder, pieces[0]):
        with pytest.raises(CheckpointError, match=f"one of {parts} parts; missing beside it: {pieces[-1].name}; downl"):
            Checkpoint.open(at)
    shutil.copy(tmp_path / "kept", pieces[-1])
    assert Checkpoint.open(folder).identity() != identity  # another file, of another time
    one = tmp_path / "renamed.gguf"
    shutil.copy(pieces[0], one)
    with pytest.raises(CheckpointError, match=rf"one of {parts} parts, but its name does not; .* rename them"):
        Checkpoint.open(one)


def test_several_models_in_a_folder(tmp_path):
    """Two quantisations: their names are the choice. A vision tower beside a model is none."""
    path = tiny("qwen2", tmp_path / "source", **SIZES)
    folder = tmp_path / "both"
    folder.mkdir()
    for kind in ("Q8_0", "Q4_K"):
        shutil.copy(write(path, tmp_path / kind, kind)[0], folder / f"model-{kind}.gguf")
    with pytest.raises(
        CheckpointError, match=r"holds 2 GGUF models: model-Q4_K.gguf \(.* GB\), model-Q8_0.gguf .*give"
    ):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder / "model-Q8_0.gguf").format("model.layers.0.mlp.up_proj.weight") == "int8g32f16"
    (folder / "model-Q4_K.gguf").rename(folder / "mmproj-model.gguf")
    assert Checkpoint.open(folder).format("model.layers.0.mlp.up_proj.weight") == "int8g32f16"


def test_old_keys(tmp_path):
    """rope.scale_linear is linear scaling; without head_count_kv, every head has its own keys."""
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    path = tiny("llama", tmp_path / "source", num_key_value_heads=4, **scaled)
    keys = ("rope.scaling.type", "rope.scaling.factor", "attention.head_count_kv")
    file, _, _ = write(path, tmp_path / "out", extra=lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
                       leave_out=keys)  # fmt: skip
    assert typical(logits(file, "reference"), truth(path, list(range(40)))) < 2e-4


def test_layers_of_one_size_in_arrays(tmp_path):
    """Keys that are an array by layer are read where all layers agree, and refused by name where they do not."""
    path = tiny("qwen3", tmp_path / "source")

    def arrays(heads):
        def add(w):
            w.add_array("qwen3.attention.head_count_kv", heads)
            w.add_array("qwen3.feed_forward_length", [96] * 4)

        return add

    out = ("attention.head_count_kv", "feed_forward_length")
    file, _, _ = write(path, tmp_path / "out", extra=arrays([2] * 4), leave_out=out)
    assert typical(logits(file, "reference"), truth(path, list(range(40)))) < 2e-4
    file, _, _ = write(path, tmp_path / "odd", extra=arrays([2, 2, 4, 2]), leave_out=out)
    with pytest.raises(PortError, match=r"qwen3.attention.head_count_kv is \[2, 2, 4, 2\]; layers of different sizes"):
        Checkpoint.open(file)


def test_queries_and_keys_as_one(tmp_path):
    """Newer converters can keep q, k and v as one matrix, and gate and up of experts."""
    path = tiny("llama", tmp_path / "source", **SIZES, **BIASES)
    file, _, wanted = write(path, tmp_path / "out", "Q8_0")
    reader, w = gguf.GGUFReader(file), gguf.GGUFWriter(tmp_path / "fused.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            w.add_key_value(field.name, field.contents(), field.types[0])
    held = {t.name: t for t in reader.tensors}
    for name, t in held.items():
        if ".attn_q." in name:
            parts = [np.array(held[name.replace("attn_q", f"attn_{n}")].data) for n in "qkv"]
            w.add_tensor(name.replace("attn_q", "attn_qkv"), np.concatenate(parts), raw_dtype=t.tensor_type)
        elif ".attn_k." not in name and ".attn_v." not in name:
            w.add_tensor(name, np.array(t.data), raw_dtype=t.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    c = Checkpoint.open(tmp_path / "fused.gguf")
    assert c.names == set(wanted)
    for name, want in wanted.items():
        np.testing.assert_array_equal(values(c.read(name)), want)


def test_a_large_cost_is_said(tmp_path, monkeypatch):
    """Opening warns where bf16 in place of blocks takes a gigabyte more; here a hundred bytes."""
    from intaglio.models.files.gguf import read

    path = tiny("qwen2", tmp_path / "source", **SIZES)
    file, _, _ = write(path, tmp_path / "out", "Q2_K")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoint.open(file)
    monkeypatch.setattr(read, "WORTH", 100)
    with pytest.warns(
        UserWarning, match=r"matrices of type Q2_K become bf16, .* GB in memory instead of .* int8 or int4"
    ):
        Checkpoint.open(file)


def test_the_types_here_are_all_that_are_in_use():
    """Every type the library knows is read, refused by a name of its own, or one that files do not hold."""
    refused = {"TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4"}
    no_weights = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}
    assert set(TYPES) == {t.name for t in gguf.GGMLQuantizationType} - refused - no_weights
    assert encoded(np.ones((2, 256), np.float32), "Q2_K", np.random.default_rng(0))[1].shape == (2, 256)


def test_headers_are_read_as_the_library_reads_them(tmp_path):
    """Every type of metadata, nested arrays of numbers and text, and where tensors lie."""
    draw = np.random.default_rng()
    w = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for i, kind in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")):
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        getattr(w, f"add_{kind}")(f"k.{i}", int(draw.integers(low, high, dtype=kind, endpoint=True)))
    w.add_float32("k.f", float(np.float32(draw.normal())))
    w.add_float64("k.d", float(draw.normal()))
    w.add_bool("k.b", bool(draw.integers(2)))
    w.add_string("k.s", "größer 你好 \x00")
    w.add_array("k.texts", ["", "a", "ж" * int(draw.integers(1, 400))])
    w.add_array("k.floats", [float(np.float32(x)) for x in draw.normal(size=5)])
    w.add_array("k.ints", [int(x) for x in draw.integers(-9, 9, 1000)])
    for i in range(5):
        shape = tuple(int(x) for x in draw.integers(1, 6, int(draw.integers(1, 4))))
        w.add_tensor(f"t.{i}", draw.normal(size=shape).astype(np.float16 if i % 2 else np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    fields, tensors = read_header(tmp_path / "model.gguf")
    wanted = gguf.GGUFReader(tmp_path / "model.gguf")
    assert fields == {k: f.contents() for k, f in wanted.fields.items() if not k.startswith("GGUF.")}
    ours = [(t.name, t.kind, t.shape, t.start, t.stop - t.start) for t in tensors]
    theirs = [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), int(t.data_offset), int(t.n_bytes))
        for t in wanted.tensors
    ]
    assert ours == theirs
    raw = (tmp_path / "model.gguf").read_bytes()
    last = max(t.stop for t in tensors)  # what follows is padding
    for end in {*draw.integers(0, last, 40).tolist(), 0, 3, 8, 23, 24, last - 1}:
        (tmp_path / "cut.gguf").write_bytes(raw[:end])
        with pytest.raises(HeaderError):
            read_header(tmp_path / "cut.gguf")


def test_types_have_the_librarys_numbers_and_sizes():
    known = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert KINDS.items() <= known.items()
    assert {name for name, *_ in KINDS.values()} >= set(TYPES) | {"TQ1_0", "TQ2_0"}
