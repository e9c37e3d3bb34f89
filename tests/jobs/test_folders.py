"""Which files of a folder are its data, and which of them belong to the requested split."""

import os
from pathlib import Path

import pytest
import zarr

from jobs.sources.resolve import resolve_source
from jobs.sources.splits import split_of


def fill(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}"}}\n' if name.endswith("l") else name)
    return str(folder)


def names(spec: str | Path, split: str | None = None) -> list[str]:
    return [document.text for document in resolve_source(str(spec), split=split).documents()]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00001-0a1b.parquet", "test"),
        ("data/train_sft-00000-of-00001.parquet", "train_sft"),
        ("train.jsonl", "train"),
        ("wiki.valid.jsonl", "validation"),
        ("my_dev_set.csv", "validation"),
        ("Training-2.jsonl", "train"),
        ("test/0001.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("x/eval/deep/1.jsonl", "test"),
        ("train_test_split.jsonl", None),
        ("trains.jsonl", None),
        ("latest.jsonl", None),
        ("README.md", None),
    ],
)
def test_the_split_of_a_file_is_known_by_the_hub_s_conventions(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("data/train-1.jsonl", "data/test-1.jsonl"),
        ("train.jsonl", "test.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("train/a.txt", "test/a.txt"),
        ("training.txt", "eval.txt"),
    ],
)
def test_a_folder_of_splits_is_read_one_split_at_a_time(tmp_path: Path, train: str, test: str) -> None:
    folder = fill(tmp_path, train, test)
    assert names(folder, "train") == [train]
    assert names(folder, "test") == [test]
    with pytest.raises(ValueError, match=r"has several splits: test, train; choose one with --split, or use a glob"):
        names(folder)
    with pytest.raises(ValueError, match="has no split 'validation'; choose with --split from: test, train"):
        names(folder, "validation")
    glob = f"{folder}/**/*{Path(train).suffix}"
    assert sorted(names(glob)) == sorted([train, test])
    assert names(glob, "test") == [test]


def test_other_files_are_of_no_split_and_the_identity_of_a_folder_with_one_split_stays(tmp_path: Path) -> None:
    folder = fill(tmp_path, "data/train-1.jsonl", "data/dev-1.jsonl", "README.md")
    assert names(folder, "train") == ["data/train-1.jsonl"]
    assert names(folder, "dev") == names(folder, "validation") == ["data/dev-1.jsonl"]
    one = fill(tmp_path / "one", "train-1.jsonl", "train-2.jsonl")
    assert resolve_source(one).identity == resolve_source(one, split="train").identity
    assert resolve_source(one).identity["split"] is None


def test_programs_and_books_with_such_names_are_all_read(tmp_path: Path) -> None:
    program = fill(tmp_path, "train.py", "test/a.py", "model.py")
    assert names(program) == ["model.py", "test/a.py", "train.py"]


def test_a_folder_without_splits_takes_train_and_no_other(tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.jsonl", "b.jsonl")
    assert names(folder, "train") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match="has no splits, so --split test does not apply"):
        names(folder, "test")


def test_what_tools_leave_beside_data_is_left_out_with_a_note(tmp_path: Path) -> None:
    junk = ("_SUCCESS", ".part-0.jsonl.crc", "part-0.jsonl.crc", "__MACOSX/._a.jsonl", "Thumbs.db", "_started_1")
    folder = fill(tmp_path, "part-0.jsonl", "sub/__pycache__/x.pyc", *junk)
    source = resolve_source(folder)
    assert names(folder) == ["part-0.jsonl"]
    assert source.note == f"6 auxiliary, 1 hidden or linked entries of {folder} left out"
    assert names(fill(tmp_path / "code", "__init__.py", "_private.py")) == ["__init__.py", "_private.py"]


def test_links_that_lead_to_themselves_are_left_out(tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.jsonl")
    (tmp_path / "one.jsonl").symlink_to("one.jsonl")
    (tmp_path / "two").symlink_to("three")
    (tmp_path / "three").symlink_to("two")
    assert names(folder) == ["a.jsonl"]
    assert "3 hidden or linked" in str(resolve_source(folder).note)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_in_the_folder_of_the_data_is_no_data(tmp_path: Path, zarr_format: int) -> None:
    folder = fill(tmp_path, "a.txt")
    before = resolve_source(folder).identity
    zarr.open_group(str(tmp_path / "routes.zarr"), mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    fill(tmp_path, "routes.zarr.results/report.txt", "my.results/kept.txt")
    (tmp_path / "my.results/kept.txt").unlink()
    source = resolve_source(folder)
    assert source.identity == before
    assert source.note == f"2 store's entries of {folder} left out"
    for name in ("routes.zarr", "routes.zarr.results"):
        with pytest.raises(ValueError, match="is a Zarr store or its results"):
            names(tmp_path / name)


def test_the_links_of_a_hub_s_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--org--name"
    blob, snapshot = repository / "blobs/0a1b", repository / "snapshots/c0ffee"
    fill(repository, "blobs/0a1b", "snapshots/c0ffee/.keep")
    blob.write_text('{"text": "from the cache"}\n')
    (snapshot / "data").mkdir()
    (snapshot / "train.jsonl").symlink_to("../../blobs/0a1b")
    (snapshot / "data/other.jsonl").symlink_to("../../../blobs/0a1b")
    (snapshot / "gone.jsonl").symlink_to("../../blobs/gone")
    assert names(snapshot) == ["from the cache"] * 2
    assert names(snapshot / "train.jsonl") == ["from the cache"]
    assert "2 hidden or linked" in str(resolve_source(str(snapshot)).note)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.jsonl").write_bytes(blob.read_bytes())
    (plain / "data").mkdir()
    (plain / "data/other.jsonl").write_bytes(blob.read_bytes())
    assert resolve_source(str(plain)).identity == resolve_source(str(snapshot)).identity


def test_a_folder_of_nothing_but_links_says_how_to_follow_them(tmp_path: Path) -> None:
    fill(tmp_path, "real/a.txt")
    (tmp_path / "links").mkdir()
    os.symlink("../real/a.txt", tmp_path / "links/a.txt")
    with pytest.raises(
        ValueError, match=r"no files to read \(1 hidden or linked .*; links are followed in a glob such"
    ):
        names(tmp_path / "links")
    assert names(tmp_path / "links/*") == ["real/a.txt"]


def test_a_bracket_in_a_path_is_a_name_where_it_exists_and_else_told(tmp_path: Path) -> None:
    fill(tmp_path, "data[1].jsonl", "data[2]/a.txt")
    assert names(tmp_path / "data[1].jsonl") == ["data[1].jsonl"]
    assert names(tmp_path / "data[2]") == ["data[2]/a.txt"]
    with pytest.raises(
        ValueError, match=r"no file matches .*a bracket or star that is part of a name is written \[\[\]"
    ):
        names(tmp_path / "data[2]/*.txt")
    assert names(tmp_path / "data[[]2]/*.txt") == ["data[2]/a.txt"]
