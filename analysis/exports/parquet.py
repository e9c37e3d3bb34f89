"""Counts of captures, and the routes of selected documents, as four Parquet files for DuckDB, pandas or a spreadsheet.

`SCHEMAS` describes every column, and so does the metadata of the files: "description" says what is counted and in which
order, "columns" what each column means, "captures" holds each capture's attributes; the last two are JSON. All tables
are in long form, `data_set` is the first column, so one file can hold several captures, and missing values are null.

Tokens and experts are one table for both directions, sorted by token: a reader finds a token's row groups by their
minima and maxima, and an expert's tokens by scanning two columns that compress well. For 32,000 tokens, 32 layers and 8
experts (6 million pairs, two threads) DuckDB takes 9 ms for a token and 16 to 59 ms for an expert. Sorted by expert,
the file would take twice the bytes and a token 120 ms, and an expert still 15 ms: a second file is not worth it.

Promises: the numbers equal those of `analysis.metrics.load`, `analysis.metrics.tokens`, `analysis.metrics.choices` and
`analysis.metrics.paths`; a file is complete or absent, and an existing one is replaced; memory holds one data set's
counts and, of the tables, one convention, some tokens, or a part of one document at a time. Does not count anything:
the reducers do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from analysis.metrics.choices import Choices, Followed, transitions_of
from analysis.metrics.load import Load
from analysis.metrics.paths import document_path
from analysis.metrics.tokens import TokenCounts
from analysis.results import measure
from analysis.scanning import EVERYTHING, Array, Reducer, Selection
from store.attributes import attributes
from store.coverage import Coverage, coverage
from store.files import whole_file
from store.names import dataset_names
from store.reader import open_covered

ROWS = 2**17  # per row group: what DuckDB gives to one thread (122,880), rounded up to a power of two
CONVENTIONS: tuple[Followed, ...] = ("first", "all", "rank")

_DATA_SET = ("data_set", pa.string(), "the capture: a group of the store")
_LAYER = ("layer", pa.int32(), "layer, by the model's own number")
_EXPERT = ("expert", pa.int32(), "expert of that layer, from 0")
_K = ("k", pa.int32(), "the rank of the choice; 0 has the largest weight")
_TOKEN = ("token_id", pa.int32(), "token id")
_PIECE = ("piece", pa.string(), "the tokenizer's piece")

_COLUMNS: dict[str, tuple[str, list[tuple[str, pa.DataType, str]]]] = {
    "load": (
        "How often, and with what weight, each expert is chosen at each rank; by data_set, layer, expert, k",
        [
            _DATA_SET,
            _LAYER,
            _EXPERT,
            _K,
            ("count", pa.int64(), "tokens whose choice of this rank is the expert"),
            (
                "share",
                pa.float64(),
                "count over all choices at the layer: sums to 1 over expert and k; even share: 1/(E k)",
            ),
            ("mass_share", pa.float64(), "weight of these choices over all weight at the layer: sums to 1"),
        ],
    ),
    "token_experts": (
        "Pairs of a token and an expert that occur, in both directions; by data_set, token_id, layer, expert",
        [
            _DATA_SET,
            _TOKEN,
            _PIECE,
            ("tokens", pa.int64(), "occurrences of the token"),
            _LAYER,
            _EXPERT,
            ("count", pa.int64(), "occurrences of the token with the expert among its k choices"),
            ("share", pa.float64(), "count over tokens: sums to k over experts; expected by chance: k/E"),
            ("lift", pa.float64(), "share over the share of all tokens that choose the expert; expected by chance: 1"),
        ],
    ),
    "transitions": (
        "Choices at neighbouring captured layers, including pairs that never occur;"
        " by data_set, convention (first, all, rank), layer, expert, next_expert",
        [
            _DATA_SET,
            ("by", pa.string(), "pairs counted: first choices, all k*k pairs, or choices of equal rank"),
            _LAYER,
            ("next_layer", pa.int32(), "the next captured layer"),
            _EXPERT,
            ("next_expert", pa.int32(), "expert of next_layer"),
            ("count", pa.int64(), "pairs of choices; with by = 'first', one per token"),
            ("probability", pa.float64(), "count over all pairs from the expert; null if it was never chosen"),
            (
                "lift",
                pa.float64(),
                "probability over the share of all pairs that go to next_expert; expected by chance: 1",
            ),
        ],
    ),
    "routes": (
        "All choices of every token of selected documents, without special tokens;"
        " by data_set, document (in the given order), position, layer, k",
        [
            _DATA_SET,
            ("document", pa.int64(), "the document's id"),
            ("name", pa.string(), "the document's title, path or id"),
            ("position", pa.int64(), "the token's number in its document, from 0"),
            _TOKEN,
            _PIECE,
            _LAYER,
            _K,
            _EXPERT,
            ("weight", pa.float32(), "the choice's weight, as returned by the router (16 bits)"),
        ],
    ),
}
SCHEMAS: dict[str, pa.Schema] = {
    table: pa.schema(
        [pa.field(name, kind, metadata={"description": about}) for name, kind, about in columns],
        metadata={
            "description": description,
            "columns": json.dumps(
                {name: about for name, _, about in columns}
            ),  # repeated because DuckDB does not see the metadata of fields
        },
    )
    for table, (description, columns) in _COLUMNS.items()
}
"""Columns by table, with their types; descriptions are in the metadata."""


@dataclass(frozen=True, kw_only=True)
class CaptureToWrite:
    """A capture to write, and how to scan it."""

    capture: xr.Dataset
    """From `store.open_capture`, complete or not."""
    ask: Callable[[Sequence[Reducer]], list[xr.Dataset]]
    """Runs reducers: `partial(scan, capture)`, or `analysis.results.measure` for its store."""
    documents: Sequence[int | str] = ()
    """The documents whose routes to write: ids, or unique names."""
    only: Selection = EVERYTHING
    """What `ask` counts; its roles and phases also select among the documents' routes."""


def write_tables(
    path: Path | str,
    folder: Path | str,
    *,
    datasets: Sequence[str] = (),
    documents: Sequence[int | str] = (),
    roles: Sequence[str] = (),
    phases: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Coverage]:
    """Write the tables of a store's data sets; the counts for them are kept next to the store.

    Parameters
    ----------
    path
        The store.
    folder
        Where load.parquet, token_experts.parquet, transitions.parquet and routes.parquet are written; created if it
        does not exist. Each file is replaced atomically, one after the other.
    datasets
        Data sets; default all.
    documents
        Ids or names of the documents whose routes to write; each data set must have them.
    roles, phases
        Restrict all tables to tokens of these speakers, or of these phases ("prompt", "generated"); each data set must
        have them. Default: all. The files record this under "captures", as "phase" and "role".
    progress
        Called with the data set, shards read and shards in all.

    Returns
    -------
    list of Coverage
        What was counted for each data set; of an incomplete one, the captured part is written.

    Raises
    ------
    FileNotFoundError
        When there is no such store or data set.
    ValueError
        When there is no data set, or a document, a role or a phase does not exist.
    """
    names = list(datasets) or dataset_names(path)
    if not names:
        raise ValueError(f"{path} has no data set yet")
    states = [coverage(path, name) for name in names]
    only = Selection(roles=tuple(roles) or None, phases=tuple(phases) or None)

    def captures() -> Iterator[CaptureToWrite]:
        for state in states:
            of_this = None if progress is None else partial(progress, state.dataset)
            ask = partial(measure, path, state.dataset, state=state, only=only, progress=of_this)
            yield CaptureToWrite(capture=open_covered(path, state), ask=ask, documents=documents, only=only)

    write_captures(captures(), folder)
    return states


def write_captures(captures: Iterable[CaptureToWrite], folder: Path | str) -> list[Path]:
    """Write the tables of any captures, one after the other; see `write_tables`.

    Returns
    -------
    list of Path
        The four files.
    """
    folder, about = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        write = {table: stack.enter_context(_whole(folder / f"{table}.parquet", table)) for table in SCHEMAS}
        for each in captures:
            capture = each.capture.assign(piece=each.capture["piece"].compute())
            name = str(capture.attrs["dataset"])
            for rows in _routes(
                capture, each.documents, each.only
            ):  # before the scan, because a document may not exist
                _add(write["routes"], "routes", {"data_set": name, **rows})
            load, choices, tokens = each.ask([Load(), Choices(), TokenCounts()])
            _add(write["load"], "load", {"data_set": name, **_long(_by_choice(load), ("layer", "expert", "k"), "load")})
            for rows in _transitions(choices):
                _add(write["transitions"], "transitions", {"data_set": name, **rows})
            for rows in _token_experts(tokens, load, capture):
                _add(write["token_experts"], "token_experts", {"data_set": name, **rows})
            missing = 0 if "captured" not in capture else int((~capture["captured"].values).sum())
            counted = {"tokens_counted": load.attrs["n"], "rows_missing": missing, **each.only.labels}
            about[name] = {**counted, "attrs": attributes(capture)}
        for writer in write.values():
            writer.add_key_value_metadata({"captures": json.dumps(about)})
    return [folder / f"{table}.parquet" for table in SCHEMAS]


@contextmanager
def _whole(path: Path, table: str) -> Iterator[pq.ParquetWriter]:
    """A writer of a file that appears under its name when it is complete, and not at all if an error is raised.

    A killed process leaves a hidden file that ends in ".partial", which readers of *.parquet do not see.
    """
    schema = SCHEMAS[table]
    with whole_file(path) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        yield writer


def _add(writer: pq.ParquetWriter, table: str, columns: Mapping[str, Any]) -> None:
    """Write rows given as arrays by column, or as one value for all of them; NaN becomes null."""
    schema = SCHEMAS[table]
    size = max(len(column) for column in columns.values() if not np.isscalar(column))
    arrays = [
        pa.repeat(pa.scalar(columns[field.name], field.type), size)
        if np.isscalar(columns[field.name])
        else pa.array(columns[field.name], field.type, from_pandas=True)
        for field in schema
    ]
    writer.write_table(pa.table(arrays, schema=schema), row_group_size=ROWS)


def _long(values: xr.Dataset, dims: tuple[str, ...], table: str) -> dict[str, Array]:
    """The variables of a Dataset that a table has, each as a column over all `dims`, the last varying fastest."""
    names = [name for name in SCHEMAS[table].names if name in values or name in dims]
    columns = xr.broadcast(*(values[name] for name in names))
    return {name: column.transpose(*dims).values.ravel() for name, column in zip(names, columns, strict=True)}


def _by_choice(load: xr.Dataset) -> xr.Dataset:
    """Counts, and shares by choice, which sum to 1 over (k, expert) at a layer; NaN where nothing was counted."""
    found = load[["counts"]].rename(counts="count")
    for name, amount in (("share", load["counts"]), ("mass_share", load["mass"])):
        total = amount.sum(("k", "expert"))
        found[name] = amount / total.where(total > 0)
    return found


def _transitions(choices: xr.Dataset) -> Iterator[dict[str, Any]]:
    """Pairs of choices at neighbouring layers, one convention at a time."""
    for by in CONVENTIONS:
        moves = transitions_of(choices, by=by).rename(counts="count")
        columns = _long(moves, ("layer", "expert", "next_expert"), "transitions")
        yield {"by": by, **columns}


def _token_experts(tokens: xr.Dataset, load: xr.Dataset, capture: xr.Dataset) -> Iterator[dict[str, Any]]:
    """Pairs of a token and an expert that occur, some tokens at a time; formulas as in `analysis.metrics.tokens`."""
    counts, occurrences, piece = (
        tokens["counts"].values,
        tokens["tokens"].values,
        capture["piece"].values.astype(object),
    )
    per_expert = load["counts"].sum("k").transpose("layer", "expert").values
    seen, step = np.flatnonzero(occurrences), max(1, ROWS // per_expert.size)
    for start in range(0, seen.size, step):
        ids = seen[start : start + step]
        token, layer, expert = np.nonzero(counts[ids])
        count, token_id = counts[ids][token, layer, expert].astype(np.int64), ids[token]
        share = count / occurrences[token_id]
        yield {
            "token_id": token_id,
            "piece": piece[token_id],
            "tokens": occurrences[token_id],
            "layer": tokens["layer"].values[layer],
            "expert": expert,
            "count": count,
            "share": share,
            "lift": share * load.attrs["n"] / per_expert[layer, expert],
        }


def _routes(capture: xr.Dataset, documents: Sequence[int | str], only: Selection) -> Iterator[dict[str, Any]]:
    """The choices of documents, one row group at a time."""
    roles, phases = only.roles or (), only.phases or ()
    for document in documents:
        try:
            path = document_path(capture, document, roles=roles, phases=phases).rename(token="token_id")
        except ValueError as error:
            raise ValueError(f"{capture.attrs['dataset']}: {error}") from error
        if "weight" not in path:  # null in the table
            path["weight"] = xr.full_like(path["expert"], np.nan, dtype=np.float16)
        step = max(1, ROWS // (path.sizes["layer"] * path.sizes["k"]))
        for start in range(0, path.sizes["position"], step):
            part = path.isel(position=slice(start, start + step))
            about = {"document": path.attrs["document"], "name": path.attrs["name"]}
            yield about | _long(part, ("position", "layer", "k"), "routes")
