"""How long tests wait: until the event happens. There is a limit for events that never happen, which even a slow
machine does not reach."""

import time
from collections.abc import Callable

HUNG_S = 600
"""Seconds after which a process, an answer or an event is considered hung; on two idle cores the slowest takes a
minute.

A whole test has 1800 seconds, the `timeout` in pyproject.toml, so a test that waits for one of these can say which.
"""
NEVER_S = 1e6
"""Seconds that no test takes: the period of timers that must not fire in a test."""


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
