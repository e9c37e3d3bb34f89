"""The parts of this project's code that decide bytes have a version, and captures from before a field of the identity
existed resume.

`tests/stores/begun` holds three captures of `tests/stores/begun-texts`, created through the command line by the code of
06f8627, before `routing_version` existed: in NF4 (with this project's own forward pass), unquantized, and with the
defaults of that time. They are kept unchanged. When `ROUTING_VERSION` is raised on purpose, a capture by the new code
is added.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import Ran
from fake_model import store_files
from test_families import checkpoint_of

from jobs import status
from store import CaptureGroup, coverage
from store.identity import LATER, differences, identity_of, refuse_other_identity
from workers import describe_model, shard, tiny_checkpoint
from workers.models.forwards import FORWARDS

Command = Callable[..., Ran]
STORES = Path(__file__).parents[1] / "stores"
GRID = ["--sequence_length", "64", "--rows_per_shard", "8", "--batch_tokens", "256"]
BEGUN = {
    "nf4": ["--name", "nf4", "--quantization", "nf4", *GRID],
    "none": ["--name", "none", "--quantization", "none", *GRID],
    "defaults": ["--name", "defaults"],
}
MICRO_BATCHES = "e4ad0fcba8c1c974"  # of some rows; of 06f8627 too
NEAR_TIE = 0.01  # difference of two weights below which another processor may choose differently


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the texts, where commands run."""
    shutil.copytree(STORES / "begun-texts", tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(name: str, store: Path) -> list[Any]:
    common = ["--local", "--device", "cpu", "--model", "tiny", "--dataset", "texts", "--allow_mixed", "--store", store]
    return [*common, *BEGUN[name]]


def assert_same_routes(found: Path, name: str) -> None:
    """Equal tokens; equal choices except near-ties, and equal weights up to rounding."""
    one, other = (xr.open_zarr(store, group=name, consolidated=False).load() for store in (found, STORES / "begun"))
    np.testing.assert_array_equal(one["token"], other["token"])
    weight = other["weight"].values.astype(float)
    apart = np.sort(weight, axis=-1)
    sure = (apart[..., 1] - apart[..., 0] > NEAR_TIE) & (other["expert"].values[..., 0] != 255)
    same = (np.sort(one["expert"].values, -1) == np.sort(other["expert"].values, -1)).all(-1)
    assert same[other["expert"].values[..., 0] != 255].mean() > 0.99
    ordered = sure & same
    np.testing.assert_array_equal(one["expert"].values[ordered], other["expert"].values[ordered])
    np.testing.assert_allclose(one["weight"].values[ordered], weight[ordered], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "none"])
def test_a_capture_by_this_code_has_the_routes_of_the_kept_one_or_another_routing_version(
    name: str, place: Path, command: Command
) -> None:
    """If this fails and the change is intended, raise `ROUTING_VERSION` and also keep a capture by the new code."""
    assert command(*options(name, place / "new")).status == 0
    assert LATER["routing_version"] == shard.ROUTING_VERSION == 1
    assert_same_routes(place / "new", name)


def test_the_micro_batches_of_some_rows_are_those_of_this_routing_version() -> None:
    lengths = np.random.default_rng(5).integers(1, 2049, 4000).astype(np.int32)
    lengths[:500] = 2048
    found = [shard.micro_batches(lengths, tokens) for tokens in (8_192, 32_768)]
    batches = [sorted(batch.tolist() for batch in each) for each in found]  # their order affects no byte
    digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
    assert (shard.ROUTING_VERSION, digest[:16]) == (1, MICRO_BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGUN)
def test_a_store_that_older_code_began_resumes_with_the_same_command(name: str, place: Path, command: Command) -> None:
    store = place / "begun"
    shutil.copytree(STORES / "begun", store)
    before = store_files(store)
    lost = coverage(store, name).shards_total - 1
    group = CaptureGroup(store, name)
    group.discard(lost)
    assert coverage(store, name).missing == [lost]
    ran = command(*options(name, store))
    assert ran.status == 0, ran.err
    assert command(store / name, "--verify", main=status.main).status == 0
    again = store_files(store)
    objects = {f"{name}/{array}/c/{lost}/0/0/0" for array in ("expert", "weight")}
    assert again.keys() == before.keys()
    assert {key for key in before if again[key] != before[key]} <= objects | {f"{name}/expert/commits/{lost}.json"}
    assert_same_routes(store, name)
    assert CaptureGroup(store, name).identity == json.loads(before[f"{name}/zarr.json"])["attributes"]["identity"]


@pytest.mark.slow
def test_a_capture_that_began_with_transformers_attention_resumes_with_it(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss had no own forward pass: its experts were packed, and attention was that of transformers."""
    folder = checkpoint_of("gpt_oss", place / "model", vocab_size=32_000)
    for file in tiny_checkpoint().glob("*token*"):
        shutil.copy(file, folder)
    given = [*options("nf4", place / "store"), "--model", folder, "--limit_documents", "12"]
    with monkeypatch.context() as patch:
        patch.delitem(FORWARDS, "GptOssModel")
        assert command(*given).status == 0
    group = CaptureGroup(place / "store", "nf4")
    before, begun = store_files(place / "store"), group.identity
    assert begun["expert_backend"] == "grouped"
    group.discard(0)
    ran = command(*given)
    assert ran.status == 0, ran.err
    again = store_files(place / "store")
    assert CaptureGroup(place / "store", "nf4").identity == begun
    assert {key for key in before if again[key] != before[key]} <= {"nf4/expert/commits/0.json"}
    assert describe_model(folder, quantization="nf4", device_type="cpu")["expert_backend"] == "grouped_sinks"


def test_a_field_of_the_identity_that_came_later_is_left_out_at_its_first_value() -> None:
    fields = {"model": "m", "routing_version": 1}
    assert identity_of(fields) == {"model": "m"}
    assert identity_of({**fields, "routing_version": 2}) == {"model": "m", "routing_version": 2}
    assert differences({"model": "m"}, fields) == []
    with pytest.raises(ValueError, match="routing_version: the store has 1, this run has 2"):
        refuse_other_identity("here", {"model": "m"}, {"model": "m", "routing_version": 2})


def test_no_later_field_stands_in_the_identity_of_an_ordinary_capture(place: Path, command: Command) -> None:
    assert command(*options("none", place / "new"), "--limit_documents", "1").status == 0
    assert LATER.keys().isdisjoint(CaptureGroup(place / "new", "none").identity)
