"""The journal of an engine: `RecordedEngine` writes one, `replay()` runs it again."""

from intaglio.runtime.record.record import RecordedEngine
from intaglio.runtime.record.replay import JournalError, Replayed, replay

__all__ = ["JournalError", "RecordedEngine", "Replayed", "replay"]
