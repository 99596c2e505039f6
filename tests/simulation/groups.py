"""GroupWorld: simulates one seed of a group of ranks on several hosts, with its coordinator, agents, links and clients.

What runs is the shipped code: the engine, HostsExecutable, HostAgent, and the decisions in membership.py. Networks,
processes, heartbeats and the clock are simulated. A rank's result comes from the oracle, and carries in a tap which
coordinator, epoch, step and rank it is from. Long because one clock drives networks, processes and clients together.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.serving import VOCABULARY, smallest_program

from intaglio.batch import Sampling
from intaglio.devices import ArrayWeights, DeviceError, Executable, StateSpec, StepResult, open_device
from intaglio.devices.oracle import expected
from intaglio.devices.processes import link as frames
from intaglio.devices.processes import membership
from intaglio.devices.processes.agent import pack_messages
from intaglio.devices.processes.hosts import HostAgent, HostsExecutable
from intaglio.devices.processes.job import RankFacts
from intaglio.devices.processes.link import LinkLost
from intaglio.devices.processes.membership import BeatWatch, FrameOrder, OutOfOrder, Roster, Session, Silence
from intaglio.devices.processes.messages import Reader, RequestReader, pack, result_parts, text
from intaglio.runtime import Engine, Event, Request, SamplingParams, Sequence
from simulation.world import Violation

PROGRAM, STATE = smallest_program(), StateSpec(16, 4)
ORACLE = open_device("oracle")
KINDS = (
    "slow", "late", "kill", "hang", "agent dies", "power off", "pause", "cut", "cut one way", "cut data", "repeat",
    "coordinator dies", "coordinator's power off",
)  # fmt: skip
HARMLESS = {"slow", "late"}  # no loss may come of these
HOSTS, EACH = 2, 1  # hosts in a group, and ranks on each
TICK, COMPUTE, STEP_TIMEOUT, PATIENCE = 0.1, 0.03, 3.0, 10.0  # seconds
HEAL = 2.5  # seconds; from then on there are no faults
SETTLED = HEAL + 2.0  # from then on no group may fail
LATEST = SETTLED + 4.0  # by then everything has ended
EXIT_NOTICED, SILENCE_NOTICED = 0.5, 1.0  # seconds


class CoordinatorDied(BaseException):
    """Ends whatever the coordinator's process was doing. Not an Exception, because the engine catches those."""


@dataclass
class Mesh:
    """What HostsExecutable reads of a MeshProgram."""

    stages: int
    last: Any = PROGRAM
    programs: tuple[Any, ...] = (PROGRAM,) * (HOSTS * EACH)


class NoJob:
    """A job that no simulated rank reads."""

    def parts(self) -> list[np.ndarray]:
        return [np.zeros(1, np.int64)]

    def modules(self) -> list[str]:
        return []


class SimulatedCondition:
    """What code waits on: waiting lets simulated time pass."""

    def __init__(self, world: GroupWorld) -> None:
        self.world = world

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait_for(self, happened: Callable[[], bool], seconds: float) -> bool:
        self.world.advance(seconds, happened)
        return happened()


class End:
    """One end of a link, in place of a Link: the shipped frame order and silence over a simulated connection."""

    def __init__(self, world: GroupWorld, here: str, there: str, silence: float = frames.SILENCE) -> None:
        self.world, self.here, self.there = world, here, there
        self.order, self.quiet = FrameOrder(), Silence(silence, world.now)
        self.closed = threading.Event()
        self.inbox = list[tuple[int, bytes]]()
        self.take: Callable[[int, bytes], None] = lambda kind, payload: self.inbox.append((kind, payload))
        self.lose: Callable[[LinkLost], None] = lambda why: None
        self.peer: End
        self.unsent = list[Callable[[], None]]()  # the network carries nothing now
        self.arrival = 0.0  # of what was sent last
        self.handled = 0
        world.ends.append(self)

    def send(self, kind: int, payload: bytes = b"") -> None:
        if self.closed.is_set():
            raise LinkLost("closed")
        number = self.order.next_number()
        self.transmit(lambda: self.peer.deliver(kind, payload, number))
        if kind != membership.BEAT and self.world.repeats and self.world.rng.random() < 0.3:
            self.world.log(f"frame {number} of {self.here} is repeated")
            self.transmit(lambda: self.peer.deliver(kind, payload, number))

    def receive(self) -> tuple[int, bytes]:
        return self.inbox.pop(0)

    def transmit(self, arrive: Callable[[], None]) -> None:
        if (self.here, self.there) in self.world.cuts or self.unsent:
            self.unsent.append(arrive)
            return
        self.arrival = max(self.arrival, self.world.now + self.world.latency())
        self.world.at(self.arrival, arrive)

    def flush(self) -> None:
        """The network carries again what was held up."""
        held, self.unsent = self.unsent, []
        for arrive in held:
            self.transmit(arrive)

    def deliver(self, kind: int, payload: bytes, number: int) -> None:
        if self.closed.is_set():
            return
        if self.world.paused(self.here):
            self.world.at(self.world.pauses[self.here], lambda: self.deliver(kind, payload, number))
            return
        self.quiet.heard(self.world.now)
        try:
            self.order.check(number)
        except OutOfOrder as e:
            self.fail(str(e))
            return
        if number != self.handled:
            raise Violation(f"frame {number} is handled by {self.here}, {self.handled} was due")
        self.handled += 1
        if kind != membership.BEAT:
            self.take(kind, payload)

    def beat(self) -> None:
        if not self.closed.is_set() and not self.world.paused(self.here):
            self.send(membership.BEAT)
            if self.quiet.left(self.world.now) <= 0:
                self.fail(f"nothing came in {self.quiet.allowed:g} s")

    def fail(self, why: str) -> None:
        if not self.closed.is_set():
            self.close()
            self.lose(LinkLost(why))

    def close(self, silently: bool = False) -> None:
        """Close this end; the other learns of it, unless this end's host has no power."""
        if not self.closed.is_set():
            self.closed.set()
            if not silently:
                self.transmit(lambda: self.peer.fail("the other end closed the connection"))


class SimulatedRanks:
    """The ranks of one host in one epoch, in place of a HostGroup."""

    def __init__(self, host: Host, link: End, message: bytes) -> None:
        r = Reader(memoryview(message))
        facts: Any = r.text(int(r.array(np.int64, 1)[0]))
        self.host, self.link, self.world = host, link, host.world
        self.coordinator, self.epoch, self.ranks = host.coordinator, int(facts["epoch"]), list(facts["ranks"])
        self.running, self.stopped_at = True, dict[int, float]()
        self.oracle = ORACLE.load(PROGRAM, ArrayWeights({}), STATE)
        self.watch = BeatWatch(self.ranks, facts["silence"], TICK)
        self.peers = [name for name in self.world.members_of(self.epoch, self.coordinator) if name != host.name]
        self.busy, self.began = self.world.now, self.world.now
        self.parts, self.own = dict[int, set[str]](), dict[int, bytes]()
        if any(ranks.running for ranks in host.started):
            raise Violation(f"{host.name} starts epoch {self.epoch} while ranks of another run there")
        host.started.append(self)
        self.world.log(f"{host.name} starts ranks {self.ranks} of epoch {self.epoch}")
        self.world.after(self.world.rng.uniform(0.05, 0.15), self.loaded)
        self.world.after(TICK, self.look)

    def loaded(self) -> None:
        answer = pack(RankFacts("simulated", PROGRAM.hash).parts())
        self.send(membership.LOADED, bytes(8) + pack_messages([answer] * len(self.ranks)))

    def send(self, kind: int, message: bytes) -> None:
        if self.running and not self.link.closed.is_set():
            self.link.send(kind, self.epoch.to_bytes(8, "big") + message)

    def beats(self, rank: int) -> int:
        return 1 + int((self.stopped_at.get(rank, self.world.now) - self.began) / TICK)

    def look(self) -> None:
        """What the thread does that watches the ranks."""
        if self.running:
            if not self.world.paused(self.host.name):
                hung = self.watch.look({r: self.beats(r) for r in self.ranks}, lambda rank: rank in self.stopped_at)
                for rank in hung:
                    self.fail(f"rank {rank} hangs")
            self.world.after(TICK, self.look)

    def fail(self, why: str) -> None:
        self.send(membership.LOST, why.encode())
        self.stop()

    def stop(self) -> None:
        self.running = False

    def post(self, message: bytes) -> None:
        number = int.from_bytes(message[:8], "big")
        slow = 10.0 if self.host.name in self.world.slow else 1.0
        self.busy = max(self.busy, self.world.now) + COMPUTE * slow
        self.world.at(self.busy, lambda: self.compute(number, message[8:]))

    def compute(self, number: int, message: bytes) -> None:
        """The step's own part; a stopped rank stops all."""
        if not self.running or self.stopped_at:
            return
        if self.world.paused(self.host.name):
            self.world.at(self.world.pauses[self.host.name], lambda: self.compute(number, message))
            return
        request, answers = RequestReader().read(memoryview(message)), []
        none = np.zeros(len(request.batch.rows), np.int32)  # what ranks before the last answer is not used
        last = self.ranks[-1] == HOSTS * EACH - 1
        result = self.oracle.step(request) if last else StepResult(none, none.astype(np.float32), None)
        for rank in self.ranks:
            tag = np.array([self.coordinator, self.epoch, number, rank], np.float32)
            answers.append(pack(result_parts(StepResult(result.tokens, result.logprobs, None, {"from": tag}))))
        self.own[number] = pack_messages(answers)
        for peer in self.peers:
            self.world.data(self.host.name, peer, lambda peer=peer: self.world.hosts[peer].part(self, number))
        self.answer(number)

    def answer(self, number: int) -> None:
        if number in self.own and self.parts.get(number, set()) >= set(self.peers):
            self.send(membership.RESULT, number.to_bytes(8, "big") + self.own.pop(number))


@dataclass
class Host:
    """A host with an agent, which connects to the coordinator and does what that says."""

    world: GroupWorld
    name: str
    link: End | None = None
    session: Session | None = None
    started: list[SimulatedRanks] = field(default_factory=list)
    coordinator: int = 0
    dead: bool = False

    def connect(self) -> None:
        """What the agent does every RETRY seconds while it has no link."""
        world = self.world
        world.after(0.5, self.connect)
        lost = not self.link or self.link.closed.is_set()
        cut = {(self.name, "c"), ("c", self.name)} & world.cuts
        if self.dead or not lost or cut or not world.serving or world.paused(self.name):
            return
        mine, theirs = End(world, self.name, "c"), End(world, "c", self.name)
        mine.peer, theirs.peer = theirs, mine
        self.link, self.coordinator = mine, world.incarnation
        session = self.session = Session(lambda message: SimulatedRanks(self, mine, message))
        mine.take = session.take
        mine.lose = lambda why: session.end()
        theirs.take = lambda kind, message: world.greet(theirs, kind, message)
        mine.send(membership.HELLO, text({"name": self.name, "cores": 2, "address": [self.name, 1]}).tobytes())

    def part(self, sender: SimulatedRanks, number: int) -> None:
        """A part of a collective has come from another host's ranks. The communicator drops other epochs' parts."""
        if self.world.paused(self.name):
            self.world.at(self.world.pauses[self.name], lambda: self.part(sender, number))
            return
        for ranks in self.started:
            if ranks.running and (ranks.coordinator, ranks.epoch) == (sender.coordinator, sender.epoch):
                ranks.parts.setdefault(number, set()).add(sender.host.name)
                ranks.answer(number)

    def die(self, silently: bool) -> None:
        """All processes of the host end; the agent is started again later."""
        self.dead = True
        for ranks in self.started:
            ranks.running = False
        if self.link:
            self.link.close(silently)


class CheckedGroup(HostsExecutable):
    """The shipped group. Its results must come from its own ranks, in their order, and from the step that was asked."""

    world: GroupWorld

    def receive(self, number: int) -> StepResult:
        result = super().receive(number)
        tags = [tuple(map(int, result.taps[f"from@{r}"])) for r in range(HOSTS * EACH) if f"from@{r}" in result.taps]
        wanted = [(self.world.incarnation, self.epoch.number, number, r) for r in range(HOSTS * EACH)]
        if tags != wanted:
            raise Violation(f"results of {tags} are taken for {wanted}")
        return StepResult(result.tokens, result.logprobs, None)


class GroupWorld:
    """Runs one seed, with the classes as they are; group_mutants.py plants bugs in them."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now = random.Random(seed), 0.0
        self.lines, self.heap, self.pushed = list[str](), list[tuple[float, int, Callable[[], None]]](), 0
        self.ends, self.cuts, self.slow = list[End](), set[tuple[str, str]](), set[str]()
        self.pauses, self.late, self.repeats = dict[str, float](), False, False
        self.incarnation, self.serving, self.died = 0, False, False
        self.losses = 0
        self.struck = dict[str, float]()  # when a fault last struck a host
        self.groups = list[CheckedGroup]()  # all there were, so that none is collected at a moment that chance decides
        self.current: CheckedGroup | None = None
        self.live, self.ended = dict[str, Sequence](), dict[str, str]()
        self.members = dict[tuple[int, int], list[str]]()  # hosts by coordinator and epoch
        self.waiting, self.asked, self.seen = list[Request](), 0, dict[str, int]()
        names = ["a", "b", "s"][: self.rng.choice((2, 3, 3))]
        self.hosts = {name: Host(self, name) for name in names}
        self.stages = self.rng.choice((1, 2))
        swarm = [kind for kind in KINDS if self.rng.random() < 0.3]
        self.kinds = swarm or [self.rng.choice(KINDS)]
        self.harmless = set(self.kinds) <= HARMLESS
        for i, host in enumerate(self.hosts.values()):
            self.at(0.01 * i, host.connect)
        for _ in range(self.rng.randint(1, 4)):
            self.at(self.rng.uniform(0.2, HEAL - 0.2), lambda: self.disturb(self.rng.choice(self.kinds)))
        for _ in range(self.rng.randint(1, 4)):
            self.at(self.rng.uniform(0, HEAL), self.ask)
        self.at(HEAL, self.heal)
        self.at(SETTLED, self.ask)
        self.at(0.1, self.beat)

    def log(self, line: str) -> None:
        self.lines.append(f"{self.now:.4f} {line}")

    def at(self, time: float, action: Callable[[], None]) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (max(time, self.now), self.pushed, action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def paused(self, name: str) -> bool:
        return self.pauses.get(name, 0.0) > self.now

    def latency(self) -> float:
        return self.rng.uniform(0.001, 0.3 if self.late else 0.01)

    def data(self, here: str, there: str, arrive: Callable[[], None]) -> None:
        """What ranks send each other; TCP sends again what the network swallows."""
        if (here, there) in self.cuts:
            self.after(0.2, lambda: self.data(here, there, arrive))
        else:
            self.after(self.latency(), arrive)

    def beat(self) -> None:
        """All ends send their heartbeats and look whether they heard of the others."""
        self.ends = [end for end in self.ends if not end.closed.is_set() or end.unsent]
        for end in list(self.ends):
            end.beat()
        self.after(frames.INTERVAL, self.beat)

    def members_of(self, epoch: int, coordinator: int) -> list[str]:
        return self.members[coordinator, epoch]

    # The coordinator

    def start(self) -> None:
        """Start a coordinator's process: a roster, and an engine once the first group has formed."""
        self.incarnation += 1
        self.serving, self.died, self.current = True, False, None
        self.roster: Roster[HostAgent] = Roster()
        self.epochs = itertools.count(1)
        self.engine: Engine | None = None
        self.log(f"coordinator {self.incarnation} starts")
        self.engine = Engine(
            self.form(None), clock=lambda: self.now, rng=random.Random(self.incarnation), restart=self.restart,
            max_batch_tokens=16, max_sequences=4, max_waiting=16, max_drafts=0, max_restarts=5,
        )  # fmt: skip

    def greet(self, end: End, kind: int, message: bytes) -> None:
        end.inbox.append((kind, message))
        agent = HostAgent(end)  # type: ignore[arg-type]
        end.take, end.lose = agent.take, agent.lose
        self.roster.add(agent)

    def form(self, lost: CheckedGroup | None) -> CheckedGroup:
        self.advance(PATIENCE, lambda: bool(self.roster.choose(HOSTS)))
        agents = self.roster.choose(HOSTS)
        if not agents:
            raise DeviceError(f"{HOSTS} hosts are wanted")
        number = next(self.epochs)
        self.members[self.incarnation, number] = [agent.name for agent in agents]
        self.log(f"epoch {number} of {[agent.name for agent in agents]}")
        CheckedGroup.world = self
        group = CheckedGroup(
            agents, Mesh(self.stages), [[NoJob()] * EACH] * HOSTS, STATE, STEP_TIMEOUT, 0.7,  # type: ignore[arg-type, list-item]
            lost, news=SimulatedCondition(self), epoch=number,  # type: ignore[arg-type]
        )  # fmt: skip
        self.groups.append(group)
        self.current = group
        return group

    def restart(self) -> Executable:
        lost = self.current
        assert lost
        self.losses += 1
        self.log(f"lost: {lost.epoch.failed}")
        if self.harmless:
            raise Violation(f"nothing but {self.kinds} happened, and the group was lost: {lost.epoch.failed}")
        if self.now > SETTLED:
            raise Violation(f"a group is lost when nothing fails any more: {lost.epoch.failed}")
        return self.form(lost)

    def die(self, silently: bool) -> None:
        """The coordinator's process ends; another starts a moment later."""
        if not self.serving:
            return
        self.serving, self.died = False, True
        for end in list(self.ends):
            if end.here == "c":
                end.close(silently)

    # Faults

    def disturb(self, kind: str) -> None:
        name = self.rng.choice(list(self.hosts))
        host, seconds = self.hosts[name], self.rng.uniform(0.1, 2.0)
        if host.dead and kind in ("kill", "hang", "agent dies", "power off", "pause"):
            return  # nothing runs there that could fail
        self.struck[name] = self.now
        self.log(f"{kind}: {name}, {seconds:.2f} s")
        until = min(self.now + seconds, HEAL)
        lasts = until - self.now > SILENCE_NOTICED + 0.1
        match kind:
            case "slow":
                self.slow.add(name)
                self.at(until, lambda: self.slow.discard(name))
            case "late":
                self.late = True
                self.at(until, lambda: setattr(self, "late", False))
            case "kill" | "hang":
                self.hurt(host, kind)
            case "agent dies" | "power off":
                self.expect(name, EXIT_NOTICED if kind == "agent dies" else SILENCE_NOTICED, kind)
                host.die(silently=kind == "power off")
                self.at(until, lambda: setattr(host, "dead", False))
            case "pause":
                self.pauses[name] = until
                if lasts:
                    self.expect(name, SILENCE_NOTICED, kind)
            case "cut" | "cut one way" | "cut data":
                peer = "c" if kind != "cut data" else next((n for n in self.hosts if n != name), "c")
                ways = [(name, peer), (peer, name)]
                cut = set(ways if kind == "cut" else [self.rng.choice(ways)])
                self.cuts |= cut
                self.at(until, lambda: self.mend(cut))
                if lasts and peer == "c":
                    self.expect(name, SILENCE_NOTICED, kind)
            case "repeat":
                self.repeats = True
                self.at(min(self.now + 0.1, HEAL), lambda: setattr(self, "repeats", False))
            case "coordinator dies" | "coordinator's power off":
                self.die(silently=kind != "coordinator dies")

    def hurt(self, host: Host, kind: str) -> None:
        """Kill or stop one of the ranks that run on a host."""
        for ranks in host.started:
            if ranks.running and kind == "kill":
                self.after(0.005, lambda ranks=ranks: ranks.running and ranks.fail("a rank exited"))
                self.expect(host.name, EXIT_NOTICED, kind)
            elif ranks.running:
                ranks.stopped_at.setdefault(self.rng.choice(ranks.ranks), self.now)
                self.expect(host.name, SILENCE_NOTICED, kind)

    def expect(self, name: str, seconds: float, kind: str) -> None:
        """The group in use, of which this host is a member, must have failed after so many seconds."""
        group = self.current
        paused = any(until > self.now for until in self.pauses.values()) and kind != "pause"
        if not group or group.epoch.failed or self.died or self.late or self.cuts or paused:
            return
        if name not in self.members_of(group.epoch.number, self.incarnation):
            return
        incarnation, began = self.incarnation, self.now
        self.struck[name] = began

        def check() -> None:
            disturbed = self.late or self.incarnation != incarnation or not self.serving or self.struck[name] > began
            if not group.epoch.failed and not disturbed and not self.pauses_since(began, kind):
                raise Violation(f"{kind} of {name} is not noticed in {seconds} s")

        self.after(seconds, check)

    def pauses_since(self, began: float, kind: str) -> bool:
        """True if agents have stood still since, so that they notice later."""
        return kind != "pause" and any(until > began for until in self.pauses.values())

    def mend(self, cut: set[tuple[str, str]]) -> None:
        self.cuts -= cut
        for end in self.ends:
            if (end.here, end.there) in cut:
                end.flush()

    def heal(self) -> None:
        self.log("everything is healed")
        self.mend(set(self.cuts))
        self.slow.clear()
        self.late = self.repeats = False
        for host in self.hosts.values():
            host.dead = False

    # Clients

    def ask(self) -> None:
        self.asked += 1
        rng, id = self.rng, f"r{self.asked}"
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 6), temperature=rng.choice((0.0, 0.9)), seed=rng.randrange(99), ignore_eos=True
        )
        self.log(f"ask {id} {prompt} {params.max_tokens}")
        self.waiting.append(Request(id, prompt, params))

    def admit(self) -> None:
        assert self.engine
        for request in self.waiting:
            [self.live[request.id]] = self.engine.add(request)
        self.waiting.clear()

    def take(self, events: list[Event]) -> None:
        for e in events:
            self.log(str(e.token) if e.finish_reason is None else f"{e.request} {e.token} {e.finish_reason}")
            if e.request not in self.live:
                raise Violation(f"an event for what has ended or never was: {e}")
            s = self.live[e.request]
            if e.token is not None:
                before, p = s.output[: self.seen.get(e.request, 0)], s.request.params
                right = expected([*s.prompt, *before], VOCABULARY, Sampling(p.temperature, seed=s.seed))
                if e.token != right:
                    raise Violation(f"{e.request} gets {e.token} after {before}, undisturbed it would get {right}")
                self.seen[e.request] = len(before) + 1
            if e.finish_reason is not None:
                if e.finish_reason != "length" and (self.harmless or self.now > SETTLED):
                    raise Violation(f"{e.request} ends with {e.finish_reason}: {e.fault}")
                self.end(e.request, e.finish_reason)

    def end(self, id: str, why: str) -> None:
        if id in self.ended:
            raise Violation(f"{id} ends twice")
        self.ended[id] = why
        del self.live[id]

    # Time

    def advance(self, seconds: float, until: Callable[[], bool]) -> None:
        """Let time pass until something is so, or for so many seconds."""
        end = self.now + seconds
        while not until():
            if not self.heap or self.heap[0][0] > end:
                self.now = end
                return
            self.now, _, action = heapq.heappop(self.heap)
            action()
            if self.died:
                raise CoordinatorDied

    def run(self) -> None:
        """Run until all is done. Raises Violation, or an exception that the shipped code should not have raised."""
        self.log(f"{self.kinds} on {list(self.hosts)}, {self.stages} stages")
        while True:
            try:
                self.start()
                self.serve()
                break
            except CoordinatorDied:
                pass
            except DeviceError as e:  # the first group did not form
                self.log(f"not started: {e}")
                if self.now > SETTLED:
                    raise Violation(f"no group forms when nothing fails any more: {e}") from None
                self.die(silently=False)
            self.log(f"coordinator {self.incarnation} has died")
            for id in list(self.live):
                self.end(id, "lost")
            self.died = False
            self.advance(0.3, lambda: False)
        self.finish()

    def serve(self) -> None:
        assert self.engine
        while self.now <= LATEST:
            if self.engine.failed:
                self.log(f"the engine gives up: {self.engine.failed}")
                if self.now > SETTLED:
                    raise Violation(f"the engine gives up when nothing fails any more: {self.engine.failed}")
                self.die(silently=False)
                raise CoordinatorDied
            self.admit()
            if self.engine.idle:
                if self.now > SETTLED and not self.waiting:
                    return
                self.advance(0.1, lambda: bool(self.waiting))
            else:
                self.take(self.engine.step())
        raise Violation(f"{sorted(self.live)} have not ended at {self.now:.2f} s")

    def finish(self) -> None:
        """Close the group; nothing may be left running, and everything must have ended once."""
        assert self.engine
        if self.live or len(self.ended) != self.asked or self.ended[f"r{self.asked}"] != "length":
            raise Violation(f"{self.asked} requests, ended are {self.ended}")
        self.engine.executable.close()
        self.advance(1.2, lambda: False)
        left = [f"epoch {r.epoch} on {h.name}" for h in self.hosts.values() for r in h.started if r.running]
        if left:
            raise Violation(f"ranks are left running: {left}")
        self.log(f"{self.losses} losses, {self.incarnation} coordinators")
