"""Moves experts between the ranks of a mesh on the host: each rank packs its new experts in a thread beside the steps.

Between two steps all ranks then exchange the packed weights of a layer and the table of who computes which tokens.
Results do not depend on the placement, so streams go on with the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from intaglio import _native
from intaglio.devices.device import DeviceError
from intaglio.devices.expert_load import ExpertLoad
from intaglio.ops import Experts
from intaglio.program import Program
from intaglio.program.expert_placement import ExpertPlacement, PlacementError, Ranks, turns
from intaglio.program.source import restacked

Pack = Callable[[Program, list[str]], tuple[dict[str, _native.Weight], dict[str, np.ndarray]]]


@dataclass(frozen=True)
class PackedExperts:
    """Packed weights of one layer's experts on this rank, for a new placement of the experts on the ranks.

    Attributes:
        op: number of the layer's experts op in the Program.
        held: for each rank, the numbers of its experts in the new placement.
        rank: the index of this rank in `held`.
        matrices: {name of the packed matrix to replace: its new native Weight}.
        vectors: {name of the vector to replace: its new values, f32}.
    """

    op: int
    held: Ranks
    rank: int
    matrices: Mapping[str, _native.Weight]
    vectors: Mapping[str, np.ndarray]


class ExpertMoves:
    """Counts the tokens routed to each expert of a loaded Program, and replaces the experts that this rank holds.

    Args:
        native: the native executable.
        program: the Program loaded in it.
        ids: {name of a tensor: its number in the native executable}.
        matrices: packed weights: {name of the packed matrix: native Weight}.
        pack: function that reads and packs weights. It takes a Program and a list of weight names. It returns ({name of
            a packed matrix: native Weight}, {name of a vector: f32 array}).
    """

    def __init__(
        self, native: _native.Executable, program: Program, ids: Mapping[str, int],
        matrices: Mapping[str, _native.Weight], pack: Pack,
    ) -> None:  # fmt: skip
        self.native, self.program, self.ids, self.matrices, self.pack = native, program, ids, matrices, pack
        self.ops = {op.site: (i, op) for i, op in enumerate(program.ops) if isinstance(op, Experts)}
        self.held: dict[str, tuple[int, ...]] = {site: op.held for site, (_, op) in self.ops.items()}
        self.thread: threading.Thread | None = None
        self.packed: list[PackedExperts] = []
        self.error: Exception | None = None

    def loads(self) -> dict[str, ExpertLoad]:
        """Return the ExpertLoad of each layer with experts, as a dict {name of the layer's experts op: ExpertLoad}.

        `tokens` of an ExpertLoad counts the tokens routed to each expert of the layer since the Program was loaded,
        also for experts on other ranks. `held` has the experts of this rank; it is () for every other rank, because
        this rank does not know them.
        """
        found = {}
        for site, (i, op) in self.ops.items():
            held = tuple(self.held[site] if r == op.rank else () for r in range(op.ranks))
            found[site] = ExpertLoad(np.array(self.native.expert_tokens(i), np.int64), held)
        return found

    def load(self, layers: Mapping[str, Ranks]) -> None:
        """Start a thread that reads and packs the experts that a new placement gives to this rank.

        Returns None at once. `layers` is {name of a layer's experts op: for each rank, the numbers of its experts}.
        Layers that this rank does not run are ignored. Raises DeviceError if other experts are being loaded, and for a
        placement that does not fit.
        """
        if self.thread and self.thread.is_alive():
            raise DeviceError("other experts are being loaded; switch to them first")
        for site in layers.keys() & self.ops.keys():
            self._check(site, layers[site])
        self.error, self.packed = None, []
        self.thread = threading.Thread(target=self._load, args=(dict(layers),), daemon=True)
        self.thread.start()

    def loaded(self) -> bool:
        """False while experts are being loaded in the background; otherwise True.

        If loading failed, the first call afterwards raises DeviceError with the message of the error.
        """
        if self.thread and self.thread.is_alive():
            return False
        self.thread = None
        if error := self.error:
            self.error = None
            raise DeviceError(f"experts cannot be moved: {type(error).__name__}: {error}")
        return True

    def switch(self) -> None:
        """Wait until the new experts are loaded, and use them in all later steps. Returns None.

        Nothing changes if load() was not called since the last switch. Raises DeviceError if loading failed.
        """
        if self.thread:
            self.thread.join()
        self.loaded()
        for new in self.packed:
            for name, weight in new.matrices.items():
                self.matrices[name].take(weight)
            for name, values in new.vectors.items():
                self.native.set_vector(self.ids[name], values)
            attributes = turns(new.held, new.rank)
            self.native.place_experts(new.op, *(list(attributes[name]) for name in ("held", "copy", "copies")))
            self.held[self.program.ops[new.op].site] = new.held[new.rank]
        self.packed = []

    def _check(self, site: str, held: Ranks) -> None:
        """Raise DeviceError unless the new placement `held` fits the layer's experts op `site`. Returns None.

        It must have as many ranks, and as many experts on each rank, as the present placement.
        """
        op, given = self.ops[site][1], [len(own) for own in held]
        if not op.held or given != [len(op.held)] * op.ranks:
            raise DeviceError(
                f"{site} takes {len(op.held)} experts on each of {op.ranks} ranks, got {given}; experts are moved only "
                "in layouts with redundant experts, such as ep4r8"
            )
        try:
            ExpertPlacement({site: held}).check(op.of, op.ranks)
        except PlacementError as e:
            raise DeviceError(str(e)) from None

    def _load(self, layers: Mapping[str, Ranks]) -> None:
        try:
            found = [self._packed(site, held) for site, held in layers.items() if site in self.ops]
            self.packed = found
        except Exception as e:  # whatever reading a checkpoint can raise; loaded() reports it
            self.error = e

    def _packed(self, site: str, held: Ranks) -> PackedExperts:
        """Read and pack the experts that a new placement of a layer gives to this rank. Returns the PackedExperts.

        Args:
            site: name of the layer's experts op.
            held: for each rank, the numbers of its experts in the new placement.
        """
        i, op = self.ops[site]
        rank = op.rank
        named = (op.gate, op.up, op.down, op.gate_bias, op.up_bias, op.down_bias, op.order, op.down_order)
        weights = [name for name in named if name]
        tensors = {name: self.program.tensors[name] for name in weights}
        moved = {}
        for name, t in tensors.items():
            axis = "s" if len(t.shape) == 3 else "r"
            moved[name] = replace(t, source=restacked(t.source, op.held, held[rank], op.of, axis))
        program = self.program.with_ops(self.program.ops, {**self.program.tensors, **moved})
        matrices, vectors = self.pack(program, weights)
        return PackedExperts(i, held, rank, matrices, vectors)
