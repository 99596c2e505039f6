"""Cluster: replica processes of one model, started, supervised, drained and scaled, behind one router."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from intaglio.cluster.backends import Backends
from intaglio.cluster.link import LinkLost
from intaglio.cluster.process import ReplicaFailed, ReplicaProcess

log = logging.getLogger("intaglio.cluster")
BACKOFF_FIRST, BACKOFF_MAX = 0.1, 10.0  # seconds before a replica that ended is started again
DRAIN_TIMEOUT = 600.0  # seconds that a drained replica's last requests may take
MAX_REPLICAS = 64


class Cluster:
    """Replicas r0, r1, ... of one model. words: arguments of `intaglio serve` for each."""

    def __init__(self, backends: Backends, words: list[str], folder: Path) -> None:
        self.backends, self.words, self.folder = backends, words, folder
        self.processes: dict[str, ReplicaProcess] = {}
        self.restarts: dict[str, int] = {}
        self.since = time.time()
        self.stopping = False
        self._supervisors: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._numbers = 0
        self._changing = asyncio.Lock()
        backends.on_lost = self._lost

    async def start(self, replicas: int) -> None:
        """Start replicas and wait until all serve. Raises ReplicaFailed if one does not start."""
        self.backends.start()
        async with self._changing:
            await self._grow(replicas)

    async def scale(self, replicas: int) -> None:
        """Start or drain replicas until there are as many. Raises ValueError for a number outside 1..MAX_REPLICAS."""
        if not 1 <= replicas <= MAX_REPLICAS:
            raise ValueError(f"{replicas} replicas; allowed: 1 to {MAX_REPLICAS}")
        async with self._changing:
            names = [name for name in self.processes if name not in self._leaving]
            await self._grow(replicas - len(names))
            for name in reversed(names[replicas:]):
                await self._remove(name)

    async def drain(self, name: str, restart: bool = False) -> int:
        """Move a replica's requests to others and stop it; start it again if `restart`. Returns how many it had.

        Raises ValueError if there is no such replica, or no other to take its requests.
        """
        async with self._changing:
            if name not in self.processes or name in self._leaving:
                raise ValueError(f"there is no replica {name!r}; there are {', '.join(self.processes) or 'none'}")
            others = [r for r in self.backends.router.replicas.values() if r.placeable and r.name != name]
            if not others:
                raise ValueError(
                    f"no other replica than {name} takes requests; start one with `intaglio cluster scale`"
                )
            moved = await self._remove(name)
            if restart:
                await self._add(name)
            return moved

    async def stop(self) -> None:
        """Stop all replicas at once."""
        self.stopping = True
        tasks = list(self._supervisors.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self.processes.values()))
        await self.backends.close()

    def state(self) -> dict[str, Any]:
        """A dict for JSON: the replicas with their state, load and restarts, and the router's queue and counts."""
        router = self.backends.router
        replicas = []
        for name, process in self.processes.items():
            view = router.replicas.get(name)
            if view is None:
                continue
            report = view.report
            replicas.append({
                "name": name, "pid": process.pid, "state": view.state, "requests": len(view.jobs),
                "running": report.running, "waiting": report.waiting, "kv_usage": report.kv_usage,
                "cached_tokens": report.cached_tokens, "prompt_tokens": report.prompt_tokens,
                "output_tokens": report.output_tokens, "restarts": self.restarts.get(name, 0),
            })  # fmt: skip
        return {
            "replicas": replicas, "queued": len(router.queue), "policy": router.policy,
            "moves": dict(self.backends.moves), "refused": dict(router.refused), "seconds": time.time() - self.since,
        }  # fmt: skip

    async def _grow(self, more: int) -> None:
        names = []
        for _ in range(more):
            names.append(f"r{self._numbers}")
            self._numbers += 1
        results = await asyncio.gather(*(self._add(name) for name in names), return_exceptions=True)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            raise errors[0]

    async def _add(self, name: str) -> None:
        """Start a replica and wait until it serves. Forgets it and raises ReplicaFailed if it does not."""
        self.backends.router.add_replica(name)
        process = self.processes[name] = ReplicaProcess(name, self.words, self.folder)
        try:
            await self.backends.attach(name, await process.start())
        except BaseException:
            process.kill()
            del self.processes[name]
            self.backends.router.died(name)
            self.backends.router.remove_replica(name)
            raise
        self._supervisors[name] = asyncio.ensure_future(self._supervise(name, process))

    async def _remove(self, name: str) -> int:
        """Drain a replica and stop its process. Returns how many requests it had."""
        self._leaving.add(name)
        try:
            moved = self.backends.drain(name)
            await self.backends.emptied(name, DRAIN_TIMEOUT)
            supervisor = self._supervisors.pop(name)
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            await self.processes.pop(name).stop()
            if link := self.backends.links.get(name):
                await link.close()
            self.backends.router.died(name)
            self.backends.router.remove_replica(name)
        finally:
            self._leaving.discard(name)
        return moved

    async def _supervise(self, name: str, process: ReplicaProcess) -> None:
        """Start the process again whenever it has ended."""
        wait = BACKOFF_FIRST
        while True:
            code = await process.wait()
            process.kill()
            log.error("replica %s ended with exit code %s; it is started again", name, code)
            self.restarts[name] = self.restarts.get(name, 0) + 1
            await asyncio.sleep(wait)
            self.backends.router.restarting(name)
            try:
                await self.backends.attach(name, await process.start())
                wait = BACKOFF_FIRST
            except (ReplicaFailed, LinkLost, TimeoutError, OSError) as e:
                wait = min(2 * wait, BACKOFF_MAX)
                log.error("replica %s could not be started: %s; next attempt in %.1f s", name, e, wait)
                process.kill()

    def _lost(self, name: str) -> None:
        """Kill the process of a replica whose connection has ended. The supervisor then starts it again."""
        if (process := self.processes.get(name)) and name not in self._leaving and not self.stopping:
            process.kill()
