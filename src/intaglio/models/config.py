"""Reads config.json: typed values over a family's defaults, with errors that name the key.

Records which keys are read, so that unread ones can be reported (keys.py). The description of a model that is made from
the config is decoder.Decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from intaglio.models.kinds import kind_wanted

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
MLP_TYPES = ("dense", "sparse")
PER_LAYER = ("mlp_layer_types", "no_rope_layers", "layer_rope_theta", "indexer_types")  # lists of one value per layer


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read. The message names file, value and, if known, remedy."""


class PortError(ValueError):
    """Raised for a model that cannot be ported. The message has the key or tensor, its value and what is allowed."""


class Settings(dict[str, Any]):
    """A table (JSON object) of a config file that records which of its keys are read.

    Attributes:
        at: path of the table in the file, such as rope_parameters.
        given: the keys and values in the file, without those set later, such as defaults.
        seen: the keys that were read.
        ignored: {a key without effect: the reason}.
    """

    def __init__(self, table: Mapping[str, Any], at: str = "") -> None:
        super().__init__(table)
        self.at = at
        self.given = dict(table)
        self.seen: set[str] = set()
        self.ignored: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return self._checked(key, super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return self._checked(key, super().get(key, default))

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().setdefault(key, default)

    def _checked(self, key: str, value: Any) -> Any:
        if wanted := kind_wanted(key, value):
            raise PortError(f"config.json: {self.path(key)}={value!r}; wanted {wanted}")
        return value

    def path(self, key: str) -> str:
        """The place of a key in the config file, as text with dots, such as rope_parameters.rope_theta.

        key: a key of this table, present or not.
        """
        return f"{self.at}.{key}" if self.at else key

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) of each key in the file that has not been read."""
        return ((key, value) for key, value in self.given.items() if key not in self.seen)


class Config:
    """config.json, with a family's defaults for keys that the file leaves out. Records which keys are read.

    As in transformers, a key that is null in config.json has no value; it does not take the default.

    Attributes:
        table: the values by key: those of the file, the defaults, and values that a port has set.
        given: the keys and values in the file.
        seen: the keys that were read.
        parts: copies of the nested tables that settings() returned, such as rope_scaling. Each copy records which of
            its own keys are read.
        replaced: {a key that another one overrides: the reason}.
        mlp_types: the values that the list mlp_layer_types may have; a port whose layers have other values sets them.
        ignored: {prefix of tensor names: why this config makes the port ignore such tensors}. Tensors that a family
            always ignores are listed in its Family instead.
        named: {a key as ports read it: the file's own name for the key}, where the two names differ. Errors use the
            file's name.
    """

    def __init__(self, table: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.table: dict[str, Any] = {**defaults, **table}
        self.given = dict(table)
        self.seen: set[str] = set()
        self.parts: list[Settings] = []
        self.replaced: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        self.named: dict[str, str] = {}
        self.mlp_types: tuple[str, ...] = MLP_TYPES

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` if it has none.

        Raises PortError for a value that is not of the key's kind (kinds.py), and for a list of one value per layer
        that has another length than num_hidden_layers.
        """
        self.seen.add(key)
        value = self.table.get(key)
        if wanted := kind_wanted(key, value):
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted {wanted}")
        if key in PER_LAYER and value:
            self.check_length(key, value)
        if key == "mlp_layer_types" and (unknown := sorted({*(value or ())} - {*self.mlp_types})):
            raise PortError(f"config.json: {key} has {unknown[0]!r}; wanted {' or '.join(self.mlp_types)}")
        return default if value is None else value

    def check_length(self, key: str, values: Sequence[Any]) -> None:
        """Raise PortError if `values`, a list with one value per layer, does not have num_hidden_layers values.

        key: the key of config.json that has the list, for the error. Without num_hidden_layers nothing is checked.
        """
        layers = self.table.get("num_hidden_layers")
        if isinstance(layers, int) and len(values) != layers:
            raise PortError(f"config.json: {key} lists {len(values)} layers but num_hidden_layers={layers}")

    def name(self, key: str) -> str:
        """The name that config.json uses for a setting, for error messages.

        key: the usual name of the setting. It is returned unchanged unless this model type has another name for it.
        """
        return self.named.get(key, key)

    def either(self, *keys: str) -> str:
        """The name of the first of these keys that has a value in the config (not null); the last name if none has one.

        Called where config files use different keys for the same setting. All the keys count as read. Raises PortError
        if the file gives several of them unlike values.
        """
        valued = [key for key in keys if self.get(key) is not None]
        told = [key for key in valued if key in self.given]
        if wrong := [key for key in told[1:] if self.given[key] != self.given[told[0]]]:
            first = told[0]
            raise PortError(
                f"config.json: {self.name(first)}={self.given[first]!r} and {self.name(wrong[0])}="
                f"{self.given[wrong[0]]!r}, two names of one value; wanted equal values, or one of the names"
            )
        return valued[0] if valued else keys[-1]

    def count(self, key: str) -> int:
        """The value of a key that is an integer of 0 or more. Raises PortError for another or a missing value."""
        value = self.get(key)
        if value is None:
            raise PortError(f"config.json lacks {self.name(key)!r}, which this family needs")
        return int(value)

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        """The value of a key that lists as many numbers as `default`, as a tuple; `default` if the key has no value.

        Raises PortError for a list of another length.
        """
        values = self.get(key, default)
        if len(values) != len(default):
            raise PortError(f"config.json: {self.name(key)}={values!r}; wanted {len(default)} numbers")
        return tuple(float(x) for x in values)

    def settings(self, key: str, inner: str = "") -> Settings:
        """A Settings copy of the table at `key`, or of the table `inner` inside it; empty if there is none.

        The copy records which of its keys are read. Raises PortError if the value is not a table.
        """
        value = self.get(key, {})
        at = key
        if inner and isinstance(value, Mapping):
            value, at = value.get(inner) or {}, f"{key}.{inner}"
        if not isinstance(value, Mapping):
            raise PortError(f"config.json: {at}={value!r}; wanted an object {{...}}")
        out = Settings(value, at)
        known = next((part for part in self.parts if part.at == at), None)
        if known is None:
            self.parts.append(out)
        else:
            out.seen, out.ignored = known.seen, known.ignored
        return out

    def whole(self, key: str, default: int | None = None) -> int:
        """The value of a key that is a count: an integer of 1 or more. Raises PortError for any other value.

        default: used if the key has no value. Without a default, a missing value raises PortError.
        """
        value = self.get(key, default)
        if value is None:
            raise PortError(f"config.json lacks {self.name(key)!r}, which this family needs")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted an integer of 1 or more")
        return value

    def whole_or_none(self, key: str) -> int | None:
        """The value of a key that is a count, as whole() checks it; None if it has no value."""
        return None if self.get(key) is None else self.whole(key)

    def real(self, key: str, default: float | None = None) -> float:
        """The value of a key that is a finite number above 0. Raises PortError for any other value.

        default: used if the key has no value. Without a default, a missing value raises PortError.
        """
        value = self.get(key, default)
        if value is None:
            raise PortError(f"config.json lacks {self.name(key)!r}, which this family needs")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """The value of a key that is true or false; False if it has no value. Raises PortError for anything else."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted true or false")
        return value

    def refuse(self, *keys: str, why: str) -> None:
        """Raise PortError, with the reason `why`, if any of these keys has a value other than false, 0, 0.0 or {}.

        A key that is missing or null is accepted too.
        """
        for key in keys:
            if self.get(key) not in (None, False, 0, {}):
                raise PortError(f"config.json: {self.name(key)}={self.get(key)!r} is not supported: {why}")

    def activation(self, key: str = "hidden_act") -> str:
        """Name of the activation function, as ops call it. Raises PortError for an unknown one.

        key: the key of config.json that has the function's name.
        """
        value = self.get(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise PortError(
                f"config.json: {self.name(key)}={value!r} is not ported; known are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def need_silu(self, why: str, key: str = "hidden_act") -> None:
        """Raise PortError unless the activation function is silu. Returns nothing.

        why: the end of the message. key: the key of config.json that has the function's name.
        """
        if self.activation(key) != "silu":
            raise PortError(f"config.json: {self.name(key)}={self.get(key)!r}; {why}")

    def layer_types(
        self, every: int = 0, usual: Sequence[str] | None = None, known: Sequence[str] = LAYER_TYPES
    ) -> list[str]:
        """The attention type of each layer, as a list: the value of the key `layer_types`, or a default.

        Args:
            every: for the default: each `every`-th layer has full attention and the others a sliding window; 0: all
                layers have full attention.
            usual: the default itself; None: the one that `every` gives.
            known: the types that are allowed.

        Raises PortError for a type that is not in `known`, and for another number of types than num_hidden_layers.
        """
        n = self.whole("num_hidden_layers")
        usual = usual or ["sliding_attention" if every and (i + 1) % every else "full_attention" for i in range(n)]
        kinds = self.get("layer_types", usual)
        self.check_length("layer_types", kinds)
        for i, kind in enumerate(kinds):
            if kind not in known:
                raise PortError(f"config.json: layer_types[{i}]={kind!r} is not ported; known are {', '.join(known)}")
        return list(kinds)
