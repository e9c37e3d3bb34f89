"""What a page needs and the index does not hold: it is counted while nobody waits for long, one thing after the other.

Promises: what a scan has counted is kept in the index's folder, like all answers, so that it is counted once; a visitor
waits `PATIENCE_S` at most; a process that is to end does not finish a scan first. Does not know what is counted.
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

PATIENCE_S = 2.0  # that a visitor waits before being told how far it is (arbitrary)
KNOWN = 64  # things that are remembered (arbitrary)


class Counting:
    """What was counted for pages.

    Parameters
    ----------
    folder : Path
        Where answers are kept.
    only : Selection
        The tokens that are counted.
    threads : int, optional
        For scans; default one a processor.
    """

    def __init__(self, folder: Path, only: Selection, threads: int | None = None) -> None:
        self.folder, self.only, self.threads = folder, only, threads
        self.progress = 0, 0
        """Shards that were read, and that are to be, in the scan that is at work."""
        self._known: dict[tuple[str, ...], tuple[tuple[str, ...], Future[dict[str, Any]]]] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def result(
        self, about: tuple[str, ...], shown: Sequence[Shown], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """What was computed of data sets as they are now; None while it is at work, and what it raised, if it did.

        Parameters
        ----------
        about
            What is computed, and of which data sets.
        shown
            These.
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
            except BaseException as error:  # whoever asks is told
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def ask(self, opened: xr.Dataset, reducers: Sequence[Reducer], shown: Sequence[Shown]) -> list[xr.Dataset]:
        """Answers about what was opened of some data sets: from what is kept, or from a scan."""
        about = [part for each in shown for part in (each.identity, each.view.now.state.digest)]

        def report(done: int, total: int) -> None:
            self.progress = done, total
            if not threading.main_thread().is_alive():
                raise KeyboardInterrupt  # the process ends, which waits for the threads of a scan

        name = shown[0].view.dataset
        return answers(
            opened, reducers, self.folder, name, about, only=self.only, threads=self.threads, progress=report
        )
