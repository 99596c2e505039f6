"""ReplicaActor: what runs on a node of a Ray cluster, and starts one replica's process there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray

from intaglio.cluster.admin import cluster_folder
from intaglio.cluster.process import ReplicaFailed, ReplicaProcess
from intaglio.tiers.peer import TOKEN_VARIABLE

BLOCKS_BYTES, BLOCKS_SHARE = 8 << 30, 8  # of the K/V blocks that a replica keeps for others: at most 1/8 of the memory


class ReplicaActor:
    """The methods of a Ray actor that runs one replica's process, which ends with the actor.

    words: arguments of `intaglio serve`. cluster: name of the folder for logs on this node.
    """

    def __init__(self, name: str, words: list[str], cluster: str, kv_token: str | None) -> None:
        if kv_token:
            os.environ[TOKEN_VARIABLE] = kv_token  # which the process inherits
            words = [*words, *peer_words(ray.util.get_node_ip_address(), words)]
        self.process = ReplicaProcess(name, words, cluster_folder(cluster))

    async def listen(self, token: str) -> dict[str, Any]:
        """Start the process, with its control channel at this node's address. token: secret that a client must know.

        Returns a dict once the process serves, with the keys host, port, pid, node and log. If it does not start, the
        dict has one key, failed, with the reason.
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
        """End the process and all that it started, at once."""
        self.process.kill()

    async def trim_log(self) -> None:
        """Move the log's content aside if the log is long. Raises OSError if that fails."""
        self.process.trim_log()


def peer_words(host: str, given: Sequence[str]) -> list[str]:
    """Arguments of `intaglio serve` with which a replica keeps K/V blocks in memory and gives them to others.

    host: this node's address. given: arguments that the user gives; --kv-cache-size among them is left as it is.
    Otherwise the size is 8 GiB, or 1/8 of the node's memory if that is less.
    """
    words = ["--kv-peer", f"tcp://{f'[{host}]' if ':' in host else host}:0"]
    if not any(word.split("=")[0] == "--kv-cache-size" for word in given):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        words += ["--kv-cache-size", str(min(BLOCKS_BYTES, memory // BLOCKS_SHARE))]
    return words
