"""Devices: host (C++), reference (NumPy), oracle (tests), silicon (modelled). Open one with `open_device(name)`.

A device's module is imported when the device is opened. Only the host, and devices in processes of their own (a worker,
groups of ranks), need the compiled part of this package.
"""

from __future__ import annotations

from importlib import import_module

from intaglio.devices.clock import Clock, VirtualClock, WallClock
from intaglio.devices.cores import usable_cores
from intaglio.devices.device import (
    BlockingExecutable,
    CompletedStep,
    Device,
    DeviceError,
    DeviceFacts,
    DeviceLost,
    Executable,
    PendingStep,
    ReplacementRefused,
    StateSpec,
    StepRequest,
    StepResult,
    Weights,
)
from intaglio.devices.hosts import HostsDevice
from intaglio.devices.mesh import MeshDevice
from intaglio.devices.ranks import RanksDevice
from intaglio.devices.weights import ArrayWeights, ReportedWeights
from intaglio.devices.worker import WorkerDevice
from intaglio.plugins import load_plugins

DEVICES: dict[str, str] = {}  # "module:class" by name


def register_device(name: str, where: str) -> None:
    """Register a Device class under `name`, so that open_device(name) can open it. Returns None.

    `where` is a text "module:class". A device that was registered under this name before is replaced.
    """
    DEVICES[name] = where


def open_device(name: str, **options: object) -> Device:
    """Create and return the Device registered under `name`, with `options` as arguments of its class.

    Raises DeviceError if no device has that name, PluginError if a plugin fails to load, and the errors of the class.
    """
    load_plugins()
    if name not in DEVICES:
        raise DeviceError(f"no device called {name!r}; there are {', '.join(sorted(DEVICES))}")
    module, _, kind = DEVICES[name].partition(":")
    device = vars(import_module(module))[kind](**options)
    assert isinstance(device, Device)
    return device


register_device("host", "intaglio.devices.host:HostDevice")
register_device("oracle", "intaglio.devices.oracle:OracleDevice")
register_device("reference", "intaglio.devices.reference:ReferenceDevice")
register_device("silicon", "intaglio.devices.silicon:SiliconDevice")

__all__ = [
    "DEVICES", "ArrayWeights", "BlockingExecutable", "Clock", "CompletedStep", "Device", "DeviceError", "DeviceFacts",
    "DeviceLost", "Executable", "HostsDevice", "MeshDevice", "PendingStep", "RanksDevice", "ReplacementRefused",
    "ReportedWeights", "StateSpec", "StepRequest", "StepResult", "VirtualClock", "WallClock", "Weights", "WorkerDevice",
    "open_device", "register_device", "usable_cores",
]  # fmt: skip
