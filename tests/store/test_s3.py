"""Stores on S3: the same objects as on a disk, byte for byte, and failures that are reported in one sentence."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest
import xarray as xr
from bucket import Bucket
from fake_model import TEXTS, FakeEngine, fake_capture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import HUNG_S
from s3_server import any_files, bucket_store, new_store, server_address, variables  # noqa: F401

from store import CaptureGroup, coverage, dataset_names, lease, open_capture, open_tree
from store import s3 as s3_module
from store.objects import LocalObjects, Objects, open_objects
from store.s3 import S3Objects
from workers.shard import capture_shard

ROOT = Path(__file__).parents[2]


def comparable(store: Path | str) -> dict[str, Any]:
    """Every object of a store; of commit records only the parts that do not depend on their writer and its speed."""
    files = any_files(store)
    for key in [key for key in files if "/commits/" in key]:
        record = json.loads(files[key])
        files[key] = {name: value for name, value in record.items() if name not in ("seconds", "worker")}
    return files


@pytest.fixture
def captured(s3: str) -> str:
    """A whole capture."""
    fake_capture(s3, TEXTS)
    return s3


# --- The same as on a disk ------------------------------------------------------------------------------------

KEYS = ("a", "b/c", "b/d", "b/e/f", "g/0")
CONTENTS = st.sampled_from([b"", b"x", b"y"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["put", "put_new"]), st.sampled_from(KEYS), CONTENTS),
        st.tuples(st.just("put_over"), st.sampled_from(KEYS), CONTENTS, CONTENTS),
        st.tuples(st.sampled_from(["get", "size_bytes", "delete"]), st.sampled_from(KEYS)),
        st.tuples(st.sampled_from(["list", "folders", "clear"]), st.sampled_from(["b", "g", "none"])),
    ),
    max_size=12,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_a_bucket_and_the_one_in_memory_answer_and_hold_what_a_folder_does(
    s3: str,
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[Any, ...]],
) -> None:
    folder = tmp_path_factory.mktemp("objects")
    files: dict[str, bytes] = {}
    disk, s3_objects = LocalObjects(folder, "scratch"), S3Objects(f"{s3}/{folder.name}"[5:], "scratch")
    kinds: list[Objects] = [disk, s3_objects, Bucket("scratch", files)]
    for name, *arguments in operations:
        ours, *theirs = (getattr(objects, name)(*arguments) for objects in kinds)
        assert theirs == [ours, ours], (name, arguments)
    for objects in kinds:
        objects.delete("scratch/none")
        assert list(objects.get_many(KEYS)) == [key for key in KEYS if disk.get(key) is not None]
        assert objects.get_many(KEYS) == disk.get_many(KEYS)
        assert objects.sizes("", KEYS) == disk.sizes("", KEYS)
    assert any_files(f"{s3}/{folder.name}") == any_files(folder) == files


def test_an_object_is_put_over_one_with_the_bytes_that_were_read_and_over_no_other(s3: str, tmp_path: Path) -> None:
    for objects in (LocalObjects(tmp_path, "scratch"), S3Objects(s3[5:], "scratch")):
        assert not objects.put_over("key", b"", b"new")  # there is no such object
        assert objects.get("key") is None
        objects.put("key", b"old")
        assert not objects.put_over("key", b"other", b"new")
        assert objects.get("key") == b"old"
        assert objects.put_over("key", b"old", b"new")
        assert objects.get("key") == b"new"


def test_a_capture_on_s3_has_the_bytes_of_a_local_one_object_for_object(captured: str, tmp_path: Path) -> None:
    fake_capture(tmp_path / "routes.zarr", TEXTS)
    ours, theirs = comparable(tmp_path / "routes.zarr"), comparable(captured)
    assert theirs == ours
    assert len([key for key in ours if "/commits/" in key]) == 5
    local, remote = coverage(str(tmp_path / "routes.zarr"), "fake"), coverage(captured, "fake")
    assert remote.complete
    assert (remote.tokens_done, remote.bytes_done) == (local.tokens_done, local.bytes_done)
    xr.testing.assert_identical(open_capture(captured, "fake"), open_capture(tmp_path / "routes.zarr", "fake"))


def test_an_incomplete_capture_on_s3_is_refused_and_healed(captured: str) -> None:
    before = comparable(captured)
    CaptureGroup(captured, "fake").discard(1)
    bucket_store(captured).put("fake/weight/c/3/0/0/0", b"")
    with pytest.raises(ValueError, match="missing shards: 1, 3") as raised:
        open_capture(captured, "fake")
    assert captured in str(raised.value)
    assert open_capture(captured, "fake", allow_incomplete=True)["captured"].values.sum() == 9
    assert fake_capture(captured, TEXTS).complete
    assert comparable(captured) == before


def test_a_tree_of_captures_is_listed_and_opened(captured: str) -> None:
    fake_capture(captured, TEXTS[:3], "other")
    bucket_store(captured).put("stray/file", b"")
    assert dataset_names(captured) == ["fake", "other"]
    assert sorted(open_tree(captured).children) == ["fake", "other"]
    with pytest.raises(FileNotFoundError, match="it holds: fake, other"):
        open_capture(captured, "none")
    with pytest.raises(FileNotFoundError, match=f"no store at {captured}2"):
        dataset_names(f"{captured}2")


PLAIN = """
import sys, importlib.util
import xarray as xr
from obstore.store import S3Store
from zarr.storage import ObjectStore
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # of expert-atlas
for name in ("store", "workers", "jobs", "analysis"):
    assert importlib.util.find_spec(name) is None, name
bucket, _, prefix = sys.argv[1].removeprefix("s3://").partition("/")
store = ObjectStore(S3Store(bucket, prefix=prefix, client_options={"allow_http": True}), read_only=True)
data = xr.open_zarr(store, group="fake", consolidated=False).compute()
assert xr.open_datatree(store, engine="zarr", consolidated=False)["fake"].to_dataset().compute().identical(data)
print(int(data["expert"].astype("int64").sum()), data["name"].values.tolist())
"""


def test_plain_xarray_reads_a_store_on_s3_where_none_of_our_packages_is_there(captured: str, tmp_path: Path) -> None:
    with lease.lease(CaptureGroup(captured, "fake")):  # as while a capture runs
        command = [sys.executable, "-I", "-W", "error", "-c", PLAIN, captured]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    data = open_capture(captured, "fake").compute()
    assert done.stdout == f"{int(data['expert'].astype('int64').sum())} {data['name'].values.tolist()}\n"


DEATHS = (
    "put_new fake/token/lease.json",
    "put_new fake/name/zarr.json",
    "put_new fake/zarr.json",
    "put_new fake/token/c/3/0",
    "put_new fake/document_id/c/0",
    "put_over fake/length/zarr.json",
    "put_over fake/zarr.json",
    "put_over fake/token/plan.json",
    "put_new fake/expert/c/0/0/0/0",
    "put_new fake/expert/commits/1.json",
    "put_new fake/weight/c/3/0/0/0",
    "delete fake/token/lease.json",
)
"""While creating the group, while planning, between the objects of shards, and at the end."""


def test_a_capture_killed_again_and_again_leaves_the_bytes_of_an_undisturbed_one(s3: str, tmp_path: Path) -> None:
    fake_capture(tmp_path / "truth.zarr", TEXTS)
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "s3_driver.py")]
    runs = "\n".join(json.dumps([s3, death]) for death in (*DEATHS, None))
    done = subprocess.run(command, input=runs, capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(DEATHS) + ["0"], done.stderr
    assert comparable(s3) == comparable(tmp_path / "truth.zarr")


# --- Few requests -----------------------------------------------------------------------------------------------


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every request that goes through obstore's functions, as "get key"."""
    seen: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: Any, key: str, *data: Any, **options: Any) -> Any:
            seen.append(f"{name} {key}")
            return function(store, key, *data, **options)

        return call

    for name in ("get", "head", "put", "delete", "list", "list_with_delimiter"):
        monkeypatch.setattr(obstore, name, counted(name, getattr(obstore, name)))
    return seen


def test_a_worker_fetches_the_plan_the_tokens_and_the_lengths_of_its_shard_and_nothing_else(
    captured: str, requests: list[str]
) -> None:
    group = CaptureGroup(captured, "fake")
    assert group.layout.rows_per_shard == 4
    requests.clear()
    group.read_rows(2)
    assert requests == ["get fake/token/plan.json", "get fake/token/c/2/0", "get fake/length/c/0"]


def test_counting_what_is_there_asks_once_for_each_record_and_for_no_object(captured: str, requests: list[str]) -> None:
    group = CaptureGroup(captured, "fake")
    assert len(group.identity) > 0
    assert len(group.layout.layers) == 3
    requests.clear()
    valid, wrong = group.commits()
    assert (len(valid), wrong) == (5, {})
    records = [f"get fake/expert/commits/{shard}.json" for shard in range(5)]
    assert sorted(requests) == sorted(
        [*records, "list fake/expert/c", "list fake/weight/c"]
        + [f"list_with_delimiter fake/expert/{folder}" for folder in ("commits", "faults")]
    )


def test_more_objects_than_a_page_of_the_listing_holds_are_all_counted(s3: str) -> None:
    objects = S3Objects(s3[5:], "scratch")
    keys = [f"many/{number:04d}" for number in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: objects.put(key, key[-1:].encode()), keys))
    assert objects.list("many") == [key.partition("/")[2] for key in keys]
    assert objects.sizes("many", [*keys, "many/none"]) == [1] * 1001 + [None]
    assert objects.get_many(keys) == {key: key[-1:].encode() for key in keys}
    objects.clear("many")
    assert objects.list("many") == []


# --- Answers that are lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lease.json", "fake/zarr.json", "environment.json", "expert/c/", "commits/"])
def test_a_put_that_succeeded_and_whose_answer_was_lost_stops_nothing(
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
) -> None:
    put_new, lost = S3Objects.put_new, []

    def put_whose_answer_is_lost(self: S3Objects, name: str, data: bytes) -> bool:
        """The client's view on a retry: its own object is already there."""
        done = put_new(self, name, data)
        if key in name and done:
            lost.append(name)
            return False
        return done

    monkeypatch.setattr(S3Objects, "put_new", put_whose_answer_is_lost)
    assert fake_capture(s3, TEXTS).complete
    assert lost
    fake_capture(tmp_path / "truth.zarr", TEXTS)
    assert comparable(s3) == comparable(tmp_path / "truth.zarr")


def test_a_commit_whose_answer_was_lost_is_told_from_one_that_another_writer_made(
    captured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = CaptureGroup(captured, "fake")
    rows = group.read_rows(0)
    routes, _ = capture_shard(group, 0, rows, FakeEngine(), batch_tokens=24)()
    assert not group.commit(0, routes, rows=rows, facts={"worker": "late"})
    group.discard(0)
    put_new = S3Objects.put_new
    monkeypatch.setattr(S3Objects, "put_new", lambda self, key, data: put_new(self, key, data) and False)
    assert group.commit(0, routes, rows=rows, facts={"worker": "mine"})
    assert not group.commit(0, routes, rows=rows, facts={"worker": "late"})


# --- Leases -----------------------------------------------------------------------------------------------------

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from store import CaptureGroup
from store.lease import lease
with lease(CaptureGroup(sys.argv[2], "fake")) as held:
    print(held.token, flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(store: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds the lease, and its token."""
    command = [sys.executable, "-W", "error", "-c", HOLDER, str(ROOT), store]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_second_process_is_told_who_holds_a_store_on_s3_and_takes_over_when_it_was_killed(captured: str) -> None:
    group = CaptureGroup(captured, "fake")
    with held_elsewhere(captured) as (holder, token):
        assert lease.lease_token(group) == token
        message = f"{captured}/fake is being captured by process {holder.pid} of .* on {socket.gethostname()} since 20"
        with pytest.raises(RuntimeError, match=message), lease.lease(group):
            pytest.fail("two processes hold the lease")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert str(lease.lease_holder(group)).endswith(", which is gone")
        with lease.lease(group) as mine:
            assert lease.lease_token(group) == mine.token != token
            assert not mine.lost
    assert lease.lease_token(group) is None


def test_a_process_that_ends_gives_its_lease_on_s3_back(captured: str) -> None:
    with held_elsewhere(captured) as (holder, token):
        assert token
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait(HUNG_S) == 0
        assert lease.lease_token(CaptureGroup(captured, "fake")) is None


def test_of_two_that_take_a_stale_lease_over_at_once_the_later_put_changes_nothing(
    captured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process puts its record after this one has read the stale record: If-Match rejects this one's."""
    group = CaptureGroup(captured, "fake")
    stale = lease._holder() | {"process_start": "1"}
    group.objects.put("fake/token/lease.json", json.dumps(stale).encode())
    put_over, other = S3Objects.put_over, lease._holder()

    def overtaken(self: S3Objects, key: str, old: bytes, data: bytes) -> bool:
        get = obstore.get

        def read_then_overtaken(store: Any, path: str) -> Any:
            found = get(store, path)
            group.objects.put(key, json.dumps(other).encode())
            return found

        with monkeypatch.context() as patch:
            patch.setattr(obstore, "get", read_then_overtaken)
            return put_over(self, key, old, data)

    monkeypatch.setattr(S3Objects, "put_over", overtaken)
    with pytest.raises(RuntimeError, match="another job took over the stale lease"), lease.lease(group):
        pytest.fail("two jobs hold the lease")
    assert lease.lease_token(group) == other["token"]


# --- What goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/x.zarr", "gs:// is not supported; use a folder or s3://bucket/prefix"),
        ("file:///tmp/x.zarr", "file:// is not supported"),
        (Path("az://bucket/x.zarr"), "az:// is not supported"),
        ("s3://", "is not a store: a bucket's name has 3 to 63 of"),
        ("s3:///x", "is not a store"),
        ("s3://Bucket_/x", "s3://Bucket_/x is not a store"),
    ],
)
def test_a_url_that_names_no_store_is_refused(path: Path | str, message: str) -> None:
    for opened in (lambda: coverage(path, "fake"), lambda: dataset_names(path), lambda: open_objects(path, "")):
        with pytest.raises(ValueError, match=message):
            opened()


@pytest.mark.parametrize("path", ["s3://bucket/a/b.zarr", Path("s3://bucket/a/b.zarr"), "S3://bucket/a/b.zarr/"])
def test_a_store_on_s3_is_printed_as_its_url_also_when_it_came_as_a_path(path: Path | str) -> None:
    assert CaptureGroup(path, "fake").path == "s3://bucket/a/b.zarr"


def test_a_bucket_that_is_not_there_is_named(s3: str) -> None:
    message = (
        "s3://no-such-bucket/r.zarr: http://127.0.0.1:[0-9]+ has no bucket 'no-such-bucket': make it, or name another"
    )
    objects = S3Objects("no-such-bucket/r.zarr", "")
    for failing in (
        lambda: dataset_names("s3://no-such-bucket/r.zarr"),
        lambda: fake_capture("s3://no-such-bucket/r.zarr", TEXTS),
        lambda: objects.list("x"),
        lambda: objects.sizes("x", ["x/y"]),
    ):
        with pytest.raises(FileNotFoundError, match=message) as raised:
            failing()
        assert "\n" not in str(raised.value)


class Answers(ThreadingHTTPServer):
    """Answers every request with one status and body, as S3 documents them."""

    def __init__(self, status: int, body: str = "") -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> "Answers":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def at(s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points to another address, with only one retry."""
    monkeypatch.setattr(s3_module, "RETRIES", 1)
    return lambda address: [monkeypatch.setenv(name, value) for name, value in variables(address).items()] and None


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (
            403,
            "InvalidAccessKeyId",
            PermissionError,
            "rejects these credentials .InvalidAccessKeyId: why.: they must be",
        ),
        (403, "SignatureDoesNotMatch", PermissionError, "rejects these credentials"),
        (401, "AccessDenied", PermissionError, "allowed to list, get, put and delete in the bucket"),
        (301, "PermanentRedirect", OSError, "another region: set AWS_REGION"),
        (503, "SlowDown", OSError, "SlowDown: why"),
        (501, "NotImplemented", OSError, "NotImplemented: why"),
    ],
)
def test_what_a_server_refuses_is_told_in_a_line(
    at: Callable[[str], None], status: int, code: str, kind: type[OSError], message: str
) -> None:
    with Answers(status, f"<Error><Code>{code}</Code><Message>why</Message></Error>") as server:
        at(f"http://127.0.0.1:{server.server_port}")
        objects = S3Objects("bucket/r.zarr", "")
        for failing in (
            lambda: objects.get("k"),
            lambda: objects.put("k", b""),
            lambda: objects.put_new("k", b""),
            lambda: objects.put_over("k", b"", b""),
            lambda: objects.delete("k"),
            lambda: objects.list("k"),
            lambda: objects.sizes("k", ["k/l"]),
            lambda: objects.get_many(["k"]),
        ):
            with pytest.raises(kind, match=f"s3://bucket/r.zarr: .*{message}") as raised:
                failing()
            assert "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_told_after_the_tries_of_one_request(
    at: Callable[[str], None], requests: list[str]
) -> None:
    at("http://127.0.0.1:9")
    message = "r.zarr: http://127.0.0.1:9 cannot be reached .* after 1 retries, max_retries: 1, .*AWS_ENDPOINT_URL"
    with pytest.raises(ConnectionError, match=message):
        coverage("s3://bucket/r.zarr", "fake")
    assert len(requests) == 1


def test_a_server_that_is_not_there_is_given_up_within_a_minute() -> None:
    """No try starts later; see `test_s3_faults.py`."""
    assert s3_module.RETRY_S + s3_module.LONGEST_BACK_OFF_S + s3_module.CONNECT_S <= 60


def test_missing_credentials_are_told(at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    at("http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(PermissionError, match=r"r.zarr: there are no credentials: set AWS_ACCESS_KEY_ID and"):
        coverage("s3://bucket/r.zarr", "fake")
