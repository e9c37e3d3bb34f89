"""The analysis compared with plain Python: each metric equals a loop over every token, for any chunks."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import captures, make_capture

from analysis.metrics.choices import Choices, transitions
from analysis.metrics.load import Load, expert_load
from analysis.metrics.paths import WindowCounts, document_path, frequent_windows, frequent_windows_of
from analysis.metrics.tokens import TokenCounts, expert_tokens, expert_tokens_of, token_experts, token_experts_of
from analysis.scanning import room_to_turn, scan, turn

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def few_captures() -> st.SearchStrategy[xr.Dataset]:
    return captures(experts=st.integers(2, 16), most_choices=4, most_documents=7)


def routed_tokens(capture: xr.Dataset) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Token id, experts (layer, k) and weights (layer, k) of each token that counts, one at a time."""
    data = capture.compute()
    tokens, experts, weights = (data[name].values for name in ("token", "expert", "weight"))
    fill = np.iinfo(experts.dtype).max
    for row, length in enumerate(data["length"].values.tolist()):
        for position in range(length):
            token, expert = int(tokens[row, position]), experts[row, position]
            if expert[0, 0] != fill and token not in capture.attrs["special_token_ids"]:
                yield token, expert, weights[row, position].astype(float)


@few
@given(few_captures())
def test_load_equals_a_loop_over_tokens(capture: xr.Dataset) -> None:
    experts, k = capture.attrs["num_experts"], capture.sizes["k"]
    count = np.zeros((capture.sizes["layer"], k, experts), dtype=int)
    mass = np.zeros((capture.sizes["layer"], experts))
    n = 0
    for _, expert, weight in routed_tokens(capture):
        n += 1
        for layer in range(capture.sizes["layer"]):
            for j in range(k):
                count[layer, j, expert[layer, j]] += 1
                mass[layer, expert[layer, j]] += weight[layer, j]
    load = expert_load(capture)
    assert load.attrs["n"] == n
    assert load.attrs["null"] == 1 / experts
    np.testing.assert_array_equal(load["counts"].transpose("layer", "k", "expert"), count)
    if n:
        np.testing.assert_allclose(load["share"].transpose("layer", "expert"), count.sum(1) / (k * n))
        np.testing.assert_allclose(load["mass_share"], mass / mass.sum(1, keepdims=True), rtol=1e-12)
    else:
        assert bool(load["share"].isnull().all())
    assert load["layer"].values.tolist() == capture["layer"].values.tolist()


@few
@given(few_captures())
def test_token_tables_equal_the_two_dictionaries_of_a_loop(capture: xr.Dataset) -> None:
    occurrences: Counter[int] = Counter()
    sent: Counter[tuple[int, int, int]] = Counter()
    for token, expert, _ in routed_tokens(capture):
        occurrences[token] += 1
        for layer, chosen in zip(capture["layer"].values.tolist(), expert, strict=True):
            sent.update((layer, token, int(e)) for e in chosen)
    n, last = sum(occurrences.values()), int(capture["layer"][-1])
    table = token_experts(capture)
    assert table.attrs["n"] == n
    assert table["token_id"].values.tolist() == sorted(occurrences)
    assert table["piece"].values.tolist() == [f"▁w{x}" for x in sorted(occurrences)]
    for (layer, x, e), times in sent.items():
        cell = table.sel(layer=layer, token_id=x, expert=e)
        to_expert = sum(c for (at, _, other), c in sent.items() if (at, other) == (layer, e))
        assert int(cell["counts"]) == times
        assert float(cell["share"]) == times / occurrences[x]
        np.testing.assert_allclose(cell["lift"], (times / occurrences[x]) / (to_expert / n))
    assert int(table["counts"].sum()) == sum(sent.values())
    xr.testing.assert_identical(token_experts(capture, last), table.sel(layer=last))

    for by, key in (
        ("count", lambda x, e: (-sent[last, x, e], x)),
        ("lift", lambda x, e: (-sent[last, x, e] / occurrences[x], -sent[last, x, e], x)),
    ):
        top = expert_tokens(capture, last, top=3, by=by, min_count=2)  # type: ignore[arg-type]
        for e in range(capture.attrs["num_experts"]):
            got = [x for x in top["token_id"].sel(expert=e).values.tolist() if x >= 0]
            common = [x for x in occurrences if occurrences[x] >= 2 and sent[last, x, e]]
            assert got == sorted(common, key=lambda x, e=e, key=key: key(x, e))[:3]


@few
@given(few_captures())
def test_transitions_and_windows_equal_a_loop_over_tokens(capture: xr.Dataset) -> None:
    layers = capture["layer"].values.tolist()
    size = min(3, len(layers))
    pairs: Counter[tuple[int, int, int]] = Counter()
    grams: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    n = 0
    for _, expert, _ in routed_tokens(capture):
        n += 1
        first = [int(e) for e in expert[:, 0]]
        pairs.update((layers[i], first[i], first[i + 1]) for i in range(len(layers) - 1))
        for i in range(len(layers) - size + 1):
            grams[tuple(layers[i : i + size]), tuple(first[i : i + size])] += 1
    moves = transitions(capture)
    assert int(moves["counts"].sum()) == sum(pairs.values())
    for (layer, a, b), times in pairs.items():
        cell = moves.sel(layer=layer, expert=a, next_expert=b)
        leaving = sum(c for (at, x, _), c in pairs.items() if (at, x) == (layer, a))
        arriving = sum(c for (at, _, y), c in pairs.items() if (at, y) == (layer, b))
        assert int(cell["counts"]) == times
        np.testing.assert_allclose(cell["probability"], times / leaving)
        np.testing.assert_allclose(cell["lift"], times / leaving / (arriving / n))
    assert moves["next_layer"].values.tolist() == layers[1:]

    top = frequent_windows(capture, size, top=7)
    windows = zip(top["layer"].values.tolist(), top["expert"].values.tolist(), strict=True)
    got = [((tuple(at), tuple(path)), int(c)) for (at, path), c in zip(windows, top["counts"], strict=True)]
    assert got == sorted(grams.items(), key=lambda item: (-item[1], item[0]))[:7]
    np.testing.assert_allclose(top["share"], [c / n for _, c in got])
    assert top.attrs["null"] == capture.attrs["num_experts"] ** -size

    # By the transitions: each step's share of the tokens at the expert before it.
    def by_transitions(at: tuple[int, ...], path: tuple[int, ...]) -> float:
        steps = list(zip(at, path, strict=True))
        here = [sum(c for (a, p), c in grams.items() if a == at and p[i] == e) for i, (_, e) in enumerate(steps)]
        both = [
            sum(c for (a, p), c in grams.items() if a == at and p[i : i + 2] == path[i : i + 2])
            for i in range(len(path) - 1)
        ]
        return here[0] * math.prod(pair / one for pair, one in zip(both, here, strict=False))

    np.testing.assert_allclose(top["expected"], [by_transitions(*gram) for gram, _ in got])
    surprising = frequent_windows(capture, size, top=5, by="surprise")
    bits = {gram: c * math.log2(c / by_transitions(*gram)) for gram, c in grams.items()}
    wanted = sorted((value for value in bits.values() if value > 1e-6), reverse=True)[:5]
    found = surprising["counts"] * np.log2(surprising["counts"] / surprising["expected"])
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@few
@given(few_captures())
def test_a_documents_path_is_its_captured_text_in_order(capture: xr.Dataset) -> None:
    data = capture.compute()
    fill = np.iinfo(data["expert"].dtype).max
    for document in set(data["document_id"].values.tolist()):
        expected, missing, position = [], 0, 0
        for row in np.flatnonzero(data["document_id"] == document):
            for p in range(int(data["length"][row])):
                token = int(data["token"].values[row, p])
                if token in capture.attrs["special_token_ids"]:
                    continue
                if data["expert"].values[row, p, 0, 0] == fill:
                    missing += 1
                else:
                    routes = data["expert"].values[row, p].tolist(), data["weight"].values[row, p].tolist()
                    expected.append((position, token, f"▁w{token}", int(row), *routes))
                position += 1
        path = document_path(capture, document)
        names = ("position", "token", "piece", "row", "expert", "weight")
        got = list(zip(*(path[name].values.tolist() for name in names), strict=True))
        assert got == expected
        assert path.attrs["tokens_missing"] == missing
        xr.testing.assert_identical(document_path(capture, path.attrs["name"]), path)


def all_of(capture: xr.Dataset, threads: int | None = None) -> list[xr.Dataset]:
    """The counts of one scan, and the results from them."""
    counted = scan(capture, [Load(), Choices(), WindowCounts(), TokenCounts()], threads=threads)
    _, _, windows, tokens = counted
    ranked = expert_tokens_of(tokens, by="lift", min_count=2)
    return [*counted, frequent_windows_of(windows), token_experts_of(tokens), ranked]


def test_results_are_equal_to_the_bit_for_any_chunks_and_threads() -> None:
    capture = make_capture(documents=40, missing=[2], chunked=False)
    whole = all_of(capture.chunk({"doc": -1}), threads=1)
    for chunk, threads in ((1, 5), (3, 2), (7, 3)):
        for one, other in zip(all_of(capture.chunk({"doc": chunk}), threads=threads), whole, strict=True):
            xr.testing.assert_identical(one, other)


def test_one_scan_decodes_each_shard_once_and_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = make_capture(documents=30, rows_per_shard=4)
    decoded: list[tuple[frozenset[str], int]] = []
    load = xr.Dataset.load

    def counting(self: xr.Dataset, **options: object) -> xr.Dataset:
        decoded.append((frozenset(map(str, self.variables)), self.sizes["doc"]))
        return load(self, **options)

    monkeypatch.setattr(xr.Dataset, "load", counting)
    scan(capture, [Choices(), WindowCounts(), TokenCounts()])
    num_shards = -(-capture.sizes["doc"] // 4)
    assert len(decoded) == num_shards > 3
    assert {names for names, _ in decoded} == {frozenset({"expert", "token"})}
    assert max(rows for _, rows in decoded) == 4
    assert sum(rows for _, rows in decoded) == capture.sizes["doc"]
    assert capture.chunks, "the caller's dataset stays lazy"


def test_rows_that_are_not_committed_are_neither_decoded_nor_counted() -> None:
    capture = make_capture(documents=30, rows_per_shard=4, chunked=False)
    captured = np.ones(capture.sizes["doc"], dtype=bool)
    captured[4:9] = False  # shard 1 whole, and one row of shard 2
    kept = capture.isel(doc=captured)
    torn = capture["expert"].copy(deep=True)
    torn[4:8] = 200  # what a killed writer may leave: decoding it would raise
    capture = capture.assign(expert=torn, captured=("doc", captured)).chunk({"doc": 4})
    xr.testing.assert_identical(expert_load(capture), expert_load(kept))
    assert document_path(capture, int(kept["document_id"][-1])).attrs["tokens_missing"] == 0
    lost = int(capture["document_id"][5])
    path = document_path(capture, lost)
    assert path.attrs["tokens_missing"] > 0
    assert not set(range(4, 9)) & set(path["row"].values.tolist())


def test_progress_counts_every_shard() -> None:
    calls: list[tuple[int, int]] = []
    capture = make_capture(documents=20, rows_per_shard=3)
    scan(capture, [Choices()], threads=2, progress=lambda *call: calls.append(call))
    num_shards = -(-capture.sizes["doc"] // 3)
    assert sorted(calls) == [(done, num_shards) for done in range(1, num_shards + 1)]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("expert", 8, "layer 2: expert 8, but the model has 8 experts"),
        ("token", 40, "token 40, but the vocabulary has 40"),
        ("weight", np.inf, "not a finite number"),
    ],
)
def test_a_damaged_shard_is_refused(variable: str, value: float, message: str) -> None:
    capture = make_capture(documents=20, chunked=False)
    spoiled = capture[variable].copy(deep=True)
    spoiled[(5, 0, 2, 0)[: spoiled.ndim]] = value
    with pytest.raises(ValueError, match=message):
        expert_load(capture.assign({variable: spoiled}).chunk({"doc": 4}))


def test_one_failing_shard_stops_the_other_threads() -> None:
    capture = make_capture(documents=200, rows_per_shard=1, chunked=False)
    expert = capture["expert"].copy(deep=True)
    expert[0, 0, 0, 0] = 9
    seen: list[int] = []
    with pytest.raises(ValueError, match="expert 9"):
        scan(
            capture.assign(expert=expert).chunk({"doc": 1}),
            [Load()],
            threads=1,
            progress=lambda done, total: seen.append(done),
        )
    assert not seen


def test_uniform_routes_give_the_nulls() -> None:
    capture = make_capture(
        documents=400, sequence_length=64, rows_per_shard=64, num_experts=4, vocabulary=6, strength=0
    )
    load, moves, table = expert_load(capture), transitions(capture), token_experts(capture)
    n = load.attrs["n"]
    assert n > 10_000
    # Five standard errors of a share of n draws.
    assert float(abs(load["share"] - 0.25).max()) < 5 * np.sqrt(0.25 * 0.75 / n)
    assert float(abs(moves["probability"] - 0.25).max()) < 5 * np.sqrt(0.25 * 0.75 / (n / 5))
    scarce = int(table["tokens"].min())
    assert float(abs(table["share"] - 0.5).max()) < 5 * np.sqrt(0.5 * 0.5 / scarce)
    assert float(abs(table["lift"] - 1).max()) < 6 / np.sqrt(scarce)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda capture: token_experts(capture, 40), r"layers \[40\] were not captured.*\[0, 1, 2\]"),
        (lambda capture: expert_tokens(capture, by="luck"), "'luck'.*'count' or 'lift'"),
        (lambda capture: expert_tokens(capture, top=0), "top=0"),
        (
            lambda capture: frequent_windows(capture, by="luck"),
            "'luck': must be 'count' or 'surprise'",
        ),
        (lambda capture: frequent_windows(capture, 4), "n=4 layers, but the capture has 3: n must be 1 to 3"),
        (lambda capture: document_path(capture, 9), "document 9: the capture has documents 0 to 8"),
        (lambda capture: document_path(capture, "nobody"), "no document has the name 'nobody'"),
        (lambda capture: document_path(capture, "twice"), r"documents \[2, 3\] have the name 'twice'"),
    ],
)
def test_a_question_without_an_answer_says_why(ask: object, message: str) -> None:
    capture = make_capture(names=["a", "b", "twice", "twice", "c", "d", "e", "f", "g"])
    with pytest.raises(ValueError, match=message):
        ask(capture)  # type: ignore[operator]


def test_windows_too_many_to_count_are_refused_not_sampled() -> None:
    capture = make_capture(documents=2, num_experts=300, experts_per_token=1)
    assert capture["expert"].dtype == np.uint16
    with pytest.raises(ValueError, match="27000000 windows of n=3 through 300 experts"):
        frequent_windows(capture)


def test_nothing_captured_gives_empty_answers_not_errors() -> None:
    capture = make_capture(missing=range(100))
    results = all_of(capture)
    assert [result.attrs["n"] for result in results] == [0] * 7
    assert results[4].sizes["window"] == results[5].sizes["token_id"] == results[6].sizes["place"] == 0


def test_every_metric_says_what_it_is() -> None:
    for result in all_of(make_capture()):
        assert {"n", "estimator", "null", "definition", "source"} <= set(result.attrs)


def test_analysis_imports_no_torch_transformers_or_ray() -> None:
    names = "metrics.choices, metrics.load, metrics.paths, metrics.repetition, metrics.tokens, report.page"
    modules = ", ".join(f"analysis.{name}" for name in names.split(", "))
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@few
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_turned_table_has_its_columns_as_rows(rows: int, columns: int) -> None:
    table = np.random.default_rng(0).integers(0, 256, (rows, columns), np.uint8)
    turned = room_to_turn(rows, columns)
    turn(table, turned)
    np.testing.assert_array_equal(turned[:columns, :rows], table.T)
