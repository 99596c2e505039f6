"""Devices: the seam and what stands behind it. `open_device(name)` is the only way in."""

from __future__ import annotations

from collections.abc import Callable

from intaglio.devices.device import (
    ArrayWeights,
    Device,
    DeviceError,
    DeviceLost,
    Executable,
    StateSpec,
    StepResult,
    Weights,
)
from intaglio.devices.host import HostDevice
from intaglio.devices.mesh import MeshDevice
from intaglio.devices.oracle import OracleDevice
from intaglio.devices.reference import ReferenceDevice
from intaglio.devices.worker import WorkerDevice

DEVICES: dict[str, Callable[..., Device]] = {"host": HostDevice, "oracle": OracleDevice, "reference": ReferenceDevice}


def open_device(name: str, **options: object) -> Device:
    """The device called `name`. Raises DeviceError naming those there are."""
    if name not in DEVICES:
        raise DeviceError(f"no device called {name!r}; there are {', '.join(sorted(DEVICES))}")
    return DEVICES[name](**options)


__all__ = [
    "DEVICES", "ArrayWeights", "Device", "DeviceError", "DeviceLost", "Executable", "MeshDevice", "StateSpec",
    "StepResult", "Weights", "WorkerDevice", "open_device",
]  # fmt: skip
