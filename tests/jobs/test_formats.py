"""Which files are read in which format, and which are recognized and rejected with a remedy."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.sources import arrow_files
from jobs.sources.resolve import group_name, resolve_source


def read(path: Path) -> list[str]:
    return [document.text for document in resolve_source(str(path)).documents()]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
LINES = b'{"text": "one"}\n{"text": "two"}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 104857600\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".jsonlines", ".jl", ".ndjson", ".json", ".Json", ".JSONL.GZ"])
def test_json_lines_are_known_by_every_ending_that_they_have(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(LINES) if suffix.endswith("GZ") else LINES)
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize(
    ("suffix", "data", "expected"),
    [
        (".jsonl", LINES, ["one", "two"]),
        (".csv", b"id,text\n1,one\n2,two\n", ["one", "two"]),
        (".txt", b"\xef\xbb\xbfone\ntwo\n", ["one\ntwo\n"]),
        ("", b"one\n", ["one\n"]),
    ],
)
def test_text_formats_are_read_compressed(
    tmp_path: Path, packed: str, suffix: str, data: bytes, expected: list[str]
) -> None:
    path = tmp_path / f"data{suffix}{packed}"
    first, second = data[:5], data[5:]
    path.write_bytes(PACKERS[packed](first) + PACKERS[packed](second))  # of several parts, as written by parallel tools
    assert read(path) == expected
    assert group_name(str(path)) == "data"
    path.write_bytes(PACKERS[packed](data * 1000)[:-9])
    with pytest.raises(ValueError, match=r"cannot read .*data"):
        read(path)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read .*data"):
        read(path)
    path.write_bytes(LFS)
    with pytest.raises(ValueError, match="git lfs pull"):
        read(path)


def test_compressed_data_under_another_name_and_whole_binary_files_inside_are_refused(tmp_path: Path) -> None:
    for suffix, pack in PACKERS.items():
        (tmp_path / "x.jsonl").write_bytes(pack(LINES))
        with pytest.raises(
            ValueError, match=rf"x\.jsonl contains {suffix[1:]} data; rename it so that it ends in \{suffix}"
        ):
            read(tmp_path / "x.jsonl")
        (tmp_path / f"x.parquet{suffix}").write_bytes(pack(b"PAR1"))
        with pytest.raises(ValueError, match=rf"is parquet inside \{suffix}, which is not supported; decompress it"):
            read(tmp_path / f"x.parquet{suffix}")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_has_quotes_lines_within_values_and_a_separator_of_its_own(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "x.csv"
    body = f'\ufeffid{mark}n{mark}body\r\n1{mark}5{mark}"a ""b""{mark}\n c"\r\n\r\n{mark}6{mark}{"x" * 200_000}\r\n'
    path.write_bytes(body.encode() + f"3{mark}7{mark}".encode() + b"a\xffb\r\n")
    source = resolve_source(str(path))
    found = [(document.name, document.text, document.repaired) for document in source.documents()]
    assert found == [("1", f'a "b"{mark}\n c', False), ("x.csv:5", "x" * 200_000, False), ("3", "a\ufffdb", True)]
    assert [document.name for document in source.documents(2)] == ["3"]
    assert source.identity["field"] == "body"


def test_tsv_and_several_csv_files_are_read_in_order(tmp_path: Path) -> None:
    for name, body in (("a.TSV", "id\ttext\nx\tone, two; three\n"), ("b.tsv", "text\tid\nfour\ty\n")):
        (tmp_path / name).write_text(body)
    assert read(tmp_path) == ["one, two; three", "four"]
    (tmp_path / "c.tsv").write_text("body\nfive\n")
    with pytest.raises(ValueError, match=r"c\.tsv has no column 'text'; its columns: body"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("id,text\n1,one\n2,two,three\n", r"x\.csv, line 3: has 3 values, but line 1 names 2 columns; put quotes"),
        ('id,text\n1,"one" two\n', r"x\.csv, line 2: .*quotes inside a value must be doubled"),
        ('id,text\n1,"one\n', r"x\.csv, line 2: .*quotes inside a value must be doubled"),
        ("", r"x\.csv, line 1: a line with the names of all columns is expected"),
        ("id,,text\n1,2,3\n", r"x\.csv, line 1: a line with the names of all columns is expected"),
        ("text,text\na,b\n", r"x\.csv has several columns named 'text'"),
        ("id,url\n1,http\n", r"has no columns that could be the text; .*id \(number\), url \(text\)"),
    ],
)
def test_a_faulty_csv_file_is_refused_by_line(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "x.csv").write_text(body)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "x.csv")


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
def test_arrow_files_of_both_kinds_are_read_from_any_row(
    tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_files, "BATCH_ROWS", 2)
    expected = []
    for part in "ab":
        table = pa.table({"id": [f"{part}{n}" for n in range(7)], "text": [f"text {part}{n}" for n in range(7)]})
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(
            tmp_path / f"{part}{suffix}", table.schema
        ) as to:
            to.write_table(table, max_chunksize=3)
        expected += table["text"].to_pylist()
    source = resolve_source(str(tmp_path))
    for start in (0, 2, 3, 6, 7, 10, 14, 15):
        assert [document.text for document in source.documents(start)] == expected[start:]
    (tmp_path / f"a{suffix}").write_bytes((tmp_path / f"a{suffix}").read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"cannot read .*a\{suffix} as arrow"):
        read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.parquet", "x.arrow", "x", "x.bin", "x.pdf"])
def test_a_git_lfs_pointer_is_told_under_every_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, not the data; run `git lfs pull`"):
        read(tmp_path / name)


REFUSED = {
    "x.pdf": (b"%PDF-1.7\n", "PDF"),
    "x.txt": (b"%PDF-1.7\n", "PDF"),
    "x.docx": (b"PK\x03\x04", "word processor"),
    "x.xlsx": (b"PK\x03\x04", "spreadsheet"),
    "x.zip": (b"PK\x03\x04", "archive"),
    "x": (b"PK\x03\x04\x14", "archive"),
    "x.tar.gz": (gzip.compress(b"x"), "archive"),
    "x.tgz": (gzip.compress(b"x"), "archive"),
    "x.PNG": (b"\x89PNG\r\n\x1a\n", "image"),
    "x.md": (b"\x89PNG\r\n\x1a\n", "image"),
    "x.jpg": (b"\xff\xd8\xff\xe0", "image"),
    "x.pkl": (b"\x80\x04\x95", "pickle"),
    "data": (b"\x80\x04\x95", "pickle"),
    "x.pt": (b"PK\x03\x04", "pickle"),
    "x.safetensors": (b"\x08\0\0\0", "tensor"),
    "x.npy": (b"\x93NUMPY", "numpy"),
    "x.sqlite": (b"SQLite format 3\0", "database"),
    "y.jsonl": (b"SQLite format 3\0", "database"),
    "x.html.txt": (b"\n<!DOCTYPE html>\n<p>404", "HTML page"),
    "z.jsonl": (b"<html><p>403", "HTML page"),
    "z.parquet": (b"<html><p>403", "HTML page"),
    "w.txt": (b"PAR1\x15\x04", r"contains parquet data; .*ends in \.parquet"),
    "w.jsonl": (b"ARROW1\0\0", r"contains arrow data; .*ends in \.arrow"),
    "x.lz4": (b"\x04\x22\x4d\x18", "compressed in an unsupported way"),
    "x.orc": (b"ORC", "unsupported format"),
    "annex.csv": (b"/annex/objects/SHA256E-s1--ab", "git annex get"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str) -> None:
    data, said = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("text", ["id,text\r\n1,Grüße\r\n" * 1000, "漢字の本\n" * 3000])
def test_wide_encodings_are_told_with_the_way_to_convert_them(
    tmp_path: Path, encoding: str, marked: bool, text: str
) -> None:
    for name in ("x.txt", "x.csv", "x.jsonl"):
        (tmp_path / name).write_bytes(("\ufeff" * marked + text).encode(encoding))
        with pytest.raises(
            ValueError, match=rf"(?i){name} is text in {encoding.replace('-le', 'le')[:6]}.*iconv -f"
        ) as e:
            read(tmp_path / name)
        assert encoding.upper().replace("-LE", "LE").replace("-BE", "BE") in str(e.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (json.dumps([{"text": "a"}], indent=1), r"line 1: not JSON .*jq -c '\.\[\]' FILE"),
        (json.dumps([{"text": "a"}]), r"line 1: holds a list; .*jq -c '\.\[\]' FILE"),
        (json.dumps({"text": "a"}, indent=1), r"line 1: not JSON .*jq -c \. FILE"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz"])
def test_json_that_is_one_array_or_object_is_refused_with_the_way_to_make_lines(
    tmp_path: Path, body: str, said: str, suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(body.encode()) if suffix.endswith("gz") else body.encode())
    with pytest.raises(ValueError, match=said):
        read(path)


@pytest.mark.parametrize("name", ["noext", "x.txt", "x.data", "part-00000", "x.gz", "x.jsonl_1"])
@pytest.mark.parametrize("data", [LINES, b'{"text": "one"}', b'\xef\xbb\xbf\n{ "text": "' + b"x" * 9000 + b'"}\n'])
def test_json_lines_under_another_name_are_never_one_text(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    end = r"\.jsonl\.gz" if name.endswith("gz") else r"\.jsonl"
    with pytest.raises(ValueError, match=rf"{name} contains JSON lines .*it ends in {end}$"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["", "{", "{}\n", '{"a": 1}\nand prose', '{"a": 1,\n "b": 2}', "[1]\n", "ORC", "GGUF is", "Obj", "<p>x"]
)
def test_what_only_resembles_another_format_is_text(tmp_path: Path, text: str) -> None:
    for name in ("x.txt", "README", "x.rst"):
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == [text]


def test_parquet_under_a_capital_ending_is_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.PARQUET")
    assert read(tmp_path / "x.PARQUET") == ["a"]
