"""GGUF files (llama.cpp): metadata as a config, tensors under the names that transformers gives them, blocks as codes.

Values are exact, except for the block types that blocks.py lists as rounded to bf16 by the `gguf` library.
"""

from intaglio.models.files.gguf.file import GgufFile, find_gguf, open_gguf
from intaglio.models.files.gguf.keys import KeyFate
from intaglio.models.files.gguf.read import GgufModel, read_gguf, use_of
from intaglio.models.files.gguf.tensors import Raw

__all__ = ["GgufFile", "GgufModel", "KeyFate", "Raw", "find_gguf", "open_gguf", "read_gguf", "use_of"]
