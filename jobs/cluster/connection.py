"""Connect to a Ray cluster, for captures and for scans.

Promises: an address that does not answer causes an error within seconds, and the cluster's token stays private.
"""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.console.terminal import Terminated, catch_sigterm

ROOT = Path(__file__).resolve().parents[2]
CONNECT_S = 10.0  # arbitrary


@contextmanager
def connection() -> Iterator[None]:
    """A connection to the cluster of $RAY_ADDRESS, to one that was started on this machine, or to a new one here.

    Raises
    ------
    ValueError
        When the cluster cannot be reached, or rejects this process.
    """
    _refuse_silence(os.environ.get("RAY_ADDRESS", ""))
    try:
        _connect()
        _close_token()
    except (ConnectionError, RayError) as error:
        raise ValueError(
            f"no Ray cluster: {error}. If one runs there, it rejects this process's token: set RAY_AUTH_MODE=token and"
            " put the cluster's token into ~/.ray/auth_token"
        ) from error
    except OSError as error:
        raise ValueError(
            f"no Ray cluster: it cannot write its files ({error}): set RAY_TMPDIR to a writable folder"
        ) from error
    except SystemExit as error:  # from Ray's own SIGTERM handler during startup
        raise Terminated from error
    finally:
        catch_sigterm()  # replaces Ray's handler
    try:
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    """Connect. If Ray cannot store the token of a new cluster in the home folder, the environment holds it."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        ray.init(**options)
    except PermissionError:
        if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            raise
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray.init(**options)


def _close_token() -> None:
    """Make Ray's token private: Ray leaves it readable for every user of the machine, and anyone who has it can run
    code here."""
    with suppress(OSError, RuntimeError):  # no token, another user's token, or no home folder
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def runtime_env() -> dict[str, Any]:
    """The environment in which a process on the cluster can import this code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": path}}


def _refuse_silence(address: str) -> None:
    """Reject an address where nothing listens: Ray itself would try for a quarter of an hour."""
    if address.startswith("http"):
        raise ValueError(
            f"RAY_ADDRESS={address} is a dashboard, which accepts jobs (ray job submit). To capture from here, set it"
            " to the head's own address, such as 10.0.0.1:6379, or unset it"
        )
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster: nothing listens at RAY_ADDRESS={address} ({error})") from error
    os.environ.setdefault(
        "RAY_gcs_server_port_wait_time_s", "5"
    )  # tries of one second, instead of twenty with a wrong token
