"""Reaching a Ray cluster, for captures and for scans.

Promises: an address that does not answer is an error within seconds, and the cluster's token is private.
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
    """A connection to the cluster of $RAY_ADDRESS, or the one that was started on this machine, or a new one here.

    Raises
    ------
    ValueError
        When the cluster cannot be reached, or refuses this process.
    """
    _refuse_silence(os.environ.get("RAY_ADDRESS", ""))
    try:
        _connect()
        _close_token()
    except (ConnectionError, RayError) as error:
        raise ValueError(
            f"no Ray cluster: {error}. If one runs there, it refuses this process's token: set RAY_AUTH_MODE=token, and"
            " have the cluster's token in ~/.ray/auth_token"
        ) from error
    except OSError as error:
        raise ValueError(
            f"no Ray cluster: it cannot write its files ({error}): set RAY_TMPDIR to a folder that it can write in"
        ) from error
    except SystemExit as error:  # from Ray's own handler of SIGTERM, while it starts
        raise Terminated from error
    finally:
        catch_sigterm()  # in place of Ray's
    try:
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    """Connect; where Ray cannot keep the token of a new cluster in the home folder, the environment holds it."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        ray.init(**options)
    except PermissionError:
        if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            raise
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray.init(**options)


def _close_token() -> None:
    """Ray leaves the token that it makes to be read by every user of the machine, and who has it runs code here."""
    with suppress(OSError, RuntimeError):  # no token, another user's, or nobody's home
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def runtime_env() -> dict[str, Any]:
    """What a process on the cluster needs to import this code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": path}}


def _refuse_silence(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would ask it for a quarter of an hour."""
    if address.startswith("http"):
        raise ValueError(
            f"RAY_ADDRESS={address} is a dashboard's, which takes jobs (ray job submit); to capture from here, set it"
            " to the head's own address, such as 10.0.0.1:6379, or unset it"
        )
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster: nobody listens at RAY_ADDRESS={address} ({error})") from error
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "5")  # tries of a second, not twenty with a wrong token
