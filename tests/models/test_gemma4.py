"""Gemma 4 against transformers, for random configurations: logits of prefill, chunks and decode, and sharded; refusals.

Layers share K/V caches, have experts beside their MLP, per-layer embeddings, keys that serve as values, at random.
INTAGLIO_GEMMA4_CASES sets how many configurations are tried (3).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from support.tiny import compare, compare_sharded, tiny

from intaglio.compiler import build_mesh
from intaglio.models import Checkpoint, PortError, port, port_config

pytest.importorskip("transformers")
CASES = int(os.environ.get("INTAGLIO_GEMMA4_CASES", "3"))
LIMIT = 2e-4
SLIDING, FULL = "sliding_attention", "full_attention"


def random_settings(rng: np.random.Generator) -> dict[str, object]:
    """Keys of config.json for a tiny model. The last layer has full attention, as in every Gemma 4.

    transformers cannot run layers that share caches without per-layer embeddings, and does not save equal widths of
    heads in layers with full attention and with windows.
    """
    n = int(rng.integers(2, 7))
    shared = int(rng.integers(0, n))
    kinds = [*(str(x) for x in rng.choice([SLIDING, FULL], n - 1)), FULL]
    own = sorted(set(kinds[: n - shared]))
    if shared and FULL not in own:
        shared = 0
    kinds = [k if k in own or not shared else own[0] for k in kinds]
    heads, kv_heads = ((4, 2), (4, 1), (6, 2), (4, 4), (2, 1))[int(rng.integers(5))]
    width = heads * int(rng.integers(11, 25))
    experts = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": int(rng.integers(1, 5)),
               "moe_intermediate_size": int(rng.integers(20, 60))} if rng.integers(2) else {}  # fmt: skip
    return experts | {
        "num_hidden_layers": n, "num_kv_shared_layers": shared, "layer_types": kinds, "hidden_size": width,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": int(rng.choice([10, 12, 14, 18, 22])), "global_head_dim": 8 * int(rng.integers(1, 5)),
        "num_global_key_value_heads": 1,
        "sliding_window": int(rng.integers(2, 30)), "intermediate_size": int(rng.integers(31, 110)),
        "use_double_wide_mlp": bool(rng.integers(2)), "attention_k_eq_v": bool(rng.integers(2)),
        "hidden_size_per_layer_input": int(rng.integers(min(shared, 1), 20)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "vocab_size_per_layer_input": int(rng.integers(263, 270)), "attention_bias": bool(rng.integers(2)),
        "final_logit_softcapping": float(rng.integers(5, 40)) if rng.integers(2) else None,
        "hidden_activation": ("gelu_pytorch_tanh", "silu")[int(rng.integers(2))],
    }  # fmt: skip


@pytest.mark.parametrize("case", range(CASES))
def test_random_configurations(tmp_path, case, rng):
    settings = random_settings(rng)
    path = tiny("gemma4", tmp_path / "model", **settings)
    errors = compare(path, "host", steps=4, seed=int(rng.integers(1 << 20)))
    assert max(errors.values()) < LIMIT, (errors, settings)
    compare_sharded(path, LIMIT)


def test_layers_that_read_other_caches_have_no_keys_of_their_own(tmp_path):
    program = port(Checkpoint.open(tiny("gemma4_shared", tmp_path / "model")))
    assert {n for n in program.tensors if n.endswith("k_cache")} == {f"layers.{i}.attn.k_cache" for i in range(3)}
    assert not any(f"layers.{i}.attn.{x}_proj.weight" in program.tensors for i in (3, 4, 5) for x in "kv")
    widths = [program.tensors[f"layers.{i}.mlp.gate_proj.weight"].shape[0] for i in range(6)]
    assert widths == [96, 96, 96, 192, 192, 192]
    assert len(build_mesh(program, "pp2").programs) == 2


def test_refusals():
    sizes = {
        "architectures": ["Gemma4ForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, FULL], "vocab_size": 64,
    }  # fmt: skip
    assert port_config(sizes, 64).vocabulary == 64
    other = {str(i): {"head_dim": 64 if i == 3 else 32} for i in range(4)}
    for change, wanted in (
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers=4; wanted 0 to 3"),
        ({"num_kv_shared_layers": 3}, "leaves no layer of type full_attention with a K/V cache of its own"),
        ({"per_layer_config": other}, "layer 3 has head_dim=64, .* wanted 32 and 4 as in layer 1, whose keys"),
        ({"enable_moe_block": True}, "num_experts"),
        ({"use_bidirectional_attention": "all"}, "attention is causal here"),
    ):
        with pytest.raises(PortError, match=wanted):
            port_config(sizes | change, 64)
