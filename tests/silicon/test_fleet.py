"""Many replicas event by event: each does what it would do alone with its requests, and the router balances them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence

import pytest

from intaglio.chips import target
from intaglio.codesign.fleet import ROUTES, Member, choice, serve_fleet, simulate_fleet
from intaglio.codesign.placement import Placement
from intaglio.codesign.queue import Queue, QueueSettings, serve
from intaglio.codesign.serving import EngineSettings, Limits
from intaglio.codesign.simulate import ported
from intaglio.codesign.steps import Formats, Server
from intaglio.measure.workload import LoadRequest
from intaglio.router import Job, Router


class Linear:
    """Step costs that grow with sequences, keys and prompt tokens, for tests of the queues alone."""

    copies = 1

    def cost(self, decoding: int, context: float, chunks: Sequence[tuple[int, int, int]] = ()) -> tuple[float, float]:
        tokens = sum(q * n for q, _, n in chunks)
        return 1e-3 + 1e-5 * decoding + 1e-9 * decoding * context + 2e-5 * tokens, 1.0 + tokens


def load_of(rng: random.Random, count: int, rate: float) -> list[LoadRequest]:
    at, out = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        out.append(LoadRequest(at, rng.randrange(1, 900), rng.choice((1, rng.randrange(1, 300)))))
    return out


def test_each_replica_serves_its_requests_as_a_lone_server_would() -> None:
    rng = random.Random()
    replicas, rate = rng.randrange(1, 6), rng.uniform(1, 60)
    settings = QueueSettings(rng.randrange(3000, 20000), 512, rng.randrange(2, 40), step_s=1e-4)
    load = load_of(rng, 150, rate)
    found = serve_fleet(Linear(), settings, load, replicas, "round-robin")
    alone = [serve(Linear(), settings, load[i::replicas]) for i in range(replicas)]
    assert found.outcomes == tuple(one.outcomes for one in alone)
    assert found.steps == sum(one.steps for one in alone)
    assert found.joules == pytest.approx(sum(one.joules for one in alone))


def test_all_requests_end_and_the_router_balances() -> None:
    """Each request ends once; of two routers the one that sees open requests leaves no replica idle for long."""
    rng = random.Random()
    settings = QueueSettings(10**6, 512, 256)
    load = load_of(rng, 400, 200.0)
    for route in ROUTES:
        found = serve_fleet(Linear(), settings, load, 4, route)
        assert sorted(o.request.at for o in found.all) == [r.at for r in load]
        assert all(0 <= (o.first or 0) <= o.end for o in found.all)
    with pytest.raises(ValueError, match="route 'x'; use one of least-open, round-robin"):
        serve_fleet(Linear(), settings, load, 4, "x")
    same = [LoadRequest(0.0, 100, 50)] * 12  # at one time: each of four replicas gets three
    assert [len(mine) for mine in serve_fleet(Linear(), settings, same, 4).outcomes] == [3, 3, 3, 3]


def test_round_robin_is_that_of_the_shipped_router() -> None:
    rng = random.Random()
    count, replicas = rng.randrange(1, 60), rng.randrange(1, 9)
    router = Router("round-robin")
    for i in range(replicas):
        router.add_replica(str(i))
        router.ready(str(i), str(i))
    chosen = []
    for i in range(count):
        router.submit(Job(str(i)), 0.0)
        chosen += [int(placed.replica) for placed in router.dispatch(0.0)]
    members = [Member(i, Queue(Linear(), QueueSettings(1))) for i in range(replicas)]
    assert chosen == [choice("round-robin")(members, i).number for i in range(count)]


def test_a_placement_with_replicas_is_simulated() -> None:
    """Twice the replicas for twice the load: about the same latencies, twice the rate, the same watts a chip."""
    program = ported("llama-3-8b", None)
    on, settings = target("h100_sxm"), EngineSettings()
    results = []
    for replicas in (2, 4):
        server = Server.of(program, Placement.parse(f"dp{replicas}tp1"), Formats("fp8"))
        load = [LoadRequest(i / replicas, 300, 40) for i in range(20 * replicas)]
        results.append(simulate_fleet(server, on, load, settings, Limits(tpot=10.0)))
    two, four = results
    assert (two.chips, four.chips, two.within_limits) == (2, 4, 1.0)
    assert four.summary.output_tokens_per_s == pytest.approx(2 * two.summary.output_tokens_per_s, rel=0.1)
    assert four.watts_per_chip == pytest.approx(two.watts_per_chip, rel=0.1)
    with pytest.raises(ValueError, match="scale the lengths down"):
        simulate_fleet(server, on, [LoadRequest(0.0, 10**6, 1)], settings, Limits())


def test_a_target_finds_its_times_again_in_another_process() -> None:
    """Equal targets have equal hashes, and a pickled one does not carry its hash."""
    on = target("h100_sxm")
    again = pickle.loads(pickle.dumps(on))
    assert hash(on) == hash(again) and on == again
    assert "_hash" in vars(on) and "_hash" not in vars(pickle.loads(pickle.dumps(on)))
