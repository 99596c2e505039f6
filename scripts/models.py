"""Write src/intaglio/data/architectures.json and docs/models.md: every decoder architecture of transformers.

Each is ported, with its largest deviation, or refused with a reason.

    python scripts/models.py             the data file and the page
    python scripts/models.py --new       also compare the tiny models of ports without a deviation with transformers
    python scripts/models.py --auto      also derive each port anew, without reading existing ports (an hour)
    python scripts/models.py --measure   also compare the tiny model of each port with transformers (minutes)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "src/intaglio/data/architectures.json", ROOT / "docs/models.md"

RECURRENT = "recurrent blocks (state-space layers, linear attention or short convolutions) of a form that is not ported"
SPARSE = "sparse attention of a form that is not ported: an indexer chooses the positions that a query sees"
AUDIO = "audio tokens or an audio encoder"
LOOPED = "layers that run more than once, with keys and values of each pass"
HELPER = "a draft model that reads the keys and values of the model that it helps"
REASONS: dict[str, tuple[str, ...]] = {
    RECURRENT: (
        "InklingForCausalLM", "Inkling2ForCausalLM", "Inkling2LoopForCausalLM",
        "LaraMiniForCausalLM", "Qwen4ExpForCausalLM",
        "ZayaForCausalLM", "xLSTMForCausalLM",
    ),
    SPARSE: (
        "Dots3NoteForCausalLM",
        "MiniMaxM3VLForCausalLM",
    ),
    AUDIO: (
        "MossTranscribeDiarizeForConditionalGeneration", "MoshiForCausalLM", "MusicgenForCausalLM",
        "MusicgenMelodyForCausalLM", "Phi4MultimodalForCausalLM", "WhisperForCausalLM",
    ),
    "an indexer and norms with low-rank gates": ("AXK2ForCausalLM",),
    "an indexer, sinks in latent attention, residual streams that learned gates mix": ("HYV4ForCausalLM",),
    "recurrent blocks that need an op for WKV, which keeps a running maximum; each token mixed with the one before": (
        "RwkvForCausalLM",
    ),
    LOOPED: ("DoryForCausalLM", "HrmTextForCausalLM"),
    HELPER: ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
    "streams of attention for the n-grams ahead": ("ProphetNetForCausalLM",),
    "embeddings of each character's shape and sound": ("RoCBertForCausalLM",),
    "adapters of each language": ("XmodForCausalLM",),
    "attention to both sides; the positions of XLM": ("XLMWithLMHeadModel",),
    "two streams of attention with relative positions": ("XLNetLMHeadModel",),
    "attention by hashing, reversible layers": ("ReformerModelWithLMHead",),
    "residuals scaled by depth, a temperature of its own, a gate bias of each head": ("BeamForCausalLM",),
    "experts chosen by logit plus bias, weighted by sigmoid": ("Kolibri1ForCausalLM",),
    "two attentions in a layer, and experts that compute nothing": ("LongcatFlashForCausalLM",),
    "experts of attention": ("JetMoeForCausalLM",),
    "patches of bytes, whose borders a model of its own finds": ("BltForCausalLM",),
    "attention biased by a value of each key": ("DogeForCausalLM",),
    "a gate of each attention head; numbers of heads that differ between layers": ("LagunaForCausalLM",),
    "buckets of relative positions, a bias of each": ("CpmAntForCausalLM",),
}  # fmt: skip


def listed() -> dict[str, list[str]]:
    """Model types by architecture, of all decoders that the installed transformers can build."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    out: dict[str, list[str]] = {}
    for kind, names in NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            out.setdefault(name, []).append(kind)
    return {name: sorted(out[name]) for name in sorted(out)}


def gather(deviations: dict[str, float], automatic: dict[str, float]) -> dict[str, Any]:
    """The contents of the data file. automatic: the deviations of ports that `intaglio port --auto` derived."""
    import transformers

    from intaglio.models import families

    why = {name: reason for reason, names in REASONS.items() for name in names}
    table = {}
    for name, kinds in listed().items():
        row: dict[str, Any] = {"model_types": kinds}
        if name in deviations:
            row["deviation"] = deviations[name]
        if name in automatic:
            row["automatic"] = automatic[name]
        if name not in families():
            row["reason"] = why.get(name, "")
        table[name] = row
    return {"transformers": transformers.__version__, "architectures": table}


def page(data: dict[str, Any]) -> str:
    """The text of docs/models.md."""
    from intaglio.models import families

    known, table = families(), data["architectures"]
    ported = [name for name in table if name in known]
    automatic = sum("automatic" in row for row in table.values())
    lines = [
        "# Models", "",
        f"Of the {len(table)} decoder architectures that transformers {data['transformers']} can build, "
        f"{len(ported)} load here, text only. `intaglio models --all` prints the same list. Written by "
        "`scripts/models.py`; do not edit.", "",
        "The deviation is the largest of max |ours - theirs| / max |theirs| over prefill, chunks and decode, float32, "
        "on the tiny random model of `tests/support/tiny.py`, by the NumPy reference device.", "",
        f"`intaglio port TYPE --auto` derives {automatic} of them from their classes in transformers, without "
        "reading an existing port and without code written by hand; the last column has the largest deviation of the "
        "derived port, in prefill and decode, over variants of the configuration. `python scripts/models.py --auto` "
        "derives them anew.", "",
        "## Ported", "", "| architecture | models | largest deviation | of the automatic port |", "|---|---|---|---|",
    ]  # fmt: skip
    for name in ported:
        gap = table[name].get("deviation")
        derived = table[name].get("automatic")
        said = f"{'not measured' if gap is None else f'{gap:.0e}'} | {'' if derived is None else f'{derived:.0e}'}"
        lines.append(f"| {name} | {known[name].models} | {said} |")
    others = sorted(set(known) - set(table))
    lines += ["", f"Also, by names that transformers does not list among decoders: {', '.join(others)}.", ""]
    lines += ["## Not ported", "", "| architecture | reason |", "|---|---|"]
    lines += [f"| {name} | {row['reason']} |" for name, row in table.items() if name not in known]
    return "\n".join(lines) + "\n"


def measure(known: dict[str, float]) -> dict[str, float]:
    """The largest deviation of each architecture that tests/support/tiny.py builds, over its rows there.

    Those in `known` are not measured again.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny import FAMILIES, MIXTURES, OTHERS, RECURRENT, architecture, compare, tiny

    out: dict[str, float] = {}
    rows = FAMILIES | MIXTURES | OTHERS | RECURRENT
    with tempfile.TemporaryDirectory() as folder:
        for family in rows:
            name = architecture(rows[family]["class"])
            if name in known:
                continue
            path = tiny(family, Path(folder) / family)
            out[name] = max(out.get(name, 0.0), *compare(path, steps=8).values())
            print(f"{name} {out[name]:.1e}", flush=True)
    return out


def rounded(gaps: dict[str, float]) -> dict[str, float]:
    """Deviations with two digits."""
    return {name: float(f"{gap:.1e}") for name, gap in gaps.items()}


def derive(names: list[str]) -> dict[str, float]:
    """The largest deviation of each automatic port that is verified. names: architectures to try; []: all."""
    import importlib

    from intaglio.debugging.automatic import port_automatically

    importlib.import_module("intaglio.models.port").families = dict  # no port is in view
    out: dict[str, float] = {}
    for name, kinds in listed().items():
        if names and name not in names:
            continue
        for kind in kinds:
            try:
                made = port_automatically(kind)
            except Exception as e:
                print(f"{kind}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}", flush=True)
                continue
            print(str(made).replace("\n", "; "), flush=True)
            if made.verified and made.architecture == name:
                out[name] = max(made.deviations.values())
                break
    return out


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true", help="compare each port with transformers anew")
    parser.add_argument("--new", action="store_true", help="compare only ports that have no deviation yet")
    parser.add_argument("--auto", nargs="*", metavar="NAME", help="derive the ports of these architectures, or of all")
    wanted, found, derived = parser.parse_args(), dict[str, float](), dict[str, float]()
    if DATA.exists() and not wanted.measure:
        rows = json.loads(DATA.read_text())["architectures"]
        found = {name: row["deviation"] for name, row in rows.items() if "deviation" in row}
    if DATA.exists() and wanted.auto != []:
        rows = json.loads(DATA.read_text())["architectures"]
        derived = {name: row["automatic"] for name, row in rows.items() if "automatic" in row}
    if wanted.measure or wanted.new:
        found |= measure(found)
    if wanted.auto is not None:
        derived = {k: v for k, v in derived.items() if k not in wanted.auto} | derive(wanted.auto)
    data = gather(rounded(found), rounded(derived))
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))
    missing = [name for name, row in data["architectures"].items() if row.get("reason") == ""]
    if missing:
        sys.exit(f"no reason given for {', '.join(missing)}; add them to REASONS")


if __name__ == "__main__":
    main()
