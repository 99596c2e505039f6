"""Recipe: a function's name and its keyword arguments, with which another process makes an equal object."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

Recipe = tuple[str, Mapping[str, Any]]  # "module:name" of what makes it, and its arguments, which JSON can hold


@runtime_checkable
class HasRecipe(Protocol):
    """Interface of objects that have a Recipe, with which another process can make an equal object."""

    def recipe(self) -> Recipe:
        """Return the Recipe of this object: a tuple ("module:name" of a function, its arguments).

        Another process calls make() with the Recipe to get an equal object. The arguments are a dict {name: value} that
        can be written as JSON.
        """


def named(where: str) -> Any:
    """Import the object called "module:name", such as a function or class, and return it.

    Raises ImportError or AttributeError if there is none.
    """
    module, _, name = where.partition(":")
    return reduce(getattr, name.split("."), import_module(module))


def make(recipe: Recipe) -> object:
    """Call the function that the recipe names with the recipe's arguments, and return the object that it makes.

    Raises the errors of importing the module and of calling the function.
    """
    where, arguments = recipe
    return named(where)(**arguments)
