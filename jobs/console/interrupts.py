"""Ctrl-C while a script is still importing what it needs: one line and status 130, and no traceback.

Imports nothing of ours and nothing that is slow: each script calls this first.
"""

import os
import signal
import sys


def end_on_interrupt() -> None:
    """End the process at Ctrl-C, until `jobs.console.terminal.run_job` takes over: nothing is begun before that."""

    def end(*_: object) -> None:
        print("error: interrupted: nothing was begun", file=sys.stderr, flush=True)
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell has it ignored
        signal.signal(signal.SIGINT, end)
