"""Intaglio: transformer inference, from checkpoint to chip."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.runtime import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """LLM and SamplingParams are imported when first asked for, so that `import intaglio` costs nothing."""
    if name == "LLM":
        from intaglio.llm import LLM

        return LLM
    if name == "SamplingParams":
        from intaglio.runtime import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}")
