"""Reading a model's config.json: typed values with a family's defaults, and errors that name the key.

Not the description of a model: that is decoder.Decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


class PortError(ValueError):
    """A model that cannot be ported as it stands: it says which key or tensor, its value, what is allowed."""


class Config:
    """config.json over a family's defaults. As in transformers, a key that is null is none, not the default."""

    def __init__(self, table: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.table: dict[str, Any] = {**defaults, **table}

    def get(self, key: str, default: Any = None) -> Any:
        value = self.table.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A count: an integer of 1 or more."""
        value = self.get(key, default)
        if value is None:
            raise PortError(f"config.json lacks {key!r}, which this family needs")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PortError(f"config.json: {key}={value!r}; wanted an integer of 1 or more")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if value is None:
            raise PortError(f"config.json lacks {key!r}, which this family needs")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise PortError(f"config.json: {key}={value!r}; wanted a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise PortError(f"config.json: {key}={value!r}; wanted true or false")
        return value

    def refuse(self, *keys: str, why: str) -> None:
        """Raise PortError if any of these keys is set to something."""
        for key in keys:
            if self.get(key) not in (None, False, 0, {}):
                raise PortError(f"config.json: {key}={self.get(key)!r} is not supported: {why}")

    def activation(self, key: str = "hidden_act") -> str:
        value = self.get(key)
        if value not in ACTIVATIONS:
            raise PortError(f"config.json: {key}={value!r} is not ported; known are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def layer_types(self, every: int = 0) -> list[str]:
        """The kind of each layer. Without `layer_types`: each `every`-th is full, the others slide; all full if 0."""
        n = self.whole("num_hidden_layers")
        usual = ["sliding_attention" if every and (i + 1) % every else "full_attention" for i in range(n)]
        kinds = self.get("layer_types", usual)
        if len(kinds) != n:
            raise PortError(f"config.json: layer_types lists {len(kinds)} layers but num_hidden_layers={n}")
        for i, kind in enumerate(kinds):
            if kind not in LAYER_TYPES:
                known = ", ".join(LAYER_TYPES)
                raise PortError(f"config.json: layer_types[{i}]={kind!r} is not ported; known are {known}")
        return list(kinds)
