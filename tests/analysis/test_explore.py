"""The explorer over HTTP: every page shows what the store holds, every link has a target, and strangers are
rejected."""

import base64
import http.client
import json
import multiprocessing
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import uvicorn
from fake_model import fake_capture, fake_layout, words
from patience import HUNG_S, wait_until

from analysis.explorer import serving as serving_module
from analysis.explorer.document import document_page, whole
from analysis.explorer.live import Explorer
from analysis.explorer.search import find_tokens
from analysis.explorer.site import site
from analysis.explorer.token import token_page
from analysis.metrics.choices import coactivation, transitions
from analysis.metrics.load import expert_load
from analysis.metrics.tokens import expert_tokens
from jobs import explore
from store import CaptureGroup, open_capture

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [words(90, number) for number in range(5)] + ["", words(40, 1), words(40, 1)]


@contextmanager
def serving(explorer: Explorer) -> Iterator[str]:
    """The address of an explorer that runs during the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(site(explorer), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(HUNG_S)
        listener.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two captures of a fake model; the second lacks shards."""
    path = tmp_path_factory.mktemp("explore") / "s.zarr"
    fake_capture(path, TEXTS)
    fake_capture(path, TEXTS[:3], name="some")
    for shard in (1, 2):
        CaptureGroup(path, "some").discard(shard)
    return path


@pytest.fixture(scope="module")
def explorer(store: Path) -> Explorer:
    """Both, indexed."""
    explorer = Explorer(str(store), ["fake", "some"])
    for name in explorer.indexes:
        explorer.refresh(name)
    assert not explorer.problems
    return explorer


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    """The address of their explorer."""
    with serving(explorer) as address:
        yield address


def asked(url: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of any answer; redirects are followed."""
    try:
        with urllib.request.urlopen(url, timeout=HUNG_S) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def text_of(page: str) -> str:
    """The text of a page without its markup."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(page)
    return re.sub(r"\s+", " ", "".join(found))


def data_of(page: str) -> dict[str, Any]:
    """The data of the page's script."""
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    data: dict[str, Any] = json.loads(text)
    return data


def test_every_link_leads_somewhere_and_every_answer_has_its_policy(address: str) -> None:
    to_see, seen = ["/", "/fake/document/0"], set[str]()
    while to_see and len(seen) < 250:
        place = to_see.pop(len(seen) * 7 % len(to_see))  # alternates between depth and breadth
        if place in seen:
            continue
        seen.add(place)
        status, headers, page = asked(address + place)
        assert status == 200, place
        assert "default-src 'none'" in headers["content-security-policy"], place
        assert headers["x-content-type-options"] == "nosniff"
        links = {link.replace("&amp;", "&").split("#")[0] for link in re.findall(r'(?:href|src)="(/[^"]*)"', page)}
        to_see += sorted(links - seen)
    kinds = {re.sub(r"\d+|\?.*", "", place) for place in seen}
    wanted = {
        "/",
        "/fake",
        "/fake/document/",
        "/fake/document//export",
        "/fake/token/",
        "/fake/expert//",
        "/fake/place",
    }
    assert wanted <= kinds


@pytest.mark.parametrize(
    ("place", "status", "said"),
    [
        ("/nothing", 404, "no data set 'nothing': available are fake, some"),
        ("/fake/document/99", 404, "document 99: fake has documents 0 to 7"),
        ("/fake/document/0?page=99", 404, "page 99 of document 0: the document has pages 1 to"),
        ("/fake/document/0?page=x", 400, "page=x is no number"),
        ("/fake/document/0?page=-1", 400, "page=-1 is no number"),
        ("/fake/token/1000", 404, "the vocabulary of fake has tokens 0 to 999"),
        ("/fake/token/5?layer=1", 404, "name a layer of 0 to 2 and an expert, or neither"),
        ("/fake/token/5?layer=7&expert=1", 404, "name a layer of 0 to 2"),
        ("/fake/token/5?layer=1&expert=8", 404, "expert 8: fake has experts 0 to 7"),
        ("/fake/token/5?page=999", 404, "page 999: pages are 1 to"),
        ("/fake?page=7", 404, "page 7: pages are 1 to 1"),
        ("/fake?page=0", 404, "page 0: pages are 1 to 1"),
        ("/fake/token/5?page=0", 404, "page 0: pages are 1 to"),
        ("/fake/document/0?page=0", 404, "page 0 of document 0: the document has pages 1 to"),
        ("/fake/expert?layer=1", 400, "name a layer and an expert"),
        ("/state.json", 404, "no data set 'state.json'"),
        ("/fake/expert/9/1", 404, "fake has experts 0 to 7 at layers 0 to 2"),
        ("/fake/expert/1/8", 404, "fake has experts 0 to 7"),
        ("/fake/place?row=9999&position=0", 404, "fake has no token in row 9999"),
        ("/fake/search?q=", 400, "the search is empty"),
        ("/-/search?q=%00", 400, "the search is empty"),
        ("/fake/../../etc/passwd", 404, ""),
        ("/%2e%2e/%2e%2e/etc/passwd", 404, ""),
        ("/fake%00", 404, "no data set"),
        ("/fake/document/0/export/x", 404, ""),
    ],
)
def test_what_cannot_be_shown_is_said_on_a_page(address: str, place: str, status: int, said: str) -> None:
    found, headers, page = asked(address + place)
    assert found == status
    assert said in text_of(page)
    assert "Traceback" not in page
    assert "default-src 'none'" in headers["content-security-policy"]


def test_a_request_under_a_foreign_name_is_refused(address: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=HUNG_S)
    hosts = {"evil.example": 400, "127.0.0.1.evil.example": 400, "127.0.0.1:1": 200, "localhost": 200, "[::1]:80": 200}
    for host, status in hosts.items():
        connection.request("GET", "/-/state.json", headers={"Host": host})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status, host
    connection.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_written(address: str, method: str) -> None:
    request = urllib.request.Request(address + "/fake", method=method, data=b"x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=HUNG_S)
    refused.value.close()
    assert refused.value.code == 405


def test_a_page_of_text_holds_the_document_s_routes(address: str, store: Path) -> None:
    capture = open_capture(store, "fake").load()
    pieces = capture["piece"].values
    for document in (0, 3, 6):
        rows = np.flatnonzero(capture["document_id"].values == document)
        rows = rows[np.argsort(capture["offset"].values[rows])]
        for page, row in enumerate(rows, 1):
            shown = data_of(asked(f"{address}/fake/document/{document}?page={page}")[2])
            [own] = shown["documents"]
            length = int(capture["length"].values[row])
            token = capture["token"].values[row, :length]
            assert own["ids"] == token.tolist()
            assert own["texts"] == [str(pieces[number]).replace("▁", " ") for number in token]
            expert = np.frombuffer(base64.b64decode(own["expert"]), np.uint8).reshape(length, 3, 2)
            np.testing.assert_array_equal(expert, capture["expert"].values[row, :length])
            weight = np.frombuffer(base64.b64decode(own["weight"]), "<u2").reshape(length, 3, 2) * own["scale"]
            np.testing.assert_allclose(weight, capture["weight"].values[row, :length], atol=2e-5)


def test_what_is_not_captured_is_shown_without_routes(address: str, store: Path) -> None:
    capture = open_capture(store, "some", allow_incomplete=True)
    for row in range(capture.sizes["doc"]):
        captured = bool(capture["captured"].values[row])
        page = asked(f"{address}/some/place?row={row}&position=0")[2]
        expert = np.frombuffer(base64.b64decode(data_of(page)["documents"][0]["expert"]), np.uint8)
        assert (expert == 255).all() == (not captured)
        assert (expert == 255).any() == (not captured)
    assert "some is incomplete: " in json.dumps(json.loads(asked(f"{address}/-/state.json")[2]))


def test_an_empty_document_is_a_page_that_says_so(address: str) -> None:
    status, _, page = asked(f"{address}/fake/document/5")
    assert status == 200
    assert "0 tokens" in text_of(page)


def test_a_token_s_places_are_as_many_as_its_map_says(address: str, store: Path) -> None:
    capture = open_capture(store, "fake").load()
    token, expert = capture["token"].values, capture["expert"].values
    number = int(np.bincount(token[token > 1]).argmax())
    at = token == number
    for layer, e in ((0, 3), (2, 5), (1, 0)):
        chose = int((expert[at][:, layer] == e).any(axis=1).sum())
        page = text_of(asked(f"{address}/fake/token/{number}?layer={layer}&expert={e}")[2])
        assert f"{chose:,} of {at.sum():,} chose expert {e} of layer {layer}" in page


def test_an_expert_s_page_says_what_the_metrics_say(address: str, store: Path) -> None:
    capture = open_capture(store, "fake")
    share = expert_load(capture)["share"].sel(layer=1, expert=4)
    top = expert_tokens(capture, layer=1, by="count").sel(expert=4, place=1)
    pair = coactivation(capture)["probability"].sel(layer=1, expert=4)
    partner, moves = int(pair.fillna(0).values.argmax()), transitions(capture)["probability"].sel(layer=1, expert=4)
    page = text_of(asked(f"{address}/fake/expert/1/4")[2])
    assert f"fake{float(share):.1%}" in page.replace(" ", "")
    assert f"{int(top['counts']):,} {int(top['tokens']):,} {float(top['share']):.1%}" in page.replace("  ", " ") or (
        f"{int(top['counts']):,}{int(top['tokens']):,}{float(top['share']):.1%}" in page.replace(" ", "")
    )
    assert f"{partner}{float(pair.max()):.1%}" in page.replace(" ", "")
    assert f"{int(moves.values.argmax())}{float(moves.max()):.1%}" in page.replace(" ", "")


def test_a_search_finds_tokens_and_documents(address: str) -> None:
    page = text_of(asked(f"{address}/fake/search?q=document+3")[2])
    assert "document 3" in page
    assert "Tokens" not in page
    page = text_of(asked(f"{address}/fake/search?q=nothing+has+this")[2])
    assert "No text, token or document name in fake contains it" in page
    assert "0 places" not in text_of(asked(f"{address}/-/search?q=1:2")[2])
    for scope in ("-", "fake"):
        page = text_of(asked(f"{address}/{scope}/search?q=/([/")[2])
        assert page.count("/([/ is not a regular expression") == 1
        assert "Token class" not in page


def test_tokens_that_occur_are_listed_and_the_one_that_is_asked_for_comes_first(explorer: Explorer) -> None:
    view = explorer.shown["fake"].view
    occurring = np.flatnonzero(view.token_counts).tolist()
    token = min(occurring, key=lambda number: len(view.pieces[number]))
    text = view.texts[token].strip()
    found = find_tokens(view, text, 10_000)["rows"]
    assert found[0]["id"] == token
    assert sorted(row["id"] for row in found) == [number for number in occurring if text in view.texts[number]]
    assert len(found) < sum(text in piece for piece in view.pieces), "others contain it and do not occur"


def test_a_phrase_s_places_are_those_of_the_text(explorer: Explorer, address: str) -> None:
    view, capture = explorer.shown["fake"].view, open_capture(explorer.path, "fake").load()
    token = capture["token"].values[0, 1:3].tolist()
    phrase = "".join(view.texts[number] for number in token)[1:]
    rows = [
        "".join(view.texts[number] for number in own[:length].tolist())
        for own, length in zip(capture["token"].values, capture["length"].values, strict=True)
    ]
    number = sum(len(re.findall(f"(?={re.escape(phrase)})", row)) for row in rows)
    assert number > 0
    page = asked(f"{address}/fake/search?{urlencode({'q': phrase.upper()})}")[2]
    assert f"{number} place" in text_of(page)
    assert page.count("<mark>") == min(number, 20)
    everywhere = text_of(asked(f"{address}/-/search?{urlencode({'q': phrase})}")[2])
    assert f"fake {number} place" in everywhere


def test_the_next_place_of_a_token_is_the_one_behind_and_after_the_last_comes_the_first(explorer: Explorer) -> None:
    now, capture = explorer.shown["fake"].view.now, open_capture(explorer.path, "fake").load()
    token = capture["token"].values
    number = int(np.bincount(token[token >= 0])[3:].argmax()) + 3
    places = [(int(row), int(position)) for row, position in np.argwhere(token == number)]
    assert len(places) > 2
    for before, after in zip(places, places[1:] + places[:1], strict=True):
        assert now.neighbour(number, *before) == after
        assert now.neighbour(number, *after, back=True) == before
    row, position = places[1]
    assert now.neighbour(number, row, position - 1) == places[1], "from a place where it is not"


def test_what_a_running_capture_commits_is_shown_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fake_capture(path, TEXTS)
    commits = path / "fake" / "expert" / "commits"
    kept = {file: file.read_bytes() for file in sorted(commits.glob("*.json"))[2:]}
    for file in kept:
        file.unlink()
    explorer, stop = Explorer(str(path), ["fake"]), threading.Event()
    following = threading.Thread(target=explorer.follow, args=(stop,), daemon=True)
    following.start()
    try:
        with serving(explorer) as address:

            def state() -> dict[str, Any]:
                [found] = json.loads(asked(f"{address}/-/state.json")[2])["sets"]
                return dict(found)

            wait_until(lambda: state()["indexed"] == 2, "the first shards are indexed")
            before = state()
            assert before["busy"]
            for file, data in kept.items():
                file.write_bytes(data)
            wait_until(lambda: state()["indexed"] == 2 + len(kept), "all shards are indexed")
            assert state()["digest"] != before["digest"]
            assert not state()["busy"]
            assert state()["note"] == ""
    finally:
        stop.set()
        following.join(HUNG_S)


def test_an_index_that_cannot_be_written_is_said_and_texts_are_shown_all_the_same(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said: list[str] = []
    explorer = Explorer(str(store), ["fake"], tmp_path / "file", log=said.append)
    assert explorer.refresh("fake") == 0
    assert [line for line in said if "use --index to choose another folder" in line] == said
    with serving(explorer) as address:
        assert "The index of fake is not updated: " in asked(f"{address}/-/state.json")[2]
        assert data_of(asked(f"{address}/fake/document/0")[2])["documents"][0]["ids"]
        assert "Indexing has just started" in text_of(asked(f"{address}/fake")[2])
        assert asked(f"{address}/fake/expert/0/0")[0] == 503, "not shown as measured zero"
        assert explorer.refresh("fake") == 0
    assert len(said) == 1, "said once"


def test_a_damaged_shard_is_said_on_the_page_of_its_text(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    explorer = Explorer(str(copy), ["fake"], tmp_path / "index")
    shard = copy / "fake" / "expert" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 255
    shard.write_bytes(data)
    with serving(explorer) as address:
        found = [asked(f"{address}/fake/place?row={row}&position=0") for row in range(4)]
        assert any(status == 500 and "--verify marks the damaged shards" in text_of(page) for status, _, page in found)
        explorer.refresh("fake")
        assert "--verify marks the damaged shards" in explorer.problems["fake"]


# The command


def state_at(address: str) -> list[dict[str, Any]]:
    """The progress of each data set."""
    return list(json.loads(asked(f"{address}-/state.json")[2])["sets"])


def all_indexed(address: str) -> bool:
    """Whether everything that is committed is indexed."""
    return all(each["indexed"] == each["shards_done"] for each in state_at(address))


def test_the_command_prints_its_address_and_ctrl_c_ends_it(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "explore.py"), str(store), "--port", "0", "--index", str(tmp_path)]
    command += ["--processes", "2", "--page", "fake/expert/1/0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        page = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/fake/expert/1/0", page)
        address = page.removesuffix("fake/expert/1/0")
        status, _, page = asked(address)
        assert status == 200
        assert "What do the experts do?" in page
        wait_until(lambda: all_indexed(address), "all shards are indexed")
        started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert started, "another process answers, too"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=HUNG_S)
        assert process.returncode == 0
        wait_until(lambda: not any(Path("/proc", number).exists() for number in started), "all have ended")
        assert "shards indexed" in said
        assert "Traceback" not in said
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--export", "page.html"], "--export FILE and --document ID go together"),
        (["--document", "0"], "--export FILE and --document ID go together"),
        (["--port", "70000"], "--port 70000: 0 to 65535"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen at 192.0.2.1"),
        (["--export", "no/such/page.html", "--document", "0"], "its folder must exist"),
        (["--processes", "0"], "--processes 0: 1 or more"),
        (["--prot", "1"], "--prot"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_error(
    command: Any, store: Path, arguments: list[str], said: str
) -> None:
    ran = command(f"{store}/fake", *arguments, main=explore.main)
    assert ran.status == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_taken_port_is_named(command: Any, store: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = command(store, "--port", port, "--index", tmp_path, main=explore.main)
    assert ran.status == 2
    assert f"cannot listen at 127.0.0.1, port {port}" in ran.err


def test_documents_are_exported_by_id_or_name_as_one_file(command: Any, store: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ran = command(f"{store}/fake", "--export", page, "--document", "0", "--document", "document 3", main=explore.main)
    assert ran.status == 0
    assert ran.out.strip() == str(page)
    data = data_of(page.read_text())
    assert {document["document"] for document in data["documents"]} == {0, 3}
    capture = open_capture(store, "fake").load()
    wanted = [capture["length"].values[capture["document_id"].values == number].sum() for number in (0, 3)]
    assert sum(len(document["ids"]) for document in data["documents"]) == sum(wanted)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page.read_text()), "nothing is asked for"


def test_what_does_not_fit_one_file_is_refused(command: Any, store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for module in ("analysis.explorer.one_file", "analysis.explorer.site"):
        monkeypatch.setattr(f"{module}.MOST_TOKENS", 100)
    ran = command(
        f"{store}/fake", "--export", tmp_path / "p.html", "--document", "0", "--document", "1", main=explore.main
    )
    assert ran.status == 2
    assert "2 documents of 180 tokens: one file holds 100 at most" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_store_of_more_shards_than_files_may_be_open_is_explored(store: Path, tmp_path: Path) -> None:
    # One process: a second one is told up to two seconds later what the first has indexed, and may answer next.
    given = [str(store), "--port", "0", "--processes", "1", "--index", str(tmp_path)]
    code = f"import sys; sys.argv[1:] = {given!r}"
    code += "; from jobs import explore; from jobs.console.terminal import run_job; run_job(explore.main)"
    process = subprocess.Popen(
        ["bash", "-c", 'ulimit -Sn 40 && exec "$@"', "bash", sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        wait_until(lambda: all_indexed(address), "all shards are indexed")
        assert sum(each["indexed"] for each in state_at(address)) >= 25, "beside which a server needs more than 15"
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=HUNG_S)
    assert "Too many open files" not in said


def test_one_data_set_that_cannot_be_read_leaves_the_others(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    (copy / "some" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    explorer = Explorer(str(copy))
    assert list(explorer.shown) == ["fake"]
    with serving(explorer) as address:
        assert "some cannot be shown: " in text_of(asked(f"{address}/")[2])
    shutil.rmtree(copy / "fake")
    with pytest.raises(ValueError, match="is not a capture that this version reads"):
        Explorer(str(copy))


def test_a_data_set_that_begins_later_is_shown_and_one_that_is_captured_anew_is_another(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fake_capture(path, TEXTS[:2], name="first")
    explorer, stop = Explorer(str(path)), threading.Event()
    following = threading.Thread(target=explorer.follow, args=(stop,), daemon=True)
    following.start()
    try:
        wait_until(lambda: explorer.state("first")["indexed"] > 0, "the first data set is indexed")
        fake_capture(path, TEXTS[:1], name="second")
        wait_until(lambda: "second" in explorer.shown and not explorer.state("second")["busy"], "the second one is")
    finally:
        stop.set()
        following.join(HUNG_S)
    shutil.rmtree(path / "first")
    fake_capture(path, [words(20, 77)], name="first", layout=fake_layout(vocab_size=1500), identity={"other": 1})
    explorer.refresh("first")
    view = explorer.shown["first"].view
    assert (len(view.texts), view.now.tokens, view.names) == (1500, 20, ["document 0"])


def test_a_helper_shows_what_the_first_process_has_indexed_and_ends_with_it(store: Path, tmp_path: Path) -> None:
    first, helper = (Explorer(str(store), ["fake", "some"], tmp_path) for _ in range(2))
    first.refresh("fake")
    first.problems["some"] = "the disk is full"
    own, other = multiprocessing.Pipe()
    stop, pipes = threading.Event(), [own]
    telling = threading.Thread(target=serving_module._tell, args=(first, pipes, stop))
    telling.start()
    listening = threading.Thread(target=serving_module._listen, args=(helper, other))
    listening.start()
    wait_until(lambda: helper.shown["fake"].view.now.tokens == first.shown["fake"].view.now.tokens, "it is shown")
    wait_until(lambda: helper.problems == first.problems, "what went wrong is said")
    stop.set()
    telling.join(HUNG_S)
    own.close()
    listening.join(HUNG_S)
    assert not listening.is_alive()


def test_an_unexpected_error_does_not_end_the_following(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    explorer = Explorer(str(store), ["fake"], tmp_path, log=said.append)
    monkeypatch.setattr(explorer.indexes["fake"], "refresh", lambda **_: 1 / 0)
    assert explorer.refresh("fake") == 0
    assert said == ["fake: division by zero"]
    assert "division by zero" in explorer.state("fake")["note"]
    monkeypatch.undo()
    assert explorer.refresh("fake") > 0
    assert explorer.problems == {}


def test_where_tables_have_no_room_tokens_are_counted_in_their_places(
    store: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    kept = Explorer(str(store), ["fake"], tmp_path)
    kept.refresh("fake")
    monkeypatch.setattr("analysis.explorer.view.TABLES_BYTES", 0)
    bare = Explorer(str(store), ["fake"], tmp_path)
    one, other = (each.shown["fake"].view for each in (kept, bare))
    assert (len(one.tables), len(other.tables)) == (3, 0)
    for token in np.flatnonzero(one.token_counts).tolist():
        assert token_page(one, token) == token_page(other, token)
    for layer in (0, 1, 2):
        for by in ("lift", "count"):
            assert one.top(layer, by).equals(other.top(layer, by))
    monkeypatch.setattr("analysis.explorer.token.MAPPED", 6 * 3)  # of three occurrences
    frequent = int(one.token_counts.argmax())
    found = token_page(other, frequent)
    assert (found["of"], found["count"]) == (3, int(one.token_counts[frequent]))
    assert [sum(each) for each in found["counts"]] == [6, 6, 6]


def test_tokens_are_numbered_through_a_document_whatever_stands_before_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    fake_capture(path, [words(20, 1)], bos="row")
    view = Explorer(str(path)).shown["fake"].view
    pages = [document_page(view, 0, page + 1) for page in range(len(view.pages_of(0)))]
    assert [page["offset"] for page in pages] == [0, 8, 16]
    assert [number for page in pages for number in page["ids"]] == whole(view, 0)["ids"]


@pytest.mark.parametrize("array", ["token", "expert", "weight"])
def test_an_object_that_is_gone_is_not_shown_as_text_or_zero(store: Path, tmp_path: Path, array: str) -> None:
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    explorer = Explorer(str(copy), ["fake"], tmp_path / "index")
    shutil.rmtree(copy / "fake" / array / "c")
    with serving(explorer) as address:
        status, _, page = asked(f"{address}/fake/document/0")
    assert status == 500
    assert "cannot be decoded" in text_of(page)
