"""A Program around one op, run on the reference and on every instruction set of the host device. Used by tests."""

from __future__ import annotations

import numpy as np

from intaglio import formats
from intaglio.batch import Batch, Chunk, Sampling, bind
from intaglio.devices import ArrayWeights, StateSpec, StepRequest, Weights
from intaglio.devices.host import HostDevice, isa_names
from intaglio.devices.reference import ReferenceDevice
from intaglio.formats import Quantised
from intaglio.ops import (
    Embed,
    Linear,
    Sample,
    Select,
    Value,
)  # fmt: skip
from intaglio.program import Builder, Program

EPS = 2.0**-24  # unit roundoff of float32
ISAS = isa_names()
PAGE = 16


class Bench:
    """A Program whose first temp is an arbitrary matrix (an embedding looked up row by row)."""

    def __init__(self, rng: np.random.Generator, rows: int, cols: int, scale: float = 1.0) -> None:
        self.rng, self.rows = rng, rows
        self.b = Builder("bench", 4096)
        self.arrays: dict[str, Value] = {}
        self.x = self.matrix("x", rows, cols, scale)

    def weight(self, name: str, values: Value, format: str = "f32") -> str:
        """Codes are stored as they are; values in `format`, or in f32 to be quantised at load."""
        if isinstance(values, Quantised):
            self.arrays[name] = values
            return self.b.weight(name, values.shape, name, values.format)
        stored = "f32" if formats.get(format).grouped else format
        self.arrays[name] = values.astype(formats.get(stored).dtype)
        return self.b.weight(name, values.shape, name, format)

    def matrix(self, name: str, rows: int, cols: int, scale: float = 1.0) -> str:
        table = self.weight(name + ".table", self.rng.normal(size=(rows, cols)) * scale)
        return self.b.op(Embed, name, "tokens", table)

    def run(self, site: str, batch: Batch | None = None) -> dict[str, np.ndarray]:
        """The result at `site` by device: "reference" and each instruction set.

        Checks that 1 and 2 threads give the same bits.
        """
        last = self.b.op(Select, "select", self.x, "rows")
        head = self.weight("head", self.rng.normal(size=(max(self.rows, 8), int(self.b.tensors[last].shape[1]))))
        self.b.op(Linear, "lm_head", last, head, out="logits", role="output")
        self.b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
        program, weights = self.b.done(), ArrayWeights(self.arrays)
        state = StateSpec(64, PAGE)
        pages = -(-self.rows // PAGE)
        batch = batch or bind([Chunk(range(self.rows), 0, range(pages), [0])], PAGE)
        taps = [site]
        out = {
            "reference": ReferenceDevice().load(program, weights, state).step(StepRequest(batch, taps=taps)).taps[site]
        }
        for isa in ISAS:
            one, two = (
                HostDevice(n, isa).load(program, weights, state).step(StepRequest(batch, taps=taps)).taps[site]
                for n in (1, 2)
            )
            np.testing.assert_array_equal(one, two, err_msg=f"{isa}: 2 threads give other bits than 1")
            out[isa] = one
        return out


def hold(results: dict[str, np.ndarray], bound: np.ndarray | float) -> None:
    """Assert that every result is within `bound` of the reference."""
    for isa in ISAS:
        off = np.abs(results[isa].astype(np.float64) - results["reference"]) - bound
        assert (off <= 0).all(), (
            f"{isa}: off by {off.max():.3g} beyond its bound at {np.unravel_index(off.argmax(), off.shape)}"
        )


def finish(bench: Bench) -> Program:
    last = bench.b.op(Select, "select", bench.x, "rows")
    head = bench.weight("head", np.ones((bench.rows, int(bench.b.tensors[last].shape[1]))))
    bench.b.op(Linear, "lm_head", last, head, out="logits", role="output")
    bench.b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return bench.b.done()


SAMPLINGS = (Sampling(), Sampling(0.8, seed=11), Sampling(1.2, top_k=9, top_p=0.9, seed=12))


def run_single(ex: object, tokens: list[int], sampling: Sampling, pages: list[int]) -> tuple[np.ndarray, np.ndarray]:
    got = ex.step(StepRequest(bind([Chunk(tokens, 0, pages, range(len(tokens)), sampling)], PAGE), logits=True))  # type: ignore[attr-defined]
    return got.logits, got.tokens


def keep_company(program: Program, arrays: Weights, isa: str, rng: np.random.Generator, mixes: int = 50) -> None:
    """Run random batches and compare each sequence's bits with those of running it alone."""
    state = StateSpec(512, PAGE)
    single, team = (HostDevice(n, isa).load(program, arrays, state) for n in (1, 2))
    for mix in range(mixes):
        count = int(rng.integers(1, 6))
        longest = 640 if mix % 10 == 0 else 70  # some reach over a split of 512 positions
        lengths = [int(rng.integers(1, longest if i == 0 else 70)) for i in range(count)]
        sequences = [rng.integers(0, program.vocabulary, n).tolist() for n in lengths]
        samplings = [SAMPLINGS[int(rng.integers(3))] for _ in sequences]
        free = rng.permutation(512).tolist()
        pages = [[free.pop() for _ in range(-(-n // PAGE))] for n in lengths]
        want = [run_single(single, s, p, pages[0] + free) for s, p in zip(sequences, samplings, strict=True)]
        ex = team if rng.integers(2) else single
        done = [0] * count
        got: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in sequences]
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            going = [i for i in rng.permutation(count).tolist() if done[i] < lengths[i] and rng.integers(4)]
            if not going:
                continue
            sizes = {i: min(int(rng.choice([1, 3, 17, 200])), lengths[i] - done[i]) for i in going}
            chunks = [
                Chunk(sequences[i][done[i] : done[i] + n], done[i], pages[i], range(n), samplings[i])
                for i, n in sizes.items()
            ]
            step = ex.step(StepRequest(bind(chunks, PAGE), logits=True))
            assert step.logits is not None
            at = 0
            for i, n in sizes.items():
                got[i].append((step.logits[at : at + n], step.tokens[at : at + n]))
                done[i], at = done[i] + n, at + n
        for i in range(count):
            np.testing.assert_array_equal(
                np.concatenate([x for x, _ in got[i]]), want[i][0], err_msg=f"mix {mix}, logits"
            )
            np.testing.assert_array_equal(
                np.concatenate([t for _, t in got[i]]), want[i][1], err_msg=f"mix {mix}, tokens"
            )
