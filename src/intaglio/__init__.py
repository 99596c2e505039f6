"""Intaglio: transformer inference, from checkpoint to chip."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.runtime import Grammar, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """The object called `name` of __all__, imported on first use. Raises AttributeError for another name.

    So `import intaglio` loads neither NumPy nor the native module.
    """
    if name == "LLM":
        from intaglio.llm import LLM

        return LLM
    if name in ("Grammar", "SamplingParams"):
        from intaglio import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}")
