"""Plugins: packages that add ops, kernels, chips, devices or model families through an entry point.

Such a package names a module in the entry point group `intaglio.plugins`. Importing the module registers what it
provides: an op by its class, a kernel with host_kernel or chip_kernel, a sharding rule with sharding_rule, a chip with
register_chip, a model family with register_family, a device with register_device. If the environment variable
INTAGLIO_PLUGINS is set, only the plugins it names (separated by commas) are loaded; if it is empty, none is.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points

GROUP = "intaglio.plugins"
_loaded: set[str] = set()


class PluginError(ValueError):
    """Raised for a plugin that cannot be imported; the message names the plugin, its module and the error."""


def load_plugins() -> tuple[str, ...]:
    """Import the installed plugins that the environment variable INTAGLIO_PLUGINS allows.

    Returns a tuple of plugin names. The names are those of all plugins that this process has imported so far, in
    alphabetical order. Each plugin is imported once per process. The function is called before a model family, chip,
    kernel library, device or op is looked up by name. Raises PluginError if a plugin cannot be imported; the error
    names the plugin and its module.
    """
    for point in _chosen():
        if point.name in _loaded:
            continue
        _loaded.add(point.name)  # before its import, during which it may look up names itself
        try:
            point.load()
        except Exception as e:
            _loaded.discard(point.name)
            package = point.dist.name if point.dist else "?"
            raise PluginError(
                f"plugin {point.name!r} ({point.value}, of package {package}) cannot be imported: "
                f"{type(e).__name__}: {e}; mend or uninstall it, or leave it out with INTAGLIO_PLUGINS"
            ) from e
    return tuple(sorted(_loaded))


@cache  # reading the metadata of all installed packages takes some 10 ms
def _chosen() -> tuple[EntryPoint, ...]:
    """Returns the entry points of the group `intaglio.plugins` that may be loaded, as a tuple in order of name.

    If the environment variable INTAGLIO_PLUGINS is set, only the entry points that it names may be loaded.
    """
    names = os.environ.get("INTAGLIO_PLUGINS")
    allowed = None if names is None else {name.strip() for name in names.split(",")}
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return tuple(point for point in points if allowed is None or point.name in allowed)
