"""GGUF files of models with recurrent state: llama.cpp computes the logits that Intaglio computes from the same file.

Needs llama-cpp-python (pip install '.[bench]'); skipped without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_files import write
from support.published import logits
from support.tiny import VOCABULARY, error, tiny

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
TOKENS = list(range(40))
NETS = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "mlp_only_layers": []}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
WHOLE = {"head_dim": 64, "rope_parameters": ROPE}  # with room for the sections of rope that Qwen3.5's files have
SSM = {"mamba_expand": 2, "mamba_d_head": 16}
ROWS: dict[str, dict[str, Any]] = {  # with the sizes that llama.cpp takes for granted
    "qwen3_next": NETS,
    "qwen3_5": NETS | WHOLE,
    "qwen3_5_moe": NETS | WHOLE,
    "granitemoehybrid": SSM,
    "granitemoehybrid_dense": SSM | {"intermediate_size": 72},
    "mamba": {"intermediate_size": 128, "expand": 2, "use_bias": False},
    "mamba2": {"time_step_limit": [0.0, float("inf")], "use_bias": False},
    "jamba": {"mamba_expand": 2},
    "falcon_h1": {},
    "nemotron_h": {"time_step_min": 0.001},
    "lfm2": {"block_auto_adjust_ff_dim": False, "conv_bias": False},
}


def by_llama_cpp(file: Path) -> np.ndarray:
    """llama.cpp's logits [tokens, vocabulary] of TOKENS, with K and V in float32."""
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {file}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(TOKENS), VOCABULARY)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)
    return found


@pytest.mark.parametrize("family", ROWS)
def test_logits(tmp_path, family):
    """Sums of up to 100 products in float32 in another order: 100 * 2^-24, and some layers."""

    def more(w: Any) -> None:
        w.add_tokenizer_model("no_vocab")
        w.add_vocab_size(VOCABULARY)

    file, _, _ = write(tiny(family, tmp_path / "source", **ROWS[family]), tmp_path / "out", extra=more)
    ours = logits(file, "host", tokens=TOKENS)
    assert error(ours, by_llama_cpp(file)) < 1e-4
