"""Derives a port: traces variants of the tiny model, writes the port file, and verifies it against transformers."""

from __future__ import annotations

import re
import tempfile
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.batch import Chunk, bind
from intaglio.debugging.automatic.expressions import Variant
from intaglio.debugging.automatic.flatten import flatten, text
from intaglio.debugging.automatic.layers import model_facts
from intaglio.debugging.automatic.tiny import LAYERS, OTHER_SIZES, SIZES, TinyModels
from intaglio.debugging.automatic.trace import Trace, Unmatched, record
from intaglio.debugging.automatic.writing import Unsolved, turned, write_port
from intaglio.debugging.check import check
from intaglio.debugging.porting import PortingError, read_config
from intaglio.devices import StateSpec, StepRequest, open_device
from intaglio.models import Checkpoint, CheckpointError, Family, PortError, port
from intaglio.progress import Progress, silent

PROMPT, STEPS = 53, 8  # tokens of a verification: at once, then one by one
LIMIT = 1e-4  # of max |ours - theirs| / max |theirs|, float32
USUAL = (  # keys that ports read by these names
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    "vocab_size", "hidden_act", "intermediate_size",
)  # fmt: skip
SHOWN = 4  # variants of the configuration whose logits are compared, besides the first


@dataclass(frozen=True)
class AutoPort:
    """The result of an automatic port of an architecture.

    It has the source text of the port and says how far the port is verified.

    Attributes:
        architecture: name of the architecture in config.json.
        text: source text of the port file; "" if none could be written.
        deviations: {configuration in words: error of the port's logits}. An error is max |ours - theirs| / max
            |theirs|, see deviation().
        refused: {setting as key=value: why the port refuses it}.
        failure: what could not be ported, or the difference from transformers that was found, as text; "" for a
            verified port.
    """

    architecture: str
    text: str
    deviations: Mapping[str, float]
    refused: Mapping[str, str]
    failure: str

    @property
    def verified(self) -> bool:
        """True if a port was written and it agrees with transformers in all comparisons, within the tolerance."""
        return bool(self.text) and not self.failure

    def __str__(self) -> str:
        lines = [f"{self.architecture}: {'verified' if self.verified else 'not ported'}"]
        lines += [f"  {name}: logits differ by {gap:.1e}" for name, gap in self.deviations.items()]
        lines += [f"  refuses {switch}: {why}" for switch, why in self.refused.items()]
        return "\n".join([*lines, *([self.failure] if self.failure else [])])


def port_automatically(target: str, progress: Progress = silent) -> AutoPort:
    """Write a port of an architecture by tracing a tiny transformers model, and verify it. Returns the AutoPort.

    If the architecture cannot be ported, the AutoPort's field `failure` says why. A port that exists already is
    ignored. Raises PortingError if a tiny model of the architecture cannot be built or run.

    target: a checkpoint folder, or a model type of transformers. progress: called before each step.
    """
    config = read_config(target)
    tiny = TinyModels(config)
    progress(0, 0, f"tracing a tiny {tiny.architecture}")
    try:
        first = _first(tiny)
    except Unmatched as e:
        return AutoPort(tiny.architecture, "", {}, {}, paragraph(tiny.architecture, e))
    if untraced := tiny.untraced_layer_types():
        why = f"its layer_types may be {', '.join(untraced)}, which the tiny model has not: such layers were not traced"
        then = (
            "Port it by hand: step 2 of docs/adding-a-model.md; for layers with recurrent state, the mixers in step 3"
        )
        return AutoPort(tiny.architecture, "", {}, {}, f"{tiny.architecture} is not ported: {why}. {then}.")
    variants, refused, lines = _variants(tiny, first, progress)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        tiny.save(tiny.build(), base)
        about = _about(tiny, first, base)
        while True:
            try:
                made = write_port(tiny.architecture, tiny.model_type, variants, lines, _stored(base, first), about)
                break
            except Unsolved as e:
                if e.variant is None or e.variant is first:
                    return AutoPort(tiny.architecture, "", {}, refused, f"{tiny.architecture}: {e}.")
                variants = [v for v in variants if v is not e.variant]
                key, new = next(iter(e.variant.changes.items()))
                refused[f"{key}={new!r}"] = str(e)
                lines.append(_refusal(tiny, key, new, str(e)))
        family = load_port(made)
        return _verify(tiny, family, made, variants, refused, Path(folder), progress)


def paragraph(architecture: str, e: Unmatched) -> str:
    """An error text for users that names the module that cannot be ported.

    It also names the op or field of Decoder nearest to the module. architecture: name of the architecture in
    config.json. e: the error, which names the module, what is missing, and the nearest op or field.
    """
    return (
        f"{architecture} is not ported: the module {e.module} has {e.missing}, for which no op or field of Decoder is "
        f"there. The nearest is {e.nearest}. Add it to models/decoder/ (docs/adding-a-model.md), or port by hand."
    )


def load_port(text: str) -> Family:
    """Execute the source text of a port file. Returns the Family (port of a model architecture) that it defines."""
    space: dict[str, Any] = {"__name__": "port"}
    exec(compile(text, "<port>", "exec"), space)  # text that this package wrote
    family = space["FAMILIES"][0]
    assert isinstance(family, Family)
    return family


def _first(tiny: TinyModels) -> Variant:
    """Trace the tiny model with its usual sizes (SIZES). Returns the Variant: its config.json and traced properties.

    All other variants are compared with this one. If transformers refuses the head_dim in SIZES, it is hidden_size /
    num_attention_heads instead. Raises Unmatched for what the fields of Decoder cannot express, PortingError if the
    model cannot be built or run.
    """
    try:
        return _variant(tiny, {})
    except PortingError:
        if not tiny.has("head_dim"):
            raise
        tiny.without.add("head_dim")
        tiny.given[tiny.key("head_dim")] = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        return _variant(tiny, {})


def _variant(tiny: TinyModels, changes: dict[str, Any]) -> Variant:
    """Trace the tiny model with some changed config keys. Returns the Variant: its config.json and traced properties.

    changes: {config key: value}. Comparing variants shows how a field of Decoder depends on config.json. Raises
    Unmatched for what the fields of Decoder cannot express, PortingError if the model cannot be built or run.
    """
    model = tiny.build(**changes)
    tokens = np.random.default_rng(0).integers(3, 250, 61).tolist()
    try:
        trace = record(model, tokens)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as e:
        raise PortingError(f"the tiny {tiny.model_type} with {changes or 'small sizes'} does not run: {e}") from e
    facts = flatten(model_facts(trace))
    facts["ignored"] = _ignored(trace, facts["prefix"])
    config = dict(trace.config)
    config |= {usual: config[own] for usual, own in aliases(tiny).items() if config.get(own) is not None}
    return Variant(config, changes, facts)


def _ignored(trace: Trace, prefix: str) -> tuple[str, ...]:
    """Patterns for the names of the weights that the port ignores, as a tuple: the value of Family.ignored.

    A pattern, such as *.cross_attn., stands for a module in the layers that the trace never called. prefix: the part of
    a weight's name before the list of layers.
    """
    head = trace.head
    inside = [re.search(r"\.\d+\.(\w+)\.", f"{m}.") for m in trace.uncalled() if m != head and m.startswith(prefix)]
    own = {m[1] for m in inside if m}
    used = {part for c in trace.calls for part in c.name.split(".")}
    return tuple(f"*.{name}." for name in sorted(own - used))


def aliases(tiny: TinyModels) -> dict[str, str]:
    """Returns {usual name of a config key: its name in the model's config.json}, for keys with an unusual name.

    The dict is the value of Family.aliases. tiny: the tiny models of the architecture.
    """
    return {k: own for k, own in tiny.own.items() if k in USUAL and k not in tiny.usual and own in tiny.usual}


def _variants(tiny: TinyModels, first: Variant, progress: Progress) -> tuple[list[Variant], dict[str, str], list[str]]:
    """Trace the tiny model with other sizes and settings. Returns (variants, refused, lines).

    - variants: list of Variants: `first`, the variants whose traced fields differ from those of `first`, and the
      variants in which several config keys or the layer types were changed.
    - refused: {setting that the fields of Decoder cannot express: the reason}.
    - lines: source text for the port file, one statement for each refused setting, which raises an error for it.

    Settings with which transformers cannot build or run the model are skipped. Raises PortingError if the fields of
    Decoder cannot express a model with several changed config keys, such as OTHER_SIZES.

    Args:
        tiny: builds the models.
        first: the Variant with the usual sizes.
        progress: called before each model.
    """
    trials: list[dict[str, Any]] = [{k: v for k, v in OTHER_SIZES.items() if k in _sized(tiny)}]
    trials += [{k: x} for k, values in tiny.switches().items() for x in values]
    trials += [{"tie_word_embeddings": not first.facts["tied"]}] if "tie_word_embeddings" in tiny.usual else []
    if "layer_types" in tiny.usual and tiny.usual.get("sliding_window") and tiny.usual.get("layer_types"):
        trials.append({"layer_types": (["sliding_attention", "full_attention", "full_attention"] * LAYERS)[:LAYERS]})
    if "head_dim" in tiny.usual and "head_dim" not in tiny.without:
        trials.append({"head_dim": None})
    if "n_group" in tiny.usual:
        trials.append({"n_group": 2, "topk_group": 1})
    out, refused, lines = [first], dict[str, str](), list[str]()
    for at, changes in enumerate(trials):
        progress(at, len(trials), f"tracing {', '.join(f'{k}={v}' for k, v in list(changes.items())[:2])}")
        try:
            v = _variant(tiny, changes)
        except PortingError:
            continue  # transformers refuses this combination
        except Unmatched as e:
            if len(changes) > 1:
                raise PortingError(paragraph(tiny.architecture, e)) from e
            (key, new), *_ = changes.items()
            refused[f"{key}={new!r}"] = str(e)
            lines.append(_refusal(tiny, key, new, str(e)))
            continue
        if len(changes) > 1 or v.facts != first.facts or "layer_types" in changes:
            out.append(v)
    return out, refused, lines


def _sized(tiny: TinyModels) -> set[str]:
    return {k for k in OTHER_SIZES if tiny.key(k) in tiny.settings()}


def _refusal(tiny: TinyModels, key: str, new: Any, why: str) -> str:
    """A statement for a port file, as text. It raises PortError if `key` in config.json has a value that is not ported.

    The statement accepts the value that the tiny model has. If this value is false (0, None, False) and `new` is true,
    it accepts every false value.

    Args:
        tiny: the tiny models, which have the accepted value.
        key: the config key.
        new: another value of the key, with which porting failed.
        why: the reason, for the error.
    """
    usual = {**tiny.usual, **tiny.settings()}.get(key)
    short = textwrap.shorten(re.sub(r"[\"\\\n{}]", "", why), 70, placeholder=" ...")
    if new and not usual:
        return f'c.refuse("{key}", why="{short}")'
    raised = f"raise PortError(f\"config.json: {key}={{c.get('{key}')!r}} is not ported: {short}\")"
    return f'if c.get("{key}") != {text(usual)}:\n        {raised}'


def _saved(folder: Path, module: str) -> str:
    """The name, without ".weight", under which a checkpoint stores the weight of the output head.

    It is `module` if the checkpoint has MODULE.weight. Otherwise the head is tied to the embedding, and the result is
    the embedding's name: the only matrix NAME.weight outside the layers whose NAME contains "emb" and has no dot. If
    there is no such matrix, or more than one, the result is `module`.

    folder: the checkpoint. module: name of the head's module in transformers; if it is "", the result is "".
    """
    found = Checkpoint.open(folder)
    if f"{module}.weight" in found.names or not module:
        return module
    outer = [n.removesuffix(".weight") for n in found.names if "layers." not in n and n.endswith(".weight")]
    heads = [n for n in outer if len(found.shape(f"{n}.weight")) == 2 and "emb" in n and n.count(".") == 0]
    return heads[0] if len(heads) == 1 else module


def _about(tiny: TinyModels, first: Variant, folder: Path) -> dict[str, Any]:
    """Facts about an architecture for the text of its port file, as a dict: the argument `about` of write_port().

    The keys are:

    - version: version of transformers.
    - defaults: {config key: its value in transformers if config.json does not have it}.
    - aliases: {usual name of a config key: its name in the model's config.json}.
    - title: name of the architecture without the ending of its class name.
    - head: name of the output head's module in a checkpoint; "" if it is lm_head or there is none.
    - vocabulary: source text of the expression that gives the size of the vocabulary.

    Args:
        tiny: the tiny models of the architecture.
        first: the Variant with the usual sizes.
        folder: a checkpoint of the tiny model.
    """
    import transformers

    rope = tiny.usual.get("rope_parameters") or {}
    defaults = {k: v for k, v in tiny.usual.items() if isinstance(v, str | int | float) and k not in tiny.derived}
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        defaults |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    defaults |= {usual: tiny.usual[own] for usual, own in aliases(tiny).items() if tiny.usual.get(own) is not None}
    head = _saved(folder, str(first.facts.get("head", "")))
    outer = "" if first.facts["prefix"].startswith("model.") else first.facts["prefix"].removesuffix("model.")
    title = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", tiny.architecture)
    return {
        "version": transformers.__version__, "defaults": defaults, "aliases": aliases(tiny), "title": title,
        "head": "" if head in ("", outer + "lm_head") else head, "vocabulary": 'c.whole("vocab_size")',
    }  # fmt: skip


def _stored(folder: Path, first: Variant) -> str:
    """The layout in which a checkpoint stores the matrices of experts, as text; "" for a model without experts.

    It is "NAMED", "NUMBERED", "STACKED" or "TRANSPOSED", names of constants of models.decoder. The checkpoint may use
    other names than transformers, so two names are added to first.facts["mixture"]: "saved_correction", the
    checkpoint's name of the correction bias, and for "NUMBERED" also "saved_block", its name of the experts' module.
    Raises PortingError for any other layout.

    folder: a checkpoint of the tiny model. first: the Variant with the usual sizes.
    """
    m = first.facts.get("mixture")
    if not m:
        return ""
    checkpoint = Checkpoint.open(folder)
    names = checkpoint.names
    if m["correction"]:
        m["saved_correction"] = _saved_correction(checkpoint, m)
    if any(n.endswith("experts.gate_up_proj") for n in names):
        return "TRANSPOSED" if m["turned"] else "STACKED"
    if any(re.search(r"experts\.0\.gate_proj\.weight$", n) for n in names):
        return "NAMED"
    found = next((n for n in names if re.search(r"experts\.0\.w1\.weight$", n)), None)
    if found:
        block = re.search(r"layers\.\d+\.(.*)\.experts", found)
        m["saved_block"] = block[1] if block else m["block"]
        return "NUMBERED"
    raise PortingError(f"the checkpoint holds experts as {sorted(n for n in names if 'experts' in n)[:2]}")


def _saved_correction(checkpoint: Checkpoint, m: Mapping[str, Any]) -> str:
    """Returns the name under which a checkpoint stores the experts' correction bias, as a str.

    The name begins after the names of the layer and of its block. "|v" is appended if the bias is stored as a matrix
    [1, N]; it tells the port to read a vector. If the checkpoint has no such tensor, m["correction"] is returned.

    Args:
        checkpoint: a checkpoint of the tiny model.
        m: properties of the mixture. "correction" is the name of the bias in transformers; the tensor in the checkpoint
            is the one whose name ends with the same last part. "block" is the name of the block.
    """
    last = m["correction"].rpartition(".")[2]
    for name in sorted(checkpoint.names):
        if found := re.search(rf"layers\.\d+\.{re.escape(m['block'])}\.((?:.*\.)?{re.escape(last)})$", name):
            return found[1] + ("|v" if len(checkpoint.shape(name)) == 2 else "")
    return str(m["correction"])


def _verify(
    tiny: TinyModels, family: Family, text: str, variants: list[Variant], refused: dict[str, str], folder: Path,
    progress: Progress,
) -> AutoPort:  # fmt: skip
    """Compare a port's logits with those of transformers. Returns the AutoPort: the port and its errors.

    The logits of the first 2 * SHOWN variants are compared. If all errors are at most LIMIT, check() also compares the
    results of all ops in the first variant.

    Args:
        tiny: builds the models.
        family: the port.
        text: source text of the port.
        variants: traced variants of the configuration.
        refused: settings that the port refuses, for the AutoPort.
        folder: folder in which checkpoints of the variants are written.
        progress: called before each variant.
    """
    deviations, failure = dict[str, float](), ""
    for at, v in enumerate(variants[: 2 * SHOWN]):
        name = ", ".join(f"{k}={x!r}" for k, x in list(v.changes.items())[:2]) or "small sizes"
        name = _brief(v) or name
        progress(len(deviations), len(variants), f"verifying {name}")
        path = folder / f"variant{len(deviations)}"
        model = tiny.build(**v.changes)
        tiny.save(model, path)
        try:
            with warnings.catch_warnings():
                if at:  # the first variant's warnings name the keys that the port does not read
                    warnings.simplefilter("ignore", UserWarning)
                deviations[name] = deviation(path, family, model)
        except (PortError, CheckpointError) as e:
            failure = failure or f"with {name} the port does not load: {e}"
            continue
        if deviations[name] > LIMIT:
            failure = failure or f"with {name} logits differ by {deviations[name]:.1e}, more than {LIMIT:g}"
    if not failure:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            program = port(Checkpoint.open(folder / "variant0"), 61, family=family)
        report = check(folder / "variant0", program=program)
        failure = "" if report.ok else f"first difference at {report.first_bad}: {report.cause}"
    return AutoPort(tiny.architecture, text, deviations, refused, failure)


def _brief(v: Variant) -> str:
    rope = v.changes.get("rope_parameters") or {}
    return ", ".join(f"{k} {rope[k]}" for k in ("rope_type", "rope_theta", "partial_rotary_factor") if k in rope)


def deviation(path: Path, family: Family, model: Any) -> float:
    """The error of a port's logits, as one number: max |ours - theirs| / max |theirs|.

    The maximum is over a prefill of a random prompt and some decode steps. The result is infinity if one of our logits
    is not finite.

    path: a checkpoint of `model`. family: the port. model: the transformers model. Raises PortError or CheckpointError
    if the port cannot load the checkpoint.
    """
    import torch

    checkpoint = Checkpoint.open(path)
    program = port(checkpoint, PROMPT + STEPS + 3, family=family)
    tokens = np.random.default_rng(1).integers(3, 250, PROMPT + STEPS).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
    pages = -(-len(tokens) // 16)
    state = StateSpec(pages, 16, 2 * program.recurrent)
    ex = open_device("reference").load(program, checkpoint, state)

    def run(ids: list[int], at: int) -> np.ndarray:
        chunk = Chunk(ids, at, list(range(pages)), range(len(ids)), state=state.pair(0, 0))
        got = ex.step(StepRequest(bind([chunk], 16), logits=True)).logits
        assert got is not None
        return got

    rows = [run(tokens[:PROMPT], 0), *(run([tokens[i]], i) for i in range(PROMPT, len(tokens)))]
    made = np.concatenate(rows)
    gap = float(np.abs(made - wanted).max() / np.abs(wanted).max())
    return gap if np.isfinite(gap) else float("inf")


__all__ = ["AutoPort", "deviation", "load_port", "port_automatically", "turned"]
