"""The recipe: which passes run, in which order and why, and the cook that runs and reports them.

What a pass did is read off the Programs before and after it, so a report cannot differ from what happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from intaglio.compiler.buffers import plan_buffers, planned, row_bytes
from intaglio.compiler.dead import remove_dead
from intaglio.compiler.fusions import fuse_epilogues, fuse_glu, fuse_residual_experts, fuse_residual_norm
from intaglio.compiler.layout import Layout
from intaglio.compiler.projections import merge_projections
from intaglio.compiler.shard import shard
from intaglio.compiler.weights import set_weight_formats
from intaglio.program import Program, ProgramError, verify, verify_mesh


class Pass(NamedTuple):
    """One line of the recipe: `run` takes a Program and returns one that computes the same."""

    name: str
    run: Callable[..., Program]
    why: str


WHOLE = (  # on the Program of the whole model
    Pass("remove_dead", remove_dead, "what nobody reads is neither computed nor held, and hinders no fusion"),
    Pass("set_weight_formats", set_weight_formats, "bytes are time: store each weight in the format asked for"),
)
EACH = (  # on the Program of each rank
    Pass("merge_projections", merge_projections, "one wide matrix product instead of several that read the same x"),
    Pass("fuse_glu", fuse_glu, "activation(gate) * up is formed before the product is stored"),
    Pass("fuse_epilogues", fuse_epilogues, "scale, activation and residual ride on the product they follow"),
    Pass("fuse_residual_norm", fuse_residual_norm, "the residual rides on the norm it follows"),
    Pass("fuse_residual_experts", fuse_residual_experts, "the residual, or the shared expert, rides on the experts"),
    Pass("plan_buffers", plan_buffers, "temps that are never alive together share memory"),
)
RECIPE = WHOLE + EACH


def build(
    program: Program,
    weights: str = "auto",
    kv_format: str = "auto",
    *,
    passes: Sequence[Pass] = RECIPE,
    check: bool = False,
    report: Callable[[str], object] | list[str] | None = None,
) -> Program:
    """The Program a device should be given. Verified at the end, and after every pass with `check`.

    `weights` is auto (as stored), f32, bf16, f16, fp8 (fp8g128), int8 (int8g128), int4 (int4g32) or a full name such as
    int8g64, q4_k or mxfp4; `kv_format` is auto (to go with the weights), f32, bf16 or int8 (one scale a token and
    head). `report` takes one line a pass. Raises FormatError for an unknown format and ProgramError, naming the pass,
    for a Program that breaks a rule.
    """
    say = report.append if isinstance(report, list) else report
    for step in passes:
        before = program
        program = step.run(before, weights, kv_format) if step.run is set_weight_formats else step.run(before)
        if check:
            _verify(program, f"after pass {step.name}: ")
        if say:
            say(f"{step.name}: {'; '.join(_changes(before, program)) or 'nothing to do'}")
    _verify(program, "after the last pass: ")
    return program


def build_mesh(
    program: Program,
    layout: str | Layout,
    weights: str = "auto",
    kv_format: str = "auto",
    *,
    wire: str = "f32",
    check: bool = False,
) -> tuple[Program, ...]:
    """The Programs of all ranks of a layout, such as tp4pp2, in order of rank. Weights get their formats first, so that
    shares are quantised as the whole would be. Raises as build() and shard() do."""
    ranks = shard(build(program, weights, kv_format, passes=WHOLE, check=check), layout, wire)
    programs = tuple(build(rank, passes=EACH, check=check) for rank in ranks)
    verify_mesh(programs)
    return programs


def build_stages(
    program: Program, layout: str | Layout, weights: str = "auto", kv_format: str = "auto", *, wire: str = "f32"
) -> tuple[Program, ...]:
    """One rank's Program of each stage, as build_mesh() gives it: the ranks of a stage are alike, so that the first
    stands for all where only time is asked."""
    lanes = Layout.parse(layout).lanes if isinstance(layout, str) else layout.lanes
    ranks = shard(build(program, weights, kv_format, passes=WHOLE), layout, wire)
    return tuple(build(rank, passes=EACH) for rank in ranks[::lanes])


def _verify(program: Program, when: str) -> None:
    try:
        verify(program)
    except ProgramError as e:
        raise ProgramError(when + str(e)) from None


def _changes(before: Program, after: Program) -> Iterator[str]:
    """What is different, in words: ops by kind, formats, tensors dropped, buffers."""
    old, new = (Counter(op.kind for op in p.ops) for p in (before, after))
    counts = [f"{old[kind]} {kind}s -> {new[kind]}" for kind in sorted(old | new) if old[kind] != new[kind]]
    known = set(before.ops)
    changed = [op.site for op in after.ops if op not in known]
    if changed:
        yield f"{', '.join(counts) or f'{len(changed)} ops set'}, e.g. {changed[0]}"
    elif len(after.tensors) < len(before.tensors):
        yield ", ".join([*counts, f"{len(before.tensors)} tensors -> {len(after.tensors)}"])
    both = [(before.tensors[n], t) for n, t in after.tensors.items() if n in before.tensors]
    formats = Counter(f"{t.role}s {was.format} -> {t.format}" for was, t in both if was.format != t.format)
    yield from (f"{n} {change}" for change, n in formats.items())
    if planned(after) and not planned(before):
        (n, held), (m, kept) = ((len(b), sum(b.values())) for b in (row_bytes(before), row_bytes(after)))
        yield f"{n} temps of {held:,} bytes a row -> {m} buffers of {kept:,}"
