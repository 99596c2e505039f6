"""Search space of kernel_fit.py: the values that facts of a kernel may have, and kernels from which searches start.

A fact is a discrete property of a kernel, such as its tiles: a field of KernelLibrary that has one value on every chip.
"""

from __future__ import annotations

from typing import Any

FLAG = (False, True)
CUTLASS = tuple((m, n) for m in (64, 128, 256) for n in (32, 64, 128, 256) if m * n <= 32768)  # tiles of its kernels
CORE_RATES = (0.0, *(round(2 * 1.2**i, 1) for i in range(18)))  # bytes a cycle
TILE_CYCLES = (0.0, *(float(round(250 * 2 ** (i / 2), -1)) for i in range(13)))  # up to 16,000
EIGHT_BITS = ("kv_native", "kv_dequant_ops", "kv_quant_cycles", "kv_cast_bytes")  # facts without effect on bf16 caches
FACTS: dict[str, dict[str, tuple[Any, ...]]] = {  # op -> field -> alternatives
    "products": {
        "persistent": FLAG, "quantise_launches": (0, 1, 2, 3), "quantise_bytes": (2.0, 3.0, 5.0, 8.0, 12.0),
        "row_cycles": (0.0, 350.0, 500.0, 1000.0, 1500.0, 2000.0), "core_bytes_per_cycle": CORE_RATES,
        "matmul_stages": (4, 8), "tiles": (CUTLASS,), "split_k": ((1,), (1, 2, 3, 4, 6, 8, 16, 32)),
    },
    "prefill": {
        "kv_native": FLAG, "pack_gqa": FLAG, "persistent": FLAG, "key_tile": (16, 32, 64, 128),
        "query_tiles": ((16,), (32,), (64,), (128,), (64, 128), (128, 256), (256,)),
        "softmax_overlap": (0.0, 0.3, 0.6, 0.9), "attention_launches": (2, 3, 4), "kv_row_cycles": (5, 10, 20, 40, 120),
        "kv_dequant_ops": (2, 8, 24), "kv_quant_cycles": (0.0, 0.2, 0.7),
        "prefill_window_keys": (1, 256, 1024, 1536, 1_000_000), "key_tile_cycles": TILE_CYCLES,
        "core_bytes_per_cycle": CORE_RATES[5:12:2], "fused_rotation": FLAG,
    },
    "decode": {
        "kv_native": FLAG, "split_mha": FLAG, "merge_launch": FLAG, "pack_windowed": FLAG,
        "key_tile": (16, 32, 64, 128), "half_burst_cost": (1.0, 1.3, 2.0), "attention_launches": (2, 3, 4),
        "decode_jobs": (1, 2, 4), "decode_waits": (1, 2, 3, 5), "decode_stages": (2, 4), "min_query_rows": (1, 16, 64),
        "kv_splits": ((1,), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64, 128), (8,), (16,)),
        "window_min_keys": (1, 256, 1024), "kv_dequant_ops": (2, 8, 24), "kv_cast_bytes": (0.0, 5.0, 8.0, 11.0),
        "pack_most": (8, 16, 32, 1_000_000), "key_tile_cycles": TILE_CYCLES,
        "whole_key_tiles": FLAG, "core_bytes_per_cycle": CORE_RATES[5:12:2],
        "fused_rotation": FLAG,
    },
    "experts": {
        "experts_native": FLAG, "expert_tiles": ("best", "by_experts", "by_tokens"), "expert_fused_activation": FLAG,
        "expert_all_rows": FLAG, "expert_permute": FLAG, "w4_dequant_ops": (0.0, 1.0, 2.0, 4.0, 8.0),
        "routing_launches": (1, 3, 5, 8), "expert_stages": (2, 4),
        "expert_rows": ((16, 32, 64, 128, 256), (16, 32, 64), (64, 128), (128,), (64,)),
        "expert_columns": ((64, 128, 256), (128,), (64,)),
    },
    "collectives": {"switch_reduce_min_chips": (2, 4, 8, 16)},
    "recurrent": {
        "scan_kernels": (1, 6), "row_cycles": (0.0, 60.0, 100.0, 150.0, 200.0, 8e3, 16e3, 32e3),
        "core_bytes_per_cycle": CORE_RATES,
    },
}  # fmt: skip
STARTS = ("", "hopper", "blackwell")  # libraries whose facts a search starts from; "": the chip's own
ATTENTION = ("prefill", "decode")  # ops whose kernels differ between generations more often: of these only the own
MENUS: dict[str, tuple[dict[str, Any], ...]] = {  # op -> facts of well-known kernels, from which a search starts too
    "products": (  # CUTLASS's scaled products: one kernel quantises rows of the activations before them
        {"tiles": CUTLASS, "split_k": (1,), "quantise_launches": 1, "quantise_bytes": 5.0},
        {"split_k": (1,), "quantise_launches": 1, "quantise_bytes": 5.0, "row_cycles": 1500.0},
        {"quantise_launches": 1, "quantise_bytes": 3.0},
        {"persistent": True},
    ),
    "prefill": (
        {"fused_rotation": True, "core_bytes_per_cycle": 7.2},  # TensorRT-LLM
        # Triton's kernels: no packing, and each product waits for the softmax before it
        {"query_tiles": (64,), "key_tile": 64, "pack_gqa": False, "softmax_overlap": 0.0, "kv_native": False},
    ),
    "decode": (
        {"fused_rotation": True, "core_bytes_per_cycle": 7.2, "whole_key_tiles": False},
        {"key_tile": 32, "kv_splits": (8,), "merge_launch": True, "min_query_rows": 16, "kv_native": False},
    ),
    "experts": (  # fused products of TensorRT-LLM and CUTLASS
        {"expert_tiles": "best", "expert_fused_activation": True, "expert_all_rows": False, "routing_launches": 3},
    ),
    "collectives": (),
    "recurrent": ({"scan_kernels": 1, "row_cycles": 16e3},),
}  # fmt: skip
