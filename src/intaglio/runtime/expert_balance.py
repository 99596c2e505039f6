"""Expert load balancing: counts tokens per expert, and moves experts between ranks while requests run (EPLB).

Every layer is moved by itself: its experts are loaded beside the steps, and all ranks switch between two steps. Results
do not depend on the placement, so no stream changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from intaglio.devices import DeviceError, DeviceLost, Executable
from intaglio.devices.expert_load import ExpertLoad
from intaglio.program.expert_placement import Ranks, balance
from intaglio.runtime.launcher import Launcher

COUNT_EVERY = 1.0  # seconds between two counts of tokens
LOOK_EVERY = 0.1  # seconds between two looks at what is next in moving experts
RARELY = 10.0  # times as long if steps are under way, for which every question to the device waits
MOVE_EVERY = 60.0  # seconds between two proposals
WORTH = 1.1  # a layer is moved if that makes the largest load of a rank smaller by this factor


class ExpertBalancer:
    """Counts the tokens that each expert of a model gets, and moves experts between ranks to make loads equal.

    Experts are moved only in layouts with redundant experts. Does nothing for a model without experts. If experts
    cannot be loaded, nothing is moved until the device is replaced, and `failed` says why.

    Attributes:
        every: seconds between two proposals of a new placement; inf: experts are never moved.
        worth: a layer's experts are moved only if the load of its busiest rank, divided by the mean load of its ranks,
            becomes smaller by this factor, above 1.
        loads: the ExpertLoad of each layer when they were last counted, by site (the layer's name); tokens since the
            engine's start.
        moves: number of times that a layer's experts were moved.
        moved: None, or called after a layer's experts have moved, with each rank's experts of every layer, by site.
        failed: why experts are not moved; "" if they are.
    """

    def __init__(self, launcher: Launcher, every: float = MOVE_EVERY, worth: float = WORTH) -> None:
        self.launcher, self.every, self.worth = launcher, every, worth
        self.loads: dict[str, ExpertLoad] = {}
        self.moved: Callable[[Mapping[str, Ranks]], None] | None = None
        self.moves, self.failed = 0, ""
        self._counted_on: Executable | None = None
        self._has_experts = False
        self._base: dict[str, np.ndarray] = {}  # tokens counted on executables that were lost
        self._since: dict[str, np.ndarray] = {}  # tokens at the last proposal
        self._counted = self._looked = self._next_move = 0.0
        self._recent: dict[str, np.ndarray] = {}  # layers still to be balanced, with the tokens to balance them for
        self._loading: dict[str, Ranks] = {}

    @property
    def movable(self) -> bool:
        """True if experts can be moved between ranks: the layout has redundant experts.

        False until count() was first called, because the layout is known only from the device's answer.
        """
        return any(load.held and all(load.held) for load in self.loads.values())

    def tick(self, now: float, last: bool = False) -> None:
        """Count the tokens of experts every COUNT_EVERY seconds, and move experts between ranks step by step.

        The next step of a move is taken every LOOK_EVERY seconds.

        Called between two steps. The device answers only when no step is under way. So while a pipeline has steps under
        way, the intervals are RARELY times as long. If experts cannot be moved, the counts serve only metrics, and the
        interval of counting is always RARELY times as long. A call balances one layer at most, as that takes
        milliseconds.

        Args:
            now: the time in seconds.
            last: True if no request is left; tokens are then counted now.

        Raises DeviceLost if the device is lost. Another failure of the device stops all moves, see `failed`.
        """
        if self._counted_on is not self.launcher.executable:
            self._begin(now)
        if not self._has_experts:
            return
        rarely = RARELY if self.launcher.under_way else 1.0
        if last or now >= self._counted + COUNT_EVERY * (rarely if self.movable else RARELY):
            self._counted = now
            self.count()
        look_every = LOOK_EVERY * (rarely if self._loading else 1.0)
        if self.movable and not self.failed and now >= self._looked + look_every:
            self._looked = now
            try:
                self._move(now)
            except DeviceLost:
                raise
            except DeviceError as e:
                self.failed, self._recent, self._loading = str(e), {}, {}

    def count(self) -> None:
        """Read from the device how many tokens each expert has got, and store it in `loads`. Returns nothing.

        Tokens counted on earlier devices that were lost are included. Raises DeviceLost if the device is lost.
        """
        for site, load in self.launcher.between_steps(lambda device: device.expert_loads()).items():
            base = self._base.get(site, np.zeros_like(load.tokens))
            self.loads[site] = ExpertLoad(base + load.tokens, load.held)

    def propose(self, site: str, recent: np.ndarray) -> Ranks | None:
        """A better placement of one layer's experts: for each rank a tuple of the experts that it holds.

        None if the layout has no redundant experts, if no expert got a token, or if moving is not worth it: the
        imbalance (busiest rank over mean) must fall by the factor `worth` at least.

        site: name of the layer's op `experts`. recent: tokens that each expert got lately, i64 [experts].
        """
        held = self.loads[site].held
        if not held or not all(held) or not recent.any():
            return None
        proposed = balance(recent.astype(np.float64), len(held), len(held[0]))
        now, then = (ExpertLoad(recent, ranks).imbalance() for ranks in (held, proposed))
        return proposed if now >= then * self.worth else None

    def _begin(self, now: float) -> None:
        """Start again on a new executable, after the first start or the loss of a device. now: the time in seconds.

        The new executable counts tokens from 0, so the tokens counted so far are kept as a base. A move in progress is
        forgotten, and `failed` is reset.
        """
        self._base = {site: load.tokens for site, load in self.loads.items()}
        self._counted_on = self.launcher.executable
        self._has_experts = self.launcher.executable.unwrapped().has_experts()
        self._recent, self._loading, self._next_move, self.failed = {}, {}, now + self.every, ""
        self._counted, self._looked = -np.inf, now - LOOK_EVERY

    def _tokens_since_last(self) -> dict[str, np.ndarray]:
        """How many tokens went to each expert since the last call of this method, or since counting began.

        Returns {site (name of the layer's op `experts`): i64 [experts]}.
        """
        found = {}
        for site, load in self.loads.items():
            found[site] = load.tokens - self._since.get(site, np.zeros_like(load.tokens))
            self._since[site] = load.tokens
        return found

    def _move(self, now: float) -> None:
        """Do the next part of moving experts. Returns nothing.

        1. If a layer's experts are being loaded at their new places: return. If they have been loaded: switch the layer
           to them and go on.
        2. If no layer is left to balance and `every` seconds have passed since the last round: list all layers, each
           with the tokens that its experts got since that round.
        3. If a layer is left: propose a new placement for it. If propose() finds one, begin to load the experts.

        Raises DeviceError if the device fails, DeviceLost if it is lost. now: the time in seconds.
        """
        device = self.launcher.between_steps
        if self._loading:
            if not device(lambda executable: executable.experts_loaded()):
                return
            device(lambda executable: executable.switch_experts())
            self.moves += 1
            self._loading = {}
            if self.moved:
                self.count()
                self.moved({site: load.held for site, load in self.loads.items()})
        if not self._recent and now >= self._next_move:
            self._next_move = now + self.every
            self.count()
            self._recent = self._tokens_since_last()
        if self._recent:
            site = next(iter(self._recent))
            proposed = self.propose(site, self._recent.pop(site))
            if proposed:
                layers: Mapping[str, Ranks] = {site: proposed}
                device(lambda executable: executable.load_experts(layers))
                self._loading = dict(layers)
