"""The example scripts: each is run as described in its first line, and its numbers are computed again in numpy."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from fake_model import fake_capture, fake_layout, words

import store

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "analysis" / "examples"
LAYERS = (0, 2, 5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two data sets of a made-up model."""
    path = tmp_path_factory.mktemp("examples") / "s.zarr"
    for seed, name in enumerate(("one", "two")):
        texts = [words(size, seed + size) for size in (70, 3, 40)]
        assert fake_capture(path, texts, name, layout=fake_layout(layers=LAYERS, sequence_length=16)).complete
    return path


def example(name: str, *arguments: object, folder: Path = ROOT) -> str:
    """The output of an example; warnings are errors."""
    command = [sys.executable, "-W", "error", str((EXAMPLES / f"{name}.py").relative_to(ROOT)), *map(str, arguments)]
    if folder != ROOT:
        command[3] = str(EXAMPLES / f"{name}.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def routed(path: Path, name: str) -> tuple[xr.Dataset, np.ndarray]:
    """A capture in memory, and which of its positions hold a token."""
    data = store.open_capture(path, name).compute()
    return data, np.arange(data.sizes["position"]) < data["length"].values[:, None]


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+(?:\.\d+)?", line)]


def test_every_example_is_run_here() -> None:
    tested = {name.removeprefix("test_").removesuffix("_counts_what_numpy_counts") for name in globals()}
    assert {file.stem for file in EXAMPLES.glob("*.py")} <= tested
    for file in EXAMPLES.glob("*.py"):
        assert f"`python analysis/examples/{file.name} demo.zarr" in file.read_text(encoding="utf-8").split('"""')[1]


def test_table5_counts_what_numpy_counts(path: Path, tmp_path: Path) -> None:
    data, filled = routed(path, "one")
    expert, both = data["expert"].values, filled[:, 1:]
    here, before = expert[:, 1:][both], expert[:, :-1][both]
    lines = example("table5", path / "one", folder=tmp_path).splitlines()  # from any folder
    assert lines[0] == f"one: {both.sum()} pairs of neighbouring tokens; % that repeat"
    for line, index in zip(lines[3:6], range(3), strict=True):
        first = (here[:, index, 0] == before[:, index, 0]).mean()
        either = (here[:, index, :, None] == before[:, index, None, :]).any((1, 2)).mean()
        assert numbers(line) == [LAYERS[index], round(100 * first, 1), round(100 * either, 1)]
    assert numbers(lines[6]) == [12.5, 46.4]
    assert len(lines) == 7


def test_domain_specialization_counts_what_numpy_counts(path: Path, tmp_path: Path) -> None:
    lines = example("domain_specialization", path, "-o", tmp_path / "figure.html").splitlines()
    wanted = []
    for name in ("one", "two"):
        data, filled = routed(path, name)
        for index, layer in enumerate(LAYERS):
            chosen = data["expert"].values[filled][:, index]
            share = [round(100 * float((chosen == expert).any(1).mean()), 1) for expert in range(8)]
            wanted.append(f"{name}, layer {layer}: {share} % of the tokens; even share 25.0 %")
    assert lines == wanted
    page = (tmp_path / "figure.html").read_text(encoding="utf-8")
    assert page.count('"data set": "one"') == page.count('"data set": "two"') == 3 * 8
    assert "cdn.jsdelivr" not in page  # it works offline


def test_two_dictionaries_counts_what_numpy_counts(path: Path) -> None:
    data, filled = routed(path, "two")
    token, chosen = data["token"].values[filled], data["expert"].values[filled][:, LAYERS.index(5)]
    pairs = Counter((int(t), int(e)) for t, both in zip(token, chosen, strict=True) for e in both)
    lines = example("two_dictionaries", path / "two", "--layer", 5, "--top", 3).splitlines()
    assert lines[0] == "expert -> tokens, at layer 5 of two"
    occurs = Counter(token.tolist())
    for expert, line in enumerate(lines[1:9]):
        found = {t: count for (t, e), count in pairs.items() if e == expert}
        top = sorted(found, key=lambda t, found=found: (-found[t], t))[:3]
        assert line.split(": ", 1)[0] == f"  {expert}"
        assert eval(line.split(": ", 1)[1]) == {f"▁{t}": found[t] for t in top}
    assert lines[9] == f"token -> experts, the 3 most frequent of {len(occurs)} tokens"
    for line, t in zip(lines[10:], sorted(occurs, key=lambda t: (-occurs[t], t))[:3], strict=True):
        piece, experts = line.strip().split(": ", 1)
        assert eval(piece) == f"▁{t}"
        assert eval(experts) == {e: count for (x, e), count in pairs.items() if x == t}


def test_own_metric_counts_what_numpy_counts(path: Path) -> None:
    data, filled = routed(path, "one")
    weight = data["weight"].values[filled].astype(float)
    near = weight[..., 1] > 0.9 * weight[..., 0]
    lines = example("own_metric", path / "one").splitlines()
    assert f"share of {filled.sum()} tokens" in lines[0]
    assert [numbers(line) for line in lines[1:]] == [
        [layer, round(float(near[:, index].mean()), 4)] for index, layer in enumerate(LAYERS)
    ]
