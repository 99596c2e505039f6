"""ReplicaActor: what runs on a node of a Ray cluster, and starts one replica's process there."""

from __future__ import annotations

from typing import Any

import ray

from intaglio.cluster.admin import cluster_folder
from intaglio.cluster.process import ReplicaFailed, ReplicaProcess


class ReplicaActor:
    """The methods of a Ray actor that runs one replica's process, which ends with the actor.

    words: arguments of `intaglio serve`. cluster: name of the folder for logs on this node.
    """

    def __init__(self, name: str, words: list[str], cluster: str) -> None:
        self.process = ReplicaProcess(name, words, cluster_folder(cluster))

    async def listen(self, token: str) -> dict[str, Any]:
        """Start the process, which listens at this node's address for who knows the token.

        Returns a dict once it serves: host, port, pid, node and log; or failed, the reason, if it does not.
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
        """End the process: it gets some seconds to end by itself."""
        await self.process.stop()

    async def kill(self) -> None:
        """End the process and all that it started, at once."""
        self.process.kill()

    async def trim_log(self) -> None:
        """Keep the log short. Raises OSError."""
        self.process.trim_log()
