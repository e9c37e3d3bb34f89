"""Plan while capturing: a thread that turns text into rows while workers fill the planned shards."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jobs.capturing.captures import Capture
from store.plan import Plan


class _Stopped(Exception):
    """The job ended before its plans were complete."""


class Planning:
    """Plans captures one after the other in its own thread."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        self._captures = captures
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="plan", daemon=True)

    @property
    def complete(self) -> bool:
        """Whether every plan is complete.

        Raises
        ------
        ValueError, OSError
            Errors of the planner.
        """
        if self._error is not None:
            raise self._error
        return all(capture.planner.plan.complete for capture in self._captures)

    def _run(self) -> None:
        try:
            for capture in self._captures:
                capture.planner.run(self._published)
                capture.log_planned()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error  # raised when the job checks

    def _published(self, plan: Plan) -> None:
        if self._stop.is_set():
            raise _Stopped

    @contextmanager
    def running(self) -> Iterator["Planning"]:
        """Plan while the block runs. Everything that is published by its end is kept."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
