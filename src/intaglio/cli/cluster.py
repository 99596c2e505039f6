"""`intaglio cluster`: several replicas of a model behind one router, on this machine or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intaglio.cli import options as o
from intaglio.cli.group import Group
from intaglio.cli.serve import peer_address

if TYPE_CHECKING:
    from intaglio.cluster.ray_launcher import RayLauncher
    from intaglio.router import Role

cluster = typer.Typer(cls=Group, no_args_is_help=True, help="Several replicas of a model behind one address.")
Name = Annotated[str, typer.Option("--name", help="Name of the cluster, if several run here.")]
BLOCKS_BYTES = 8 << 30  # most bytes of the K/V blocks that prefill replicas hand over


@cluster.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def up(
    context: typer.Context,
    model: o.Model = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN..MAX", help="Processes that serve the model; with .. autoscaled by the queue. Default: 2."
        ),
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(min=1, max=32, help="Replicas that compute prompts for those of --decode.")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(min=1, max=32, help="Replicas that generate; with --prefill, in place of --replicas.")
    ] = None,
    layout: o.Layout = None,
    prefill_layout: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Of the replicas of --prefill. Default: that of --layout.")
    ] = None,
    decode_layout: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Of the replicas of --decode. Default: that of --layout.")
    ] = None,
    device: o.Device = "host",
    weights: o.Weights = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each replica. Default: an equal share of the cores.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: o.ApiKeys = None,
    policy: Annotated[str, typer.Option(help="Placement of requests: cache-aware or round-robin.")] = "cache-aware",
    weight: Annotated[
        list[str] | None, typer.Option(metavar="TENANT=W", help="A tenant's share; 1 where not given.")
    ] = None,
    max_queued: Annotated[int, typer.Option(min=1, help="Requests that may wait in the router; beyond: 429.")] = 1024,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds a request gets in all.")] = 600.0,
    queue_timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds it may wait for its start.")] = 120.0,
    otlp_endpoint: o.TracesEndpoint = None,
    name: Name = "default",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run the replicas on this Ray cluster; auto: the one here.")
    ] = None,
) -> None:
    """Serve a model by several replicas behind one address, until Ctrl-C or `intaglio cluster down`.

    Arguments after -- go to each replica's `intaglio serve`, such as -- --kv-tokens 8192.
    """
    try:
        import uvloop

        from intaglio.cluster.admin import blocks_folder, cluster_folder
        from intaglio.cluster.budget import gives, peer_budget, size_words
        from intaglio.cluster.front import FrontOptions
        from intaglio.cluster.process import Launched, ReplicaProcess
        from intaglio.cluster.prompt import TimeLimits
        from intaglio.cluster.run import ClusterOptions, run_cluster
        from intaglio.devices import usable_cores
        from intaglio.machine import Machine
        from intaglio.server.serve import listen, raise_file_limit
        from intaglio.server.tracing import Tracing
    except ImportError as e:
        raise ValueError(f"the cluster needs {e.name}: pip install 'intaglio[serve]'") from None
    roles, most = read_roles(replicas, prefill, decode)
    total = sum(roles.values())
    layouts = read_layouts(roles, layout, prefill_layout, decode_layout)
    if ray is not None and len(set(layouts.values())) > 1:
        raise ValueError("--prefill-layout and --decode-layout do not go with --ray; give all replicas one --layout")
    raise_file_limit()
    folder = cluster_folder(name)
    more = list(context.args)
    if model is not None and str(model).startswith("--"):  # no model was given, and this stood after --
        word = re.sub(r"=(tcp|https?):/(?!/)", r"=\1://", str(model))  # a Path has one slash in place of two
        more, model = [word, *more], None
    tiered, peered = gives(more, "--kv-cache-dir"), gives(more, "--kv-peer")
    if ray is not None and peered:
        raise ValueError("--kv-peer does not go with --ray, where each replica gives blocks at its node's own address")
    apart = prefill is not None and not tiered
    kv_token = secrets.token_hex(16)  # of the replicas that hand K/V blocks over by TCP
    if peered:
        os.environ.setdefault("INTAGLIO_KV_TOKEN", kv_token)  # which the replicas inherit
        check_free_port(more)
    nodes = connect_ray(ray, name) if ray is not None else None
    cores = nodes.threads(most or total) if nodes else max(1, usable_cores() // (most or total))
    share = threads or cores
    given: dict[str, Any] = {"device": device, "weights": weights, "timeout": timeout}
    given["threads"] = share if device == "host" else threads
    given["queue-timeout"], given["otlp-endpoint"] = queue_timeout, otlp_endpoint
    words = [str(model)] if model else []
    words += [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    words += ["--max-open", "100000", *more]
    tracing = Tracing(otlp_endpoint, "intaglio-router") if otlp_endpoint else None
    listener = listen(host, port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    print(f"starting {total} replicas; their logs are in {folder}{' of their nodes' if nodes else ''}", flush=True)
    with blocks_folder(folder) if apart and not peered and not nodes else nullcontext() as blocks:
        words += blocks_words(blocks, more) if blocks else []

        def launch(replica: str, role: Role) -> Launched:
            if nodes:
                return nodes(replica, role)
            size = size_words(more, peer_budget(role, most or total, Machine().memory)) if peered else []
            return ReplicaProcess(replica, [*words, *layout_words(layouts[role]), *size], folder)

        if nodes:
            [layout] = set(layouts.values())
            words += layout_words(layout)
            nodes.prepare(words, ranks_of(layout), share, kv_token if apart else None, most or total)
        options = ClusterOptions(
            launch, roles, most, policy, read_weights(weight or []), max_queued,
            FrontOptions(tuple(api_key or ()), TimeLimits(timeout, queue_timeout), tracing=tracing),
        )  # fmt: skip
        try:
            code = uvloop.run(
                run_cluster(
                    options, listener, folder, lambda _: print(f"serving {total} replicas at {address}", flush=True)
                )
            )
        finally:
            if nodes:
                nodes.close()
    if tracing:
        tracing.close()
    sys.stdout.flush()
    raise typer.Exit(code)


@cluster.command()
def status(name: Name = "default", as_json: o.Json = False) -> None:
    """Show the replicas with their state and load."""
    show(_ask(name, {"do": "status"}), as_json)


@cluster.command()
def drain(
    replica: Annotated[str, typer.Argument(help="Such as r0; see status.")],
    restart: Annotated[bool, typer.Option("--restart", help="Start it again afterwards.")] = False,
    name: Name = "default",
) -> None:
    """Stop a replica after its requests have been moved to other replicas, which continue them."""
    moved = _ask(name, {"do": "drain", "replica": replica, "restart": restart})
    print(f"{replica} had {moved} requests; it is {'started again' if restart else 'stopped'}")


@cluster.command()
def scale(
    replicas: Annotated[int, typer.Argument(min=1, max=64, help="Number of replicas to have afterwards.")],
    role: Annotated[
        str | None,
        typer.Option(help="Role of the replicas, prefill or decode, where these are apart. Default: decode."),
    ] = None,
    name: Name = "default",
) -> None:
    """Start replicas, or drain and stop replicas, until the cluster has the given number."""
    show(_ask(name, {"do": "scale", "replicas": replicas, "role": role}), False)


@cluster.command()
def down(name: Name = "default") -> None:
    """Stop the cluster. Requests that run are ended."""
    _ask(name, {"do": "down"})
    print(f"cluster {name} is stopping")


def show(state: dict[str, Any], as_json: bool) -> None:
    """Print a cluster's state as a table, or as JSON if `as_json` is True. state: result of Cluster.state()."""
    if as_json:
        print(json.dumps(state))
        return
    print(f"{'replica':7} {'role':7} {'pid':>7} {'state':8} {'requests':>8} {'running':>7} {'waiting':>7} "
          f"{'K/V used':>8} {'restarts':>8}")  # fmt: skip
    for r in state["replicas"]:
        print(
            f"{r['name']:7} {r['role']:7} {r['pid'] or '-':>7} {r['state']:8} {r['requests']:>8} {r['running']:>7} "
            f"{r['waiting']:>7} {r['kv_usage']:>8.0%} {r['restarts']:>8}"
        )
    print(f"{state['queued']} requests wait in the router")


def read_roles(replicas: str | None, prefill: int | None, decode: int | None) -> tuple[dict[Role, int], int | None]:
    """Returns the numbers of replicas that the options of `up` ask for, as ({role: number}, maximum).

    The maximum is the largest number of replicas with autoscaling; None without autoscaling. replicas, prefill, decode:
    values of the options of these names, None if not given. Raises ValueError for options that do not go together, and
    for a wrong text in `replicas`.
    """
    if prefill is None and decode is None:
        return read_replicas(replicas or "2")
    if prefill is None or decode is None:
        raise ValueError("--prefill and --decode go together; give both, or --replicas alone")
    if replicas is not None:
        raise ValueError("--replicas does not go with --prefill and --decode, which tell how many there are")
    return {"prefill": prefill, "decode": decode}, None


def read_replicas(text: str) -> tuple[dict[Role, int], int | None]:
    """Parse the value of --replicas. Returns ({"mixed": number of replicas at the start}, maximum).

    The maximum is the largest number of replicas with autoscaling; None without autoscaling. "1..4" means 1 at the
    start and at most 4: ({"mixed": 1}, 4). A single number, such as "2", means no autoscaling: ({"mixed": 2}, None).
    "mixed" is the role of replicas that prefill and decode. Raises ValueError for other texts, for numbers outside 1 to
    64, and if the first number is above the second.
    """
    found = re.fullmatch(r"([0-9]{1,2})(?:\.\.([0-9]{1,2}))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most <= 64:
        raise ValueError(f"--replicas {text}: write a number from 1 to 64, or such as 1..4, the lower first")
    return {"mixed": least}, most if found and found[2] else None


def read_layouts(
    roles: Collection[Role], layout: str | None, prefill: str | None, decode: str | None
) -> dict[Role, str | None]:
    """Returns the layout of each role's replicas, as a dict {role: layout}.

    A layout is a text such as "tp2", or None for one rank. Prefill and decode replicas must compute the same bits. The
    order of sums depends on tp, the number of tensor-parallel ranks. If the layouts of the two roles have different tp,
    the layout with the smaller tp is told to sum in the parts of the larger: tp4 and tp2 become tp4 and tp2sums4.

    layout, prefill, decode: values of --layout, --prefill-layout and --decode-layout. Raises ValueError if
    --prefill-layout or --decode-layout is given without replicas of that role. Raises LayoutError, a ValueError, if the
    two layouts cannot compute the same bits.
    """
    from intaglio.compiler import Layout, LayoutError

    given: dict[Role, str | None] = {"prefill": prefill, "decode": decode}
    for role, text in given.items():
        if text is not None and role not in roles:
            raise ValueError(f"--{role}-layout {text} goes with --prefill and --decode; use --layout for all replicas")
    texts: dict[Role, str | None] = {role: given.get(role) or layout for role in roles}
    read = {role: Layout.parse(text or "tp1") for role, text in texts.items()}
    if len({one.numerics for one in read.values()}) == 1:
        return texts
    parts = max(max(one.tp, one.sums) for one in read.values())
    alike = {role: replace(one, sums=1 if one.tp == parts else parts) for role, one in read.items()}
    if len({one.numerics for one in alike.values()}) > 1:
        shown = " and ".join(f"{one} of --{role}" for role, one in read.items())
        raise LayoutError(f"layouts {shown} do not give the same bits; they may differ in tp, pp and sp only")
    return {role: str(one) for role, one in alike.items()}


def layout_words(layout: str | None) -> list[str]:
    """Returns the arguments that give `intaglio serve` a layout, as a list of words; [] if `layout` is None."""
    return ["--layout", layout] if layout else []


def ranks_of(layout: str | None) -> int:
    """Returns the number of ranks of a layout such as tp2pp2; 1 for None.

    Raises LayoutError, a ValueError, for a wrong layout.
    """
    from intaglio.compiler import Layout

    return Layout.parse(layout).ranks if layout else 1


def connect_ray(address: str, name: str) -> RayLauncher:
    """Returns a RayLauncher that is connected to the Ray cluster at `address`. name: name of Intaglio's cluster.

    Raises ValueError if ray is not installed, or if there is no Ray cluster at the address.
    """
    try:
        from intaglio.cluster.ray_launcher import RayLauncher
    except ImportError as e:
        raise ValueError(f"--ray needs {e.name}: pip install 'intaglio[cluster]'") from None
    return RayLauncher(address, name)


def blocks_words(folder: Path, given: Sequence[str]) -> list[str]:
    """Returns arguments of `intaglio serve`, as a list of words, that make replicas keep K/V blocks in `folder`.

    The list has --kv-cache-dir. It also has --kv-cache-size, with half of the disk's free space but at most
    BLOCKS_BYTES (8 GiB), unless the user's own arguments, `given`, have that option.
    """
    from intaglio.cluster.budget import size_words

    size = min(BLOCKS_BYTES, shutil.disk_usage(folder).free // 2)
    return ["--kv-cache-dir", str(folder), *size_words(given, size)]


def check_free_port(given: Sequence[str]) -> None:
    """Raise ValueError for a --kv-peer address that is wrong or has a port other than 0.

    given: arguments of `intaglio serve`, which may have --kv-peer. With port 0 each replica takes a free port. Any
    other port would be the same for all replicas, but only one replica can use it.
    """
    words = [part for word in given for part in word.split("=", 1)]
    for address in [peer_address(after) for word, after in pairwise(words) if word == "--kv-peer"]:
        if address and address.port:
            raise ValueError(f"--kv-peer {address} has a port for one replica; write port 0: each takes a free one")


def read_weights(words: list[str]) -> dict[str, float]:
    """Returns a dict {tenant: weight} from texts such as a=2. Raises ValueError for any other text."""
    weights = {}
    for word in words:
        tenant, equals, value = word.rpartition("=")
        try:
            weights[tenant] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--weight {word}: write TENANT=W, such as batch=0.5")
    return weights


def _ask(name: str, command: dict[str, Any]) -> Any:
    from intaglio.cluster.admin import ask

    return ask(name, command)
