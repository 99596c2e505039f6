"""Tiers: where K/V blocks are kept outside an engine's pool. Each is a Connector of the runtime."""

from intaglio.tiers.block_file import BlockFileError
from intaglio.tiers.block_order import BlockOrder
from intaglio.tiers.disk import DiskTier
from intaglio.tiers.peer import PeerTier
from intaglio.tiers.store import StoreTier

__all__ = ["BlockFileError", "BlockOrder", "DiskTier", "PeerTier", "StoreTier"]
