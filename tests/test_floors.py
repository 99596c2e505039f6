"""Layering rules of docs/design.md: imports go only to lower layers, there are no import cycles, a long file says why.

A room is a package or module directly under intaglio; a floor is a layer of rooms. docs/images/rooms.svg shows them.
Reads the source and imports nothing. An import counts wherever it stands: in a function, or for the type checker alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "src" / "intaglio"
FLOORS = (  # from the lowest up; rooms of one floor do not import each other
    ("formats", "batch", "plugins", "progress", "_native"),
    ("ops", "chips"),
    ("program", "collectives"),
    ("compiler", "models", "silicon"),
    ("devices",),
    ("runtime",),
    ("model", "machine", "tiers", "router"),
    ("llm",),
    ("server", "debugging", "measure"),
    ("codesign", "cluster"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {(room, lower) for room in ("devices", "silicon", "runtime") for lower in ("models", "compiler")}
HEAVY = {"torch", "transformers"}
LONGEST = 500  # lines; a longer file says why in its first ten lines, in a sentence that begins "Long because"


@dataclass(frozen=True)
class Import:
    name: str  # fully dotted, the imported name included
    line: int
    in_function: bool
    type_only: bool


def find_imports(node: ast.AST, package: str, in_function: bool = False, type_only: bool = False) -> Iterator[Import]:
    """Every import below `node` in a module whose package is `package`, import_module("...") among them."""
    names: list[str] = []
    match node:
        case ast.Import():
            names = [alias.name for alias in node.names]
        case ast.ImportFrom():
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            names = [package + name if name.startswith(".") else name]
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            type_only = True
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            in_function = True
    for name in names:
        yield Import(name, node.lineno, in_function, type_only)
    for child in ast.iter_child_nodes(node):
        yield from find_imports(child, package, in_function, type_only)


def judge(room: str, found: Import) -> str | None:
    """What is wrong with an import in `room` (the package's own __init__ is the room ""); None if nothing."""
    top, _, rest = found.name.partition(".")
    if top in HEAVY:
        allowed = room == "debugging" and found.in_function
        return None if allowed else f"{top} may be imported only inside functions of debugging"
    if top != "intaglio" or rest == "__version__":
        return None
    if room == "":
        return None if found.in_function or found.type_only else "the package root imports lazily or not at all"
    target = rest.split(".")[0]
    if target not in FLOOR:
        return f"{found.name} is in no room; import from the room itself, or give it a floor in this test"
    if target == room:
        return None
    if (room, target) in FORBIDDEN:
        return f"{room} must not import {target}"
    if FLOOR[target] >= FLOOR[room]:
        return f"{room} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[target]})"
    return None


def find_faults(package: Path) -> list[str]:
    faults = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        room = "" if parts == ("__init__",) else parts[0]
        if room and room not in FLOOR:
            faults.append(f"{file}: {room} has no floor; give it one in this test")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for found in find_imports(tree, ".".join(["intaglio", *parts[:-1]])):
            if fault := judge(room, found):
                faults.append(f"{file}:{found.line}: {fault}")
    return faults


def test_every_import_goes_down() -> None:
    assert any(PACKAGE.rglob("*.py"))
    assert find_faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("ops/linear.py", "from intaglio.program import Program", "ops (floor 1) imports program (floor 2)"),
        ("ops/linear.py", "def f():\n    import intaglio.program.verify", ":2: ops (floor 1) imports program"),
        ("ops/linear.py", "from ..program import Program", "imports program"),
        ("ops/deep/er.py", "from ...program.text import parse", "imports program"),
        ("ops/__init__.py", "from .. import program", "imports program"),
        ("formats.py", "from . import batch", "formats (floor 0) imports batch (floor 0)"),
        ("ops/linear.py", "import importlib\nimportlib.import_module('intaglio.cli')", "imports cli"),
        ("ops/linear.py", "if TYPE_CHECKING:\n    from intaglio.models import Port", "imports models"),
        ("models/llama.py", "from intaglio.compiler import fuse", "models (floor 3) imports compiler (floor 3)"),
        ("devices/host.py", "from intaglio.compiler import fuse", "devices must not import compiler"),
        ("silicon/machine.py", "import intaglio.models", "silicon must not import models"),
        ("silicon/machine.py", "from intaglio.devices import Device", "silicon (floor 3) imports devices (floor 4)"),
        ("runtime/engine.py", "from intaglio import models", "runtime must not import models"),
        ("llm.py", "from intaglio.measure import profile", "llm (floor 7) imports measure (floor 8)"),
        ("ops/linear.py", "from intaglio import LLM", "intaglio.LLM is in no room"),
        ("ops/linear.py", "import intaglio", "intaglio is in no room"),
        ("attic/old.py", "", "attic has no floor"),
        ("__init__.py", "from intaglio.llm import LLM", "the package root imports lazily"),
        ("debugging/compare.py", "import torch", "torch may be imported only inside functions of debugging"),
        ("ops/linear.py", "def f():\n    from transformers import x", "transformers may be imported only"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, fault: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    faults = find_faults(tmp_path)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/linear.py", "import numpy\nfrom intaglio import __version__, formats\nfrom .op import Op"),
        ("devices/silicon.py", "from intaglio.silicon.machine import Machine"),
        ("debugging/compare.py", "def f():\n    import torch"),
        ("cli/bench.py", "from intaglio.measure import profile"),
        (
            "__init__.py",
            "if TYPE_CHECKING:\n    from intaglio.llm import LLM\ndef __getattr__(name):\n    import intaglio.llm",
        ),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert find_faults(tmp_path) == []


def module_graph(package: Path) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports."""
    files = {".".join(["intaglio", *f.relative_to(package).with_suffix("").parts]): f for f in package.rglob("*.py")}
    names = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        inside = name if file.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = set()
        for found in find_imports(ast.parse(file.read_text(encoding="utf-8")), inside):
            target = found.name
            while target and target not in names:
                target = target.rpartition(".")[0]
            graph[name] |= {target} - {name, "", "intaglio"}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first of them repeated at the end; [] if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(e.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(module_graph(PACKAGE)) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("from intaglio.models.a import x\n")
    (tmp_path / "models" / "a.py").write_text("def f():\n    from intaglio.models import b\n")
    (tmp_path / "models" / "b.py").write_text("if TYPE_CHECKING:\n    from intaglio.models.a import x\n")
    assert set(circle(module_graph(tmp_path))) == {"intaglio.models.a", "intaglio.models.b"}


def test_a_long_file_says_why() -> None:
    files = [
        *PACKAGE.rglob("*.py"),
        *(REPO / "tests").rglob("*.py"),
        *(file for file in (REPO / "csrc").rglob("*") if file.is_file()),
    ]
    texts = {str(file.relative_to(REPO)): file.read_text(encoding="utf-8").splitlines() for file in files}
    long = {name: len(lines) for name, lines in texts.items() if len(lines) > LONGEST}
    assert {n: length for n, length in long.items() if "Long because" not in " ".join(texts[n][:10])} == {}


def test_the_picture_shows_these_floors() -> None:
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", (REPO / "docs" / "images" / "rooms.svg").read_text())
    numbers = [int(text) for text in texts if text.isdigit()]
    shown = {floor: texts[texts.index(str(floor)) + 1 :] for floor in numbers}
    rooms = {floor: tuple(names[: len(FLOORS[floor])]) for floor, names in shown.items()}
    assert rooms == dict(enumerate(FLOORS[:-1]))  # all but __main__
