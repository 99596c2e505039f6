"""The runtime uses no ambient input: clock, randomness, device and processes are passed in, so it can be simulated.

Reads the source, imports nothing.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parent.parent.parent / "src" / "intaglio" / "runtime"
ALLOWED = {  # modules that the runtime may import; others have clocks, randomness, threads or files
    "__future__", "bisect", "collections", "contextlib", "dataclasses", "enum", "functools", "hashlib", "heapq",
    "intaglio", "itertools", "json", "math", "numpy", "typing",
}  # fmt: skip
AMBIENT = {"open", "input", "print", "exec", "eval", "__import__", "breakpoint", "exit"}
UNSTABLE = {"hash", "id"}  # their values differ from run to run


def ambient_inputs(source: str) -> list[str]:
    """Each use of ambient input in a module's source."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                faults += [f"imports {a.name}" for a in names if a.name.split(".")[0] not in ALLOWED]
            case ast.ImportFrom(module=module, level=0) if str(module).split(".")[0] not in ALLOWED:
                faults.append(f"imports {module}")
            case ast.Call(func=ast.Name(id=name)) if name in AMBIENT | UNSTABLE:
                faults.append(f"calls {name}()")
            case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"):
                faults.append("uses numpy.random")
            case ast.For(iter=it) | ast.comprehension(iter=it):
                if isinstance(it, ast.Set) or (isinstance(it, ast.Call) and getattr(it.func, "id", "") == "set"):
                    faults.append("iterates over a set, whose order is not defined")
    return faults


def test_runtime_uses_no_ambient_input() -> None:
    files = sorted(RUNTIME.rglob("*.py"))
    assert len(files) > 5
    assert {str(f): faults for f in files if (faults := ambient_inputs(f.read_text(encoding="utf-8")))} == {}


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
        ("for x in {1, 2}: pass", "iterates over a set"),
        ("[x for x in set(y)]", "iterates over a set"),
    ],
)
def test_ambient_input_is_found(source: str, fault: str) -> None:
    [found] = ambient_inputs(source)
    assert found.startswith(fault)


def test_injected_input_is_allowed() -> None:
    assert (
        ambient_inputs("import math\nfrom intaglio.batch import bind\nself.clock()\nsorted(set(x))\nself.open(x)") == []
    )
