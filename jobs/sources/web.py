"""A file from the web: whole or not at all, bounded, over http and https alone.

It promises that a file that is there was received to its last byte, and that it is not fetched again. It does not know
what is in it.
"""

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib import request
from urllib.parse import urlsplit

from jobs.console.terminal import log
from jobs.sources.resolve import usable
from store.files import whole_file
from store.secrets import without_secrets

MAX_BYTES = 1 << 28  # of a file (arbitrary: a hundred times the texts that it is meant for)
BLOCK_BYTES = 1 << 20
TIMEOUT_S = 30.0  # without a byte (arbitrary)
HANDLERS = (
    request.ProxyHandler,
    request.UnknownHandler,
    request.HTTPHandler,
    request.HTTPSHandler,
    request.HTTPDefaultErrorHandler,
    request.HTTPRedirectHandler,
    request.HTTPErrorProcessor,
)
"""Those of the web alone: a redirection to a file or to FTP leads nowhere."""


def is_url(spec: str) -> bool:
    """Whether a data set is named by an address.

    Raises
    ------
    ValueError
        When it is one of another kind than http and https, or holds a user's name: urllib takes that for the host.
    """
    scheme, separator, rest = spec.partition("://")
    told = without_secrets(spec)
    if separator and scheme not in ("http", "https"):
        raise ValueError(f"{told} begins with {scheme}://, and must begin with http:// or https://, or be a path")
    if separator and "@" in re.split("[/?#]", rest)[0]:
        raise ValueError(f"{told} holds a user's name or password: download the file, and give its path")
    return bool(separator)


def fetch(url: str, folder: Path) -> Path:
    """Download a file, unless it is there.

    Parameters
    ----------
    url
        Its address, http or https.
    folder
        Where it goes; made where it is not there.

    Returns
    -------
    pathlib.Path
        The file. Its name ends like the address, for the ending says what kind of file it is.

    Raises
    ------
    ValueError
        When it cannot be had whole; nothing is left behind then.
    """
    name = usable(urlsplit(url).path.rpartition("/")[2]) or "text"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if path.exists():
        log(f"{without_secrets(url)} was fetched before: {path}")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    opener = request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    try:
        with (
            opener.open(url, timeout=TIMEOUT_S) as response,
            whole_file(path) as unfinished,
            unfinished.open("xb") as file,
        ):
            received = 0
            while block := response.read(BLOCK_BYTES):
                received += len(block)
                if received > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                file.write(block)
            _check_whole(received, response.headers["Content-Length"], response.headers["Transfer-Encoding"])
    except (OSError, HTTPException, ValueError) as error:  # urllib's errors are OSErrors
        why = without_secrets(str(error)) or type(error).__name__
        raise ValueError(
            f"cannot fetch {without_secrets(url)}: {why}. Try again, or download it and give its path"
        ) from error
    return path


def _check_whole(received: int, announced: str | None, encoding: str | None) -> None:
    if announced is None and encoding is None:  # a chunked answer says itself where it ends
        raise ValueError("the server does not say how long it is, so that a connection cut off would not be noticed")
    if announced is not None and received != int(announced):
        raise ValueError(f"{received:,} of {int(announced):,} bytes came")
