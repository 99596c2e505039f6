"""Closed forms of chip kernels against the simulator executing their instructions, and the L2 cache that both model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.silicon import SMALL, normal, run_kernel

from intaglio import formats
from intaglio.chips import CHIPS, Target, target
from intaglio.codesign.agreement import compare_kernel
from intaglio.codesign.kernel_cases import CASES, Case, batch_of, case, temp
from intaglio.ops import Attend, ChooseKeys, Decay, Embed, Linear, Norm, SelectiveScan, ShortConv, Tensor, Value
from intaglio.silicon.cache import LINE, Cache, lines_of
from intaglio.silicon.kernels import kernel_class
from intaglio.silicon.kernels.experts import expected_rows, experts_timing
from intaglio.silicon.kernels.product import time_choices
from intaglio.silicon.kernels.rows import RowsKernel
from intaglio.silicon.memory import Region, dense
from intaglio.silicon.sizes import BatchSizes, sizes_of

BY_ROWS = (
    "norm", "rope", "map", "embed", "select", "permute", "concat", "route", "sinusoid", "sample", "moment", "sinkhorn",
    "mix_streams", "pool_keys", "decay",
)  # fmt: skip


@pytest.mark.parametrize("kind", BY_ROWS)
def test_closed_form_and_machine_agree_on_kernels_that_work_row_by_row(kind: str, rng: np.random.Generator) -> None:
    """On any chip, within 5 % if operands and results fit the L2. Others were up to 7 % off, of 100 near its size."""
    on = target(str(rng.choice(sorted(CHIPS))))
    found = [compare_kernel(on, CASES[kind](rng, on)) for _ in range(2)]
    for a in found:
        op, tensors = a.case.op, a.case.tensors
        fits = kernel_class(op).of(op, tensors).time(on.with_library(activation_bytes=4), sizes_of(a.case.batch), False)
        usable = on.chip.l2_bytes * on.library.l2_usable
        evicts = usable and (fits.hbm_bytes or fits.l2_bytes > 0.95 * usable)
        assert abs(a.ratio - 1) < (0.15 if evicts else 0.05), (on.chip.name, a.ratio, a.case.words)


FOLLOWED = (
    "short_conv", "rg_lru", "selective_scan", "linear_attention", "choose_keys", "attend_chosen", "attend_pooled"
)  # fmt: skip


@pytest.mark.parametrize("kind", FOLLOWED)
def test_closed_form_and_machine_agree_on_followed_loops(kind: str, rng: np.random.Generator) -> None:
    """On any chip: the closed form follows every core, and the tiles in the L2."""
    on = target(str(rng.choice(sorted(CHIPS))))
    found = [compare_kernel(on, CASES[kind](rng, on)) for _ in range(2)]
    assert all(0.95 < a.ratio < 1.05 for a in found), [(on.chip.name, a.ratio, a.case.words) for a in found]


@pytest.mark.parametrize(("chip", "width"), [("a100_sxm", 3296), ("l40s", 800), ("tpu_v5e", 320)])
def test_first_column_of_a_transposed_state_brings_the_lines_of_the_others(chip: str, width: int) -> None:
    """The closed form loaded the columns of rates and state as one tile, and was up to 6 % off on an A100."""
    names = {"x": "x", "step": "d", "b": "b", "c": "c", "rate": "r", "skip": "k", "state": "s"}
    tensors = [temp(name, columns) for name, columns in (("x", width), ("d", width), ("b", 16), ("c", 16))]
    tensors += [Tensor("r", (width, 16), "f32", "weight"), Tensor("k", (width,), "f32", "weight")]
    tensors.append(Tensor("s", ("N", width, 16), "f32", "state"))
    call = case(SelectiveScan(site="s", **names, out="y"), tensors, batch_of([(1, 1)] * 3), "")
    assert 0.99 < compare_kernel(target(chip), call).ratio < 1.01


def test_an_indexer_multiplies_while_the_lanes_sum_and_choose() -> None:
    """The closed form kept an accumulator until the keys were chosen, and was 10 % slower than the machine."""
    op = ChooseKeys(site="c", q="q", weights="w", cache="k", chosen="c", heads=4, top=418)
    tensors = [temp("q", 4 * 64), temp("w", 4), Tensor("k", ("P", "B", 1, 64), "bf16", "state")]
    assert 0.99 < compare_kernel(target("trainium2"), case(op, tensors, batch_of([(14, 1820)]), "")).ratio < 1.01


def test_a_loop_that_just_outgrows_the_l2_waits_for_its_last_tiles() -> None:
    """On an L40S, 77.8 MB outgrow an L2 of 76.8 MB: some last tiles miss. The closed form was 8 % off."""
    op = Norm(site="n", x="x", weight="w", out="y", norm="rms", eps=1e-6, residual="r")
    tensors = [temp("x", 3168), temp("r", 3168), Tensor("w", (3168,), "bf16", "weight")]
    assert 0.95 < compare_kernel(target("l40s"), case(op, tensors, batch_of([(2047, 0)]), "")).ratio < 1.05


def test_a_decay_with_one_tile_computes_while_it_stores() -> None:
    """On an MI300X, whose cores have room for one tile of each result, the closed form was 9 % slower."""
    op = Decay(site="d", x="x", rate="r", bias="b", step="s", decay="d")
    tensors = [temp("x", 6656), Tensor("r", (104,), "f32", "weight"), Tensor("b", (6656,), "f32", "weight")]
    assert 0.99 < compare_kernel(target("mi300x"), case(op, tensors, batch_of([(602, 0)]), "")).ratio < 1.01


def test_neighbouring_jobs_share_lines_of_a_state() -> None:
    """Cores that load different numbers of lines do not keep in step. The closed form was 16 % off on an L40S."""
    op = ShortConv(site="c", x="x", w="w", state="s", out="y")
    tensors = [temp("x", 7248), Tensor("w", (7248, 3), "f32", "weight"), Tensor("s", ("N", 2, 7248), "f32", "state")]
    assert 0.98 < compare_kernel(target("l40s"), case(op, tensors, batch_of([(1, 1)] * 131), "")).ratio < 1.02


def test_indices_of_an_embedding_fit_beside_its_tiles() -> None:
    """The tiles of rows of 1,360 columns once took all SRAM of an mi355x core."""
    op = Embed(site="embed", tokens="t", w="w", out="y")
    tensors = [Tensor("t", ("T",), "i32", "input"), Tensor("w", (32000, 1360), "bf16", "weight")]
    for rows in (1, 27, 600):
        assert 0.9 < compare_kernel(target("mi355x"), case(op, tensors, batch_of([(rows, 0)]), "")).ratio < 1.1


@pytest.mark.parametrize("chip", ["a100_sxm", "h100_sxm", "b200_sxm", "tpu_v5e", "tpu_v7", "mi300x", "gaudi3", "sohu"])
@pytest.mark.parametrize("kind", ["attend", "kv_write"])
def test_closed_form_and_machine_agree_on_attention(chip: str, kind: str, rng: np.random.Generator) -> None:
    """Prompts, decoding sequences, windows and latent attention; see docs/accuracy.md for every chip."""
    on = target(chip)
    found = [compare_kernel(on, CASES[kind](rng, on)) for _ in range(4)]
    assert all(0.9 < a.ratio < 1.1 for a in found), [(a.ratio, a.case.words) for a in found]


def test_queries_that_outgrow_the_l2_come_from_hbm() -> None:
    """33 MB of latent queries outgrow an A100's L2, so HBM delivers the first: the closed form found them in the L2."""
    op = Attend(site="a", q="q", k_cache="kc", v_cache="kc", rope_cache="rc", out="y", heads=32, scale=0.1)
    caches = [Tensor(name, ("P", "B", 1, width), "bf16", "state") for name, width in (("kc", 512), ("rc", 64))]
    call = case(op, [temp("q", 32 * 576), *caches], batch_of([(450, 0)]), "")
    assert 0.99 < compare_kernel(target("a100_sxm"), call).ratio < 1.01


@pytest.mark.parametrize("keys,window", [(899, 332), (1794, 488), (828, 0)])
def test_prompts_wait_for_keys_that_no_earlier_job_has_read(keys: int, window: int) -> None:
    """Each round of jobs in a window reads new keys. The closed form let the first round alone wait: 2.03 times."""
    op = Attend(site="a", q="q", k_cache="k", v_cache="v", out="y", heads=6, scale=0.125, window=window)
    caches = [Tensor(name, ("P", "B", 3, 64), "bf16", "state") for name in ("k", "v")]
    call = case(op, [temp("q", 6 * 64), *caches], batch_of([(828, keys - 828)]), "")
    assert 0.9 < compare_kernel(target("sohu"), call).ratio < 1.1


@pytest.mark.parametrize("chip", ["h100_sxm", "mi300x"])
def test_a_library_reads_latents_once(chip: str) -> None:
    """The first 512 of a latent's 576 columns are also its value. They counted twice in modelled decoding."""
    widths, heads, sequences, keys = {"kc": 512, "rc": 64}, 16, 8, 4096
    op = Attend(
        site="a", q="q", k_cache="kc", v_cache="kc", rope_cache="rc", out="y", heads=heads, scale=0.1
    )  # fmt: skip
    caches = [Tensor(name, ("P", "B", 1, width), "bf16", "state") for name, width in widths.items()]
    call = case(op, [temp("q", heads * 576), *caches], batch_of([(1, keys - 1)] * sequences), "")
    taken = kernel_class(op).of(op, call.tensors).time(target(chip), sizes_of(call.batch), prefetched=False)
    assert taken.hbm_bytes == sequences * (keys * 576 + heads * (576 + 512)) * 2


def product(on: Target, m: int, n: int, k: int, format: str = "bf16") -> Case:
    """The call of a `linear`."""
    op = Linear(site="linear", x="x", w="w", out="y", x_format=format)
    return case(op, [temp("x", k), Tensor("w", (n, k), format, "weight")], batch_of([(m, 0)]), f"{m} {n} {k} {format}")


@pytest.mark.parametrize("kind", ["linear", "head_linear", "experts"])
@pytest.mark.parametrize("chip", ["sohu", "tpu_v5e", "trainium2"])
def test_closed_form_and_machine_agree_on_random_products(chip: str, kind: str, rng: np.random.Generator) -> None:
    """See docs/accuracy.md for more calls, on every chip. A few calls of any seed are within these bounds."""
    on = target(chip)
    found = [compare_kernel(on, CASES[kind](rng, on)) for _ in range(9)]
    assert all(1 / 1.1 < a.ratio < 1.1 for a in found), [(a.ratio, a.case.words) for a in found]
    assert np.median([abs(a.ratio - 1) for a in found]) < 0.02, [(a.ratio, a.case.words) for a in found]


@pytest.mark.parametrize("chip", ["sohu", "tpu_v5e", "a100_sxm", "h100_sxm", "l40s"])
def test_closed_form_and_machine_agree_on_a_product_of_a_layer(chip: str) -> None:
    """The streams once chose tiles of one row: 105 times the closed form on sohu, 5.5 on H100, 8 on A100."""
    assert 0.95 < compare_kernel(target(chip), product(target(chip), 256, 512, 512)).ratio < 1.05


@pytest.mark.parametrize(
    ("chip", "sizes", "format"),
    [
        ("sohu", (1033, 256, 960), "fp8row"),  # drained in two pieces, both before the first store
        ("sohu", (644, 1264, 1984), "bf16"),  # weights of the first step arrive while its x is loaded
        ("tpu_v5e", (1, 688, 448), "bf16"),  # the last tile has few columns
        ("tpu_v5e", (225, 2096, 768), "bf16"),  # stores beside loads, without an L2
        ("trainium2", (798, 3376, 576), "fp8row"),  # the first store starts when most operands are loaded
        ("gaudi3", (1499, 3840, 2240), "bf16"),  # later blocks of rows find the weights in the L2
        ("gaudi3", (878, 256, 4864), "bf16"),  # to add the parts of a split K takes the array's latency for every row
        ("gaudi3", (946, 1328, 1344), "bf16"),  # all weights have arrived after the first round of the first block
        ("tpu_v6e", (523, 224, 2880), "bf16"),  # the last tile has 11 rows of 256
        ("tpu_v7", (1649, 944, 448), "fp8row"),  # likewise, on two cores
        ("tpu_v7", (26, 1344, 7744), "fp8row"),  # the second tile's loads wait for stages one after the other
        ("tpu_v7", (25, 3296, 1344), "fp8row"),  # steps over K no longer end at copies of a row's scale
        ("tpu_v7", (914, 1968, 1024), "fp8row"),  # most loads have ended before the first store
        ("a100_sxm", (1387, 1680, 8000), "bf16"),  # with K split, partial sums would outgrow the L2
    ],
)
def test_causes_of_earlier_differences_of_products(chip: str, sizes: tuple[int, int, int], format: str) -> None:
    """Each of these calls was more than 8 % off before its cause was in the closed form."""
    on = target(chip)
    assert 0.94 < compare_kernel(on, product(on, *sizes, format)).ratio < 1.06


@settings(max_examples=15, deadline=None)
@given(
    chip=st.sampled_from(sorted(CHIPS)), narrow=st.booleans(), experts=st.sampled_from([8, 16, 64]),
    top=st.sampled_from([1, 2, 8]), hidden=st.integers(2, 64), inner=st.integers(2, 64), first=st.integers(1, 500),
)  # fmt: skip
@example(chip="mi300x", narrow=False, experts=8, top=2, hidden=2, inner=5, first=60)  # a second row hid latency
def test_more_tokens_of_experts_never_take_less_time(
    chip: str, narrow: bool, experts: int, top: int, hidden: int, inner: int, first: int
) -> None:
    """With the fastest tiles, for 30 numbers of tokens; see codesign/physics.py for libraries that choose by rule."""
    on = target(chip).with_library(expert_tiles="best")
    format = "e4m3" if narrow and "e4m3" in dict(on.chip.macs) else "bf16"
    seconds = [
        experts_timing(
            on,
            tokens,
            top,
            expected_rows(tokens, top, experts, experts),
            experts,
            64 * hidden,
            64 * inner,
            format,
            format,
        ).seconds
        for tokens in range(first, first + 30)
    ]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(seconds)), seconds


@settings(max_examples=20, deadline=None)
@given(
    chip=st.sampled_from(sorted(CHIPS)), n=st.integers(8, 1024), k=st.integers(4, 256), narrow=st.booleans(),
    out_bytes=st.sampled_from([2.0, 4.0]),
)  # fmt: skip
@example(chip="sohu", n=353, k=4, narrow=False, out_bytes=2.0)  # the edge tile's weights were loaded as of a whole tile
def test_more_rows_never_take_less_time(chip: str, n: int, k: int, narrow: bool, out_bytes: float) -> None:
    """With the fastest tiles of each number of rows, from one row to 600; to 1e-9, the rounding of float64."""
    on = target(chip)
    format = "e4m3" if narrow and "e4m3" in dict(on.chip.macs) else "bf16"
    rows = np.arange(1, 600)[:, None]
    how = time_choices(on, rows, 16 * n, 64 * k, format, format, formats.bits(format), out_bytes)
    seconds = how["seconds"].min(axis=1)
    assert (seconds[1:] >= seconds[:-1] * (1 - 1e-9)).all(), seconds


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), glu=st.booleans(), extras=st.booleans(), parts=st.sampled_from([2, 3, 5]))
def test_a_product_whose_k_is_split_has_the_values_of_its_reference(
    seed: int, glu: bool, extras: bool, parts: int
) -> None:
    """Parts of K are added in FP32: some more roundings than a product that is not split."""
    rng = np.random.default_rng(seed)
    on = SMALL.with_chip(cores=16).with_library(split_k=(parts,), tiles=((16, 32),))
    rows, k, n = int(rng.integers(1, 9)), 64 * int(rng.integers(24, 30)) + 6, 2 * int(rng.integers(2, 20))
    op = Linear(
        site="l", x="x", w="w", out="y", x_format="f32", glu=glu, activation="silu" if glu else "",
        bias="b" if extras else None, residual="r" if extras else None,
    )  # fmt: skip
    out = n // 2 if glu else n
    tensors = [temp("x", k), Tensor("w", (n, k), "f32", "weight"), Tensor("b", (n,), "f32", "weight"), temp("r", out)]
    values: dict[str, Value] = {
        "x": normal(rng, rows, k), "w": normal(rng, n, k), "b": normal(rng, n), "r": normal(rng, rows, out)
    }  # fmt: skip
    made = case(op, tensors, batch_of([(rows, 0)]), "")
    got, memory = run_kernel(on, op, made.tensors, values, made.batch)
    assert len(memory.launches) == 2
    want = op.reference(values, made.batch)["y"]
    tolerance = 4 * (k / 32 + 8) * float(np.finfo(np.float32).eps) * np.sqrt(k)
    np.testing.assert_allclose(got["y"], want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cache_evicts_only_to_make_room(data: st.DataObject) -> None:
    """Lines that it loses are written back if dirty; it is full from then on. With accesses of whole lines."""
    size = data.draw(st.integers(1, 12))
    cache, held, dirty = Cache(size * LINE), set[int](), set[int]()
    for _ in range(data.draw(st.integers(1, 30))):
        first, count, writes = data.draw(st.tuples(st.integers(0, 30), st.integers(1, 20), st.booleans()))
        touched = set(range(first, first + count))
        moved = cache.access(dense("hbm", first * LINE, 1, count * LINE, "int8"), writes)
        now = set(cache.slots[cache.slots >= 0].tolist())
        assert now <= held | touched and len(now) == cache.held == min(size, len(held | touched))
        dirty |= touched if writes else set()
        gone = (held | touched) - now
        assert moved == (len(touched - held) * (not writes) + len(gone & dirty)) * LINE
        held, dirty = now, dirty - gone


def test_misses_grow_gradually_where_an_array_outgrows_the_cache(rng: np.random.Generator) -> None:
    """The part that a second scan misses. If the least recently used lines were evicted, it would miss all of them."""
    lines, row, parts = int(rng.integers(4000, 8000)), 16, []
    for times in (1.0, 1.05, 1.2, 1.5, 2, 4):
        cache, rows = Cache(lines * LINE), int(lines * times) // row
        matrix = dense("hbm", 0, rows, row * LINE, "int8")
        scans = [[cache.access(matrix.part(slice(r, r + 1)), False) for r in range(rows)] for _ in range(2)]
        assert sum(scans[0]) == matrix.nbytes
        parts.append(sum(scans[1]) / matrix.nbytes)
    assert parts[0] == 0 and parts[-1] > 0.9 and all(0 < b - a < 0.5 for a, b in pairwise(parts)), parts


def test_columns_of_half_a_line_fetch_whole_lines_once() -> None:
    """Only their bytes counted once: weights that were read in steps of half a line took half of HBM's time."""
    matrix, cache = dense("hbm", 0, 8, 512, "int8"), Cache(100 * LINE)
    moved = [cache.access(matrix.part(cols=slice(i, i + LINE // 2)), False) for i in range(0, 512, LINE // 2)]
    assert moved == [8 * LINE, 0] * 4


def test_a_cache_without_lines_misses_always() -> None:
    region = dense("hbm", 0, 4, 100, "int8")
    assert [Cache(0).access(region, writes) for writes in (False, True)] == [400.0, 400.0]
    assert Cache(1000).access(dense("hbm", 0, 0, 100, "int8"), False) == 0


@settings(max_examples=60, deadline=None)
@given(address=st.integers(0, 999), rows=st.integers(1, 9), cols=st.integers(1, 400), gap=st.integers(0, 600))
def test_lines_of_a_region_are_those_of_its_bytes(address: int, rows: int, cols: int, gap: int) -> None:
    region = Region("hbm", address, rows, cols, cols + gap, "int8")
    touched = {(address + r * (cols + gap) + c) // LINE for r in range(rows) for c in range(cols)}
    assert set(lines_of(region).tolist()) == touched


@settings(max_examples=40, deadline=None)
@given(chip=st.sampled_from(sorted(CHIPS)), width=st.integers(64, 16384), data=st.data())
def test_an_elementwise_op_has_no_cliff_where_it_outgrows_the_l2(chip: str, width: int, data: st.DataObject) -> None:
    """One more row takes at least as long, and at most a few rows' time longer, at any size."""
    on = target(chip)
    edge = max(2, int(on.chip.l2_bytes * on.library.l2_usable / (3 * width * on.library.activation_bytes)))
    rows = data.draw(st.integers(max(1, edge - 2), 2 * edge + 2))
    one = RowsKernel("T", width, 3)
    fewer, more = (one.time(on, BatchSizes(n, 1, ((n, n, 1),)), False).seconds for n in (rows, rows + 1))
    alone = one.time(on, BatchSizes(1, 1, ((1, 1, 1),)), False).seconds - on.library.launch_s
    assert fewer <= more * (1 + 1e-9) and more <= fewer + 4 * alone + 2 * on.chip.constants.hbm_latency_s
