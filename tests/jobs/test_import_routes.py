"""Other engines' routes through the command line: imported, resumed, verified, examined, exported, imported again."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import Ran
from engine_forms import FORMS, sequences, vllm_http

from analysis import expert_load, write_replay
from jobs import compare, doctor, import_routes, query, status
from store import CaptureGroup, attributes, open_capture, verify

ROUTES = ("--model", "mixtral", "--num_experts", 8)


def imported(command: Callable[..., Ran], path: Path, store: Path, name: str, form: str, *more: object) -> Ran:
    options = [*ROUTES, "--store", store, "--name", name, "--format", form, "--experts_per_token", 2, *more]
    return command(path, *options, main=import_routes.main)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_imported_by_one_command_and_again_changes_nothing(
    form: str, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    name, write = FORMS[form]
    made = sequences(number=6)
    path = write(tmp_path, made)
    options = ("--engine_version", "1.2", "--json")
    ran = imported(command, path, tmp_path / "s.zarr", "served", name, *options)
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    tokens = sum(len(one["prompt"]) + len(one["completion"]) for one in made)
    assert (told["tokens"], told["documents"], told["experts_per_token"]) == (tokens, 6, 2)
    again = imported(command, path, tmp_path / "s.zarr", "served", name, *options)
    assert (again.status, json.loads(again.out)) == (0, told)
    group = CaptureGroup(tmp_path / "s.zarr", "served")
    found = verify(group)
    assert (found.shards, found.plan) == ({}, [])
    about = attributes(open_capture(tmp_path / "s.zarr", "served"))["imported"]
    assert (about["engine_version"], [each["name"] for each in about["files"]]) == ("1.2", [path.name])
    assert len(about["files"][0]["sha256"]) == 64


def test_other_files_under_the_same_name_are_refused(tmp_path: Path, command: Callable[..., Ran]) -> None:
    store = tmp_path / "s.zarr"
    assert imported(command, vllm_http(tmp_path, sequences()), store, "a", "vllm").status == 0
    ran = imported(command, vllm_http(tmp_path, sequences(seed=1)), store, "a", "vllm")
    assert ran.status == 2
    assert "imported: the store has" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "sglang"], "--format sglang reads .jsonl, .json"),
        (["--format", "vllm", "--layers", "a"], "must be numbers and ranges"),
        (["--format", "vllm", "--layers", "1,1"], "ascending numbers, each once"),
        (["--format", "vllm", "--layers", "0-7"], "routes have 3 layers, but the model has experts at 8"),
        (["--format", "vllm", "--experts_per_token", "4"], "the files have 2 experts per token, but mixtral chooses 4"),
        (["--format", "vllm", "--num_experts", "4"], "it holds expert"),
        (["--format", "plain"], "is unknown or missing"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(
    tmp_path: Path, command: Callable[..., Ran], options: list[str], message: str
) -> None:
    path = FORMS["vllm 0.33, offline"][1](tmp_path, sequences())
    ran = command(path, *ROUTES, "--store", tmp_path / "s.zarr", "--name", "a", *options, main=import_routes.main)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err


def test_files_that_are_not_there_and_a_model_that_is_not_known_are_named(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    assert "no file" in imported(command, tmp_path / "none.npz", tmp_path / "s", "a", "vllm").err
    path = vllm_http(tmp_path, sequences())
    options = ("--format", "vllm", "--store", tmp_path / "s", "--name", "a")
    ran = command(path, "--model", "nothing", *options, main=import_routes.main)
    assert (ran.status, "neither a folder" in ran.err) == (2, True)


def test_weights_are_made_of_logits_as_the_family_does_or_as_one_says() -> None:
    rules = {"mixtral": "renormalized", "olmoe": "softmax", "qwen3_moe": "renormalized", "deepseek_v3": "unknown"}
    for family, rule in rules.items():
        assert import_routes._rule({"model_type": family, "norm_topk_prob": family != "olmoe"}) == rule
    asked = import_routes.ImportConfig(files=(), format="transformers", model="m", store="s", name="n")
    unknown = import_routes.Model(name="m", num_experts=8, experts_per_token=2, rule="unknown")
    with pytest.raises(ValueError, match="m is of a family in which the k largest logits may not be the choice"):
        import_routes._weights(asked, unknown)
    assert import_routes._weights(replace(asked, weights="softmax"), unknown) == "softmax"
    assert import_routes._weights(asked, replace(unknown, rule="none")) == "none"


def test_layers_are_numbered_as_the_model_does_where_files_have_all(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    made = sequences()
    path = vllm_http(tmp_path, made)
    assert imported(command, path, tmp_path / "s.zarr", "a", "vllm", "--layers", "1-2").status == 0
    found = open_capture(tmp_path / "s.zarr", "a")
    assert found["layer"].values.tolist() == [1, 2]
    np.testing.assert_array_equal(found["expert"][0, : len(made[0]["expert"])], made[0]["expert"][:, 1:])


def test_the_doctor_says_what_is_wrong_and_how_two_captures_agree(tmp_path: Path, command: Callable[..., Ran]) -> None:
    made = sequences(number=30)
    store = tmp_path / "s.zarr"
    assert imported(command, vllm_http(tmp_path, made), store, "good", "vllm").status == 0
    for one in made:
        one["expert"] = np.roll(one["expert"], 1, axis=1)
        one["expert"][:, 1] = 0
    assert imported(command, vllm_http(tmp_path, made), store, "bad", "vllm").status == 0
    ran = command(store / "bad", "--json", main=doctor.main)
    assert ran.status == 1
    found = {one["fault"]: one for one in json.loads(ran.out)["findings"]}
    assert found["zero layers"]["layers"] == [1]
    shown = command(store / "bad", main=doctor.main)
    assert "zero layers: layer 1; first in rows 0 to 4\n" in shown.out
    ran = command(store / "good", "--against", store / "good", "--json", main=doctor.main)
    compared = json.loads(ran.out)["comparison"]
    assert (compared["verdict"], compared["agreement"], compared["position"]) == ("agrees", 1.0, 0)
    told = command(store / "good", "--against", store / "good", main=doctor.main).out
    assert "verdict: agrees" in told
    assert command(store / "good", "--against", store / "none", main=doctor.main).status == 2
    assert "not both" in command(store / "a", "--against", "s/b", "--recapture", 1, main=doctor.main).err


def test_what_vllm_would_return_of_the_tiny_model_is_imported_and_agrees_with_the_model_here(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    """The whole way, with the model's configuration and tokenizer: import, doctor, a question."""
    from workers import capture_texts

    texts = [f"The Congress of the United States met in {year}, and the President spoke." for year in range(1801, 1809)]
    own = capture_texts("tiny", texts, quantization="none")
    made = []
    for row in range(len(texts)):
        token = own["token"].values[row, : int(own["length"][row])]
        made.append(
            {"prompt": token[:5], "completion": token[5:], "expert": own["expert"].values[row, : len(token) - 1]}
        )
    path, store = vllm_http(tmp_path, made), tmp_path / "s.zarr"
    options = ("--format", "vllm", "--model", "tiny", "--store", store, "--name", "served")
    assert command(path, *options, main=import_routes.main).status == 0
    ran = command(store / "served", "--recapture", 4, "--json", main=doctor.main)
    compared = json.loads(ran.out)["comparison"]
    assert (compared["verdict"], compared["documents"], compared["agreement"]) == ("agrees", 4, 1.0)
    every, generated = (
        json.loads(command(store / "served", "--token", "▁of", "--json", *more, main=query.main).out)
        for more in ((), ("--phase", "generated"))
    )
    assert (every["phase"], generated["phase"]) == ([], ["generated"])
    assert every["answers"][0]["tokens"] == int((own["token"] == every["answers"][0]["token_id"]).sum())
    counted = sum(int((own["token"].values[row, 5:] == every["answers"][0]["token_id"]).sum()) for row in range(8))
    assert generated["answers"][0]["tokens"] == counted
    both = [
        int(re.search(r"([\d,]+) tokens in both", command(*2 * [store / "served"], *more, main=compare.main).out)[1])
        for more in ((), ("--phase", "generated"))
    ]
    assert both[0] - both[1] == 8 * 5, "the prompts are left out"
    assert "complete" in command(store, "--verify", main=status.main).out


@pytest.mark.parametrize("framework", ["vllm", "sglang", "slime", "verl"])
def test_a_replay_is_exported_imported_and_equal_in_each_engines_form(
    framework: str, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    store, made = tmp_path / "s.zarr", sequences(number=6, last=framework == "verl")  # verl has all S tokens
    path, options = FORMS["plain, JSON"][1](tmp_path, made), {"num_hidden_layers": 3}
    assert imported(command, path, store, "own", "plain", "--layers", "1-2").status == 0
    own = open_capture(store, "own")
    write_replay(tmp_path / "replay.jsonl", own, framework, **options)  # type: ignore[arg-type]
    ran = imported(command, tmp_path / "replay.jsonl", store, framework, "replay", "--layers", "1-2")
    assert ran.status == 0, ran.err
    back = open_capture(store, framework)
    assert "phase" not in back
    for name in ("expert", "token", "length", "document_id", "offset", "layer"):
        np.testing.assert_array_equal(back[name].values, own[name].values)
    write_replay(tmp_path / "again.jsonl", back, framework, **options)  # type: ignore[arg-type]
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "replay.jsonl").read_text()
    if framework in ("sglang", "slime"):  # flat, and read like SGLang's own answers, with separate ids
        lines = [json.loads(line) for line in (tmp_path / "replay.jsonl").read_text().splitlines()]
        for line in lines:
            line["prompt_token_ids"], line["output_ids"] = line["tokens"][:1], line["tokens"][1:]
        (tmp_path / "sglang.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert imported(command, tmp_path / "sglang.jsonl", store, "flat", "sglang", "--layers", "1-2").status == 0
        np.testing.assert_array_equal(open_capture(store, "flat")["expert"].values, own["expert"].values)


def test_loads_of_routes_without_weights_are_those_of_routes_with_them(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    made = sequences()
    plain = FORMS["plain, JSON"][1](tmp_path, made)
    assert imported(command, plain, tmp_path / "s.zarr", "with", "plain").status == 0
    assert imported(command, vllm_http(tmp_path, made), tmp_path / "s.zarr", "without", "vllm").status == 0
    there, here = (expert_load(open_capture(tmp_path / "s.zarr", name)) for name in ("with", "without"))
    # With weights choices are ordered by them.
    np.testing.assert_array_equal(there["counts"].sum("k"), here["counts"].sum("k"))
    xr.testing.assert_equal(there["share"], here["share"])
    assert bool(here["mass_share"].isnull().all())
    assert not bool(there["mass_share"].isnull().any())
