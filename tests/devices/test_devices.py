"""The registry of devices: modules are imported when a device is opened; facts and clocks of devices."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from intaglio.devices import DEVICES, DeviceError, VirtualClock, WallClock, open_device, register_device
from intaglio.devices.oracle import OracleDevice

WITHOUT_NATIVE = """
import sys
sys.modules["intaglio._native"] = None
import intaglio.devices.reference
from intaglio.devices import open_device
assert open_device("reference").name == "reference" and open_device("oracle").name == "oracle"
try:
    open_device("host")
except ImportError:
    print("only the host needs it")
"""


def test_only_the_host_needs_the_compiled_module() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_NATIVE], capture_output=True, text=True)
    assert done.stdout == "only the host needs it\n", done.stderr


def test_a_registered_device_is_opened_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="no device called 'mine'; there are host, oracle, reference, silicon"):
        open_device("mine")
    monkeypatch.setitem(DEVICES, "mine", "")
    register_device("mine", f"{OracleDevice.__module__}:OracleDevice")
    assert isinstance(open_device("mine"), OracleDevice)


def test_facts_of_devices() -> None:
    host, chip = open_device("host", threads=2).facts(), open_device("silicon").facts()
    assert host.threads == 2 and host.isa and host.memory and host.memory > 1 << 20
    assert chip.threads is chip.isa is None and chip.memory
    assert open_device("silicon").clock.modelled and not open_device("reference").clock.modelled


def test_clocks_wait() -> None:
    virtual, wall = VirtualClock(), WallClock()
    virtual.wait_until(3.0)
    virtual.wait_until(2.0)
    assert virtual() == 3.0
    until = wall() + 0.01
    wall.wait_until(until)
    wall.wait_until(until)
    assert until <= wall() <= time.monotonic()
