"""Comparison of measured serving latencies with modelled ones: each row of a table is served in virtual time.

A row names a model, a chip, a serving engine, formats, a layout, lengths and the number of requests kept open. All
requests, ten times that number, are queued at the start, as by the load generators of such tables; one is sent when
another ends.
"""

from __future__ import annotations

import csv
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isqrt
from pathlib import Path
from random import Random

from intaglio.chips import CHIPS, Target, target
from intaglio.codesign.disaggregated import Apart, run_apart
from intaglio.codesign.engines import EngineProfile, EngineTimes, engine
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import QueueSettings, serve
from intaglio.codesign.simulate import ported
from intaglio.codesign.steady import estimate
from intaglio.codesign.steps import Formats, Server, StepTimes
from intaglio.codesign.table_rows import APART, LENGTHS, SERVERS, check_rows
from intaglio.compiler import Layout
from intaglio.measure.workload import LoadRequest
from intaglio.program import Program
from intaglio.progress import Progress, silent

MODELS = {  # the end of a row's model_path -> card
    "Llama-3.1-70B": "llama-3.1-70b", "Llama-3.1-8B-Instruct": "llama-3.1-8b", "Qwen3-32B": "qwen3-32b",
    "Qwen3-32B-NVFP4": "qwen3-32b", "DeepSeek-R1": "deepseek-v3", "DeepSeek-V3": "deepseek-v3",
    "DeepSeek-R1-NVFP4": "deepseek-v3", "DeepSeek-V3.1-NVFP4": "deepseek-v3", "MiniMax-M2.5": "minimax-m2",
    "gpt-oss-120b": "gpt-oss-120b", "Qwen3.5-397B-A17B": "qwen3.5-397b-a17b", "Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Kimi-K2.5": "kimi-k2", "GLM-5": "glm-5",
}  # fmt: skip
MIXTURES = {card for card in MODELS.values() if not card.startswith(("llama", "qwen3-32b"))}
FORMATS = {"": "bf16", "fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4", "int4_wo": "int4"}
TURNS = 10  # requests for each that is open
SPREAD = (1024, 8192)  # prompts of these lengths are drawn from 80 to 100 % of them, and so are their responses


@dataclass(frozen=True)
class Row:
    """One row of a table of benchmark measurements of serving systems. The properties parse its columns.

    Attributes:
        columns: {name of a column: text}.
        twin: the row from which this row's numbers of prefill and decode servers were copied, see completed(). None:
            the numbers were not copied.
    """

    columns: dict[str, str]
    twin: Row | None = None

    def number(self, name: str) -> int:
        """The value of the column `name`, rounded down to a whole number; 0 if the column is empty or missing."""
        return int(float(self.columns.get(name) or 0))

    @property
    def card(self) -> str | None:
        """Name of the model config that ships with the package for the row's model; None if no config does."""
        return MODELS.get(self.columns["model_path"].split("/")[-1])

    @property
    def concurrency(self) -> int:
        """Number of requests that the benchmark kept open at once; 0 if the row does not say."""
        return self.number("concurrency") or self.number("batch_size")

    @property
    def ttft(self) -> float:
        """Measured mean time to the first token, in seconds."""
        return float(self.columns["silicon_ttft_ms"]) / 1e3

    @property
    def tpot(self) -> float:
        """Measured mean time per token after the first, in seconds."""
        return float(self.columns["silicon_tpot_ms"]) / 1e3

    @property
    def group(self) -> str:
        """The kind of system that the row measured, as text: "disaggregated", "mixture" or "dense".

        "disaggregated": prefill and decode ran on separate servers. "mixture": the same servers did both, for a
        mixture-of-experts model. "dense": the same servers did both, for any other model.
        """
        if self.columns["mode"] != "agg":
            return "disaggregated"
        return "mixture" if self.card in MIXTURES else "dense"

    @property
    def counts_servers(self) -> bool:
        """True if the row states both the number of prefill servers and the number of decode servers."""
        return all(self.number(f"{kind}num_workers") for kind in APART)

    @property
    def split(self) -> str:
        """The half of the table to which the row belongs: "fit" or "test".

        The model's constants are fitted to the rows of one half and tested on the rows of the other. The half is chosen
        by a hash of all columns except the measured ones. Repeated measurements of one setting are therefore in the
        same half. If the row has a `twin`, the twin's columns are hashed instead.
        """
        columns = (self.twin or self).columns
        asked = [v for k, v in sorted(columns.items()) if not k.startswith("silicon")]
        return ("fit", "test")[zlib.crc32("|".join(asked).encode()) % 2]

    def refusal(self) -> str | None:
        """The reason why the servers of this row cannot be modelled, as text; None if they can be modelled."""
        if self.card is None:
            return f"no card of {self.columns['model_path']}"
        if self.columns["system"] not in CHIPS:
            return f"no chip {self.columns['system']}"
        if self.group == "disaggregated" and not self.counts_servers:
            return "the number of prefill or decode servers is not given"
        for name in ("gemm_quant_mode", "moe_quant_mode"):
            if self.columns[name] not in FORMATS:
                return f"{name} {self.columns[name]!r} has no format here; known are {', '.join(filter(None, FORMATS))}"
        if not self.concurrency:
            return "neither concurrency nor batch size"
        return None

    def formats(self, profile: EngineProfile) -> Formats:
        """The Formats of the row's model: number formats of weights, K/V cache, activations and routed experts.

        profile: the serving engine's profile. The K/V cache has the format profile.kv, with one exception: if the
        row's column gemm_quant_mode means bf16, the format is "auto", which means that it follows from the weights.
        """
        gemm, moe = (FORMATS[self.columns[f"{name}_quant_mode"]] for name in ("gemm", "moe"))
        kv = profile.kv if gemm != "bf16" else "auto"
        if self.card == "gpt-oss-120b" and moe == "nvfp4":
            return Formats("bf16", kv, "weights", "mxfp4")
        if self.card in MIXTURES and moe in ("nvfp4", "int4"):
            return Formats("bf16", kv, "weights", moe)  # published so: only experts have four bits
        return Formats(gemm, kv, "weights", moe if self.card in MIXTURES else "")

    def profile(self, general: EngineProfile) -> EngineProfile:
        """The EngineProfile that holds for the server on which the row was measured.

        An EngineProfile has the constants of a serving engine. general: profile of the row's engine. The result is a
        copy of `general` with the values that hold for the row's chip, engine release, model, layout and prompt length,
        see EngineProfile.of(). Raises LayoutError if the row's numbers of chips contradict each other.
        """
        apart = self.group == "disaggregated"
        layout = str(replace(self.placement("prefill_"), replicas=1) if apart else self.placement())
        release, system = self.columns.get("backend_version") or "", self.columns["system"]
        return general.of(release, self.card or "", layout, apart, system, self.number("isl"))

    def placement(self, phase: str = "") -> Placement:
        """The Placement of the measured servers.

        It says how many servers there are, and how the chips of a server share the model. phase: for a disaggregated
        row (prefill and decode on separate servers), "prefill_" for its prefill servers or "decode_" for its decode
        servers; "" for any other row. Raises LayoutError if the row's numbers of chips contradict each other.
        """
        sizes = [max(1, self.number(phase + name)) for name in ("tp_size", "pp_size", "attention_dp_size")]
        (tp, pp, dp), expert = sizes, [max(1, self.number(f"{phase}moe_{w}_size")) for w in ("tp", "ep")]
        workers = max(1, self.number(f"{phase}num_workers")) if phase else 1
        if self.card not in MIXTURES:
            return Placement(Layout(tp=tp, pp=pp), replicas=dp * workers)
        lanes = expert[0] * expert[1]
        if not phase and (lanes > 8 or (tp > 1 and dp > 1)):
            # tp or dp times ep: the same measurements stand in the table with tp8, ep8 and with tp64, moe 8 x 8
            n = isqrt(lanes)
            tp, dp, expert = (1, n, [1, n]) if dp > 1 else (n, 1, [1, n])
        experts = Layout(tp=expert[0], ep=expert[1])
        if dp == 1 and expert == [tp, 1]:
            return Placement(Layout(tp=tp, pp=pp), replicas=workers)
        return Placement(Layout(tp=tp, pp=pp), dp, experts, workers)

    def load(self) -> list[LoadRequest]:
        """The requests of the row's benchmark, as a list of LoadRequests that all arrive at 0 s.

        The list has TURNS * n requests, where n is the number of requests that the benchmark kept open. Each request
        has the row's prompt length and output length. If both lengths are in SPREAD (1024 and 8192), each request's two
        lengths are drawn at random from 80 to 100 % of the row's lengths, with seed n; the benchmark's load generator
        draws them this way.
        """
        n, isl, osl = self.concurrency, self.number("isl"), self.number("osl")
        count = TURNS * n
        if isl not in SPREAD or osl not in SPREAD:
            return [LoadRequest(0.0, isl, osl)] * count
        rng = Random(n)
        return [
            LoadRequest(0.0, rng.randint(isl * 8 // 10, isl), rng.randint(osl * 8 // 10, osl)) for _ in range(count)
        ]


@dataclass(frozen=True)
class Compared:
    """The measured latencies of a row, and the modelled latencies to compare them with.

    Attributes:
        row: the measured row.
        ttft: modelled mean time to the first token, in seconds; 0 if the row was not modelled.
        tpot: modelled mean time per token after the first, in seconds; 0 if the row was not modelled.
        refused: why the row was not modelled; "" if it was.
        draft_tokens: number of draft tokens that each decode step verifies (speculative decoding); 0: no drafts.
    """

    row: Row
    ttft: float = 0.0
    tpot: float = 0.0
    refused: str = ""
    draft_tokens: int = 0

    @property
    def errors(self) -> tuple[float, float]:
        """(error of the time to first token, error of the time per output token), each modelled / measured - 1.

        An error is negative if the modelled latency is too short. Both are -1 if the row was not modelled (see
        `refused`).
        """
        return self.ttft / self.row.ttft - 1, self.tpot / self.row.tpot - 1


def rows(path: Path) -> list[Row]:
    """Read a CSV file of measured servers. Returns a list of Rows, one for each line below the header, in file order.

    Some lines for disaggregated servers do not state the numbers of prefill and decode servers. completed() copies
    these numbers from another line of the same measurement, if the file has one. Raises ValueError if the file has no
    line below the header or lacks a column. Raises TableError for a value that is not allowed.
    """
    with path.open(newline="", encoding="utf-8") as file:
        found = [Row(columns) for columns in csv.DictReader(file)]
    wanted = (
        "backend", "model_path", "system", "mode", "isl", "osl", "gemm_quant_mode", "moe_quant_mode", "silicon_ttft_ms",
        "silicon_tpot_ms",
    )  # fmt: skip
    if not found or not set(wanted) <= set(found[0].columns):
        raise ValueError(f"{path}: wanted rows with columns {', '.join(wanted)}")
    times = ("silicon_ttft_ms", "silicon_tpot_ms")
    check_rows(path, [row.columns for row in found], LENGTHS, times=times, optional=SERVERS)
    return completed(found)


def completed(found: Sequence[Row]) -> list[Row]:
    """A list of the rows in `found`, with missing numbers of prefill and decode servers filled in.

    Published tables list some experiments twice, once without the numbers of servers. A disaggregated row without them
    gets them from its twin, a row of the same experiment that states both numbers. All columns whose names start with
    prefill_ or decode_ are copied from the twin. Two rows are of the same experiment if they have the same model and
    are equal in all other columns, except the path of the model. A row without a twin stays unchanged. So does a row
    with several twins whose copied columns would differ.
    """
    twins: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        if row.group == "disaggregated" and row.counts_servers:
            twins.setdefault(experiment(row), []).append(row)
    out = []
    for row in found:
        same = twins.get(experiment(row), []) if row.group == "disaggregated" and not row.counts_servers else []
        servers = [{k: v for k, v in twin.columns.items() if k.startswith(APART)} for twin in same]
        known = bool(servers) and all(each == servers[0] for each in servers)
        out.append(replace(row, columns=row.columns | servers[0], twin=same[0]) if known else row)
    return out


def experiment(row: Row) -> tuple[str, ...]:
    """A tuple of texts that identifies the measurement of a row.

    Two rows of the same measurement have equal tuples. The first text is the name of the shipped config of the row's
    model, or "". The others are "column=value" for the columns, measured latencies included. Left out are the path of
    the model and the columns that start with prefill_ or decode_, because a table may list one measurement with these
    columns and again without them.
    """
    left_out = ("model_path", *(k for k in row.columns if k.startswith(APART)))
    return (row.card or "", *(f"{k}={v}" for k, v in sorted(row.columns.items()) if k not in left_out))


@lru_cache(maxsize=64)
def whole(card: str) -> Program:
    """The Program of a whole model, not yet compiled. Raises ValueError for an unknown name.

    card: name of a model config that ships with the package.
    """
    return ported(card, None)


@lru_cache(maxsize=64)
def times(
    card: str, on: Target, placement: Placement, how: Formats, fusions: tuple[str, ...], queries: int = 1
) -> StepTimes:
    """The StepTimes of one server: an object that gives the modelled seconds and joules of the server's steps.

    A second call with equal arguments returns the same object, which keeps the step times that it has computed. Raises
    LayoutError if the placement does not fit the model, FormatError for an unknown format, and ChipError if the chip
    cannot hold the weights or cannot compute in a format.

    Args:
        card: name of a model config that ships with the package.
        on: chip and kernel library.
        placement: how the chips share the model.
        how: number formats.
        fusions: names in FUSIONS, ways in which the engine fuses or replaces ops.
        queries: number of tokens that a step computes for each decoding sequence; above 1 with draft tokens.
    """
    return StepTimes(Server.of(whole(card), placement, how), on, fusions, queries)


def compare(row: Row, profile: EngineProfile, closed_form: bool = False) -> Compared:
    """Model the latencies of a measured row. Returns a Compared: the row with its modelled latencies.

    The row's requests are served in virtual time by a model of the row's servers. If the row cannot be modelled, the
    result's field `refused` says why, and its latencies are 0.

    Args:
        row: the measured row.
        profile: profile of the row's serving engine.
        closed_form: True to compute the latencies with the formula steady.estimate() for the mean lengths of the
            requests, in about a tenth of the time. Rows of disaggregated servers are always simulated.
    """
    if why := row.refusal():
        return Compared(row, refused=why)
    assert row.card
    asked, context = row.number("isl") + row.number("osl"), whole(row.card).context
    if asked > context:
        return Compared(row, refused=f"requests of {asked:,} tokens; the context of {row.card} is {context:,}")
    try:
        profile = row.profile(profile)
        if row.group == "disaggregated":
            ended = run_apart(apart_of(row, profile), row.load(), [0.0] * row.concurrency).ended
            first, each = (statistics.fmean(o[i] for o in ended) for i in (1, 2))
            return Compared(row, first, each, draft_tokens=profile.draft_tokens)
        on, settings = server_of(row, profile)
        if closed_form:
            load = row.load()
            prompt, output = (round(statistics.fmean(getattr(r, name) for r in load)) for name in ("prompt", "output"))
            steady = estimate(on, settings, prompt, output, -(-row.concurrency // on.server.placement.replicas))
            return Compared(row, steady.ttft, steady.tpot, draft_tokens=profile.draft_tokens)
        done = serve(on, settings, row.load(), row.concurrency)
    except ValueError as e:  # it does not fit: ChipError, LayoutError, or a request longer than the cache
        return Compared(row, refused=str(e).split(";")[0])
    first = statistics.fmean(o.first or 0.0 for o in done.outcomes)
    each = statistics.fmean(o.each or 0.0 for o in done.outcomes)
    return Compared(row, first, each, draft_tokens=profile.draft_tokens)


def server_of(row: Row, profile: EngineProfile, phase: str = "") -> tuple[EngineTimes, QueueSettings]:
    """Model the server on which a row was measured. Returns (EngineTimes with its step times, QueueSettings).

    Args:
        row: the measured row. refusal() must return None for it.
        profile: the engine's profile for the row, see Row.profile().
        phase: "prefill_" or "decode_" for the prefill or the decode servers of a disaggregated row; "" for other rows.

    Raises ChipError or LayoutError if the model does not fit.
    """
    assert row.card
    how = row.formats(profile)
    on = profile.on(target(row.columns["system"]), (how.experts or how.weights) if row.card in MIXTURES else "")
    own = times(row.card, on, row.placement(phase), how, profile.fusions, 1 + profile.draft_tokens)
    sequences = max(1, min(256, row.concurrency))  # engines keep recurrent state for those that run
    kv = own.server.kv_room(
        own.target, profile.memory_share, profile.max_batch_tokens, sequences, states=1, gives_back=not phase
    )
    return EngineTimes(own, profile), profile.settings(kv, own.copies, row.concurrency, phase == "decode_")


def apart_of(row: Row, profile: EngineProfile) -> Apart:
    """The Apart (disaggregated deployment) on which a disaggregated row was measured.

    It has the step times and settings of the row's prefill servers and of its decode servers. profile: the engine's
    profile for the row. Raises ChipError or LayoutError if the model does not fit.
    """
    (first, one), (second, two) = (server_of(row, profile, phase) for phase in ("prefill_", "decode_"))
    return Apart(first, second, one, two, profile.route)


def compare_all(
    found: Sequence[Row], profiles: Callable[[str], EngineProfile] = engine, progress: Progress = silent,
    closed_form: bool = False,
) -> Iterator[Compared]:  # fmt: skip
    """Model the latencies of all rows. Yields a Compared (a row with its modelled latencies) for each row.

    The results are not in the order of `found`. They are sorted so that rows of one model and server follow each other
    and the server is compiled once.

    Args:
        found: the measured rows.
        profiles: function from an engine's name to its EngineProfile; its errors are raised.
        progress: called before each row.
        closed_form: True to compute latencies with steady.estimate(), see compare().
    """
    cached: dict[str, EngineProfile] = {}
    ordered = sorted(found, key=lambda r: (r.card or "", [r.columns.get(c) or "" for c in sorted(r.columns)]))
    for i, row in enumerate(ordered):
        progress(i, len(found), f"{row.columns['backend']} {row.columns['model_path']} on {row.columns['system']}")
        name = row.columns["backend"]
        if name not in cached:
            cached[name] = profiles(name)
        yield compare(row, cached[name], closed_form)


@dataclass(frozen=True)
class Agreement:
    """Statistics of the errors of modelled latencies, over rows of one engine and group of systems.

    A row's error is its modelled latency / its measured latency - 1.

    Attributes:
        engine: name of the engine, or "all".
        group: kind of the rows: "dense", "mixture" (of experts) or "disaggregated", see Row.group.
        rows: number of rows compared.
        derived: number of these rows whose numbers of servers were copied from another row, see completed().
        tpot: median of the absolute errors of the time per token.
        ttft: median of the absolute errors of the time to the first token.
        tpot_bias: median of the signed errors of the time per token.
        ttft_bias: median of the signed errors of the time to the first token.
        worst: up to three rows, as Compared, with the largest errors of the time per token; the largest comes first.
    """

    engine: str
    group: str
    rows: int
    derived: int
    tpot: float
    ttft: float
    tpot_bias: float
    ttft_bias: float
    worst: tuple[Compared, ...] = field(default=(), repr=False)


def agreements(compared: Sequence[Compared]) -> list[Agreement]:
    """Statistics of the errors of modelled latencies, as a list of Agreements.

    First comes an Agreement for each engine and group of rows (dense, mixture or disaggregated, see Row.group). Then
    comes an Agreement for each group, over the rows of all engines. Pairs and groups without rows are left out. The
    list is empty if no row was modelled.

    compared: rows with modelled latencies. Rows that could not be modelled (Compared.refused) are left out.
    """
    out = []
    good = [c for c in compared if not c.refused]
    keys = sorted({(c.row.columns["backend"], c.row.group) for c in good})
    for name, group in [*keys, *(("all", group) for group in sorted({g for _, g in keys}))]:
        mine = [c for c in good if c.row.group == group and name in ("all", c.row.columns["backend"])]
        first, each = [[c.errors[i] for c in mine] for i in (0, 1)]
        worst = tuple(sorted(mine, key=lambda c: -abs(c.errors[1]))[:3])
        derived = sum(c.row.twin is not None for c in mine)
        medians = (statistics.median(map(abs, each)), statistics.median(map(abs, first)))
        biases = (statistics.median(each), statistics.median(first))
        out.append(Agreement(name, group, len(mine), derived, *medians, *biases, worst))
    return out
