"""Gemma 3n against transformers, for random configurations: logits, bits in random chunks, sharded; and refusals.

INTAGLIO_GEMMA3N_CASES sets how many configurations are tried (3). Relative logit error is max |ours - theirs| / max
|theirs|, in float32.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from support.tiny import compare, drawn, error, tiny, truth

from intaglio.batch import Chunk, bind
from intaglio.compiler import LayoutError, build, build_mesh
from intaglio.devices import MeshDevice, StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, PortError, account, port, port_config

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")
CASES = int(os.environ.get("INTAGLIO_GEMMA3N_CASES", "3"))
LIMIT = 2e-4
TOKENS = 40
SLIDING, FULL = "sliding_attention", "full_attention"


def random_settings(rng: np.random.Generator) -> dict[str, object]:
    """Keys of config.json for a tiny model: heads, widths, windows, shared layers, streams and sparsity at random."""
    n = int(rng.integers(2, 6))
    shared = int(rng.integers(0, n - 1))
    kinds = [str(x) for x in rng.choice([SLIDING, FULL], n)]
    own = sorted(set(kinds[: n - shared]))
    kinds = [k if k in own else own[0] for k in kinds]
    heads, kv_heads = ((4, 2), (4, 1), (6, 2), (4, 4), (3, 1))[int(rng.integers(5))]
    streams = int(rng.integers(1, 5))
    return {
        "num_hidden_layers": n, "num_kv_shared_layers": shared, "layer_types": kinds,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 2 * int(rng.integers(4, 14)),
        "hidden_size": heads * int(rng.integers(11, 25)), "sliding_window": int(rng.integers(2, 30)),
        "intermediate_size": [int(x) for x in rng.integers(31, 110, n)],
        "activation_sparsity_pattern": [float(x) for x in rng.choice([0.0, 0.3, 0.5, 0.9], n)],
        "altup_num_inputs": streams, "altup_active_idx": int(rng.integers(streams)),
        "altup_correct_scale": bool(rng.integers(2)), "laurel_rank": int(rng.integers(1, 20)),
        "hidden_size_per_layer_input": int(rng.integers(1, 20)),
        "vocab_size_per_layer_input": int(rng.integers(257, 300)), "tie_word_embeddings": bool(rng.integers(2)),
        "attention_bias": bool(rng.integers(2)), "final_logit_softcapping": float(rng.integers(5, 40)),
        "hidden_activation": ("gelu_pytorch_tanh", "silu")[int(rng.integers(2))],
    }  # fmt: skip


@pytest.mark.parametrize("case", range(CASES))
def test_random_configurations(tmp_path, case, rng):
    settings = random_settings(rng)
    path = tiny("gemma3n", tmp_path / "model", **settings)
    if rng.random() < 0.3:  # streams below the least root mean square
        held = safetensors.load_file(path / "model.safetensors")
        held |= {name: x * 1e-4 for name, x in held.items() if ".altup_projections." in name}
        safetensors.save_file(held, path / "model.safetensors", {"format": "pt"})
    program = port(Checkpoint.open(path))
    errors = compare(path, "host", program=program, steps=4, seed=int(rng.integers(1 << 20)))
    assert max(errors.values()) < LIMIT, (errors, settings)

    ids = drawn(path, rng, program.vocabulary, TOKENS)
    wanted = truth(path, ids)
    ex = open_device("host").load(build(program), Checkpoint.open(path), StateSpec(9, 16))
    whole = logits(ex, ids, [TOKENS])
    assert error(whole, wanted) < LIMIT, settings
    cuts = sorted(int(x) for x in rng.choice(np.arange(1, TOKENS), int(rng.integers(1, 9)), replace=False))
    np.testing.assert_array_equal(logits(ex, ids, [*cuts, TOKENS]), whole, err_msg=f"{cuts} {settings}")
    for layout in ("tp2", "pp2"):
        if layout == "tp2" and settings["num_attention_heads"] % 2:
            with pytest.raises(LayoutError, match="which tp=2 does not divide; use tp=1, 3"):
                build_mesh(program, layout)
            continue
        mesh = build_mesh(program, layout)
        sharded = MeshDevice(open_device("host")).load(mesh, Checkpoint.open(path), StateSpec(9, 16))
        got = logits(sharded, ids, [TOKENS])
        assert error(got, wanted) < LIMIT, (layout, settings)


def logits(ex, ids: list[int], stops: list[int]) -> np.ndarray:
    """The logits [tokens, vocabulary] of a prompt run in chunks that end at `stops`."""
    out, at = [], 0
    for stop in stops:
        chunk = Chunk(ids[at:stop], at, [3, 1, 2], range(stop - at))
        out.append(ex.step(StepRequest(bind([chunk], 16), logits=True)).logits)
        at = stop
    return np.concatenate(out)


def test_tensors_of_shared_layers_and_of_other_parts_are_accounted_for(tmp_path):
    """A checkpoint as released: with a wrapper's names, K and V projections of sharing layers, and other towers."""
    path = tiny("gemma3n", tmp_path / "text")
    ids = list(range(100, 120))
    wanted = truth(path, ids)
    held = safetensors.load_file(path / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): x.contiguous() for name, x in held.items()}
    extra = ("k_proj", "v_proj", "k_norm")
    for i, source in ((4, 0), (5, 2)):
        at = "model.language_model.layers.{}.self_attn.{}.weight"
        named |= {at.format(i, x): named[at.format(source, x)].clone() for x in extra}
    named["model.audio_tower.conformer.0.norm.weight"] = named["model.language_model.norm.weight"].clone()
    text = json.loads((path / "config.json").read_text())
    whole = {
        "architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "text_config": text,
        "audio_config": {"model_type": "gemma3n_audio"}, "dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(whole))
    safetensors.save_file(named, path / "model.safetensors", {"format": "pt"})
    found = account(path)
    unused = {t.name: t.why for t in found.tensors if t.fate != "used"}
    assert set(unused) == {
        n for n in named if "audio" in n or any(f"layers.{i}.self_attn.{x}." in n for i in (4, 5) for x in extra)
    }
    ex = open_device("host").load(port(Checkpoint.open(path)), Checkpoint.open(path), StateSpec(4, 16))
    assert error(logits(ex, ids, [20]), wanted) < LIMIT


def test_refusals():
    sizes = {
        "architectures": ["Gemma3nForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_kv_shared_layers": 1, "layer_types": [SLIDING, FULL, SLIDING, FULL], "vocab_size": 64,
    }  # fmt: skip
    assert port_config(sizes, 64).vocabulary == 64
    for change, wanted in (
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers=4; wanted 0 to 3"),
        ({"num_kv_shared_layers": 3}, "leaves no layer of type full_attention with a K/V cache of its own"),
        ({"altup_active_idx": 4}, "altup_active_idx=4; wanted 0 to 3"),
        ({"intermediate_size": [64, 64]}, "intermediate_size lists 2 layers but num_hidden_layers=4"),
        ({"intermediate_size": [64, 64, 64, 0]}, r"intermediate_size=\[64, 64, 64, 0\]; wanted integers of 1 or more"),
        ({"activation_sparsity_pattern": 1.0}, "activation_sparsity_pattern=.*; wanted numbers from 0 to below 1"),
        ({"activation_sparsity_pattern": [0, 0, "0", 0]}, "wanted numbers from 0 to below 1, one for each layer"),
        ({"use_bidirectional_attention": True}, "attention is causal here"),
    ):
        with pytest.raises(PortError, match=wanted):
            port_config(sizes | change, 64)


def test_layers_stay_with_the_cache_that_they_read():
    sizes = {
        "architectures": ["Gemma3nForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
        "num_kv_shared_layers": 2, "layer_types": [*[SLIDING] * 5, FULL, SLIDING, FULL], "vocab_size": 64,
    }  # fmt: skip
    program = port_config(sizes, 64)
    assert len(build_mesh(program, "pp4").programs) == 4
    with pytest.raises(LayoutError, match="whose K/V cache or chosen positions they read; use pp4"):
        build_mesh(program, "pp6")
