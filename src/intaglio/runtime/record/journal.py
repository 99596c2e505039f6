"""Journal entries as JSON-serialisable dicts, one for each call of the engine.

record.py writes them, replay.py reads them. An entry holds the call ("do": engine, add, suspend, resume, step, abort or
drain) and the external inputs of the engine during the call ("clock": readings; "launches" and "restarts": the outcome
of each; "losses": those of the device that were noticed between two steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intaglio.devices import DeviceError, DeviceLost
from intaglio.runtime.engine import Engine
from intaglio.runtime.request import Event

Entry = Mapping[str, Any]


def write_engine(engine: Engine) -> dict[str, Any]:
    """Returns the journal fields that describe an engine, as a dict.

    They are the Program hash, the K/V cache sizes, the pipeline depth and the engine's options. A replay compares the
    hash and the sizes with those of its own engine, and makes its engine with the options.
    """
    scheduler = engine.scheduler
    options = {
        "max_batch_tokens": scheduler.max_batch_tokens, "max_sequences": scheduler.max_sequences,
        "max_waiting": engine.admission.max_waiting, "max_drafts": scheduler.max_drafts,
        "max_restarts": engine.recovery.max_restarts, "checkpoint_blocks": scheduler.checkpoints.every,
    }  # fmt: skip
    state = {"pages": engine.state.pages, "page_tokens": engine.state.page_tokens, "slots": engine.state.slots}
    return {"program": engine.program.hash, **state, "depth": engine.executable.depth, "options": options}


def write_event(event: Event) -> list[Any]:
    """Returns the fields of an event that a replay compares: a list [request id, choice, token id, finish reason]."""
    return [event.request, event.index, event.token, event.finish_reason]


def write_failure(error: Exception) -> str:
    """Returns the error of a failed launch as text for the journal. read_failure() reads it."""
    return f"lost: {error}" if isinstance(error, DeviceLost) else f"{type(error).__name__}: {error}"


def read_failure(text: str) -> DeviceError:
    """Returns the exception for a text that write_failure() wrote: DeviceLost for a lost device, else DeviceError."""
    return DeviceLost(text.removeprefix("lost: ")) if text.startswith("lost: ") else DeviceError(text)
