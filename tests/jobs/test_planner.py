"""Text to rows to routes: every token once and in its place, for all sizes, batches and interruptions."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_model import (
    BOS_ID,
    ROLES,
    FakeEngine,
    FakeRun,
    FakeTokenizer,
    fake_capture,
    fake_choice,
    fake_layout,
    store_files,
    text_source,
    word_id,
    words,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import HUNG_S

from jobs.capturing import planner as planning
from jobs.capturing.captures import capture_datasets, exit_status
from jobs.capturing.local import capture_here
from jobs.capturing.planner import Planner, default_sequence_length, encode
from jobs.sources.documents import Document, Source
from store import CaptureGroup, coverage, open_capture
from store.plan import Plan, Rows
from workers.shard import (
    BATCH_COST_TOKENS,
    Routes,
    RoutingError,
    capture_shard,
    micro_batches,
    route_rows,
)
from workers.text import Unrenderable
from workers.text.rows import document_rows, padded

Text = str | list[dict[str, str]]

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EMPTY = st.sampled_from(["", " ", "\n\t \n"])
TEXT = st.one_of(EMPTY, st.builds(words, st.integers(1, 60), st.integers(0, 99)))


def planner(run: FakeRun, source: Source) -> Planner:
    return Planner(
        run.open_group("fake"),
        source,
        run.tokenizer,  # type: ignore[arg-type]
        bos=run.config.bos,
        limit_documents=run.config.limit_documents,
    )


def expected_rows(texts: Sequence[str], positions: int, bos: str) -> Iterator[tuple[int, int, list[int]]]:
    """Document, offset and ids of each row, a token at a time."""
    for document, text in enumerate(texts):
        row: list[int] = []
        offset = 0
        for number, word in enumerate(text.split()):
            if len(row) == positions:
                yield document, offset, row
                row, offset = [], number
            if not row and (bos == "row" or (bos == "document" and number == 0)):
                row.append(BOS_ID)
            row.append(word_id(word))
        if row:
            yield document, offset, row


def assert_planned(path: Path, texts: Sequence[str], positions: int, bos: str) -> None:
    """The store holds these texts, and its plan counts them right."""
    data = open_capture(path, "fake", allow_incomplete=True).compute()
    rows = list(expected_rows(texts, positions, bos))
    assert data.sizes["doc"] == len(rows)
    assert data["document_id"].values.tolist() == [document for document, _, _ in rows]
    assert data["offset"].values.tolist() == [offset for _, offset, _ in rows]
    assert data["length"].values.tolist() == [len(ids) for _, _, ids in rows]
    assert data["token"].values.tolist() == [ids + [-1] * (positions - len(ids)) for _, _, ids in rows]
    assert data["name"].values.tolist() == [f"document {number}" for number in range(len(texts))]
    assert CaptureGroup(path, "fake").plan == Plan(
        complete=True,
        rows=len(rows),
        tokens=sum(len(ids) for _, _, ids in rows),
        documents=len(texts),
        documents_empty=sum(not text.split() for text in texts),
        pairs_cut=sum(one[0] == other[0] for one, other in pairwise(rows)),
    )


# --- Every token once and in its place ----------------------------------------------------------------------


@few
@given(
    texts=st.lists(TEXT, min_size=1, max_size=12),
    positions=st.integers(2, 20),
    rows=st.integers(1, 6),
    bos=st.sampled_from(["none", "document", "row"]),
    publish_positions=st.integers(1, 200),
    batch_documents=st.integers(1, 5),
    batch_characters=st.integers(1, 400),
    stops=st.lists(st.integers(0, 4), max_size=3),
)
def test_every_token_of_every_document_is_planned_once_and_in_its_place_also_when_stopped(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    positions: int,
    rows: int,
    bos: Any,
    publish_positions: int,
    batch_documents: int,
    batch_characters: int,
    stops: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    layout = fake_layout(sequence_length=positions, rows_per_shard=rows)

    class Stopped(Exception):
        pass

    def stop_after(publications: int) -> Any:
        left = [publications]

        def progress(plan: Plan) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "PUBLISH_POSITIONS", publish_positions)
        patch.setattr(planning, "BATCH_DOCUMENTS", batch_documents)
        patch.setattr(planning, "BATCH_CHARACTERS", batch_characters)
        for publications in stops:
            try:
                planner(FakeRun(folder / "s.zarr", layout, bos=bos), text_source(texts)).run(stop_after(publications))
            except Stopped:
                plan = CaptureGroup(folder / "s.zarr", "fake").plan
                assert plan.complete or plan.rows % layout.rows_per_shard == 0
        planner(FakeRun(folder / "s.zarr", layout, bos=bos), text_source(texts)).run()
    assert_planned(folder / "s.zarr", texts, positions, bos)
    # Batches and stops do not change the bytes: the defaults plan these texts at once.
    planner(FakeRun(folder / "once.zarr", layout, bos=bos), text_source(texts)).run()
    assert store_files(folder / "s.zarr") == store_files(folder / "once.zarr")


def test_one_document_of_a_million_tokens_is_cut_into_rows_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = words(1_000_000)
    layout = fake_layout(sequence_length=64, rows_per_shard=1000)
    published: list[int] = []
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 2**18)
    planner(FakeRun(tmp_path / "s.zarr", layout), text_source(["one two", text, "three"])).run(
        lambda plan: published.append(plan.rows)
    )
    assert layout.rows_per_shard == 960  # whole inner chunks of 64 rows
    assert published == [*range(3840, 15_627, 3840), 15_627]
    assert_planned(tmp_path / "s.zarr", ["one two", text, "three"], 64, "none")


def test_text_of_more_rows_than_a_chunk_of_the_row_arrays_is_planned_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [words(20, number) for number in range(3)] + [words(40_000, 4), words(30_001, 5), "end"]
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 25_000)
    planner(FakeRun(tmp_path / "s.zarr", fake_layout(sequence_length=1, rows_per_shard=512)), text_source(texts)).run()
    assert (tmp_path / "s.zarr" / "fake" / "length" / "c" / "1").exists()
    assert_planned(tmp_path / "s.zarr", texts, 1, "none")


def test_documents_whose_text_was_repaired_are_counted(tmp_path: Path) -> None:
    documents = [Document(name=f"d{n}", text=words(n, n), repaired=n % 3 == 0) for n in range(10)]
    source = Source(name="fake", read=lambda start: iter(documents[start:]), identify=dict)
    assert planner(FakeRun(tmp_path / "s.zarr"), source).run().documents_repaired == 4


# --- Windows of one document --------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(2, 12), st.sampled_from(["none", "document", "row"]))
def test_windows_tile_the_document_and_only_the_last_is_short(tokens: int, positions: int, bos: Any) -> None:
    ids = np.arange(100, 100 + tokens, dtype=np.int32)
    rows = document_rows(ids, positions, bos=bos, bos_id=BOS_ID)
    assert np.concatenate([ids[:0], *(row[int(has_bos) :] for _, row, has_bos in rows)]).tolist() == ids.tolist()
    assert [offset for offset, _, _ in rows] == [int(row[int(has_bos)]) - 100 for _, row, has_bos in rows]
    assert [has_bos for _, _, has_bos in rows] == [
        bos == "row" or (bos == "document" and n == 0) for n in range(len(rows))
    ]
    assert all(row[0] == BOS_ID for _, row, has_bos in rows if has_bos)
    assert all(len(row) == positions for _, row, _ in rows[:-1])
    assert all(row.dtype == np.int32 and 0 < len(row) <= positions for _, row, _ in rows)


@pytest.mark.parametrize(
    ("positions", "bos_id", "reason"), [(8, None, "has no BOS token"), (1, 1, "a row of 1 token has no room")]
)
def test_a_bos_that_cannot_be_put_is_refused_naming_the_document(
    tmp_path: Path, positions: int, bos_id: int | None, reason: str
) -> None:
    run = FakeRun(tmp_path / "s.zarr", fake_layout(sequence_length=positions), bos="row")
    run.tokenizer.bos_id = bos_id
    with pytest.raises(ValueError, match=f"document 0 \\('document 0'\\): --bos row: .*{reason}"):
        planner(run, text_source(["a b"])).run()
    assert document_rows(np.arange(2, dtype=np.int32), positions) != []


def test_rows_are_filled_up_on_the_right() -> None:
    rows = padded([np.array([1, 2], np.int32), np.array([3], np.int32)], 3)
    assert (rows.tolist(), rows.dtype) == ([[1, 2, -1], [3, -1, -1]], np.int32)
    assert padded([np.array([7], np.uint8)], 2, 255).tolist() == [[7, 255]]
    assert padded([], 4).shape == (0, 4)


# --- Conversations --------------------------------------------------------------------------------------------


@few
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(ROLES), st.builds(words, st.integers(0, 12))), min_size=1, max_size=4),
        min_size=1,
        max_size=6,
    )
)
def test_each_token_of_a_conversation_has_its_speaker_and_the_padding_none(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[list[tuple[str, str]]]
) -> None:
    path = tmp_path_factory.mktemp("chat") / "s.zarr"
    texts: list[Text] = [[{"role": role, "content": text} for role, text in talk] for talk in conversations]
    assert fake_capture(path, texts, layout=fake_layout(roles=ROLES)).complete
    data = open_capture(path, "fake").compute()
    found: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(texts))}
    for row in range(data.sizes["doc"]):
        length = int(data["length"][row])
        pairs = zip(data["token"].values[row].tolist(), data["role"].values[row].tolist(), strict=True)
        found[int(data["document_id"][row])] += list(pairs)[:length]
        assert (data["role"].values[row, length:] == 255).all()
    for number, talk in enumerate(conversations):
        assert found[number] == [(word_id(word), ROLES.index(role)) for role, text in talk for word in text.split()]
    assert data["role"].dtype == np.uint8
    assert data["role"].attrs["flag_meanings"].split() == list(ROLES)


# --- How much of a data set, and how long its rows are --------------------------------------------------------


@pytest.mark.parametrize(("limit", "planned"), [(1, 1), (3, 3), (6, 6), (100, 6), (None, 6)])
def test_a_limit_takes_the_first_documents_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, planned: int
) -> None:
    texts = [words(10 * n + 3, n) for n in range(6)]
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 8)
    monkeypatch.setattr(planning, "BATCH_DOCUMENTS", 2)
    run = FakeRun(tmp_path / "s.zarr", limit_documents=limit)
    planner(run, text_source(texts)).run()
    assert_planned(tmp_path / "s.zarr", texts[:planned], 8, "none")
    assert run.tokenizer.encoded == texts[:planned]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_limit_holds_also_when_planning_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    texts = [words(30, n) for n in range(8)]
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 8)

    def progress(plan: Plan) -> None:
        if plan.rows >= 4 * stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planner(FakeRun(tmp_path / "s.zarr", limit_documents=5), text_source(texts)).run(progress)
    planner(FakeRun(tmp_path / "s.zarr", limit_documents=5), text_source(texts)).run()
    assert_planned(tmp_path / "s.zarr", texts[:5], 8, "none")


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([0], None, 16),
        ([16, 3], None, 16),
        ([3, 17], None, 32),
        ([2047], None, 2048),
        ([2048], None, 2048),
        ([2049], None, 2048),
        ([100_000, 5], None, 2048),
        ([5] * 999 + [40, 400], None, 64),  # the 1,001st document does not count
        ([5, 40, 400], 2, 64),
        ([5, 40, 400], 5000, 512),
    ],
)
def test_the_default_row_holds_the_longest_of_the_first_thousand_documents(
    lengths: list[int], limit: int | None, expected: int
) -> None:
    source = text_source([words(length) for length in lengths])
    assert default_sequence_length(source, FakeTokenizer(), limit) == expected  # type: ignore[arg-type]


def test_no_text_is_read_twice_once_the_plan_is_complete(tmp_path: Path) -> None:
    texts = [words(30, n) for n in range(4)]
    first = FakeRun(tmp_path / "s.zarr")
    planner(first, text_source(texts)).run()
    assert first.tokenizer.encoded == texts
    before = store_files(tmp_path / "s.zarr")

    def read(start: int) -> Iterator[Document]:
        pytest.fail("the data set was read again")

    again = FakeRun(tmp_path / "s.zarr")
    planner(again, Source(name="fake", read=read, identify=dict)).run()
    assert again.tokenizer.encoded == []
    assert store_files(tmp_path / "s.zarr") == before


def test_a_second_run_goes_on_without_the_documents_that_are_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [words(32, n) for n in range(6)]  # a shard each
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 32)
    monkeypatch.setattr(planning, "BATCH_DOCUMENTS", 1)

    def progress(plan: Plan) -> None:
        if plan.documents == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planner(FakeRun(tmp_path / "s.zarr"), text_source(texts)).run(progress)
    again = FakeRun(tmp_path / "s.zarr")
    planner(again, text_source(texts)).run()
    assert again.tokenizer.encoded == texts[4:]


def test_a_complete_capture_loads_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_capture(tmp_path / "s.zarr", [words(30)])
    monkeypatch.setattr(FakeRun, "assignment", lambda *_: pytest.fail("an engine was asked for"))
    assert fake_capture(tmp_path / "s.zarr", [words(30)]).complete


# --- Micro-batches ----------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(lambda sizes: np.array(sizes, dtype=np.int32))


@given(LENGTHS | st.lists(st.integers(1, 2048), min_size=1, max_size=60).map(np.array), st.integers(1, 40_000))
def test_each_row_is_in_one_micro_batch_of_the_asked_size_the_two_largest_at_the_ends(
    length: np.ndarray, batch_tokens: int
) -> None:
    batches = micro_batches(length, batch_tokens)
    sizes = [len(batch) * int(length[batch].max()) for batch in batches]
    assert [*sizes[:1], *sizes[-1:], *sizes[1:-1]][: len(sizes)] == sorted(sizes, reverse=True)
    by_length = sorted(batches, key=lambda batch: (-length[batch].max(), batch[0]))
    order = np.concatenate(by_length)
    assert sorted(order.tolist()) == list(range(len(length)))
    assert (np.diff(length[order]) <= 0).all()
    for batch in batches:
        assert len(batch) == 1 or len(batch) * length[batch].max() <= batch_tokens
        assert (length[batch].max() - length[batch]).sum() <= BATCH_COST_TOKENS
    for batch, after in pairwise(by_length):  # none smaller than need be
        longer = np.append(batch, after[0])
        padding = (length[longer].max() - length[longer]).sum()
        assert len(longer) * length[longer].max() > batch_tokens or padding > BATCH_COST_TOKENS
    assert [batch.tolist() for batch in micro_batches(length.copy(), batch_tokens)] == [b.tolist() for b in batches]


@few
@given(LENGTHS, st.integers(1, 300), st.sampled_from([8, 300]), st.sampled_from([(0,), (1, 3, 9)]), st.integers(1, 3))
def test_routes_are_those_of_each_token_in_its_row_whatever_the_batches(
    length: np.ndarray, batch_tokens: int, num_experts: int, layers: tuple[int, ...], k: int
) -> None:
    layout = fake_layout(
        sequence_length=40, rows_per_shard=64, layers=layers, num_experts=num_experts, experts_per_token=k
    )
    token = np.random.default_rng(0).integers(2, 999, (len(length), 40)).astype(np.int32)
    token[np.arange(40) >= length[:, None]] = -1
    rows = Rows(token=token, length=length, document_id=np.zeros(0), offset=np.zeros(0))
    counted: list[int] = []
    routes = route_rows(FakeEngine(layers, num_experts, k), rows, layout, batch_tokens, counted.append)()
    expert, weight = routes["expert"], routes["weight"]
    assert (expert.shape, weight.dtype) == ((len(length), 40, len(layers), k), np.float16)
    assert expert.dtype == (np.uint8 if num_experts == 8 else np.uint16)
    for row, position in [(0, 0), (len(length) - 1, int(length[-1]) - 1), (len(length) // 2, 0)]:
        for index, layer in enumerate(layers):
            for choice in range(k):
                wanted = fake_choice(int(token[row, position]), position, layer, choice, num_experts)
                assert (expert[row, position, index, choice], weight[row, position, index, choice]) == wanted
    beyond = np.arange(40) >= length[:, None]
    assert (expert[beyond] == layout.missing_expert).all()
    assert (weight[beyond] == 0).all()
    assert (expert[~beyond] < num_experts).all()
    alone = route_rows(FakeEngine(layers, num_experts, k), rows, layout, 1)()
    np.testing.assert_array_equal(expert, alone["expert"])
    np.testing.assert_array_equal(weight, alone["weight"])
    assert sum(counted) == length.sum()


# --- What does not fit, and what cannot be ------------------------------------------------------------------------


def routed(path: Path, **options: Any) -> CaptureGroup:
    texts = [words(number, number) for number in (8, 8, 8, 8, 5, 3, 2, 8, 8)]
    assert fake_capture(path, texts, **options).complete
    return CaptureGroup(path, "fake")


@pytest.mark.parametrize(("fits", "halvings"), [(32, 0), (31, 1), (16, 1), (15, 2), (8, 2)])
def test_what_does_not_fit_is_halved_until_it_does_with_equal_bytes_and_the_commit_says_so(
    tmp_path: Path, fits: int, halvings: int
) -> None:
    roomy, tight = (routed(tmp_path / name, batch_tokens=32, fits=size) for name, size in (("a", 999), ("b", fits)))
    assert tight.commits()[0][0]["halvings"] == halvings
    assert roomy.commits()[0][0]["halvings"] == 0
    one, other = store_files(roomy.path), store_files(tight.path)
    assert one.keys() == other.keys()
    assert [key for key in one if one[key] != other[key] and "/commits/" not in key] == []


def test_halving_begins_anew_with_each_shard(tmp_path: Path) -> None:
    group = routed(tmp_path / "s", batch_tokens=32, fits=16)
    # The last shards' rows, fewer and shorter, fit as they are.
    assert [record["halvings"] for _, record in sorted(group.commits()[0].items())] == [1, 1, 0]


def test_rows_that_do_not_fit_even_alone_are_set_aside_with_what_to_do(tmp_path: Path) -> None:
    state = fake_capture(tmp_path / "s.zarr", [words(80)], batch_tokens=32, fits=7)
    assert (state.shards_done, state.plan.complete, exit_status([state])) == (0, True, 3)
    assert state.missing == list(state.quarantined) == [0, 1, 2]
    for shard, record in state.quarantined.items():
        assert len(record["errors"]) == 3
        for error in record["errors"]:
            assert error.startswith(f"OutOfMemory: shard {shard} of fake does not fit, not even in micro-batches of")
            assert "--sequence_length" in error
            assert "8 tokens, and 7 fit" in error


class DeviceEngine(FakeEngine):
    """Has its results, as a device has, only after what was started next was started too: whoever waits, waits long."""

    def __init__(self, starts: int) -> None:
        super().__init__()
        self.started = [threading.Event() for _ in range(starts)]
        self.number = 0

    def start(self, token: np.ndarray, length: np.ndarray) -> Callable[[], Routes]:
        finish, number = super().start(token, length), self.number
        self.started[number].set()
        self.number += 1

        def wait() -> Routes:
            following = self.started[number + 1 : number + 2]
            assert all(event.wait(HUNG_S) for event in following), f"the device waited after micro-batch {number}"
            return finish()

        return wait


def captured_with(engine: FakeEngine, path: Path, texts: Sequence[Text]) -> xr.Dataset:
    run: Any = FakeRun(path, batch_tokens=16)
    run.make_engine = lambda: engine
    assert capture_datasets(run, [("fake", text_source(texts))], capture_here)[0].complete
    return open_capture(path, "fake").compute()


def test_a_device_never_waits_for_results_to_be_fetched_nor_for_a_shard_to_be_written(tmp_path: Path) -> None:
    texts = [words(number, number) for number in (8, 8, 8, 8, 5, 3, 2, 8, 8)]
    counting = FakeEngine()
    quiet = captured_with(counting, tmp_path / "a", texts)
    assert len(counting.sizes) > coverage(tmp_path / "a", "fake").shards_total > 2
    busy = captured_with(DeviceEngine(len(counting.sizes)), tmp_path / "b", texts)
    assert busy.equals(quiet)


class BadEngine(FakeEngine):
    """Routes as asked until a shard's second micro-batch, which it spoils."""

    def __init__(self, spoil: str) -> None:
        super().__init__(layers=(3, 5, 9))
        self.spoil = spoil

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        expert, weight = super().route(token, length).values()
        if len(self.sizes) == 2:
            match self.spoil:
                case "expert":
                    expert[-1, 0, 1, 1] = 8
                case "fill":
                    expert[0, int(length[0]) - 1, 2, 0] = 255
                case "layer missing":
                    expert, weight = expert[:, :, :2], weight[:, :, :2]
                case "row missing":
                    expert, weight = expert[1:], weight[1:]
                case "weights of another shape":
                    weight = weight[..., :1]
        return {"expert": expert, "weight": weight}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("expert", "shard 0 of fake: layer 5 chose an expert at or beyond num_experts = 8"),
        ("fill", "shard 0 of fake: layer 9 chose an expert"),
        ("layer missing", "shard 0 of fake: the engine returned"),
        ("row missing", "shard 0 of fake: the engine returned"),
        ("weights of another shape", "shard 0 of fake: the engine returned"),
    ],
)
def test_choices_that_cannot_be_stop_the_shard_and_nothing_is_committed(
    tmp_path: Path, spoil: str, message: str
) -> None:
    run = FakeRun(tmp_path / "s.zarr", fake_layout(layers=(3, 5, 9)), batch_tokens=16)
    planner(run, text_source([words(60)])).run()
    group = CaptureGroup(tmp_path / "s.zarr", "fake")
    with pytest.raises(RoutingError, match=message):
        capture_shard(group, 0, group.read_rows(0), BadEngine(spoil), batch_tokens=16)()
    assert coverage(group.path, "fake").shards_done == 0


def test_the_number_of_shards_is_that_of_the_rows(tmp_path: Path) -> None:
    for rows in (1, 4, 5, 8, 9):
        state = fake_capture(tmp_path / f"{rows}.zarr", [words(8 * rows)])
        assert (state.shards_total, state.complete) == (math.ceil(rows / 4), True)


def test_a_text_that_changes_while_it_is_planned_is_refused_before_the_plan_is_complete(tmp_path: Path) -> None:
    source = text_source([words(30)])
    hashes = iter(["before", "after"])
    changing = replace(source, identify=lambda: {"sha256": next(hashes)})
    assert changing.identity == {"sha256": "before"}
    run = FakeRun(tmp_path / "s.zarr")
    run.open_group("fake")
    with pytest.raises(ValueError, match="the text of fake changed while it was planned"):
        planner(run, changing).run()
    assert not CaptureGroup(tmp_path / "s.zarr", "fake").plan.complete


def test_an_empty_conversation_is_an_empty_document_and_a_refused_one_is_named(tmp_path: Path) -> None:
    plan = fake_capture(tmp_path / "s.zarr", [[], [{"role": "user", "content": words(3)}]]).plan
    assert (plan.documents, plan.documents_empty) == (2, 1)

    class Refusing(FakeTokenizer):
        def chat(self, messages: Any) -> Any:
            raise ValueError("no such role")

    run = FakeRun(tmp_path / "t.zarr")
    run.tokenizer = Refusing()
    with pytest.raises(ValueError, match="document 'document 0': no such role") as raised:
        planner(run, text_source([[{"role": "bot", "content": "x"}]])).run()
    assert not isinstance(raised.value, Unrenderable), "a fault that is not the document's stays one"


def test_a_conversation_that_cannot_be_rendered_is_told_apart_and_its_tools_reach_the_tokenizer() -> None:
    documents = [
        Document(name="one", messages=[{"role": "user", "content": "x"}], tools=[{"name": "f"}]),
        Document(name="two", messages=[{"role": "user", "content": "x"}], documents="none"),
    ]

    class Picky(FakeTokenizer):
        def chat(self, messages: Any, tools: Any = None, documents: Any = None) -> Any:
            if documents is not None:
                raise Unrenderable(f"its documents are {documents}")
            assert tools == [{"name": "f"}]
            return super().chat(messages)

    encoded = encode(documents, Picky())  # type: ignore[arg-type]
    assert next(encoded)[0] is documents[0]
    with pytest.raises(Unrenderable, match="document 'two': its documents are none"):
        next(encoded)
