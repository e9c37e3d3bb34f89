"""The store: its layout on disk, its bytes, the order of durability, and what readers learn."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from fake_model import (
    TEXTS,
    FakeEngine,
    FakeRun,
    fake_capture,
    fake_choice,
    fake_layout,
    store_files,
    text_source,
    word_id,
    words,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from patience import wait_until

from analysis.metrics.load import expert_load
from jobs.capturing import planner as planning
from jobs.capturing.planner import Planner
from store import CaptureGroup, Layout, coverage, dataset_names, lease, open_capture, open_tree, planned
from store import layout as layout_module
from store import objects as objects_module
from store.group import VOID
from store.identity import identity_hash
from store.layout import ROW_CHUNK, SHARD_CHOICES, SHARD_TOKENS, ArraySpec, default_rows_per_shard
from store.objects import LocalObjects
from store.plan import Plan, Rows
from workers.shard import Routes, capture_shard

ROWS = [math.ceil(len(text.split()) / 8) for text in TEXTS]  # 17 in all: five shards of 4, the last one clipped
CHUNK_BYTES = 2**21


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "routes.zarr"
    fake_capture(path, TEXTS, "prose")
    fake_capture(path, TEXTS[:3], "code")
    return path


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """The store, to be damaged."""
    subprocess.run(["cp", "-r", store, tmp_path / "copy.zarr"], check=True)
    return tmp_path / "copy.zarr"


def new_group(path: Path, layout: Layout | None = None, **identity: Any) -> CaptureGroup:
    layout = layout or fake_layout()
    pieces = [f"w{number}" for number in range(layout.vocab_size)]
    return CaptureGroup.create(
        path, "fake", layout=layout, identity={"model": "fake"} | identity, attrs={}, pieces=pieces
    )


def planned_group(path: Path, layout: Layout | None = None, texts: Sequence[str] = TEXTS) -> CaptureGroup:
    run = FakeRun(path, layout)
    group = run.open_group("fake")
    Planner(group, text_source(texts), run.tokenizer).run()  # type: ignore[arg-type]
    return group


def choices(group: CaptureGroup, shard: int) -> tuple[Rows, Routes]:
    """A shard's rows and arbitrary choices for them, which do not matter to the store."""
    rows, layout = group.read_rows(shard), group.layout
    random = np.random.default_rng(shard)
    shape = (len(rows.length), layout.sequence_length, len(layout.layers), layout.experts_per_token)
    dtype = layout.arrays()["expert"].dtype
    expert = random.integers(0, layout.num_experts, shape).astype(dtype)
    return rows, {"expert": expert, "weight": random.random(shape).astype(np.float16)}


# --- Layout -----------------------------------------------------------------------------------------------


def codecs(array: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The array's own codec configuration (a sharding one unwrapped) and (name, configuration) of the inner ones."""
    outer = array["codecs"]
    inner = outer[0]["configuration"]["codecs"] if outer[0]["name"] == "sharding_indexed" else outer
    return outer[0], [(codec["name"], codec.get("configuration", {})) for codec in inner]


def test_the_arrays_have_the_published_dims_types_fills_and_codecs(store: Path) -> None:
    found = {
        name: json.loads((store / "prose" / name / "zarr.json").read_bytes())
        for name in ("expert", "weight", "token", "length", "document_id", "offset", "name", "piece", "layer")
    }
    routes, row = ["doc", "position", "layer", "k"], ["doc"]
    expected = {
        "expert": (routes, "uint8", 255, [17, 8, 3, 2], [4, 8, 3, 2], ("lz4", 5, "bitshuffle")),
        "weight": (routes, "float16", 0.0, [17, 8, 3, 2], [4, 8, 3, 2], ("zstd", 5, "shuffle")),
        "token": (["doc", "position"], "int32", -1, [17, 8], [4, 8], ("zstd", 3, "shuffle")),
        "length": (row, "int32", -1, [17], [ROW_CHUNK], ("zstd", 3, "shuffle")),
        "document_id": (row, "int64", -1, [17], [ROW_CHUNK], ("zstd", 3, "shuffle")),
        "offset": (row, "int32", -1, [17], [ROW_CHUNK], ("zstd", 3, "shuffle")),
        "name": (["document"], "string", "", [7], [ROW_CHUNK], ("zstd", 3, "noshuffle")),
        "piece": (["token_id"], "string", "", [1000], [ROW_CHUNK], ("zstd", 3, "noshuffle")),
        "layer": (["layer"], "int32", -1, [3], [3], None),
    }
    for name, (dims, dtype, fill, shape, grid, blosc) in expected.items():
        array = found[name]
        assert array["dimension_names"] == dims, name
        assert array["data_type"] == dtype, name
        assert array["fill_value"] == fill, name
        assert array["shape"] == shape, name
        assert array["chunk_grid"]["configuration"]["chunk_shape"] == grid, name
        outer, inner = codecs(array)
        assert (outer["name"] == "sharding_indexed") == (name in ("expert", "weight", "token")), name
        assert inner[-1][0] == "crc32c", name
        if blosc is None:
            assert [codec for codec, _ in inner] == ["bytes", "crc32c"]
        else:
            configuration = dict(inner[-2][1])
            assert (inner[-2][0], configuration["cname"], configuration["clevel"], configuration["shuffle"]) == (
                "blosc",
                *blosc,
            ), name
        units = array["attributes"].get("units")
        assert units == (None if name in ("name", "piece") else "token" if name in ("length", "offset") else "1"), name
        assert array["attributes"]["long_name"]


def test_no_codec_is_named_outside_zarrs_core_and_none_of_its_extensions(store: Path) -> None:
    core = {"sharding_indexed", "bytes", "blosc", "crc32c", "vlen-utf8"}  # vlen-utf8 as every Zarr 3 reader knows it
    for file in store.rglob("zarr.json"):
        array = json.loads(file.read_bytes())
        if array["node_type"] == "array":
            outer, inner = codecs(array)
            assert {outer["name"], *(name for name, _ in inner)} <= core, file


@given(
    sequence_length=st.integers(1, 5000),
    layers=st.integers(1, 64),
    k=st.integers(1, 8),
    rows=st.integers(1, 3000),
)
def test_an_inner_chunk_has_all_layers_and_at_most_about_2_mb_and_fits_the_shard(
    sequence_length: int, layers: int, k: int, rows: int
) -> None:
    assume(sequence_length * layers * k * rows <= SHARD_CHOICES)  # more is rejected
    layout = fake_layout(
        sequence_length=sequence_length, layers=tuple(range(layers)), experts_per_token=k, rows_per_shard=rows
    )
    spec = layout.arrays()["expert"]
    assert spec.shard is not None
    assert spec.chunk[2:] == spec.shard[2:] == (layers, k)
    assert math.prod(spec.chunk) <= CHUNK_BYTES or spec.chunk[0] == 1
    assert all(size % part == 0 for size, part in zip(spec.shard, spec.chunk, strict=True))
    assert spec.shard[1] >= sequence_length
    assert spec.chunk[:2] <= (64, 512)
    # Only as many rows are dropped as sharding requires.
    assert rows - spec.chunk[0] < layout.rows_per_shard == spec.shard[0] <= rows


def test_mixtral_at_full_length_has_64_rows_of_512_positions_in_a_chunk_of_2_mb() -> None:
    layout = fake_layout(sequence_length=2048, layers=tuple(range(32)), rows_per_shard=default_rows_per_shard(2048))
    spec = layout.arrays()["expert"]
    assert (spec.chunk, spec.shard) == ((64, 512, 32, 2), (128, 2048, 32, 2))
    assert math.prod(spec.chunk) == CHUNK_BYTES


@pytest.mark.parametrize(("length", "rows"), [(1, 262_144), (512, 512), (2048, 128), (262_144, 1), (10**6, 1)])
def test_the_default_shard_has_a_quarter_of_a_million_positions_and_one_row_at_least(length: int, rows: int) -> None:
    assert default_rows_per_shard(length) == rows
    assert SHARD_TOKENS == 262_144


@pytest.mark.parametrize(
    ("num_experts", "dtype", "missing"),
    [(8, "uint8", 255), (255, "uint8", 255), (256, "uint16", 65_535), (65_534, "uint16", 65_535)],
)
def test_the_missing_expert_is_never_a_legal_one(num_experts: int, dtype: str, missing: int, tmp_path: Path) -> None:
    layout = fake_layout(num_experts=num_experts)
    assert (layout.arrays()["expert"].dtype, layout.arrays()["expert"].fill) == (dtype, missing)
    assert layout.missing_expert >= num_experts
    fake_capture(tmp_path / "s.zarr", TEXTS, layout=layout)
    expert = open_capture(tmp_path / "s.zarr", "fake")["expert"]
    assert expert.dtype == dtype
    assert (expert.values != missing).any(axis=(2, 3)).sum() == sum(len(text.split()) for text in TEXTS)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0, but must be at least 1"),
        ({"rows_per_shard": -1}, "rows_per_shard is -1"),
        ({"layers": ()}, "no layer with experts"),
        ({"num_experts": 65_535}, "num_experts is 65535, but the store supports at most 65,534"),
    ],
)
def test_an_impossible_layout_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_layout(**sizes)


# --- Bytes ------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sequence_length=st.sampled_from([1, 7, 16, 515, 1030]),
    rows_per_shard=st.sampled_from([1, 3, 5, 8]),
    rows=st.integers(1, 20),
    num_experts=st.sampled_from([8, 300]),
    empty=st.booleans(),
)
def test_an_encoded_shard_has_the_bytes_that_zarr_writes_into_the_large_array(
    tmp_path: Path, sequence_length: int, rows_per_shard: int, rows: int, num_experts: int, empty: bool
) -> None:
    layout = fake_layout(
        sequence_length=sequence_length, rows_per_shard=rows_per_shard, num_experts=num_experts, layers=(1, 5)
    )
    random = np.random.default_rng(rows)
    for name, spec in layout.arrays().items():
        if spec.shard is None:
            continue
        large = zarr.create_array(
            zarr.storage.LocalStore(tmp_path / "large.zarr"),
            name=name,
            overwrite=True,
            shape=(rows, *spec.trailing),
            chunks=spec.chunk,
            shards=spec.shard,
            dtype=spec.dtype,
            fill_value=spec.fill,
            compressors=spec.compressors,
            dimension_names=spec.dims,
            attributes=dict(spec.attrs),
        )
        values = (random.random(large.shape) * min(num_experts, 2000)).astype(spec.dtype)
        if empty:  # inner chunks of only fill values are omitted
            values[:, sequence_length // 2 :] = spec.fill
        values[0, 0] = 1
        size = layout.rows_per_shard
        for shard in range(math.ceil(rows / size)):
            part = values[shard * size : (shard + 1) * size]
            large[shard * size : (shard + 1) * size] = part
            file = tmp_path / "large.zarr" / name / spec.key(shard)
            if file.exists():  # Zarr deletes a shard of only fill values, but here it always exists
                assert spec.encode(part) == file.read_bytes(), (name, shard)
            else:
                assert (part == spec.fill).all()
        assert spec.metadata(rows) == (tmp_path / "large.zarr" / name / "zarr.json").read_bytes()


@pytest.mark.parametrize("fill", [255.0, 0.0, np.nan])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_an_inner_chunk_is_left_out_where_zarr_leaves_it_out(fill: float, data: st.DataObject) -> None:
    rows, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    size, cell = rows * positions, st.sampled_from([fill, fill, fill, -0.0, 1.0])
    spec = ArraySpec(
        dtype="float32", dims=("doc", "position"), trailing=(positions,), chunk=(2, 2), shard=(4, 6), fill=fill,
        compressors=(),
    )  # fmt: skip
    values = np.array(data.draw(st.lists(cell, min_size=size, max_size=size)), np.float32).reshape(rows, positions)
    memory = zarr.storage.MemoryStore()
    array = zarr.create_array(
        memory, shape=values.shape, chunks=(2, 2), shards=(4, 6), dtype="float32", fill_value=fill, compressors=()
    )
    array[...] = values
    if written := memory._store_dict.get("c/0/0"):
        assert spec.encode(values) == written.to_bytes()
    else:
        np.testing.assert_array_equal(values, np.full_like(values, fill))


def test_a_shard_of_another_shape_than_the_arrays_is_our_own_fault() -> None:
    spec = fake_layout().arrays()["token"]
    for shape in ((0, 8), (5, 8), (4, 7)):
        with pytest.raises(AssertionError):
            spec.encode(np.zeros(shape, np.int32))
    assert spec.encode(np.zeros((4, 8), np.int32)) != spec.encode(np.zeros((3, 8), np.int32))


def test_a_flipped_bit_in_a_shard_is_an_error_and_no_data(copy: Path) -> None:
    file = copy / "prose" / "expert" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[10] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        open_capture(copy, "prose")["expert"].isel(doc=slice(0, 4)).compute()


# --- Values -----------------------------------------------------------------------------------------------


def test_every_token_has_the_formulas_choices_and_everything_else_is_fill(store: Path) -> None:
    data = open_capture(store, "prose").compute()
    row = 0
    for document, text in enumerate(TEXTS):
        ids = [word_id(word) for word in text.split()]
        for offset in range(0, len(ids), 8):
            window = ids[offset : offset + 8]
            assert int(data["length"][row]) == len(window)
            assert (int(data["document_id"][row]), int(data["offset"][row])) == (document, offset)
            assert data["token"][row].values.tolist() == window + [-1] * (8 - len(window))
            for position, token in enumerate(window):
                for index, layer in enumerate((0, 1, 2)):
                    for k in range(2):
                        expert, weight = fake_choice(token, position, layer, k, 8)
                        assert int(data["expert"][row, position, index, k]) == expert
                        assert float(data["weight"][row, position, index, k]) == weight
            assert (data["expert"][row, len(window) :] == 255).all()
            assert (data["weight"][row, len(window) :] == 0).all()
            row += 1
    assert row == data.sizes["doc"]
    assert data["name"].values.tolist() == [f"document {number}" for number in range(len(TEXTS))]
    assert data["piece"].values.tolist() == [f"▁{number}" for number in range(1000)]
    assert data["layer"].values.tolist() == [0, 1, 2]


# --- Order of writes --------------------------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The visible changes in order: the keys of all returned puts and of removals."""
    visible: list[str] = []

    def recording(method: Any) -> Any:
        def call(self: LocalObjects, key: str, *data: bytes) -> Any:
            result = method(self, key, *data)
            visible.append(("-" if not data else "") + key.partition("/")[2])
            return result

        return call

    for name in ("put", "put_new", "put_over", "delete"):
        monkeypatch.setattr(LocalObjects, name, recording(getattr(LocalObjects, name)))
    return visible


def test_a_commit_record_is_written_after_both_objects_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = planned_group(tmp_path / "s.zarr")
    visible = spied(monkeypatch)
    rows, routes = choices(group, 4)
    assert group.commit(4, routes, rows=rows, facts={"seconds": 1.5, "worker": "me"})
    assert visible == ["expert/c/4/0/0/0", "weight/c/4/0/0/0", "expert/commits/4.json"]
    record = json.loads((group.path / "fake/expert/commits/4.json").read_bytes())
    objects = {name: (group.path / f"fake/{name}/c/4/0/0/0").read_bytes() for name in ("expert", "weight")}
    assert record == {
        "identity": identity_hash(group.identity),
        "shard": 4,
        "seconds": 1.5,
        "worker": "me",
        "rows": 1,
        "tokens": int(rows.length.sum()),
        "token_crc32c": google_crc32c.value(rows.token.tobytes()),
        **{name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in objects.items()},
    }


def test_the_plan_record_is_written_after_all_that_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visible = spied(monkeypatch)
    planned_group(tmp_path / "s.zarr")
    created = visible.index("zarr.json")
    assert visible[created + 1 :][-1] == "token/plan.json"
    last = len(visible) - 2 - visible[:-1][::-1].index("token/plan.json")
    published = visible[last + 1 :]
    data = [index for index, key in enumerate(published) if "/c/" in key]
    grown = [index for index, key in enumerate(published) if key.endswith("/zarr.json")]
    assert data
    assert max(data) < min(grown)  # an array grows after its data are there
    assert visible.index("zarr.json") > max(
        index for index, key in enumerate(visible[: created + 1]) if key.endswith("/zarr.json") or "/c/" in key
    )


def test_taking_a_shard_back_removes_the_commit_before_the_data(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visible = spied(monkeypatch)
    CaptureGroup(copy, "prose").discard(2)
    # The note of a fault is last: it is removed with the record that it is about.
    assert visible == ["expert/commits/2.json", "-expert/c/2/0/0/0", "-weight/c/2/0/0/0", "-expert/faults/2.json"]
    assert (copy / "prose/expert/commits/2.json").read_bytes() == VOID


def test_a_file_and_its_folder_are_synced_around_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, link, swap = os.fsync, os.link, os.replace

    def spy_fsync(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        assert folder or path.read_bytes() == b"data"  # all of it, before it is synced
        calls.append(f"sync {path.relative_to(tmp_path) if folder else 'file'}")
        fsync(handle)

    def spy_link(source: Path, target: Path) -> None:
        calls.append(f"link {target.relative_to(tmp_path)}")
        link(source, target)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {target.relative_to(tmp_path)}")
        swap(source, target)

    objects = LocalObjects(tmp_path / "root", "scratch")
    objects.put("warm", b"data")  # the scratch folder exists from here on
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    monkeypatch.setattr(os, "replace", spy_replace)
    assert objects.put_new("a/b/new", b"data")
    # The new folders' names too, each in its parent.
    assert calls == ["sync file", "sync root/a", "sync root", "link root/a/b/new", "sync root/a/b"]
    calls.clear()
    objects.put("a/b/new", b"data")
    assert calls == ["sync file", "replace root/a/b/new", "sync root/a/b"]
    calls.clear()
    objects.delete("a/b/new")
    assert calls == ["sync root/a/b"]


# --- Objects ----------------------------------------------------------------------------------------------


def test_objects_are_put_got_listed_and_deleted_by_key(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "root", "a/scratch")
    assert objects.get("a/b") is None
    assert objects.size_bytes("a/b") is None
    assert objects.list("a") == []
    objects.put("a/b", b"one")
    objects.put("a/b", b"other")
    assert not objects.put_new("a/b", b"third")
    assert (objects.get("a/b"), objects.size_bytes("a/b")) == (b"other", 5)
    assert objects.get("a/b/c") is None
    assert objects.list("a") == ["b"]
    objects.delete("a/b")
    objects.delete("a/b")
    assert objects.get("a/b") is None
    assert list((tmp_path / "root" / "a" / "scratch").iterdir()) == []


@pytest.mark.parametrize(("method", "given"), [("put", ()), ("put_new", ()), ("put_over", (b"old",))])
def test_a_write_that_fails_leaves_neither_an_object_nor_a_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, given: tuple[bytes, ...]
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    objects = LocalObjects(tmp_path, "scratch")
    objects.put("old", b"old")
    monkeypatch.setattr(os, "fsync", full)
    for key in ("old", "scratch/new"):
        with pytest.raises(OSError, match="No space"):
            getattr(objects, method)(key, *given, b"new")
    monkeypatch.undo()
    assert store_files(tmp_path) == {"old": b"old"}


def test_who_replaces_an_object_on_a_disk_waits_for_the_one_who_does_so_and_then_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = LocalObjects(tmp_path, "scratch")
    objects.put("a", b"old")
    with (tmp_path / "a").open("rb") as first, ThreadPoolExecutor(1) as pool:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = pool.submit(objects.put_over, "a", b"old", b"second's")
        wait_until(lambda: any((tmp_path / "scratch").iterdir()), "it has written what it puts")
        objects.put("a", b"first's")
        fcntl.flock(first, fcntl.LOCK_UN)
        assert not second.result()
    assert objects.get("a") == b"first's"
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not objects.put_over("none", b"old", b"new")
    monkeypatch.setattr(objects_module, "LOCK_TRIES", 1)
    with (tmp_path / "a").open("rb") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process has locked this file and does not continue"):
            objects.put_over("a", b"first's", b"new")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def none(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(source))

    monkeypatch.setattr(os, "link", none)
    with pytest.raises(OSError, match=rf"no hard links, .* use another one, or s3://.*{tmp_path}/a"):
        LocalObjects(tmp_path, "scratch").put_new("a", b"data")
    assert store_files(tmp_path) == {}


def test_a_partial_file_is_never_visible_under_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = LocalObjects(tmp_path, "scratch")
    fsync, seen = os.fsync, []

    def look(handle: int) -> None:
        seen.append(objects.get("key"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    objects.put_new("key", b"first")
    objects.put("key", b"second")
    # Before the file is linked nothing is there; then the complete file, while its folder is synced.
    assert list(dict.fromkeys(seen)) == [None, b"first", b"second"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "A", "a b", ".hidden", "é", "a\n", "x" * 129])
def test_a_name_that_would_leave_the_store_or_that_zarr_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid name of a data set"):
        CaptureGroup(tmp_path, name)
    with pytest.raises(ValueError, match="is not a valid name of a data set"):
        coverage(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


# --- Identity ---------------------------------------------------------------------------------------------


def test_another_identity_on_the_same_group_is_refused_naming_each_field_and_both_values(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr", quantization="nf4", layers=(1, 2))
    before = store_files(group.path)
    assert new_group(tmp_path / "s.zarr", quantization="nf4", layers=[1, 2]).identity == group.identity
    with pytest.raises(ValueError, match="holds another capture") as caught:
        new_group(tmp_path / "s.zarr", model="other", quantization="nf4", layers=(1, 2), bos="row")
    message = str(caught.value)
    assert "model: the store has 'fake', this run has 'other'" in message
    assert "bos: the store has None, this run has 'row'" in message
    assert "quantization" not in message
    assert "layers" not in message
    assert "--name" in message
    assert store_files(group.path) == before


def test_another_limit_of_documents_is_told_to_be_another_capture(tmp_path: Path) -> None:
    new_group(tmp_path / "s.zarr", limit_documents=5)
    with pytest.raises(ValueError, match="limit_documents: the store has 5, this run has 10") as caught:
        new_group(tmp_path / "s.zarr", limit_documents=10)
    assert "a capture cannot grow" in str(caught.value)


def test_the_identitys_hash_depends_on_every_value_and_on_no_order() -> None:
    assert identity_hash({"a": 1, "b": (1, 2)}) == identity_hash({"b": [1, 2], "a": 1})
    different = [{}, {"a": 1}, {"a": "1"}, {"a": None}, {"b": 1}, {"a": 1, "b": 1}]
    assert len({identity_hash(identity) for identity in different}) == len(different)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a capture that this version reads: schema_version is None"),
        ('{"attributes": {"schema_version": 99}}', "schema_version is 99, but only 1 and 2 are supported"),
        ("not JSON", "is not JSON"),
    ],
)
def test_a_folder_that_is_no_capture_is_refused_and_left_alone(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "zarr.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        new_group(tmp_path)
    with pytest.raises(ValueError, match=message):
        coverage(tmp_path, "fake")
    assert store_files(tmp_path) == {"fake/zarr.json": content.encode()}


# --- Lease ------------------------------------------------------------------------------------------------


def holder(group: CaptureGroup) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((group.path / "fake" / "token" / "lease.json").read_bytes())
    return found


def holder_processes(group: CaptureGroup) -> list[str]:
    with lease.lease(group):
        found: list[str] = holder(group)["processes"]
    return found


def put_holder(group: CaptureGroup, **facts: Any) -> None:
    with lease.lease(group):
        found = holder(group)
    (group.path / "fake" / "token" / "lease.json").write_text(json.dumps(found | facts))


def test_a_second_job_is_told_who_writes_where_and_since_when(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    with lease.lease(group):
        mine = holder(group)
        with pytest.raises(RuntimeError, match="is being captured by process") as caught, lease.lease(group):
            pytest.fail("two jobs hold the lease")
        for fact in (f"process {os.getpid()}", socket.gethostname(), mine["since"], "fake"):
            assert fact in str(caught.value)
        assert holder(group) == mine
    with lease.lease(group):
        pass
    assert not (group.path / "fake" / "token" / "lease.json").exists()


def test_the_lease_is_given_back_when_the_job_fails(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    with pytest.raises(KeyboardInterrupt), lease.lease(group):
        raise KeyboardInterrupt
    assert not (group.path / "fake" / "token" / "lease.json").exists()


def test_a_dead_processs_lease_is_taken_over_and_its_partial_files_removed(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    put_holder(group, process=gone.pid)
    (group.path / "fake" / "token" / "partial").mkdir(exist_ok=True)
    (group.path / "fake" / "token" / "partial" / "left").write_text("half")
    with lease.lease(group):
        assert holder(group)["process"] == os.getpid()
        assert not (group.path / "fake" / "token" / "partial" / "left").exists()


@pytest.mark.parametrize("step", ["_write_partial", "_parent_made"])
def test_of_two_jobs_that_start_at_once_one_has_the_lease_and_the_other_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The winner clears the scratch folder while the loser's own lease is written there."""
    winner, loser = (CaptureGroup(tmp_path, "texts") for _ in range(2))
    done = getattr(LocalObjects, step)
    with ExitStack() as stack:

        def overtaken(objects: LocalObjects, *arguments: Any) -> Path:
            path: Path = done(objects, *arguments)
            if objects is loser.objects and not (tmp_path / "texts/token/lease.json").exists():
                stack.enter_context(lease.lease(winner))
            return path

        monkeypatch.setattr(LocalObjects, step, overtaken)
        with pytest.raises(RuntimeError, match="texts is being captured by process"), lease.lease(loser):
            pass
        assert lease.lease_token(winner) is not None


def test_a_file_that_cannot_be_placed_is_an_error_after_some_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = LocalObjects(tmp_path, "scratch")
    monkeypatch.setattr(objects, "_write_partial", lambda data: tmp_path / "gone")
    for put in (objects.put, objects.put_new):
        with pytest.raises(FileNotFoundError, match="gone"):
            put("a/b", b"data")


def test_a_later_process_of_the_same_id_is_not_the_holder(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    put_holder(group, process_start="1")
    with lease.lease(group):
        assert holder(group)["process_start"] != "1"


def test_a_process_id_of_another_container_says_nothing_though_its_host_has_the_same_name(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    put_holder(group, process=gone.pid, processes=[holder_processes(group)[0], "pid:[1]"])

    def watches(why: str) -> None:
        raise TimeoutError(why)

    with pytest.raises(TimeoutError, match="to see whether it is alive"), lease.lease(group, watches):
        pytest.fail("the lease of a living job was taken")


def test_a_holder_that_is_dead_and_not_reaped_is_gone(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as dying:
        put_holder(group, process=dying.pid, process_start=lease._process_start(dying.pid))
        with pytest.raises(RuntimeError, match=f"process {dying.pid}"), lease.lease(group):
            pytest.fail("the lease of a living process was taken")
        dying.kill()
        os.waitid(os.P_PID, dying.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet reaped by the parent
        with lease.lease(group):
            assert holder(group)["process"] == os.getpid()


def test_a_job_whose_lease_was_taken_does_not_take_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    group = new_group(tmp_path / "s.zarr")
    with lease.lease(group) as held:
        other = json.dumps(holder(group) | {"token": "another job's"})
        take_until_told(held, lambda: (group.path / "fake" / "token" / "lease.json").write_text(other))
        assert holder(group)["token"] == "another job's"
    assert holder(group)["token"] == "another job's"


def take_until_told(held: lease.Lease, take: Callable[[], object]) -> None:
    """Take a lease until its job notices: a renewal that has started may still put its record."""
    wait_until(lambda: [take(), held.lost][1], "the job is told")


def test_a_user_id_without_a_name_is_told_as_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(lease.getpass, "getuser", nameless)
    group = new_group(tmp_path / "s.zarr")
    with lease.lease(group):
        assert holder(group)["user"] == str(os.getuid())


def test_the_lease_is_renewed_while_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    group = new_group(tmp_path / "s.zarr")
    with lease.lease(group):
        first = holder(group)
        wait_until(lambda: holder(group)["renewed"] != first["renewed"], "it is renewed")
        assert holder(group) | {"renewed": 0} == first | {"renewed": 0}


def test_a_lease_file_that_cannot_be_read_is_taken_over(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    for content in ("", "[]", "{}", "{"):
        (group.path / "fake" / "token" / "lease.json").write_text(content)
        with lease.lease(group):
            assert holder(group)["process"] == os.getpid()


def test_a_job_whose_lease_was_taken_or_is_gone_is_told_at_the_next_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = new_group(tmp_path / "s.zarr")
    file = group.path / "fake" / "token" / "lease.json"
    assert lease.lease_token(group) is None
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    for taken in (
        lambda text: file.write_text(text.replace(held.token, "another")),
        lambda _: file.unlink(missing_ok=True),
    ):
        with lease.lease(group) as held:
            assert lease.lease_token(group) == held.token
            first = holder(group)
            wait_until(lambda: holder(group)["renewed"] != first["renewed"], "it is renewed")  # noqa: B023
            assert not held.lost
            take_until_told(held, lambda: taken(file.read_text() if file.exists() else ""))  # noqa: B023
        file.unlink(missing_ok=True)


def test_who_holds_the_lease_is_told_with_how_alive_it_is(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    assert lease.lease_holder(group) is None
    with lease.lease(group):
        assert str(lease.lease_holder(group)).startswith(f"process {os.getpid()} of ")
        assert f"on {socket.gethostname()} since 2" in str(lease.lease_holder(group))
    put_holder(group, process_start="1")
    assert str(lease.lease_holder(group)).endswith(", which is gone")
    put_holder(group, host="elsewhere", processes=["elsewhere"], process_start="1", renewed=1234)
    told = str(lease.lease_holder(group))
    assert re.search(r" on elsewhere since .*, renewed 1,234 times \(every 20 s while it is alive\)$", told)


# --- Notes beside the commits ---------------------------------------------------------------------------------


def test_a_commit_counts_if_it_is_of_this_capture_and_this_shard(copy: Path) -> None:
    group = CaptureGroup(copy, "prose")
    record = (copy / "prose/expert/commits/2.json").read_bytes()
    assert [group.committed(shard) for shard in range(6)] == [True] * 5 + [False]
    for changes in ({"identity": "f" * 64}, {"shard": 1}, {"tokens": 0}, {"weight": None}):
        (copy / "prose/expert/commits/2.json").write_text(json.dumps(json.loads(record) | changes))
        assert not group.committed(2), changes
    (copy / "prose/expert/commits/2.json").write_bytes(record[:9])
    assert not group.committed(2)


def test_the_first_worker_settles_the_environment_and_readers_do_not_mind_the_record(tmp_path: Path) -> None:
    group = planned_group(tmp_path / "s.zarr")
    assert group.environment is None
    assert group.settle_environment({"torch": "1"}) == {"torch": "1"}
    assert group.settle_environment({"torch": "2"}) == group.environment == {"torch": "1"}
    assert open_tree(group.path, allow_incomplete=True)["fake"].sizes["doc"] == 17


def test_a_shard_in_quarantine_is_missing_and_named_until_it_is_released_or_committed(tmp_path: Path) -> None:
    group = planned_group(tmp_path / "s.zarr")
    record = {"strikes": 3, "errors": ["RoutingError: layer 2 did not fire\nmore"], "documents": ["document 2"]}
    for shard in (1, 3):
        group.quarantine(shard, record)
    (group.path / "fake/expert/quarantine/2.json").write_text("{")
    state = coverage(group.path, "fake")
    assert state.quarantined == group.quarantined() == {1: record, 2: {}, 3: record}
    assert state.missing == [0, 1, 2, 3, 4]
    layer = "RoutingError: layer 2 did not fire"
    assert str(state).endswith(f"missing shards: 0-4; in quarantine: 1 ({layer}), 2, 3 ({layer})")
    group.release(2)
    group.release(2)
    rows, routes = choices(group, 1)
    group.commit(1, routes, rows=rows, facts={})
    assert list(coverage(group.path, "fake").quarantined) == [3]
    assert (
        open_capture(group.path, "fake", allow_incomplete=True)["captured"].values.sum() == 4
    )  # and there is no warning
    for shard in (0, 1, 2, 4, 9):  # 9: beyond the plan
        group.quarantine(shard, {})
    assert str(coverage(group.path, "fake")).endswith(f"in quarantine: 0, 2, 3 ({layer}), and 1 more")


def test_the_documents_of_a_shard_are_named_in_order(store: Path) -> None:
    group = CaptureGroup(store, "prose")
    ids = open_capture(store, "prose")["document_id"].values
    for shard in range(5):
        assert group.document_names(shard) == [f"document {i}" for i in sorted(set(ids[shard * 4 : shard * 4 + 4]))]
    assert group.document_names(0) == ["document 0", "document 2"]


def test_rows_across_the_chunks_of_the_flat_arrays_are_read_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (layout_module, planned):
        monkeypatch.setattr(module, "ROW_CHUNK", 3)  # smaller than a shard, and not a divisor of it
    group = planned_group(tmp_path / "s.zarr")
    data = open_capture(group.path, "fake", allow_incomplete=True)
    for shard in range(5):
        part = data.isel(doc=slice(shard * 4, shard * 4 + 4))
        rows = group.read_rows(shard)
        np.testing.assert_array_equal(rows.token, part["token"])
        np.testing.assert_array_equal(rows.length, part["length"])
        assert group.document_names(shard) == [f"document {i}" for i in sorted(set(part["document_id"].values))]


def test_tokens_that_do_not_fit_their_lengths_are_never_captured(copy: Path) -> None:
    group = CaptureGroup(copy, "prose")
    shutil.copy(copy / "prose/token/c/0/0", copy / "prose/token/c/1/0")
    with pytest.raises(ValueError, match="tokens and lengths of shard 1 do not match; remove the folder prose"):
        group.read_rows(1)


# --- Coverage ---------------------------------------------------------------------------------------------


def test_a_complete_capture_counts_its_shards_tokens_and_bytes(store: Path) -> None:
    state = coverage(store, "prose")
    objects = [
        path for name in ("expert", "weight") for path in (store / "prose" / name / "c").rglob("0") if path.is_file()
    ]
    assert state.complete
    assert (state.shards_done, state.shards_total, state.missing, state.wrong) == (5, 5, [], {})
    assert state.tokens_done == state.plan.tokens == sum(len(text.split()) for text in TEXTS)
    assert state.bytes_done == sum(path.stat().st_size for path in objects)
    assert (state.plan.rows, state.plan.documents, state.plan.documents_empty) == (sum(ROWS), 7, 2)
    assert str(state) == f"prose: complete, 5 shards, {state.tokens_done} tokens"


def damage(path: Path, how: str) -> None:
    match how:
        case "deleted":
            path.unlink()
        case "zero-length":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "of another identity":
            path.write_text(json.dumps(json.loads(path.read_bytes()) | {"identity": "f" * 64}))
        case "not JSON":
            path.write_text("{")
        case "without its fields":
            path.write_text("{}")
        case "a list":
            path.write_text("[1]")


OBJECTS = [(array, how) for array in ("expert", "weight") for how in ("deleted", "zero-length", "truncated")]
RECORDS = ["of another identity", "not JSON", "without its fields", "a list", "zero-length"]


@pytest.mark.parametrize(
    ("file", "how"),
    [(f"{array}/c/3/0/0/0", how) for array, how in OBJECTS] + [("expert/commits/3.json", how) for how in RECORDS],
)
def test_a_shard_whose_commit_does_not_hold_is_missing_named_and_healed(
    copy: Path, file: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = store_files(copy / "prose")
    damage(copy / "prose" / file, how)
    state = coverage(copy, "prose")
    assert not state.complete
    assert (state.missing, list(state.wrong), state.shards_done) == ([3], [3], 4)
    assert "prose: 4 of 5 shards are committed; missing shards: 3" in str(state)
    with pytest.raises(ValueError, match="missing shards: 3"):
        open_capture(copy, "prose")
    fake_capture(copy, TEXTS, "prose")
    healed = [line for line in capsys.readouterr().err.splitlines() if "is captured again" in line]
    assert [line.partition(" is captured")[0] for line in healed] == ["prose: shard 3"]
    if how in ("deleted", "truncated"):
        assert ("is gone" if how == "deleted" else "were committed") in healed[0]
        assert file.partition("/")[0] in healed[0]
    after = store_files(copy / "prose")
    del before["expert/commits/3.json"], after["expert/commits/3.json"]  # other seconds
    assert after == before
    assert coverage(copy, "prose").complete


def test_a_shard_without_a_commit_is_missing_though_its_objects_are_there(copy: Path) -> None:
    for shard in (0, 1, 3):
        (copy / "prose" / "expert" / "commits" / f"{shard}.json").unlink()
    state = coverage(copy, "prose")
    assert (state.missing, state.wrong) == ([0, 1, 3], {})
    assert "missing shards: 0-1, 3" in str(state)


def test_a_stray_file_among_the_commits_is_no_commit(copy: Path) -> None:
    (copy / "prose" / "expert" / "commits" / ".nfs000001").write_text("")
    (copy / "prose" / "expert" / "commits" / "notes.txt").write_text("")
    assert coverage(copy, "prose").complete


def test_what_is_not_there_is_said(store: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no store at"):
        dataset_names(tmp_path)
    with pytest.raises(FileNotFoundError, match="no store at"):
        open_capture(tmp_path / "none", "prose")
    with pytest.raises(FileNotFoundError, match=r"no data set 'verse' in .*; it holds: code, prose"):
        open_capture(store, "verse")
    with pytest.raises(FileNotFoundError, match="no data set 'verse' in the store"):
        coverage(store, "verse")


# --- Reading ----------------------------------------------------------------------------------------------


def test_a_capture_is_lazy_labelled_and_has_one_dask_chunk_a_shard(store: Path) -> None:
    data = open_capture(store, "prose")
    assert dict(data.sizes) == {"doc": 17, "position": 8, "layer": 3, "k": 2, "document": 7, "token_id": 1000}
    assert list(data.data_vars) == [
        *("expert", "weight", "token", "length", "document_id", "offset", "name", "piece", "captured"),
    ]
    for name in ("expert", "weight", "token"):
        assert data[name].chunks is not None, name
        assert data[name].chunks[0] == (4, 4, 4, 4, 1), name
        assert all(len(sizes) == 1 for sizes in data[name].chunks[1:]), name
    assert data["expert"].dims == ("doc", "position", "layer", "k")
    assert data.attrs["dataset"] == "prose"
    assert data["captured"].values.all()
    for name in data.variables:
        assert data[name].attrs["long_name"], name


def test_an_incomplete_capture_is_opened_only_on_demand_and_marks_what_is_missing(copy: Path) -> None:
    whole = open_capture(copy, "prose").compute()
    CaptureGroup(copy, "prose").discard(1)
    CaptureGroup(copy, "prose").discard(4)
    with pytest.raises(ValueError, match=r"missing shards: 1, 4.*allow_incomplete=True"):
        open_capture(copy, "prose")
    data = open_capture(copy, "prose", allow_incomplete=True).compute()
    missing = np.isin(np.arange(17) // 4, [1, 4])
    assert data["captured"].values.tolist() == (~missing).tolist()
    assert (data["expert"].values[missing] == 255).all()
    assert (data["weight"].values[missing] == 0).all()
    xr.testing.assert_equal(data.isel(doc=~missing), whole.isel(doc=~missing))
    xr.testing.assert_equal(data["token"], whole["token"])


def test_a_capture_that_is_being_planned_is_incomplete_though_every_planned_shard_is_there(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr")
    assert str(coverage(group.path, "fake")) == (
        "fake: 0 of 0 shards are committed, and its text is not completely planned; missing shards: none"
    )
    random = np.random.default_rng(0)
    columns = {"length": np.full(4, 8, np.int32), "document_id": np.arange(4), "offset": np.zeros(4, np.int32)}
    rows = Rows(token=random.integers(0, 9, (4, 8)).astype(np.int32), **columns)
    plan = Plan(rows=4, tokens=32, documents=4)
    group.publish(rows, ["a", "b", "c", "d"], plan)
    own, routes = choices(group, 0)
    group.commit(0, routes, rows=own, facts={})
    with pytest.raises(ValueError, match="its text is not completely planned"):
        open_capture(group.path, "fake")
    data = open_capture(group.path, "fake", allow_incomplete=True)
    assert data.sizes["doc"] == 4
    np.testing.assert_array_equal(data["expert"], routes["expert"])
    group.publish(
        Rows(**{name: getattr(rows, name)[:0] for name in (*columns, "token")}), [], replace(plan, complete=True)
    )
    assert open_capture(group.path, "fake").sizes["doc"] == 4
    with pytest.raises(AssertionError, match="never grows again"):
        group.publish(rows, [], plan)


def test_a_data_set_of_empty_documents_is_complete_and_has_no_rows(tmp_path: Path) -> None:
    state = fake_capture(tmp_path / "s.zarr", ["", " \n\t"])
    assert state.complete
    assert (state.shards_total, state.plan.documents, state.plan.documents_empty) == (0, 2, 2)
    data = open_capture(tmp_path / "s.zarr", "fake").compute()
    assert (data.sizes["doc"], data["name"].values.tolist()) == (0, ["document 0", "document 1"])


def test_the_tree_holds_every_data_set_as_it_is_opened_alone(store: Path, copy: Path) -> None:
    tree = open_tree(store)
    assert sorted(tree.children) == dataset_names(store) == ["code", "prose"]
    for name, node in tree.children.items():
        xr.testing.assert_identical(node.to_dataset(), open_capture(store, name))
    CaptureGroup(copy, "code").discard(0)
    with pytest.raises(ValueError, match="code: 2 of 3 shards are committed; missing shards: 0"):
        open_tree(copy)
    assert not open_tree(copy, allow_incomplete=True)["code"]["captured"][0]


PLAIN = """
import sys, json, importlib.util
import numpy as np, xarray as xr
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # of expert-atlas
for name in ("store", "workers", "jobs", "analysis"):
    assert importlib.util.find_spec(name) is None, name
path = sys.argv[1]
data = xr.open_zarr(path, group="prose", consolidated=False)
tree = xr.open_datatree(path, engine="zarr", consolidated=False)
assert sorted(tree.children) == ["code", "prose"], tree
assert tree["prose"].to_dataset().compute().identical(data.compute())
print(json.dumps({
    "sums": {name: int(np.asarray(data[name].astype("int64").sum())) for name in
             ("expert", "token", "length", "document_id", "offset")},
    "weight": float(data["weight"].astype("float64").sum()),
    "names": data["name"].values.tolist(),
    "piece": str(data["piece"].values[7]),
    "layer": data["layer"].values.tolist(),
    "dims": list(data["expert"].dims),
    "dtypes": [str(data[name].dtype) for name in ("expert", "weight", "token", "length", "document_id", "offset")],
    "model": data.attrs["model"],
}))
"""


@pytest.mark.parametrize("incomplete", [False, True])
def test_plain_xarray_reads_the_store_where_none_of_our_packages_is_there(
    copy: Path, tmp_path: Path, incomplete: bool
) -> None:
    if incomplete:
        CaptureGroup(copy, "prose").discard(1)
    command = [sys.executable, "-I", "-W", "error", "-c", PLAIN, str(copy)]
    with lease.lease(CaptureGroup(copy, "prose")):  # as while a capture runs
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    data = open_capture(copy, "prose", allow_incomplete=incomplete).compute()
    for name, total in found["sums"].items():
        assert total == int(data[name].astype("int64").sum()), name
    assert found["weight"] == float(data["weight"].astype("float64").sum())
    assert found["names"] == data["name"].values.tolist()
    assert (found["piece"], found["layer"], found["model"]) == ("▁7", [0, 1, 2], "fake")
    assert found["dims"] == ["doc", "position", "layer", "k"]
    assert found["dtypes"] == ["uint8", "float16", "int32", "int32", "int64", "int32"]


# --- Writers that were killed, and several at once -----------------------------------------------------------


@pytest.mark.parametrize("left", ["equal", "torn", "zero-length", "of other choices"])
def test_an_object_without_a_commit_is_kept_if_it_is_equal_and_replaced_if_it_is_not(tmp_path: Path, left: str) -> None:
    group = planned_group(tmp_path / "s.zarr")
    rows, routes = choices(group, 0)
    group.commit(0, routes, rows=rows, facts={})
    file = group.path / "fake" / "expert" / "c" / "0" / "0" / "0" / "0"
    right, inode = file.read_bytes(), file.stat().st_ino
    (group.path / "fake" / "expert" / "commits" / "0.json").unlink()
    if left != "equal":
        other = group.layout.arrays()["expert"].encode(routes["expert"][::-1])
        file.write_bytes({"torn": right[:-3], "zero-length": b"", "of other choices": other}[left])
    assert group.commit(0, routes, rows=rows, facts={})
    assert file.read_bytes() == right
    assert (file.stat().st_ino == inode) == (left == "equal")
    assert coverage(group.path, "fake").missing == [1, 2, 3, 4]


def test_a_committed_shard_is_left_as_it_is(tmp_path: Path) -> None:
    group = planned_group(tmp_path / "s.zarr")
    rows, routes = choices(group, 0)
    assert group.commit(0, routes, rows=rows, facts={"worker": "first"})
    before = store_files(group.path)
    assert not group.commit(0, {**routes, "expert": routes["expert"][::-1]}, rows=rows, facts={"worker": "second"})
    assert store_files(group.path) == before


def test_two_writers_of_the_same_shards_leave_the_bytes_of_one(tmp_path: Path) -> None:
    texts = [words(300, 1), words(200, 2)]
    fake_capture(tmp_path / "alone.zarr", texts)
    group = planned_group(tmp_path / "both.zarr", texts=texts)
    committed, start = [], threading.Barrier(3)

    def write(worker: str) -> None:
        start.wait()
        own = CaptureGroup(group.path, "fake")
        for shard in coverage(own.path, "fake").missing:
            rows = own.read_rows(shard)
            routes, _ = capture_shard(own, shard, rows, FakeEngine(), batch_tokens=24)()
            committed.append(own.commit(shard, routes, rows=rows, facts={"worker": worker}))

    writers = [threading.Thread(target=write, args=(f"writer {number}",)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    state = coverage(group.path, "fake")
    assert state.complete
    assert sum(committed) == state.shards_total == 16  # each shard was committed by exactly one
    alone, both = store_files(tmp_path / "alone.zarr"), store_files(group.path)
    del alone["fake/expert/environment.json"]  # which nobody has set here
    assert alone.keys() == both.keys()
    assert [key for key in alone if alone[key] != both[key] and "/commits/" not in key] == []


# --- Missing data are never mistaken for measured data -------------------------------------------------------------

PLAN_OBJECTS = (
    *("length/c/0", "document_id/c/0", "offset/c/0", "name/c/0", "piece/c/0", "layer/c/0"),
    *("token/c/0/0", "token/c/4/0"),
)


@pytest.mark.parametrize("key", PLAN_OBJECTS)
@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_a_lost_object_of_the_plan_makes_the_capture_incomplete_and_unreadable(copy: Path, key: str, how: str) -> None:
    file = copy / "prose" / key
    assert file.is_file()
    file.unlink() if how == "deleted" else file.write_bytes(b"")
    state = coverage(copy, "prose")
    assert state.lost == [key]
    assert not state.complete
    for allowed in (False, True):
        with pytest.raises(
            ValueError, match=f"1 objects of the plan are lost, first {key}; remove the folder prose"
        ) as raised:
            open_capture(copy, "prose", allow_incomplete=allowed)
        assert "allow_incomplete" not in str(raised.value)  # which would not help
    with pytest.raises(ValueError, match="objects of the plan are lost"):
        fake_capture(copy, TEXTS, "prose")


def test_nothing_of_a_whole_capture_is_lost(store: Path) -> None:
    assert coverage(store, "prose").lost == []


def test_rows_that_read_as_fill_are_never_captured(copy: Path) -> None:
    group = CaptureGroup(copy, "prose")
    group.discard(1)
    (copy / "prose" / "token" / "c" / "1" / "0").unlink()
    with pytest.raises(ValueError, match=r"rows of shard 1 are missing or damaged: token/c/1/0 is gone; remove the"):
        group.read_rows(1)


def test_arrays_that_grew_unevenly_are_read_as_far_as_the_plan_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner was killed between the arrays of its second publication."""
    run = FakeRun(tmp_path / "s.zarr")
    group = run.open_group("fake")
    monkeypatch.setattr(planning, "PUBLISH_POSITIONS", 32)
    put_over = LocalObjects.put_over

    def killed(objects: LocalObjects, key: str, old: bytes, data: bytes) -> bool:
        if key == "fake/offset/zarr.json" and group.plan.rows:
            raise KeyboardInterrupt
        return put_over(objects, key, old, data)

    monkeypatch.setattr(LocalObjects, "put_over", killed)
    with pytest.raises(KeyboardInterrupt):
        Planner(group, text_source(TEXTS), run.tokenizer).run()  # type: ignore[arg-type]
    sizes = {name: zarr.open_array(tmp_path / "s.zarr", path=f"fake/{name}").shape[0] for name in ("token", "offset")}
    assert sizes["token"] > sizes["offset"]
    data = open_capture(tmp_path / "s.zarr", "fake", allow_incomplete=True)
    assert data.sizes["doc"] == group.plan.rows == 4
    assert data["offset"].values.tolist() == [0, 0, 8, 16]


def test_a_late_writer_leaves_a_committed_shard_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It checked for the commit before the other writer made it, and has other bytes."""
    group = planned_group(tmp_path / "s.zarr")
    rows, routes = choices(group, 0)
    late = CaptureGroup(group.path, "fake")
    real, looked = late.objects.get, []

    def get(key: str) -> bytes | None:
        found = real(key)
        if "/commits/" in key and not looked:
            looked.append(key)
            group.commit(0, routes, rows=rows, facts={"worker": "first"})
        return found

    monkeypatch.setattr(late.objects, "get", get)
    assert not late.commit(0, {**routes, "expert": (routes["expert"] + 1) % 8}, rows=rows, facts={"worker": "late"})
    assert looked
    valid, wrong = group.commits()
    assert (list(valid), wrong) == ([0], {})
    data = open_capture(group.path, "fake", allow_incomplete=True)
    assert (data["expert"][: len(rows.length)].values == routes["expert"]).all()


@pytest.mark.parametrize("damaged", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_a_commit_record_that_is_none_is_replaced_and_any_other_is_left(tmp_path: Path, damaged: bytes) -> None:
    group = planned_group(tmp_path / "s.zarr")
    rows, routes = choices(group, 0)
    record = tmp_path / "s.zarr" / "fake/expert/commits/0.json"
    assert group.commit(0, routes, rows=rows, facts={})
    whole = record.read_bytes()
    record.write_bytes(damaged)
    assert group.commit(0, routes, rows=rows, facts={})
    assert record.read_bytes() == whole
    record.write_bytes(b"{}")
    assert not group.commit(0, routes, rows=rows, facts={})
    assert record.read_bytes() == b"{}"


def test_two_makers_of_one_group_do_not_mix_their_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_new, made = LocalObjects.put_new, []

    def other_first(objects: LocalObjects, key: str, data: bytes) -> bool:
        if key == "fake/zarr.json" and not made:
            made.append(key)
            new_group(tmp_path / "s.zarr", fake_layout(sequence_length=12), text="other")
        return put_new(objects, key, data)

    monkeypatch.setattr(LocalObjects, "put_new", other_first)
    with pytest.raises(RuntimeError, match="made by another job at the same time"):
        new_group(tmp_path / "s.zarr", text="mine")


def test_a_creation_that_was_killed_leaves_no_array_that_the_next_capture_does_not_have(tmp_path: Path) -> None:
    group = new_group(tmp_path / "s.zarr", fake_layout(roles=("user", "template")))
    (group.path / "fake" / "zarr.json").unlink()
    fake_capture(group.path, TEXTS)
    assert not (group.path / "fake" / "role").exists()
    assert "role" not in open_capture(group.path, "fake")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is not JSON"), ("[1]", "holds list"), ('{"x": 1}', "unknown fields"), ("{}", "lacks")],
)
def test_a_plan_record_that_is_none_is_named(copy: Path, content: str, message: str) -> None:
    (copy / "prose" / "token" / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=rf"prose/token/plan\.json.*{message}"):
        coverage(copy, "prose")


def test_a_commit_without_its_facts_is_wrong_and_no_traceback(copy: Path) -> None:
    file = copy / "prose" / "expert" / "commits" / "2.json"
    record = json.loads(file.read_text())
    del record["tokens"]
    file.write_text(json.dumps(record))
    assert list(coverage(copy, "prose").wrong) == [2]


def test_a_damaged_shard_is_named_by_its_rows_with_what_to_do(copy: Path) -> None:
    file = copy / "prose" / "expert" / "c" / "2" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match=r"rows 8 to 11 of prose, as numbered in the given Dataset, cannot be decoded .*--verify"
    ):
        expert_load(open_capture(copy, "prose").assign_attrs(special_token_ids=[]))
