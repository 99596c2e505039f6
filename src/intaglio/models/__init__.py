"""Models: reading checkpoints and tokenizers, and the ports that turn a checkpoint into a Program."""

from intaglio.models.checkpoint import Checkpoint, CheckpointError
from intaglio.models.config import PortError
from intaglio.models.port import families, port, port_config
from intaglio.models.tokenizer import Stream, Tokenizer, TokenizerError

__all__ = [
    "Checkpoint", "CheckpointError", "PortError", "Stream", "Tokenizer", "TokenizerError", "families", "port",
    "port_config",
]  # fmt: skip
