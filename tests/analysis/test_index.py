"""The explorer's index: every occurrence is found, every sum equals that of a scan, whatever happens in between."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from fake_model import FakeEngine, fake_capture, words
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import EXPERTS, make_capture

from analysis.explorer import index as index_module
from analysis.explorer.index import CaptureIndex, index_folder, reducers
from analysis.explorer.parts import ALIGNED
from analysis.metrics.contexts import TopContexts, top_contexts
from analysis.metrics.load import Load
from analysis.scanning import accumulate, merge, scan, shards_to_read
from analysis.statistics.jackknife import Jackknife
from store import CaptureGroup, open_capture

TEXTS = [words(90, number) for number in range(5)] + [words(40, 1)] * 2


HARMS = ("sums cut short", "sums gone", "a part gone", "a part cut short", "a part empty", "a part zeroed", "all gone")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A capture of several shards, complete."""
    path = tmp_path / "s.zarr"
    fake_capture(path, TEXTS)
    return path


def occurrences(capture: xr.Dataset) -> dict[int, list[tuple[int, int]]]:
    """Rows and positions of each token that counts, one by one."""
    found: dict[int, list[tuple[int, int]]] = {}
    token, length = capture["token"].values, capture["length"].values
    captured = capture["captured"].values if "captured" in capture else np.ones(len(length), bool)
    for row in np.flatnonzero(captured).tolist():
        for position in range(length[row]):
            number = int(token[row, position])
            if number not in capture.attrs["special_token_ids"]:
                found.setdefault(number, []).append((row, position))
    return found


def looked_up(index: CaptureIndex, *asked: int) -> list[tuple[int, int]]:
    """All places that the index names."""
    number, found = index.now.occurrences(*asked, limit=10**6)
    places = []
    for part, at in found:
        [row], [position] = part.places(np.array([at]))
        places.append((int(row), int(position)))
    assert number == len(places)
    return places


def assert_sums_are_a_scan_s(index: CaptureIndex) -> None:
    """All sums compared with one scan of the committed shards."""
    wanted = scan(index.now.capture, list(reducers(index.now.capture).values()))
    for name, result in zip(reducers(index.now.capture), wanted, strict=True):
        xr.testing.assert_identical(index.now.result(name), result)


def test_every_occurrence_is_found_with_its_experts_and_no_other(store: Path) -> None:
    index = CaptureIndex(store, "fake")
    assert index.refresh(threads=1) > 1, "several shards"
    capture = open_capture(store, "fake").load()
    expert, places = capture["expert"].values, occurrences(capture)
    for token in range(capture.sizes["token_id"]):
        assert index.now.occurrences(token)[0] == len(places.get(token, []))
    for token, own in sorted(places.items())[::7]:
        assert sorted(looked_up(index, token)) == own
        for at in range(capture.sizes["layer"]):
            for e in range(8):
                wanted = [(row, position) for row, position in own if e in expert[row, position, at]]
                assert sorted(looked_up(index, token, at, e)) == wanted
    token = max(places, key=lambda number: len(places[number]))
    for part, at in index.now.occurrences(token, limit=10**6)[1]:
        [row], [position] = part.places(np.array([at]))
        np.testing.assert_array_equal(part.expert[:, at], expert[row, position])


def test_pages_of_places_follow_each_other_without_a_gap(store: Path) -> None:
    index = CaptureIndex(store, "fake")
    index.refresh()
    places = occurrences(open_capture(store, "fake"))
    token = max(places, key=lambda number: len(places[number]))
    everything = looked_up(index, token)
    for step in (1, 2, 3, 7):
        paged = []
        for skip in range(0, len(everything), step):
            number, found = index.now.occurrences(token, skip=skip, limit=step)
            assert number == len(everything)
            paged += [tuple(int(each[0]) for each in part.places(np.array([at]))) for part, at in found]
        assert paged == everything


def test_the_text_around_a_place_ends_where_its_row_does(store: Path) -> None:
    index = CaptureIndex(store, "fake")
    index.refresh()
    capture = open_capture(store, "fake").load()
    token, length = capture["token"].values, capture["length"].values
    for row in range(len(length)):
        part = index.now.part_of(row)
        assert part is not None
        for position in {0, length[row] // 2, length[row] - 1}:
            ids, at = part.around(row, int(position), 5)
            low, high = max(0, position - 5), min(length[row], position + 6)
            assert ids.tolist() == token[row, low:high].tolist()
            assert at == position - low


def test_what_is_committed_later_is_added_and_nothing_is_counted_twice(store: Path) -> None:
    group = CaptureGroup(store, "fake")
    shards = group.num_shards
    away = {}
    for shard in range(1, shards):  # their commits are removed and restored one by one
        record = store / "fake" / "expert" / "commits" / f"{shard}.json"
        away[shard] = record.read_bytes()
        record.unlink()
    index = CaptureIndex(store, "fake")
    assert index.refresh() == 1
    assert_sums_are_a_scan_s(index)
    for shard, data in away.items():
        (store / "fake" / "expert" / "commits" / f"{shard}.json").write_bytes(data)
        before = index.now
        assert index.refresh() == 1
        assert len(index.now.parts) == len(before.parts) + 1
        assert_sums_are_a_scan_s(index)
        assert before.state.shards_done == index.now.state.shards_done - 1, "what was shown is left as it was"
    assert index.refresh() == 0
    again = CaptureIndex(store, "fake")
    assert again.now.parts.keys() == index.now.parts.keys(), "kept beside the store"
    assert_sums_are_a_scan_s(again)
    assert again.refresh() == 0


def test_a_shard_that_is_captured_again_with_other_bytes_replaces_its_part(store: Path) -> None:
    index = CaptureIndex(store, "fake")
    index.refresh()
    group = CaptureGroup(store, "fake")
    rows = group.read_rows(1)
    expert, weight = FakeEngine().route(rows.token + 1, rows.length).values()  # another model's
    group.discard(1)
    beyond = np.arange(expert.shape[1]) >= rows.length[:, None]
    expert[beyond], weight[beyond] = 255, 0
    group.commit(1, {"expert": expert, "weight": weight}, rows=rows, facts={})
    for other in (index, CaptureIndex(store, "fake")):
        assert other.refresh() >= 1
        assert_sums_are_a_scan_s(other)
        assert len(list(other.folder.glob("000001-*"))) == 1


@pytest.mark.parametrize("harm", HARMS)
def test_an_index_that_was_damaged_is_made_again(store: Path, harm: str) -> None:
    index = CaptureIndex(store, "fake")
    index.refresh()
    sums, part = index.folder / "sums.npz", next(index.folder.glob("000001-*"))
    if harm == "sums cut short":
        sums.write_bytes(sums.read_bytes()[:-100])
    elif harm == "sums gone":
        sums.unlink()
    elif harm == "a part gone":
        part.unlink()
    elif harm == "a part cut short":
        part.write_bytes(part.read_bytes()[:-64])
    elif harm == "a part empty":
        part.write_bytes(b"")
    elif harm == "a part zeroed":
        part.write_bytes(part.read_bytes()[:ALIGNED] + bytes(part.stat().st_size - ALIGNED))
    else:
        shutil.rmtree(index_folder(store))
    again = CaptureIndex(store, "fake")
    assert not again.now.parts
    assert again.refresh() == CaptureGroup(store, "fake").num_shards
    assert_sums_are_a_scan_s(again)


def test_a_process_that_dies_while_it_indexes_loses_one_batch_at_most(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "PARTS_AT_ONCE", 2)
    index = CaptureIndex(store, "fake")

    def killed(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.refresh(threads=1, progress=killed)
    again = CaptureIndex(store, "fake")
    assert len(again.now.parts) == 2
    assert_sums_are_a_scan_of(again, 2)
    left = [again.folder / f".000009-x.{age}.partial" for age in ("old", "new")]
    for file in left:
        file.write_bytes(b"of a process that was killed")
    os.utime(left[0], (0, 0))
    again.refresh()
    assert_sums_are_a_scan_s(again)
    assert list(again.folder.glob(".*.partial")) == left[1:], "what is new may be another process's"


def test_other_reducers_are_another_index(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = CaptureIndex(store, "fake")
    own = index_module.reducers
    monkeypatch.setattr(index_module, "reducers", lambda capture: {**own(capture), "load": Jackknife(Load(), 9)})
    assert CaptureIndex(store, "fake").folder != one.folder


def test_what_was_counted_is_shown_also_when_it_cannot_be_kept(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = CaptureIndex(store, "fake")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "_keep", full)
    with pytest.raises(OSError, match="No space left"):
        index.refresh()
    assert len(index.now.parts) == index.now.state.shards_done
    assert_sums_are_a_scan_s(index)


def assert_sums_are_a_scan_of(index: CaptureIndex, shards: int) -> None:
    """The sums over only the first shards."""
    asked, capture = reducers(index.now.capture), index.now.capture
    states = accumulate(capture, list(asked.values()), shards_to_read(capture)[:shards])
    for (name, reducer), state in zip(asked.items(), states, strict=True):
        xr.testing.assert_identical(index.now.result(name), reducer.finish(state, capture))


def test_a_bucket_s_index_lies_in_the_user_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = (index_folder(f"s3://{bucket}/routes.zarr") for bucket in ("a", "b"))
    assert one != other
    assert one.is_relative_to(tmp_path)
    assert index_folder("/data/routes.zarr") == Path("/data/routes.zarr.results")


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), experts=EXPERTS, top=st.integers(1, 5), missing=st.sets(st.integers(0, 3)))
def test_an_expert_s_places_are_those_of_its_largest_weights(
    seed: int, experts: int, top: int, missing: set[int]
) -> None:
    capture = make_capture(seed=seed, num_experts=experts, missing=tuple(missing))
    found = scan(capture, [TopContexts(top, around=2)], threads=2)[0]
    xr.testing.assert_identical(found.drop_vars("around"), top_contexts(capture, top=top, threads=2))
    expert, weight, length = (capture[name].values for name in ("expert", "weight", "length"))
    best: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
    for number, places in occurrences(capture).items():
        assert number not in capture.attrs["special_token_ids"]
        for row, position in places:
            for at in range(capture.sizes["layer"]):
                for k in range(capture.sizes["k"]):
                    key = at, int(expert[row, position, at, k])
                    best.setdefault(key, []).append((-float(weight[row, position, at, k]), row, position))
    rows_of, position_of, weight_of, around_of = (
        found[name].values for name in ("row", "position", "weight", "around")
    )
    for at in range(capture.sizes["layer"]):
        for e in range(experts):
            wanted, rows = [], set()
            for value, row, position in sorted(best.get((at, e), [])):
                if row not in rows:
                    rows.add(row)
                    wanted.append((row, position, -value))
            got = list(zip(*(of[at, e].tolist() for of in (rows_of, position_of, weight_of)), strict=True))
            assert [place for place in got if place[0] >= 0] == wanted[:top]
            for (row, position, _), around in zip(wanted[:top], around_of[at, e], strict=False):
                for offset, weighed in enumerate(around.tolist(), position - 2):
                    here = 0 <= offset < length[row] and expert[row, offset, at].tolist().count(e) == 1
                    rank = expert[row, offset, at].tolist().index(e) if here else 0
                    assert weighed == (weight[row, offset, at, rank] if here else 0)


def test_an_expert_s_places_do_not_depend_on_the_order_of_shards() -> None:
    capture, reducer = make_capture(seed=3, documents=30), TopContexts(4, around=3)
    shards = shards_to_read(capture)
    wanted = scan(capture, [reducer])[0]
    for halves in ((shards[::2], shards[1::2]), (shards[::-1], [])):
        [one], [other] = (accumulate(capture, [reducer], half, threads=1) for half in halves)
        [joined] = merge([reducer], [one], [other])
        xr.testing.assert_identical(reducer.finish(joined, capture), wanted)
