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
    """Counts the tokens that each expert of a model gets, and moves experts between ranks to balance the ranks' loads.

    Experts are moved only in layouts with redundant experts. For a model without experts, nothing is done. If experts
    cannot be loaded, no experts are moved until the device is replaced, and `failed` says why.

    Attributes:
        every: seconds between two proposals of a new placement; inf to never move experts.
        worth: a factor above 1. A layer's experts are moved only if its imbalance becomes smaller by this factor. The
            imbalance is the load of the busiest rank, divided by the mean load of the ranks.
        loads: the ExpertLoad of each layer at the last count, by the site (name) of the layer's op `experts`. Tokens
            are counted since the engine's start.
        moves: number of times that a layer's experts were moved.
        moved: function that is called after a layer's experts were moved, or None. Its argument is a dict from site to
            the experts of each rank, for all layers.
        failed: why experts cannot be moved; "" if they can.
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
        """True if experts can be moved between ranks, because the layout has redundant experts.

        False before the first call of count(): the layout is known only from the device's answer.
        """
        return any(load.held and all(load.held) for load in self.loads.values())

    def tick(self, now: float, last: bool = False) -> None:
        """Count each expert's tokens and continue moving experts, if these are due. Returns nothing.

        Called between two steps. Tokens are counted every COUNT_EVERY seconds. A move is continued every LOOK_EVERY
        seconds; a call handles at most one layer, because that takes milliseconds.

        The intervals are RARELY times as long while a pipeline has steps under way, since the device answers only when
        no step is under way. If experts cannot be moved, tokens are always counted at the longer interval, because the
        counts then serve only metrics.

        Args:
            now: the time in seconds.
            last: True if no request is left; tokens are then counted at once.

        Raises DeviceLost if the device is lost. Any other failure of the device stops all moves, see `failed`.
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
        """Read from the device how many tokens each expert has got, and store the numbers in `loads`. Returns nothing.

        The numbers include tokens that were counted on earlier devices, which have been lost and replaced. Raises
        DeviceLost if the present device is lost.
        """
        for site, load in self.launcher.between_steps(lambda device: device.expert_loads()).items():
            base = self._base.get(site, np.zeros_like(load.tokens))
            self.loads[site] = ExpertLoad(base + load.tokens, load.held)

    def propose(self, site: str, recent: np.ndarray) -> Ranks | None:
        """Returns a better placement of one layer's experts, or None.

        A placement has for each rank a tuple of the experts that the rank is to hold. Returns None in these cases:

        - The layout has no redundant experts, or the experts of a rank are not known.
        - No expert got a token.
        - The imbalance (load of the busiest rank / mean load) would not fall by the factor `worth`.

        site: name of the layer's op `experts`. recent: number of tokens that each expert got recently, i64 [experts].
        """
        held = self.loads[site].held
        if not held or not all(held) or not recent.any():
            return None
        proposed = balance(recent.astype(np.float64), len(held), len(held[0]))
        now, then = (ExpertLoad(recent, ranks).imbalance() for ranks in (held, proposed))
        return proposed if now >= then * self.worth else None

    def _begin(self, now: float) -> None:
        """Prepare for a new executable, at the first start or after the loss of a device. Returns nothing.

        A new executable counts tokens from 0, so the tokens counted so far are kept and will be added. A move in
        progress is forgotten, and `failed` becomes "". now: the time in seconds.
        """
        self._base = {site: load.tokens for site, load in self.loads.items()}
        self._counted_on = self.launcher.executable
        self._has_experts = self.launcher.executable.unwrapped().has_experts()
        self._recent, self._loading, self._next_move, self.failed = {}, {}, now + self.every, ""
        self._counted, self._looked = -np.inf, now - LOOK_EVERY

    def _tokens_since_last(self) -> dict[str, np.ndarray]:
        """Returns how many tokens each expert got since the last call of this method, or since counting began.

        The result is a dict from the site (name) of each layer's op `experts` to i64 [experts].
        """
        found = {}
        for site, load in self.loads.items():
            found[site] = load.tokens - self._since.get(site, np.zeros_like(load.tokens))
            self._since[site] = load.tokens
        return found

    def _move(self, now: float) -> None:
        """Continue moving experts between ranks: finish the last layer, then begin the next. Returns nothing.

        1. If a layer's experts are still being loaded at their new places, return. If they have been loaded, switch the
           layer to them.
        2. If no layer is left to balance and `every` seconds have passed since the last round, begin a round: list all
           layers, each with the tokens that its experts got since the last round.
        3. If a layer is left, propose a new placement for it, and begin to load the experts if there is a better
           placement.

        now: the time in seconds. Raises DeviceError if the device fails, DeviceLost if it is lost.
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
