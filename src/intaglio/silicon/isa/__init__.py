"""The instruction set: one class for each instruction, with its effect on memory (`run`) and its cost (`cost`).

One file for each kind of instruction. Importing this package imports every module in it, so that each registers its
instructions.
"""

from importlib import import_module
from pkgutil import iter_modules

from intaglio.silicon.isa.attention import Attend, Merge, Rescale, Softmax
from intaglio.silicon.isa.choosing import Choose, Locate
from intaglio.silicon.isa.control import Check, Halt
from intaglio.silicon.isa.instruction import ENGINES, Cost, Instruction
from intaglio.silicon.isa.matrix import Drain, Matmul
from intaglio.silicon.isa.recurrence import Scan
from intaglio.silicon.isa.reduction import Moment, Pool, Sinkhorn
from intaglio.silicon.isa.routing import Combine, Group, Score, SparseMix, TopK, Weigh
from intaglio.silicon.isa.sampling import Sample
from intaglio.silicon.isa.softmax_step import SoftmaxStep
from intaglio.silicon.isa.transfer import Fill, Gather, Load, Receive, Scatter, Send, Store
from intaglio.silicon.isa.vector import Convert, Dequantise, Map, Norm, Permute, Quantise, Rope

__all__ = [
    "ENGINES", "Attend", "Check", "Choose", "Combine", "Convert", "Cost", "Dequantise", "Drain", "Fill", "Gather",
    "Group", "Halt", "Instruction", "Load", "Locate", "Map", "Matmul", "Merge", "Moment", "Norm", "Permute", "Pool",
    "Quantise", "Receive", "Rescale", "Rope", "Sample", "Scan", "Scatter", "Score", "Send", "Sinkhorn", "Softmax",
    "SoftmaxStep", "SparseMix", "Store", "TopK", "Weigh",
]  # fmt: skip

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
