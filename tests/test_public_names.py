"""Tests use no private name of the package: not as an attribute, not by import, and not in a string to patch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
OWN = {"self", "cls"}
PUBLIC = {
    "_replace",
    "_asdict",
    "_fields",
    "_make",
    "_native",
    "_experts_implementation",
}  # namedtuple; the C++ part; theirs


def private(name: str) -> bool:
    return bool(re.fullmatch(r"_[a-z]\w*", name)) and name not in PUBLIC


def uses(source: str) -> Iterator[str]:
    """Yield "LINE: NAME" for each private name that the source uses of an object other than self or cls."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner not in OWN:
                names = [name]
            case ast.Attribute(value=ast.Attribute() | ast.Call() | ast.Subscript(), attr=name):
                names = [name]
            case ast.ImportFrom(module=module) if str(module).startswith("intaglio"):
                names = [alias.name for alias in node.names]
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr") | ast.Attribute(attr="setattr")):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                names = [part for text in texts for part in text.split(".")]
        yield from (f"{node.lineno}: {name}" for name in names if private(name))  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda f: str(f.relative_to(TESTS)))
def test_tests_use_public_names(file: Path) -> None:
    assert list(uses(file.read_text(encoding="utf-8"))) == []


def test_a_private_name_is_found() -> None:
    found = [
        "engine._now", "a.b()._x", "monkeypatch.setattr(LLM, '_ids', 1)", "monkeypatch.setattr('intaglio.llm._as', 1)",
        "from intaglio.llm import _layout", "getattr(x, '_y')",
    ]  # fmt: skip
    assert [len(list(uses(line))) for line in found] == [1] * len(found)
    assert not list(uses("self._x\nstep._replace(a=1)\nfrom intaglio import _native\nx.__class__\ngetattr(x, 'y')"))
