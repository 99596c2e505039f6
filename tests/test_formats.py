"""Number formats: rounding against ml_dtypes and torch, and the error every quantised value may have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from intaglio import formats
from intaglio.formats import SPAN, TINY, FormatError, Quantised, get, in_groups, quantise, quantise_rows, round_to

GROUPED = ("int8g32", "int8g128", "int4g32", "int4g128")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70), elements=finite)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32)))
def test_plain_rounding_is_that_of_torch(x: np.ndarray) -> None:
    for name, kind in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        with np.errstate(over="ignore"):
            got = round_to(x, name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, torch.from_numpy(x).to(kind).float().numpy())


def test_ties_go_to_even() -> None:
    step = 2.0**-7  # of bf16 between 1 and 2
    np.testing.assert_array_equal(round_to(np.float32([1 + step / 2, 1 + 1.5 * step]), "bf16"), [1, 1 + 2 * step])
    np.testing.assert_array_equal(round_to(np.float32([1 + 2.0**-11, 1 + 3 * 2.0**-11]), "f16"), [1, 1 + 2.0**-9])


def check_grouped(x: np.ndarray, name: str) -> Quantised:
    """Shapes, ranges, nearest codes, scales among those tried, and errors no larger than under the first of them."""
    fmt = get(name)
    q = quantise(x, name)
    assert q.codes.shape == x.shape and q.codes.dtype == np.int8
    assert q.scales.shape == (len(x), -(-x.shape[1] // fmt.group)) and q.scales.dtype == np.float32
    np.testing.assert_array_equal(q.scales, round_to(q.scales, "bf16"))
    low, high = (-127, 127) if fmt.bits == 8 else (-8, 7)
    assert q.codes.min() >= low and q.codes.max() <= high
    groups = in_groups(x, fmt.group).astype(np.float64)
    steps = np.divide(groups, q.scales[:, :, None], out=np.zeros_like(groups), where=q.scales[:, :, None] != 0)
    error = np.abs(groups - in_groups(q.codes, fmt.group) * q.scales[:, :, None].astype(np.float64))
    allowed = np.abs(q.scales[:, :, None]) * np.maximum(0.5, np.maximum(steps - high, low - steps))
    assert (error <= allowed * (1 + 1e-6) + TINY).all()
    low_end, high_end = groups.min(axis=2), groups.max(axis=2)
    farthest = np.where(-low_end >= high_end, low_end, high_end)
    end, beside = (127, 1) if fmt.bits == 8 else (8, 0.75)
    reach = np.abs(farthest[q.scales != 0] / q.scales[q.scales != 0])
    assert (np.abs(reach - end) <= beside + (end + beside) * 2.0**-8).all()
    first = np.abs(farthest) / 127 if fmt.bits == 8 else farthest / -8
    plain = round_to(first.astype(np.float32), "bf16")[:, :, None].astype(np.float64)
    codes = np.clip(np.rint(np.divide(groups, plain, out=np.zeros_like(groups), where=plain != 0)), low, high)
    least = ((groups - codes * plain) ** 2).sum(axis=2)
    # their sums are of float32, whose rounding a value at the middle of two codes feels most: 2^-22 of 127 steps
    assert ((error**2).sum(axis=2) <= least * (1 + 1e-3) + TINY).all()
    return q


@pytest.mark.parametrize("name", GROUPED)
@quick
@given(matrices)
def test_quantised_values_are_within_half_a_step(name: str, x: np.ndarray) -> None:
    check_grouped(x, name)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("k", [1, 31, 33, 127, 200])
def test_any_width_works(name: str, k: int) -> None:
    check_grouped(np.random.default_rng(k).normal(size=(5, k)).astype(np.float32), name)


@pytest.mark.parametrize("name", GROUPED)
def test_zero_and_constant_rows_are_exact(name: str) -> None:
    scale = np.float32(0.375)
    top = np.float32(127 if get(name).bits == 8 else -8)
    x = np.zeros((4, 40), np.float32)
    x[1], x[2] = scale * top, -scale * top
    x[3, :32] = scale * top  # the second group is zero
    np.testing.assert_array_equal(check_grouped(x, name).rows(slice(None)), x)
    np.testing.assert_array_equal(quantise(x[:1], name).scales, 0)


@pytest.mark.parametrize("name", GROUPED)
def test_int_matrices_on_the_grid_are_exact(name: str) -> None:
    fmt = get(name)
    rng = np.random.default_rng(0)
    high = 127 if fmt.bits == 8 else 7
    codes = rng.integers(-high, high + 1, (6, 3 * fmt.group)).astype(np.float32)
    codes[:, :: fmt.group] = 127 if fmt.bits == 8 else -8
    q = check_grouped(codes * np.float32(2.0**-5), name)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.rows(np.array([4, 0])), codes[[4, 0]] * np.float32(2.0**-5))


@pytest.mark.parametrize("name", GROUPED)
def test_the_smallest_numbers_become_zeros(name: str) -> None:
    x = np.full((1, 64), 1e-40, np.float32)
    assert not quantise(x, name).rows(slice(None)).any()
    codes, scales = quantise_rows(x, 32)
    assert not codes.any() and np.isfinite(scales).all()


@quick
@given(matrices, st.sampled_from([32, 64, 128]))
def test_activations_are_within_half_a_step(x: np.ndarray, group: int) -> None:
    codes, scales = quantise_rows(x, group)
    assert codes.shape == (len(x), -(-x.shape[1] // group), group) and scales.shape == codes.shape[:2]
    assert codes.dtype == np.int8 and scales.dtype == np.float32 and codes.min() >= -127
    wide = scales[:, :, None].astype(np.float64)
    error = np.abs(in_groups(x, group) - codes * wide)
    assert (error <= wide / 2 * (1 + 1e-5) + TINY).all()
    span = -(-SPAN // group) * group
    peak = np.abs(in_groups(x, span)).max(axis=2)
    most = np.abs(in_groups(codes.reshape(len(x), -1), span)).max(axis=2)
    assert (most[peak >= TINY] == 127).all()


@pytest.mark.parametrize("name", ["int8row", "fp8row", "fp8g32", "fp8g128", "mxfp4"])
@quick
@given(matrices)
def test_other_scaled_formats_choose_the_nearest_code(name: str, x: np.ndarray) -> None:
    """No code of the format, under the same scale, is nearer to the value than the chosen one."""
    fmt, q = get(name), quantise(x, name)
    assert q.codes.shape == x.shape and q.scales.shape == (len(x), -(-x.shape[1] // q.group))
    levels = {
        "int8row": np.arange(-127, 128),
        "mxfp4": np.array([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]),
    }.get(name, np.unique(np.arange(256, dtype=np.uint8).view(formats.E4M3).astype(np.float64)[np.r_[:127, 128:255]]))
    assert np.isin(q.codes.astype(np.float64), levels).all()
    scale = np.repeat(q.scales, q.group, axis=1)[:, : x.shape[1]].astype(np.float64)
    nearest = np.abs(x[..., None] - levels * scale[..., None]).min(axis=-1)
    error = np.abs(x - q.rows(slice(None)).astype(np.float64))
    assert (error <= nearest * (1 + 1e-6) + np.abs(x) * 2.0**-22 + TINY).all()
    if fmt.group == formats.ROW:
        assert (q.scales == q.scales[:, :1]).all()
    if name == "mxfp4":  # half a power of two, under which the largest value is between 8 and 16 halves of a step
        assert (np.frexp(q.scales)[0][q.scales != 0] == 0.5).all()


@pytest.mark.parametrize("name", [*GROUPED, "int8row", "fp8row", "fp8g32", "mxfp4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_group_nan(name: str, bad: float) -> None:
    """Never a code that looks like a weight; groups beside it are untouched."""
    x = np.random.default_rng().normal(size=(3, 300)).astype(np.float32)
    want = quantise(x, name)
    x[1, 140] = bad
    got = quantise(x, name).rows(slice(None))
    group = want.group if get(name).group != formats.ROW else 300
    spoilt = np.zeros(x.shape, bool)
    spoilt[1, 140 // group * group : (140 // group + 1) * group] = True
    assert np.isnan(got[spoilt]).all()
    np.testing.assert_array_equal(got[~spoilt], want.rows(slice(None))[~spoilt])


def blocks(rng: np.random.Generator, rows: int = 64) -> np.ndarray:
    return rng.normal(size=(rows, 1024)).astype(np.float32)


def relative_error(x: np.ndarray, name: str) -> float:
    wide = x.astype(np.float64)
    return float(np.linalg.norm(quantise(x, name).rows(slice(None)) - wide) / np.linalg.norm(wide))


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5, 3.0])
def test_q4_k_is_a_line_through_each_group(shift: float) -> None:
    """Scales and minima are up to 63 of units that f16 holds; no other code, scale or minimum beside the chosen ones is
    nearer to the values."""
    rng = np.random.default_rng()
    x = blocks(rng) * np.exp2(rng.integers(-9, 9, (64, 1))).astype(np.float32)
    size = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) ** 2
    x += shift * np.abs(x).max(axis=1, keepdims=True)
    q = quantise(x, "q4_k")
    assert q.format == "q4_k" and q.group == 32 and q.codes.min() >= 0 and q.codes.max() <= 15
    assert q.minima is not None and q.units is not None and q.low_units is not None
    for steps, unit in ((q.scales, q.units), (q.minima, q.low_units)):
        np.testing.assert_array_equal(unit, round_to(unit, "f16"))
        unit = np.repeat(unit, 8, axis=1)
        count = np.divide(steps, unit, out=np.zeros_like(steps), where=unit > 0)
        assert (count == np.rint(count)).all() and count.min() >= 0 and count.max() <= 63

    def error(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
        """The least squared error of each group under any codes."""
        s, m = (np.repeat(v.astype(np.float64), 32, axis=1) for v in (scales, minima))
        codes = np.clip(np.rint(np.divide(x + m, s, out=np.zeros_like(s), where=s > 0)), 0, 15)
        return in_groups((x - (codes * s - m)) ** 2, 32).sum(axis=2)

    got = in_groups((x - q.rows(slice(None)).astype(np.float64)) ** 2, 32).sum(axis=2)
    assert (got <= error(q.scales, q.minima) * (1 + 1e-3)).all()
    up = np.repeat(q.units, 8, axis=1), np.repeat(q.low_units, 8, axis=1)
    for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1)):  # not group by group: a search ends at its own edges
        beside = error(np.clip(q.scales + i * up[0], 0, 63 * up[0]), np.clip(q.minima + j * up[1], 0, 63 * up[1]))
        assert np.mean(got / size) <= np.mean(beside / size) * (1 + 1e-3)


def test_groups_err_less_than_llama_cpps() -> None:
    """Q8_0 and Q4_0, of as many bits: a scale in f16 that takes the value farthest from 0 to 127, or to -8."""
    x = np.random.default_rng().normal(size=(256, 1024)).astype(np.float32)
    groups = in_groups(x, 32)
    farthest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)
    for name, end, low, high in (("int8g32", 127, -127, 127), ("int4g32", -8, -8, 7)):
        scale = round_to(farthest / np.float32(end), "f16")
        theirs = np.clip(np.rint(groups / scale), low, high) * scale - groups
        assert relative_error(x, name) < 0.98 * np.linalg.norm(theirs) / np.linalg.norm(x)


def test_q4_k_errs_less_than_llama_cpps() -> None:
    """Beside what its C code leaves of such layers (bench/quality.py: 7.13 and 2.92 %), and int4 at as many bits."""
    rng = np.random.default_rng()
    normal, uniform = blocks(rng, 256), rng.uniform(0, 1, (256, 1024)).astype(np.float32)
    for size in (1.0, 1e-4, 1e-6):  # the last two have units below the least normal f16
        assert relative_error(normal * np.float32(size), "q4_k") < (0.0713 if size > 1e-5 else 0.08)
    assert relative_error(uniform, "q4_k") < 0.0292
    assert relative_error(normal, "int4g32") > 1.15 * relative_error(normal, "q4_k")


def test_q4_k_of_what_needs_no_rounding() -> None:
    """Zeros stay zeros; constants and lines of 16 steps come back but for their units' rounding to f16."""
    rng = np.random.default_rng()
    x = np.zeros((3, 512), np.float32)
    x[1] = np.repeat(rng.normal(size=2), 256)
    x[2] = rng.integers(0, 16, 512) * 0.25 - 1.75
    x[2, ::32], x[2, 1::32] = -1.75, 2.0
    got = quantise(x, "q4_k").rows(slice(None))
    np.testing.assert_array_equal(got[0], 0)
    # units are up to 2^-10 too large, of which a value has two parts: at most twice the largest and once
    np.testing.assert_allclose(got, x, rtol=0, atol=3 * 2.0**-10 * np.abs(x).max())
    assert not quantise(np.full((1, 256), 1e-40, np.float32), "q4_k").rows(slice(None)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e6, -2e6])
def test_what_a_block_cannot_hold_makes_it_nan(bad: float) -> None:
    x = blocks(np.random.default_rng(), 3)
    want = quantise(x, "q4_k").rows(slice(None))
    x[1, 300] = bad
    got = quantise(x, "q4_k").rows(slice(None))
    assert np.isnan(got[1, 256:512]).all()
    got[1, 256:512] = want[1, 256:512]
    np.testing.assert_array_equal(got, want)


def test_q4_k_has_whole_blocks() -> None:
    with pytest.raises(FormatError, match="q4_k needs rows of whole blocks of 256 values, not 576; use int4g32"):
        quantise(np.zeros((1, 576), np.float32), "q4_k")


def test_mxfp4_is_that_of_the_microscaling_specification() -> None:
    """OCP MX 1.0, 6.3: the shared exponent is floor(log2(max)) - 2; elements are rounded to E2M1 and saturate."""
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [5.0, 7.9, -2.5, 0.25, 0.26, 3.5]
    np.testing.assert_array_equal(quantise(x, "mxfp4").rows(slice(None))[0, :6], [4, 6, -2, 0, 0.5, 4])
    np.testing.assert_array_equal(quantise(x / 64, "mxfp4").scales, [[2.0**-7]])


def test_a_row_is_quantised_alike_in_any_company() -> None:
    x = np.random.default_rng(0).normal(size=(9, 100)).astype(np.float32)
    whole, alone = quantise_rows(x, 32), quantise_rows(x[4:5], 32)
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(a[4:5], b)


@pytest.mark.parametrize(
    ("name", "rows", "cols", "nbytes"),
    [
        ("f32", 3, 5, 60), ("bf16", 3, 5, 30), ("f16", 1, 7, 14), ("i32", 2, 2, 16),
        ("int8g32", 3, 64, 3 * (64 + 2 * 2)), ("int8g128", 1, 130, 130 + 2 * 2),
        ("int4g32", 4, 32, 4 * (16 + 2)), ("int4g32", 1, 33, 21), ("int4g1024", 2, 1024, 2 * (512 + 2)),
    ],
)  # fmt: skip
def test_nbytes(name: str, rows: int, cols: int, nbytes: int) -> None:
    assert get(name).nbytes(rows, cols) == nbytes


def test_names() -> None:
    assert get("int4g64").grouped and (get("int4g64").bits, get("int4g64").group) == (4, 64)
    assert get("int8g32").dtype == np.int8 and get("bf16").dtype == formats.BF16 and not get("bf16").grouped
    assert get("f32") is get("f32")


@pytest.mark.parametrize("name", ["", "fp32", "int8", "int4g", "int8g0", "int8g16", "int8g33", "int4g2048", "int2g32"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=rf"unknown number format '{name}': use one of f32, bf16, f16, i32, int8gN"):
        get(name)


def test_plain_formats_have_no_codes() -> None:
    with pytest.raises(FormatError, match="bf16 is a plain format"):
        quantise(np.zeros((1, 1), np.float32), "bf16")
