"""Speed of serving in virtual time: 1,000 engine steps of Llama-3-70B on 8 chips, and a day of 64 replicas.

    python bench/serving_time.py                 # about four minutes
    python bench/serving_time.py --requests 100000

CPU and wall-clock seconds are measured here; steps and hours are modelled. The engine's row runs the shipped engine and
scheduler, one step after another, with and without the time to compile the model. The day runs event by event: each of
64 replicas has a queue of its own, and all of them are simulated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from host import table

from intaglio.chips import target
from intaglio.codesign.fleet import simulate_fleet
from intaglio.codesign.placement import Placement
from intaglio.codesign.serving import EngineSettings, Limits, ramped, simulate_serving
from intaglio.codesign.simulate import ported, stages
from intaglio.codesign.steps import Formats, Server
from intaglio.measure.workload import LoadRequest, draw, fitting, trace

DAY_S = 86400
REPLICAS = 64
STEPS = 1000


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result of `work`, CPU seconds, wall-clock seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def engine_rows(chip: str, open_: int) -> list[str]:
    """Cells of a row: the engine's steps on one chip with `open_` requests open, scaled to STEPS steps."""
    compiled, compile_cpu, compile_wall = timed(
        lambda: stages(ported("llama-3-70b", None), "tp8", "fp8", "auto", "auto")
    )
    program = ported("llama-3-70b", None)
    load = ramped([LoadRequest(0.0, 2048, 128)] * (4 * open_), open_, 2.0)
    done, cpu, wall = timed(
        lambda: simulate_serving(program, compiled, target(chip), "tp8", load, EngineSettings(), Limits(), open_)
    )
    scale = STEPS / done.steps
    return [
        f"{STEPS:,} engine steps, {chip} tp8, {open_} open", f"{done.summary.seconds * scale:,.1f} s",
        f"{cpu * scale:.2f}", f"{wall * scale:.2f}", f"{compile_cpu:.2f} CPU s, {compile_wall:.2f} s to compile",
    ]  # fmt: skip


def day_row(chip: str, requests: int) -> list[str]:
    """Cells of a row: 64 replicas of 8 chips with requests like those of a public trace of conversations."""
    program = ported("llama-3.1-70b", None)
    lengths = trace("conversation")
    share = requests / 1e6
    load = draw(lengths, requests, 1e6 / DAY_S, 1.0, fitting(lengths, program.context), program.context)
    server = Server.of(program, Placement.parse(f"dp{REPLICAS}tp8"), Formats("fp8"))
    done, cpu, wall = timed(lambda: simulate_fleet(server, target(chip), load, EngineSettings(), Limits()))
    what = f"{requests:,} requests in {24 * share:.3g} h, {REPLICAS} replicas of {chip} tp8"
    faster = f"{done.summary.seconds / wall:,.0f} times real time, {done.steps:,} steps"
    return [what, f"{done.summary.seconds / 3600:,.1f} h", f"{cpu:.1f}", f"{wall:.1f}", faster]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=10**6, help="of the day, which shortens with them")
    asked = parser.parse_args()
    rows = [engine_rows(chip, open_) for chip in ("sohu", "h100_sxm") for open_ in (16, 64)]
    rows.append(day_row("h100_sxm", asked.requests))
    print(f"Python {sys.version.split()[0]}")
    print(table(["what", "modelled", "CPU s", "wall s", ""], rows))


if __name__ == "__main__":
    main()
