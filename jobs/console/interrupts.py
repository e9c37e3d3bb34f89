"""Ctrl-C during a script's imports: one line and status 130, without a traceback.

Imports nothing from this project and nothing slow, because each script calls this first.
"""

import os
import signal
import sys


def end_on_interrupt() -> None:
    """End the process at Ctrl-C, until `jobs.console.terminal.run_job` takes over; no work has started before that."""

    def end(*_: object) -> None:
        print("error: interrupted before any work was started", file=sys.stderr, flush=True)
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless the shell ignores it
        signal.signal(signal.SIGINT, end)
