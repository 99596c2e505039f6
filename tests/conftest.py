"""What several test files take."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from intaglio.devices import DEVICES

# Nothing asserts wall-clock time: a machine that is busy elsewhere must not fail a test for being slow to draw
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(params=["reference", "host"])
def device(request):
    """Both devices that compute, one after the other."""
    if request.param not in DEVICES:
        pytest.skip(f"no {request.param} device")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints made once for all tests of a file."""
    return tmp_path_factory.mktemp("checkpoints")
