"""Recipe: a function's name and its keyword arguments, with which another process makes an equal object."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

Recipe = tuple[str, Mapping[str, Any]]  # "module:name" of what makes it, and its arguments, which JSON can hold


@runtime_checkable
class HasRecipe(Protocol):
    """Interface of objects that have a Recipe, from which another process can make an equal object."""

    def recipe(self) -> Recipe:
        """The Recipe of this object, for make() in another process: ("module:name" of a function, its arguments).

        The arguments are passed by keyword and are values that JSON can hold.
        """


def named(where: str) -> Any:
    """The object called "module:name". Raises ImportError or AttributeError if there is none."""
    module, _, name = where.partition(":")
    return reduce(getattr, name.split("."), import_module(module))


def make(recipe: Recipe) -> object:
    """Call the function of a recipe and return the object it makes.

    Raises the errors of importing the module and of calling the function.
    """
    where, arguments = recipe
    return named(where)(**arguments)
