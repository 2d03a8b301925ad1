"""A Hugging Face hub on 127.0.0.1: the few endpoints that huggingface_hub asks for when it downloads a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "76543210fedcba9876543210fedcba9876543210"


class FakeHub:
    """One repository, `org/model`, with `files` at COMMIT and OLD_COMMIT.

    Attributes:
        files: name -> content.
        fail: what to answer instead: "404", "revision", "gated", "401", "503" or "".
        cut: name -> bytes after which the first transfer of that file breaks off.
        broken: names whose transfer always fails.
        requests: every "METHOD path" that came in.
        ranges: Range headers that came in, by file name.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fail = ""
        self.cut: dict[str, int] = {}
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str]] = []
        self.url = ""

    def downloads(self) -> Counter[str]:
        """How often each file was asked for with GET."""
        return Counter(
            line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line
        )


@contextmanager
def serve(hub: FakeHub) -> Iterator[None]:
    """Answer requests while the block runs; `hub.url` is the address."""

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.fake.requests.append(f"{self.command} {url.path}")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self.fake.fail == "503":
            self._send(503, b"down")
        elif parts[:2] == ["api", "models"]:
            self._api(parts[2:], parse_qs(url.query))
        elif len(parts) == 5 and parts[2] == "resolve":
            self._file(parts[3], parts[4])
        else:
            self._send(404, b"")

    def _api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        refused = {"404": (404, "RepoNotFound"), "revision": (404, "RevisionNotFound"), "401": (401, "")}
        if self.fake.fail in refused:
            status, code = refused[self.fake.fail]
            self._send(status, b"{}", **({"X-Error-Code": code} if code else {}))
        elif parts[2:3] == ["auth-check"]:
            gated = {"X-Error-Code": "GatedRepo"} if self.fake.fail == "gated" else {}
            self._send(403 if gated else 200, b"{}", **gated)
        elif parts[2:3] == ["tree"]:
            self._json(
                [{"type": "file", "path": n, "size": len(c), "oid": _sha1(c)} for n, c in self.fake.files.items()]
            )
        else:
            siblings = [{"rfilename": n, "size": len(c), "blobId": _sha1(c)} for n, c in self.fake.files.items()]
            commit = OLD_COMMIT if parts[2:] == ["revision", OLD_COMMIT] else COMMIT
            gated = "manual" if self.fake.fail == "gated" else False
            body = {"id": "org/model", "sha": commit, "gated": gated}
            if "blobs" not in query:  # real answers name the files without it, too, but not their sizes
                siblings = [{"rfilename": s["rfilename"]} for s in siblings]
            self._json({**body, "siblings": siblings})

    def _file(self, commit: str, name: str) -> None:
        content = self.fake.files[name]
        common = {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "GET" and name in self.fake.broken:
            self._send(500, b"broken")
        elif (asked := self.headers.get("Range")) and self.command == "GET":
            self.fake.ranges.append((name, asked))
            start = int(asked.removeprefix("bytes=").split("-")[0])
            extent = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], **common, **{"Content-Range": extent})
        elif self.command == "GET" and name in self.fake.cut:
            self._send(200, content, stop=self.fake.cut.pop(name), **common)
        else:
            self._send(200, content, **common)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, stop: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if stop is None else body[:stop])
        if stop is not None:
            self.close_connection = True


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
