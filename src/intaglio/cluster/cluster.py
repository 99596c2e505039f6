"""Cluster: replica processes of one model, started, supervised, drained and scaled, behind one router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
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
INITIALS: Mapping[Role, str] = {"mixed": "r", "prefill": "p", "decode": "d"}


class Cluster:
    """Replica processes of one model, with the names r0, r1, ...

    With separate replicas for prefill and decode the names are p0, p1, ... and d0, d1, ...

    Args:
        backends: the router with its links to the replicas.
        launch: function that makes the process of a replica from its name, and does not start it yet.
        autoscaler: decides how many replicas there are, if they are all of one role; None: only scale() changes that.
    """

    def __init__(
        self, backends: Backends, launch: Callable[[str], Launched], autoscaler: Autoscaler | None = None
    ) -> None:
        self.backends, self.launch, self.autoscaler = backends, launch, autoscaler
        self.processes: dict[str, Launched] = {}
        self.restarts: dict[str, int] = {}
        self.roles: tuple[Role, ...] = ("mixed",)
        self.since = time.time()
        self.stopping = False
        self._supervisors: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers: Counter[Role] = Counter()
        self._changing = asyncio.Lock()
        backends.on_lost = self._lost

    async def start(self, replicas: Mapping[Role, int]) -> None:
        """Start replicas and wait until all serve. replicas: how many of each role.

        Raises ReplicaFailed if one does not start.
        """
        self.roles = tuple(replicas)
        self.backends.start()
        self._tasks.append(asyncio.ensure_future(self._tidy()))
        async with self._changing:
            await self._grow([role for role, n in replicas.items() for _ in range(n)])
        if self.autoscaler:
            self._tasks.append(asyncio.ensure_future(self._autoscale(self.autoscaler)))

    async def scale(self, replicas: int, role: Role | None = None) -> None:
        """Start or drain replicas of a role until the cluster has `replicas` of that role.

        role: None is "mixed", or "decode" if the cluster has separate replicas for prefill and decode. Raises
        ValueError for a number outside 1..MAX_REPLICAS and for a role that the cluster does not have, ReplicaFailed if
        a replica does not start.
        """
        if not 1 <= replicas <= MAX_REPLICAS:
            raise ValueError(f"{replicas} replicas; allowed: 1 to {MAX_REPLICAS}")
        async with self._changing:
            role = role or next(r for r in self.roles if r != "prefill")
            if role not in self.roles:
                raise ValueError(f"the cluster has no {role} replicas; allowed: {', '.join(self.roles)}")
            names = [name for name in self.processes if self.backends.router.replicas[name].role == role]
            await self._grow([role] * (replicas - len(names)))
            await self._remove(names[replicas:][::-1])

    async def drain(self, name: str, restart: bool = False) -> int:
        """Move a replica's requests to other replicas and stop it; start it again if `restart`.

        Returns how many requests it had. Raises ValueError if there is no such replica or no other to take its
        requests, ReplicaFailed if it does not start again.
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
            if restart:
                await self._add(name, role)
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
        """A dict for JSON: the replicas with their state, load and restarts, and the queue and counts of the router."""
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
        }  # fmt: skip

    async def _grow(self, roles: Sequence[Role]) -> None:
        """Start one more replica for each of `roles`, all at once. Raises the first error if any does not start."""
        names: dict[str, Role] = {}
        for role in roles:
            names[f"{INITIALS[role]}{self._numbers[role]}"] = role
            self._numbers[role] += 1
        results = await asyncio.gather(*(self._add(*one) for one in names.items()), return_exceptions=True)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            raise errors[0]

    async def _add(self, name: str, role: Role) -> None:
        """Start a replica and wait until it serves.

        If it does not, it is removed, and the error, such as ReplicaFailed, is raised.
        """
        self.backends.router.add_replica(name, role)
        process = self.processes[name] = self.launch(name)
        try:
            await self.backends.attach(name, await process.start())
        except BaseException:
            process.kill()
            del self.processes[name]
            self.backends.forget(name)
            raise
        self._supervisors[name] = asyncio.ensure_future(self._supervise(name, process))

    async def _remove(self, names: Sequence[str]) -> int:
        """Drain replicas, all at the same time, and stop their processes.

        Each has up to DRAIN_TIMEOUT seconds for its requests to end. Returns how many requests they had.
        """
        self._leaving.update(names)
        try:
            moved = sum([self.backends.drain(name) for name in names])
            await asyncio.gather(*map(self._stop_drained, names))
        finally:
            self._leaving.difference_update(names)
        return moved

    async def _stop_drained(self, name: str) -> None:
        """Wait until a drained replica has no requests, at most DRAIN_TIMEOUT, then stop and forget it."""
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
        """Start and remove replicas as the autoscaler says. A replica that cannot be started is tried again."""
        while True:
            await asyncio.sleep(AUTOSCALE)
            now = len(self.processes)
            wanted = autoscaler.wanted(self.backends.router, now, self.backends.clock())
            if wanted == now:
                continue
            log.info("autoscaling from %d to %d replicas: %s", now, wanted, autoscaler.why)
            try:
                await self.scale(wanted)
            except Exception as e:
                known = isinstance(e, ReplicaFailed | LinkLost | TimeoutError | OSError)
                log.error("a replica could not be added: %s", e or type(e).__name__, exc_info=None if known else e)

    async def _supervise(self, name: str, process: Launched) -> None:
        """Restart a replica's process each time it ends. Runs until cancelled, or until the replica is removed."""
        wait = BACKOFF_FIRST
        while True:
            code = await process.wait()
            if name in self._leaving:  # else it would be given requests again while it is removed
                log.error("replica %s ended with exit code %s while it was drained", name, code)
                return
            log.error("replica %s ended with exit code %s; it is started again", name, code)
            self.restarts[name] = self.restarts.get(name, 0) + 1
            await asyncio.sleep(wait)
            if name in self._leaving:
                return
            try:
                self.backends.router.restarting(name)
                await self.backends.attach(name, await process.start())
                wait = BACKOFF_FIRST
            except Exception as e:
                wait = min(2 * wait, BACKOFF_MAX)
                known = isinstance(e, ReplicaFailed | LinkLost | TimeoutError | OSError)
                log.error(
                    "replica %s could not be started: %s; next attempt in %.1f s", name, e or type(e).__name__, wait,
                    exc_info=None if known else e,
                )  # fmt: skip
                process.kill()

    async def _tidy(self) -> None:
        """Move replicas' logs aside when they become long (see ReplicaProcess.trim_log()). Runs until cancelled."""
        while True:
            await asyncio.sleep(TIDY)
            for process in self.processes.values():
                try:
                    process.trim_log()
                except OSError as e:
                    log.error("%s cannot be shortened: %s", process.log, e)

    def _lost(self, name: str) -> None:
        """Kill the process of a replica whose connection has ended, so that _supervise() starts it again.

        Nothing happens while the replica is removed or the cluster stops.
        """
        if (process := self.processes.get(name)) and name not in self._leaving and not self.stopping:
            process.kill()
