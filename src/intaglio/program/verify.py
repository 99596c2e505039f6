"""The verifier: rules that every Program must satisfy.

A rule is a function that yields one message for each violation it finds, and nothing for a valid Program; verify() runs
them all. Shapes are checked by the ops' own `shapes()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from intaglio import formats
from intaglio.ops import REGISTRY, SYMBOLS, Grouped, Recv, Send
from intaglio.ops.op import ROLES, OpError, dim_known
from intaglio.program.program import Program, ProgramError

Rule = Callable[[Program], Iterator[str]]


def names_resolve(p: Program) -> Iterator[str]:
    """Yield an error message for each tensor name that an op or a view uses but the Program's table of tensors lacks.

    Also yields a message for each entry of the table whose key is not the tensor's own name.
    """
    for key, t in p.tensors.items():
        if key != t.name:
            yield f"the table lists {t.name!r} under {key!r}"
        if t.view and t.view[0] not in p.tensors:
            yield f"{t.name} is a view of {t.view[0]!r}, which is not in the table"
    for op in p.ops:
        for name in (*op.inputs, *op.outputs):
            if name not in p.tensors:
                yield f"{op.site} ({op.kind}) names {name!r}, which is not in the table"


def tensors_well_formed(p: Program) -> Iterator[str]:
    """Yield an error message for each fault in the declaration of a tensor.

    The faults are: an unknown role, number format or dimension; a constant whose shape does not match its number of
    values; a weight without a source.
    """
    for t in p.tensors.values():
        if t.role not in ROLES:
            yield f"{t.name} has role {t.role!r}; use one of {', '.join(ROLES)}"
        try:
            formats.get(t.format)
        except formats.FormatError as e:
            yield f"{t.name}: {e}"
        if not t.shape or not all(map(dim_known, t.shape)):
            known = f"positive numbers, {', '.join(SYMBOLS)} or a share such as T:1/4 or B/4"
            yield f"{t.name} is {t.type}; dims are {known}"
        if t.role == "const" and t.shape != (len(t.values),):
            yield f"const {t.name} is {t.type} but carries {len(t.values)} values"
        if t.role == "weight" and not t.source:
            yield f"weight {t.name} names no checkpoint tensor as its source"


def sites_unique(p: Program) -> Iterator[str]:
    """Yield an error message for each op that has the same site as an earlier op.

    A site is the name of an op's place in the model, such as layers.0.attn.q_proj.
    """
    seen: set[str] = set()
    for op in p.ops:
        if op.site in seen:
            yield f"two ops stand at site {op.site!r}"
        seen.add(op.site)


def faces_present(p: Program) -> Iterator[str]:
    """Yield an error message for each op that is not registered.

    Also yields a message for each method that an op lacks. An op needs the methods shapes(), reference() and work(). A
    collective needs exchange() instead of reference().
    """
    for op in p.ops:
        if REGISTRY.get(op.kind) is not type(op):
            yield f"{op.site}: op {op.kind!r} is not registered; known ops are {', '.join(sorted(REGISTRY))}"
        for face in op.faces:
            if face not in type(op).__dict__:
                yield f"{op.site}: op {op.kind} has no {face}()"


def shapes_agree(p: Program) -> Iterator[str]:
    """Yield an error message for each op that does not accept the shapes of its operands.

    Also yields a message for each result whose declared shape or format differs from what the op computes.
    """
    for op in p.ops:
        try:
            for name, (shape, format) in op.shapes(p.tensors).items():
                t = p.tensors[name]
                if (t.shape, t.format) != (shape, format):
                    yield f"{op.site} ({op.kind}) computes {name} as {format}{list(shape)} but it is declared {t.type}"
        except OpError as e:
            yield str(e)
        except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as e:  # attributes of other types
            yield f"{op.site} ({op.kind}) cannot have these operands and attributes: {type(e).__name__}: {e}"


def written_before_read(p: Program) -> Iterator[str]:
    """Yield an error message for each wrong read or write of a temp (intermediate result) or output tensor.

    The faults are:

    - The tensor is read before it is written.
    - The tensor is never written, or is written twice.
    - An op writes a view, or a tensor that is neither a temp nor an output.
    """
    written: set[str] = set()
    for op in p.ops:
        for name in op.inputs:
            if p.tensors[name].role in ("temp", "output") and p.base(name) not in written:
                yield f"{op.site} ({op.kind}) reads {name} before anything has written it"
        for name in op.outputs:
            t = p.tensors[name]
            if t.role not in ("temp", "output") or t.view:
                what = "view" if t.view else t.role
                yield f"{op.site} ({op.kind}) writes {name}, a {what}; only temps and outputs are written"
            if name in written:
                yield f"{op.site} ({op.kind}) writes {name} a second time"
            written.add(name)
    for t in p.tensors.values():
        if t.role in ("temp", "output") and not t.view and t.name not in written:
            yield f"{t.role} {t.name} is never written"


def views_inside(p: Program) -> Iterator[str]:
    """Yield an error message for each invalid view.

    A view is a range of columns of another tensor, its base, without a copy. The base must be a temp (intermediate
    result) and not a view itself. The view must have the same format and number of rows as its base, and its columns
    must lie inside the base's columns.
    """
    for t in p.tensors.values():
        if t.view:
            base, start = p.tensors[t.view[0]], t.view[1]
            fits = len(t.shape) == len(base.shape) == 2 and 0 <= start <= int(base.shape[1]) - int(t.shape[1])
            if not fits or t.shape[0] != base.shape[0] or t.format != base.format:
                yield f"view {t.name} {t.type} from column {start} does not lie inside {base.name} {base.type}"
            if base.view or base.role != "temp":
                yield f"view {t.name} is of {base.name}, a {'view' if base.view else base.role}; views are of temps"


def state_kept(p: Program) -> Iterator[str]:
    """Yield an error message for each wrong use of a state tensor (K/V cache or recurrent state) by an op.

    The faults are:

    - an operand that is not declared for state gets a state tensor;
    - an operand that is declared for state gets another tensor;
    - an op reads a K/V cache before this step's values were written to it;
    - recurrent state is updated twice in a step;
    - the first dimension of recurrent state is not N.
    """
    written: set[str] = set()
    for op in p.ops:
        declared = {*op.reads_state, *op.writes_state}
        for name in op.inputs:
            if p.tensors[name].role == "state" and name not in declared:
                yield f"{op.site} ({op.kind}) names state {name} in an operand that is not declared for state"
        for name in declared:
            if p.tensors[name].role != "state":
                yield f"{op.site} ({op.kind}) uses {name}, a {p.tensors[name].role}, as state; declare it as state"
        for name in op.reads_state:
            if name not in written:
                yield f"{op.site} ({op.kind}) reads state {name} before this step's values are written to it"
        for name in op.operands("slots"):
            if name in written:
                yield f"{op.site} ({op.kind}) updates recurrent state {name} a second time in one step"
            if p.tensors[name].shape[0] != "N":
                yield f"{op.site} ({op.kind}): recurrent state {name} is {p.tensors[name].type}; wanted [N, ...]"
        written.update(op.writes_state)


def windows_kept(p: Program) -> Iterator[str]:
    """Yield error messages for each K/V cache that is read both with and without a sliding window.

    There is one message for each op that reads the cache with a window. Only the caches of ops with two block tables
    (Op.two_tables) are checked.
    """
    for op in p.ops:
        for name in op.reads_state if op.two_tables else ():
            if op.reach(name) and name not in p.windows:
                others = ", ".join(o.site for o in p.ops if name in o.reads_state and not o.reach(name))
                yield f"{op.site} ({op.kind}) reads {name} through a window, and others do without one: {others}"


def buffers_apart(p: Program) -> Iterator[str]:
    """Yield an error message for each op that overwrites an intermediate result which is still needed.

    The op itself or a later op reads it. This can happen because several intermediate results may share one memory
    buffer, one after another.
    """
    last = {p.base(name): i for i, op in enumerate(p.ops) for name in (*op.outputs, *op.inputs)}
    holder: dict[int, str] = {}
    for i, op in enumerate(p.ops):
        for name in op.outputs:
            buffer = p.tensors[name].buffer
            if buffer is None:
                continue
            other = holder.get(buffer)
            if other is not None and last[other] >= i:
                yield f"{op.site} writes {name} into buffer {buffer} while {other} there is still to be read"
            holder[buffer] = name


def collectives_placed(p: Program) -> Iterator[str]:
    """Yield an error message for each collective that names a wrong rank.

    Also yields a message if the Program's own rank is outside the mesh. The group of a collective must lie inside the
    mesh and contain the Program's rank. A send or recv must name another rank of the mesh.
    """
    if not 0 <= p.rank < p.mesh:
        yield f"rank {p.rank} is outside a mesh of {p.mesh}"
    for op in p.ops:
        if isinstance(op, Grouped) and (p.rank not in op.group or max(op.group) >= p.mesh):
            yield f"{op.site} ({op.kind}) has group={op.group}; wanted ranks of 0..{p.mesh - 1}, {p.rank} among them"
        if isinstance(op, Send | Recv) and (op.peer == p.rank or not 0 <= op.peer < p.mesh):
            yield f"{op.site} ({op.kind}) has peer={op.peer}; wanted another rank than {p.rank} of 0..{p.mesh - 1}"


RULES: tuple[Rule, ...] = (
    names_resolve,
    tensors_well_formed,
    sites_unique,
    faces_present,
    shapes_agree,
    written_before_read,
    views_inside,
    state_kept,
    windows_kept,
    buffers_apart,
    collectives_placed,
)


def verify(program: Program) -> None:
    """Raise ProgramError if the Program breaks a rule; return nothing if it is valid.

    The error lists up to eight faults, all of the first rule that is broken.
    """
    for rule in RULES:
        wrong = list(rule(program))
        if wrong:
            more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ProgramError(
                f"program {program.name!r} breaks rule {rule.__name__}:\n  " + "\n  ".join(wrong[:8]) + more
            )
