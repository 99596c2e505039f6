"""Models by hub id: files that are downloaded, cache, offline use, errors; against a hub in this process."""

import json
import os
import subprocess
import sys

import pytest
from support.hub import serving

from intaglio import LLM
from intaglio.model import BUNDLED, Model
from intaglio.models.hub import HubError, choose_files, hub_id, locate

constants = pytest.importorskip("huggingface_hub.constants")
FILES = {p.name: p.read_bytes() for p in BUNDLED.iterdir() if p.is_file()}
READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
REPO = "some/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the bundled model as some/model, and an empty cache."""
    with serving({REPO: {**FILES, "pytorch_model.bin": b"pickle", "modeling_own.py": b"raise SystemExit(9)"}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield hub


def test_a_hub_id_loads_as_the_folder_does(hub):
    reports = []
    llm = LLM(REPO, progress=lambda *report: reports.append(report))
    assert llm.model.name == REPO
    assert llm.generate("def f(")[0].token_ids == LLM().generate("def f(")[0].token_ids
    assert hub.downloaded() == READ  # neither the pickle nor the code
    total = sum(len(FILES[name]) for name in READ)
    downloads = [done for done, all_of_them, what in reports if what.startswith("downloading") and all_of_them == total]
    assert downloads == sorted(downloads) and downloads[-1] == total


def test_what_is_in_the_cache_is_not_downloaded_again_and_serves_without_a_network(hub, monkeypatch):
    path = locate(REPO)
    hub.requests.clear()
    assert locate(REPO) == path and hub.downloaded() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(REPO) == path
    with pytest.raises(
        HubError, match=r"the cache of the hub has no some/other, .* cannot be reached: .*HF_HUB_OFFLINE"
    ):
        locate("some/other")
    (path / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"has no weights, .*these are the files in the cache"):
        locate(REPO)


def test_an_unreachable_hub_is_named_with_the_reason(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"no folder some/model here, the cache .*cannot be reached: .*refused"):
        Model.open(REPO)


def test_a_download_that_breaks_off_is_completed(hub):
    hub.cut["model.safetensors"] = 100_000
    assert (locate(REPO) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize(
    "repo, revision, why",
    [
        ("some/other", None, "no folder some/other here and no repository of that name"),
        (REPO, "v2", "some/model has no revision 'v2'; give a branch, tag or commit"),
        ("some/gated", None, "some/gated is gated: ask for access on its page"),
        (str(BUNDLED), "v1", "revision 'v1' is for a hub id"),
    ],
)
def test_what_the_hub_refuses_is_refused_with_the_next_step(hub, repo, revision, why):
    hub.repos["some/gated"], hub.gated = FILES, {"some/gated"}
    with pytest.raises(HubError, match=why):
        locate(repo, revision)


def test_a_revision_is_a_tag_or_a_commit(hub):
    path = locate(REPO, "v1")
    assert locate(REPO, path.name) == path


def test_a_folder_comes_before_a_repository_of_its_name(hub, tmp_path):
    (tmp_path / REPO).mkdir(parents=True)
    assert str(locate(REPO)) == REPO and hub_id(REPO) is None and hub.requests == []
    assert hub_id("some/other:Q8_0") == "some/other:Q8_0"
    assert [hub_id(x) for x in ("name", "a/b/c", "./a", "/a/b", "a/b:", "~/a")] == [None] * 6


def test_the_command_line_takes_hub_ids(hub, tmp_path):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run = [sys.executable, "-m", "intaglio", "models", REPO, "--revision", "v1", "--json"]
    made = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)["architecture"] and hub.downloaded() == READ


WEIGHTS = [f"m-{q}.gguf" for q in ("Q4_K_S", "Q4_K_M", "Q8_0", "IQ4_XS")]


@pytest.mark.parametrize(
    "files, tag, chosen",
    [
        (["config.json", "model.safetensors", "README.md", "x.py"], None, ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors", "m.gguf"], None, ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors", *WEIGHTS], "Q8_0", ["m-Q8_0.gguf"]),
        (["config.json", "weights.safetensors"], None, ["config.json", "weights.safetensors"]),
        (["config.json", "consolidated.safetensors", "x.safetensors"], None, ["config.json", "x.safetensors"]),
        (
            ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors", "c.safetensors"], None,
            ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"],
        ),
        (
            ["config.json", "model.safetensors.index.json", "model.safetensors", "a.safetensors", "b.safetensors"],
            None,
            ["config.json", "model.safetensors"],
        ),
        (WEIGHTS, None, ["m-Q4_K_M.gguf"]),
        (WEIGHTS, "q4_k_s", ["m-Q4_K_S.gguf"]),
        (["m-Q8_0.gguf", "mmproj-m-f16.gguf"], None, ["m-Q8_0.gguf"]),
        (
            ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", *WEIGHTS[:2]], "Q8_0",
            ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"],
        ),
        (["adapter_config.json", "adapter_model.bin"], None, ["adapter_config.json"]),
        (["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"], None, ["open_clip_config.json"]),
        (["config.json", "vision_tower.safetensors", "x.safetensors"], None, ["config.json", "x.safetensors"]),
        (
            ["additional_chat_templates/tool.jinja", "config.json", "hf_quant_config.json", "model.safetensors"], None,
            ["additional_chat_templates/tool.jinja", "config.json", "hf_quant_config.json", "model.safetensors"],
        ),
    ],
)  # fmt: skip
def test_one_format_is_chosen(files, tag, chosen):
    tables = {
        "config.json": {},
        "model.safetensors.index.json": {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}},
    }
    assert choose_files(REPO, files, tag, tables.__getitem__) == chosen


@pytest.mark.parametrize(
    "files, tag, why",
    [
        (["config.json", "pytorch_model.bin"], None, "has its weights in pytorch_model.bin only"),
        (["README.md"], None, "has no weights, neither .*README.md"),
        (["config.json", "a.safetensors", "b.safetensors"], None, "2 safetensors files and no model.safetensors.index"),
        (WEIGHTS, "Q2_K", "has 4 GGUF models and none of them is Q2_K: m-IQ4_XS.gguf, .*choose one, as in"),
        (["a-Q8_0.gguf", "b-Q6_K.gguf"], None, "2 GGUF models and none of them is Q4_K_M"),
        (["config.json", "model.safetensors"], "Q8_0", "has no GGUF files, so :Q8_0 chooses nothing"),
        (["config.json", "model.safetensors.index.json", "a.safetensors"], None, "names b.safetensors, which"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_the_files_there_are(files, tag, why):
    tables = {
        "config.json": {},
        "model.safetensors.index.json": {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}},
    }
    with pytest.raises(HubError, match=why):
        choose_files(REPO, files, tag, tables.__getitem__)
