"""Every public method has a docstring, its own or inherited from the method that it overrides.

ruff (rules D, google convention) checks everything else; its rule D102 does not know inheritance.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

import intaglio

OPTIONAL = ("ray",)  # packages that modules of their own need


def public_classes(module: ModuleType) -> Iterator[type]:
    """Public classes that are defined in the module itself."""
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield value


def undocumented(cls: type) -> Iterator[str]:
    """Names of the public methods and properties of a class that have no docstring and inherit none."""
    for name, member in vars(cls).items():
        if isinstance(member, classmethod | staticmethod):
            member = member.__func__
        documentable = inspect.isfunction(member) or isinstance(member, property)
        if documentable and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield name


def classes(name: str) -> list[type]:
    """Public classes of a module; [] if it needs a package that is not installed with the tests."""
    try:
        return list(public_classes(import_module(name)))
    except ModuleNotFoundError as e:
        if e.name not in OPTIONAL:
            raise
        return []


def test_public_methods_are_documented() -> None:
    names = [m.name for m in walk_packages(intaglio.__path__, "intaglio.") if not m.name.endswith(".__main__")]
    assert "intaglio.program.verify" in names
    missing = [
        f"{name}.{cls.__name__}.{method}" for name in names for cls in classes(name) for method in undocumented(cls)
    ]
    assert missing == []


class Base:
    def documented(self) -> None:
        """Do nothing."""


class Derived(Base):
    def documented(self) -> None: ...

    def bare(self) -> None: ...

    @property
    def value(self) -> int:
        return 1

    def _private(self) -> None: ...


def test_an_undocumented_method_is_found() -> None:
    assert list(undocumented(Derived)) == ["bare", "value"]
