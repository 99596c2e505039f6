"""Files in deploy/: dashboards are generated and show metrics that exist; commands have known options.

`make lint` checks the other files against their schemas.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import parse_options
from support.served import served
from support.tiny import tiny

from intaglio.cluster.backends import Backends
from intaglio.cluster.metrics import RouterMetrics
from intaglio.router import Router

REPO = Path(__file__).parent.parent
DEPLOY = REPO / "deploy"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards", REPO / "scripts" / "dashboards.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cluster", "server"])
def test_dashboards_are_those_of_their_script(script: Any, name: str) -> None:
    text = (DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text()
    assert text == script.dashboard(name), "run python scripts/dashboards.py"
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in json.loads(text)["panels"]]
    assert len(set(places)) == len(places) > 10


def shown(name: str) -> set[str]:
    """The metrics that a dashboard's queries name."""
    panels = json.loads((DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text())["panels"]
    return {m for p in panels for t in p["targets"] for m in re.findall(r"(?:vllm|intaglio):\w+", t["expr"])}


def families(text: str) -> set[str]:
    """The names of metrics in Prometheus' text format, as a query would name them."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    return {name + ("_bucket" if kind == "histogram" else "") for name, kind in kinds.items()}


def test_the_clusters_dashboard_shows_metrics_of_the_router() -> None:
    assert shown("cluster") <= families(RouterMetrics(Backends(Router())).render().decode())


def test_the_servers_dashboard_shows_metrics_of_a_server(tmp_path: Path) -> None:
    with served(tiny("llama", tmp_path / "tiny", num_hidden_layers=1), llm={"device": "oracle"}) as s:
        assert shown("server") <= families(s.get("/metrics").text)


def test_commands_are_known() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    for words in (compose["services"]["intaglio"]["command"], container["args"]):
        own, to_replicas = words[: words.index("--")], words[words.index("--") + 1 :]
        parse_options(own)
        parse_options(["serve", *to_replicas])
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_the_images_user_may_write_to_the_volumes() -> None:
    """A new volume has the owner of the image's folder at that place, or root if there is none."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = [v.split(":") for v in compose["services"]["intaglio"]["volumes"]]
    [folder] = [path for source, path, *_ in mounts if source in compose["volumes"]]
    as_root = (DEPLOY / "Dockerfile").read_text().split("\nUSER ")[0]
    assert re.search(rf"mkdir {folder} && chown intaglio {folder}$", as_root, re.MULTILINE)


def test_mounted_files_exist() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    volumes = [v.split(":")[0] for s in services.values() for v in s.get("volumes", ()) if v.startswith("./")]
    assert len(volumes) == 3 and all((DEPLOY / v).exists() for v in volumes)
    assert (DEPLOY / services["intaglio"]["build"]["context"] / "deploy" / "Dockerfile").is_file()
