"""Walk through a store in a browser: texts coloured by expert, tokens, experts, documents.

usage: python jobs/explore.py STORE[/DATASET] [options]

Examples:
  python jobs/explore.py demo.zarr
  python jobs/explore.py demo.zarr/demo-prose --port 0
  python jobs/explore.py demo.zarr/demo-prose --export page.html --document 12

Server:
  --port PORT               where it listens, 0 for any that is free (8177)
  --host ADDRESS            whoever reaches it can read the store: there is no password (127.0.0.1)
  --page PAGE               what the printed address opens: demo-code/token/604
  --index FOLDER            where the index is kept (beside the store)
  --threads N               shards that are indexed at the same time (one a processor)
  --processes N             that answer, for several visitors at once (one a processor, 4 at most)

What counts:
  --phase PHASE             count and find only tokens of the prompt, or only generated ones
  --role ROLE               count and find only tokens of this speaker; repeat for more

One file instead of a server:
  --export FILE             write documents as an HTML file that works offline
  --document DOCUMENT       one of them, by its id or its name; repeat for more

It answers until Ctrl-C stops it. docs/options.md explains every option.
Exit status: 0 stopped or exported, 2 there is no such store, document or address.
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
    """Read a store's texts coloured by expert, look for tokens, walk from expert to expert; every view has a link.

    Prints the address to open, and answers until it is interrupted. What was committed is indexed once, beside the
    store (73 bytes a token for Mixtral); texts can be read meanwhile, and what a running capture commits is added as it
    comes. With --export nothing is served: documents are written as one file, for a paper's web page. Exit status: 0
    stopped, or exported; 2 when there is no such store, document or address.
    """

    place: Annotated[str, tyro.conf.Positional]
    """STORE, or STORE/DATASET for one of its data sets: demo.zarr, s3://bucket/routes.zarr/wikitext-103."""
    page: str | None = None
    """The page whose address is printed, without the host, as reports name it: demo-code/expert/2/7."""
    host: str = "127.0.0.1"
    """The address to listen at. Whoever reaches it can read the store: there is no password."""
    port: int = 8177
    """The port to listen at; 0 for any that is free."""
    index: Path | None = None
    """A folder for the index. Default: beside the store, or in the user's cache for a store in a bucket."""
    processes: int | None = None
    """Processes that answer: more visitors at once, and more memory. Default: one a processor, 4 at most."""
    threads: int | None = None
    """Shards that are indexed at the same time. Default: one a processor."""
    phase: Annotated[tuple[Literal["prompt", "generated"], ...], tyro.conf.UseAppendAction] = ()
    """Count and find only tokens of this phase, where captures say it (imported routes do); texts are shown whole. May
    be repeated. Each selection has an index of its own."""
    role: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Count and find only tokens of this speaker, where captures are of conversations: assistant. May be repeated."""
    export: Path | None = None
    """Write the documents that --document names here, as one HTML file that works offline, and end."""
    document: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """With --export: a document, by its id, or by its name where that is no number. May be repeated."""


def main(arguments: list[str]) -> int:
    """Serve, or export."""
    config = parse(ExploreConfig, "explore", arguments)
    if bool(config.document) != (config.export is not None):
        raise ValueError("--export FILE and --document ID go together: give both, or neither")
    if not 0 <= config.port < 65_536:
        raise ValueError(f"--port {config.port}: 0 to 65535")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"--threads {config.threads}: 1 or more")
    if config.processes is not None and config.processes < 1:
        raise ValueError(f"--processes {config.processes}: 1 or more")
    if config.export is not None and (config.phase or config.role):
        raise ValueError("--export writes whole texts: leave out --phase and --role")
    if config.export is not None:
        return _export(*capture_at(config.place), config)
    store, names = captures_at(config.place)

    from analysis.explorer.live import Explorer  # numba takes a second: --help does not wait for it
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
    """Answer until interrupted, and index meanwhile."""
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
            log(f"note: whoever reaches {where}, port {port}, can read this store: there is no password")
        name = socket.gethostname() if address.is_unspecified else f"[{where}]" if address.version == 6 else where
        print(f"http://{name}:{port}/{(config.page or '').lstrip('/')}", flush=True)
        log("Ctrl-C stops it")
        follower.start()
        try:
            with helpers(explorer, here, listener, processes - 1):
                server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has stopped in order, and hands the signal on
            pass
        finally:
            stop.set()
    return 0


def _open_more_files() -> None:
    """Each part of an index is an open file: a hundred million tokens have 400."""
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if limit != resource.RLIM_INFINITY else limit, most))


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


if __name__ == "__main__":
    run_job(main)
