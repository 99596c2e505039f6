"""Fixtures that several test files use."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from intaglio.devices import DEVICES

# Nothing asserts wall-clock time: a machine that is busy elsewhere must not fail a test for being slow to draw
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SEED = int(os.environ.get("TEST_SEED", np.random.SeedSequence().entropy % 2**32))  # type: ignore[operator]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A random generator, seeded anew in every run; a failure prints TEST_SEED, which reproduces it."""
    print(f"TEST_SEED={SEED}")
    return np.random.default_rng([SEED, *request.node.name.encode()])


@pytest.fixture
def py_rng(rng: np.random.Generator) -> random.Random:
    """A generator of Python's `random` module, seeded by `rng`, so that TEST_SEED reproduces it."""
    return random.Random(int(rng.integers(2**32)))


@pytest.fixture(params=["reference", "host"])
def device(request):
    """The devices that compute values, one after the other."""
    if request.param not in DEVICES:
        pytest.skip(f"no {request.param} device")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for checkpoints that are made once for all tests of a file."""
    return tmp_path_factory.mktemp("checkpoints")
