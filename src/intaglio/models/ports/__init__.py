"""The table of ported architectures. A row of the table is a Family and describes one architecture.

Every module of this package except family.py has the rows of related architectures, in a tuple `FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from intaglio.models.ports.family import Family
from intaglio.plugins import load_plugins

__all__ = ["Family", "families", "register_family"]

_FAMILIES: dict[str, Family] = {}


def register_family(*families: Family) -> None:
    """Add ports (Families) to the table of ports. A Family replaces another Family with the same architecture name.

    Returns nothing.
    """
    _FAMILIES.update((family.architecture, family) for family in families)


def families() -> dict[str, Family]:
    """Returns a dict from an architecture's name in config.json to its Family (port). Ports of plugins are included.

    Raises PluginError for a plugin that cannot be imported.
    """
    load_plugins()
    return _FAMILIES


for _module in iter_modules(__path__):
    if _module.name != "family":
        register_family(*import_module(f"{__name__}.{_module.name}").FAMILIES)
