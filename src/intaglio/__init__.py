"""Intaglio: transformer inference, from checkpoint to chip."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.runtime import Grammar, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Returns the public object `name` of the package (LLM, Grammar or SamplingParams), imported on first use.

    `import intaglio` alone thus loads neither NumPy nor the native module. Raises AttributeError for any other name.
    """
    if name == "LLM":
        from intaglio.llm import LLM

        return LLM
    if name in ("Grammar", "SamplingParams"):
        from intaglio import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}")
