"""Sharding rules by op: how one lane computes its part of an op, and which collective makes a result whole again.

A rule is a function (lane, op) that appends the op, and collectives where they are needed, to the lane's Program; it
returns nothing. One file per family of ops, as in `intaglio.ops`. Importing this package imports every module in it, so
that each registers its rules.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
