"""Compares two of our own runs of one checkpoint, site by site, and finds the first difference.

Needs no transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.batch import Chunk, bind
from intaglio.compiler import build
from intaglio.debugging.check import PAGE, TOKENS, CheckError, Report, Row, difference, tolerances
from intaglio.devices import DEVICES, StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, port
from intaglio.program import Program
from intaglio.progress import Progress, silent


def parse(run: str) -> tuple[str, str]:
    """Split the text `run`, such as "host:int8", into a tuple (device name, weight format).

    The weight format is "auto" if the text has no colon. Raises CheckError for an unknown device, and for the device
    "oracle", which computes no values.
    """
    device, _, weights = run.partition(":")
    if device not in DEVICES or device == "oracle":
        raise CheckError(f"{run!r}: wanted device or device:weights, such as host:int8; devices are host, reference")
    return device, weights or "auto"


def bisect(
    path: str | Path, runs: Sequence[str], seed: int = 0, programs: Sequence[Program] | None = None,
    progress: Progress = silent,
) -> Report:  # fmt: skip
    """Run one checkpoint in two ways on random tokens, and compare the results of every op. Returns the Report.

    The first run is taken as correct. Results are compared at each site (an op's name, such as layers.3.mlp.down_proj)
    that both Programs have, in the order of the second Program. The tolerances are those of check(). They allow only
    for rounding in float32. With a lossy weight format, the first site out of tolerance is therefore where the format
    begins to change results.

    Args:
        path: the checkpoint.
        runs: two runs, each a device name, or a device name and a weight format, such as "reference" or "host:int8".
        seed: seed of the random token ids.
        programs: the Programs of the two runs; None: the checkpoint is compiled for each run.
        progress: called before each run.

    Raises CheckError unless there are two runs with known devices, CheckpointError or PortError if the checkpoint
    cannot be loaded, and FormatError for an unknown weight format.
    """
    if len(runs) != 2:
        raise CheckError(f"bisect takes two runs, such as reference,host:int8; got {','.join(runs)!r}")
    checkpoint = Checkpoint.open(path)
    raw = port(checkpoint, context=TOKENS)
    ids = np.random.default_rng(seed).integers(0, raw.vocabulary, TOKENS).tolist()
    pages = -(-TOKENS // PAGE)
    state = StateSpec(pages, PAGE, 2 * raw.recurrent)
    batch = bind([Chunk(ids, 0, range(pages), range(TOKENS), state=state.pair(0, 0))], PAGE)
    taken: list[dict[str, np.ndarray]] = []
    made: list[Program] = []
    for i, run in enumerate(runs):
        progress(i, len(runs), f"running {run}")
        device, weights = parse(run)
        program = programs[i] if programs else build(raw, weights)
        options: dict[str, Any] = {"cache": None} if device == "host" else {}
        ex = open_device(device, **options).load(program, checkpoint, state)
        sites = {op.site for op in program.ops} | {t.name for t in program.tensors.values() if t.view}
        result = ex.step(StepRequest(batch, logits=True, taps=sites))
        assert result.logits is not None
        taken.append({**result.taps, "logits": result.logits})
        made.append(program)
    allowed = tolerances(made[1], TOKENS)
    both = [s for s in allowed if s in taken[0] and s in taken[1] and taken[0][s].shape == taken[1][s].shape]
    rows = [Row(s, difference(taken[1][s], taken[0][s]), allowed[s]) for s in both]
    last = difference(taken[1]["logits"], taken[0]["logits"])
    rows.append(Row("logits", last, max(allowed.values())))
    first = next((r.site for r in rows if not r.ok), None)
    return Report(raw.name, runs[1], TOKENS, tuple(rows), first, last, first is None, against=runs[0])
