"""Cluster: replica processes of one model, started, supervised, drained and scaled, behind one router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intaglio.cluster.backends import Backends
from intaglio.cluster.link import LinkLost
from intaglio.cluster.process import Launched, ReplicaFailed
from intaglio.router import Autoscaler, Role

log = logging.getLogger("intaglio.cluster")
BACKOFF_FIRST, BACKOFF_MAX = 0.1, 10.0  # seconds before a replica that ended is started again
DRAIN_TIMEOUT = 600.0  # seconds that a drained replica's last requests may take
AUTOSCALE = 1.0  # seconds between decisions of the autoscaler
TIDY = 10.0  # seconds between looks at the lengths of logs
MAX_REPLICAS = 64
INCIDENTS, INCIDENT = 50, 200  # kept for state(): their number, and most characters of each
INITIALS: Mapping[Role, str] = {"mixed": "r", "prefill": "p", "decode": "d"}


class Cluster:
    """Replica processes of one model, with the names r0, r1, ...

    With separate replicas for prefill and decode the names are p0, p1, ... and d0, d1, ...

    Args:
        backends: the router with its links to the replicas.
        launch: function that makes the process of a replica from its name and role, and does not start it yet.
        autoscaler: decides how many replicas there are, if they are all of one role; None: only scale() changes that.
    """

    def __init__(
        self, backends: Backends, launch: Callable[[str, Role], Launched], autoscaler: Autoscaler | None = None
    ) -> None:
        self.backends, self.launch, self.autoscaler = backends, launch, autoscaler
        self.processes: dict[str, Launched] = {}
        self.restarts: dict[str, int] = {}
        self.roles: tuple[Role, ...] = ("mixed",)
        self.since = time.time()
        self.incidents: deque[tuple[float, str]] = deque(maxlen=INCIDENTS)  # (time of day in seconds, what happened)
        self.stopping = False
        self._supervisors: dict[str, asyncio.Task[None]] = {}
        self._starting: dict[str, asyncio.Future[None]] = {}  # first starts of replicas
        self._leaving: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers: Counter[Role] = Counter()
        self._changing = asyncio.Lock()
        backends.on_lost = self._lost

    async def start(self, replicas: Mapping[Role, int]) -> None:
        """Start replicas and wait until all serve. Returns nothing. Call it once, before all other methods.

        replicas: number of replicas of each role. If a replica does not start, ReplicaFailed is raised; the other
        replicas keep running until stop().
        """
        self.roles = tuple(replicas)
        self.backends.start()
        self._tasks.append(asyncio.ensure_future(self._tidy()))
        async with self._changing:
            await self._started(self._enrol([role for role, n in replicas.items() for _ in range(n)]))
        if self.autoscaler:
            self._tasks.append(asyncio.ensure_future(self._autoscale(self.autoscaler)))

    async def scale(self, replicas: int, role: Role | None = None) -> None:
        """Start or drain replicas of one role until the cluster has `replicas` of them. Returns nothing.

        role: the role; None stands for "decode" if the cluster has separate replicas for prefill and decode, else for
        "mixed". Raises ValueError for a number outside 1..MAX_REPLICAS and for a role that the cluster does not have.
        Raises ReplicaFailed if a replica does not start, or is drained before it serves.
        """
        if not 1 <= replicas <= MAX_REPLICAS:
            raise ValueError(f"{replicas} replicas; allowed: 1 to {MAX_REPLICAS}")
        async with self._changing:
            role = role or next(r for r in self.roles if r != "prefill")
            if role not in self.roles:
                raise ValueError(f"the cluster has no {role} replicas; allowed: {', '.join(self.roles)}")
            names = [name for name in self.processes if self.backends.router.replicas[name].role == role]
            starts = self._enrol([role] * (replicas - len(names)))
            await self._remove(names[replicas:][::-1])
        await self._started(starts)  # which may take long: others may be drained meanwhile

    async def drain(self, name: str, restart: bool = False) -> int:
        """Move a replica's requests to other replicas and stop the replica. If `restart` is True, start it again.

        Returns the number of requests that the replica had when draining began. Raises ValueError if there is no such
        replica, or no other replica to take its requests. Raises ReplicaFailed if the replica does not start again.
        """
        async with self._changing:
            if name not in self.processes or name in self._leaving:
                raise ValueError(f"there is no replica {name!r}; there are {', '.join(self.processes) or 'none'}")
            others = [r for r in self.backends.router.replicas.values() if r.placeable and r.name != name]
            if not others:
                raise ValueError(
                    f"no other replica than {name} takes requests; start one with `intaglio cluster scale`"
                )
            role = self.backends.router.replicas[name].role
            moved = await self._remove([name])
            starts = {name: self._enrol_one(name, role)} if restart else {}
        await self._started(starts)
        return moved

    async def stop(self) -> None:
        """End all replicas at once, without draining them, and close the links to them."""
        self.stopping = True
        tasks = [*self._supervisors.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self.processes.values()))
        await self.backends.close()

    def state(self) -> dict[str, Any]:
        """Returns a dict for JSON: state, load and restarts of each replica, and queue and counts of the router."""
        router = self.backends.router
        replicas = []
        for name, process in self.processes.items():
            view = router.replicas.get(name)
            if view is None:
                continue
            report = view.report
            replicas.append({
                "name": name, "role": view.role, "node": process.node, "pid": process.pid, "state": view.state,
                "requests": len(view.jobs),
                "running": report.running, "waiting": report.waiting, "kv_usage": report.kv_usage,
                "cached_tokens": report.cached_tokens, "prompt_tokens": report.prompt_tokens,
                "output_tokens": report.output_tokens, "restarts": self.restarts.get(name, 0),
            })  # fmt: skip
        return {
            "replicas": replicas, "queued": len(router.queue), "policy": router.policy,
            "moves": dict(self.backends.moves), "prefills": dict(self.backends.prefills),
            "refused": dict(router.refused), "seconds": time.time() - self.since,
            "incidents": [{"at": at, "what": what} for at, what in self.incidents],
        }  # fmt: skip

    def _note(self, what: str, level: int = logging.ERROR, error: Exception | None = None) -> None:
        """Log an event of a replica, and add it to the list of incidents that state() shows. Returns nothing.

        If the text has several lines, the list gets only the first line, because every tenant may read the list.

        Args:
            what: the text that describes the event.
            level: level of the log entry.
            error: an error whose traceback is logged, too; None: no traceback.
        """
        log.log(level, "%s", what, exc_info=error)
        self.incidents.append((time.time(), what.partition("\n")[0][:INCIDENT]))

    def _enrol(self, roles: Sequence[Role]) -> dict[str, asyncio.Future[None]]:
        """Add one new replica for each of `roles`, and begin to start the replicas.

        Returns a dict {name of the replica: asyncio future}. The future is done once the replica serves; it has the
        error if the replica does not start. _started() waits for all of these futures.
        """
        starts: dict[str, asyncio.Future[None]] = {}
        for role in roles:
            name = f"{INITIALS[role]}{self._numbers[role]}"
            self._numbers[role] += 1
            starts[name] = self._enrol_one(name, role)
        return starts

    def _enrol_one(self, name: str, role: Role) -> asyncio.Future[None]:
        self.backends.router.add_replica(name, role)
        self.processes[name] = self.launch(name, role)
        start = self._starting[name] = asyncio.ensure_future(self._start_one(name))
        return start

    async def _started(self, starts: Mapping[str, asyncio.Future[None]]) -> None:
        """Wait until each of the replicas in `starts` serves or has failed to start. Returns nothing.

        If replicas fail, the error of the first of them is raised. For a replica that was removed before it served, the
        error is ReplicaFailed.

        starts: {name of the replica: asyncio future that is done when the replica serves}.
        """
        results = await asyncio.gather(*starts.values(), return_exceptions=True)
        for name, result in zip(starts, results, strict=True):
            if isinstance(result, asyncio.CancelledError):
                raise ReplicaFailed(f"replica {name} was removed before it served")
            if isinstance(result, BaseException):
                raise result

    async def _start_one(self, name: str) -> None:
        """Start a replica and wait until it serves. Returns nothing.

        If the start fails or is cancelled, the replica is removed and the error, such as ReplicaFailed, is raised.
        """
        process = self.processes[name]
        try:
            await self.backends.attach(name, await process.start())
        except BaseException:
            process.kill()
            del self.processes[name]
            self.backends.forget(name)
            await process.stop()
            raise
        finally:
            self._starting.pop(name, None)
        self._supervisors[name] = asyncio.ensure_future(self._supervise(name, process))

    async def _remove(self, names: Sequence[str]) -> int:
        """Drain the replicas `names`, all at the same time, and stop their processes.

        Each replica has up to DRAIN_TIMEOUT seconds in which its requests can end. Returns the number of requests that
        the replicas had, all together, when draining began.
        """
        self._leaving.update(names)
        try:
            moved = sum([self.backends.drain(name) for name in names])
            if names:
                self._note(f"{', '.join(names)}: drained; {moved} requests move to other replicas", logging.INFO)
            await asyncio.gather(*map(self._stop_drained, names))
        finally:
            self._leaving.difference_update(names)
        return moved

    async def _stop_drained(self, name: str) -> None:
        """Wait until a replica has no requests, at most DRAIN_TIMEOUT seconds. Then stop the replica and forget it.

        name: name of a replica that is given no more requests. If the replica is still being started, the start is
        cancelled and the process is killed at once.
        """
        if start := self._starting.get(name):
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        if name not in self.processes:
            return
        await self.backends.emptied(name, DRAIN_TIMEOUT)
        supervisor = self._supervisors.pop(name)
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        await self.processes.pop(name).stop()
        if link := self.backends.links.get(name):
            await link.close()
        self.backends.forget(name)
        self.restarts.pop(name, None)

    async def _autoscale(self, autoscaler: Autoscaler) -> None:
        """Start and remove replicas as `autoscaler` decides, every AUTOSCALE seconds. Runs until the task is cancelled.

        If replicas cannot be started, the error is added to the incidents, and the next round tries again.
        """
        while True:
            await asyncio.sleep(AUTOSCALE)
            now = len(self.processes)
            wanted = autoscaler.wanted(self.backends.router, now, self.backends.clock())
            if wanted == now:
                continue
            self._note(f"autoscaling from {now} to {wanted} replicas: {autoscaler.why}", logging.INFO)
            try:
                await self.scale(wanted)
            except Exception as e:
                known = isinstance(e, ReplicaFailed | LinkLost | TimeoutError | OSError)
                self._note(f"a replica could not be added: {e or type(e).__name__}", error=None if known else e)

    async def _supervise(self, name: str, process: Launched) -> None:
        """Start a replica's process again each time it ends.

        Runs until cancelled, or until the replica is being removed.
        """
        wait = BACKOFF_FIRST
        while True:
            code = await process.wait()
            if name in self._leaving:  # else it would be given requests again while it is removed
                self._note(f"replica {name} ended with exit code {code} while it was drained")
                return
            self._note(f"replica {name} ended with exit code {code}; it is started again")
            self.restarts[name] = self.restarts.get(name, 0) + 1
            await asyncio.sleep(wait)
            if name in self._leaving:
                return
            try:
                self.backends.router.restarting(name)
                await self.backends.attach(name, await process.start())
                wait = BACKOFF_FIRST
                self._note(f"replica {name} serves again", logging.INFO)
            except Exception as e:
                wait = min(2 * wait, BACKOFF_MAX)
                known = isinstance(e, ReplicaFailed | LinkLost | TimeoutError | OSError)
                what = f"replica {name} could not be started: {e or type(e).__name__}; next attempt in {wait:.1f} s"
                self._note(what, error=None if known else e)
                process.kill()

    async def _tidy(self) -> None:
        """Shorten long log files of replicas, every TIDY seconds. Runs until cancelled."""
        while True:
            await asyncio.sleep(TIDY)
            for process in self.processes.values():
                try:
                    process.trim_log()
                except OSError as e:
                    log.error("%s cannot be shortened: %s", process.log, e)

    def _lost(self, name: str, why: str, error: Exception | None) -> None:
        """Kill the process of a replica whose connection has ended.

        _supervise() then starts the replica again. The process is left alone while the replica is removed or the
        cluster stops. why: text to log; "": none. error: the exception to log with it, or None.
        """
        if why:
            self._note(why, error=error)
        if (process := self.processes.get(name)) and name not in self._leaving and not self.stopping:
            process.kill()
