"""Accuracy of weight formats and of llama.cpp's: relative error of random layers, bits per byte of a model.

The model is the bundled one, on text it was not trained on; lower is better everywhere.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from checkpoints import gguf_name, llama_api, write_gguf, write_safetensors
from engines import Engine, Intaglio, LlamaCpp, compiled
from host import say, table
from tokenizers import Tokenizer

from intaglio import formats
from intaglio.model import BUNDLED
from intaglio.models import Checkpoint
from intaglio.models.files.checkpoint import read_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

OURS = {"bf16": "bf16", "int8": "int8g128", "int4": "int4g32"} | {n: n for n in ("int8g32", "int4g128", "q4_k")}
PEERS = {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K"}  # a model's format, and that of most of its layers
ORDER = ("bf16", "int8", "int8g32", "Q8_0", "int4", "int4g128", "Q4_0", "q4_k", "Q4_K_M")
ROWS, COLUMNS, INPUTS = 1024, 2048, 64
FREEDOM = 4  # degrees of freedom of the heavy-tailed weights: the fewest with room for a variance that settles
WINDOW = 1024  # tokens of context at most, the bundled model's own


@dataclass(frozen=True)
class HeldOut:
    """Tokens of the held-out modules, and how many bytes of text they stand for."""

    ids: list[int]
    bytes: float


@dataclass(frozen=True)
class Quality:
    """Of one format. `as_run` includes what the engine does to activations; the others are of the weights alone.

    Which of the values share a scale is chance, and so is much of what the bundled model loses: `weights_only` has one
    value for each of several orders of the columns.
    """

    layer_bits: float
    normal: float
    heavy: float
    model_bits: float
    weights_only: list[float]
    as_run: float

    def cells(self) -> list[str]:
        errors = [f"{100 * x:.3f}%" for x in (self.normal, self.heavy)]
        mean, off = np.mean(self.weights_only), np.std(self.weights_only, ddof=1) / len(self.weights_only) ** 0.5
        model = [f"{self.model_bits:.2f}", f"{mean:.4f}", f"{off:.4f}", f"{self.as_run:.4f}"]
        return [f"{self.layer_bits:.2f}", *errors, *model]


HEAD = ["format", "", "bits/weight", "normal", "heavy-tailed", "bits/weight", "weights only", "+-", "as run"]
OVER = ["", "", "layer:", "error", "error", "model:", "bits/byte", "", "bits/byte"]


Rounding = Callable[[np.ndarray], tuple[np.ndarray, float]]  # values as a format holds them, and its bits a weight


def rounded(w: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """`w` as a format of this project holds it, and bits a weight."""
    fmt = formats.get(name)
    values = formats.quantise(w, name).rows(slice(None)) if fmt.grouped else formats.round_to(w, name)
    return values, 8 * fmt.nbytes(*w.shape) / w.size


def peer_rounded(w: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """`w` as a format of llama.cpp holds it, by its own C code, and bits a weight."""
    quantise = ctypes.CDLL(str(Path(llama_api().__file__).parent / "lib" / "libggml-base.so")).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType[name]
    w = np.ascontiguousarray(w, np.float32)
    out = np.empty((len(w), gguf.quant_shape_to_byte_shape(w.shape, kind)[-1]), np.uint8)
    quantise(int(kind), w.ctypes.data, out.ctypes.data, 0, *w.shape, None)
    return gguf.quants.dequantize(out, kind), 8 * out.nbytes / w.size


def layer_error(round_weights: Rounding, heavy: bool) -> float:
    """Relative error of w x over random normal x, the weights normal or Student's t."""
    rng = np.random.default_rng(1)
    shape = (ROWS, COLUMNS)
    w = 0.02 * (rng.standard_t(FREEDOM, shape) if heavy else rng.standard_normal(shape)).astype(np.float32)
    x = rng.standard_normal((COLUMNS, INPUTS), np.float32)
    exact = w @ x
    return float(np.linalg.norm(round_weights(w)[0] @ x - exact) / np.linalg.norm(exact))


def held_out(tokens: int | None) -> HeldOut:
    """By the rule of the bundled model's training, from the running interpreter's library."""
    from train_bundled import encode, is_held_out, read_modules

    trained = read_json(BUNDLED / "training.json")
    if trained["python"] != platform.python_version():
        print(
            f"Python {platform.python_version()}, trained on {trained['python']}: held-out modules may differ a little"
        )
    modules = {name: text for name, text in read_modules().items() if is_held_out(name)}
    corpus = encode(Tokenizer.from_file(str(BUNDLED / "tokenizer.json")), modules)
    ids = corpus.held.tolist()[: tokens and tokens + 1]
    print(f"{BUNDLED.name} on {len(ids)} of {len(corpus.held)} tokens of {corpus.held_modules} modules held out")
    print(f"training's own figure on all of them: {trained['held_out_bits_per_byte']['after']} bits per byte")
    return HeldOut(ids, corpus.held_bytes * len(ids) / len(corpus.held))


def bits_per_byte(engine: Engine, text: HeldOut) -> float:
    """In windows; every token but the first is predicted once."""
    engine.load()
    bits = 0.0
    for start in range(0, len(text.ids) - 1, WINDOW):
        window = text.ids[start : start + WINDOW + 1]
        logits = engine.logits(window[:-1]).astype(np.float64)
        peak = logits.max(axis=1)
        chosen = logits[np.arange(len(logits)), window[1:]]
        bits += float((np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak - chosen).sum()) / math.log(2)
    return bits / text.bytes


def our_roundings(checkpoint: Checkpoint, name: str) -> dict[str, Rounding]:
    """How our compiler lays out each of the model's tensors."""
    tensors = compiled(checkpoint.path, name).of_role("weight")
    return {source: partial(rounded, name=t.format) for t in tensors for source in t.source}


def peer_roundings(checkpoint: Checkpoint, path: Path) -> dict[str, Rounding]:
    """The same of a file that llama.cpp quantised."""
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    stored = {name: types.get(gguf_name(name)) for name in checkpoint.names}
    return {name: partial(peer_rounded, name=kind) for name, kind in stored.items() if kind}


def model_values(
    checkpoint: Checkpoint, roundings: Mapping[str, Rounding], order: int
) -> tuple[dict[str, np.ndarray], float]:
    """The model's tensors as float32, matrices rounded with their columns in a random order, and bits a weight."""
    values: dict[str, np.ndarray] = {}
    bits = matrix = 0.0
    for name, rounding in roundings.items():
        values[name] = checkpoint.read(name).astype(np.float32)
        if values[name].ndim == 2:
            columns = np.random.default_rng([order, *name.encode()]).permutation(values[name].shape[1])
            values[name][:, columns], each = rounding(values[name][:, columns])
            bits, matrix = bits + each * values[name].size, matrix + values[name].size
    return values, bits / matrix


def float_folder(folder: Path, config: Path, values: Mapping[str, np.ndarray]) -> Path:
    """A checkpoint of these float32 tensors."""
    folder.mkdir()
    (folder / "config.json").symlink_to(config)
    kind = np.dtype(np.float32)
    write_safetensors(
        folder / "model.safetensors", {n: (x.shape, kind) for n, x in values.items()}, iter(values.values())
    )
    return folder


def bundled_copy(root: Path) -> Path:
    """The bundled model in a folder that files can be added to."""
    folder = root / BUNDLED.name
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(BUNDLED / name)
    return folder


def quality(name: str, root: Path, folder: Path, text: HeldOut, orders: int, threads: int) -> Quality:
    """All figures of one format."""
    checkpoint = Checkpoint.open(folder)
    engine: Engine
    if name in OURS:
        layer = partial(rounded, name=OURS[name])
        roundings = our_roundings(checkpoint, name)
        engine = Intaglio(folder, name, threads, [WINDOW])
    else:
        layer = partial(peer_rounded, name=PEERS[name])
        roundings = peer_roundings(checkpoint, write_gguf(folder, name, threads))
        engine = LlamaCpp(folder, name, threads, [WINDOW])
    alone, bits = [], 0.0
    for order in range(orders):
        values, bits = model_values(checkpoint, roundings, order)
        copy = float_folder(root / name, folder / "config.json", values)
        alone.append(bits_per_byte(Intaglio(copy, "f32", threads, [WINDOW]), text))
        shutil.rmtree(copy)
    return Quality(
        layer(np.zeros((1, COLUMNS), np.float32))[1],
        layer_error(layer, heavy=False),
        layer_error(layer, heavy=True),
        bits,
        alone,
        bits_per_byte(engine, text),
    )


NOTES = f"""
Layers are {ROWS} x {COLUMNS}, x normal, products in float32; heavy-tailed is Student's t, {FREEDOM} degrees of freedom.
Weights only: the format's values as float32 through the host device with float32 activations, ours and llama.cpp's;
the mean of several orders of the columns, the same for all formats, and its standard error.
As run: each by its own engine. Ours then rounds activations to bf16, or to int8 for int8 and int4 weights; llama.cpp
to its Q8_0 or Q8_K. Ours keeps the tied output table at int8g128 for 4 bits; llama.cpp chooses a format for each
tensor by itself. Hence the model's own bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--tokens", type=int, help="of the held-out text; default: all")
    parser.add_argument("--orders", type=int, default=5, help="of the columns, over which to take the mean")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.orders < 2:
        parser.error(f"--orders {args.orders}: at least 2, or there is no telling how far a mean is off")
    text = held_out(args.tokens)
    lines = [HEAD]
    with tempfile.TemporaryDirectory() as root:
        folder = bundled_copy(Path(root))
        for name in args.format:
            say(name)
            q = quality(name, Path(root), folder, text, args.orders, args.threads)
            whose = "intaglio" if name in OURS else "llama.cpp"
            full = OURS.get(name, name)
            lines.append([name if full == name else f"{name} ({full})", whose, *q.cells()])
    print(table(OVER, lines))
    print(NOTES)


if __name__ == "__main__":
    main()
