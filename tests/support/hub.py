"""Fake Hugging Face Hub: a server with the part of its API that downloads use, for repositories held in memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOLVE = r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.*)"


class Hub(ThreadingHTTPServer):
    """`repos`: files by path, by "owner/name". Every revision in `revisions` is the same commit.

    `requests` are (method, path, Range header) as they came. `cut`: bytes after which a download breaks off, once.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.revisions, self.gated = repos, {"main", "v1"}, set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self):
        """Paths in their repositories of the files that were read, in the order of the first request for each."""
        read = (
            re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.*)", path) for way, path, _ in self.requests if way == "GET"
        )
        return list(dict.fromkeys(m[1] for m in read if m))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo, revision = m[1], m[2] or "main"
        elif m := re.fullmatch(RESOLVE, path):
            repo, revision = m["repo"], m["revision"]
        else:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if repo in self.server.gated and not path.startswith("/api/"):
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        commit = hashlib.sha1(repo.encode()).hexdigest()
        if revision not in self.server.revisions | {commit}:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self.answer(200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        if m["file"] not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        self.send_file(m["file"], files[m["file"]], commit)

    def send_file(self, name, data, commit):
        head = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        first = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].partition("-")[0])
        if first:
            head["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.answer(
            206 if first else 200,
            head,
            data[first:],
            self.server.cut.pop(name, None) if self.command == "GET" else None,
        )

    def answer(self, status, head, body=b"", cut=None):
        self.send_response(status)
        for key, value in {**head, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(repos):
    """A Hub of these repositories, served by a thread until the block ends."""
    hub = Hub(repos)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
