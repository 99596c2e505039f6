"""Placement: how the chips of a serving system share a model, in the words of serving engines.

A Placement is some replicas of one server. In a server each of `copies` copies of the attention layers serves its own
requests (data-parallel attention), while all of the server's chips share the experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from intaglio.compiler import Layout, LayoutError

GRAMMAR = (
    "a layout such as tp8 or tp4pp2; replicas of it, dp2tp4; experts shared by all chips, tp8/ep8 or, with "
    "data-parallel attention, dp8/ep8 or dp4tp2/tp2ep4; and several such servers, 8x(dp8/ep8)"
)


@dataclass(frozen=True)
class Placement:
    """How the chips of a serving system share a model.

    The system has `replicas` equal servers, each of one or more chips. With data-parallel attention a server has
    several copies of the attention layers (DP ranks). Each copy has its own requests and K/V cache. All chips of the
    server share the experts.

    Attributes:
        attention: layout of one copy of all layers except routed experts.
        copies: number of such copies in a server; 1 without data-parallel attention.
        experts: layout of the routed experts over all chips of a server; None: the routed experts have the
            layout `attention` too.
        replicas: number of servers. They share nothing.

    Raises LayoutError in three cases: there are several copies but `experts` is None; `experts` has pipeline stages or
    sequence parallelism; `experts` has not as many chips as one pipeline stage of `attention`, times `copies`.
    """

    attention: Layout
    copies: int = 1
    experts: Layout | None = None
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.copies > 1 and self.experts is None:
            raise LayoutError(f"{self.copies} copies of attention without a layout of the experts; wanted {GRAMMAR}")
        if self.experts is not None:
            have, want = self.experts.lanes, self.attention.lanes * self.copies
            if have != want or self.experts.pp > 1 or self.experts.sp:
                raise LayoutError(
                    f"experts on {self.experts.ranks} chips, but a pipeline stage of the server has {want}; "
                    f"the experts' tp times ep must be {want}"
                )

    @classmethod
    def parse(cls, text: str) -> Placement:
        """The Placement of a text such as tp8, dp2tp4 or 8x(dp8/ep8); GRAMMAR lists the forms.

        Raises LayoutError for any other text.
        """
        outer = re.fullmatch(r"(?:(\d+)x)?\(?([^()]+)\)?", text.strip())
        if outer is None or (text.count("("), text.count(")")) not in ((0, 0), (1, 1)):
            raise LayoutError(f"layout {text!r}; wanted {GRAMMAR}")
        replicas, inner = int(outer[1] or 1), outer[2]
        before, slash, after = inner.partition("/")
        found = re.match(r"dp(\d+)", before)
        copies = int(found[1]) if found else 1
        rest = before[found.end() :] if found else before
        if not replicas or not copies or (found and not rest and not slash):
            raise LayoutError(f"layout {text!r}; wanted {GRAMMAR}")
        attention = Layout.parse(rest or "tp1")
        if not slash:
            return cls(attention, replicas=replicas * copies)
        return cls(attention, copies, Layout.parse(after), replicas)

    @property
    def chips_per_server(self) -> int:
        """Number of chips of one server."""
        return self.attention.ranks * self.copies

    @property
    def chips(self) -> int:
        """Number of chips of all servers."""
        return self.chips_per_server * self.replicas

    @property
    def plain(self) -> bool:
        """True if routed experts have the same layout as all other layers (`experts` is None)."""
        return self.experts is None

    @property
    def single(self) -> bool:
        """True for a single server whose experts have no layout of their own.

        This means that `replicas` is 1 and `experts` is None. Only such a placement can be simulated with the engine
        that serves real requests. Others need the queue model.
        """
        return self.plain and self.replicas == 1

    def __str__(self) -> str:
        many = f"dp{self.copies}" if self.copies > 1 else ""
        inner = many + ("" if many and self.attention == Layout() else str(self.attention))
        if self.experts is None:
            return (f"dp{self.replicas}" if self.replicas > 1 else "") + inner
        whole = f"{inner}/{self.experts}"
        return f"{self.replicas}x({whole})" if self.replicas > 1 else whole


def placements(chips: int, routed: bool) -> list[Placement]:
    """All ways to place a model on `chips` chips, as a list of Placements. A model may not fit some of them.

    The list has every division of the chips into equal servers, pipeline stages and tensor-parallel ranks. Raises
    ValueError for less than one chip.

    routed: True for a model with routed experts. The list then also has expert-parallel servers. In such a server each
    expert is whole on one chip, and the experts are spread over all chips. The server has one or more copies of the
    attention layers, each divided by tensor parallelism, and no pipeline stages.
    """
    if chips < 1:
        raise ValueError(f"{chips} chips; give 1 or more")
    ways = [(a, b, chips // a // b) for a in divisors(chips) for b in divisors(chips // a)]
    out = [Placement(Layout(tp=tp, pp=pp), replicas=n) for tp, pp, n in ways]
    if routed:
        out += [Placement(Layout(tp=tp), c, Layout(ep=c * tp), n) for tp, c, n in ways if c * tp > 1]
    return out


def divisors(n: int) -> list[int]:
    """The divisors of n, a whole number of 1 or more, as an ascending list."""
    return [i for i in range(1, n + 1) if n % i == 0]
