"""The runtime reaches for nothing: clock, randomness, device and spawning are passed in, or it could not be simulated.

Reads the source, imports nothing.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parent.parent / "src" / "intaglio" / "runtime"
ALLOWED = {  # what a module of the runtime may import; anything else gives it a clock, a die, a thread or a file
    "__future__", "bisect", "collections", "dataclasses", "enum", "heapq", "hashlib", "intaglio", "itertools", "json",
    "math", "numpy", "typing",
}  # fmt: skip
REACHING = {"open", "input", "print", "exec", "eval", "__import__", "breakpoint", "exit"}
CHANGING = {"hash", "id"}  # their values differ from run to run


def reached_for(source: str) -> list[str]:
    """Each thing in a module's source that it should have been given."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                faults += [f"imports {a.name}" for a in names if a.name.split(".")[0] not in ALLOWED]
            case ast.ImportFrom(module=module, level=0) if str(module).split(".")[0] not in ALLOWED:
                faults.append(f"imports {module}")
            case ast.Call(func=ast.Name(id=name)) if name in REACHING | CHANGING:
                faults.append(f"calls {name}()")
            case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"):
                faults.append("uses numpy.random")
            case ast.For(iter=it) | ast.comprehension(iter=it):
                if isinstance(it, ast.Set) or (isinstance(it, ast.Call) and getattr(it.func, "id", "") == "set"):
                    faults.append("walks a set, in no certain order")
    return faults


def test_the_runtime_is_given_everything() -> None:
    files = sorted(RUNTIME.rglob("*.py"))
    assert len(files) > 5
    assert {str(f): faults for f in files if (faults := reached_for(f.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import time", "imports time"),
        ("def f():\n    from random import Random", "imports random"),
        ("import numpy as np\nnp.random.default_rng()", "uses numpy.random"),
        ("import concurrent.futures", "imports concurrent.futures"),
        ("import asyncio, math", "imports asyncio"),
        ("from multiprocessing.connection import Pipe", "imports multiprocessing.connection"),
        ("open('/tmp/x')", "calls open()"),
        ("hash('x') % 7", "calls hash()"),
        ("for x in {1, 2}: pass", "walks a set"),
        ("[x for x in set(y)]", "walks a set"),
    ],
)
def test_reaching_is_found(source: str, fault: str) -> None:
    [found] = reached_for(source)
    assert found.startswith(fault)


def test_what_is_given_is_not_reached_for() -> None:
    assert reached_for("import math\nfrom intaglio.batch import bind\nself.clock()\nsorted(set(x))\nself.open(x)") == []
