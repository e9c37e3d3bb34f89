"""A capture leaves the store through xarray, as netCDF and as Zarr in other chunks, opened by `store` or by plain
xarray."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from fake_model import ROLES, fake_capture, fake_layout, words

from store import CaptureGroup, attributes, open_capture, open_tree

PAGE = Path(__file__).parents[2] / "docs" / "store.md"
CHATS = [[{"role": ROLES[number % 3], "content": words(9, number)}] for number in range(11)]
TEXTS = ("name", "piece")
"""Arrays for which numpy has several types."""
Write = Callable[[xr.Dataset, Path], xr.Dataset]


def as_netcdf(data: xr.Dataset, path: Path) -> xr.Dataset:
    data.to_netcdf(path, engine="h5netcdf")
    return xr.open_dataset(path, engine="h5netcdf")


def as_zarr(data: xr.Dataset, path: Path) -> xr.Dataset:
    data.chunk(doc=3, position=5).to_zarr(path, consolidated=False)
    return xr.open_zarr(path, consolidated=False)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A capture with every kind of attribute: `git_commit` is None if the code is not in a repository."""
    attrs = {"git_commit": None, "environment": {"torch": "2", "device": None}, "special_token_ids": [0, 1]}
    path = tmp_path / "demo.zarr"
    fake_capture(path, CHATS, name="demo-prose", layout=fake_layout(roles=ROLES))
    group = path / "demo-prose" / "zarr.json"
    metadata = json.loads(group.read_bytes())
    metadata["attributes"] |= attrs
    group.write_text(json.dumps(metadata))
    return path


@pytest.mark.parametrize("write", [as_netcdf, as_zarr])
def test_an_opened_capture_is_written_with_all_values_and_attributes(store: Path, tmp_path: Path, write: Write) -> None:
    routes = open_capture(store, "demo-prose")
    with write(routes, tmp_path / "copy") as copy:
        xr.testing.assert_equal(copy, routes.compute())
        for name, array in routes.variables.items():
            assert copy[name].dims == array.dims, name
            assert copy[name].dtype == array.dtype or name in TEXTS, name
        assert copy["expert"].attrs["missing"] == 255
        held = {name: as_plain(value) for name, value in attributes(copy).items()}
    group = CaptureGroup(store, "demo-prose")
    wanted = {name: value for name, value in group.attrs.items() if value is not None}
    assert held == {**wanted, "environment": group.environment, "dataset": "demo-prose"}
    assert held["identity"] == group.identity


def as_plain(value: Any) -> Any:
    """Lists instead of netCDF's arrays, and plain numbers instead of numpy's."""
    return value.tolist() if hasattr(value, "tolist") else value


def test_a_tree_is_written_as_netcdf(store: Path, tmp_path: Path) -> None:
    tree = open_tree(store)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as copy:
        xr.testing.assert_equal(copy["demo-prose"].to_dataset(), tree["demo-prose"].to_dataset().compute())


def test_the_lines_of_the_page_write_what_plain_xarray_has_opened(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    opening, leaving = (next(block for block in blocks if word in block) for word in ("open_zarr(", "drop_encoding("))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(opening.partition("valid =")[0] + leaving, names)
    routes = open_capture(store, "demo-prose").drop_vars("captured").compute()
    with xr.open_dataset("routes.nc", engine="h5netcdf") as one, xr.open_zarr("copy.zarr", consolidated=False) as other:
        for copy in (one, other):
            xr.testing.assert_equal(copy, routes)
            assert attributes(copy)["identity"] == CaptureGroup(store, "demo-prose").identity
    with pytest.raises(TypeError, match="Invalid value for attr 'identity'"):
        xr.open_zarr(store, group="demo-prose", consolidated=False).to_netcdf("raw.nc", engine="h5netcdf")


def test_text_that_only_looks_like_a_mapping_stays_text() -> None:
    attrs = {"model": "{tiny}", "identity": '{"model": "a"}', "bos": "none"}
    assert attributes(xr.Dataset(attrs=attrs)) == {"model": "{tiny}", "identity": {"model": "a"}, "bos": "none"}
