"""Reading back: exactly the faults are named, on a disk and on S3, and the next capture repairs them to equal bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import TEXTS, fake_capture, fake_layout, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import any_files, new_store, server_address  # noqa: F401

from jobs import status
from jobs.capturing import planner as planning
from store import CaptureGroup, coverage, layout, open_capture, planned
from store.lease import lease
from store.objects import LocalObjects, open_objects
from store.verification import Findings, verify
from workers.text.rows import BosRule

Command = Callable[..., Any]
SHARDS = 5


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A whole capture, to be damaged."""
    path = tmp_path / "routes.zarr" if request.param == "local" else request.getfixturevalue("s3")
    fake_capture(path, TEXTS)
    return path


def comparable(store: Path | str) -> dict[str, Any]:
    """Every object; of commit records only the parts that do not depend on their writer and its speed."""
    files = any_files(store)
    for key in [key for key in files if "/commits/" in key]:
        record = json.loads(files[key])
        files[key] = {name: value for name, value in record.items() if name not in ("seconds", "worker")}
    return files


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


def changed_record(**facts: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | facts).encode()


def damage(store: Path | str, key: str, how: Callable[[bytes], bytes | None]) -> None:
    """Replace an object; None removes it."""
    objects = open_objects(store, scratch="fake/token/partial")
    before = objects.get(f"fake/{key}")
    assert before is not None, key
    after = how(before)
    objects.delete(f"fake/{key}") if after is None else objects.put(f"fake/{key}", after)


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "with a bit flipped": lambda data: flipped(data, 77),
}
MESSAGES = {
    "deleted": "its {} shard is gone",
    "emptied": "its {} shard has 0 bytes, ",
    "cut": "its {} shard has ",
    "longer": "its {} shard has ",
    "with a bit flipped": "its {} shard is damaged: its sha256 is ",
}
RECORDS: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "of another identity": (changed_record(identity="f" * 64), "is of identity ffffffffffff"),
    "of another shard": (changed_record(shard=1), "is of shard 1"),
    "that cannot be read": (lambda data: data[:20], "cannot be read"),
    "of nothing": (lambda data: b"", "cannot be read"),
    "with another checksum": (
        lambda data: changed_record(weight=json.loads(data)["weight"] | {"sha256": "0" * 64})(data),
        "its weight shard is damaged",
    ),
    "of an earlier version": (
        lambda data: changed_record(expert={"bytes": json.loads(data)["expert"]["bytes"], "crc32c": 1})(data),
        "its expert shard was committed without its sha256",
    ),
}
CASES = [
    *(
        (f"{name}/c/{{}}/0/0/0", how, MESSAGES[kind].format(name))
        for name in ("expert", "weight")
        for kind, how in DAMAGE.items()
    ),
    *(("expert/commits/{}.json", how, message) for how, message in RECORDS.values()),
]


def test_nothing_is_wrong_with_a_whole_capture_and_all_of_it_was_read(store: Path | str) -> None:
    before, tokens = any_files(store), []
    found = verify(CaptureGroup(store, "fake"), tokens.append)
    assert found == Findings(shards={}, plan=[])
    assert sum(tokens) == coverage(store, "fake").tokens_done
    assert len(tokens) == SHARDS
    assert any_files(store) == before


@pytest.mark.parametrize(("key", "how", "message"), CASES)
def test_a_damaged_shard_is_named_alone_and_healed_to_equal_bytes(
    store: Path | str, key: str, how: Callable[[bytes], bytes | None], message: str
) -> None:
    before, shard = comparable(store), SHARDS - 1
    damage(store, key.format(shard), how)
    found = verify(CaptureGroup(store, "fake"))
    assert list(found.shards) == [shard]
    assert found.shards[shard].startswith(message), found.shards
    assert (found.plan, found.unnoted) == ([], None)
    state = coverage(store, "fake")
    assert (state.missing, list(state.wrong)) == ([shard], [shard])
    with pytest.raises(ValueError, match=f"missing shards: {shard}"):
        open_capture(store, "fake")
    assert fake_capture(store, TEXTS).complete
    assert comparable(store) == before  # the note is gone with the record that it was about
    assert verify(CaptureGroup(store, "fake")) == Findings(shards={}, plan=[])


def test_a_damage_that_lengths_tell_is_named_though_nothing_was_noted_before(store: Path | str) -> None:
    damage(store, "expert/commits/2.json", DAMAGE["deleted"])
    assert verify(CaptureGroup(store, "fake")) == Findings(shards={}, plan=[])  # it claims nothing and is missing
    assert coverage(store, "fake").missing == [2]


@pytest.mark.parametrize("key", ["expert/c/{}/0/0/0", "weight/c/{}/0/0/0", "expert/commits/{}.json"])
def test_shards_that_were_swapped_are_both_named_and_healed(store: Path | str, key: str) -> None:
    before, files = comparable(store), any_files(store)
    damage(store, key.format(1), lambda _: files[f"fake/{key.format(2)}"])
    damage(store, key.format(2), lambda _: files[f"fake/{key.format(1)}"])
    found = verify(CaptureGroup(store, "fake"))
    assert list(found.shards) == [1, 2]
    for shard, other in ((1, 2), (2, 1)):
        message = f"is of shard {other}" if "commits" in key else f"its {key[:6]} shard has "  # another length
        assert found.shards[shard].startswith(message)
    assert fake_capture(store, TEXTS).complete
    assert comparable(store) == before


@pytest.mark.parametrize("name", ["expert", "weight"])
def test_shards_of_equal_length_that_were_swapped_are_told_from_damaged_ones(tmp_path: Path, name: str) -> None:
    texts = [words(32 * 12)]
    fake_capture(tmp_path / "s.zarr", texts)
    files = any_files(tmp_path / "s.zarr")
    places = {shard: f"{name}/c/{shard}/0/0/0" for shard in range(12)}
    one, other = next(
        (one, other)
        for one in places
        for other in range(one)
        if len(files[f"fake/{places[one]}"]) == len(files[f"fake/{places[other]}"])
    )
    damage(tmp_path / "s.zarr", places[one], lambda _: files[f"fake/{places[other]}"])
    damage(tmp_path / "s.zarr", places[other], lambda _: files[f"fake/{places[one]}"])
    assert coverage(tmp_path / "s.zarr", "fake").complete  # lengths do not tell
    assert verify(CaptureGroup(tmp_path / "s.zarr", "fake")).shards == {
        other: f"its {name} shard holds the bytes of shard {one}",
        one: f"its {name} shard holds the bytes of shard {other}",
    }
    fake_capture(tmp_path / "s.zarr", texts)
    assert {key: data for key, data in any_files(tmp_path / "s.zarr").items() if "/commits/" not in key} == {
        key: data for key, data in files.items() if "/commits/" not in key
    }


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damaged=st.dictionaries(
        st.sampled_from(range(SHARDS)), st.tuples(st.sampled_from(["expert", "weight"]), st.integers(0, 10**6))
    )
)
def test_exactly_the_shards_with_a_flipped_bit_are_named(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, damaged: dict[int, tuple[str, int]]
) -> None:
    copy = tmp_path_factory.mktemp("copy") / "routes.zarr"
    shutil.copytree(whole, copy)
    for shard, (name, bit) in damaged.items():
        damage(copy, f"{name}/c/{shard}/0/0/0", lambda data, bit=bit: flipped(data, bit))  # type: ignore[misc]
    assert list(verify(CaptureGroup(copy, "fake")).shards) == sorted(damaged)
    assert coverage(copy, "fake").missing == sorted(damaged)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole capture, to be left as it is."""
    path = tmp_path_factory.mktemp("whole") / "routes.zarr"
    fake_capture(path, TEXTS)
    return path


# --- Notes --------------------------------------------------------------------------------------------------


def test_a_note_is_about_one_record_and_void_for_another(store: Path | str) -> None:
    group = CaptureGroup(store, "fake")
    valid, _ = group.commits()
    group.note_fault(3, valid[3], "its expert shard is damaged")
    assert group.commits()[1] == {3: "its expert shard is damaged"}
    damage(store, "expert/commits/3.json", changed_record(seconds=12.5))
    assert group.commits()[1] == {}
    group.note_fault(3, valid[3], "found in what was there before")  # noted late: it is already repaired
    assert group.commits()[1] == {}


def test_a_note_that_cannot_be_read_is_no_excuse(store: Path | str) -> None:
    group = CaptureGroup(store, "fake")
    group.note_fault(3, group.commits()[0][3], "its expert shard is damaged")
    damage(store, "expert/faults/3.json", lambda data: data[:9])
    assert list(group.commits()[1]) == [3]
    assert fake_capture(store, TEXTS).complete
    assert not [key for key in any_files(store) if "faults" in key]


def test_what_cannot_be_noted_is_said(whole_copy: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    damage(whole_copy, "weight/c/1/0/0/0", DAMAGE["with a bit flipped"])

    def read_only(objects: LocalObjects, key: str, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(LocalObjects, "put", read_only)
    ran = command(whole_copy, "--verify", main=status.main)
    assert ran.status == 1
    assert "fake: shard 1 failed verification: its weight shard is damaged" in ran.err
    assert "so that the next capture will not know: [Errno 30] Read-only file system" in ran.err


@pytest.fixture
def whole_copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


# --- The plan -----------------------------------------------------------------------------------------------

PLAN_KEYS = (
    "length/c/0",
    "document_id/c/0",
    "offset/c/0",
    "name/c/0",
    "piece/c/0",
    "layer/c/0",
    "token/c/1/0",
    "token/c/4/0",
)


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "with a bit flipped"])
@pytest.mark.parametrize("key", PLAN_KEYS)
def test_a_damaged_object_of_the_plan_is_named_and_no_shard_is_blamed(whole_copy: Path, key: str, how: str) -> None:
    damage(whole_copy, key, DAMAGE[how])
    found = verify(CaptureGroup(whole_copy, "fake"))
    assert found.shards == {}
    assert len(found.plan) == 1
    assert found.plan[0].startswith(
        f"{key} {'is gone' if how == 'deleted' else 'is empty' if how == 'emptied' else ''}"
    )


def test_tokens_that_were_swapped_are_not_those_of_the_commits(store: Path | str) -> None:
    files = any_files(store)
    damage(store, "token/c/1/0", lambda _: files["fake/token/c/2/0"])
    found = verify(CaptureGroup(store, "fake"))
    assert (found.shards, found.plan) == (
        {},
        ["token/c/1/0 holds other tokens than those from which shard 1 was captured"],
    )


def swap(store: Path | str, one: str, other: str) -> None:
    files = any_files(store)
    damage(store, one, lambda _: files[f"fake/{other}"])
    damage(store, other, lambda _: files[f"fake/{one}"])


def change_values(store: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put other values into an array's first object, encoded as by planning."""
    group = CaptureGroup(store, "fake")
    spec, size = group.layout.arrays()[name], min(group.plan_sizes()[name], group.layout.arrays()[name].step)
    damage(store, f"{name}/{spec.key(0)}", lambda _: spec.encode(change(group.values(name, 0, size))))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-dimensional arrays have chunks of 8 entries: three of them hold the 17 rows of the texts."""
    for module in (layout, planned):
        monkeypatch.setattr(module, "ROW_CHUNK", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bos", ["none", "document", "row"])
def test_nothing_is_wrong_with_a_plan_of_many_chunks(tmp_path: Path, bos: BosRule) -> None:
    fake_capture(tmp_path / "s.zarr", [*TEXTS, words(200, 6)], bos=bos)
    assert verify(CaptureGroup(tmp_path / "s.zarr", "fake")) == Findings(shards={}, plan=[])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bos", ["none", "document", "row"])
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("name", ["length", "document_id", "offset"])
def test_chunks_of_rows_that_were_swapped_are_named(tmp_path: Path, name: str, captured: bool, bos: BosRule) -> None:
    fake_capture(tmp_path / "s.zarr", TEXTS, bos=bos)
    group = CaptureGroup(tmp_path / "s.zarr", "fake")
    for shard in () if captured else list(group.commits()[0]):
        group.discard(shard)
    swap(tmp_path / "s.zarr", f"{name}/c/0", f"{name}/c/1")
    found = verify(group)
    assert found.shards == {}
    assert any(f"{name}/c/0" in fault for fault in found.plan), found.plan
    assert any(f"{name}/c/1" in fault for fault in found.plan), found.plan
    if name == "length" and captured:  # the commits say that it is not the tokens
        assert {"length/c/0 does not match token/", "length/c/1 does not match token/"} <= {f[:32] for f in found.plan}


def test_tokens_that_were_swapped_before_they_were_captured_do_not_fit_their_lengths(whole_copy: Path) -> None:
    group = CaptureGroup(whole_copy, "fake")
    for shard in (1, 2):
        group.discard(shard)
    swap(whole_copy, "token/c/1/0", "token/c/2/0")
    assert verify(group).plan == [
        "token/c/1/0 does not match length/c/0: row 5 has 6 tokens, but its length is 8",
        "token/c/2/0 does not match length/c/0: row 9 has 8 tokens, but its length is 6",
    ]


def test_speakers_where_no_token_is_are_found_when_shards_were_swapped(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": words(count)}] for count in (29, 32)]  # a shard each; the second is full
    fake_capture(tmp_path / "s.zarr", talks, layout=fake_layout(roles=("system", "user", "assistant")))
    swap(tmp_path / "s.zarr", "role/c/0/0", "role/c/1/0")
    assert verify(CaptureGroup(tmp_path / "s.zarr", "fake")).plan == [
        "role/c/0/0 does not match token/c/0/0: it names a speaker in row 3 where there is no token"
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "length",
            lambda values: values + 8 * (values == 8),
            "length/c/0 does not match token/c/0/0: row 1 has 8 tokens",
        ),
        ("length", lambda values: values * (values > 5), "length/c/0 does not match token/c/0/0: row 0 has 5 tokens"),
        ("document_id", lambda values: values + 1, "document_id/c/0 says document 7 for row 13, but 7 are planned"),
        (
            "document_id",
            lambda values: values[::-1],
            "document_id/c/0 says document 5 for row 4, but the previous row is",
        ),
        ("offset", lambda values: values + 8, "offset/c/0 does not match document_id/c/0, length/c/0: it says 8 for"),
        ("offset", lambda values: values // 16 * 16, "offset/c/0 does not match document_id/c/0, length/c/0: it says"),
        ("layer", lambda values: values + 1, "layer/c/0 says [1, 2, 3], but the layout says [0, 1, 2]"),
    ],
)
def test_a_plan_that_decodes_and_cannot_be_true_is_named(
    whole_copy: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    change_values(whole_copy, name, change)
    faults = verify(CaptureGroup(whole_copy, "fake")).plan
    assert any(fault.startswith(message) for fault in faults), faults


def codecs_of(data: bytes) -> Any:
    return json.loads(data)["codecs"]


def changed_sharding(**facts: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        sharding = codecs_of(data)[0]
        return changed_record(codecs=[sharding | {"configuration": sharding["configuration"] | facts}])(data)

    return change


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("expert", changed_sharding(index_location="start"), "codecs"),
        ("token", changed_sharding(chunk_shape=[2, 8]), "codecs"),
        ("weight", changed_sharding(codecs=[{"name": "bytes", "configuration": {"endian": "big"}}]), "codecs"),
        ("weight", changed_sharding(index_codecs=[{"name": "bytes"}]), "codecs"),
        ("length", lambda data: changed_record(codecs=codecs_of(data)[:-1])(data), "codecs"),
        ("name", changed_record(chunk_key_encoding={"name": "v2"}), "chunk_key_encoding"),
        (
            "offset",
            changed_record(chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}),
            "chunk",
        ),
        ("offset", changed_record(shape=[18]), "[18], but [17] are planned"),
        ("expert", changed_record(shape=[20, 8, 3, 2]), "[20, 8, 3, 2], but [17, 8, 3, 2] are planned"),
        ("piece", changed_record(shape=[1001]), "[1001], but [1000] are planned"),
        ("offset", changed_record(codecs=[{}]), "cannot be read"),
        ("offset", changed_record(codecs=[{"name": "bytes", "configuration": [1]}]), "cannot be read"),
    ],
)
def test_a_description_that_would_be_read_otherwise_is_named(
    whole_copy: Path, name: str, how: Callable[[bytes], bytes], message: str
) -> None:
    damage(whole_copy, f"{name}/zarr.json", how)
    faults = verify(CaptureGroup(whole_copy, "fake")).plan
    message = message if message.startswith("cannot") else f"says {message}"
    assert [fault.startswith(f"{name}/zarr.json {message}") for fault in faults] == [True], faults


def test_a_description_that_another_zarr_words_differently_is_the_same(whole_copy: Path) -> None:
    def worded(data: bytes) -> bytes:
        configuration = codecs_of(data)[0]["configuration"]
        inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "blosc"}, "crc32c"]
        short = {"chunk_shape": configuration["chunk_shape"], "codecs": inner}
        short["index_codecs"] = ["bytes", {"name": "crc32c", "configuration": {}}]
        sharding = {"name": "sharding_indexed", "configuration": short}
        return changed_record(codecs=[sharding], chunk_key_encoding={"name": "default"})(data)

    for name in ("expert", "weight", "token"):
        damage(whole_copy, f"{name}/zarr.json", worded)
    assert verify(CaptureGroup(whole_copy, "fake")) == Findings(shards={}, plan=[])


@pytest.mark.parametrize("name", ["expert", "token", "piece"])
def test_an_arrays_description_is_part_of_the_plan(whole_copy: Path, name: str) -> None:
    key = f"{name}/zarr.json"
    right = (whole_copy / "fake" / key).read_bytes()
    for change, message in {
        "deleted": f"{key} is gone",
        "cut": f"{key} cannot be read",
        "of another type": f"{key} says data_type int8, but the layout says ",
        "of another shape": f"{key} says [1",
    }.items():
        (whole_copy / "fake" / key).write_bytes(right)
        changes: dict[str, Callable[[bytes], bytes | None]] = {
            **DAMAGE,
            "of another type": changed_record(data_type="int8"),
            "of another shape": changed_record(shape=[1, *json.loads(right)["shape"][1:]]),
        }
        damage(whole_copy, key, changes[change])
        faults = verify(CaptureGroup(whole_copy, "fake")).plan
        assert faults[0].startswith(message), faults


def test_a_capture_with_speakers_is_verified_with_them(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": words(20)}, {"role": "assistant", "content": words(9)}]
    fake_capture(tmp_path / "s.zarr", [talk], layout=fake_layout(roles=("system", "user", "assistant")))
    group = CaptureGroup(tmp_path / "s.zarr", "fake")
    assert verify(group) == Findings(shards={}, plan=[])
    damage(tmp_path / "s.zarr", "role/c/0/0", DAMAGE["with a bit flipped"])
    assert [fault.partition(" ")[0] for fault in verify(group).plan] == ["role/c/0/0"]


def test_a_capture_that_is_still_planned_is_verified_as_far_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 32)
    put_over = LocalObjects.put_over

    def killed(objects: LocalObjects, key: str, old: bytes, data: bytes) -> bool:
        if key == "fake/offset/zarr.json" and CaptureGroup(tmp_path / "s.zarr", "fake").plan.rows:
            raise KeyboardInterrupt
        return put_over(objects, key, old, data)

    monkeypatch.setattr(LocalObjects, "put_over", killed)
    with pytest.raises(KeyboardInterrupt):
        fake_capture(tmp_path / "s.zarr", TEXTS)
    assert verify(CaptureGroup(tmp_path / "s.zarr", "fake")) == Findings(shards={}, plan=[])


# --- The command ------------------------------------------------------------------------------------------------


def test_status_verify_names_exactly_the_wrong_shards_and_ends_with_1_until_they_are_healed(
    store: Path | str, command: Command
) -> None:
    assert command(store, "--verify", main=status.main).status == 0
    for shard in (1, 3):
        damage(store, f"expert/c/{shard}/0/0/0", DAMAGE["with a bit flipped"])
    assert command(store, main=status.main).status == 0  # lengths do not tell
    ran = command(f"{store}/fake", "--verify", main=status.main)
    assert ran.status == 1
    named = [line.partition(":")[2].strip() for line in ran.out.splitlines() if "failed verification" in line]
    assert [line.partition(":")[0] for line in named] == ["shard 1 failed verification", "shard 3 failed verification"]
    assert "missing shards: 1, 3" in ran.out
    assert command(store, main=status.main).status == 1  # it is noted
    fake_capture(store, TEXTS)
    assert command(store, "--verify", main=status.main).status == 0


def test_status_verify_tells_what_to_do_about_a_damaged_plan(whole_copy: Path, command: Command) -> None:
    damage(whole_copy, "token/c/2/0", DAMAGE["with a bit flipped"])
    ran = command(whole_copy, "--verify", main=status.main)
    assert ran.status == 1
    assert "fake: the plan is damaged: token/c/2/0 cannot be decoded" in ran.err
    assert "remove the folder fake and capture it again" in ran.err


def test_status_tells_who_captures_now_and_what_is_in_quarantine(store: Path | str, command: Command) -> None:
    group = CaptureGroup(store, "fake")
    group.discard(2)
    group.quarantine(2, {"strikes": 3, "errors": ["RoutingError: layer 3\nand more"], "documents": ["a", "b"]})
    with lease(group):
        ran = command(store, main=status.main)
    assert ran.status == 1
    assert "in quarantine: 2 (RoutingError: layer 3)" in ran.out
    assert "and more" not in ran.out
    assert "fake: being captured by process " in ran.err
    assert "being captured" not in command(store, main=status.main).err
