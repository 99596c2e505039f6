"""Checkpoints of bitsandbytes, MLX, Metal, HQQ, AutoRound, Quark, and of GPTQ and AWQ with 2, 3 and 8 bits.

Values, logits (also with tp2) and the account are checked; settings that may change codes are refused. Each
format is written out here; the layouts were compared with those of the libraries (bitsandbytes 0.50, mlx 0.32, hqq
0.2.8, auto-round 0.16, amd-quark 0.13).
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published import hold, logits, quantised, typical, with_zeros
from support.tiny import error, tiny, truth

from intaglio.models import Checkpoint, PortError, account, port
from intaglio.models.files import checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4 = torch.cat([FP4, -FP4])
BF16 = 2.0**-8  # of values rounded to nearest: a half of the last of 8 bits
ONCE = 2.0**-23  # of values whose code and zero are multiplied by the scale apart, in float32


def stream(codes, bits):
    """[.., n] codes as [.., n bits / 32] int32, packed without gaps, the lowest first."""
    each = (codes.long()[..., None] >> torch.arange(bits)) & 1
    words = each.reshape(*codes.shape[:-1], -1, 32)
    total = (words << torch.arange(32)).sum(dim=-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def bnb4(kind, nested, size=64, table=None):
    table = table if table is not None else NF4 if kind == "nf4" else FP4

    def encode(w, name):
        blocks = w.reshape(-1, size)
        most = blocks.abs().amax(dim=1)
        state = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(w.shape)}
        parts = {"weight.absmax": most, "weight.quant_map": table.clone()}
        if nested:
            offset, levels = most.mean(), torch.linspace(-1, 1, 256)
            scale = torch.stack([(m - offset).abs().max() for m in most.split(256)])
            each = scale.repeat_interleave(256)[: len(most)]
            codes = ((most - offset) / each)[:, None].sub(levels).abs().argmin(dim=1)
            most = levels[codes] * each + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
            parts |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": scale,
                      "weight.nested_quant_map": levels}  # fmt: skip
        codes = (blocks / most[:, None])[..., None].sub(table).abs().argmin(dim=-1)
        pairs = codes.reshape(-1, 2)
        parts["weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8)
        packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = packed
        return parts, (table[codes] * most[:, None]).reshape(w.shape)

    return encode


def int8(w, name):
    most = w.abs().amax(dim=1)
    codes = (w * 127 / most[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * (most / 127)[:, None]


def affine(bits, group, biases="biases"):
    """MLX's: words of codes, code * scale + bias."""

    def encode(w, name):
        groups = w.reshape(len(w), -1, group)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scale, bias = ((high - low) / (2**bits - 1)).bfloat16(), low.bfloat16()
        codes = ((groups - bias[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1)
        back = codes * scale.float()[..., None] + bias.float()[..., None]
        words = stream(codes.reshape(w.shape), bits).view(torch.uint32)
        return {"weight": words, "scales": scale, biases: bias}, back.reshape(w.shape)

    return encode


def affine_mixed(w, name):
    return affine(8, 32)(w, name) if "down_proj" in name else affine(4, 64)(w, name)


def hqq(bits, axis):
    packing = {4: "4bit_u8", 3: "3bit_32", 8: "8bit_u8"}[bits]

    def text(s):
        return torch.tensor([ord(c) for c in s], dtype=torch.uint8)

    def encode(w, name):
        grouped = w.reshape(-1, 64) if axis == 1 else w.reshape(64, -1)
        low, high = grouped.amin(dim=axis, keepdim=True), grouped.amax(dim=axis, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half()
        zero = (-low / scale.float()).half()
        codes = (grouped / scale.float() + zero.float()).round().clamp(0, 2**bits - 1).int()
        back = ((codes - zero.float()) * scale.float()).reshape(w.shape)
        each = {4: 2, 3: 10, 8: 1}[bits]
        runs = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % each)).chunk(each)
        words = sum(run << (bits * (each - 1 - i)) for i, run in enumerate(runs))
        parts = {
            "W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero,
            "shape": torch.tensor(w.shape), "packing": text(packing), "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(64, dtype=torch.int32), "axis": torch.tensor(axis, dtype=torch.int32),
            "compute_dtype": text("torch.float16"), "view_as_float": torch.tensor(0, dtype=torch.uint8),
        }  # fmt: skip
        return parts, back

    return encode


def gptq(bits, less):
    """Codes of any bits down K; zeros less one, or symmetric zeros if `less` is None."""

    def encode(w, name):
        codes, scale, zero, back = with_zeros(w, 64, 2**bits - 1)
        if less is None:  # AutoGPTQ's words of 3-bit zeros: all 4, less one
            groups = w.reshape(len(w), -1, 64)
            zero, scale = torch.full_like(zero, 4), (groups.abs().amax(dim=2) / 3.5).half()
            steps = (groups / scale.float()[..., None]).round().clamp(-4, 3)
            codes, back = (steps + 4).reshape(w.shape), (steps * scale.float()[..., None]).reshape(w.shape)
        return {
            "qweight": stream(codes, bits).T.contiguous(),
            "qzeros": stream((zero - (1 if less is None else less)).clamp(min=0).T.contiguous(), bits),
            "scales": scale.T.contiguous(), "g_idx": (torch.arange(w.shape[1]) // 64).int(),
        }, back  # fmt: skip

    return encode


def awq8(w, name):
    codes, scale, zero, back = with_zeros(w, 64, 255)
    order = [0, 2, 1, 3]

    def packed(x):
        return stream(x.reshape(len(x), -1, 4)[..., order].reshape(x.shape), 8)

    return {"qweight": packed(codes.T.contiguous()), "qzeros": packed(zero.T.contiguous()),
            "scales": scale.T.contiguous()}, back  # fmt: skip


def quark(w, name):
    """FP8 in attention, MXFP4 in the MLP, INT8 rows in the down projections."""
    if "self_attn" in name:
        scale = w.abs().max() / 448
        codes = (w / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.1)}, codes.float() * scale
    if "down_proj" in name:
        scale = w.abs().amax(dim=1) / 127
        codes = (w / scale[:, None]).round().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, codes * scale[:, None]
    groups = w.reshape(len(w), -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=2))) - 2
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    step = torch.exp2(exponents)[..., None]
    codes = (groups.abs() / step)[..., None].sub(table).abs().argmin(dim=-1)
    back = table[codes] * step * torch.where(groups < 0, -1, 1)
    pairs = (codes + 8 * (groups < 0)).reshape(len(w), -1, 2)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return {"weight": packed, "weight_scale": (exponents + 127).to(torch.uint8)}, back.reshape(w.shape)


def extra(w, name):
    """AutoRound's: 8 bits in the down projections."""
    return gptq(8 if "down_proj" in name else 4, 0)(w, name)


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6.0}
HQQ = {"quant_method": "hqq", "skip_modules": ["lm_head"], "quant_config": {"weight_quant_params": {"nbits": 4}}}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "data_type": "int", "iters": 200}
QUARK = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}, "exclude": ["lm_head"]}
MLX8 = {"bits": 8, "group_size": 32}
V2 = {"quant_method": "gptq", "group_size": 64, "checkpoint_format": "gptq_v2"}
KINDS = {  # writer, settings, formats here, rounding of values, bound of logits
    "nf4": (bnb4("nf4", False), BNB4, {"nf4g64"}, 0, 0.02),
    "nf4 nested": (bnb4("nf4", True), BNB4, {"nf4g64"}, 0, 0.02),
    "nf4 across rows": (bnb4("nf4", True, 256), BNB4, {"nf4g128", "nf4g64"}, 0, 0.02),
    "fp4": (bnb4("fp4", True), BNB4, {"fp4g64"}, 0, 0.02),
    "another codebook": (bnb4("fp4", False, 64, FP4 * 0.75), BNB4, {"bf16"}, BF16, 0.02),
    "llm.int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"int8rowf32"}, 0, 0.05),
    "mlx mixed": (
        affine_mixed,
        {"bits": 4, "group_size": 64, **{f"model.layers.{i}.mlp.down_proj": MLX8 for i in (0, 1)}},
        {"affine4g64", "affine8g32"}, 0, 0.08,
    ),
    "mlx 3 bits": (affine(3, 64), {"bits": 3, "group_size": 64, "mode": "affine"}, {"affine4g64"}, 0, 0.08),
    "mlx 6 bits": (affine(6, 64), {"bits": 6, "group_size": 64}, {"affine8g64"}, 0, 0.08),
    "metal": (affine(2, 32, "qbiases"), {"quant_method": "metal", "bits": 2, "group_size": 32}, {"affine4g32"}, 0, 0.1),
    "hqq": (hqq(4, 1), HQQ, {"affine4g64f32"}, ONCE, 0.08),
    "hqq columns": (hqq(4, 0), HQQ, {"bf16"}, BF16, 0.02),
    "hqq 3 bits": (hqq(3, 1), HQQ, {"affine4g64f32"}, ONCE, 0.08),
    "hqq 8 bits": (hqq(8, 1), HQQ, {"affine8g64f32"}, ONCE, 0.08),
    "gptq 2 bits": (gptq(2, 0), V2 | {"bits": 2}, {"uint4g64f16"}, 0, 0.1),
    "gptq 3 bits": (gptq(3, 0), V2 | {"bits": 3}, {"uint4g64f16"}, 0, 0.05),
    "gptq 3 bits v1": (gptq(3, None), {"quant_method": "gptq", "bits": 3, "sym": True}, {"uint4g64f16"}, 0, 0.05),
    "awq 8 bits": (awq8, {"quant_method": "awq", "bits": 8, "group_size": 64}, {"uint8g64f16"}, 0, 0.05),
    "auto-round": (
        extra, AUTO | {"packing_format": "auto_round:gptqmodel", "extra_config": {".*down_proj": {"bits": 8}}},
        {"uint4g64f16", "uint8g64f16"}, 0, 0.05,
    ),
    "auto-round awq": (
        awq8, AUTO | {"bits": 8, "packing_format": "auto_round:auto_awq"}, {"uint8g64f16"}, 0, 0.05,
    ),
    "quark": (quark, QUARK, {"fp8row", "mxfp4", "int8rowf32"}, 0, 0.06),
}  # fmt: skip


@pytest.mark.filterwarnings("error:.*quantization_config")
@pytest.mark.parametrize("kind", KINDS)
def test_format(tmp_path, kind):
    encode, config, formats, rounding, limit = KINDS[kind]
    coded, plain, values = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    hold(coded, plain, values, limit, formats, rounding, cancel=4 if rounding == ONCE else 2.0**-16)


def test_a_table_of_mlx(tmp_path):
    """The embedding is quantised too, and settings stand under `quantization`."""
    config = {"bits": 4, "group_size": 64}
    coded, plain, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, affine(4, 64), config)
    tensors, twin = load_file(coded / "model.safetensors"), load_file(plain / "model.safetensors")
    parts, back = affine(4, 64)(tensors.pop("model.embed_tokens.weight").float(), "")
    save_file(
        tensors | {f"model.embed_tokens.{n}": x.contiguous() for n, x in parts.items()}, coded / "model.safetensors"
    )
    save_file(twin | {"model.embed_tokens.weight": back}, plain / "model.safetensors")
    table = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(table | {"quantization": config}))
    assert error(logits(coded, "host"), truth(plain, list(range(40)))) < 0.08
    a = account(coded)
    embed = next(t for t in a.tensors if t.name == "model.embed_tokens.weight")
    assert (embed.dtype, embed.format, embed.becomes) == ("U32", "affine4g64", ("embed.weight",))


@pytest.mark.parametrize(("key", "value"), [("online_rotation", "hadamard"), ("svd_rank", 32), ("outlier_ids", [1])])
def test_settings_that_may_change_codes_are_refused(tmp_path, key, value):
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, key: value}
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, int8, config)
    with pytest.raises(PortError, match=f"quantization_config.{key}=.*no reader here knows this setting"):
        port(Checkpoint.open(coded))


def test_what_becomes_much_larger_is_noted(tmp_path, monkeypatch):
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, hqq(4, 0), HQQ)
    assert not Checkpoint.open(coded).notes
    monkeypatch.setattr(checkpoint, "WORTH", 1 << 16)
    (note,) = Checkpoint.open(coded).notes
    assert note.startswith(
        "14 quantised matrices become bf16, 0.0 GB in memory instead of 0.0 in the files; with weights"
    )


def test_experts_of_mlx(tmp_path):
    """Stacks of a layer's experts, under switch_mlp."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2, "decoder_sparse_step": 1}
    config = {"bits": 4, "group_size": 32}
    source = tiny("qwen3moe", tmp_path / "source", **sizes)
    coded, plain, _ = quantised(source, tmp_path, affine(4, 32), config)
    stacks, tensors = {}, {}
    for name, x in load_file(coded / "model.safetensors").items():
        numbered = re.fullmatch(r"(.*)\.experts\.(\d+)\.(.*)", name)
        if numbered:
            stacks.setdefault(f"{numbered[1]}.switch_mlp.{numbered[3]}", {})[int(numbered[2])] = x
        else:
            tensors[name] = x
    tensors |= {name: torch.stack([parts[e] for e in sorted(parts)]) for name, parts in stacks.items()}
    save_file(tensors, coded / "model.safetensors")
    assert typical(logits(coded, "host"), truth(plain, list(range(40)))) < 0.05
    listed = [t.name for t in account(coded).tensors]
    assert sorted(listed) == sorted(tensors)


@pytest.mark.parametrize(
    ("encode", "config", "says"),
    [
        (hqq(4, 1), {**HQQ}, "W_q has no zero beside it"),
        (gptq(3, 1), {"quant_method": "gptq", "bits": 3}, "zeros of 3 bits in the first version of GPTQ's format"),
        (gptq(4, 0), AUTO | {"packing_format": "auto_round:exllamav2"}, "packing_format='auto_round:exllamav2'"),
        (affine(4, 64), {"bits": 4, "group_size": 32}, "codes of 4 bits in groups of 32 make it"),
        (bnb4("nf4", True), BNB4, "nested_absmax is not; the file is not complete"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, encode, config, says):
    coded, _, _ = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    tensors = load_file(coded / "model.safetensors")
    save_file(
        {n: x for n, x in tensors.items() if not n.endswith((".zero", "nested_absmax"))}, coded / "model.safetensors"
    )
    with pytest.raises(PortError, match=says):
        Checkpoint.open(coded)


def test_zeros_of_three_bits_as_gptqmodel_saves_them(tmp_path):
    """Words of symmetric zeros (4), less constants of GPTQModel's."""
    ones = torch.tensor([0x24924924, 0x92492492, 0x49249249], dtype=torch.int64)

    def encode(w, name):
        parts, back = gptq(3, None)(w, name)
        fours = stream(torch.full((1, 32), 4), 3).long() - ones
        words = torch.where(fours < -(1 << 31), fours + (1 << 32), fours).to(torch.int32)
        return parts | {"qzeros": words.repeat(len(parts["qzeros"]), parts["qzeros"].shape[1] // 3)}, back

    config = {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": True}
    coded, _, values = quantised(tiny("llama", tmp_path / "source", **SIZES), tmp_path, encode, config)
    c = Checkpoint.open(coded)
    for name, want in values.items():
        np.testing.assert_array_equal(c.read(name).rows(slice(None)), want.numpy())
