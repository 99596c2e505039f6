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
    """Return a list of the names of the CPU instruction sets that can be used, best first.

    This build has kernels for them and this machine can run them.
    """
    return list(_native.isas())


@cache
def build_hash() -> str:
    """Return a hash, as text, of the compiled part of this package.

    Builds with different hashes may compute results that differ in bits.
    """
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()


class HostDevice(Device):
    """The CPU of this machine as a device. Raises DeviceError for an argument out of range.

    Args:
        threads: number of CPU threads; None: usable_cores(), one per core within the container's CPU limit.
        isa: name of the instruction set; None: $INTAGLIO_ISA, or the best one if that is not set.
        cache: folder where packed weights are kept for the next start; None keeps nothing. "auto" keeps weights of 64
            MB or more in $INTAGLIO_CACHE, or in ~/.cache/intaglio/packed if that is not set.
        communicator: this rank's end of a group of ranks; None: no group. With a communicator, collectives run inside
            the native step, and all ranks must begin each step.
        state_file: file descriptor of a memory file for the K/V cache, which then outlives this process. Only one
            Program can use it. The file's present content is kept. None: the cache ends with this process.
        image_file: file descriptor of a memory file for packed weights that are not in `cache`. Only one Program can
            use it. If the file has the packed weights already, they are mapped instead of packed again. None: no such
            file.
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
        """Return the Recipe with which another process makes an equal host device.

        It is a tuple (name of this class, arguments). The arguments are the threads, the instruction set and the folder
        for packed weights. The communicator and the memory files are left out because they are open descriptors. Each
        rank's process adds its own.
        """
        cache = None if self.cache is None else str(self.cache)
        return f"{__name__}:HostDevice", {"threads": self.threads, "isa": self.isa, "cache": cache}

    def facts(self) -> DeviceFacts:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return DeviceFacts(self.isa, self.threads, memory, build_hash())

    def load_program(self, program: Program, weights: Weights, state: StateSpec) -> Executable:
        """Load one Program: translate its ops to native ops and pack its weights. Returns the Executable.

        Raises ProgramError for an invalid Program. Raises DeviceError for a page size that the kernels do not support,
        for an op without a host kernel, and for weights of the wrong shape or type.
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
