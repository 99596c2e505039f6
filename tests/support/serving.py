"""An engine on the oracle device, and a run of it that checks the invariants. Used by tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from intaglio.batch import Sampling
from intaglio.devices import ArrayWeights, DeviceError, StateSpec, StepRequest, open_device
from intaglio.devices.oracle import expected
from intaglio.ops import Attend, Embed, KvWrite, Linear, Sample, Select
from intaglio.program import Builder, Program
from intaglio.runtime import Engine, Event, RecordedEngine, Request, SamplingParams, Sequence, check_invariants
from intaglio.runtime.request import TokenIds
from intaglio.runtime.sampling import edits

VOCABULARY, CONTEXT = 97, 64


def smallest_program(context: int = CONTEXT) -> Program:
    """One layer of attention over an embedding."""
    b = Builder("smallest", context)
    b.weight("embed.weight", (VOCABULARY, 8), "embed")
    x = b.op(Embed, "embed", "tokens", "embed.weight")
    k, v = b.cache("layers.0.k_cache", 1, 8, "f32"), b.cache("layers.0.v_cache", 1, 8, "f32")
    b.op(KvWrite, "layers.0.kv_write", x, x, k, v)
    x = b.op(Attend, "layers.0.attend", x, k, v, heads=1, scale=1.0)
    x = b.op(Select, "select", x, "rows")
    b.op(Linear, "lm_head", x, "embed.weight", out="logits", role="output")
    b.op(Sample, "sample", "logits", tokens="next_tokens", logprobs="logprobs", role="output")
    return b.done()


def oracle_engine(
    pages: int = 16, page_tokens: int = 4, seed: int = 0, slots: int = 0, windows: tuple[int, int] = (0, 0),
    **options: Any,
) -> Engine:  # fmt: skip
    """An engine on the oracle device with a clock that advances by 1 at each reading."""
    state = StateSpec(pages, page_tokens, slots, *windows)
    executable = open_device("oracle").load(smallest_program(), ArrayWeights({}), state)
    ticks = iter(range(10**9))
    engine = RecordedEngine if "journal" in options else Engine
    return engine(executable, rng=random.Random(seed), clock=lambda: float(next(ticks)), **options)


def request(id: str, prompt: TokenIds, eos: frozenset[int] = frozenset(), **options: Any) -> Request:
    """A Request of these fields; any other option is one of SamplingParams."""
    own = {f.name for f in fields(Request)}
    params = SamplingParams(**{name: value for name, value in options.items() if name not in own})
    return Request(id, list(prompt), params, eos, **{name: value for name, value in options.items() if name in own})


def add(engine: Engine, *requests: Request) -> list[Sequence]:
    """Queue requests. Returns the sequences of all their choices."""
    return [s for r in requests for s in engine.add(r)]


def truth(s: Sequence) -> list[int]:
    """The output that the oracle defines for the sequence, from its token ids alone."""
    output: list[int] = []
    p = s.request.params
    for _ in s.output:
        drawn = Sampling(p.temperature, p.top_k, p.top_p, p.min_p, s.seed, edits(p, s.prompt, output))
        output.append(expected([*s.prompt, *output], VOCABULARY, drawn))
    return output


def run_checked(engine: Engine) -> list[Event]:
    """Step until idle, checking the invariants after every step. Returns all events."""
    events = []
    while not engine.idle:
        events += engine.step()
        check_invariants(engine)
    return events


def fail_after_work(engine: Engine, when: Callable[[StepRequest], Any]) -> Engine:
    """The engine, whose executable raises DeviceError after the work of each step for which `when` is true."""
    run = engine.executable.run  # type: ignore[attr-defined]

    def fails(step: StepRequest) -> Any:
        result = run(step)
        if when(step):
            raise DeviceError("planted, after the work")
        return result

    engine.executable.run = fails  # type: ignore[attr-defined]
    return engine
