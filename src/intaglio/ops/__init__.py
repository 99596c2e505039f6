"""The ops of a Program, one file per family. An op class has fields, a shape rule, a NumPy definition and its work.

Importing this package imports every module in it, so that each registers its ops.
"""

from importlib import import_module
from pkgutil import iter_modules

from intaglio.ops.attention import Attend, KvWrite
from intaglio.ops.collective import AllGather, AllReduce, AllToAll, Collective, Grouped, Recv, ReduceScatter, Send
from intaglio.ops.conv import ShortConv
from intaglio.ops.data import Concat, Embed, Permute, Select
from intaglio.ops.elementwise import Map
from intaglio.ops.experts import Experts, Route
from intaglio.ops.indexer import ChooseKeys
from intaglio.ops.linear import HeadLinear, Linear, x_format
from intaglio.ops.linear_attention import Decay, LinearAttention
from intaglio.ops.moment import Moment
from intaglio.ops.norm import Norm
from intaglio.ops.op import REGISTRY, SYMBOLS, Op, OpError, Tensor, Value, Work
from intaglio.ops.pooled import AttendPooled, PoolKeys
from intaglio.ops.position import Rope, Sinusoid
from intaglio.ops.sample import Sample
from intaglio.ops.selective_scan import RgLru, SelectiveScan
from intaglio.ops.streams import MixStreams, Sinkhorn

__all__ = [
    "REGISTRY", "SYMBOLS", "AllGather", "AllReduce", "AllToAll", "Attend", "AttendPooled", "ChooseKeys", "Collective",
    "Concat", "Decay", "Embed", "Experts", "Grouped", "HeadLinear", "KvWrite", "Linear", "LinearAttention", "Map",
    "MixStreams", "Moment", "Norm", "Op", "OpError", "Permute", "PoolKeys", "Recv", "ReduceScatter", "RgLru", "Rope",
    "Route", "Sample", "Select", "SelectiveScan", "Send", "ShortConv", "Sinkhorn", "Sinusoid", "Tensor", "Value",
    "Work", "x_format",
]  # fmt: skip

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
