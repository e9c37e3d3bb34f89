"""Captured shares compared with those published for the real Mixtral: the arithmetic and the command.

The model behind the command draws its choices so that its shares are those published for a domain; it recognizes the
domain by the words of the text.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_model import FakeEngine, FakeRun, fake_layout, word_id

from analysis.metrics import published as validation
from analysis.metrics.published import compared, published_counts, total_variation
from jobs import validate
from jobs.capturing import run as prepare
from jobs.validate import ValidateConfig, one_text
from store import Layout, coverage, open_capture
from workers.shard import Routes

Command = Callable[..., Any]
DOMAINS = ("c4", "github")
LAYERS = (0, 3, 7, 15)
PUBLISHED = json.loads((Path(validation.__file__).parent / "mixtral_published.json").read_text())
TOKENS = 208_896


def counts_of(domain: str, form: str, layer: int) -> np.ndarray:
    return np.array(PUBLISHED[f"expert_counts_{form}"][domain][str(layer)])


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one / one.sum() - other / other.sum()).sum() / 2)


# --- The arithmetic ---------------------------------------------------------------------------------------


def test_the_published_counts_are_those_of_the_file() -> None:
    known = published_counts()
    assert known.attrs["n"] == TOKENS == 102 * validation.BLOCK_TOKENS
    for domain in DOMAINS:
        for layer in (0, 7, 15):
            of = known["counts"].sel(domain=domain, layer=layer)
            assert of.sel(choice="first").values.tolist() == PUBLISHED["expert_counts_top1"][domain][str(layer)]
            assert of.sel(choice="first or second").values.tolist() == counts_of(domain, "top2", layer).tolist()
            assert int(of.sum()) == 3 * TOKENS
    assert known["domain"].values.tolist() == [*DOMAINS] == [name for name in DOMAINS if hasattr(ValidateConfig, name)]


def test_distances_scale_and_verdicts_equal_numpy() -> None:
    random = np.random.default_rng(4)
    known = published_counts()
    drawn = {name: random.integers(1, 2000, (31, 2, 3, 8)) for name in DOMAINS}
    drawn["c4"][0] = known["counts"].sel(domain="c4") + random.integers(0, 500, (2, 3, 8))
    drawn["github"][0, :, :2] = known["counts"].sel(domain="c4").values[:, :2]
    coords = {"choice": known["choice"].values, "layer": [0, 7, 15]}
    found = compared(
        {n: xr.DataArray(a, coords, ("replicate", "choice", "layer", "expert")) for n, a in drawn.items()}, known
    )
    for name, other in (DOMAINS, DOMAINS[::-1]):
        for c, form in enumerate(("top1", "top2")):
            for index, layer in enumerate((0, 7, 15)):
                cell = found.isel(choice=c, layer=index).sel(domain=name)
                own, far = (apart(drawn[name][0, c, index], counts_of(to, form, layer)) for to in (name, other))
                scale = apart(counts_of(name, form, layer), counts_of(other, form, layer))
                assert cell["distance"].sel(published=[name, other]).values == pytest.approx([own, far])
                assert float(cell["own"]) == pytest.approx(own)
                assert float(cell["scale"]) == pytest.approx(scale)
                noise = [apart(one, drawn[name][0, c, index]) for one in drawn[name][1:, c, index]]
                assert float(cell["sampling"]) == pytest.approx(np.quantile(noise, 0.95) * 2**0.5)
                assert cell["nearest"].item() == (name if own < far else other)
                assert bool(cell["confirmed"]) == (own < far and own < scale)
                said = "its own" if own < scale else "far from all"
                assert cell["verdict"].item() == (said if own < far else f"nearer to {other}")
    assert bool(found["confirmed"].sel(domain="c4").all())
    assert set(found["verdict"].sel(domain="github").values[:, :2].ravel()) == {"nearer to c4"}
    assert 0.04 < float(found["scale"].min()) < float(found["scale"].max()) < 0.126


def test_a_model_that_is_far_from_all_is_not_confirmed_though_it_lies_on_the_right_side() -> None:
    known = published_counts()
    skewed = known["counts"].sel(domain=["c4"]) + 3 * TOKENS * (known["expert"] == 0)
    counts = {"c4": xr.concat([skewed.isel(domain=0, drop=True)] * 3, "replicate")}
    found = compared(counts, known)
    assert not found["confirmed"].any()
    assert "far from all" in found["verdict"].values


def test_the_distance_of_nothing_is_not_zero() -> None:
    nothing = xr.zeros_like(published_counts()["counts"])
    assert bool(total_variation(nothing, published_counts()["counts"]).isnull().all())
    with pytest.raises(ValueError, match=r"no counts are published for \['arxiv'\]: choose from \['c4', 'github'\]"):
        compared({"arxiv": nothing}, published_counts())


# --- A model that draws published shares ------------------------------------------------------------------


def pairs_of(domain: str, layer: int) -> np.ndarray:
    """Probabilities (first, second) with the published shares and an empty diagonal, by proportional fitting."""
    first, second = (
        counts_of(domain, "top1", layer),
        counts_of(domain, "top2", layer) - counts_of(domain, "top1", layer),
    )
    table = 1.0 - np.eye(8)
    for _ in range(2000):
        table *= (first / table.sum(1))[:, None]
        table *= second / table.sum(0)
    np.testing.assert_allclose(table.sum(1), first, rtol=1e-6)
    return table / table.sum()


class DrawingEngine(FakeEngine):
    """Draws each row's choices from the published shares of the domain whose words it has."""

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        routes = super().route(token, length)
        for row, tokens in enumerate(length):
            ids = token[row, :tokens]
            domain = DOMAINS[ids[-1] % 2]
            random = np.random.default_rng(zlib.crc32(ids.tobytes()))
            for index, layer in enumerate(self.layers):
                table = TABLES[domain, layer]
                drawn = random.choice(64, tokens, p=table.ravel())
                routes["expert"][row, :tokens, index] = np.stack(np.divmod(drawn, 8), -1)
        return routes


TABLES = {(domain, layer): pairs_of(domain, layer if layer != 3 else 7) for domain in DOMAINS for layer in LAYERS}


class DrawingRun(FakeRun):
    """Replaces `jobs.capturing.run.Run` in the command, with that model."""

    engine: type[FakeEngine] = DrawingEngine
    shape: Layout = fake_layout(layers=LAYERS)

    def __init__(self, asked: Any) -> None:
        layout = fake_layout(
            **{name: getattr(self.shape, name) for name in ("layers", "num_experts", "experts_per_token")},
            sequence_length=asked.sequence_length,
            rows_per_shard=asked.rows_per_shard,
        )
        super().__init__(asked.store_path, layout, bos=asked.bos, batch_tokens=4 * asked.sequence_length)
        sizes = (self.shape.layers, self.shape.num_experts, self.shape.experts_per_token)
        self.make_engine = partial(self.engine, *sizes)
        self.described = {
            "model": asked.model, "quantization": asked.quantization, "layers": list(sizes[0]),
            "num_experts": sizes[1], "experts_per_token": sizes[2],
        }  # fmt: skip


def text_of(domain: str, tokens: int) -> str:
    """A text of the domain's words: those whose id is even, or odd."""
    known = [word for number in range(1000) if word_id(word := f"w{number}") % 2 == DOMAINS.index(domain)]
    return " ".join(np.array(known)[np.random.default_rng(tokens).integers(0, len(known), tokens)])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Short texts, 10 blocks and a few tokens, and the artificial model instead of a real one."""
    monkeypatch.setattr(prepare, "Run", DrawingRun)
    monkeypatch.chdir(tmp_path)
    for domain in DOMAINS:
        (tmp_path / f"{domain}.txt").write_text(text_of(domain, 20_500))
    return {domain: tmp_path / f"{domain}.txt" for domain in DOMAINS}


def run(command: Command, c4: object, github: object, *more: str) -> Any:
    return command("fake", "--c4", c4, "--github", github, *more, main=validate.main)


# --- The command ------------------------------------------------------------------------------------------


def test_a_model_with_the_published_shares_is_confirmed_within_sampling(
    command: Command, files: dict[str, Path], tmp_path: Path
) -> None:
    for domain, path in files.items():
        path.write_text(text_of(domain, TOKENS + 5000))
    done = run(command, files["c4"], files["github"])
    assert done.status == 0, done.err
    assert done.out.count("│ its own ") == 12
    assert "12 of 12 shares" in done.out
    assert "captured: fake, nf4" in done.out
    for domain in DOMAINS:
        capture = open_capture(tmp_path / "validate.zarr", domain).compute()
        assert f"{domain}: {TOKENS - 1:,} tokens; {TOKENS:,} were published" in done.out  # all but the BOS
        assert capture["length"].values[:102].tolist() == [2048] * 102  # one position is used by a BOS
        assert np.unique(capture["document_id"]).tolist() == [0]
        experts = capture["expert"].values[:102].reshape(-1, len(LAYERS), 2)[1:]
        for layer in (0, 7, 15):
            here = experts[:, LAYERS.index(layer)]
            for form, chosen in (("top1", here[:, 0]), ("top2", here)):
                own = apart(np.bincount(chosen.ravel(), minlength=8), counts_of(domain, form, layer))
                assert own < 0.006  # 208,895 independent draws
                assert f"{own:.4f}" in done.out


def test_swapped_texts_and_a_model_without_structure_are_not_confirmed(
    command: Command, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(command, files["github"], files["c4"])
    assert done.status == 1
    assert "0 of 12 shares" in done.out
    assert done.out.count("nearer to c4") == done.out.count("nearer to github") == 6
    monkeypatch.setattr(DrawingRun, "engine", FakeEngine)
    assert run(command, files["c4"], files["github"], "--store", "other.zarr").status == 1


def test_one_domain_is_enough_and_a_short_text_is_told(command: Command, files: dict[str, Path]) -> None:
    done = command("fake", "--github", files["github"], main=validate.main)
    assert (done.status, "6 of 6" in done.out, "c4:" in done.out) == (0, True, False)
    assert "github: 20,500 tokens; 208,896 were published" in done.out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": (0, 1, 2)}, "layers [0, 1, 2], 8 experts and 2 choices"),
        ({"layers": LAYERS, "num_experts": 16}, "layers [0, 3, 7, 15], 16 experts and 2 choices"),
        ({"layers": LAYERS, "experts_per_token": 1}, "layers [0, 3, 7, 15], 8 experts and 1 choices"),
    ],
)
def test_another_model_is_refused_before_anything_is_done(
    command: Command,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(DrawingRun, "shape", fake_layout(**changes))
    done = run(command, files["c4"], files["github"])
    assert (done.status, done.out) == (2, "")
    assert "layers [0, 7, 15], 8 experts and 2 choices, but this model" in done.err
    assert said in done.err
    assert not (tmp_path / "validate.zarr").exists()


def test_the_tiny_model_goes_through_the_real_loading_code_and_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4.txt").write_text("some text")
    done = command("tiny", "--c4", "c4.txt", "--quantization", "none", main=validate.main)
    assert (done.status, done.out) == (2, "")
    assert "this model has layers [0, 1, 2, 3, 4, 5, 6, 7], 8 experts and 2 choices: use Mixtral 8x7B" in done.err


def test_a_real_checkpoint_is_captured_as_the_published_blocks_were(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = published_counts().assign_coords(layer=[0, 3, 7])  # the tiny model has no layer 15
    monkeypatch.setattr(validation, "published_counts", lambda: known)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4.jsonl").write_text("\n".join(json.dumps({"text": "A text about bread. " * 60}) for _ in range(10)))
    done = command("tiny", "--c4", "c4.jsonl", "--quantization", "none", main=validate.main)
    assert (done.status, "0 of 6 shares" in done.out) == (1, True), done.err  # random weights
    capture = open_capture(tmp_path / "validate.zarr", "c4").compute()
    assert capture["token"].values[:, 0].tolist() == [1, *capture["token"].values[1:, 0]]  # one BOS, at the start
    assert (capture["token"].values == 1).sum() == 1
    assert capture["length"].values[:-1].tolist() == [2048] * (capture.sizes["doc"] - 1)
    assert f"c4: {int(capture['length'].sum()) - 1:,} tokens" in done.out
    assert (capture.attrs["bos"], capture.attrs["sequence_length"]) == ("document", 2048)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give the text of a published domain"),
        (("--c4", "nowhere.txt"), "no data set 'nowhere.txt'"),
        (("--c4", "empty.txt"), "--c4 empty.txt contains no text"),
        (("--c4", "chat.jsonl"), "--c4 chat.jsonl contains conversations"),
        (("--c4", "https://a/b.txt"), "no data set 'https://a/b.txt': URLs are not supported; download"),
        (("--c4", "c4.txt", "--store", "s3://bucket/x"), "--store s3://bucket/x: a validation runs on this machine"),
    ],
)
def test_what_cannot_be_validated_exits_2(
    command: Command, files: dict[str, Path], options: Sequence[str], said: str
) -> None:
    files["c4"].with_name("empty.txt").write_text(" \n")
    files["c4"].with_name("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    done = command("fake", *options, main=validate.main)
    assert (done.status, done.out) == (2, "")
    assert said in done.err


def test_an_interrupted_validation_goes_on(
    command: Command, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Breaking(DrawingEngine):
        left = 4

        def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
            Breaking.left -= 1
            if Breaking.left < 0:
                raise KeyboardInterrupt
            return super().route(token, length)

    monkeypatch.setattr(validate, "ROWS_PER_SHARD", 4)
    whole = run(command, files["c4"], files["github"], "--store", "whole.zarr")
    monkeypatch.setattr(DrawingRun, "engine", Breaking)
    done = run(command, files["c4"], files["github"])
    assert (done.status, done.out) == (130, "")
    store = tmp_path / "validate.zarr"
    assert 0 < sum(coverage(store, name).shards_done for name in DOMAINS) < 6
    before = {path: path.stat().st_mtime_ns for path in store.rglob("commits/*.json")}
    monkeypatch.setattr(DrawingRun, "engine", DrawingEngine)
    again = run(command, files["c4"], files["github"])
    assert (again.status, again.out) == (0, whole.out)
    assert "skipped, committed before" in again.err or "nothing to do" in again.err
    assert before
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_failed_capture_is_no_verdict(
    command: Command, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(DrawingRun, "assignment", lost)
    done = run(command, files["c4"], files["github"])
    assert (done.status, done.out) == (2, "")
    assert "error: the GPU is lost" in done.err


def test_documents_are_read_as_one_text_with_the_line_ends_of_python(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one\r\ntwo", "three\r", "four" * 100, "never read")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = one_text("c4", str(tmp_path / "a.jsonl"), 50)
    [document] = source.documents()
    assert document.text == "\n".join(["one\ntwo", "three\n", "four" * 100])[:50]
    assert list(source.documents(1)) == []
    (tmp_path / "b.txt").write_text(document.text)
    assert one_text("c4", str(tmp_path / "b.txt"), 50).identity == source.identity  # wherever it lies
    assert one_text("c4", str(tmp_path / "b.txt"), 49).identity != source.identity
