"""Runs a cluster in this process: the router's HTTP server, its replicas, its administration, its shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from intaglio.cluster.admin import administration
from intaglio.cluster.backends import Backends
from intaglio.cluster.cluster import Cluster
from intaglio.cluster.front import Front, FrontOptions
from intaglio.cluster.process import Launched
from intaglio.router import Autoscaler, Limits, Role, Router
from intaglio.server.serve import CLOSE_TIMEOUT, POLL_INTERVAL, Connection, QuietServer

log = logging.getLogger("intaglio.cluster")


@dataclass(frozen=True)
class ClusterOptions:
    """Options of a cluster.

    Attributes:
        launch: function that makes the process of a replica from its name and role.
        replicas: number of replicas of each role.
        most: largest number of replicas that the autoscaler may start; None: no autoscaling.
        policy: name of the router's placement policy, a key of router.POLICIES.
        weights: weight of each tenant by name; tenants that are not named have weight 1.
        max_queued: maximum number of requests that wait in the router.
        front: options of the HTTP application.
    """

    launch: Callable[[str, Role], Launched]
    replicas: Mapping[Role, int] = field(default_factory=lambda: {"mixed": 2})
    most: int | None = None
    policy: str = "cache-aware"
    weights: Mapping[str, float] = field(default_factory=dict)
    max_queued: int = 1024
    front: FrontOptions = field(default_factory=FrontOptions)


async def run_cluster(
    options: ClusterOptions, listener: socket.socket, folder: Path, announce: Callable[[Cluster], None]
) -> int:
    """Run a cluster until SIGINT, SIGTERM or the command `down`. Returns the exit code of the process.

    The code is 0, or 130 if the cluster is ended before all replicas serve. After the first signal, running requests
    may still end; the second signal ends them. Raises ReplicaFailed if a replica does not start. Raises ValueError for
    an unknown policy, a wrong weight or number of replicas, or if another cluster runs in the folder.

    Args:
        options: the options of the cluster.
        listener: socket on which the router serves HTTP.
        folder: the cluster's folder.
        announce: function that is called with the Cluster once all replicas serve.
    """
    router = Router(options.policy, Limits(options.max_queued), options.weights)
    backends = Backends(router)
    autoscaler = Autoscaler(sum(options.replicas.values()), options.most) if options.most else None
    cluster = Cluster(backends, options.launch, autoscaler)
    front = Front(backends, options.front, cluster.state)
    ending, ended = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (ended if ending.is_set() else ending).set()
        front.draining = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with administration(folder, _commands(cluster, ended)):
        starting = asyncio.ensure_future(cluster.start(options.replicas))
        stopping = [asyncio.ensure_future(event.wait()) for event in (ending, ended)]
        try:
            await asyncio.wait({starting, *stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return 130
            await starting
            await _serve(front, listener, lambda: announce(cluster), ending, ended)
        finally:
            for task in (starting, *stopping):
                task.cancel()
            await asyncio.gather(starting, *stopping, return_exceptions=True)
            await cluster.stop()
    return 0


async def _serve(
    front: Front, listener: socket.socket, announce: Callable[[], None], ending: asyncio.Event, ended: asyncio.Event
) -> None:
    """Serve HTTP until `ended` is set, or until `ending` is set and no request is open. Returns nothing.

    announce: called once the server listens.
    """
    config = uvicorn.Config(
        front, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=int(CLOSE_TIMEOUT), backlog=4096,
    )  # fmt: skip
    server = QuietServer(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(POLL_INTERVAL / 10)
    announce()
    try:
        while not serving.done() and not ended.is_set() and not (ending.is_set() and front.open == 0):
            await asyncio.sleep(POLL_INTERVAL)
    finally:
        server.should_exit = True
        if ended.is_set():
            server.force_exit = True
        await asyncio.wait({serving}, timeout=2 * CLOSE_TIMEOUT)


def _commands(cluster: Cluster, ended: asyncio.Event) -> dict[str, Any]:
    async def status(_: dict[str, Any]) -> Any:
        return cluster.state()

    async def drain(command: dict[str, Any]) -> Any:
        return await cluster.drain(command["replica"], bool(command.get("restart")))

    async def scale(command: dict[str, Any]) -> Any:
        await cluster.scale(command["replicas"], command.get("role"))
        return cluster.state()

    async def down(_: dict[str, Any]) -> Any:
        ended.set()
        return None

    return {"status": status, "drain": drain, "scale": scale, "down": down}
