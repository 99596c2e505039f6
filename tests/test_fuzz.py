"""A few hundred generated requests find no fault in the server; `make fuzz` sends 10,000."""

from __future__ import annotations

import re
from pathlib import Path

from fuzz import fuzz
from tiny import tiny


def test_generated_requests_find_no_fault(tmp_path: Path) -> None:
    done = fuzz(tiny("llama", tmp_path / "tiny", num_hidden_layers=2), 200)
    told = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, told
    found = re.search(r"(\d+) generated", told)
    assert found and int(found[1]) > 75, told  # of the second half
