"""Models: reading checkpoints and tokenizers, and the ports that turn a checkpoint into a Program."""

from intaglio.models.checkpoint import Checkpoint, CheckpointError
from intaglio.models.config import PortError
from intaglio.models.grammar import GrammarError, Grammars
from intaglio.models.port import families, port, port_config
from intaglio.models.tokenizer import Stream, Tokenizer, TokenizerError

__all__ = [
    "Checkpoint", "CheckpointError", "GrammarError", "Grammars", "PortError", "Stream", "Tokenizer", "TokenizerError",
    "families", "port", "port_config",
]  # fmt: skip
