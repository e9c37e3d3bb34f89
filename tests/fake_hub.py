"""A hub on the loopback interface: enough of its protocol for the real client libraries to run against it.

It serves files from memory, `datasets/org/name` and `org/name` alike, at one commit. A private repository
answers 401 without the token. Clients read `HF_ENDPOINT` when imported: start them in a subprocess, with
`FakeHub.environment`.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_for_tests"
Files = dict[str, bytes]


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories`: "datasets/org/name" or "org/name" → path in it → bytes."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Files], private: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private = repositories, private
        self.asked: list[str] = []

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, **also: str) -> dict[str, str]:
        """The environment of a client: this hub, caches under `home`, none of the caller's own settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept |= {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home)}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return kept | also


class Handler(BaseHTTPRequestHandler):
    """Answers `/api/KIND/REPO[/revision/…|/tree/REVISION/FOLDER]` and `/REPO/resolve/REVISION/PATH`."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the tests' output quiet."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/").removeprefix("models/")
        self.server.asked.append(path)
        known = [name for name in self.server.repositories if f"{path}/".startswith(f"{name}/")]
        if not known:
            return self.send(404, error="RepoNotFound")
        if known[0] in self.server.private and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401, error="RepoNotFound")
        files = self.server.repositories[known[0]]
        action, _, rest = path.removeprefix(known[0]).strip("/").partition("/")
        revision, _, name = rest.partition("/")
        if revision not in ("", "main", COMMIT):
            return self.send(404, error="RevisionNotFound")
        if action == "resolve":
            return self.send(200, files[name]) if name in files else self.send(404, error="EntryNotFound")
        if action == "tree":
            return self.send(200, json.dumps(listing(files, name, "recursive=true" in self.path.lower())))
        siblings = [{"rfilename": path} for path in files]
        info = {"id": known[0].removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
        return self.send(200, json.dumps(info))

    do_HEAD = do_GET

    def send(self, status: int, data: bytes | str = b"", error: str | None = None) -> None:
        data = data if isinstance(data, bytes) else data.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def listing(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files below a folder; or the files and folders right in it."""
    below = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
    depth = len(folder.split("/")) + 1 if folder else 1
    children = {"/".join(path.split("/")[:depth]) for path in below}
    folders = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(children - set(below))]
    return folders + [
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in below.items()
        if recursive or path in children
    ]
