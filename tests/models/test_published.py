"""Checkpoints in published formats: codes are read bit for bit, and the host packs those codes unchanged.

Logits are those of the dequantised model within the rounding of activations. Long because each format is written here
as its library writes it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.published import SIZES, in_place, logits, quantised, typical, with_zeros, words
from support.tiny import error, tiny, truth
from support.written import by_compressed_tensors, by_transformers_fp8

from intaglio import _native, formats
from intaglio.batch import Chunk, bind
from intaglio.compiler import LayoutError, build, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.devices.host import fill_codes
from intaglio.formats import Quantised
from intaglio.models import Checkpoint, PortError, port
from intaglio.models.files import checkpoint
from intaglio.program.source import read, strips

safetensors = pytest.importorskip("safetensors.torch")
GOLDEN = Path(__file__).parent.parent / "golden"
MOE = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "decoder_sparse_step": 1}


def fp8_blocks(w, name):
    """DeepSeek's: E4M3, a float32 scale for each block of 128 x 128."""
    n, k = w.shape
    padded = torch.zeros(-(-n // 128) * 128, -(-k // 128) * 128)
    padded[:n, :k] = w
    blocks = padded.reshape(-(-n // 128), 128, -(-k // 128), 128)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    back = (codes.float() * scale[:, None, :, None]).reshape(padded.shape)[:n, :k]
    return {"weight": codes.reshape(padded.shape)[:n, :k].contiguous(), "weight_scale_inv": scale}, back


def compressed(w, name):
    """int4 in groups of 64 by functions of compressed-tensors, matrix by matrix: those of experts are no modules."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**INT4["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = w.reshape(len(w), -1, 64)
    scale, _ = calculate_qparams(groups.amin(dim=2), groups.amax(dim=2), args)
    parts = Compressor.compress({"weight": w, "weight_scale": scale.bfloat16()}, scheme)
    wide = {**parts, "weight_scale": parts["weight_scale"].float()}
    return parts, Compressor.decompress(wide, scheme)["weight"]


def gptq(w, name, group=64, order=range(8), less=0x11111111):
    """As gptqmodel packs: codes down K, words of zeros less ones, scales turned; a zero of 0 borrows from the next."""
    w = torch.cat([w[:5].abs(), w[5:]])  # five rows whose zeros are 0
    codes, scale, zero, back = with_zeros(w, group or w.shape[1], (1 << 32 // len(order)) - 1)
    return {
        "qweight": words(codes, order).T.contiguous(), "qzeros": words(zero.T.contiguous(), order, less),
        "scales": scale.T.contiguous(), "g_idx": (torch.arange(w.shape[1]) // (group or w.shape[1])).int(),
    }, back  # fmt: skip


def gptq8(w, name):
    """The same in 8 bits."""
    return gptq(w, name, 64, range(4), 0x01010101)


def gptq_v2(w, name):
    """The same by rows, in the second version, where nothing is taken off zeros."""
    return gptq(w, name, 0, range(4), 0)


def act_order(w, name):
    """The same with columns grouped in another order, as by their activations: one for all that meet one input. Those
    of the first expert stand as they come, like those of one that has seen no tokens."""
    module = name.rsplit(".", 2)[0]
    draw = torch.Generator().manual_seed(zlib.crc32(f"{module} {w.shape[1]}".encode()))
    order = torch.arange(w.shape[1]) if module.endswith("experts.0") else torch.randperm(w.shape[1], generator=draw)
    parts, back = gptq(w[:, order], name)
    back[:, order] = back.clone()
    codes = torch.zeros(w.shape, dtype=torch.int64)
    codes[:, order] = unpacked(parts["qweight"].T)
    parts |= {
        "qweight": words(codes).T.contiguous(),
        "g_idx": torch.argsort(order).div(64, rounding_mode="floor").int(),
    }
    return parts, back


def unpacked(x):
    """[.., n] int32 as the 8 n codes that words() made them of."""
    return torch.stack([x >> (4 * i) & 15 for i in range(8)], dim=-1).reshape(*x.shape[:-1], -1).long()


def awq(w, name, group=64):
    """As AutoAWQ's gemm version packs: columns interleaved within a word."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, scale, zero, back = with_zeros(w, group)
    turned = codes.T.contiguous(), zero.T.contiguous()
    return {"qweight": words(turned[0], order), "qzeros": words(turned[1], order), "scales": scale.T.contiguous()}, back


def weights(bits, strategy, group=None, symmetric=True, type="int"):
    return {"num_bits": bits, "type": type, "strategy": strategy, "group_size": group, "symmetric": symmetric}


def scheme(*args, **how):
    groups = {"group_0": {"weights": weights(*args, **how)}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


INT4 = {"weights": weights(4, "group", 64)}
SCHEMES = {  # of compressed-tensors: weights, the dtype of scales, its name where the library would take another
    "fp8 rows": (weights(8, "channel", type="float"), "bfloat16", "fp8row"),
    "fp8 tensor": (weights(8, "tensor", type="float"), "float32", "fp8row"),
    "fp8 groups": (weights(8, "group", 64, type="float"), "float16", "fp8g64"),
    "fp8 blocks by compressed-tensors": (
        weights(8, "block", type="float") | {"block_structure": [128, 128]},
        "bfloat16",
        "fp8g128",
    ),
    "int3 dense": (weights(3, "group", 64), "bfloat16", "int4g64"),
    "int2 uneven": (weights(2, "group", 64, False), "float16", "uint4g64f16"),
    "int5 uneven rows": (weights(5, "channel", None, False), "bfloat16", "uint8row"),
    "int6 dense": (weights(6, "channel"), "float32", "int8rowf32"),
    "mxfp4 rows": (weights(4, "group", 32, type="float"), "bfloat16", "mxfp4"),
    "int8 rows": (weights(8, "channel"), "bfloat16", "int8row", "int-quantized"),
    "int8 rows f32": (weights(8, "channel"), "float32", "int8rowf32", "int-quantized"),
    "int8 groups f16": (weights(8, "group", 64), "float16", "int8g64f16"),
    "int4 rows": (weights(4, "channel"), "bfloat16", "int4row"),
    "int4 groups": (weights(4, "group", 64), "bfloat16", "int4g64"),
    "int4 groups f16": (weights(4, "group", 128), "float16", "int4g128f16"),
    "int8 rows uneven": (weights(8, "channel", None, False), "bfloat16", "uint8row", "int-quantized"),
    "int8 rows uneven packed": (weights(8, "channel", None, False), "float16", "uint8rowf16"),
    "int8 tensor uneven": (weights(8, "tensor", None, False), "float32", "uint8rowf32", "int-quantized"),
    "int8 groups uneven": (weights(8, "group", 64, False), "bfloat16", "uint8g64"),
    "int4 rows uneven": (weights(4, "channel", None, False), "bfloat16", "uint4row"),
    "int4 uneven": (weights(4, "group", 64, False), "bfloat16", "uint4g64"),
    "int4 uneven f32": (weights(4, "group", 64, False), "float32", "uint4g64f32"),
}
PACKED = {  # by the published packing, for want of a library that could be asked in a test: see also the goldens
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "desc_act": False}, "uint4g64f16"),
    "gptq act-order": (act_order, {"quant_method": "gptq", "bits": 4, "desc_act": True}, "uint4g64f16"),
    "gptq 8 bits": (gptq8, {"quant_method": "gptq", "bits": 8, "group_size": 64}, "uint8g64f16"),
    "gptq 8 bits rows": (
        gptq_v2,
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        "uint8rowf16",
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "uint4g64f16"),
}  # fmt: skip
BLOCKS = (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8g128")
KINDS = {  # of experts
    "fp8 blocks": BLOCKS,
    "int4 groups": (compressed, {"quant_method": "compressed-tensors", "config_groups": {"g": INT4}}, "int4g64"),
    "awq": PACKED["awq"],
}
DENSE = ["fp8 blocks", *SCHEMES, *PACKED]


def written(kind, folder, monkeypatch):
    """(checkpoint of a small Llama in this format, the same dequantised, what its matrices stand for, the format)."""
    if kind in PACKED:
        return *quantised(tiny("llama", folder / "source", **SIZES), folder, *PACKED[kind][:2]), PACKED[kind][2]
    if kind in SCHEMES:
        pytest.importorskip("compressed_tensors")
        scheme, dtype, format, *name = SCHEMES[kind]
        return *by_compressed_tensors(tiny("llama", folder / "source", dtype, **SIZES), folder, scheme, *name), format
    pytest.importorskip("accelerate")
    return *by_transformers_fp8(tiny("llama", folder / "source", **SIZES), folder, monkeypatch), "fp8g128"


@pytest.mark.parametrize("kind", DENSE)
def test_published_matrices(tmp_path, monkeypatch, kind):
    coded, plain, values, format = written(kind, tmp_path, monkeypatch)
    c = Checkpoint.open(coded)
    p = port(c)
    name = "model.layers.1.mlp.up_proj.weight"
    assert c.format(name) == p.tensors["layers.1.mlp.up_proj.weight"].format == format
    assert len(values) == 14
    for name, want in values.items():
        held, got = in_place(c, name)
        assert held == format and c.shape(name) == tuple(want.shape)
        assert torch.equal(torch.from_numpy(got).to(want.dtype), want)  # libraries round what they dequantise
    wanted = truth(plain, list(range(40)))
    # Activations in int8; or in bf16, as K, V and the library's values are. Codes of 2 bits take more of the range.
    limit = 0.02 if not formats.get(format).integer else 0.1 if kind == "int2 uneven" else 0.05
    for device in ("reference", "host"):
        assert error(logits(coded, device), wanted) < limit
    if formats.get(format).published:  # and quantised anew, if asked for
        assert error(logits(coded, "host", weights="int8"), wanted) < 0.06
    held = open_device("host").load(build(p), c, StateSpec(4, 16)).packed_bytes
    narrow = kind.startswith(("int2", "int3", "int5", "int6"))  # kept in 4 or 8 bits
    assert held < (2 if narrow else 1.1) * sum(f.stat().st_size for f in coded.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("gptq-act-order", "uint4g32f16"),
        ("gptq-8-bits", "uint8g32f16"),
        ("compressed-act-order", "int4g32f16"),
        ("awq", "uint4g32f16"),
    ],
)
def test_checkpoints_of_libraries_that_are_not_here(tmp_path, name, format):
    """Written by gptqmodel and autoawq, with what they dequantise their matrices to: see scripts/goldens.py."""
    values = safetensors.load_file(GOLDEN / f"{name}.values.safetensors")
    c = Checkpoint.open(GOLDEN / name)
    assert len(values) == 7
    for matrix, want in values.items():
        held, got = in_place(c, matrix)
        assert held == format and torch.equal(torch.from_numpy(got).half(), want)
    kept = {
        n: torch.from_numpy(c.read(n).astype(np.float32))
        for n in c.names
        if n.endswith(("norm.weight", "tokens.weight"))
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    safetensors.save_file(
        {n: x.float() for n, x in (kept | values).items()}, plain / "model.safetensors", {"format": "pt"}
    )
    config = {k: v for k, v in c.config.items() if k not in ("quantization_config", "dtype")}
    (plain / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    permutes = [op.site for op in port(c).ops if op.kind == "permute"]
    sites = ["attn.q_proj", "attn.o_proj", "mlp.gate_proj", "mlp.down_proj"] if name != "awq" else []
    assert permutes == [f"layers.0.{site}.permute" for site in sites]  # q, k and v share one, as gate and up do
    for device in ("reference", "host"):
        assert error(logits(GOLDEN / name, device), truth(plain, list(range(40)))) < 0.05


@pytest.mark.parametrize("layout", ["tp2", "tp2sp", "pp2"])
def test_columns_in_order_on_a_mesh(tmp_path, layout):
    """What is cut is gathered before its columns change places."""
    encode, config, _ = PACKED["gptq act-order"]
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    c = Checkpoint.open(coded)
    programs = build_mesh(port(c), layout)
    if layout != "pp2":
        rows = [
            [int(p.tensors[f"layers.0.mlp.{n}.weight"].shape[0]) for p in programs.programs]
            for n in ("gate_up_proj", "down_proj")
        ]
        assert sum(rows[0]) == 2 * 384 and rows[1] == [256, 256]
    ex = MeshDevice(open_device("host")).load(programs, c, StateSpec(4, 16))
    got = ex.step(StepRequest(bind([Chunk(range(40), 0, range(4), range(40))], 16), logits=True)).logits
    assert error(got, logits(coded, "host")) < 0.02  # sums in other orders round activations to int8 otherwise


@pytest.mark.parametrize("layout", ["", "ep2"])
def test_columns_of_experts_in_order(tmp_path, layout):
    """Each expert's own, but one that gate and up share."""
    encode, config, _ = PACKED["gptq act-order"]
    coded, plain, _ = quantised(tiny("qwen3moe", tmp_path / "source", **MOE), tmp_path, encode, config)
    c, wanted = Checkpoint.open(coded), truth(plain, list(range(40)))
    p = port(c)
    orders = [str(p.tensors[f"layers.0.mlp.experts.{n}"].type) for n in ("order", "down_order")]
    assert orders == ["i32[8, 256]", "i32[8, 128]"]
    assert len({c.order(f"model.layers.0.mlp.experts.{e}.down_proj.weight") for e in range(8)}) == 8
    if layout:
        ex = MeshDevice(open_device("host")).load(build_mesh(p, layout), c, StateSpec(4, 16))
        got = ex.step(StepRequest(bind([Chunk(range(40), 0, range(4), range(40))], 16), logits=True)).logits
        assert typical(got, wanted) < 0.05
        return
    for device in ("reference", "host"):
        assert typical(logits(coded, device), wanted) < 0.05
    assert typical(logits(coded, "host", weights="int8"), wanted) < 0.06  # dequantised and quantised anew, in order
    with pytest.raises(LayoutError, match="has its own column order, which tp=2 would split"):
        build_mesh(p, "tp2")


def test_columns_in_order_of_a_weight_joined_from_parts(tmp_path):
    """Lightning attention, whose q, k and v are cut from one tensor."""
    encode, config, _ = PACKED["gptq act-order"]
    source = tiny("minimax", tmp_path / "source", **SIZES, layer_types=["linear_attention", "full_attention"])
    coded, plain, _ = quantised(source, tmp_path, encode, config)
    assert typical(logits(coded, "host"), truth(plain, list(range(40)))) < 0.05


def test_an_expert_of_two_orders_is_refused(tmp_path):
    coded, _, _ = quantised(tiny("qwen3moe", tmp_path / "source", **MOE), tmp_path, *PACKED["gptq act-order"][:2])
    arrays = safetensors.load_file(coded / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.g_idx"
    arrays[name] = arrays[name].flip(0).contiguous()
    safetensors.save_file(arrays, coded / "model.safetensors")
    with pytest.raises(PortError, match="experts.3.gate_proj.order and .*experts.3.up_proj.order differ"):
        port(Checkpoint.open(coded))


def test_groups_of_other_sizes_are_refused(tmp_path):
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, *PACKED["gptq act-order"][:2])
    arrays = safetensors.load_file(coded / "model.safetensors")
    arrays["model.layers.0.mlp.up_proj.g_idx"][0] = 1 + arrays["model.layers.0.mlp.up_proj.g_idx"][0]
    safetensors.save_file(arrays, coded / "model.safetensors")
    with pytest.raises(PortError, match="up_proj.(g_idx: groups of other sizes than 6|scales: groups of 65)"):
        Checkpoint.open(coded)


@pytest.mark.parametrize("kind", [*DENSE, "mxfp4"])
def test_runs_of_rows_are_the_matrix(tmp_path, monkeypatch, kind):
    """What a host takes run by run, cut as a rank's share or not, is what it would take at once."""
    draw = np.random.default_rng()
    monkeypatch.setattr(checkpoint, "STRIP", 1)
    monkeypatch.setattr(checkpoint, "ROWS", int(draw.integers(1, 9)))
    if kind == "mxfp4":
        c = Checkpoint.open(gpt_oss(tmp_path)[0])
        name, sources = "model.layers.0.mlp.experts.down_proj", ["|T", "|T|r0:1/2", "|T|s2:4/6", "|T|r32:64/128"]
    else:
        coded, *_, format = written(kind, tmp_path, monkeypatch)
        c = Checkpoint.open(coded)
        name, sources = "model.layers.1.mlp.down_proj.weight", ["", "|r64:192/256", "|r1:2/2", "|r0:3/4|r0:96/192"]
        sources.append("|r0:1/1" if "row" in format else "|c0:128/384")
    for steps in sources:
        ((_, whole),) = read(name + steps, c.read)
        runs = [x for _, x in strips(name + steps, c.read, c.strips)]
        whole_only = c.coded[name].whole > 1  # words of zeros that run over rows
        assert (steps or len(runs) > 1 or whole_only) and all(
            isinstance(x, Quantised) and x.format == whole.format for x in runs
        )
        for part, values in whole.arrays.items():
            np.testing.assert_array_equal(np.concatenate([x.arrays[part] for x in runs]), values)


@pytest.mark.parametrize("kind", ["fp8 blocks", "int4 groups", "awq"])
def test_published_experts(tmp_path, kind):
    encode, config, format = KINDS[kind]
    coded, plain, _ = quantised(tiny("qwen3moe", tmp_path / "source", **MOE), tmp_path, encode, config)
    p = port(Checkpoint.open(coded))
    assert {p.tensors[f"layers.1.mlp.experts.{n}"].format for n in ("gate", "up", "down")} == {format}
    wanted = truth(plain, list(range(40)))
    for device in ("host", "reference"):
        assert typical(logits(coded, device), wanted) < 0.05


@pytest.mark.parametrize(
    "format", ["fp8g128", "fp8g32", "fp8row", "mxfp4", "int8g32", "int8row", "int4g64", "int4g128"]
)
@pytest.mark.parametrize("glu", [False, True])
def test_the_host_packs_the_very_codes(format, glu):
    """Codes given to the host come back as the values they stand for, whole and in parts."""
    draw = np.random.default_rng()
    n, k = 2 * int(draw.integers(1, 70)), int(draw.integers(1, 300))
    q = formats.quantise(draw.normal(size=(n, k)).astype(np.float32), format)
    fmt = formats.get(format)
    weight = _native.Weight(fmt.family, n, k, fmt.group_of(k), glu)
    cut = int(draw.integers(0, n))
    for first, last in ((0, cut), (cut, n)):
        part = q.each(lambda x, first=first, last=last: np.ascontiguousarray(x[first:last]))
        fill_codes(weight, part, first, 2)
    got = np.empty((n, k), np.float32)
    for i in range(n):
        weight.unpack(i, got[i])
    np.testing.assert_array_equal(got, q.rows(slice(None)))


def gpt_oss(folder):
    """(a checkpoint with experts of random blocks and scales, the same as transformers' own function dequantises it,
    what its matrices stand for)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    path = tiny("gptoss", folder / "source", **sizes)
    arrays = safetensors.load_file(path / "model.safetensors")
    coded, plain, values = dict(arrays), dict(arrays), {}
    draw = torch.Generator().manual_seed(3)
    for name in [n for n in arrays if n.endswith(("gate_up_proj", "down_proj"))]:
        e, k, n = arrays[name].shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(121, 125, (e, n, k // 32), generator=draw, dtype=torch.uint8)
        plain[name] = values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        del coded[name]
        coded |= {name + "_blocks": blocks, name + "_scales": scales}
    table = json.loads((path / "config.json").read_text())
    for sub, tensors, more in (
        ("coded", coded, {"quantization_config": {"quant_method": "mxfp4"}}),
        ("plain", plain, {}),
    ):
        shutil.copytree(path, folder / sub)
        safetensors.save_file(tensors, folder / sub / "model.safetensors")
        (folder / sub / "config.json").write_text(json.dumps({**table, **more}))
    return folder / "coded", folder / "plain", values


@pytest.mark.parametrize("device", ["reference", "host"])
def test_mxfp4(tmp_path, device):
    """gpt-oss: random blocks and scales, which transformers' own function dequantises."""
    coded, plain, values = gpt_oss(tmp_path)
    c = Checkpoint.open(coded)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    got = c.read(name)
    assert isinstance(got, Quantised) and c.format(name) == "mxfp4" and c.shape(name) == tuple(values[name].shape)
    np.testing.assert_array_equal(got.rows(slice(None)).swapaxes(1, 2), values[name].numpy())
    assert port(c).tensors["layers.0.mlp.experts.up"].format == "mxfp4"
    assert typical(logits(coded, device), truth(plain, list(range(40)))) < 0.05


def test_latent_projections_by_head_leave_their_codes(tmp_path):
    """kv_b_proj is split by head and turned: what was fp8 becomes bf16, and the Program says so."""
    path = tiny(
        "deepseekv3", tmp_path / "source", kv_lora_rank=128, qk_nope_head_dim=32, v_head_dim=32, hidden_size=128
    )
    coded, plain, _ = quantised(path, tmp_path, *KINDS["fp8 blocks"][:2])
    p = port(Checkpoint.open(coded))
    assert {p.tensors[f"layers.0.attn.{n}"].format for n in ("k_up", "v_up")} == {"bf16"}
    for device in ("reference", "host"):
        assert typical(logits(coded, device), truth(plain, list(range(40)))) < 0.03


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "no tensor has a quant_state or SCB beside it",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format='marlin' is packed for a",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv', zero_point=True; 4 and 8 bits, gemm"),
        (scheme(4, "group", 48, type="float"), "weights of 4 bits, type 'float', strategy 'group' are not read"),
        (scheme(4, "group", 16, symmetric=False, type="float"), "floats with zero points"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
            "W4A16 is the name of a preset",
        ),
        (scheme(8, "block"), "strategy 'block' are not read"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "NVIDIA Model Optimizer., quant_algo 'W4A8_AWQ' is not",
        ),
        ({"quant_method": "aqlm"}, "'aqlm': AQLM .additive codebooks.; it is not read here. take a version in FP8"),
        ({"quant_method": "quark", "algo_config": [{"name": "rotation"}]}, "rotations of activations are not computed"),
        ({"quant_method": "of_my_own"}, "quant_method 'of_my_own' is not read; known are fp8"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, config, says):
    path = tiny("llama", tmp_path)
    table = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**table, "quantization_config": config}))
    with pytest.raises(PortError, match=says):
        Checkpoint.open(path)


def test_a_code_without_its_scale_is_named(tmp_path):
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, *BLOCKS[:2])
    arrays = safetensors.load_file(coded / "model.safetensors")
    del arrays["model.layers.0.mlp.up_proj.weight_scale_inv"]
    safetensors.save_file(arrays, coded / "model.safetensors")
    with pytest.raises(PortError, match="up_proj.weight is F8_E4M3, but neither .*_scale_inv nor .*_scale is there"):
        Checkpoint.open(coded)


@pytest.mark.parametrize("name", ["int4g128f16", "uint4g64", "uint8g64f16", "q5_k", "q6_k", "int8rowf32", "int4row"])
def test_formats_that_are_only_read(name):
    fmt = formats.get(name)
    assert fmt.published and fmt.grouped and fmt.integer
    with pytest.raises(formats.FormatError, match=f"{name} is only read from checkpoints"):
        formats.quantise(np.ones((2, 64), np.float32), name)


CUT = ["fp8 blocks", "fp8 rows", "int4 groups f16", "int8 rows uneven", "gptq", "awq", "mxfp4 rows"]


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_keeps_the_codes(tmp_path, monkeypatch, kind):
    """Lanes hold less than a group of columns: the scale goes with the codes, and no value changes."""
    coded, *_ = written(kind, tmp_path, monkeypatch)
    c = Checkpoint.open(coded)
    program = port(c)
    mesh = build_mesh(program, "tp4")
    for name in ("layers.0.attn.o_proj.weight", "layers.1.mlp.down_proj.weight"):
        (source,) = program.tensors[name].source
        whole = c.read(source).rows(slice(None))
        parts = []
        for p in mesh.programs:
            t = p.tensors[name]
            pieces = [x for source in t.source for _, x in read(source, c.read)]
            assert all(isinstance(x, Quantised) and x.format == t.format for x in pieces)
            parts += [x.rows(slice(None)) for x in pieces]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    ex = MeshDevice(open_device("host")).load(mesh, c, StateSpec(4, 16))
    got = ex.step(StepRequest(bind([Chunk(range(40), 0, range(4), range(40))], 16), logits=True)).logits
    assert error(got, logits(coded, "host")) < 0.06  # sums in other orders round activations to int8 otherwise


def test_a_cut_that_would_tear_groups_is_refused(tmp_path):
    """Heads of 24 columns: no group of 32 or more ends where the lanes' columns end."""
    source = tiny(
        "mistral", tmp_path / "source", hidden_size=128, intermediate_size=256, head_dim=40, num_hidden_layers=1
    )
    encode = lambda w, name: gptq(w, name, 32)  # noqa: E731
    coded, _, _ = quantised(source, tmp_path, encode, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    p = port(Checkpoint.open(coded))
    with pytest.raises(
        LayoutError, match=r"o_proj.weight is uint4g32f16.* in the checkpoint, and a cut at column 40 would"
    ):
        build_mesh(p, "tp4")
    build_mesh(p, "tp4", "int8")


def gptq_partial(w, name):
    """Groups of 128 of 192 columns: the last has 64."""
    k = w.shape[1]
    whole = -(-k // 128) * 128
    codes, scale, zero, back = with_zeros(torch.nn.functional.pad(w, (0, whole - k)), 128)
    return {
        "qweight": words(codes[:, :k]).T.contiguous(), "qzeros": words(zero.T.contiguous(), less=0x11111111),
        "scales": scale.T.contiguous(), "g_idx": (torch.arange(k) // 128).int(),
    }, back[:, :k].contiguous()  # fmt: skip


@pytest.mark.parametrize("config", [{"group_size": 128}, {}, {"group_size": 64}])
def test_a_last_group_that_is_not_full(tmp_path, config):
    """By the config's group size, or by g_idx where the config has none or another."""
    source = tiny("llama", tmp_path / "source", **{**SIZES, "hidden_size": 192})
    held = {"quant_method": "gptq", "bits": 4, **config}
    coded, plain, values = quantised(source, tmp_path, gptq_partial, held)
    c = Checkpoint.open(coded)
    for name, want in values.items():
        assert torch.equal(torch.from_numpy(in_place(c, name)[1]).to(want.dtype), want)
    assert error(logits(coded, "host"), truth(plain, list(range(40)))) < 0.05


def without(path, suffix):
    arrays = safetensors.load_file(path / "model.safetensors")
    safetensors.save_file({n: x for n, x in arrays.items() if not n.endswith(suffix)}, path / "model.safetensors")


def test_scales_that_do_not_fit_the_config(tmp_path):
    source = tiny("llama", tmp_path / "source", **{**SIZES, "hidden_size": 192})
    held = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    coded, _, _ = quantised(source, tmp_path, gptq_partial, held)
    without(coded, "g_idx")
    with pytest.raises(PortError, match=r"scales has [23] groups, but config.json's group_size=64 makes [36] of"):
        Checkpoint.open(coded)
    without(coded, "qzeros")
    with pytest.raises(PortError, match=r"qweight has no qzeros beside it"):
        Checkpoint.open(coded)


def test_dynamic_overrides_of_gptq(tmp_path):
    """Down projections of 8 bits in groups of 32, and those of layer 0 not quantised."""
    source = tiny("llama", tmp_path / "source", **SIZES)

    def encode(w, name):
        if "layers.0.mlp" in name:
            return {"weight": w}, w
        return gptq(w, name, 32, range(4), 0x01010101) if "down_proj" in name else gptq(w, name, 64)

    dynamic = {"-:.*layers\\.0\\.mlp": {}, "+:.*down_proj": {"bits": 8, "group_size": 32}}
    held = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic}
    coded, plain, _ = quantised(source, tmp_path, encode, held)
    c = Checkpoint.open(coded)
    assert (
        c.format("model.layers.1.mlp.down_proj.weight") == "uint8g32f16"
        and c.format("model.layers.0.mlp.up_proj.weight") == "f32"
    )
    assert error(logits(coded, "host"), truth(plain, list(range(40)))) < 0.05


@pytest.mark.parametrize(
    ("kind", "file", "held"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
        (
            "fp8 tensor",
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
        ),
    ],
)
def test_settings_in_a_file_beside_config_json(tmp_path, monkeypatch, kind, file, held):
    coded, _, values, _ = written(kind, tmp_path, monkeypatch)
    table = json.loads((coded / "config.json").read_text())
    table.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(table))
    (coded / file).write_text(json.dumps(held))
    c = Checkpoint.open(coded)
    assert c.quantised_by.split(":")[0] == file
    for name, want in values.items():
        assert torch.equal(torch.from_numpy(in_place(c, name)[1]).to(want.dtype), want)
    port(c)


def test_settings_left_from_another_version(tmp_path):
    path = tiny("llama", tmp_path / "m", **SIZES)
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}))
    assert error(logits(path, "reference"), truth(path, list(range(40)))) < 1e-4


def test_fbgemm_and_e8m0_scales(tmp_path):
    """Scales by row as fbgemm_fp8 has them; blocks whose scales are powers of two."""
    source = tiny("llama", tmp_path / "source", **SIZES)

    def rows(w, name):
        scale = w.abs().amax(dim=1, keepdim=True) / 448
        codes = (w / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}, codes.float() * scale

    def powers(w, name):
        parts, _ = fp8_blocks(w, name)
        exponents = torch.ceil(torch.log2(parts["weight_scale_inv"]))
        scale = torch.exp2(exponents).repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, : w.shape[1]]
        codes = (w / scale).to(torch.float8_e4m3fn)
        stored = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return {"weight": codes, "weight_scale_inv": stored}, codes.float() * scale

    for encode, config in ((rows, {"quant_method": "fbgemm_fp8"}), (powers, BLOCKS[1])):
        folder = tmp_path / encode.__name__
        coded, plain, values = quantised(source, folder, encode, config)
        c = Checkpoint.open(coded)
        for name, want in values.items():
            assert torch.equal(torch.from_numpy(in_place(c, name)[1]).to(want.dtype), want)
        assert error(logits(coded, "host"), truth(plain, list(range(40)))) < 0.02


def test_config_groups_of_several_schemes(tmp_path, monkeypatch):
    """int4 groups for the MLP and int8 rows for attention; and groups that differ in their observer alone."""
    pytest.importorskip("compressed_tensors")
    coded, _, values, _ = written("int4 groups", tmp_path, monkeypatch)
    table = json.loads((coded / "config.json").read_text())
    (group,) = table["quantization_config"]["config_groups"].values()
    other = {**group, "weights": {**group["weights"], "observer": "mse"}, "targets": ["re:.*self_attn.*"]}
    eight = {**group, "weights": {**group["weights"], "num_bits": 8}, "targets": ["re:.*of_nothing"]}
    table["quantization_config"]["config_groups"] = {"a": other, "b": eight, "c": {**group, "targets": ["Linear"]}}
    (coded / "config.json").write_text(json.dumps(table))
    c = Checkpoint.open(coded)
    for name, want in values.items():
        assert torch.equal(torch.from_numpy(in_place(c, name)[1]).to(want.dtype), want)
    table["quantization_config"]["config_groups"] = {"a": other}
    (coded / "config.json").write_text(json.dumps(table))
    with pytest.raises(PortError, match=r"mlp.* but no entry of config_groups has"):
        Checkpoint.open(coded)
