"""Counts that a page needs and the index does not hold, made in the background, one after the other.

Promises: the result of a scan is kept in the index's folder, like all answers, so it is counted once; a visitor waits
at most `PATIENCE_S`; a process that should end does not finish a scan first. Does not know what is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import xarray as xr

from analysis.explorer.live import Shown
from analysis.results import answers
from analysis.scanning import Reducer, Selection

PATIENCE_S = 2.0  # a visitor waits before the progress is shown (arbitrary)
KNOWN = 64  # results that are remembered (arbitrary)


class Counting:
    """Counts for pages.

    Parameters
    ----------
    folder : Path
        Where answers are kept.
    only : Selection
        The tokens that are counted.
    threads : int, optional
        For scans; default one per processor.
    """

    def __init__(self, folder: Path, only: Selection, threads: int | None = None) -> None:
        self.folder, self.only, self.threads = folder, only, threads
        self.progress = 0, 0
        """Shards read, and shards in all, of the running scan."""
        self._known: dict[tuple[str, ...], tuple[tuple[str, ...], Future[dict[str, Any]]]] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def result(
        self, about: tuple[str, ...], shown: Sequence[Shown], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The result for data sets as they are now; None while it is being computed. Raises what the computation
        raised.

        Parameters
        ----------
        about
            What is computed, and for which data sets.
        shown
            The data sets.
        compute
            Called once, in a thread of its own.
        """
        digests = tuple(each.digest for each in shown)
        with self._lock:
            if self._known.get(about, ((), None))[0] != digests:
                self._known.pop(about, None)
                while len(self._known) >= KNOWN:
                    self._known.pop(next(iter(self._known)))
                self._known[about] = digests, self._begin(compute)
            found = self._known[about][1]
        try:
            return found.result(PATIENCE_S)
        except NotYet:
            return None

    def _begin(self, compute: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()

        def work() -> None:
            try:
                with self._turn:
                    self.progress = 0, 0
                    future.set_result(compute())
            except BaseException as error:  # passed to the caller
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def ask(self, opened: xr.Dataset, reducers: Sequence[Reducer], shown: Sequence[Shown]) -> list[xr.Dataset]:
        """Answers about opened data sets: from the kept ones, or from a scan."""
        about = [part for each in shown for part in (each.identity, each.view.now.state.digest)]

        def report(done: int, total: int) -> None:
            self.progress = done, total
            if not threading.main_thread().is_alive():
                raise KeyboardInterrupt  # the process is ending, and would wait for the threads of a scan

        name = shown[0].view.dataset
        return answers(
            opened, reducers, self.folder, name, about, only=self.only, threads=self.threads, progress=report
        )
