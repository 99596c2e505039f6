"""`intaglio serve`: the options of the server on the command line."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[Path | None, typer.Argument(help="Checkpoint folder. Default: the bundled model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="INTAGLIO_API_KEY", help="Ask for this key; may be given several times.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API. Default: its folder's.")] = None,
    device: Annotated[
        str, typer.Option(help="host (C++, fast), reference (NumPy, the definition), oracle, silicon (modelled).")
    ] = "host",
    weights: Annotated[str, typer.Option(help="Format of the weights: auto, f32, bf16, int8, int4.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the host device.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions to compile for.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of KV to hold for all requests.")] = None,
    chip: Annotated[str | None, typer.Option(help="With silicon: the chip. Default: sohu. See intaglio chips.")] = None,
    chips: Annotated[int | None, typer.Option(min=1, help="With silicon: how many share the model.")] = None,
    layout: Annotated[str | None, typer.Option(help="How ranks share the model, such as tp4pp2.")] = None,
    worker: Annotated[bool, typer.Option("--worker", help="The device in a process of its own.")] = False,
    max_sequences: Annotated[int, typer.Option(min=1, help="Choices that run together.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 512,
    max_waiting: Annotated[int, typer.Option(min=1, help="Choices that may wait; beyond: 429.")] = 256,
    max_drafts: Annotated[int, typer.Option(min=0, help="Tokens guessed a step; 0: no speculation.")] = 0,
    max_open: Annotated[int, typer.Option(min=1, help="Requests open at once; beyond: 429.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 8 << 20,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds a request gets in all.")] = 600.0,
    queue_timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds it may wait for its start.")] = 120.0,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Origin whose pages may ask. Default: none.")] = None,
    journal: Annotated[Path | None, typer.Option(help="Write all that happens there, for `intaglio replay`.")] = None,
) -> None:
    """Serve a model over OpenAI's HTTP API, with a page at / and metrics at /metrics."""
    try:
        import uvloop

        from intaglio.server.prepare import Limits
        from intaglio.server.serve import listen, raise_file_limit
        from intaglio.server.serve import serve as run
        from intaglio.server.service import Options, Service
    except ImportError as e:
        raise ValueError(f"the server needs {e.name}: pip install 'intaglio[serve]'") from None
    from intaglio.llm import LLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.setswitchinterval(0.0005)  # the engine's thread gets the interpreter back that soon; 5 ms by default
    raise_file_limit()
    listener = listen(host, port)
    llm = LLM(
        model, device, weights, threads, context=context, kv_tokens=kv_tokens, worker=worker, journal=journal,
        chip=chip, chips=chips, layout=layout, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens,
        max_waiting=max_waiting, max_drafts=max_drafts,
    )  # fmt: skip
    options = Options(
        name=name or llm.path.resolve().name, keys=tuple(api_key or ()), origins=tuple(cors_origin or ()),
        limits=Limits(timeout, queue_timeout), max_open=max_open, max_body=max_body,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"

    def announce(service: Service) -> None:
        modelled = f"; times are modelled: {llm.modelled}" if llm.modelled else ""
        print(f"serving {options.name} at {address}{modelled}", flush=True)

    code = uvloop.run(run(llm, options, listener, announce))
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)  # an engine told twice to end may still be in a step, and must not keep the process
