"""HostDevice: this machine's CPU as a device. Also its instruction sets, and a hash of the native build."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from intaglio import _native
from intaglio.devices.cores import usable_cores
from intaglio.devices.device import Device, DeviceError, DeviceFacts, Executable, StateSpec, Weights
from intaglio.devices.host.executable import HostExecutable
from intaglio.devices.recipe import Recipe
from intaglio.program import Program, verify


def isa_names() -> list[str]:
    """A list of the instruction sets that this build has kernels for and this machine can run, best first."""
    return list(_native.isas())


@cache
def build_hash() -> str:
    """A hash, as text, of the compiled part of this package. Another build may compute other bits."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()


class HostDevice(Device):
    """The CPU of this machine as a device. Raises DeviceError for an argument out of range.

    Args:
        threads: CPU threads; by default usable_cores(): one per core, within the container's CPU limit.
        isa: instruction set; by default $INTAGLIO_ISA, else the best one.
        cache: folder where packed weights are kept for the next start. "auto" is $INTAGLIO_CACHE or
            ~/.cache/intaglio/packed, for weights of 64 MB or more; None keeps nothing.
        communicator: this rank's end of a group; None: no group. With one, Programs run their collectives inside the
            native step, and all ranks must begin each step.
        state_file: descriptor of a memory file for the K/V cache of the one Program that is loaded, so that the cache
            outlives this process. The file's present content is kept. None: the cache ends with this process.
        image_file: descriptor of a memory file for the packed weights of the one Program that is loaded, if they are
            not in `cache`. If the file holds them already, they are mapped instead of packed. None: no such file.
    """

    name = "host"

    def __init__(
        self, threads: int | None = None, isa: str | None = None, *, cache: str | Path | None = "auto",
        communicator: _native.Communicator | None = None, state_file: int | None = None,
        image_file: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.communicator = cache, communicator
        self.state_file, self.image_file = state_file, image_file
        self.threads = threads or usable_cores()
        self.isa = isa or os.environ.get("INTAGLIO_ISA") or isa_names()[0]
        if not 1 <= self.threads <= 256:
            raise DeviceError(f"threads={threads} is outside 1..256")
        if self.isa not in isa_names():
            raise DeviceError(f"instruction set {self.isa!r} is not available; there are {', '.join(isa_names())}")

    def recipe(self) -> Recipe:
        """The Recipe, (name of this class, arguments), by which another process makes an equal host device.

        It has the threads, the instruction set and the folder for packed weights. It leaves out the communicator and
        memory files, which are open descriptors: each rank's process adds its own.
        """
        cache = None if self.cache is None else str(self.cache)
        return f"{__name__}:HostDevice", {"threads": self.threads, "isa": self.isa, "cache": cache}

    def facts(self) -> DeviceFacts:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return DeviceFacts(self.isa, self.threads, memory, build_hash())

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        """Translate a Program's ops and pack its weights. Returns the Executable.

        Raises ProgramError for a Program that breaks a rule. Raises DeviceError for a page size that the kernels do not
        support, an op without a host kernel, and weights of the wrong shape or type.
        """
        verify(program)
        multiple = _native.PAGE_MULTIPLE
        if state.page_tokens % multiple or state.page_tokens < multiple:
            raise DeviceError(f"page_tokens={state.page_tokens}; the host needs a multiple of {multiple}, such as 32")
        return HostExecutable(
            program,
            weights,
            state,
            self.threads,
            self.isa,
            self.cache,
            self.communicator,
            self.state_file,
            self.image_file,
        )
