"""The figures on the pages are those in the result files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
CARD = (ROOT / "workers" / "tiny-mixtral" / "README.md").read_text()
FOUR_BITS = (ROOT / "docs" / "design" / "0005-four-bits.md").read_text()
FP8 = (ROOT / "docs" / "design" / "0011-fp8.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
UNITS = (1, 100, 1e-6, 1e-9, 2**-20, 2**-30)
"""Units of a figure, relative to the number in the file: itself, per cent, millions, GB, MiB, GiB."""


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def rows(page: str, columns: int) -> list[list[str]]:
    """Cells of all tables with a number of columns, without their heads."""
    found = [
        [cell.strip(" *`") for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]
    return [row for row in found if len(row) == columns and re.match(r"[<\d]|two|one", row[-1])]


def test_the_card_s_losses_are_those_of_the_result_and_well_under_the_n_grams() -> None:
    measured = result("tiny.json")["nats_per_token"]
    told = [row for row in rows(CARD, 5) if row[1][:1].isdigit()]
    assert [row[0] for row in told] == list(measured)
    for name, *values in told:
        wanted = [measured[name][model] for model in list(measured[name])[:4]]
        assert values == [f"{value:.2f}" for value in wanted]
        assert wanted[3] < min(wanted[:3]) - 0.15
        assert wanted[3] < wanted[1] - 0.35  # of all texts, as the model


def test_the_card_tells_what_was_trained_on_as_the_script_recorded_it() -> None:
    record = json.loads((ROOT / "workers" / "tiny-mixtral" / "training.json").read_text())
    told = [row for row in rows(CARD, 5) if "," in row[3]]
    assert {
        name: (int(trained.replace(",", "")), int(held.replace(",", ""))) for name, _, _, trained, held in told
    } == {name: (text["train_tokens"], text["held_out_tokens"]) for name, text in record["texts"].items()}
    for text in record["texts"].values():
        assert text["licence"] in CARD
    for said in ("seed 87", "2,000 batches", f"{record['seconds']} seconds on one H100"):
        assert said in " ".join(CARD.split())
    assert record["steps"] == 2000


def test_experts_tell_of_texts_and_tokens_beyond_chance_and_share_the_load() -> None:
    found = result("tiny.json")
    assert max(found["expert_and_data_set"]["p"]) <= 0.01
    assert all(bits > 5 * null for bits, null in zip(*list(found["expert_and_data_set"].values())[1:3], strict=True))
    texts = {name: told for name, told in found["expert_and_token"].items() if name != "what"}
    assert len(texts) == 4
    for told in texts.values():
        assert all(bits > 10 * null for bits, null in zip(told["bits"], told["by_chance"], strict=True))
    assert max(found["max_vio"]) < 0.5


def test_the_card_s_table_by_layer_is_the_result_s() -> None:
    found = result("tiny.json")
    texts = [told["bits"] for name, told in found["expert_and_token"].items() if name != "what"]
    means = [sum(bits) / len(texts) for bits in zip(*texts, strict=True)]
    wanted = [found["expert_and_data_set"]["bits"], means, found["max_vio"]]
    assert [row[1:] for row in rows(CARD, 9)[1:]] == [[f"{value:.2f}" for value in values] for values in wanted]


def percent(share: float) -> str:
    """Rounded as on the page: two significant digits below ten."""
    value = 100 * share
    return "0" if value == 0 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 1 else f"{value:.1f}"


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("float16", "float32 → float16"),
        ("bfloat16", "float32 → bfloat16"),
        ("int8, bfloat16", "float32 → int8"),
        ("NF4, routers as they are, bfloat16** (the default)", "float32 → nf4"),
        ("the same, computed in float32", "float32 → nf4, float32"),
        ("NF4, routers too, bfloat16", "float32 → nf4, gates too"),
        ("FP4, routers as they are, bfloat16", "float32 → fp4"),
        ("FP4, routers too, float16 (the notebook's)", "float32 → fp4, gates too, float16"),
    ],
)
def test_each_row_of_the_weights_table_is_the_result_s(row: str, pair: str) -> None:
    found = result("precision.json")["pairs"][pair]
    [told] = [values for name, *values in rows(FOUR_BITS, 7) if name == row]
    differ = [1 - same for same in found["same_set"]]
    first = 1 - sum(found["same_first"]) / 8
    wanted = [differ[0], differ[3], differ[7], sum(differ) / 8, first, found["differ_somewhere"]]
    assert told == [percent(round(value, 7)) for value in wanted]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("float32: batches of 64 rows → rows alone", "float32: 64 rows → rows alone"),
        ("NF4, bfloat16: the same", "nf4: 64 rows → rows alone"),
        ("float32: GPU → CPU", "float32: GPU → CPU"),
        ("NF4, float32: GPU → CPU", "nf4, float32: GPU → CPU"),
        ("bfloat16: GPU → CPU", "bfloat16: GPU → CPU"),
        ("NF4, bfloat16: GPU → CPU", "nf4: GPU → CPU"),
        ("bfloat16: grouped_mm → batched_mm", "bfloat16: grouped_mm → batched_mm"),
        ("bfloat16: grouped_mm → eager", "bfloat16: grouped_mm → eager"),
        ("NF4, bfloat16: sorted (ours) → unfused", "nf4: sorted → unfused"),
    ],
)
def test_each_row_of_the_second_table_is_the_result_s(row: str, pair: str) -> None:
    found = result("precision.json")["pairs"][pair]
    [told] = [values for name, *values in rows(FOUR_BITS, 5) if name == row]
    differ = [1 - same for same in found["same_set"]]
    tokens = round(found["differ_somewhere"] * found["tokens"])
    wanted = [percent(round(value, 7)) for value in (differ[0], differ[7], sum(differ) / 8, found["differ_somewhere"])]
    assert told == (wanted if tokens != 2 else ["0", "0", "0", "two tokens"])
    assert f"{found['tokens']:,} tokens" in FOUR_BITS


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("bf16 products → fp8 products, the same NF4 weights", "bf16 products → fp8 products"),
        ("the same, added up in float32", "bf16 products → fp8 products, added up in float32"),
        ("NF4 weights in float32 → bf16 products", "dequantized, float32 → bf16 products"),
        ("NF4 weights in float32 → fp8 products", "dequantized, float32 → fp8 products"),
        ("unquantized in float32 → NF4 weights in float32", "unquantized, float32 → dequantized, float32"),
        ("unquantized in float32 → NF4, bf16 products", "unquantized, float32 → bf16 products"),
        ("unquantized in float32 → NF4, fp8 products", "unquantized, float32 → fp8 products"),
    ],
)
def test_what_fp8_changes_at_full_width_is_the_result_s(row: str, pair: str) -> None:
    found = result("gpu-fp8-fidelity.json")["full_width"]
    [told] = [values for name, *values in rows(FP8, 6) if name == row]
    assert told == [percent(router[pair]["differ"]) for router in found]
    assert {router["tokens"] for router in found} == {32_768}
    assert all(router["two_runs_equal"] for router in found)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("bfloat16", "float32 → bfloat16"),
        ("fp8, bf16", "float32 → fp8"),
        ("fp8, fp8", "float32 → fp8, fp8 products"),
        ("NF4, bf16", "float32 → nf4"),
        ("NF4, fp8", "float32 → nf4, fp8 products"),
    ],
)
def test_what_fp8_changes_in_the_tiny_model_is_the_result_s(row: str, pair: str) -> None:
    found = result("fp8-tiny.json")["tiny"][pair]
    [told] = [values for name, *values in rows(FP8, 6) if name == row]
    differ = [1 - same for same in found["same_set"]]
    wanted = [differ[0], differ[3], differ[7], sum(differ) / 8, found["differ_somewhere"]]
    assert told == [percent(round(value, 7)) for value in wanted]
    assert f"({found['tokens']:,} tokens)" in FP8


def test_the_speeds_in_fp8_are_the_result_s() -> None:
    measured = result("gpu-fp8.json")["rows"]
    for what, tokens, rate, ratio, memory in rows(FP8, 5):
        weights, matmul = (name.lower() for name in what.split(", ")[:2])
        system = "fp8 captured" + ", added up in float32" * ("added" in what) if matmul == "fp8" else "captured"
        wanted = {"system": system, "weights": weights, "matmul": matmul, "tokens": int(tokens.replace(",", ""))}
        [row] = [row for row in measured if wanted.items() <= row.items()]
        assert rate == f"{row['tokens_per_s']:,}"
        assert ratio in ("", f"{row.get('ratio_to_fp8 gemms', 0):.3f}")
        if matmul == "fp8":  # the file has a note about the other
            assert memory == f"{row['peak_gib']:.1f} GiB"


def test_the_proof_s_counts_in_fp8_are_the_result_s() -> None:
    found = result("gpu-fp8-fidelity.json")["proof"]
    assert {"tiny, fp8", "full width, fp8", "tiny, bf16", "full width, bf16"} == found.keys()
    for one in found.values():
        assert (one["false_alarms"], one["missed"]) == (0, {"batch": 0, "layer": 0})
        assert one["least_share_of_a_sample_with_the_same_set"] == 1
    planted = sum(sum(found[f"{model}, fp8"]["planted"].values()) for model in ("tiny", "full width"))
    assert f"{planted:,} planted faults" in " ".join(FP8.split())
    largest = [
        max(found[f"{model}, {way}"]["largest_relative_difference_of_a_weight"] for model in ("tiny", "full width"))
        for way in ("bf16", "fp8")
    ]
    assert f"{largest[0]:.1%} with bf16 and {largest[1]:.1%} with fp8".replace("%", " %") in " ".join(FP8.split())


def test_the_page_of_inference_tells_the_rejections_of_the_result() -> None:
    page, found = (ROOT / "docs" / "design" / "0010-inference.md").read_text(), result("inference.json")
    told = [row for row in rows(page, 13) if "/" in row[2]]
    heads = [
        (5, 5),
        (5, 50),
        (8, 8),
        (8, 400),
        (12, 12),
        (12, 100),
        (20, 20),
        (20, 100),
        (50, 50),
        (50, 400),
        (100, 100),
    ]
    assert len(told) == 12
    for length, spread, *cells in told:
        of = {
            tuple(row["documents"]): f"{100 * row['rejected']:.1f} / {100 * row['rejected_by_shuffling']:.1f}"
            for row in found["rejections"]
            if (row["lengths"], row["spread"]) == (length, spread)
        }
        assert cells == [of[head] for head in heads]
    for row in found["rejections"]:  # two simulation errors, of those that were tested, beside 3 to 7 %
        tested = row["simulations"] * (1 - row["untested"])
        assert (
            0.03 - 2 * (0.03 * 0.97 / tested) ** 0.5 <= row["rejected"] <= 0.07 + 2 * (0.07 * 0.93 / tested) ** 0.5
        ), row


def test_the_page_of_inference_tells_how_often_equal_means_are_told_apart() -> None:
    page, found = (ROOT / "docs" / "design" / "0010-inference.md").read_text(), result("means.json")["means"]
    told = {tuple(row[:3]): row[3:] for row in rows(page, 5) if row[1] in ("equal", "unequal")}
    for row in found:
        head = ", ".join(map(str, row["documents"])), row["lengths"], ", ".join(map(str, row["spreads"]))
        cell = f"{100 * row['rejected']:.1f} / {100 * row['student']:.1f}"
        assert told[head][(8, 256).index(row["cells"])] == cell
        tested = row["simulations"] * (1 - row["untested"])
        assert row["rejected"] <= 0.05 + 3 * (0.05 * 0.95 / tested) ** 0.5, row
    assert len(told) == len(found) / 2


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a result, including those in its texts and names."""
    if isinstance(value, dict):
        yield from (number for pair in value.items() for part in pair for number in numbers(part))
    elif isinstance(value, list):
        yield from (number for part in value for number in numbers(part))
    elif isinstance(value, str):
        yield from (float(number) for number in re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float):
        yield float(value)


def figures(page: str) -> Iterator[tuple[str, str]]:
    """A result file and a figure for each table row that names a file, or is below one that does.

    Only figures with a comma, or with a point from 1.1 on: smaller ones are shares, which other tests compute.
    """
    name = ""
    for line in page.splitlines():
        name = "" if line.startswith("#") else (re.findall(r"([\w-]+\.json)", line) or [name])[-1]
        for figure in re.findall(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+\.\d+)(?![\w.])", line):
            if line[:1] == "|" and name and float(figure.replace(",", "")) >= 1.1:
                yield name, figure


def held(figure: str, values: list[float]) -> bool:
    """Whether a value rounds to the figure, in one of the units."""
    digits = figure.replace(",", "")
    step = 10.0 ** -len(digits.partition(".")[2]) if "." in digits else 10.0 ** (len(digits) - len(digits.rstrip("0")))
    return any(abs(value * unit - float(digits)) <= step * 0.5001 for value in values for unit in UNITS)


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/recording.md"])
def test_each_figure_of_a_table_is_in_the_file_that_it_names(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    of = {name: list(numbers(result(name))) for name in {name for name, _ in figures(text)}}
    wrong = [(name, figure) for name, figure in figures(text) if not held(figure, of[name])]
    assert not wrong
    assert len(of) >= (1 if page == "docs/recording.md" else 3)


def test_a_figure_that_is_in_no_file_is_found() -> None:
    [one] = figures("| a | 24,235 tokens/s | [x](results/gpu-engine.json) |")
    assert one == ("gpu-engine.json", "24,235")
    assert not held("24,235", list(numbers(result("gpu-engine.json"))))


def test_the_shares_of_the_products_alone_are_the_results() -> None:
    for name, product in (("gpu-engine.json", "gemms"), ("gpu-fp8.json", "fp8 gemms")):
        ratios = {
            f"{row['tokens_per_s']:,}": row.get(f"ratio_to_{product}")
            for row in result(name)["rows"]
            if "tokens_per_s" in row
        }
        told = re.findall(r"\| ([\d,]+) \| (0\.\d{3}) \|", PERFORMANCE)
        assert sum(rate in ratios and abs(ratios[rate] - float(share)) < 5.1e-4 for rate, share in told) == 3
    families = result("gpu-families.json")["rows"]
    told = rows(PERFORMANCE, 7)
    assert len(told) == 7
    for model, products, tokens, rate, other, share, memory in told:
        of = {
            row["system"]: row
            for row in families
            if row["model"] == model.partition(",")[0].lower()
            and row["tokens"] == int(tokens.replace(",", ""))
            and (row["matmul"] == products or row["system"].startswith("transformers"))
        }
        captured, alone, stock = of["captured"], of["products alone"], of["transformers, grouped_mm"]
        assert (rate, other) == (f"{captured['tokens_per_s']:,}", f"{stock['tokens_per_s']:,}")
        assert float(share) == round(captured["tokens_per_s"] / alone["tokens_per_s"], 2)
        assert abs(float(memory) - captured["peak_gib"]) < 0.051


NAMES = {"bfloat16": "bfloat16", "int8, bfloat16": "int8", "NF4, routers too, bfloat16": "nf4, gates too"}
NAMES |= {"FP4, routers as they are, bfloat16": "fp4"}
NAMES |= dict.fromkeys(("NF4, bfloat16 (the default on a GPU)",), "nf4")
NAMES |= {"NF4, routers as they are, bfloat16 (the default on a GPU)": "nf4"}
FP4 = "fp4, gates too, float16"
NAMES |= {"FP4, routers too, float16 (the preset notebook)": FP4}
NAMES |= {"FP4 with quantized routers, float16 (the preset notebook)": FP4}


@pytest.mark.parametrize(("page", "many"), [("models.md", 6), ("trust.md", 6)])
def test_the_pages_for_users_tell_what_precision_changes_as_the_results_do(page: str, many: int) -> None:
    pairs = result("precision.json")["pairs"]
    pairs |= {
        f"float32 → {name}": pair
        for name, pair in (
            ("fp8, bf16 products", result("fp8-tiny.json")["tiny"]["float32 → fp8"]),
            ("NF4, fp8 products", result("fp8-tiny.json")["tiny"]["float32 → nf4, fp8 products"]),
        )
    }
    told = 0
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        name, *cells = [cell.strip(" `").replace("`", "") for cell in line.strip("|").split("|")]
        pair = pairs.get(f"float32 → {NAMES.get(name, name)}")
        if pair and cells and cells[0][:1].isdigit():
            differ = [1 - same for same in pair["same_set"]]
            mean, some = sum(differ) / 8, pair["differ_somewhere"]
            wanted = [differ[0], differ[3], differ[7], mean, some] if page == "models.md" else [mean, some]
            assert cells[: len(wanted)] == [percent(round(value, 7)) for value in wanted], name
            told += 1
    assert told == many


def test_the_readme_fits_a_screen_and_a_half_and_its_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 8192
    assert "ray job submit -- python jobs/capture.py --dataset wikitext-103" in readme
    assert not [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not (ROOT / link).exists()]


def test_the_page_about_trust_tells_what_the_simulations_show() -> None:
    page = " ".join((ROOT / "docs" / "trust.md").read_text(encoding="utf-8").split())
    simulated = [100 * row["rejected"] for row in result("inference.json")["rejections"]]
    usual, many = sum(3 <= rejected <= 7 for rejected in simulated), len(simulated)
    wanted = f"p ≤ 0.05 in {min(simulated):.1f} to {max(simulated):.1f} %; in {usual} of the {many} between 3 and 7 %"
    assert wanted in page
    means = [round(100 * row["rejected"], 1) for row in result("means.json")["means"]]
    assert f"p ≤ 0.05 in {min(means)} to {max(means)} %" in page
    equal = [
        100 * row["rejected"]
        for row in result("inference.json")["rejections"]
        if row["lengths"] == "200" and min(row["documents"]) >= 8
    ]
    assert "in 3 to 6 % of simulated equal data sets" in page
    assert 2.95 < min(equal) < 3.5
    assert 5.5 < max(equal) < 6.5
    proof = result("gpu-fp8-fidelity.json")["proof"]
    planted = sum(sum(proof[f"{model}, fp8"]["planted"].values()) for model in ("tiny", "full width"))
    assert f"none of {planted:,} planted faults was missed" in page


def test_the_readme_counts_the_families_as_the_survey_did() -> None:
    families = result("families-survey.json")["families"]
    captured = sum(any(one["outcome"] == "captured" for one in each.values()) for each in families.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Of {len(families)} model types in transformers 5.23, {captured} were captured" in readme


def test_the_page_about_reliability_counts_what_chaos_did() -> None:
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    rows_of = {row["what"].partition(":")[0]: row for row in result("chaos.json")["tests"]["rows"]}
    assert all(row["times"] == row["survived"] for row in rows_of.values())
    kinds = {"every interleaving": "interleavings", "power lost": "power losses", "bad input": "bad inputs"}
    kinds |= {"killed at each write": "kills at a write", "workers come, go and break": "failures of workers"}
    for name, told in kinds.items():
        assert f"{rows_of[name]['times']:,} {told}" in page


def test_the_page_of_metrics_names_every_function_that_computes_one() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = (ROOT / "analysis" / "__init__.pyi").read_text(encoding="utf-8")
    names = re.findall(r"^from \.(?:metrics|statistics)\.\w+ import ([a-z]\w+)", listed, re.MULTILINE)
    assert len(names) > 50
    assert not [name for name in names if f"`{name}" not in page and f"`{name.removesuffix('_of')}" not in page]
