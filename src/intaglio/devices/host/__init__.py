"""The host device: runs Programs on this machine's CPU with SIMD kernels.

Load: a Program is laid out (layout.py), its weights are packed and its ops made native (load.py). Step: one native
call, interrupted only at collectives and at ops with Python kernels (executable.py). Kernels are registered by op class
(kernels.py). Results do not depend on batch, chunking or thread count: every reduction has a fixed order (see csrc/).
"""

from intaglio.devices.host.device import HostDevice, isa_names
from intaglio.devices.host.executable import HostExecutable
from intaglio.devices.host.kernels import host_kernel
from intaglio.devices.host.layout import HostLayout
from intaglio.devices.host.load import fill_codes

__all__ = ["HostDevice", "HostExecutable", "HostLayout", "fill_codes", "host_kernel", "isa_names"]
