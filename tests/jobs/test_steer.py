"""`jobs/steer.py`: the experts that distinguish one text are found and masked, and the losses of both texts are
reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import store
from analysis import carriers, contrast
from jobs import compare, steer
from jobs.capturing.options import as_begun
from jobs.console.steer_rows import carriers_told
from store import attributes
from workers import capture_texts

Command = Callable[..., Any]
DOCUMENTS, TOKENS = 12, 40
LEGAL = "The parties agree that clause {} of this contract ends on the first day of May, and that it is not renewed."
CODE = "def area_{}(width, height):\n    return [width * height for _ in range(4)]\n\nprint(area_{}(3, 4))\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts of equal documents, in JSON lines."""
    folder = tmp_path_factory.mktemp("steer")
    for name, text in (("legal", LEGAL), ("code", CODE)):
        documents = [{"text": text.format(number, number)} for number in range(DOCUMENTS)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


@pytest.fixture
def captured(texts: Path, command: Command) -> Path:
    """A store of both, made once."""
    place = texts / "s.zarr"
    if not place.exists():
        options = ("--local", "--model", "tiny", "--device", "cpu", "--limit_tokens", TOKENS, "--record", "logprob")
        data = [word for name in ("legal", "code") for word in ("--dataset", texts / f"{name}.jsonl")]
        assert command(*data, *options, "--store", place).status == 0
    return place


def shares(capture: xr.Dataset) -> np.ndarray:
    """The number of tokens that reach each expert, (L, E), counted without a metric."""
    experts = capture["expert"].values[(capture["token"] > 2).values]  # 0 to 2 are special
    return np.stack([(experts == expert).any(-1).mean(0) for expert in range(8)], axis=-1)


def test_the_experts_are_found_and_their_effects_are_those_of_captures_without_them(
    captured: Path, command: Command, tmp_path: Path
) -> None:
    places, into, file = (f"{captured}/code", f"{captured}/legal"), tmp_path / "without.zarr", tmp_path / "code.json"
    asked = (*places, "--local", "--device", "cpu", "--into", into, "--experts", 3)
    ran = command(*asked, "--write", file, "--json", main=steer.main)
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    code, legal = (store.open_capture(captured, name).load() for name in ("code", "legal"))
    apart = shares(code) - shares(legal)
    largest = [divmod(int(cell), 8) for cell in np.argsort(-apart, axis=None)[:3]]
    assert [(row["layer"], row["expert"]) for row in told["experts"]] == largest
    for row in told["experts"]:
        assert row["difference"] == pytest.approx(apart[row["layer"], row["expert"]])
        assert row["low"] > 0
    named = {str(layer): sorted(e for at, e in largest if at == layer) for layer, _ in largest}
    assert json.loads(file.read_text()) == named
    mask = sorted(largest)
    for row, text in zip(told["data_sets"], (CODE, LEGAL), strict=True):
        documents = [text.format(number, number) for number in range(DOCUMENTS)]
        one, other = (
            capture_texts("tiny", documents, sequence_length=64, record=["logprob"], mask=each)["logprob"].values
            for each in ((), mask)
        )
        assert row["effect"] == pytest.approx(float(np.nanmean((other - one)[:, : TOKENS - 1])), abs=1e-4)
    assert told["data_sets"][0]["difference"] == pytest.approx(
        told["data_sets"][0]["effect"] - told["data_sets"][1]["effect"], abs=1e-6
    )
    attrs = attributes(store.open_capture(into, "code"))
    assert attrs["mask"] == [f"{layer}:{expert}" for layer, expert in mask]
    other = command(*asked, "--experts", 1, main=steer.main)
    assert other.status == 2
    assert f"has mask {', '.join(attrs['mask'])}: use --into to name another store" in other.err
    again = command(*asked, main=steer.main)
    assert "nothing to do" in again.err
    assert (
        f"Without these 3 experts, the log-probability of a token changes by {told['data_sets'][0]['effect']:+.4f}"
        in (" ".join(again.out.split()))
    )
    assert command(captured, into, main=compare.main).out.startswith("effect of")


def test_experts_are_named_alone_and_forced_within_what_a_token_chooses(
    captured: Path, command: Command, tmp_path: Path
) -> None:
    places = (f"{captured}/code", f"{captured}/legal")
    ran = command(*places, "--only_name", "--force", "--experts", 64, "--json", main=steer.main)
    told = json.loads(ran.out)
    of_layer = [row["layer"] for row in told["experts"]]
    assert told["change"] == "force"
    assert max(of_layer.count(layer) for layer in of_layer) == 2
    assert "data_sets" not in told
    both = {name: store.open_capture(captured, name) for name in ("code", "legal")}
    forced = {name: each.assign_attrs(force=[f"{layer}:0" for layer in range(8)]) for name, each in both.items()}
    beside = [row["layer"] for row in carriers_told(forced, 64, forced=True)["experts"]]
    assert max(beside.count(layer) for layer in beside) == 1, "one is forced already"
    said = command(*places, "--only_name", "--experts", 1, main=steer.main)
    first = json.loads(command(*places, "--only_name", "--experts", 1, "--json", main=steer.main).out)["experts"][0]
    assert f"--record logprob --mask {first['layer']}:{first['expert']}" in said.err
    named = {each: steer.SteerConfig(one=places[0], other=places[1], into=each).store for each in (None, "~/x.zarr")}
    assert named == {None: str(captured.with_name("s-without-code.zarr")), "~/x.zarr": str(Path.home() / "x.zarr")}


def test_what_cannot_be_steered_is_told(captured: Path, command: Command, tmp_path: Path, texts: Path) -> None:
    def refused(*arguments: object) -> str:
        ran = command(*arguments, main=steer.main)
        assert ran.status == 2
        return str(ran.err)

    code, legal = f"{captured}/code", f"{captured}/legal"
    assert "have the same name" in refused(code, code)
    with pytest.raises(ValueError, match=r"code-importance is not a capture of jobs/capture\.py"):
        as_begun({"configuration": {"dataset": ["code"]}, "script": "jobs/importance.py"}, "code-importance")
    assert "--experts is 0" in refused(code, legal, "--experts", 0)
    assert "no data set" in refused(code, f"{captured}/lega")
    options = (
        "--local",
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--limit_tokens",
        TOKENS,
        "--store",
        tmp_path / "p.zarr",
    )
    assert command("--dataset", texts / "code.jsonl", *options).status == 0
    assert "capture it with --record logprob" in refused(
        f"{tmp_path}/p.zarr/code", legal, "--into", tmp_path / "x.zarr"
    )
    few = ("--name", "few", "--limit_documents", 2, "--record", "logprob")
    assert command("--dataset", texts / "code.jsonl", *options, *few).status == 0
    assert "differences were not tested" in refused(f"{tmp_path}/p.zarr/few", legal)


def test_only_experts_beyond_chance_are_taken_and_a_layer_keeps_what_it_needs(captured: Path) -> None:
    found = contrast({name: store.open_capture(captured, name) for name in ("code", "legal")})
    every = carriers(found, "code", most=64)
    own = found.sel(data_set="code")
    for layer in found["layer"].values.tolist():
        for expert in range(8):
            cell = own.sel(layer=layer, expert=expert)
            sure = float(cell["difference_low"]) > 0
            assert ((layer, expert) in every) == sure
    few = carriers(found, "code", most=64, left=7)
    assert len({layer for layer, _ in few}) == len(few)
    assert few == [cell for at, cell in enumerate(every) if cell[0] not in [layer for layer, _ in every[:at]]]
    assert carriers(found, "code", most=64, left={layer: 8 if layer else 7 for layer in range(8)}) == [
        cell for cell in few if not cell[0]
    ]
    with pytest.raises(ValueError, match="no data set 'prose'"):
        carriers(found, "prose")
