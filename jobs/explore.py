"""Explore a store in a browser: texts coloured by expert, tokens, experts, documents.

usage: python jobs/explore.py STORE[/DATASET] [options]

Examples:
  python jobs/explore.py demo.zarr
  python jobs/explore.py demo.zarr/demo-prose --port 0
  python jobs/explore.py demo.zarr/demo-prose --export page.html --document 12

Server:
  --port PORT               the port to listen at, 0 for any free port (8177)
  --host ADDRESS            anyone who reaches it can read the store: no password (127.0.0.1)
  --page PAGE               the page of the printed address: demo-code/token/604
  --index FOLDER            where the index is kept (next to the store)
  --threads N               shards indexed at the same time (one per processor)
  --processes N             server processes, for more visitors (one per processor, at most 4)

What counts:
  --phase PHASE             count and find only tokens of the prompt, or only generated ones
  --role ROLE               count and find only tokens of this speaker; repeat for more

One file instead of a server:
  --export FILE             write documents as an HTML file that works offline
  --document DOCUMENT       a document, by its id or its name; repeat for more

It runs until Ctrl-C stops it. docs/options.md explains every option.
Exit status: 0 stopped or exported, 2 no such store, document or address.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.places import capture_at, captures_at, refuse_no_file
from jobs.console.terminal import log, run_job

if TYPE_CHECKING:
    from analysis.explorer.live import Explorer


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Read a store's texts coloured by expert, search for tokens, and go from expert to expert; every view has a link.

    Prints the address to open, and runs until it is interrupted. Committed data is indexed once, next to the store (73
    bytes per token for Mixtral). Texts can be read during indexing, and what a running capture commits is added
    continuously. With --export there is no server: documents are written as one file, for a paper's web page. Exit
    status: 0 stopped or exported, 2 no such store, document or address.
    """

    place: Annotated[str, tyro.conf.Positional]
    """STORE, or STORE/DATASET for one of its data sets: demo.zarr, s3://bucket/routes.zarr/wikitext-103."""
    page: str | None = None
    """The page of the printed address, without the host, as given in reports: demo-code/expert/2/7."""
    host: str = "127.0.0.1"
    """The address to listen at. Anyone who reaches it can read the store: there is no password."""
    port: int = 8177
    """The port to listen at; 0 for any free port."""
    index: Path | None = None
    """A folder for the index. Default: next to the store, or in the user's cache for a store in a bucket."""
    processes: int | None = None
    """Server processes: more visitors at once, but more memory. Default: one per processor, at most 4."""
    threads: int | None = None
    """Shards indexed at the same time. Default: one per processor."""
    phase: Annotated[tuple[Literal["prompt", "generated"], ...], tyro.conf.UseAppendAction] = ()
    """Count and find only tokens of this phase, if captures record it (imported routes do); texts are shown in full.
    May be repeated. Each selection has a separate index."""
    role: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Count and find only tokens of this speaker, if captures contain conversations: assistant. May be repeated."""
    export: Path | None = None
    """Write the documents of --document to this file, as one HTML page that works offline, and exit."""
    document: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """With --export: a document, by its id, or by its name if that is not a number. May be repeated."""


def main(arguments: list[str]) -> int:
    """Serve, or export."""
    config = parse(ExploreConfig, "explore", arguments)
    if bool(config.document) != (config.export is not None):
        raise ValueError("--export FILE and --document ID go together: give both, or neither")
    if not 0 <= config.port < 65_536:
        raise ValueError(f"--port {config.port}: must be 0 to 65535")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"--threads {config.threads}: must be at least 1")
    if config.processes is not None and config.processes < 1:
        raise ValueError(f"--processes {config.processes}: must be at least 1")
    if config.export is not None and (config.phase or config.role):
        raise ValueError("--export writes complete texts: it cannot be combined with --phase and --role")
    if config.export is not None:
        return _export(*capture_at(config.place), config)
    store, names = captures_at(config.place)

    from analysis.explorer.live import Explorer  # numba takes a second: --help must not wait for it
    from analysis.scanning import Selection

    _open_more_files()
    only = Selection(roles=config.role or None, phases=config.phase or None)
    named = None if config.place.rstrip("/") == store.rstrip("/") else names
    return _serve(Explorer(store, named, config.index, only=only, threads=config.threads, log=log), config)


def _export(store: str, name: str, config: ExploreConfig) -> int:
    """Write documents as one file."""
    output = config.export
    assert output is not None
    refuse_no_file("export", output)

    from analysis.explorer.index import CaptureIndex
    from analysis.explorer.one_file import export_page
    from analysis.explorer.view import View
    from analysis.metrics.paths import document_number
    from store.files import whole_file

    view = View(store, name, CaptureIndex(store, name, config.index).now)
    asked = [int(document) if document.isdecimal() else document for document in config.document]
    page = export_page(view, [document_number(view.capture, document) for document in asked])
    with whole_file(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(output.absolute())
    return 0


def _serve(explorer: "Explorer", config: ExploreConfig) -> int:
    """Serve until interrupted, and index in the background."""
    from analysis.explorer.serving import MOST, helpers, server_of

    stop = threading.Event()
    follower = threading.Thread(target=explorer.follow, args=(stop,), daemon=True)
    with _listener(config.host, config.port) as listener:
        where, port = listener.getsockname()[:2]
        address = ipaddress.ip_address(where)
        here = (socket.gethostname(), config.host)
        server = server_of(explorer, here)
        processes = config.processes or min(MOST, os.cpu_count() or 1)
        if not address.is_loopback:
            log(f"note: anyone who reaches {where}, port {port}, can read this store: there is no password")
        name = socket.gethostname() if address.is_unspecified else f"[{where}]" if address.version == 6 else where
        print(f"http://{name}:{port}/{(config.page or '').lstrip('/')}", flush=True)
        log("press Ctrl-C to stop")
        follower.start()
        try:
            with helpers(explorer, here, listener, processes - 1):
                server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has shut down cleanly and passes the signal on
            pass
        finally:
            stop.set()
    return 0


def _open_more_files() -> None:
    """Each part of an index is an open file: a hundred million tokens need 400."""
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if limit != resource.RLIM_INFINITY else limit, most))


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises
    ------
    ValueError
        When the address does not belong to this machine, or the port is in use.
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
            f"cannot listen at {host}, port {port} ({error}): use another --port, or 0 for any free one"
        ) from error
    return listener


if __name__ == "__main__":
    run_job(main)
