"""Ports compared with transformers: every family, odd sizes, both forms of rope settings, and what is refused.

Relative logit error is max |ours - theirs| / max |theirs|, in float32, on prefill, on chunks and on decode steps.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.broken import broken
from support.saved import save
from support.tiny import FAMILIES, LLAMA3, LONGROPE, MIXTURES, ROPE, THREE_TO_ONE, YARN, compare, tiny, truth

from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.debugging.check import wide_cache
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, PortError, account, port, port_config
from intaglio.ops import Attend, Linear, Map, Norm, Rope
from intaglio.program import parse_program

transformers = pytest.importorskip("transformers")
LIMIT = 2e-4
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
VARIANTS = [
    ("llama", {"head_dim": 80, **MQA, "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    ("llama", {**MHA, "rope_parameters": LINEAR, "attention_bias": False, "tie_word_embeddings": True}),
    ("llama", {"mlp_bias": False, "vocab_size": 1021}),
    ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "rope_parameters": None}),
    ("mistral", {"head_dim": 96, "sliding_window": None, **MHA}),
    ("mistral", {"class": "Ministral", "layer_types": THREE_TO_ONE}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "tie_word_embeddings": False}),
    ("qwen2", {"rope_parameters": YARN, **MQA}),
    ("qwen3", {"head_dim": 80, "attention_bias": True, "vocab_size": 257, "pad_token_id": 0, "eos_token_id": 2}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_window": 20, **MHA}),
    ("phi3", {"original_max_position_embeddings": 200, "tie_word_embeddings": True}),
    ("gemma2", {"head_dim": 80, "attention_bias": True, "final_logit_softcapping": None, **MQA}),
    ("gemma3", {"head_dim": 96, "num_key_value_heads": 4, "final_logit_softcapping": 9.0, "attention_bias": True}),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 1, **MHA}),
    ("olmo3", {**MQA, "sliding_window": 9}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, **MHA}),
    ("cohere2", {"attention_bias": True, "tie_word_embeddings": False, "hidden_size": 320, **MQA}),
]  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_family(folder, family, device):
    errors = compare(tiny(family, folder / family), device)
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_family_compiled(folder, family, device):
    errors = compare(tiny(family, folder / family), device, "auto", steps=4)
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_variant(tmp_path, family, overrides, device):
    short = overrides.get("original_max_position_embeddings")  # as long as transformers takes the short factors too
    errors = compare(tiny(family, tmp_path, **overrides), device, steps=8, context=short)
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_stored_types(tmp_path, family, dtype, device):
    path = tiny(family, tmp_path, dtype)
    p = port(Checkpoint.open(path))
    stored = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert {t.format for t in p.of_role("weight")} == {stored}
    assert {t.format for t in p.of_role("state")} == {"bf16"}
    assert max(compare(path, device, program=wide_cache(p), steps=4).values()) < LIMIT
    assert 1e-4 < max(compare(path, device, steps=4).values()) < 5e-2  # keys and values rounded to bf16


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_worse_than_transformers_in_bf16(tmp_path, family, device):
    """Against the same bf16 weights computed in float32: ||ours - f32|| / ||bf16 transformers - f32|| below 1.2."""
    import torch

    path = tiny(family, tmp_path, "bfloat16")
    program = build(port(Checkpoint.open(path), 256), "auto")
    assert any(op.x_format == "bf16" for op in program.ops if isinstance(op, Linear))
    tokens = np.random.default_rng(5).integers(0, program.vocabulary, 64).tolist()
    wanted = truth(path, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].float().numpy()
    ex = open_device(device).load(program, Checkpoint.open(path), StateSpec(4, 16))
    ours = ex.step(StepRequest(bind([Chunk(tokens, 0, range(4), range(64))], 16), logits=True)).logits
    ratio = np.linalg.norm(ours - wanted) / np.linalg.norm(theirs - wanted)
    print(f"{family} on {device}: {ratio:.2f}")
    assert ratio < 1.2


CHANGES = {
    "no rope factor or wrong style": lambda op: (
        isinstance(op, Rope) and replace(op, style="half" if op.style == "interleaved" else "interleaved")
    ),
    "window": lambda op: isinstance(op, Attend) and replace(op, window=0 if op.window else 20),
    "scale": lambda op: isinstance(op, Attend) and replace(op, scale=op.scale * 1.1),
    "softcap": lambda op: isinstance(op, Attend) and replace(op, softcap=0.0),
    "norm offset": lambda op: isinstance(op, Norm) and replace(op, offset=1 - op.offset),
    "norm kind": lambda op: isinstance(op, Norm) and replace(op, norm="rms" if op.norm == "layer" else "layer"),
    "bias": lambda op: isinstance(op, Linear) and replace(op, bias=None),
    "activation": lambda op: isinstance(op, Map) and replace(op, expr=op.expr.replace("silu", "gelu")),
    "multiplier": lambda op: isinstance(op, Map) and replace(op, expr=op.expr.replace(" * 0.22", "")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_sees_each_feature(folder, family):
    """Each feature taken away or changed moves the logits by far more than the limit, so that none passes unseen."""
    path = tiny(family, folder / family)
    p = port(Checkpoint.open(path), 256)
    seen = 0
    for name, change in CHANGES.items():
        if (wrong := broken(p, change)) is not None:
            assert compare(path, program=wrong, steps=0)["prefill"] > 10 * LIMIT, name
            seen += 1
    assert seen >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_text_form(folder, family):
    p = port(Checkpoint.open(tiny(family, folder / family)), 256)
    assert parse_program(str(p)) == p
    assert p.context == 256
    assert [t.name for t in p.of_role("output")] == ["logits", "next_tokens", "logprobs"]
    assert {op.site for op in p.ops} >= {
        "embed",
        "layers.3.attn.attend",
        "layers.3.mlp.add",
        "select",
        "norm",
        "lm_head",
    }


def config_of(family, **overrides):
    table = {**FAMILIES[family], **overrides}
    name = table.pop("class")
    made = getattr(transformers, table.pop("config", f"{name}Config"))(**json.loads(json.dumps(table)))
    return {**made.to_dict(), "architectures": [f"{name}ForCausalLM"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """A config.json with nothing but five sizes gives the Program that the full one of transformers gives."""
    name, kind = FAMILIES[family]["class"], FAMILIES[family].get("config", f"{FAMILIES[family]['class']}Config")
    bare = {
        "hidden_size": 128,
        "num_attention_heads": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "vocab_size": 64,
    }
    full = getattr(transformers, kind)(**bare, pad_token_id=0).to_dict()
    architectures = {"architectures": [f"{name}ForCausalLM"]}
    assert port_config({**bare, **architectures}) == port_config({**full, **architectures, "dtype": "bfloat16"})


OLDER = {
    "llama": (
        {"rope_parameters": LLAMA3},
        {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ),
    "qwen2": ({"rope_parameters": LINEAR}, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "phi3": (
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        {
            "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
            "rope_scaling": {"type": "su", **{k: LONGROPE[k] for k in ("short_factor", "long_factor")}},
        },
    ),
    "gemma3": (
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        {
            "sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "olmo3": (
        {},
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
    ),
    "cohere2": ({}, {"sliding_window_pattern": 4, "rope_theta": 10000.0}),
}  # fmt: skip


@pytest.mark.parametrize("family", OLDER)
def test_both_forms_of_rope_settings_give_one_program(family):
    new, old = OLDER[family]
    newer = config_of(family, **SMALL, **new, max_position_embeddings=256, dtype="float32")
    dropped = ("rope_parameters", "layer_types", "dtype", "original_max_position_embeddings")
    older = {k: v for k, v in newer.items() if k not in dropped} | old | {"torch_dtype": "float32"}
    assert port_config(older) == port_config(newer)


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, YARN, {**YARN, "attention_factor": 1.3, "beta_fast": 8}, LONGROPE])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_frequencies_are_those_of_transformers(rope, head_dim):
    rope = {**rope, "rope_theta": 1e6}
    if "short_factor" in rope:
        rope |= {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
        rope |= {k: np.linspace(1, 3, head_dim // 2).tolist() for k in ("short_factor", "long_factor")}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": head_dim, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, rope_parameters=dict(rope), max_position_embeddings=16384)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    p = port_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    (turn, _) = (op for op in p.ops if isinstance(op, Rope))
    ours = np.array(p.tensors[turn.frequencies].values, np.float32)
    np.testing.assert_array_max_ulp(ours, theirs.inv_freq.numpy(), 3)
    assert turn.factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_longrope_chooses_its_factors_by_context():
    config = config_of("phi3", hidden_size=64, num_attention_heads=4, max_position_embeddings=256, pad_token_id=0)

    def table(context):
        p = port_config(config, context)
        return p.tensors["rope.frequencies"].values, next(op.factor for op in p.ops if isinstance(op, Rope))

    (short, a), (long, b), (usual, c) = table(32), table(33), table(None)
    assert long != short == usual
    assert a == b == c == pytest.approx((1 + np.log(256 / 32) / np.log(32)) ** 0.5)


def test_gemma_embeddings_are_scaled_by_a_rounded_root():
    config = {"architectures": ["Gemma2ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8, "vocab_size": 8}
    config["num_hidden_layers"] = 1
    assert port_config(config, format="bf16").ops[0].scale == 55.5
    assert port_config(config, format="f32").ops[0].scale == np.float32(3072**0.5)


def altered(path, family="llama", config=(), tensors=lambda t: None, **overrides):
    """A tiny checkpoint with config keys replaced (or dropped, by None) and tensors changed."""
    c = Checkpoint.open(tiny(family, path / "good", **overrides))
    arrays = {n: np.array(c.read(n)) for n in c.names}
    tensors(arrays)
    table = {**c.config, **dict(config)}
    return save(path / "altered", arrays, {k: v for k, v in table.items() if v is not None})


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_multimodal_gemma(tmp_path, prefix):
    plain = Checkpoint.open(tiny("gemma3", tmp_path / "text"))
    tensors = {n.replace("model.", prefix): np.array(plain.read(n)) for n in plain.names}
    tensors["vision_tower.embeddings.weight"] = np.ones((2, 2))
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": plain.config, "vision_config": {}}
    p = port(save(tmp_path / "seeing", tensors, config), name="text")
    same = parse_program(str(p).replace(prefix, "model."))
    assert same == port(plain, name="text")


def test_context(folder):
    c = Checkpoint.open(tiny("llama", folder / "llama"))
    assert port(c, 17).context == 17
    for wrong in (257, -1):
        with pytest.raises(PortError, match=rf"context={wrong} is outside 1\.\.256"):
            port(c, wrong)


def test_harmless_tensors_are_ignored(tmp_path):
    def more(t):
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
        t["lm_head.weight"] = t["model.embed_tokens.weight"]

    port(altered(tmp_path, "qwen2", tensors=more))


SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
}
REFUSED_CONFIGS = {
    "num_key_value_heads": (3, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    "hidden_act": ("mish", r"hidden_act='mish' is not ported; known are silu"),
    "quantization_config": (
        {"quant_method": "awq"},
        "quantization_config=.* is not supported: .*read off a checkpoint",
    ),
    "rope_parameters": (
        {"rope_type": "spiral", "rope_theta": 1e4},
        "rope_type='spiral' is not ported; known are default",
    ),
    "rope_scaling": ({"type": "llama3", "factor": 2}, "rope type 'llama3' needs 'low_freq_factor'"),
    "hidden_size": ("64", "hidden_size='64'; wanted an integer of 1 or more"),
    "num_hidden_layers": (0, "num_hidden_layers=0; wanted an integer"),
    "rms_norm_eps": (-1.0, "rms_norm_eps=-1.0; wanted a number above 0"),
    "attention_bias": ("yes", "attention_bias='yes'; wanted true or false"),
    "layer_types": (["full_attention"], "layer_types=.* is not supported: LlamaForCausalLM has full attention"),
    "vocab_size": (None, "config.json lacks 'vocab_size'"),
    "dtype": ("float8_e4m3fn", "dtype 'float8_e4m3fn' is not ported; known are float32"),
}


HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("llama", {"rope_parameters": HALF}, "rope_parameters.partial_rotary_factor"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("deepseekv3", {"rope_parameters": HALF}, "rope_parameters.partial_rotary_factor"),
        (
            "gemma3", {"rope_parameters": {"full_attention": HALF, "sliding_attention": HALF}},
            "rope_parameters.full_attention.partial_rotary_factor",
        ),
    ],
)  # fmt: skip
def test_a_rotary_factor_that_transformers_ignores(tmp_path, family, change, key):
    """With rope of type default, families that turn whole heads do so whatever partial_rotary_factor says."""
    path = tiny(family, tmp_path / family, rope_parameters=change.get("rope_parameters", ROPE))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    assert max(compare(path, "reference", steps=2).values()) < 1e-4
    fate = next(fate for fate in account(path).keys if fate.key == key)
    assert fate.fate == "ignored" and "turns whole heads" in fate.why and "turns whole heads" in fate.note


@pytest.mark.parametrize("key", REFUSED_CONFIGS)
def test_configs_refused(key):
    value, says = REFUSED_CONFIGS[key]
    config = {"architectures": ["LlamaForCausalLM"], **SMALL, "intermediate_size": 96, "vocab_size": 32, key: value}
    with pytest.raises(PortError, match=says):
        port_config(config)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm=True is not supported"),
        (
            "qwen2",
            {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 with rope_type='yarn', but this family rotates whole heads",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "attention is causal here"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "does not apply it"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "nothing for sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types lists 3 layers but num_hidden_layers=4"),
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
            r"layer_types\[3\]='linear_attention'",
        ),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": [1.0] * 5}}, "long_factor has 5 values; wanted 6"),
        (
            "phi3",
            {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.1}},
            "rope rotates 1 columns of head_dim=16",
        ),
        (
            "mistral",
            {"layer_types": THREE_TO_ONE},
            "layer_types=.* is not supported: MistralForCausalLM has one window",
        ),
        ("mistral", {"hidden_size": 65, "head_dim": None}, "hidden_size=65 is not a multiple of num_attention_heads=4"),
    ],
)
def test_features_refused(family, change, says):
    with pytest.raises(PortError, match=says):
        port_config({**config_of(family, **SMALL), **change})


def test_unknown_architectures():
    config = {"architectures": ["NobodyForCausalLM"], "num_local_experts": 8, "kv_lora_rank": 512, "hidden_size": 64}
    with pytest.raises(PortError) as e:
        port_config(config)
    for part in ("NobodyForCausalLM is not ported", "kv_lora_rank, num_local_experts", "`intaglio port "):
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("family", "config", "tensors", "says"),
    [
        ("llama", {}, "model.norm.weight", r"lacks 1 tensors \(model.norm.weight\)"),
        ("llama", {"tie_word_embeddings": False}, "lm_head.weight", r"lacks 1 tensors \(lm_head.weight\)"),
        ("llama", {"attention_bias": False}, "", r"holds 16 tensors \(model.layers.0.self_attn.k_proj.bias.*\.\.\.\)"),
        ("llama", {"num_hidden_layers": 5}, "", r"lacks 16 tensors .*layers.4"),
        ("llama", {"num_hidden_layers": 3}, "", r"holds 16 tensors .*layers.3"),
        ("llama", {"head_dim": 32}, "", r"k_proj.bias is \[32\], config.json makes it \[64\] \(num_key_value"),
        ("qwen2", {"vocab_size": 264}, "", r"embed_tokens.weight is \[263, 64\], .* \[264, 64\] \(vocab_size"),
        ("qwen3", {}, "model.layers.1.self_attn.q_norm.weight", "lacks 1 tensors .*q_norm"),
        ("phi3", {"intermediate_size": 97}, "", r"down_proj.weight is \[64, 96\].*\(hidden_size, intermediate"),
    ],
)  # fmt: skip
def test_tensors_refused(tmp_path, family, config, tensors, says):
    with pytest.raises(PortError, match=says):
        port(altered(tmp_path, family, config, lambda t: t.pop(tensors, None)))


def test_a_tensor_that_cannot_be_cut_is_named(tmp_path):
    def narrower(t):
        t["transformer.h.1.attn.c_attn.weight"] = np.ascontiguousarray(t["transformer.h.1.attn.c_attn.weight"][:, :191])

    says = r"h.1.attn.c_attn.weight is \[64, 191\], from which the port takes parts \(T\|r.*cannot cut 191"
    with pytest.raises(PortError, match=says):
        port(altered(tmp_path, "gpt2", tensors=narrower))


def test_stored_types_refused(tmp_path):
    c = Checkpoint.open(tiny("olmo2", tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    c.entries[name] = replace(c.entries[name], dtype="F8_E4M3")
    with pytest.raises(PortError, match=r"up_proj.weight is stored as F8_E4M3; ports take F32, BF16, F16"):
        port(c)
