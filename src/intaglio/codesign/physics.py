"""Properties that hold for modelled steps on any chip, whatever the constants: bounds by peak rates, monotonicity.

Draws a random chip, model, layout and load, and names the properties that do not hold. scripts/physics.py runs
thousands of draws, tests/silicon/test_physics.py a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intaglio import formats
from intaglio.chips import CHIPS, Target, target
from intaglio.codesign.simulate import cards, ported, scaled, stages
from intaglio.compiler import Layout
from intaglio.models import port_config
from intaglio.ops import Experts
from intaglio.program import Program
from intaglio.silicon.kernels.experts import ExpertsKernel
from intaglio.silicon.plan import Plan
from intaglio.silicon.sizes import BatchSizes
from intaglio.silicon.timeline import Timeline

RESOURCES: dict[str, tuple[str, ...]] = {  # each is doubled alone; fields of a chip
    "matrix arrays": ("macs",), "HBM rate": ("hbm_bytes_per_s",), "L2 size": ("l2_bytes",),
    "L2 rate": ("l2_bytes_per_cycle",), "ports": ("port_bytes_per_cycle",), "SRAM size": ("sram_bytes",),
    "SRAM rate": ("sram_bytes_per_cycle",), "accumulators": ("acc_bytes",), "vector lanes": ("vec_lanes",),
    "exponentials": ("exp_lanes",), "attention lanes": ("att_lanes",), "link rate": ("bytes_per_s",),
}  # fmt: skip
RANDOM = (
    "clock_hz", "hbm_bytes_per_s", "l2_bytes", "l2_bytes_per_cycle", "port_bytes_per_cycle", "sram_bytes_per_cycle",
    "vec_lanes", "exp_lanes", "bytes_per_s", "hbm_latency_s",
)  # fmt: skip
SLOWER = 0.01  # by which a step may be slower with twice of a resource: tiles are whole numbers
ROUNDING = 1e-9  # relative, of sums of times in float64
LAYOUTS = ("tp1", "tp2", "tp4", "tp8", "pp2", "tp2pp2", "tp4sp")


@dataclass(frozen=True)
class Draw:
    """A random test case: a chip, a model on it, and the load of one step.

    Attributes:
        on: chip and kernel library.
        model: name of the model, or its sizes in words.
        layout: how the chips share the model, such as tp2.
        programs: the Program of one rank of each pipeline stage.
        whole: the Program of the same model on a single chip, as a tuple with one element.
        decoding: number of decoding sequences in the step.
        keys: number of keys (tokens in the K/V cache) of each decoding sequence.
        prompt: number of tokens of the prompt that the step computes; 0: no prompt.
        precision: number formats of weights, K/V cache and activations, in words.
        changes: a pair (field name such as chip.vec_lanes, new value) for each field of the shipped chip that was
            changed. The size of HBM is changed too, but not listed.
    """

    on: Target
    model: str
    layout: str
    programs: tuple[Program, ...]
    whole: tuple[Program, ...]
    decoding: int
    keys: int
    prompt: int
    precision: str
    changes: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        load = f"{self.decoding} x {self.keys} keys + prompt {self.prompt}"
        changes = "".join(f" --set {name}={value:.6g}" for name, value in self.changes)
        return f"{self.on.chip.name}{changes}, {self.model}, {self.layout}, {self.precision}, {load}"


def sizes(decoding: int, keys: int, prompt: int) -> BatchSizes:
    """The BatchSizes of a step with decoding sequences and at most one prompt.

    They count the step's sequences and tokens. decoding: number of decoding sequences. keys: number of keys (tokens in
    the K/V cache) of each decoding sequence. prompt: number of tokens of the prompt, which the step computes whole; 0:
    no prompt.
    """
    parts = ((1, keys, decoding),) * (decoding > 0) + ((prompt, prompt, 1),) * (prompt > 0)
    return BatchSizes(decoding + prompt, decoding + (prompt > 0), parts)


def random_chip(rng: np.random.Generator) -> tuple[Target, tuple[tuple[str, float], ...]]:
    """Returns (Target with a random chip, changed fields). The fields are a tuple of pairs (field name, new value).

    The chip is one of the shipped chips. In half of the cases four of its rates or sizes are scaled by random factors
    from 1/3 to 3. In the other half nothing is scaled and the tuple is empty. The chip always has 10 TB of HBM, so that
    every model fits; the tuple does not list this change.
    """
    on = target(str(rng.choice(sorted(CHIPS))))
    on = on.with_chip(hbm_bytes=10**13)  # what does not fit is not timed
    if rng.random() < 0.5:
        return on, ()
    changes = {}
    for name in rng.choice(RANDOM, 4, replace=False).tolist():
        changes[f"chip.{name}"] = scaled(on.get(f"chip.{name}"), float(3 ** rng.uniform(-1, 1)))
    kept = {k: max(v, 1) if isinstance(v, int) and "l2_bytes" not in k else v for k, v in changes.items()}
    return on.changed(kept), tuple(kept.items())


def random_model(rng: np.random.Generator) -> tuple[str, Program]:
    """Returns (sizes as text, Program) of a small random model with two layers, Llama or Mixtral."""
    heads = int(rng.choice([8, 16, 32, 64]))
    kv = int(rng.choice([k for k in (8, 16, 32) if k <= heads]))
    hidden, inner = int(rng.integers(2, 17)) * 512, int(rng.integers(2, 29)) * 512
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    if rng.random() < 0.3:
        config |= {
            "architectures": ["MixtralForCausalLM"], "num_local_experts": int(rng.choice([8, 16, 64])),
            "num_experts_per_tok": int(rng.choice([1, 2, 8])), "sliding_window": None,
        }  # fmt: skip
    words = f"hidden={hidden} inner={inner} heads={heads} kv={kv} experts={config.get('num_local_experts', 0)}"
    return words, port_config(config)


def draw(rng: np.random.Generator, card: str | None = None) -> Draw:
    """A random test case for violations(), as a Draw.

    It has a chip, a model, a layout, number formats and a load. card: name of a model config that ships with the
    package; None: a small random model. Raises ValueError for an unknown name.
    """
    on, changes = random_chip(rng)
    name, program = (card, ported(card, None)) if card else random_model(rng)
    reachable = [x for x in LAYOUTS if Layout.parse(x).tp <= max(1, on.chip.links.max_chips)]
    layout = str(rng.choice(reachable if on.chip.links.max_chips > 1 else ["tp1", "pp2"]))
    narrow = "e4m3" in dict(on.chip.macs) and rng.random() < 0.5
    how = ("fp8row", "int8", "fp8") if narrow else ("auto", "auto", "auto")
    decoding, keys = int(2 ** rng.uniform(0, 9)), int(2 ** rng.uniform(4, 14))
    prompt = int(2 ** rng.uniform(1, 13)) if rng.random() < 0.5 else 0  # one token would be decoded
    parts = stages(program, layout, *how)
    whole = parts if layout == "tp1" else stages(program, "tp1", *how)
    precision = "8-bit weights, K/V and rows" if narrow else "two-byte formats"
    return Draw(on, name, layout, parts, whole, decoding, keys, prompt, precision, changes)


def timelines(programs: Sequence[Program], on: Target, load: BatchSizes) -> list[Timeline]:
    """Simulate one step. Returns a list with one Timeline (modelled times of the ops) for each pipeline stage.

    programs: one rank's Program of each stage. on: chip and kernel library. load: sizes of the step.
    """
    return [plan.run(load) for plan in Plan.of(programs, on)]


def seconds(programs: Sequence[Program], on: Target, load: BatchSizes) -> float:
    """Modelled seconds of one step through all pipeline stages.

    programs: one rank's Program of each stage. load: sizes of the step.
    """
    return sum(plan.cost(load)[0] for plan in Plan.of(programs, on))


def over_peak(on: Target, t: Timeline) -> list[str]:
    """Find the rates of a simulated step that exceed the chip's peak rates. Returns a list of texts.

    The list has an error text for each such rate; it is [] if there is none. The rates are FLOP/s and the bytes per
    second of HBM, L2 and links. t: the step's Timeline in one pipeline stage.
    """
    chip, out = on.chip, []
    flops = sum(e.timing.flops / chip.peak_flops(e.timing.format) for e in t.ops if e.timing.flops)
    total = t.totals()
    l2 = chip.l2_bytes_per_cycle * chip.clock_hz * on.library.l2_multicast
    rates = {
        "FLOP/s": flops, "HBM": total.hbm_bytes / chip.hbm_bytes_per_s, "L2": total.l2_bytes / l2,
        "links": total.link_bytes / chip.links.chip_bytes_per_s if total.link_bytes else 0.0,
    }  # fmt: skip
    for name, least in rates.items():
        if least > t.seconds * (1 + ROUNDING):
            out.append(f"{name}: a step of {t.seconds * 1e6:.3f} us needs {least * 1e6:.3f} us at the peak rate")
    return out


def tiles_by_heuristic(d: Draw) -> bool:
    """True if the kernel library chooses the tiles of its expert kernels by the number of tokens, not by time.

    vLLM's get_default_config chooses them this way: its tiles grow at 32, 64, 96 and 512 tokens. A step with more
    tokens may then be faster than a step with fewer.
    """
    kernels = [ExpertsKernel.of(op, p.tensors) for p in d.programs for op in p.ops if isinstance(op, Experts)]
    formats_run = {max(k.x_format, k.w_format, key=formats.bits) for k in kernels}
    return any(d.on.kernel("experts", f).library.expert_tiles != "best" for f in formats_run)


def violations(d: Draw) -> list[str]:
    """Check that modelled times obey physics in one case. Returns a list with a text for each broken property.

    The properties:

    1. No rate of a step is above the data sheet's.
    2. n chips are at most n times as fast as one chip. If the n chips may overlap two halves of a batch, so may the one
       chip.
    3. A chip with twice as much of a resource in RESOURCES, such as the HBM rate, is at most 1 % slower.
    4. More sequences, more keys or more prompt tokens do not make a step faster.

    A real system may break properties 3 and 4 for two reasons, which are therefore excluded here. The first is a
    library that overlaps two halves of a batch: in such a schedule a shorter task can lengthen the whole (R. L. Graham,
    Bounds on Multiprocessing Timing Anomalies, 1969). For 3 and 4 the halves are not overlapped. The second is a
    library that chooses tiles by a heuristic, see tiles_by_heuristic(). For 4 the fastest tiles are used.
    """
    load = sizes(d.decoding, d.keys, d.prompt)
    lines = timelines(d.programs, d.on, load)
    out = [why for t in lines for why in over_peak(d.on, t)]
    base, chips = sum(t.seconds for t in lines), Layout.parse(d.layout).ranks
    alone = seconds(d.whole, d.on, load)
    if d.on.library.dual_batch_overlap and load.tokens > 1:  # one chip may run two halves too, one after the other
        alone = min(alone, sum(plan.schedule(load, load.halves()).seconds for plan in Plan.of(d.whole, d.on)))
    if alone > base * chips * (1 + ROUNDING):
        out.append(f"{chips} chips are {alone / base:.3f} times as fast as one")
    on = d.on.with_library(dual_batch_overlap=False)
    base = seconds(d.programs, on, load)
    for name, fields in RESOURCES.items():
        changed = on.changed({f"chip.{f}": scaled(on.get(f"chip.{f}"), 2) for f in fields})
        if (after := seconds(d.programs, changed, load)) > base * (1 + SLOWER):
            out.append(f"twice the {name}: {after / base - 1:.2%} slower")
    if tiles_by_heuristic(d):
        on = on.with_library(expert_tiles="best")
        base = seconds(d.programs, on, load)
    for name, more in (
        ("one sequence more", sizes(d.decoding + 1, d.keys, d.prompt)),
        ("twice the sequences", sizes(2 * d.decoding, d.keys, d.prompt)),
        ("one key more", sizes(d.decoding, d.keys + 1, d.prompt)),
        ("twice the keys", sizes(d.decoding, 2 * d.keys, d.prompt)),
        ("a prompt one token longer", sizes(d.decoding, d.keys, d.prompt + 1)),
        ("a prompt twice as long", sizes(d.decoding, d.keys, 2 * d.prompt or 64)),
    ):
        if (after := seconds(d.programs, on, more)) < base * (1 - ROUNDING):
            out.append(f"{name}: {1 - after / base:.4%} faster")
    return out


def all_cards() -> list[str]:
    """Names of the model configs that ship with the package (cards), as a sorted list."""
    return sorted(cards())
