"""ServedModel: one model of a server, with its engine's driver, its metrics and its vocabulary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.devices.processes.address import TcpAddress
from intaglio.llm import LLM
from intaglio.runtime import Request
from intaglio.server.driver import Driver, Submission
from intaglio.server.metrics import Metrics
from intaglio.server.problem import Problem
from intaglio.server.tracing import trace_choices
from intaglio.server.vocabulary import Vocabulary
from intaglio.tiers import PeerTier


class ServedModel:
    """A model under the name that clients request, with its engine and the driver that runs the engine.

    It is created and used on the event loop.

    llm: the model and its engine. metrics: the server's metrics, to which the model is added. defaults: values of
    SamplingParams fields for requests that do not give these fields.
    """

    def __init__(self, name: str, llm: LLM, metrics: Metrics, defaults: Mapping[str, Any]) -> None:
        self.name, self.llm, self.defaults = name, llm, defaults
        facts = {"block_size": str(llm.state.page_tokens), "num_gpu_blocks": str(llm.state.pages)}
        tier = llm.tier.counts if llm.tier else None
        clock = llm.clock if llm.modelled else None
        series = metrics.add_model(name, lambda: self.driver.snapshot, facts, clock, tier)
        self.driver = Driver(llm.engine, series.watch)
        self.vocabulary = Vocabulary(llm.model.tokenizer)

    @property
    def broken(self) -> str | None:
        """The reason why the model can no longer serve requests, such as a crashed engine; None while it can."""
        if self.driver.crash is not None:
            return f"the engine crashed: {self.driver.crash}"
        return self.driver.snapshot.gauges.failed

    @property
    def identity(self) -> tuple[str, str, str]:
        """Three texts (program, numerics, scope). Two replicas give bitwise equal results if all three are equal.

        program: hash of the Program, the compiled model. numerics: the device and what decides its rounding, such as
        "host avx2 tp2". scope: digest of everything that the K/V cache depends on, which includes the weights and the
        version of this package.
        """
        engine = self.driver.engine
        return engine.scope.program, engine.numerics, engine.scope.digest

    def block_names(self, prompt: Sequence[int], salt: str | None) -> dict[str, Any]:
        """Returns a dict with the K/V block size (`block_size`) and the cache keys of a prompt's full blocks (`names`).

        The block size is in tokens. The cache keys are a list. A router uses the dict to estimate how
        much of later prompts this replica has cached. salt: the request's cache salt, or None.
        """
        names = self.driver.engine.block_names
        return {"block_size": names.block_size, "names": names.of(prompt, salt)}

    def announce(self, requests: Sequence[Request], peer: str) -> None:
        """Tell the engine that a peer has the full K/V blocks of these requests' prompts. Returns nothing.

        The engine fetches the blocks from the peer when it needs them. Nothing is done if this model does not fetch
        blocks from peers, or if it is the peer itself.

        peer: address of the peer, as text. Raises ValueError if the text is not an address.
        """
        if isinstance(tier := self.llm.tier, PeerTier):
            names = self.driver.engine.block_names
            address = TcpAddress.parse(peer, tier.address.token.decode())
            if address != tier.address:
                tier.announce([name for r in requests for name in names.of(r.prompt, r.salt)], address)

    @property
    def saves_blocks(self) -> bool:
        """True if the engine saves K/V blocks to a tier (a store from which they can be loaded later)."""
        return self.driver.engine.offload.connector is not None

    def hanging(self, seconds: float) -> str | None:
        """Returns an error message if the engine's current step has taken at least `seconds`; None otherwise."""
        s = self.driver.snapshot
        silent = time.monotonic() - s.beat
        return None if s.idle or silent < seconds else f"the engine has been in one step for {silent:.0f} s"

    def refusal(self) -> Problem | None:
        """Returns the error (status 503) that a new request for this model would get; None if it would be admitted.

        A request is refused if the engine has failed or its queue is full. Whether the server is shutting down is not
        checked.
        """
        if self.broken:
            return Problem(503, self.broken, code="failed", retry_after=1)
        waiting, most = self.driver.snapshot.gauges.waiting, self.llm.admission.max_waiting
        if waiting >= most:
            why = f"{waiting} choices are waiting, max_waiting is {most}"
            return Problem(503, why, code="queue_full", retry_after=1)
        return None

    def card(self, created: int) -> dict[str, Any]:
        """Returns the entry for this model in the list of GET /v1/models, as a dict.

        created: Unix time in seconds, for the entry's field of this name.
        """
        model = self.llm.model
        facts = {"id": self.name, "object": "model", "created": created, "owned_by": "intaglio"}
        return {**facts, "root": model.path.name, "parent": None, "max_model_len": model.program.context}

    def trace(self, submission: Submission) -> None:
        """Record the phases queue, prefill and decode of each ended choice as spans of the request's trace.

        Nothing is recorded if the request is not traced, or if the device's time is modelled, since modelled times
        cannot be combined with the times of other spans. Choices that ended on another replica are left out. Returns
        nothing.
        """
        if not self.llm.modelled:
            elsewhere = {d.choice for d in submission.earlier if d.usage}
            here = {i: u for i, u in enumerate(submission.usages) if u and i not in elsewhere}
            trace_choices(here, self.name, self.llm.clock())

    def state(self, since: int) -> dict[str, Any]:
        """Returns a dict for GET /state: this model's queue, K/V cache, totals, and the steps after step `since`."""
        s, tokenizer = self.driver.snapshot, self.llm.model.tokenizer
        steps = [r for r in list(self.driver.steps) if r.number > since]
        return {
            "model": self.name,
            "chat": bool(tokenizer and tokenizer.template),
            "context": self.llm.model.program.context,
            "clock": self.llm.clock(),
            "modelled": self.llm.modelled,
            "running": s.gauges.running,
            "waiting": s.gauges.waiting,
            "blocks": s.gauges.blocks,
            "blocks_held": s.gauges.blocks_held,
            "blocks_cached": s.gauges.blocks_cached,
            "output_tokens": s.counts.output_tokens,
            "computed_tokens": s.counts.computed_tokens,
            "draining": s.gauges.draining,
            "steps": [[r.number, r.began, r.seconds, r.prefill_tokens, r.decode_tokens, r.sequences] for r in steps],
        }
