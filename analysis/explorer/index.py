"""What the explorer looks up instead of reading a store: every token's places, and the sums behind the expert pages.

A scan takes seconds or minutes, and a page should take a tenth of a second. So each shard is read once: its part
(`analysis.explorer.parts`) is written, and the sums behind the pages are updated.

Promises: a part belongs to exactly the committed bytes, because its name holds their checksum; what is committed later
is added, and nothing is counted twice; a shard that was captured again with other bytes gets a new part, and the sums
start again. A part that is missing, truncated or damaged is rebuilt. A killed process loses the work of at most
`PARTS_AT_ONCE` shards. The index may be deleted at any time. It takes 8 bytes per token, one per choice (two from 256
experts on), and 4 per shard and token of the vocabulary: 73 bytes per token for Mixtral. If tokens are selected by role
or phase, they get a separate index.

Does not know what is shown: `analysis.explorer.live`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from analysis.explorer.parts import MARK, Occurrences, Part
from analysis.metrics.choices import Choices
from analysis.metrics.contexts import TopContexts
from analysis.metrics.load import ExpertCounts, Load
from analysis.metrics.sample import SampledRoutes
from analysis.results import question
from analysis.scanning import EVERYTHING, Reducer, Selection, State, accumulate, merge, selected_labels
from analysis.statistics.jackknife import Jackknife
from store.coverage import Coverage, coverage
from store.files import whole_file
from store.group import CaptureGroup
from store.identity import identity_hash
from store.names import beside
from store.reader import open_covered

PARTS_AT_ONCE = 32  # shards between two saves of the sums (arbitrary)
AROUND = 12  # tokens of context on each side of a place (arbitrary)
SAMPLED = 32_768  # tokens of whole documents that are kept individually: 12 MB for 48 layers of 8 choices (arbitrary)
ABANDONED_S = 86_400.0  # after which an unfinished file is assumed to come from a killed process (arbitrary)

Sums = dict[str, State]
"""The counts of each of `reducers`, by name."""


def reducers(capture: xr.Dataset) -> dict[str, Reducer]:
    """What is summed up over the parts of a capture."""
    counted: dict[str, Reducer] = {
        "load": Jackknife(Load()),
        "choices": Choices(),
        "position": ExpertCounts(32),
        "sample": SampledRoutes(SAMPLED),
    }
    return counted | ({"contexts": TopContexts(around=AROUND)} if "weight" in capture else {})


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """The indexed part of a capture. Immutable: what is added later makes a new object."""

    state: Coverage
    """What is planned and committed."""
    capture: xr.Dataset
    parts: Mapping[str, Part]
    """The indexed shards, by name, in order."""
    sums: Sums

    def result(self, name: str) -> xr.Dataset:
        """What one of `reducers` found in the parts."""
        return reducers(self.capture)[name].finish(self.sums[name], self.capture)

    @property
    def tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.sums["choices"]["tokens"][0])

    def occurrences(
        self, token: int, layer: int | None = None, expert: int | None = None, *, skip: int = 0, limit: int = 20
    ) -> tuple[int, list[tuple[Part, int]]]:
        """How often a token went to an expert at a layer (by index), or how often it occurs; and some of the places.

        Returns
        -------
        number : int
        found : list of (Part, int)
            At most `limit` after the first `skip`, in the order of shards: indices into the part's `order`.
        """
        number, found = 0, list[tuple[Part, int]]()
        for part in self.parts.values():
            here = part.count(token, layer, expert)
            if skip < number + here and len(found) < limit:
                first = max(0, skip - number)
                places = part.find(token, layer, expert)[first : first + limit - len(found)]
                found += [(part, int(index)) for index in places]
            number += here
        return number, found

    def neighbour(self, token: int, row: int, position: int, *, back: bool = False) -> tuple[int, int]:
        """The next place of a token after or before another place; after the last one comes the first.

        Raises
        ------
        ValueError
            When the token does not occur.
        """
        number, _ = self.occurrences(token, limit=0)
        if not number:
            raise ValueError(f"token {token} does not occur in the indexed part")
        before = sum(part.before(token, row, position + (not back)) for part in self.parts.values())
        _, [(part, found)] = self.occurrences(token, skip=(before - back) % number, limit=1)
        rows, positions = part.places(np.array([found]))
        return int(rows[0]), int(positions[0])

    def part_of(self, row: int) -> Part | None:
        """The part that holds a row of the capture; None if it is not indexed."""
        shard = row // int(self.capture.attrs["rows_per_shard"])
        name = _part_name(shard, self.state.sums[shard]) if shard in self.state.sums else ""
        return self.parts.get(name)


class CaptureIndex:
    """The index of one capture.

    Parameters
    ----------
    path, dataset
        The store, and the capture in it.
    folder : Path, optional
        Where indexes are kept; default next to the store, or in the user's cache for a store in a bucket.
    only : Selection, optional
        The tokens that are counted and found.

    Raises
    ------
    ValueError
        When there is no such capture, or it lacks the labels by which tokens are selected.

    Attributes
    ----------
    now : Indexed
        What is indexed; at first what an earlier process left. Replaced as a whole by `refresh`.
    """

    def __init__(
        self, path: Path | str, dataset: str, folder: Path | None = None, only: Selection = EVERYTHING
    ) -> None:
        self.path, self.dataset, self.only = path, dataset, only
        self.root = index_folder(path) if folder is None else folder
        self._begin()

    def _begin(self) -> None:
        """Start from what was saved for the current capture."""
        state, capture = self._open()
        selected_labels(capture, self.only)  # raises if the capture has none of these
        self.identity = identity_hash(CaptureGroup(self.path, self.dataset).identity)
        counted = [asdict(self.only), *(question(reducer) for reducer in reducers(capture).values())]
        self.folder = self.root / self.dataset / f"index-{_hash([MARK, self.identity, counted])[:16]}"
        kept, sums = self._kept(capture)
        parts = self._parts(state, capture, kept, {})
        if len(parts) < len(kept):  # some belong to shards that were captured again, or are missing or damaged
            parts, sums = {}, _empty(capture)
        self.now = Indexed(state=state, capture=capture, parts=parts, sums=sums)

    def refresh(
        self, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None, most: int | None = None
    ) -> int:
        """Index the shards committed since the last call.

        Parameters
        ----------
        threads
            Shards decoded at the same time; default one per processor.
        progress
            Called with (shards done, shards in all) after each shard, from any thread.
        most
            The most shards to add.

        Returns
        -------
        int
            Shards that were added.

        Raises
        ------
        OSError
            When the index cannot be written; what was written is kept.
        ValueError
            When a shard cannot be decoded.
        """
        if identity_hash(CaptureGroup(self.path, self.dataset).identity) != self.identity:
            self._begin()  # another capture replaced it
        state, capture = self._open()
        names, done, sums = _part_names(state), set(self.now.parts), self.now.sums
        if not done <= set(names.values()):
            done, sums = set(), _empty(capture)
        self.now = self._with(state, capture, done, sums)
        left = [shard for shard, name in names.items() if name not in done]
        counted = itertools.count(1)
        on_shard = None if progress is None else lambda *_: progress(next(counted), len(left))
        for start in range(0, len(left[:most]), PARTS_AT_ONCE):
            some = left[:most][start : start + PARTS_AT_ONCE]
            sums = self._add(capture, names, sums, some, threads, on_shard)
            done |= {names[shard] for shard in some}
            self.now = self._with(state, capture, done, sums)
            self._keep(done, sums)
        self._tidy(names)
        return len(left[:most])

    def _open(self) -> tuple[Coverage, xr.Dataset]:
        state = coverage(self.path, self.dataset)
        return state, open_covered(self.path, state)

    def _add(
        self,
        capture: xr.Dataset,
        names: Mapping[int, str],
        sums: Sums,
        shards: list[int],
        threads: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> Sums:
        """Write the parts of some shards, and update the sums."""
        step, rows = int(capture.attrs["rows_per_shard"]), capture.sizes["doc"]
        slices = [slice(shard * step, min(rows, (shard + 1) * step)) for shard in shards]
        asked = reducers(capture)
        writing = Occurrences(self.folder, {shard * step: names[shard] for shard in shards})
        _, *states = accumulate(
            capture, [writing, *asked.values()], slices, only=self.only, threads=threads, progress=progress
        )
        before = [{name: array.copy() for name, array in sums[key].items()} for key in asked]  # some add in place
        return dict(zip(asked, merge(list(asked.values()), before, states), strict=True))

    def _with(self, state: Coverage, capture: xr.Dataset, done: set[str], sums: Sums) -> Indexed:
        """The new state of the index."""
        parts = self._parts(state, capture, done, self.now.parts)
        if len(parts) < len(done):
            raise OSError(f"{len(done) - len(parts)} parts of the index are missing from {self.folder}: restart")
        return Indexed(state=state, capture=capture, parts=parts, sums=sums)

    def _parts(
        self, state: Coverage, capture: xr.Dataset, done: set[str], known: Mapping[str, Part]
    ) -> dict[str, Part]:
        """The parts of the committed shards that are done, if they exist and are complete."""
        step, parts = int(capture.attrs["rows_per_shard"]), {}
        for shard, name in _part_names(state).items():
            if name in done:
                try:
                    parts[name] = known.get(name) or Part(self.folder / name, shard * step)
                except FileNotFoundError:
                    continue
                except ValueError:  # truncated or damaged
                    (self.folder / name).unlink(missing_ok=True)
        return parts

    def _tidy(self, names: Mapping[int, str]) -> None:
        """Remove the parts of shards that were captured again, and unfinished files of killed processes.

        A file counts as unfinished when it is a day older than the newest file here. Dates are compared with each other
        only, because a shared folder's dates do not come from this host's clock.
        """
        files = {found: _written_s(found) for found in (self.folder.iterdir() if self.folder.is_dir() else ())}
        for found, written_s in files.items():
            shard = re.match(r"\d+(?=-)", found.name)
            replaced = shard is not None and names.get(int(shard[0]), found.name) != found.name
            with contextlib.suppress(OSError):  # another process was faster
                old = found.name.endswith(".partial") and max(files.values()) - written_s > ABANDONED_S
                if replaced or old:
                    found.unlink()

    def _keep(self, done: set[str], sums: Sums) -> None:
        """Save the sums, with the names of the parts they cover."""
        arrays = {f"{key}/{name}": array for key, state in sums.items() for name, array in state.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "sums.npz") as unfinished, unfinished.open("wb") as file:
            np.savez(file, parts=np.array(sorted(done)), **arrays)  # type: ignore[arg-type]

    def _kept(self, capture: xr.Dataset) -> tuple[set[str], Sums]:
        """What was saved, or nothing if it is missing or incomplete."""
        try:
            with (self.folder / "sums.npz").open("rb") as file, np.load(file, allow_pickle=False) as saved:
                sums: Sums = {key: {} for key in reducers(capture)}
                for place in saved.files:
                    key, _, name = place.rpartition("/")
                    if key:
                        sums[key][name] = saved[place]
                done = set(saved["parts"].tolist())
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return set(), _empty(capture)
        return done, sums


def index_folder(path: Path | str) -> Path:
    """Where the indexes of a store are kept: next to it, or in the user's cache if it is in a bucket.

    A part is memory-mapped, so it must be a local file.
    """
    if "://" not in str(path):
        return Path(beside(path))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "expert-atlas" / _hash(str(path).rstrip("/"))[:16]


def _empty(capture: xr.Dataset) -> Sums:
    return {name: reducer.init(capture) for name, reducer in reducers(capture).items()}


def _part_names(state: Coverage) -> dict[int, str]:
    """The names of the committed shards' parts."""
    return {shard: _part_name(shard, checksum) for shard, checksum in sorted(state.sums.items())}


def _part_name(shard: int, checksum: str) -> str:
    return f"{shard:06d}-{checksum[:16]}"


def _hash(about: object) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _written_s(file: Path) -> float:
    """When a file was written, by the clock of its file system; 0 where another process has removed it meanwhile."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
