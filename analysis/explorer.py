"""What the explorer holds: for each data set of a store its index, a view of it, and its experts' profiles.

Promises: a request sees one state of a data set; a newer one takes its place as a whole, also while a capture runs.
Reading and indexing never wait for each other. Does not know HTTP: `jobs.site`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.index import CaptureIndex
from analysis.profile import Profiles
from analysis.view import View

BUSY_S, QUIET_S = 2.0, 20.0  # between looks at a capture that runs, and at one that is complete
FIRST = 8  # shards after which the first numbers are shown (arbitrary)


@dataclass(frozen=True)
class Shown:
    """A data set at one moment."""

    view: View
    digest: str
    """Another one when anything that is shown may be."""

    @cached_property
    def profiles(self) -> Profiles:
        """Of its experts; computed when the first is asked for."""
        return Profiles(self.view)


class Explorer:
    """All data sets of a store that are explored.

    Parameters
    ----------
    path
        The store.
    names
        Its data sets.
    folder : Path, optional
        Where indexes are kept: see `analysis.index.index_folder`.
    threads : int, optional
        For indexing; default one a processor.
    """

    def __init__(
        self, path: str, names: Sequence[str], folder: Path | None = None, *, threads: int | None = None
    ) -> None:
        self.path, self.threads = path, threads
        self.indexes = {name: CaptureIndex(path, name, folder) for name in names}
        self.shown = {name: self._show(name, None) for name in names}
        self.problems: dict[str, str] = {}
        """Why a data set's index does not go on."""
        self.progress: dict[str, tuple[int, int]] = {}
        """Shards of it that were indexed, and that are to be, while it is at work."""

    def alike(self, name: str) -> list[Profiles]:
        """The profiles of the data sets whose experts can be compared with one's, itself included."""
        own = self.shown[name].view

        def model(view: View) -> tuple[object, ...]:
            return view.capture.attrs.get("model"), view.experts, view.choices, *view.layers

        return [shown.profiles for shown in self.shown.values() if model(shown.view) == model(own)]

    def refresh(self, name: str, *, told: Callable[[str, int, int], None] | None = None) -> int:
        """Index what was committed of a data set since, and show it.

        Returns
        -------
        int
            Shards that were added.
        """

        def tell(done: int, total: int) -> None:
            self.progress[name] = done, total
            if told is not None:
                told(name, done, total)

        index, added = self.indexes[name], 0
        try:
            for most in (FIRST, None):
                added += index.refresh(threads=self.threads, progress=tell, most=most)
                if self.shown[name].digest != _digest(index):
                    self.shown[name] = self._show(name, self.shown[name].view)
                    self._warm(name)
            self.problems.pop(name, None)
        except (OSError, ValueError, RuntimeError) as error:
            self.problems[name] = str(error) or repr(error)
        finally:
            self.progress.pop(name, None)
        return added

    def follow(self, stop: threading.Event, told: Callable[[str, int, int], None] | None = None) -> None:
        """Keep what is shown up to date until `stop` is set."""
        due = dict.fromkeys(self.indexes, 0.0)
        while not stop.is_set():
            for name in [name for name, at in due.items() if time.monotonic() >= at and not stop.is_set()]:
                started = time.monotonic()
                self.refresh(name, told=told)
                quiet = self.shown[name].view.now.state.complete or name in self.problems
                due[name] = time.monotonic() + max(QUIET_S if quiet else BUSY_S, 5 * (time.monotonic() - started))
            stop.wait(0.2)

    def state(self, name: str) -> dict[str, Any]:
        """How far a data set is captured and indexed, and what there is to say of it."""
        shown = self.shown[name]
        state, indexed = shown.view.now.state, len(shown.view.now.parts)
        behind = state.shards_done - indexed
        note = ""
        if name in self.problems:
            note = f"The index of {name} does not go on: {self.problems[name]}"
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
        }

    def _show(self, name: str, before: View | None) -> Shown:
        index = self.indexes[name]
        return Shown(View(self.path, name, index.now, before), _digest(index))

    def _warm(self, name: str) -> None:
        """Compute what the first visitors of every page would wait for."""
        shown = self.shown[name]
        profiles, view = shown.profiles, shown.view
        _ = view.document_tokens
        view.now.occurrences(0, 0, 0)  # compiled
        for layer in view.table_layers:
            for by in profiles.orders:
                view.top(layer, by)


def _digest(index: CaptureIndex) -> str:
    now = index.now
    return hashlib.sha256(f"{now.state.digest} {sorted(now.parts)}".encode()).hexdigest()[:16]
