"""The documentation: its Python blocks and `intaglio` commands run, its links resolve, and the site lists all pages.

Blocks run in a folder where `checkpoint/folder`, `path/to/checkpoint` and every `~/models/NAME` are the bundled model
with a chat template. The Python blocks of a page share one namespace. `intaglio serve` is started on a free port, asked
for its health and stopped. Comments in a page, on the line before a block:

    <!-- run before: CODE -->    Python that readers need not see
    <!-- part of: FILE -->       the block is an extract of FILE, whose lines are compared; `...` stands for the rest
    <!-- not run: REASON -->     its Python is only compiled, and the options of its commands are only parsed
    <!-- fails: REASON -->       its commands end with exit code 1
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import parse_options
from typer.testing import CliRunner

import intaglio.cli
from intaglio.model import BUNDLED

REPO = Path(__file__).resolve().parent.parent
SITE = sorted((REPO / "docs").rglob("*.md"))
PAGES = [*(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *SITE]
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
MARK = re.compile(r"<!-- (not run|part of|run before|fails):\s(.*?)\s?-->", re.DOTALL)
COMMAND = re.compile(r" {4,}(intaglio|make|pip|curl|pre-commit|PYTHONPATH=tests|\.venv/bin/\w+) ")


@dataclass(frozen=True)
class Block:
    kind: str  # python, or command
    text: str
    line: int
    not_run: str = ""  # the reason
    fails: str = ""  # the reason
    part_of: str = ""  # the file of which it is an extract


def read_blocks(text: str) -> list[Block]:
    """The Python blocks and command lines of a page, in order."""
    blocks: list[Block] = []
    for found in MARK.finditer(text):
        if found[1] == "run before":
            blocks.append(Block("python", found[2], text.count("\n", 0, found.start())))
    lines, marks, at, marked = text.splitlines(), dict[str, str](), 0, -1
    while at < len(lines):
        line, start = lines[at], at
        at += 1
        if mark := MARK.fullmatch(line.strip()):
            marks, marked = {mark[1].replace(" ", "_"): mark[2]} if mark[1] != "run before" else {}, at
        elif fence := re.fullmatch(r" *(`{3,})(\w*)", line):
            while lines[at].strip() != fence[1]:
                at += 1
            if fence[2] == "python":
                blocks.append(Block("python", textwrap.dedent("\n".join(lines[start + 1 : at])), start + 1, **marks))
            at, marks = at + 1, {}
        elif COMMAND.match(line + " "):
            while line.endswith("\\"):
                line, at = line[:-1] + lines[at], at + 1
            blocks.append(Block("command", line.strip(), start + 1, **marks))
        elif not line.strip() and start > marked:
            marks = {}
    return sorted(blocks, key=lambda block: block.line)


def words_of(command: str) -> list[str]:
    """The words of a command line after its name, as a shell would pass them."""
    words = shlex.split(command, comments=True)[1:]
    return [re.sub(r"(^|=)~", lambda found: found[1] + os.environ["HOME"], word) for word in words]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the bundled model under the names that the documentation uses."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in ("checkpoint/folder", "path/to/checkpoint", *re.findall(r"~/(models/[\w.-]+)", text)):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in BUNDLED.iterdir():
            if file.name != "tokenizer_config.json" and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_server(words: list[str]) -> None:
    """Start `intaglio serve` with these words on a free port, ask for its health, stop it."""
    command = [sys.executable, "-m", "intaglio", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        try:
            found = re.search(r" at (http://[^\s;]+)", process.stdout.readline())
            assert found, process.stderr.read()
            assert urllib.request.urlopen(f"{found[1]}/health", timeout=60).status == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def check_extract(block: Block) -> None:
    """Raise AssertionError unless the block's lines, up to any `...`, begin lines of the file, in the same order."""
    lines = iter((REPO / block.part_of).read_text(encoding="utf-8").splitlines())
    for wanted in filter(None, (line.partition("...")[0].rstrip() for line in block.text.splitlines())):
        assert any(line.startswith(wanted) for line in lines), f"{block.part_of} has no line {wanted!r} there"


def run_command(block: Block) -> None:
    program = block.text.split()[0]
    if program == "make":
        targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert block.text.split()[1] in targets
    if program != "intaglio":
        return
    words = words_of(block.text)
    parse_options(words)
    if block.not_run:
        return
    if words[0] == "serve":
        run_server(words)
        return
    result = CliRunner().invoke(intaglio.cli.app, words, input="")
    assert result.exit_code == bool(block.fails), result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_blocks_run(page: Path, home: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in read_blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        try:
            if block.kind == "command":
                run_command(block)
            else:
                code = compile(block.text, where, "exec")
                if block.part_of:
                    check_extract(block)
                elif not block.not_run:
                    exec(code, names)
        except Exception as e:
            raise AssertionError(f"{where}: {block.text}") from e


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_fences(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def without_fences(text: str) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of a page's links and images, without those to other sites."""
    text = re.sub(r"`[^`\n]+`", "", without_fences(page.read_text(encoding="utf-8")))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if not target.startswith(("http://", "https://", "mailto:"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"
        assert page not in SITE or not file or REPO / "docs" in found.parents, f"{target} is outside the site"


def test_every_page_is_reachable() -> None:
    """Every page of the site can be reached by links from its home page or from the README."""
    reached, waiting = set[Path](), [REPO / "docs" / "index.md", REPO / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / target.partition("#")[0]).resolve() for target in links(page) if target[0] != "#"]
    assert {page.name for page in SITE if page not in reached and page.parent.name != "api"} == set()


def test_links_and_anchors_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`: three\n```\n# not a heading\n```\n[x](#one-three) `[y](z.md)`\n")
    assert anchors(page) == {"one-two-three"}
    assert links(page) == ["#one-three"]


def test_the_site_has_every_page() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (REPO / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(REPO / "docs")) for page in SITE)


def test_the_glossary_is_in_order() -> None:
    terms = re.findall(r"^\| \*\*(.*?)\*\*", (REPO / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 30
    assert terms == sorted(terms, key=str.lower)


def test_blocks_are_read() -> None:
    text = textwrap.dedent(
        """\
        <!-- run before: n = 1 -->

        ```python
        assert n == 1
        ```

        <!-- not run: needs a network -->

            intaglio demo \\
                --json  # why

            make demo
        """
    )
    assert read_blocks(text) == [
        Block("python", "n = 1", 0),
        Block("python", "assert n == 1", 3),
        Block("command", "intaglio demo         --json  # why", 9, "needs a network"),
        Block("command", "make demo", 12),
    ]


def test_a_changed_extract_is_found() -> None:
    check_extract(Block("python", "def check_extract(...\n    lines = ...", 1, part_of="tests/test_docs.py"))
    with pytest.raises(AssertionError, match="has no line 'def check_extracts"):
        check_extract(Block("python", "def check_extracts(block)", 1, part_of="tests/test_docs.py"))


def test_an_unknown_option_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse_options(["generate", "--no-such-option"])
