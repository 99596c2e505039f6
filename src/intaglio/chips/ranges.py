"""Allowed ranges of the numbers in chip and kernel library files.

They are wide enough for any machine, and narrow enough to catch a number that is wrong by many digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Range = tuple[float, float]

RATE: Range = (1, 1e9)  # values or bytes a cycle
BYTES: Range = (1, 1e18)
CHIP: dict[str, Range] = {
    "cores": (1, 1e6), "clock_hz": (1e3, 1e12), "array_shape": (1, 1e5), "array_depth": (0, 1e6), "sram_bytes": BYTES,
    "sram_bytes_per_cycle": RATE, "acc_bytes": BYTES, "vec_lanes": RATE, "exp_lanes": RATE, "att_lanes": (0, 1e9),
    "port_bytes_per_cycle": RATE, "l2_bytes": (0, 1e18), "l2_bytes_per_cycle": RATE, "hbm_bytes": BYTES,
    "hbm_bytes_per_s": (1, 1e18), "tdp_w": (1e-3, 1e6),
}  # fmt: skip
LINKS: dict[str, Range] = {
    "count": (0, 1e6), "bytes_per_s": (0, 1e18), "max_chips": (1, 1e9), "host_links": (0, 1e6),
    "node_bytes_per_s": (0, 1e18), "node_latency_s": (0, 1),
}  # fmt: skip
ENERGY: dict[str, Range] = {name: (0, 1) for name in ("mac", "hbm_byte", "l2_byte", "link_byte")} | {"idle_w": (0, 1e6)}
CONSTANTS: dict[str, Range] = {"hbm_latency_s": (0, 1)}

NATURAL: Range = (1, 1e9)
AMOUNT: Range = (0, 1e9)
SECONDS: Range = (0, 1)
LIBRARY: dict[str, Range] = {
    "memory_factor": (1e-3, 1e3),
    **dict.fromkeys(("launch_s", "barrier_s", "link_latency_s", "small_reduce_s", "softmax_overlap"), SECONDS),
    **dict.fromkeys(
        (
            "activation_bytes", "burst_bytes", "tiles", "split_k", "matmul_stages", "key_tile", "query_tiles",
            "fused_query_tiles", "min_query_rows", "kv_splits", "decode_jobs", "decode_waits", "decode_stages",
            "window_min_keys",
            "expert_rows", "expert_columns", "expert_stages", "vector_load_values", "l2_multicast",
            "attention_launches", "prefill_window_keys", "pack_most", "scan_kernels",
        ),
        NATURAL,
    ),
    **dict.fromkeys(
        (  "half_burst_cost", "kv_dequant_ops", "kv_row_cycles", "kv_quant_cycles", "unaligned_row_cost",
            "fp8_dequant_ops", "fp8_load_bytes_per_cycle", "fp8_overfetch",
            "routing_launches", "routing_ops", "switch_reduce_min_chips", "quantise_launches", "quantise_bytes",
            "row_cycles", "key_tile_cycles", "kv_cast_bytes", "core_bytes_per_cycle", "w4_dequant_ops",
        ),
        AMOUNT,
    ),
}  # fmt: skip


def outside(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> str:
    """Returns an error text for the first of `values` that is not allowed; "" if all are allowed.

    A value is not allowed if it is NaN, outside its range or an empty tuple. values: {name: a number, or a tuple of
    numbers}. ranges: {name: (least, most)}. Values without a range are not checked. A range without a value raises
    KeyError.
    """
    for name, (least, most) in ranges.items():
        value = values[name]
        numbers = list(_numbers(value))
        if not numbers or not all(least <= number <= most for number in numbers):
            return f"{name}={value}; allowed: {number(least)} to {number(most)}"
    return ""


def _numbers(value: Any) -> Iterator[float]:
    for item in value if isinstance(value, tuple) else [value]:
        yield from _numbers(item) if isinstance(item, tuple) else [item]


def number(value: float) -> str:
    """Returns a number as text for an error message, such as "1,000" or "0.5".

    From 1 to a million the number is rounded to a whole number. From a million on it has an exponent, such as "1e+12".
    """
    return f"{value:g}" if value >= 1e6 or 0 < value < 1 else f"{value:,.0f}"
