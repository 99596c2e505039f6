"""The list of architectures: complete for the installed transformers, each ported or refused, the page as generated."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.models import families

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("models_script", ROOT / "scripts/models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_data_and_page_are_fresh(script):
    data = json.loads(script.DATA.read_text())
    if data["transformers"] != transformers.__version__:
        pytest.skip(f"the list is of transformers {data['transformers']}, installed is {transformers.__version__}")
    found = {name: row["deviation"] for name, row in data["architectures"].items() if "deviation" in row}
    derived = {name: row["automatic"] for name, row in data["architectures"].items() if "automatic" in row}
    assert data == script.gather(found, derived), "run python scripts/models.py"
    assert script.PAGE.read_text() == script.page(data), "run python scripts/models.py"


def test_every_architecture_is_ported_and_measured_or_has_a_reason(script):
    for name, row in json.loads(script.DATA.read_text())["architectures"].items():
        if name in families():
            assert "reason" not in row
            assert 0 < row.get("deviation", 1e-9) < 2e-4, name
        else:
            assert row["reason"], name


def test_automatic_ports_are_within_the_limit(script):
    derived = [
        row["automatic"] for row in json.loads(script.DATA.read_text())["architectures"].values() if "automatic" in row
    ]
    assert len(derived) >= 40 and max(derived) < 1e-4


def test_command():
    result = CliRunner().invoke(app, ["models", "--all", "--json"])
    assert result.exit_code == 0, result.output
    table = json.loads(result.output)["architectures"]
    assert table["LlamaForCausalLM"]["status"] == "ported"
    assert table["RwkvForCausalLM"]["status"] == "refused" and "recurrent" in table["RwkvForCausalLM"]["reason"]
