"""Finds the port that fits an architecture: builds a tiny random model with transformers and tries every port on it.

For a port that fits, it gives the row of the table of ports; if none fits, how many sites the nearest port gets right
and what differs at the next.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.progress import Progress, counted, silent

SMALL: dict[str, Any] = {  # sizes of the tiny model, where its config has such a key
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 263,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "num_experts": 8, "num_local_experts": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "sliding_window": 24, "max_window_layers": 2,
    "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258,
}  # fmt: skip
DERIVED = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "qk_head_dim")  # of the number of layers


class PortingError(RuntimeError):
    """Raised if no port can be tried on a model architecture, because a tiny model of it cannot be built or run.

    The message says what is missing and how to correct it.
    """


@dataclass(frozen=True)
class Trial:
    """Result of trying one port on the tiny model.

    Attributes:
        architecture: the architecture for which the port was written.
        sites: number of ops whose results agree with transformers, before the first that differs; 0 if the port cannot
            be applied to the model.
        fits: True if no result differs.
        why: a description of the first difference, or the reason why the port cannot be applied; "" if the port fits.
    """

    architecture: str
    sites: int
    fits: bool
    why: str


@dataclass(frozen=True)
class Findings:
    """Result of trying the existing ports on a model architecture.

    Attributes:
        architecture: name of the architecture.
        known: True if the table of ports has this architecture.
        trials: one Trial for each port, the best first. If `known`, only the architecture's own port was tried.
        row: source text of a row to add to the table of ports, made from the port that fits; "" if `known` or if no
            port fits.
    """

    architecture: str
    known: bool
    trials: tuple[Trial, ...]
    row: str

    def __str__(self) -> str:
        lines = [f"{self.architecture}: {'ported' if self.known else 'not in the table'}"]
        for t in self.trials[:6]:
            mark = "fits" if t.fits else f"{t.sites} sites agree" if t.sites else "does not apply"
            lines.append(f"  as {t.architecture}: {mark}{'; ' + t.why if t.why else ''}")
        if not self.known and not self.trials[0].fits:
            lines.append(
                "No port fits. --auto derives one from the model's behaviour, or names what cannot be derived."
            )
        if self.row:
            lines += ["", "The row for FAMILIES of its file in models/ports/:", "", self.row]
        return "\n".join(lines)


def read_config(target: str) -> dict[str, Any]:
    """Return the configuration of a model as a dict, with the keys of config.json.

    The argument `target` is one of:

    - a checkpoint folder: the result is the contents of its config.json.
    - a model type of transformers, such as "qwen3_moe": the result is the default configuration of this type.

    Raises PortingError for a folder without config.json, for an unknown model type, and if transformers is missing or
    refuses its own defaults.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise PortingError(
                f"{path} has no config.json; give a checkpoint's folder, or a model type of transformers"
            )
        return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    try:
        import transformers
    except ImportError:
        raise PortingError("porting needs torch and transformers: pip install torch transformers") from None
    try:
        config = transformers.AutoConfig.for_model(target)
    except ValueError:
        raise PortingError(f"{target!r} is neither a folder nor a model type that transformers knows") from None
    except Exception as e:  # its own checks of a configuration raise errors of several kinds
        why = " ".join(str(e).split())
        raise PortingError(f"transformers refuses its own default configuration of {target!r}: {why}") from e
    inner = config.get_text_config()
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = mapping.get(inner.model_type) or mapping.get(target)
    if named is None:
        raise PortingError(f"transformers has no causal language model for {target!r}")
    return {**inner.to_dict(), "architectures": [named]}


def build_tiny(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write a checkpoint of a model with small sizes and random weights to `folder`. Returns its config.json as a dict.

    `config` is the configuration of the full-size model. Raises PortingError if transformers cannot build the small
    model.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    inner = {**config, **(config.get("text_config") or {})}
    kind = transformers.AutoConfig.for_model(str(inner["model_type"]))
    known = kind.get_text_config().to_dict()
    given = {k: v for k, v in inner.items() if k in known and k not in DERIVED}
    small = {k: v for k, v in SMALL.items() if known.get(k) is not None or inner.get(k) is not None}
    made = type(kind.get_text_config())(**{**given, **small})
    try:
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    except (TypeError, ValueError) as e:  # some configuration classes have defaults that their model does not take
        raise PortingError(
            f"transformers cannot build a tiny {inner['model_type']} ({e}); give the folder of a checkpoint, "
            "whose config.json sets what the defaults of transformers leave out"
        ) from e
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if not p.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
                continue
            noise = torch.randn(p.shape, generator=draw)
            if p.dim() > 1:
                p.copy_(noise * (0.5 if "embed" in name else 1.2 / p.shape[-1] ** 0.5))
            else:
                p.copy_(p + 0.3 * noise)
    model.float().save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def try_port(folder: Path, config: Mapping[str, Any], architecture: str) -> Trial:
    """Run the tiny model in `folder` with the port of `architecture`, and compare the results with transformers.

    Returns a Trial, which says how many ops agree. If the port cannot be applied to the model, no error is raised: the
    Trial says why.

    Args:
        folder: a checkpoint of the tiny model.
        config: content of its config.json.
        architecture: the architecture whose port is used, even if config.json names another one.
    """
    from intaglio.debugging.check import check
    from intaglio.models import Checkpoint, CheckpointError, PortError
    from intaglio.models import port as port_checkpoint

    checkpoint = Checkpoint.open(folder)
    checkpoint.config = {**config, "architectures": [architecture], "model_type": None}
    try:
        report = check(folder, program=port_checkpoint(checkpoint, context=64))
    except (PortError, CheckpointError, TypeError, ValueError) as e:
        return Trial(architecture, 0, False, str(e).rpartition("ForCausalLM) ")[2])
    sites = next((i for i, row in enumerate(report.rows) if not row.ok), len(report.rows))
    why = "" if report.ok else f"first difference at {report.first_bad}: {report.cause}"
    return Trial(architecture, sites, report.ok, why)


def lacking(trial: Trial) -> float:
    """Return the number of tensors that the port of `trial` reads and the tiny model lacks.

    The result is inf if the port failed for another reason.
    """
    found = re.match(r"lacks (\d+) tensors", trial.why)
    return int(found[1]) if found else float("inf")


def investigate(target: str, progress: Progress = silent) -> Findings:
    """Find the existing port that fits an architecture. Returns the Findings: the result of every port, the best first.

    A tiny model of the architecture with random weights is built with transformers. Each port is run on it and compared
    with transformers, op by op. If the table of ports has the architecture, only its own port is tried. If no port
    fits, the first Trial says how many ops agreed with the best port.

    Args:
        target: a checkpoint folder, or a model type of transformers.
        progress: called before each port.

    Raises PortingError if a tiny model cannot be built.
    """
    from intaglio.models import families

    config = read_config(target)
    (architecture, *_) = config["architectures"]
    known = families()
    with tempfile.TemporaryDirectory() as folder:
        progress(0, 0, f"building a tiny {architecture}")
        tiny = build_tiny(config, Path(folder))
        names = [architecture] if architecture in known else sorted(known)
        trying = counted(names, progress, lambda name: f"trying the port of {name}")
        trials = [try_port(Path(folder), tiny, name) for name in trying]
    best = sorted(trials, key=lambda t: (not t.fits, -t.sites, lacking(t), t.architecture))
    row = ""
    if architecture not in known and best[0].fits:
        family = known[best[0].architecture]
        changed = {k: config[k] for k, v in family.defaults.items() if k in config and config[k] != v}
        defaults = (
            f"{{**DEFAULTS, {', '.join(f'{k!r}: {v!r}' for k, v in changed.items())}}}" if changed else "DEFAULTS"
        )
        row = f'Family("{architecture}", "...", {defaults}, {family.describe.__name__}),'
    return Findings(architecture, architecture in known, tuple(best), row)
