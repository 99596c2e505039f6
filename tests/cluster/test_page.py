"""The page of a router loads nothing from other hosts, and shows replicas and incidents."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.clustered import clustered
from support.served import TEST_TIMEOUT_S, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_and_the_incidents_that_it_shows(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    words = "--api-key", "secret"
    headers = {"authorization": "Bearer secret"}
    with clustered(folder, tmp_path_factory.mktemp("p"), 1, *words) as cluster:
        page = httpx.get(cluster.url, timeout=TEST_TIMEOUT_S)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(r"https?://|//[a-z]|@import|url\(", page.text)

        def state() -> Any:
            return httpx.get(f"{cluster.url}/cluster", headers=headers, timeout=TEST_TIMEOUT_S).json()

        assert state()["incidents"] == []
        assert httpx.get(f"{cluster.url}/cluster", timeout=TEST_TIMEOUT_S).status_code == 401
        cluster.kill("r0")
        wait_for(lambda: len(state()["incidents"]) == 2)
        assert [i["what"] for i in state()["incidents"]] == [
            "replica r0 ended with exit code -9; it is started again", "replica r0 serves again",
        ]  # fmt: skip
        if CHROMIUM:
            look(cluster.url, state()["incidents"][0]["what"])


def look(url: str, incident: str) -> None:
    """Check in a browser that the page asks for the key and shows the replica and the incident."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TEST_TIMEOUT_S * 1000)
        page, faults = browser.new_page(), []
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.goto(url)
        wait_for(lambda: "API key" in (page.text_content("#note") or ""))
        page.fill("#key", "secret")
        wait_for(lambda: incident in (page.text_content("#incidents") or ""))
        assert (page.text_content("#replicas") or "").startswith("r0ready")
        assert not faults
        browser.close()
