"""How long tests wait: until it happens. Only what would never happen has a limit, which no slow machine reaches."""

import time
from collections.abc import Callable

HUNG_S = 600
"""Seconds after which a process, an answer or an event is taken for hung; on two idle cores the slowest takes a minute.

A whole test has 1800 seconds, the `timeout` in pyproject.toml, so that a test which waits for one of these says which.
"""
NEVER_S = 1e6
"""Seconds that no test takes: the period of what runs by time and must not run in a test."""


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait until something has happened.

    Raises
    ------
    TimeoutError
        When it did not happen within `HUNG_S`.
    """
    end = time.monotonic() + HUNG_S
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {HUNG_S} s: {what}")
        time.sleep(0.02)
