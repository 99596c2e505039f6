"""Writes arrays and a config as a safetensors checkpoint folder. Used by tests."""

from __future__ import annotations

import json

import numpy as np

from intaglio.models import Checkpoint


def save(path, tensors, config):
    """A checkpoint of these float32 arrays."""
    header, data = {}, b""
    for name, x in tensors.items():
        blob = np.ascontiguousarray(x, np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    text = json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(path)
