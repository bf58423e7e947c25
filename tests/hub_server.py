"""A hub on loopback: the parts of its HTTP interface that a download uses."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", "tokenizer.json")  # stored with Git LFS, named by their SHA-256


class Hub:
    """One model, ``owner/model``, and how the server misbehaves."""

    repo = "owner/model"

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.sent: dict[str, bytes] = {}  # other bytes than the listing promises
        self.stop_after: dict[str, int] = {}  # bytes after which connections break
        self.hold_after: dict[str, int] = {}  # bytes after which they wait for ``go_on``
        self.go_on = threading.Event()
        self.token: str | None = None  # needed for access
        self.failure: tuple[int, str] | None = None  # status and error code of every answer
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.url = ""

    def fetched(self, name: str) -> list[str | None]:
        """The Range header of each request for a file's bytes."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(name)]


def etag(name: str, content: bytes) -> str:
    """What the hub calls a file's content: SHA-256 or git's hash."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer requests on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def answer(self) -> None:
            hub.requests.append((self.command, self.path, self.headers["Range"]))
            if hub.failure:
                self.fail(*hub.failure)
            elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
                self.fail(401, "RepoNotFound")
            elif match := re.fullmatch(r"/api/models/(\w+/\w+)/revision/(\w+)\?.*", self.path):
                if self.known(match[1], match[2]):
                    self.listing()
            elif match := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/([\w.-]+)", self.path):
                if self.known(match[1], match[2]):
                    self.file(match[3])
            else:
                self.fail(404, "EntryNotFound")

        def known(self, repo: str, revision: str) -> bool:
            if repo != hub.repo:
                self.fail(404, "RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.fail(404, "RevisionNotFound")
            else:
                return True
            return False

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def listing(self) -> None:
            siblings = []
            for name, content in hub.files.items():
                entry: dict[str, object] = {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": etag("git", content),
                }
                if name.endswith(LARGE):
                    entry["lfs"] = {
                        "sha256": etag(name, content),
                        "size": len(content),
                        "pointerSize": 130,
                    }
                siblings.append(entry)
            body = json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def file(self, name: str) -> None:
            if name not in hub.files:
                return self.fail(404, "EntryNotFound")
            content = hub.sent.get(name, hub.files[name])
            start = 0
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
                start = int(match[1])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{etag(name, hub.files[name])}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            if self.command == "GET":
                stop = max(start, hub.stop_after.get(name, len(content)))
                held = max(start, hub.hold_after.get(name, stop))
                self.wfile.write(content[start:held])
                if held < stop:
                    self.wfile.flush()
                    hub.go_on.wait(60)
                    with suppress(OSError):  # nobody reads on
                        self.wfile.write(content[held:stop])
                self.close_connection = True
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
