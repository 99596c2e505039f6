"""The compiler's recipe: its passes, their order and the reasons; and the functions that run them.

build() compiles a Program for one device; build_mesh() and build_stages() also shard it. build() reports what each pass
changed, by comparing the Programs before and after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from intaglio import formats
from intaglio.compiler.buffers import buffers, bytes_per_row, plan_buffers, planned
from intaglio.compiler.dead import remove_dead
from intaglio.compiler.fusions import fuse_epilogues, fuse_glu, fuse_residual_experts, fuse_residual_norm
from intaglio.compiler.layout import Layout
from intaglio.compiler.projections import merge_projections
from intaglio.compiler.shard import shard
from intaglio.compiler.weights import set_weight_formats
from intaglio.program import MeshProgram, Program, ProgramError, verify, verify_mesh


class Pass(NamedTuple):
    """A compiler pass: one transformation of a Program, with its name and reason.

    Attributes:
        name: name of the pass.
        run: function that takes a Program and returns a Program with the same results. set_weight_formats() also takes
            the formats of weights and of K/V, as text.
        why: the reason for the pass, as text.
    """

    name: str
    run: Callable[..., Program]
    why: str


WHOLE = (  # on the Program of the whole model
    Pass("remove_dead", remove_dead, "an op whose result no op reads costs time and prevents fusions"),
    Pass(
        "set_weight_formats",
        set_weight_formats,
        "decoding is bound by memory: store each weight in the requested format",
    ),
)
EACH = (  # on the Program of each rank
    Pass("merge_projections", merge_projections, "one wide matrix product instead of several that read the same x"),
    Pass("fuse_glu", fuse_glu, "activation(gate) * up is computed before the product is stored"),
    Pass("fuse_epilogues", fuse_epilogues, "scale, activation and residual become part of the product before them"),
    Pass("fuse_residual_norm", fuse_residual_norm, "the residual becomes part of the norm before it"),
    Pass(
        "fuse_residual_experts",
        fuse_residual_experts,
        "the residual, or the shared expert, becomes part of the experts op",
    ),
    Pass("plan_buffers", plan_buffers, "temps with disjoint lifetimes share memory"),
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
    """Compile a Program for a device. Returns the compiled Program, which has been verified.

    Raises FormatError for an unknown format, and ProgramError if the compiled Program breaks a rule.

    Args:
        program: the Program of the whole model, not compiled.
        weights: number format of weights: auto (as stored), f32, bf16, f16, fp8 (fp8g128), int8 (int8g128), int4
            (int4g32) or a full name such as int8g64, q4_k or mxfp4.
        kv_format: number format of the K/V cache: auto, f32, bf16, int8 (one scale per token and head) or fp8 (E4M3,
            with the checkpoint's scales for each layer, or 1). auto: f32 for f32 weights, otherwise the format that the
            checkpoint asks for, or bf16.
        passes: the passes to run, in order.
        check: True to verify the Program after every pass. The ProgramError then names the pass.
        report: a function that is called with one line of text per pass, or a list to which the lines are appended.
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
) -> MeshProgram:
    """Compile a Program and divide it among the ranks of a layout. Returns a MeshProgram: the Programs of all ranks.

    Formats of weights are set before the Program is divided, so that a rank's part of a weight has the same values as
    in the whole weight.

    Args:
        program: the Program of the whole model, not compiled.
        layout: how ranks share the model, such as tp4pp2.
        weights: format of weights: auto (as stored), or a name such as fp8, int8 or int4; see build().
        kv_format: format of the K/V cache: auto, f32, bf16, int8 or fp8; see build().
        wire: number format to which values are rounded before they travel between ranks.
        check: True to verify the Program after every pass too.

    Raises FormatError for an unknown format, LayoutError if the layout does not fit the Program, and ProgramError if a
    compiled Program breaks a rule.
    """
    ranks = _sharded(program, layout, weights, kv_format, wire, check)
    mesh = MeshProgram(tuple(build(rank, passes=EACH, check=check) for rank in ranks), str(layout))
    verify_mesh(mesh)
    return mesh


def build_stages(
    program: Program, layout: str | Layout, weights: str = "auto", kv_format: str = "auto", *, wire: str = "f32"
) -> tuple[Program, ...]:
    """The compiled Program of the first rank of each pipeline stage, as a tuple.

    These Programs are enough to time a model: no rank of a stage has larger tensors than the first, and ranks wait for
    each other.

    Args:
        program: the Program of the whole model, not compiled.
        layout: how ranks share the model, such as tp4pp2.
        weights: format of weights: auto (as stored), or a name such as fp8, int8 or int4; see build().
        kv_format: format of the K/V cache: auto, f32, bf16, int8 or fp8; see build().
        wire: number format to which values are rounded before they travel between ranks.

    Raises FormatError for an unknown format, LayoutError if the layout does not fit the Program, and ProgramError if a
    compiled Program breaks a rule.
    """
    lanes = Layout.parse(layout).lanes if isinstance(layout, str) else layout.lanes
    ranks = _sharded(program, layout, weights, kv_format, wire)
    return tuple(build(rank, passes=EACH) for rank in ranks[::lanes])


def _sharded(
    program: Program, layout: str | Layout, weights: str, kv_format: str, wire: str, check: bool = False
) -> tuple[Program, ...]:
    """Run the passes WHOLE on a Program, then divide it among ranks. Returns a tuple with a Program for each rank.

    The caller must still run the passes EACH on each of these Programs.

    Args:
        program: the Program of the whole model, not compiled.
        layout: how ranks share the model, such as tp4pp2.
        weights: format of weights, see build().
        kv_format: format of the K/V cache, see build().
        wire: number format to which values are rounded before they travel between ranks.
        check: True to verify the Program after every pass.

    Raises FormatError for an unknown format, LayoutError if the layout does not fit the Program, and ProgramError if a
    compiled Program breaks a rule.
    """
    whole = build(program, weights, kv_format, passes=WHOLE, check=check)
    return shard(whole, layout, wire, _coded(program, whole))


def _coded(ported: Program, whole: Program) -> set[str]:
    """Names of the quantised weights that keep the checkpoint's number format, and so its codes, as a set.

    They are the quantised weights with the same format in both Programs. ported: the Program with the checkpoint's
    formats. whole: the same Program after set_weight_formats().
    """
    kept = ((t, ported.tensors.get(t.name)) for t in whole.of_role("weight"))
    return {t.name for t, was in kept if was and was.format == t.format and formats.get(t.format).grouped}


def _verify(program: Program, when: str) -> None:
    """Verify a Program. Raises ProgramError if it breaks a rule; the message begins with the text `when`."""
    try:
        verify(program)
    except ProgramError as e:
        raise ProgramError(when + str(e)) from None


def _changes(before: Program, after: Program) -> Iterator[str]:
    """Yield a line of text for each kind of change that a pass made to a Program.

    The kinds are: changed ops, the number of tensors, formats of tensors, and buffers. before, after: the Program
    before and after the pass.
    """
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
        (n, held), (m, kept) = ((len(buffers(q)), bytes_per_row(q)) for q in (before, after))
        yield f"{n} temps of {held:,} bytes per row -> {m} buffers of {kept:,}"
