"""Holding a checkpoint's Program against transformers, site by site, both in float32: where do they first part?

The reference for a site is what a transformers module of the same weight puts out or takes in, or its cache of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.batch import Chunk, bind
from intaglio.devices import StateSpec, open_device
from intaglio.models import Checkpoint, port
from intaglio.ops import Embed, KvWrite, Linear, Norm, Op
from intaglio.program import Program

EPS = 2.0**-23  # float32
MARGIN = 8.0  # tiny models of every family stay below 0.05 of it; a wrong window, theta or weight is beyond 10
PAGE = 32
TOKENS = 61  # prime, so that no number of heads equals it


class CheckError(RuntimeError):
    """A check that cannot be made: what is missing, and how to get it."""


@dataclass(frozen=True)
class Row:
    """One site: ||ours - theirs|| / ||theirs||, and what rounding alone may explain."""

    site: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What a check found. `first_bad` is the first site, in the order of the Program, that is out of line."""

    program: str
    device: str
    tokens: int
    rows: tuple[Row, ...]
    first_bad: str | None
    logits: float
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "rows": [{**asdict(r), "ok": r.ok} for r in self.rows]}

    def __str__(self) -> str:
        wide = max(len(r.site) for r in self.rows)
        lines = [f"{self.program} on {self.device} against transformers, float32, {self.tokens} tokens"]
        lines.append(f"{'site':{wide}}  {'error':>9}  {'allowed':>9}")
        for r in self.rows:
            lines.append(f"{r.site:{wide}}  {r.error:9.2e}  {r.tolerance:9.2e}{'' if r.ok else '  OUT OF LINE'}")
        end = "agrees at every site" if self.ok else f"parts from transformers at {self.first_bad}"
        return "\n".join([*lines, f"{end}; logits differ by {self.logits:.2e}"])


def reference_model(path: str | Path) -> Any:
    """The transformers model of a checkpoint in float32 with eager attention. Raises CheckError if not installed."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise CheckError(f"a check needs torch and transformers ({e}): pip install torch transformers") from None
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.float32, attn_implementation="eager").eval()
    # Gemma rounds sqrt(hidden) to the type the weights are stored in; loaded as float32 it would not
    embed, c = model.get_input_embeddings(), Checkpoint.open(path)
    if hasattr(embed, "embed_scale"):
        stored = next(c.dtype(name) for name in c.names if name.endswith("embed_tokens.weight"))
        kind = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
        embed.embed_scale.copy_(embed.embed_scale.to(kind).float())
    return model


def check(
    path: str | Path,
    device: str = "reference",
    tokens: int | Sequence[int] = TOKENS,
    seed: int = 0,
    program: Program | None = None,
) -> Report:
    """Compare on a prompt: `tokens` ids, or so many random ones drawn from `seed`. `program` defaults to the port's.

    A site's tolerance is 8 * eps * sqrt(K) * sqrt(n), eps = 2^-23, K the longest sum so far (a rounding error in each
    of K terms, random in sign) and n the ops so far (their errors add up likewise).
    """
    checkpoint = Checkpoint.open(path)
    count = tokens if isinstance(tokens, int) else len(tokens)
    p = wide_cache(program or port(checkpoint, context=count))
    drawn = np.random.default_rng(seed).integers(0, p.vocabulary, count).tolist()
    ids = drawn if isinstance(tokens, int) else list(tokens)
    theirs, logits = observe(reference_model(path), p, ids)
    pages = -(-count // PAGE)
    options = {"cache": None} if device == "host" else {}  # nobody else runs this Program
    executable = open_device(device, **options).load(p, checkpoint, StateSpec(pages, PAGE))
    batch = bind([Chunk(ids, 0, range(pages), range(count))], PAGE)
    result = executable.step(batch, logits=True, taps=set(theirs))
    assert result.logits is not None
    allowed = tolerances(p, count)
    rows = [Row(site, difference(result.taps[site], theirs[site]), allowed[site]) for site in allowed if site in theirs]
    last = difference(result.logits, logits)
    rows.append(Row("logits", last, max(allowed.values())))
    first = next((r.site for r in rows if not r.ok), None)
    return Report(p.name, device, count, tuple(rows), first, last, first is None)


def wide_cache(p: Program) -> Program:
    """The Program with its keys and values kept in float32."""
    tensors = {n: replace(t, format="f32") if t.role == "state" else t for n, t in p.tensors.items()}
    return p.with_ops(p.ops, tensors)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    wide = theirs.astype(np.float64)
    gap = np.linalg.norm(ours.astype(np.float64).reshape(wide.shape) - wide) / (np.linalg.norm(wide) or 1.0)
    return float(gap) if np.isfinite(gap) else float("inf")


def tolerances(p: Program, tokens: int) -> dict[str, float]:
    """What rounding may do up to each site, as check() explains; views stand at the site of their base."""
    out: dict[str, float] = {}
    longest = 1
    for n, op in enumerate(p.ops, start=1):
        widths = [int(p.tensors[x].shape[-1]) for x in op.inputs if isinstance(p.tensors[x].shape[-1], int)]
        longest = max(longest, tokens if op.kind == "attend" else 1, *(widths if op.kind in ("linear", "norm") else ()))
        views = [t.name for t in p.tensors.values() if t.view and t.view[0] in op.outputs]
        out |= dict.fromkeys([op.site, *views], MARGIN * EPS * (longest * n) ** 0.5)
    return out


def observe(model: Any, p: Program, tokens: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What transformers computes at the Program's sites, float32 [tokens, width], and the logits."""
    import torch
    from transformers import DynamicCache

    seen: dict[str, np.ndarray] = {}
    producers = {name: op.site for op in p.ops for name in op.outputs}

    def keep(site: str, x: Any) -> None:
        if x.dim() == 4 and x.shape[1] != len(tokens):  # heads before tokens
            x = x.transpose(1, 2)
        seen.setdefault(site, x.detach().reshape(len(tokens), -1).numpy().copy())

    def hook(op: Op) -> Any:
        def after(module: Any, args: Any, out: Any) -> None:
            if isinstance(op, Linear | Norm) and op.x in producers:
                keep(producers[op.x], args[0])
            # a scale is often applied outside the module; the next site's input then shows it
            if getattr(op, "scale", 1.0) == 1.0 or hasattr(module, "embed_scale"):
                keep(op.site, out)

        return after

    handles = [
        module.register_forward_hook(hook(op)) for op in p.ops if (module := module_of(model, p, op)) is not None
    ]
    cache: Any = DynamicCache()  # without a config it keeps all keys of sliding layers too
    try:
        with torch.no_grad():
            out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    writes = [op for op in p.ops if isinstance(op, KvWrite)]
    for op, layer in zip(writes, cache.layers, strict=True):
        for name, held in ((op.k, layer.keys), (op.v, layer.values)):
            keep(producers.get(name, name), held)
    return seen, out.logits[0].float().numpy()


def module_of(model: Any, p: Program, op: Op) -> Any:
    """The transformers module that holds the weight of `op`, or None."""
    if op.site == "lm_head":
        return model.get_output_embeddings()
    weight = op.weight if isinstance(op, Norm) else op.w if isinstance(op, Linear | Embed) else None
    if weight is None or not p.tensors[weight].source:
        return None
    name = p.tensors[weight].source[0].removesuffix(".weight")
    modules = dict(model.named_modules())
    return modules.get(name) or modules.get(name.replace("language_model.model.", "model.language_model."))
