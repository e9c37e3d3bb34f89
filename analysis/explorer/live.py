"""The explorer's state: for each data set of a store its index, a view of it, and its experts' profiles.

Promises: a request sees one state of a data set; a newer state replaces it as a whole, even while a capture runs.
Reading and indexing never wait for each other. Does not know HTTP: `analysis.explorer.site`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.explorer.expert import Alike, Profiles
from analysis.explorer.index import PARTS_AT_ONCE, CaptureIndex
from analysis.explorer.unusual import Unusual, unusual_documents
from analysis.explorer.view import View
from analysis.metrics.contrast import differences_in_words
from analysis.scanning import EVERYTHING, Selection
from store import model_differences
from store.attributes import attributes
from store.identity import changes_in_words
from store.names import dataset_names
from store.secrets import without_secrets

BUSY_S, QUIET_S = 2.0, 20.0  # between checks of a running and of a complete capture
LOG_S = 10.0  # between two log lines about one index
FIRST = 8  # shards after which the first numbers are shown (arbitrary)


@dataclass(frozen=True)
class Shown:
    """A data set at one moment."""

    view: View
    digest: str
    """Changes when anything that is shown may have changed."""
    identity: str
    """The hash of the capture."""

    @cached_property
    def profiles(self) -> Profiles:
        """The profiles of its experts; computed at the first request."""
        return Profiles(self.view)

    @cached_property
    def unusual(self) -> Unusual:
        """How unusual its documents are; computed at the first request."""
        return unusual_documents(self.view)


class Explorer:
    """The data sets of a store that are explored.

    Parameters
    ----------
    path
        The store.
    names
        Its data sets; None for all, including those added later.
    folder : Path, optional
        Where indexes are kept: see `analysis.explorer.index.index_folder`.
    only : Selection, optional
        The tokens that are counted and found; texts are shown in full.
    threads : int, optional
        For indexing; default one per processor.
    log
        Called with one line about each event.

    Raises
    ------
    ValueError
        When none of them can be read.
    """

    def __init__(
        self,
        path: str,
        names: Sequence[str] | None = None,
        folder: Path | None = None,
        *,
        only: Selection = EVERYTHING,
        threads: int | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.names, self.folder, self.only, self.threads, self.log = path, names, folder, only, threads, log
        self.indexes: dict[str, CaptureIndex] = {}
        self.shown: dict[str, Shown] = {}
        self.problems: dict[str, str] = {}
        """Why a data set is not shown, or why its index is not updated."""
        self.progress: dict[str, tuple[int, int]] = {}
        """Shards indexed, and shards in all, while indexing."""
        self.stop = threading.Event()
        self.look()
        if not self.shown:
            raise ValueError("; ".join(self.problems.values()) or f"{path} has no data set yet")

    def look(self) -> None:
        """Show the data sets that are not shown yet, in the state in which they are indexed."""
        for name in self.names or dataset_names(self.path):
            if name not in self.shown:
                with self._survive(name):
                    self.indexes[name] = CaptureIndex(self.path, name, self.folder, self.only)
                    self.shown[name] = self._show(name)

    def alike(self, own: Shown) -> list[Alike]:
        """The other data sets whose experts can be shown next to those of this one."""

        def model(view: View) -> tuple[object, ...]:
            return view.capture.attrs.get("model"), view.experts, view.choices, *view.layers

        others = [each for name, each in [*self.shown.items()] if name != own.view.dataset and each.view.now.tokens]
        return [
            Alike(each.profiles, differs(own.view, each.view)) for each in others if model(each.view) == model(own.view)
        ]

    def refresh(self, name: str, most: int | None = None) -> int:
        """Index what was committed to a data set since, at most so many shards, and show it.

        Returns
        -------
        int
            Shards that were added; also 0 if indexing fails: see `problems`.
        """
        logged = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal logged
            self.progress[name] = done, total
            if done == total or time.monotonic() - logged >= LOG_S:
                logged = time.monotonic()
                self.log(f"{name}: {done:,} of {total:,} shards indexed")

        index, added = self.indexes[name], 0
        try:
            with self._survive(name):
                added = index.refresh(threads=self.threads, progress=report, most=most)
                if self.shown[name].digest != _digest(index):
                    self.shown[name] = self._show(name)
        finally:
            self.progress.pop(name, None)
        return added

    def reread(self, name: str, digest: str) -> None:
        """Show a data set in the state that another process indexed, unless it is shown already."""
        if name not in self.shown or self.shown[name].digest != digest:
            with self._survive(name):
                self.indexes[name] = CaptureIndex(self.path, name, self.folder, self.only)
                self.shown[name] = self._show(name)

    def follow(self, stop: threading.Event) -> None:
        """Keep the shown state up to date until `stop` is set; start with a few shards of each data set."""
        self.stop = stop
        due: dict[str, float] = {}
        most: int | None = FIRST
        while not stop.is_set():
            with self._survive(self.path):
                self.look()
            for name in self.indexes:
                started = time.monotonic()
                if stop.is_set() or started < due.get(name, 0.0):
                    continue
                added = self.refresh(name, most)
                took = time.monotonic() - started
                quiet = self.shown[name].view.now.state.complete or name in self.problems
                due[name] = time.monotonic() + (0 if added else max(QUIET_S if quiet else BUSY_S, 5 * took))
            most = PARTS_AT_ONCE
            stop.wait(0.2)

    @contextmanager
    def _survive(self, name: str) -> Iterator[None]:
        """Continue after any exception: storage raises its own types, and a thread that ended would end unnoticed."""
        try:
            yield
            self.problems.pop(name, None)
        except Exception as error:
            if self.stop.is_set():  # the process ends, and its thread pools have ended already
                return
            reason = without_secrets(str(error) or repr(error))
            if isinstance(error, OSError):
                reason += "; use --index to choose another folder for the index"
            if self.problems.get(name) != reason:
                self.log(f"{name}: {reason}")
            self.problems[name] = reason

    def state(self, name: str) -> dict[str, Any]:
        """How far a data set is captured and indexed, and a note about it."""
        shown = self.shown[name]
        state, indexed = shown.view.now.state, len(shown.view.now.parts)
        behind = state.shards_done - indexed
        note = ""
        if name in self.problems:
            note = f"The index of {name} is not updated: {self.problems[name]}."
        elif behind:
            done, total = self.progress.get(name, (0, behind))
            note = f"{name} is being indexed: {done:,} of {total:,} shards."
        elif not state.complete:
            note = f"{name} is incomplete: {state.shards_done:,} of {state.shards_total:,} shards are committed."
        return {
            "name": name,
            "digest": shown.digest,
            "note": note,
            "busy": bool(behind) or not state.complete,
            "documents": state.plan.documents,
            "tokens": state.plan.tokens,
            "tokens_done": state.tokens_done,
            "shards": state.shards_total,
            "shards_done": state.shards_done,
            "indexed": indexed,
            "model": str(shown.view.capture.attrs.get("model", "?")),
            "changes": changes(shown.view),
        }

    def _show(self, name: str) -> Shown:
        """A data set as it is indexed now; slow parts are computed later."""
        index, before = self.indexes[name], self.shown.get(name)
        same = before is not None and before.identity == index.identity
        view = View(self.path, name, index.now, before.view if before and same else None)
        shown = Shown(view, _digest(index), index.identity)
        if index.now.parts:
            _ = shown.profiles, shown.unusual
            view.warm()
        return shown


def changes(view: View) -> str:
    """What was changed about its model's choices, in words; empty if nothing was."""
    return changes_in_words(attributes(view.capture)["identity"])


def differs(one: View, other: View) -> str:
    """How the model of another data set differs, in words: what was changed about its choices, if nothing else
    differs."""
    said = [attributes(view.capture) for view in (one, other)]
    fields, changed = model_differences(*said), ("mask", "force", "top_k", "routes_from", "routes_weights")
    if fields.keys() <= set(changed):
        return changes_in_words(said[1]["identity"]) or ("unchanged choices" if fields else "")
    return differences_in_words(*said)


def _digest(index: CaptureIndex) -> str:
    now = index.now
    return hashlib.sha256(f"{now.state.digest} {sorted(now.parts)}".encode()).hexdigest()[:16]
