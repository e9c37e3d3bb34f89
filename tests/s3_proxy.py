"""A proxy for an S3 server on loopback that breaks requests like networks and storages do, and counts them.

Each broken request has one fault, and its retry succeeds unless there are more faults:

- "503", "500": rejected before the server has seen it;
- "reset": the connection is closed in the middle of the request, which the server never sees;
- "lost": the server does it, and the answer is lost with the connection;
- "stall": the server does it, but the answer does not arrive before the client gives up;
- "cut": the answer's body ends too early.
"""

import contextlib
import http.client
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from patience import HUNG_S

FAULTS = ("503", "500", "reset", "lost", "stall", "cut")
Fault = Callable[[str, str], str | None]
"""Maps the method and key of a request to its fault, if any."""


@dataclass(frozen=True)
class Seen:
    """A request."""

    at: float
    method: str
    key: str
    """The key below the store; empty for a listing and a removal."""
    condition: str | None
    """The condition of a put: what must be there, or must not be there ("*")."""
    fault: str | None


class Proxy(ThreadingHTTPServer):
    """The proxy. Requests pass unchanged until `fault` is set.

    Parameters
    ----------
    address : str
        The server's.
    """

    daemon_threads = True

    def __init__(self, address: str) -> None:
        self.server, self.fault = urlsplit(address), _no_fault
        self.seen: list[Seen] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        """What AWS_ENDPOINT_URL must say."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that gave up."""

    def requests(self) -> list[str]:
        """ "GET fake/zarr.json" for each request."""
        return [f"{one.method} {one.key}" for one in self.seen]

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """What the server answers."""
        connection = http.client.HTTPConnection(str(self.server.hostname), self.server.port, timeout=HUNG_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        key = unquote(urlsplit(self.path).path).partition("/routes.zarr")[2].lstrip("/")
        fault = self.server.fault(self.command, key)
        condition = self.headers.get("If-None-Match") or self.headers.get("If-Match")
        self.server.seen.append(Seen(time.monotonic(), self.command, key, condition, fault))
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset":
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.rfile.read(length)
        if fault in ("500", "503"):
            return self.send(int(fault), {}, b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>")
        status, headers, data = self.server.forward(self.command, self.path, dict(self.headers), body)
        if fault == "lost":
            return self.hang_up()
        if fault == "stall":
            self.connection.settimeout(HUNG_S)
            self.rfile.read(1)  # returns nothing when the client closes the connection
            return self.hang_up()
        self.send(status, headers, data, cut=fault == "cut" and len(data) > 1)
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def send(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


def _no_fault(method: str, key: str) -> str | None:
    return None


def once_each(faults: Iterable[str | None]) -> Fault:
    """Each of these faults once, on the next requests."""
    left, lock = deque(faults), threading.Lock()

    def fault(method: str, key: str) -> str | None:
        with lock:
            return left.popleft() if left else None

    return fault


@contextlib.contextmanager
def proxy(address: str) -> Iterator[Proxy]:
    """A proxy that runs during the block."""
    server = Proxy(address)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
