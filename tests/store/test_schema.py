"""A store of every schema version there ever was opens, reads, verifies and goes on, with the code as it is now.

`tests/stores/schema-N` is kept as it was written by the first version that wrote it, and never made again; one is added
with the number: `python tests/store/test_schema.py`, once, when `SCHEMA_VERSION` has grown.
"""

import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np
import pytest
import xarray as xr
from fake_model import ROLES, fake_capture, fake_choice, fake_layout, store_files, words

from analysis.metrics.load import expert_load
from store import CaptureGroup, coverage, open_capture
from store.layout import SCHEMA_VERSION
from store.verification import verify

STORES = Path(__file__).parents[1] / "stores"
VERSIONS = range(1, SCHEMA_VERSION + 1)
TEXTS = [words(30, 1), "", words(5, 2), [{"role": "user", "content": words(4, 3)}]]


def capture(path: Path) -> None:
    """What every one of them holds: a plain data set, and one of conversations."""
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


@pytest.mark.parametrize("version", VERSIONS)
def test_a_capture_of_that_version_goes_on_and_is_left_as_it_is(version: int, tmp_path: Path) -> None:
    path = tmp_path / "routes.zarr"
    shutil.copytree(STORES / f"schema-{version}", path)
    before = store_files(path)
    capture(path)
    after = store_files(path)
    assert {key: data for key, data in after.items() if "/partial" not in key} == before


if __name__ == "__main__":
    capture(STORES / f"schema-{SCHEMA_VERSION}")
