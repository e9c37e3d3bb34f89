"""Walk through a store in a browser: `python jobs/explore.py STORE`, a small web server on this machine."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro

from jobs.places import captures_at
from jobs.terminal import LOG_EVERY_S, run_job, say

if TYPE_CHECKING:
    from analysis.explorer import Explorer

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Read a store's texts coloured by expert, look for tokens, walk from expert to expert; every view has a link.

    Prints the address to open, and answers until it is interrupted. What was committed is indexed once, beside the
    store (72 bytes a token for Mixtral); texts can be read meanwhile, and what a running capture commits is added as it
    comes. With --export nothing is served: documents are written as one file, for a paper's web page. Exit status: 0
    stopped, or exported; 2 when there is no such store, document or address.
    """

    store: Annotated[str, tyro.conf.Positional]
    """STORE, or STORE/DATASET for one of its data sets: demo.zarr, s3://bucket/routes.zarr/wikitext-103."""
    host: str = "127.0.0.1"
    """The address to listen at. Whoever reaches it can read the store: there is no password."""
    port: int = 8177
    """The port to listen at; 0 for any that is free."""
    index: Path | None = None
    """A folder for the index. Default: beside the store, or in the user's cache for a store in a bucket."""
    threads: int | None = None
    """Shards that are indexed at the same time. Default: one a processor."""
    export: Path | None = None
    """Write the documents that --document names here, as one HTML file that works offline, and end."""
    document: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """With --export: a document, by its id, or by its name where that is no number. May be repeated."""


def main(arguments: list[str]) -> int:
    """Serve, or export."""
    config = tyro.cli(ExploreConfig, prog="python jobs/explore.py", args=arguments, use_underscores=True)
    if bool(config.document) != (config.export is not None):
        raise ValueError("--export FILE and --document ID go together: give both, or neither")
    if not 0 <= config.port < 65_536:
        raise ValueError(f"--port {config.port}: 0 to 65535")
    store, names = captures_at(config.store)
    if not names:
        raise ValueError(f"{store} holds no data set yet")
    if config.export is not None:
        return _export(store, names, config)

    from analysis.explorer import Explorer  # numba takes a second: --help does not wait for it

    explorer = Explorer(store, names, config.index, threads=config.threads)
    return _serve(explorer, config)


def _export(store: str, names: list[str], config: ExploreConfig) -> int:
    """Write documents as one file."""
    if len(names) > 1:
        raise ValueError(f"{store} holds {', '.join(names)}: say which, as {store.rstrip('/')}/{names[0]}")
    output = config.export
    assert output is not None
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise ValueError(f"--export {output}: its folder must exist, and it must not be a folder itself")

    from analysis.export import export_page
    from analysis.files import whole_file
    from analysis.index import CaptureIndex
    from analysis.paths import document_number
    from analysis.view import View

    view = View(store, names[0], CaptureIndex(store, names[0], config.index).now)
    asked = [int(document) if document.isdecimal() else document for document in config.document]
    page = export_page(view, [document_number(view.capture, document) for document in asked])
    with whole_file(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(output.absolute())
    return 0


def _serve(explorer: "Explorer", config: ExploreConfig) -> int:
    """Answer until interrupted, and index meanwhile."""
    import uvicorn

    from jobs.site import site

    everywhere = config.host in ("0.0.0.0", "::")
    application = site(explorer, ["*"] if everywhere else [*LOOPBACK, config.host])
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=2))
    stop = threading.Event()
    follower = threading.Thread(target=explorer.follow, args=(stop, _tell()), daemon=True)
    with _listener(config.host, config.port) as listener:
        if config.host not in LOOPBACK:
            say(f"note: whoever reaches {config.host} can read this store: there is no password")
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"http://{host}:{listener.getsockname()[1]}/", flush=True)
        say("Ctrl-C stops it")
        follower.start()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has stopped in order, and hands the signal on
            pass
        finally:
            stop.set()
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises
    ------
    ValueError
        When the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen at {host}, port {port} ({error}): give another --port, or 0 for any"
        ) from error
    return listener


def _tell() -> Callable[[str, int, int], None]:
    """Says every ten seconds how far the index of a data set is, and when it is done."""
    said = time.monotonic()
    lock = threading.Lock()

    def tell(name: str, done: int, total: int) -> None:
        nonlocal said
        with lock:
            if done == total or time.monotonic() - said >= LOG_EVERY_S:
                said = time.monotonic()
                say(f"{name}: {done:,} of {total:,} shards indexed")

    return tell


if __name__ == "__main__":
    run_job(main)
