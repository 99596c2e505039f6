"""Metadata: the values of a GGUF file by llama.cpp's keys, without the prefix that names the architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from intaglio.models.config import CheckpointError, PortError
from intaglio.models.files.gguf.file import GgufFile
from intaglio.models.files.gguf.tensors import Tables


@dataclass(frozen=True)
class Metadata:
    """The metadata (keys and values) and the tensors of a GGUF file.

    Attributes:
        file: the file.
        tables: the file's tensors, under the names that they have in transformers.
        factors: lists of rope frequency factors from the file. The keys are "freqs", "long" and "short"; a key is
            missing if the file has no such factors.
        seen: keys that were read so far, as in the file, such as llama.block_count.
    """

    file: GgufFile
    tables: Tables
    factors: dict[str, list[float]]
    seen: set[str] = field(default_factory=set)

    @property
    def layers(self) -> int:
        """Number of layers of the model, without multi-token-prediction (nextn) layers."""
        return self.whole("block_count") - self.whole("nextn_predict_layers", 0)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of the key "<architecture>.<key>" in the file; `default` if the file does not have the key.

        The key is added to `seen`. key: the part after the architecture, such as block_count for llama.block_count.
        """
        return self.whole_key(f"{self.file.architecture}.{key}", default)

    def whole_key(self, key: str, default: Any = None) -> Any:
        """The value of a complete key, such as xielu.beta, in the file; `default` if the file does not have the key.

        The key is added to `seen`. Most keys of a GGUF file begin with the name of the architecture: get() adds that
        name, this method does not.
        """
        self.seen.add(key)
        return self.file.get(key, default)

    def one(self, key: str, default: Any = None) -> Any:
        """The value of a key that must be equal in all layers, such as a number, a bool or a text.

        If the file has a list with a value for each layer, the result is their common value. Returns `default` if
        the file does not have the key. Raises PortError if the layers have different values.

        key: the part of the key after the architecture.
        """
        value = self.get(key, default)
        if not isinstance(value, list):
            return value
        own = value[: self.layers]
        if len(set(own)) != 1:
            raise PortError(
                f"{self.file.path}: {self.file.architecture}.{key} is {own[:8]}{'...' if len(own) > 8 else ''}; layers "
                "of different sizes are not ported"
            )
        return own[0]

    def whole(self, key: str, default: int | None = None) -> int:
        return int(self._number(key, default))

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._number(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.one(key, default))

    def _number(self, key: str, default: Any) -> float:
        value = self._needed(key, default)
        if isinstance(value, str | bytes | list) or not math.isfinite(value):
            raise CheckpointError(f"{self.file.path}: {self.file.architecture}.{key}={value!r}; wanted a finite number")
        return value

    def _needed(self, key: str, default: Any) -> Any:
        value = self.one(key, default)
        if value is None:
            raise CheckpointError(f"{self.file.path} lacks {self.file.architecture}.{key}; the file is incomplete")
        return value

    def fixed(self, key: str, wanted: int) -> None:
        """Raise PortError if the file has the key with a value other than `wanted`. Returns nothing.

        key: the part of the key after the architecture. wanted: the only value that is supported.
        """
        if self.get(key, wanted) != wanted:
            raise PortError(
                f"{self.file.path}: {self.file.architecture}.{key}={self.get(key)!r} is not ported; wanted {wanted}"
            )

    def refuse(self, key: str, why: str) -> None:
        """Raise PortError if the file has the key with a value other than 0, False or []. Returns nothing.

        Args:
            key: the part of the key after the architecture.
            why: the reason, for the error.
        """
        if self.get(key) not in (None, 0, False, []):
            raise PortError(f"{self.file.path}: {self.file.architecture}.{key}={self.get(key)!r} is not ported: {why}")

    @property
    def hidden(self) -> int:
        return self.tables.shape("model.embed_tokens.weight")[1]

    @property
    def heads(self) -> int:
        return self.whole("attention.head_count")

    @property
    def kv_heads(self) -> int:
        """Number of K/V heads of one layer. All layers with attention have this number.

        Without the key attention.head_count_kv, it is the number of query heads. Raises PortError if layers with
        attention have different numbers, or if no layer has attention.
        """
        own = self.kv_heads_by_layer
        if len({n for n in own if n}) != 1:
            self.one("attention.head_count_kv")
            raise PortError(
                f"{self.file.path}: attention.head_count_kv is {own} in {self.layers} layers; one needs heads"
            )
        return max(own)

    @property
    def kv_heads_by_layer(self) -> list[int]:
        """A list with the number of K/V heads of each layer; 0 for a layer without attention."""
        return [int(x) for x in self.by_layer("attention.head_count_kv", self.heads)]

    def by_layer(self, key: str, default: Any = None) -> list[float]:
        """Returns a list with a key's value for each layer. A single number in the file counts for every layer.

        Args:
            key: the part of the key after the architecture.
            default: a number or a list, used if the file does not have the key.

        Raises CheckpointError in three cases: the list has fewer values than the model has layers; a value is not a
        number; or the file lacks the key and `default` is None.
        """
        value = self.get(key, default)
        values = value[: self.layers] if isinstance(value, list) else [value] * self.layers
        if value is None:
            self._needed(key, None)
        if len(values) < self.layers or any(isinstance(x, str | bytes | list) or math.isnan(x) for x in values):
            raise CheckpointError(
                f"{self.file.path}: {self.file.architecture}.{key}={value!r}; wanted a number, or one for each of the "
                f"{self.layers} layers"
            )
        return values

    @property
    def head_dim(self) -> int:
        return self.whole("attention.key_length", self.hidden // self.heads)

    def has(self, name: str, layer: int = 0) -> bool:
        """True if the file has the tensor `name` in layer `layer`.

        name: transformers' name of the tensor after the prefix model.layers.N, such as self_attn.o_proj.bias.
        """
        return f"model.layers.{layer}.{name}" in self.tables.names

    def sliding(self, period: int) -> list[str]:
        """Returns a list with each layer's attention type, "sliding_attention" or "full_attention", as in config.json.

        The key attention.sliding_window_pattern of the file has a flag for each layer (true: sliding) or a number n.
        With a number, every n-th layer has full attention and the others slide; with 0 all layers have full attention.

        period: the number n if the file does not have the key.
        """
        pattern = self.get("attention.sliding_window_pattern", period)
        if not isinstance(pattern, list):
            pattern = [bool((i + 1) % pattern) if pattern else False for i in range(self.layers)]
        return ["sliding_attention" if slides else "full_attention" for slides in pattern[: self.layers]]
