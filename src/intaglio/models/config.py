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
    """Raised for a checkpoint that cannot be read.

    The message names the file and the wrong value and, if known, says what to do.
    """


class PortError(ValueError):
    """Raised for a model that is not supported.

    The message names the key or tensor, its value and the values that are allowed.
    """


class Settings(dict[str, Any]):
    """A dict with the values of a JSON object in a config file. It records which of its keys are read.

    Attributes:
        at: path of the object in the file, such as rope_parameters; "" for the outermost object.
        given: the keys and values in the file, without keys that were set later, such as defaults.
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
        """The place of `key` in the config file, with dots between names, such as rope_parameters.rope_theta."""
        return f"{self.at}.{key}" if self.at else key

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) for each key of the file that has not been read."""
        return ((key, value) for key, value in self.given.items() if key not in self.seen)


class Config:
    """The values of a config.json, with defaults for keys that the file leaves out. It records which keys are read.

    A key that is null in config.json has no value; it does not get the default. transformers does the same.

    Attributes:
        table: all values by key: from the file, from the defaults, and values set later by the code that reads the
            model.
        given: the keys and values in the file alone.
        seen: the keys that were read.
        parts: copies of the nested tables that settings() returned, such as rope_scaling. Each copy records which of
            its own keys are read.
        replaced: {key that has no effect because another key overrides it: the reason}.
        mlp_types: the values that are allowed in the list mlp_layer_types.
        ignored: {prefix of tensor names: why tensors with this prefix are not needed under this config}.
        named: {key that the code reads: name of that key in the file}, where the two names differ. Error messages use
            the name in the file.
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
        """The value of `key`; `default` if the key is missing or null.

        Raises PortError if the value is not of the kind that the key must have (kinds.py), and if the key lists one
        value per layer but the list does not have num_hidden_layers values.
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
        """Raise PortError if the list `values` does not have one value for each of the num_hidden_layers layers.

        key: the key of config.json that has the list, for the message. Nothing is checked if the config lacks
        num_hidden_layers.
        """
        layers = self.table.get("num_hidden_layers")
        if isinstance(layers, int) and len(values) != layers:
            raise PortError(f"config.json: {key} lists {len(values)} layers but num_hidden_layers={layers}")

    def name(self, key: str) -> str:
        """The name of `key` in this config.json, for error messages.

        It is `key` itself, unless files of this model type use another name.
        """
        return self.named.get(key, key)

    def either(self, *keys: str) -> str:
        """The first of `keys` that has a value other than null; the last of `keys` if none has one.

        Used where config files have different keys for the same setting. All the keys count as read. Raises PortError
        if the file has several of the keys, with different values.
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
        """The value of `key`, an integer of 0 or more. Raises PortError for any other value, or if there is none."""
        value = self.get(key)
        if value is None:
            raise PortError(f"config.json lacks {self.name(key)!r}, which this family needs")
        return int(value)

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        """The numbers that `key` lists, as a tuple of floats; `default` if the key has no value.

        Raises PortError if the list is not as long as `default`.
        """
        values = self.get(key, default)
        if len(values) != len(default):
            raise PortError(f"config.json: {self.name(key)}={values!r}; wanted {len(default)} numbers")
        return tuple(float(x) for x in values)

    def settings(self, key: str, inner: str = "") -> Settings:
        """The JSON object at `key`, or the object `inner` inside it, as a Settings.

        It is empty if the file has no such object. The Settings is a copy that records which of its keys are read.
        Raises PortError if the value is not an object.
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
        """The value of `key`, an integer of 1 or more; `default` if the key has no value.

        Raises PortError for any other value, and for a missing value if `default` is None.
        """
        value = self.get(key, default)
        if value is None:
            raise PortError(f"config.json lacks {self.name(key)!r}, which this family needs")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted an integer of 1 or more")
        return value

    def whole_or_none(self, key: str) -> int | None:
        """The value of `key`, an integer of 1 or more; None if the key has no value.

        Raises PortError for any other value.
        """
        return None if self.get(key) is None else self.whole(key)

    def real(self, key: str, default: float | None = None) -> float:
        """The value of `key`, a finite number above 0; `default` if the key has no value.

        Raises PortError for any other value, and for a missing value if `default` is None.
        """
        value = self.get(key, default)
        if value is None:
            raise PortError(f"config.json lacks {self.name(key)!r}, which this family needs")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """The value of `key`, true or false; False if the key has no value. Raises PortError for any other value."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise PortError(f"config.json: {self.name(key)}={value!r}; wanted true or false")
        return value

    def refuse(self, *keys: str, why: str) -> None:
        """Raise PortError, with the reason `why`, if one of `keys` is set.

        A key is not set if it is missing or its value is null, false, 0 or {}.
        """
        for key in keys:
            if self.get(key) not in (None, False, 0, {}):
                raise PortError(f"config.json: {self.name(key)}={self.get(key)!r} is not supported: {why}")

    def activation(self, key: str = "hidden_act") -> str:
        """The name of the config's activation function, as ops call it. Raises PortError if it is unknown.

        key: the key of config.json that names the function.
        """
        value = self.get(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise PortError(
                f"config.json: {self.name(key)}={value!r} is not ported; known are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def need_silu(self, why: str, key: str = "hidden_act") -> None:
        """Raise PortError if the activation function is not silu.

        why: the end of the message. key: the key of config.json that names the function.
        """
        if self.activation(key) != "silu":
            raise PortError(f"config.json: {self.name(key)}={self.get(key)!r}; {why}")

    def layer_types(
        self, every: int = 0, usual: Sequence[str] | None = None, known: Sequence[str] = LAYER_TYPES
    ) -> list[str]:
        """The attention type of each layer, as a list: the value of the key `layer_types`, or a default.

        Args:
            every: the default if `usual` is None: one layer in `every` (layers every - 1, 2 * every - 1, ...) has full
                attention, the others have a sliding window. 0: all layers have full attention.
            usual: the default, one type per layer; None: `every` determines the default.
            known: the types that are allowed.

        Raises PortError for a type that is not in `known`, and for a list that does not have num_hidden_layers types.
        """
        n = self.whole("num_hidden_layers")
        usual = usual or ["sliding_attention" if every and (i + 1) % every else "full_attention" for i in range(n)]
        kinds = self.get("layer_types", usual)
        self.check_length("layer_types", kinds)
        for i, kind in enumerate(kinds):
            if kind not in known:
                raise PortError(f"config.json: layer_types[{i}]={kind!r} is not ported; known are {', '.join(known)}")
        return list(kinds)
