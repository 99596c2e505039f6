"""`intaglio serve`: its options; loads the models, runs the server and ends the process with its exit status."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intaglio.cli import options as o
from intaglio.cli.load import HOSTS
from intaglio.cli.progress import progress_bar
from intaglio.progress import prefixed

if TYPE_CHECKING:
    from intaglio.devices.processes.address import TcpAddress


def state_cache_bytes(text: str) -> int | None:
    """Returns the number of bytes that the value of --state-cache-size stands for; None for "auto", 0 for "0".

    Raises ValueError for a text that is no size.
    """
    return None if text == "auto" else 0 if text == "0" else o.parse_size(text)


def checked_control(param: typer.CallbackParam, text: str | None) -> str | None:
    """Callback of --control: returns the text unchanged; None if the option is not given.

    Raises ValueError, naming the option, if the text is a socket's path whose folder does not exist, or a TCP address
    that is wrong or whose token is not set.
    """
    if text is not None and text.startswith("tcp://"):
        o.checked_by(control_address)(param, text)
    elif text is not None:
        o.in_existing_folder(param, Path(text))
    return text


def control_address(text: str | None) -> Path | TcpAddress | None:
    """Returns the address that the value of --control stands for.

    - A text that starts with tcp:// gives a TcpAddress.
    - Any other text is the path of a Unix socket, and gives a Path.
    - None gives None.

    Raises ValueError for a wrong TCP address, and if the environment variable with its token is not set or too short.
    """
    if text is None or not text.startswith("tcp://"):
        return None if text is None else Path(text)
    from intaglio.server.control_tcp import TOKEN_VARIABLE

    return address_with_token(text, TOKEN_VARIABLE)


def peer_address(text: str | None) -> TcpAddress | None:
    """Returns the TcpAddress that the value of --kv-peer stands for; None for None.

    Raises ValueError for a wrong address, for one at which other hosts cannot connect, such as 0.0.0.0, and if
    INTAGLIO_KV_TOKEN is not set or too short.
    """
    from intaglio.tiers.peer import TOKEN_VARIABLE

    if text is None:
        return None
    address = address_with_token(text, TOKEN_VARIABLE)
    if address.unspecified:
        raise ValueError(
            f"{text}: others are told this address and cannot connect to {address.host}; write an address that this "
            "host has in their network, or 127.0.0.1 if all run on this host"
        )
    return address


def address_with_token(text: str, variable: str) -> TcpAddress:
    """Returns the TcpAddress for a text such as tcp://10.0.0.5:8001. Its token is the value of an environment variable.

    variable: name of the environment variable. Raises ValueError for a wrong address, and if the variable is not set or
    the token is too short.
    """
    from intaglio.devices.processes.address import TcpAddress

    token = os.environ.get(variable)
    if token is None:
        raise ValueError(f"{text} needs a token; set {variable} to 16 or more random characters")
    return TcpAddress.parse(text, token)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]MODEL]...",
            help="Checkpoint folders, GGUF files or hub ids, each with its name in the API. Default: bundled.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: o.ApiKeys = None,
    name: Annotated[str | None, typer.Option(help="Name in the API of the only model. Default: its folder's.")] = None,
    revision: o.Revision = None,
    device: o.Device = "host",
    weights: o.Weights = "auto",
    threads: o.Threads = None,
    context: o.Context = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of KV a model holds for all requests.")] = None,
    chip: o.Chip = None,
    chips: o.Chips = None,
    layout: o.Layout = None,
    expert_placement: Annotated[
        Path | None,
        typer.Option(
            callback=o.in_existing_folder,
            help="With --layout such as ep4r8: JSON file of each rank's experts, read at the start, updated later.",
        ),
    ] = None,
    rebalance_every: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds between two proposals to move experts; 0: none move. Default: 60."),
    ] = None,
    in_process: o.InProcess = False,
    worker: Annotated[bool, typer.Option("--worker", help="Run the device in a process of its own.")] = False,
    max_sequences: Annotated[int, typer.Option(min=1, help="Choices that run together.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 512,
    max_waiting: Annotated[int, typer.Option(min=1, help="Choices that may wait; more get status 429.")] = 256,
    max_drafts: Annotated[int, typer.Option(min=0, help="Draft tokens a step; 0: no speculative decoding.")] = 0,
    state_cache_size: Annotated[
        str,
        typer.Option(
            callback=o.checked_by(state_cache_bytes, ", or auto, or 0"),
            help="Maximum bytes of recurrent states in the prefix cache, such as 2GiB; 0: none. Default: auto.",
        ),
    ] = "auto",
    window_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens of KV for sliding-window layers; 0: keep all. Default: auto.")
    ] = None,
    max_open: Annotated[int, typer.Option(min=1, help="Requests open at once; more get status 429.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 8 << 20,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds a request gets in all.")] = 600.0,
    queue_timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds it may wait for its start.")] = 120.0,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Web origin allowed by CORS. Default: none.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file with the chat template, for a checkpoint without one.")
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            help="Sampling defaults: auto (the checkpoint's generation_config.json), none (OpenAI's), or a file."
        ),
    ] = "auto",
    kv_cache_dir: Annotated[
        Path | None, typer.Option(help="Keep KV blocks there, for this server's next start and for others.")
    ] = None,
    kv_peer: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT",
            callback=o.checked_by(peer_address),
            help="For `cluster up --prefill`, after --: keep KV blocks in memory and give them there to replicas with "
            "the token in INTAGLIO_KV_TOKEN.",
        ),
    ] = None,
    kv_cache_size: Annotated[
        str | None,
        typer.Option(
            callback=o.checked_size,
            help="Bytes that --kv-cache-dir or --kv-peer may use. Default: 8GiB; --kv-peer: at most 1/8 of the memory.",
        ),
    ] = None,
    otlp_endpoint: o.TracesEndpoint = None,
    journal: Annotated[
        Path | None,
        typer.Option(callback=o.in_existing_folder, help="Write all that happens there, for `intaglio replay`."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|tcp://HOST:PORT",
            callback=checked_control,
            help="Unix socket, or address with the token in INTAGLIO_CONTROL_TOKEN, for a router. "
            "The server ends when its stdin closes.",
        ),
    ] = None,
) -> None:
    """Serve one model or several over OpenAI's HTTP API, with a page at / and metrics at /metrics.

    Options hold for every model. Several models take turns on the CPU threads, and a quarter of the memory is split
    among them in equal parts for K/V cache.
    """
    try:
        import uvloop

        from intaglio.server.defaults import sampling_defaults
        from intaglio.server.prepare import Limits
        from intaglio.server.serve import listen, raise_file_limit
        from intaglio.server.serve import serve as run
        from intaglio.server.service import Options, Service
        from intaglio.server.tracing import Tracing
    except ImportError as e:
        raise ValueError(f"the server needs {e.name}: pip install 'intaglio[serve]'") from None
    from intaglio.llm import KV_CACHE_BYTES, LLM
    from intaglio.machine import Machine
    from intaglio.tiers.peer import default_budget

    sys.setswitchinterval(0.0005)  # the engine's thread gets the interpreter back that soon; 5 ms by default
    raise_file_limit()
    folders = named_folders(models or [], name)
    if journal and len(folders) > 1:
        raise ValueError(f"--journal {journal} records one model, here are {len(folders)}; leave it out")
    if chat_template and len(folders) > 1:
        raise ValueError(f"--chat-template {chat_template} is for one model, here are {len(folders)}; leave it out")
    if revision and len(folders) > 1:
        raise ValueError(f"--revision {revision} is for one model, here are {len(folders)}; leave it out")
    if expert_placement and len(folders) > 1:
        raise ValueError(
            f"--expert-placement {expert_placement} is for one model, here are {len(folders)}; leave it out"
        )
    peer = peer_address(kv_peer)
    if peer and peer.port and len(folders) > 1:
        raise ValueError(
            f"--kv-peer {peer} has a port for one model, here are {len(folders)}; write port 0: each takes a free one"
        )
    default_bytes = default_budget(Machine().memory, len(folders)) if peer else KV_CACHE_BYTES
    kv_cache_bytes = o.parse_size(kv_cache_size) if kv_cache_size else default_bytes
    template = read_template(chat_template) if chat_template else None
    machine = Machine(threads, models=len(folders)) if len(folders) > 1 else None
    tracing = Tracing(otlp_endpoint, "intaglio") if otlp_endpoint else None
    listener = listen(host, port)
    llms = {}
    for name, folder in folders.items():
        with progress_bar(f"loading {name}") as progress:
            llms[name] = LLM(
                folder, device, weights, None if machine else threads, context=context, kv_tokens=kv_tokens,
                worker=worker, journal=journal, chip=chip, chips=chips, layout=layout, in_process=in_process,
                expert_placement=expert_placement, rebalance_every=rebalance_every,
                hosts=HOSTS.get(),
                max_sequences=max_sequences,
                max_batch_tokens=max_batch_tokens, max_waiting=max_waiting, max_drafts=max_drafts, machine=machine,
                state_cache_bytes=state_cache_bytes(state_cache_size), window_tokens=window_tokens,
                kv_cache_dir=kv_cache_dir, kv_peer=peer, kv_cache_bytes=kv_cache_bytes,
                revision=revision, progress=prefixed(progress, name),
            )  # fmt: skip
    if template is not None:
        for llm in llms.values():
            llm.use_chat_template(template)
    defaults = {name: sampling_defaults(llm.model.path, generation_config) for name, llm in llms.items()}
    # after the progress bar, which would be drawn over what is logged
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = Options(
        keys=tuple(api_key or ()), origins=tuple(cors_origin or ()), limits=Limits(timeout, queue_timeout),
        max_open=max_open, max_body=max_body, defaults=defaults, tracing=tracing,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"

    def announce(service: Service) -> None:
        times = next((f"; times are modelled: {llm.modelled}" for llm in llms.values() if llm.modelled), "")
        for name, given in defaults.items():
            if given:
                text = ", ".join(f"{field}={value}" for field, value in given.items())
                print(f"{name}: sampling defaults of its generation_config.json: {text}", flush=True)
        print(f"serving {', '.join(llms)} at {address}{times}", flush=True)

    if control:
        end_with_stdin()
    code = uvloop.run(run(llms, options, listener, announce, control=control_address(control)))
    for llm in llms.values():
        if llm.tier:
            llm.tier.close()
    if tracing:
        tracing.close()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)  # an engine told twice to end may still be in a step, and must not keep the process


def end_with_stdin() -> None:
    """Start a thread that ends this process, with exit code 1, as soon as its standard input ends.

    The input is a pipe from the process that started this one, and ends when that process does.
    """

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def read_template(path: Path) -> str:
    """Returns the text of a chat template file. Raises ValueError, naming the file, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--chat-template {path} cannot be read: {e}") from None


def named_folders(models: list[str], name: str | None) -> dict[str, Path | None]:
    """Returns a dict {name of the model in the API: path of its checkpoint}, in the order of `models`.

    If `models` is empty, the dict has the bundled model, with None as path.

    Args:
        models: arguments of the form NAME=MODEL or MODEL. A MODEL without a name is named after its folder or hub id.
        name: name to give to the only model; None: the names that `models` give.

    Raises ValueError for an empty name, a name that is used twice, and `name` with several models.
    """
    from intaglio.model import BUNDLED
    from intaglio.models.hub import hub_id

    if name is not None and len(models) > 1:
        raise ValueError(f"--name {name} is for one model, here are {len(models)}; write NAME=MODEL for each")
    folders: dict[str, Path | None] = {}
    for word in models:
        given, equals, folder = word.partition("=")
        named = equals and not Path(word).exists()
        path = Path(folder if named else word)
        known = given if named else hub_id(path) or path.resolve().name
        if not known or known in folders:
            raise ValueError(f"{word}: the name {known!r} is empty or used twice; write NAME=MODEL")
        folders[known] = path
    if not folders:
        folders[BUNDLED.name] = None
    return {name: next(iter(folders.values()))} if name is not None else folders
