"""Automatic ports: derive a model family's description from the behaviour of its tiny transformers model."""

from intaglio.debugging.automatic.derive import AutoPort, port_automatically

__all__ = ["AutoPort", "port_automatically"]
