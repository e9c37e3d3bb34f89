"""Bad input by the hundred: always a clear error or a right result; never a hang, a bare traceback or a wrong store.

Each test draws damaged input and compares the outcome with an oracle that does not use the tested code. A hang is
stopped by the suite's timeout. `EXAMPLES=50` draws fifty times as many examples, different ones each time.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
import yaml
from fake_model import TEXTS, fake_capture, fake_layout
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from more import MORE
from patience import HUNG_S

from analysis.explorer.live import Explorer
from analysis.explorer.site import site
from analysis.metrics.choices import Choices
from analysis.metrics.load import Load
from analysis.results import measure
from jobs import capture, compare, explore, quantize, query, report, resubmit, status, train_tiny, validate
from jobs.capturing.options import CaptureConfig
from jobs.capturing.planner import Planner
from jobs.console.terminal import run_job
from jobs.sources.refused import COMPRESSED, MARKS, REFUSED, TABLES
from jobs.sources.resolve import resolve_source
from store import CaptureGroup, coverage, open_capture
from store import lease as leases
from store.names import beside
from store.verification import verify
from workers.text.tokenizer import TextTokenizer, load_tokenizer
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.timeout(3 * HUNG_S * MORE), pytest.mark.filterwarnings("default")]

CLEAR = (ValueError, OSError, RuntimeError)  # what `jobs.console.terminal.run_job` makes one line of
UNCLEAR = (RecursionError, NotImplementedError, UnicodeError)  # though they are of those classes
VAGUE = ("embedded null byte", "could not convert", "invalid literal", "out of range", "maximum recursion")
"""Python's own messages about a value, which do not name it."""


def fuzzed(examples: int) -> Any:
    """A number of examples in the suite, more if requested."""
    return settings(max_examples=examples * MORE)


def costly(examples: int) -> Any:
    """The same for examples that take a second each: failures are shown as found."""
    return settings(fuzzed(examples), phases=[Phase.explicit, Phase.generate])


def told(work: Callable[[], Any]) -> Any:
    """The result of the work; None if it is rejected, which must have a clear message."""
    found, refused = attempt(work)
    assert not isinstance(refused, UNCLEAR), repr(refused)
    if refused is not None:
        clear(str(refused))
    return found


def attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of the work, or the error."""
    try:
        return work(), None
    except CLEAR as error:
        return None, error


def clear(message: str) -> None:
    """A message must not be empty, and must say more than Python's own."""
    assert message.strip()
    assert not any(vague in message for vague in VAGUE), message
    assert "Traceback" not in message


def ran(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
    """Status, output and errors of a job, run like its script; uncaught errors are raised."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["job", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_job(main)
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code in (0, 1, 2, 3), (code, err.getvalue())
    said = err.getvalue() + out.getvalue()
    assert code == 0 or said.strip()
    assert "Traceback" not in said
    for line in said.splitlines():
        if line.startswith("error: "):
            clear(line)
    return code, out.getvalue(), err.getvalue()


# --- The text path ----------------------------------------------------------------------------------------

ODD = (
    *("\ufeff", "\r\n", "\r", "\x00", "\x1a", "\u2028", "\ufffd", "é", "e\u0301", "🙂", "▁"),
    *("<s>", "</s>", " ", "\ufdd0", "\U0010ffff"),
)
TEXT = st.text(max_size=40) | st.lists(st.sampled_from([*ODD, "word ", "another"]), max_size=12).map("".join)
BYTES = st.binary(max_size=60) | TEXT.map(lambda text: text.encode()) | st.sampled_from(
    [b"", b"\xef\xbb\xbf", b"\xff\xfeh\x00i\x00", b"\xed\xa0\x80", b"\xc3", b"a" * 70_000, b"a b " * 9_000, b"\n" * 500]
)  # fmt: skip


@cache
def tokenizer() -> TextTokenizer:
    return load_tokenizer(tiny_checkpoint())


def planned(place: Path, store: Path) -> tuple[CaptureGroup, list[str], list[list[int]]]:
    """A planned data set: the group, and each document's name and tokens, joined from its rows."""
    source = resolve_source(str(place))
    layout = fake_layout(vocab_size=tokenizer().vocab_size, sequence_length=64, rows_per_shard=64)
    group = CaptureGroup.create(store, source.name, layout=layout, identity={}, attrs={}, pieces=["a"])
    Planner(group, source, tokenizer()).run()
    plan = group.plan
    names = group.values("name", 0, plan.documents).tolist() if plan.documents else []
    documents: list[list[int]] = [[] for _ in names]
    if plan.rows:
        columns = [group.values(name, 0, plan.rows) for name in ("token", "length", "document_id", "offset")]
        for token, length, document, offset in zip(*columns, strict=True):
            assert offset == len(documents[document]), "rows follow one another"
            documents[document] += token[:length].tolist()
    return group, names, documents


STARTS = (*COMPRESSED.values(), *TABLES.values(), *MARKS, *(start for kind in REFUSED for start in kind.starts))
"""First bytes of other formats."""


@fuzzed(15)
@given(st.dictionaries(st.sampled_from(["a", "b.txt", "c.md", "nested/d"]), BYTES, min_size=1))
@example({"a": b"\xef\xbb\xbf"})
@example({"a": b"x" * 8192 + b"\0"})
def test_of_any_bytes_every_character_is_planned_or_the_file_refused_by_name(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder, "texts") / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder, "texts") / name).write_bytes(data)
        binary = [name for name, data in files.items() if b"\0" in data[:8192] or data.startswith(STARTS)]
        pages = [name for name, data in files.items() if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in b"<{"]
        done, refused = attempt(lambda: planned(Path(folder, "texts"), Path(folder, "s.zarr")))
        if refused is not None:
            assert any(name in str(refused) for name in [*binary, *pages]), refused
            return
        assert not binary
        group, names, documents = done
        texts = [files[name].removeprefix(b"\xef\xbb\xbf").decode(errors="replace") for name in sorted(files)]
        assert names == sorted(files)
        assert documents == [ids.tolist() for ids in tokenizer().encode_batch(texts)]
        damaged = sum(not valid(data) for data in files.values())
        plan = group.plan
        assert (plan.documents_repaired, plan.documents_empty) == (damaged, documents.count([]))
        assert plan.tokens == sum(map(len, documents))


def valid(data: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return bool(data.decode()) or True
    return False


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


STRANGE_LINES = (
    *(
        '{"text": "\\ud800 lone"}',
        '{"text": "\\ud83d\\ude42"}',
        '{"text": "a\\u0000b"}',
        '{"text": NaN}',
        '{"text": 1e999}',
    ),
    *('{"text": ' + "9" * 5000 + "}", '{"text": "twice", "text": "second"}', '{"text": "' + "long " * 5000 + '"}'),
    *('{"text": "x", "id": ' + deep(900) + "}", '{"text": ' + deep(900) + "}", deep(100_000), "{" * 2000),
    *("", " ", "null", "[]", '"x"', "\x0b", "\x1c"),
)
LINE = st.one_of(
    st.fixed_dictionaries({"text": TEXT | st.none()}, optional={"id": TEXT | st.integers()}).map(json.dumps),
    st.fixed_dictionaries({"text": st.text() | st.integers()}, optional={"title": st.text()}).map(json.dumps),
    TEXT,
    st.sampled_from(STRANGE_LINES),
).map(lambda line: line.encode(errors="surrogatepass"))
LINES = st.lists((LINE | st.binary(max_size=20)).filter(lambda line: b"\n" not in line), max_size=6)


def json_documents(data: bytes) -> list[tuple[str, bool]] | None:
    """The text of each line and whether it was damaged; None if it is not a line."""
    found = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip(b" \t\r\n\x0b\x0c"):
            continue
        try:
            values = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            return None
        text = values.get("text", 0) if isinstance(values, dict) else 0
        if not isinstance(text, str | None):
            return None
        clean = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found.append((clean, not valid(line) or clean != (text or "")))
    return found


@fuzzed(25)
@given(LINES, st.sampled_from([b"\n", b"\r\n", b"\n\n"]), st.booleans(), st.booleans())
@example([b""], b"\n", True, False)
@example([deep(100_000).encode()], b"\n", False, False)
@example([b'{"text": "a", "id": ' + deep(940).encode() + b"}"], b"\n", False, False)
def test_of_any_lines_every_text_is_planned_or_the_line_refused_by_number(
    lines: list[bytes], end: bytes, mark: bool, packed: bool
) -> None:
    data = b"\xef\xbb\xbf" * mark + end.join(lines) + end * bool(lines)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "t.jsonl.gz" if packed else "t.jsonl")
        place.write_bytes(gzip.compress(data, 1) if packed else data)
        wanted = json_documents(data)
        done, refused = attempt(lambda: planned(place, Path(folder, "s.zarr")))
        if refused is not None:
            clear(str(refused))
            assert "t.jsonl" in str(refused), refused
            assert not wanted, "documents were refused"
            return
        group, _, documents = done
        assert wanted is not None, "a line that is no document was taken"
        assert documents == [ids.tolist() for ids in tokenizer().encode_batch([text for text, _ in wanted])]
        assert group.plan.documents_repaired == sum(damaged for _, damaged in wanted)


def test_lines_that_are_documents_are_not_refused() -> None:
    lines = [json.dumps({"text": text, "id": text}) for text in [*ODD, "", "x" * 100_000, "\ud800"]]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "t.jsonl")
        place.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
        _, _, documents = planned(place, Path(folder, "s.zarr"))
        assert len(documents) == len(lines)


ROLE = st.sampled_from(["user", "assistant", "system", "tool", "", "User", "\ud800"]) | st.integers()
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLE, "content": TEXT | st.none() | st.lists(st.text(max_size=3))}
)


@fuzzed(25)
@given(st.lists(MESSAGE | st.text(max_size=3), max_size=5))
@example([{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDF0)))}])
@example([{"role": "user", "content": " \u2028<s>[INST] "}, {"role": "assistant", "content": ""}])
def test_any_conversation_is_planned_with_a_role_for_each_token_or_refused(messages: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "t.jsonl")
        place.write_text(
            json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n" + json.dumps({"messages": messages})
        )
        source = resolve_source(str(place))
        found = told(lambda: list(source.documents()))
        if found and found[1].messages:
            encoded = told(lambda: tokenizer().chat(found[1].messages))
            assert encoded is None or len(encoded[0]) == len(encoded[1])


PARQUET = """
import faulthandler, json, random, sys, warnings
from pathlib import Path
faulthandler.enable()
warnings.simplefilter("error")
from jobs.sources.resolve import resolve_source
good, place, seed, number = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chooser, refused = random.Random(seed), 0
for _ in range(number):
    damaged = bytearray(good)
    for _ in range(chooser.choice((1, 1, 2, 8))):
        of = chooser.choice((len(good), 600))  # most of a small file's faults are told by its end
        at = len(good) - 1 - chooser.randrange(min(of, len(good)))
        damaged[at] = chooser.choice((0, 255, damaged[at] ^ 1 << chooser.randrange(8), chooser.randrange(256)))
    place.write_bytes(damaged[: chooser.choice((None, None, None, chooser.randrange(len(good))))])
    try:
        documents = list(resolve_source(str(place)).documents())
    except ValueError as error:
        assert place.name in str(error), error
        refused += 1
    else:
        assert all(isinstance(document.text, str) for document in documents)
print(refused)
"""
"""Code for a separate process: a parser that crashes or uses all memory is found too."""


def test_a_damaged_parquet_file_is_read_or_refused_by_name_and_crashes_nothing(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": ["one two", "", None, "drei"] * 50, "id": list(map(str, range(200)))}), good)
    seed = "1" if os.environ.get("CI") == "true" else str(int.from_bytes(os.urandom(3)))
    script = ["bash", "-c", 'ulimit -v 16000000; exec "$@"', "-", sys.executable, "-c", PARQUET, good, bad, seed]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(
        [*script, str(80 * MORE)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HUNG_S * MORE
    )
    assert done.returncode == 0, (seed, done.stderr[-3000:])
    assert int(done.stdout) > 10


def test_a_column_whose_name_is_no_text_is_refused_by_the_file_s_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "t.parquet", store_schema=False)
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes().replace(b"text", b"te\xfft"))
    with pytest.raises(ValueError, match=r"cannot read .*t\.parquet as parquet"):
        resolve_source(str(tmp_path / "t.parquet"))


# --- The store --------------------------------------------------------------------------------------------

ARRAYS = ("expert", "weight", "token", "length", "document_id", "offset", "name", "piece", "layer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of five shards, to be copied and damaged."""
    path = tmp_path_factory.mktemp("fuzz") / "s.zarr"
    assert fake_capture(path, TEXTS).complete
    return path


@contextlib.contextmanager
def copied(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(whole, Path(folder, "s.zarr")))


HUGE = st.sampled_from(
    [
        10**30,
        2**63,
        2**32,
        2**31,
        65_536,
        -1,
        0,
        1e308,
        1e999,
        -0.5,
        "9" * 300,
        "",
        "\ud800",
        "a\0b",
        "../x",
        [],
        {},
        True,
    ]
)
JSON = st.recursive(
    HUGE | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
DEEP = ("bytes", deep(100_000).encode())
DAMAGE = st.one_of(
    st.just(DEEP),
    st.tuples(st.just("bytes"), st.binary(max_size=40)),
    st.tuples(st.just("json"), JSON),
    st.tuples(st.just("field"), st.integers(0, 500), JSON),
    st.tuples(st.just("field"), st.integers(0, 500), HUGE),
    st.tuples(st.just("without"), st.integers(0, 500)),
    st.tuples(st.just("cut"), st.integers(0, 3000)),
    st.tuples(st.just("flip"), st.integers(0, 30_000)),
)


def put(*place_and_value: Any) -> tuple[Any, ...]:
    """A named damage, for faults found earlier: another value at a place."""
    return ("put", *place_and_value)


def damaged(data: bytes, how: tuple[Any, ...]) -> bytes:
    """A record with one thing about it changed."""
    match how:
        case "bytes", other:
            return bytes(other)
        case "json", value:
            return json.dumps(value).encode()
        case "cut", size:
            return data[: size % (len(data) + 1)]
        case "flip", bit:
            return bytes(byte ^ (at == bit // 8 % len(data)) << bit % 8 for at, byte in enumerate(data))
    record = json.loads(data)
    if how[0] == "put":
        *path, last, value = how[1:]
        functools.reduce(lambda inside, key: inside[key], path, record)[last] = value
        return json.dumps(record).encode()
    inside, key = places(record)[how[1] % len(places(record))] if places(record) else ({"": 0}, "")
    if how[0] == "without":
        del inside[key]
    else:
        inside[key] = how[2]
    return json.dumps(record).encode()


def places(record: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON document that holds a value."""
    own = list(record) if isinstance(record, dict) else range(len(record)) if isinstance(record, list) else []
    return [place for key in own for place in ((record, key), *places(record[key]))]


RECORDS = {
    "expert/commits/0.json": None,
    "expert/commits/4.json": None,
    "token/plan.json": None,
    "expert/environment.json": None,
    "expert/commits/007.json": b"{}",
    "expert/commits/99999999999999999999.json": b"{}",
    "expert/faults/1.json": b'{"reason": "damaged", "commit_crc32c": 1}',
    "expert/quarantine/1.json": b'{"errors": ["RoutingError: a", "b"], "documents": ["x", "y"]}',
    "token/lease.json": json.dumps({**leases._holder(), "process": 2**22 + 1, "process_start": "1"}).encode(),
}
"""Records of a group, and the content of missing ones."""


def same(found: Any, wanted: Any) -> bool:
    """Whether two opened captures are equal."""
    return all(
        found[name].dtype == wanted[name].dtype and np.array_equal(found[name].values, wanted[name].values)
        for name in ARRAYS
    )


def holds(store: Path, wanted: Path) -> None:
    """Every report about a store is true or a clear error."""
    state = told(lambda: coverage(store, "fake"))
    for more in ([], ["--json"], ["--verify"]):
        ran(status.main, store, *more)
    opened = told(lambda: open_capture(store, "fake", allow_incomplete=True).load())
    found = told(lambda: verify(CaptureGroup(store, "fake")))
    if opened is None or found is None or found.plan:
        return
    committed = opened["captured"].values
    right = open_capture(wanted, "fake").load()
    assert len(committed) == right.sizes["doc"], "rows are gone, and nobody says so"
    ok = committed & ~np.isin(np.arange(len(committed)) // 4, list(found.shards))
    for name in ("expert", "weight"):
        np.testing.assert_array_equal(opened[name].values[ok], right[name].values[ok])
    if state is not None and state.complete and not found.shards:
        assert same(opened, right)


@pytest.mark.slow
@costly(10)
@given(st.sampled_from(sorted(RECORDS)), DAMAGE)
@example("token/plan.json", put("rows", 10**12))  # searched for a trillion shards
@example("token/plan.json", put("tokens", "../x"))
@example("token/plan.json", put("documents", None))
@example("token/plan.json", ("json", {}))  # was a plan of no rows
@example("expert/commits/4.json", put("seconds", "x"))
@example("expert/commits/4.json", put("expert", "sha256", 2**32))
@example("expert/commits/4.json", put("expert", [1]))
@example("expert/quarantine/1.json", put("errors", 5))
@example("expert/commits/4.json", DEEP)
@example("expert/quarantine/1.json", DEEP)
@example("token/plan.json", DEEP)
@example("token/lease.json", DEEP)
@example("token/lease.json", put("renewed", "x"))
@example("token/lease.json", put("process", "../../etc/passwd"))
def test_of_any_record_a_capture_is_healed_to_what_it_was_or_refused_in_words(
    whole: Path, name: str, how: tuple[Any, ...]
) -> None:
    with copied(whole) as store, mock.patch.object(leases, "RENEW_S", 0.01):
        file = store / "fake" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(damaged(RECORDS[name] or file.read_bytes(), how))
        if "quarantine" in name:
            (store / "fake/expert/commits/1.json").unlink()
        holds(store, whole)
        state = told(lambda: fake_capture(store, TEXTS))
        if state is not None and state.complete:
            again = told(lambda: open_capture(store, "fake").load())
            if again is not None and not verify(CaptureGroup(store, "fake")).plan:
                assert same(again, open_capture(whole, "fake").load())


@costly(8)
@given(st.sampled_from(["zarr.json", *(f"{name}/zarr.json" for name in ARRAYS)]), DAMAGE)
@example("zarr.json", DEEP)
@example("expert/zarr.json", DEEP)
@example("zarr.json", ("json", 1))
@example("zarr.json", put("attributes", "identity", 1))
@example("zarr.json", put("attributes", "layers", 3.5))
@example("zarr.json", put("attributes", "sequence_length", [1]))
@example("zarr.json", put("attributes", "vocab_size", 10**30))  # searched for as many pieces
@example("zarr.json", put("attributes", "rows_per_shard", 2**31 - 1))
@example("zarr.json", put("attributes", "special_token_ids", 2**32))
@example("zarr.json", put("attributes", {"schema_version": 1}))
@example("expert/zarr.json", put("chunk_grid", "configuration", "chunk_shape", [[1]]))
@example("token/zarr.json", put("attributes", [True, 65_536]))  # "list index out of range"
@example("piece/zarr.json", put("shape", [136]))  # tokens had no piece
@example("layer/zarr.json", put("shape", [2]))
@example("name/zarr.json", put("shape", [5]))
@example("token/zarr.json", put("data_type", "uint32"))  # was silently read as other tokens
def test_of_any_attributes_a_capture_reads_as_it_was_or_is_refused_in_words(
    whole: Path, name: str, how: tuple[Any, ...]
) -> None:
    with copied(whole) as store:
        file = store / "fake" / name
        file.write_bytes(damaged(file.read_bytes(), how))
        holds(store, whole)
        for question in (["--token_id", 5], ["--expert", "1:3"], ["--document", 2]):
            ran(query.main, f"{store}/fake", *question)
        ran(explore.main, store, "--export", store.parent / "page.html", "--document", 2)
        state = told(lambda: fake_capture(store, TEXTS))
        if state is not None and state.complete:
            holds(store, whole)


@costly(4)
@given(DAMAGE)
@example(DEEP)
def test_of_any_root_the_store_is_listed_or_refused_in_words(whole: Path, how: tuple[Any, ...]) -> None:
    with copied(whole) as store:
        (store / "zarr.json").write_bytes(damaged((store / "zarr.json").read_bytes(), how))
        holds(store, whole)
        told(lambda: fake_capture(store, TEXTS))


# --- What is kept beside a store --------------------------------------------------------------------------


def saved(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


PLAIN = io.BytesIO()
np.save(PLAIN, np.arange(3))
KEPT = DAMAGE.filter(lambda how: how[0] in ("bytes", "cut", "flip")) | st.just(("bytes", PLAIN.getvalue()))


@costly(12)
@given(st.integers(0, 99), KEPT)
@example(0, ("bytes", PLAIN.getvalue()))  # one array, where several are kept
@example(0, ("bytes", saved(other=np.arange(3))))
@example(0, ("bytes", saved(count=np.array([{"a": 1}], dtype=object))))  # a pickle
def test_a_damaged_answer_is_counted_again(whole: Path, number: int, how: tuple[Any, ...]) -> None:
    with copied(whole) as store:
        wanted = measure(store, "fake", [Load(), Choices()])
        kept = sorted(Path(beside(store)).rglob("*.npz"))
        assert len(kept) == 2
        file = kept[number % 2]
        file.write_bytes(damaged(file.read_bytes(), how))
        found = measure(store, "fake", [Load(), Choices()])
        assert all(one.identical(other) for one, other in zip(found, wanted, strict=True))


# --- The explorer's addresses -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The address of an explorer whose log lines are kept."""
    explorer = Explorer(str(whole), ["fake"], tmp_path_factory.mktemp("index"))
    explorer.refresh("fake")
    assert not explorer.problems
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(site(explorer), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(HUNG_S)
    listener.close()


NUMBER = st.sampled_from(
    ["0", "1", "5", "255", "256", "999", "65536", "-1", "x", "1e3", "٣", "1_0", "+1", "%00", "%0d%0aX:1", "",
     "9" * 15, "9" * 16, "9" * 5000]
)  # fmt: skip
NAME = st.sampled_from(
    ["fake", "document", "token", "expert", "place", "search", "export", "explorer.js", "..", "%2e%2e", "%ff",
     "fake%00", "%2F", ""]
)  # fmt: skip
PART = NUMBER | NAME | st.text(max_size=6).map(quote)
ADDRESS = st.one_of(
    st.tuples(NUMBER, NUMBER).map(lambda two: f"/fake/expert/{two[0]}/{two[1]}"),
    NUMBER.map(lambda number: f"/fake/token/{number}"),
    NUMBER.map(lambda number: f"/fake/document/{number}"),
    NUMBER.map(lambda number: f"/fake/document/{number}/export"),
    st.sampled_from(["/fake", "/fake/search", "/fake/place", "/", "/state.json"]),
    st.lists(PART, max_size=5).map(lambda parts: "/" + "/".join(parts)),
)
KEY = st.sampled_from(["page", "layer", "expert", "row", "position", "q", "token", "x"])
VALUE = st.sampled_from(["%ff", "%ED%A0%80", "a" * 9000, "&&", "%", "=", "%3Cscript%3E"])
ASKED = st.lists(st.tuples(KEY, NUMBER | VALUE | st.text(max_size=6).map(quote)).map("=".join), max_size=4).map(
    "&".join
)


def answer(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=HUNG_S) as connection:
        connection.sendall(request)
        found = b""
        while block := connection.recv(65_536):
            found += block
    return found


@fuzzed(200)
@given(ADDRESS, ASKED)
@example("/fake/token/5", "layer=1&expert=999999999999999")
@example("/fake/document/" + "9" * 5000, "page=0")
def test_every_address_is_answered_and_none_is_a_failure_of_the_server(port: int, address: str, asked: str) -> None:
    head, _, page = answer(port, request(f"{address}?{asked}", "localhost")).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"200", b"307", b"400", b"404"), head
    assert b"Traceback" not in page
    if b"text/html" in head:
        assert b"default-src 'none'" in head, "each page has its policy"


def request(address: str, host: str) -> bytes:
    return f"GET {address} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode(errors="replace")


@fuzzed(60)
@given(st.binary(max_size=200) | st.builds(request, ADDRESS, st.text(max_size=20)))
def test_what_is_no_request_stops_nothing(port: int, sent: bytes) -> None:
    with contextlib.suppress(TimeoutError, ConnectionError):
        connection = socket.create_connection(("127.0.0.1", port), timeout=1)
        with connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65_536)
    assert answer(port, request("/", "localhost")).startswith(b"HTTP/1.1 200 ")


# --- The command line -------------------------------------------------------------------------------------

JOBS: dict[str, tuple[Any, Any]] = {
    "capture": (capture, CaptureConfig),
    "compare": (compare, compare.CompareConfig),
    "explore": (explore, explore.ExploreConfig),
    "quantize": (quantize, quantize.QuantizeConfig),
    "query": (query, query.QueryConfig),
    "report": (report, report.ReportConfig),
    "resubmit": (resubmit, resubmit.ResubmitConfig),
    "status": (status, status.StatusConfig),
    "train_tiny": (train_tiny, train_tiny.TrainConfig),
    "validate": (validate, validate.ValidateConfig),
}
VALUES = [
    *(
        "",
        "-1",
        "0",
        "1",
        "2",
        "nan",
        "inf",
        "1e999",
        "9" * 30,
        "9" * 5000,
        "\udcff",
        "../x",
        "/",
        ".",
        "~",
        "--",
        "*",
        "[",
    ),
    *("s3://", "s3://b", "http://x", "gs://a/b", "http://u:p@h/x?y", "demo:nothing", "org/name", "org/name:c"),
    *("t.txt", "c.jsonl", "y.yaml", "folder", "s.zarr", "s.zarr/fake", "s.zarr/nope", "/dev/null", "no/such", "a b"),
    *("notebook", "1:3", "1:99", "٣:٣", "x" * 300, "\x1b[31m", "%s", "none", "nf4", "cpu", "auto", "true"),
    *("\u2215etc", "．．/x", "{0}", "▁1", "5"),
]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A job, and a command line of its own options with values of other options."""
    job = draw(st.sampled_from(sorted(JOBS)))
    options = [field.name for field in dataclasses.fields(JOBS[job][1])]
    words = draw(st.lists(st.sampled_from(["s.zarr", "s.zarr/fake", "t.txt"]) | st.sampled_from(VALUES), max_size=2))
    for option in draw(st.lists(st.sampled_from(options), max_size=4)):
        value = draw(st.sampled_from(VALUES))
        words += draw(st.sampled_from([[f"--{option}={value}"], [f"--{option}", value], [f"--{option}"]]))
    return job, words


@pytest.fixture(scope="module")
def place(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of the jobs: a store and a few files, without a network or other processes."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(whole, folder / "s.zarr")
    (folder / "folder").mkdir()
    (folder / "t.txt").write_text("one two three")
    (folder / "c.jsonl").write_text('{"text": "a"}\n')
    (folder / "y.yaml").write_text("dataset: t.txt\nstore: y.zarr\n")
    nothing: dict[str, Any] = {
        "huggingface_hub.HfApi.dataset_info": {"side_effect": ConnectionError("no hub here")},
        "huggingface_hub.snapshot_download": {"side_effect": OSError("no hub here")},
        "uvicorn.Server.run": {},
        "jobs.cluster.connection.connection": {"side_effect": ValueError("no Ray cluster here")},
        "jobs.resubmit.connect": {"side_effect": ValueError("no head here")},
        "jobs.train_tiny.text_rows": {"side_effect": ValueError("no training here")},
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        for name, how in nothing.items():
            stack.enter_context(mock.patch(name, **how))
        yield folder


@fuzzed(45)
@given(command_lines())
@example(("capture", ["--local", "--config=--"]))
@example(("capture", ["--local", "--dataset=t.txt", "--gpus_per_worker=nan", "--print_config"]))
@example(("report", ["s.zarr", "-o", "\udcff.html"]))
@example(("status", ["s.zarr/\x1b[31m"]))
def test_any_command_line_ends_with_a_status_and_a_message(place: Path, line: tuple[str, list[str]]) -> None:
    job, words = line
    ran(JOBS[job][0].main, *words)


CONFIG_VALUE = st.recursive(
    st.sampled_from(VALUES) | st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
OPTIONS = sorted(field.name for field in dataclasses.fields(CaptureConfig))
YAML = [
    *OPTIONS,
    ": ",
    "- ",
    "\n",
    "&a ",
    "*a ",
    "{",
    "[",
    "'",
    "|",
    "? ",
    "<<",
    "\t",
    "\0",
    "!!python/object/apply:os.abort []",
]
CONFIG = st.one_of(
    st.dictionaries(st.sampled_from(OPTIONS), CONFIG_VALUE, max_size=4).map(yaml.safe_dump).map(str.encode),
    st.dictionaries(st.sampled_from([*OPTIONS, "no-such", "<<", "1"]), CONFIG_VALUE).map(json.dumps).map(str.encode),
    st.lists(st.sampled_from(YAML)).map("".join).map(str.encode),
    st.binary(max_size=30),
)
BOMB = "store:\n  - &x0 [a, a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"  - &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@fuzzed(60)
@given(CONFIG)
@example(BOMB.encode())  # a billion letters when expanded
@example(b"[" * 5000)
@example(b'store: "a\\0b"\ndataset: t.txt')
@example(b'store: "\\ud800"\ndataset: t.txt')
@example(b"store: !!python/object/apply:os.abort []")
def test_any_configuration_file_is_taken_whole_or_refused_by_name(place: Path, content: bytes) -> None:
    (place / "any.yaml").write_bytes(content)
    code, out, err = ran(capture.main, "--config", "any.yaml", "--print_config")
    if code:
        assert "any.yaml" in err or "--" in err + out
    else:
        (place / "printed.yaml").write_text(out, encoding="utf-8")
        assert ran(capture.main, "--config", "printed.yaml", "--print_config")[1] == out


@pytest.mark.parametrize("store", ['"a\\0b"', '"\\ud800"'])
def test_a_store_that_no_path_can_name_is_refused_by_its_name(place: Path, store: str) -> None:
    (place / "any.yaml").write_text(f"store: {store}\ndataset: t.txt\nmodel: tiny\nlocal: true\n")
    code, _, err = ran(capture.main, "--config", "any.yaml", "--device=cpu", "--quantization=none")
    assert code == 2
    assert "is not a valid path: a path holds no NUL and no lone surrogate" in err
