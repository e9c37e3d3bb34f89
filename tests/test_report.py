"""The report's text: what it says is computed from the data, and nothing in the data can act."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic import HOSTILE, make_capture

from analysis import report
from analysis.answers import answer, contrast_between
from analysis.answers import contrasted as contrasted_documents
from analysis.scan import scan
from analysis.sentences import sentences
from store import Coverage
from store.plan import Plan


def state_of(data, missing=()):
    """A coverage for a synthetic capture."""
    tokens = int(data["length"].sum())
    shards = -(-data.sizes["doc"] // data.attrs["rows_per_shard"])
    return Coverage(
        dataset=data.attrs["dataset"],
        plan=Plan(complete=True, rows=data.sizes["doc"], tokens=tokens, documents=data.sizes["document"]),
        shards_total=shards,
        missing=list(missing),
        wrong={},
        quarantined={},
        lost=[],
        tokens_done=tokens,
        bytes_done=0,
        seconds=0.0,
        digest="synthetic",
    )


def answers_of(label, **options):
    """The report's answers about a synthetic capture."""
    data = make_capture(dataset=label, **options).assign_attrs(model="m", quantization="nf4")
    return answer(data, state_of(data, options.get("missing", ())), label)


def contrasted(missing=(), **captures):
    """The report's answers about captures that are compared with each other; the last one lacks some shards."""
    captures = {label: data.assign_attrs(model="m", quantization="nf4") for label, data in captures.items()}
    documents, last = contrasted_documents(captures), list(captures)[-1]
    return [
        answer(
            data,
            state_of(data, missing if label == last else ()),
            label,
            documents=documents if label in documents else None,
        )
        for label, data in captures.items()
    ]


def told(answers):
    """The page's sentences."""
    return sentences(answers, contrast_between(answers))


def specs_of(page, kind):
    """The charts of one kind, in the page's order."""
    numbers = re.findall(rf'data-kind="{kind}" data-number="(\d+)"', page)
    return [page_data(page)["specs"][int(number)] for number in numbers]


def page_data(page):
    """What the page's script reads."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    for spec in data["specs"]:
        for name, packed in spec["datasets"].items():
            spec["datasets"][name] = [dict(zip(packed["columns"], row, strict=True)) for row in packed["rows"]]
    return data


def test_the_busiest_expert_named_is_the_one_that_numpy_finds():
    data = make_capture(seed=3, documents=40, special_token_ids=()).assign_attrs(model="m")
    answers = answer(data, state_of(data), "a")
    expert, length = data["expert"].values, data["length"].values
    filled = np.arange(expert.shape[1]) < length[:, None]
    counts = np.array([np.bincount(expert[filled][:, at].ravel(), minlength=8) for at in range(expert.shape[2])])
    layer, busiest = np.unravel_index(counts.argmax(), counts.shape)
    share = counts[layer, busiest] / counts[layer].sum()
    sentence, *_ = told([answers])
    number = int(data["layer"][layer])
    assert f"busiest expert is {busiest} at layer {number}, with {share:.1%}" in sentence
    assert f"{int(filled.sum()):,} tokens" in sentence


def planted(data, layer, expert, share):
    """A copy in which that share of the tokens reaches that expert, as their second choice where it was neither."""
    routes = data["expert"].compute().copy()
    pair = routes.sel(layer=layer).values
    lacks = (np.random.default_rng(1).random(pair.shape[:2]) < share) & (pair != expert).all(-1) & (pair[..., 0] < 255)
    pair[lacks, 1] = expert
    routes.loc[{"layer": layer}] = pair
    return data.assign(expert=routes.chunk(data["expert"].chunksizes))


def test_a_planted_specialist_is_named_with_its_shares_and_swapping_the_data_sets_swaps_what_is_said():
    one, other = (make_capture(seed=seed, documents=120, layers=(0, 4, 9), strength=0) for seed in (1, 2))
    other = planted(other, layer=4, expert=6, share=0.5)
    said = told(contrasted(one=one, other=other))
    assert len(said) == 3
    assert "other: " in said[1]
    assert "Its specialist is expert 6 at layer 4: 6" in said[1]
    numbers = re.search(r"(\d+)% of them reach it, and (\d+)% in .* \((\d+) to (\d+) points apart", said[1])
    reach, usual, low, high = map(int, numbers.groups())
    assert low < reach - usual < high
    assert reach == pytest.approx(100 * (1 / 4 + 0.5 * 3 / 4), abs=3)
    assert "25% would be even" in said[1]
    assert "busiest expert is 6 at layer 4 on other" in said[2]
    assert told(contrasted(other=other, one=one)) == [said[1], said[0], said[2]]


def test_of_uniform_routes_no_more_than_chance_is_said():
    finds = 0
    for seed in range(0, 24, 2):
        pair = {name: make_capture(seed=seed + at, documents=60, strength=0) for at, name in enumerate("ab")}
        said = told(contrasted(**pair))
        assert len(said) == 3  # and nothing of tokens
        beyond = ["beyond chance (smallest q over the layers" in sentence for sentence in said[:2]]
        assert beyond[0] == beyond[1]
        assert not beyond[0] or "999 shuffles of documents" in said[0]
        finds += not all(beyond)
    assert finds <= 2  # of twelve, where one in twenty is expected


def test_a_token_that_has_an_expert_of_its_own_is_told_as_numpy_counts_it():
    data = make_capture(seed=5, documents=120, strength=0, special_token_ids=())
    token = data["token"].values
    routes = data["expert"].compute().copy()
    routes.values[token == 7, 1] = [5, 2]  # always, at the second layer
    data = data.assign(expert=routes.chunk(data["expert"].chunksizes)).assign_attrs(model="m")
    *_, sentence = told([answer(data, state_of(data), "a")])
    pair = routes.values[:, :, 1][token >= 0]
    expert = int(re.search(r"go to expert (\d)", sentence)[1])
    assert expert in (2, 5)
    share = (pair == expert).any(-1).mean()
    assert f"at layer 1, 100% of the {(token == 7).sum():,} " in sentence
    assert f"gets {share:.0%} of all tokens" in sentence


def test_data_sets_of_different_models_are_not_contrasted():
    one, other = (make_capture(seed=seed, documents=20, strength=0) for seed in (1, 2))
    assert contrasted_documents({"one": one.assign_attrs(model="m"), "other": other.assign_attrs(model="n")}) == {}
    assert len(told([answers_of("one", seed=1, strength=0), answers_of("other", strength=0)])) == 2


def test_an_incomplete_capture_says_so_and_which_shards_are_missing():
    page = report.render([answers_of("part", documents=30, missing=(1,))])
    assert "Incomplete." in page
    assert "missing shards: 1" in page
    assert "Incomplete." not in report.render([answers_of("whole")])


def test_a_capture_without_a_token_is_reported_as_such():
    answers = answers_of("none", documents=4, missing=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert told([answers]) == ["none: no token is captured yet."]
    assert "no token is captured yet" in report.render([answers])


def test_hostile_pieces_stay_inside_the_data_and_come_back_whole():
    pieces = [*HOSTILE, *(f"w{index}" for index in range(40 - len(HOSTILE)))]
    answers = answers_of("<b>label</b>", documents=60, pieces=pieces, vocabulary=40)
    page = report.render([answers])
    assert "<b>label</b>" not in page
    assert "&lt;b&gt;label&lt;/b&gt;" in page
    assert page.count("</script>") == 3  # the data's own and the two scripts'
    assert "\u2028" not in page
    assert "\u202e" not in page
    tokens = specs_of(page, "tokens")[0]["datasets"]
    shown = {row["piece"] for rows in tokens.values() for row in rows}
    assert shown & set(HOSTILE)


def test_each_chart_holds_what_the_metrics_say():
    answers = answers_of("a", documents=40, layers=(1, 3, 4))
    page = report.render([answers])
    [cells] = specs_of(page, "load")[0]["datasets"].values()
    assert len(cells) == 3 * 8
    for row in cells:
        share = float(answers.load["share"].sel(layer=row["layer"], expert=row["expert"]))
        assert row["share"] == pytest.approx(100 * share, rel=1e-3)
    links = next(rows for rows in specs_of(page, "paths")[0]["datasets"].values() if "next_expert" in rows[0])
    above = (answers.moves["probability"] > answers.moves.attrs["null"]).sum()
    assert len(links) == int(above)


def test_the_policy_allows_the_page_s_own_scripts_only():
    page = report.render([answers_of("a")])
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert len(re.findall("sha256-", policy)) == 2
    assert "script-src 'sha256-" in policy


@pytest.mark.parametrize(("layers", "experts", "k", "sets"), [(32, 8, 2, 4), (48, 128, 8, 2)])
def test_pages_of_large_models_stay_under_three_megabytes(layers, experts, k, sets):
    shape = {"layers": range(layers), "num_experts": experts, "experts_per_token": k, "documents": 30}
    answers = contrasted(**{str(seed): make_capture(seed=seed, **shape) for seed in range(sets)})
    assert len(report.render(answers).encode()) < 3_000_000


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    output = tmp_path / "report.html"
    output.write_text("old")
    monkeypatch.setattr(report, "dataset_names", lambda path: ["a"])
    monkeypatch.setattr(report, "open_covered", lambda path, state: make_capture())
    monkeypatch.setattr(report, "coverage", lambda path, name: state_of(make_capture()))
    monkeypatch.setattr(report, "measure", lambda path, name, reducers, **_: scan(make_capture(), reducers))
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write_report([tmp_path / "s.zarr"], output)
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no store at .*nothing\.zarr \(no such folder\)"):
        report.write_report([tmp_path / "nothing.zarr"], tmp_path / "report.html")


def test_many_experts_are_reported_with_shorter_windows_and_fewer_layers_of_tokens():
    answers = answers_of("many", layers=range(12), num_experts=128, experts_per_token=4, documents=20)
    assert answers.windows.sizes["step"] == 2  # 128**3 windows at ten layers would not fit an exact count
    assert answers.tokens["layer"].values.tolist() == [0, 4, 7, 11]
    page = report.render([answers])
    assert "at 4 of 12 layers" in page
    assert len(page.encode()) < 3_000_000


def test_the_layers_of_every_data_set_can_be_chosen():
    page = report.render([answers_of("low", layers=(0, 1)), answers_of("high", layers=(3, 4))])
    assert re.findall(r"<option>(\d+)</option>", page) == ["0", "1", "3", "4"]


def test_a_model_with_one_layer_of_experts_has_a_page_without_windows():
    answers = answers_of("one", layers=(5,), documents=30)
    assert answers.windows is None
    assert "Most frequent windows" not in report.render([answers])


def test_every_chart_is_written_for_papers_and_names_cannot_leave_the_folder(tmp_path):
    captures = {"../../evil": make_capture(seed=1, documents=40), "plain": make_capture(seed=2, documents=40)}
    answers = contrasted(**captures)
    written = report.write_figures(answers, tmp_path / "in" / "figures")
    assert sorted(written) == sorted((tmp_path / "in" / "figures").iterdir())
    assert len({path.stem for path in written}) == len(written) / 3
    begins = {".svg": b"<svg", ".pdf": b"%PDF", ".png": b"\x89PNG"}
    for path in written:
        assert path.read_bytes().startswith(begins[path.suffix])
    names = [path.stem for path in written if path.suffix == ".svg"]
    assert [name for name in names if "tokens-plain" in name] == [
        f"07-tokens-plain-layer-{layer}" for layer in (0, 1, 2)
    ]
    assert [name[3:] for name in names[:4]] == ["words", "data-sets", "neighbours", "effective-experts"]
    texts = [(tmp_path / "in" / "figures" / f"07-tokens-plain-layer-{layer}.svg").read_text() for layer in (0, 2)]
    assert texts[0] != texts[1]
    assert "Neighbours: share with the same first expert" in (tmp_path / "in/figures/02-neighbours.svg").read_text()


def test_lines_hold_what_the_metrics_say_and_their_nulls():
    answers = contrasted(a=make_capture(seed=1, documents=40), b=make_capture(seed=2, documents=40))
    page = report.render(answers)
    apart = contrast_between(answers)
    words, data_sets, neighbours, effective, first, margin, position, caching = (
        next(rows for rows in spec["datasets"].values() if len(rows) > 1) for spec in specs_of(page, "lines")
    )
    by_name = {each.label: each for each in answers}
    for row in words:
        of = by_name[row["data_set"]].words.sel(layer=row["layer"])
        assert (row["value"], row["by_chance"]) == pytest.approx(
            (of["specialization"].item(), of["null"].item()), rel=1e-3
        )
    for row in data_sets:
        of = apart.sel(layer=row["layer"])
        wanted = [of[f"divergence_{name}"].item() for name in ("corrected", "low", "high")]
        assert [row[name] for name in ("value", "low", "high")] == pytest.approx(wanted, rel=1e-3)
    for rows, result, name in (
        (neighbours, "repetition", "first_repeated"),
        (first, "confidence", "mean_first"),
        (margin, "confidence", "mean_margin"),
        (position, "position", "mutual_information"),
    ):
        for row in rows:
            of = getattr(by_name[row["data_set"]], result)[name].sel(layer=row["layer"])
            assert row["value"] == pytest.approx(of.item(), rel=1e-3)
    for row in effective:
        load = by_name[row["data_set"]].load["share"].sel(layer=row["layer"]).values
        assert row["value"] == pytest.approx(2 ** -(load * np.log2(load)).sum(), rel=1e-3)
    for row in caching:
        of = by_name[row["data_set"]].caches.sel(policy=row["policy"], cache_size=row["cache_size"])
        assert row["hit_rate"] == pytest.approx(100 * of["hit_rate"].mean().item(), rel=1e-3)


def test_each_chart_tells_its_definition_and_source():
    page = report.render([answers_of("a", documents=40)])
    told = [html.unescape(text) for text in re.findall(r"Definition and source</summary><p>(.*?)</p>", page)]
    assert len(told) == len(page_data(page)["specs"])
    for text in told:
        assert text.startswith("Definition: ")
    assert sum("Source: " in text for text in told) > len(told) / 2


def test_data_sets_that_differ_are_contrasted_cell_by_cell():
    other = planted(make_capture(seed=2, documents=120, strength=0), layer=1, expert=6, share=0.5)
    answers = contrasted(one=make_capture(seed=1, documents=120, strength=0), other=other)
    page, apart = report.render(answers), contrast_between(answers)
    for label, spec in zip(("one", "other"), specs_of(page, "domains"), strict=True):
        [rows] = spec["datasets"].values()
        for row in rows:
            cell = apart.sel(data_set=label, layer=row["layer"], expert=row["expert"])
            assert row["difference"] == pytest.approx(100 * cell["difference"].item(), rel=1e-3)
            assert row["q"] == pytest.approx(cell["difference_q"].item(), rel=1e-3)
        sure = [(row["layer"], row["expert"]) for row in rows if row["q"] <= 0.05]
        assert (1, 6) in sure
        assert sum(layer != 1 for layer, _ in sure) <= 1  # one in twenty may be chance
