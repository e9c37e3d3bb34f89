"""A folder on http://, as served by web servers and hubs: ranges of a file, and a page that lists a folder."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """A file, or a part of it; a folder's list."""
        path, asked = Path(self.translate_path(self.path)), RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start, stop = (int(end) if end else None for end in asked.groups())
        part = data[-(stop or 0) :] if start is None else data[start : len(data) if stop is None else stop + 1]
        first = len(data) - len(part) if start is None else start
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@contextmanager
def web_folder(folder: Path) -> Iterator[str]:
    """The address at which a folder is served on loopback."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *arguments: _Handler(*arguments, directory=str(folder)),  # type: ignore[arg-type]
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
