"""ReplicaActor: the Ray actor that starts, watches and ends one replica's process on a node of a Ray cluster."""

from __future__ import annotations

import os
from typing import Any

import ray

from intaglio.cluster.admin import cluster_folder
from intaglio.cluster.budget import peer_budget, size_words
from intaglio.cluster.process import ReplicaFailed, ReplicaProcess
from intaglio.machine import Machine
from intaglio.router import Role
from intaglio.tiers.peer import TOKEN_VARIABLE


class ReplicaActor:
    """Class of the Ray actor that runs one replica's process. The process ends with the actor.

    words: arguments of `intaglio serve`. cluster: name of the folder for logs on this node. role: the replica's role.
    sharing: how many replicas of the cluster may share this node and its memory. kv_token: secret with which replicas
    fetch K/V blocks of each other; None if they fetch none.
    """

    def __init__(
        self, name: str, words: list[str], cluster: str, role: Role, sharing: int, kv_token: str | None
    ) -> None:
        if kv_token:
            os.environ[TOKEN_VARIABLE] = kv_token  # which the process inherits
            size = peer_budget(role, sharing, Machine().memory)
            words = [*words, *peer_words(ray.util.get_node_ip_address()), *size_words(words, size)]
        self.process = ReplicaProcess(name, words, cluster_folder(cluster))

    async def listen(self, token: str) -> dict[str, Any]:
        """Start the replica's server process, with its control channel at the address of this Ray node.

        Returns a dict once the process serves. Its keys are host and port (of the control channel), node (id of the Ray
        node), pid (of the process) and log (path of its log file). If the process does not start, the dict has only the
        key failed, whose value is the reason.

        token: secret that a client must know.
        """
        try:
            address = await self.process.listen(ray.util.get_node_ip_address(), token)
        except ReplicaFailed as e:
            return {"failed": str(e)}
        node = ray.get_runtime_context().get_node_id()
        where = {"host": address.host, "port": address.port, "node": node}
        return {**where, "pid": self.process.pid, "log": str(self.process.log)}

    async def wait(self) -> int:
        """Wait until the process has ended. Returns its exit code."""
        return await self.process.wait()

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it has not ended after some seconds."""
        await self.process.stop()

    async def kill(self) -> None:
        """End the process, and all processes that it started, at once."""
        self.process.kill()

    async def trim_log(self) -> None:
        """Move the content of the replica's log to NAME.log.1 once it is longer than LOG_BYTES. Returns nothing.

        Raises OSError if that fails.
        """
        self.process.trim_log()


def peer_words(host: str) -> list[str]:
    """Returns arguments of `intaglio serve`, a list, that make a replica keep K/V blocks in memory for other replicas.

    Other replicas fetch the blocks at a free TCP port of this node. host: this node's address, at which the replica
    listens.
    """
    return ["--kv-peer", f"tcp://{f'[{host}]' if ':' in host else host}:0"]
