"""One row of the table of ported architectures. The rows stand in the files of their families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.models.config import Config
from intaglio.models.decoder import Decoder


@dataclass(frozen=True)
class Family:
    """`describe(config, context)` fills in the Decoder; `defaults` are what config.json may leave out. `prefixes` are
    where the decoder's tensors may stand, `ignored` the starts of tensor names that belong to parts not ported."""

    architecture: str
    models: str
    defaults: Mapping[str, Any]
    describe: Callable[[Config, int], Decoder]
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = ()
