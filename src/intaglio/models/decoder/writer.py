"""Writer: adds weights, linears, norms, views and residual additions to a Program. The blocks of a layer use it.

Ops are written one by one, in the order of the model's forward(); the compiler fuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from intaglio import formats
from intaglio.models.config import PortError
from intaglio.models.decoder.description import Decoder
from intaglio.ops import Linear, Map, Norm, Permute, Rope, x_format
from intaglio.program import Builder
from intaglio.program.source import names


class Writer:
    """Builds the Program of a Decoder: has methods that add a weight, a linear layer, a norm and so on.

    Most methods add an op or a weight and return the name of the resulting tensor. The argument `site` is the name of
    the op in the Program, such as layers.3.mlp.down_proj.

    Args:
        d: description of the model.
        name: name of the Program.
        context: maximum tokens of a sequence.
        format: function (name of a checkpoint tensor) -> number format in which it is stored.
        order: function (name of a weight) -> name of the checkpoint tensor that holds the order of the weight's columns
            (GPTQ's act-order). It returns "" if the columns are not reordered.
    """

    def __init__(
        self, d: Decoder, name: str, context: int, format: Callable[[str], str], order: Callable[[str], str]
    ) -> None:
        self.d, self.format, self.order = d, format, order
        self.permuted: dict[tuple[str, str], str] = {}  # {(x, order): x in that order}
        self.b = Builder(name, context)
        table = d.source(f"{d.table or d.prefix + 'embed_tokens'}.weight")
        self.cache = d.cache or ("f32" if format(names(table)[0]) == "f32" else "bf16")

    def weight(self, site: str, what: str, shape: tuple[int, ...], source: str) -> str:
        """Add the weight or bias of a checkpoint's module to the Program. Returns its name, SITE.WHAT.

        Args:
            site: name of the op that reads the weight or bias.
            what: "weight" or "bias".
            shape: shape of the weight or bias.
            source: name of the module in the checkpoint, as Llama calls it (see Decoder.source()).
        """
        found = self.d.source(f"{source}.{what}")
        return self.b.weight(f"{site}.{what}", shape, found, self.format(names(found)[0]))

    def tensor(self, name: str, shape: tuple[int, ...], source: str | Sequence[str], plain: bool = False) -> str:
        """Add a tensor of the checkpoint as a weight of the Program, under `name`. Returns `name`.

        Args:
            name: the weight's name in the Program.
            shape: shape of the weight.
            source: the checkpoint tensor, or a part of it, in the notation of program/source.py; or several of these,
                whose rows are put below each other.
            plain: True if a quantised tensor is to be dequantised to bf16, for an op that takes no quantised weight.

        Raises PortError for a tensor with act-order (reordered columns).
        """
        found = [self.d.source(s) for s in ([source] if isinstance(source, str) else source)]
        if ordered := [n for s in found for n in names(s) if self.order(n)]:
            raise PortError(
                f"{ordered[0]}: act-order (columns in an order of their own) is supported for linears and experts only"
            )
        format = self.format(names(found[0])[0])
        return self.b.weight(name, shape, found, "bf16" if plain and formats.get(format).grouped else format)

    def stack(self, name: str, shape: tuple[int, int, int], source: str) -> str:
        """Add one weight [experts, rows, columns] that holds a matrix of every expert of a layer. Returns `name`.

        If the matrices have reordered columns (GPTQ's act-order), the caller must add their orders with orders().

        Args:
            name: the weight's name in the Program.
            shape: shape of the weight.
            source: the checkpoint tensors of the matrices, in the notation of program/source.py.
        """
        source = self.d.source(source)
        return self.b.weight(name, shape, source, self.format(names(source)[0]))

    def orders(self, name: str, shape: tuple[int, int], *sources: str) -> str | None:
        """Add the column orders (GPTQ's act-order) of the experts' matrices as one i32 weight [experts, columns].

        Returns the name of the weight; None if the matrices have no such orders. The matrices of one expert in
        `sources` multiply the same input, so they must have the same order. Raises PortError if they do not.

        Args:
            name: the weight's name in the Program.
            shape: (experts, columns).
            sources: for each kind of matrix, such as gate and up, a text that names the checkpoint's tensors of all
                experts, such as "layers.0.mlp.experts.{0..7}.up_proj.weight". Names are as in Llama (see
                Decoder.source()).
        """
        sources = tuple(map(self.d.source, sources))
        runs = [[self.order(n) for n in names(source)] for source in sources]
        for own in zip(*runs, strict=True):
            if len(set(own)) > 1:
                raise PortError(
                    f"{' and '.join(own)} differ; matrices that multiply the same input need the same column order"
                )
        source = sources[0].removesuffix(".weight") + ".order"
        return self.b.weight(name, shape, source, "i32") if any(runs[0]) else None

    def constant(self, name: str, values: Sequence[float]) -> str:
        """Add a small vector whose values are stored in the Program itself. Returns `name`.

        If the Program already has a tensor of this name, nothing is added.
        """
        return name if name in self.b.tensors else self.b.const(name, values)

    def cache_scales(self, i: int, at: str, heads: int) -> dict[str, str]:
        """Add the scales of a layer's K/V cache, each as a vector [heads]. Returns {"k_scale": name, "v_scale": name}.

        The result is {} if the cache has no scales.

        Args:
            i: number of the layer.
            at: prefix of the vectors' names.
            heads: number of K/V heads of the layer.

        Raises PortError unless the Decoder has one scale, or one per head.
        """
        out = {}
        for field, values in zip(("k_scale", "v_scale"), self.d.cache_scales.get(i, ()), strict=False):
            if len(values) not in (1, heads):
                raise PortError(
                    f"{at}{field} has {len(values)} values for {heads} K/V heads; wanted one, or one per head"
                )
            out[field] = self.b.const(f"{at}{field}", values if len(values) == heads else values * heads)
        return out

    def scalar(self, site: str, x: str, source: str) -> str:
        """Add ops that repeat the one value of a checkpoint tensor in each row of a new tensor.

        Returns the name of the new tensor, [tokens, 1].

        Args:
            site: name of the op.
            x: name of a tensor [tokens, ...]; only its number of rows is used.
            source: name of the checkpoint tensor.
        """
        zeros = self.b.op(Map, f"{site}.zeros", self.b.view(f"{site}.column", x, 0, 1), expr="a * 0.0")
        return self.b.op(Norm, site, zeros, bias=self.tensor(f"{site}.value", (1,), source), norm="none")

    def linear(self, site: str, x: str, rows: int, cols: int, source: str, bias: bool = False, shared: str = "") -> str:
        """Add a linear layer: x times the transposed weight [rows, cols] of a module, plus a bias if there is one.

        Returns the name of the result's tensor, [tokens, rows].

        Args:
            site: name of the op.
            x: name of the input tensor, [tokens, cols].
            rows: rows of the weight.
            cols: columns of the weight and of x.
            source: name of the module in the checkpoint, as Llama calls it (see Decoder.source()).
            bias: True if the module has a bias.
            shared: if several linear layers use the same weight, the op name from which weight and bias get their
                names; "": they get them from `site`.
        """
        w = self.weight(shared or site, "weight", (rows, cols), source)
        b = self.weight(shared or site, "bias", (rows,), source) if bias else None
        x = self.in_order(site, x, cols, f"{source}.weight")
        return self.b.op(Linear, site, x, w, bias=b, x_format=self.x_format(w))

    def joined(self, site: str, x: str, rows: int, sources: Sequence[str]) -> str:
        """Add a linear layer whose weight consists of parts of one module's weight, one below the other.

        Returns the name of the result's tensor, [tokens, rows].

        Args:
            site: name of the op.
            x: name of the input tensor, [tokens, hidden].
            rows: number of rows of all parts together.
            sources: the parts, in the notation of program/source.py.
        """
        found = [self.d.source(source) for source in sources]
        w = self.b.weight(f"{site}.weight", (rows, self.d.hidden), found, self.format(names(found[0])[0]))
        x = self.in_order(site, x, self.d.hidden, sources[0])
        return self.b.op(Linear, site, x, w, x_format=self.x_format(w))

    def in_order(self, site: str, x: str, cols: int, source: str) -> str:
        """Put the columns of `x` into the order in which a weight's columns are stored (GPTQ's act-order).

        Returns the name of the reordered tensor. If the weight's columns are not reordered, no op is added and the
        result is `x`. Weights that read the same `x` in the same order share one op.

        Args:
            site: name of the op that reads the weight.
            x: name of the tensor.
            cols: columns of `x`.
            source: name of the weight in the checkpoint.
        """
        order = self.order(names(self.d.source(source))[0])
        if order and (x, order) not in self.permuted:
            columns = self.b.weight(f"{site}.order", (cols,), order, "i32")
            self.permuted[x, order] = self.b.op(Permute, f"{site}.permute", x, columns)
        return self.permuted[x, order] if order else x

    def x_format(self, w: str) -> str:
        """The number format to which activations are rounded before they are multiplied with a weight.

        "int8" if the codes of the weight are whole numbers, else "f32". w: name of the weight.
        """
        return x_format(self.b.tensors[w].format, exact=True)

    def norm(self, site: str, x: str, width: int, source: str, group: int = 0, shared: str = "") -> str:
        """Add a norm of the kind that the model uses (Decoder.norm). Returns the name of the result's tensor.

        Args:
            site: name of the op.
            x: name of the input tensor.
            width: number of values of the norm's weight.
            source: name of the norm's module in the checkpoint.
            group: number of consecutive columns that are normed together; 0: the whole row.
            shared: if several norms use the same weight, the op name from which the weight gets its name; "": it gets
                its name from `site`.
        """
        d, held = self.d, shared or site
        w = self.weight(held, "weight", (width,), source) if d.norm_weight else None
        bias = self.weight(held, "bias", (width,), source) if d.norm_bias else None
        return self.b.op(Norm, site, x, weight=w, bias=bias, norm=d.norm, eps=d.eps, offset=d.norm_offset, group=group)

    def layer_norm(self, i: int, which: str, x: str) -> str:
        """Add one of the norms of layer `i`. Returns the name of the normed tensor; `x` if the layer lacks the norm.

        Args:
            i: number of the layer.
            which: the norm, such as attn.norm or mlp.post_norm (see PRE in description.py).
            x: name of the input tensor.
        """
        source = self.d.norms.get(which) if which not in self.d.layers[i].without else None
        at = f"{self.d.prefix}layers.{i}.{source}"
        return self.norm(f"layers.{i}.{which}", x, self.d.hidden, at) if source else x

    def rope(self, site: str, x: str, rope: str, head_dim: int, style: str = "", trailing: bool = False) -> str:
        """Add the op that applies rope to queries or keys. Returns the name of the rotated tensor; `x` if `rope` is "".

        Args:
            site: name of the op.
            x: name of the tensor of queries or keys.
            rope: name of the rope table in Decoder.ropes (see Layer.rope); "": no rope.
            head_dim: columns of a head.
            style: how columns are paired, "half" or "interleaved"; "": the style of the rope table.
            trailing: True if the last columns of each head are rotated, not the first.
        """
        if not rope:
            return x
        turn = self.d.ropes[rope]
        return self.b.op(
            Rope, site, x, "positions", f"{rope}.frequencies", head_dim=head_dim, style=style or turn.style,
            factor=turn.factor, trailing=trailing,
        )  # fmt: skip

    def parts(self, at: str, source: str, x: str, widths: Mapping[str, int], fused: str, bias: bool) -> list[str]:
        """Add linear layers that read the same `x`, such as q, k and v. Returns the names of their results as a list.

        If the checkpoint stores these layers as one module, a single linear layer is added instead, and a view of its
        result takes the place of each layer's result.

        Args:
            at: prefix of the ops' names in the Program.
            source: prefix of the modules' names in the checkpoint.
            x: name of the input tensor.
            widths: {name of a linear layer: columns of its result}, in order.
            fused: name of the module that may hold all of them, such as qkv_proj; Decoder.fused says whether it does.
            bias: True if the linear layers have biases.
        """
        if fused not in self.d.fused:
            return [self.linear(at + n, x, w, self.d.hidden, source + n, bias) for n, w in widths.items()]
        base = self.linear(at + fused, x, sum(widths.values()), self.d.hidden, source + fused, bias)
        return self.views(base, {at + n: w for n, w in widths.items()})

    def views(self, base: str, widths: Mapping[str, int]) -> list[str]:
        """Divide the columns of a tensor into consecutive views, from column 0 on. Returns a list of the views' names.

        Args:
            base: name of the tensor.
            widths: {name of a view: number of its columns}, in order.
        """
        out, start = [], 0
        for name, width in widths.items():
            out.append(self.b.view(name, base, start, start + width))
            start += width
        return out

    def scaled(self, site: str, x: str, by: float) -> str:
        """Add an op that multiplies the tensor `x` by a number. Returns the name of the result; `x` if `by` is 1.

        Args:
            site: name of the op.
            x: name of the tensor.
            by: the number.
        """
        return x if by == 1 else self.b.op(Map, site, x, expr=f"a * {by!r}")

    def add(self, site: str, x: str, branch: str, mix: tuple[float, float] = (1.0, 1.0)) -> str:
        """Add an op that adds a branch (attention or an MLP) to the residual. Returns the name of the sum's tensor.

        Args:
            site: the op's name.
            x: name of the residual's tensor.
            branch: name of the branch's tensor.
            mix: a pair (a, b); the sum is a * x + b * branch. With the default (1, 1) the sum is x +
                Decoder.residual_scale * branch.
        """
        if mix != (1.0, 1.0):
            return self.b.op(Map, site, x, b=branch, expr=f"a * {mix[0]!r} + b * {mix[1]!r}")
        scale = "" if self.d.residual_scale == 1 else f" * {self.d.residual_scale!r}"
        return self.b.op(Map, site, x, b=branch, expr=f"a + b{scale}")
