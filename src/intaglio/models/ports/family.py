"""Family: one ported architecture, a row of the table that the modules of this package fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import Decoder, Writer

OTHER_PART = "a part of the model that is not ported"  # why a tensor of another tower has no use


@dataclass(frozen=True)
class Family:
    """A port: turns the config.json of one architecture into a Decoder (model description).

    Attributes:
        architecture: the architecture's name in config.json.
        models: the released models of this architecture.
        defaults: values of config keys that config.json may leave out.
        describe: function (Config, context length in tokens) -> Decoder.
        prefixes: possible prefixes of the decoder's tensor names.
        ignored: prefixes of the names of tensors that are not read, such as a vision tower's; * matches any text.
        writer: class that writes the Program's ops from a Decoder. A family with ops of its own has a subclass of
            Writer.
        model_types: values of model_type in config.json for which transformers uses this architecture.
        fixed: {config key: the only values that the port implements}, for keys that describe() need not read.
        aliases: {Llama's name of a config key: this family's name of the key}.
        prepare: function that changes values of the Config before the context length is read from it; None: none.
        tops: names of modules, such as embed_tokens, that show which prefix a checkpoint uses: the first in `prefixes`
            for which the checkpoint has a tensor PREFIX + MODULE + ".weight".
        adapt: function (Decoder, {tensor's name: shape}) -> Decoder; None: none. It changes the Decoder if checkpoints
            with equal configs name or divide tensors in different ways. The `prefix` of the Decoder is already set.
    """

    architecture: str
    models: str
    defaults: Mapping[str, Any]
    describe: Callable[[Config, int], Decoder]
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = ()
    writer: type[Writer] = Writer
    model_types: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Config], None] | None = None
    tops: tuple[str, ...] = ("embed_tokens", "norm", "layers.0.input_layernorm")
    adapt: Callable[[Decoder, Mapping[str, tuple[int, ...]]], Decoder] | None = None
