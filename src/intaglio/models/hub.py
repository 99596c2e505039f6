"""Checkpoints by hub id: a repository owner/name of the Hugging Face Hub, found in the local cache or downloaded.

Downloads through `huggingface_hub`, so its cache, its token and its environment variables (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE) apply. Only files that Intaglio reads are downloaded; code in a repository never is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from intaglio.models.config import CheckpointError
from intaglio.models.files.folder import (
    ADAPTER,
    INDEX,
    OTHER_LAYOUTS,
    OTHER_WEIGHTS,
    deciding_file,
    listed_shards,
    not_a_model,
)
from intaglio.models.files.gguf.file import BESIDE, PART
from intaglio.models.files.quantisation import BESIDE as QUANTISATION
from intaglio.models.text.account import FILES as TEXT
from intaglio.progress import Progress, silent

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?::([\w.-]+))?")  # owner/name, and :TAG to choose among GGUF files
DEFAULT_TAG = "Q4_K_M"  # of several GGUF files; llama.cpp takes the same
SMALL = {"config.json", *TEXT, *QUANTISATION}
INSTEAD = {ADAPTER, *OTHER_LAYOUTS}  # files that say what a repository without config.json is
TEMPLATES = "additional_chat_templates/"


class HubError(CheckpointError):
    """Raised if a checkpoint cannot be had from the Hugging Face hub. The message says why and what to do."""


def locate(name: str | Path, revision: str | None = None, progress: Progress = silent) -> Path:
    """Returns the path of the checkpoint that `name` refers to. A checkpoint with a hub id is downloaded if needed.

    A path that exists is returned unchanged, even if it also has the form of a hub id. A name that does not have the
    form of a hub id is returned unchanged, too, whether the path exists or not.

    Args:
        name: a path, or a hub id: owner/name, or owner/name:TAG for the GGUF file of the quantisation TAG, such as
            Q4_K_M.
        revision: branch, tag or commit of the repository; None: main.
        progress: function called as progress(bytes done, bytes in all, text that says what is done).

    Raises:
        HubError: the repository or the files wanted are not there or cannot be downloaded; `revision` is given for a
            path; or the huggingface_hub library is missing.
    """
    path = Path(name)
    match = HUB_ID.fullmatch(str(name))
    if path.exists() or not match:
        if revision is not None:
            raise HubError(
                f"revision {revision!r} is for a hub id such as Qwen/Qwen3-0.6B, not for {path}; leave it out"
            )
        return path
    repo, tag = match.groups()
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise HubError(f"no folder {path}; to download it as a hub id: pip install 'intaglio[hub]'") from None
    return _Repository(repo, revision).fetch(tag, progress)


def hub_id(name: str | Path) -> str | None:
    """Returns `name` as a string if it is a hub id; else None.

    A hub id has the form owner/name. An existing path of this form is not taken for a hub id.
    """
    return str(name) if HUB_ID.fullmatch(str(name)) and not Path(name).exists() else None


def choose_files(repo: str, files: Iterable[str], tag: str | None, read: Callable[[str], Any]) -> list[str]:
    """Returns a list of the files to download from a repository: text files, settings, and weights in one format.

    The weights are the first of these that the repository has:

    - the files that `transformers_weights` of config.json names;
    - model.safetensors;
    - the shards that model.safetensors.index.json lists;
    - the only *.safetensors file;
    - the only GGUF model or, if there are several, the GGUF model with DEFAULT_TAG in its name.

    With a tag, only GGUF models with the tag in their names are considered. All parts of a split GGUF model are in the
    list.

    For a repository that is not a model, such as an adapter, the list has only the file that shows this. Reading the
    downloaded folder then raises an error that says what the repository is.

    Args:
        repo: name of the repository, for errors.
        files: paths of all files in the repository.
        tag: quantisation in the name of a GGUF file, such as Q8_0; None: any format.
        read: function from the path of a JSON file of the repository to its contents.

    Raises:
        HubError: there are no weights that can be read; or there are several models and no rule chooses one.
    """
    files = sorted(files)
    unread = {"tokenizer.model"} if "tokenizer.json" in files else set()
    small = [f for f in files if f in SMALL - unread or (f.startswith(TEMPLATES) and f.endswith(".jinja"))]
    if tag is None and "config.json" in files and (weights := _safetensors(repo, files, read)):
        return small + weights
    if models := _gguf_models(files):
        return _chosen_gguf(repo, models, tag)
    if tag is not None:
        raise HubError(f"{repo} has no GGUF files, so :{tag} chooses nothing; leave it out")
    if "config.json" not in files and (instead := [f for f in files if f in INSTEAD]):
        return instead
    if held := [f for f in files if f.endswith(OTHER_WEIGHTS)]:
        raise HubError(
            f"{repo} has its weights in {held[0]} only, a format that is not read; take a repository with safetensors, "
            "or save it again: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    named = ", ".join(files[:8])
    raise HubError(f"{repo} has no weights, neither *.safetensors with a config.json nor *.gguf; its files: {named}")


def _safetensors(repo: str, files: list[str], read: Callable[[str], Any]) -> list[str]:
    """Returns a list of the safetensors files to download; [] if the repository has none.

    If the files have an index, it is the first item of the list. Only files in the repository's top folder count.
    Raises HubError if the repository lacks a file that config.json or the index names, or if there are several files
    without an index.

    Args:
        repo: name of the repository, for errors.
        files: paths of all files in the repository.
        read: function from the name of a JSON file of the repository to its contents.
    """
    decides = deciding_file(read("config.json"), files.__contains__, read)
    if decides is not None:
        shards = listed_shards(read(decides)) if decides in files and decides.endswith(".index.json") else []
        if missing := [f for f in (decides, *shards) if f not in files]:
            by = "config.json" if missing[0] == decides else decides
            raise HubError(f"{repo}: {by} names {missing[0]}, which the repository lacks; take another revision")
        return [decides, *shards]
    held = [f for f in files if f.endswith(".safetensors") and "/" not in f and not not_a_model(f)]
    if len(held) > 1:
        raise HubError(
            f"{repo} has {len(held)} safetensors files and no {INDEX} that names them: {', '.join(held[:4])}; "
            "download the one you mean, and give its folder"
        )
    return held


def _gguf_models(files: list[str]) -> dict[str, list[str]]:
    """Returns the GGUF models of a repository as {path of a model's first file: list of the paths of all its files}.

    Files that only accompany a model, such as mmproj files, are left out. files: paths of all files in the repository.
    """
    models: dict[str, list[str]] = {}
    for f in files:
        name = f.rpartition("/")[2]
        if f.endswith(".gguf") and not name.lower().startswith(BESIDE):
            part = PART.fullmatch(name)
            models.setdefault(f[: len(f) - len(name)] + (part[1] if part else name), []).append(f)
    return {parts[0]: parts for parts in models.values()}


def _chosen_gguf(repo: str, models: Mapping[str, list[str]], tag: str | None) -> list[str]:
    """Returns the paths of all files of one GGUF model, as a list.

    With a tag it is the model whose name contains the tag. Without a tag it is the only model or, if there are several,
    the model whose name contains DEFAULT_TAG. Raises HubError unless exactly one model fits.

    Args:
        repo: name of the repository, for errors.
        models: {path of a model's first file: list of the paths of all its files}.
        tag: quantisation in the name of a GGUF file, such as Q8_0; None: no tag.
    """
    if tag is None and len(models) == 1:
        return next(iter(models.values()))
    wanted = re.compile(rf"(?:^|[^A-Za-z0-9]){re.escape(tag or DEFAULT_TAG)}(?:$|[^A-Za-z0-9_])", re.IGNORECASE)
    fit = [first for first in models if wanted.search(first.rpartition("/")[2])]
    if len(fit) == 1:
        return models[fit[0]]
    why = f"{len(fit)} of them are {tag or DEFAULT_TAG}" if fit else f"none of them is {tag or DEFAULT_TAG}"
    raise HubError(
        f"{repo} has {len(models)} GGUF models and {why}: {', '.join(fit or models)}; choose one, as in {repo}:Q8_0"
    )


class _Repository:
    """One revision of a repository on the Hugging Face hub. If the hub cannot be reached, the local cache is used."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo, self.revision = repo, revision
        self.commit: str | None = None  # that the revision names
        self.why = ""  # why the hub cannot be reached

    def fetch(self, tag: str | None, progress: Progress) -> Path:
        """Download the checkpoint's files that the cache lacks. Returns the path of their folder in the cache.

        For a GGUF model it returns the path of its (first) file. Raises HubError if the files are not there or cannot
        be downloaded.

        Args:
            tag: quantisation to choose among GGUF files, such as Q8_0; None: DEFAULT_TAG.
            progress: function called as progress(bytes done, bytes in all, text that says what is done).
        """
        progress(0, 0, f"looking up {self.repo}")
        sizes = self._sizes()
        if sizes is None:
            return self._cached(tag)
        chosen = choose_files(self.repo, sizes, tag, lambda f: json.loads(self._download(f).read_bytes()))
        total, done = sum(sizes[f] for f in chosen), 0
        paths = []
        for f in chosen:
            paths.append(self._download(f, done, total, progress))
            done += sizes[f]
            progress(done, total, f"downloading {f}")
        return _opened(paths, chosen)

    def _gated(self) -> HubError:
        return HubError(f"{self.repo} is gated: ask for access on its page, then log in (hf auth login, or HF_TOKEN)")

    def _sizes(self) -> dict[str, int] | None:
        """Ask the hub for the repository's files. Returns {path: size in bytes}, or None if the hub cannot be reached.

        Sets `commit` to the commit of the revision; if the hub cannot be reached, sets `why` to the reason. Raises
        HubError if the repository or revision does not exist, or if access is denied.
        """
        from huggingface_hub import HfApi, errors

        at = f" at revision {self.revision!r}" if self.revision else ""
        try:
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
        except errors.GatedRepoError:
            raise self._gated() from None
        except errors.RepositoryNotFoundError:
            raise HubError(
                f"there is no folder {self.repo} here and no repository of that name on the hub; if it is private, "
                "log in (hf auth login, or HF_TOKEN)"
            ) from None
        except errors.RevisionNotFoundError:
            raise HubError(
                f"{self.repo} has no revision {self.revision!r}; give a branch, tag or commit of it"
            ) from None
        except errors.HfHubHTTPError as e:
            if e.response.status_code < 500:
                raise HubError(f"the hub refuses {self.repo}{at}: {_first_line(e)}") from None
            self.why = _first_line(e)
            return None
        except Exception as e:  # of the HTTP library, which is not the same in all versions of huggingface_hub
            self.why = _first_line(e)
            return None
        self.commit = info.sha
        return {s.rfilename: s.size or 0 for s in info.siblings or ()}

    def _cached(self, tag: str | None) -> Path:
        """Returns the path of the checkpoint's folder or GGUF file in the cache. Does not use the network.

        Raises HubError if the cache lacks the repository or files that are needed.

        tag: quantisation to choose among GGUF files, such as Q8_0; None: DEFAULT_TAG.
        """
        from huggingface_hub import errors, snapshot_download

        try:
            folder = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            at = f" at revision {self.revision}" if self.revision else ""
            raise HubError(
                f"there is no folder {self.repo} here, the cache of the hub has no {self.repo}{at}, and the hub cannot "
                f"be reached: {self.why}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder"
            ) from None
        held = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        try:
            chosen = choose_files(self.repo, held, tag, lambda f: json.loads((folder / f).read_bytes()))
        except HubError as e:
            raise HubError(
                f"{e} (these are the files in the cache, {folder}; the hub cannot be reached: {self.why})"
            ) from None
        return _opened([folder / f for f in chosen], chosen)

    def _download(self, file: str, done: int = 0, total: int = 0, progress: Progress = silent) -> Path:
        """Download one file of the repository to the cache, unless it is there. Returns its path in the cache.

        A partial download is continued. Raises HubError if the download fails, or if the repository was changed
        meanwhile.

        Args:
            file: the file's path in the repository.
            done: bytes of the files downloaded before this one, for `progress`.
            total: bytes of all files, for `progress`.
            progress: function called as progress(bytes done, total, text that says what is done).
        """
        from huggingface_hub import errors, hf_hub_download

        bar = _bar(done, total, f"downloading {file}", progress)
        try:
            path = Path(hf_hub_download(self.repo, file, revision=self.revision, tqdm_class=bar))
        except errors.GatedRepoError:
            raise self._gated() from None
        except Exception as e:  # of the HTTP library, of the cache or of the disk
            raise HubError(
                f"{self.repo}: {file} is not downloaded whole: {_first_line(e)}; run the command again to complete it"
            ) from e
        if self.commit not in path.parts:
            raise HubError(f"{self.repo} was changed on the hub during the download; run the command again")
        return path


def _opened(paths: list[Path], files: list[str]) -> Path:
    """Returns the path at which a downloaded checkpoint can be opened.

    For a GGUF model this is its first file, else the folder that holds the checkpoint's files. paths: paths of the
    downloaded files on this machine. files: their paths in the repository, in the same order.
    """
    if files[0].endswith(".gguf"):
        return paths[0]
    return paths[0].parents[files[0].count("/")]


def _first_line(e: BaseException) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def _bar(done: int, total: int, what: str, progress: Progress) -> Any:
    """Returns a subclass of tqdm that calls progress(bytes done, total, what) while a file is downloaded.

    Args:
        done: bytes of the files that were downloaded before this one. They are included in the reported bytes.
        total: bytes of all files.
        what: text that says what is done, such as "downloading FILE".
        progress: the function to call.
    """
    from tqdm import tqdm

    class Reported(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self.so_far = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.so_far += int(n or 0)
            progress(done + self.so_far, total, what)
            return super().update(n)

    return Reported
