"""Captures of the same documents: compared with all sign flips, and with documents that differ more than captures."""

from itertools import product

import numpy as np
import pytest
import xarray as xr
from synthetic import make_capture

from analysis.metrics.load import expert_load
from analysis.metrics.paired import paired_contrast
from analysis.statistics.flips import MIN_UNITS


def rerouted(capture: xr.Dataset, seed: int, share: float, to: int | None = None) -> xr.Dataset:
    """The same tokens; of a share of them the first choice at layer 1 is another expert, drawn evenly or `to`."""
    random = np.random.default_rng(seed)
    expert, experts = capture["expert"].values.copy(), int(capture.attrs["num_experts"])
    own = expert[:, :, 1].astype(int)
    drawn = random.integers(0, experts, own.shape[:2]) if to is None else np.full(own.shape[:2], to)
    moved = (random.random(own.shape[:2]) < share) & (own != drawn[..., None]).all(-1) & (own[..., 0] != 255)
    expert[moved, 1, 0] = drawn[moved]
    return capture.assign(expert=(capture["expert"].dims, expert)).chunk({"doc": 4})


def test_the_statistic_and_p_are_those_of_all_flips() -> None:
    whole = make_capture(documents=9, special_token_ids=(), chunked=False)
    one, other = whole.chunk({"doc": 4}), rerouted(whole, 1, 0.5, to=3)
    found = paired_contrast({"one": one, "other": other}, replicates=3000)
    documents = np.unique(whole["document_id"].values)
    length = np.array([int(whole["length"].values[whole["document_id"].values == d].sum()) for d in documents])
    counts = np.array(
        [
            [
                [
                    [
                        int((data["expert"].values[data["document_id"].values == d, :, layer] == e).sum())
                        for e in range(8)
                    ]
                    for layer in range(3)
                ]
                for d in documents
            ]
            for data in (one, other)
        ],
        float,
    )
    np.testing.assert_allclose(found["share"], counts.sum(1) / length.sum(), rtol=1e-12)
    apart = (counts[0] - counts[1]) / length.sum()
    part = length / length.sum()

    def largest(signs: np.ndarray) -> np.ndarray:
        flipped = signs[:, None, None] * apart
        total = flipped.sum(0)
        error = np.sqrt(((flipped - part[:, None, None] * total) ** 2 / (1 - part)[:, None, None]).sum(0))
        with np.errstate(invalid="ignore"):
            return np.nanmax(np.where(error > 0, abs(total) / error, 0.0), axis=-1)

    own = largest(np.ones(len(documents)))
    flips = np.array([largest(np.array(signs)) for signs in product([-1.0, 1.0], repeat=len(documents))])
    exact = (flips >= own - 1e-9).mean(0)
    drawn = found["p"].values
    assert (abs(drawn - exact) <= 4 * np.sqrt(exact * (1 - exact) / 3000) + 1 / 3000).all()
    assert drawn[0] == drawn[2] == 1.0  # layers that are equal
    assert drawn[1] < 0.05


def test_a_change_of_the_model_is_found_under_documents_that_differ_more() -> None:
    whole = make_capture(documents=60, strength=3.0, chunked=False)
    changed = rerouted(whole, 2, 0.08, to=6)
    found = paired_contrast({"before": whole.chunk({"doc": 4}), "after": changed})
    cell = found.sel(layer=1, expert=6)
    assert float(cell["difference_high"]) < 0
    assert float(cell["difference_p"]) < 0.05
    true = expert_load(whole.chunk({"doc": 4}))["share"] - expert_load(changed)["share"]
    np.testing.assert_allclose(found["difference"], 2 * true, atol=1e-12)
    assert bool(found["difference_p"].sel(layer=[0, 2]).min() == 1)


def test_captures_that_differ_by_chance_alone_are_told_apart_five_times_of_a_hundred() -> None:
    p = []
    for seed in range(60):
        whole = make_capture(seed=seed, documents=14, layers=(0, 1), sequence_length=32, chunked=False)
        captures = {name: rerouted(whole, 1000 + 2 * seed + side, 0.4) for side, name in enumerate("ab")}
        p.append(float(paired_contrast(captures, replicates=199)["p"].sel(layer=1)))
    rejected = np.mean(np.array(p) <= 0.05)
    assert rejected <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(p))
    assert 0.35 < np.mean(p) < 0.65


def test_documents_of_one_capture_alone_are_left_out_and_few_are_not_tested() -> None:
    whole = make_capture(documents=20, chunked=False)
    less = whole.isel(doc=whole["document_id"].values >= 5).chunk({"doc": 4})
    found = paired_contrast({"all": whole.chunk({"doc": 4}), "less": less})
    assert found.attrs["unpaired"] == {"all": 5, "less": 0}
    assert bool((found["difference"] == 0).all())
    few = whole.isel(doc=whole["document_id"].values < MIN_UNITS - 1).chunk({"doc": 4})
    untested = paired_contrast({"one": few, "two": few})
    assert "to be significant" in untested.attrs["untested"]
    assert bool(untested[["p", "difference_p", "difference_low"]].isnull().all().to_array().all())


def test_what_cannot_be_paired_is_refused() -> None:
    whole = make_capture(documents=4)
    with pytest.raises(ValueError, match="3 captures: exactly two are needed to pair documents"):
        paired_contrast({"a": whole, "b": whole, "c": whole})
    other = whole.assign(document_id=whole["document_id"] + 100)
    with pytest.raises(ValueError, match="a and b have no document_id in common"):
        paired_contrast({"a": whole, "b": other})
