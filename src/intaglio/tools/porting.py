"""Porting made quick: a tiny random model of an architecture, every port there is tried on it, and what each lacks.

Says which port fits as it is and writes its row of the table; where none does, how far the nearest came, and why it
parts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

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
    """An architecture that cannot be tried: what is missing, and what to do."""


@dataclass(frozen=True)
class Trial:
    """One port tried on the tiny model: the sites in line before the first that is not, or why it does not apply."""

    architecture: str
    sites: int
    fits: bool
    why: str


@dataclass(frozen=True)
class Findings:
    """What was tried, best first; `row` is the table's row for a port that fits."""

    architecture: str
    known: bool
    trials: tuple[Trial, ...]
    row: str

    def __str__(self) -> str:
        lines = [f"{self.architecture}: {'ported' if self.known else 'not in the table'}"]
        for t in self.trials[:6]:
            mark = "fits" if t.fits else f"{t.sites} sites in line" if t.sites else "does not apply"
            lines.append(f"  as {t.architecture}: {mark}{'; ' + t.why if t.why else ''}")
        if self.row:
            lines += ["", "The row for the table of its file in models/:", "", self.row]
        return "\n".join(lines)


def read_config(target: str) -> dict[str, Any]:
    """config.json of a folder, or transformers' defaults for a model type such as qwen3_moe."""
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
    inner = config.get_text_config()
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = mapping.get(inner.model_type) or mapping.get(target)
    if named is None:
        raise PortingError(f"transformers has no causal language model for {target!r}")
    return {**inner.to_dict(), "architectures": [named]}


def build_tiny(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A random model of this kind, with small sizes, in `folder`; returns its config as transformers wrote it."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    inner = {**config, **(config.get("text_config") or {})}
    kind = transformers.AutoConfig.for_model(str(inner["model_type"]))
    known = kind.get_text_config().to_dict()
    given = {k: v for k, v in inner.items() if k in known and k not in DERIVED}
    small = {k: v for k, v in SMALL.items() if known.get(k) is not None or inner.get(k) is not None}
    made = type(kind.get_text_config())(**{**given, **small})
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
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
    """The tiny model as if it were of `architecture`."""
    from intaglio.models import Checkpoint, CheckpointError, PortError, port
    from intaglio.tools.check import check

    checkpoint = Checkpoint.open(folder)
    checkpoint.config = {**config, "architectures": [architecture]}
    try:
        report = check(folder, program=port(checkpoint, context=64))
    except (PortError, CheckpointError, TypeError, ValueError) as e:
        return Trial(architecture, 0, False, str(e).rpartition("ForCausalLM) ")[2])
    sites = next((i for i, row in enumerate(report.rows) if not row.ok), len(report.rows))
    why = "" if report.ok else f"parts at {report.first_bad}: {report.cause}"
    return Trial(architecture, sites, report.ok, why)


def investigate(target: str) -> Findings:
    """Try every port on a tiny model of what `target` names. Raises PortingError."""
    from intaglio.models import families

    config = read_config(target)
    (architecture, *_) = config["architectures"]
    known = families()
    with tempfile.TemporaryDirectory() as folder:
        tiny = build_tiny(config, Path(folder))
        names = [architecture] if architecture in known else sorted(known)
        trials = [try_port(Path(folder), tiny, name) for name in names]
    best = sorted(trials, key=lambda t: (not t.fits, -t.sites, t.architecture))
    row = ""
    if architecture not in known and best[0].fits:
        family = known[best[0].architecture]
        changed = {k: config[k] for k, v in family.defaults.items() if k in config and config[k] != v}
        defaults = (
            f"{{**DEFAULTS, {', '.join(f'{k!r}: {v!r}' for k, v in changed.items())}}}" if changed else "DEFAULTS"
        )
        row = f'Family("{architecture}", "...", {defaults}, {family.describe.__name__}),'
    return Findings(architecture, architecture in known, tuple(best), row)


def port_command(
    target: Annotated[str, typer.Argument(help="A checkpoint folder, or a model type of transformers.")],
) -> None:
    """Which port fits an architecture, what is missing, and its row for the table. Needs torch and transformers."""
    try:
        findings = investigate(target)
    except PortingError as e:
        raise ValueError(str(e)) from None
    typer.echo(str(findings))
    if not findings.trials[0].fits:
        raise typer.Exit(1)
