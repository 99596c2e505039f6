"""Expert load balancing: counts tokens per expert, and moves experts between ranks while requests run (EPLB).

Every layer is moved by itself: its experts are loaded beside the steps, and all ranks switch between two steps. Results
do not depend on the placement, so no stream changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from intaglio.devices import DeviceError, Executable
from intaglio.devices.expert_load import ExpertLoad
from intaglio.program.expert_placement import Ranks, balance
from intaglio.runtime.launcher import Launcher

COUNT_EVERY = 1.0  # seconds between two counts of tokens
LOOK_EVERY = 0.1  # seconds between two looks whether experts are loaded
MOVE_EVERY = 60.0  # seconds between two proposals
WORTH = 1.1  # a layer is moved if that makes the largest load of a rank smaller by this factor


class ExpertBalancer:
    """Keeps the loads of a model's experts, and moves experts of layouts with redundant experts.

    Does nothing for a model without experts. If experts cannot be loaded, nothing is moved any more, and `failed` says
    why.

    Attributes:
        every: seconds between two proposals.
        worth: a layer is moved if its largest load of a rank, over the mean, becomes smaller by this factor.
        loads: the ExpertLoad of each layer when they were last counted, by site; tokens since the engine's start.
        moves: layers whose experts were moved.
        failed: why experts are not moved; "" if they are.
    """

    def __init__(self, launcher: Launcher, every: float = MOVE_EVERY, worth: float = WORTH) -> None:
        self.launcher, self.every, self.worth = launcher, every, worth
        self.loads: dict[str, ExpertLoad] = {}
        self.moves, self.failed = 0, ""
        self._counted_on: Executable | None = None
        self._base: dict[str, np.ndarray] = {}  # tokens counted on executables that were lost
        self._since: dict[str, np.ndarray] = {}  # tokens at the last proposal
        self._next_count = self._next_look = 0.0
        self._next_move: float | None = None
        self._wanted: dict[str, Ranks] = {}  # layers still to be moved
        self._loading: dict[str, Ranks] = {}

    def tick(self, now: float, last: bool = False) -> None:
        """Count tokens, and propose, load or switch experts if it is time. Call between steps.

        now: seconds. last: no request is left, so count now. Raises DeviceLost.
        """
        if not any(op.kind == "experts" for op in self.launcher.executable.program.ops):
            return
        if self._counted_on is not self.launcher.executable:
            self._begin(now)
        if now >= self._next_count or last:
            self._next_count = now + COUNT_EVERY
            self.count()
        if not self.failed and now >= self._next_look:
            self._next_look = now + LOOK_EVERY
            try:
                self._move(now)
            except DeviceError as e:
                self.failed, self._wanted, self._loading = str(e), {}, {}

    def count(self) -> None:
        """Read the loads from the device. Returns nothing. Raises DeviceLost."""
        for site, load in self.launcher.between_steps(lambda device: device.expert_loads()).items():
            base = self._base.get(site, np.zeros_like(load.tokens))
            self.loads[site] = ExpertLoad(base + load.tokens, load.held)

    def propose(self) -> dict[str, Ranks]:
        """The layers that are worth moving, by site: the experts of each rank.

        They are balanced for the tokens since the last proposal.
        """
        found = {}
        for site, load in self.loads.items():
            recent = load.tokens - self._since.get(site, np.zeros_like(load.tokens))
            self._since[site] = load.tokens
            if not load.held or not all(load.held) or not recent.any():
                continue
            held = balance(recent.astype(np.float64), len(load.held), len(load.held[0]))
            now, then = (ExpertLoad(recent, ranks).imbalance() for ranks in (load.held, held))
            if now >= then * self.worth:
                found[site] = held
        return found

    def _begin(self, now: float) -> None:
        """Start to count on the executable in use, whose counts and placement are those of a new one."""
        self._base = {site: load.tokens for site, load in self.loads.items()}
        self._counted_on = self.launcher.executable
        self._wanted, self._loading, self._next_move = {}, {}, now + self.every
        self._next_count = self._next_look = now

    def _move(self, now: float) -> None:
        """Do what is next in moving experts. Returns nothing. Raises DeviceError, DeviceLost."""
        device = self.launcher.between_steps
        if self._loading:
            if device(lambda executable: executable.experts_loaded()):
                device(lambda executable: executable.switch_experts())
                self.moves += 1
                self._loading = {}
        elif not self._wanted and self._next_move is not None and now >= self._next_move:
            self._next_move = now + self.every
            self.count()
            self._wanted = self.propose()
        if self._wanted and not self._loading:
            site = next(iter(self._wanted))
            layers: Mapping[str, Ranks] = {site: self._wanted.pop(site)}
            device(lambda executable: executable.load_experts(layers))
            self._loading = dict(layers)
