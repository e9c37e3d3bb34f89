"""An array besides `expert` and `weight` is one entry of `OPTIONAL`; everything that is true for them is true for it.

The array here is `margin`: a number for each token and layer, which the fake model computes by a formula.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_model import TEXTS, FakeEngine, FakeRun, fake_capture, fake_layout, store_files, text_source

from jobs.capturing.captures import capture_datasets
from jobs.capturing.local import capture_here
from store import CaptureGroup, Coverage, Layout, coverage, open_capture, verify
from store.layout import OPTIONAL, ArraySpec
from workers.shard import Routes

SHARDS = 5


def margin_spec(layout: Layout) -> ArraySpec:
    return ArraySpec(dtype="float32", fill=np.nan, compressors=(), captured=True, **layout.grid("layer"))


@pytest.fixture(autouse=True)
def _margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry."""
    monkeypatch.setitem(OPTIONAL, "margin", margin_spec)


class MarginEngine(FakeEngine):
    """Also returns a margin; at and beyond a row's length, one that must not be kept."""

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        return {**super().route(token, length), "margin": margin(token, len(self.layers))}


def margin(token: np.ndarray, layers: int) -> np.ndarray:
    """Margin of each token, which depends only on its id and the layer; float32 (..., layers)."""
    return (token[..., None] * np.float32(0.5) + np.arange(layers)).astype(np.float32)


def capture(path: Path, engine: type[FakeEngine] = MarginEngine, **options: Any) -> Coverage:
    run: Any = FakeRun(path, fake_layout(record=("margin",)), identity={"record": ["margin"]}, **options)
    layout = run.layout
    run.make_engine = partial(engine, layout.layers, layout.num_experts, layout.experts_per_token)
    return capture_datasets(run, [("fake", text_source(TEXTS))], capture_here)[0]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    assert capture(tmp_path / "s.zarr").complete
    return tmp_path / "s.zarr"


def objects(path: Path) -> dict[str, Any]:
    """Every file; of commit records only the parts that do not depend on speed."""
    files: dict[str, Any] = dict(store_files(path))
    for key in [key for key in files if "/commits/" in key]:
        files[key] = {name: value for name, value in json.loads(files[key]).items() if name != "seconds"}
    return files


def record_of(path: Path, shard: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path / f"fake/expert/commits/{shard}.json").read_text())
    return record


def test_it_is_captured_committed_and_opened_here_and_by_plain_xarray(store: Path) -> None:
    routes = open_capture(store, "fake")
    plain = xr.open_zarr(store, group="fake", consolidated=False)
    filled = np.arange(8) < routes["length"].values[:, None]
    for data in (routes, plain):
        assert data["margin"].dims == ("doc", "position", "layer")
        assert data["margin"].dtype == np.float32
        np.testing.assert_array_equal(data["margin"].values[filled], margin(data["token"].values[filled], 3))
        assert np.isnan(data["margin"].values[~filled]).all()
    for shard in range(SHARDS):
        written = (store / f"fake/margin/c/{shard}/0/0").read_bytes()
        assert record_of(store, shard)["margin"]["bytes"] == len(written) > 0
    assert routes.attrs["record"] == ["margin"]
    assert CaptureGroup(store, "fake").layout == fake_layout(record=("margin",))
    assert CaptureGroup(store, "fake").layout.routes == ("expert", "weight", "margin")


def test_it_leaves_through_xarray_as_the_others_do(store: Path, tmp_path: Path) -> None:
    routes = open_capture(store, "fake")
    routes.to_netcdf(tmp_path / "routes.nc", engine="h5netcdf")
    routes.chunk(doc=3, layer=1).to_zarr(tmp_path / "copy.zarr", consolidated=False)
    with xr.open_dataset(tmp_path / "routes.nc", engine="h5netcdf") as copy:
        xr.testing.assert_equal(copy, routes.compute())
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "copy.zarr", consolidated=False), routes.compute())


def test_its_bytes_are_counted_and_change_the_digest(store: Path, tmp_path: Path) -> None:
    without = fake_capture(tmp_path / "without.zarr", TEXTS)
    size = sum(record_of(store, shard)["margin"]["bytes"] for shard in range(SHARDS))
    state = coverage(store, "fake")
    assert state.bytes_done == without.bytes_done + size
    assert state.digest != without.digest
    assert all(state.sums[shard] != without.sums[shard] for shard in range(SHARDS))


def test_a_flipped_byte_of_it_is_found_and_the_next_capture_heals_it(store: Path) -> None:
    before, file = objects(store), store / "fake/margin/c/3/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert coverage(store, "fake").complete, "its length does not tell"
    found = verify(CaptureGroup(store, "fake"))
    assert (list(found.shards), found.plan) == ([3], [])
    assert found.shards[3].startswith("its margin shard is damaged: its sha256 is ")
    assert coverage(store, "fake").missing == [3]
    assert capture(store).complete
    assert objects(store) == before


@pytest.mark.parametrize("gone", ["margin/c/2/0/0", "expert/commits/2.json"])
def test_a_shard_of_which_something_is_gone_is_missing_and_captured_again(store: Path, gone: str) -> None:
    before = objects(store)
    (store / "fake" / gone).unlink()
    assert coverage(store, "fake").missing == [2]
    state = capture(store)
    assert state.complete
    assert objects(store) == before


def test_a_lost_description_of_it_is_a_lost_plan(store: Path) -> None:
    (store / "fake/margin/zarr.json").unlink()
    assert coverage(store, "fake").lost == ["margin/zarr.json"]


def test_an_engine_that_does_not_give_it_is_refused_naming_it(tmp_path: Path) -> None:
    state = capture(tmp_path / "s.zarr", FakeEngine)
    assert (state.shards_done, sorted(state.quarantined)) == (0, list(range(SHARDS)))
    for shard, record in state.quarantined.items():
        wanted = f"shard {shard} of fake: the engine returned expert, weight and no margin, which"
        assert all(wanted in error for error in record["errors"])


def test_an_engine_that_gives_it_in_another_shape_is_refused_naming_it(tmp_path: Path) -> None:
    class Flat(MarginEngine):
        def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
            routes = super().route(token, length)
            return {**routes, "margin": routes["margin"][..., 0]}

    state = capture(tmp_path / "s.zarr", Flat)
    assert (state.shards_done, len(state.quarantined)) == (0, SHARDS)
    assert all("the engine returned margin of shape" in error for error in state.quarantined[0]["errors"])


def test_a_capture_without_it_has_the_bytes_that_it_has_where_nobody_knows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_capture(tmp_path / "known.zarr", TEXTS)
    monkeypatch.delitem(OPTIONAL, "margin")
    fake_capture(tmp_path / "unknown.zarr", TEXTS)
    assert objects(tmp_path / "known.zarr") == objects(tmp_path / "unknown.zarr")
    attrs = CaptureGroup(tmp_path / "known.zarr", "fake").attrs
    assert "record" not in attrs
    assert Layout.from_attrs(attrs).record == ()


def test_what_a_killed_creation_left_of_it_does_not_stay_in_a_capture_without_it(store: Path, tmp_path: Path) -> None:
    (store / "fake/zarr.json").unlink()  # the last object of a creation
    shutil.rmtree(store / "fake/expert/commits")
    shutil.rmtree(store / "fake/token")
    assert fake_capture(store, TEXTS).complete
    assert not (store / "fake/margin/zarr.json").exists()


def test_a_name_that_no_version_here_can_record_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"record names 'mood', which this version cannot record; known are .*, margin"
    ):
        fake_layout(record=("mood",))
    monkeypatch.delitem(OPTIONAL, "margin")
    with pytest.raises(
        ValueError, match=r"does not describe a capture: record names 'margin'.*known are logit, .*effect$"
    ):
        open_capture(store, "fake")
