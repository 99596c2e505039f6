"""Trains the model that ships with Intaglio: a 5 M parameter Llama on the Python standard library.

Uses torch, transformers and tokenizers, which running Intaglio never needs. The learning-rate schedule follows the wall
clock, so a run always ends on time with its cosine complete; for the same reason two runs agree closely, not bit for
bit. With glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=40000000000 spares page faults: an eighth faster.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "src" / "intaglio" / "data" / "stdlib-5m"
BOS, EOS = "<|bos|>", "<|eos|>"
SEED = 5
VOCAB = 4096
CONTEXT = 1024
TRAIN_LENGTH = 256  # on one Zen 4 core 2,970 tokens/s; 2,190 at 512, where attention takes over
LONG_SHARE = 0.15  # the end of the run trains at the full context, so that every position has been seen
TOKENS_PER_STEP = 2048  # small, because the budget buys only some 8 M tokens: steps are what is short
CURVE_TOKENS = 16384  # of the held-out stream, for the figures on the way; the final one takes all of it
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data",
}  # fmt: skip
SKIPPED_FILES = ("html/entities.py", "_sysconfigdata", "config-")  # tables, and what only names the build machine
NOTICE = """stdlib-5m: the model bundled with Intaglio

A Llama-style language model of about five million parameters, trained from scratch by scripts/train_bundled.py for
demonstrations and tests. It imitates Python source text; it is not a coding assistant, and what it writes is not
checked by anyone.

Training text: the sources of the Python {python} standard library, without its tests and its data tables.
{copyright}
The standard library is distributed under the PSF License Agreement (LICENSE.txt here, or
https://docs.python.org/3/license.html). The weights and the tokenizer may reproduce short passages of it.

The weights, the tokenizer and the configuration are distributed under the Apache License 2.0, like Intaglio itself.
"""


@dataclass(frozen=True)
class Corpus:
    """Token streams (bos + module + eos, end to end) and the number of UTF-8 bytes that the held-out one stands for."""

    train: torch.Tensor
    held: torch.Tensor
    held_bytes: int
    held_modules: int
    modules: int
    bytes: int


def is_held_out(path: str) -> bool:
    """About one module in twenty, by a hash of its path: the choice survives other Python versions."""
    return hashlib.sha256(path.encode()).digest()[0] < 13


def read_modules() -> dict[str, str]:
    """The running interpreter's library sources, by path inside the library."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")[:-1]) or name.startswith(SKIPPED_FILES):
            continue
        with contextlib.suppress(UnicodeDecodeError):
            modules[name] = file.read_text(encoding="utf-8")
    return modules


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: lossless for any text; digits stand alone, an indent joins the line break before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\n+ *(?=\S)| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\p{N}|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, modules: dict[str, str]) -> Corpus:
    eos = tokenizer.token_to_id(EOS)
    streams: dict[bool, list[int]] = {False: [], True: []}
    for name, text in modules.items():
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids) != text:
            raise SystemExit(f"{name}: the tokenizer does not give its text back")
        streams[is_held_out(name)] += [*ids, eos]
    held = [name for name in modules if is_held_out(name)]
    return Corpus(
        train=torch.tensor(streams[False]),
        held=torch.tensor(streams[True]),
        held_bytes=sum(len(modules[name].encode()) for name in held),
        held_modules=len(held),
        modules=len(modules),
        bytes=sum(len(text.encode()) for text in modules.values()),
    )


def float32_attention(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
    """Causal attention outside autocast: torch's bfloat16 one is a third slower on a CPU than its float32 one."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """5.2 M parameters; every width is a multiple of 128, so any block format and any 2- or 4-way split fits."""
    torch.manual_seed(SEED)
    AttentionInterface.register("float32", float32_attention)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            attn_implementation="float32",
        )
    )


def build_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def draw_batch(corpus: Corpus, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, length] and their next tokens, a function of the step alone.

    Each window opens with bos whatever it cuts into, so that a prompt need not be the head of a module.
    """
    random = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    starts = torch.randint(len(corpus.train) - length, (TOKENS_PER_STEP // length, 1), generator=random)
    window = corpus.train[starts + torch.arange(length + 1)]
    inputs = window[:, :-1].clone()
    inputs[:, 0] = corpus.train[0]
    return inputs, window[:, 1:]


def rate_share(share: float) -> float:
    """Learning rate over its peak at a share of the run: 2 % warm-up, then a cosine down to a tenth."""
    if share < 0.02:
        return max(share / 0.02, 0.01)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.02) / 0.98)))


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, corpus: Corpus, step: int, length: int, dtype: torch.dtype
) -> float:
    inputs, labels = draw_batch(corpus, step, length)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, corpus: Corpus, length: int = TRAIN_LENGTH, tokens: int | None = None
) -> float:
    """On the held-out stream in windows of `length`, every token predicted once; on its first `tokens` if given."""
    stream = corpus.held[: tokens + 1] if tokens else corpus.held
    bits = 0.0
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        bits += F.cross_entropy(logits.float(), window[1:], reduction="sum").item() / math.log(2)
    return bits / (corpus.held_bytes * len(stream) / len(corpus.held))


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def probe(corpus: Corpus, tokenizer: Tokenizer, steps: int = 10) -> None:
    """Tokens a second for each number format and thread count, so that the caller can choose."""
    for threads in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_num_threads(threads)
            model = build_model(tokenizer)
            optimizer = build_optimizer(model, 1e-3)
            train_step(model, optimizer, corpus, 0, TRAIN_LENGTH, dtype)
            start = time.monotonic()
            for step in range(steps):
                train_step(model, optimizer, corpus, step, TRAIN_LENGTH, dtype)
            log(f"{threads} threads {dtype}: {steps * TOKENS_PER_STEP / (time.monotonic() - start):.0f} tokens/s")


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Written aside and renamed: a kill in the middle leaves the one before it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    torch.save(state, aside)
    os.replace(aside, path)


def train(
    model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace, dtype: torch.dtype
) -> tuple[int, float, list[dict[str, float]]]:
    """Trains in place until the clock says so; returns steps, seconds and the held-out curve."""
    optimizer = build_optimizer(model, args.rate)
    budget, step, spent, curve = 60 * args.minutes, 0, 0.0, []
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, curve = state["step"], state["seconds"], state["curve"]
        log(f"resumed at step {step}, {spent:.0f} s")
    start = time.monotonic() - spent
    logged, saved, logged_step = spent, spent, step
    while (seconds := time.monotonic() - start) < budget:
        share = seconds / budget
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate_share(share)
        length = CONTEXT if share > 1 - LONG_SHARE else TRAIN_LENGTH
        loss = train_step(model, optimizer, corpus, step, length, dtype)
        step += 1
        if seconds - logged > 20:
            speed = (step - logged_step) * TOKENS_PER_STEP / (seconds - logged)
            log(f"{seconds:6.0f} s  step {step}  loss {loss:.3f}  {speed:.0f} tokens/s")
            logged, logged_step = seconds, step
        if seconds - saved > min(240.0, budget / 4):
            bpb = bits_per_byte(model, corpus, tokens=CURVE_TOKENS)
            curve.append({"seconds": round(seconds), "tokens": step * TOKENS_PER_STEP, "bits_per_byte": round(bpb, 4)})
            log(f"{seconds:6.0f} s  step {step}  held-out {bpb:.4f} bits per byte (first {CURVE_TOKENS} tokens)")
            save_checkpoint(
                args.checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                    "curve": curve,
                },
            )
            saved = seconds
    return step, time.monotonic() - start, curve


def write_model(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, report: dict[str, object]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=ids["eos_token_id"])
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    holder = " ".join(sys.copyright.split("\n")[:2])
    (out / "NOTICE").write_text(NOTICE.format(python=platform.python_version(), copyright=holder))
    license_text = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if license_text.exists():
        (out / "LICENSE.txt").write_text(license_text.read_text())
    (out / "model.safetensors").chmod(0o644)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=50, help="wall-clock budget of the training itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "intaglio-train" / "state.pt")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of a run that was cut off")
    parser.add_argument("--probe", action="store_true", help="only measure tokens/s by number format and threads")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    modules = read_modules()
    tokenizer = train_tokenizer([text for name, text in modules.items() if not is_held_out(name)])
    corpus = encode(tokenizer, modules)
    log(
        f"{corpus.modules} modules, {corpus.bytes} bytes, {len(corpus.train)} training tokens; held out: "
        f"{corpus.held_modules} modules, {corpus.held_bytes} bytes, {len(corpus.held)} tokens"
    )
    if args.probe:
        return probe(corpus, tokenizer)
    torch.set_num_threads(args.threads)
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    before = bits_per_byte(model, corpus, tokens=CURVE_TOKENS)
    log(f"{parameters} parameters, {before:.4f} bits per byte before training")
    steps, seconds, curve = train(model, corpus, args, getattr(torch, args.dtype))
    # What ships is bfloat16, so that is what the figure is about.
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    after = bits_per_byte(model, corpus, CONTEXT)
    tokens = steps * TOKENS_PER_STEP
    log(f"{after:.4f} held-out bits per byte after {tokens} tokens in {seconds:.0f} s")
    report = {
        "parameters": parameters,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "modules": corpus.modules,
        "corpus_bytes": corpus.bytes,
        "training_stream_tokens": len(corpus.train),
        "held_out_modules": corpus.held_modules,
        "held_out_bytes": corpus.held_bytes,
        "steps": steps,
        "tokens_seen": tokens,
        "seconds": round(seconds),
        "tokens_per_second": round(tokens / seconds),
        "threads": args.threads,
        "dtype": args.dtype,
        "held_out_measure": f"before and during: the first {CURVE_TOKENS} tokens in windows of {TRAIN_LENGTH}; "
        f"after: all of them in windows of {CONTEXT}, with the weights as shipped",
        "held_out_bits_per_byte": {"before": round(before, 4), "during": curve, "after": round(after, 4)},
    }
    write_model(args.out, model.bfloat16(), tokenizer, report)
    args.checkpoint.unlink(missing_ok=True)
    log(f"wrote {args.out}")


if __name__ == "__main__":
    main()
