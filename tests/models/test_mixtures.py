"""Families with experts compared with transformers: logits and routing; and that the comparison sees each feature."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from support.broken import broken
from support.saved import save
from support.tiny import BASE, MIXTURES, YARN, compare, error, shake, tiny

from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.debugging.check import reference_model, wide_cache
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.formats import Quantised, quantise
from intaglio.models import Checkpoint, PortError, families, port, port_config
from intaglio.models.account import account
from intaglio.ops import Attend, Experts, HeadLinear, Linear, Map, Norm, Rope, Route
from intaglio.program import parse_program
from intaglio.program.source import expand, shape_after, take

transformers = pytest.importorskip("transformers")
LIMIT = 2e-4
LATENTS = ("deepseekv2", "deepseekv3", "kimik2")
VARIANTS = [
    ("mixtral", {"num_experts_per_tok": 1, "sliding_window": None, "head_dim": 40}),
    ("qwen2moe", {"qkv_bias": False, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("qwen3moe", {"attention_bias": True, "mlp_only_layers": [3], "decoder_sparse_step": 1, "norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4, "attention_bias": True}),
    ("granitemoe", {"tie_word_embeddings": True, "attention_bias": True}),
    ("gptoss", {"attention_bias": False, "num_experts_per_tok": 4, "sliding_window": 9}),
    ("deepseekv2", {"topk_method": "greedy", "q_lora_rank": 36, "n_group": None, "rope_parameters": None}),
    ("deepseekv3", {"rope_interleave": False, "norm_topk_prob": False, "n_group": 4, "topk_group": 3}),
    ("deepseekv3", {"q_lora_rank": None, "rope_parameters": YARN, "first_k_dense_replace": 0, "n_shared_experts": 2}),
    ("glm4moe", {"use_qk_norm": False, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}),
    ("llama4", {"use_qk_norm": False, "attn_temperature_tuning": False, "interleave_moe_layer_step": 1}),
    ("llama4", {"no_rope_layers": [0, 1, 1, 0], "num_experts_per_tok": 2, "attention_chunk_size": 7}),
    ("minimaxm2", {"tie_word_embeddings": True, "num_experts_per_tok": 5}),
    ("phimoe", {"lm_head_bias": False, "attention_bias": False, "sliding_window": 20, "router_jitter_noise": 0.01}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_variant(tmp_path, family, overrides):
    errors = compare(tiny(family, tmp_path, **overrides), "reference", steps=8)
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_is_no_worse_than_transformers_in_bf16(tmp_path, family, device):
    """||ours - f32|| / ||bf16 transformers - f32|| below 1.2, over the sequences in which neither sends a token to
    other experts than float32 does: where one does, its logits are another model's."""
    import torch

    path = tiny(family, tmp_path, "bfloat16")
    program = build(wide_cache(port(Checkpoint.open(path))), "auto")
    tokens = np.random.default_rng(5).integers(0, program.vocabulary, (64, 5))
    (wanted, chosen), (theirs, other) = (routed(path, tokens, d) for d in (torch.float32, torch.bfloat16))
    ours, own = on_device(program, path, device, tokens)
    same = np.ones(len(tokens), bool)
    for sets in (other, own):
        for a, b in zip(chosen, sets, strict=True):
            same &= (a == b).reshape(len(tokens), -1).all(axis=1)
    assert same.sum() >= 8, "too few sequences keep their experts in bf16"
    ratio = np.linalg.norm((ours - wanted)[same]) / np.linalg.norm((theirs - wanted)[same])
    assert ratio < 1.2


def routed(path, tokens, dtype):
    """Logits [sequences, tokens, vocabulary] by transformers, and the sorted expert choices of each layer."""
    import torch

    model = reference_model(path).to(dtype)
    seen = []

    def after(module, args, out):
        logits, ids = (out[1], None) if module.__class__.__name__ == "Llama4Router" else (out[0], out[2])
        ids = torch.topk(logits, module.top_k, dim=1)[1] if ids is None else ids
        seen.append(np.sort(ids.reshape(tokens.size, -1).numpy(), axis=1))

    handles = [m.register_forward_hook(after) for m in model.modules() if type(m).__name__.lower().endswith("router")]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
    for handle in handles:
        handle.remove()
    return logits, seen


def on_device(program, path, device, tokens):
    """Logits, and the sorted expert choices of each layer, by way of route's own meaning on the routers' logits."""
    ex = open_device(device).load(program, Checkpoint.open(path), StateSpec(4 * len(tokens), 16))
    routes = [op for op in program.ops if isinstance(op, Route)]
    n = tokens.shape[1]
    batch = bind([Chunk(row, 0, range(4 * i, 4 * i + 4), range(n)) for i, row in enumerate(tokens.tolist())], 16)
    result = ex.step(StepRequest(batch, logits=True, taps={op.logits for op in routes}))
    chosen = []
    for op in routes:
        values = {op.logits: result.taps[op.logits]}
        if op.bias:
            (name,) = program.tensors[op.bias].source
            values[op.bias] = np.asarray(Checkpoint.open(path).read(name), np.float32)
        chosen.append(np.sort(op.reference(values, batch)[op.ids], axis=1))
    return result.logits.reshape(*tokens.shape, -1), chosen


@pytest.mark.parametrize("family", MIXTURES)
def test_every_token_goes_where_transformers_sends_it(folder, family, device):
    import torch

    path = tiny(family, folder / family)
    tokens = np.random.default_rng(8).integers(0, 256, (2, 50))
    wanted = routed(path, tokens, torch.float32)[1]
    got = on_device(build(port(Checkpoint.open(path))), path, device, tokens)[1]
    assert len(got) == len(wanted) > 0
    for ours, theirs in zip(got, wanted, strict=True):  # a margin within rounding: 1 token in 1000 at most
        assert (ours == theirs).all(axis=1).mean() > 0.99


def swapped(op):
    return isinstance(op, Experts) and replace(op, gate=op.up, up=op.gate)


def other_score(op):
    return "softmax" if op.score == "sigmoid" else "sigmoid"


def sums_freely(op):
    return op.score not in ("chosen", "sparsemixer") and op.top > 1


def other_style(op):
    return "half" if op.style == "interleaved" else "interleaved"


CHANGES = {
    "score": lambda op: isinstance(op, Route) and replace(op, score=other_score(op)),
    "normalise": lambda op: isinstance(op, Route) and sums_freely(op) and replace(op, normalise=not op.normalise),
    "scale": lambda op: isinstance(op, Route) and replace(op, scale=op.scale * 1.3),
    "correction": lambda op: isinstance(op, Route) and replace(op, bias=None),
    "jitter": lambda op: isinstance(op, Route) and op.jitter and replace(op, jitter=0.001),
    "gate and up": swapped,
    "gate": lambda op: isinstance(op, Experts) and replace(op, activation="gelu"),
    "limit": lambda op: isinstance(op, Experts) and replace(op, limit=0.0),
    "shift": lambda op: isinstance(op, Experts) and replace(op, shift=0.0),
    "biases": lambda op: isinstance(op, Experts) and replace(op, gate_bias=None, up_bias=None, down_bias=None),
    "input": lambda op: isinstance(op, Experts) and op.scale_input and replace(op, scale_input=False),
    "sinks": lambda op: isinstance(op, Attend) and replace(op, sinks=None),
    "chunk": lambda op: isinstance(op, Attend) and replace(op, chunk=0),
    "window": lambda op: isinstance(op, Attend) and replace(op, window=0),
    "temper": lambda op: isinstance(op, Attend) and replace(op, temper=0.0),
    "style": lambda op: isinstance(op, Rope) and replace(op, style=other_style(op)),
    "leading": lambda op: isinstance(op, Rope) and replace(op, trailing=False),
    "shared gate": lambda op: isinstance(op, Map) and op.c and replace(op, c=None, expr="a + b"),
    "norm bias": lambda op: isinstance(op, Norm) and replace(op, bias=None),
    "router bias": lambda op: isinstance(op, Linear) and op.site.endswith("router") and replace(op, bias=None),
    "eps": lambda op: isinstance(op, Norm) and ".attn.kv_norm" in op.site and replace(op, eps=1e-2),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_the_comparison_sees_each_feature(folder, family):
    path = tiny(family, folder / family)
    p = port(Checkpoint.open(path))
    seen = set()
    for name, change in CHANGES.items():
        if (wrong := broken(p, change)) is not None:
            assert compare(path, program=wrong, steps=0)["prefill"] > 10 * LIMIT, name
            seen.add(name)
    assert {"score", "gate and up", "gate", "style"} - {"score"} <= seen and len(seen) >= 4


@pytest.mark.parametrize("family", MIXTURES)
def test_text_form(folder, family):
    p = port(Checkpoint.open(tiny(family, folder / family)))
    assert parse_program(str(p)) == p
    assert any(isinstance(op, HeadLinear) for op in p.ops) == (family in LATENTS)


@pytest.mark.parametrize("family", MIXTURES)
def test_defaults_are_those_of_transformers(family):
    """A config.json with nothing but five sizes gives the Program that the full one of transformers gives."""
    name, kind = MIXTURES[family]["class"], MIXTURES[family].get("config", f"{MIXTURES[family]['class']}Config")
    bare = {
        "hidden_size": 128,
        "num_attention_heads": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": 64,
    }
    if name == "DeepseekV2":
        bare["num_experts_per_tok"] = 4  # transformers' own default is none
    full = getattr(transformers, kind)(**bare, pad_token_id=0).to_dict()
    architectures = {"architectures": [f"{name}ForCausalLM"]}
    assert port_config({**bare, **architectures}) == port_config({**full, **architectures, "dtype": "bfloat16"})


def test_text_part_of_multimodal_qwen(tmp_path, device):
    """Qwen3-VL on text alone: transformers' whole model against the port of its language model."""
    import torch

    text = {k: v for k, v in BASE.items() if "token" not in k} | {"head_dim": 32}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    model = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    ).eval()
    shake(model, 5)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(3).integers(0, 256, 40).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    checkpoint = Checkpoint.open(tmp_path)
    ex = open_device(device).load(port(checkpoint), checkpoint, StateSpec(4, 16))
    got = ex.step(StepRequest(bind([Chunk(tokens, 0, range(4), range(40))], 16), logits=True)).logits
    assert error(got, wanted) < LIMIT


def test_multi_token_prediction_layers_are_ignored(tmp_path):
    path = tiny("deepseekv3", tmp_path / "good")
    c = Checkpoint.open(path)
    arrays = {n: np.array(c.read(n)) for n in c.names}
    more = {"model.layers.4.eh_proj.weight": np.ones((2, 2)), "model.layers.4.mlp.gate.weight": np.ones((2, 2))}
    config = {**c.config, "num_nextn_predict_layers": 1}
    assert port(save(tmp_path / "more", arrays | more, config), name="same") == port(c, name="same")
    with pytest.raises(PortError, match="holds 2 tensors .*eh_proj"):
        port(save(tmp_path / "less", arrays | more, {**config, "num_nextn_predict_layers": 0}))


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ("qwen3moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen3moe", {"num_local_experts": 6, "num_experts": 5}, "num_local_experts=6 and num_experts=5, two names of"),
        ("deepseekv2", {"norm_topk_prob": True}, "does not divide the weights"),
        ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok=4; SparseMixer chooses 2"),
        ("mixtral", {"num_local_experts": 7}, r"lacks 12 tensors .*experts\.6"),
        ("mixtral", {"num_hidden_layers": 400_000_000}, "num_hidden_layers=400000000, but the checkpoint holds only"),
        ("granitemoe", {"num_local_experts": 5}, r"input_linear.weight is \[6, 96, 64\], .* makes it \[5, 96, 64\]"),
        ("deepseekv3", {"kv_lora_rank": 41}, r"kv_a_layernorm.weight is \[40\], config.json makes it \[41\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, family, change, says):
    path = tiny(family, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(PortError, match=says):
        port(Checkpoint.open(path))


def test_two_names_of_one_value_may_agree(tmp_path):
    path = tiny("qwen3moe", tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"num_experts": 8, "num_local_experts": 8}
    (path / "config.json").write_text(json.dumps(config))
    fates = {f.key: f.fate for f in account(path).keys}
    assert (fates["num_experts"], fates["num_local_experts"]) == ("used", "used")


@pytest.mark.parametrize(
    ("source", "shape", "want"),
    [
        ("x", (4, 6), lambda x: x),
        ("x|T", (2, 4, 6), lambda x: x.transpose(0, 2, 1)),
        ("x|r0:1/2", (4, 6), lambda x: x[::2]),
        ("x|r2:4/4", (3, 8, 5), lambda x: np.concatenate([x[:, 2:4], x[:, 6:8]], axis=1)),
        ("x|T|r1:2/2", (3, 5, 6), lambda x: x.transpose(0, 2, 1)[:, 1::2]),
        ("x|c1:2/2", (3, 6), lambda x: x[:, 1::2]),
        ("x|h4|s2:4/4", (8, 5), lambda x: x.reshape(4, 2, 5)[2:]),
        ("x|h2|r0:1/3|T", (12, 5), lambda x: x.reshape(2, 6, 5)[:, ::3].transpose(0, 2, 1)),
    ],
)
def test_sources(source, shape, want):
    x = np.random.default_rng(0).normal(size=shape)
    ((name, steps),) = expand(source)
    assert name == "x"
    np.testing.assert_array_equal(take(x, steps), want(x))
    assert shape_after(shape, steps) == want(x).shape


def test_sources_in_a_run_and_those_not_understood():
    assert list(expand("a.{2..4}.b|T")) == [(f"a.{i}.b", ("T",)) for i in (2, 3, 4)]
    for step in ("q", "r0:1", "r2:1/2", "r0:1/5"):
        with pytest.raises(ValueError, match=re.escape(step)):
            take(np.ones((4, 4)), (step,))


@pytest.mark.parametrize(
    ("format", "step", "coded"),
    [
        ("int8g32", "c64:128/160", True),
        ("int8g32", "c128:160/160", True),
        ("int4g64", "c128:160/160", True),  # the last group is cut short by the row's end
        ("int8g32", "c32:64/80", False),  # of every 80 columns: the second run's groups lie across
        ("int8g32", "c0:40/160", False),
        ("fp8row", "c3:7/10", True),  # a row's one scale goes with any of its columns
        ("int8g32", "s1:2/3", True),
        ("int8g32", "r1:3/4", True),
    ],
)
def test_cuts_of_codes(format, step, coded):
    """Codes stay codes where groups stay whole; the values are those of the whole either way."""
    x = np.random.default_rng(len(step)).normal(size=(3, 8, 160)).astype(np.float32)
    whole = quantise(x.reshape(24, 160), format).stacked((3, 8, 160))
    got = take(whole, (step,))
    assert isinstance(got, Quantised) == coded
    values = got.rows(slice(None)) if isinstance(got, Quantised) else got
    np.testing.assert_array_equal(values, take(whole.rows(slice(None)), (step,)))
    assert got.shape == shape_after(whole.shape, (step,))


def test_a_vector_stored_as_a_matrix_of_one_row_names_the_step_that_reads_it(tmp_path):
    family = families()["Ernie4_5_MoeForCausalLM"]

    def without_step(c, context):
        d = family.describe(c, context)
        return replace(d, mixture=replace(d.mixture, correction=d.mixture.correction.removesuffix("|v")))

    with pytest.raises(PortError, match=r"is \[1, 8\], .* end its source with \|v"):
        port(Checkpoint.open(tiny("ernie4_5_moe", tmp_path)), family=replace(family, describe=without_step))
