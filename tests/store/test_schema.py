"""A store of every past schema version opens, reads, verifies and resumes with the current code.

`tests/stores/schema-N` is kept as written by the first version with that schema, and never created again. A new one is
added once, with `write` or `capture`, when the number is raised. Version 2 is that of routes without weights.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from fake_model import ROLES, fake_capture, fake_choice, fake_layout, store_files, words

from analysis.metrics.load import expert_load
from analysis.metrics.position import position_load
from store import CaptureGroup, coverage, open_capture, write_capture
from store.layout import SCHEMA_VERSION, WITHOUT_WEIGHTS
from store.verification import verify

STORES = Path(__file__).parents[1] / "stores"
VERSIONS = range(1, SCHEMA_VERSION + 1)
TEXTS = [words(30, 1), "", words(5, 2), [{"role": "user", "content": words(4, 3)}]]


def capture(path: Path) -> None:
    """The content of each of them: a plain data set and one of conversations."""
    fake_capture(
        path, [text for text in TEXTS if isinstance(text, str)], name="texts", layout=fake_layout(vocab_size=1000)
    )
    fake_capture(path, [TEXTS[3]] * 3, name="chats", layout=fake_layout(roles=ROLES))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_store_of_that_version_opens_reads_and_holds(version: int) -> None:
    path = STORES / f"schema-{version}"
    for name in ("texts", "chats"):
        assert CaptureGroup(path, name).attrs["schema_version"] == version
        found = verify(CaptureGroup(path, name))
        assert not found.shards
        assert not found.plan
        routes = open_capture(path, name)
        token, expert, length = (routes[each].values for each in ("token", "expert", "length"))
        for row in range(routes.sizes["doc"]):
            for position in range(length[row]):
                for layer in range(routes.sizes["layer"]):
                    for k in (0, 1):
                        wanted, _ = fake_choice(int(token[row, position]), position, layer, k, 8)
                        assert expert[row, position, layer, k] == wanted
        assert expert_load(routes).attrs["n"] == length.sum() == coverage(path, name).tokens_done
        plain = xr.open_zarr(path, group=name, consolidated=False)
        np.testing.assert_array_equal(plain["expert"].values, expert)


def write(path: Path) -> None:
    """The content of the store without weights: the choices of the fake model for rows of arbitrary tokens."""
    token = np.random.default_rng(0).integers(0, 1000, (9, 8))
    position, layer, k = np.indices((8, 3, 2))
    expert, _ = fake_choice(token[..., None, None], position, layer, k, 8)
    write_capture(
        path,
        "routes",
        blocks=[{"token": token, "expert": expert, "document_id": np.arange(9) // 2}],
        num_experts=8,
        layers=(0, 1, 2),
        rows_per_shard=4,
        attrs={"model": "fake"},
    )


def test_a_store_without_weights_opens_reads_holds_and_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "routes.zarr"
    shutil.copytree(STORES / f"schema-{WITHOUT_WEIGHTS}", path)
    before = store_files(path)
    write(path)
    assert store_files(path) == before
    found = verify(CaptureGroup(path, "routes"))
    assert (found.shards, found.plan) == ({}, [])
    routes = open_capture(path, "routes").compute()
    assert routes.attrs["schema_version"] == WITHOUT_WEIGHTS
    assert "weight" not in routes
    for row, position, layer, k in np.ndindex(routes["expert"].shape):
        wanted, _ = fake_choice(int(routes["token"][row, position]), position, layer, k, 8)
        assert routes["expert"].values[row, position, layer, k] == wanted
    assert position_load(routes).attrs["n"] == coverage(path, "routes").tokens_done == 72


@pytest.mark.parametrize("version", VERSIONS)
def test_a_capture_of_that_version_goes_on_and_is_left_as_it_is(version: int, tmp_path: Path) -> None:
    path = tmp_path / "routes.zarr"
    shutil.copytree(STORES / f"schema-{version}", path)
    before = store_files(path)
    capture(path)
    after = store_files(path)
    assert {key: data for key, data in after.items() if "/partial" not in key} == before
