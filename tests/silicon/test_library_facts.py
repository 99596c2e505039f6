"""Effects of a kernel library's fields on modelled times: native 8-bit kernels, packing, warm caches, PCIe bridges."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.chips import ChipError, target
from intaglio.codesign.validate import predict, timing
from intaglio.silicon.kernels.attend import attend_timing
from intaglio.silicon.kernels.collectives import collective_timing
from intaglio.silicon.kernels.experts import experts_timing, grouped_target, grouped_timing
from intaglio.silicon.kernels.kv_write import Heads
from intaglio.silicon.kernels.tiling import tiling

B200, H100, L40S = target("b200_sxm"), target("h100_sxm"), target("l40s")


@pytest.mark.parametrize("name", ["h100_sxm", "b200_sxm", "l40s"])
def test_fp8_experts_are_faster_than_bf16_except_by_the_kernel_that_converts_them(name: str) -> None:
    layer = 512, 8, (32,) * 128, 128, 4096, 1536
    bf16, fp8 = (experts_timing(target(name), *layer, f, f).seconds for f in ("bf16", "e4m3"))
    assert fp8 < bf16
    if name == "h100_sxm":
        slow = experts_timing(target(name), *layer, "e4m3", "e4m3", kernel="flashinfer_cutlass_per_tensor").seconds
        assert slow > 1.5 * bf16


def test_experts_whose_rows_are_copied_first_or_whose_weights_are_converted_take_longer() -> None:
    counts, hidden = (64,) * 128, 4096
    for x_format, w_format, x_bytes in (("bf16", "bf16", 2), ("bf16", "e2m1", 2), ("e4m3", "e2m1", 1)):
        layer = 2048, 4, counts, 128, hidden, 1536, x_format, w_format
        plain, permuted, converted = (
            experts_timing(B200.with_library(**fact), *layer).seconds
            for fact in ({}, {"expert_permute": True}, {"w4_dequant_ops": 8.0})
        )
        copied_s = sum(counts) * hidden * 2 * x_bytes / B200.chip.l2_rate
        assert permuted - plain > B200.library.launch_s + copied_s
        assert (converted > plain) == (x_format == "bf16" and w_format == "e2m1")


def test_weights_read_by_half_bursts_move_more_bytes_from_hbm_but_not_from_the_l2() -> None:
    a100 = target("a100_sxm")  # more tokens than experts: steps of 64 bytes
    whole, half = (
        grouped_timing(a100.with_library(half_burst_cost=cost), 64, (64,) * 8, 2048, 4096, "bf16", "bf16", 16.0, 2.0)
        for cost in (1.0, 1.3)
    )
    assert half.weight_bytes == pytest.approx(1.3 * whole.weight_bytes)
    assert half.l2_bytes == pytest.approx(whole.l2_bytes) and half.seconds > whole.seconds


def test_native_8_bit_attention_is_faster_than_with_conversion() -> None:
    h = Heads(32, 8, 128, 128, bits=8)
    for q in (1, 2048):
        native = attend_timing(B200, h, ((q, 8192, 8),)).seconds
        converted = attend_timing(B200.with_library(kv_native=False), h, ((q, 8192, 8),)).seconds
        assert native < converted


def test_a_head_width_without_a_kernel_falls_back() -> None:
    seconds = {d: attend_timing(B200, Heads(32, 8, d, d, bits=8), ((2048, 2048, 8),)).seconds for d in (128, 192)}
    assert seconds[192] > 4 * seconds[128]


def test_a_warm_cache_is_no_slower_and_large_caches_are_not_warm() -> None:
    h = Heads(32, 8, 128, 128)
    small, large = ((1, 2048, 4),), ((1, 8192, 64),)
    assert attend_timing(B200, h, small, warm=True).seconds < attend_timing(B200, h, small).seconds
    assert attend_timing(B200, h, large, warm=True).seconds == attend_timing(B200, h, large).seconds


def test_a_window_keeps_heads_from_being_packed_on_ada() -> None:
    windowed, packed = Heads(32, 4, 128, 128, window=4096), L40S.with_library(pack_windowed=True)
    assert (
        attend_timing(L40S, windowed, ((1, 4096, 64),)).seconds
        > attend_timing(packed, windowed, ((1, 4096, 64),)).seconds
    )
    plain = Heads(32, 4, 128, 128)
    assert attend_timing(L40S, plain, ((1, 4096, 64),)) == attend_timing(packed, plain, ((1, 4096, 64),))


def test_kernels_that_process_keys_before_a_window_take_longer_and_at_most_as_long_as_without_one() -> None:
    windowed, whole = Heads(16, 4, 128, 128, window=512), Heads(16, 4, 128, 128)
    seconds = [
        attend_timing(H100.with_library(prefill_window_keys=least), windowed, ((8192, 8192, 2),)).seconds
        for least in (1, 512, 2048, 4096, 1_000_000)
    ]
    assert seconds[0] == seconds[1] < seconds[2] < seconds[3] < seconds[4]
    assert seconds[4] == pytest.approx(attend_timing(H100, whole, ((8192, 8192, 2),)).seconds, rel=0.02)


def test_kernels_that_quantise_row_by_row_take_longer_only_with_many_rows() -> None:
    by_row = H100.with_library(row_cycles=1500.0)
    for m, longer in ((8, False), (8192, True)):
        row = {"m": str(m), "n": "512", "k": "512", "dtype": "fp8"}
        plain, slow = (predict(on, "matmul", [row])[0] for on in (H100, by_row))
        assert (slow > plain + 20) == longer and slow >= plain
    without = H100.with_library(quantise_launches=0)
    assert predict(without, "matmul", [row])[0] < predict(H100, "matmul", [row])[0]


def test_large_groups_of_heads_that_are_not_packed_take_longer() -> None:
    limited = H100.with_library(pack_most=32)
    for group, longer in ((32, False), (64, True)):
        h = Heads(group, 1, 128, 128)
        packed, apart = (attend_timing(on, h, ((1, 512, 256),)).seconds for on in (H100, limited))
        assert apart > 2 * packed if longer else apart == packed


def test_a_kernel_that_converts_the_cache_beforehand_takes_longer_with_8_bits_only() -> None:
    casts = H100.with_library(kv_cast_bytes=8.0)
    row = {"batch": "64", "query_len": "1", "context_len": "8191", "n_heads": "16"}
    for dtype, longer in (("fp8", True), ("bfloat16", False)):
        plain, slow = (predict(on, "mla_decode", [{**row, "kv_dtype": dtype}])[0] for on in (H100, casts))
        assert slow > 2 * plain if longer else slow == plain


def prompt_row(batch: int, tokens: int, heads: int, kv: int, d: int, dtype: str = "bfloat16") -> dict[str, str]:
    """A row of a table of prefill attention, without cached keys and without a window."""
    numbers = {"batch": batch, "query_len": tokens, "context_len": 0, "n_heads": heads, "n_kv_heads": kv, "head_dim": d}
    return {name: str(value) for name, value in numbers.items()} | {"window": "0", "kv_dtype": dtype}


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 64), tokens=st.integers(2, 2048), kv=st.integers(1, 16), group=st.sampled_from([1, 4, 8]),
    d=st.sampled_from([64, 128, 256]), dtype=st.sampled_from(["bfloat16", "fp8"]),
)  # fmt: skip
def test_slow_cores_before_attention_take_longer_and_one_kernel_moves_the_fewest_bytes(
    batch: int, tokens: int, kv: int, group: int, d: int, dtype: str
) -> None:
    """One kernel that rotates and caches reads keys and values once: batch * tokens * kv * d * 4 bytes less."""
    row = prompt_row(batch, tokens, kv * group, kv, d, dtype)
    fast, slow = (
        predict(H100.with_library(fused_rotation=True, core_bytes_per_cycle=rate), "attention_prefill", [row])[0]
        for rate in (0.0, 7.2)
    )
    moved = batch * tokens * d * kv * (4 * group + 4 + (4 if dtype == "bfloat16" else 2))
    rates = H100.chip.hbm_rate, 7.2 * H100.chip.cores * H100.chip.clock_hz
    assert slow - fast == pytest.approx((moved / rates[1] - moved / rates[0]) * 1e6, rel=1e-6)
    apart, one = (timing(H100.with_library(fused_rotation=f), "attention_prefill", row) for f in (False, True))
    assert apart.hbm_bytes - one.hbm_bytes == pytest.approx(batch * tokens * d * kv * 4)


@settings(max_examples=40, deadline=None)
@given(
    q=st.sampled_from([1, 128, 1024]), keys=st.integers(1, 8192), batch=st.integers(1, 512), kv=st.integers(1, 8),
    few=st.floats(0, 4000), more=st.floats(0, 4000),
)  # fmt: skip
def test_cycles_of_a_tile_and_waits_of_a_job_never_shorten_attention(
    q: int, keys: int, batch: int, kv: int, few: float, more: float
) -> None:
    h, part = Heads(8 * kv, kv, 128, 128), ((q, q + keys, batch),)
    one, other = (
        attend_timing(H100.with_library(key_tile_cycles=cycles), h, part).seconds for cycles in (few, few + more)
    )
    assert one <= other
    once, twice = (attend_timing(H100.with_library(decode_waits=n), h, part).seconds for n in (1, 2))
    assert once < twice if q == 1 else once == twice
    whole, rest = (attend_timing(H100.with_library(whole_key_tiles=f), h, part).seconds for f in (True, False))
    assert rest <= 1.001 * whole  # less is read, so a larger part of it comes from HBM


def test_a_context_of_one_key_is_read_alone_by_kernels_that_do_not_read_whole_tiles() -> None:
    h, part = Heads(16, 16, 256, 256), ((1, 1, 2048),)
    whole, one = (attend_timing(H100.with_library(whole_key_tiles=f), h, part).seconds for f in (True, False))
    assert one < whole / 4


def test_cards_of_a_pcie_tree_share_the_hosts_bridges() -> None:
    moved = 1 << 28
    two, four, eight = (collective_timing(L40S, "all_reduce", n, moved).seconds for n in (2, 4, 8))
    assert four > 2 * two and eight > 1.8 * four
    with pytest.raises(ChipError, match=r"host_links=0.*; a pcie_tree needs more than 0"):
        L40S.with_chip(host_links=0.0)


def test_all_reduce_in_the_switch_is_a_fact_of_the_library() -> None:
    faster = B200.with_library(switch_reduce_min_chips=8)
    assert collective_timing(faster, "all_reduce", 8, 1 << 28).seconds < 0.9 * (
        collective_timing(B200, "all_reduce", 8, 1 << 28).seconds
    )


def test_a_chip_too_small_for_every_tile_of_experts_is_refused() -> None:
    small = H100.changed({"chip.name": "tiny", "chip.acc_bytes": 8192, "library.tiles": ((16, 64),)})
    with pytest.raises(ChipError, match=r"no tile of experts in library 'hopper', rows \(64,\) .*, fits chip 'tiny'"):
        grouped_target(small, 512, 8)
    on = grouped_target(H100, 512, 8)
    assert on.library.tiles == ((64, 128),) and on.library.mxu_efficiency == H100.library.grouped_mxu_efficiency


def test_steps_over_k_are_shorter_where_no_tile_fits_a_whole_one() -> None:
    sohu = target("sohu")
    whole = tiling(sohu, (700, 1024, 4096), "f32", "bf16", 16.0)
    small = sohu.with_chip(sram_bytes=sohu.chip.sram_bytes // 4)
    short = tiling(small, (700, 1024, 4096), "f32", "bf16", 16.0)
    assert whole.depth >= 2 * short.depth >= 2
    assert {(c.rows, c.columns) for c in (whole, short)} <= set(sohu.library.tiles)
