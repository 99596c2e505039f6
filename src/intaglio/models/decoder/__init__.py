"""Decoder: the description of a decoder-only model, which ports fill in, and the functions that write its Program."""

from intaglio.models.decoder.description import (
    BEFORE,
    GLM,
    NAMED,
    NAMED_BIASES,
    NUMBERED,
    ONE,
    POST,
    PRE,
    SANDWICH,
    STACKED,
    SUM,
    TRANSPOSED,
    UNGATED,
    UNGATED_STACKED,
    AltUp,
    Compressed,
    Decoder,
    Hyper,
    Indexer,
    Latent,
    Layer,
    Mixture,
    Shared,
    layer_norm_sizes,
    sizes,
    sparse,
    uniform_layers,
    window,
)
from intaglio.models.decoder.mixers import ConvMixer, DeltaMixer, LightningMixer, LruMixer, ScanMixer, SsmMixer
from intaglio.models.decoder.write import write
from intaglio.models.decoder.writer import Writer

__all__ = [
    "BEFORE", "GLM", "NAMED", "NAMED_BIASES", "NUMBERED", "ONE", "POST", "PRE", "SANDWICH", "STACKED", "SUM",
    "TRANSPOSED", "UNGATED", "UNGATED_STACKED", "AltUp", "Compressed", "ConvMixer", "Decoder", "DeltaMixer", "Hyper",
    "Indexer", "Latent", "Layer", "LightningMixer", "LruMixer", "Mixture", "ScanMixer", "Shared", "SsmMixer", "Writer",
    "layer_norm_sizes", "sizes", "sparse", "uniform_layers", "window", "write",
]  # fmt: skip
