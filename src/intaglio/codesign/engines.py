"""EngineProfile: what a serving engine adds to the steps of a chip, as data. The profiles are data/engines/*.toml.

EngineTimes: step times and energies of a server under such a profile.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from intaglio.chips import ChipError, Target
from intaglio.chips.files import built, read_toml, typed
from intaglio.codesign.fleet import ROUTES
from intaglio.codesign.fusions import FUSIONS
from intaglio.codesign.memory import KvRoom
from intaglio.codesign.queue import RANKS, QueueSettings
from intaglio.codesign.steps import StepTimes

SERVERS = ("system", "card", "release", "layout", "prompt")  # what a recipe's server is known by
ENGINES = Path(__file__).resolve().parent.parent / "data" / "engines"


@dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """How a serving engine runs steps. Times are in seconds.

    Attributes:
        name: the engine's name.
        description: one line, for listings.
        max_batch_tokens: maximum tokens of a step, on each data-parallel copy of the attention layers (DP rank).
        max_sequences: maximum sequences that run at once on each DP rank.
        memory_share: fraction of a chip's HBM that weights, activations and K/V cache may fill.
        mixed: True if prompts and decoding sequences share steps; False: a step with prompts decodes nothing.
        kv: format of the K/V cache for models with 8-bit or 4-bit weights.
        step_s: the host's time for each step.
        sequence_s: the host's time for each sequence of a step. Each DP rank has a host process for its sequences.
        request_s: the host's time for each request: HTTP, tokenizer, first text.
        prompt_token_s: the host's time for each token of a prompt.
        admission_steps: number of steps that a request waits before it is admitted.
        poll_steps: number of decode steps between two looks of a server for new requests, as pairs (least number of
            open requests, steps) in ascending order. The last pair whose number of requests is reached counts. If no
            pair's number is reached, the server looks before every step.
        decode_sequences: number of sequences that each DP rank of a decode server runs at once, as pairs (least number
            of requests open on all servers, sequences) in ascending order. The last pair whose number of requests is
            reached counts. If no pair's number is reached, the rank runs max_sequences.
        route: how a router chooses one of several disaggregated servers: one of codesign.fleet.ROUTES.
        ranks: which DP rank of a server computes a prompt: one of codesign.queue.RANKS, explained at QueueSettings.
        graph_launch_s: launch overhead of a kernel in a step that only decodes (a CUDA graph). None: the launch
            overhead that the kernel library gives is used.
        decode_factor: time of a step that only decodes, as a multiple of the modelled time of its kernels.
        prefill_factor: time of a step with prompts, as a multiple of the modelled time of its kernels.
        fusions: names in intaglio.codesign.fusions.FUSIONS. Each is a way in which the engine fuses, splits or replaces
            ops of the Program.
        library: {field of the kernel library: value}. On every chip, these values replace those of the chip's library.
        generations: {generation of chips, such as hopper: {field of the kernel library: value}}. On chips of this
            generation, these values replace those of the chip's library and those in `library`.
        experts: {generation: {format of routed experts' weights, such as nvfp4: {field of the kernel library: value}}}.
            For models whose routed experts have this format, these values replace all others on chips of this
            generation.
        draft_tokens: draft tokens that a step verifies for each decoding sequence (speculative decoding).
        tokens_per_step: mean tokens that a sequence gains in a step that decodes it: 1, or more with drafts.
        recipes: dicts {profile field: value} for some servers, such as the options with which published benchmarks
            start them. Five more keys say for which servers a dict holds: `system` (the chip's name), `card`,
            `release`, `layout` (of one prefill server if disaggregated) and `prompt` (tokens of a request's prompt). A
            missing key matches every server. If several dicts set a field, the last one counts. The key `why` is a text
            that gives the source of the values.
        apart: {profile field: value} for disaggregated servers (separate prefill and decode).
        older: {profile field: value} for older releases of the engine. A release is older if its number is below that
            in the key `before`, such as 0.14.
        reasons: source of each field's value.

    Raises ValueError for a value out of range, an unknown fusion, route or `ranks`. Raises ChipError, a ValueError, for
    unknown fields in `recipes`, `apart` or `older`, and for an `older` without a release in `before`.
    """

    name: str
    description: str
    max_batch_tokens: int = 8192
    max_sequences: int = 1024
    memory_share: float = 0.9
    mixed: bool = True
    kv: str = "auto"
    step_s: float = 0.0
    sequence_s: float = 0.0
    request_s: float = 0.0
    prompt_token_s: float = 0.0
    admission_steps: float = 0.0
    poll_steps: tuple[tuple[int, int], ...] = ()
    decode_sequences: tuple[tuple[int, int], ...] = ()
    route: str = "least-open"
    ranks: str = "any"
    graph_launch_s: float | None = None
    decode_factor: float = 1.0
    prefill_factor: float = 1.0
    fusions: tuple[str, ...] = ()
    library: dict[str, Any] = field(default_factory=dict)
    generations: dict[str, dict[str, Any]] = field(default_factory=dict)
    experts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    draft_tokens: int = 0
    tokens_per_step: float = 1.0
    recipes: tuple[dict[str, Any], ...] = ()
    apart: dict[str, Any] = field(default_factory=dict)
    older: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < float("inf"):
                raise ValueError(f"engine {self.name}: {one.name} is {value}; allowed: 0 or more")
        known = {one.name for one in fields(self)} - {"name", "description", "recipes", "apart", "older", "reasons"}
        wanted = known | {"before"}
        if self.older and (not set(self.older) <= wanted or not numbers(str(self.older.get("before", "")))):
            raise ChipError(
                f"engine {self.name}: older has {self.older}; wanted before = a release, and {sorted(wanted)}"
            )
        if unknown := sorted(set(self.apart) - known):
            raise ChipError(f"engine {self.name}: apart has {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        for recipe in self.recipes:
            allowed = known | {*SERVERS, "why"}
            if unknown := sorted(set(recipe) - allowed):
                raise ChipError(
                    f"engine {self.name}: a recipe has {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}"
                )
        if unknown := sorted(set(self.fusions) - set(FUSIONS)):
            raise ValueError(f"engine {self.name}: unknown fusion {', '.join(unknown)}; known: {', '.join(FUSIONS)}")
        if self.route not in ROUTES:
            raise ValueError(f"engine {self.name}: route is {self.route!r}; allowed: {', '.join(ROUTES)}")
        if self.ranks not in RANKS:
            raise ValueError(f"engine {self.name}: ranks is {self.ranks!r}; allowed: {', '.join(RANKS)}")
        for name in ("max_batch_tokens", "max_sequences", "decode_factor", "prefill_factor"):
            if not getattr(self, name):
                raise ValueError(f"engine {self.name}: {name} is 0; allowed: above 0")
        if not 1 <= self.tokens_per_step <= 1 + self.draft_tokens:
            raise ValueError(
                f"engine {self.name}: tokens_per_step is {self.tokens_per_step:g}; allowed: 1 to "
                f"{1 + self.draft_tokens}, with draft_tokens {self.draft_tokens}"
            )

    def is_older(self, release: str) -> bool:
        """True if `release` is older than the release in self.older["before"], or if `release` is "" (not known).

        False if the profile has no values for older releases, and for a release whose name does not start with a
        number.
        """
        if not self.older:
            return False
        return not release or () < numbers(release) < numbers(self.older["before"])

    def of(
        self, release: str, card: str = "", layout: str = "", apart: bool = False, system: str = "", prompt: int = 0
    ) -> EngineProfile:
        """Returns a copy of this profile with the values that hold for one server.

        A disaggregated server gets the values in `self.apart`. Any other server gets the values in `self.older` if
        is_older() is True for its release. Then the values of each matching recipe are applied, in order. In the copy,
        `recipes`, `apart` and `older` are empty.

        Args:
            release: the engine's release, such as 0.17.0; "": not known, and taken as an older release.
            card: name of the model's card (its shipped config).
            layout: text of the server's Placement, such as tp8. For any disaggregated server, give the text of one
                prefill server's Placement.
            apart: True for a disaggregated server, which only prefills or only decodes.
            system: name of the chip, such as b200_sxm.
            prompt: tokens of a request's prompt.
        """
        older = {k: v for k, v in self.older.items() if k != "before"} if self.is_older(release) else {}
        changes = dict(self.apart if apart else older)
        asked = dict(zip(SERVERS, (system, card, release, layout, prompt), strict=True))
        for recipe in self.recipes:
            if all(recipe.get(name, value) == value for name, value in asked.items()):
                changes |= {k: v for k, v in recipe.items() if k not in (*SERVERS, "why")}
        return replace(self, **changes, recipes=(), apart={}, older={})

    def on(self, target: Target, experts: str = "") -> Target:
        """Returns a copy of `target` whose kernel library has this engine's values for some fields.

        There are three sources of values; a later source overrides an earlier one:

        - self.library.
        - self.generations, for the generation of target.library, such as hopper.
        - self.experts, for the same generation and the format `experts`.

        If the engine has no values, the result is `target` itself.

        experts: format of the weights of routed experts, such as nvfp4; "": the model has no routed experts. Raises
        ChipError for an unknown field of a library, or a value out of range.
        """
        generation = target.library.generation
        own = self.experts.get(generation, {}).get(experts, {})
        changes = {**self.library, **self.generations.get(generation, {}), **own}
        return target.with_library(**changes) if changes else target

    def settings(
        self, kv: KvRoom, copies: int = 1, concurrency: int = 1, decodes: bool = False
    ) -> QueueSettings:  # fmt: skip
        """Returns the QueueSettings (limits and host times for simulating a queue) of one server of this engine.

        Args:
            kv: room for K/V of the server's sequences.
            copies: data-parallel copies of the attention layers (DP ranks) in the server. Each runs up to
                self.max_sequences sequences, or up to self.decode_sequences if `decodes` is True.
            concurrency: number of requests open at once on the server; for a disaggregated server, on all servers
                together. It selects the values in self.poll_steps and self.decode_sequences.
            decodes: True for a disaggregated server that decodes.
        """
        sequences = of_load(self.decode_sequences, concurrency, self.max_sequences) if decodes else self.max_sequences
        return QueueSettings(
            kv, self.max_batch_tokens, sequences * copies, self.mixed, self.step_s, self.sequence_s,
            self.request_s, self.prompt_token_s, self.admission_steps, of_load(self.poll_steps, concurrency, 0),
            self.tokens_per_step, self.ranks,
        )  # fmt: skip


class EngineTimes:
    """Modelled step times and energies of a server that runs under one serving engine.

    A step takes the modelled time of its kernels, multiplied by a factor of the engine's profile. There is one factor
    for steps with prompts, and one for steps that only decode. In steps that only decode, the profile's
    `graph_launch_s` (launch overhead with CUDA graphs) replaces the library's launch overhead, if it is set.

    times: the server's StepTimes. profile: the engine's profile.
    """

    def __init__(self, times: StepTimes, profile: EngineProfile) -> None:
        self.times, self.profile, self.copies = times, profile, times.copies
        self.server, self.target = times.server, times.target
        launch = profile.graph_launch_s
        self.graphs = times if launch is None else times.on(times.target.with_library(launch_s=launch))

    def cost(self, decoding: int, context: float, chunks: Sequence[tuple[int, int, int]] = ()) -> tuple[float, float]:
        """Returns (seconds, joules) of one step. The joules are those of all chips of the server.

        The profile's factors make the step longer than its kernels; in the added time the chips draw idle power.

        Args:
            decoding: number of decoding sequences in the step.
            context: mean number of keys (tokens in the cache) of the decoding sequences.
            chunks: the step's prompt chunks, each as (new tokens, keys including the new tokens, number of such
                chunks).
        """
        factor = self.profile.prefill_factor if chunks else self.profile.decode_factor
        seconds, joules = (self.times if chunks else self.graphs).cost(decoding, context, chunks)
        idle_w = self.target.chip.energy.idle_w * self.server.placement.chips_per_server
        return seconds * factor, joules + (factor - 1) * seconds * idle_w


def of_load(pairs: Sequence[tuple[int, int]], concurrency: int, default: int) -> int:
    """Returns the value of a setting that depends on the number of open requests.

    pairs: (least number of open requests, value), ascending by the number. The result is the value of the last pair
    whose number is at most `concurrency`, or `default` if there is no such pair.
    """
    return next((value for least, value in reversed(pairs) if concurrency >= least), default)


def numbers(release: str) -> tuple[int, ...]:
    """Returns the numbers with which a release's name starts, as a tuple: (1, 2, 0) for 1.2.0rc6.

    () if the name does not start with a number.
    """
    found = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def engines() -> dict[str, Path]:
    """Returns the engine profiles that ship with the package, as a dict {name of the engine: TOML file}."""
    return {path.stem: path for path in sorted(ENGINES.glob("*.toml"))}


def engine(name: str) -> EngineProfile:
    """Returns the EngineProfile called `name`, or the one in the file `name` if `name` ends in .toml.

    Raises ValueError for an unknown name or a wrong value. Raises ChipError for an unknown field, a value of the wrong
    type, or a file that is not TOML.
    """
    path = Path(name) if name.endswith(".toml") else engines().get(name)
    if path is None or not path.is_file():
        raise ValueError(f"there is no serving engine {name!r}; known are {', '.join(engines())}, or give a NAME.toml")
    table = read_toml(path)
    known = {one.name for one in fields(EngineProfile)} - {"name"}
    if unknown := sorted(set(table) - known):
        raise ChipError(f"{path}: unknown {', '.join(unknown)}; a profile has {', '.join(sorted(known))}")
    profile: EngineProfile = built(path, EngineProfile, {"name": path.stem, **table})
    hints = get_type_hints(EngineProfile)

    def checked(where: str, part: dict[str, Any]) -> dict[str, Any]:
        return {k: typed(f"{path}: {where}.{k}", v, hints[k]) if k in hints else v for k, v in part.items()}

    return replace(
        profile, apart=checked("apart", profile.apart), older=checked("older", profile.older),
        recipes=tuple(checked("recipes", one) for one in profile.recipes),
    )  # fmt: skip
