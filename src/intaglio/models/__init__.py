"""Models: readers of checkpoints and tokenizers, and the ports that turn a checkpoint into a Program."""

from intaglio.models.account import Account, account
from intaglio.models.config import CheckpointError, PortError
from intaglio.models.files.checkpoint import Checkpoint
from intaglio.models.port import port, port_config
from intaglio.models.ports import Family, families, register_family
from intaglio.models.text.grammar import GrammarError, Grammars
from intaglio.models.text.tokenizer import Stream, Tokenizer, TokenizerError, has_tokenizer
from intaglio.models.text.transcript import Transcript

__all__ = [
    "Account", "Checkpoint", "CheckpointError", "Family", "GrammarError", "Grammars", "PortError", "Stream",
    "Tokenizer", "TokenizerError", "Transcript", "account", "families", "has_tokenizer", "port", "port_config",
    "register_family",
]  # fmt: skip
