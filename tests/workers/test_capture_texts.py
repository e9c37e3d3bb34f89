"""`capture_texts` returns what a store would hold for the same texts."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import store
import workers
from analysis.metrics.load import expert_load
from workers.models.loading import LoadedModel

TEXTS = ["The cat sat on the mat. " * 3, "", "def f(x):\n    return x", "<s> stays text", "한국어 " * 40]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The texts as files, one document each, in their order."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    return texts


@pytest.mark.parametrize("bos", ["none", "document", "row"])
def test_texts_in_memory_are_texts_in_a_store(tiny_model: LoadedModel, folder: Path, command, bos: str) -> None:  # type: ignore[no-untyped-def]
    quantization = tiny_model.provenance["quantization"]
    path = folder.parent / "s.zarr"
    ran = command(
        *("--local", "--model", "tiny", "--dataset", folder, "--store", path, "--quantization", quantization),
        *("--sequence_length", "32", "--batch_tokens", "100", "--bos", bos, "--device", "cpu"),
    )
    assert ran.status == 0, ran.err
    stored = store.open_capture(path, "texts").load()
    memory = workers.capture_texts(tiny_model, TEXTS, sequence_length=32, batch_tokens=100, bos=bos)
    assert isinstance(memory, xr.Dataset)
    assert list(memory.data_vars) == list(stored.data_vars)
    assert set(memory.coords) == set(stored.coords)
    for name, variable in stored.variables.items():
        ours = memory[name].variable
        assert ours.dims == variable.dims, name
        if variable.dtype.kind in "OT":
            assert ours.dtype.kind in "OT", name
        else:
            assert ours.dtype == variable.dtype, name
        if name != "name":  # texts have no files' names
            np.testing.assert_array_equal(ours.values, variable.values, err_msg=str(name))
    assert memory.sizes["document"] == len(TEXTS)
    for field in ("num_experts", "experts_per_token", "sequence_length", "special_token_ids", "quantization", "model"):
        assert memory.attrs[field] == stored.attrs[field], field
    assert (memory["expert"].values[memory["token"].values == -1] == 255).all()
    xr.testing.assert_equal(expert_load(memory), expert_load(stored))


def test_captured_texts_leave_as_netcdf(tiny_model: LoadedModel, tmp_path: Path) -> None:
    memory = workers.capture_texts(tiny_model, ["one two three", ""])
    memory.to_netcdf(tmp_path / "texts.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "texts.nc", engine="h5netcdf") as copy:
        xr.testing.assert_equal(copy, memory)
        assert copy.attrs.keys() == memory.attrs.keys()


def test_a_folder_is_loaded_and_captured_as_a_loaded_model_is(tiny_model: LoadedModel) -> None:
    quantization = tiny_model.provenance["quantization"]
    given = workers.capture_texts(tiny_model.folder, ["one two three"], quantization=quantization)
    xr.testing.assert_identical(given, workers.capture_texts(tiny_model, ["one two three"]))
    assert given.sizes["position"] == int(given["length"].max()), "no position is there for nothing"


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_texts_without_a_token_are_refused(tiny_model: LoadedModel, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"no text has a token: {len(texts)} texts"):
        workers.capture_texts(tiny_model, texts)


def test_faults_of_the_caller_are_named(tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length is 0, but must be 1 to 32768"):
        workers.capture_texts(tiny_model, ["a"], sequence_length=0)
    with pytest.raises(ValueError, match="give a list of texts, not one text"):
        workers.capture_texts(tiny_model, "a text")
    with pytest.raises(ValueError, match="sequence_length is 32769, but must be 1 to 32768"):
        workers.capture_texts(tiny_model, ["a"], sequence_length=32769)
    with pytest.raises(ValueError, match="'q4' is none of nf4, fp4, mxfp4, fp8, int8, none"):
        workers.capture_texts(tiny_model.folder, ["a"], quantization="q4")
    with pytest.raises(ValueError, match=r"no/such"):
        workers.capture_texts(tmp_path / "no/such", ["a"])


def test_what_is_recorded_in_memory_is_what_a_store_has(tiny_model: LoadedModel, folder: Path, command) -> None:  # type: ignore[no-untyped-def]
    quantization, path = tiny_model.provenance["quantization"], folder.parent / "s.zarr"
    ran = command(
        *("--local", "--model", "tiny", "--dataset", folder, "--store", path, "--quantization", quantization),
        *("--sequence_length", "32", "--batch_tokens", "100", "--device", "cpu", "--weight_precision", "float32"),
        *("--record", "logits", "--record", "output_norm", "--record", "logprob", "--top_logits", "3"),
    )
    assert ran.status == 0, ran.err
    stored = store.open_capture(path, "texts").load()
    memory = workers.capture_texts(
        tiny_model, TEXTS, sequence_length=32, batch_tokens=100, record=["logits", "output_norm", "logprob"],
        top_logits=3, weight_precision="float32",
    )  # fmt: skip
    for name in ("weight", "logit", "logit_expert", "output_norm", "logprob"):
        assert (memory[name].dims, memory[name].dtype) == (stored[name].dims, stored[name].dtype), name
        np.testing.assert_array_equal(memory[name].values, stored[name].values, err_msg=name)
    for field in ("record", "top_logits", "weight_bits", "router_transformation", "pairs_cut"):
        assert memory.attrs[field] == stored.attrs[field], field
    with pytest.raises(ValueError, match="'mood' cannot be recorded"):
        workers.capture_texts(tiny_model, ["a"], record=["mood"])  # type: ignore[list-item]
