"""The page at /: it loads nothing from other hosts, and in a headless Chromium, if there is one, streams an answer."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.served import TEST_TIMEOUT_S, Slow, served, wait_for
from support.tiny import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def until(page: Any, what: str) -> None:
    """Wait for an expression to hold. Not by the page's own means: its policy lets nobody evaluate text in it."""
    wait_for(lambda: bool(page.evaluate(what)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("page") / "tiny", num_hidden_layers=2)


def test_it_fetches_nothing_from_elsewhere(folder: Path) -> None:
    with served(folder) as s:
        page = s.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page.text)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_it_works_in_a_browser(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    with served(folder, keys=("secret",)) as s, sync_playwright() as p:
        s.llm.engine.executable = Slow(s.llm.engine.executable, 0.2)
        s.llm.model = replace(s.llm.model, eos_ids=frozenset())  # so that the answer lasts as long as it is looked at
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TEST_TIMEOUT_S * 1000)
        page = browser.new_page()
        page.set_default_timeout(TEST_TIMEOUT_S * 1000)
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(s.url)
        until(page, "document.getElementById('note').textContent.includes('API key')")
        page.fill("#key", "secret")
        until(page, "document.getElementById('model').textContent.startsWith('tiny')")
        page.fill("#text", "hello <b>there</b>")
        page.click("#send")
        until(page, "+document.getElementById('running').textContent === 1")
        until(page, "+document.getElementById('speed').textContent > 0")
        until(page, "document.querySelector('.assistant')?.textContent.length > 3")
        drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x)"
        assert page.eval_on_selector("#steps", drawn)
        assert page.text_content(".user") == "hello <b>there</b>"  # text, never markup
        page.click("#stop")
        wait_for(lambda: s.llm.engine.counts.finished["abort"] == 1)
        until(page, "+document.getElementById('running').textContent === 0")
        assert faults == [] and all(url.startswith((s.url, "data:")) for url in asked)
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_without_a_template_it_continues_text(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    with served(None, llm={"device": "host"}) as s, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TEST_TIMEOUT_S * 1000)
        page = browser.new_page()
        page.set_default_timeout(TEST_TIMEOUT_S * 1000)
        page.goto(s.url)
        until(page, "document.getElementById('model').textContent.includes('continues text')")
        page.fill("#text", "def read(self")
        page.press("#text", "Enter")
        until(page, "document.querySelector('.assistant') && !document.getElementById('send').disabled")
        assert len(page.text_content(".assistant") or "") > 20
        browser.close()
