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
    """A dict of the journal fields of an engine: Program hash, sizes of the K/V cache and options.

    A replay compares the hash and the sizes with its own engine's, and uses the options.
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
    """The fields of an event that a replay compares, as a list: request id, choice, token, finish reason."""
    return [event.request, event.index, event.token, event.finish_reason]


def write_failure(error: Exception) -> str:
    """Text of the error of a failed launch, for the journal."""
    return f"lost: {error}" if isinstance(error, DeviceLost) else f"{type(error).__name__}: {error}"


def read_failure(text: str) -> DeviceError:
    """The exception for a failure recorded by write_failure(): DeviceLost or DeviceError."""
    return DeviceLost(text.removeprefix("lost: ")) if text.startswith("lost: ") else DeviceError(text)
