"""The Parquet tables compared with a loop over tokens; and the example queries, in DuckDB, compared with xarray."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
from fake_model import fake_capture, fake_layout, words
from hypothesis import given, settings
from synthetic import HOSTILE, captures, make_capture

from analysis.exports.parquet import CONVENTIONS, ROWS, SCHEMAS, CaptureToWrite, write_captures, write_tables
from analysis.metrics.choices import transitions
from analysis.metrics.paths import document_path
from analysis.metrics.tokens import expert_tokens
from analysis.scanning import scan
from store import CaptureGroup, coverage, open_capture
from store.layout import Layout

ROOT = Path(__file__).parents[2]
QUERIES = ROOT / "analysis" / "examples" / "queries.sql"
Row = dict[str, Any]


def source(capture: xr.Dataset, documents: Any = ()) -> CaptureToWrite:
    return CaptureToWrite(capture=capture, ask=partial(scan, capture), documents=documents)


def rows_of(folder: Path, table: str) -> list[Row]:
    """Read by DuckDB: equal to pyarrow's result, and with the documented types."""
    read = pq.read_table(folder / f"{table}.parquet")
    assert read.schema.equals(SCHEMAS[table])
    found = duckdb.sql(f"FROM '{folder}/{table}.parquet'")
    listed = [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
    assert listed == read.to_pylist()
    return listed


def close(row: Row, wanted: Row) -> None:
    """The same columns and values; floats almost equal, None if there is no number."""
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
        assert row[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), (name, row)


# --- Every column against a loop ----------------------------------------------------------------------------------


class Looped:
    """A capture read token by token in plain Python."""

    def __init__(self, capture: xr.Dataset) -> None:
        data = capture.compute()
        self.layers, self.pieces = data["layer"].values.tolist(), data["piece"].values.tolist()
        self.k, self.experts = data.sizes["k"], data.attrs["num_experts"]
        fill, special = np.iinfo(data["expert"].dtype).max, data.attrs["special_token_ids"]
        self.chosen: Counter[tuple[int, int, int]] = Counter()
        self.mass: defaultdict[tuple[int, int, int], float] = defaultdict(float)
        self.tokens: Counter[int] = Counter()
        self.pairs: Counter[tuple[int, int, int]] = Counter()
        self.moved: dict[str, Counter[tuple[int, int, int]]] = {by: Counter() for by in CONVENTIONS}
        self.routes: defaultdict[int, list[tuple[int, int, list, list]]] = defaultdict(list)
        for row in range(data.sizes["doc"]):
            place, document = int(data["offset"][row]), int(data["document_id"][row])
            for position in range(int(data["length"][row])):
                token = int(data["token"].values[row, position])
                if token in special:
                    continue
                place += 1
                routes = data["expert"].values[row, position].tolist()
                weights = data["weight"].values[row, position].astype(float).tolist()
                if routes[0][0] == fill:
                    continue
                self.tokens[token] += 1
                self.routes[document].append((place - 1, token, routes, weights))
                for index, layer in enumerate(self.layers):
                    for k, (expert, weight) in enumerate(zip(routes[index], weights[index], strict=True)):
                        self.chosen[layer, expert, k] += 1
                        self.mass[layer, expert, k] += weight
                        self.pairs[token, layer, expert] += 1
                for layer, (here, there) in zip(self.layers[:-1], pairwise(routes), strict=True):
                    self.moved["first"][layer, here[0], there[0]] += 1
                    self.moved["all"].update((layer, a, b) for a in here for b in there)
                    self.moved["rank"].update((layer, a, b) for a, b in zip(here, there, strict=True))

    def load(self) -> list[Row]:
        rows = []
        for layer in self.layers:
            places = [(layer, e, k) for e in range(self.experts) for k in range(self.k)]
            choices, weight = (sum(of[place] for place in places) for of in (self.chosen, self.mass))
            for place in places:
                rows.append({"data_set": "synthetic", **dict(zip(("layer", "expert", "k"), place, strict=True))})
                share = self.chosen[place] / choices if choices else None
                mass_share = self.mass[place] / weight if weight else None
                rows[-1] |= {"count": self.chosen[place], "share": share, "mass_share": mass_share}
        return rows

    def token_experts(self) -> list[Row]:
        total, rows = sum(self.tokens.values()), []
        for (token, layer, expert), count in sorted(self.pairs.items()):
            got = sum(times for (_, at, e), times in self.pairs.items() if (at, e) == (layer, expert))
            about = {"data_set": "synthetic", "token_id": token, "piece": self.pieces[token]}
            occurrences = {"tokens": self.tokens[token], "layer": layer, "expert": expert, "count": count}
            share = count / self.tokens[token]
            rows.append(about | occurrences | {"share": share, "lift": share / (got / total)})
        return rows

    def transitions(self) -> list[Row]:
        rows = []
        for by, moved in self.moved.items():
            for layer, above in pairwise(self.layers):
                here = {(a, b): moved[layer, a, b] for a in range(self.experts) for b in range(self.experts)}
                leaving = [sum(here[a, b] for b in range(self.experts)) for a in range(self.experts)]
                arriving = [sum(here[a, b] for a in range(self.experts)) for b in range(self.experts)]
                for (a, b), count in here.items():
                    probability = count / leaving[a] if leaving[a] else None
                    lift = None
                    if leaving[a] and arriving[b]:
                        lift = count * sum(leaving) / leaving[a] / arriving[b]
                    about = {"data_set": "synthetic", "by": by, "layer": layer, "next_layer": above}
                    numbers = {"count": count, "probability": probability, "lift": lift}
                    rows.append(about | {"expert": a, "next_expert": b} | numbers)
        return rows

    def document(self, number: int) -> list[Row]:
        return [
            {
                "data_set": "synthetic", "document": number, "name": f"document {number}", "position": place,
                "token_id": token, "piece": self.pieces[token], "layer": layer, "k": k, "expert": e, "weight": weight,
            }
            for place, token, routes, weights in sorted(self.routes[number])
            for index, layer in enumerate(self.layers)
            for k, (e, weight) in enumerate(zip(routes[index], weights[index], strict=True))
        ]  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(captures())
def test_every_column_equals_a_loop_over_tokens(capture: xr.Dataset) -> None:
    looped, documents = Looped(capture), list(range(capture.sizes["document"]))[::-1]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        written = write_captures([source(capture, documents)], folder / "new" / "tables")
        folder = folder / "new" / "tables"
        assert sorted(written) == sorted(folder.iterdir())
        wanted = {
            "load": looped.load(),
            "token_experts": looped.token_experts(),
            "transitions": looped.transitions(),
            "routes": [row for number in documents for row in looped.document(number)],
        }
        for table, rows in wanted.items():
            found = rows_of(folder, table)
            assert len(found) == len(rows), table
            for one, other in zip(found, rows, strict=True):
                close(one, other)


# --- Files --------------------------------------------------------------------------------------------------------


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    capture = make_capture(missing=[0])
    write_captures([source(capture.assign(captured=("doc", np.arange(capture.sizes["doc"]) >= 4)))], tmp_path)
    for table, schema in SCHEMAS.items():
        read = pq.read_schema(tmp_path / f"{table}.parquet")
        assert all(field.metadata[b"description"] for field in read)
        query = f"SELECT decode(key), decode(value) FROM parquet_kv_metadata('{tmp_path}/{table}.parquet')"
        told = dict(duckdb.sql(f"{query} WHERE key <> 'ARROW:schema'").fetchall())
        assert list(json.loads(told["columns"])) == schema.names
        assert told["description"]
        about = json.loads(told["captures"])["synthetic"]
        assert about["attrs"] == capture.attrs
        assert about["rows_missing"] == 4
        assert about["tokens_counted"] == sum(Looped(capture).tokens.values())
    assert rows_of(tmp_path, "routes") == []


def test_several_captures_lie_in_one_file_told_apart_by_name(tmp_path: Path) -> None:
    parts = []
    for seed, name in enumerate(("prose", "code")):
        capture = make_capture(seed=seed, dataset=name)
        write_captures([source(capture, [2])], tmp_path / name)
        parts.append(source(capture, [2]))
    write_captures(parts, tmp_path)
    for table in SCHEMAS:
        assert rows_of(tmp_path, table) == [
            row for name in ("prose", "code") for row in rows_of(tmp_path / name, table)
        ]


def test_row_groups_are_bounded_and_a_token_is_found_by_their_minima(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.exports.parquet.ROWS", 100)
    capture = make_capture(documents=60, vocabulary=200)
    write_captures([source(capture, [0, 1, 2, 3])], tmp_path / "small")
    monkeypatch.setattr("analysis.exports.parquet.ROWS", ROWS)
    write_captures([source(capture, [0, 1, 2, 3])], tmp_path / "large")
    for table in SCHEMAS:
        assert rows_of(tmp_path / "small", table) == rows_of(tmp_path / "large", table)
        about = pq.read_metadata(tmp_path / "small" / f"{table}.parquet")
        groups = [about.row_group(index) for index in range(about.num_row_groups)]
        assert max(group.num_rows for group in groups) <= 100
        if table == "token_experts":
            ids = [group.column(1).statistics for group in groups]
            assert [one.max <= other.min for one, other in pairwise(ids)] == [True] * (len(groups) - 1)


def test_hostile_pieces_and_names_come_back_as_they_are(tmp_path: Path) -> None:
    hostile = [*HOSTILE, "\x1b[31m", "a\x00b", "", "line\nline", "'; DROP TABLE load; --"]
    capture = make_capture(
        vocabulary=len(hostile), pieces=hostile, names=hostile[:9], special_token_ids=(), documents=9, strength=0
    )
    write_captures([source(capture, range(9))], tmp_path)
    for table, names in (("token_experts", ["piece"]), ("routes", ["piece", "name"])):
        for row in rows_of(tmp_path, table):
            assert row["piece"] == hostile[row["token_id"]]
            assert "name" not in names or row["name"] == hostile[row["document"]]


def test_a_store_holds_no_piece_that_is_no_text(tmp_path: Path) -> None:
    layout = Layout(sequence_length=8, rows_per_shard=4, layers=(0,), num_experts=2, experts_per_token=1, vocab_size=1)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        CaptureGroup.create(tmp_path / "s.zarr", "x", layout=layout, identity={}, attrs={}, pieces=["\ud800"])


def test_an_error_or_an_unknown_document_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    write_captures([source(make_capture())], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(reducers: Any) -> Any:
        raise OSError("the disk is gone")

    other = make_capture(seed=1)
    with pytest.raises(OSError, match="the disk is gone"):
        write_captures([source(other), CaptureToWrite(capture=other, ask=broken)], tmp_path)
    with pytest.raises(ValueError, match="synthetic: document 9: the capture has documents 0 to 8"):
        write_captures([CaptureToWrite(capture=other, ask=broken, documents=[9])], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED = """
import os, signal, sys
from analysis.exports.parquet import write_captures
from test_parquet import make_capture, source
def killed(reducers):
    os.kill(os.getpid(), signal.SIGKILL)
capture = make_capture()
from analysis.exports.parquet import CaptureToWrite
write_captures([source(capture, [0]), CaptureToWrite(capture=capture, ask=killed, documents=[1])], sys.argv[1])
"""


def test_a_killed_writer_leaves_no_half_file_and_the_next_one_works(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "analysis")])
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.glob("*.parquet")) == []
    with pytest.raises(duckdb.IOException, match="No files found"):
        duckdb.sql(f"FROM '{tmp_path}/*.parquet'")
    write_captures([source(make_capture(), [0])], tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 4


# --- A store ------------------------------------------------------------------------------------------------------


def test_a_store_is_written_from_kept_counts_and_as_far_as_it_goes(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    for name in ("a", "b"):
        fake_capture(store, [words(40, number) for number in range(3)], name, layout=fake_layout())
    group = CaptureGroup(store, "b")
    group.discard(1)
    told: list[tuple[str, int, int]] = []
    states = write_tables(store, tmp_path / "one", documents=["document 1"], progress=lambda *now: told.append(now))
    assert [(state.dataset, state.complete) for state in states] == [("a", True), ("b", False)]
    assert {name for name, *_ in told} == {"a", "b"}
    told.clear()
    write_tables(store, tmp_path / "two", documents=[1], progress=lambda *now: told.append(now))
    assert told == [], "counted once"
    for name in ("a", "b"):
        capture = open_capture(store, name, allow_incomplete=True)
        write_captures([source(capture, [1])], tmp_path / name)
    for table in SCHEMAS:
        both = [row for name in ("a", "b") for row in rows_of(tmp_path / name, table)]
        assert rows_of(tmp_path / "one", table) == rows_of(tmp_path / "two", table) == both
    counted = {
        name: sum(row["count"] for row in rows_of(tmp_path / name, "load") if (row["layer"], row["k"]) == (0, 0))
        for name in ("a", "b")
    }
    assert counted["a"] == coverage(store, "a").tokens_done == 120
    assert counted["b"] == coverage(store, "b").tokens_done < 120
    write_tables(store, tmp_path / "chosen", datasets=["b"])
    assert {row["data_set"] for row in rows_of(tmp_path / "chosen", "load")} == {"b"}


# --- The example queries ------------------------------------------------------------------------------------------


def test_the_worked_queries_answer_as_xarray_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = make_capture(documents=80, layers=(2, 3, 4), vocabulary=60, seed=3)
    write_captures([source(capture, [0, 1])], tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    queries = duckdb.extract_statements(QUERIES.read_text(encoding="utf-8"))
    assert len(queries) == 3
    tokens, bits, path = (duckdb.sql(query.query) for query in queries)

    wanted = expert_tokens(capture, 3, top=10, by="lift", min_count=20).sel(expert=5)
    wanted = wanted.rename(counts="count").isel(place=wanted["token_id"].values >= 0)
    assert wanted.sizes["place"] > 3
    assert tokens.columns == ["data_set", "piece", "token_id", "count", "tokens", "share", "lift"]
    found = dict(zip(tokens.columns, zip(*tokens.fetchall(), strict=True), strict=True))
    for name in ("piece", "token_id", "count", "tokens", "share", "lift"):
        assert list(found[name]) == wanted[name].values.tolist(), name

    count = transitions(capture, by="first")["counts"]
    assert bool((count == 0).any()), "the logarithm of 0 is not taken"
    joint = count / count.sum(("expert", "next_expert"))
    independent = joint.sum("expert") * joint.sum("next_expert")
    nats = (joint * np.log(joint.where(joint > 0) / independent)).sum(("expert", "next_expert"))
    wanted_bits = {int(layer): float(nats.sel(layer=layer)) / np.log(2) for layer in nats["layer"].values}
    answered = bits.fetchall()
    assert [row[1:3] for row in answered] == [
        (layer, layer + 1) for layer in sorted(wanted_bits, key=lambda layer: -wanted_bits[layer])
    ]
    assert [row[3] for row in answered] == pytest.approx(sorted(wanted_bits.values(), reverse=True))

    document = document_path(capture, 0).isel(position=slice(0, 50))
    first = document.isel(k=0)
    assert path.fetchall() == [
        (
            "synthetic",
            int(token["position"]),
            str(token["piece"].values),
            " ".join(map(str, token["expert"].values.tolist())),
            pytest.approx(float(token["weight"].astype(float).mean())),
        )
        for token in (first.isel(position=index) for index in range(first.sizes["position"]))
    ]
    assert first.sizes["position"] > 3
