"""The ops: one file a family. Each op carries its fields, its shape rule, its meaning in NumPy and its work."""

from intaglio.ops.attention import Attend, KvWrite
from intaglio.ops.collective import AllGather, AllReduce, AllToAll, Collective, Grouped, Recv, ReduceScatter, Send
from intaglio.ops.data import Embed, Permute, Select
from intaglio.ops.elementwise import Map
from intaglio.ops.experts import Experts, Route
from intaglio.ops.linear import HeadLinear, Linear
from intaglio.ops.norm import Norm
from intaglio.ops.op import REGISTRY, SYMBOLS, Op, OpError, Tensor, Value, Work
from intaglio.ops.position import Rope
from intaglio.ops.sample import Sample

__all__ = [
    "REGISTRY", "SYMBOLS", "AllGather", "AllReduce", "AllToAll", "Attend", "Collective", "Embed", "Experts", "Grouped",
    "HeadLinear", "KvWrite", "Linear", "Map", "Norm", "Op", "OpError", "Permute", "Recv", "ReduceScatter", "Rope",
    "Route", "Sample", "Select", "Send", "Tensor", "Value", "Work",
]  # fmt: skip
