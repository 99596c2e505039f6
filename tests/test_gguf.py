"""GGUF files, written by llama.cpp's library: the values are those it dequantises, the logits those of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_published import logits, typical
from tiny import tiny, truth

from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.devices import StateSpec, open_device
from intaglio.devices.host import HostDevice
from intaglio.formats import Quantised
from intaglio.models import Checkpoint, PortError, port

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")
Kind = gguf.GGMLQuantizationType
GOLDEN = Path(__file__).parent / "golden"
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
ARCHITECTURES = {
    "llama": {"attention_bias": False, "mlp_bias": False, "rope_parameters": None},
    "qwen2": {},
    "qwen3": {},
}
LIMITS = {"F32": 2e-4, "F16": 0.02, "BF16": 0.02}  # of formats that are values: K and V in bf16 but for the first
BYTES = {"Q4_K": 144, "Q6_K": 210}


def name_of(name):
    """llama.cpp's name of a tensor."""
    parts = {
        "embed_tokens": "token_embd", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "lm_head": "output",
    }  # fmt: skip
    parts |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    words = name.split(".")
    at = f"blk.{words[2]}." if "layers" in words else ""
    return f"{at}{'output_norm' if name == 'model.norm.weight' else parts[words[-2]]}.{words[-1]}"


def permuted(w, heads):
    """The order of rows that convert_hf_to_gguf.py gives q and k of llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def in_halves(w, heads):
    """And back."""
    return np.ascontiguousarray(w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape))


def encoded(w, kind, draw):
    """(blocks, the values they stand for) by the library; K-quants, which it only reads, from random blocks."""
    if kind not in BYTES:
        blocks = gguf.quants.quantize(w, Kind[kind])
    else:
        blocks = draw.integers(0, 256, (len(w), w.shape[1] // 256, BYTES[kind]), dtype=np.uint8)
        half = np.float16(np.abs(w).mean() / (300 if kind == "Q4_K" else 1000)).tobytes()
        for at in (0, 2) if kind == "Q4_K" else (208,):
            blocks[..., at : at + 2] = np.frombuffer(half, np.uint8)
        blocks = blocks.reshape(len(w), -1)
    return blocks, gguf.quants.dequantize(blocks, Kind[kind])


def write(path, arch, kind, folder):
    """A GGUF file of the checkpoint in `path`, and the same dequantised as a checkpoint."""
    arrays = safetensors.load_file(path / "model.safetensors")
    c = json.loads((path / "config.json").read_text())
    w = gguf.GGUFWriter(folder / "model.gguf", arch)
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(64)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(10000.0)
    draw, plain = np.random.default_rng(2), {}
    for name, x in arrays.items():
        heads = {"q_proj.weight": c["num_attention_heads"], "k_proj.weight": c["num_key_value_heads"]}
        turned = next((h for end, h in heads.items() if name.endswith(end)), 0) if arch == "llama" else 0
        y = permuted(x, turned) if turned else x
        if x.ndim == 2 and kind != "F32":
            blocks, back = encoded(y, kind, draw)
            w.add_tensor(name_of(name), blocks, raw_dtype=Kind[kind])
            plain[name] = back
            if turned:
                plain[name] = in_halves(back, turned)
        else:
            w.add_tensor(name_of(name), np.ascontiguousarray(y))
            plain[name] = x
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    shutil.copytree(path, folder / "plain")
    safetensors.save_file(plain, folder / "plain" / "model.safetensors")
    return folder / "model.gguf", folder / "plain", plain


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gguf(tmp_path, arch, kind):
    path = tiny(arch, tmp_path / "source", **SIZES, **ARCHITECTURES[arch])
    file, plain, values = write(path, arch, kind, tmp_path)
    c = Checkpoint.open(file)
    assert c.names == set(values)
    for name, want in values.items():
        got = c.read(name)
        assert isinstance(got, Quantised) == (want.ndim == 2 and kind not in LIMITS)
        np.testing.assert_array_equal(got.rows(slice(None)) if isinstance(got, Quantised) else got, want)
    limit = LIMITS.get(kind, 0.05)
    wanted = truth(plain, list(range(40)))
    for device in ("reference", "host"):
        assert typical(logits(file, device), wanted) < limit
    held = open_device("host").load(build(port(c)), c, StateSpec(4, 16)).packed_bytes
    assert held < 1.1 * file.stat().st_size
    assert c.identity() == Checkpoint.open(tmp_path).identity()  # the folder of an only GGUF file is that file


def test_k_quants_as_llama_cpp_chooses_them(tmp_path):
    """A file by llama.cpp's own quantiser (scripts/goldens.py), which gguf-py reads but does not write."""
    c = Checkpoint.open(GOLDEN / "q4_k_m.gguf")
    config = {**c.config, "model_type": "llama", "dtype": "float32"}
    blocks = {t.name: t for t in gguf.GGUFReader(GOLDEN / "q4_k_m.gguf").tensors}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    plain = {}
    for name in c.names:
        t = blocks[name_of(name)]
        x = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        turned = heads.get(name.split(".")[-2])
        plain[name] = in_halves(x, turned) if turned else x
        got = c.read(name)
        np.testing.assert_array_equal(got.rows(slice(None)) if isinstance(got, Quantised) else got, plain[name])
    assert {c.format(n) for n, x in plain.items() if x.ndim == 2} == {"q4_k", "q6_k"}
    safetensors.save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device in ("reference", "host"):
        assert typical(logits(GOLDEN / "q4_k_m.gguf", device), truth(tmp_path, list(range(40)))) < 0.05


def test_blocks_packed_on_disk_are_the_same(tmp_path):
    """The second start maps the file that the first one wrote, and computes the same bits."""
    path = tiny("qwen3", tmp_path / "source", **SIZES)
    c = Checkpoint.open(write(path, "qwen3", "Q4_K", tmp_path)[0])
    program, found = build(port(c)), []
    for ready in (False, True):
        ex = HostDevice(2, cache=tmp_path / "cache").load(program, c, StateSpec(4, 16))
        assert ex.image is not None and ex.image.ready == ready
        ex.image.wait()
        batch = bind([Chunk(range(40), 0, range(4), range(40))], 16)
        found.append(ex.step(batch, logits=True).logits)
    np.testing.assert_array_equal(*found)


def test_what_a_gguf_file_may_not_be(tmp_path):
    w = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    w.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(PortError, match="architecture 'mamba' is not read; known are llama, qwen2, qwen3"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_a_kind_nobody_reads(tmp_path):
    path = tiny("qwen2", tmp_path / "source", **SIZES)
    with pytest.raises(PortError, match=r"tensor .* is Q5_0; known are F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K"):
        Checkpoint.open(write(path, "qwen2", "Q5_0", tmp_path)[0])


def test_the_program_names_the_blocks(tmp_path):
    path = tiny("qwen3", tmp_path / "source", **SIZES)
    file, _, _ = write(path, "qwen3", "Q4_K", tmp_path)
    p = port(Checkpoint.open(file))
    assert {t.format for t in p.of_role("weight") if len(t.shape) == 2} == {"q4_k"}
    held = sum(t.nbytes({}) for t in p.of_role("weight"))
    assert held < 1.1 * file.stat().st_size
