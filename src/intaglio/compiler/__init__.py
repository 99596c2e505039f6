"""The compiler: a recipe of passes, each a function from Program to Program. It never opens a device.

`build` cooks the recipe; `RECIPE` is the recipe, to be read from top to bottom.
"""

from intaglio.compiler.layout import Layout, LayoutError
from intaglio.compiler.recipe import RECIPE, Pass, build, build_mesh, build_stages
from intaglio.compiler.shard import shard

__all__ = ["RECIPE", "Layout", "LayoutError", "Pass", "build", "build_mesh", "build_stages", "shard"]
