"""Two captures compared: checked against plain Python, and rejected if nothing can be compared."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from fake_model import fake_capture, words
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import captures, make_capture
from test_choices import capture_of

from analysis.metrics.agreement import agreement
from analysis.metrics.choices import random_overlap

ROOT = Path(__file__).parents[2]


@settings(max_examples=20, deadline=None)
@given(captures(), st.integers(0, 2**31))
def test_agreement_equals_a_loop_over_tokens(capture: xr.Dataset, seed: int) -> None:
    data, random = capture.compute(), np.random.default_rng(seed)
    expert, fill = data["expert"].values, np.iinfo(data["expert"].dtype).max
    changed = expert.copy()
    moved = random.random(expert.shape[:3]) < 0.3
    layers, k, experts = data.sizes["layer"], data.sizes["k"], data.attrs["num_experts"]
    drawn = random.random((*expert.shape[:3], experts)).argsort(-1)[..., :k].astype(expert.dtype)
    changed[moved] = drawn[moved]
    changed[expert == fill] = fill
    other = data.assign(expert=(data["expert"].dims, changed)).chunk({"doc": 2})
    found = agreement(capture, other)
    same_set: list[list[bool]] = [[] for _ in range(layers)]
    overlap: list[list[float]] = [[] for _ in range(layers)]
    margins: list[tuple[list[float], list[float]]] = [([], []) for _ in range(layers)]
    bins: dict[tuple[int, int], list[tuple[bool, bool]]] = {}
    differs: list[int] = []
    for row in range(data.sizes["doc"]):
        for p in range(int(data["length"][row])):
            if expert[row, p, 0, 0] == fill or int(data["token"][row, p]) in data.attrs["special_token_ids"]:
                continue
            where = layers
            for layer in range(layers):
                a, b = expert[row, p, layer].tolist(), changed[row, p, layer].tolist()
                same_set[layer].append({*a} == {*b})
                overlap[layer].append(len({*a} & {*b}) / k)
                where = layer if {*a} != {*b} and where == layers else where
                weight = data["weight"].values[row, p, layer].astype(float)
                margin = float(weight[0] - weight[1]) if k > 1 else 0.0
                margins[layer][a[0] != b[0]].append(margin)
                if k > 1:
                    bins.setdefault((layer, min(int(margin * 10), 9)), []).append(({*a} == {*b}, a[0] == b[0]))
            differs.append(where)
    n = len(differs)
    assert found.attrs["n"] == n
    if not n:
        assert bool(found["same_set"].isnull().all())
        return
    assert found.attrs["any_difference"] == pytest.approx(np.mean([where < layers for where in differs]))
    for layer in range(layers):
        assert float(found["same_set"][layer]) == pytest.approx(np.mean(same_set[layer]))
        assert float(found["overlap"][layer]) == pytest.approx(np.mean(overlap[layer]))
        assert float(found["same_first"][layer]) == pytest.approx(len(margins[layer][0]) / n)
        assert float(found["first_difference"][layer]) == pytest.approx(differs.count(layer) / n)
        for name, values in zip(("margin", "margin_at_flips"), margins[layer], strict=True):
            got = float(found[name][layer])
            assert got == pytest.approx(np.mean(values), abs=1e-6) if values else np.isnan(got)
        for number in range(10):
            held = bins.get((layer, number), [])
            assert int(found["tokens_of_margin"][layer, number]) == len(held)
            shares = [float(found[f"{name}_of_margin"][layer, number]) for name in ("same_set", "same_first")]
            assert shares == pytest.approx(np.mean(held, axis=0).tolist()) if held else np.isnan(shares).all()


def test_a_capture_agrees_with_itself_and_with_an_unrelated_one_by_chance() -> None:
    random = np.random.default_rng(2)
    one, other = (
        capture_of(random.random((40_000, 3, 8)).argsort(-1)[..., :2].astype(np.uint8), [0, 5, 9]) for _ in range(2)
    )
    same = agreement(one, one)
    assert same.attrs["any_difference"] == 0
    assert float(same["same_set"].min()) == float(same["same_first"].min()) == 1
    apart = agreement(one, other)
    for name in ("same_set", "overlap", "same_first"):
        null = apart[name].attrs["null"]
        assert float(abs(apart[name] - null).max()) < 5 * np.sqrt(null * (1 - null) / 40_000)
    assert apart["same_set"].attrs["null"] == random_overlap(2, 8)["same_set"] == pytest.approx(1 / 28)
    null = apart.attrs["any_difference_null"]
    assert null == pytest.approx(1 - 28.0**-3)
    assert abs(apart.attrs["any_difference"] - null) < 5 * np.sqrt(null * (1 - null) / 40_000) + 1e-9


def test_what_only_one_capture_holds_is_not_counted() -> None:
    whole, holed = make_capture(documents=20), make_capture(documents=20, missing=[1])
    found = agreement(whole, holed)
    assert found.attrs["n"] == agreement(holed, whole).attrs["n"] < agreement(whole, whole).attrs["n"]
    assert found.attrs["any_difference"] == 0


def test_captures_of_other_texts_or_shapes_are_refused() -> None:
    one = make_capture(documents=20)
    token = one["token"].compute().copy()
    token[3, 0] = 5 if int(token[3, 0]) != 5 else 6
    with pytest.raises(ValueError, match=r"different texts: at position 0 of a row, the tokens are \d+ and \d+"):
        agreement(one.assign(token=token.chunk({"doc": 4})), one)
    with pytest.raises(ValueError, match="one has 8 of experts, the other 4"):
        agreement(one, make_capture(documents=20, num_experts=4))
    with pytest.raises(ValueError, match="different layers"):
        agreement(one, make_capture(documents=20, layers=(0, 1, 3)))


def test_the_command_prints_each_layer_and_what_differs(tmp_path: Path) -> None:
    for name, text in (("a", 1), ("b", 1), ("c", 2)):
        fake_capture(tmp_path / "s.zarr", [words(60, text)], name)

    def compare(*places: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / "compare.py"), *places]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = compare("s.zarr/a", "s.zarr/b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("agreement of s.zarr/a and s.zarr/b: equal tokens")
    assert "60 tokens in both; 0.00% of them differ" in done.stdout
    assert done.stdout.count("1.0000") >= 9
    assert "by chance" in done.stdout
    other = compare("s.zarr/a", "s.zarr/c")
    assert other.returncode == 0, other.stderr
    assert other.stdout.startswith(
        "contrast of s.zarr/a and s.zarr/c: the captures hold different texts: at position 0"
    )
    assert "no store at a (no such folder)" in compare("a", "s.zarr/b").stderr
    assert "no data set 'x'" in compare("s.zarr/x", "s.zarr/b").stderr
