"""Replicas on a Ray cluster: a placement group and an actor for each, which runs `intaglio serve` on its node.

A placement group has one bundle of CPUs for each rank of the replica, all on one node. The router connects to the
replica itself over TCP, with a token that it has made (see server/control_tcp.py); requests do not pass through Ray.
If a node is lost, so is the actor, and the cluster's supervision places the replica again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from intaglio.cluster.link import Link
from intaglio.cluster.process import STARTING, STOPPING, Launched, ReplicaFailed
from intaglio.cluster.ray_actor import ReplicaActor
from intaglio.cluster.threads import threads_that_fit
from intaglio.devices.processes.address import TcpAddress
from intaglio.router import Role

log = logging.getLogger("intaglio.cluster")
PLACING = 300.0  # seconds that a replica may wait for a node with enough CPUs
CHOSEN = 5.0  # of them, seconds that it waits for the node that was chosen, before any other will do
CONNECTING = 10.0  # seconds in which the connection to a replica that serves is tried again
CALL = 10.0  # seconds that an actor may take to answer, beyond what it is asked to do
NODE_LABEL = "ray.io/node-id"
LOST = -1  # exit code of a process whose actor is gone


class RayLauncher:
    """A connection to a Ray cluster. Calling it makes a replica that runs there, a RayReplica.

    Args:
        address: address of the Ray cluster, such as 10.0.0.1:6379. "auto" stands for the Ray cluster of this machine.
        cluster: name of this Intaglio cluster, for the folder of logs on each node.

    Raises ValueError if there is no Ray cluster at the address.
    """

    def __init__(self, address: str, cluster: str) -> None:
        self.cluster = cluster
        self.words: Sequence[str] = ()
        self.kv_token: str | None = None
        self.sharing = 1  # most replicas on a node
        self.bundles: list[dict[str, float]] = [{"CPU": 1.0}]
        self.replicas: dict[str, RayReplica] = {}
        try:
            ray.init(address=address, namespace="intaglio", log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise ValueError(f"there is no Ray cluster at {address}: {e}; start one with `ray start --head`") from None

    def threads(self, replicas: int) -> int:
        """Returns how many CPUs each replica can get at most, if all replicas must fit into the Ray cluster.

        The CPUs of a replica must be on one node. The result is 1 if the replicas do not even fit with one CPU each.
        replicas: number of replicas, which all get the same number of CPUs.
        """
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        return threads_that_fit(nodes, replicas)

    def prepare(
        self, words: Sequence[str], ranks: int, threads: int, kv_token: str | None = None, replicas: int = 1
    ) -> None:
        """Set the command and the number of CPUs of every replica that is started from now on. Returns nothing.

        Args:
            words: arguments of `intaglio serve`.
            ranks: number of ranks of a replica.
            threads: number of CPUs that all ranks of one replica have together.
            kv_token: secret with which replicas fetch K/V blocks of each other; None if they fetch none.
            replicas: maximum number of replicas of the cluster.

        Raises ValueError if no node has enough CPUs for a replica.
        """
        self.kv_token = kv_token
        self.words, self.bundles = tuple(words), [{"CPU": float(max(1, threads // ranks))} for _ in range(ranks)]
        most = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if most < self.cpus:
            raise ValueError(
                f"a replica needs {self.cpus:.0f} CPUs of one Ray node, the largest has {most:.0f}; "
                "give fewer --threads or a smaller --layout"
            )
        self.sharing = min(replicas, int(most // self.cpus))

    @property
    def cpus(self) -> float:
        """Number of CPUs that all ranks of one replica have together."""
        return sum(bundle["CPU"] for bundle in self.bundles)

    def __call__(self, name: str, role: Role) -> RayReplica:
        """Returns a new RayReplica with this name and role. Its process is not started yet."""
        self.replicas[name] = RayReplica(name, role, self)
        return self.replicas[name]

    def choose_node(self, name: str, nodes: Sequence[Mapping[str, Any]]) -> str:
        """Returns the id of the node on which to start a replica; "" if no node has enough CPUs.

        Among the nodes with enough CPUs, the node with the fewest replicas of this cluster is chosen. So replicas share
        a node only if they must.

        name: name of the replica to place, which is not counted itself. nodes: the result of ray.nodes().
        """
        used = Counter(r.node_id for r in self.replicas.values() if r.name != name)
        fitting = [n for n in nodes if n["Alive"] and n["Resources"].get("CPU", 0.0) >= self.cpus]
        return min((n["NodeID"] for n in fitting), key=lambda id: (used[id], id), default="")

    def close(self) -> None:
        """End the connection to the Ray cluster. Ray then ends all replicas that still run."""
        ray.shutdown()


class RayReplica(Launched):
    """A replica whose process runs on a node of a Ray cluster. Its methods must be called on the event loop."""

    def __init__(self, name: str, role: Role, launcher: RayLauncher) -> None:
        self.name, self.role, self.launcher = name, role, launcher
        self._pid: int | None = None
        self.node, self.node_id = "", ""
        self.log = Path(f"{name}.log")  # on the node; known after the start
        self._actor: Any = None
        self._link: Link | None = None
        self._group: PlacementGroup | None = None
        self._over = asyncio.Event()  # kill() was called, or the actor is gone
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return self._pid

    async def start(self) -> Link:
        await self._release()
        self._over.clear()
        token = secrets.token_hex(16)
        try:
            group = await self._placed()
            placed = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            cpus = self.launcher.bundles[0]["CPU"]
            actor = ray.remote(ReplicaActor).options(num_cpus=cpus, scheduling_strategy=placed, max_restarts=0)
            launcher = self.launcher
            self._actor = actor.remote(
                self.name, list(launcher.words), launcher.cluster, self.role, launcher.sharing, launcher.kv_token
            )
            found = await self._unless_killed(self._actor.listen.remote(token), STARTING + CALL)
            if "failed" in found:
                raise ReplicaFailed(found["failed"])
            self._pid, self.log = found["pid"], Path(found["log"])
            self.node, self.node_id = f"{found['host']} ({found['node'][:8]})", found["node"]
            log.info("replica %s runs on Ray node %s; its log there is %s", self.name, self.node, self.log)
            self._link = await Link.connect(TcpAddress(found["host"], found["port"], token.encode()), CONNECTING)
            return self._link
        except RayError as e:
            self.kill()
            raise ReplicaFailed(f"replica {self.name} lost its Ray node: {type(e).__name__}") from None
        except BaseException:
            self.kill()
            raise

    async def wait(self) -> int:
        if self._actor is None:
            return LOST
        try:
            code: int = await self._unless_killed(self._actor.wait.remote(), None)
            return code
        except (RayError, ReplicaFailed):
            if self._link:  # a node that Ray has lost may still be connected to this process
                self._link.abort()
            return LOST

    async def stop(self) -> None:
        if self._actor is not None and not self._over.is_set():
            with suppress(RayError, TimeoutError, ReplicaFailed):
                await self._unless_killed(self._actor.stop.remote(), STOPPING + CALL)
        self.launcher.replicas.pop(self.name, None)
        await self._release()

    def kill(self) -> None:
        self._over.set()
        self._in_background(self._release())

    def trim_log(self) -> None:
        if self._actor is not None:
            self._actor.trim_log.remote()  # what comes of it does not matter here

    async def _placed(self) -> PlacementGroup:
        """Wait until the CPUs for this replica are reserved, and return their placement group.

        Raises ReplicaFailed after PLACING seconds, or once kill() is called.
        """
        ends, patience, said = time.monotonic() + PLACING, CHOSEN, False
        bundles = self.launcher.bundles
        while time.monotonic() < ends and not self._over.is_set():
            # The first attempt names a node; one that has no room, or is lost and Ray has not noticed yet, is given up.
            nodes = await asyncio.to_thread(ray.nodes) if patience == CHOSEN else []
            self.node_id = self.launcher.choose_node(self.name, nodes)
            labels = [{NODE_LABEL: self.node_id}] * len(bundles) if self.node_id else None
            group = await asyncio.to_thread(placement_group, bundles, "STRICT_PACK", bundle_label_selector=labels)
            self._group = group
            until = min(ends, time.monotonic() + patience)
            while time.monotonic() < until and not self._over.is_set():
                if await asyncio.to_thread(group.wait, 1.0):
                    return group
            await asyncio.to_thread(remove_placement_group, group)
            self._group = None
            patience = 4 * CHOSEN if patience == CHOSEN else CHOSEN
            if not said:
                said = True
                log.warning("replica %s waits for a Ray node with %g free CPUs", self.name, self.launcher.cpus)
        raise ReplicaFailed(
            f"replica {self.name}: no Ray node had {self.launcher.cpus:g} free CPUs for {PLACING:.0f} s"
        )

    async def _unless_killed(self, call: Any, seconds: float | None) -> Any:
        """Wait for `call`, a call of the actor, and return its result. The wait ends early if kill() is called.

        Raises RayError if the call fails, ReplicaFailed if kill() is called, and TimeoutError after `seconds`; None: no
        limit.
        """

        async def result() -> Any:
            return await call

        tasks = [asyncio.ensure_future(result()), asyncio.ensure_future(self._over.wait())]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            if self._over.is_set():
                raise ReplicaFailed(f"replica {self.name} was ended")
            raise TimeoutError(f"replica {self.name} did not answer within {seconds:.0f} s")
        finally:
            for task in tasks:
                task.cancel()

    async def _release(self) -> None:
        """End the actor, the replica's process and all processes that it started, and remove the placement group."""
        actor, group, self._actor, self._group = self._actor, self._group, None, None
        self._pid, self.node_id = None, ""
        if actor is not None:
            with suppress(RayError, TimeoutError):  # a stopped process does not end with its actor
                await asyncio.wait_for(_result(actor.kill.remote()), CALL / 5)
            with suppress(RayError):
                await asyncio.to_thread(ray.kill, actor)
        if group is not None:
            with suppress(RayError):
                await asyncio.to_thread(remove_placement_group, group)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _result(call: Any) -> Any:
    """Wait for a call of an actor and return its result."""
    return await call
