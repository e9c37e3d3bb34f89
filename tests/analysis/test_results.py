"""Stored results: bit-identical to a scan's, never those of another question, and without cost."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_model import fake_capture, words
from patience import HUNG_S
from ray_nodes import ray_nodes

from analysis import results, scanning
from analysis.metrics import load
from analysis.metrics.choices import Choices
from analysis.metrics.document_scores import DocumentScores
from analysis.metrics.load import Load
from analysis.metrics.repetition import Repetition
from analysis.metrics.tokens import TokenCounts
from analysis.results import measure
from analysis.scanning import Reducer, Selection, accumulate, scan
from analysis.statistics.parts import Parts, halves
from store import CaptureGroup, open_capture

QUESTIONS: list[Reducer] = [Choices(), Repetition((1, 2)), Load(), TokenCounts()]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A capture of five shards."""
    path = tmp_path / "s.zarr"
    fake_capture(path, [words(40, number) for number in range(4)])
    return path


class Counting:
    """A runner that records its requests."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, dataset: xr.Dataset, reducers: Any, shards: Any, **how: Any) -> Any:
        """Accumulate in this process."""
        self.asked.append([type(reducer).__name__ for reducer in reducers])
        return accumulate(dataset, reducers, shards, **how)


def test_a_second_question_reads_no_shard_and_has_the_scan_s_answer(store: Path) -> None:
    runner = Counting()
    wanted = scan(open_capture(store, "fake"), QUESTIONS)
    for _ in range(2):
        for one, other in zip(measure(store, "fake", QUESTIONS, runner=runner), wanted, strict=True):
            xr.testing.assert_identical(one, other)
    assert runner.asked == [["Choices", "Repetition", "Load", "TokenCounts"]]
    measure(store, "fake", [Load(), Repetition((1, 3)), Choices()], runner=runner)
    assert runner.asked[1:] == [["Repetition"]], "only what is new is counted"
    assert not [path for path in store.rglob("*") if "results" in path.name], "beside the store, not in it"


@pytest.mark.parametrize(
    "other",
    [
        {"layers": [0, 2]},
        {"layers": [2, 0]},
        {"only": Selection(documents=(1,))},
        {"only": Selection(positions=(0, 3))},
        {"only": Selection(tokens=(5, 6))},
    ],
)
def test_another_selection_is_another_question(store: Path, other: dict[str, Any]) -> None:
    runner = Counting()
    whole = measure(store, "fake", [Load()], runner=runner)[0]
    part = measure(store, "fake", [Load()], runner=runner, **other)[0]
    assert len(runner.asked) == 2
    assert not whole.identical(part)
    capture = open_capture(store, "fake")
    if "layers" in other:
        capture = capture.sel(layer=other["layers"])
    xr.testing.assert_identical(part, scan(capture, [Load()], only=other.get("only", Selection()))[0])


def test_a_shard_that_comes_or_changes_makes_old_answers_another_question_s(store: Path) -> None:
    group, runner = CaptureGroup(store, "fake"), Counting()
    before = measure(store, "fake", [Load()], runner=runner)[0]
    rows = group.read_rows(1)
    shape = (*rows.token.shape, 3, 2)
    expert, weight = np.full(shape, 255, np.uint8), np.zeros(shape, np.float16)
    filled = np.arange(shape[1]) < rows.length[:, None]
    expert[filled], weight[filled] = np.array([1, 2], np.uint8), np.float16(0.5)
    group.discard(1)
    partly = measure(store, "fake", [Load()], runner=runner)[0]
    assert partly.attrs["n"] == before.attrs["n"] - int(rows.length.sum())
    group.commit(1, {"expert": expert, "weight": weight}, rows=rows, facts={})
    after = measure(store, "fake", [Load()], runner=runner)[0]
    assert len(runner.asked) == 3
    assert after.attrs["n"] == before.attrs["n"]
    assert not after.identical(before)
    xr.testing.assert_identical(after, scan(open_capture(store, "fake"), [Load()])[0])


def test_an_answer_that_is_not_whole_is_counted_again(store: Path) -> None:
    runner = Counting()
    wanted = measure(store, "fake", [Load()], runner=runner)[0]
    [kept] = Path(f"{store}.results").rglob("*.npz")
    for spoiled in (kept.read_bytes()[:-40], b"", b"no zip"):
        kept.write_bytes(spoiled)
        xr.testing.assert_identical(measure(store, "fake", [Load()], runner=runner)[0], wanted)
    assert len(runner.asked) == 4


def test_where_nothing_can_be_kept_the_answer_is_given_and_a_warning(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(f"{store}.results").write_text("a file, where the folder would be")
    with pytest.warns(RuntimeWarning, match="cannot be kept next to the store"):
        found = measure(store, "fake", [Load()])[0]
    xr.testing.assert_identical(found, scan(open_capture(store, "fake"), [Load()])[0])


def test_what_was_not_captured_is_refused(store: Path) -> None:
    with pytest.raises(ValueError, match=r"layers \[7\] were not captured; fake has \[0, 1, 2\]"):
        measure(store, "fake", [Load()], layers=[0, 7])
    with pytest.raises(FileNotFoundError):
        measure(store, "other", [Load()])


MINE = """
import numpy as np
from analysis.metrics.load import Load
class Mine(Load):
    def update(self, state, block):
        state["count"] += {step} * int(block["counted"].sum())
"""


def mine(step: int) -> Reducer:
    """The definitions of a notebook's cell, under the same name each time."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(MINE.format(step=step), names)
    made: Reducer = names["Mine"]()
    return made


def test_an_edited_reducer_is_counted_anew_also_in_a_notebook(store: Path) -> None:
    runner = Counting()
    found = [measure(store, "fake", [mine(step)], runner=runner)[0] for step in (1, 2, 1)]
    assert runner.asked == [["Mine"], ["Mine"]], "the third is the first"
    assert found[1]["counts"].equals(2 * found[0]["counts"])
    xr.testing.assert_identical(found[2], found[0])


def test_an_edit_of_what_a_reducer_or_the_scan_calls_counts_anew(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Counting()
    for module, name in ((load, "_add_choices"), (scanning, "_excluded_tokens")):
        measure(store, "fake", [Load()], runner=runner)
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, own=own: own(*given))
        measure(store, "fake", [Load()], runner=runner)
    assert len(runner.asked) == 3


def test_nothing_is_kept_of_what_may_count_anything(store: Path) -> None:
    class Noisy(Load):
        def __init__(self) -> None:
            self.random = np.random.default_rng(0)

    runner = Counting()
    for _ in range(2):
        found = measure(store, "fake", [Noisy(), Load()], runner=runner)
    assert runner.asked == [["Noisy", "Load"], ["Noisy"]]
    xr.testing.assert_identical(*found)
    assert len(list(Path(f"{store}.results").rglob("*.npz"))) == 1


ON_A_CLUSTER = """
import pickle, sys
from jobs.cluster.scans import ClusterRunner
from jobs.cluster.connection import connection
from analysis.results import measure
from analysis.statistics.parts import Parts, halves
from store import coverage
from test_results import QUESTIONS
store, out = sys.argv[1:]
told = []
with connection():
    state = coverage(store, "fake")
    runner = ClusterRunner(store, state)
    progress = lambda *now: told.append(now)
    found = measure(store, "fake", QUESTIONS, state=state, runner=runner, layers=[0, 2], progress=progress)
pickle.dump((found, told), open(out, "wb"))
"""


@pytest.mark.slow
def test_a_scan_on_a_cluster_equals_one_in_this_process(store: Path, tmp_path: Path) -> None:
    here, out = Path(__file__).parents[1], tmp_path / "found"
    command = [sys.executable, "-c", ON_A_CLUSTER, store, out]
    with ray_nodes(1, here.parent, here, here / "analysis") as nodes:
        done = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    found, progress = pickle.loads(out.read_bytes())
    for one, other in zip(found, scan(open_capture(store, "fake").sel(layer=[0, 2]), QUESTIONS), strict=True):
        xr.testing.assert_identical(one, other)
    assert progress[-1] == (5, 5)


def test_arrays_and_functions_among_the_parameters_are_told_apart(store: Path) -> None:
    tables = [np.zeros((2, 2, 32, 8), np.int64) for _ in range(2)]
    tables[1][0, 0, 5, 5] = 1
    first, second, again = (results.question(DocumentScores(tables[at], halves)) for at in (0, 1, 0))
    assert first != second
    assert first == again
    runner = Counting()
    for seed in (0, 1, 1):
        belongs = partial(halves, seed=seed)
        measure(store, "fake", [Parts(Load(), 1, lambda document, use=belongs: use(document))], runner=runner)
    assert len(runner.asked) == 2
