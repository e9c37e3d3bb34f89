"""Tokens are selected by speaker and by whether they were generated; parts that need weights are omitted without
them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
from starlette.testclient import TestClient
from synthetic import make_capture

from analysis.explorer.document import document_page
from analysis.explorer.live import Explorer
from analysis.explorer.site import site
from analysis.exports.parquet import write_tables
from analysis.exports.placement import gpu_load, load_matrix
from analysis.metrics.agreement import agreement
from analysis.metrics.choices import Choices
from analysis.metrics.confidence import MeanWeights
from analysis.metrics.load import ExpertCounts, Load
from analysis.metrics.paths import document_path
from analysis.report.page import write_report
from analysis.scanning import Selection, scan
from analysis.statistics.jackknife import Jackknife
from jobs import explore, query
from store import open_capture, write_capture

ROLES = "system user assistant"


def labelled(seed: int = 0) -> xr.Dataset:
    """A capture in which some tokens have a role and a phase."""
    capture = make_capture(seed=seed)
    random = np.random.default_rng(seed)
    shape = capture["token"].shape
    phase = random.choice([0, 1, 255], shape).astype(np.uint8)
    role = random.choice([0, 1, 2, 255], shape).astype(np.uint8)
    return capture.assign(
        phase=(("doc", "position"), phase, {"flag_meanings": "prompt generated"}),
        role=(("doc", "position"), role, {"flag_meanings": ROLES}),
    ).chunk({"doc": 4})


def counted(capture: xr.Dataset, phases: set[int], roles: set[int]) -> np.ndarray:
    """Choices of the selected tokens (layer, expert), one at a time."""
    data = capture.compute()
    count = np.zeros((data.sizes["layer"], 8), int)
    for row, position in np.ndindex(*data["token"].shape):
        if position >= int(data["length"][row]) or int(data["token"][row, position]) == 1:  # the special one
            continue
        if int(data["phase"][row, position]) in phases and int(data["role"][row, position]) in roles:
            for layer, chosen in enumerate(data["expert"].values[row, position]):
                count[layer, chosen] += 1
    return count


@pytest.mark.parametrize(
    ("only", "phases", "roles"),
    [
        (Selection(phases=("generated",)), {1}, {0, 1, 2, 255}),
        (Selection(phases=("prompt", "generated")), {0, 1}, {0, 1, 2, 255}),
        (Selection(roles=("assistant",)), {0, 1, 255}, {2}),
        (Selection(roles=("user", "assistant"), phases=("prompt",)), {0}, {1, 2}),
    ],
)
def test_the_selected_tokens_are_counted_and_no_others(only: Selection, phases: set[int], roles: set[int]) -> None:
    capture = labelled()
    wanted = counted(capture, phases, roles)
    assert wanted.sum() > 50
    load, counts, choices = scan(capture, [Load(), Jackknife(ExpertCounts()), Choices()], only=only)
    np.testing.assert_array_equal(load["counts"].sum("k"), wanted)
    np.testing.assert_array_equal(counts["counts"].isel(replicate=0), wanted)
    assert choices.attrs["n"] == load.attrs["n"] == wanted[0].sum() // 2


def test_what_cannot_be_selected_is_named() -> None:
    with pytest.raises(ValueError, match="synthetic does not record the phase of tokens"):
        scan(make_capture(), [Load()], only=Selection(phases=("prompt",)))
    with pytest.raises(ValueError, match="role 'narrator': synthetic has system, user, assistant"):
        scan(labelled(), [Load()], only=Selection(roles=("narrator",)))


def test_a_documents_path_says_role_and_phase() -> None:
    capture = labelled()
    path = document_path(capture, 2)
    row = int(path["row"][0])
    place = np.flatnonzero(capture["token"].values[row] != 1)[0]
    names = {0: "prompt", 1: "generated", 255: ""}
    assert path["phase"].values[0] == names[int(capture["phase"][row, place])]
    assert set(path["role"].values) <= {*ROLES.split(), ""}


@pytest.mark.parametrize(
    ("phases", "roles"), [(("generated",), ()), ((), ("user", "assistant")), (("prompt",), ("user",))]
)
def test_a_documents_path_is_of_the_selected_tokens_alone(phases: tuple[str, ...], roles: tuple[str, ...]) -> None:
    capture = labelled()
    every, some = document_path(capture, 2), document_path(capture, 2, phases=phases, roles=roles)
    kept = [
        at
        for at in range(every.sizes["position"])
        if (not phases or every["phase"].values[at] in phases) and (not roles or every["role"].values[at] in roles)
    ]
    assert 0 < len(kept) == some.attrs["n"] < every.attrs["n"]
    xr.testing.assert_equal(some, every.isel(position=kept))
    assert some.attrs["tokens_missing"] == every.attrs["tokens_missing"]
    with pytest.raises(ValueError, match="role 'narrator': synthetic has system, user, assistant"):
        document_path(capture, 2, roles=["narrator"])


def test_experts_are_placed_by_the_load_of_generated_tokens_alone() -> None:
    capture = labelled()
    [load] = scan(capture, [Load()], only=Selection(phases=("generated",)))
    wanted = counted(capture, {1}, {0, 1, 2, 255})
    np.testing.assert_array_equal(load_matrix(load), wanted)
    halves = gpu_load(load, 2, ["contiguous"])["gpu_load"].values[0]
    np.testing.assert_array_equal(halves, np.stack([wanted[:, :4].sum(1), wanted[:, 4:].sum(1)], axis=1))


def test_loads_and_agreements_need_no_weights_and_what_needs_them_says_so() -> None:
    capture = make_capture()
    bare = capture.drop_vars("weight")
    with_weights, without = (scan(each, [Load()])[0] for each in (capture, bare))
    xr.testing.assert_equal(with_weights["counts"], without["counts"])
    xr.testing.assert_equal(with_weights["share"], without["share"])
    for name in ("mass", "mass_share"):
        assert bool(without[name].isnull().all())
    with pytest.raises(ValueError, match="MeanWeights needs weight, which synthetic does not have"):
        scan(bare, [MeanWeights()])
    same, known = agreement(bare, bare), agreement(capture, capture)
    xr.testing.assert_equal(same["same_set"], known["same_set"])
    assert bool(same["margin"].isnull().all())
    assert int(same["tokens_of_margin"].sum()) == 0


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of routes without weights, whose last tokens have none."""
    random = np.random.default_rng(0)
    expert: Any = random.random((40, 16, 3, 8)).argsort(-1)[..., :2]
    expert[:, -1] = 255
    phase = np.broadcast_to(np.arange(16) >= 6, (40, 16)).astype(int)
    path: Path = tmp_path_factory.mktemp("without") / "s.zarr"
    write_capture(
        path,
        "served",
        blocks=[{"token": random.integers(0, 9, (40, 16)), "expert": expert, "phase": phase}],
        num_experts=8,
        layers=(0, 1, 2),
        attrs={"model": "m", "order_of_choices": "as given"},
    )
    return path


def test_a_report_says_what_is_left_out_and_counts_only_what_is_selected(without: Path, tmp_path: Path) -> None:
    every = write_report([without], tmp_path / "all.html")
    generated = write_report([without], tmp_path / "some.html", only=Selection(phases=("generated",)))
    assert (every.answers[0]["load"].attrs["n"], generated.answers[0]["load"].attrs["n"]) == (600, 360)
    assert "confidence" not in {section.id for section in every.sections}
    assert {"load", "tokens", "repetition", "position"} <= {section.id for section in every.sections}
    page = (tmp_path / "some.html").read_text()
    assert "served: only tokens whose phase is generated are counted." in page
    assert "served: the routes were imported without weights, so shares of weight and" in page
    assert "does not guarantee that a token&#39;s first expert has the largest weight" in page
    with pytest.raises(ValueError, match="served does not record the role of tokens"):
        write_report([without], tmp_path / "no.html", only=Selection(roles=("user",)))


def test_tables_of_routes_without_weights_have_nulls_in_their_place(without: Path, tmp_path: Path) -> None:
    write_tables(without, tmp_path, documents=[3])
    routes, load = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("routes", "load"))
    assert (routes.num_rows, routes["weight"].null_count) == (15 * 3 * 2, 15 * 3 * 2)
    assert load["mass_share"].null_count == load.num_rows
    assert load["count"].null_count == 0


def test_tables_are_of_the_selected_tokens_and_say_so(without: Path, tmp_path: Path) -> None:
    assert query.main([str(without), "--parquet", str(tmp_path), "--document", "3", "--phase", "generated"]) == 0
    routes, load = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("routes", "load"))
    assert set(routes["position"].to_pylist()) == set(range(6, 15))
    data = open_capture(without, "served").compute()
    expert = data["expert"].values[:, 6:15]  # generated tokens with routes
    wanted = [[(expert[:, :, layer] == number).sum() for number in range(8)] for layer in range(3)]
    found = np.zeros((3, 8), int)
    for row in load.to_pylist():
        found[row["layer"], row["expert"]] += row["count"]
    np.testing.assert_array_equal(found, wanted)
    said = json.loads(pq.read_metadata(tmp_path / "load.parquet").metadata[b"captures"])["served"]
    assert (said["phase"], said["tokens_counted"], "role" in said) == (["generated"], 360, False)


def test_the_explorer_counts_and_finds_the_selected_tokens_alone(without: Path, tmp_path: Path) -> None:
    data = open_capture(without, "served").compute()
    pages, folders = {}, set()
    for phases, tokens in ((None, slice(0, 15)), (("generated",), slice(6, 15)), (("prompt",), slice(0, 6))):
        explorer = Explorer(str(without), only=Selection(phases=phases), folder=tmp_path)
        explorer.refresh("served")
        folders.add(explorer.indexes["served"].folder)
        client = TestClient(site(explorer, ("testserver",)))
        token, expert = data["token"].values[:, tokens], data["expert"].values[:, tokens, 1]
        went = (expert[token == 4] == 3).any(axis=1)
        page = client.get("/served/token/4?layer=1&expert=3").text
        assert f"{went.size} occurrences" in page
        assert f"{went.sum()} of {went.size} chose" in page
        place = re.findall(r"row=(\d+)&amp;position=(\d+)", page)
        assert len(place) == min(20, went.sum())
        assert all(tokens.start <= int(position) < tokens.stop for _, position in place)
        share = (expert == 3).any(axis=2).sum() / expert.size
        pages[phases] = page, client.get("/served/expert/1/3").text
        assert f"<td>{share:.1%}</td>" in pages[phases][1]
        assert len(document_page(explorer.shown["served"].view, 0)["ids"]) == 16, "texts are whole"
    assert len(folders) == 3, "each selection has an index of its own"
    for phases, shown in pages.items():
        said = f"only tokens whose phase is {phases and phases[0]} are counted"
        assert [said in page for page in shown] == [phases is not None] * 2
    with pytest.raises(ValueError, match="served does not record the role of tokens"):
        Explorer(str(without), only=Selection(roles=("user",)), folder=tmp_path)


def test_the_explorers_options_select_tokens_and_do_not_go_with_whole_texts(
    without: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Explorer] = []
    monkeypatch.setattr(explore, "_serve", lambda explorer, config: served.append(explorer) or 0)
    common = [str(without), "--index", str(tmp_path), "--phase", "generated"]
    assert explore.main(common) == 0
    assert served[0].only == Selection(phases=("generated",))
    with pytest.raises(ValueError, match="served does not record the role of tokens"):
        explore.main([*common, "--role", "user"])
    with pytest.raises(
        ValueError, match="--export writes complete texts: it cannot be combined with --phase and --role"
    ):
        explore.main([*common, "--export", str(tmp_path / "x.html"), "--document", "0"])


def test_the_explorer_shows_routes_without_weights_and_names_phases(without: Path) -> None:
    explorer = Explorer(str(without))
    explorer.refresh("served")
    client = TestClient(site(explorer, ("testserver",)))
    page = client.get("/served/expert/1/3")
    assert page.status_code == 200
    assert "Not available: the routes of served were imported without weights." in page.text
    found = document_page(explorer.shown["served"].view, 0)
    assert found["weighed"] is False
    assert found["roles"] == ["prompt"] * 6 + ["generated"] * 10
    for address in ("/served", "/served/document/0", "/served/token/3"):
        assert client.get(address).status_code == 200
