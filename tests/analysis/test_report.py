"""The report's text: its statements are computed from the data, and nothing in the data is executed."""

import html
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import altair as alt
import numpy as np
import pytest
from scipy.stats import t as student
from synthetic import HOSTILE, bursty, make_capture, state_of

from analysis.charts import files
from analysis.charts.paths import MAX_TOKEN_LINKS
from analysis.metrics.contrast import contrast_of
from analysis.report import page as report
from analysis.report.answers import answer
from analysis.report.headline import sentences
from analysis.report.sections import contrast as contrast_section
from analysis.report.sections import load as load_section
from analysis.report.sections import tokens as tokens_section
from analysis.report.sections.all import SECTIONS
from analysis.report.sections.contrast import contrast_between
from analysis.report.summary import main_finding
from analysis.scanning import scan

OF_SENTENCES = (load_section.SECTION, contrast_section.SECTION, tokens_section.SECTION)
"""The sections whose answers are used in the page's sentences."""


def answers_of(label, **options):
    """The report's answers about a synthetic capture."""
    data = make_capture(dataset=label, **options).assign_attrs(model="m", quantization="nf4")
    return answer(data, state_of(data, options.get("missing", ())), label)


def contrasted(missing=(), sections=SECTIONS, block_tokens=None, **captures):
    """The report's answers about captures that are compared with each other; the last one lacks some shards."""
    common = {"model": "m", "quantization": "nf4"}
    made = {label: data.assign_attrs(common | data.attrs) for label, data in captures.items()}
    lacks = {list(captures)[-1]: missing}
    options = {"sections": sections, "block_tokens": block_tokens}
    return [answer(data, state_of(data, lacks.get(label, ())), label, **options) for label, data in made.items()]


def few(**captures):
    """The answers that the sentences need."""
    return contrasted(sections=OF_SENTENCES, **captures)


def contrast_page(answers):
    """The page with only the charts of the differences between data sets."""
    return report.render(report.report_of(answers, [contrast_section.SECTION]))


def told(answers):
    """The page's sentences."""
    return sentences(answers, contrast_between(answers))


def page_of(*answers):
    """The page about some data sets."""
    return report.render(report.report_of(answers))


@pytest.fixture(scope="module")
def pair():
    """The answers about two data sets of 60 documents, and their page."""
    captures = {name: make_capture(seed=seed, documents=60, layers=(1, 3, 4)) for name, seed in (("a", 1), ("b", 2))}
    answers = contrasted(**captures)
    return answers, page_of(*answers)


def figures_of(page, kind):
    """The charts of one kind, in the page's order, with their tables by name."""
    numbers = re.findall(rf'data-kind="{kind}" data-number="(\d+)"', page)
    return [page_data(page)["figures"][int(number)] for number in numbers]


def lines_of(page):
    """The rows of all line charts, by the names of their files."""
    names = re.findall(r'data-kind="lines" data-number="\d+" data-name="([^"]*)"', page)
    return dict(zip(names, (figure["tables"]["points"] for figure in figures_of(page, "lines")), strict=True))


def page_data(page):
    """The data of the page's script, with tables as rows."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    for figure in data["figures"]:
        for name, packed in figure["tables"].items():
            columns = {key: unpacked(values) for key, values in packed.items()}
            figure["tables"][name] = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
    return data


def unpacked(column):
    """A column in the form of the page's script, one value after the other."""
    if isinstance(column, list):
        return column
    if "texts" in column:
        return [column["texts"][place] for place in unpacked(column["places"])]
    values = [0]
    for step, count in column["steps"]:
        for _ in range(count):
            values.append(values[-1] + step)
    return values[1:]


@pytest.mark.parametrize(("experts", "k"), [(4, 4), (512, 1), (1024, 2)])
def test_the_busiest_expert_named_is_the_one_that_numpy_finds(experts, k):
    shape = {"num_experts": experts, "experts_per_token": k}
    data = make_capture(seed=3, documents=40, special_token_ids=(), **shape).assign_attrs(model="m")
    answers = answer(data, state_of(data), "a")
    expert, length = data["expert"].values, data["length"].values
    filled = np.arange(expert.shape[1]) < length[:, None]
    counts = np.array([np.bincount(expert[filled][:, at].ravel(), minlength=experts) for at in range(expert.shape[2])])
    layer, busiest = np.unravel_index(counts.argmax(), counts.shape)
    share = counts[layer, busiest] / counts[layer].sum()
    sentence, *_ = told([answers])
    number = int(data["layer"][layer])
    assert f"busiest expert is {busiest} at layer {number}, with {share:.1%}" in sentence
    assert f"{int(filled.sum()):,} tokens" in sentence
    assert sentence in html.unescape(page_of(answers))


def planted(data, layer, expert, share):
    """A copy in which that share of the tokens reaches that expert, as their second choice where it was neither."""
    routes = data["expert"].compute().copy()
    pair = routes.sel(layer=layer).values
    lacks = (np.random.default_rng(1).random(pair.shape[:2]) < share) & (pair != expert).all(-1) & (pair[..., 0] < 255)
    pair[lacks, 1] = expert
    routes.loc[{"layer": layer}] = pair
    return data.assign(expert=routes.chunk(data["expert"].chunksizes))


def avoiding(data, avoided=0):
    """A copy in which no token reaches that expert: each one that did gets one of those that it had not."""
    routes, random = data["expert"].compute().copy(), np.random.default_rng(2)
    for chosen in routes.values.reshape(-1, data.sizes["k"]):
        if avoided in chosen:
            chosen[chosen == avoided] = random.choice(np.setdiff1d(np.arange(8), [*chosen, avoided]))
    return data.assign(expert=routes.chunk(data["expert"].chunksizes))


def reached(data, layer, expert):
    """The tokens of each document that count, and those of them that reach an expert: (document)."""
    data = data.compute()
    counts = (data["token"].values >= 0) & (data["token"].values != 1)  # 1 is special
    reach = (data["expert"].sel(layer=layer).values == expert).any(-1) & counts
    ids = data["document_id"].values
    both = [(counts[ids == one].sum(), reach[ids == one].sum()) for one in np.unique(ids)]
    return np.array([pair for pair in both if pair[0]]).T


def without_each(of_documents):
    """The sum over documents, and the sums that lack one of them: (1 + documents, ...)."""
    rows = np.arange(len(of_documents))
    return np.array([of_documents.sum(0), *(of_documents[rows != lacks].sum(0) for lacks in rows)])


def standard_error(values):
    """Jackknife of values computed from all documents, and again without each of them (1 + documents, ...)."""
    documents = len(values) - 1
    return np.sqrt((documents - 1) / documents * ((values[1:] - values[0]) ** 2).sum(0))


def interval_over(values, tokens, *, share=False, corrected=False):
    """The ends of the 95 % interval of such values, for documents with these numbers of tokens."""
    reach = student.ppf(0.975, tokens.sum() ** 2 / (tokens**2).sum() - 1) * standard_error(values)
    if not share:
        middle = values[0] - (len(tokens) - 1) * (values[1:].mean(0) - values[0]) if corrected else values[0]
        return middle - reach, middle + reach
    odds = np.log(values[0] / (1 - values[0]))
    return tuple(1 / (1 + np.exp(-odds - side * reach / values[0] / (1 - values[0]))) for side in (-1, 1))


SPECIALIST = re.compile(
    r"Its specialist is expert (\d) at layer (\d): (\d+)% of the tokens choose it, compared with (\d+)% of those of"
    r" (\w+)(?:, the next highest)? \(([\d.]+) to ([\d.]+) percentage points more, simultaneous 95% interval over"
    r" documents for all experts, layers and data sets; an even share is 25%\)"
)


def test_a_planted_specialist_is_named_with_its_shares_and_swapping_the_data_sets_swaps_what_is_said():
    one, other = (make_capture(seed=seed, documents=120, layers=(0, 4, 9), strength=0) for seed in (1, 2))
    other = planted(other, layer=4, expert=6, share=0.5)
    said = told(few(one=one, other=other))
    assert len(said) == 3
    expert, layer, reach, usual, rival, low, high = SPECIALIST.search(said[1]).groups()
    assert said[1].startswith("other: ")
    assert (expert, layer, rival) == ("6", "4", "one")
    counted = [reached(data, 4, 6) for data in (other, one)]
    share = [have.sum() / tokens.sum() for tokens, have in counted]
    assert [int(reach), int(usual)] == [round(100 * each) for each in share]
    assert float(low) < 100 * 0.5 * 3 / 4 < float(high)
    assert (float(low) + float(high)) / 2 == pytest.approx(100 * (share[0] - share[1]), abs=0.1)
    error = np.hypot(*(standard_error(np.divide(*without_each(each.T).T[::-1])) for each in counted))
    wider = (float(high) - float(low)) / 2 / (100 * error)
    one_test, all_tests = student.ppf([1 - 0.025, 1 - 0.025 / 24], 100)  # the latter is Bonferroni's
    assert one_test + 0.5 < wider < all_tests + 0.1
    assert "busiest expert is 6 at layer 4 in other" in said[2]
    again = told(few(other=other, one=one))
    assert again[2] == said[2]
    assert SPECIALIST.search(again[0]).groups()[:5] == SPECIALIST.search(said[1]).groups()[:5]
    assert SPECIALIST.sub("", again[1]) == SPECIALIST.sub("", said[0])


def test_of_uniform_routes_no_more_than_chance_is_said():
    finds = 0
    for seed in range(0, 24, 2):
        pair = {name: make_capture(seed=seed + at, documents=60, strength=0) for at, name in enumerate("ab")}
        answers = few(**pair)
        apart = contrast_between(answers)
        said = sentences(answers, apart)
        assert len(said) == 3  # and nothing of tokens
        main = main_finding(answers, apart)  # of the summary
        assert ("clearest specialist" in main.said) == any("Its specialist" in sentence for sentence in said)
        assert main.said.startswith("The busiest expert") != ("clearest specialist" in main.said)
        equal = ["and no expert's share differs" in sentence for sentence in said[:2]]
        assert equal[0] == equal[1]
        finds += not all(equal)
    assert finds <= 2  # of twelve, where one in twenty is expected


def test_nobody_is_the_specialist_of_an_expert_that_another_data_set_avoids():
    a, b, c = (make_capture(seed=at, documents=90, strength=0) for at in range(3))
    said = told(few(a=a, b=b, c=avoiding(c)))
    for sentence in said[:2]:
        assert "Its specialist" not in sentence
        assert "some experts' shares differ from those in c." in sentence
    assert "expert 0 " not in said[2]
    alone = told(few(a=a, b=avoiding(b), c=avoiding(c)))
    assert SPECIALIST.search(alone[0])[1] == "0", "both others avoid it"
    assert ", the next highest (" in alone[0]


def contrast_cells(page):
    """The rows of all maps of how the data sets differ."""
    return [row for figure in figures_of(page, "domains") for row in figure["tables"]["cells"]]


def test_one_document_a_data_set_is_not_tested_and_says_so():
    whole = {name: make_capture(seed=seed, documents=40) for seed, name in enumerate("ab")}
    no_test = "it is one document, which cannot be tested"
    one, other = (make_capture(seed=seed, documents=1) for seed in (0, 3))
    answers = contrasted(a=one, b=other)
    said = told(answers)
    for sentence in said[:2]:
        assert f"Not compared with the others: {no_test}" in sentence
        assert "Its specialist" not in sentence
        assert "No expert" not in sentence
    page = page_of(*answers)
    assert page.count(no_test) >= 2
    assert {row["p"] for row in contrast_cells(page)} == {None}
    assert {row["low"] for row in figures_of(page, "load")[0]["tables"]["cells"]} == {None}
    beside = told(few(a=one, b=whole["b"]))
    assert no_test in beside[0]
    assert "Not compared: no other data set has enough documents." in beside[1]
    enough = few(**whole)
    assert not [sentence for sentence in told(enough) if no_test in sentence or "Not compared" in sentence]
    assert all(0 < row["p"] <= 1 for row in contrast_cells(contrast_page(enough)))


def test_blocks_of_a_text_of_one_document_are_compared():
    captures = {name: make_capture(seed=seed, documents=60, strength=0) for seed, name in enumerate("ab")}
    captures["b"] = planted(captures["b"], layer=1, expert=6, share=0.5)
    for name, data in captures.items():
        start = np.concatenate([[0], np.cumsum(data["length"].values)[:-1]])
        captures[name] = data.assign(document_id=data["document_id"] * 0, offset=("doc", start))
    assert all("one document" in sentence for sentence in told(few(**captures))[:2])
    said = told(contrasted(sections=OF_SENTENCES, block_tokens=64, **captures))
    assert SPECIALIST.search(said[1]).groups()[:2] == ("6", "1")


def test_what_is_said_of_seven_documents_against_eight_is_what_their_map_shows():
    a, b = (make_capture(seed=seed, documents=number, strength=0) for seed, number in ((1, 7), (2, 8)))
    for other, differs in ((planted(b, layer=1, expert=6, share=0.9), True), (b, False)):
        answers = few(a=a, b=other)
        assert [each.documents for each in answers] == [7, 8]
        said, rows = told(answers), contrast_cells(contrast_page(answers))
        assert all(0 < row["p"] <= 1 for row in rows)
        sure = {(row["layer"], row["expert"]) for row in rows if row["p"] <= 0.05}
        assert bool(sure) == differs
        assert not sure or (1, 6) in sure
        assert ("Its specialist is expert 6 at layer 1" in said[1]) == differs
        assert ("No expert is chosen by a larger share" in said[1]) != differs
        assert any("and no expert's share differs" in sentence for sentence in said) != differs
        assert not [sentence for sentence in said if "nan" in sentence.lower()]


def test_a_token_that_has_an_expert_of_its_own_is_told_as_numpy_counts_it():
    data = make_capture(seed=5, documents=120, strength=0, special_token_ids=())
    token = data["token"].values
    routes = data["expert"].compute().copy()
    routes.values[token == 7, 1] = [5, 2]  # always, at the second layer
    data = data.assign(expert=routes.chunk(data["expert"].chunksizes)).assign_attrs(model="m")
    *_, sentence = told([answer(data, state_of(data), "a")])
    expert = int(re.search(r"go to expert (\d)", sentence)[1])
    assert expert in (2, 5)
    usual = 0.0
    for document in np.unique(data["document_id"]):
        mine = (data["document_id"].values == document)[:, None] & (token >= 0)
        usual += (token[mine] == 7).sum() * (routes.values[mine][:, 1] == expert).any(-1).mean() if mine.any() else 0
    assert f"at layer 1, 100% of the {(token == 7).sum():,} occurrences of “▁w7” in a go to expert" in sentence
    assert f", compared with {usual / (token == 7).sum():.0%} when tokens are shuffled within" in sentence


def test_a_token_of_a_sample_is_told_as_one_of_a_sample(monkeypatch):
    monkeypatch.setattr(tokens_section, "ROUTES_SAMPLED", 600)
    data = bursty("token", documents=60).assign_attrs(model="m")
    answers = answer(data, state_of(data), "a")
    n, of = (answers["token_excess"].attrs[name] for name in ("n", "of"))
    assert 600 <= n < 616 < of == int(data["length"].sum())
    *_, sentence = told([answers])
    assert f"(in a sample of whole documents with {n:,} of {of:,} tokens)." in sentence


def test_no_token_is_told_where_documents_are_all_that_routes_depend_on():
    """Over all tokens each of these pages had such a finding: words are in few documents, and these have their
    experts."""
    for seed in range(6):
        data = bursty("document", seed=seed, documents=60, sequence_length=64).assign_attrs(model="m")
        answers = answer(data, state_of(data), "a")
        listed = answers["tokens"]
        usual = listed["share"] / listed["lift"]
        score = (listed["share"] - usual) / np.sqrt(usual * (1 - usual) / listed["tokens"])
        assert float(score.max()) > 10
        assert len(told([answers])) == 1
        assert float(listed["lift"].max()) > 2
        assert float(listed["lift_within"].weighted(listed["tokens"]).mean()) < 1.2, "and tiles are pale"
    assert "largest lift at each expert" in page_of(answers)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": "n"}, "model is m and n"),
        ({"quantization": "int8"}, "quantization is nf4 and int8"),
        ({"model_revision": "main"}, "model_revision is None and main"),
        ({"sequence_length": 512}, None),
    ],
)
def test_data_sets_of_other_models_are_not_contrasted_and_the_page_says_why(changed, reason):
    one, other, third = (make_capture(seed=seed, documents=20, strength=0) for seed in (1, 2, 3))
    answers = few(one=one, other=other.assign_attrs(changed), third=third)
    page, said = contrast_page(answers), told(answers)
    shown = ["one", "third"] if reason else ["one", "other", "third"]
    names = re.findall(r'data-kind="domains" data-number="\d+" data-name="domains-([^"]*)"', page)
    assert names == shown
    assert [sentence for sentence in said if "Not compared" in sentence] == ([said[1]] if reason else [])
    if reason:
        assert f" Not compared with one: {reason}. The busiest expert" in said[1]
        assert f"Not compared with one: {reason}." in html.unescape(page)


def test_two_data_sets_of_other_models_leave_nothing_to_contrast():
    answers = few(one=make_capture(seed=1), other=make_capture(seed=2).assign_attrs(quantization="int8"))
    assert contrast_between(answers) is None
    assert "quantization is nf4 and int8" in told(answers)[1]
    assert "Not compared" not in told(answers)[0]


def test_an_incomplete_capture_says_so_and_which_shards_are_missing(pair):
    page = page_of(answers_of("part", documents=30, missing=(1,)))
    assert "Incomplete." in page
    assert "missing shards: 1" in page
    assert "<dd>incomplete: " in page
    _, whole = pair
    assert "Incomplete." not in whole
    assert "<dd>complete: " in whole


def test_a_capture_without_a_token_is_reported_as_such():
    answers = answers_of("none", documents=4, missing=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert told([answers]) == ["none: no token is captured yet."]
    assert "no token is captured yet" in page_of(answers)


def test_hostile_pieces_stay_inside_the_data_and_come_back_whole():
    pieces = [*HOSTILE, *(f"w{index}" for index in range(40 - len(HOSTILE)))]
    answers = answers_of("<b>label</b>", documents=60, pieces=pieces, vocabulary=40)
    page = page_of(answers)
    assert "<b>label</b>" not in page
    assert "&lt;b&gt;label&lt;/b&gt;" in page
    assert page.count("</script>") == 3  # the data's own and the two scripts'
    assert "\u2028" not in page
    assert "\u202e" not in page
    shown = {row["piece"] for row in figures_of(page, "tokens")[0]["tables"]["tokens"]}
    assert shown & set(HOSTILE)


def test_each_chart_holds_what_the_metrics_say(pair):
    (answers, _), page = pair
    cells = figures_of(page, "load")[0]["tables"]["cells"]
    assert len(cells) == 3 * 8
    for row in cells:
        share = float(answers["load"]["share"].sel(layer=row["layer"], expert=row["expert"]))
        assert row["share"] == pytest.approx(100 * share, rel=1e-3)
        assert row["low"] <= row["share"] <= row["high"]


def test_the_policy_allows_the_page_s_own_scripts_only(pair):
    _, page = pair
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert len(re.findall("sha256-", policy)) == 2
    assert "script-src 'sha256-" in policy


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts", "k", "sets"), [(32, 8, 2, 4), (48, 128, 8, 2)])
def test_pages_of_large_models_stay_under_three_megabytes(layers, experts, k, sets, monkeypatch):
    # Fewer draws give as many numbers.
    monkeypatch.setattr(contrast_section, "contrast_of", partial(contrast_of, replicates=99))
    monkeypatch.setattr("analysis.metrics.contrast.REPLICATES_A_LAYER", 2)
    documents = 30 if experts == 8 else 10  # a contrast of many experts draws for each document
    shape = {"layers": range(layers), "num_experts": experts, "experts_per_token": k, "documents": documents}
    captures = {}
    for seed in range(sets):
        data = make_capture(seed=seed, rows_per_shard=64, **shape)
        often = np.tile(np.arange(data.sizes["doc"]), 8)  # so that links are sure, and lists are full
        captures[str(seed)] = data.isel(doc=often).chunk({"doc": 64})
    answers = contrasted(**captures)
    page = page_of(*answers)
    assert len(page.encode()) < 3_000_000
    [figure] = figures_of(page, "paths")
    assert len(figure["options"]) == sets * 17
    links = Counter(row["way"] for row in figure["tables"]["links"])
    assert sum(links.values()) > sets * (MAX_TOKEN_LINKS * 16 + 500) / 2  # the pictures are not empty


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
    assert answers["windows"].sizes["step"] == 2  # 128**3 windows at ten layers would not fit an exact count
    assert answers["tokens"]["layer"].values.tolist() == [0, 4, 7, 11]
    page = page_of(answers)
    assert "at 4 of 12 layers" in page
    assert len(page.encode()) < 3_000_000


def test_the_layers_of_every_data_set_can_be_chosen():
    page = page_of(answers_of("low", layers=(0, 1)), answers_of("high", layers=(3, 4)))
    assert re.findall(r"<option(?: selected)?>(\d+)</option>", page) == ["0", "1", "3", "4"]


def test_a_model_with_one_layer_of_experts_has_a_page_without_windows():
    answers = answers_of("one", layers=(5,), documents=30)
    assert answers.get("windows") is None
    assert "Most frequent windows" not in page_of(answers)


def test_every_chart_is_written_for_papers_and_names_cannot_leave_the_folder(tmp_path):
    captures = {"../../evil": make_capture(seed=1, documents=40), "plain": make_capture(seed=2, documents=40)}
    answers = contrasted(**captures)
    written = report.write_figures(report.report_of(answers), tmp_path / "in" / "figures")
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
    assert all('fill="white"' in text for text in texts), "a ground that is no hole in a paper's page"
    assert (
        "Neighbours: share of pairs with the same first expert"
        in (tmp_path / "in/figures/02-neighbours.svg").read_text()
    )


def test_lines_hold_what_the_metrics_say_and_their_nulls(pair):
    answers, page = pair
    lines = lines_of(page)
    apart = contrast_between(answers)
    by_name = {each.label: each for each in answers}
    for row in lines["words"]:
        of = by_name[row["data_set"]]["words"].sel(layer=row["layer"])
        assert (row["value"], row["by_chance"]) == pytest.approx(
            (of["specialization"].item(), of["null"].item()), rel=1e-3
        )
    for row in lines["data-sets"]:
        of = apart.sel(layer=row["layer"])
        wanted = [of[f"divergence_{name}"].item() for name in ("corrected", "low", "high")]
        assert [row[name] for name in ("value", "low", "high")] == pytest.approx(wanted, rel=1e-3)
    for chart, result, name, at in (
        ("neighbours", "repetition", "first_repeated", {"replicate": 0, "lag": 1}),
        ("first-weight", "weights", "mean_first", {"replicate": 0}),
        ("margin", "weights", "mean_margin", {"replicate": 0}),
        ("position", "position", "mutual_information", {}),
    ):
        for row in lines[chart]:
            of = by_name[row["data_set"]][result][name].sel(layer=row["layer"], **at)
            assert row["value"] == pytest.approx(of.item(), rel=1e-3)
    for row in lines["effective-experts"]:
        load = by_name[row["data_set"]]["load"]["share"].sel(layer=row["layer"]).values
        assert row["value"] == pytest.approx(2 ** -(load * np.log2(load)).sum(), rel=1e-3)
        even = by_name[row["data_set"]]["balance_null"]["effective_experts"].sel(of="mean", layer=row["layer"])
        assert row["by_chance"] == pytest.approx(even.item(), rel=1e-3)
        assert 4 < row["by_chance"] < 8
    for policy in ("lru", "belady"):
        for row in lines[f"caching-{policy}"]:
            of = by_name[row["data_set"]]["caches"].sel(policy=policy, cache_size=row["cache_size"])
            assert row["value"] == pytest.approx(of["hit_rate"].mean().item(), rel=1e-3)
            assert ("by_chance" in row) == (policy == "lru"), "what Belady reaches by chance is not known"
            assert row.get("by_chance", 0) == pytest.approx(of["null"].fillna(0).item(), rel=1e-3)


def test_each_chart_tells_its_definition_and_source(pair):
    _, page = pair
    told = [html.unescape(text) for text in re.findall(r'<p class="about">(.*?)</p>', page)]
    assert len(told) == len(page_data(page)["figures"])
    for text in told:
        assert text.startswith("Definition: ")
        assert re.search(r"Interval: (95%, |none)", text)
    assert sum("Source: " in text for text in told) > len(told) / 2


def test_data_sets_that_differ_are_contrasted_cell_by_cell():
    other = planted(make_capture(seed=2, documents=120, strength=0), layer=1, expert=6, share=0.5)
    captures = {"one": make_capture(seed=1, documents=120, strength=0), "other": other}
    answers = few(**captures)
    page, apart = contrast_page(answers), contrast_between(answers)
    for label, figure in zip(("one", "other"), figures_of(page, "domains"), strict=True):
        rows = figure["tables"]["cells"]
        for row in rows:
            cell = apart.sel(data_set=label, layer=row["layer"], expert=row["expert"])
            assert row["difference"] == pytest.approx(100 * cell["difference"].item(), rel=1e-3)
            assert row["p"] == pytest.approx(cell["difference_p"].item(), rel=1e-3)
            for end in ("low", "high"):
                assert row[f"difference_{end}"] == pytest.approx(100 * cell[f"difference_{end}"].item(), rel=1e-3)
            tokens, have = reached(captures[label], row["layer"], row["expert"])
            assert row["share"] == pytest.approx(100 * have.sum() / tokens.sum(), rel=1e-3)
        sure = [(row["layer"], row["expert"]) for row in rows if row["p"] <= 0.05]
        assert (1, 6) in sure
        assert {layer for layer, _ in sure} == {1}


def pairs_of(data, lag):
    """For each row, whether its pairs of tokens at that distance share an expert, and the first one: (pair, layer)."""
    data = data.compute()
    expert, length, token = (data[name].values for name in ("expert", "length", "token"))
    for row in range(len(length)):
        both = [
            p
            for p in range(length[row] - lag)
            if not {int(token[row, p]), int(token[row, p + lag])} & set(data.attrs["special_token_ids"])
        ]
        one, other = expert[row, both], expert[row, [p + lag for p in both]]
        yield (one[..., :, None] == other[..., None, :]).any((2, 3)), one[..., 0] == other[..., 0]


def by_document(data, of_rows):
    """Numbers of rows, summed over the rows of each document that has a token: (document, ...)."""
    ids, of_rows = data["document_id"].values, np.array(of_rows)
    counted = ((data["token"].values >= 0) & (data["token"].values != 1)).sum(1)  # 1 is special
    return np.array([of_rows[ids == one].sum(0) for one in np.unique(ids) if counted[ids == one].any()])


def tokens_of_documents(data):
    """How many count in each document that has any: float64 (document)."""
    counted = (data["token"].values >= 0) & (data["token"].values != 1)
    return by_document(data, counted.sum(1)).astype(float)


def test_repetition_by_lag_has_its_nulls_and_the_interval_over_documents():
    data = make_capture(seed=4, documents=60, layers=(0, 3)).assign_attrs(model="m")
    answers = answer(data, state_of(data), "a")
    page = page_of(answers)
    lines, heat = lines_of(page), figures_of(page, "repetition")[0]["tables"]["cells"]
    tokens = tokens_of_documents(data)
    first = answers["load"]["counts"].isel(k=0).values / answers["load"].attrs["n"]
    for at, lag in enumerate((1, 2, 4, 8)):
        of_rows = [(shared.sum(0), same.sum(0), len(shared)) for shared, same in pairs_of(data, lag)]
        pairs = without_each(by_document(data, [count for _, _, count in of_rows]))
        for which, chart in enumerate(("shared-by-lag", "first-by-lag")):
            found = without_each(by_document(data, [row[which] for row in of_rows]))
            share = found / pairs[:, None]  # (1 + document, layer)
            row = lines[chart][at]
            assert (row["lag"], row["n"]) == (lag, pairs[0])
            assert row["value"] == pytest.approx(share[0].mean(), rel=1e-3)
            ends = interval_over(share.mean(1), tokens, share=True)
            assert (row["low"], row["high"]) == pytest.approx(ends, rel=1e-3)
            if which:
                assert row["by_chance"] == pytest.approx((first**2).sum(1).mean(), rel=1e-3)
                continue
            ends = interval_over(share, tokens, share=True)
            for layer in range(2):
                [cell] = [c for c in heat if (c["layer"], c["lag"]) == ((0, 3)[layer], lag)]
                wanted = [100 * each[layer] for each in (share[0], *ends)]
                assert [cell["share"], cell["low"], cell["high"]] == pytest.approx(wanted, rel=1e-3)
                assert cell["pairs"] == pairs[0]
    nulls = [figure["tables"].get("null") for figure in figures_of(page, "lines")]
    assert [{"null": 13 / 28}] in nulls
    assert [{"null": 1 / 8}] in nulls


def test_bands_of_load_and_effective_experts_are_intervals_over_documents():
    data = make_capture(seed=4, documents=60, layers=(0, 3)).assign_attrs(model="m")
    page = page_of(answer(data, state_of(data), "a"))
    expert, token = data["expert"].values, data["token"].values
    counted = (token >= 0) & (token != 1)  # 1 is special
    chosen = [expert[row, counted[row]] for row in range(len(token))]
    of_rows = [[np.bincount(row[:, at].ravel(), minlength=8) for at in range(2)] for row in chosen]
    count, tokens = without_each(by_document(data, of_rows)), tokens_of_documents(data)
    share = count / count.sum(-1, keepdims=True)  # (1 + document, layer, expert)
    ends = interval_over(share, tokens, share=True)
    for cell in figures_of(page, "load")[0]["tables"]["cells"]:
        at = (0, 3).index(cell["layer"]), cell["expert"]
        wanted = [100 * each[at] for each in (share[0], *ends)]
        assert [cell["share"], cell["low"], cell["high"]] == pytest.approx(wanted, rel=1e-3)
    effective = np.prod(share**-share, axis=-1)
    ends = interval_over(effective, tokens, corrected=True)
    for at, row in enumerate(lines_of(page)["effective-experts"]):
        wanted = [each[at] for each in (effective[0], *ends)]
        assert [row["value"], row["low"], row["high"]] == pytest.approx(wanted, rel=1e-3)
        assert row["low"] < row["value"] < row["high"]


def test_the_path_of_a_listed_token_is_what_a_loop_counts():
    answers = contrasted(
        a=make_capture(seed=1, documents=150, layers=(0, 4, 9)), b=make_capture(seed=2, documents=150, layers=(0, 4, 9))
    )
    [figure] = figures_of(page_of(*answers), "paths")
    assert figure["by"] == "way"
    data = make_capture(seed=2, documents=150, layers=(0, 4, 9)).compute()
    listed = [int(key) for key, choice in figure["options"].items() if choice["row"]["data_set"] == "b"]
    assert figure["options"][str(listed[0])]["row"]["token"] == "all tokens"
    assert len(listed) == 1 + 16
    pieces = data["piece"].values.tolist()
    for way in listed:
        name = figure["options"][str(way)]["row"]["token"]
        token = data["token"].values
        mine = (token >= 0) & (token != 1) if name == "all tokens" else token == pieces.index(name)
        first = data["expert"].values[..., 0][mine]
        assert f"n = {len(first):,} " in figure["options"][str(way)]["subtitle"][0]
        rows = [row for row in figure["tables"]["links"] if row["way"] == way]
        assert rows
        for row in rows:
            at = (0, 4, 9).index(row["layer"])
            assert row["next_layer"] == (0, 4, 9)[at + 1]
            here = first[:, at] == row["expert"]
            moved = here & (first[:, at + 1] == row["next_expert"])
            assert row["tokens"] == moved.sum()
            assert row["share"] == pytest.approx(100 * moved.sum() / here.sum(), rel=1e-3)
            assert row["times_chance"] == pytest.approx(8 * moved.sum() / here.sum(), rel=1e-3)
        for row in figure["tables"]["circles"]:
            if row["way"] == way:
                share = (first[:, (0, 4, 9).index(row["layer"])] == row["expert"]).mean()
                assert row["first"] == pytest.approx(100 * share, rel=1e-3)


def test_a_token_s_links_are_few_where_its_choices_are_even():
    answers = answers_of("even", documents=300, strength=0, layers=range(8))
    [figure] = figures_of(page_of(answers), "paths")
    assert len(figure["options"]) == 17
    assert len(figure["tables"]["links"]) <= 17 * 7 * 64 / 2**10  # at most what chance gives, on average


def test_models_of_other_shapes_have_pictures_and_nulls_of_their_own():
    answers = [answers_of("small", layers=(0, 1)), answers_of("large", layers=(0, 1), num_experts=16)]
    page = page_of(*answers)
    small, large = figures_of(page, "paths")
    assert {choice["row"]["data_set"] for choice in small["options"].values()} == {"small"}
    assert {choice["row"]["data_set"] for choice in large["options"].values()} == {"large"}
    for row in lines_of(page)["neighbours"]:
        assert row["by_chance"] == {"small": 1 / 8, "large": 1 / 16}[row["data_set"]]
    for row in lines_of(page)["effective-experts"]:
        experts = {"small": 8, "large": 16}[row["data_set"]]
        assert experts / 2 < row["by_chance"] < experts


def test_load_by_position_is_drawn_against_the_expert_s_own_mean(pair):
    (answers, _), page = pair
    rows = lines_of(page)["position-a"]
    assert [row["start"] for row in rows[:5]] == [0, 1, 2, 4, 8]
    assert len({row["expert"] for row in rows}) == 6
    for row in rows:
        layer, expert = map(int, re.fullmatch(r"layer (\d+), expert (\d+)", row["expert"]).groups())
        count = answers["position"]["counts"].sel(layer=layer)
        usual = count.sel(expert=expert).sum() / count.sum()
        here = count.sel(start=row["start"])
        assert row["value"] == pytest.approx(float(here.sel(expert=expert) / here.sum() / usual), rel=1e-3)
        assert row["n"] == int(here.sum()) / 2


def test_a_choice_shows_its_own_rows_and_says_so_under_the_title(pair):
    answers, _ = pair
    figure = next(one for one in report.report_of(answers).figures if one.kind == "paths")
    all_rows = figure.spec["datasets"]["links"]
    for choice in figure.options:
        shown = figure.shown(choice)
        wanted = [{k: v for k, v in row.items() if k != "way"} for row in all_rows if row["way"] == choice.value]
        assert shown["datasets"]["links"] == wanted
        assert shown["title"]["subtitle"] == choice.subtitle
    assert figure.shown(None) == figure.spec


def test_a_page_and_its_figures_are_made_of_one_drawing(tmp_path, monkeypatch):
    made = []
    for name in ("Drawn", "contrast_between", "answer"):
        whole = getattr(report, name)
        monkeypatch.setattr(report, name, lambda *a, n=name, f=whole, **k: made.append(n) or f(*a, **k))
    data = make_capture(documents=20)
    monkeypatch.setattr(report, "dataset_names", lambda path: ["a"])
    monkeypatch.setattr(report, "open_covered", lambda path, state: data)
    monkeypatch.setattr(report, "coverage", lambda path, name: state_of(data))
    monkeypatch.setattr(report, "measure", lambda path, name, reducers, **_: scan(data, reducers))
    monkeypatch.setattr(files, "FORMS", {"svg": files.FORMS["svg"]})
    drawn = report.write_report([tmp_path], tmp_path / "report.html")
    assert report.write_figures(drawn, tmp_path / "figures")
    assert made == ["answer", "contrast_between", *["Drawn"] * len(SECTIONS)]


def test_every_chart_is_valid_vega_lite_and_packed_tables_come_back_whole(pair):
    answers, page = pair
    figures = report.report_of(answers).figures
    packed = page_data(page)["figures"]
    for figure, page in zip(figures, packed, strict=True):
        chart = alt.Chart.from_dict({**figure.spec, "datasets": {}})  # checks the schema
        assert chart.to_dict()["title"]["text"]
        assert page["tables"] == json.loads(json.dumps(figure.spec["datasets"]))
