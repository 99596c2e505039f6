"""Compares a checkpoint's Program with transformers, site by site, and finds the first difference and its likely cause.

The expected value at a site is the input or output of the transformers module with the same weight, or its K/V cache.
transformers runs in float32, and also in bf16 to show the error of that format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.batch import Batch, Chunk, bind
from intaglio.debugging.causes import Scene, explain
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.devices.reference import ReferenceExecutable
from intaglio.models import Checkpoint, port
from intaglio.ops import Embed, Experts, KvWrite, Linear, Map, Norm, Op, Value
from intaglio.program import Program
from intaglio.program.source import names
from intaglio.progress import Progress, silent

EPS = 2.0**-23  # float32
MARGIN = 8.0  # tiny models of every family stay below 0.05 of it; a wrong window, theta or weight is beyond 10
PAGE = 32
RENAMED = (  # what transformers calls modules that checkpoints call otherwise
    (".block_sparse_moe.router.layer", ".block_sparse_moe.router"), (".block_sparse_moe.gate", ".mlp.gate"),
    (".block_sparse_moe.gate", ".mlp.router"), (".block_sparse_moe.", ".mlp."), (".f_", ".forget_gate.f_"),
    (".attention_layer_norm", ".input_layernorm"), (".feedforward_layer_norm", ".post_attention_layernorm"),
    (".attn.wq_a", ".self_attn.q_a_proj"), (".attn.wq_b", ".self_attn.q_b_proj"), (".attn.wkv", ".self_attn.kv_proj"),
    (".attn.wo_a", ".self_attn.o_a_proj"), (".attn.wo_b", ".self_attn.o_b_proj"),
    (".attn.q_norm", ".self_attn.q_a_norm"), (".attn.norm", ".self_attn.kv_norm"), (".attn_norm", ".input_layernorm"),
    (".ffn_norm", ".post_attention_layernorm"), (".ffn.experts", ".mlp.experts"),
    (".attn.compressor.wkv", ".self_attn.compressor.kv_proj"),
    (".attn.compressor.wgate", ".self_attn.compressor.gate_proj"),
    (".attn.indexer.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
    (".attn.indexer.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
    (".attn.indexer.compressor.wkv", ".self_attn.compressor.indexer.kv_proj"),
    (".attn.indexer.compressor.wgate", ".self_attn.compressor.indexer.gate_proj"),
    (".ffn.shared_experts.w1", ".mlp.shared_experts.gate_proj"),
    (".ffn.shared_experts.w3", ".mlp.shared_experts.up_proj"),
    (".ffn.shared_experts.w2", ".mlp.shared_experts.down_proj"),
)  # fmt: skip
STAGES = 4  # of a check: float32, bf16, the device, and the cause of a difference
TOKENS = 61  # prime, so that no number of heads equals it


class CheckError(RuntimeError):
    """Raised for a check that cannot run. The message says what is missing or wrong, and how to correct it."""


@dataclass(frozen=True)
class Row:
    """The relative error of one op's result, in comparison with the result of a reference.

    The reference is transformers, or in bisect() the first of two runs.

    Attributes:
        site: the op's name, such as layers.3.mlp.down_proj.
        error: ||ours - theirs|| / ||theirs||, where `theirs` is the reference's result, in float32 for transformers.
        tolerance: the largest error that rounding alone may explain.
        bf16: the error of transformers' own run in bf16; None if that run was not made or has no such result.
    """

    site: str
    error: float
    tolerance: float
    bf16: float | None = None

    @property
    def ok(self) -> bool:
        """True if the error is within the tolerance."""
        return self.error <= self.tolerance

    @property
    def ratio(self) -> float | None:
        """Our error divided by the error of transformers in bf16: `error / bf16`, a float. 1 means equal errors.

        None if `bf16` is None or 0.
        """
        return self.error / self.bf16 if self.bf16 else None


@dataclass(frozen=True)
class Report:
    """The result of check() or bisect(): the error of each op's result, compared with a reference.

    Attributes:
        program: name of the Program.
        device: device that was checked.
        tokens: number of prompt tokens.
        rows: one Row for each op that was compared, in the order of the Program, then one for the logits.
        first_bad: name of the first op whose error exceeds its tolerance; None if there is none.
        logits: relative error of the logits.
        ok: True if no error exceeds its tolerance.
        cause: the likely cause of the first difference, as text; "" if there is none.
        origin: a sentence that says where the first NaN or infinity appears; "" if there is none.
        against: name of the reference, such as "transformers".
    """

    program: str
    device: str
    tokens: int
    rows: tuple[Row, ...]
    first_bad: str | None
    logits: float
    ok: bool
    cause: str = ""
    origin: str = ""
    against: str = "transformers"

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a dict for JSON.

        `rows` is a list of dicts, each with the fields of a Row and its properties `ok` and `ratio`.
        """
        return {**asdict(self), "rows": [{**asdict(r), "ok": r.ok, "ratio": r.ratio} for r in self.rows]}

    @property
    def title(self) -> str:
        """The heading of the report, as text.

        It names the Program, its device, the reference and the number of tokens.
        """
        return f"{self.program} on {self.device} against {self.against}, {self.tokens} tokens"

    @property
    def conclusion(self) -> list[str]:
        """The conclusion of the report, as a list of lines of text.

        The lines say whether the two runs agree, and if not, where they first differ and why. They also give the error
        of the logits.
        """
        end = "agrees at every site" if self.ok else f"parts from {self.against} at {self.first_bad}"
        lines = [f"{end}; logits differ by {self.logits:.2e}"]
        lines += [f"likely cause: {self.cause}"] if self.cause else []
        return [*lines, *([self.origin] if self.origin else [])]

    def __str__(self) -> str:
        wide = max(len(r.site) for r in self.rows)
        lines = [self.title]
        lines.append(f"{'site':{wide}}  {'error':>9}  {'allowed':>9}  {'bf16':>9}  {'ratio':>7}")
        for r in self.rows:
            bf16 = f"{r.bf16:9.2e}  {r.ratio:7.3f}" if r.bf16 and r.ratio is not None else f"{'-':>9}  {'-':>7}"
            mark = "" if r.ok else "  OUT OF LINE"
            lines.append(f"{r.site:{wide}}  {r.error:9.2e}  {r.tolerance:9.2e}  {bf16}{mark}")
        return "\n".join([*lines, *self.conclusion])


def reference_model(path: str | Path, dtype: str = "float32") -> Any:
    """Load a checkpoint with transformers. Returns the transformers model, with eager attention, ready for inference.

    `dtype` is the name of the torch type of the weights. Raises CheckError if torch or transformers is missing, and the
    errors of transformers if it cannot load the model.
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise CheckError(f"a check needs torch and transformers ({e}): pip install torch transformers") from None
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    how: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    try:
        model = load(path, **how).eval()
    except ValueError:  # a text model that transformers lists under its wrapper's type only
        named = getattr(transformers, str((Checkpoint.open(path).config.get("architectures") or [""])[0]), None)
        if named is None:
            raise
        model = named.from_pretrained(path, **how).eval()
    # Gemma rounds sqrt(hidden) to the type the weights are stored in; loaded as float32 it would not
    embed, c = model.get_input_embeddings(), Checkpoint.open(path)
    if "embed_scale" in dict(embed.named_buffers()):
        stored = next((c.dtype(name) for name in c.names if name.endswith("embed_tokens.weight")), "F32")
        kind = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
        embed.embed_scale.copy_(embed.embed_scale.to(kind).float())
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # grouped products are not to be had everywhere in bf16
    return model


def check(
    path: str | Path,
    device: str = "reference",
    tokens: int | Sequence[int] = TOKENS,
    seed: int = 0,
    program: Program | None = None,
    progress: Progress = silent,
) -> Report:
    """Compare a checkpoint's Program on a device with transformers, on one prompt. Returns the Report.

    The result of an op may differ by a relative error of 8 * eps * sqrt(K) * sqrt(n). eps is 2^-23. K is the number of
    terms of the longest sum up to this op; each term adds a rounding error of random sign. n is the number of ops up to
    this op; their errors add up in the same way.

    Raises CheckError if torch or transformers is missing, CheckpointError or PortError if the checkpoint cannot be
    loaded, and DeviceError for an unknown device.

    Args:
        path: the checkpoint.
        device: name of the device to check.
        tokens: token ids of the prompt, or the number of random token ids.
        seed: seed of the random token ids.
        program: the Program to check; None: the Program that the checkpoint's port makes.
        progress: called before each stage.
    """
    checkpoint = Checkpoint.open(path)
    count = tokens if isinstance(tokens, int) else len(tokens)
    p = wide_cache(program or port(checkpoint, context=count))
    drawn = np.random.default_rng(seed).integers(0, p.vocabulary, count).tolist()
    ids = drawn if isinstance(tokens, int) else list(tokens)
    progress(0, STAGES, "running transformers in float32")
    theirs, logits = observe(reference_model(path), p, ids)
    progress(1, STAGES, "running transformers in bf16")
    rough, rough_logits = observe(reference_model(path, "bfloat16"), p, ids)
    progress(2, STAGES, f"running device {device}")
    pages = -(-count // PAGE)
    options = {"cache": None} if device == "host" else {}  # nobody else runs this Program
    state = StateSpec(pages, PAGE, 2 * p.recurrent)
    executable = open_device(device, **options).load(p, checkpoint, state)
    batch = bind([Chunk(ids, 0, range(pages), range(count), state=state.pair(0, 0))], PAGE)
    result = executable.step(StepRequest(batch, logits=True, taps=set(theirs)))
    assert result.logits is not None
    allowed = tolerances(p, count)
    rows = []
    for site in (site for site in allowed if site in theirs):
        bf16 = difference(rough[site], theirs[site]) if site in rough else None
        rows.append(Row(site, difference(result.taps[site], theirs[site]), allowed[site], bf16))
    last = difference(result.logits, logits)
    rows.append(Row("logits", last, max(allowed.values()), difference(rough_logits, logits)))
    first = next((r.site for r in rows if not r.ok), None)
    cause = origin = ""
    if first is not None:
        progress(3, STAGES, f"looking for the cause at {first}")
        scene = scene_of(p, checkpoint, batch)
        good = {r.site for r in rows if r.ok}
        cause = explain(scene, first, logits if first == "logits" else theirs[first], good)
        origin = first_nonfinite(scene)
    return Report(p.name, device, count, tuple(rows), first, last, first is None, cause, origin)


def scene_of(p: Program, checkpoint: Checkpoint, batch: Batch) -> Scene:
    """Run the batch (one sequence) with NumPy, and return the values of all tensors as a Scene.

    The Scene also has the vectors of the checkpoint that the Program does not read: a bias that the port leaves out is
    a likely cause of a difference.
    """
    state = StateSpec(int(batch.block_table.shape[1]), PAGE, 2 * p.recurrent)
    held = ReferenceExecutable(p, checkpoint, state).held
    v: dict[str, Value] = {**held, "tokens": batch.tokens, "positions": batch.positions, "rows": batch.rows}
    for op in p.ops:
        results = op.reference(v, batch)
        v |= results
        for t in p.tensors.values():
            if t.view and t.view[0] in results:
                v[t.name] = results[t.view[0]][:, t.view[1] : t.view[1] + int(t.shape[1])]
    used = {n for op in p.ops for n in op.inputs}
    read = {name for t in p.of_role("weight") if t.name in used for source in t.source for name in names(source)}
    vectors = [n for n in checkpoint.names - read if len(checkpoint.shape(n)) == 1]
    spare = {n: np.asarray(checkpoint.read(n), np.float32) for n in vectors}
    return Scene(p, batch, {**v, **spare}, spare)


def first_nonfinite(scene: Scene) -> str:
    """Return a sentence that says where the first NaN or infinity appears; "" if there is none.

    The sentence names a weight or an op.
    """

    def bad(name: str) -> bool:
        x = scene.values[name]
        return isinstance(x, np.ndarray) and x.dtype.kind == "f" and not np.isfinite(x).all()

    for op in scene.program.ops:
        if any(bad(n) for n in op.outputs):
            from_weights = [n for n in op.inputs if scene.program.tensors[n].role == "weight" and bad(n)]
            where = f"at {op.site} ({op.kind}), whose operands are finite"
            where = f"in the weight {from_weights[0]}" if from_weights else where
            return f"the first NaN or infinity arises {where}"
    return ""


def wide_cache(p: Program) -> Program:
    """Return a copy of the Program `p` in which all K/V caches and recurrent states are stored in float32."""
    tensors = {n: replace(t, format="f32") if t.role == "state" else t for n, t in p.tensors.items()}
    return p.with_ops(p.ops, tensors)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the relative difference ||ours - theirs|| / ||theirs|| as a float; infinity if a value is NaN or infinite.

    If all values of `theirs` are 0, the result is ||ours||.
    """
    wide = theirs.astype(np.float64)
    gap = np.linalg.norm(ours.astype(np.float64).reshape(wide.shape) - wide) / (np.linalg.norm(wide) or 1.0)
    return float(gap) if np.isfinite(gap) else float("inf")


def tolerances(p: Program, tokens: int) -> dict[str, float]:
    """Return the tolerance of each op's relative error, as a dict {op's name: tolerance}.

    The tolerance is the largest error that rounding alone may explain. The error is ||ours - theirs|| / ||theirs||. The
    formula of the tolerance is in check(). The dict also has an item for each view (a slice of an op's result): the
    tolerance of the op that computes the result.

    Args:
        p: the Program.
        tokens: length of the prompt.
    """
    out: dict[str, float] = {}
    longest = 1
    for n, op in enumerate(p.ops, start=1):
        widths = [int(p.tensors[x].shape[-1]) for x in op.inputs if isinstance(p.tensors[x].shape[-1], int)]
        longest = max(longest, tokens if op.kind == "attend" else 1, *(widths if op.kind in ("linear", "norm") else ()))
        views = [t.name for t in p.tensors.values() if t.view and t.view[0] in op.outputs]
        out |= dict.fromkeys([op.site, *views], MARGIN * EPS * (longest * n) ** 0.5)
    return out


def observe(model: Any, p: Program, tokens: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run a transformers model on a prompt, and return a tuple (values, logits).

    `values` is a dict {op's name: array [tokens, width]}. It has the ops of the Program `p` whose result transformers
    shows: as input or output of a module, or as keys or values in the K/V cache. `logits` is an array [tokens,
    vocabulary].
    """
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    seen: dict[str, np.ndarray] = {}
    producers = {name: op.site for op in p.ops for name in op.outputs}
    gated = {op.a: op.site for op in p.ops if isinstance(op, Map) and op.site.endswith(".gated")}

    def keep(site: str, x: Any) -> None:
        if x.dim() == 4 and x.shape[1] != len(tokens):  # heads before tokens
            x = x.transpose(1, 2)
        if x.numel() % len(tokens) == 0:
            seen.setdefault(site, x.detach().float().reshape(len(tokens), -1).numpy().copy())

    def hook(op: Op, turn: int) -> Any:
        """Return a forward hook for the op's module. The hook stores the values of one call of the module in `seen`.

        It acts on call number `turn`, counted from 1. If several ops share a weight, their module is called once for
        each op, in the order of the ops.
        """
        calls = count(1)

        def after(module: Any, args: Any, out: Any) -> None:
            if next(calls) != turn:
                return
            inside = op.site.endswith(".norm") and producers.get(getattr(op, "x", ""), "").endswith(".gated")
            if isinstance(op, Linear | Norm) and op.x in producers and not inside:  # inside: the module has the gate
                keep(producers[op.x], args[0])
            out = _tensor_of(module, out)
            if out is None:
                return
            # a scale is often applied outside the module; the next site's input then shows it
            if getattr(op, "scale", 1.0) == 1.0 or hasattr(module, "embed_scale"):
                site = gated.get(op.out, op.site) if isinstance(op, Norm) and len(args) > 1 else op.site
                keep(site, out)  # the module of a gated norm yields what the gate leaves

        return after

    handles, turns = [], Counter[tuple[int, str | None]]()
    for op in p.ops:
        if (module := module_of(model, p, op)) is not None:
            which = id(module), weight_of(op)
            turns[which] += 1
            handles.append(module.register_forward_hook(hook(op, turns[which])))
    cache: Any = DynamicCache()  # without a config it keeps all keys of sliding layers too
    pooled = any(op.two_tables for op in p.ops)
    if p.recurrent or pooled:  # but then it has no layers for recurrent state, or for pooled keys
        cache = DynamicCache(config=model.config)
        cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    try:
        with torch.no_grad():
            out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    layers = () if pooled else cache.layers  # the layers of a model with pooled keys keep the last keys only
    filled = [layer for layer in layers if getattr(layer, "keys", None) is not None]  # not of layers that were skipped
    writes = [op for op in p.ops if isinstance(op, KvWrite)]
    for op, layer in zip(writes, filled, strict=bool(filled)):  # none for a model without a cache (GPT of 2018)
        for name, held in ((op.k, layer.keys), (op.v, layer.values)):
            pairs = getattr(model.config, "rope_interleave", model.config.model_type == "bailing_hybrid")
            if pairs and name == op.v:
                held = held.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # theirs puts pairs by halves
            keep(producers.get(name, name), held)
    width = {t.name: t.shape[-1] for t in p.tensors.values()}
    seen = {site: x for site, x in seen.items() if x.shape[1] == width.get(site, x.shape[1])}
    return seen, out.logits[0].float().numpy()


def _tensor_of(module: Any, out: Any) -> Any:
    """Return the tensor of a module's output `out` that is compared with our result.

    It is `out` itself, or an item if `out` is a tuple: the second item for the router of Llama 4, otherwise the first.
    """
    if not isinstance(out, tuple):
        return out
    return out[1] if type(module).__name__ == "Llama4Router" else out[0]


def weight_of(op: Op) -> str | None:
    """Return the name of the weight of `op` in the Program, by which module_of() finds the op's module.

    For the op Experts it is the gate weight, or the up weight if there is no gate. None if `op` has no weight.
    """
    if isinstance(op, Experts):
        return op.gate or op.up
    return op.weight if isinstance(op, Norm) else op.w if isinstance(op, Linear | Embed) else None


def module_of(model: Any, p: Program, op: Op) -> Any:
    """Return the transformers module that holds the weight of `op`, or None if there is none.

    For the op Experts it is the module that holds all experts of the layer.
    """
    if op.site == "lm_head":
        return model.get_output_embeddings()
    weight = weight_of(op)
    if weight is None or not p.tensors[weight].source:
        return None
    modules = dict(model.named_modules())
    name = p.tensors[weight].source[0].partition("|")[0].removesuffix(".weight")
    if layer := re.match(r"layers\.\d+\.", op.site):  # a layer that shares an earlier one's weights has its own module
        name = re.sub(r"layers\.\d+\.", layer[0], name, count=1)
    if isinstance(op, Experts):  # a module of all experts, whose result is theirs together
        name = re.split(r"\.(?:experts|input_linear)\.", name)[0] + ".experts"
    for old, new in (("", ""), ("language_model.model.", "model.language_model."), *RENAMED):
        found = modules.get(name.replace(old, new)) if old else modules.get(name)
        if found is not None:
            return found
    return None
