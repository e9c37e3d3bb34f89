"""`--mask`, `--force`, `--top_k` and `--routes_from` on the command line, from text to store, and in reports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_capture import write

import store
from analysis.report.command import command as reproducing
from jobs import compare, report, status
from jobs.capturing.options import parse_capture
from store.identity import LATER, changes_in_words, identity_hash

Command = Callable[..., Any]


@pytest.fixture
def base(tmp_path: Path) -> tuple[Any, ...]:
    """A small capture into `s.zarr`, of several shards, with exact weights and log-probabilities."""
    return (
        *("--dataset", write(tmp_path / "texts"), "--local", "--model", "tiny", "--device", "cpu"),
        *("--sequence_length", "32", "--rows_per_shard", "4", "--limit_documents", "4", "--store", tmp_path / "s.zarr"),
        *("--record", "logits", "--record", "logprob", "--weight_precision", "float32"),
    )


def opened(folder: Path, name: str) -> Any:
    return store.open_capture(folder / "s.zarr", name).load()


def test_what_is_changed_is_captured_resumed_and_told(command: Command, base: Any, tmp_path: Path) -> None:
    file = tmp_path / "experts.json"
    file.write_text('{"2": [0, 3]}')
    asked = ("--name", "m", "--mask", "7:1", "--mask", "5:6-7", "--mask_file", file, "--force", "*:4", "--top_k", "3")
    ran = command(*base, *asked)
    assert ran.status == 0, ran.err
    found = opened(tmp_path, "m")
    chosen = found["expert"].values[found["token"].values >= 0]
    assert chosen.shape[-1] == 3
    assert (chosen == 4).any(-1).all()
    for layer, experts in ((7, [1]), (5, [6, 7]), (2, [0, 3])):
        assert not np.isin(chosen[:, layer], experts).any()
    group = store.CaptureGroup(tmp_path / "s.zarr", "m")
    assert group.attrs["logits_of"] == "each router before its choices were changed"
    assert np.isfinite(found["logit"].values[found["token"].values >= 0]).all()
    mask, force = ["2:0", "2:3", "5:6", "5:7", "7:1"], [f"{layer}:4" for layer in range(8)]
    for told in (group.identity, group.attrs):
        assert (told["mask"], told["force"], told["top_k"]) == (mask, force, 3)
    assert (group.identity["experts_per_token"], group.attrs["configuration"]["top_k"]) == (3, 3)
    assert {"routes_from", "routes_weights"}.isdisjoint(group.identity)
    words = "mask 2:0, 2:3, 5:6, 5:7, 7:1; force 0:4, 1:4, 2:4, 3:4, 4:4, 5:4 and 2 more; top_k 3"
    assert changes_in_words(group.identity) == words
    assert words in command(tmp_path / "s.zarr", main=status.main).out
    [said] = json.loads(command(tmp_path / "s.zarr", "--json", main=status.main).out)["data_sets"]
    assert {name: said[name] for name in ("mask", "force", "top_k", "routes_from", "routes_weights")} == {
        "mask": mask, "force": force, "top_k": 3, "routes_from": None, "routes_weights": False,
    }  # fmt: skip
    assert "--mask 7:1 --mask 5:6-7" in str(reproducing(group.attrs))
    assert command(tmp_path / "s.zarr", "--output", tmp_path / "r.html", main=report.main).status == 0
    assert words in (tmp_path / "r.html").read_text()
    assert "nothing to do" in command(*base, *asked).err
    refused = command(*base, "--name", "m", "--mask", "7:1", "--top_k", "3")
    assert refused.status == 2
    assert f"  mask: the store has {mask}, this run has ['7:1']\n" in refused.err


def test_without_a_change_nothing_of_it_stands_anywhere(command: Command, base: Any, tmp_path: Path) -> None:
    assert command(*base, "--top_k", "2").status == 0, "the model's own number"
    group = store.CaptureGroup(tmp_path / "s.zarr", "texts")
    assert "logits_of" not in group.attrs
    names = {"mask", "force", "top_k", "routes_from", "routes_weights"}
    assert names <= LATER.keys()
    assert names.isdisjoint(group.identity)
    assert names.isdisjoint(group.attrs)
    assert "changed" not in command(tmp_path / "s.zarr", main=status.main).out


def test_a_capture_s_own_routes_and_weights_give_its_predictions_back(
    command: Command, base: Any, tmp_path: Path
) -> None:
    for name, options in (
        ("own", ()),
        ("masked", ("--mask", "*:1")),
        ("again", ("--routes_from", tmp_path / "s.zarr" / "own", "--routes_weights", "--batch_tokens", "100")),
        ("weighed", ("--routes_from", tmp_path / "s.zarr" / "own")),
        ("of masked", ("--routes_from", tmp_path / "s.zarr" / "masked")),
    ):
        ran = command(*base, "--name", name.replace(" ", "_"), *options)
        assert ran.status == 0, ran.err
    own, masked, again, weighed, of_masked = (
        opened(tmp_path, name) for name in ("own", "masked", "again", "weighed", "of_masked")
    )
    assert own.sizes["doc"] > 4, "one shard is no proof"
    for same, as_it_was in ((again, own), (weighed, own), (of_masked, masked)):
        np.testing.assert_array_equal(same["expert"], as_it_was["expert"])
        np.testing.assert_allclose(same["weight"], as_it_was["weight"], rtol=1e-4)
        np.testing.assert_allclose(same["logprob"], as_it_was["logprob"], atol=1e-4)
    assert np.nanmax(np.abs(masked["logprob"] - own["logprob"])) > 0.1
    source = store.CaptureGroup(tmp_path / "s.zarr", "own")
    attrs = store.CaptureGroup(tmp_path / "s.zarr", "again").attrs
    assert (len(attrs["routes_from"]), attrs["routes_weights"]) == (64, True)
    assert (attrs["router_transformation"], source.attrs["router_transformation"]) == ("unknown", "renormalized")
    assert attrs["routes_from"] == attrs["identity"]["routes_from"] == identity_hash(source.identity)


def test_the_effect_is_told_where_both_recorded_predictions(command: Command, base: Any, tmp_path: Path) -> None:
    assert command(*base, "--name", "whole").status == 0
    assert command(*base, "--name", "masked", "--mask", "3:0-1", "--mask", "5:2").status == 0
    path = tmp_path / "s.zarr"
    whole, masked = (opened(tmp_path, name) for name in ("whole", "masked"))
    difference = (masked["logprob"] - whole["logprob"]).values[:, :-1]
    special = np.isin(whole["token"].values[:, 1:], whole.attrs["special_token_ids"])
    known = np.isfinite(difference) & ~special
    told = command(path / "whole", path / "masked", main=compare.main).out
    assert f"effect on predictions: {difference[known].mean():+.4f} nats per token in the second capture" in told
    assert f"{known.sum():,} tokens)" in told
    assert f"mask: [] and {masked.attrs['mask']}" in told
    assert "tokens with the largest losses" in told
    found = json.loads(command(path / "whole", path / "masked", "--json", main=compare.main).out)
    assert found["effect"]["effect"] == pytest.approx(difference[known].mean(), abs=1e-6)
    assert (found["effect"]["n"], found["differ"]["mask"]) == (known.sum(), [[], masked.attrs["mask"]])
    worst = found["effect"]["lose_most"][0]
    token = whole["token"].values[:, 1:]
    total = {each: difference[known & (token == each)].sum() for each in np.unique(token[known])}
    assert worst["effect"] * worst["tokens"] == pytest.approx(min(total.values()), abs=1e-4)
    assert total[worst["token_id"]] == pytest.approx(min(total.values()), abs=1e-4)
    classes = {row["class"]: row for row in found["effect"]["classes"]}
    initial = np.array([len(piece) > 1 and piece[0] == "▁" and piece[1].isalpha() for piece in whole["piece"].values])
    own = difference[known & initial[token]]
    assert (classes["word-initial"]["tokens"], classes["word-initial"]["effect"]) == (
        own.size,
        pytest.approx(own.mean(), abs=1e-6),
    )
    assert "by class of the predicted token" in told
    lost = np.where(known, difference, 0).min(1)
    assert [place["effect"] for place in found["effect"]["places"]] == pytest.approx(np.sort(lost)[:10], abs=1e-6)
    for place in found["effect"]["places"]:
        row, at = place["row"], place["position"]
        assert difference[row, at - 1] == pytest.approx(place["effect"], abs=1e-6)
        ids = whole["token"].values[row, max(0, at - 10) : at + 6]
        text = "".join(whole["piece"].values[ids[ids >= 0]]).replace("▁", " ").replace("<0x0A>", "\n")
        assert place["before"] + place["token"] + place["after"] == text
    assert f"⟦{found['effect']['places'][0]['token']}⟧" in told
    counted = (whole["token"].values >= 0) & ~np.isin(whole["token"].values, whole.attrs["special_token_ids"])
    sets = [np.sort(each["expert"].values[counted], axis=-1) for each in (whole, masked)]
    moved = (sets[0] != sets[1]).any(-1).mean(0)
    shares = {"below": moved[:3].mean(), "changed": moved[[3, 5]].mean(), "above": moved[[4, 6, 7]].mean()}
    assert found["moved"] == {"layers": [3, 5], **{name: pytest.approx(share) for name, share in shares.items()}}
    assert shares["below"] == 0 < shares["changed"]
    assert [row["changed"] for row in found["layers"]] == ["", "", "", "mask 0, 1", "", "mask 2", "", "", ""]
    assert f"0.00% below layer 3; {shares['changed']:.2%} at the 2 changed layers; {shares['above']:.2%} at the" in told
    same = command(path / "whole", path / "whole", main=compare.main).out
    assert "effect on predictions: +0.0000 nats" in same
    assert "tokens with the largest losses" not in same
    assert "changed" not in same


def test_choices_and_weights_of_others_are_used_as_they_are(command: Command, base: Any, tmp_path: Path) -> None:
    """Routes of a model in 4 bits, given to the unquantized model: its choices, and its choices with weights."""
    assert command(*base, "--name", "nf4", "--quantization", "nf4").status == 0
    given = ("--routes_from", tmp_path / "s.zarr" / "nf4")
    assert command(*base, "--name", "both", *given, "--routes_weights").status == 0
    assert command(*base, "--name", "choices", *given).status == 0
    nf4, both, choices = (opened(tmp_path, name) for name in ("nf4", "both", "choices"))
    there = nf4["token"].values >= 0
    np.testing.assert_array_equal(both["expert"], nf4["expert"])
    np.testing.assert_array_equal(both["weight"], nf4["weight"])
    np.testing.assert_array_equal(
        np.sort(choices["expert"].values[there], axis=-1), np.sort(nf4["expert"].values[there], axis=-1)
    )
    assert (choices["weight"].values[there] != nf4["weight"].values[there]).mean() > 0.5, "they are its own"


def test_captures_that_do_not_fit_are_refused_before_weights_are_read(
    command: Command, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "s.zarr" / "own"
    assert command(*base, "--name", "own").status == 0
    monkeypatch.setattr("workers.engine.load_model", lambda *_, **__: pytest.fail("weights are loaded"))
    other = write(tmp_path / "other", {"a.txt": "Another text, of other words."})
    for options, message in (
        (("--sequence_length", "16"), "sequence_length: the store has 32, this run has 16"),
        (("--rows_per_shard", "8"), "rows_per_shard: the store has 4, this run has 8"),
        (("--limit_documents", "2"), "limit_documents: the store has 4, this run has 2"),
        (("--mask", "7:1"), "--routes_from gives all choices: omit --mask"),
        (("--routes_from", tmp_path / "s.zarr" / "none"), "no data set 'none'"),
    ):
        refused = command(*base, "--name", "x", "--routes_from", own, *options)
        assert refused.status == 2
        assert message in refused.err
    refused = command("--dataset", other, *base[2:], "--name", "x", "--routes_from", own)
    assert (refused.status, "holds routes of other tokens, or of another model:\n  text_" in refused.err) == (2, True)
    refused = command("--dataset", other, *base, "--routes_from", own)
    assert "--routes_from is one capture, but --dataset is given 2 times" in refused.err
    group = store.CaptureGroup(tmp_path / "s.zarr", "own")
    group.discard(0)
    refused = command(*base, "--name", "x", "--routes_from", own)
    assert (refused.status, "is not complete" in refused.err) == (2, True)
    for options, message in (
        (("--routes_weights",), "--routes_weights uses the weights of --routes_from, which is not given"),
        (("--mask", "9:1"), "--mask 9:1: there is no layer 9"),
        (("--mask", "7:1", "--force", "7:1"), "7:1 is given with both --mask and --force"),
        (("--mask", "7:*"), "--mask leaves 0 of 8 experts at layer 7"),
        (("--top_k", "9"), "--top_k is 9, but must be 1 to 8"),
        (("--top_k", "0"), "--top_k is 0, but must be 1 to 8"),
    ):
        refused = command(*base, "--name", "x", *options)
        assert (refused.status, message in refused.err) == (2, True), refused.err


def test_options_of_a_file_give_way_to_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('mask: ["7:1", "6:2"]\nforce: ["1:1"]\ntop_k: 3\nroutes_weights: true\n')
    config = parse_capture(["--config", str(file), "--mask", "0:0"])
    assert (config.mask, config.force, config.top_k, config.routes_weights) == (("0:0",), ("1:1",), 3, True)
