"""Speed of the host device compared with llama.cpp and PyTorch, on one random checkpoint with the same threads.

The engines take turns at every row. All numbers are measured, medians over the runs; ratios above 1 mean that Intaglio
is faster or smaller. A ratio is the median of the runs' ratios, because the memory speed of a shared machine varies by
half for seconds at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
from checkpoints import FILES, OURS, PEER_FORMATS, SHAPES, write_gguf, write_random
from engines import ENGINES, PACKED, Worker, compiled, decode_batches, missing, pages_each, prefill_batches, prompt

from intaglio.batch import Batch
from intaglio.devices.host import HostDevice
from intaglio.measure.bench import MOST_MEGABYTES, Roofs, measured_roofs, read_stream
from intaglio.ops import Experts, Linear
from intaglio.program import Program

OFFSETS = (0, 32, -32, 16, -16, 48, -48, 64, -64)  # of the contexts in a batch from 128 tokens
FULL = {"int8": "int8g128", "int4": "int4g32"}
CODES = {**FULL, "Q8_0": "int8g32f16", "Q6_K": "q6_k", "Q5_K_M": "q5_k", "Q4_K_M": "q4_k"}  # of most matrices
SHARE = {  # of bf16's bytes, roughly, to see what fits in memory together
    "bf16": 1.0, "int8": 0.56, "int4": 0.36, "Q8_0": 0.56, "Q6_K": 0.44, "Q5_K_M": 0.4, "Q4_K_M": 0.36,
}  # fmt: skip
LARGE = ("8b", "moe")
PHASES = ("prefill", "decode", "busy", "memory")
MEMORY = {
    "first": "first load to first token", "again": "load to first token", "peak_bytes": "peak memory",
    "weight_bytes": "  weights", "before": "  held before loading",
}  # fmt: skip
AGREE = 0.05  # relative difference of bf16 logits that rounding explains, with room to spare
PAUSE = 0.03  # seconds: OpenMP's threads go on spinning for some ms after their work is done
ROUNDS = 3  # times that engines too large to be in memory together take turns
SETTLE = 0.3  # seconds until a new process has found its core
PROMPT = 32  # tokens of the prompt that engines must agree on


@dataclass(frozen=True)
class Row:
    """A prompt of so many tokens, or decode steps after contexts of these lengths, maybe while another process keeps a
    core busy; `tokens` come of one time."""

    phase: str
    lengths: tuple[int, ...]

    @property
    def label(self) -> str:
        if self.phase == "prefill":
            return f"prefill {self.lengths[0]}"
        where = "~128" if self.lengths[0] == 128 and len(self.lengths) > 1 else str(self.lengths[0])
        return f"decode batch {len(self.lengths)} at {where}{', a core busy' if self.phase == 'busy' else ''}"

    @property
    def tokens(self) -> int:
        return self.lengths[0] if self.phase == "prefill" else len(self.lengths)


@dataclass
class Result:
    """One line: samples by engine (seconds, or bytes), how they are shown, and Intaglio's bound in the same unit."""

    shape: str
    format: str
    label: str
    unit: str  # tok/s, s, MB, or "of quiet": times as long as without the other process
    tokens: int = 1
    samples: dict[str, list[float]] = field(default_factory=dict)
    bounds: list[float] = field(default_factory=list)  # run by run, by the read stream around Intaglio's sample
    bound_by: str = ""

    def middle(self, engine: str) -> float | None:
        return median(self.samples[engine]) if self.samples.get(engine) else None

    def over_ours(self, seconds: Sequence[float]) -> float | None:
        """How many times Intaglio's sample of the same run, the median."""
        ours = self.samples.get("intaglio", [])
        return median(x / y for x, y in zip(seconds, ours, strict=True)) if ours and seconds else None

    def shown(self, sample: float | None) -> str:
        if sample is None:
            return "-"
        if self.unit == "of quiet":
            return f"{1 / sample:.0%}"
        value = {"tok/s": self.tokens / sample, "s": sample, "MB": sample / 1e6}[self.unit]
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def ratio(self, peer: str) -> str:
        found = self.over_ours(self.samples.get(peer, []))
        return f"{found:.2f}x" if found else "-"

    def cells(self) -> list[str]:
        found = self.over_ours(self.bounds)
        share = f"{found:.0%} {self.bound_by}" if found else ""
        bound = self.shown(median(self.bounds)) if self.bounds else ""
        values = [self.shown(self.middle(e)) for e in ENGINES]
        return [
            self.label,
            self.unit,
            *values,
            self.ratio("llama.cpp"),
            self.ratio("torch"),
            self.spread(),
            bound,
            share,
        ]

    def spread(self) -> str:
        """The slowest sample over the fastest, of the engine where they are furthest apart."""
        return f"{max(max(s) / min(s) for s in self.samples.values()):.2f}"


HEAD = ["", "", *ENGINES, "vs llama.cpp", "vs torch", "spread", "roof", "intaglio's share"]


def rows(shape: str, quick: bool) -> list[Row]:
    """What is measured of a shape. The large ones only decode, after short contexts: their prompts take minutes."""
    sizes = (128, 512) if quick else (128, 512, 2048)
    prefills = [] if shape in LARGE else [Row("prefill", (n,)) for n in sizes]
    decodes = [Row("decode", lengths(n)) for n in ((1, 8) if quick else (1, 4, 8, 32))]
    long = [] if quick or shape in LARGE else [Row("decode", (4096,))]
    return [*prefills, *decodes, *long, Row("busy", lengths(1))]


def lengths(sequences: int) -> tuple[int, ...]:
    return tuple(128 + OFFSETS[i % len(OFFSETS)] for i in range(sequences))


def moved(program: Program, batch: Batch, touched: Mapping[str, float] = MappingProxyType({})) -> int:
    """Bytes of weights and state that a step must read. `touched` is the share of the experts at a site whose weights
    it reads; a site not named reads what even routing would."""
    work = program.work(batch)
    held = {op.site: op for op in program.ops if isinstance(op, Experts) and op.site in touched}
    experts = sum(
        round(program.tensors[n].nbytes({}) * touched[site])
        for site, op in held.items()
        for n in (op.gate, op.up, op.down)
    )
    return experts + sum(w.state_bytes + (0 if site in held else w.weight_bytes) for site, w in work.items())


def bound(
    program: Program, batches: Iterable[Batch], measured: Roofs, touched: Mapping[str, float]
) -> tuple[float, str]:
    """Seconds that the steps' bytes or FLOPs take at the roofs, whichever is more, and which that is."""
    memory = matrix = 0.0
    for batch in batches:
        size = moved(program, batch, touched)
        memory += size / measured.bandwidth(megabytes(size))
        work = program.work(batch)
        for op in program.ops:
            format = "f32"
            if isinstance(op, Linear):
                format = program.tensors[op.w].format if op.x_format == "int8" else op.x_format
            matrix += work[op.site].flops / measured.peak(format)
    return max((memory, "of memory"), (matrix, "of matrix"))


def megabytes(size: int) -> int:
    """The working set whose read stream bounds a step of `size` bytes."""
    return min(1 << (size >> 20).bit_length(), MOST_MEGABYTES)


def take_turns(
    workers: Sequence[Worker], method: str, *arguments: Any, runs: int, stream: Callable[[], float]
) -> tuple[dict[str, list[float]], list[float]]:
    """`runs` samples of each, one after the other in every run, and of the read stream around Intaglio's, before and
    after; the first round warms up and is not counted."""
    samples: dict[str, list[float]] = {w.name: [] for w in workers}
    streams = []
    for run in range(runs + 1):
        for w in workers:
            before = stream() if w.name == "intaglio" else None
            time.sleep(PAUSE)
            sample = w(method, *arguments)
            if run:
                samples[w.name].append(sample)
            if run and before:
                streams.append((before + stream()) / 2)
    return samples, streams


def slowed(workers: Sequence[Worker], method: str, runs: int) -> dict[str, list[float]]:
    """How many times as long each takes while another process keeps one core busy: pairs, taken in turns."""
    samples: dict[str, list[float]] = {w.name: [] for w in workers}
    for _ in range(runs):
        for w in workers:
            time.sleep(PAUSE)
            quiet = w(method)
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
                time.sleep(SETTLE)
                samples[w.name].append(w(method) / quiet)
                other.kill()
    return samples


class Session:
    """One shape in one format: its checkpoint, engines and settings, and the results so far."""

    def __init__(self, args: argparse.Namespace, shape: str, format: str, folder: Path, engines: Sequence[str]) -> None:
        self.args, self.shape, self.format, self.folder, self.engines = args, shape, format, folder, engines
        self.rows = [r for r in rows(shape, args.quick) if r.phase in args.phase]
        self.steps = 9 if args.quick else 17  # of a decode sample, the first not counted
        self.results: list[Result] = []
        self.answers: dict[str, np.ndarray] = {}  # logits by engine
        self.touched: dict[Row, dict[str, float]] = {}  # the share of its experts that a step reads, by site
        self.streams: dict[Row, list[float]] = {}  # bytes/s of the read stream, run by run
        self.device = HostDevice(args.threads)
        self.program = compiled(folder, format)

    def measure(self, measured: Roofs) -> None:
        together = self._fit_together()
        groups = [list(self.engines)] if together else [[e] for e in self.engines] * ROUNDS
        runs = self.args.runs if together else -(-self.args.runs // ROUNDS)
        if not together:
            say(f"  too large to be in memory together: loaded in turns, {ROUNDS} times, {runs} runs each time")
        units = {row: "of quiet" if row.phase == "busy" else "tok/s" for row in self.rows}
        results = {row: Result(self.shape, self.format, row.label, units[row], row.tokens) for row in self.rows}
        for names in groups:
            with self._workers(names) as workers:
                for w in workers:
                    w("load")
                    w("settle")
                    self.answers[w.name] = w("logits", prompt(PROMPT, SHAPES[self.shape].vocabulary))
                for row, result in results.items():
                    say(f"  {self.format} {row.label}: {', '.join(names)}")
                    for name, samples in self._samples(workers, row, runs).items():
                        result.samples.setdefault(name, []).extend(samples)
        for row, result in results.items():
            for stream in self.streams.get(row, []):
                roofs = replace(measured, bandwidth=lambda _, stream=stream: stream)
                touched = self.touched.get(row, {})
                seconds, result.bound_by = bound(self.program, self._batches(row), roofs, touched)
                result.bounds.append(seconds)
        self.results += results.values()
        if "memory" in self.args.phase:
            self.results += self._memory()

    def _samples(self, workers: Sequence[Worker], row: Row, runs: int) -> dict[str, list[float]]:
        if row.phase == "prefill":
            return self._turns(workers, row, runs, "prefill", row.lengths[0])
        for w in workers:
            w("fill", row.lengths, self.steps)
            if w.name == "intaglio":
                self.touched[row] = w("touched")
        if row.phase == "busy":
            return slowed(workers, "decode", runs)
        return self._turns(workers, row, runs, "decode")

    def _turns(
        self, workers: Sequence[Worker], row: Row, runs: int, method: str, *arguments: Any
    ) -> dict[str, list[float]]:
        size = megabytes(max(moved(self.program, batch) for batch in self._batches(row)))
        stream = partial(read_stream, self.device.facts(), size)
        samples, streams = take_turns(workers, method, *arguments, runs=runs, stream=stream)
        self.streams.setdefault(row, []).extend(streams)
        return samples

    def _batches(self, row: Row) -> Iterator[Batch]:
        """What Intaglio runs for one sample's unit: a whole prompt, or one step."""
        if row.phase == "prefill":
            return prefill_batches([0] * row.lengths[0])
        return decode_batches(row.lengths, 1)

    @contextlib.contextmanager
    def _workers(self, names: Sequence[str], room: Sequence[int] | None = None) -> Iterator[list[Worker]]:
        if room is None:
            rooms = [[n + (0 if r.phase == "prefill" else self.steps) for n in r.lengths] for r in self.rows]
            room = max([[PROMPT], *rooms], key=lambda room: sum(map(pages_each, room)))
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Worker(n, self.folder, self.format, self.args.threads, room)) for n in names]

    def _fit_together(self) -> bool:
        stored = SHAPES[self.shape].stored_bytes()
        return sum(stored * SHARE[self.format] for _ in self.engines) < 0.8 * available_bytes()

    def _memory(self) -> list[Result]:
        """Of fresh processes: the time from files in the system's cache to the first token, and the most memory held
        over a prompt of 512 tokens and some decode steps after it. Intaglio's first load packs the weights."""
        found = {
            what: Result(self.shape, self.format, label, "s" if what in ("first", "again") else "MB")
            for what, label in MEMORY.items()
        }
        for run in range(min(self.args.runs, 3) + 1):
            for name in self.engines:
                say(f"  {self.format} load: {name}")
                values = self._load(name)
                if run:  # the first only brings the files into the cache
                    for what, value in values.items():
                        found[what].samples.setdefault(name, []).append(value)
        return list(found.values())

    def _load(self, name: str) -> dict[str, float]:
        first = None
        if name == "intaglio":
            shutil.rmtree(self.folder / PACKED, ignore_errors=True)
            with self._workers([name], [1024]) as [w]:
                first = self._first_token(w)
        with self._workers([name], [1024]) as [w]:
            again = self._first_token(w)
            w("prefill", 512)
            w("fill", (512,), 17)
            w("decode")
            held = {what: w(what) for what in ("peak_bytes", "weight_bytes")}
        return {"first": again if first is None else first, "again": again, "before": w.bytes_before_load, **held}

    @staticmethod
    def _first_token(w: Worker) -> float:
        start = time.perf_counter()
        w("load")
        w("prefill", 1)
        seconds = time.perf_counter() - start
        w("settle")
        return seconds

    def agreement(self, plain: dict[str, np.ndarray]) -> str:
        """How far apart the engines' logits are, in words; `plain` are those in bf16, if there are any."""
        names = list(self.answers)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        apart = {f"{a} and {b}": difference(self.answers[a], self.answers[b]) for a, b in pairs}
        if self.format != "bf16":
            apart |= {f"{a} and its bf16": difference(self.answers[a], plain[a]) for a in names if a in plain}
        parts = [f"{pair} {d:.3f}" for pair, d in apart.items()]
        tokens = ", ".join(f"{n} {int(x[-1].argmax())}" for n, x in self.answers.items())
        alarm = (
            "   <-- NOT THE SAME COMPUTATION"
            if self.format == "bf16" and max(apart.values(), default=0) > AGREE
            else ""
        )
        return (
            f"logits after {PROMPT} tokens, relative difference: {'; '.join(parts) or 'no peer'}. "
            f"Greedy next token: {tokens}{alarm}"
        )


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def available_bytes() -> int:
    """Memory that could be had without swapping; file caches count as free."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def say(text: str) -> None:
    """Progress, apart from what is printed as the result."""
    print(text, file=sys.stderr, flush=True)


def present_engines(formats_asked: Sequence[str]) -> list[str]:
    """Those that can run; says what the others want."""
    there = []
    for engine in ENGINES:
        if package := missing(engine):
            print(f"{engine}: left out, {package} is not installed (pip install -e '.[test,bench]')")
        else:
            there.append(engine)
    if "torch" in there and "bf16" not in formats_asked:
        print("torch: left out, it is compared in bf16 only")
    try:
        print(f"vllm {version('vllm')} is installed, but this script does not drive it: left out")
    except PackageNotFoundError:
        print("vllm: left out, not installed")
    return there


@cache
def machine() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def versions() -> dict[str, str]:
    found = {}
    for package in ("intaglio", "llama-cpp-python", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    put = [str.ljust, str.ljust] + [str.rjust] * (len(head) - 2)
    return "\n".join("  ".join(p(c, w) for p, c, w in zip(put, line, widths, strict=True)) for line in [head, *lines])


def measure_shape(args: argparse.Namespace, shape: str, folder: Path, engines: Sequence[str]) -> list[Result]:
    """All formats of one shape, printed as they come."""
    say(f"{shape}: checkpoint in {folder}")
    write_random(folder, SHAPES[shape])
    results: list[Result] = []
    plain: dict[str, np.ndarray] = {}
    device = HostDevice(args.threads)
    for format in args.format:
        chosen = [e for e in engines if e != "torch" or format == "bf16"]
        if "llama.cpp" in chosen:
            write_gguf(folder, PEER_FORMATS[format], args.threads)
        elif format in FILES:
            print(f"\n{shape}, {format}: left out, llama.cpp's quantiser writes the file")
            continue
        measured = measured_roofs(device)
        assert isinstance(measured, Roofs)
        full, peak = FULL.get(format, format), measured.peak(CODES.get(format, format))
        roofs = f"read stream {measured.bandwidth(512) / 1e9:.1f} GB/s, matrix {peak / 1e9:,.0f} GFLOP/s"
        session = Session(args, shape, format, folder, chosen)
        session.measure(measured)
        plain = session.answers if format == "bf16" else plain
        what = f"file {format} in both" if format in FILES else f"{full} against {PEER_FORMATS[format]}"
        print(f"\n{shape}, {what}, {args.threads} threads; roofs: {roofs}")
        print(table(HEAD, [r.cells() for r in session.results]))
        print(session.agreement(plain), flush=True)
        results += session.results
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["135m", "1b"])
    parser.add_argument("--format", nargs="+", choices=list(PEER_FORMATS), default=list(OURS))
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter samples")
    parser.add_argument("--dir", type=Path, help="keep checkpoints here and use them again; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    print(f"{machine()}; {platform.platform()}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
    print(f"processes that wanted a core in the last minute, before the start: {os.getloadavg()[0]:.1f}")
    engines = present_engines(args.format)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() if args.dir is None else contextlib.nullcontext(args.dir) as root:
        for shape in args.shape:
            results += measure_shape(args, shape, Path(root) / shape, engines)
    if args.json:
        report = {"machine": machine(), "versions": versions(), "threads": args.threads}
        args.json.write_text(json.dumps(report | {"results": [asdict(r) for r in results]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
