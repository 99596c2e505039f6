"""The compiler: a recipe of passes, each a function from Program to Program. It never opens a device.

`build()` runs the recipe; `RECIPE` lists the passes in order, each with its reason.
"""

from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.recipe import RECIPE, Pass, build, build_mesh, build_stages
from intaglio.compiler.shard import Lane, Share, shard, sharding_rule
from intaglio.compiler.weights import set_activation_format

__all__ = [
    "RECIPE", "Lane", "Layout", "LayoutError", "Pass", "Share", "build", "build_mesh", "build_stages",
    "set_activation_format", "shard", "sharding_rule",
]  # fmt: skip
