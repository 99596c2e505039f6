"""Runs a server of this package in a child process for the duration of a measurement."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intaglio.devices.processes import child_environment


@contextmanager
def started(words: list[str]) -> Iterator[str]:
    """A context manager that runs `intaglio serve` on a free port. Yields the server's address, up to and with /v1.

    words: command-line arguments for `intaglio serve`. The server is stopped at the end of the block. Raises
    ValueError, with the output of the server, if it does not start.
    """
    command = [sys.executable, "-m", "intaglio", "serve", *words, "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=child_environment())
        try:
            assert process.stdout
            found = re.search(r" at (http://[^\s;]+)", process.stdout.readline())
            if not found:
                process.wait()
                said.seek(0)
                raise ValueError(f"the server did not start: {said.read().strip()[-500:]}")
            yield f"{found[1]}/v1"
        finally:
            process.terminate()
            process.communicate()


def serve_words(model: Path | None, **options: Any) -> list[str]:
    """Command-line arguments for `intaglio serve`, as a list of strings.

    The path `model` comes first, unless it is None. Each keyword argument that is not None follows as an option and its
    value: max_batch=8 becomes "--max-batch", "8". Options that take no value cannot be given.
    """
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return [*([str(model)] if model else []), *(word for pair in given for word in pair)]
