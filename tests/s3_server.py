"""A real S3 server on loopback, in its own process; tests import its fixtures `server_address` and `new_store`."""

import contextlib
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from obstore.store import S3Store
from patience import HUNG_S, wait_until


def start_server(
    host: str = "127.0.0.1", popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server on a free port; returns its process and its address when it answers."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    address = f"http://{host}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    process = popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, f"the S3 server ended with status {process.returncode}"
        with contextlib.suppress(ConnectionError, urllib.error.URLError):
            urllib.request.urlopen(f"{address}/moto-api/", timeout=HUNG_S).close()
            return True
        return False

    wait_until(answers, "the S3 server answers")
    return process, address


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End the server and nothing else."""
    process.terminate()
    process.wait(HUNG_S)


def make_bucket(address: str) -> str:
    """Create an empty bucket with a new name."""
    bucket = f"atlas-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
    return bucket


def variables(address: str) -> dict[str, str]:
    """The environment variables for the server; no machine role is looked up."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
        "NO_PROXY": str(urlsplit(address).hostname),
    }


def bucket_store(url: str) -> S3Store:
    """The objects under an s3:// URL, read without the tested code."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix=prefix or None, client_options={"allow_http": True})


def bucket_files(url: str) -> dict[str, bytes]:
    """Every object under an s3:// URL by its key below it."""
    store = bucket_store(url)
    keys = [entry["path"] for page in store.list() for entry in page]
    return {key: store.get(key).bytes().to_bytes() for key in keys}


@pytest.fixture(scope="session", name="s3_address")
def server_address() -> Iterator[str]:
    """The server, one for each test process."""
    process, address = start_server()
    yield address
    stop_server(process)


@pytest.fixture(name="s3")
def new_store(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new store in its own bucket; the environment points to the server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables(s3_address).items():
        monkeypatch.setenv(name, value)
    return f"s3://{make_bucket(s3_address)}/deep/routes.zarr"


def any_files(store: Path | str) -> dict[str, Any]:
    """Every object of any store by its key."""
    if isinstance(store, str):
        return dict(bucket_files(store))
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
