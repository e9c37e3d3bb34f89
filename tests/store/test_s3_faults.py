"""S3 through a failing network: retries with growing pauses, never half an object, and few requests."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_model import TEXTS, FakeEngine, fake_capture, words
from patience import HUNG_S, NEVER_S, wait_until
from s3_proxy import FAULTS, Proxy, once_each, proxy
from s3_server import any_files, bucket_files, new_store, server_address, variables  # noqa: F401
from test_s3 import comparable

from jobs.capturing.captures import exit_status
from store import CaptureGroup, coverage, lease, open_capture
from store import s3 as s3_module
from store.objects import Objects, open_objects
from workers.shard import capture_shard

DONE_BUT_NOT_TOLD = ("lost", "stall")


@pytest.fixture
def direct(s3: str) -> Objects:
    """The content of the store, without the network."""
    return open_objects(s3, scratch="scratch")


@pytest.fixture
def network(direct: Objects, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The path to the server, which tests can break."""
    monkeypatch.setattr(s3_module, "REQUEST_S", HUNG_S)
    monkeypatch.setattr(s3_module, "PAUSES_S", (0.1, 0.2))
    monkeypatch.setattr(lease, "RENEW_S", NEVER_S)  # its requests would be counted too
    with proxy(s3_address) as between:
        for name, value in variables(between.address).items():
            monkeypatch.setenv(name, value)
        yield between


@pytest.fixture
def objects(s3: str, network: Proxy) -> Objects:
    """The content of the store, through the network."""
    return open_objects(s3, scratch="scratch")


# --- Tried again ------------------------------------------------------------------------------------------------

OPERATIONS: list[tuple[str, Callable[[Objects], Any], Any]] = [
    ("put", lambda objects: objects.put("a", b"new"), None),
    ("put_new where there is one", lambda objects: objects.put_new("a", b"other"), False),
    ("put_new", lambda objects: objects.put_new("b", b"data"), True),
    ("put_over", lambda objects: objects.put_over("a", b"new", b"newer"), True),
    ("get", lambda objects: objects.get("a"), b"newer"),
    ("get where there is none", lambda objects: objects.get("none"), None),
    ("size_bytes", lambda objects: objects.size_bytes("a"), 5),
    ("sizes", lambda objects: objects.sizes("", ["a", "none"]), [5, None]),
    ("list", lambda objects: objects.list(""), ["a", "b"]),
    ("folders", lambda objects: objects.folders(""), ["under"]),
    ("delete", lambda objects: objects.delete("b"), None),
    ("clear", lambda objects: objects.clear("under"), None),
]


def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may take a second; one that takes longer on a busy machine is retried often enough."""
    monkeypatch.setattr(s3_module, "REQUEST_S", 1)
    monkeypatch.setattr(s3_module, "PAUSES_S", (0.1,) * 10)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_once_in_any_way_is_made_again(
    s3: str, network: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A put that was done but whose answer was lost finds its own object there, which its callers expect."""
    if fault == "stall":
        give_up_soon(monkeypatch)
    objects = open_objects(s3, scratch="scratch")
    objects.put("under/c", b"")
    for name, operation, answer in OPERATIONS:
        network.fault = once_each([fault])
        found = operation(objects)
        conditional = name in ("put_new", "put_over") and fault in DONE_BUT_NOT_TOLD
        assert found == answer or (conditional and found is False), name
    assert objects.list("") == ["a"]
    assert objects.folders("") == []


def test_the_second_put_of_a_conditional_one_is_made_again_too(
    s3: str, objects: Objects, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("a", b"old")
    for fault in ("503", "reset"):
        network.fault = once_each([None, fault])  # after it was read
        assert objects.put_over("a", b"old", b"old")
    give_up_soon(monkeypatch)
    stalls = ["stall"]
    network.fault = lambda method, key: stalls.pop() if method == "PUT" and stalls else None
    assert not open_objects(s3, scratch="scratch").put_over("a", b"old", b"new")
    assert objects.get("a") == b"new"


def test_what_a_server_refuses_for_now_is_asked_again_with_growing_pauses_for_as_long_as_is_said(
    s3: str, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight tries took between one and four seconds, and 45 are promised. At most one try starts later."""
    monkeypatch.setattr(s3_module, "RETRY_S", 4)
    objects = open_objects(s3, scratch="scratch")
    network.fault = lambda method, key: "503"
    started = time.monotonic()
    with pytest.raises(OSError, match="SlowDown: Reduce your rate"):
        objects.put("a", b"")
    assert time.monotonic() - started >= 4
    assert network.seen[-2].at - network.seen[0].at <= 4
    pauses = [later.at - one.at for one, later in itertools.pairwise(network.seen)]
    assert min(pauses) > 0.9 * s3_module.BACK_OFF_S
    assert max(pauses) > 3 * s3_module.BACK_OFF_S
    assert len(pauses) < 4 / s3_module.BACK_OFF_S / 2, "they grow"


def test_pauses_grow_no_longer_than_is_said(s3: str, network: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty pauses, each up to three times as long as the one before, would be years."""
    for name, value in (("RETRIES", 60), ("RETRY_S", HUNG_S), ("BACK_OFF_S", 0.01), ("LONGEST_BACK_OFF_S", 0.02)):
        monkeypatch.setattr(s3_module, name, value)
    objects = open_objects(s3, scratch="scratch")
    network.fault = lambda method, key: "503"
    with pytest.raises(OSError, match="SlowDown: Reduce your rate"):
        objects.put("a", b"")
    assert len(network.seen) == 61


@pytest.mark.parametrize("operation", ["put_new", "get"])
def test_a_server_that_takes_too_long_is_asked_three_times_and_told(
    objects: Objects, network: Proxy, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Like a request that takes longer than all tries may take."""
    monkeypatch.setattr(s3_module, "REQUEST_S", 1)
    monkeypatch.setattr(s3_module, "RETRY_S", 0.5)
    objects = open_objects(objects.root, scratch="scratch")
    network.fault = lambda method, key: "stall"
    with pytest.raises(ConnectionError, match="cannot be reached"):
        getattr(objects, operation)(*{"put_new": ("a", b"data"), "get": ("a",)}[operation])
    wait_until(lambda: len(network.seen) >= 3, "the proxy has seen what was given up")
    assert len(network.seen) == 3


def test_an_upload_that_breaks_off_leaves_nothing_to_be_seen(
    s3: str, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "RETRY_S", 1)
    objects = open_objects(s3, scratch="scratch")
    network.fault = lambda method, key: "reset" if method == "PUT" else None
    for put in (objects.put, objects.put_new):
        with pytest.raises(ConnectionError, match="cannot be reached"):
            put("a", b"data" * 10_000)
    network.fault = once_each([])
    assert bucket_files(s3) == {}


# --- Whole captures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The objects of an undisturbed capture."""
    store = tmp_path_factory.mktemp("clean") / "routes.zarr"
    fake_capture(store, TEXTS)
    return comparable(store)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_capture_over_a_network_that_breaks_every_eighth_request_has_the_bytes_of_an_undisturbed_one(
    s3: str, network: Proxy, clean: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "stall":
        give_up_soon(monkeypatch)
    every = 8 if fault != "stall" else 40
    network.fault = once_each(itertools.chain.from_iterable([None] * (every - 1) + [fault] for _ in range(1000)))
    assert fake_capture(s3, TEXTS).complete
    broken, requests = sum(one.fault is not None for one in network.seen), len(network.seen)
    network.fault = once_each([])
    assert comparable(s3) == clean
    assert broken == requests // every > 2


@pytest.mark.slow
def test_whatever_is_visible_while_a_capture_runs_over_a_broken_network_is_whole(
    s3: str, direct: Objects, network: Proxy, clean: dict[str, Any]
) -> None:
    """Looked at past the network, before every fifth request; an array grows, and so do records of the plan."""
    final = [key for key in clean if "/expert/c/" in key or "/weight/c/" in key or "/token/c/" in key]
    kinds, seen = itertools.cycle(["reset", None, "lost", None, None]), set()

    def look(method: str, key: str) -> str | None:
        if key in final:
            for name, data in direct.get_many(final).items():
                assert data == clean[name]
                seen.add(name)
        return next(kinds)

    network.fault = look
    assert fake_capture(s3, TEXTS).complete
    assert len(seen) > 5


def test_a_storage_that_stays_away_ends_the_command_with_one_line_and_the_next_one_goes_on(
    s3: str, network: Proxy, clean: dict[str, Any], command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "RETRY_S", 1)
    away = False

    def fault(method: str, key: str) -> str | None:
        nonlocal away
        away = away or (key == "fake/expert/commits/2.json" and method == "PUT")
        return "503" if away else None

    network.fault = fault
    ran = command(main=lambda _: exit_status([fake_capture(s3, TEXTS)]))
    assert ran.status == 1
    [error] = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert f"can be resumed when this is fixed: {s3}: SlowDown" in error
    assert "Traceback" not in ran.err
    network.fault = once_each([])
    state = coverage(s3, "fake")
    assert (state.shards_done, state.wrong) == (2, {})
    with pytest.raises(ValueError, match="missing shards: 2-4"):
        open_capture(s3, "fake")
    monkeypatch.setattr(lease, "_process_start", lambda process: "later")  # it could not return its lease, and ended
    ran = command(main=lambda _: exit_status([fake_capture(s3, TEXTS)]))
    assert ran.status == 0, ran.err
    assert comparable(s3) == clean


# --- Few requests -----------------------------------------------------------------------------------------------


def test_a_shard_takes_seven_requests_and_what_must_not_be_there_is_put_under_that_condition(
    s3: str, network: Proxy
) -> None:
    fake_capture(s3, TEXTS)
    group = CaptureGroup(s3, "fake")
    group.discard(2)
    group.objects.delete("fake/expert/commits/2.json")  # as if it had never been captured
    assert group.identity
    assert group.layout
    network.seen.clear()
    rows = group.read_rows(2)
    assert group.commit(2, capture_shard(group, 2, rows, FakeEngine(), batch_tokens=24)()[0], rows=rows, facts={})
    assert network.requests() == [
        "GET fake/token/plan.json",
        "GET fake/token/c/2/0",
        "GET fake/length/c/0",
        "GET fake/expert/commits/2.json",
        "PUT fake/expert/c/2/0/0/0",
        "PUT fake/weight/c/2/0/0/0",
        "PUT fake/expert/commits/2.json",
    ]
    assert [one.condition for one in network.seen if one.method == "PUT"] == ["*"] * 3


def test_each_shard_more_of_a_whole_run_takes_nine_requests(s3: str, network: Proxy) -> None:
    """One to put its tokens, seven to fill it, and one to count its commit at the end, for any size of the rest."""
    counts = []
    for shards in (5, 10):
        network.seen.clear()
        assert fake_capture(s3, [words(32, number) for number in range(shards)], str(shards)).shards_done == shards
        counts.append(len(network.seen))
    assert counts[1] - counts[0] == 5 * 9


def test_every_put_that_could_undo_another_writers_is_conditional(s3: str, network: Proxy) -> None:
    fake_capture(s3, TEXTS)
    loose = {one.key for one in network.seen if one.method == "PUT" and one.condition is None}
    assert loose == set()
