"""The account of a checkpoint lists each tensor and key once, for every family and for random combinations of quirks.

INTAGLIO_ACCOUNT_CASES sets how many combinations are tried (30).
"""

from __future__ import annotations

import json
import os
import secrets
import warnings

import pytest
from support.quirks import quirky
from support.tiny import FAMILIES, MIXTURES, tiny
from typer.testing import CliRunner

from intaglio.cli import app
from intaglio.models import Checkpoint, account, port

safetensors = pytest.importorskip("safetensors.torch")
CASES = [*FAMILIES, *MIXTURES, "leftovers", "shards", "quantised", "tied"]
QUIRKY = int(os.environ.get("INTAGLIO_ACCOUNT_CASES", "30"))
JSON_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def made(case, path):
    """A checkpoint of this case."""
    import torch

    if case in FAMILIES or case in MIXTURES:
        return tiny(case, path)
    if case == "shards":
        return tiny("llama", path, max_shard_size="100KB")
    if case == "tied":
        tiny("qwen2", path)
        held = safetensors.load_file(path / "model.safetensors")
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
        safetensors.save_file(held, path / "model.safetensors")
        return path
    tiny("llama", path)
    held = safetensors.load_file(path / "model.safetensors")
    table = json.loads((path / "config.json").read_text())
    if case == "quantised":
        for name in [n for n in held if n.endswith("_proj.weight")]:
            scale = held[name].abs().amax() / 448
            held[name] = (held[name] / scale).to(torch.float8_e4m3fn)
            held[f"{name}_scale"] = scale
            held[name.replace("weight", "input_scale")] = torch.tensor(0.1)
        table["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["x"]}
    else:
        held["model.rotary_emb.inv_freq"] = torch.ones(8)
        held["model.norm.bias"] = torch.zeros(64)
        (path / "README.md").write_text("")
        (path / "pytorch_model.bin").write_text("")
        table |= {"torch_dtype": "float32", "_name_or_path": "x", "a_key_of_my_own": 3}
    safetensors.save_file(held, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_and_key_once(tmp_path, case):
    hold(made(case, tmp_path / "m"))


@pytest.mark.parametrize("number", range(QUIRKY))
def test_with_quirks(tmp_path, number):
    seed = secrets.randbelow(2**31)
    try:
        hold(quirky(tmp_path / "m", tmp_path / "source", seed))
    except AssertionError as e:
        raise AssertionError(f"seed {seed}") from e


def hold(path):
    """Every tensor of the files that hold the model, every key of the JSON files and every file is listed once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = account(path)
    table = json.loads(json.dumps(a.table()))
    used = {f["file"] for f in table["files"] if f["fate"] == "used"}
    files = {f.name: safetensors.load_file(f) for f in path.glob("*.safetensors") if f.name in used}
    listed = [(t["file"], t["name"]) for t in table["tensors"]]
    assert sorted(listed) == sorted((f, n) for f, held in files.items() for n in held)
    for t in table["tensors"]:
        x = files[t["file"]][t["name"]]
        assert t["shape"] == list(x.shape) and t["bytes"] == x.numel() * x.element_size()
        assert bool(t["becomes"]) == (t["fate"] == "used") and (t["fate"] == "used" or t["why"])
    keys = [(k["file"], k["key"]) for k in table["keys"]]
    assert len(set(keys)) == len(keys) and all(k["why"] and k["fate"] in ("used", "ignored") for k in table["keys"])
    for file in JSON_FILES:
        if (path / file).exists():
            assert {(file, key) for key in json.loads((path / file).read_text())} <= set(keys)
    inside = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())  # templates alone are in a folder
    assert sorted(f["file"] for f in table["files"]) == inside
    assert all(f["why"] for f in table["files"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = port(Checkpoint.open(path))
    weights = {t.name for t in program.of_role("weight")}
    assert {b for t in table["tensors"] for b in t["becomes"]} == weights
    assert table["bytes"] == sum(g["bytes"] for g in table["groups"])


def test_reasons(tmp_path):
    a = account(made("leftovers", tmp_path / "m"))
    why = {t.name: t.why for t in a.tensors} | {f"{f.file}:{f.key}": f.why for f in a.keys}
    why |= {f.file: f.why for f in a.files}
    for name, says in {
        "model.rotary_emb.inv_freq": "a table of rope", "model.norm.bias": "a bias of zeros",
        "config.json:torch_dtype": "each tensor's header", "config.json:rope_parameters.factor": "read by the port",
        "config.json:a_key_of_my_own": "has no such setting", "README.md": "documentation",
        "pytorch_model.bin": "weights in another format", "config.json:eos_token_id": "an end of sequence",
        "tokenizer_config.json:clean_up_tokenization_spaces": "as in transformers 5",
    }.items():  # fmt: skip
        assert says in why[name], name
    assert a.said_by == "config.json: architectures=LlamaForCausalLM"
    assert [n for n in a.notes if "a_key_of_my_own=3 is ignored" in n] == list(a.notes)
    quantised = account(made("quantised", tmp_path / "q"))
    keys = {f.key: f for f in quantised.keys}
    assert keys["quantization_config.quant_method"].fate == "used"
    assert "formats of their own" in keys["quantization_config.activation_scheme"].why
    assert quantised.quantised_by == "config.json: quantization_config" and not quantised.notes


def test_the_command(tmp_path):
    path = made("leftovers", tmp_path / "m")
    run = CliRunner().invoke(app, ["models", str(path)])
    assert run.exit_code == 0
    assert "LlamaForCausalLM" in run.output and "model.layers.*.mlp.up_proj.weight" in run.output
    assert "note: config.json: a_key_of_my_own=3 is ignored" in run.output
    run = CliRunner().invoke(app, ["models", str(path), "--json"])
    assert run.exit_code == 0 and json.loads(run.output)["architecture"] == "LlamaForCausalLM"
    (path / "model.safetensors").unlink()
    assert CliRunner().invoke(app, ["models", str(path)]).exit_code != 0
