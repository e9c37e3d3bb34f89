"""Existing routes become a capture: equal to the input, checked, and the same each time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_model import TEXTS, fake_capture, store_files

import analysis
from store import CaptureGroup, Coverage, coverage, open_capture, verify, write_capture
from store.planned import PlannedGroup

LAYERS, EXPERTS, CHOICES, POSITIONS, VOCABULARY = (0, 2, 5), 6, 2, 8, 50
ROOT = Path(__file__).parents[2]

Block = dict[str, Any]


def routes(rows: int = 22, seed: int = 0, *, weight: bool = True) -> Block:
    """All rows, with garbage where there is no token."""
    random = np.random.default_rng(seed)
    shape = (rows, POSITIONS, len(LAYERS))
    block = {
        "token": random.integers(0, VOCABULARY, shape[:2]),
        "expert": random.random((*shape, EXPERTS)).argsort(-1)[..., :CHOICES],
        "weight": random.random((*shape, CHOICES)).astype(np.float32),
        "length": random.integers(1, POSITIONS + 1, rows),
        "document_id": np.cumsum(random.integers(0, 3, rows)),
    }
    beyond = np.arange(POSITIONS) >= block["length"][:, None]
    block["token"][beyond], block["expert"][beyond], block["weight"][beyond] = 10**6, 99, np.nan
    return block if weight else {name: values for name, values in block.items() if name != "weight"}


def cut(block: Block, sizes: Iterable[int]) -> Iterator[Block]:
    """Blocks of these sizes, and one with the rest."""
    start = 0
    for size in [*sizes, len(block["token"])]:
        part = slice(start, start + size)
        yield {name: values[part] for name, values in block.items()}
        start += size


def write(path: Path, blocks: Iterable[Block], **changes: Any) -> Coverage:
    given: dict[str, Any] = {"num_experts": EXPERTS, "layers": LAYERS, "rows_per_shard": 4, "attrs": {"model": "m"}}
    return write_capture(path, "own", blocks=blocks, **given | changes)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("sizes", [(), (1,) * 22, (4, 4, 1, 0, 9), (22,)])
def test_what_was_given_is_read_back_in_whatever_blocks_it_came(
    tmp_path: Path, weight: bool, sizes: tuple[int, ...]
) -> None:
    wanted = routes(weight=weight)
    state = write(tmp_path / "s.zarr", cut(wanted, sizes))
    assert state.complete
    assert (state.shards_total, state.tokens_done) == (6, int(wanted["length"].sum()))
    found = verify(CaptureGroup(tmp_path / "s.zarr", "own"))
    assert (found.shards, found.plan) == ({}, [])
    data = open_capture(tmp_path / "s.zarr", "own").compute()
    filled = np.arange(POSITIONS) < wanted["length"][:, None]
    for name in ("token", "expert", *(["weight"] if weight else [])):
        given = wanted[name].astype(np.float16) if name == "weight" else wanted[name]
        np.testing.assert_array_equal(data[name].values[filled], given[filled])
    fills = {"token": -1, "expert": 255, "weight": 0}
    assert all((data[name].values[~filled] == fill).all() for name, fill in fills.items() if name in data)
    for name in ("length", "document_id"):
        np.testing.assert_array_equal(data[name].values, wanted[name])
    before: dict[int, int] = {}
    for row, document in enumerate(wanted["document_id"].tolist()):
        assert int(data["offset"][row]) == before.get(document, 0)
        before[document] = before.get(document, 0) + int(wanted["length"][row])
    assert data.sizes["document"] == max(before) + 1
    assert data.attrs["documents_empty"] == max(before) + 1 - len(before)
    assert data["layer"].values.tolist() == list(LAYERS)
    assert data.attrs["model"] == "m"
    assert data["piece"].values.tolist() == [str(number) for number in range(wanted["token"][filled].max() + 1)]
    assert ("weight" in data) == weight


def test_the_bytes_do_not_depend_on_the_blocks_and_a_second_call_changes_none(tmp_path: Path) -> None:
    for name, sizes in (("a", (3, 7)), ("b", (5, 5, 5))):
        write(tmp_path / name, cut(routes(), sizes))
    before = store_files(tmp_path / "a")
    assert store_files(tmp_path / "b") == before
    assert write(tmp_path / "a", cut(routes(), ())).complete
    assert store_files(tmp_path / "a") == before


def test_the_grid_is_a_capture_s(tmp_path: Path) -> None:
    """The fake model's routes, written again as blocks: the same arrays, except those that come from texts."""
    fake_capture(tmp_path / "c.zarr", TEXTS)
    capture = open_capture(tmp_path / "c.zarr", "fake").compute()
    names = ("token", "expert", "weight", "length", "document_id")
    write_capture(
        tmp_path / "w.zarr",
        "fake",
        blocks=[{name: capture[name].values for name in names}],
        num_experts=capture.attrs["num_experts"],
        layers=capture["layer"].values.tolist(),
        pieces=capture["piece"].values.tolist(),
        rows_per_shard=capture.attrs["rows_per_shard"],
    )
    one, other = (store_files(tmp_path / name) for name in ("c.zarr", "w.zarr"))
    shared = [key for key in one if "/c/" in key and key.split("/")[1] in {*names, "piece", "layer"}]
    assert len(shared) == 3 * 5 + 4
    for key in [*shared, *(f"fake/{name}/zarr.json" for name in names)]:
        assert other[key] == one[key], key


def test_a_call_that_was_killed_goes_on_and_heals_what_was_damaged(tmp_path: Path) -> None:
    write(tmp_path / "whole", cut(routes(), ()))
    code = f"""
import os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}, {str(ROOT / "tests")!r}]
from test_writing import cut, routes, write
from pathlib import Path
from store import coverage
def blocks():
    for number, block in enumerate(cut(routes(), (5,) * 4)):
        if number == 3:
            while coverage(Path({str(tmp_path / "s")!r}), "own").shards_done < 3:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        yield block
write(Path({str(tmp_path / "s")!r}), blocks())
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ""}, check=False)
    assert done.returncode == -signal.SIGKILL
    state = coverage(tmp_path / "s", "own")
    assert (state.shards_done, state.plan.complete) == (3, False)
    damaged = tmp_path / "s" / "own" / "expert" / "c" / "1" / "0" / "0" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert write(tmp_path / "s", cut(routes(), (2,))).complete
    wanted = store_files(tmp_path / "whole")
    assert {key: data for key, data in store_files(tmp_path / "s").items() if key in wanted} == wanted


def test_an_error_in_a_later_block_leaves_what_came_before(tmp_path: Path) -> None:
    blocks = list(cut(routes(), (9,)))
    bad = {**blocks[1], "expert": blocks[1]["expert"] + EXPERTS}
    with pytest.raises(ValueError, match=r"block 1, row 9: it holds expert \d+, but ids must be 0 to 5"):
        write(tmp_path, [blocks[0], bad])
    assert coverage(tmp_path, "own").shards_done == 2
    assert write(tmp_path, blocks).complete


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (routes(26), "tokens"),
        (routes(20), "tokens"),
        (routes(seed=1), "tokens"),
        ({**routes(), "document_id": np.arange(22)}, "tokens"),
        ({**routes(), "expert": (routes()["expert"] + 1) % EXPERTS}, "choices or weights"),
        ({**routes(), "weight": routes()["weight"] / 2}, "choices or weights"),
    ],
    ids=["more rows", "fewer rows", "other tokens", "other documents", "other experts", "other weights"],
)
def test_other_routes_under_the_same_name_are_refused_and_change_nothing(
    tmp_path: Path, other: Block, what: str
) -> None:
    write(tmp_path, [routes()])
    before = store_files(tmp_path)
    with pytest.raises(ValueError, match=rf"own holds other {what} in shard \d+ than the blocks: use another name"):
        write(tmp_path, [other])
    assert store_files(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"attrs": {"model": "n"}},
        {"layers": (0, 2, 6)},
        {"num_experts": 7},
        {"rows_per_shard": 8},
        {"pieces": ["a"] * 50},
    ],
)
def test_another_capture_under_the_same_name_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, [routes()])
    with pytest.raises(
        ValueError, match=rf"own holds another capture:\n  {next(iter(changes)).replace('attrs', 'model')}"
    ):
        write(tmp_path, [routes()], **changes)


def changed(name: str, value: Any) -> Block:
    return {**routes(), name: value}


def altered(name: str, value: float, *place: int) -> Block:
    block = routes()
    block["length"][1] = POSITIONS
    block["token"][1], block["expert"][1], block["weight"][1] = 1, [0, 1], 0.5
    block[name][place] = value
    return block


NOT_ONE = {
    "no row": ([], "blocks holds no row"),
    "only empty blocks": ([next(cut(routes(), (0,)))], "blocks holds no row"),
    "an unknown array": ([changed("margin", np.zeros(22))], r"block 0 has the arrays \['document_id', .*'margin'"),
    "no experts": ([{"token": routes()["token"]}], r"block 0 has the arrays \['token'\]"),
    "weights that stop": ([routes(4), routes(4, weight=False)], "block 1 has the arrays"),
    "a flat token": ([changed("token", np.zeros(22, int))], r"block 0: token has the shape \(22,\)"),
    "no choice": ([changed("expert", np.zeros((22, 8, 3, 0), int))], r"expert \(22, 8, 3, 0\)"),
    "more choices than experts": ([changed("expert", np.zeros((22, 8, 3, 7), int))], "7 choices, but there are 6"),
    "floats for tokens": (
        [changed("token", np.zeros((22, 8)))],
        r"block 0: token is float64 \(22, 8\), but must be integers",
    ),
    "whole numbers for weights": ([changed("weight", np.ones((22, 8, 3, 2), int))], "block 0: weight is int64"),
    "other layers": ([changed("expert", np.zeros((22, 8, 4, 2), int))], r"but must be integers \(22, 8, 3, 2\)"),
    "another k later": ([routes(4), {**routes(4), "expert": np.zeros((4, 8, 3, 1), int)}], r"block 1: expert is int64"),
    "another P later": (
        [routes(4), {**routes(4), "token": np.zeros((4, 9), int)}],
        r"token is int64 \(4, 9\)",
    ),
    "too many lengths": (
        [changed("length", np.ones(23, int))],
        r"length is int64 \(23,\), but must be integers \(22,\)",
    ),
    "an empty row": ([altered("length", 0, 3)], "block 0, row 3: its length is 0, but must be 1 to 8"),
    "a row too long": ([altered("length", 9, 3)], "block 0, row 3: its length is 9"),
    "a negative token": ([altered("token", -1, 1, 2)], "row 1: it holds token -1"),
    "a negative expert": (
        [altered("expert", -1, 1, 2, 0, 0)],
        "row 1: it holds expert -1, but ids must be 0 to 5",
    ),
    "an expert too many": ([altered("expert", 6, 1, 2, 0, 0)], "row 1: it holds expert 6"),
    "one choice unknown": (
        [altered("expert", 255, 1, 2, 0, 0)],
        "row 1: a token has 255, for unknown, among",
    ),
    "a weight that is NaN": ([altered("weight", np.nan, 1, 2, 0, 0)], "row 1: it holds the weight nan"),
    "a weight too large": ([altered("weight", 1e6, 1, 2, 0, 0)], "row 1: it holds the weight 1000000.0"),
    "documents backwards": ([altered("document_id", 0, 21)], "row 21: it is of document 0, but documents must ascend"),
    "backwards later": ([routes(), routes()], "block 1, row 22: it is of document"),
    "a document below 0": ([changed("document_id", np.arange(-1, 21))], "row 0: it is of document -1"),
}


@pytest.mark.parametrize(("blocks", "message"), NOT_ONE.values(), ids=NOT_ONE)
def test_what_no_capture_can_hold_is_refused_with_its_place(tmp_path: Path, blocks: list[Block], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, blocks)


def test_a_token_beyond_the_pieces_is_refused_and_pieces_are_kept(tmp_path: Path) -> None:
    pieces = [f"w{number}" for number in range(VOCABULARY)]
    with pytest.raises(ValueError, match=r"it holds token \d+, but ids must be 0 to 9"):
        write(tmp_path / "few", [routes()], pieces=pieces[:10])
    write(tmp_path / "s", [routes()], pieces=pieces)
    assert open_capture(tmp_path / "s", "own")["piece"].values.tolist() == pieces


def test_what_is_not_given_is_one_document_a_row_as_long_as_its_tokens(tmp_path: Path) -> None:
    block = routes()
    filled = np.arange(POSITIONS) < block["length"][:, None]
    token = np.where(filled, block["token"], -1)
    write(tmp_path, [{"token": token, "expert": block["expert"]}])
    data = open_capture(tmp_path, "own")
    assert data["document_id"].values.tolist() == list(range(22))
    np.testing.assert_array_equal(data["length"], block["length"])


@pytest.mark.parametrize("experts", [255, 256])
def test_choices_that_are_not_known_are_not_counted(tmp_path: Path, experts: int) -> None:
    block, fill = routes(), 255 if experts == 255 else 65_535
    block["expert"][2, 0], block["length"][2] = fill, 1
    block["token"][2, 0] = 7
    write(tmp_path, [{**block, "expert": block["expert"].astype(np.uint16)}], num_experts=experts)
    data = open_capture(tmp_path, "own")
    assert data["expert"].dtype == np.dtype("uint8" if experts == 255 else "uint16")
    assert analysis.expert_load(data).attrs["n"] == block["length"].sum() - 1


def test_without_weights_what_needs_none_works_and_what_needs_them_says_so(tmp_path: Path) -> None:
    for name, weight in (("with", True), ("without", False)):
        write(tmp_path / name, [routes(weight=weight)])
    having, lacking = (open_capture(tmp_path / name, "own") for name in ("with", "without"))
    for metric in (analysis.transitions, analysis.coactivation, analysis.cache_hits, analysis.token_experts):
        xr.testing.assert_identical(metric(lacking), metric(having))
    path = analysis.document_path(lacking, int(routes()["document_id"][0]))
    assert path["expert"].size > 0
    assert "weight" not in path
    with pytest.raises(ValueError, match="Confidence needs weight, which own does not have"):
        analysis.router_confidence(lacking)
    plain = xr.open_zarr(tmp_path / "without", group="own", consolidated=False)
    np.testing.assert_array_equal(plain["expert"], lacking["expert"])


def test_code_that_knows_only_captures_with_weights_refuses_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, weight, version in (("with", True, 1), ("without", False, 2)):
        write(tmp_path / name, [routes(weight=weight)])
        metadata = json.loads((tmp_path / name / "own" / "zarr.json").read_text())
        assert metadata["attributes"]["schema_version"] == version
    monkeypatch.setattr("store.planned.WITHOUT_WEIGHTS", 1)  # like older code, which knows only 1
    assert PlannedGroup(tmp_path / "with", "own").attrs
    with pytest.raises(ValueError, match="not a capture that this version reads: schema_version is 2"):
        open_capture(tmp_path / "without", "own")


def test_it_streams(tmp_path: Path) -> None:
    """A shard is durable before the fourth block after it is read: no more is in memory."""
    seen = []

    def blocks() -> Iterator[Block]:
        for block in cut(routes(), (4,) * 5):
            if (tmp_path / "own" / "zarr.json").exists():
                seen.append(coverage(tmp_path, "own").shards_done)
            yield block

    write(tmp_path, blocks())
    at_once = [0, 0, 1, 2, 3, 4][-len(seen) :]
    assert len(seen) >= 4
    assert all(most - 2 <= found <= most for found, most in zip(seen, at_once, strict=True))


def labelled() -> Block:
    """Routes with phases, and names of documents."""
    block = routes()
    block["phase"] = np.random.default_rng(1).choice([0, 1, 255], block["token"].shape)
    block["phase"][np.arange(POSITIONS) >= block["length"][:, None]] = 77
    block["name"] = np.array([f"request {number}" for number in block["document_id"]], dtype=object)
    return block


def test_phases_and_names_are_kept_compared_and_verified(tmp_path: Path) -> None:
    block = labelled()
    state = write(tmp_path, cut(block, (9,)))
    assert write(tmp_path, cut(block, (3, 4))) == state
    capture = open_capture(tmp_path, "own")
    filled = np.arange(POSITIONS) < block["length"][:, None]
    np.testing.assert_array_equal(capture["phase"].values, np.where(filled, block["phase"], 255))
    assert capture["phase"].attrs["flag_meanings"] == "prompt generated"
    names = capture["name"].values[capture["document_id"].values].tolist()
    assert names == block["name"].tolist()
    empty = set(range(capture.sizes["document"])) - set(block["document_id"].tolist())
    assert {capture["name"].values[number] for number in empty} == {f"document {number}" for number in empty}
    for other in ({"phase": 1 - block["phase"].clip(0, 1)}, {"name": np.roll(block["name"], 3)}):
        with pytest.raises(ValueError, match="holds other tokens in shard"):
            write(tmp_path, cut(block | other, ()))
    group = CaptureGroup(tmp_path, "own")
    assert verify(group).plan == []
    spec = group.layout.arrays()["phase"]
    wrong = np.where(filled[:4], block["phase"][:4], 0).astype(np.uint8)
    (tmp_path / "own" / "phase" / spec.key(0)).write_bytes(spec.encode(wrong))
    assert "it names a phase in row" in verify(group).plan[0]


def test_a_capture_without_phases_has_the_attributes_that_it_had_before(tmp_path: Path) -> None:
    write(tmp_path, [routes()])
    assert "phases" not in CaptureGroup(tmp_path, "own").attrs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phase": labelled()["token"] * 0 + 2},
            r"row 0: it holds the phase 2, but must hold 0 \(prompt\), 1 \(generated\)",
        ),
        ({"name": ["a"]}, "block 0 has 1 names for 22 rows"),
    ],
)
def test_phases_and_names_that_cannot_be_are_refused(tmp_path: Path, changes: Block, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [labelled() | changes])


def test_a_shard_of_tokens_without_any_routes_is_written_and_verified(tmp_path: Path) -> None:
    block = routes()
    block["expert"][4:8] = 255
    write(tmp_path, [block])
    assert verify(CaptureGroup(tmp_path, "own")).shards == {}
    assert (open_capture(tmp_path, "own")["expert"][4:8] == 255).all()
