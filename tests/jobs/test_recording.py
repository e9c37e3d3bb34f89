"""`--record`, `--top_logits` and `--weight_precision` on the command line, from text to store and back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from test_capture import said, without_times, write

import store
from analysis.metrics.load import expert_load
from analysis.report.command import command as reproducing
from jobs import status
from jobs.capturing.options import parse_capture
from store.identity import LATER

Command = Callable[..., Any]
ALL = ("--record", "logits", "--record", "output_norm", "--record", "logprob")
ARRAYS = ("logit", "output_norm", "logprob")


@pytest.fixture
def base(tmp_path: Path) -> tuple[Any, ...]:
    """A small capture into `s.zarr`, of texts that are cut into rows."""
    return (
        *("--dataset", write(tmp_path / "texts"), "--local", "--model", "tiny", "--device", "cpu"),
        *("--sequence_length", "32", "--rows_per_shard", "8", "--store", tmp_path / "s.zarr"),
    )


def test_what_is_recorded_is_stored_verified_healed_and_told(command: Command, base: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    assert command(*base, "--name", "plain").status == 0
    assert command(*base, "--name", "all", *ALL).status == 0
    plain, everything = (store.open_capture(path, name).load() for name in ("plain", "all"))
    for name in ("expert", "weight", "token"):
        np.testing.assert_array_equal(plain[name], everything[name])
    filled = np.arange(32) < everything["length"].values[:, None]
    followed = np.arange(32) < everything["length"].values[:, None] - 1
    for name, there in (("logit", filled), ("output_norm", filled), ("logprob", followed)):
        assert np.isfinite(everything[name].values[there]).all()
        assert np.isnan(everything[name].values[~there]).all()
    assert everything.attrs["record"] == list(ARRAYS)
    assert everything.attrs["router_transformation"] == "renormalized"
    documents = np.unique(everything["document_id"]).size
    assert everything.attrs["pairs_cut"] == len(filled) - documents > 0, "a prediction is lost at each cut"
    assert filled.sum() - followed.sum() == everything.attrs["pairs_cut"] + documents

    before = without_times(path)
    for name, shard in zip(ARRAYS, (0, 1, 0), strict=True):
        file = next((path / "all" / name / "c" / str(shard)).rglob("0"))
        while file.is_dir():
            file = file / "0"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    ran = command(path / "all", "--verify", "--json", main=status.main)
    [told] = json.loads(ran.out)["data_sets"]
    assert (ran.status, told["record"], told["weight_bits"]) == (1, list(ARRAYS), 10)
    assert sorted(wrong["shard"] for wrong in told["wrong"]) == [0, 1]
    assert command(*base, "--name", "all", *ALL).status == 0
    healed = without_times(path)
    faults = {name for name in healed.keys() ^ before.keys() if "/faults" not in name}
    assert not faults
    assert {name: healed[name] for name in before} == before
    table = command(path, main=status.main).out
    assert "also recorded" in table
    assert "logit, output_norm, logprob" in table


def test_nothing_of_it_stands_in_the_identity_of_a_capture_without_it(
    command: Command, base: Any, tmp_path: Path
) -> None:
    assert command(*base).status == 0
    group = store.CaptureGroup(tmp_path / "s.zarr", "texts")
    assert {"record", "top_logits", "weight_bits", "weight_precision"}.isdisjoint(group.identity)
    assert {"record", "top_logits", "weight_bits", "router_transformation"}.isdisjoint(group.attrs)
    assert "also recorded" not in command(tmp_path / "s.zarr", main=status.main).out
    for change, field, stored, wanted in (
        (("--record", "logits"), "record", "[]", "['logit']"),
        (("--weight_precision", "float32"), "weight_bits", "10", "23"),
    ):
        refused = command(*base, *change)
        assert refused.status == 2
        assert f"  {field}: the store has {stored}, this run has {wanted}\n" in refused.err
    assert LATER["record"] == []


def test_the_largest_logits_only(command: Command, base: Any, tmp_path: Path) -> None:
    assert command(*base, "--name", "all", "--record", "logits").status == 0
    assert command(*base, "--name", "top", "--record", "logits", "--top_logits", 3).status == 0
    every, top = (store.open_capture(tmp_path / "s.zarr", name).load() for name in ("all", "top"))
    assert top["logit"].dims == top["logit_expert"].dims == ("doc", "position", "layer", "candidate")
    filled = np.arange(32) < top["length"].values[:, None]
    ids = top["logit_expert"].values[filled].astype(int)
    np.testing.assert_array_equal(
        top["logit"].values[filled], np.take_along_axis(every["logit"].values[filled], ids, -1)
    )
    np.testing.assert_array_equal(ids[..., :2], top["expert"].values[filled])
    assert (top["logit_expert"].values[~filled] == 255).all()
    refused = command(*base, "--top_logits", 3)
    assert (refused.status, "no logits are recorded: add --record logits" in refused.err) == (2, True)
    refused = command(*base, "--record", "logits", "--top_logits", 9)
    assert "--top_logits is 9, but must be 1 to 8, the number of experts" in refused.err
    refused = command(*base, "--record", "logits", "--record", "logits")
    assert "--record is given as logits, logits" in refused.err


def test_weights_in_float32_and_compact_are_those_of_float16_to_their_precision(
    command: Command, base: Any, tmp_path: Path
) -> None:
    for precision in ("float16", "float32", "compact"):
        ran = command(*base, "--dtype", "bfloat16", "--name", precision, "--weight_precision", precision)
        assert ran.status == 0, ran.err
    half, single, compact = (
        store.open_capture(tmp_path / "s.zarr", name).load() for name in ("float16", "float32", "compact")
    )
    assert (single["weight"].dtype, compact["weight"].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(single["weight"].astype(np.float16), half["weight"])
    np.testing.assert_allclose(compact["weight"], single["weight"], rtol=2.0**-6, atol=0)
    assert compact["weight"].attrs["mantissa_bits"] == compact.attrs["weight_bits"] == 5
    assert len(np.unique(compact["weight"])) < len(np.unique(half["weight"])) / 4
    xr.testing.assert_equal(expert_load(single), expert_load(half))  # analysis reads them like float16


def test_the_options_come_back_from_a_file_and_from_what_a_capture_says(
    command: Command, base: Any, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("record: [logits, logprob]\ntop_logits: 4\nweight_precision: compact\n")
    config = parse_capture(["--config", str(file), "--dataset", "x"])
    assert (config.record, config.top_logits, config.weight_precision) == (("logits", "logprob"), 4, "compact")
    again = parse_capture(["--config", str(file), "--dataset", "x", "--record", "output_norm"])
    assert again.record == ("output_norm",), "what the command line lists takes the place of the file's"
    assert command(*base, *ALL, "--top_logits", 2).status == 0
    told = reproducing(store.CaptureGroup(tmp_path / "s.zarr", "texts").attrs)
    assert told is not None
    assert "--record logits --record output_norm --record logprob --top_logits 2" in told


def test_a_dry_run_counts_what_is_recorded(command: Command, base: Any) -> None:
    plain, everything = command(*base, "--dry_run").out, command(*base, "--dry_run", *ALL).out

    def number(out: str, label: str) -> int:
        found = re.search(r"[\d,]{4,}", said(out, label))
        assert found
        return int(found[0].replace(",", ""))

    tokens = int(said(plain, "tokens").split()[0].replace(",", ""))
    assert said(everything, "recorded") == "expert, weight, logit, output_norm, logprob"
    assert number(everything, "store") - number(plain, "store") == pytest.approx(3.3 * tokens * (64 + 16 + 1), rel=0.01)
    experts = 8 * 3 * 64 * 256 * 4  # of the last layer; the head is tied to the embedding
    assert number(everything, "device memory") - number(plain, "device memory") == experts
    assert number(everything, "host memory") > number(plain, "host memory") + 2 * 8 * 32 * 4 * (64 + 16 + 1) - 1
