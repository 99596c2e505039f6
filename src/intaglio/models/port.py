"""Ports a checkpoint to a Program.

Chooses the family, describes the model, and checks the description against the checkpoint's tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from intaglio import formats
from intaglio.models.config import Config, PortError
from intaglio.models.decoder import (
    NAMED,
    NAMED_BIASES,
    NUMBERED,
    STACKED,
    UNGATED,
    UNGATED_STACKED,
    Decoder,
    write,
)
from intaglio.models.decoder.rope import lengths
from intaglio.models.files.cache_scales import CacheScales, read_cache_scales
from intaglio.models.files.checkpoint import PLAIN, Checkpoint
from intaglio.models.keys import Fate, judge_config, judge_quantisation
from intaglio.models.leftovers import judge_tensor
from intaglio.models.ports import Family, families
from intaglio.models.ports.family import OTHER_PART
from intaglio.models.ports.granite import STACKS
from intaglio.ops import OpError
from intaglio.program import Program, ProgramError
from intaglio.program.source import expand, is_run, shape_after

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
FEATURES = re.compile(
    r"expert|moe|lora_rank|conv|mamba|ssm|state|linear_|delta|index|sink|nextn|mtp|vision|audio|encoder"
)
OTHER_TASKS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|RewardModel")
ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM"}  # names that class had
DECIDED_BY = {  # part of a weight's name -> the config keys that determine its shape
    "experts.": "moe_intermediate_size or intermediate_size, hidden_size",
    "embed_tokens.weight": "vocab_size, hidden_size",
    "lm_head.weight": "vocab_size, hidden_size",
    "q_proj.": "num_attention_heads * head_dim, hidden_size",
    "k_proj.": "num_key_value_heads * head_dim, hidden_size",
    "v_proj.": "num_key_value_heads * head_dim, hidden_size",
    "qkv_proj.": "(num_attention_heads + 2 * num_key_value_heads) * head_dim, hidden_size",
    "o_proj.": "hidden_size, num_attention_heads * head_dim",
    "gate_proj.": "intermediate_size, hidden_size",
    "up_proj.": "intermediate_size, hidden_size",
    "gate_up_proj.": "2 * intermediate_size, hidden_size",
    "down_proj.": "hidden_size, intermediate_size",
    "gate.weight": "the number of experts, hidden_size",
    "router.": "the number of experts, hidden_size",
    "kv_b_proj.": "num_attention_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank",
    "q_norm.": "head_dim, or num_attention_heads * head_dim",
    "k_norm.": "head_dim, or num_key_value_heads * head_dim",
}


@dataclass
class Ported:
    """Result of porting a checkpoint: its Program, and a report of how the checkpoint was read.

    Attributes:
        program: the model as a list of ops, before compilation.
        family: the port that was used.
        architecture_from: text that says which file and key named the architecture.
        keys: for each key of config.json and of the quantisation settings, whether it was used or ignored, and why.
        layers: number of layers.
        unused: {name of a tensor that the Program does not use: the reason}.
        notes: messages for the user.
        ignored: {prefix of names of tensors that this port never uses: the reason}.
        scales: {name of a stored tensor with a scale of the K/V cache: names of the Program's constants with its
            value}.
    """

    program: Program
    family: Family
    architecture_from: str
    keys: list[Fate]
    layers: int = 0
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    scales: dict[str, tuple[str, ...]] = field(default_factory=dict)


def port(
    checkpoint: Checkpoint, context: int | None = None, name: str | None = None, family: Family | None = None
) -> Program:
    """Returns the Program of a checkpoint: the model as a list of ops, for positions below `context`.

    Weights keep the formats they are stored in. Issues a warning if ignored settings may matter.

    context: number of positions. None stands for max_position_embeddings, except for two kinds of rope scaling: with
    LongRoPE it stands for the original length, with YaRN for factor * original length if that is larger. name: name of
    the Program; None: the folder's name. family: the port to use; None: the port for the checkpoint's architecture.

    Raises PortError for an architecture that is not ported, a setting that is not implemented, a context outside 1 to
    the model's longest context, or tensors that do not match config.json. Raises CheckpointError for a checkpoint that
    cannot be read.
    """
    ported = port_checkpoint(checkpoint, context, name, family)
    if ported.notes:
        warnings.warn("; ".join([f"{checkpoint.path}: {ported.notes[0]}", *ported.notes[1:]]), stacklevel=2)
    return ported.program


def port_checkpoint(
    checkpoint: Checkpoint, context: int | None = None, name: str | None = None, family: Family | None = None
) -> Ported:
    """Port a checkpoint. Returns a Ported: the Program (the model as a list of ops) with a report of keys and tensors.

    Issues no warnings; the report has them as notes. Raises PortError for a checkpoint that is not ported, and
    CheckpointError for a checkpoint that cannot be read.

    Args:
        checkpoint: the open checkpoint.
        context: number of positions; None: the model's default.
        name: name of the Program; None: the folder's name.
        family: the port to use; None: the port for the checkpoint's architecture.
    """
    if family is None:
        family, said_by = _family(checkpoint.config, str(checkpoint.path))
    else:
        said_by = "the row given"
    if checkpoint.config_name != "config.json":
        said_by = f"{checkpoint.config_name}: general.architecture"
    stored = {n: checkpoint.format(n) for n in checkpoint.names}
    prefix = "model." if _llama_names(checkpoint) else _prefix(family, stored.keys())
    scales = read_cache_scales(
        checkpoint.entries, checkpoint.read_entry, checkpoint.quantisation, prefix, bool(checkpoint.coded)
    )
    c = _config(family, checkpoint.config)
    if isinstance(layers := c.table.get("num_hidden_layers"), int) and layers > len(stored):
        raise PortError(
            f"{checkpoint.config_name}: {c.name('num_hidden_layers')}={layers}, but the checkpoint holds only "
            f"{len(stored)} tensors; wanted the number of layers that it has"
        )
    notes = list(checkpoint.notes)
    layout = _layout(checkpoint, family, prefix, scales, notes)

    def format(source: str) -> str:
        if stored.get(source, "f32"):
            return stored.get(source, "f32")
        raise PortError(f"{source} is stored as {checkpoint.dtype(source)}; ports take {', '.join(PLAIN)}")

    title = name or re.sub(r"\s+", "-", checkpoint.path.resolve().name)
    program = _program(family, c, context, title, layout, format, checkpoint.order, notes)
    keys = judge_config(c, family, checkpoint.config, checkpoint.config_name)
    keys += judge_quantisation(
        checkpoint.quantisation, checkpoint.quantised_by, bool(checkpoint.coded), scales.asked_by
    )
    if checkpoint.config_name == "config.json":  # that of a GGUF file is written by its reader
        notes += [fate.note for fate in keys if fate.note]
    ported = Ported(program, family, said_by, keys, c.whole("num_hidden_layers"), notes=notes)
    for source, layer in scales.sources.items():
        ported.scales[source] = tuple(n for n in program.tensors if re.fullmatch(rf"layers\.{layer}\..*[kv]_scale", n))
        if not scales.asked_by:
            ported.unused[source] = "a scale of an FP8 K/V cache, for which the settings do not ask; --kv fp8 uses it"
    ported.ignored = dict.fromkeys(family.ignored, OTHER_PART) | c.ignored
    _match(ported, checkpoint, prefix)
    return ported


def port_config(
    config: Mapping[str, Any], context: int | None = None, name: str | None = None, format: str | None = None
) -> Program:
    """Returns the Program (the model as a list of ops) for a config.json without weights.

    context: number of positions; None: the model's default. name: name of the Program; None: the architecture's name.
    format: number format of all weights; None: the config's dtype, or bf16 if it has none. Raises PortError for an
    architecture, setting, dtype or context that is not supported, and for a config with quantisation settings.
    """
    family, _ = _family(config, "config.json")
    inner = {**config.get("text_config", {}), **config}
    dtype = str(inner.get("dtype") or inner.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if format is None and dtype not in DTYPES:
        raise PortError(f"config.json: dtype {dtype!r} is not ported; known are {', '.join(DTYPES)}")
    Config(inner, {}).refuse(
        "quantization_config", why="how its tensors are quantised is read off a checkpoint's files"
    )
    stored, c = format or DTYPES[dtype], _config(family, config)
    prefix = family.prefixes[0]
    return _program(
        family, c, context, name or family.architecture, lambda d: replace(d, prefix=prefix), lambda source: stored
    )


def _family(config: Mapping[str, Any], where: str) -> tuple[Family, str]:
    """Find the port for a config. Returns (Family, text with the config key that decided and its value).

    As in transformers, `architectures` decides if its class belongs to model_type, or if model_type is unknown;
    otherwise model_type decides. Raises PortError if there is no port. where: the checkpoint, for errors.
    """
    known = families()
    by_type = {t: f for f in known.values() for t in f.model_types}
    listed = config.get("architectures")
    named = str(listed[0]) if isinstance(listed, list) and listed else ""
    named = ALIASES.get(named, named)
    kind = config.get("model_type")
    if OTHER_TASKS.search(named):
        raise PortError(
            f"{where}: architectures names {named}, a model with a head for another task, not for the next token; "
            "give a checkpoint saved from a ForCausalLM class"
        )
    if named in known and (kind in known[named].model_types or kind not in by_type):
        return known[named], f"config.json: architectures={named}"
    if kind in by_type:
        also = f" (architectures={named} names another class; transformers goes by model_type)" if named else ""
        return by_type[kind], f"config.json: model_type={kind}{also}"
    odd = sorted(k for k, v in config.items() if FEATURES.search(k) and v not in (None, False, 0))
    seen = f" Its config.json speaks of {', '.join(odd)}, which no port supports." if odd else ""
    if not named and not kind:
        raise PortError(
            f"{where}: config.json has architectures={listed!r} and no model_type; one of them has to say which model "
            "this is"
        )
    what = f"architecture {named}" if named else f"model_type {kind!r}"
    target = where if where != "config.json" else kind or named
    raise PortError(
        f"{what} is not ported.{seen} `intaglio models --all` lists what is, and for what is not the reason; "
        f"`intaglio port {target} --auto` derives a port from its class in transformers and verifies it, or names what "
        f"is missing; `intaglio port {target}` tries every port on a tiny model of this architecture and names the "
        "nearest, from which docs/adding-a-model.md makes a port"
    )


def _prefix(family: Family, names: Any) -> str:
    """Returns the prefix that the decoder's tensor names have in a checkpoint, such as "model.".

    It is the first of family.prefixes for which the checkpoint has a tensor PREFIX + MODULE + ".weight", where MODULE
    is one of family.tops, such as embed_tokens. If "model." is among the prefixes, "" is tried last, for models saved
    without their outer class. If no prefix fits and no tensor looks like an embedding or a layer, it is the family's
    first prefix.

    Args:
        family: the port.
        names: names of the checkpoint's tensors.

    Raises PortError if the embedding or the layers have another prefix; the error states it.
    """
    tops = [f"{top}.weight" for top in family.tops]
    for p in (*family.prefixes, *([""] if "model." in family.prefixes else [])):
        if any(p + top in names for top in tops):
            return p
    if found := sorted(n for n in names if n.endswith("embed_tokens.weight") or re.search(r"(^|\.)layers\.0\.", n)):
        at = re.split(r"embed_tokens|layers\.0\.", found[0])[0]
        raise PortError(
            f"the tensors stand under {at!r} (as {found[0]}), and {family.architecture} has them under "
            f"{' or '.join(map(repr, family.prefixes))}; rename them, or save the model again from its "
            "ForCausalLM class"
        )
    return family.prefixes[0]


def _config(family: Family, config: Mapping[str, Any]) -> Config:
    """Returns the Config of the text model.

    It has the keys of text_config or, without that table, all keys of `config`. tie_word_embeddings is also read
    outside text_config. The family's aliases of keys and its function `prepare` are applied. config: contents of
    config.json.
    """
    inner = config.get("text_config")
    if not isinstance(inner, Mapping) or not inner:
        c = Config(config, family.defaults)
    else:
        outer = {k: config[k] for k in ("tie_word_embeddings",) if config.get(k) is not None}
        c = Config({**inner, **outer}, family.defaults)
    for usual, own in family.aliases.items():
        if own in config or c.get(own) is not None:
            c.named[usual] = own
        if c.get(own) is not None:
            c.table[usual] = c.get(own)
    if family.prepare:
        family.prepare(c)
    return c


def _llama_names(checkpoint: Checkpoint) -> bool:
    """True if the tensors of a GGUF file are read under the names that Decoder uses, not under transformers' names.

    False for a folder with config.json.
    """
    return checkpoint.config_name != "config.json" and bool(checkpoint.config.get("llama_names"))


def _layout(
    checkpoint: Checkpoint, family: Family, prefix: str, scales: CacheScales, notes: list[str]
) -> Callable[[Decoder], Decoder]:
    """Returns a function that takes a Decoder (model description) and returns a copy that fits a checkpoint's tensors.

    The function sets the prefix of tensor names, the K/V cache's format and scales, the names of the output head and
    its bias, whether the head is tied to the embedding, how experts are stored, and whether a router has a correction.
    It also applies `family.adapt`, except for GGUF files whose tensors have the names that Decoder uses. Each call may
    add messages for the user to `notes`. scales: scales of the K/V cache that the checkpoint has.
    """
    names = checkpoint.names

    def apply(d: Decoder) -> Decoder:
        cache = formats.CACHED if scales.asked_by else ""
        d = replace(d, prefix=prefix, cache=cache, cache_scales=scales.layers)
        if _llama_names(checkpoint):
            d = replace(d, sources={}, head="", table="")
        elif family.adapt:
            d = family.adapt(d, {n: checkpoint.shape(n) for n in names})
        if d.head and not d.tied and f"{d.head}.weight" not in names and "lm_head.weight" in names:
            d = replace(d, head="lm_head")  # as transformers 5 names every head
        embed, head = d.source(f"{prefix}embed_tokens.weight"), d.source(f"{d.head_source}.weight")
        if d.tied and head in names and embed not in names:
            d = replace(d, table=head.removesuffix(".weight"))
        elif d.tied and head in names and not checkpoint.equal(head, embed):
            d = replace(d, tied=False)
            notes.append(
                f"tie_word_embeddings is true, but {head} differs from {embed}: the head is used, as transformers does"
            )
        if d.head_bias and not d.tied and f"{d.head_source}.bias" in names:  # BERT's, beside one that is then unused
            d = replace(d, sources={k: v for k, v in d.sources.items() if k != f"{d.head_source}.bias"})
        m = d.mixture
        first = next((i for i, layer in enumerate(d.layers) if layer.sparse), 0)
        if m and m.correction_optional and f"{prefix}layers.{first}.{m.block}.{m.correction}" not in names:
            d = replace(d, mixture=(m := replace(m, correction="")))
        if m is None or m.sources not in (NAMED, NUMBERED, STACKS, UNGATED):
            return d
        if m.sources == UNGATED:
            stacked = f"{prefix}layers.{first}.{m.block}.{UNGATED_STACKED[1]}" in names
            return replace(d, mixture=replace(m, sources=UNGATED_STACKED)) if stacked else d
        for block in ("mlp", "block_sparse_moe"):
            at = f"{prefix}layers.{first}.{block}."
            if at + "experts.gate_up_proj" in names:  # as transformers 5 holds them, saved so
                router = next((r for r in ("gate", "router") if f"{at}{r}.weight" in names), m.router)
                return replace(d, mixture=replace(m, sources=STACKED, block=block, router=router))
        return d

    return apply


def _program(
    family: Family,
    c: Config,
    context: int | None,
    name: str,
    layout: Callable[[Decoder], Decoder],
    format: Callable[[str], str],
    order: Callable[[str], str] = lambda source: "",
    notes: list[str] | None = None,
) -> Program:
    """Returns the Program (the model as a list of ops) that a family's port writes for a config.

    Args:
        family: the port.
        c: the config.
        context: number of positions of the Program; None: the model's default.
        name: name of the Program.
        layout: function that returns a copy of a Decoder that fits the checkpoint's tensors.
        format: function from a stored tensor's name to its number format.
        order: function from a weight's name to the name of its act-order permutation (a tensor); "" if it has none.
        notes: list to which a warning is added if the rope table depends on the context; None: no warnings.

    Raises PortError if `context` is out of range, or if the port does not support a setting.
    """
    usual, limit, differs = lengths(c)
    length = context or usual
    if not 1 <= length <= limit:
        raise PortError(f"context={context} is outside 1..{limit} (max_position_embeddings); ask for less")
    if notes is not None and differs:
        notes.append(_long_note(length, usual, limit))
    d = layout(family.describe(c, length))
    if d.mixture and c.flag("separate_experts") and not is_run(d.mixture.source(d.mixture.sources[1])):
        d = replace(d, mixture=replace(d.mixture, sources=NAMED, biases=d.mixture.biases and NAMED_BIASES))
    try:
        return write(family.writer(d, name, length, format, order))
    except (OpError, ProgramError) as e:
        raise PortError(f"config.json: settings of {family.architecture} do not fit together: {e}") from None


def _long_note(length: int, usual: int, limit: int) -> str:
    """Returns the text of a warning for a model with two rope tables, one for short contexts and one for long contexts.

    The context for which a Program is made selects its table, so results depend on the context. The text says which
    table the Program has, and how to get the other table.

    length: the context of the Program. usual, limit: the longest contexts with the first and with the second table.
    """
    if length > usual:
        return (
            f"for a context of {length} tokens, beyond {usual}, rope is scaled for sequences of all lengths: short "
            f"ones differ from those with a context of {usual} or less"
        )
    return (
        f"the context is {length} tokens: up to {usual} the model's rope is that of its short sequences. Ask for a "
        f"context of up to {limit} (--context {limit}) to run longer ones; then all run with the rope of long ones"
    )


def _match(ported: Ported, checkpoint: Checkpoint, prefix: str) -> None:
    """Check that a Program fits its checkpoint. Adds the reason for each unused tensor to ported.unused.

    Returns nothing. Raises PortError in three cases: the checkpoint lacks a tensor that the Program reads; a tensor has
    another shape than the Program needs; or an unused tensor might change results. prefix: prefix of the decoder's
    tensor names.
    """
    program, family = ported.program, ported.family
    wanted = {
        name: (steps, () if len(t.source) > 1 else t.shape[1:] if is_run(source) else t.shape)  # (): a part, any shape
        for t in program.of_role("weight")
        for source in t.source
        for name, steps in expand(source)
    }
    where = f"{checkpoint.path} ({family.architecture})"
    if missing := sorted(wanted.keys() - checkpoint.names):
        raise PortError(
            f"{where} lacks {_some(missing)}, which its config.json asks for{_why(missing, ported, checkpoint)}"
        )
    tied = "lm_head.weight" not in program.tensors
    bias = program.tensors["lm_head.bias"].source[0] if "lm_head.bias" in program.tensors else ""
    predictors = tuple(_predictors(checkpoint.config, prefix))
    extra = []
    for name in sorted(checkpoint.names - wanted.keys() - checkpoint.orders - ported.scales.keys()):
        if name.startswith(predictors):
            ported.unused[name] = "a layer that only predicts tokens further ahead"
        elif why := next((why for start, why in ported.ignored.items() if fnmatchcase(name, f"{start}*")), ""):
            ported.unused[name] = why
        elif tied and (name.endswith("lm_head.weight") or name.endswith(".decoder.weight")):
            ported.unused[name] = "equal to the embedding, which is the head too (tie_word_embeddings)"
        elif name.replace(".decoder.", ".") == bias.replace(".decoder.", "."):
            ported.unused[name] = "a second bias of the head, which transformers does not add"
        elif why := judge_tensor(checkpoint, name):
            ported.unused[name] = why
        else:
            extra.append(name)
    if extra:
        lora = "; merge the LoRA into the weights first" if any(".lora_" in n for n in extra) else ""
        layers = [re.search(r"layers\.(\d+)\.", n) for n in extra]
        if n := min((int(m[1]) if m else 0 for m in layers), default=0):
            given = ported.layers
            lora = (
                f"; config.json has num_hidden_layers={given}, and these are of layers from {n} on"
                if n >= given
                else lora
            )
        raise PortError(f"{where} holds {_some(extra)}, which the port of {family.models} would leave unused{lora}")
    for name, (steps, shape) in sorted(wanted.items()):
        keys = next((keys for part, keys in DECIDED_BY.items() if part in name), "hidden_size")
        try:
            found = shape_after(checkpoint.shape(name), steps)
        except (ProgramError, IndexError) as e:
            raise PortError(
                f"{where}: {name} is {list(checkpoint.shape(name))}, from which the port takes parts "
                f"({'|'.join(steps)}): {e}; config.json's {keys} or the layout of the tensor is another"
            ) from None
        if shape and found != shape:
            flat = len(found) == 2 and found[0] == 1 and found[1:] == shape
            then = "; in a port, end its source with |v to read it as a vector" if flat else ""
            raise PortError(f"{where}: {name} is {list(found)}, config.json makes it {list(shape)} ({keys}){then}")


def _why(missing: list[str], ported: Ported, checkpoint: Checkpoint) -> str:
    """Returns the likely cause of missing tensors as text; "" if none is known.

    The text is for the end of an error message and begins with "; ". missing: names of the missing tensors.
    """
    if all(n.endswith(("bias", "sinks")) for n in missing):
        ends = {"norm" if "norm" in n else "mlp" if "mlp" in n else "attention" for n in missing}
        keys = [k.key for k in ported.keys if "bias" in k.key and (any(e in k.key for e in ends) or k.key == "bias")]
        given = ", ".join(f"{k}={checkpoint.config.get(k)!r}" for k in keys)
        name = ported.family.architecture
        unread = [k.key for k in ported.keys if k.key in keys and k.fate == "ignored"]
        if unread:
            return f"; the port of {name} always has them, and does not read {given}"
        return f"; config.json says {given}" if given else f"; {name} always has them"
    if all(n.endswith("lm_head.weight") for n in missing):
        return "; if the head is the embedding, set tie_word_embeddings to true"
    if any(".lora_" in n for n in checkpoint.names):
        return "; it holds LoRA tensors: merge them into the base model first"
    if checkpoint.unlisted:
        return f"; these files beside it were not read: {', '.join(checkpoint.unlisted[:4])}"
    return ""


def _predictors(config: Mapping[str, Any], prefix: str) -> list[str]:
    """Returns the name prefixes of multi-token-prediction tensors, as a list. Programs do not use these tensors.

    config: contents of config.json. prefix: prefix of the decoder's tensor names, such as "model.".
    """
    n, more = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
    return [*(f"{prefix}layers.{i}." for i in range(n, n + more)), "mtp.", "model.mtp."]


def _some(names: list[str]) -> str:
    """Returns text for an error message with the number of tensors in `names` and the first four names."""
    return f"{len(names)} tensors ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
