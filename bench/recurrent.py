"""Speed of models with recurrent state on the host device, beside llama.cpp, transformers and the machine's roofs.

Shapes of about a billion active weights: gated delta nets with experts as in Qwen3-Next, and Mamba-2 blocks as in
Granite 4, each with some layers of attention. Random weights in bfloat16. Engines take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import gguf_path
from engines import ENGINES, Worker, compiled, decode_batches, missing, pages_each, prefill_batches, prompt
from host import HEAD, Result, bound, difference, machine, megabytes, moved, say, table, take_turns, versions

from intaglio.batch import Batch
from intaglio.devices import StateSpec
from intaglio.devices.host import HostDevice
from intaglio.measure.bench import Roofs, measured_roofs, read_stream
from intaglio.models import Checkpoint
from intaglio.ops import Experts
from intaglio.program import Program

TESTS = Path(__file__).resolve().parent.parent / "tests"
FORMAT = "bf16"
PROMPT, CONTEXT, STEPS = 512, 128, 9  # tokens of the prefill; tokens before decoding; steps of a decode sample
PHASES = ("decode", "prefill")
AGREE = 32  # tokens whose logits are compared
STATE = StateSpec(pages_each(PROMPT), slots=2)

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-next": {  # 8 of 48 layers, 32 of 512 experts
        "class": "Qwen3Next", "num_hidden_layers": 8, "num_experts": 32, "num_experts_per_tok": 10,
        "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936,
    },
    "granite-4": {  # 28 of 40 layers of Granite-4.0-H-1B
        "class": "GraniteMoeHybrid", "num_hidden_layers": 28, "hidden_size": 1536, "num_local_experts": 0,
        "shared_intermediate_size": 4096, "intermediate_size": 4096, "vocab_size": 100352, "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "layer_types": (["linear_attention"] * 9 + ["full_attention"]) * 2 + ["linear_attention"] * 8,
        "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2,
        "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125, "tie_word_embeddings": True,
    },
    "tiny": {  # for trying the script
        "class": "Qwen3Next", "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 3, "hidden_size": 128,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}  # fmt: skip


def write_checkpoint(folder: Path, shape: str) -> None:
    """Write the shape's checkpoint in `folder` with transformers, unless it is there already."""
    if (folder / "done").exists():
        return
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    keys = dict(SHAPES[shape])
    name = keys.pop("class")
    config = getattr(transformers, f"{name}Config")(**keys)
    torch.set_default_dtype(torch.bfloat16)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    (folder / "done").touch()


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, in float32, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> np.ndarray:
        values = np.asarray(self.checkpoint.read(name), np.float32)
        self.checkpoint.release(name)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.entries)

    def __len__(self) -> int:
        return len(self.checkpoint.entries)


def write_gguf(folder: Path) -> None:
    """Write the folder's checkpoint as llama.cpp's GGUF file in BF16, without a tokenizer, unless it is there already.

    The writer is that of the tests of Intaglio's GGUF reader.
    """
    path = gguf_path(folder, "BF16")
    if path.exists():
        return
    sys.path.insert(0, str(TESTS))
    from support.gguf_files import usual, write_file

    config = usual(json.loads((folder / "config.json").read_text()))

    def more(w: Any) -> None:
        w.add_tokenizer_model("no_vocab")
        w.add_vocab_size(config["vocab_size"])

    aside = path.with_suffix(".new")
    for _ in write_file(aside, config, Tensors(Checkpoint.open(folder)), "BF16", more):
        pass
    os.replace(aside, path)


def batches(phase: str) -> Iterator[Batch]:
    """The steps of one sample's unit: a whole prompt, or one decode step."""
    return prefill_batches([0] * PROMPT, state=STATE) if phase == "prefill" else decode_batches([CONTEXT], 1, STATE)


def active(program: Program) -> tuple[int, int]:
    """(weights that one token is multiplied with, bytes of recurrent state that it reads and writes)."""
    work = program.work(next(iter(batches("decode"))))
    flops = sum(w.flops for op in program.ops if (w := work[op.site]).weight_bytes)
    slots = [t for t in program.tensors.values() if t.role == "state" and t.shape[0] == "N"]
    return flops // 2, 2 * sum(t.nbytes({"N": 1}) for t in slots)


def measure(args: argparse.Namespace, shape: str, folder: Path, engines: Sequence[str]) -> list[Result]:
    """The results of one shape, printed as a table."""
    say(f"{shape}: checkpoint in {folder}")
    write_checkpoint(folder, shape)
    if "llama.cpp" in engines:
        write_gguf(folder)
    device, program = HostDevice(args.threads), compiled(folder, FORMAT)
    measured = measured_roofs(device)
    assert isinstance(measured, Roofs)
    weights, state = active(program)
    labels = {"decode": f"decode batch 1 at {CONTEXT}", "prefill": f"prefill {PROMPT}"}
    results, answers, touched = [], {}, {}
    with contextlib.ExitStack() as stack:
        room = [PROMPT + STEPS]
        workers = [stack.enter_context(Worker(n, folder, FORMAT, args.threads, room)) for n in engines]
        for w in workers:
            say(f"  loading {w.name}")
            w("load")
            w("settle")
            answers[w.name] = w("logits", prompt(AGREE, program.vocabulary))
        for phase in args.phase:
            label = labels[phase]
            say(f"  {label}")
            for w in workers if phase == "decode" else ():
                w("fill", [CONTEXT], STEPS)
                if w.name == "intaglio" and any(isinstance(op, Experts) for op in program.ops):
                    touched = w("touched")
            size = megabytes(max(moved(program, batch) for batch in batches(phase)))
            stream = partial(read_stream, device.facts(), size)
            method, more = ("decode", ()) if phase == "decode" else ("prefill", (PROMPT,))
            samples, streams = take_turns(workers, method, *more, runs=args.runs, stream=stream)
            result = Result(shape, FORMAT, label, "tok/s", 1 if phase == "decode" else PROMPT, samples)
            for rate in streams:
                roofs = replace(measured, bandwidth=lambda _, rate=rate: rate)
                step = touched if phase == "decode" else {}
                seconds, result.bound_by = bound(program, batches(phase), roofs, step)
                result.bounds.append(seconds)
            results.append(result)
    print(f"\n{shape}: {weights / 1e9:.2f}e9 weights a token, {state / 1e6:.0f} MB of recurrent state a step, bf16, "
          f"{args.threads} threads; read stream {measured.bandwidth(512) / 1e9:.1f} GB/s")  # fmt: skip
    print(table(HEAD, [r.cells() for r in results]))
    for a, b in combinations(answers, 2):
        print(f"logits of {AGREE} tokens, {a} and {b}: {agreement(answers[a], answers[b])}", flush=True)
    return results


def agreement(a: np.ndarray, b: np.ndarray) -> str:
    """A line of text that compares two engines' logits, each [tokens, vocabulary]."""
    apart, same = difference(a, b), float(np.mean(a.argmax(axis=1) == b.argmax(axis=1)))
    assert np.isfinite(apart)
    return f"relative difference {apart:.3f}, the same most likely token after {same:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["qwen3-next", "granite-4"])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all installed")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="keep checkpoints here and use them again; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    args = parser.parse_args()
    print(f"{machine()}; {platform.platform()}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
    print(f"processes that wanted a core in the last minute, before the start: {os.getloadavg()[0]:.1f}")
    if package := missing("torch"):
        parser.error(f"{package} is not installed (pip install -e '.[test,bench]'); it writes the checkpoints")
    engines = ["intaglio"]
    for engine in args.engine:
        if package := missing(engine):
            print(f"{engine}: left out, {package} is not installed (pip install -e '.[test,bench]')")
        elif engine != "intaglio":
            engines.append(engine)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() if args.dir is None else contextlib.nullcontext(args.dir) as root:
        for shape in args.shape:
            folder = Path(root) / shape
            folder.mkdir(parents=True, exist_ok=True)
            results += measure(args, shape, folder, engines)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
