"""Functions that children of the fork server run in tests; imports little, because each child imports this file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from os import _exit as end_process
from pathlib import Path


def tell(argument: str, files: Sequence[int]) -> None:
    """A target: write what this process sees to the first descriptor."""
    held = [int(f) for f in os.listdir("/proc/self/fd")]
    seen = {
        "argument": argument, "variable": os.environ.get("INTAGLIO_TEST"), "folder": str(Path.cwd()),
        "leader": os.getsid(0) == os.getpid(), "threads": len(os.listdir("/proc/self/task")),
        "held": len([f for f in held if f > 2 and f not in files and os.path.exists(f"/proc/self/fd/{f}")]),
        "imported": "numpy" in sys.modules, "files": len(files),
    }  # fmt: skip
    os.write(files[0], json.dumps(seen).encode())


def leave(argument: str, files: Sequence[int]) -> None:
    """A target: end with this exit status, or by this signal if it is negative."""
    code = int(argument)
    if code < 0:
        os.kill(os.getpid(), -code)
    end_process(code)


def fail(argument: str, files: Sequence[int]) -> None:
    """A target that raises."""
    raise RuntimeError(argument)


def wait(argument: str, files: Sequence[int]) -> None:
    """A target: wait until the descriptor's other end is closed."""
    os.read(files[0], 1)
