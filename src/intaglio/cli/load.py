"""Functions by which commands open, find or compile the model that the user names, with a progress bar."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.cli.progress import progress_bar
from intaglio.devices import HostsDevice

if TYPE_CHECKING:
    from intaglio.llm import LLM
    from intaglio.program import Program


HOSTS: ContextVar[HostsDevice | None] = ContextVar("hosts", default=None)  # set by `intaglio launch`


def open_llm(
    model: Path | None, device: str, weights: str, kv_format: str, threads: int | None, context: int | None = None,
    no_cache: bool = False, layout: str | None = None, in_process: bool = False,
    revision: str | None = None, window_tokens: int | None = None,
) -> LLM:  # fmt: skip
    """Load a model and return it as an LLM, with a progress bar.

    The arguments are those of the class LLM, except `no_cache`: True to neither use nor keep packed weights on disk.
    model: path or hub id; None: the bundled model. Raises the same errors as the class LLM.
    """
    with progress_bar(f"loading {model or 'the bundled model'}") as progress:
        from intaglio.llm import LLM

        return LLM(
            model, device, weights, threads, context=context, kv_format=kv_format, cache=None if no_cache else "auto",
            layout=layout, in_process=in_process, hosts=HOSTS.get(), revision=revision, window_tokens=window_tokens,
            progress=progress,
        )  # fmt: skip


def find(model: Path, revision: str | None = None) -> Path:
    """Returns the path of a checkpoint. A checkpoint named by a hub id is downloaded first, with a progress bar.

    revision: branch, tag or commit of a hub repository; None: main. Raises HubError if there is neither such a path nor
    such a repository.
    """
    from intaglio.models.hub import locate

    with progress_bar(f"looking up {model}") as progress:
        return locate(model, revision, progress)


def compile_model(
    model: Path | None, weights: str, kv_format: str, context: int | None, report: list[str], raw: bool = False,
    revision: str | None = None,
) -> Program:  # fmt: skip
    """Returns the compiled Program of a checkpoint. If `raw` is True, the Program is not compiled.

    Args:
        model: checkpoint folder, GGUF file or hub id; None: the bundled model.
        weights: format of weights, such as auto or int8.
        kv_format: format of the K/V cache.
        context: largest context length; None: the model's own.
        report: a list to which one line of text is appended for each compiler pass.
        raw: True to return the Program that the checkpoint's port makes, before any compiler pass. `weights` and
            `kv_format` are then not used.
        revision: revision of a hub repository; None: its main branch.

    Raises HubError if there is no such checkpoint, CheckpointError or PortError if it cannot be loaded, and FormatError
    for an unknown format.
    """
    from intaglio.compiler import build
    from intaglio.model import BUNDLED
    from intaglio.models import Checkpoint, port

    ported = port(Checkpoint.open(find(model or BUNDLED, revision)), context)
    return ported if raw else build(ported, weights, kv_format, report=report)


def compile_rank(
    model: Path | None, layout: str, rank: int, weights: str, kv_format: str, context: int | None, raw: bool,
    revision: str | None = None,
) -> Program:  # fmt: skip
    """Returns the Program of one rank of a model that is split among several ranks.

    Args:
        model: checkpoint folder, GGUF file or hub id; None: the bundled model.
        layout: how the ranks share the model, such as tp4pp2.
        rank: number of the rank, from 0.
        weights: format of weights, such as auto or int8.
        kv_format: format of the K/V cache.
        context: largest context length; None: the model's own.
        raw: True for the Program as it is split, before the compiler has run.
        revision: revision of a hub repository; None: its main branch.

    Raises ValueError if the layout has no such rank, LayoutError if the layout does not fit the model, and the errors
    of compile_model().
    """
    from intaglio.compiler import build_mesh, shard

    ported = compile_model(model, weights, kv_format, context, [], raw=True, revision=revision)
    programs = shard(ported, layout) if raw else build_mesh(ported, layout, weights, kv_format).programs
    if rank >= len(programs):
        raise ValueError(f"--rank {rank}: layout {layout} has ranks 0..{len(programs) - 1}")
    return programs[rank]
