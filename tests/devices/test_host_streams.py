"""Hyper-connections on the host: sinkhorn and mix_streams against their references."""

from __future__ import annotations

import numpy as np
import pytest
from support.host_bench import EPS, Bench, hold

from intaglio.ops import MixStreams, Sinkhorn


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_sinkhorn(n: int, rng: np.random.Generator) -> None:
    """Each of 2 * 20 normalisations rounds a sum of n terms and a quotient; every value stays below 1.1."""
    bench = Bench(rng, 13, n * n, 2.0)
    hold(bench.run(bench.b.op(Sinkhorn, "y", bench.x)), 2 * 2 * 20 * (n + 2) * EPS * 1.1)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("m", [1, 3])
def test_mix_streams(m: int, branch: bool, rng: np.random.Generator) -> None:
    """A result is a sum of n + 1 products, each below 40 for normal values."""
    n, width, rows = int(rng.integers(1, 6)), int(rng.integers(1, 70)), 21
    bench = Bench(rng, rows, n * width)
    weights = bench.matrix("weights", rows, n * m)
    more = {"branch": bench.matrix("branch", rows, width), "gains": bench.matrix("gains", rows, m)} if branch else {}
    hold(bench.run(bench.b.op(MixStreams, "y", bench.x, weights, streams=n, **more)), 2 * (n + 2) * (n + 1) * 40 * EPS)
