"""A card repeats what captures say about themselves, and its lines of xarray read the store where it is served."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
import yaml
from conftest import Ran
from web_folder import web_folder

from jobs import card
from store import coverage, open_capture, write_capture
from store.coverage import Coverage


def stored(folder: Path, *, weights: bool = True) -> Coverage:
    """A small store of imported routes."""
    random = np.random.default_rng(0)
    block = {
        "token": random.integers(0, 9, (6, 8)),
        "expert": random.random((6, 8, 3, 8)).argsort(-1)[..., :2],
        "phase": np.zeros((6, 8), int),
        "name": [f"request {number}" for number in range(6)],
    }
    block |= {"weight": random.random((6, 8, 3, 2))} if weights else {}
    attrs = {
        "model": "org/model|x",
        "imported": {
            "format": "vllm",
            "engine": "vLLM",
            "engine_version": "0.33.0",
            "files": [{"name": "a.npz", "sha256": "ab" * 32}],
        },
    }
    return write_capture(
        folder / "s.zarr", "served", blocks=[block], num_experts=8, layers=(0, 1, 2), attrs=attrs, rows_per_shard=2
    )


def test_the_card_has_what_the_hub_wants_and_what_the_capture_says(tmp_path: Path, command: Callable[..., Ran]) -> None:
    state = stored(tmp_path, weights=False)
    (tmp_path / "s.zarr" / "report.html").write_text("<html>")
    ran = command(tmp_path / "s.zarr", "--license", "cc-by-4.0", "--title", "Routes: <of> a model", main=card.main)
    assert (ran.status, ran.out.strip()) == (0, str(tmp_path / "s.zarr" / "README.md"))
    _, front, text = (tmp_path / "s.zarr" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "cc-by-4.0",
        "pretty_name": "Routes: <of> a model",
        "size_categories": ["n<1K"],
        "tags": ["mixture-of-experts", "expert-routing", "interpretability", "zarr"],
        "viewer": False,
    }
    assert "# Routes: &lt;of> a model" in text
    assert r"| model | org/model\|x |" in text
    assert "48 of 6 documents, in 6 rows; complete" in text
    assert "| routes | 2 of 8 experts at 3 layers (0 to 2) |" in text
    assert "`phase`" in text
    assert "`weight`" not in text
    assert f"`{state.digest}`" in text
    assert "Imported from vLLM (version: 0.33.0)" in text
    assert f"a.npz, SHA-256 {'ab' * 32}" in text
    assert "[report.html](report.html)" in text
    assert coverage(tmp_path / "s.zarr", "served").complete  # a card next to the groups changes nothing


def test_a_capture_of_ours_names_its_command(tmp_path: Path, command: Callable[..., Ran]) -> None:
    attrs = {"model": "m", "configuration": {"dataset": ["wikitext-2"], "model": "m"}}
    block = {"token": np.zeros((1, 2), int), "expert": np.zeros((1, 2, 1, 1), int)}
    write_capture(tmp_path / "s.zarr", "own", blocks=[block], num_experts=8, layers=[0], attrs=attrs)
    assert command(tmp_path / "s.zarr/own", "--license", "mit", "-o", tmp_path / "a.md", main=card.main).status == 0
    assert "python jobs/capture.py --dataset wikitext-2 --model m" in (tmp_path / "a.md").read_text()


def test_where_a_card_cannot_be_written_is_said(tmp_path: Path, command: Callable[..., Ran]) -> None:
    ran = command(tmp_path / "none.zarr", "--license", "mit", main=card.main)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "no store at" in ran.err


def test_plain_xarray_reads_a_store_that_is_served_over_http(tmp_path: Path, command: Callable[..., Ran]) -> None:
    """The card's own lines, in a separate process, without this project's code."""
    stored(tmp_path)
    own = open_capture(tmp_path / "s.zarr", "served")
    with web_folder(tmp_path) as address:
        place = f"{address}/s.zarr"
        assert command(tmp_path / "s.zarr", "--license", "mit", "--address", place, main=card.main).status == 0
        [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "s.zarr" / "README.md").read_text(), re.S)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert "'doc': 6" in done.stdout
        with xr.open_zarr(place, group="served", consolidated=False) as read:
            for name in ("expert", "weight", "token", "phase", "length", "name"):
                np.testing.assert_array_equal(read[name].values, own[name].values)
